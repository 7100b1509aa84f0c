"""Walks the tuples of many rows of one relation at once, column by column.

All rows stand at their first column; one step reads the kind byte, length and value span of that column in every row
and moves all rows to the next. No Python object per row or value. A column's cells become an Arrow string array
without looking at them: the spans [start, end, start, end, …] are offsets of an array over the joined buffer, whose
even elements are the cells.

Its twin for few rows is rows.py; both yield equal images for every stream (tests/property/test_decoder_streams.py).
Deliberately does not cast: image.py does, for both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdc.casts import utf8_or_bytes
from connectors.postgres.buffer import Bools, Buffer, Bytes, Ints
from connectors.postgres.image import Image, Rows
from connectors.postgres.messages import DELETE, INSERT, KEY, NEW, NULL, OLD, TEXT, UNCHANGED

_TAKE = pc.get_function("array_take")
_NO_CHECK = pc.TakeOptions(boundscheck=False)


class _Spans(NamedTuple):
    """One column in all rows: where its values stand; `kind` is None if every row has a text."""

    kind: Bytes | None
    start: Ints
    end: Ints


def walk_columns(buffer: Buffer, rows: Rows, width: int, sources: list[int]) -> Image:
    """The image of at least one row; `width` columns are on the wire, `sources` are those to keep, in order.

    Raises ProtocolError if a row's bytes are not what its kind promises, or do not end with its frame.
    """
    tuple_kind = buffer.u8(rows.start + 5)
    at = rows.start + 6
    old: Ints | None = None
    old_spans: list[_Spans] = []
    deletes = rows.kind == DELETE
    plain = tuple_kind == NEW
    wrong = (plain & deletes) | ~(plain | (tuple_kind == KEY) | (tuple_kind == OLD))
    wrong |= (rows.kind == INSERT) & ~plain
    _refuse(buffer, rows.start, wrong, "unexpected kind of tuple")
    with_old = ~(plain | deletes)
    if with_old.any():
        old = np.flatnonzero(with_old)
        start, end = rows.start.take(old), rows.end.take(old)
        old_spans, behind = _walk(buffer, start, at.take(old), end, width)
        _refuse(buffer, start, (behind >= end) | (buffer.u8(behind) != NEW), "no new tuple behind the old one")
        at[old] = behind + 1
    spans, behind = _walk(buffer, rows.start, at, rows.end, width)
    _refuse(buffer, rows.start, behind != rows.end, "its tuples do not end with its frame")
    kept = [spans[i] for i in sources]
    if old is None:
        return Image([_texts(buffer, column) for column in kept], [_unchanged(column) for column in kept])
    kept_old = [old_spans[i] for i in sources]
    kept = [_fill(column, before, old) for column, before in zip(kept, kept_old, strict=True)]
    return Image(
        [_texts(buffer, column) for column in kept],
        [_unchanged(column) for column in kept],
        old,
        [_texts(buffer, column) for column in kept_old],
    )


def _walk(buffer: Buffer, message: Ints, at: Ints, end: Ints, width: int) -> tuple[list[_Spans], Ints]:
    """Spans of every column of the tuples at `at`, and the positions behind them; none beyond `end`.

    Positions are checked after every step: one that strays is refused before it can lead further.
    """
    _refuse(buffer, message, buffer.u16(at) != width, "its number of columns is not the relation's")
    at = at + 2
    _refuse(buffer, message, at > end, "a tuple is longer than its frame")
    columns = []
    for _ in range(width):
        kind = buffer.u8(at)
        text = kind == TEXT
        if text.all():
            start = at + 5
            at = start + buffer.u32(at + 1)
            columns.append(_Spans(None, start, at))
        else:
            _refuse(buffer, message, ~(text | (kind == NULL) | (kind == UNCHANGED)), "unknown kind of value")
            length = buffer.u32(at + 1)
            start = at + 1
            start[text] += 4
            length[~text] = 0
            at = start + length
            columns.append(_Spans(kind, start, at))
        if (at > end).any():
            _refuse(buffer, message, at > end, "a tuple is longer than its frame")
    return columns, at


def _fill(column: _Spans, before: _Spans, old: Ints) -> _Spans:
    """Where the new tuple says "unchanged" and the old one holds the value, it is the value."""
    if column.kind is None:
        return column
    wanted = column.kind.take(old) == UNCHANGED
    if before.kind is not None:
        # 'n' is no value here: in a 'K' tuple it says "not sent", and so it does in the 'O' tuple of a partition whose
        # own identity is not its root's. What is stored out of line is never NULL.
        wanted &= before.kind == TEXT
    if not wanted.any():
        return column
    rows = old[wanted]
    kind, start, end = column.kind.copy(), column.start.copy(), column.end.copy()
    kind[rows] = TEXT if before.kind is None else before.kind[wanted]
    start[rows] = before.start[wanted]
    end[rows] = before.end[wanted]
    return _Spans(kind, start, end)


def _unchanged(column: _Spans) -> Bools | None:
    return None if column.kind is None else column.kind == UNCHANGED


def _texts(buffer: Buffer, column: _Spans) -> pa.Array:
    """The column's cells as a string array, null where there is no text; a binary array if one is not UTF-8."""
    n = len(column.start)
    offsets = np.empty(2 * n, np.int32)
    offsets[0::2] = column.start
    offsets[1::2] = column.end
    gapped = pa.StringArray.from_buffers(2 * n - 1, pa.py_buffer(offsets), buffer.arrow)
    cells = _TAKE.call([gapped, _evens(n)], _NO_CHECK)
    _, packed, data = cells.buffers()
    if column.kind is not None:
        valid = pa.py_buffer(np.packbits(column.kind == TEXT, bitorder="little"))
        cells = pa.StringArray.from_buffers(n, packed, data, valid)
    # What is not UTF-8 is bytes, for which the cast has a place.
    return utf8_or_bytes(cells)


_even_numbers = pa.array(np.arange(0, 1 << 15, 2))


def _evens(n: int) -> pa.Array:
    global _even_numbers  # a cache of a constant; a lost race makes it twice
    if len(_even_numbers) < n:
        _even_numbers = pa.array(np.arange(0, 4 * n, 2))
    return _even_numbers.slice(0, n)


def _refuse(buffer: Buffer, message: Ints, wrong: Bools, why: str) -> None:
    if wrong.any():
        raise buffer.malformed(int(message[int(np.argmax(wrong))]), why)
