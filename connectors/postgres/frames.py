"""A run of CopyData frames: which message each of them holds, and where.

Frames are looked at all at once, with numpy, as far as their first bytes: WAL data or a keepalive, and the kind of
the message. Guarantees: a frame that is cut short, and a kind that the caller does not expect, is a ProtocolError.
Between Stream Start and Stream Stop the server puts a transaction's id behind the kind of each message (`gap`); what
follows it has the places that it always has, so readers need not know.

Deliberately reads no message: pgoutput.py does, and spool.py those about streamed transactions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cdc.errors import ProtocolError
from connectors.postgres.buffer import HEADER, Bools, Buffer, Bytes, Ints

_XLOGDATA, _KEEPALIVE = b"wk"
_KEEPALIVE_BYTES = 18
XID_BYTES = 4


def kinds(bytes_: bytes | list[int]) -> Bools:
    """A table that says of each byte whether it is one of these kinds."""
    table = np.zeros(256, np.bool_)
    table[list(bytes_)] = True
    return table


@dataclass(slots=True)
class Frames:
    """`kind` byte of each message (0: a keepalive, or left out), where the message starts, where its frame ends.

    A message starts where its fields are counted from: with a `gap`, that many bytes behind its kind.
    """

    buffer: Buffer
    kind: Bytes
    start: Ints
    end: Ints
    keepalives: Ints

    @property
    def gap(self) -> int:
        return self.buffer.gap

    def data(self, i: int) -> bytes:
        """The bytes of a message, as they are without a gap."""
        start, end = int(self.start[i]), int(self.end[i])
        if self.gap:
            return bytes((int(self.kind[i]),)) + self.buffer.blob[start + 1 : end]
        return self.buffer.blob[start:end]

    def frame_start(self, i: int) -> int:
        """Where a frame begins."""
        return int(self.end[i - 1]) if i else 0

    def wal_end(self, i: int) -> int:
        """The server's position in the header of a frame of WAL data."""
        return int(self.buffer.i64(self.start[i : i + 1] - self.gap - HEADER + 9)[0])

    def malformed(self, i: int, why: str) -> ProtocolError:
        return self.buffer.malformed(int(self.start[i]), why)

    def refuse(self, messages: Ints, wrong: Bools, why: str) -> None:
        """ProtocolError for the first of these messages that is wrong."""
        if wrong.any():
            raise self.malformed(int(messages[int(np.argmax(wrong))]), why)


def parts(blob: bytes, lengths: Ints, part_bytes: int) -> Iterator[tuple[bytes, Ints]]:
    """The frames and their lengths, in parts of about this size (a longer frame is a part)."""
    if not len(lengths):
        return
    if len(blob) <= part_bytes:
        yield blob, lengths
        return
    ends = np.cumsum(lengths)
    begin, done = 0, 0
    while begin < len(lengths):
        end = max(begin + 1, int(np.searchsorted(ends, done + part_bytes, side="right")))
        yield blob[done : int(ends[end - 1])], lengths[begin:end]
        begin, done = end, int(ends[end - 1])


def split(blob: bytes, lengths: Ints, known: Bools, *, gap: int = 0) -> Frames:
    """Look at the first byte of each frame (at least one), and at that of its message."""
    end = np.cumsum(lengths)
    start = end - lengths
    if int(lengths.min()) < _KEEPALIVE_BYTES:
        raise ProtocolError("a replication frame is cut short")
    if int(end[-1]) != len(blob):
        raise ProtocolError("replication frames do not fill what was received")
    buffer = Buffer(blob, gap=gap)
    tag = buffer.u8(start)
    keepalives = np.flatnonzero(tag != _XLOGDATA)
    if len(keepalives):
        if (tag.take(keepalives) != _KEEPALIVE).any():
            raise ProtocolError("a replication frame is neither WAL data nor a keepalive")
        if (lengths.take(keepalives) != _KEEPALIVE_BYTES).any():
            raise ProtocolError("a keepalive has a wrong length")
        if (lengths[tag == _XLOGDATA] <= HEADER + gap).any():
            raise ProtocolError("a replication frame is cut short")
        kind, message = _with_keepalives(buffer, start, keepalives)
    else:
        if int(lengths.min()) <= HEADER + gap:
            raise ProtocolError("a replication frame is cut short")
        message = start + HEADER
        kind = buffer.u8(message)
        message += gap
    unknown = ~known.take(kind)
    unknown[keepalives] = False
    if unknown.any():
        raise buffer.malformed(int(message[int(np.argmax(unknown))]), "unknown kind of message")
    return Frames(buffer, kind, message, end, keepalives)


def _with_keepalives(buffer: Buffer, start: Ints, keepalives: Ints) -> tuple[Bytes, Ints]:
    message = start + HEADER
    message[keepalives] = start[keepalives]
    kind = buffer.u8(message)
    kind[keepalives] = 0
    message += buffer.gap
    return kind, message
