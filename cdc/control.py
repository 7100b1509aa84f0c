"""How commands reach the daemon: durable requests in the state database, and their answers.

The client posts a request and waits for its answer; the daemon's main loop calls `Control.poll_once`, which runs
handlers and polls those that take longer, so none blocks another. A request survives both processes: one that was
open when the daemon died runs again at its next start, so handlers are idempotent. Requests that only make sense
while their client waits carry a deadline and are dropped after it. No socket, no second source of truth.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cdc.errors import CdcError, ConfigError, TimedOut, Verdict

if TYPE_CHECKING:
    from cdc.state import Request, State

_log = logging.getLogger(__name__)

DAEMON_FACT = "daemon"
"""Key in the state database: {pid, host, started_at, heartbeat_at}, Unix seconds, refreshed every second."""
HEARTBEAT_STALE_S = 10.0
POLL_S = 0.1
EXPIRES_AT = "_expires_at"
EXPIRED = "expired before it was served"

Answer = dict[str, Any]
Pending = Callable[[], Answer | None]
"""Polled at every `poll_once` until it gives the answer (or raises). Must return at once."""
Handler = Callable[[dict[str, Any]], Answer | Pending]
"""Takes a request's arguments; answers at once, or returns what is to be polled. Idempotent; raises CdcError."""


@dataclass(frozen=True, slots=True)
class DaemonFacts:
    """What the state database says of the daemon."""

    pid: int
    host: str
    started_at: float
    heartbeat_at: float

    @property
    def is_alive(self) -> bool:
        """Whether it gave a sign of life lately, and, on this host, its process exists."""
        if time.time() - self.heartbeat_at > HEARTBEAT_STALE_S:
            return False
        return self.host != socket.gethostname() or _process_exists(self.pid)


def beat(state: State, started_at: float) -> None:
    """Write the daemon's sign of life; the daemon calls it every second."""
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "started_at": started_at, "heartbeat_at": time.time()}
    state.set(DAEMON_FACT, facts)


def daemon(state: State) -> DaemonFacts | None:
    """The daemon that wrote into this state database last, None if none ever did."""
    facts = state.get(DAEMON_FACT)
    if not facts:
        return None
    return DaemonFacts(
        pid=int(facts["pid"]),
        host=str(facts.get("host", "")),
        started_at=float(facts["started_at"]),
        heartbeat_at=float(facts["heartbeat_at"]),
    )


def is_running(state: State) -> bool:
    """Whether a daemon serves this state database now."""
    facts = daemon(state)
    return facts is not None and facts.is_alive


class NotRunning(CdcError):
    """A command needs the daemon, and none serves this state database."""


class RequestFailed(CdcError):
    """The daemon refused a request or failed at it; the message is the daemon's."""


def order(state: State, verb: str, args: Mapping[str, Any], *, timeout_s: float = 10.0) -> Answer | None:
    """Post a request that holds whether or not a daemon runs now; blocks for its answer while one does.

    None: it stands, and will be served when the daemon starts (or as soon as it finds the time). RequestFailed if
    the daemon refuses it.
    """
    number = state.post_request(verb, dict(args))
    try:
        return _answer(state, number, timeout_s) if is_running(state) else None
    except TimedOut:
        return None


def ask(state: State, verb: str, args: Mapping[str, Any], *, timeout_s: float) -> Answer:
    """Post a request that the daemon serves only while we wait for it, and block for its answer.

    NotRunning, RequestFailed, or TimedOut after `timeout_s`.
    """
    require_daemon(state)
    number = state.post_request(verb, {**args, EXPIRES_AT: time.time() + timeout_s})
    return _answer(state, number, timeout_s)


def ask_all(
    state: State, verb: str, several: Sequence[Mapping[str, Any]], *, timeout_s: float
) -> Iterator[Answer | CdcError]:
    """As `ask`, for several requests at once, under one time: the answers in order, or what became of a request."""
    require_daemon(state)
    deadline = time.monotonic() + timeout_s
    expires = {EXPIRES_AT: time.time() + timeout_s}
    for number in [state.post_request(verb, {**args, **expires}) for args in several]:
        try:
            yield _answer(state, number, max(0.0, deadline - time.monotonic()))
        except (RequestFailed, TimedOut) as e:
            yield e


