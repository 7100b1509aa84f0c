"""A server that sends bytes instead of answers, so that a test can say what no HTTP library would."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType


class RawServer:
    """`with RawServer() as server:`; each request is answered with `server.answer`, and then the connection is closed,
    unless `keeps`. `requests` counts those that came whole."""

    def __init__(self) -> None:
        self.answer = b""
        self.keeps = False
        self.requests = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> RawServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer, suppress(OSError):
                peer.settimeout(10)
                with peer.makefile("rb") as wire:
                    while self._is_request(wire):
                        self.requests += 1
                        peer.sendall(self.answer)
                        if not self.keeps:
                            break

    @staticmethod
    def _is_request(wire: socket.SocketIO) -> bool:
        if not wire.readline():
            return False
        length = 0
        while line := wire.readline().strip():
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        wire.read(length)
        return True
