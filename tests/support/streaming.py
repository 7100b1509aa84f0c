"""An ordinary pgoutput stream said again as a server with `streaming 'on'` could have sent it.

`streamed` takes frames of protocol 1 and returns frames of protocol 2 that mean the same: some transactions come in
blocks, earlier than their commit and between others; subtransactions and whole transactions that are rolled back are
put in. Whatever reads the result must say exactly what is said of the ordinary stream.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

HEADER = 25
_WITHOUT_XID = b"BCO"


@dataclass
class _Transaction:
    """Frames between Begin and Commit; a relation is said in it before its first use."""

    begin: bytes
    frames: list[bytes] = field(default_factory=list)
    commit: bytes | None = None

    @property
    def xid(self) -> int:
        return int(struct.unpack_from(">I", self.begin, HEADER + 17)[0])


def kind(frame: bytes) -> bytes:
    """The kind of the message in a frame, empty for a keepalive."""
    return frame[HEADER : HEADER + 1] if frame[:1] == b"w" else b""


def framed(payload: bytes, lsn: int = 1) -> bytes:
    return b"w" + struct.pack(">QQq", lsn, lsn, 0) + payload


def with_xid(frame: bytes, xid: int) -> bytes:
    """The message as it stands inside of a streamed block."""
    if kind(frame) in _WITHOUT_XID:
        return frame
    return frame[: HEADER + 1] + struct.pack(">I", xid) + frame[HEADER + 1 :]


def start(xid: int, *, first: bool) -> bytes:
    return framed(b"S" + struct.pack(">IB", xid, first))


def stop() -> bytes:
    return framed(b"E")


def commit(xid: int, commit_lsn: int, end_lsn: int, time: int = 1) -> bytes:
    return framed(b"c" + struct.pack(">IBQQq", xid, 0, commit_lsn, end_lsn, time), end_lsn)


def abort(xid: int, subxid: int) -> bytes:
    return framed(b"A" + struct.pack(">II", xid, subxid))


def streamed(frames: Iterable[bytes], rng: random.Random, *, share: float = 0.6) -> list[bytes]:
    """The same stream with about this share of its transactions streamed. What never commits is left out."""
    items = list(_items(frames))
    slots: list[list[bytes]] = [[] for _ in items]
    for place, item in enumerate(items):
        if not isinstance(item, _Transaction):
            slots[place].append(item)
        elif item.commit is None:
            continue
        elif rng.random() > share:
            slots[place] += [item.begin, *item.frames, item.commit]
        else:
            blocks = list(_blocks(item, rng))
            earliest = rng.randint(max(0, place - 6), place)
            for at, block in zip(sorted(rng.randint(earliest, place) for _ in blocks), blocks, strict=True):
                slots[at] += block
            _, lsn, end_lsn, time = struct.unpack_from(">BQQq", item.commit, HEADER + 1)
            slots[place].append(commit(item.xid, lsn, end_lsn, time))
    out: list[bytes] = []
    for slot in slots:
        if rng.random() < 0.1:
            out += _nothing(rng, frames)
        out += slot
    return out


def _items(frames: Iterable[bytes]) -> Iterator[_Transaction | bytes]:
    """Transactions, and what stands between them (keepalives always)."""
    said: dict[int, bytes] = {}
    open_: _Transaction | None = None
    fresh: set[int] = set()
    for frame in frames:
        what = kind(frame)
        if what == b"B":
            open_, fresh = _Transaction(frame), set()
            continue
        if open_ is None or not what:
            yield frame
            continue
        if what == b"C":
            open_.commit = frame
            yield open_
            open_ = None
            continue
        if what == b"R":
            oid = struct.unpack_from(">I", frame, HEADER + 1)[0]
            said[oid] = frame
            fresh.add(oid)
        for oid in _used(frame):
            if oid not in fresh:
                open_.frames.append(said[oid])
                fresh.add(oid)
        open_.frames.append(frame)
    if open_ is not None:
        yield open_


def _used(frame: bytes) -> list[int]:
    match kind(frame):
        case b"I" | b"U" | b"D":
            return [struct.unpack_from(">I", frame, HEADER + 1)[0]]
        case b"T":
            count = struct.unpack_from(">I", frame, HEADER + 1)[0]
            return list(struct.unpack_from(f">{count}I", frame, HEADER + 6))
    return []


def _blocks(item: _Transaction, rng: random.Random) -> Iterator[list[bytes]]:
    """The transaction's frames in blocks, each with Stream Start and Stop, with rolled-back subtransactions between."""
    first = True
    said: dict[int, bytes] = {}
    again: set[int] = set()
    rows = [f for f in item.frames if kind(f) in (b"I", b"U", b"D", b"T", b"R")]
    block: list[bytes] = []
    for frame in [*item.frames, None]:
        if frame is None or rng.random() < 0.2:
            yield [start(item.xid, first=first), *block, stop()]
            first, block = False, []
        if frame is None:
            break
        if rng.random() < 0.1 and rows:
            # Everything that a rolled-back subtransaction said counts for nothing, its relations too.
            subxid = item.xid + rng.randint(1, 1 << 20) & 0xFFFFFFFF
            lost = [with_xid(_reshaped(f, rng), subxid) for f in rng.choices(rows, k=rng.randint(1, 5))]
            yield [start(item.xid, first=first), *block, *lost, stop(), abort(item.xid, subxid)]
            first, block = False, []
            again = set(said)
        if kind(frame) == b"R":
            oid = struct.unpack_from(">I", frame, HEADER + 1)[0]
            said[oid] = frame
            again.discard(oid)
        for oid in again.intersection(_used(frame)):
            block.append(with_xid(said[oid], item.xid))
            again.discard(oid)
        own = item.xid if rng.random() < 0.7 else item.xid + (2 << 20) + rng.randint(0, 3) & 0xFFFFFFFF
        block.append(with_xid(frame, own))


def _reshaped(frame: bytes, rng: random.Random) -> bytes:
    """A Relation message of a table that was altered in a transaction that never happens; others as they are."""
    if kind(frame) != b"R" or rng.random() < 0.5:
        return frame
    name = frame.index(b"\0", frame.index(b"\0", HEADER + 5) + 1) + 2
    column = b"\0gone\0" + struct.pack(">Ii", 25, -1)
    return frame[:name] + struct.pack(">H", 1) + column


def _nothing(rng: random.Random, frames: Iterable[bytes]) -> list[bytes]:
    """A transaction that is rolled back, or word of one of which nothing was sent."""
    xid = rng.randrange(1 << 32)
    if rng.random() < 0.5:
        return [abort(xid, xid if rng.random() < 0.5 else xid ^ 1)]
    said = {struct.unpack_from(">I", f, HEADER + 1)[0]: f for f in frames if kind(f) == b"R"}
    lost = [with_xid(f, xid) for f in said.values()]
    return [start(xid, first=True), *lost, stop(), start(xid, first=False), stop(), abort(xid, xid)]
