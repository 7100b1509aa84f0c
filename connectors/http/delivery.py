"""One batch on its way to a target over HTTP: requests in flight, what became of each row, acknowledgements.

Guarantees: a row is acknowledged after the target has said that it took it, in groups of at most GROUP_ROWS rows that
wait at most GROUP_S; when `run` returns or raises, everything that was taken is acknowledged, or is told as not sent
because the ledger failed. A request that is refused as a whole for what is in it is halved until the bad rows stand
alone. What may go through later is tried again for `retry_for_s`; then, as after any error that only an operator can
mend, nothing new is sent, what is in flight is awaited, and the rest is not sent.

Dying at any step loses no row and, where the target heeds idempotency keys, doubles none: what was not acknowledged
goes out again under the same keys.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pyarrow as pa
import tenacity

from cdc.errors import CdcError, TargetUnavailable, Verdict
from cdc.failpoints import failpoint
from cdc.sink import Batch, Ledger, PushResult, Rejected
from connectors.http.client import Client, Unanswered
from connectors.http.judging import ABSENT, REJECTED, TAKEN, UNKNOWN, Again, Judge, Judgement, Outcome, Refused
from connectors.http.pace import Pace
from connectors.http.template import Built, Item, RequestTemplate, RowRefused, row_key
from connectors.http.values import rows_of

GROUP_ROWS: Final = 2_000
GROUP_S: Final = 1.0
BODY_BYTES_MAX: Final = 16 << 20
WAIT_S = 0.25
"""Before the first repetition, about; each time twice as long, up to WAIT_MAX_S."""
WAIT_MAX_S: Final = 10.0
LEDGER_TRIES_S: Final = 30.0
_AFTER_TIMEOUT: Final = 409
"""Of a request whose first attempt ended unheard: it may still be at work on that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What requests of one batch go through; kept by the target for many."""

    target: str
    client: Client
    pace: Pace
    executor: Executor
    in_flight: int
    retry_for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How rows become requests, and answers outcomes."""

    template: RequestTemplate
    judge: Judge
    headers: dict[str, str]
    rows_per_request: int


@dataclass(slots=True)
class _State:
    """What is known of each row; of one thread."""

    kinds: list[str]
    reasons: dict[int, str] = field(default_factory=dict)
    taken: list[int] = field(default_factory=list)
    """Taken, and not acknowledged yet."""
    since: float = 0.0


