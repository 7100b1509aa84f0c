"""A TCP proxy between the daemon and a server: connections can be cut, frozen and refused from a test.

It runs an asyncio loop in a thread of its own. Frozen means that no byte passes in either direction while both sides
keep their connection, as with a network that drops packets: also if one of them dies meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo


class Wire:
    """Forwards to a server while the block runs."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._open_gate = asyncio.Event()
        self._open_gate.set()
        self._refusing = False
        self._server: asyncio.Server | None = None
        self.accepted = 0
        """Connections taken so far."""

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""
        assert self._server is not None, "not started"
        return int(self._server.sockets[0].getsockname()[1])

    def cut(self) -> None:
        """Reset every connection; new ones are taken."""
        self._call(self._abort)

    def freeze(self) -> None:
        """Let nothing through any more, on old and new connections."""
        self._call(self._open_gate.clear)

    def thaw(self) -> None:
        """Let everything through again that was held back."""
        self._call(self._open_gate.set)

    def refuse(self, refusing: bool = True) -> None:
        """Reset every connection, and each new one at once, until told otherwise."""

        def change() -> None:
            self._refusing = refusing
            self._abort()

        self._call(change)

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    def _call(self, change: Callable[[], None]) -> None:
        """Run in the loop, and return when it is done."""

        async def run() -> None:
            change()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _end(self) -> None:
        assert self._server is not None
        self._server.close()
        self._open_gate.set()
        self._abort()
        others = asyncio.all_tasks(self._loop) - {asyncio.current_task(self._loop)}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._refusing:
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, server_writer}
        self._writers |= pair
        try:
            await asyncio.gather(self._pump(reader, server_writer), self._pump(server_reader, writer))
        finally:
            self._writers -= pair

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._open_gate.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            # The news that the other side is gone does not pass either.
            await self._open_gate.wait()
            writer.transport.abort() if writer.transport.is_closing() else writer.close()


class Proxy(Wire):
    """Forwards to the server of a DSN; `dsn` leads through it."""

    def __init__(self, dsn: str) -> None:
        self._dsn = conninfo_to_dict(dsn)
        super().__init__(str(self._dsn["host"]), int(str(self._dsn["port"])))

    @property
    def dsn(self) -> str:
        return make_conninfo("", **{**self._dsn, "host": "127.0.0.1", "port": self.port})