def require_daemon(state: State) -> None:
    """NotRunning unless a daemon serves this state database."""
    facts = daemon(state)
    if facts is None:
        raise NotRunning("no daemon is running on this state directory", hint="start one: cdc run")
    if not facts.is_alive:
        age = max(0.0, time.time() - facts.heartbeat_at)
        raise NotRunning(
            f"no daemon is running: process {facts.pid} on {facts.host} gave its last sign of life {age:.0f} s ago",
            hint="start it: cdc run (or systemctl start cdc)",
        )


def _answer(state: State, number: int, timeout_s: float) -> Answer:
    deadline = time.monotonic() + timeout_s
    while True:
        request = state.request(number)
        if request.error == EXPIRED:
            # The daemon's clock was the first to say what ours is about to.
            raise TimedOut(f"no answer within {timeout_s:g} s", hint="cdc status shows what the daemon is doing")
        if request.error is not None:
            raise RequestFailed(request.error)
        if request.answered:
            return request.result or {}
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimedOut(f"no answer within {timeout_s:g} s", hint="cdc status shows what the daemon is doing")
        if not is_running(state):
            raise NotRunning("the daemon stopped before it answered", hint="its log says why; start it: cdc run")
        time.sleep(min(POLL_S, left))


class Control:
    """The daemon's side. Used by one thread, the main loop."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._handlers: dict[str, Handler] = {}
        self._pending: dict[int, tuple[Request, Pending]] = {}

    def serve(self, handlers: Mapping[str, Handler]) -> None:
        """Serve these verbs from now on."""
        self._handlers.update(handlers)

    def poll_once(self) -> int:
        """Run handlers of new requests and poll the longer ones; returns how many were answered.

        Never blocks for longer than the handlers do. A handler's error becomes its request's answer; errors that
        must stop the process (a broken invariant) are raised after that.
        """
        answered = 0
        for request in self._state.open_requests():
            entry = self._pending.get(request.id)
            if entry is None:
                answered += self._begin(request)
            else:
                answered += self._attempt(request, entry[1])
        return answered

    def close(self) -> None:
        """Forget the pending ones: they stay open in the database and are served at the next start."""
        self._pending.clear()

    def _begin(self, request: Request) -> bool:
        handler = self._handlers.get(request.verb)
        if handler is None:
            return self._finish(request, error=f"the daemon does not know the request {request.verb}; is it older?")
        args = dict(request.args)
        args.pop(EXPIRES_AT, None)
        return self._attempt(request, lambda: handler(args))

    def _attempt(self, request: Request, step: Callable[[], Answer | Pending | None]) -> bool:
        """One call of a handler or of what it returned; True if the request was answered."""
        expires_at = request.args.get(EXPIRES_AT)
        if expires_at is not None and time.time() > float(expires_at):
            return self._finish(request, error=EXPIRED)
        try:
            outcome = step()
        except CdcError as error:
            self._finish(request, error=str(error))
            if error.verdict is Verdict.FATAL and not isinstance(error, ConfigError):
                raise
            return True
        except Exception as error:  # noqa: BLE001 - a fault in one request must not stop the main loop
            # Its text is not ours and may hold values: the type and the place must do.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}"
            facts = {"verb": request.verb, "request": request.id, "error": type(error).__name__, "at": at}
            _log.error("request failed", extra=facts)
            return self._finish(request, error=f"{type(error).__name__} in the daemon; its log has the details")
        if callable(outcome):
            self._pending[request.id] = (request, outcome)
            return False
        if outcome is None:
            return False
        return self._finish(request, result=outcome)

    def _finish(self, request: Request, *, result: Answer | None = None, error: str | None = None) -> bool:
        self._pending.pop(request.id, None)
        self._state.answer_request(request.id, result=result, error=error)
        _log.info(
            "request answered",
            extra={"verb": request.verb, "request": request.id, **({"error": error} if error else {})},
        )
        return True


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
