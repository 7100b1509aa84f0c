"""A proxy between the daemon and its object store that reads the requests: some fail, vanish, or have no answer.

Which ones, a test says by `fault`: what is to happen to the requests that match, and how often. What no fault takes is
passed on. What it has from `Wire` (cut, freeze, thaw, refuse) is for all at once. Every client of the store goes
through it: ours and deltalake's.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

from tests.support.proxy import Wire

_TO_SERVER: Final = b"connection: close\r\n"
_CLOSE: Final = re.compile(rb"(?im)^connection: *close\r\n")


class Request(NamedTuple):
    """One request, as far as it is known before its body has come."""

    method: str
    path: str
    """With its query, decoded: `/bucket/shop/_cdc/lease.json`."""
    length: int


@dataclass(slots=True)
class Fault:
    """What happens to requests that match. `kind`: `says` an error instead of an answer; `reset` in the midst of the
    body; `lost`: passed on, and the connection is reset before the answer; `held`: taken and not passed on before
    `release`, whether its client still waits or not."""

    kind: str
    matches: Callable[[Request], bool]
    times: int
    share: float = 1.0
    status: int = 0
    code: str = ""
    hits: int = 0

    @property
    def is_over(self) -> bool:
        return self.hits >= self.times


class StoreProxy(Wire):
    """Forwards to the S3 server at a URL; `endpoint` leads through it."""

    def __init__(self, url: str, seed: int = 0) -> None:
        parts = urlsplit(url)
        super().__init__(str(parts.hostname), int(parts.port or 80))
        self._faults: list[Fault] = []
        self._rng = random.Random(seed)
        self._held = asyncio.Event()
        self.requests: list[Request] = []
        """All that came, in order."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fault(
        self, kind: str, method: str = "", path: str = "", *, times: int = 1, share: float = 1.0,
        longer_than: int = -1, status: int = 503, code: str = "SlowDown",
    ) -> Fault:  # fmt: skip
        """Let it happen to the next `times` requests with this method (empty: any) whose path has a match of this
        pattern; only to a `share` of them; only to those with more bytes than `longer_than`."""
        pattern = re.compile(path)
        made = Fault(
            kind,
            lambda r: method in ("", r.method) and pattern.search(r.path) is not None and r.length > longer_than,
            times, share, status, code,
        )  # fmt: skip
        self._call(lambda: self._faults.append(made))
        return made

    def heal(self) -> None:
        """No faults any more; what is held is released."""

        def change() -> None:
            self._faults.clear()
            self._held.set()
            self._held = asyncio.Event()

        self._call(change)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._refusing:
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            while await self._exchange(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the other side has gone, or the block ends
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False if the connection ends."""
        head = await reader.readuntil(b"\r\n\r\n")
        words, *lines = head[:-4].split(b"\r\n")
        method, path, _ = words.decode().split(" ")
        fields = {n.strip().lower(): v.strip() for n, _, v in (line.partition(b":") for line in lines)}
        request = Request(method, unquote(path), int(fields.get(b"content-length", b"0")))
        self.requests.append(request)
        fault = self._take(request)
        if fields.get(b"expect") == b"100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault is not None and fault.kind == "reset":
            await reader.readexactly(request.length // 2)
            writer.transport.abort()
            return False
        body = await reader.readexactly(request.length)
        if fault is not None and fault.kind == "held":
            await self._held.wait()
        await self._open_gate.wait()
        if fault is not None and fault.kind == "says":
            writer.write(_error(fault.status, fault.code))
            await writer.drain()
            return True
        kept = [line for line in lines if not line.lower().startswith((b"connection:", b"expect:"))]
        answer = await self._ask(b"\r\n".join([words, *kept]) + b"\r\n" + _TO_SERVER + b"\r\n" + body)
        if fault is not None and fault.kind == "lost":
            writer.transport.abort()
            return False
        await self._open_gate.wait()
        writer.write(answer)
        await writer.drain()
        return method == "HEAD" or b"\r\ncontent-length:" in answer.partition(b"\r\n\r\n")[0].lower()

    def _take(self, request: Request) -> Fault | None:
        for fault in self._faults:
            if not fault.is_over and fault.matches(request) and self._rng.random() < fault.share:
                fault.hits += 1
                return fault
        return None

    async def _ask(self, request: bytes) -> bytes:
        """The server's whole answer. A connection for each request: its end is the answer's."""
        reader, writer = await asyncio.open_connection(*self._target)
        try:
            writer.write(request)
            await writer.drain()
            # The connection to the client goes on: that this one ends is no business of its.
            return _CLOSE.sub(b"", await reader.read(), count=1)
        finally:
            writer.close()


def _error(status: int, code: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {code}\r\ncontent-type: application/xml\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body
