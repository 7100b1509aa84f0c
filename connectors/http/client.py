"""Sends one request and reads its answer, within bounds of time and size; decides nothing about rows.

Guarantees: the address that is connected to is an allowed one (connectors.http.addresses), TLS is verified, a request
ends within `request_timeout_s` however slowly its answer drips, at most ANSWER_BYTES_MAX of an answer are read, and a
redirect is followed only if the operator wants it, with method and body, and within the same scheme, host and port.
Neither bodies nor paths are in any message. Thread-safe. Resolving a name is bounded by the system's resolver.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPResponse
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from cdc.config_serving import TargetConfig
from cdc.errors import TargetRejected, TargetUnavailable
from connectors.http.addresses import connect

ANSWER_BYTES_MAX: Final = 10 << 20
REDIRECTS_MAX: Final = 5
_CHUNK: Final = 64 << 10
_FOLLOWED: Final = (307, 308)
"""Redirects that keep method and body."""


class Unanswered(Exception):
    """No whole answer came. `sent`: the request may have had an effect all the same."""

    def __init__(self, what: str, *, sent: bool) -> None:
        super().__init__(what)
        self.sent = sent


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    """Any case."""
    body: bytes


class _Watch:
    """The time of one request. When it is over, its connection is cut, whatever waits on it."""

    def __init__(self) -> None:
        self.over = False
        self.sent = False
        self._lock = threading.Lock()
        self._connection: HTTPConnection | None = None
        self._done = False

    def uses(self, connection: HTTPConnection) -> None:
        with self._lock:
            self._connection = connection
            if self.over:
                raise TimeoutError

    def end(self) -> None:
        with self._lock:
            self._done = True

    def strike(self) -> None:
        with self._lock:
            self.over = not self._done
            sock = self._connection.sock if self._connection is not None and self.over else None
            if sock is not None:
                with suppress(OSError):
                    # Of an SSLSocket too: its own shutdown would have the reader go on without TLS.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)


class _Gate:
    """What connections need to know: where they may lead, and whose time they take."""

    def __init__(self, config: TargetConfig) -> None:
        self._config = config
        self._here = threading.local()

    @contextmanager
    def watched(self, limit_s: float) -> Iterator[_Watch]:
        watch = self._here.watch = _Watch()
        timer = threading.Timer(limit_s, watch.strike)
        timer.daemon = True
        timer.start()
        try:
            yield watch
        finally:
            watch.end()
            timer.cancel()

    def open(self, connection: HTTPConnection) -> socket.socket:
        host = connection.host.strip("[]")
        limit_s = self._config.connect_timeout_s
        return connect(
            self._config.name, host, connection.port, allow_private=self._config.allow_private, timeout_s=limit_s
        )

    def uses(self, connection: HTTPConnection) -> None:
        self._here.watch.uses(connection)

    def sends(self) -> None:
        self._here.watch.sent = True


class _Final(HTTPResponse):
    """http.client's, which takes every answer but 100 for the final one; those before it say nothing of a request
    (RFC 9110, 15.2). After 101 the connection speaks something else, so nothing follows."""

    def begin(self) -> None:
        super().begin()
        while 100 <= self.status < 200 and self.status != HTTPStatus.SWITCHING_PROTOCOLS:
            self.headers = self.msg = None  # type: ignore[assignment]
            super().begin()


class _Gated:
    """What both kinds of connections do beside urllib3's."""

    gate: _Gate
    sock: socket.socket | None
    response_class: type[HTTPResponse] = _Final

    def _new_conn(self) -> socket.socket:
        return self.gate.open(self)  # type: ignore[arg-type]

    def connect(self) -> None:
        self.gate.uses(self)  # type: ignore[arg-type]
        super().connect()  # type: ignore[misc]
        self.gate.uses(self)  # type: ignore[arg-type]

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is None:
            self.connect()
        self.gate.uses(self)  # type: ignore[arg-type]
        self.gate.sends()
        super().request(*args, **kwargs)  # type: ignore[misc]


class _Plain(_Gated, HTTPConnection):
    def __init__(self, *args: Any, gate: _Gate, **kwargs: Any) -> None:
        self.gate = gate
        super().__init__(*args, **kwargs)


class _Secure(_Gated, HTTPSConnection):
    def __init__(self, *args: Any, gate: _Gate, **kwargs: Any) -> None:
        self.gate = gate
        super().__init__(*args, **kwargs)


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Plain


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Secure


