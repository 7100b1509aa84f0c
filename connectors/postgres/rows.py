"""Walks the tuples of a few rows of one relation, one after the other: the small-batch twin of columns.py.

Vectorised code costs some twenty numpy calls per column however few the rows are; below some 80 rows this plain loop
is faster. It yields the same image as columns.py for every stream, and refuses the same ones.
"""

from __future__ import annotations

import struct

import numpy as np
import pyarrow as pa

from connectors.postgres.buffer import Buffer
from connectors.postgres.image import Image, Rows
from connectors.postgres.messages import DELETE, INSERT, KEY, NEW, NULL, OLD, TEXT, UNCHANGED

_UINT16 = struct.Struct(">H")
_UINT32 = struct.Struct(">I")

_Cell = bytes | int
"""A text, or the kind byte NULL or UNCHANGED."""


def walk_rows(buffer: Buffer, rows: Rows, width: int, sources: list[int]) -> Image:
    """The image of at least one row; contract of columns.walk_columns."""
    cells: list[list[_Cell]] = []
    old_cells: list[list[_Cell]] = []
    old: list[int] = []
    for kind, start, end in zip(rows.kind.tolist(), rows.start.tolist(), rows.end.tolist(), strict=True):
        if start + 6 > end:
            raise buffer.malformed(start, "unexpected kind of tuple")
        tuple_kind = buffer.blob[start + 5]
        expected = (KEY, OLD) if kind == DELETE else (NEW,) if kind == INSERT else (NEW, KEY, OLD)
        if tuple_kind not in expected:
            raise buffer.malformed(start, "unexpected kind of tuple")
        row, at = _walk(buffer, start, start + 6, end, width)
        if kind != DELETE and tuple_kind != NEW:
            before = row
            if at >= end or buffer.blob[at] != NEW:
                raise buffer.malformed(start, "no new tuple behind the old one")
            row, at = _walk(buffer, start, at + 1, end, width)
            _fill(row, before, tuple_kind == OLD)
            old.append(len(cells))
            old_cells.append(before)
        if at != end:
            raise buffer.malformed(start, "its tuples do not end with its frame")
        cells.append(row)
    image = Image(
        [_texts(buffer, rows, cells, i) for i in sources],
        [np.fromiter((row[i] == UNCHANGED for row in cells), np.bool_, len(cells)) for i in sources],
    )
    if old:
        image.old = np.asarray(old, np.int64)
        image.old_texts = [_texts(buffer, rows, old_cells, i) for i in sources]
    return image


def _walk(buffer: Buffer, message: int, at: int, end: int, width: int) -> tuple[list[_Cell], int]:
    """The cells of the tuple at `at`, and the position behind it; not beyond `end`."""
    blob = buffer.blob
    if at + 2 > end:
        raise buffer.malformed(message, "a tuple is longer than its frame")
    if _UINT16.unpack_from(blob, at)[0] != width:
        raise buffer.malformed(message, "its number of columns is not the relation's")
    at += 2
    cells: list[_Cell] = []
    for _ in range(width):
        kind = blob[at] if at < end else 0
        if kind == TEXT and at + 5 <= end:
            start = at + 5
            at = start + _UINT32.unpack_from(blob, at + 1)[0]
            cells.append(blob[start:at])
        elif kind in (NULL, UNCHANGED):
            at += 1
            cells.append(kind)
        else:
            raise buffer.malformed(message, "unknown kind of value")
        if at > end:
            raise buffer.malformed(message, "a tuple is longer than its frame")
    return cells, at


def _fill(row: list[_Cell], before: list[_Cell], full: bool) -> None:
    """Where the new tuple says "unchanged" and the old one holds the value, it is the value."""
    for i, cell in enumerate(row):
        if cell == UNCHANGED and (isinstance(before[i], bytes) or (full and before[i] == NULL)):
            row[i] = before[i]


def _texts(buffer: Buffer, rows: Rows, cells: list[list[_Cell]], column: int) -> pa.Array:
    texts = [cell if isinstance(cell := row[column], bytes) else None for row in cells]
    try:
        return pa.array(texts, pa.string())
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise buffer.malformed(int(rows.start[0]), "text is not UTF-8 in it or a message near it") from error
