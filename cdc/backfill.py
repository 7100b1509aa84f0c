"""Snapshots while the stream runs: first snapshot, resync and re-reading of single keys, chunk by chunk.

Reader and log appender are one process, so what is in the log when a snapshot is taken is known; the rules that make
this lose nothing are in docs/snapshots.md, and each is named where it is kept. A chunk and its progress are one
append. A run that is killed goes on after its last chunk; a table whose shape changes starts its run anew. Takes no
lock on the source beyond ACCESS SHARE, keeps no snapshot open longer than one chunk (but for a table without a
key), and writes nothing there. One run at a time per source; it does not merge and does not decide which tables
exist.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cdc import metrics
from cdc.appending import KEPT_DETAILS, WHOLE_KINDS, Appender, Step
from cdc.candidates import Candidates
from cdc.errors import CdcError, FilterRefused, InvariantBroken, SourceRefused, Verdict
from cdc.failpoints import failpoint
from cdc.filtered import KEYS_PER_CHUNK, FilteredRun, Key, Piece
from cdc.log import EventLog
from cdc.ports import RowsRead, SnapshotReader, TableSnapshot
from cdc.runs import Run
from cdc.schema import SchemaBook
from cdc.state import State
from cdc.table import TableId, TableSchema
from cdc.window import must_read_again, unseen

log = logging.getLogger(__name__)

NUDGE_S = 0.3
"""So long the stream may take to reach what a chunk has seen before a quiet server is asked to flush."""
NUDGE_AGAIN_S = 5.0
SETTLE_S = 0.01
RETRY_S = 0.05
"""Pause before a snapshot is taken again because something logged is not visible yet."""


@dataclass(slots=True)
class Wish:
    """Keys of a table to read once more (rule 9)."""

    table: TableId
    keys: list[Key]


@dataclass(slots=True)
class _Chunk:
    """Rows that have been read and wait to be appended."""

    run: Run
    schema: TableSchema
    snapshot: TableSnapshot
    rows: RowsRead
    mark: _Mark
    step: Step
    wish: Wish | None
    since: float
    nudge_at: float


@dataclass(slots=True, frozen=True)
class _Mark:
    """The log at one moment: newest offset, and the position whose transactions a snapshot must see."""

    offset: int
    epoch: int
    lsn: int


class Backfill:
    """Runs of one source. `step` belongs to one thread; `order`, `cancel` and `wish` may be called from any."""

    def __init__(
        self,
        source: str,
        reader: SnapshotReader,
        event_log: EventLog,
        state: State,
        book: SchemaBook,
        *,
        chunk_rows: int,
        landed_lsn: Callable[[TableId], int],
        stop_table: Callable[[TableId, CdcError], None],
        nudge: Callable[[], int],
        candidates: Callable[[Run, TableSchema], Candidates | None] = lambda run, schema: Candidates(),
    ) -> None:
        """`landed_lsn` gives the highest position that the lake holds for a table (rule 0); `nudge` makes a quiet
        server flush and send what it has written; `candidates` looks through the lake for a filtered run."""
        self._source = source
        self._reader = reader
        self._log = event_log
        self._state = state
        self._book = book
        self._chunk_rows = chunk_rows
        self._landed_lsn = landed_lsn
        self._stop_table = stop_table
        self._nudge = nudge
        self._candidates = candidates
        self._appender = Appender(source, event_log, state)
        self._filtered: dict[str, FilteredRun] = {}
        self._chunk: _Chunk | None = None
        self._wishes: list[Wish] = []
        self._lock = threading.Lock()
        self._before: dict[str, set[str]] = {}
        self._not_before = 0.0
        self._halted = False
        for run in state.runs(source, states=["running"]):
            if run.kind == "keys":
                # Whoever wished for them finds out anew that they are missing.
                state.update_run(run.id, state="cancelled", reason="the daemon was stopped")

    def order(self, table: TableId, kind: str, reason: str = "", *, settle: bool = False) -> Run:
        """A run of the whole table; one that is pending is joined, one that is running is followed by the new one.

        `settle`: it answers a change that the stream does not show. It begins only behind everything that was written
        before the order: what the stream brings after the begin must not be older than that change.
        """
        details: dict[str, object] = {"settle": True} if settle else {}
        if reason:
            details["why"] = reason
        for run in self._state.runs(self._source, table, states=["pending"]):
            if run.kind in WHOLE_KINDS:
                if not settle:
                    return run
                # Who had written before is asked again, and the stream waited for.
                known = {k: v for k, v in run.details.items() if k != "behind_lsn"}
                self._before.pop(run.id, None)
                return self._state.update_run(run.id, details={**known, **details})
        return self._state.create_run(self._source, table, kind, reason=reason, details=details)

    def is_ordered(self, table: TableId) -> bool:
        """Whether a run of the whole table is pending or under way."""
        runs = self._state.runs(self._source, table, states=["pending", "running"])
        return any(r.kind in WHOLE_KINDS for r in runs)

    def order_filtered(self, table: TableId, where: str, keys: Sequence[Key], reason: str = "") -> tuple[Run, bool]:
        """A run of the rows that meet `where` (the source's SQL; empty: none) and of those that have one of `keys`
        (texts of the key's columns), and whether it was ordered before: an identical one that is pending is joined.
        SourceRefused for a table without a key."""
        schema = self._book.latest(table)
        if schema is not None and not schema.key:
            raise keyless(table)
        named = [list(key) for key in keys]
        if schema is not None and any(len(key) != len(schema.key) for key in named):
            raise SourceRefused(
                f"the key of table {table} has {len(schema.key)} columns ({', '.join(schema.key)})",
                hint="name all of them, in this order",
            )
        with self._lock:
            for run in self._state.runs(self._source, table, states=["pending"]):
                if run.kind == "filtered" and (run.where_sql, run.details.get("keys", [])) == (where, named):
                    return run, True
            details: dict[str, object] = {"keys": named} if named else {}
            if reason:
                details["why"] = reason
            run = self._state.create_run(
                self._source, table, "filtered", where_sql=where, reason=reason, details=details
            )
        return run, False

    def tell_shape(self, schema: TableSchema) -> None:
        """Append a control row in the table's newest schema version (cdc.appending). By the thread of `step` only."""
        self._appender.tell_shape(schema)

    def cancel(self, table: TableId) -> list[str]:
        """Take back the table's pending and running resyncs; a first snapshot is needed and stays, and so does what
        answers a change that the stream did not show."""
        cancelled = []
        for run in self._state.runs(self._source, table, states=["pending", "running"]):
            if run.kind in ("resync", "filtered") and not run.details.get("settle"):
                self._state.update_run(run.id, state="cancelled")
                if run.state == "running" and run.kind == "resync":
                    # What it has read so far is as good as what was there: the table goes on as before.
                    self._state.update_table(self._source, table, state="streaming", reason="", hint="")
                cancelled.append(run.id)
        return cancelled

    def wish(self, table: TableId, keys: Sequence[tuple[str, ...]]) -> None:
        """Read these keys once more; repeated wishes for the same table replace each other."""
        with self._lock:
            self._wishes = [w for w in self._wishes if w.table != table]
            self._wishes.append(Wish(table, list(keys)))

    def halt(self) -> None:
        """Do nothing any more: soon after, no step is at work. Thread-safe, and for good."""
        self._halted = True

    @property
    def idle(self) -> bool:
        """Whether nothing is ordered."""
        with self._lock:
            wishes = bool(self._wishes)
        waiting = wishes or self._chunk is not None
        return not waiting and not self._state.runs(self._source, states=["pending", "running"])

    def step(self) -> bool:
        """One bounded piece of work: start a run, read a chunk, or end a run. False if there was nothing to do or it
        must wait; errors of one table stop that table, others are raised."""
        if self._halted or time.monotonic() < self._not_before or self._log.position(self._source) is None:
            return False
        if self._chunk is not None:
            return self._guarded(self._chunk.run.table, self._settle_chunk, self._chunk.run)
        with self._lock:
            wish = self._wishes.pop(0) if self._wishes else None
        if wish is not None:
            return self._guarded(wish.table, lambda: self._read_keys(wish))
        runs = self._state.runs(self._source, states=["pending", "running"])
        runs = [r for r in runs if not self._state.is_paused("table", f"{self._source}/{r.table}")]
        if not runs:
            return False
        run = next((r for r in runs if r.state == "running"), runs[0])
        step = self._start if run.state == "pending" else self._go_on
        return self._guarded(run.table, lambda: step(run), run)

    def _guarded(self, table: TableId, work: Callable[[], bool], run: Run | None = None) -> bool:
        try:
            return work()
        except CdcError as e:
            if e.verdict is not Verdict.OPERATOR:
                raise
            self._chunk = None
            if run is not None:
                self._state.update_run(run.id, state="failed", reason=e.args[0])
            if isinstance(e, FilterRefused):
                log.warning(e.args[0], extra={"source": self._source, "table": str(table), "hint": e.hint})
            else:
                self._stop_table(table, e)
            return True
        finally:
            self._reader.end()
            if self._chunk is None:
                self._log.let_go(self._source)

    def _start(self, run: Run) -> bool:
        schema = next((t.schema for t in self._reader.tables(run.table).tables), None)
        if schema is None:
            # What has become of the table is for the next look at the catalog to say.
            why = f"table {run.table} is not in the publication of source {self._source} (mended by `cdc setup`)"
            self._state.update_run(run.id, state="failed", reason=why)
            return True
        if not self._is_covered(run):
            return False
        schema = self._book.register(schema)
        if not schema.key and run.kind == "filtered":
            self._state.update_run(run.id, state="failed", reason=keyless(run.table).args[0])
            return True
        if not schema.key:
            return self._read_keyless(run, schema)
        with self._log.lock():
            self._appender.begin(run, schema, {})
        return True

    def _is_covered(self, run: Run) -> bool:
        """Rule 0: whoever wrote before we saw everything must have ended, and the log must be where the lake is."""
        position = self._log.position(self._source)
        assert position is not None
        if position.lsn < self._landed_lsn(run.table):
            return self._wait(run, "waits for the stream to reach what the lake holds")
        covered = f"covered:{self._source}/{run.table}"
        settles = bool(run.details.get("settle"))
        behind = run.details.get("behind_lsn")
        if behind is not None:
            return position.end_lsn >= behind or self._wait(run, "waits for the stream to reach what it answers")
        if not settles and self._state.get(covered) == position.epoch:
            return True
        now = self._reader.writers()
        before = self._before.setdefault(run.id, set(now))
        before &= set(now)
        if before:
            return self._wait(run, f"waits for older transactions: {', '.join(sorted(now[b] for b in before))}")
        del self._before[run.id]
        if settles:
            self._state.update_run(run.id, details={**run.details, "behind_lsn": self._nudge()})
        self._state.set(covered, position.epoch)
        return not settles

    def _go_on(self, run: Run) -> bool:
        schema = self._book.get(run.table, int(run.details["version"]))
        position = self._log.position(self._source)
        assert position is not None
        if not schema.key or run.details.get("epoch") != position.epoch:
            # The one snapshot of a keyless table ended with the process; another epoch is another history.
            return self._start_anew(run, "the run was interrupted")
        piece = self._next(run, schema)
        if piece is None:
            return self._wait(run, "waits for the lake to hold what it has read")
        began = time.perf_counter()
        mark = self._mark()
        snapshot = self._reader.begin(schema)
        if snapshot.schema.table != run.table or snapshot.schema.oid != schema.oid:
            return self._start_anew(run, "the table was renamed or made anew")
        if self._book.register(snapshot.schema).version != schema.version:
            return self._start_anew(run, "the table's schema changed")
        relfilenode = run.details.get("relfilenode")
        if relfilenode is not None and relfilenode != snapshot.relfilenode:
            return self._start_anew(run, "the table was rewritten or truncated")
        if not self._sees_all(run, snapshot, mark):
            return False
        failpoint("backfill.after_snapshot")
        rows = self._reader.read(**piece.read)
        self._reader.end()
        metrics.SNAPSHOT_CHUNK_SECONDS.labels(self._source).observe(time.perf_counter() - began)
        return self._hold(run, schema, snapshot, rows, mark, piece.step(rows))

    def _next(self, run: Run, schema: TableSchema) -> Piece | None:
        """What the run reads next; None if it must wait."""
        if run.kind == "filtered":
            way = self._filtered.setdefault(run.id, FilteredRun())
            return way.next(run, lambda: self._candidates(run, schema), self._chunk_rows)
        after = tuple(run.last_key) if run.last_key else None
        return Piece({"after": after, "rows_max": self._chunk_rows}, whole_step)

    def _hold(
        self,
        run: Run,
        schema: TableSchema,
        snapshot: TableSnapshot,
        rows: RowsRead,
        mark: _Mark,
        step: Step,
        wish: Wish | None = None,
    ) -> bool:
        now = time.monotonic()
        self._chunk = _Chunk(run, schema, snapshot, rows, mark, step, wish, now, now + NUDGE_S)
        return self._settle_chunk()

    def _settle_chunk(self) -> bool:
        """Append the chunk once every transaction that its snapshot saw is in the log.

        Else one of them would come behind the chunk's rows: harmless for whole rows, but a key that moved and left a
        TOAST value alone would take it from a newer row that has its old key by then.
        """
        chunk = self._chunk
        assert chunk is not None
        position = self._log.position(self._source)
        assert position is not None
        now = time.monotonic()
        if position.epoch == chunk.mark.epoch and position.end_lsn < chunk.snapshot.lsn:
            if now >= chunk.nudge_at:
                self._nudge()
                chunk.nudge_at = now + NUDGE_AGAIN_S
            if now - chunk.since > NUDGE_AGAIN_S:
                return self._wait(chunk.run, "waits for the stream to reach what the chunk has seen", SETTLE_S)
            self._not_before = now + SETTLE_S
            return False
        self._chunk = None
        appended = position.epoch == chunk.mark.epoch and self._append_chunk(chunk)
        if appended:
            failpoint("backfill.after_chunk")
        elif chunk.wish is not None:
            self._state.update_run(chunk.run.id, state="cancelled")
            self.wish(chunk.wish.table, chunk.wish.keys)
        if appended and chunk.wish is not None and len(chunk.wish.keys) > KEYS_PER_CHUNK:
            self.wish(chunk.wish.table, chunk.wish.keys[KEYS_PER_CHUNK:])
        return appended

    def _mark(self) -> _Mark:
        """k: what is in the log before the snapshot is taken. What comes behind it stays there until the chunk is
        settled, although it may have landed long before."""
        with self._log.lock():
            position = self._log.position(self._source)
            assert position is not None
            offset = self._log.end_offset(self._source)
            self._log.hold(self._source, offset)
            return _Mark(offset, position.epoch, position.lsn)

    def _sees_all(self, run: Run, snapshot: TableSnapshot, mark: _Mark) -> bool:
        """Rule 1: a commit can be in our log before it is visible; such a snapshot would bring back older rows."""
        if not self._log.hidden(self._source, snapshot.visibility, through_lsn=mark.lsn):
            return True
        return self._wait(run, "waits for a logged transaction to become visible", RETRY_S)

    def _append_chunk(self, chunk: _Chunk) -> bool:
        """Window and append under one lock of the log (rules 6, 8, 10, 11, 12)."""
        run, schema, snapshot = chunk.run, chunk.schema, chunk.snapshot
        with self._log.lock():
            if not self._log.let_go(self._source):
                return self._wait(run, "the log had no room for what a chunk waited for; it is read again", RETRY_S)
            behind = self._log.records(self._source, chunk.mark.offset, table=run.table)
            records = [r for r in behind if r.kind == "change"]
            if not schema.key:
                # Its one snapshot stands at the begin row, whatever has come since.
                records = []
            if must_read_again(schema, [(r.version, r.has_truncate) for r in records]):
                return self._wait(run, "the table changed while a chunk was read; it is read again", RETRY_S)
            window = [unseen(self._log.read(r, schema), snapshot.visibility) for r in records]
            current = self._state.run(run.id)
            if current is not None and current.state == "running":
                self._appender.append(current, schema, snapshot, chunk.rows, window, chunk.step)
            return True

    def _read_keyless(self, run: Run, schema: TableSchema) -> bool:
        """Rule 16: one snapshot of the whole table, its visibility in the begin row."""
        snapshot = self._reader.begin(schema)
        renamed = snapshot.schema.table != run.table
        if renamed or self._book.register(snapshot.schema).version != schema.version:
            return self._wait(run, "the table changed; the run begins again", RETRY_S)
        seen = snapshot.visibility
        with self._log.lock():
            if self._log.hidden(self._source, seen, through_lsn=None):
                return self._wait(run, "waits for a logged transaction to become visible", RETRY_S)
            running = ",".join(map(str, sorted(seen.in_progress)))
            self._appender.begin(run, schema, {"xmin": str(seen.xmin), "xmax": str(seen.xmax), "xip": running})
        after: tuple[str, ...] | None = None
        while True:
            current = self._state.run(run.id)
            if self._halted or current is None or current.state != "running":
                return True
            rows = self._reader.read(after=after, rows_max=self._chunk_rows)
            if rows.done:
                # Its end waits for what the snapshot saw: behind it the key holds that the table was read by.
                self._reader.end()
                return self._hold(current, schema, snapshot, rows, self._mark(), whole_step(rows))
            with self._log.lock():
                self._appender.append(current, schema, snapshot, rows, [], whole_step(rows))
            failpoint("backfill.after_chunk")
            after = rows.last_key

    def _read_keys(self, wish: Wish) -> bool:
        """Rule 9: rows whose unknown columns nothing in the lake knows are read once more by key."""
        schema = self._book.held(wish.table) or self._book.latest(wish.table)
        if schema is None or not schema.key:
            raise InvariantBroken(f"keys of table {wish.table} cannot be read again: it has no key")
        keys = wish.keys[:KEYS_PER_CHUNK]
        mark = self._mark()
        snapshot = self._reader.begin(schema)
        if self._log.hidden(self._source, snapshot.visibility, through_lsn=mark.lsn):
            self._not_before = time.monotonic() + RETRY_S
            self.wish(wish.table, wish.keys)
            return False
        under_lock = self._book.register(snapshot.schema)
        if under_lock.key != schema.key:
            # The keys are of another identity. Once the stream shows the switch, the table is read anew.
            self._not_before = time.monotonic() + RETRY_S
            return False
        rows = self._reader.read(keys=keys)
        self._reader.end()
        run = self._state.create_run(
            self._source, wish.table, "keys", state="running", reason="values that no message carried",
            details={"oid": schema.oid, "version": under_lock.version, "epoch": mark.epoch},
        )  # fmt: skip
        return self._hold(run, under_lock, snapshot, rows, mark, Step(done=True, asked=keys), wish)

    def _start_anew(self, run: Run, why: str) -> bool:
        """Rule 2: what was read is of another table by now. The new run's begin row makes the old rows orphans."""
        log.warning("snapshot run starts anew", extra={"source": self._source, "table": str(run.table), "why": why})
        with self._state.transaction() as tx:
            self._state.update_run(run.id, tx=tx, state="cancelled", reason=why)
            # What it answers holds for the new run, which is asked to wait for it once more.
            kept = {k: v for k, v in run.details.items() if k in KEPT_DETAILS}
            self._state.create_run(
                self._source, run.table, run.kind, where_sql=run.where_sql, reason=why, details=kept, tx=tx
            )
        return True

    def _wait(self, run: Run, why: str, seconds: float = 0.5) -> bool:
        if run.reason != why:
            self._state.update_run(run.id, reason=why)
        self._not_before = time.monotonic() + seconds
        return False


def whole_step(rows: RowsRead) -> Step:
    """The step that a chunk of a whole table is."""
    return Step(done=rows.done, last_key=rows.last_key)


def keyless(table: TableId) -> SourceRefused:
    """A table whose rows cannot be told apart cannot be read in part."""
    return SourceRefused(
        f"table {table} has no key, so a part of it cannot be read anew", hint=f"read all of it: `cdc resync {table}`"
    )
