"""The event log: what a source has sent, durable before anyone acts on it, readable until every reader has passed.

Guarantees. An append that returned is on disk, with the position it reaches; one that failed shows nothing, and the
log goes on. Bytes that the index does not name do not exist. Offsets rise and are never reused. A record is
*complete* once the position has reached its last row; records behind it belong to the one open transaction, which
`discard_open` drops when the stream begins anew. Nothing at or below the logged position is taken a second time.
Every record's checksum is verified on read.

How: segment files (cdc.segments) are written and synced first; then one SQLite transaction names their bytes and
moves position, transaction ids and whatever the caller adds (`within`). Trimming goes the other way: unnamed first,
unlinked after. One process writes (the daemon's lock on the directory sees to it); one with a read-only state may
look on. It deliberately knows no schemas (cdc.schema) and no stages, and it drops no data when it is full: it
refuses.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from cdc.batch import SNAPSHOT_SEQ, Batch, Boundary, Portion, batch_schema
from cdc.errors import InvariantBroken, LogCorrupt, LogFull, StreamRestarted
from cdc.failpoints import failpoint
from cdc.ports import Visibility
from cdc.records import COLUMNS, Entry, LogRecord, entry_of, index_row, record_of
from cdc.segments import SegmentFiles
from cdc.state import State
from cdc.table import TableId, TableSchema
from cdc.xids import XidIndex

log = logging.getLogger(__name__)

_LOOK_S = 0.1
"""How often a process that only reads looks for new records while it waits."""


@dataclass(frozen=True, slots=True)
class LogStats:
    """`bytes` on disk of `bytes_max`; `newest_offset` of all sources."""

    bytes: int
    bytes_max: int
    segments: int
    newest_offset: int


@dataclass(slots=True)
class _Tail:
    """What is known of a source's end of the log."""

    position: Boundary | None
    end: int
    open_from: int
    must_discard: bool
    generation: int = 0
    moves: int = 0
    open_lsn: int = 0
    last: dict[TableId, tuple[int, int]] = field(default_factory=dict)


