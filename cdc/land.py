"""Landing: event log → changelogs in the lake, cut at common positions of a source.

A cut is a point between two transactions up to which every table's changes are in the open objects; each changelog
is then committed with the cut's position in the same Delta commit. Rows that a changelog holds already (its token
says so) are left out by the changelog itself, so a cut that is repeated after a crash changes nothing. A
transaction too big to wait for is written to objects while it arrives, and committed when its Commit is in the log.

A table that fails stops alone. It does not merge (cdc.merge), and it does not decide what the source may forget
(cdc.capture).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from cdc import metrics
from cdc.batch import Boundary
from cdc.capture import ConfirmGate
from cdc.errors import CdcError, LogCorrupt, StoreUnavailable, StreamRestarted, Verdict
from cdc.evolution import Evolution
from cdc.failpoints import failpoint
from cdc.freshness import Freshness
from cdc.lake.changelog import ChangelogTable, ChangelogWriter, Landed
from cdc.lake.lease import Lease
from cdc.lake.naming import LANDED
from cdc.lake.partitions import Lateness
from cdc.log import EventLog, LogRecord
from cdc.ports import ObjectStore
from cdc.schema import SchemaBook
from cdc.state import State
from cdc.table import PartitionBy, TableId, TableSchema

log = logging.getLogger(__name__)

READ_BYTES = 8 << 20
"""Log bytes in one item: bounds memory, and how late a request to land is seen."""
OPEN_BYTES = 8 << 20
"""From this size on an open transaction is written to objects before its Commit has arrived."""
HELD_BYTES = 128 << 20
"""Rows of all tables in memory, as Arrow, at which a landing is due whatever the size of its objects."""
LOG_SHARE = 4
"""A landing is due when it is this part of what the log may hold: capture needs the room."""
NONE_OPEN = (-1, -1)


class LandPoint(NamedTuple):
    """Log offset up to which everything has landed, and the source's position there (None: nothing known yet)."""

    offset: int
    boundary: Boundary | None


@dataclass(slots=True)
class Group:
    """Records to land; `cut` is the position if the log may be cut behind them."""

    records: list[LogRecord]
    offset: int
    cut: Boundary | None
    generation: int


@dataclass(frozen=True, slots=True)
class LandedCut:
    """A position of the source at which every changelog stands, and their Delta versions there."""

    boundary: Boundary
    versions: dict[TableId, int]
    common: bool = True
    """Whether all tables stand at one position of the source: only then models may read it."""


