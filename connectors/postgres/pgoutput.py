"""The pgoutput decoder: CopyData frames in, batches per table out, columnar all the way.

A read's frames are joined once; kinds, transaction boundaries, ordinals and relation ids of all messages are found
with numpy in the joined bytes, rows are grouped by relation and schema, and each group is walked column by column
(columns.py; few rows: rows.py) and cast in bulk (image.py, cdc.types). No Python object per row or value.

Guarantees: every change of a selected table comes out exactly once, in order per table, with the commit LSN and the
ordinal of its transaction, however the stream is cut into reads; what is not understood is a ProtocolError, never
skipped. Any error leaves the decoder unusable: the stream is to be started again from the last logged position.

Rows bear the origin of their transaction, or, from a message of ORIGIN_PREFIX on, the one that it names: the first such
message of a transaction counts, and what stands before it keeps what it has. Streamed or not, that is the same, but for
a message in a subtransaction that was rolled back: of a streamed one servers do not say that it was.

Deliberately does no I/O, reads no clock, answers no keepalive, and knows no catalog: `resolve` does. It reads protocol
version 1, values in text form, no two-phase; streamed transactions (version 2) come to it from spool.py once they have
committed, as transactions like any other.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa

from cdc.batch import Batch, Boundary, Portion
from cdc.errors import ProtocolError
from cdc.table import TableId, TableSchema
from connectors.postgres.buffer import Bools, Ints
from connectors.postgres.columns import walk_columns
from connectors.postgres.frames import XID_BYTES, Frames, kinds, parts, split
from connectors.postgres.image import UNKNOWN_TIME, Layout, Rows, System, make_batches
from connectors.postgres.logical_messages import Kept, MessageRow, MessageTable, with_messages
from connectors.postgres.messages import (
    BEGIN,
    COMMIT,
    DELETE,
    INSERT,
    MESSAGE,
    ORIGIN,
    RELATION,
    STREAM_ABORT,
    TRUNCATE,
    TYPE,
    UPDATE,
    Relation,
    RelationColumn,
    read_message,
    read_origin,
    read_relation,
    read_stream_abort,
    read_truncate,
    read_type,
)
from connectors.postgres.rows import walk_rows

__all__ = ["Decoder", "Relation", "RelationColumn", "ResolveRelation"]

ResolveRelation = Callable[[Relation], TableSchema | None]
"""Gives the schema of a relation whose message is new or changed; None: not selected, its rows are left out."""

PART_BYTES = 16 << 20
"""A longer read is decoded in parts of about this size: it bounds memory, and 2 GiB bound Arrow's offsets."""

_POSTGRES_EPOCH_US = 946_684_800_000_000
_UINT32 = struct.Struct(">I")


_ROW = kinds([INSERT, UPDATE, DELETE])
_CHANGE = kinds([INSERT, UPDATE, DELETE, TRUNCATE])
_RARE = kinds([RELATION, TYPE, TRUNCATE, ORIGIN, MESSAGE, STREAM_ABORT])
_KNOWN = _ROW | _RARE | kinds([BEGIN, COMMIT])


@dataclass(slots=True)
class _Known:
    """A relation as its newest message has it; `layout` None: not selected."""

    data: bytes
    layout: Layout | None


@dataclass(slots=True)
class _Open:
    """The transaction whose Commit has not been read."""

    lsn: int
    xid: int
    committed: int
    origin: str | None
    ordinal: int
    mark: str | None = None


@dataclass(slots=True)
class _Transactions:
    """The transactions of one part. Entry 0 is the one that was open before it (or none), then one per Begin.

    `of` is the entry of every message, `inside` says whether a message stands between Begin and Commit. `first` is the
    number of changes of the part before the transaction; entry 0 counts its earlier ones as negative. `counted` is the
    number of changes up to and with each message. `marks`: the message from which on a transaction is one of ours, and
    the origin that it names.
    """

    of: Ints
    inside: Bools
    commits: Ints
    lsn: Ints
    xid: Ints
    committed: Ints
    first: Ints
    counted: Ints
    end_lsn: Ints
    origins: dict[int, str]
    marks: dict[int, tuple[int, str]]

    def origin(self, entry: int, message: int) -> str | None:
        """The origin that a message of the transaction `entry` has."""
        since, name = self.marks.get(entry, (message, ""))
        return name if since < message else self.origins.get(entry)


