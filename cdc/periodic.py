"""One run of a source that has no stream: read every table in one snapshot, find what differs from the lake, log it.

Guarantees:
- A run is one transaction of the source: all changes that it finds stand at one new position, and none can be read as
  complete before the last one is in the log. A run that dies leaves nothing but what the next one drops.
- What is compared with is exactly what `current` holds; the caller starts no run before everything logged has landed
  and been merged. So nothing has to be remembered, and a difference is found however it came about.
- A table that the lake does not hold whole yet is read whole (`r` rows between a begin and an end row, as snapshots
  beside a stream do it): chunk by chunk at the position before, so that the log need not hold it at once; its end row
  belongs to the run's transaction, so it comes to light together with the others.
- Memory is bounded: a table is compared part by part (cdc.comparison).

It decides neither when a run is due nor what is done about errors (cdc.periodic_pipeline).
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from cdc import metrics
from cdc.appending import shape_fact
from cdc.batch import SNAPSHOT_SEQ, Batch, Boundary, Portion
from cdc.changes import At, Images, batches
from cdc.compare import Found, NotUnique
from cdc.comparison import Comparison
from cdc.config import SourceConfig
from cdc.cursor import KINDS, Memory, fresh, highest, text_of
from cdc.differences import frozen, reading_reason
from cdc.discovery import epoch_fact
from cdc.errors import CdcError, LogFull, SchemaConflict, SourceRefused, SourceUnavailable, Verdict
from cdc.failpoints import failpoint
from cdc.lake.changelog import ChangelogTable
from cdc.lake.held import HeldRows
from cdc.log import EventLog
from cdc.ports import ObjectStore, Past, RowsRead, RunReader, RunSnapshot, RunTable
from cdc.runs import Run
from cdc.schema import SchemaBook
from cdc.state import State
from cdc.table import Column, TableId, TableSchema
from cdc.units import duration_s
from cdc.window import Stamp, control_batch, read_batch

log = logging.getLogger(__name__)

ROOM_S = 60.0
"""How long a log that is full may stay as full as it is before a run is given up."""
TRIM_PIECES = 16
"""After so many pieces of a table, what the allocator keeps is given back."""
PORTION_BYTES = 4 << 20
"""Changes of about this size are logged together."""
FULL_KINDS = ("first", "resync")


class Halted(Exception):
    """The process ends; the run is given up, and leaves nothing."""


def cursor_fact(source: str, table: TableId) -> str:
    """Name of the fact that holds what a table's runs of strategy "cursor" have come to."""
    return f"cursor:{source}/{table}"


def whole_fact(source: str, table: TableId) -> str:
    """Name of the fact that holds the schema version that a table was last read whole in."""
    return f"whole:{source}/{table}"


