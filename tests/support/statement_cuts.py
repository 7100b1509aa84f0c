"""A wire between a Postgres client and its server that breaks at the n-th message of the client, for any n.

It understands just enough of the protocol to count: the first message has no type byte, the others have one and their
length. TLS and GSS must be off. Each break is one of two: the message does not arrive (`LOST_ASKING`), or it arrives,
and what the server answers does not (`LOST_ANSWER`): of a COMMIT, the client then does not know what became of it.
"""

from __future__ import annotations

import asyncio

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.support.proxy import Wire

LOST_ASKING, LOST_ANSWER = "lost asking", "lost answer"


class CuttingWire(Wire):
    """Forwards to the server of a DSN; `arm` sets the next break. Connections that have been cut stay dead, later ones
    are whole until it is armed again."""

    def __init__(self, dsn: str) -> None:
        self._dsn = conninfo_to_dict(dsn)
        super().__init__(str(self._dsn["host"]), int(str(self._dsn["port"])))
        self._left: int | None = None
        self._how = ""
        self.seen = 0
        """Messages of clients since it was armed."""
        self.cuts = 0

    @property
    def dsn(self) -> str:
        changed = {"host": "127.0.0.1", "port": self.port, "sslmode": "disable", "gssencmode": "disable"}
        return make_conninfo("", **{**self._dsn, **changed})

    def arm(self, message: int | None, how: str = LOST_ASKING) -> None:
        """Break at this message of the client, counted from now and from 1; None: never, only count."""

        def change() -> None:
            self._left, self._how, self.seen = message, how, 0

        self._call(change)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, server_writer}
        self._writers |= pair
        deaf = asyncio.Event()
        try:
            await asyncio.gather(
                self._asking(reader, server_writer, writer, deaf), self._answering(server_reader, writer, deaf)
            )
        finally:
            self._writers -= pair
            for one in pair:
                one.transport.abort()

    async def _asking(
        self,
        reader: asyncio.StreamReader,
        server: asyncio.StreamWriter,
        client: asyncio.StreamWriter,
        deaf: asyncio.Event,
    ) -> None:
        typed = False
        try:
            while True:
                head = await reader.readexactly(5 if typed else 4)
                body = await reader.readexactly(int.from_bytes(head[-4:], "big") - 4)
                typed = True
                self.seen += 1
                if self._left == self.seen:
                    self._left = None
                    self.cuts += 1
                    if self._how == LOST_ASKING:
                        client.transport.abort()
                        server.transport.abort()
                        return
                    deaf.set()
                server.write(head + body)
                await server.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            if not deaf.is_set():
                server.close()  # the server learns of it as of any client that has gone

    async def _answering(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter, deaf: asyncio.Event) -> None:
        try:
            while data := await reader.read(1 << 16):
                if deaf.is_set():
                    break  # the answer has been given, so the server has done what it was asked
                client.write(data)
                await client.drain()
        except OSError:
            pass
        finally:
            client.transport.abort()
