"""Commands reach the daemon by durable requests: two sides of one state database, in two threads."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdc import control
from cdc.control import Control, NotRunning, RequestFailed
from cdc.errors import ConfigError, InvariantBroken, SourceRefused, TimedOut
from cdc.state import State


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    opened = State(tmp_path / "state.db")
    yield opened
    opened.close()


class MainLoop:
    """The daemon's main loop, as far as it concerns control."""

    def __init__(self, path: Path, handlers: dict[str, control.Handler]) -> None:
        self._path = path
        self._handlers = handlers
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.error: Exception | None = None

    def __enter__(self) -> MainLoop:
        ready = threading.Event()
        self._ready = ready
        self._thread.start()
        assert ready.wait(5)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        state = State(self._path, create=False)
        served = Control(state)
        served.serve(self._handlers)
        started = time.time()
        try:
            while not self._stop.is_set():
                control.beat(state, started)
                self._ready.set()
                served.poll_once()
                self._stop.wait(0.01)
        except InvariantBroken as error:
            self.error = error
        finally:
            served.close()
            state.close()


def test_a_request_comes_back_with_the_handlers_answer(state: State) -> None:
    with MainLoop(state.path, {"echo": lambda args: {"heard": args}}):
        assert control.ask(state, "echo", {"table": "public.t"}, timeout_s=5) == {"heard": {"table": "public.t"}}


def test_a_long_request_does_not_hold_up_the_others(state: State) -> None:
    go_on = threading.Event()
    handlers: dict[str, control.Handler] = {
        "long": lambda args: lambda: {"done": True} if go_on.is_set() else None,
        "short": lambda args: {"n": args["n"]},
    }
    answers: list[dict[str, Any]] = []
    with MainLoop(state.path, handlers):
        waiting = threading.Thread(target=lambda: answers.append(control.ask(state, "long", {}, timeout_s=20)))
        waiting.start()
        assert [control.ask(state, "short", {"n": n}, timeout_s=5)["n"] for n in range(3)] == [0, 1, 2]
        assert answers == []
        go_on.set()
        waiting.join(10)
    assert answers == [{"done": True}]


def test_a_refusal_reaches_the_client_with_its_hint(state: State) -> None:
    def refuse(args: dict[str, Any]) -> control.Answer:
        raise SourceRefused("no such table", hint="cdc tables")

    with MainLoop(state.path, {"resync": refuse}) as loop:
        with pytest.raises(RequestFailed, match=r"no such table \(hint: cdc tables\)"):
            control.ask(state, "resync", {}, timeout_s=5)
        with pytest.raises(RequestFailed, match="does not know the request dance"):
            control.ask(state, "dance", {}, timeout_s=5)
    assert loop.error is None


def test_a_wrong_name_is_an_answer_but_a_broken_invariant_stops_the_loop(state: State) -> None:
    def wrong(args: dict[str, Any]) -> control.Answer:
        raise ConfigError("no such source")

    def broken(args: dict[str, Any]) -> control.Answer:
        raise InvariantBroken("went back")

    def buggy(args: dict[str, Any]) -> control.Answer:
        raise ZeroDivisionError("secret value")

    with MainLoop(state.path, {"wrong": wrong, "broken": broken, "buggy": buggy}) as loop:
        with pytest.raises(RequestFailed, match="no such source"):
            control.ask(state, "wrong", {}, timeout_s=5)
        with pytest.raises(RequestFailed, match=r"^ZeroDivisionError in the daemon"):
            control.ask(state, "buggy", {}, timeout_s=5)
        assert loop.error is None
        with pytest.raises(RequestFailed, match="went back"):
            control.ask(state, "broken", {}, timeout_s=5)
    assert isinstance(loop.error, InvariantBroken)