class Delivery:
    """Pushes one batch. `run` is called once."""

    def __init__(self, batch: Batch, form: Form, route: Route, ledger: Ledger) -> None:
        self._batch = batch
        self._form = form
        self._route = route
        self._ledger = ledger
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._error: CdcError | None = None
        self._is_ledger_lost = False
        self._known: queue.SimpleQueue[tuple[int, Outcome]] = queue.SimpleQueue()
        """From the threads that send: place of a row, and what became of it."""
        self._state = _State([UNKNOWN] * batch.rows.num_rows)

    def run(self) -> PushResult:
        """Send everything that can be sent now. Blocks; raises for a defect of ours only."""
        starts = iter(range(0, self._batch.rows.num_rows, self._form.rows_per_request))
        running: set[Future[None]] = set()
        try:
            while True:
                while len(running) < 2 * self._route.in_flight and not self._stop.is_set():
                    start = next(starts, None)
                    if start is None:
                        break
                    running.add(self._route.executor.submit(self._send_chunk, start))
                if not running:
                    break
                done, running = wait(running, timeout=self._due_s(), return_when=FIRST_COMPLETED)
                self._acknowledge(everything=False)
                for future in done:
                    future.result()
        except BaseException:
            self._stop.set()
            raise
        finally:
            wait(running)
            self._acknowledge(everything=True)
        return self._result()

    def _result(self) -> PushResult:
        keys, state = self._batch.acks.column("key"), self._state
        of_kind: dict[str, list[int]] = {}
        for at, kind in enumerate(state.kinds):
            of_kind.setdefault(kind, []).append(at)
        return PushResult(
            rows=len(state.kinds),
            rejected=[Rejected(keys[at].as_py(), state.reasons[at]) for at in of_kind.get(REJECTED, ())],
            absent=[keys[at].as_py() for at in of_kind.get(ABSENT, ())],
            unsent=[keys[at].as_py() for at in of_kind.get(UNKNOWN, ())],
            error=self._error,
        )

    # ------------------------------------------------------------------ acknowledging (the caller's thread)

    def _due_s(self) -> float:
        return max(0.0, self._state.since + GROUP_S - time.monotonic()) if self._state.taken else GROUP_S

    def _acknowledge(self, *, everything: bool) -> None:
        """Take in what the senders know, and acknowledge it if it is enough, old enough, or the end."""
        state = self._state
        while True:
            try:
                at, outcome = self._known.get_nowait()
            except queue.Empty:
                break
            if outcome.kind == TAKEN:
                state.since = state.since if state.taken else time.monotonic()
                state.taken.append(at)
                if len(state.taken) >= GROUP_ROWS:
                    self._flush()
            else:
                state.kinds[at] = outcome.kind
                state.reasons[at] = outcome.reason
        if everything or time.monotonic() >= state.since + GROUP_S:
            self._flush()

    def _flush(self) -> None:
        taken, self._state.taken = self._state.taken, []
        if not taken or self._is_ledger_lost:
            return
        failpoint("http.before_ack")
        try:
            acknowledge(self._ledger, self._batch.acks.take(pa.array(taken)))
        except CdcError as e:
            self._is_ledger_lost = True
            self._fail(e)
            return
        failpoint("http.after_ack")
        for at in taken:
            self._state.kinds[at] = TAKEN

    def _fail(self, error: CdcError) -> None:
        """Nothing new is sent. The first error that an operator must mend is told, or else the first of all."""
        with self._lock:
            if self._error is None or self._error.verdict is Verdict.RETRY is not error.verdict:
                self._error = error
        self._stop.set()

    # ------------------------------------------------------------------ sending (the executor's threads)

    def _send_chunk(self, start: int) -> None:
        size = self._form.rows_per_request
        rows = rows_of(self._batch.rows.slice(start, size))
        acks = self._batch.acks.slice(start, size).to_pylist()
        sync, action = self._batch.assignment.sync, self._batch.action
        items: list[tuple[int, Item]] = []
        for at, (row, ack) in enumerate(zip(rows, acks, strict=True), start):
            key = row_key(sync, action, ack["key"], ack["digest"] or "", ack["version"])
            try:
                items.append((at, self._form.template.item(row, key)))
            except RowRefused as e:
                self._known.put((at, Outcome(REJECTED, str(e))))
        self._send(items)

    def _send(self, items: Sequence[tuple[int, Item]]) -> None:
        """Send these rows in one request; if it is refused for what is in it, each half by itself."""
        if not items or self._stop.is_set():
            return
        try:
            built = self._form.template.build([item for _, item in items])
            if built.body is not None and len(built.body) > BODY_BYTES_MAX:
                raise Refused(f"the request has more than {BODY_BYTES_MAX >> 20} MB")
            judgement = self._exchange(built, len(items))
        except (Refused, RowRefused) as e:
            if len(items) > 1:
                middle = len(items) // 2
                self._send(items[:middle])
                self._send(items[middle:])
            else:
                self._known.put((items[0][0], Outcome(REJECTED, str(e))))
            return
        except Again as e:
            if not self._stop.is_set() or self._error is None:
                self._fail(
                    TargetUnavailable(
                        f"target {self._route.target}: {e}, tried again for {self._route.retry_for_s:g} s",
                        hint="the rows wait for the next run; see whether the target is up, and its limits",
                    )
                )
            return
        except CdcError as e:
            self._fail(e)
            return
        for (at, _), outcome in zip(items, judgement.outcomes, strict=True):
            if outcome.kind != UNKNOWN:
                self._known.put((at, outcome))
        if judgement.error is not None:
            self._fail(judgement.error)

    def _exchange(self, built: Built, rows: int) -> Judgement:
        """Send until there is an answer that stands. Again if there was none in time; Refused, TargetRejected."""
        unheard = False
        headers = {**self._form.headers, **built.headers}
        for attempt in self._attempts():
            with attempt:
                if not self._route.pace.wait(self._stop):
                    raise Again("the run was stopped")
                try:
                    answer = self._route.client.send(built.method, built.path, headers, built.body)
                except Unanswered as e:
                    unheard = unheard or e.sent
                    raise Again(str(e)) from None
                if answer.status == _AFTER_TIMEOUT and unheard:
                    raise Again(f"status {answer.status}")
                return self._form.judge(answer, rows)
        raise AssertionError  # the last attempt returns or raises

    def _attempts(self) -> tenacity.Retrying:
        backoff = tenacity.wait_random_exponential(multiplier=WAIT_S, max=WAIT_MAX_S)
        retry_for_s = self._route.retry_for_s

        def pause_s(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            asked_s = error.after_s if isinstance(error, Again) else 0.0
            if asked_s:
                self._route.pace.hold(min(asked_s, retry_for_s))
            return max(asked_s, backoff(state))

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Again),
            wait=pause_s,
            stop=tenacity.stop_any(tenacity.stop_before_delay(retry_for_s), tenacity.stop_when_event_set(self._stop)),
            sleep=tenacity.sleep_using_event(self._stop),
            reraise=True,
        )


def acknowledge(ledger: Ledger, acks: pa.Table) -> None:
    """Let the ledger know that the target has taken these rows (their versions before): durable on return. What a
    repetition may mend is repeated for a while; then the ledger's error."""
    versions = pa.array(acks.column("version").to_numpy() + np.int64(1), pa.int64())
    moved = acks.set_column(acks.column_names.index("version"), "version", versions)
    tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_mend),
        wait=tenacity.wait_random_exponential(multiplier=WAIT_S, max=WAIT_MAX_S),
        stop=tenacity.stop_before_delay(LEDGER_TRIES_S),
        reraise=True,
    )(ledger.acknowledge, moved)


def _may_mend(error: BaseException) -> bool:
    return isinstance(error, CdcError) and error.verdict is Verdict.RETRY


__all__ = ["Delivery", "Form", "Route", "acknowledge"]
