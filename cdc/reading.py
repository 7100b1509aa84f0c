"""One reader of snapshots, and the chunk that it has in hand: from the mark in the log to the append.

A chunk has a snapshot, a window and a hold on the log of its own, so any number of lanes may read side by side, also
ranges of one table: rules 1, 2, 6 and 11 of docs/snapshots.md are kept chunk by chunk, and what two chunks say of a
row that moved between them is in the order of the log, because each waits for all that its snapshot saw. Which run
reads what is decided in cdc.backfill.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from cdc import metrics
from cdc.appending import Appender, Step
from cdc.failpoints import failpoint
from cdc.log import EventLog
from cdc.ports import RowsRead, SnapshotReader, TableSnapshot
from cdc.runs import Run
from cdc.schema import SchemaBook
from cdc.state import State
from cdc.table import TableId, TableSchema
from cdc.window import must_read_again, unseen

NUDGE_S = 0.3
"""So long the stream may take to reach what a chunk has seen before a quiet server is asked to flush."""
NUDGE_AGAIN_S = 5.0
SETTLE_S = 0.01
RETRY_S = 0.05
"""Pause before a snapshot is taken again because something logged is not visible yet."""
TURN_S = 0.2
"""Longest wait for a reader to be allowed."""


class Later(Exception):
    """The run must wait: why (empty: nothing to tell), and for how long at least. `whole`: all its lanes, not this."""

    def __init__(self, why: str = "", seconds: float = 0.5, *, whole: bool = True) -> None:
        super().__init__(why)
        self.why = why
        self.seconds = seconds
        self.whole = whole


class Anew(Exception):
    """The run must begin anew: what it has read is of another table by now. The argument says why."""


@dataclass(slots=True)
class Wish:
    """Keys of a table to read once more (rule 9)."""

    table: TableId
    keys: list[tuple[str, ...]]


@dataclass(slots=True, frozen=True)
class Mark:
    """The log at one moment: newest offset, and the position whose transactions a snapshot must see."""

    offset: int
    epoch: int
    lsn: int


@dataclass(slots=True)
class Chunk:
    """Rows that have been read and wait to be appended."""

    run: Run
    schema: TableSchema
    snapshot: TableSnapshot
    rows: RowsRead
    mark: Mark
    step: Step
    wish: Wish | None
    since: float
    nudge_at: float


@dataclass(slots=True)
class Piece:
    """What to read for one chunk: arguments for `SnapshotReader.read`, and the step that it is."""

    read: dict[str, Any]
    step: Callable[[RowsRead], Step]


class Lane:
    """One reader. Belongs to one thread."""

    def __init__(
        self,
        number: int,
        source: str,
        reader: SnapshotReader,
        event_log: EventLog,
        state: State,
        book: SchemaBook,
        appender: Appender,
        nudge: Callable[[], int],
        turns: threading.Semaphore | None,
    ) -> None:
        """`turns`: so many lanes may have a server send rows at the same time; None: there is this lane only."""
        self.number = number
        self.reader = reader
        self.chunk: Chunk | None = None
        self.not_before = 0.0
        self.takes = 0
        self._source = source
        self._log = event_log
        self._state = state
        self._book = book
        self._appender = appender
        self._nudge = nudge
        self._turns = turns

    @contextmanager
    def taking(self) -> Iterator[None]:
        """From before a snapshot is taken until it has been held against the log."""
        self.takes += 1
        try:
            yield
        finally:
            self.takes += 1

    def mark(self) -> Mark:
        """k: what is in the log before the snapshot is taken. What comes behind it stays there until the chunk is
        settled, although it may have landed long before."""
        with self._log.lock():
            position = self._log.position(self._source)
            assert position is not None
            offset = self._log.end_offset(self._source)
            self._log.hold(self._source, offset, self.number)
            return Mark(offset, position.epoch, position.lsn)

    def rest(self) -> None:
        """Let go of the snapshot, and of the log unless a chunk waits."""
        self.reader.end()
        if self.chunk is None:
            self._log.let_go(self._source, self.number)

    def begin(self, run: Run, schema: TableSchema) -> tuple[Mark, TableSnapshot]:
        """Open a snapshot of the run's table that sees all that is logged (rules 1 and 2)."""
        mark = self.mark()
        with self.taking():
            snapshot = self.reader.begin(schema)
            hidden = self._log.hidden(self._source, snapshot.visibility, through_lsn=mark.lsn)
        if snapshot.schema.table != run.table or snapshot.schema.oid != schema.oid:
            raise Anew("the table was renamed or made anew")
        if self._book.register(snapshot.schema).version != schema.version:
            raise Anew("the table's schema changed")
        _same_file(run, snapshot)
        # A commit can be in our log before it is visible; such a snapshot would bring back older rows.
        if hidden:
            raise Later("waits for a logged transaction to become visible", RETRY_S)
        failpoint("backfill.after_snapshot")
        return mark, snapshot

    def read(self, run: Run, schema: TableSchema, choose: Callable[[TableSnapshot], Piece]) -> float:
        """Read one chunk, which is then in hand: of its open snapshot, what `choose` says. Seconds that it took."""
        release = self._take_turn()
        try:
            began = time.perf_counter()
            mark, snapshot = self.begin(run, schema)
            more: dict[str, Any] = {} if self._turns is None else {"received": release}
            piece = choose(snapshot)
            rows = self.reader.read(**piece.read, **more)
            self.reader.end()
        finally:
            release()
        took = time.perf_counter() - began
        metrics.SNAPSHOT_CHUNK_SECONDS.labels(self._source).observe(took)
        self.take(run, schema, snapshot, rows, mark, piece.step(rows))
        return took

    def _take_turn(self) -> Callable[[], None]:
        turns = self._turns
        if turns is None:
            return lambda: None
        if not turns.acquire(timeout=TURN_S):
            raise Later(seconds=0.0, whole=False)
        held = [True]

        def release() -> None:
            with suppress(IndexError):
                held.pop()
                turns.release()

        return release

    def take(
        self,
        run: Run,
        schema: TableSchema,
        snapshot: TableSnapshot,
        rows: RowsRead,
        mark: Mark,
        step: Step,
        wish: Wish | None = None,
    ) -> None:
        """Have a chunk in hand."""
        now = time.monotonic()
        self.chunk = Chunk(run, schema, snapshot, rows, mark, step, wish, now, now + NUDGE_S)

    def settle(self) -> bool:
        """Append the chunk in hand once every transaction that its snapshot saw is in the log; whether it was. It is
        in hand no more, unless this raises Later because the stream has not come so far.

        Else one of them would come behind the chunk's rows: harmless for whole rows, but a key that moved and left a
        TOAST value alone would take it from a newer row that has its old key by then.
        """
        chunk = self.chunk
        assert chunk is not None
        position = self._log.position(self._source)
        assert position is not None
        now = time.monotonic()
        if position.epoch == chunk.mark.epoch and position.end_lsn < chunk.snapshot.lsn:
            if now >= chunk.nudge_at:
                self._nudge()
                chunk.nudge_at = now + NUDGE_AGAIN_S
            late = now - chunk.since > NUDGE_AGAIN_S
            why = "waits for the stream to reach what the chunk has seen" if late else ""
            raise Later(why, SETTLE_S, whole=False)
        self.chunk = None
        return position.epoch == chunk.mark.epoch and self._append(chunk)

    def _append(self, chunk: Chunk) -> bool:
        """Window and append under one lock of the log (rules 6, 8, 10, 11, 12)."""
        run, schema, snapshot = chunk.run, chunk.schema, chunk.snapshot
        with self._log.lock():
            if not self._log.let_go(self._source, self.number):
                raise Later("the log had no room for what a chunk waited for; it is read again", RETRY_S)
            behind = self._log.records(self._source, chunk.mark.offset, table=run.table)
            records = [r for r in behind if r.kind == "change"]
            if not schema.key:
                # Its one snapshot stands at the begin row, whatever has come since.
                records = []
            changed = Later("the table changed while a chunk was read; it is read again", RETRY_S)
            if must_read_again(schema, [(r.version, False) for r in records]):
                raise changed
            window = [unseen(self._log.read(r, schema), snapshot.visibility) for r in records]
            # A truncate that the snapshot has seen is in the chunk already; where the stream lags, there is always one.
            truncates = [
                record.has_truncate and "t" in batch.system("_op").to_pylist()
                for record, batch in zip(records, window, strict=True)
            ]
            if must_read_again(schema, [(schema.version, truncate) for truncate in truncates]):
                raise changed
            current = self._state.run(run.id)
            if current is not None and current.state == "running":
                # Another lane may have read meanwhile what is another file.
                _same_file(current, snapshot)
                self._appender.append(current, schema, snapshot, chunk.rows, window, chunk.step)
            return True


def _same_file(run: Run, snapshot: TableSnapshot) -> None:
    relfilenode = run.details.get("relfilenode")
    if relfilenode is not None and relfilenode != snapshot.relfilenode:
        raise Anew("the table was rewritten or truncated")