def test_an_order_given_while_the_daemon_is_down_is_served_at_its_start_and_once(state: State) -> None:
    assert control.order(state, "pause", {"name": "shop"}) is None
    served: list[dict[str, Any]] = []

    def pause(args: dict[str, Any]) -> control.Answer:
        served.append(args)
        return {}

    for _ in range(2):
        with MainLoop(state.path, {"pause": pause, "ping": lambda args: {}}):
            control.ask(state, "ping", {}, timeout_s=5)
    assert served == [{"name": "shop"}]


def test_asking_without_a_daemon_says_so_at_once(state: State) -> None:
    with pytest.raises(NotRunning, match="no daemon is running"):
        control.ask(state, "wait", {}, timeout_s=60)
    control.beat(state, time.time())
    facts = state.get(control.DAEMON_FACT)
    assert facts["pid"] == os.getpid()
    state.set(control.DAEMON_FACT, {**facts, "heartbeat_at": time.time() - 60})
    with pytest.raises(NotRunning, match="last sign of life 60 s ago"):
        control.ask(state, "wait", {}, timeout_s=60)
    assert state.open_requests() == []


def test_a_daemon_whose_process_is_gone_counts_as_down_before_its_heartbeat_is_old(state: State) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    now = time.time()
    facts = {"pid": child, "host": socket.gethostname(), "started_at": now, "heartbeat_at": now}
    state.set(control.DAEMON_FACT, facts)
    assert not control.is_running(state)
    state.set(control.DAEMON_FACT, {**facts, "host": "elsewhere.example"})
    assert control.is_running(state)


def test_an_answer_that_does_not_come_ends_in_a_time_out_and_is_not_served_later(state: State) -> None:
    calls: list[str] = []

    def never(args: dict[str, Any]) -> control.Pending:
        calls.append("begun")
        return lambda: None

    with MainLoop(state.path, {"wait": never}):
        with pytest.raises(TimedOut, match=r"no answer within 0\.3 s"):
            control.ask(state, "wait", {}, timeout_s=0.3)
        give_up = time.monotonic() + 5
        while state.open_requests() and time.monotonic() < give_up:
            threading.Event().wait(0.02)
        assert state.open_requests() == []
    control.beat(state, time.time())
    with pytest.raises(TimedOut):
        control.ask(state, "wait", {}, timeout_s=0.01)
    with MainLoop(state.path, {"wait": never, "ping": lambda args: {}}):
        control.ask(state, "ping", {}, timeout_s=5)
    assert calls == ["begun"]


def test_a_daemon_that_stops_releases_its_clients(state: State) -> None:
    outcome: list[BaseException] = []

    def ask() -> None:
        try:
            control.ask(state, "wait", {}, timeout_s=60)
        except NotRunning as error:
            outcome.append(error)

    with MainLoop(state.path, {"wait": lambda args: lambda: None}):
        client = threading.Thread(target=ask)
        client.start()
        give_up = time.monotonic() + 5
        while not state.open_requests() and time.monotonic() < give_up:
            threading.Event().wait(0.01)
    facts = state.get(control.DAEMON_FACT)
    state.set(control.DAEMON_FACT, {**facts, "heartbeat_at": 0})
    client.join(5)
    assert len(outcome) == 1
    assert "stopped before it answered" in str(outcome[0])


def test_an_open_request_of_a_killed_daemon_is_served_by_the_next(state: State) -> None:
    number = state.post_request("resync", {"table": "public.t"})
    with MainLoop(state.path, {"resync": lambda args: lambda: None, "ping": lambda args: {}}):
        control.ask(state, "ping", {}, timeout_s=5)
    assert not state.request(number).answered
    with MainLoop(state.path, {"resync": lambda args: {"run": "1"}, "ping": lambda args: {}}):
        control.ask(state, "ping", {}, timeout_s=5)
    assert state.request(number).result == {"run": "1"}


def test_a_request_whose_time_the_daemon_ended_first_is_a_time_out_too(state: State) -> None:
    number = state.post_request("wait", {control.EXPIRES_AT: 1.0})
    server = control.Control(state)
    server.serve({"wait": lambda args: lambda: None})
    server.poll_once()
    with pytest.raises(TimedOut):
        control._answer(state, number, 5.0)
