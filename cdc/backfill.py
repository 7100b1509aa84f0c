"""Snapshots while the stream runs: first snapshot, resync and re-reading of single keys, chunk by chunk.

Reader and log appender are one process, so what is in the log when a snapshot is taken is known; the rules that make
this lose nothing are in docs/snapshots.md, and each is named where it is kept. A chunk and its progress are one
append. A run that is killed goes on after its last chunk; a table whose shape changes starts its run anew. Takes no
lock on the source beyond ACCESS SHARE, keeps no snapshot open longer than one chunk (but for a table without a
key), and writes nothing there. Several lanes (cdc.reading) read several tables, and ranges of one, side by side; here
is decided which lane does what. It does not merge and does not decide which tables exist.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from cdc.appending import KEPT_DETAILS, WHOLE_KINDS, Appender, Step
from cdc.candidates import Candidates
from cdc.errors import CdcError, FilterRefused, InvariantBroken, NotPublished, SourceRefused, Verdict
from cdc.failpoints import failpoint
from cdc.filtered import KEYS_PER_CHUNK, FilteredRun, Key
from cdc.log import EventLog
from cdc.pace import FIRST_BLOCKS, FIRST_ROWS, ChunkSize, RateLimit
from cdc.ports import RowsRead, SnapshotReader, TableSnapshot
from cdc.ranges import details_of, first_free, ranges_of
from cdc.reading import RETRY_S, Anew, Lane, Later, Piece, Wish
from cdc.runs import Run
from cdc.schema import SchemaBook
from cdc.state import State
from cdc.table import TableId, TableSchema

log = logging.getLogger(__name__)

PARTS_MAX = 32
"""Ranges of one table."""
PAUSED_S = 0.5


class Backfill:
    """Runs of one source. `step` of each lane belongs to one thread; `order`, `cancel`, `wish` may be by any."""

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
        more_readers: Sequence[SnapshotReader] = (),
        chunk_bytes: int = 32 << 20,
        rate: RateLimit | None = None,
    ) -> None:
        """`landed_lsn` gives the highest position that the lake holds for a table (rule 0); `nudge` makes a quiet
        server flush and send what it has written; `candidates` looks through the lake for a filtered run.
        With `more_readers` there is a lane for each of all readers, and one of them computes while the others read."""
        self._source = source
        self._log = event_log
        self._state = state
        self._book = book
        self._rate = rate or RateLimit(0, 0)
        self._bounds = self._rate.chunk_bounds(chunk_rows, chunk_bytes)
        self._landed_lsn = landed_lsn
        self._stop_table = stop_table
        self._nudge = nudge
        self._candidates = candidates
        self._appender = Appender(source, event_log, state)
        self._filtered: dict[str, FilteredRun] = {}
        self._readers = max(1, len(more_readers))
        turns = threading.Semaphore(self._readers) if more_readers else None
        self._lanes = [
            Lane(number, source, each, event_log, state, book, self._appender, nudge, turns)
            for number, each in enumerate([reader, *more_readers])
        ]
        self._claims: dict[int, tuple[str, int | None, TableId]] = {}
        """What each lane is at: run, range, table."""
        self._sizes: dict[str, ChunkSize] = {}
        self.open = True
        """Whether anything was ordered when somebody last looked."""
        self._wishes: list[Wish] = []
        self._lock = threading.RLock()
        self._before: dict[str, set[str]] = {}
        self._not_before: dict[str, float] = {}
        """Runs that wait, and until when."""
        self._halted = False
        for run in state.runs(source, states=["running"]):
            if run.kind == "keys":
                # Whoever wished for them finds out anew that they are missing.
                state.update_run(run.id, state="cancelled", reason="the daemon was stopped")

    def order(self, table: TableId, kind: str, reason: str = "", *, settle: bool = False) -> Run:
        """A run of the whole table; one that is pending is joined, one that is running is followed by the new one.

        `settle`: it answers a change that the stream does not show. It begins only behind everything that was written
        before the order: what the stream brings after the begin must not be older than that change. A first snapshot
        always does: nothing is known of what the table met before it.
        """
        settle = settle or kind == "first"
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

    def retire(self, table: TableId, reason: str, hint: str) -> None:
        """The table is gone, and so are its runs. Under the log's lock: no chunk that is appended takes it back."""
        with self._log.lock():
            for run in self._state.runs(self._source, table, states=["pending", "running"]):
                self._state.update_run(run.id, state="cancelled", reason=reason)
            self._state.update_table(self._source, table, state="removed", reason=reason, hint=hint)

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

    def takes(self) -> list[int]:
        """One number a lane, odd while it takes a snapshot that has not been held against the log (rule 1). Whoever
        forgets logged transactions that no snapshot can miss any more waits for those that are being taken."""
        return [lane.takes for lane in self._lanes]

    @property
    def idle(self) -> bool:
        """Whether nothing is ordered."""
        with self._lock:
            waiting = bool(self._wishes) or any(lane.chunk is not None for lane in self._lanes)
        return not waiting and not self._state.runs(self._source, states=["pending", "running"])

    def step(self, number: int = 0, pause: str = "") -> bool:
        """One bounded piece of work of a lane: start a run, read a chunk, or end a run. False if there was nothing to
        do or it must wait; errors of one table stop that table, others are raised. `pause`: why nothing is to be read
        now; what has been read is appended all the same. Each lane belongs to one thread."""
        lane = self._lanes[number]
        if self._halted or time.monotonic() < lane.not_before or self._log.position(self._source) is None:
            return False
        if lane.chunk is not None:
            return self._guarded(lane, lane.chunk.run.table, self._settle, lane.chunk.run)
        if number and not self.open:
            return False
        held = self._rate.wait_s()
        if held > 0:
            pause = pause or "is held to the rate limit"
            lane.not_before = time.monotonic() + min(held, PAUSED_S)
        if pause:
            self._tell(pause)
            return False
        job = self._claim(lane)
        return job() if job is not None else False

    def _tell(self, why: str) -> None:
        """Say of all runs why nothing is read."""
        with self._lock:
            for run in self._state.runs(self._source, states=["pending", "running"]):
                if run.reason != why:
                    self._state.update_run(run.id, reason=why)

    def _claim(self, lane: Lane) -> Callable[[], bool] | None:
        """What the lane does next; no other lane does it meanwhile."""
        with self._lock:
            taken = list(self._claims.values())
            for wish in self._wishes:
                if all(table != wish.table for _, _, table in taken):
                    self._wishes.remove(wish)
                    self._claims[lane.number] = ("", None, wish.table)
                    return partial(self._guarded, lane, wish.table, partial(self._read_keys, wish=wish))
            # A run of single keys belongs to the lane that has made it.
            runs = [r for r in self._state.runs(self._source, states=["pending", "running"]) if r.kind != "keys"]
            self.open = bool(runs)
            if not runs and not taken:
                # A lane may still be at a run that has been cancelled meanwhile, and knows it by these.
                for known in (self._sizes, self._filtered, self._not_before, self._before):
                    known.clear()
            runs = [r for r in runs if not self._state.is_paused("table", f"{self._source}/{r.table}")]
            running = [r for r in runs if r.state == "running"]
            now = time.monotonic()
            for run in running:
                if now < self._not_before.get(run.id, 0.0):
                    continue
                own = [number for run_id, number, _ in taken if run_id == run.id]
                number = self._free_range(run, own)
                if number is not None:
                    self._claims[lane.number] = (run.id, number, run.table)
                    return partial(self._guarded, lane, run.table, partial(self._go_on, run=run, number=number), run)
            busy = {r.table for r in running} | {table for _, _, table in taken}
            begun = len({run_id for run_id, _, _ in taken if run_id} | {r.id for r in running})
            for run in runs:
                if run.state == "pending" and run.table not in busy and begun < self._readers:
                    busy.add(run.table)
                    if now >= self._not_before.get(run.id, 0.0):
                        self._claims[lane.number] = (run.id, None, run.table)
                        return partial(self._guarded, lane, run.table, partial(self._start, run=run), run)
            return None

    def _free_range(self, run: Run, taken: list[int | None]) -> int | None:
        """A range of the run that nobody reads. Before it is planned, and where its pieces follow each other, the run
        has one."""
        if run.kind in WHOLE_KINDS and "ranges" in run.details:
            return first_free(run, [n for n in taken if n is not None])
        return None if taken else 0

    def _guarded(self, lane: Lane, table: TableId, work: Callable[[Lane], bool], run: Run | None = None) -> bool:
        try:
            return work(lane)
        except Later as e:
            self._wait(lane, run, e)
            return False
        except NotPublished as e:
            # As in `_start`: no error of the table. It may come back, and is read anew then.
            lane.chunk = None
            if run is not None:
                self._state.update_run(run.id, state="failed", reason=e.args[0])
            return True
        except Anew as e:
            assert run is not None
            lane.chunk = None
            return self._start_anew(run, str(e))
        except CdcError as e:
            if e.verdict is not Verdict.OPERATOR:
                raise
            lane.chunk = None
            if run is not None:
                self._state.update_run(run.id, state="failed", reason=e.args[0])
            if isinstance(e, FilterRefused):
                log.warning(e.args[0], extra={"source": self._source, "table": str(table), "hint": e.hint})
            else:
                self._stop_table(table, e)
            return True
        finally:
            lane.rest()
            if lane.chunk is None:
                with self._lock:
                    self._claims.pop(lane.number, None)

    def _start(self, lane: Lane, run: Run) -> bool:
        schema = next((t.schema for t in lane.reader.tables(run.table).tables), None)
        if schema is None:
            # What has become of the table is for the next look at the catalog to say.
            why = f"table {run.table} is not in the publication of source {self._source} (mended by `cdc setup`)"
            self._state.update_run(run.id, state="failed", reason=why)
            return True
        self._be_covered(lane, run)
        schema = self._book.register(schema)
        if not schema.key and run.kind == "filtered":
            self._state.update_run(run.id, state="failed", reason=keyless(run.table).args[0])
            return True
        if not schema.key:
            return self._read_keyless(lane, run, schema)
        with self._log.lock():
            self._appender.begin(run, schema, {})
        return True

    def _be_covered(self, lane: Lane, run: Run) -> None:
        """Rule 0: whoever wrote before we saw everything must have ended, and the log must be where the lake is."""
        position = self._log.position(self._source)
        assert position is not None
        if position.lsn < self._landed_lsn(run.table):
            raise Later("waits for the stream to reach what the lake holds")
        covered = f"covered:{self._source}/{run.table}"
        settles = bool(run.details.get("settle"))
        behind = run.details.get("behind_lsn")
        if behind is not None:
            if position.end_lsn < behind:
                raise Later("waits for the stream to reach what it answers")
            return
        if not settles and self._state.get(covered) == position.epoch:
            return
        now = lane.reader.writers()
        before = self._before.setdefault(run.id, set(now))
        before &= set(now)
        if before:
            raise Later(f"waits for older transactions: {', '.join(sorted(now[b] for b in before))}")
        self._before.pop(run.id, None)
        if settles:
            self._state.update_run(run.id, details={**run.details, "behind_lsn": self._nudge()})
        self._state.set(covered, position.epoch)
        if settles:
            raise Later(seconds=0.0)

    def _go_on(self, lane: Lane, run: Run, number: int) -> bool:
        now = self._state.run(run.id)
        if now is None or now.state != "running":
            return True
        run = now
        schema = self._book.get(run.table, int(run.details["version"]))
        position = self._log.position(self._source)
        assert position is not None
        if not schema.key or run.details.get("epoch") != position.epoch:
            # The one snapshot of a keyless table ended with the process; another epoch is another history.
            raise Anew("the run was interrupted")
        whole, planned = run.kind in WHOLE_KINDS, "ranges" in run.details or run.last_key is not None
        if whole and not planned and len(self._lanes) > 1:
            took = lane.read(run, schema, partial(self._plan, run, schema))
        else:
            piece = self._next(run, schema, number)
            if piece is None and self._whole_pending(run.table):
                # The lake may hold it only when the whole table has been read, and that waits for us.
                raise Anew("the whole table is read before")
            if piece is None:
                raise Later("waits for the lake to hold what it has read")
            took = lane.read(run, schema, lambda _: piece)
        assert lane.chunk is not None
        rows, size = lane.chunk.rows, self._sizes[run.id]
        if lane.chunk.step.asked is None:
            size.learn(took, rows.rows, rows.bytes, rows_max=self._bounds[0], bytes_max=self._bounds[1])
        self._rate.took(rows.rows, rows.bytes)
        return self._settle(lane)

    def _whole_pending(self, table: TableId) -> bool:
        return any(r.kind in WHOLE_KINDS for r in self._state.runs(self._source, table, states=["pending"]))

    def _plan(self, run: Run, schema: TableSchema, snapshot: TableSnapshot) -> Piece:
        """Decide how the run reads its table, and begin with its first range. Behind the begin row, for the sake of
        decision 31."""
        plan = snapshot.plan(PARTS_MAX)
        with self._log.lock():
            now = self._state.run(run.id)
            if now is None or now.state != "running":
                raise Later(seconds=0.0)
            # Blocks are those of one file; keys are of any, as long as nothing was read.
            file = {"relfilenode": snapshot.relfilenode} if plan.strategy == "blocks" else {}
            run = self._state.update_run(run.id, details={**now.details, **file, **details_of(plan)})
        piece = self._next(run, schema, 0)
        assert piece is not None
        return piece

    def _next(self, run: Run, schema: TableSchema, number: int) -> Piece | None:
        """What the run reads next; None if it must wait."""
        by_blocks = run.details.get("strategy") == "blocks"
        first = FIRST_BLOCKS if by_blocks else min(FIRST_ROWS, self._bounds[0])
        size = int(self._sizes.setdefault(run.id, ChunkSize(first)).size)
        if run.kind == "filtered":
            way = self._filtered.setdefault(run.id, FilteredRun())
            return way.next(run, lambda: self._candidates(run, schema), min(size, self._bounds[0]))
        part = ranges_of(run)[number]
        arguments: dict[str, Any] = {"after": part.at}
        if by_blocks:
            arguments |= {"blocks": size, "through": part.to}
        else:
            arguments["rows_max"] = min(size, self._bounds[0])
            if part.to is not None:
                arguments["through"] = part.to

        def step(rows: RowsRead) -> Step:
            return Step(done=rows.done, last_key=rows.last_key, range=number)

        return Piece(arguments, step)

    def _settle(self, lane: Lane) -> bool:
        chunk = lane.chunk
        assert chunk is not None
        wish = chunk.wish
        appended = False
        try:
            appended = lane.settle()
            if appended:
                failpoint("backfill.after_chunk")
        finally:
            if wish is not None and lane.chunk is None:
                if not appended:
                    self._state.update_run(chunk.run.id, state="cancelled")
                    self.wish(wish.table, wish.keys)
                elif len(wish.keys) > KEYS_PER_CHUNK:
                    self.wish(wish.table, wish.keys[KEYS_PER_CHUNK:])
        return appended

    def _read_keyless(self, lane: Lane, run: Run, schema: TableSchema) -> bool:
        """Rule 16: one snapshot of the whole table, its visibility in the begin row."""
        with lane.taking():
            snapshot = lane.reader.begin(schema)
            renamed = snapshot.schema.table != run.table
            if renamed or self._book.register(snapshot.schema).version != schema.version:
                raise Later("the table changed; the run begins again", RETRY_S)
            seen = snapshot.visibility
            with self._log.lock():
                if self._log.hidden(self._source, seen, through_lsn=None):
                    raise Later("waits for a logged transaction to become visible", RETRY_S)
                running = ",".join(map(str, sorted(seen.in_progress)))
                self._appender.begin(run, schema, {"xmin": str(seen.xmin), "xmax": str(seen.xmax), "xip": running})
        after: tuple[str, ...] | None = None
        while True:
            current = self._state.run(run.id)
            if self._halted or current is None or current.state != "running":
                return True
            rows = lane.reader.read(after=after, rows_max=self._bounds[0])
            if rows.done:
                # Its end waits for what the snapshot saw: behind it the key holds that the table was read by.
                lane.reader.end()
                lane.take(current, schema, snapshot, rows, lane.mark(), whole_step(rows))
                return self._settle(lane)
            with self._log.lock():
                self._appender.append(current, schema, snapshot, rows, [], whole_step(rows))
            failpoint("backfill.after_chunk")
            after = rows.last_key
            self._rate.took(rows.rows, rows.bytes)
            while (held := self._rate.wait_s()) > 0 and not self._halted:
                time.sleep(min(held, PAUSED_S))

    def _read_keys(self, lane: Lane, wish: Wish) -> bool:
        """Rule 9: rows whose unknown columns nothing in the lake knows are read once more by key."""
        schema = self._book.held(wish.table) or self._book.latest(wish.table)
        if schema is None or not schema.key:
            raise InvariantBroken(f"keys of table {wish.table} cannot be read again: it has no key")
        keys = wish.keys[:KEYS_PER_CHUNK]
        mark = lane.mark()
        with lane.taking():
            snapshot = lane.reader.begin(schema)
            hidden = self._log.hidden(self._source, snapshot.visibility, through_lsn=mark.lsn)
        if hidden:
            self.wish(wish.table, wish.keys)
            raise Later(seconds=RETRY_S, whole=False)
        under_lock = self._book.register(snapshot.schema)
        if under_lock.key != schema.key:
            # The keys are of another identity. Once the stream shows the switch, the table is read anew.
            raise Later(seconds=RETRY_S, whole=False)
        rows = lane.reader.read(keys=keys)
        lane.reader.end()
        run = self._state.create_run(
            self._source, wish.table, "keys", state="running", reason="values that no message carried",
            details={"oid": schema.oid, "version": under_lock.version, "epoch": mark.epoch},
        )  # fmt: skip
        lane.take(run, under_lock, snapshot, rows, mark, Step(done=True, asked=keys), wish)
        return self._settle(lane)

    def _start_anew(self, run: Run, why: str) -> bool:
        """Rule 2: what was read is of another table by now. The new run's begin row makes the old rows orphans."""
        with self._log.lock(), self._state.transaction() as tx:
            # Several lanes may find out at once.
            now = self._state.run(run.id)
            if now is None or now.state not in ("pending", "running"):
                return True
            self._state.update_run(run.id, tx=tx, state="cancelled", reason=why)
            # What it answers holds for the new run, which is asked to wait for it once more.
            kept = {k: v for k, v in run.details.items() if k in KEPT_DETAILS}
            self._state.create_run(
                self._source, run.table, run.kind, where_sql=run.where_sql, reason=why, details=kept, tx=tx
            )
        log.warning("snapshot run starts anew", extra={"source": self._source, "table": str(run.table), "why": why})
        return True

    def _wait(self, lane: Lane, run: Run | None, later: Later) -> None:
        now = time.monotonic()
        if run is None or not later.whole:
            lane.not_before = now + later.seconds
        else:
            self._not_before[run.id] = now + later.seconds
        if run is not None and later.why:
            known = self._state.run(run.id)
            if known is not None and known.state in ("pending", "running") and known.reason != later.why:
                self._state.update_run(run.id, reason=later.why)


def whole_step(rows: RowsRead) -> Step:
    """The step that a chunk of a whole table is."""
    return Step(done=rows.done, last_key=rows.last_key)


def keyless(table: TableId) -> SourceRefused:
    """A table whose rows cannot be told apart cannot be read in part."""
    return SourceRefused(
        f"table {table} has no key, so a part of it cannot be read anew", hint=f"read all of it: `cdc resync {table}`"
    )
