"""Walks the tuples of a few rows of one relation, one after the other: the small-batch twin of columns.py.

Vectorised code costs some twenty numpy calls per column however few the rows are; below some 80 rows this plain loop
is faster. It yields the same image as columns.py for every stream (its texts still as Python values, which image.py
makes arrays of for many small batches at once), and refuses the same ones.
"""

from __future__ import annotations

import struct

import numpy as np

from connectors.postgres.buffer import Bools, Buffer
from connectors.postgres.image import Image, Rows, Texts
from connectors.postgres.messages import DELETE, INSERT, KEY, NEW, NULL, OLD, TEXT, UNCHANGED

_UINT16 = struct.Struct(">H")
_UINT32 = struct.Struct(">I")

_Cell = bytes | int | None
"""A text, None for NULL, or UNCHANGED."""


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
            _fill(row, before)
            old.append(len(cells))
            old_cells.append(before)
        if at != end:
            raise buffer.malformed(start, "its tuples do not end with its frame")
        cells.append(row)
    image = Image(*_by_column(cells, sources))
    if old:
        image.old = np.asarray(old, np.int64)
        image.old_texts, _ = _by_column(old_cells, sources)
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
            cells.append(None if kind == NULL else UNCHANGED)
        else:
            raise buffer.malformed(message, "unknown kind of value")
        if at > end:
            raise buffer.malformed(message, "a tuple is longer than its frame")
    return cells, at


def _fill(row: list[_Cell], before: list[_Cell]) -> None:
    """Where the new tuple says "unchanged" and the old one holds the value, it is the value; NULL there is none."""
    for i, cell in enumerate(row):
        known = before[i]
        if cell == UNCHANGED and (isinstance(known, bytes)):
            row[i] = known


def _by_column(cells: list[list[_Cell]], sources: list[int]) -> tuple[list[Texts], list[Bools | None]]:
    """Texts of the kept columns, and where each was not sent (None: nowhere)."""
    columns = list(zip(*cells, strict=True))
    texts: list[Texts] = [columns[i] for i in sources]
    unchanged: list[Bools | None] = [None for _ in sources]
    if any(UNCHANGED in row for row in cells):
        for place, text in enumerate(texts):
            if UNCHANGED in text:
                unchanged[place] = np.asarray([cell == UNCHANGED for cell in text])
                texts[place] = [None if cell == UNCHANGED else cell for cell in text]
    return texts, unchanged
