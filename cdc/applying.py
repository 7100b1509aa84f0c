"""A plan carried out: its batches sent in order and at their pace, what the target says of each row noted.

Guarantees: whatever the sink has acknowledged is noted in the row log as far as this process lives; rows that were
refused for what another row holds are tried once more, together, when everything else is written. The plans of a group
go to the target in one call, and so in one transaction: deletes of the dependent tables first, then what is written to
the tables that they depend on. Does not decide what is sent, and does not retry a target that is away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from cdc.config_serving import SyncConfig
from cdc.errors import CdcError
from cdc.pace import RateLimit
from cdc.plan import Plan
from cdc.rowlog import RowLog
from cdc.sink import DELETE, Batch, Ordering, PushResult, Rejected, Sink

CONFLICTS_MAX = 50_000
"""Rows refused for what another row holds that are kept for another try."""
REJECTS_KEPT = 1_000
_ROUNDS = 3
_SLICE_S = 0.1


@dataclass(slots=True)
class Applied:
    """What became of one plan."""

    written: int = 0
    deleted: int = 0
    absent: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    """Of REJECTS_KEPT at most; `rejects` counts them all."""
    rejects: int = 0
    stopped: bool = False
    error: CdcError | None = None


@dataclass(slots=True)
class Work:
    """One plan on its way: under which run it is sent, and where its rows are noted."""

    config: SyncConfig
    plan: Plan
    run: str
    log: RowLog
    applied: Applied = field(default_factory=Applied)
    _pairs: pa.Array | None = None
    _keys: pa.Array | None = None
    again: list[Batch] = field(default_factory=list)
    """Rows of batches that conflict with other rows."""
    known: pa.Table | None = None
    """Acknowledgements (cdc.sink.ACKS) since the plan was made: what they hold already is not sent."""

    def batches(self, rows: int) -> Iterator[Batch]:
        """What is left to send, as Plan.batches."""
        return (left for batch in self.plan.batches(rows, self.run) if (left := self.left(batch)).rows.num_rows)

    def left(self, batch: Batch) -> Batch:
        """The batch without what is acknowledged already."""
        if self.known is None:
            return batch
        if self._pairs is None:
            alive = self.known.filter(pc.not_equal(self.known.column("digest"), ""))
            self._pairs, self._keys = _pairs(alive).combine_chunks(), alive.column("key").combine_chunks()
        if batch.action == DELETE:
            return _filtered(batch, pc.is_in(batch.acks.column("key"), self._keys))
        return _filtered(batch, pc.invert(pc.is_in(_pairs(batch.acks), self._pairs)))

    def took(self, batch: Batch, result: PushResult, *, last: bool) -> None:
        """Count and note a batch's result. Conflicts are not counted before their last try."""
        conflicts = [] if last else [r.key for r in result.rejected if r.conflicts]
        if conflicts and sum(b.rows.num_rows for b in self.again) + len(conflicts) <= CONFLICTS_MAX:
            wanted = pc.is_in(batch.acks.column("key"), pa.array(conflicts, pa.string()))
            self.again.append(_filtered(batch, wanted))
            batch = _filtered(batch, pc.invert(wanted))
            others = [r for r in result.rejected if not r.conflicts]
            result = replace(result, rows=result.rows - len(conflicts), rejected=others)
        done = self.applied
        if batch.action == DELETE:
            done.deleted += result.written
        else:
            done.written += result.written
        done.absent += len(result.absent)
        done.rejects += len(result.rejected)
        done.rejected += result.rejected[: REJECTS_KEPT - len(done.rejected)]
        done.error = done.error or result.error
        self.log.note(batch, result)


def apply(sink: Sink, work: Work, should_stop: Callable[[], bool]) -> None:
    """Send one plan batch by batch, each durable by itself; `work.applied` says what became of it, also if this raises
    (TargetRejected, TargetUnavailable). Stops between two batches when `should_stop` says so. Blocks."""
    pace = RateLimit(work.config.rows_per_s, 0)
    rows, _ = pace.chunk_bounds(work.config.batch_rows, 0)
    for batch in work.batches(rows):
        if not _waited(pace, should_stop):
            work.applied.stopped = True
            return
        for result in sink.push([batch]):
            work.took(batch, result, last=False)
        pace.took(batch.rows.num_rows, 0)
        if work.applied.error is not None:
            raise work.applied.error
    for round_ in range(1, _ROUNDS + 1):
        batches, work.again = work.again, []
        if not batches:
            return
        before = sum(b.rows.num_rows for b in batches)
        for batch, result in zip(batches, sink.push(batches), strict=True):
            work.took(batch, result, last=round_ == _ROUNDS)
        if sum(b.rows.num_rows for b in work.again) == before:
            break
    for batch in work.again:
        # No progress: asked once more, so that each row has its reason.
        for result in sink.push([batch]):
            work.took(batch, result, last=True)
    work.again = []


def apply_together(sink: Sink, works: Sequence[Work], should_stop: Callable[[], bool]) -> None:
    """Send the plans of a group in one call, which is one transaction where the target has such. Blocks."""
    if should_stop():
        for work in works:
            work.applied.stopped = True
        return
    ordered = list(works)
    if isinstance(sink, Ordering):
        by_sync = {w.plan.assignment.sync: w for w in works}
        ordered = [by_sync[a.sync] for a in sink.order([w.plan.assignment for w in works])]
    sent = [(w, w.left(b)) for w in reversed(ordered) for b in w.plan.deletes(w.config.batch_rows, w.run)]
    sent += [(w, w.left(b)) for w in ordered for b in w.plan.writes(w.config.batch_rows, w.run)]
    sent = [(w, b) for w, b in sent if b.rows.num_rows]
    if not sent:
        return
    results = sink.push([batch for _, batch in sent])
    for (work, batch), result in zip(sent, results, strict=True):
        work.took(batch, result, last=True)


def _pairs(acks: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(acks.column("digest"), acks.column("key"), " ")


def _filtered(batch: Batch, mask: pa.ChunkedArray) -> Batch:
    mask = mask.combine_chunks()
    differs = None if batch.differs is None else batch.differs.filter(mask)
    return replace(batch, rows=batch.rows.filter(mask), acks=batch.acks.filter(mask), differs=differs)


def _waited(pace: RateLimit, should_stop: Callable[[], bool]) -> bool:
    """Whether the pace allows the next batch now; False: stopped while waiting."""
    while not should_stop():
        left = pace.wait_s()
        if not left:
            return True
        time.sleep(min(left, _SLICE_S))
    return False