@dataclass(slots=True)
class Counts:
    """What a run did. `read`: rows that came from the source."""

    tables: int = 0
    read: int = 0
    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    snapshot: int = 0
    failed: int = 0

    def to_json(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(slots=True)
class Work:
    """One table in one run. `shape`: the columns that the lake holds of it (another than `schema` only where it is
    frozen); `whole`: why it is read whole, empty if it is compared; `past`: what a run by cursor reads (None: all)."""

    found: RunTable
    schema: TableSchema
    shape: TableSchema
    ordered: list[Run]
    whole: str = ""
    past: Past | None = None
    cursor: Column | None = None
    memory: Memory | None = None
    mark: int | None = None
    rows: int = 0
    run: Run | None = None
    failed: bool = False

    @property
    def table(self) -> TableId:
        return self.schema.table


@dataclass(slots=True)
class _Open:
    """The run that is under way."""

    snapshot: RunSnapshot
    before: Boundary
    at: At
    seq: int = 0
    held: list[Batch] = field(default_factory=list)
    held_bytes: int = 0
    ends: list[Batch] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


class PeriodicRuns:
    """Runs of one source; `run` belongs to one thread."""

    def __init__(
        self,
        config: SourceConfig,
        reader: RunReader,
        event_log: EventLog,
        state: State,
        book: SchemaBook,
        store: ObjectStore,
        *,
        epoch: int,
        temp_dir: Path,
        marks: Callable[[], set[str]],
        stop_table: Callable[[TableId, CdcError], None],
        rests: Callable[[TableId], bool],
        halted: Callable[[], bool],
        make_room: Callable[[], None],
    ) -> None:
        """`marks`: tables that the lake says need to be read whole; `rests`: whether a table is stopped; `make_room`
        waits a moment for what is logged to land."""
        self._config = config
        self._source = config.name
        self._reader = reader
        self._log = event_log
        self._state = state
        self._book = book
        self._store = store
        self._epoch = epoch
        self._temp_dir = temp_dir
        self._marks = marks
        self._stop_table = stop_table
        self._rests = rests
        self._halted = halted
        self._make_room = make_room
        self._deadline = 0.0
        self.now: str = ""
        """The table that is being read, empty between runs."""

    def run(self) -> Counts:
        """One run, from its snapshot to the log; durable on return. Raises what stops the whole run; errors of one
        table stop that table. Halted if the process ends. After any of these the log holds nothing of the run that
        could be read, and it may be done again."""
        try:
            return self._run()
        except BaseException:
            # Nobody waits for the landing of what will not be ended.
            self._log.discard_open(self._source)
            raise

    def _run(self) -> Counts:
        self._deadline = time.monotonic() + self._config.run_timeout_s
        before = self._log.position(self._source)
        assert before is not None
        try:
            snapshot = self._reader.begin()
            at = At(self._epoch, max(snapshot.lsn, before.lsn + 1), snapshot.taken_at_us)
            run = _Open(snapshot, before, at)
            works = self._plan(snapshot)
            failpoint("periodic.after_snapshot")
            for work in sorted(works, key=lambda w: not w.whole):
                self.now = str(work.table)
                self._table(run, work)
                failpoint("periodic.between_tables")
        finally:
            self.now = ""
            self._reader.end()
        self._end(run)
        for work in works:
            if not work.failed:
                self._note(run, work)
        self._retire(snapshot)
        # All OIDs that are known are of this history now, and places may tell tables by them.
        self._state.set(epoch_fact(self._source), self._epoch)
        run.counts.tables = len(works)
        return run.counts

    # ---- which tables, and how ----

    def _plan(self, snapshot: RunSnapshot) -> list[Work]:
        works = []
        for found in snapshot.tables:
            table = found.schema.table
            if self._state.is_paused("table", f"{self._source}/{table}"):
                continue
            if found.refused is not None:
                if self._state.table(self._source, table).state != "stopped":
                    self._stop_table(table, SourceRefused(found.refused[0], hint=found.refused[1]))
                continue
            if self._state.table(self._source, table).state == "removed":
                self._state.update_table(self._source, table, state="new", reason="", hint="")
            if self._rests(table):
                continue
            try:
                works.append(self._work(found, snapshot))
            except SchemaConflict as e:
                self._stop_table(table, e)
        return works

    def _work(self, found: RunTable, snapshot: RunSnapshot) -> Work:
        table = found.schema.table
        changelog = ChangelogTable(self._store, self._source, table)
        tokens = changelog.tokens()
        known = self._state.table(self._source, table)
        counter = max(tokens.snapshot_seq + 1, known.snapshot_seq)
        self._state.update_table(self._source, table, oid=found.schema.oid, snapshot_seq=counter)
        schema = self._book.note_newest(found.schema)
        held = self._book.held(table)
        if held is None and (noted := changelog.shape()) is not None:
            held = noted[0]
        shape = schema
        if held is not None and self._config.contract(str(table)) == "freeze":
            shape = frozen(held, schema)
        ordered = [
            r for r in self._state.runs(self._source, table, states=["pending", "running"]) if r.kind in FULL_KINDS
        ]
        work = Work(found, schema, shape, ordered)
        # The transaction ids that a keyless table's first state is known by are those of one history.
        epochs = range(1 if schema.key else self._epoch, self._epoch + 1)
        if not any(tokens.complete(e, schema.oid) for e in epochs):
            work.whole = "the lake does not hold it yet"
        elif str(table) in self._marks():
            work.whole = "the lake says that it needs to be read anew"
        elif any(r.details.get("whole") for r in ordered):
            work.whole = next(r.reason for r in ordered if r.details.get("whole"))
        elif held is not None:
            work.whole = reading_reason(held, shape)
        self._by_cursor(work, snapshot)
        return work

    def _by_cursor(self, work: Work, snapshot: RunSnapshot) -> None:
        """Whether less than the whole table needs to be read, and from where on."""
        name = self._config.cursor
        column = next((c for c in work.schema.columns if c.name == name), None)
        if not name or column is None or not work.schema.key or column.type_oid not in KINDS or column.declared:
            return
        work.cursor = column
        saved = self._state.get(cursor_fact(self._source, work.table))
        memory = Memory.from_json(saved) if saved is not None and saved.get("epoch") == self._epoch else None
        if memory is not None and (memory.version, memory.storage) == (work.schema.version, work.found.storage):
            work.memory = memory
            due = time.time() >= memory.full_at + duration_s(self._config.full_every)
            low = memory.begin(snapshot.alive)
            if not (due or work.ordered or work.whole) and low is not None:
                work.past = Past(column=name, least=text_of(low, column, self._config.cursor_lag_s))

    def _retire(self, snapshot: RunSnapshot) -> None:
        """Tables that are gone, or not selected any more: the lake keeps what it has of them."""
        there = {t.schema.table for t in snapshot.tables}
        for known in self._state.tables(self._source):
            if known.table in there or known.table.is_own or known.state == "removed":
                continue
            reason = "it was dropped or renamed, or is not selected any more"
            log.warning("table %s: %s", known.table, reason, extra={"source": self._source, "table": str(known.table)})
            for run in self._state.runs(self._source, known.table, states=["pending", "running"]):
                self._state.update_run(run.id, state="cancelled", reason=reason)
            self._state.set(cursor_fact(self._source, known.table), None)
            self._state.update_table(self._source, known.table, state="removed", reason=reason, hint="")

    # ---- one table ----

    def _table(self, run: _Open, work: Work) -> None:
        """Read a table and log what is new of it; an error that only an operator can mend stops it alone."""
        try:
            if work.whole:
                self._read_whole(run, work)
            else:
                self._compare(run, work)
        except NotUnique as e:
            self._fail(run, work, SourceRefused(
                f"table {work.table}: {e}, as the lake tells keys apart ({', '.join(work.schema.key)})",
                hint=f'look for rows that share a key (a corrupt index?), or leave it out: exclude = ["{work.table}"]',
            ))  # fmt: skip
        except CdcError as e:
            if e.verdict is not Verdict.OPERATOR:
                raise
            self._fail(run, work, e)

    def _check(self) -> None:
        """Between two pieces of work: whether there is still time for more."""
        if self._halted():
            raise Halted
        if time.monotonic() > self._deadline:
            raise SourceUnavailable(
                f"source {self._source}: a run was given up after {self._config.run_timeout_s:g} s (run_timeout_s)",
                hint="raise run_timeout_s, or divide the tables between several sources",
            )

    def _logged(self, append: Callable[[], object]) -> None:
        """Append, waiting for landing to make room where that is all that is missing."""
        smallest, patient_until = self._log.size_bytes(), time.monotonic() + ROOM_S
        while True:
            try:
                append()
                return
            except LogFull:
                size = self._log.size_bytes()
                if size < smallest:
                    smallest, patient_until = size, time.monotonic() + ROOM_S
                if time.monotonic() > patient_until:
                    raise
                self._make_room()
                self._check()

    def _fail(self, run: _Open, work: Work, error: CdcError) -> None:
        work.failed = True
        run.counts.failed += 1
        self._stop_table(work.table, error)

    def _pieces(self, run: _Open, work: Work) -> Generator[RowsRead]:
        """What the source has of a table, and what its cursor has come to."""
        column = work.cursor
        with closing(self._reader.read(work.found.schema, work.past)) as pieces:
            for number, piece in enumerate(pieces, 1):
                self._check()
                if number % TRIM_PIECES == 0:
                    pa.default_memory_pool().release_unused()
                work.rows += piece.rows
                run.counts.read += piece.rows
                if column is not None and piece.rows:
                    mark = highest(piece.columns[work.schema.columns.index(column)], column, run.snapshot.clock_us)
                    work.mark = max((m for m in (mark, work.mark) if m is not None), default=None)
                yield piece

    def _read_whole(self, run: _Open, work: Work) -> None:
        table, schema = work.table, work.schema
        entry = work.run = self._entry(work)
        # Nothing that comes later has a transaction id: what the begin row says is seen is nothing.
        seen = {} if schema.key else {"xmin": "0", "xmax": "0", "xip": ""}
        facts = {"event": "begin", "kind": entry.kind, "oid": str(schema.oid), **seen}
        self._log_chunk(run, work, 0, control_batch(schema, facts, self._stamp(run, table, entry.id)))
        with closing(self._pieces(run, work)) as pieces:
            for number, piece in enumerate(pieces, 1):
                stamp = self._stamp(run, table, entry.id)
                batch = read_batch(schema, piece.columns, piece.raw, stamp, piece.rows)
                metrics.count_kept_as_text(self._source, table, batch.kept_as_text())
                self._log_chunk(run, work, number, batch)
                metrics.SNAPSHOT_ROWS.labels(self._source, metrics.table_label(self._source, table)).inc(piece.rows)
                failpoint("periodic.after_chunk")
        run.counts.snapshot += work.rows
        run.ends.append(self._end_row(run, work, entry))

    def _entry(self, work: Work) -> Run:
        """The entry of a whole reading: the order that it answers, unless that was begun before and cut short."""
        kind, reason, details = "resync", work.whole, {}
        if self._state.table(self._source, work.table).state == "new":
            kind = "first"
        if work.ordered:
            last = work.ordered[-1]
            if last.chunk_no < 0:
                return last
            kind, reason, details = last.kind, last.reason, last.details
            work.ordered = [r for r in work.ordered if r.chunk_no < 0]
            # Its rows are in the lake, or may be: they must not be taken for the new one's.
            self._state.update_run(last.id, state="cancelled", reason="it was cut short")
        return self._state.create_run(self._source, work.table, kind, reason=reason, details=details)

    def _log_chunk(self, run: _Open, work: Work, number: int, batch: Batch) -> None:
        """A piece of a whole reading, with its progress."""
        entry, table = work.run, work.table
        assert entry is not None
        following = batch.system("_seq")[-1].as_py() + 1 - SNAPSHOT_SEQ
        details = {**entry.details, "oid": work.schema.oid, "version": work.schema.version}

        def progress(tx: Any) -> None:
            self._state.update_run(
                entry.id, tx=tx, state="running", chunk_no=number, rows=work.rows, reason="",
                first_lsn=run.before.lsn, details=details,
            )  # fmt: skip
            self._state.update_table(
                self._source, table, tx=tx, state="snapshotting", reason="", hint="", snapshot_seq=following
            )
            self._state.set(shape_fact(self._source, table), work.schema.version, tx)

        kind = "chunk" if number else "control"
        self._logged(
            lambda: self._log.append_chunk(
                self._source, [batch], run=entry.id, chunk=number, kind=kind, within=progress
            )
        )

    def _end_row(self, run: _Open, work: Work, entry: Run) -> Batch:
        """The row that makes what was read count. Its place in the count is taken before it is logged."""
        seq = self._stamp(run, work.table, entry.id).seq
        self._state.update_table(self._source, work.table, snapshot_seq=seq - SNAPSHOT_SEQ + 1)
        stamp = Stamp(epoch=run.at.epoch, lsn=run.at.lsn, seq=seq, run=entry.id, at_us=run.at.at_us)
        facts = {"event": "end", "kind": entry.kind, "oid": str(work.schema.oid)}
        return control_batch(work.schema, facts, stamp)

    def _stamp(self, run: _Open, table: TableId, entry: str) -> Stamp:
        seq = SNAPSHOT_SEQ + self._state.table(self._source, table).snapshot_seq
        return Stamp(epoch=self._epoch, lsn=run.before.lsn, seq=seq, run=entry, at_us=run.at.at_us)

    def _tell_shape(self, run: _Open, work: Work) -> None:
        """A shape that no row shows: the lake follows all the same."""
        fact = shape_fact(self._source, work.table)
        told = self._state.get(fact)
        if told == work.schema.version:
            return
        if told is None and ChangelogTable(self._store, self._source, work.table).has_columns(work.schema):
            self._state.set(fact, work.schema.version)
            return
        entry = self._state.create_run(self._source, work.table, "shape", state="done")
        stamp = self._stamp(run, work.table, entry.id)

        def note(tx: Any) -> None:
            self._state.update_table(self._source, work.table, tx=tx, snapshot_seq=stamp.seq - SNAPSHOT_SEQ + 1)
            self._state.set(fact, work.schema.version, tx)

        facts = {"event": "shape", "kind": "shape", "oid": str(work.schema.oid)}
        control = control_batch(work.schema, facts, stamp)
        self._log.append_chunk(self._source, [control], run=entry.id, chunk=0, kind="control", within=note)

    def _compare(self, run: _Open, work: Work) -> None:
        self._temp_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="run-", dir=self._temp_dir) as folder:
            held = HeldRows(self._store, self._source, work.table, work.shape, Path(folder))
            comparison = Comparison(
                work.schema, work.shape, held, Path(folder),
                source_bytes=work.found.bytes, partial=work.past is not None, check=self._check,
            )  # fmt: skip
            try:
                with closing(self._pieces(run, work)) as pieces:
                    for piece in pieces:
                        comparison.take(piece)
                self._tell_shape(run, work)
                for old, new, found in comparison.parts():
                    self._log_found(run, work, old, new, found)
            finally:
                comparison.close()
        pa.default_memory_pool().release_unused()

    def _log_found(self, run: _Open, work: Work, old: Images, new: Images, found: Found) -> None:
        """Changes of one part into the run's transaction."""
        schema = work.schema
        whole = work.shape is schema
        before = old.take(found.updated_old) if whole else None
        sides: list[tuple[str, Images, Images | None]] = [
            ("d", old.take(found.deleted), None),
            ("u", new.take(found.updated_new), before),
            ("c", new.take(found.inserted), None),
        ]
        label = metrics.table_label(self._source, work.table)
        for op, rows, was in sides:
            for batch in batches(schema, op, run.at, run.seq, rows, was):
                run.seq += batch.data.num_rows
                run.held.append(batch)
                run.held_bytes += batch.data.nbytes
                metrics.CHANGES.labels(self._source, label).inc(batch.data.num_rows)
                metrics.count_kept_as_text(self._source, work.table, batch.kept_as_text())
                if run.held_bytes >= PORTION_BYTES:
                    self._flush(run)
        run.counts.deleted += len(found.deleted)
        run.counts.updated += len(found.updated_new)
        run.counts.inserted += len(found.inserted)

    def _flush(self, run: _Open) -> None:
        if run.held:
            portion = Portion(batches=run.held, head_lsn=run.snapshot.lsn)
            self._logged(lambda: self._log.append(self._source, portion))
            failpoint("periodic.after_portion")
        run.held, run.held_bytes = [], 0

    # ---- its end ----

    def _end(self, run: _Open) -> None:
        """The boundary that makes all of it one transaction. A run that found nothing has the server's own position."""
        changed = run.seq > 0 or bool(run.ends)
        lsn = run.at.lsn if changed else max(run.before.lsn, run.snapshot.lsn)
        failpoint("periodic.before_boundary")
        portion = Portion(
            batches=[*run.held, *run.ends],
            boundary=Boundary(self._epoch, lsn, lsn),
            head_lsn=run.snapshot.lsn,
            committed_at_us=run.at.at_us if changed else 0,
        )
        self._logged(lambda: self._log.append(self._source, portion))
        failpoint("periodic.after_boundary")

    def _note(self, run: _Open, work: Work) -> None:
        """What is remembered of a table. All of it may be lost: then more is read than needed."""
        full = work.past is None
        # Under the log's lock no table is stopped: landing may have done so already, for what this run brought.
        with self._log.lock(), self._state.transaction() as tx:
            if self._rests(work.table):
                return
            if work.cursor is not None:
                kept = {**self._memory(run, work).to_json(), "epoch": self._epoch}
                self._state.set(cursor_fact(self._source, work.table), kept, tx)
            if work.whole:
                # Of a frozen table there is more to read when it thaws.
                version = work.schema.version if work.shape is work.schema else None
                self._state.set(whole_fact(self._source, work.table), version, tx)
            for entry in {r.id for r in work.ordered} | ({work.run.id} if work.run else set()) if full else ():
                self._state.update_run(entry, tx=tx, state="done", rows=work.rows, reason="")
            self._state.update_table(self._source, work.table, tx=tx, state="streaming", reason="", hint="")

    def _memory(self, run: _Open, work: Work) -> Memory:
        alive, now = run.snapshot.alive, run.at.at_us / 1e6
        if work.memory is None:
            return fresh(work.schema.version, work.found.storage, now, work.mark, alive)
        return work.memory.after(work.mark, alive, full_at=now if work.past is None else None)


__all__ = ["Counts", "Halted", "PeriodicRuns", "cursor_fact", "whole_fact"]