class LogReader:
    """The upstream end: groups of log records behind an offset, never past the beginning of a small open
    transaction."""

    def __init__(
        self, source: str, log: EventLog, state: State, gate: ConfirmGate, due_in_s: Callable[[], float]
    ) -> None:
        self._source = source
        self._log = log
        self._state = state
        self._gate = gate
        self._due_in_s = due_in_s
        self._offset = 0
        self._generation = -1
        self._last: Boundary | None = None
        self._open = NONE_OPEN
        """Where the open transaction that has been begun to be read will stand."""

    def open(self, after: LandPoint) -> None:
        self._offset = after.offset
        self._generation = self._log.generation(self._source)
        self._last = None
        self._open = NONE_OPEN

    def read(self, timeout_s: float) -> Group | None:
        timeout_s = min(timeout_s, self._due_in_s())
        with self._log.lock():
            generation = self._log.generation(self._source)
            position = self._log.position(self._source)
            end = self._log.end_offset(self._source)
        if generation != self._generation:
            raise StreamRestarted(
                f"source {self._source}: the stream was restarted; landing starts again at its checkpoint"
            )
        if position is None:
            self._log.wait(self._source, self._offset, timeout_s)
            return None
        if self._offset >= end:
            # While the rows of an open transaction wait for its Commit, a position before it is no cut for them.
            if self._last != position and (position.epoch, position.lsn) >= self._open:
                self._last, self._open = position, NONE_OPEN
                return Group([], self._offset, position, generation)
            self._log.wait(self._source, self._offset, timeout_s)
            return None
        records = self._log.records(self._source, self._offset, bytes_max=READ_BYTES)
        taken = self._landable(records, position)
        if not taken:
            self._log.wait(self._source, end, timeout_s)
            return None
        self._offset = taken[-1].offset
        return Group(taken, self._offset, self._cut(taken, end, position), generation)

    def confirm(self, durable: LandPoint) -> None:
        boundary = durable.boundary
        reached = {"epoch": boundary.epoch, "lsn": boundary.lsn, "end_lsn": boundary.end_lsn} if boundary else {}
        self._state.save_checkpoint("land", self._source, {"offset": durable.offset, **reached})
        self._log.trim({self._source: durable.offset})
        if boundary is not None:
            self._gate.landed(boundary)

    def close(self) -> None:
        self._generation = -1

    def _landable(self, records: list[LogRecord], position: Boundary) -> list[LogRecord]:
        """Complete records, or, when there are none, those of a big open transaction."""
        reached = (position.epoch, position.lsn)
        if self._open > reached:
            # Once begun, an open transaction is read to its end, with whatever stands between its parts: only there is
            # the next cut.
            return records
        complete = []
        for record in records:
            if record.kind == "change" and (record.epoch, record.last_lsn) > reached:
                break
            complete.append(record)
        if complete:
            return complete
        return [] if self._due_in_s() <= 0 or self._open_bytes() < OPEN_BYTES else records

    def _open_bytes(self) -> int:
        """Bytes of the open transaction that wait, as far as it matters: `records` stops short of its bound."""
        return sum(r.bytes for r in self._log.records(self._source, self._offset, bytes_max=2 * OPEN_BYTES))

    def _cut(self, taken: list[LogRecord], end: int, position: Boundary) -> Boundary | None:
        reached = max(self._open, *((r.epoch, r.last_lsn) for r in taken))
        if reached > (position.epoch, position.lsn):
            self._open = reached
            return None
        self._open = NONE_OPEN
        if self._offset >= end:
            self._last = position
            return position
        following = self._log.records(self._source, self._offset, limit=1)
        if following and following[0].kind == "change" and (following[0].epoch, following[0].first_lsn) > reached:
            # The commit record's own position: its transaction may come again, and is known by its token.
            return Boundary(reached[0], reached[1], reached[1])
        return None


