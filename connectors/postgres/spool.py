"""The streamed transactions that have not committed: held until Stream Commit, forgotten at Stream Abort.

With `streaming 'on'` (pgoutput protocol 2) the server sends a big transaction while it runs, in blocks between Stream
Start and Stream Stop, with other transactions between them. The spool stands between receiver and decoder: it takes
the blocks out of the stream, and at Stream Commit gives the transaction's messages to the decoder as those of an
ordinary transaction, behind a Begin and before a Commit of its own making, without those of subtransactions that were
rolled back. So positions, ordinals, relations and origins are exactly those of a stream that was not streamed.

Guarantees: everything ordinary keeps its order; a transaction stands where its Stream Commit stood. What is held in
memory stays below `memory_bytes` (and the blob under way), the rest is in one file per transaction, removed with it.
Nothing here survives a crash or is meant to: the server sends an uncommitted transaction again, from its beginning.
A Relation message of a rolled-back subtransaction is left out like its rows (the server says it again afterwards);
one that an ordinary transaction said later than the streamed one is said once more at its end, because the server
takes the newest in order of sending for known.

It reads no row: the decoder does. It does not know what is durable, and confirms nothing.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cdc.errors import SpoolFailed
from cdc.memory import give_back_memory
from connectors.postgres.buffer import HEADER, Bools, Ints
from connectors.postgres.frames import XID_BYTES, Frames, kinds, split
from connectors.postgres.messages import (
    BEGIN,
    COMMIT,
    DELETE,
    INSERT,
    MESSAGE,
    ORIGIN,
    RELATION,
    STREAM_ABORT,
    STREAM_COMMIT,
    STREAM_START,
    STREAM_STOP,
    TRUNCATE,
    TYPE,
    UPDATE,
    StreamCommit,
    read_stream_abort,
    read_stream_commit,
    read_stream_start,
)

PORTION_BYTES = 4 << 20
"""About so much of a transaction is given to the decoder at a time, and logged at once: less costs more writes."""

_CONTROL = kinds([STREAM_START, STREAM_STOP, STREAM_COMMIT, STREAM_ABORT])
_STREAMED = kinds([RELATION, TYPE, INSERT, UPDATE, DELETE, TRUNCATE, MESSAGE, ORIGIN])
_KNOWN = _CONTROL | _STREAMED | kinds([BEGIN, COMMIT])
_PART_OVERHEAD = 256
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Part:
    """Frames for the decoder; `aborted` None: ordinary ones, else those of a streamed transaction (`feed_spooled`), of
    which there is `more`. `anonymous`: it begins one of which the server did not say an origin."""

    data: bytes
    lengths: Ints
    aborted: Ints | None = None
    more: bool = False
    anonymous: bool = False


@dataclass(slots=True)
class _Said:
    """A Relation message: when it came, by which (sub)transaction, and its frame."""

    number: int
    xid: int
    frame: bytes


@dataclass(slots=True)
class _Transaction:
    """A transaction that the server streams to us, by its top-level id."""

    xid: int
    aborted: set[int] = field(default_factory=set)
    written: list[tuple[int, int, int]] = field(default_factory=list)
    """Segments in the file: where, how many frames, how many bytes of frames."""
    held: list[tuple[bytes, Ints]] = field(default_factory=list)
    held_bytes: int = 0
    has_origin: bool = False
    relations: dict[int, list[_Said]] = field(default_factory=dict)
    """By OID, those that may still hold, in order."""


class Spool:
    """The streamed transactions of one stream. Not thread-safe. SpoolFailed if the disk takes or gives no more, or the
    files would take more than `bytes_max`."""

    def __init__(self, folder: Path, *, memory_bytes: int, bytes_max: int) -> None:
        """Nothing that lies in `folder` from before counts: it is removed, now and by `close`."""
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._bytes_max = bytes_max
        self._open: dict[int, _Transaction] = {}
        self._inside: _Transaction | None = None
        self._said: dict[int, _Said] = {}
        self._number = 0
        self.held_bytes = 0
        """Bytes in memory."""
        self.written_bytes = 0
        """Bytes in files."""
        self.head_lsn = 0
        """The server's position as of the newest frame that was taken."""
        self.messages = 0
        """Messages in what was taken last."""
        shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Forget everything; idempotent."""
        self._open.clear()
        self._inside = None
        self.held_bytes = self.written_bytes = 0
        shutil.rmtree(self._folder, ignore_errors=True)

    def take(self, data: bytes, lengths: Ints, *, in_transaction: bool) -> Iterator[Part]:
        """Take the next frames of the stream; what the decoder gets now, in order. To be read to its end before the
        next call.

        `in_transaction`: whether the decoder stands between an ordinary Begin and its Commit. ProtocolError for what
        no stream can hold.
        """
        frames = split(data, lengths, _KNOWN)
        self._note_head(frames)
        controls = np.flatnonzero(_CONTROL.take(frames.kind))
        if not len(controls) and self._inside is None:
            self._note_relations(frames, 0, len(lengths))
            yield Part(data, lengths)
            return
        depth = np.cumsum(frames.kind == BEGIN, dtype=np.int64) - np.cumsum(frames.kind == COMMIT, dtype=np.int64)
        frames.refuse(controls, depth.take(controls) != -int(in_transaction), "inside of another transaction")
        runs: list[tuple[int, int]] = []
        at = 0
        for i in [*controls.tolist(), len(lengths)]:
            if self._inside is not None:
                self._keep(frames, at, i, runs)
            elif i > at:
                self._note_relations(frames, at, i)
                runs.append((at, i))
            at = i + 1
            if i == len(lengths):
                break
            try:
                commit = self._control(frames.kind[i], frames.data(i))
            except ValueError as error:
                raise frames.malformed(i, str(error)) from error
            if commit is not None:
                yield from _joined(frames, lengths, runs)
                runs = []
                yield from self._replay(commit)
        yield from _joined(frames, lengths, runs)

    # --- what the server says of streamed transactions ----------------------------------------------------------

    def _control(self, kind: int, data: bytes) -> StreamCommit | None:
        """Follow a message about a streamed transaction. Returns it if it commits one. ValueError if it cannot be."""
        if kind == STREAM_STOP:
            if self._inside is None:
                raise ValueError("no Stream Start before it")
            if len(data) != 1:
                raise ValueError("wrong length")
            self._inside = None
            return None
        if self._inside is not None:
            raise ValueError("inside of a streamed block")
        if kind == STREAM_START:
            xid, first = read_stream_start(data)
            if first == (xid in self._open):
                raise ValueError("it is not the first block" if first else "the first block is missing")
            self._inside = self._open.setdefault(xid, _Transaction(xid))
        elif kind == STREAM_ABORT:
            self._abort(*read_stream_abort(data))
        else:
            commit = read_stream_commit(data)
            if commit.xid not in self._open:
                raise ValueError("no Stream Start before it")
            return commit
        return None

    def _abort(self, xid: int, subxid: int) -> None:
        """An id that we know nothing of is that of a transaction of which nothing was sent."""
        transaction = self._open.get(xid)
        if transaction is None:
            return
        if subxid == xid:
            self._forget(transaction)
            return
        transaction.aborted.add(subxid)
        for oid, said in list(transaction.relations.items()):
            transaction.relations[oid] = [one for one in said if one.xid != subxid]

    # --- what is held ---------------------------------------------------------------------------------------------

    def _keep(self, frames: Frames, begin: int, end: int, runs: list[tuple[int, int]]) -> None:
        """Hold these frames of the open block; keepalives among them are ordinary."""
        kind = frames.kind[begin:end]
        strange = ~_STREAMED.take(kind) & (kind != 0)
        if strange.any():
            raise frames.malformed(begin + int(np.argmax(strange)), "inside of a streamed block")
        for i in (np.flatnonzero(kind == 0) + begin).tolist():
            self._hold(frames, begin, i)
            runs.append((i, i + 1))
            begin = i + 1
        self._hold(frames, begin, end)

    def _hold(self, frames: Frames, begin: int, end: int) -> None:
        transaction = self._inside
        if begin == end or transaction is None:
            return
        start, ends = frames.start[begin:end], frames.end[begin:end]
        kind = frames.kind[begin:end]
        messages = np.arange(begin, end)
        origins = kind == ORIGIN
        frames.refuse(messages, (ends <= start + XID_BYTES) & ~origins, "it is cut short")
        if transaction.aborted or (kind == RELATION).any():
            xids = frames.buffer.u32(start + 1)
            again = transaction.aborted.intersection(np.unique(xids[~origins]).tolist())
            if again:
                frames.refuse(messages, np.isin(xids, list(again)), "its subtransaction was rolled back before")
            self._note_streamed_relations(transaction, frames, begin, end, xids)
        first = frames.frame_start(begin)
        data, lengths = frames.buffer.blob[first : int(ends[-1])], np.diff(ends, prepend=first)
        if origins.any():
            transaction.has_origin = True
            data, lengths = _with_xids(data, lengths, origins, transaction.xid)
        transaction.held.append((data, lengths))
        size = len(data) + lengths.nbytes + _PART_OVERHEAD
        transaction.held_bytes += size
        self.held_bytes += size
        if self.held_bytes > self._memory_bytes:
            self._make_room()

    def _make_room(self) -> None:
        """The greatest go to disk, until half of the room is free: so writes are long, and files few."""
        for transaction in sorted(self._open.values(), key=lambda t: -t.held_bytes):
            if self.held_bytes <= self._memory_bytes // 2:
                break
            self._write(transaction)

    def _write(self, transaction: _Transaction) -> None:
        if self.written_bytes + transaction.held_bytes > self._bytes_max:
            raise self._failed("spool_bytes_max is reached", transaction.held_bytes)
        segments = [(b"".join(d for d, _ in g), np.concatenate([n for _, n in g])) for g in _portions(transaction.held)]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            file = os.open(self._path(transaction), flags, 0o600)
            try:
                at = os.fstat(file).st_size
                for data, lengths in segments:
                    _write_all(file, lengths.astype("<u4").tobytes())
                    _write_all(file, data)
                    transaction.written.append((at, len(lengths), len(data)))
                    at += 4 * len(lengths) + len(data)
                    self.written_bytes += len(data)
            finally:
                os.close(file)
        except OSError as error:
            raise self._failed(str(error.strerror), transaction.held_bytes) from error
        self.held_bytes -= transaction.held_bytes
        transaction.held, transaction.held_bytes = [], 0

    def _forget(self, transaction: _Transaction) -> None:
        del self._open[transaction.xid]
        self.held_bytes -= transaction.held_bytes
        if transaction.written:
            self.written_bytes -= sum(size for _, _, size in transaction.written)
            self._path(transaction).unlink(missing_ok=True)
        if not self._open:
            self._said.clear()

    def _path(self, transaction: _Transaction) -> Path:
        return self._folder / f"{transaction.xid}.frames"

    def _failed(self, why: str, more: int) -> SpoolFailed:
        return SpoolFailed(
            f"{self._folder} fails to hold a transaction that is streamed before it commits: {why}; "
            f"{self.written_bytes} bytes of such are there, {more} more are to be",
            hint="free space on that disk or raise spool_bytes_max, then restart; until then the server keeps them",
        )

    # --- what is committed ----------------------------------------------------------------------------------------

    def _replay(self, commit: StreamCommit) -> Iterator[Part]:
        """The transaction as an ordinary one, in portions; then it is forgotten."""
        transaction = self._open[commit.xid]
        aborted = np.fromiter(sorted(transaction.aborted), np.int64, len(transaction.aborted))
        begun = struct.pack(">QqI", commit.commit_lsn, commit.time, commit.xid)
        ended = struct.pack(">BQQq", 0, commit.commit_lsn, commit.end_lsn, commit.time)
        newer = self._promote(transaction)
        before, behind = [_frame(BEGIN, commit, begun)], [*newer, _frame(COMMIT, commit, ended)]
        for data, lengths, last in self._read(transaction):
            around = (before, behind if last else [])
            sizes = [np.fromiter(map(len, frames), np.int64, len(frames)) for frames in around]
            data = b"".join((*around[0], data, *around[1]))
            anonymous = bool(before) and not transaction.has_origin
            numbers = np.concatenate((sizes[0], lengths, sizes[1]))
            yield Part(data, numbers, aborted, more=not last, anonymous=anonymous)
            before, data = [], b""
            give_back_memory()
        self._forget(transaction)

    def _read(self, transaction: _Transaction) -> Iterator[tuple[bytes, Ints, bool]]:
        """Portions of the frames, and whether it is the last; at least one."""
        groups = _portions(self._pieces(transaction))
        group = next(groups, [(b"", _NONE)])
        for following in groups:
            yield b"".join(data for data, _ in group), np.concatenate([n for _, n in group]), False
            group = following
        yield b"".join(data for data, _ in group), np.concatenate([n for _, n in group]), True

    def _pieces(self, transaction: _Transaction) -> Iterator[tuple[bytes, Ints]]:
        """What is held of the transaction, in order: first what is on disk, read only when it is asked for."""
        if transaction.written:
            try:
                file = os.open(self._path(transaction), os.O_RDONLY)
                try:
                    for at, count, size in transaction.written:
                        lengths = np.frombuffer(_read_all(file, at, 4 * count), "<u4").astype(np.int64)
                        yield _read_all(file, at + 4 * count, size), lengths
                finally:
                    os.close(file)
            except OSError as error:
                raise self._failed(str(error.strerror), 0) from error
        yield from transaction.held

    # --- relations ------------------------------------------------------------------------------------------------

    def _note_relations(self, frames: Frames, begin: int, end: int) -> None:
        """Relations of ordinary transactions, while others are streamed."""
        if not self._open:
            return
        for i in (np.flatnonzero(frames.kind[begin:end] == RELATION) + begin).tolist():
            self._number += 1
            start = int(frames.start[i])
            oid = int.from_bytes(frames.buffer.blob[start + 1 : start + 5], "big")
            frame = frames.buffer.blob[frames.frame_start(i) : int(frames.end[i])]
            self._said[oid] = _Said(self._number, 0, _spread(frame, 0))

    def _note_streamed_relations(
        self, transaction: _Transaction, frames: Frames, begin: int, end: int, xids: Ints
    ) -> None:
        for i in (np.flatnonzero(frames.kind[begin:end] == RELATION) + begin).tolist():
            self._number += 1
            start = int(frames.start[i])
            oid = int.from_bytes(frames.buffer.blob[start + 5 : start + 9], "big")
            frame = frames.buffer.blob[frames.frame_start(i) : int(frames.end[i])]
            said = transaction.relations.setdefault(oid, [])
            if said and said[-1].xid == int(xids[i - begin]):
                said.pop()
            said.append(_Said(self._number, int(xids[i - begin]), frame))

    def _promote(self, transaction: _Transaction) -> list[bytes]:
        """Let the transaction's relations hold from now on. Returns the frames of those that came after them from
        transactions that have committed before: of two, the server takes the one for known that it sent last."""
        newer = []
        for oid, said in transaction.relations.items():
            if not said:
                continue
            other = self._said.get(oid)
            if other is not None and other.number > said[-1].number:
                newer.append(other.frame)
            else:
                self._said[oid] = said[-1]
        return newer

    def _note_head(self, frames: Frames) -> None:
        self.messages = len(frames.kind) - len(frames.keepalives)
        last = np.flatnonzero(frames.kind)[-1:]
        if len(last):
            self.head_lsn = max(self.head_lsn, frames.wal_end(int(last[0])))
        if len(frames.keepalives):
            wal_end = frames.buffer.i64(frames.start.take(frames.keepalives) + 1)
            self.head_lsn = max(self.head_lsn, int(wal_end.max()))


def _joined(frames: Frames, lengths: Ints, runs: list[tuple[int, int]]) -> Iterator[Part]:
    """The ordinary frames of these runs as one part, if there are any."""
    if not runs:
        return
    blob = frames.buffer.blob
    data = b"".join(blob[frames.frame_start(begin) : int(frames.end[end - 1])] for begin, end in runs)
    yield Part(data, np.concatenate([lengths[begin:end] for begin, end in runs]))


def _portions(held: Iterable[tuple[bytes, Ints]]) -> Iterator[list[tuple[bytes, Ints]]]:
    """The pieces in groups of about PORTION_BYTES."""
    group: list[tuple[bytes, Ints]] = []
    size = 0
    for piece in held:
        if group and size + len(piece[0]) > PORTION_BYTES:
            yield group
            group, size = [], 0
        group.append(piece)
        size += len(piece[0])
    if group:
        yield group


def _spread(frame: bytes, xid: int) -> bytes:
    """The frame of an ordinary message with an id behind the message's kind."""
    return frame[: HEADER + 1] + struct.pack(">I", xid) + frame[HEADER + 1 :]


def _frame(kind: int, commit: StreamCommit, fields: bytes) -> bytes:
    """A frame of our own making, in the place of the Stream Commit."""
    header = struct.pack(">cQQq", b"w", commit.commit_lsn, commit.end_lsn, 0)
    return _spread(header + bytes((kind,)) + fields, commit.xid)


def _with_xids(data: bytes, lengths: Ints, origins: Bools, xid: int) -> tuple[bytes, Ints]:
    """Origin comes without an id, once in a transaction: give it the transaction's."""
    ends = np.cumsum(lengths)
    pieces = []
    at = 0
    for i in np.flatnonzero(origins).tolist():
        begin, end = int(ends[i] - lengths[i]), int(ends[i])
        pieces += [data[at:begin], _spread(data[begin:end], xid)]
        at = end
    return b"".join((*pieces, data[at:])), lengths + XID_BYTES * origins


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _read_all(file: int, at: int, size: int) -> bytes:
    """Exactly these bytes of the file."""
    data = os.pread(file, size, at)
    while len(data) < size:
        # One call gives at most 2 GiB.
        more = os.pread(file, size - len(data), at + len(data))
        if not more:
            raise OSError(0, "a file is shorter than what was written to it")
        data += more
    return data
