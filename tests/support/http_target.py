"""A service over HTTP that behaves as badly as real ones, in a thread beside the test, and keeps account of it.

It holds rows (`rows`), applies an effect once per idempotency key however often it comes (`effects` in order,
`duplicates` counts the rest), and refuses rows whose value begins with "bad" for good. Faults strike what a test says
(`next_faults`), or a share of all requests, drawn from a seed (`chaos`). Paths: `/rows` one row, `/rows/KEY` with
DELETE, `/batch` several with an outcome each, `/whole` several of which all are refused if one is; anything else by
`answers`.
"""

from __future__ import annotations

import json
import random
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final
from urllib.parse import unquote

BEFORE: Final = ("429", "500", "503", "early")
"""Faults without an effect."""
AFTER: Final = ("cut", "half", "mute", "drip", "garbage", "502")
"""Faults after the effect: no answer, half of one, one that never comes or never ends, no JSON, another's error."""
ITEMS: Final = ("short", "blank")
"""Faults of an answer with outcomes: too few of them, or such that say nothing. The effect is there."""


@dataclass(slots=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(slots=True)
class Reply:
    status: int
    content: Any = None
    headers: dict[str, str] = field(default_factory=dict)


class HttpTargetServer:
    """`with HttpTargetServer() as server:`; `server.url`. `answers` replies to paths that are not ours."""

    def __init__(
        self, *, answers: Callable[[Request], Reply] | None = None, tls: ssl.SSLContext | None = None, drip_s: float = 3
    ) -> None:
        self.rows: dict[str, Any] = {}
        self.effects: list[tuple[str, Any]] = []
        """Key and value (None: removed), in order."""
        self.duplicates = 0
        self.requests: list[Request] = []
        self.next_faults: list[str] = []
        self.struck: list[str] = []
        self.most_at_once = 0
        self._answers = answers
        self._seen: set[str] = set()
        self._lock = threading.RLock()
        self._chaos: tuple[random.Random, float, Sequence[str]] | None = None
        self._active = 0
        self._end = threading.Event()
        self._drip_s = drip_s
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30
            disable_nagle_algorithm = True

            def log_message(self, *args: Any) -> None:
                pass

            def _do(self) -> None:
                outer._handle(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _do

        self._server = _Quiet(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.url = f"{'http' if tls is None else 'https'}://{'127.0.0.1' if tls is None else 'localhost'}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> HttpTargetServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def chaos(self, seed: int, share: float, kinds: Sequence[str]) -> None:
        """From now on a share of all requests is struck by one of these faults; 0: none."""
        with self._lock:
            self._chaos = (random.Random(seed), share, kinds) if share else None

    @property
    def count(self) -> int:
        """Requests that came whole."""
        return len(self.requests)

    # ------------------------------------------------------------------ one request

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(length)
        request = Request(handler.command, handler.path, {n.lower(): v for n, v in handler.headers.items()}, body)
        with self._lock:
            self.requests.append(request)
            self._active += 1
            self.most_at_once = max(self.most_at_once, self._active)
            fault = self._draw()
            if fault:
                self.struck.append(fault)
        try:
            self._answer(handler, request, fault)
        except OSError:
            handler.close_connection = True  # the client has gone
        finally:
            with self._lock:
                self._active -= 1

    def _draw(self) -> str:
        if self.next_faults:
            return self.next_faults.pop(0)
        if self._chaos is None:
            return ""
        rng, share, kinds = self._chaos
        return rng.choice(list(kinds)) if rng.random() < share else ""

    def _answer(self, handler: BaseHTTPRequestHandler, request: Request, fault: str) -> None:
        if fault == "early":
            handler.close_connection = True
            return
        if fault.partition(":")[0] in ("429", "500", "503"):
            status, _, after = fault.partition(":")
            headers = {"Retry-After": after} if after else {}
            self._write(handler, Reply(int(status), {"error": "later"}, headers))
            return
        if fault.startswith("redirect:"):
            status, _, where = fault.removeprefix("redirect:").partition(":")
            self._write(handler, Reply(int(status), None, {"Location": where}))
            return
        reply = self._reply(request)
        if fault == "cut":
            handler.close_connection = True
        elif fault == "502":
            self._write(handler, Reply(502, {"error": "a proxy gave up"}))
        elif fault == "garbage":
            self._write(handler, Reply(reply.status, b'<html>{"ok": tru'))
        elif fault == "mute":
            self._end.wait(self._drip_s)
            handler.close_connection = True
        elif fault in ("half", "drip"):
            self._write_badly(handler, reply, drips=fault == "drip")
        else:
            if fault in ITEMS and isinstance(reply.content, dict) and "outcomes" in reply.content:
                outcomes = reply.content["outcomes"]
                reply.content["outcomes"] = outcomes[:-1] if fault == "short" else [{"id": 1} for _ in outcomes]
            self._write(handler, reply)

    def _write(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        data = reply.content if isinstance(reply.content, bytes) else json.dumps(reply.content).encode()
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _write_badly(self, handler: BaseHTTPRequestHandler, reply: Reply, *, drips: bool) -> None:
        data = json.dumps(reply.content).encode()
        handler.close_connection = True
        if not drips:
            handler.send_response(reply.status)
            handler.send_header("Content-Length", str(len(data) + 10))
            handler.end_headers()
            handler.wfile.write(data[: len(data) // 2])
            return
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        rounds = int(self._drip_s / 0.05)
        while rounds and not self._end.wait(0.05):
            handler.wfile.write(b"a")
            handler.wfile.flush()
            rounds -= 1

    # ------------------------------------------------------------------ effects

    def _reply(self, request: Request) -> Reply:
        if request.path.partition("/")[2].split("/")[0] in ("rows", "batch", "whole"):
            with self._lock:
                return self._apply(request)
        return self._answers(request) if self._answers is not None else Reply(404, {"error": "no such path"})

    def _apply(self, request: Request) -> Reply:
        path = request.path
        if path == "/rows":
            row = request.json
            refusal = self._take(request.headers["idempotency-key"], row["key"], row["value"])
            return Reply(422, {"ok": False, "error": refusal}) if refusal else Reply(200, {"ok": True})
        if path.startswith("/rows/"):
            return self._remove(request.headers["idempotency-key"], unquote(path.removeprefix("/rows/")))
        if path == "/batch":
            told = [self._take(row["id"], row["key"], row["value"]) for row in request.json["inputs"]]
            return Reply(207, {"outcomes": [{"ok": not t, **({"error": t} if t else {})} for t in told]})
        rows = request.json["inputs"]
        if any(str(row["value"]).startswith("bad") for row in rows):
            return Reply(400, {"ok": False, "error": "one of them is bad"})
        for row in rows:
            self._take(row["id"], row["key"], row["value"])
        return Reply(200, {"ok": True})

    def _take(self, idempotency_key: str, key: str, value: Any) -> str:
        """Why the row is refused; empty: it was taken, now or before."""
        if str(value).startswith("bad"):
            return "the value is bad"
        if self._is_new(idempotency_key):
            self.rows[key] = value
            self.effects.append((key, value))
        return ""

    def _remove(self, idempotency_key: str, key: str) -> Reply:
        if self._is_new(idempotency_key):
            if key not in self.rows:
                return Reply(404, {"error": "no such row"})
            del self.rows[key]
            self.effects.append((key, None))
        return Reply(200, {"ok": True})

    def _is_new(self, idempotency_key: str) -> bool:
        if idempotency_key in self._seen:
            self.duplicates += 1
            return False
        self._seen.add(idempotency_key)
        return True


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that are cut are what this is for."""


__all__ = ["AFTER", "BEFORE", "ITEMS", "HttpTargetServer", "Reply", "Request"]