@dataclass(slots=True)
class _Piece:
    """Row messages of one relation and layout that make one batch, from message `first` on; or a truncate."""

    first: int
    layout: Layout
    messages: Ints
    truncate: bool = False


class Decoder:
    """Decodes one replication stream. Not thread-safe; `feed` does not block, unless `resolve` does.

    Transactions with a commit LSN at or below `after_lsn` are left out completely; a boundary never stands below
    (`after_lsn`, `after_end_lsn`). `messages` makes rows of logical messages (None: they are passed over). `row_plan`
    "auto" walks groups of fewer than `small_rows` rows one by one.
    """

    def __init__(
        self,
        resolve: ResolveRelation,
        *,
        epoch: int,
        after_lsn: int = 0,
        after_end_lsn: int = 0,
        small_rows: int = 80,
        row_plan: Literal["auto", "columns", "rows"] = "auto",
        messages: MessageTable | None = None,
    ) -> None:
        self._resolve = resolve
        self._messages = messages
        self._epoch = epoch
        self._after_lsn = after_lsn
        self._small_rows = {"auto": small_rows, "columns": 0, "rows": 1 << 62}[row_plan]
        self._relations: dict[int, _Known] = {}
        self._open: _Open | None = None
        self._begun_lsn = 0
        self._lsn = after_lsn
        self._end_lsn = max(after_lsn, after_end_lsn)
        self._head_lsn = 0
        self._ddl = False
        self._broken = False
        self.types: dict[int, tuple[str, str]] = {}
        """Schema and name of the types that Type messages named, by OID."""

    @property
    def in_transaction(self) -> bool:
        """Whether the newest frame left a transaction open."""
        return self._open is not None

    def feed(self, frames: Sequence[bytes]) -> Portion:
        """Decode the next CopyData payloads of the stream, in order; as `feed_blob`."""
        return self.feed_blob(b"".join(frames), np.fromiter(map(len, frames), np.int64, len(frames)))

    def feed_blob(self, blob: bytes, lengths: Ints) -> Portion:
        """Decode the next CopyData payloads of the stream, joined, with the length of each.

        Raises ProtocolError for anything not understood, and what `resolve` raises; then the decoder is of no further
        use and says so.
        """
        if self._broken:
            raise ProtocolError("the decoder stopped at an earlier error")
        self._broken = True
        portion = Portion()
        for part, of_part in parts(blob, lengths, PART_BYTES):
            messages = split(part, of_part, _KNOWN)
            portion.received_bytes += messages.buffer.size
            portion.messages += len(of_part) - len(messages.keepalives)
            self._decode(messages, portion)
        portion.head_lsn = self._head_lsn
        self._broken = False
        return portion

    def feed_spooled(self, blob: bytes, lengths: Ints, aborted: Ints) -> Portion:
        """Decode the next frames of a streamed transaction that has committed; as `feed_blob`, but each message has
        its transaction's id behind its kind, Begin and Commit too, and those of the ids in `aborted` are left out.

        The portion counts no bytes and messages: they were received before.
        """
        if self._broken:
            raise ProtocolError("the decoder stopped at an earlier error")
        self._broken = True
        portion = Portion()
        for part, of_part in parts(blob, lengths, PART_BYTES):
            messages = split(part, of_part, _KNOWN, gap=XID_BYTES)
            if len(aborted):
                messages.kind[np.isin(messages.buffer.u32(messages.start - XID_BYTES + 1), aborted)] = 0
            self._decode(messages, portion)
        portion.head_lsn = self._head_lsn
        self._broken = False
        return portion

    def _decode(self, messages: Frames, portion: Portion) -> None:
        kept = self._messages.kept(messages) if self._messages is not None else {}
        transactions = self._transactions(messages, kept)
        changed, truncates = self._rare(messages, transactions)
        portion.ddl |= self._ddl
        self._ddl = False
        tail = int(transactions.commits[-1]) + 1 if len(transactions.commits) else 0
        pieces = self._pieces(messages, transactions, changed, truncates, tail)
        portion.batches += self._batches(messages, transactions, pieces)
        alone = self._message_rows(messages, transactions, kept, tail, portion) if kept else 0
        self._finish(messages, transactions, portion, alone)

    # --- transactions -------------------------------------------------------------------------------------------

    def _transactions(self, messages: Frames, kept: Kept) -> _Transactions:
        """Find Begin and Commit, check that they alternate and agree, and number the changes."""
        kind = messages.kind
        is_begin, is_commit, is_change = kind == BEGIN, kind == COMMIT, with_messages(_CHANGE.take(kind), kept)
        begins, commits = np.flatnonzero(is_begin), np.flatnonzero(is_commit)
        edges = np.flatnonzero(is_begin | is_commit)
        if len(edges):
            order = kind.take(edges)
            previous = np.concatenate(([COMMIT if self._open is None else BEGIN], order[:-1]))
            messages.refuse(edges, order == previous, "Begin and Commit do not alternate")
        of = np.cumsum(is_begin, dtype=np.int64)
        inside = (of - np.cumsum(is_commit, dtype=np.int64)) == (1 if self._open is None else 0)
        outside = is_change & ~inside
        if outside.any():
            raise messages.malformed(int(np.argmax(outside)), "a change outside of a transaction")
        lsn, xid, committed = self._begins(messages, begins)
        counted = np.cumsum(is_change, dtype=np.int64)
        first = np.concatenate(([-self._open.ordinal if self._open else 0], counted.take(begins)))
        end_lsn = self._commits(messages, commits, lsn.take(of.take(commits)))
        origins = {0: self._open.origin} if self._open and self._open.origin is not None else {}
        marks = {0: (-1, self._open.mark)} if self._open and self._open.mark is not None else {}
        return _Transactions(of, inside, commits, lsn, xid, committed, first, counted, end_lsn, origins, marks)

    def _begins(self, messages: Frames, begins: Ints) -> tuple[Ints, Ints, Ints]:
        """Commit LSN, xid and commit time of the open transaction and of each Begin."""
        at, buffer = messages.start.take(begins), messages.buffer
        messages.refuse(begins, messages.end.take(begins) != at + 21, "wrong length")
        opened = self._open or _Open(self._begun_lsn, 0, UNKNOWN_TIME, None, 0)
        lsn = np.concatenate(([opened.lsn], buffer.i64(at + 1)))
        messages.refuse(begins, np.diff(lsn) <= 0, "its commit LSN is not above the one before")
        committed = buffer.i64(at + 9)
        committed = np.where(committed == 0, UNKNOWN_TIME, committed + _POSTGRES_EPOCH_US)
        xid = np.concatenate(([opened.xid], buffer.u32(at + 17)))
        return lsn, xid, np.concatenate(([opened.committed], committed))

    def _commits(self, messages: Frames, commits: Ints, begun: Ints) -> Ints:
        """End LSN of each Commit, checked against the Begin of its transaction."""
        at, buffer = messages.start.take(commits), messages.buffer
        messages.refuse(commits, messages.end.take(commits) != at + 26, "wrong length")
        messages.refuse(commits, buffer.i64(at + 2) != begun, "its commit LSN is not that of Begin")
        end_lsn = buffer.i64(at + 10)
        messages.refuse(commits, end_lsn < begun, "it ends before its commit LSN")
        return end_lsn

    def _finish(self, messages: Frames, transactions: _Transactions, portion: Portion, alone: int) -> None:
        """Take over what the part says of complete transactions, of the stream's end, and of the open one; `alone` is
        the position of the last message that stands outside of transactions."""
        t = transactions
        closed = t.of.take(t.commits)
        lsns = t.lsn.take(closed)
        new = lsns > self._after_lsn
        reached = bool(new.any())
        if len(t.commits):
            self._end_lsn = max(self._end_lsn, int(t.end_lsn.max()))
            self._head_lsn = max(self._head_lsn, int(t.end_lsn.max()))
        if reached:
            self._lsn = int(lsns[-1])
            portion.xids = np.concatenate((portion.xids, t.xid.take(closed[new]).astype(np.uint32)))
            portion.xid_lsns = np.concatenate((portion.xid_lsns, lsns[new]))
            times = t.committed.take(closed[new])
            times = times[times != UNKNOWN_TIME]
            if len(times):
                portion.committed_at_us = int(times[-1])
        if alone:
            self._lsn, self._end_lsn, reached = max(self._lsn, alone), max(self._end_lsn, alone), True
        reached |= self._keepalives(messages, t)
        last = np.flatnonzero(messages.kind)[-1:]
        if len(last):
            self._head_lsn = max(self._head_lsn, messages.wal_end(int(last[0])))
        if reached:
            portion.boundary = Boundary(self._epoch, self._lsn, self._end_lsn)
        end = len(t.lsn) - 1
        self._begun_lsn = int(t.lsn[end])
        if not t.inside[-1]:
            self._open = None
            return
        ordinal = int(t.counted[-1]) - int(t.first[end])
        origin, mark = t.origins.get(end), t.marks[end][1] if end in t.marks else None
        self._open = _Open(int(t.lsn[end]), int(t.xid[end]), int(t.committed[end]), origin, ordinal, mark)

    def _keepalives(self, messages: Frames, transactions: _Transactions) -> bool:
        """Take over the positions in keepalives; whether one stood between two transactions."""
        if not len(messages.keepalives):
            return False
        wal_end = messages.buffer.i64(messages.start.take(messages.keepalives) + 1)
        messages.refuse(messages.keepalives, wal_end < 0, "its position is out of range")
        self._head_lsn = max(self._head_lsn, int(wal_end.max()))
        outside = ~transactions.inside.take(messages.keepalives)
        if not outside.any():
            return False
        self._end_lsn = max(self._end_lsn, int(wal_end[outside].max()))
        return True

    # --- relations and other rare messages ----------------------------------------------------------------------

    def _rare(
        self, messages: Frames, transactions: _Transactions
    ) -> tuple[dict[int, list[tuple[int, _Known | None]]], list[_Piece]]:
        """Read the rare messages in order.

        Returns, for each relation that changed in this part, its versions with the message from which each holds
        (the first: what held before the part), and the truncates of selected tables.
        """
        changed: dict[int, list[tuple[int, _Known | None]]] = {}
        truncates: list[_Piece] = []
        rare = np.flatnonzero(_RARE.take(messages.kind))
        if not len(rare):
            return changed, truncates
        for i in rare.tolist():
            kind, data, inside = messages.kind[i], messages.data(i), bool(transactions.inside[i])
            if kind == RELATION:
                self._relation(messages, i, changed)
                continue
            try:
                if kind == TYPE:
                    oid, schema, name = read_type(data)
                    self.types[oid] = (schema, name)
                elif kind == ORIGIN:
                    name = read_origin(data)
                    if not inside:
                        raise ValueError("outside of a transaction")
                    transactions.origins[int(transactions.of[i])] = name
                elif kind == STREAM_ABORT:
                    # Postgres 18 sends it also to those who did not ask for streams, of transactions never sent.
                    read_stream_abort(data)
                    if inside:
                        raise ValueError("inside of a transaction")
                elif kind == TRUNCATE:
                    truncates += self._truncated(i, read_truncate(data))
                else:
                    message = read_message(data)
                    self._ddl |= message.is_ddl
                    if inside and message.origin is not None:
                        transactions.marks.setdefault(int(transactions.of[i]), (i, message.origin))
            except ValueError as error:
                raise messages.malformed(i, _reason(error)) from error
        after = transactions.lsn > self._after_lsn
        return changed, [piece for piece in truncates if after[transactions.of[piece.first]]]

    def _relation(self, messages: Frames, i: int, changed: dict[int, list[tuple[int, _Known | None]]]) -> None:
        """The same message comes again and again: only other bytes make another version."""
        data = messages.data(i)
        oid = _UINT32.unpack_from(data, 1)[0] if len(data) >= 5 else 0
        before = self._relations.get(oid)
        if before is not None and before.data == data:
            return
        try:
            relation = read_relation(data)
        except ValueError as error:
            raise messages.malformed(i, _reason(error)) from error
        schema = self._resolve(relation)
        known = _Known(data, None if schema is None else Layout(relation, schema))
        self._relations[oid] = known
        changed.setdefault(oid, [(-1, before)]).append((i, known))

    def _truncated(self, i: int, oids: list[int]) -> Iterator[_Piece]:
        for oid in oids:
            known = self._relations.get(oid)
            if known is None:
                raise ValueError("no Relation message before it")
            if known.layout is not None:
                yield _Piece(i, known.layout, np.array([i]), truncate=True)

    def _message_rows(
        self, messages: Frames, transactions: _Transactions, kept: Kept, tail: int, portion: Portion
    ) -> int:
        """Batches of the logical messages that are kept, those of the transaction that is still open apart. The
        position of the last one outside of transactions, 0 if none is new."""
        assert self._messages is not None
        t, alone = transactions, 0
        complete: list[MessageRow] = []
        still_open: list[MessageRow] = []
        for i, message in kept.items():
            if not message.transactional:
                if t.inside[i]:
                    raise messages.malformed(i, "a message outside of transactions stands inside of one")
                if message.lsn > self._after_lsn:
                    # Its own transaction, so to speak: sent in the order of positions, and known by its own.
                    complete.append(MessageRow(message, message.lsn, 0, 0, UNKNOWN_TIME, None))
                    alone = message.lsn
                continue
            of = int(t.of[i])
            if t.lsn[of] > self._after_lsn:
                seq = int(t.counted[i]) - 1 - int(t.first[of])
                row = MessageRow(message, int(t.lsn[of]), seq, int(t.xid[of]), int(t.committed[of]), t.origin(of, i))
                (complete if i < tail else still_open).append(row)
        portion.batches += [self._messages.batch(self._epoch, rows) for rows in (complete, still_open) if rows]
        return alone

    # --- rows ---------------------------------------------------------------------------------------------------

    def _pieces(
        self,
        messages: Frames,
        transactions: _Transactions,
        changed: dict[int, list[tuple[int, _Known | None]]],
        truncates: list[_Piece],
        tail: int,
    ) -> list[_Piece]:
        """Group the rows by relation, cut each group where its schema changes, at its truncates and at `tail`."""
        changes = np.flatnonzero(_CHANGE.take(messages.kind))
        if not len(changes):
            return []
        kept = transactions.lsn.take(transactions.of.take(changes)) > self._after_lsn
        kept &= messages.kind.take(changes) != TRUNCATE
        if not kept.all():
            changes = changes[kept]
        pieces = list(truncates)
        start = messages.start.take(changes)
        # Kind, relation, kind of tuple, number of columns: checked here also for rows that nobody will walk.
        messages.refuse(changes, messages.end.take(changes) < start + 8, "it is cut short")
        oids = messages.buffer.u32(start + 1)
        for oid, rows in _groups(oids):
            versions = changed.get(oid) or [(-1, self._relations.get(oid))]
            cuts = [first for first, _ in versions[1:]] + [tail]
            cuts += [piece.first for piece in truncates]
            numbers = changes.take(rows)
            edges = [0, *np.unique(np.searchsorted(numbers, cuts)).tolist(), len(numbers)]
            for begin, end in pairwise(edges):
                if begin == end:
                    continue
                first = int(numbers[begin])
                known = next(version for since, version in reversed(versions) if since < first)
                if known is None:
                    raise messages.malformed(first, "no Relation message before it")
                if known.layout is not None:
                    pieces.append(_Piece(first, known.layout, numbers[begin:end]))
        return _in_order(pieces)

    def _batches(self, messages: Frames, transactions: _Transactions, pieces: list[_Piece]) -> list[Batch]:
        """Walk the rows of each piece, and make its batch."""
        if not pieces:
            return []
        t = transactions
        order = np.concatenate([piece.messages for piece in pieces])
        of = t.of.take(order)
        rows = Rows(messages.kind.take(order), messages.start.take(order), messages.end.take(order))
        walked = []
        begin = 0
        for piece in pieces:
            count = len(piece.messages)
            part = slice(begin, begin + count)
            begin += count
            if piece.truncate:
                image = piece.layout.blank(count)
            else:
                walk = walk_rows if count < self._small_rows else walk_columns
                own = Rows(rows.kind[part], rows.start[part], rows.end[part])
                image = walk(messages.buffer, own, piece.layout.width, piece.layout.sources)
            walked.append((piece.layout, image, count))
        system = System(
            epoch=self._epoch,
            kind=rows.kind,
            lsn=t.lsn.take(of),
            seq=t.counted.take(order) - 1 - t.first.take(of),
            xid=t.xid.take(of),
            committed=t.committed.take(of),
            origin=_origins(t, of, order) if t.origins or t.marks else None,
        )
        return make_batches(walked, system, messages.buffer.size)