class Lander:
    """The downstream end: one open writer per table, committed together at a cut."""

    def __init__(
        self,
        source: str,
        log: EventLog,
        state: State,
        book: SchemaBook,
        store: ObjectStore,
        *,
        epoch: int,
        temp_dir: Path,
        land_every_s: float,
        land_bytes: int,
        lease: Lease,
        stop_table: Callable[[TableId, CdcError], None],
        is_stopped: Callable[[TableId], bool],
        evolution: Evolution,
        partition_by: Callable[[str], PartitionBy | None] = lambda table: None,
        admits: Callable[[LogRecord, TableSchema], bool] = lambda record, schema: True,
    ) -> None:
        """`admits`: whether a record is for the place where its table stands now; raises what stops the table."""
        self._evolution = evolution
        self._partition_by = partition_by
        self._source = source
        self._log = log
        self._state = state
        self._book = book
        self._store = store
        self._epoch = epoch
        self._temp_dir = temp_dir
        self._land_every_s = land_every_s
        self._land_bytes = land_bytes
        self._lease = lease
        self._stop_table = stop_table
        self._is_stopped = is_stopped
        self._admits = admits
        self._changelogs: dict[TableId, ChangelogTable] = {}
        self._writers: dict[TableId, ChangelogWriter] = {}
        self._changed_us: dict[TableId, int] = {}
        self._bytes = 0
        self._first_at: float | None = None
        self._reclaimed: set[TableId] = set()
        self._point = LandPoint(0, None)
        self._cut: LandPoint | None = None
        self._dirty = False
        self._asked_to = 0
        self._settled_to = 0
        """Log offsets: up to where somebody waits, and up to where all has landed."""
        self._versions: dict[TableId, int] = {}
        self._floor = -1
        self.freshness = Freshness(source)
        """What each table lacks in the lake, and since when."""
        self.landed_cut: LandedCut | None = None
        """The newest cut at which all changelogs stand; None until landing has passed what it found in the lake."""
        self.landed: Boundary | None = None
        """Position up to which everything has landed; None until something is known."""

    def ask(self) -> Callable[[], bool]:
        """Land what is logged now as soon as a cut allows; whether that has happened. Thread-safe."""
        wanted = self._asked_to = self._log.end_offset(self._source, complete=True)
        return lambda: self._settled_to >= wanted

    def due_in_s(self) -> float:
        """Seconds until what is open should be committed at the next cut; infinite if nothing is open."""
        if not self._dirty or self._first_at is None:
            return math.inf
        if self._asked_to > self._settled_to or self._is_full():
            return 0.0
        return max(0.0, self._first_at + self._land_every_s - time.monotonic())

    def _is_full(self) -> bool:
        """Whether objects have become big enough, or wait in too much memory or log."""
        writers = self._writers.values()
        return (
            self._bytes * LOG_SHARE >= self._log.bytes_max
            or sum(w.object_bytes for w in writers) >= self._land_bytes
            or sum(w.held_bytes for w in writers) >= HELD_BYTES
        )

    def changelog(self, table: TableId) -> ChangelogTable:
        """The changelog of a table, as landing sees it."""
        if table not in self._changelogs:
            by = self._partition_by(str(table))
            self._changelogs[table] = ChangelogTable(self._store, self._source, table, partition_by=by)
        return self._changelogs[table]

    def resume(self) -> LandPoint:
        self._lease.check()
        doubtful = set(self._writers)
        self.abandon()
        self._changelogs.clear()
        self._look_around(doubtful)
        saved = self._state.checkpoint("land", self._source)
        self._point = LandPoint(int(saved["offset"]) if saved else 0, None)
        self._settled_to = self._point.offset
        return self._point

    def write(self, item: Group) -> LandPoint | None:
        began = time.perf_counter()
        self._lease.check()
        for record in item.records:
            self._add(record, item.generation)
        self._point = LandPoint(item.offset, item.cut)
        self._cut = self._point if item.cut is not None else None
        durable = self._settle()
        metrics.STAGE_SECONDS.labels("land").inc(time.perf_counter() - began)
        return durable

    def tick(self) -> LandPoint | None:
        return self._settle()

    def _look_around(self, doubtful: Collection[TableId]) -> None:
        """Where the changelogs stand. A kill between two tables leaves them at different cuts, so no common one is
        known until landing has passed the highest. Orphans are looked for once, and in `doubtful` tables again."""
        self.landed_cut = None
        self._versions.clear()
        self._floor = -1
        for known in self._state.tables(self._source):
            changelog = self.changelog(known.table)
            try:
                if changelog.version() < 0:
                    continue
                if known.table not in self._reclaimed or known.table in doubtful:
                    # No writer of landing is at work now: what one has uploaded and not committed is nobody's. Before
                    # it is read where the table stands: a commit of before may have come.
                    changelog.reclaim(term=self._lease.fence, kind=LANDED)
                    self._reclaimed.add(known.table)
                self._versions[known.table] = changelog.refresh()
                self._floor = max(self._floor, changelog.tokens().stream(self._epoch))
            except StoreUnavailable:
                # A lake that is away holds up only those that land there.
                if not self._is_stopped(known.table):
                    raise

    def _settle(self) -> LandPoint | None:
        """Commit if it is due and we stand at a cut; without open rows every cut is durable as it is."""
        if self._cut is None:
            return None
        if self._dirty:
            if self.due_in_s() > 0:
                return None
            self._commit(self._cut)
        self.freshness.settled()
        point, self._cut = self._cut, None
        self._settled_to = point.offset
        self.landed = point.boundary
        if point.boundary is not None and point.boundary.lsn >= self._floor:
            self.landed_cut = LandedCut(point.boundary, dict(self._versions))
        return point

    def _add(self, record: LogRecord, generation: int) -> None:
        if self._is_stopped(record.table):
            return
        schema = self._book.get(record.table, record.version)
        try:
            batch = self._log.read(record, schema)
        except LogCorrupt:
            if self._log.generation(self._source) != generation:
                raise StreamRestarted(f"source {self._source}: the stream was restarted") from None
            raise
        try:
            if not self._admits(record, schema):
                return
            batch = self._evolution.admit(
                batch, lsn=record.last_lsn, judged=record.kind != "control", changelog=self.changelog(record.table)
            )
            if record.table not in self._writers:
                self._writers[record.table] = self.changelog(record.table).writer(
                    self._temp_dir, fence=self._lease.fence
                )
            self._writers[record.table].add(batch, chunk=record.chunk)
        except CdcError as e:
            if e.verdict is not Verdict.OPERATOR:
                raise
            self._stop(record.table, e)
            self._note_open()
            return
        times = pc.min_max(batch.system("_committed_at"))
        self.freshness.read(record.table, times["min"].value)
        if record.kind == "change" and (newest := times["max"].value) is not None:
            self._changed_us[record.table] = max(newest, self._changed_us.get(record.table, 0))
        self._bytes += record.bytes
        self._note_open()

    def _note_open(self) -> None:
        """Something waits for a cut."""
        self._dirty = True
        if self._first_at is None:
            self._first_at = time.monotonic()

    def _commit(self, cut: LandPoint) -> None:
        assert cut.boundary is not None
        self._lease.check()
        failpoint("land.before_cut")
        self._evolution.announce(self.changelog)
        tables = list(self._writers)
        for table, writer in list(self._writers.items()):
            self._lease.check()
            began = time.perf_counter()
            try:
                landed = writer.commit(cut.boundary)
            except CdcError as e:
                if e.verdict is not Verdict.OPERATOR:
                    raise
                self._stop(table, e)
                continue
            failpoint("land.between_tables")
            del self._writers[table]
            self._versions[table] = landed.version
            self._count(table, landed, writer.lateness)
            self.freshness.landed(table, landed.version, landed.rows)
            metrics.LAND_SECONDS.labels(self._source).observe(time.perf_counter() - began)
        failpoint("land.after_cut")
        with self._state.transaction() as tx:
            for table in tables:
                last: dict[str, Any] = {"last_change_us": self._changed_us[table]} if table in self._changed_us else {}
                if table.is_own:
                    last["state"] = "streaming"
                self._state.update_table(self._source, table, tx=tx, landed_lsn=cut.boundary.lsn, **last)
        self._evolution.commit()
        self._changed_us.clear()
        self._bytes, self._first_at, self._dirty = 0, None, False

    def _count(self, table: TableId, landed: Landed, lateness: Lateness) -> None:
        label = metrics.table_label(self._source, table)
        metrics.LANDED_ROWS.labels(self._source, label).inc(landed.rows)
        metrics.LANDED_BYTES.labels(self._source).inc(landed.bytes)
        if self._changelogs[table].partition_by is not None:
            metrics.LATE_ROWS.labels(self._source, label).inc(lateness.late)
            metrics.UNDATED_ROWS.labels(self._source, label).inc(lateness.undated)
            metrics.LATENESS.add((self._source, label), lateness.counts.tolist(), lateness.total_s)

    def _stop(self, table: TableId, error: CdcError) -> None:
        writer = self._writers.pop(table, None)
        if writer is not None:
            writer.abandon()
        self._stop_table(table, error)

    def abandon(self) -> None:
        """Let go of what is open and not committed; it is read again from the log."""
        for writer in self._writers.values():
            writer.abandon()
        self._writers.clear()
        self._evolution.forget()
        self._changed_us.clear()
        self._bytes, self._first_at, self._dirty, self._cut = 0, None, False, None