class Client:
    """Requests to one target. TargetRejected if its url or `ca_file` cannot be used. Connects at first use."""

    def __init__(self, config: TargetConfig) -> None:
        self._config = config
        self._where = f"target {config.name}"
        parts = urlsplit(config.url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise TargetRejected(f"{self._where}: url is no address to append paths to", hint="write https://HOST/PATH")
        self.is_secure = parts.scheme == "https"
        self._origin = (parts.scheme, host, port or (443 if self.is_secure else 80))
        self._base = parts.path.rstrip("/")
        self._gate = _Gate(config)
        # One more than is needed at once, so that nobody waits for a connection.
        options: dict[str, Any] = {"maxsize": config.in_flight + 1, "block": True, "gate": self._gate}
        timeout = urllib3.Timeout(connect=config.connect_timeout_s, read=config.request_timeout_s)
        self._trusted: dict[str, Any] = {"ssl_context": self._trust()} if self.is_secure else {}
        pool = _SecurePool if self.is_secure else _PlainPool
        self._pool = pool(host, self._origin[2], timeout=timeout, retries=False, **options, **self._trusted)

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
        """The answer, whatever it says. Blocks up to the connect and request time-outs. Unanswered if none came,
        TargetRejected if the address, the certificate or a redirect is one that only an operator can mend."""
        at = f"{self._base}{path}" or "/"
        at = at if at.startswith("/") else f"/{at}"
        for _ in range(REDIRECTS_MAX + 1):
            answer = self._exchange(method, at, headers, body)
            if not 300 <= answer.status < 400:
                return answer
            at = self._redirected(answer, at)
        raise TargetRejected(
            f"{self._where}: more than {REDIRECTS_MAX} redirects",
            hint=f"correct the url of [target.{self._config.name}]",
        )

    def reach(self) -> None:
        """Connect, with TLS if the url asks for it, and send nothing. TargetUnavailable, TargetRejected."""
        with self._gate.watched(self._config.connect_timeout_s * 2), self._translated():
            _, host, port = self._origin
            timeout_s = self._config.connect_timeout_s
            connection = self._pool.ConnectionCls(host, port, timeout=timeout_s, gate=self._gate, **self._trusted)
            try:
                connection.connect()
            finally:
                connection.close()

    def close(self) -> None:
        """Close idle connections; idempotent."""
        self._pool.close()

    def _trust(self) -> ssl.SSLContext:
        file = self._config.ca_file
        try:
            return ssl.create_default_context(cafile=None if file is None else str(file))
        except OSError as e:
            raise TargetRejected(f"{self._where}: ca_file {file} cannot be used: {e.strerror or 'no certificates'}",
                              hint="it holds certificates in PEM") from e  # fmt: skip

    def _exchange(self, method: str, at: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
        with self._gate.watched(self._config.request_timeout_s) as watch, self._translated(watch):
            response = self._pool.urlopen(
                method, at, body=body, headers={"Accept-Encoding": "identity", "User-Agent": "cdc", **headers},
                redirect=False, preload_content=False,
            )  # fmt: skip
            whole = False
            try:
                read = bytearray()
                for chunk in response.stream(_CHUNK):
                    read += chunk
                    if len(read) > ANSWER_BYTES_MAX:
                        raise Unanswered(f"an answer of more than {ANSWER_BYTES_MAX >> 20} MB", sent=True)
                whole = not watch.over
            finally:
                if not whole:
                    response.close()
                response.release_conn()
            if watch.over:
                raise TimeoutError
            return Answer(response.status, response.headers, bytes(read))

    def _redirected(self, answer: Answer, at: str) -> str:
        """Where a redirect leads, if it may be followed."""
        setting = f"[target.{self._config.name}]"
        if not self._config.follow_redirects:
            raise TargetRejected(
                f"{self._where}: answers with a redirect ({answer.status})",
                hint=f"write the address that it leads to into url, or set follow_redirects = true in {setting}",
            )
        if answer.status not in _FOLLOWED:
            raise TargetRejected(
                f"{self._where}: answers with a redirect ({answer.status}) that does not keep the method",
                hint=f"write the address that it leads to into the url of {setting}",
            )
        scheme, host, port = self._origin
        netloc = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            parts = urlsplit(urljoin(f"{scheme}://{netloc}{at}", answer.headers.get("Location", "")))
            leads_to = (parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        except ValueError:
            leads_to = ("", None, 0)
        if leads_to != self._origin:
            raise TargetRejected(
                f"{self._where}: answers with a redirect to another host",
                hint=f"if rows and secrets may go there, write its address into the url of {setting}",
            )
        return f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"

    @contextmanager
    def _translated(self, watch: _Watch | None = None) -> Iterator[None]:
        """The library's errors as ours. Their texts are left out: some hold the path."""
        try:
            yield
        except (Unanswered, TargetRejected):
            raise
        except Exception as e:  # noqa: BLE001 - a server can make others than urllib3's: a chunk of -5 bytes, ValueError
            if _is_certificate(e):
                raise TargetRejected(
                    f"{self._where}: the server's certificate is not trusted, or is of another host",
                    hint=f"correct the url, or set ca_file in [target.{self._config.name}]",
                ) from None
            sent = watch is not None and watch.sent
            what = _words(e, over=watch is not None and watch.over)
            if watch is None:
                raise TargetUnavailable(f"{self._where}: {what}", hint="check that it runs and is reachable") from None
            raise Unanswered(what, sent=sent) from None


def _is_certificate(error: BaseException) -> bool:
    seen: list[Any] = [error, *error.args, error.__cause__, error.__context__]
    return any(isinstance(each, ssl.SSLCertVerificationError | ssl.CertificateError) for each in seen)


def _words(error: BaseException, *, over: bool) -> str:
    if isinstance(error, TargetUnavailable):
        return str(error.args[0]).partition(": ")[2]
    if over or isinstance(error, TimeoutError | urllib3.exceptions.TimeoutError):
        return "no whole answer in time"
    if isinstance(error, urllib3.exceptions.SSLError | ssl.SSLError):
        return "TLS failed"
    inner = error.args[1] if isinstance(error, urllib3.exceptions.ProtocolError) and len(error.args) > 1 else error
    reason = inner.strerror if isinstance(inner, OSError) and inner.strerror else type(inner).__name__
    return f"the connection failed ({reason})"


__all__ = ["ANSWER_BYTES_MAX", "Answer", "Client", "Unanswered"]