def _in_order(pieces: list[_Piece]) -> list[_Piece]:
    """The pieces by their first message. Where relations have swapped their names and swapped back, the rows of one
    table come from several: these are cut so that no piece reaches behind the beginning of the next."""
    of_tables: dict[TableId, list[_Piece]] = {}
    for piece in pieces:
        of_tables.setdefault(piece.layout.schema.table, []).append(piece)
    cut: list[_Piece] = []
    for same in of_tables.values():
        if len({piece.layout.schema.oid for piece in same}) == 1:
            cut += same
            continue
        messages = np.concatenate([piece.messages for piece in same])
        owner = np.repeat(np.arange(len(same)), [len(piece.messages) for piece in same])
        order = np.argsort(messages)
        messages, owner = messages.take(order), owner.take(order)
        edges = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(owner)]
        cut += [
            replace(same[owner[begin]], first=int(messages[begin]), messages=messages[begin:end])
            for begin, end in pairwise(edges)
        ]
    return sorted(cut, key=lambda piece: piece.first)


def _groups(oids: Ints) -> Iterator[tuple[int, Ints]]:
    """Each OID and where it stands, in order. A scan per OID while they are few, a sort when they are many."""
    rest: Ints | None = None
    for _ in range(8):
        left = oids if rest is None else oids.take(rest)
        if not len(left):
            return
        oid = int(left[0])
        same = left == oid
        if rest is None:
            rest = np.arange(len(oids))
        yield oid, rest[same]
        rest = rest[~same]
    assert rest is not None
    if not len(rest):
        return
    left = oids.take(rest)
    order = np.argsort(left, kind="stable")
    edges = np.flatnonzero(np.diff(left.take(order))) + 1
    for group in np.split(rest.take(order), edges):
        yield int(oids[group[0]]), group


def _origins(t: _Transactions, of: Ints, messages: Ints) -> pa.Array:
    """The origin of each of these messages of the transactions `of`."""
    names = {2 * entry: name for entry, name in t.origins.items()}
    if t.marks:
        names |= {2 * entry + 1: name for entry, (_, name) in t.marks.items()}
        since = np.full(len(t.lsn), np.iinfo(np.int64).max)
        since[list(t.marks)] = [first for first, _ in t.marks.values()]
        of = 2 * of + (messages > since.take(of))
    else:
        of = 2 * of
    known = sorted(names)
    place = np.searchsorted(known, of)
    place[place == len(known)] = 0
    absent = np.asarray(known, np.int64).take(place) != of
    return pa.array([names[n] for n in known], pa.string()).take(pa.array(place, mask=absent))


def _reason(error: ValueError) -> str:
    return "a name in it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