class EventLog:
    """The log in `directory`, indexed in `state`. Thread-safe. Opening a writable one recovers it (LogCorrupt if
    bytes that the index names are missing); on a read-only state nothing is touched, and every answer is read
    afresh."""

    def __init__(self, directory: Path, state: State, *, bytes_max: int, segment_bytes: int = 64 << 20) -> None:
        self._state = state
        self.bytes_max = bytes_max
        self._files = SegmentFiles(directory, segment_bytes=segment_bytes)
        self._xids = XidIndex(state)
        self._lock = threading.RLock()
        self._arrived = threading.Condition()
        self._closed = False
        self._tails: dict[str, _Tail] = {}
        self._passed: dict[str, int] = {}
        self._held: dict[tuple[str, int], int] = {}
        segments = state.query("select segment, bytes, last_offset from segments")
        self._last_offsets: dict[int, int] = {segment: last for segment, _, last in segments}
        named = {segment: end for segment, end, _ in segments}
        if state.readonly:
            self._files.load(named)
        else:
            self._files.recover(named)
        found = state.query("select seq from sqlite_sequence where name = 'records'")
        self._next = int(found[0][0]) + 1 if found else 1

    def lock(self) -> AbstractContextManager[bool]:
        """The log's lock, re-entrant: nothing is appended by others, and no position moves, while it is held. Must
        not be taken inside a state transaction."""
        return self._lock

    # -- appending -----------------------------------------------------------------------------------------------------

    def append(self, source: str, portion: Portion) -> None:
        """Take what the stream brought; durable on return. Batches are logged in the order of their first row.

        LogFull if it does not fit or the disk is full, StoreUnavailable if the disk fails: nothing of it is logged
        then, and it may be repeated. InvariantBroken if it goes back: a boundary below the logged one, rows at or
        below it, or rows of an open transaction that the log holds already (`discard_open` was forgotten)."""
        self._check_writable()
        entries = [entry_of(batch) for batch in portion.batches if batch.data.num_rows]
        # A reader that has taken a prefix of the records must know from the next one's first row what it can rely on.
        entries.sort(key=lambda entry: entry.first[0])
        with self._lock:
            tail = self._tail(source)
            position = _checked(source, tail, entries, portion.boundary)
            new_ids = len(portion.xids) > 0
            if not entries and not new_ids and position == tail.position:
                return
            open_index = _open_index(entries, position)

            def change(tx: sqlite3.Connection, open_from: int) -> None:
                _save_tail(tx, source, position, self._next + len(entries) - 1 if entries else tail.end, open_from)
                tx.execute(
                    "update sources set head_lsn = max(head_lsn, ?), committed_at = max(committed_at, ?) "
                    "where name = ?",
                    (portion.head_lsn, portion.committed_at_us, source),
                )
                if new_ids:
                    self._xids.add(tx, source, portion.xids, portion.xid_lsns)

            moved = portion.boundary is not None
            open_from = 0 if moved else tail.open_from
            if not open_from and open_index is not None:
                open_from = self._next + open_index
            first = self._store(source, entries, ("change", None, None), lambda tx: change(tx, open_from))
            tail.position = position
            tail.open_from = open_from
            tail.open_lsn = entries[-1].last[0] if open_index is not None else tail.open_lsn if open_from else 0
            for entry in entries:
                tail.last[entry.table] = entry.last
            if new_ids:
                self._xids.added(source, portion.xids, portion.xid_lsns)
            self._announce(tail, first + len(entries) - 1 if entries else tail.end)
            failpoint("log.after_index")

    def append_chunk(
        self,
        source: str,
        batches: Sequence[Batch],
        *,
        run: str,
        chunk: int | None,
        kind: str = "chunk",
        within: Callable[[sqlite3.Connection], None] | None = None,
    ) -> int:
        """Take rows that a snapshot read, or a control row (`kind='control'`), and run `within` in the same
        transaction; durable on return. The offset of the last record (the source's newest one if there are no rows).

        The caller holds `lock()` since it read the position that the rows carry as `_lsn`: InvariantBroken if they
        carry another. Other errors as `append`; whatever `within` raises leaves nothing behind."""
        self._check_writable()
        if kind not in ("chunk", "control"):
            raise InvariantBroken(f"a snapshot cannot append records of kind {kind!r}")
        entries = [entry_of(batch) for batch in batches if batch.data.num_rows]
        with self._lock:
            tail = self._tail(source)
            for entry in entries:
                _check_chunk(source, tail.position, entry)
            end = self._next + len(entries) - 1 if entries else tail.end

            def change(tx: sqlite3.Connection) -> None:
                if entries:
                    _save_tail(tx, source, tail.position, end, tail.open_from)
                if within is not None:
                    within(tx)

            self._store(source, entries, (kind, run, chunk), change)
            if entries:
                self._announce(tail, end)
            failpoint("log.after_index")
            return end

    def _store(
        self,
        source: str,
        entries: Sequence[Entry],
        marks: tuple[str, str | None, int | None],
        change: Callable[[sqlite3.Connection], None],
    ) -> int:
        """Write, sync, index: the one way into the log. The first offset."""
        first = self._next
        self._check_room(source, sum(entry.buffer.size for entry in entries))
        written = self._files.write(first, [entry.buffer for entry in entries]) if entries else None
        committing = False
        try:
            with self._state.transaction() as tx:
                if written is not None:
                    rows = [
                        index_row(source, entry, first + i, written.segment, written.starts[i], marks)
                        for i, entry in enumerate(entries)
                    ]
                    tx.executemany(f"insert into records ({COLUMNS}) values ({', '.join('?' * 18)})", rows)
                    tx.execute(
                        "insert into segments values (?1, ?2, ?3) "
                        "on conflict (segment) do update set bytes = ?2, last_offset = ?3",
                        (written.segment, written.end, first + len(entries) - 1),
                    )
                change(tx)
                failpoint("log.before_index")
                committing = True
        except BaseException:
            if written is not None and committing:
                # A commit that failed on the disk may come back to life when SQLite recovers: its bytes must be there,
                # and neither its offsets nor its segment may be given away.
                self._files.leave()
                self._next += len(entries)
            elif written is not None:
                self._files.withdraw()
            raise
        if written is not None:
            self._files.accept()
            self._next += len(entries)
            self._last_offsets[written.segment] = self._next - 1
        return first

    def _check_room(self, source: str, size: int) -> None:
        live = self._files.bytes
        if not size or live + size <= self.bytes_max:
            return
        if self._held:
            # What is held can be read again; a log that is full of it could wait for whoever waits for the log.
            self._held.clear()
            self._drop_passed()
            return self._check_room(source, size)
        open_from = self._tail(source).open_from
        open_bytes = 0
        if open_from:
            sql = "select sum(bytes) from records where source = ? and offset >= ?"
            open_bytes = int(self._state.query(sql, (source, open_from))[0][0] or 0)
        message = (
            f"the event log holds {_size(live)} of at most {_size(self.bytes_max)} and {_size(size)} more do not fit"
        )
        if open_bytes > live // 2:
            raise LogFull(
                f"{message}; {_size(open_bytes)} belong to a transaction that has not ended",
                hint="raise log_bytes_max above the size of that transaction",
            )
        raise LogFull(
            message,
            hint="capture goes on when landing has freed space: see what holds it up with `cdc status`, "
            "or raise log_bytes_max",
        )

    # -- the open transaction and the position -------------------------------------------------------------------------

    def discard_open(self, source: str) -> int:
        """Drop the records of the open transaction, because the stream begins anew behind the position; how many. If
        there were any, `generation` changes, and records that a reader holds of them are void."""
        self._check_writable()
        with self._lock:
            tail = self._tail(source)
            if not tail.open_from:
                tail.must_discard = False
                tail.last.clear()
                return 0
            with self._state.transaction() as tx:
                dropped, end = self._drop_open(tx, source, tail)
                _save_tail(tx, source, tail.position, end, 0)
            self._reset(tail, tail.position, end)
            return dropped

    def set_position(self, source: str, boundary: Boundary, *, other_server: bool = False) -> None:
        """Say where a source stands that the log does not know better: at the start on an empty disk, when a new epoch
        begins, or when another server goes on with it (`other_server`). Then transaction ids and positions are another
        server's, and the old ones are forgotten. Drops the open transaction. InvariantBroken if it goes back."""
        self._check_writable()
        with self._lock:
            tail = self._tail(source)
            before = tail.position
            if before is not None and boundary[:2] < before[:2]:
                raise InvariantBroken(
                    f"position of source {source} would go back from {_at(before)} to {_at(boundary)}"
                )
            other_server |= before is not None and boundary.epoch != before.epoch
            with self._state.transaction() as tx:
                _, end = self._drop_open(tx, source, tail)
                _save_tail(tx, source, boundary, end, 0)
                if other_server:
                    self._xids.clear(tx, source)
                    tx.execute(
                        "update sources set head_lsn = 0, received_lsn = 0, confirmed_lsn = 0, committed_at = 0 "
                        "where name = ?",
                        (source,),
                    )
            if other_server:
                self._xids.cleared(source)
            self._reset(tail, boundary, end)

    def _drop_open(self, tx: sqlite3.Connection, source: str, tail: _Tail) -> tuple[int, int]:
        """Unname the open records; how many they were, and the source's newest offset then."""
        if not tail.open_from:
            return 0, tail.end
        cursor = tx.execute(
            "delete from records where source = ? and offset >= ? and kind = 'change'", (source, tail.open_from)
        )
        newest = tx.execute("select max(offset) from records where source = ?", (source,)).fetchone()[0]
        return cursor.rowcount, newest or 0

    def _reset(self, tail: _Tail, position: Boundary | None, end: int) -> None:
        if tail.open_from:
            tail.generation += 1
        tail.position, tail.open_from, tail.open_lsn, tail.must_discard = position, 0, 0, False
        tail.last.clear()
        self._announce(tail, end)

    def generation(self, source: str) -> int:
        """Changes, in this process, whenever records of an open transaction were dropped."""
        return self._tail(source).generation

    def position(self, source: str) -> Boundary | None:
        """The logged position: every record up to it is complete. None if the source never had one."""
        return self._tail(source).position

    def end_offset(self, source: str, *, complete: bool = False) -> int:
        """Offset of the source's newest record; `complete`: before an open transaction. 0: none to speak of."""
        tail = self._tail(source)
        return tail.open_from - 1 if complete and tail.open_from else tail.end

    # -- reading -------------------------------------------------------------------------------------------------------

    def records(
        self,
        source: str,
        after: int,
        *,
        table: TableId | None = None,
        bytes_max: int | None = None,
        limit: int | None = None,
    ) -> list[LogRecord]:
        """Records behind an offset, in order; those of the open transaction too. With `bytes_max` it stops before it
        would be exceeded, but not before one record."""
        condition, parameters = "source = ? and offset > ?", [source, after]
        if table is not None:
            condition, parameters = "source = ? and schema = ? and name = ? and offset > ?", [source, *table, after]
        if bytes_max is not None:
            return self._records_until(condition, parameters, bytes_max, limit)
        sql = f"select {COLUMNS} from records where {condition} order by offset limit ?"
        return [record_of(row) for row in self._state.query(sql, [*parameters, -1 if limit is None else limit])]

    def _records_until(
        self, condition: str, parameters: list[Any], bytes_max: int, limit: int | None
    ) -> list[LogRecord]:
        """In pages, so that a long log is not read for a short answer."""
        taken: list[LogRecord] = []
        total, page = 0, 64
        while limit is None or len(taken) < limit:
            rows = self._state.query(
                f"select {COLUMNS} from records where {condition} order by offset limit ?",
                [*parameters, page if limit is None else min(page, limit - len(taken))],
            )
            for row in rows:
                total += row[6]
                if taken and total > bytes_max:
                    return taken
                taken.append(record_of(row))
            if len(rows) < page:
                break
            parameters = [*parameters[:-1], taken[-1].offset]
            page = 1024
        return taken

    def read(self, record: LogRecord, schema: TableSchema) -> Batch:
        """The batch of a record, in its schema version. LogCorrupt if its bytes are not those that were written,
        StreamRestarted if the record is no longer in the log (its transaction was dropped, or it was trimmed)."""
        if schema.version != record.version or schema.table != record.table:
            raise InvariantBroken(f"record {record.offset} of {record.table} has schema version {record.version}")
        buffer = self._files.read(record.segment, record.start, record.bytes)
        if buffer is None or zlib.crc32(buffer) != record.crc32:
            where = f"{self._files.path(record.segment).name}, byte {record.start}"
            if not self._state.query("select 1 from records where offset = ?", (record.offset,)):
                raise StreamRestarted(f"record {record.offset} ({where}) is no longer in the event log")
            raise LogCorrupt(
                f"record {record.offset} of {record.table} ({where}) "
                + ("is missing" if buffer is None else "does not match its checksum"),
                hint="with confirm_after = 'landed': stop the daemon, move state_dir away and start again; "
                "with 'log': do the same and resync the table",
            )
        return Batch(schema, pa.ipc.read_record_batch(buffer, batch_schema(schema, record.optional)))

    def wait(self, source: str, after_offset: int, timeout_s: float) -> bool:
        """Block until the source has a record behind `after_offset`, or its position or its open transaction changes;
        whether it did within the time. Returns early, False, when the log is closed."""
        if self._state.readonly:
            return self._look(source, after_offset, timeout_s)
        tail = self._tail(source)
        with self._arrived:
            moves = tail.moves
            self._arrived.wait_for(
                lambda: self._closed or tail.end > after_offset or tail.moves != moves, timeout=timeout_s
            )
            return not self._closed and (tail.end > after_offset or tail.moves != moves)

    def _look(self, source: str, after_offset: int, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        before = self._tail(source)
        while True:
            now = self._tail(source)
            if now.end > after_offset or (now.position, now.open_from) != (before.position, before.open_from):
                return True
            rest = deadline - time.monotonic()
            with self._arrived:
                if rest <= 0 or self._arrived.wait_for(lambda: self._closed, timeout=min(rest, _LOOK_S)):
                    return False

    # -- which transactions are logged ---------------------------------------------------------------------------------

    def hidden(self, source: str, visibility: Visibility, *, through_lsn: int | None = None) -> bool:
        """Rule 1 of snapshots: whether a transaction that was logged up to the position `through_lsn` (None: any) is,
        or may be, one that the snapshot does not see. Then take the snapshot again later."""
        return self._xids.hidden(source, visibility, through_lsn)

    def prune_xids(self, source: str, oldest_xmin: int) -> int:
        """Forget logged transactions below the oldest `xmin` that any open or coming snapshot can have; how many.
        Call it every few minutes (cdc.xids says why)."""
        self._check_writable()
        with self._lock:
            return self._xids.prune(source, oldest_xmin)

    # -- retention -----------------------------------------------------------------------------------------------------

    def trim(self, source_offsets: dict[str, int]) -> int:
        """Drop whole segments whose every record its source's readers have passed: `source_offsets` says, per source,
        the offset that all of them have. A source that is left out stays at what was said of it last in this process,
        at first 0. The bytes freed. Never drops a record of an open transaction, nor what is held."""
        self._check_writable()
        with self._lock:
            before = dict(self._passed)
            self._passed.update(source_offsets)
            return self._drop_passed() if self._passed != before else 0

    def hold(self, source: str, offset: int, by: int = 0) -> None:
        """Keep the records behind an offset, whoever has passed them, until `let_go` by the same one."""
        self._held[source, by] = offset

    def let_go(self, source: str, by: int = 0) -> bool:
        """End what `hold` began. Whether it held: False if an append needed the room (or nothing was held)."""
        return self._held.pop((source, by), None) is not None

    def _drop_passed(self) -> int:
        with self._lock:
            freed = 0
            sources = [row[0] for row in self._state.query("select name from sources where log_end > 0")]
            for segment in sorted(self._files.sizes):
                last = self._last_offsets.get(segment)
                if last is not None:
                    if any(self._holds(source, segment, last) for source in sources):
                        continue
                    with self._state.transaction() as tx:
                        tx.execute("delete from records where offset between ? and ?", (segment, last))
                        tx.execute("delete from segments where segment = ?", (segment,))
                    del self._last_offsets[segment]
                # Unnamed now, so it may go; a crash before it does leaves it to recovery.
                failpoint("log.before_unlink")
                freed += self._files.drop(segment)
            return freed

    def _holds(self, source: str, segment: int, last: int) -> bool:
        """Whether a source still needs a segment."""
        passed = self._passed.get(source, 0)
        passed = min([passed, *(offset for (holder, _), offset in list(self._held.items()) if holder == source)])
        open_from = self._tail(source).open_from
        if open_from:
            passed = min(passed, open_from - 1)
        if passed >= last:
            return False
        sql = "select 1 from records where source = ? and offset between ? and ? limit 1"
        return bool(self._state.query(sql, (source, max(segment, passed + 1), last)))

    def size_bytes(self) -> int:
        """Bytes on disk that count against the limit."""
        return self.stats().bytes

    def stats(self) -> LogStats:
        """How full the log is."""
        if self._state.readonly:
            self._files.load(dict(self._state.query("select segment, bytes from segments")))
            found = self._state.query("select seq from sqlite_sequence where name = 'records'")
            self._next = int(found[0][0]) + 1 if found else 1
        with self._lock:
            return LogStats(self._files.bytes, self.bytes_max, len(self._files.sizes), self._next - 1)

    def close(self) -> None:
        """Wake who waits, and close the files; what was appended stays. Idempotent."""
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()
        with self._lock:
            self._files.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _check_writable(self) -> None:
        if self._state.readonly:
            raise InvariantBroken("the event log was opened to be read")
        if self._state.in_transaction:
            # The lock of the log comes before that of the database, always: else two threads can wait for each other.
            raise InvariantBroken("the event log was called inside a state transaction")

    def _tail(self, source: str) -> _Tail:
        tail = self._tails.get(source)
        if tail is not None and not self._state.readonly:
            return tail
        rows = self._state.query(
            "select positioned, epoch, lsn, end_lsn, log_end, log_open from sources where name = ?", (source,)
        )
        loaded = _Tail(None, 0, 0, False)
        if rows:
            positioned, epoch, lsn, end_lsn, end, open_from = rows[0]
            position = Boundary(epoch, lsn, end_lsn) if positioned else None
            loaded = _Tail(position, end, open_from, must_discard=open_from > 0)
        if self._state.readonly:
            return loaded
        with self._arrived:
            return self._tails.setdefault(source, loaded)

    def _announce(self, tail: _Tail, end: int) -> None:
        with self._arrived:
            tail.end = end
            tail.moves += 1
            self._arrived.notify_all()


def _save_tail(tx: sqlite3.Connection, source: str, position: Boundary | None, end: int, open_from: int) -> None:
    at = position or Boundary(0, 0, 0)
    tx.execute(
        "insert into sources (name, positioned, epoch, lsn, end_lsn, log_end, log_open) "
        "values (?1, ?2, ?3, ?4, ?5, ?6, ?7) on conflict (name) do update set "
        "positioned = ?2, epoch = ?3, lsn = ?4, end_lsn = ?5, log_end = ?6, log_open = ?7",
        (source, position is not None, *at, end, open_from),
    )


def _checked(source: str, tail: _Tail, entries: Sequence[Entry], boundary: Boundary | None) -> Boundary | None:
    """The position after an append, or InvariantBroken if what is appended does not continue the log."""
    before = tail.position
    if tail.must_discard:
        raise InvariantBroken(f"source {source}: the open transaction of an earlier stream was not discarded")
    if boundary is not None and before is not None:
        if boundary.epoch != before.epoch or boundary.lsn < before.lsn:
            raise InvariantBroken(f"position of source {source} would go from {_at(before)} to {_at(boundary)}")
        # A server that was asked again begins with older keepalives; what is known to be empty stays known.
        boundary = boundary._replace(end_lsn=max(boundary.end_lsn, before.end_lsn))
    position = boundary if boundary is not None else before
    logged = before.lsn if before is not None else -1
    reached = position.lsn if position is not None else -1
    if tail.open_from and boundary is not None and tail.open_lsn > reached:
        raise InvariantBroken(f"source {source}: a boundary stands before the open transaction")
    open_lsn = tail.open_lsn if tail.open_from and boundary is None else 0
    newest = dict(tail.last)
    for entry in entries:
        (first, _), (last, _) = entry.first, entry.last
        if position is not None and entry.epoch != position.epoch:
            raise InvariantBroken(f"rows of {entry.table} are of epoch {entry.epoch}, the position is {_at(position)}")
        if first <= logged:
            raise InvariantBroken(f"rows of {entry.table} at {first:X} are logged already, up to {logged:X}")
        if entry.first <= newest.get(entry.table, (0, -1)):
            raise InvariantBroken(f"rows of {entry.table} at {first:X} come a second time")
        newest[entry.table] = entry.last
        if last > reached:
            open_lsn = open_lsn or last
            if first != open_lsn or last != open_lsn:
                raise InvariantBroken(f"a batch of {entry.table} mixes the open transaction with others")
    return position


def _open_index(entries: Sequence[Entry], position: Boundary | None) -> int | None:
    """Index of the first entry of the open transaction."""
    reached = position.lsn if position is not None else -1
    return next((i for i, entry in enumerate(entries) if entry.last[0] > reached), None)


def _check_chunk(source: str, position: Boundary | None, entry: Entry) -> None:
    if position is None:
        raise InvariantBroken(f"source {source} has no position yet, so no snapshot row has a place behind it")
    if entry.epoch != position.epoch or entry.first[0] != position.lsn or entry.last[0] != position.lsn:
        raise InvariantBroken(f"snapshot rows of {entry.table} do not stand at the logged position {_at(position)}")
    if entry.first[1] < SNAPSHOT_SEQ:
        raise InvariantBroken(f"snapshot rows of {entry.table} have ordinals of the stream")


def _at(boundary: Boundary) -> str:
    return f"{boundary.epoch}/{boundary.lsn:X}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1_000_000 else f"{count / 1e3:.1f} KB"


__all__ = ["EventLog", "LogRecord", "LogStats"]
