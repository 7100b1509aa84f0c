"""One batch on its way to a target over HTTP: requests in flight, what became of each row, acknowledgements.

Guarantees: rows are on record as attempts before they are sent (ANNOUNCED_ROWS at a time), and acknowledged after the
target has said that it took them, in groups of at most GROUP_ROWS that wait at most GROUP_S. When `run` returns or
raises, everything that was taken is acknowledged, or is told as not sent because the ledger failed; of what was not
sent or clearly refused, the attempt is withdrawn; only what ended unheard stays in doubt. A request that is refused as
a whole for what is in it is halved until the bad rows stand alone. What may go through later is tried again for
`retry_for_s`; then, as after any error that only an operator can mend, nothing new is sent, what is in flight is
awaited, and the rest is not sent.

Dying at any step loses no row and, where the target heeds idempotency keys, doubles none: what is in doubt goes out
again under the same key, and what differs from it under a key of its own, but in mode insert: there a key in doubt is
one insert, whatever its content is by now.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import tenacity

from cdc.errors import CdcError, TargetUnavailable, Verdict
from cdc.failpoints import failpoint
from cdc.sink import ACKS, DELETE, Batch, Ledger, PushResult, Rejected
from connectors.http.client import Client, Unanswered
from connectors.http.judging import ABSENT, REJECTED, TAKEN, UNKNOWN, Again, Judge, Judgement, Outcome, Refused
from connectors.http.pace import Pace
from connectors.http.template import Built, Item, RequestTemplate, RowRefused, row_key
from connectors.http.values import rows_of

GROUP_ROWS: Final = 2_000
GROUP_S: Final = 1.0
ANNOUNCED_ROWS: Final = 2_000
"""About as many rows can be in doubt after a crash."""
BODY_BYTES_MAX: Final = 16 << 20
WAIT_S = 0.25
"""Before the first repetition, about; each time twice as long, up to WAIT_MAX_S."""
WAIT_MAX_S: Final = 10.0
LEDGER_TRIES_S: Final = 30.0
_NOTHING: Final = ACKS.empty_table()
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


class Delivery:
    """Pushes one batch. `run` is called once."""

    def __init__(self, batch: Batch, form: Form, route: Route, ledger: Ledger) -> None:
        self._batch = batch
        self._form = form
        self._route = route
        self._ledger = ledger
        self._rows = batch.rows.num_rows
        self._keys: list[str] = batch.acks.column("key").to_pylist()
        self._digests = [digest or "" for digest in batch.acks.column("digest").to_pylist()]
        self._versions: list[int] = batch.acks.column("version").to_pylist()
        """Of each row's attempt, once it is announced."""
        self._before: dict[int, tuple[str, int]] = {}
        """Attempts that stood when these rows were announced."""
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._error: CdcError | None = None
        self._is_ledger_lost = False
        self._known: queue.SimpleQueue[tuple[int, Outcome]] = queue.SimpleQueue()
        """From the threads that send: place of a row, and what became of it."""
        self._unheard: set[int] = set()
        """Rows of which something was sent whose effect is not known, whatever was answered later."""
        self._in_part: set[int] = set()
        """Rows of requests that were not taken as a whole: known once they were sent by themselves."""
        self._kinds = [UNKNOWN] * self._rows
        self._reasons: dict[int, str] = {}
        self._announced = 0
        self._taken: list[int] = []
        """Taken, and not acknowledged yet."""
        self._taken_at = 0.0

    def run(self) -> PushResult:
        """Send everything that can be sent now. Blocks; raises for a defect of ours only."""
        size = self._form.rows_per_request
        starts = iter(range(0, self._rows, size))
        running: set[Future[None]] = set()
        try:
            while True:
                while len(running) < 2 * self._route.in_flight and not self._stop.is_set():
                    start = next(starts, None)
                    if start is None:
                        break
                    if start >= self._announced and not self._announce(start, size):
                        break
                    running.add(self._route.executor.submit(self._send_chunk, start))
                if not running:
                    break
                done, running = wait(running, timeout=self._due_s(), return_when=FIRST_COMPLETED)
                self._gather()
                if self._taken and time.monotonic() >= self._taken_at + GROUP_S:
                    self._record()
                for future in done:
                    future.result()
        except BaseException:
            self._stop.set()
            raise
        finally:
            wait(running)
            self._gather()
            self._finish()
        return self._result()

    def _result(self) -> PushResult:
        of_kind: dict[str, list[int]] = {}
        for at, kind in enumerate(self._kinds):
            of_kind.setdefault(kind, []).append(at)
        return PushResult(
            rows=self._rows,
            rejected=[Rejected(self._keys[at], self._reasons[at]) for at in of_kind.get(REJECTED, ())],
            absent=[self._keys[at] for at in of_kind.get(ABSENT, ())],
            unsent=[self._keys[at] for at in of_kind.get(UNKNOWN, ())],
            error=self._error,
        )

    # ------------------------------------------------------------------ the ledger (the caller's thread)

    def _due_s(self) -> float:
        return max(0.0, self._taken_at + GROUP_S - time.monotonic()) if self._taken else GROUP_S

    def _gather(self) -> None:
        """Take in what the senders know, and acknowledge it if it is enough."""
        while True:
            try:
                at, outcome = self._known.get_nowait()
            except queue.Empty:
                return
            if outcome.kind == TAKEN:
                self._taken_at = self._taken_at if self._taken else time.monotonic()
                self._taken.append(at)
                if len(self._taken) >= GROUP_ROWS:
                    self._record()
            else:
                self._kinds[at] = outcome.kind
                self._reasons[at] = outcome.reason

    def _announce(self, start: int, size: int) -> bool:
        """Put the next rows on record before any of them is sent, with what waits to be acknowledged; False if the
        ledger fails. A row's version tells its effect from every other that the target may have seen of its key."""
        self._announced = min(self._rows, start + max(size, ANNOUNCED_ROWS // size * size))
        try:
            standing = self._ledger.attempts()
        except CdcError as e:
            self._lose(e)
            return False
        for at in range(start, self._announced):
            attempt = standing.get(self._keys[at])
            if attempt is not None:
                self._before[at] = attempt
                if attempt[0] and self._batch.assignment.mode == "insert":
                    # Changes are not sent in this mode: it is the same insert, whatever the row holds by now. What is
                    # acknowledged is the older content, since that is what the target may have.
                    self._digests[at] = attempt[0]
                self._versions[at] = attempt[1] + (attempt[0] != self._digests[at])
        return self._record(attempts=self._acks(range(start, self._announced)))

    def _record(self, *, settled: pa.Table = _NOTHING, attempts: pa.Table = _NOTHING) -> bool:
        taken, self._taken = self._taken, []
        if self._is_ledger_lost:
            return False
        failpoint("http.before_ack")
        try:
            record(self._ledger, acks=self._acks(taken, add=1), settled=settled, attempts=attempts)
        except CdcError as e:
            self._lose(e)
            return False
        failpoint("http.after_ack")
        for at in taken:
            self._kinds[at] = TAKEN
        return True

    def _finish(self) -> None:
        """Acknowledge what is left, and withdraw attempts that are known to have had no effect: where an older attempt
        stood, it stands again, or else the version moves on, so that a row that was refused is not answered from a
        service's memory once it is mended there."""
        taken = set(self._taken)
        clean = [
            at
            for at in range(self._announced)
            if self._kinds[at] != TAKEN
            and at not in taken
            and at not in self._unheard
            and (self._kinds[at] != UNKNOWN or at not in self._in_part)
        ]
        settled = [at for at in clean if at not in self._before]
        restored = [at for at in clean if at in self._before]
        moved = [self._versions[at] + (self._kinds[at] != UNKNOWN) for at in settled]
        self._record(
            settled=_table([self._keys[at] for at in settled], [""] * len(settled), moved),
            attempts=_table(
                [self._keys[at] for at in restored],
                [self._before[at][0] for at in restored],
                [self._before[at][1] for at in restored],
            ),
        )

    def _acks(self, rows: Iterable[int], *, add: int = 0) -> pa.Table:
        places = list(rows)
        return _table(
            [self._keys[at] for at in places],
            [self._digests[at] for at in places],
            [self._versions[at] + add for at in places],
        )

    def _lose(self, error: CdcError) -> None:
        """The ledger does not take anything now: what is not acknowledged stays as it is on record."""
        self._is_ledger_lost = True
        self._fail(error)

    def _fail(self, error: CdcError) -> None:
        """Nothing new is sent. The first error that an operator must mend is told, or else the first of all."""
        with self._lock:
            known = self._error
            if known is None or (known.verdict is Verdict.RETRY and error.verdict is not Verdict.RETRY):
                self._error = error
        self._stop.set()

    # ------------------------------------------------------------------ sending (the executor's threads)

    def _send_chunk(self, start: int) -> None:
        size = self._form.rows_per_request
        rows = rows_of(self._batch.rows.slice(start, size))
        deletes = self._batch.action == DELETE
        items: list[tuple[int, Item]] = []
        for at, row in enumerate(rows, start):
            key = row_key(
                self._batch.assignment.sync, self._keys[at], self._digests[at], self._versions[at], deletes=deletes
            )
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
            judgement = self._exchange(built, [at for at, _ in items])
        except (Refused, RowRefused) as e:
            if isinstance(e, Refused) and e.in_part:
                self._in_part.update(at for at, _ in items)
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
        except BaseException:
            # A defect of ours: who knows what was sent before.
            self._unheard.update(at for at, _ in items)
            raise
        for (at, _), outcome in zip(items, judgement.outcomes, strict=True):
            if outcome.kind == UNKNOWN:
                self._unheard.add(at)
            else:
                self._known.put((at, outcome))
        if judgement.error is not None:
            self._fail(judgement.error)

    def _exchange(self, built: Built, places: Sequence[int]) -> Judgement:
        """Send until there is an answer that stands. Again if there was none in time; Refused, TargetRejected."""
        unheard = False
        headers = {**self._form.headers, **built.headers}
        for attempt in self._attempts():
            with attempt:
                if not self._route.pace.wait(self._stop):
                    raise Again("the run was stopped")
                try:
                    answer = self._route.client.send(built.method, built.path, headers, built.body)
                    if answer.status == _AFTER_TIMEOUT and unheard:
                        raise Again(f"status {answer.status}")
                    return self._form.judge(answer, len(places))
                except Unanswered as e:
                    unheard = unheard or e.sent
                    raise Again(str(e)) from None
                except Again as e:
                    unheard = unheard or e.had_effect
                    raise
                finally:
                    if unheard:
                        self._unheard.update(places)
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


def record(ledger: Ledger, *, acks: pa.Table, settled: pa.Table = _NOTHING, attempts: pa.Table = _NOTHING) -> None:
    """As Ledger.record. What a repetition may mend is repeated for a while; then the ledger's error."""
    tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_mend),
        wait=tenacity.wait_random_exponential(multiplier=WAIT_S, max=WAIT_MAX_S),
        stop=tenacity.stop_before_delay(LEDGER_TRIES_S),
        reraise=True,
    )(ledger.record, acks=acks, settled=settled, attempts=attempts)


def _table(keys: list[str], digests: list[str], versions: list[int]) -> pa.Table:
    return pa.table({"key": keys, "digest": digests, "version": versions}, schema=ACKS)


def _may_mend(error: BaseException) -> bool:
    return isinstance(error, CdcError) and error.verdict is Verdict.RETRY


__all__ = ["Delivery", "Form", "Route", "record"]
