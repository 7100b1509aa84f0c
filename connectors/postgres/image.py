"""From walked tuples to batches: texts are cast, system columns added. Both row plans end here.

A row plan (columns.py, rows.py) yields an Image: Postgres' text of every cell, still untyped. Everything that decides
what a batch says is in this module, so the two plans can only differ in how they walk the bytes.

What costs the same for one row as for a thousand is done once for all batches of a part: system columns are made
once and sliced, and the cells of small batches that have one type are cast together, whatever their tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cdc.batch import TIMESTAMP_TYPE, Batch, batch_schema, system_type
from cdc.errors import SchemaConflict
from cdc.table import Column, TableSchema
from cdc.types import build_raw, cast
from connectors.postgres.buffer import Bools, Bytes, Ints
from connectors.postgres.messages import DELETE, INSERT, TRUNCATE, UPDATE, Relation

UNKNOWN_TIME = np.iinfo(np.int64).min
"""Commit time of a transaction when nobody knows it."""

CAST_TOGETHER_ROWS = 500
"""Columns of fewer rows are cast together with others of their type; the copy costs more than it saves for longer."""
CAST_TOGETHER_BYTES = 64 << 20
"""Of a longer part (it holds one huge message) nothing is: values of a gigabyte would not fit in one array twice."""

_Cells = tuple[pa.Array, Bools | None]
"""Typed values, and the mask of those that the type cannot hold."""

Texts: TypeAlias = pa.Array | Sequence[Any]
"""The texts of one column: an Arrow string or binary array, or bytes and None."""

_OPS = np.zeros(256, np.uint8)
_OPS[[INSERT, UPDATE, DELETE, TRUNCATE]] = np.frombuffer(b"cudt", np.uint8)


@dataclass(slots=True)
class Image:
    """The cells of some rows of one relation, as text; columns in the order of the table's schema.

    `texts` holds the row images (for deletes: the old tuple), null where NULL or not sent; `unchanged` masks the cells
    whose value the message did not carry. `old` numbers the updates that carried an old tuple, `old_texts` are theirs.
    """

    texts: list[Texts]
    unchanged: list[Bools | None]
    old: Ints | None = None
    old_texts: list[Texts] = field(default_factory=list)


@dataclass(slots=True)
class Rows:
    """Row messages of one relation in stream order: kind byte, its position, end of its frame."""

    kind: Bytes
    start: Ints
    end: Ints


class System:
    """System columns of all rows of a part, in the order of its batches: each takes a slice."""

    def __init__(
        self, *, epoch: int, kind: Bytes, lsn: Ints, seq: Ints, xid: Ints, committed: Ints, origin: pa.Array | None
    ) -> None:
        n = len(kind)
        offsets = pa.py_buffer(np.arange(n + 1, dtype=np.int32))
        ops = pa.StringArray.from_buffers(n, offsets, pa.py_buffer(_OPS.take(kind)))
        numbers = (np.full(n, epoch, np.int64), lsn, seq, xid)
        self._required = [ops, *(_numbers(pa.int64(), values) for values in numbers)]
        self._optional = {"_committed_at": _numbers(TIMESTAMP_TYPE, committed, committed != UNKNOWN_TIME)}
        if origin is not None:
            self._optional = {"_origin": origin, **self._optional}

    def required(self, begin: int, count: int) -> list[pa.Array]:
        return [column.slice(begin, count) for column in self._required]

    def optional(self, begin: int, count: int) -> dict[str, pa.Array]:
        """The optional columns in which one of these rows has a value."""
        slices = {name: column.slice(begin, count) for name, column in self._optional.items()}
        return {name: column for name, column in slices.items() if column.null_count < count}


class Layout:
    """How the tuples of one Relation message become the columns of one schema version.

    `width` is the number of columns on the wire, `sources` names for each column of the schema its place among them.
    Raises SchemaConflict if the schema has a column that the relation does not send: it would read as NULL.
    """

    def __init__(self, relation: Relation, schema: TableSchema) -> None:
        self.schema = schema
        self.width = len(relation.columns)
        places = {column.name: i for i, column in enumerate(relation.columns)}
        absent = [column.name for column in schema.columns if column.name not in places]
        if absent:
            raise SchemaConflict(
                f"the stream of {schema.table} does not carry column {absent[0]!r} of its schema",
                hint="the table was altered since it was read; start the source again",
            )
        self.sources = [places[column.name] for column in schema.columns]
        self._names = pa.array([column.name for column in schema.columns], pa.string())
        self._before_type = system_type("_before", schema)
        self._schemas: dict[tuple[str, ...], pa.Schema] = {}

    def blank(self, rows: int) -> Image:
        """The image of rows that say nothing of any column."""
        nulls = pa.nulls(rows, pa.string())
        return Image([nulls for _ in self.sources], [None for _ in self.sources])

    def batch(
        self, image: Image, system: System, begin: int, count: int, new: Sequence[_Cells], old: Sequence[_Cells]
    ) -> Batch:
        """The batch of these rows, whose cells have been cast; optional system columns only where some row has one."""
        optional = system.optional(begin, count)
        if image.old is not None:
            optional["_before"] = self._before(image.old, [values for values, _ in old], count)
        unchanged = self._unchanged(image.unchanged, count)
        if unchanged is not None:
            optional["_unchanged"] = unchanged
        raw = self._raw(image, count, [mask for _, mask in new], [mask for _, mask in old])
        if raw is not None:
            optional["_raw"] = raw
        names = tuple(optional)
        schema = self._schemas.get(names)
        if schema is None:
            schema = self._schemas[names] = batch_schema(self.schema, names)
        arrays = [*system.required(begin, count), *optional.values(), *(values for values, _ in new)]
        return Batch(self.schema, pa.RecordBatch.from_arrays(arrays, schema=schema))

    def _raw(
        self, image: Image, n: int, masks: Sequence[Bools | None], old_masks: Sequence[Bools | None]
    ) -> pa.Array | None:
        found: list[tuple[str, pa.Array, Bools | None]] = [
            (column.name, _array(text), mask)
            for column, text, mask in zip(self.schema.columns, image.texts, masks, strict=True)
            if mask is not None
        ]
        if image.old is not None and any(mask is not None for mask in old_masks):
            spread = _spread(image.old, n)
            found += [
                ("before." + column.name, _array(text).take(spread), _scatter(mask, image.old, n))
                for column, text, mask in zip(self.schema.columns, image.old_texts, old_masks, strict=True)
                if mask is not None
            ]
        if not found:
            return None
        return build_raw([name for name, _, _ in found], [text for _, text, _ in found], [mask for _, _, mask in found])

    def _before(self, rows: Ints, columns: list[pa.Array], n: int) -> pa.Array:
        bitmap = None
        if len(rows) < n:
            spread = _spread(rows, n)
            columns = [column.take(spread) for column in columns]
            present = np.zeros(n, np.bool_)
            present[rows] = True
            bitmap = _bitmap(present)
        return pa.StructArray.from_buffers(self._before_type, n, [bitmap], children=columns)

    def _unchanged(self, masks: list[Bools | None], n: int) -> pa.Array | None:
        found = [(i, mask) for i, mask in enumerate(masks) if mask is not None and mask.any()]
        if not found:
            return None
        places = np.asarray([i for i, _ in found], np.int64)
        cells = np.stack([mask for _, mask in found], axis=1)
        counts = cells.sum(axis=1)
        offsets = np.zeros(n + 1, np.int32)
        np.cumsum(counts, out=offsets[1:])
        names = self._names.take(pa.array(places[np.nonzero(cells)[1]]))
        return pa.ListArray.from_buffers(
            pa.list_(pa.string()), n, [_bitmap(counts > 0), pa.py_buffer(offsets)], children=[names]
        )


def make_batches(walked: Sequence[tuple[Layout, Image, int]], system: System, part_bytes: int) -> list[Batch]:
    """The batches of these images in order; each with its layout and number of rows, which `system` has one by one.

    `part_bytes` is the size of the frames that all of them come from."""
    wanted: list[tuple[Column, Texts]] = []
    for layout, image, _ in walked:
        wanted += zip(layout.schema.columns, image.texts, strict=True)
        if image.old is not None:
            wanted += zip(layout.schema.columns, image.old_texts, strict=True)
    cells = iter(_cast_together(wanted, CAST_TOGETHER_ROWS if part_bytes < CAST_TOGETHER_BYTES else 0))
    batches = []
    begin = 0
    for layout, image, count in walked:
        new, old = list(islice(cells, len(image.texts))), list(islice(cells, len(image.old_texts)))
        batches.append(layout.batch(image, system, begin, count, new, old))
        begin += count
    return batches


def _cast_together(wanted: Sequence[tuple[Column, Texts]], rows_max: int) -> list[_Cells]:
    """Cast each text to its column's type; those of the same type and fewer rows at once."""
    cells: list[_Cells | None] = [None] * len(wanted)
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, (column, text) in enumerate(wanted):
        if len(text) < rows_max:
            # Everything that a cast looks at, but not what the column is called and where it stands.
            sort = (column.type_oid, column.typmod, column.element_oid, column.type_name, column.declared, _form(text))
            alike.setdefault(sort, []).append(i)
        else:
            cells[i] = cast(column, _array(text))
    for group in alike.values():
        column = wanted[group[0]][0]
        texts = [wanted[i][1] for i in group]
        for i, part in zip(group, _cast_parts(column, texts), strict=True):
            cells[i] = part
    return [cell for cell in cells if cell is not None]


def _cast_parts(column: Column, texts: Sequence[Texts]) -> Iterator[_Cells]:
    if len(texts) == 1:
        yield cast(column, _array(texts[0]))
        return
    together = pa.concat_arrays(texts) if isinstance(texts[0], pa.Array) else _array(list(chain.from_iterable(texts)))
    values, mask = cast(column, together)
    begin = 0
    for text in texts:
        end = begin + len(text)
        masked = mask is not None and bool(mask[begin:end].any())
        yield values.slice(begin, len(text)), mask[begin:end] if mask is not None and masked else None
        begin = end


def _form(texts: Texts) -> object:
    return texts.type.id if isinstance(texts, pa.Array) else None


def _array(texts: Texts) -> pa.Array:
    """As a string array; as a binary one if some text is not UTF-8."""
    if isinstance(texts, pa.Array):
        return texts
    try:
        return pa.array(texts, pa.string())
    except pa.ArrowInvalid:
        return pa.array(texts, pa.binary())


def _numbers(kind: pa.DataType, values: Ints, valid: Bools | None = None) -> pa.Array:
    """64-bit values as an Arrow array without a copy."""
    bitmap = None if valid is None or valid.all() else _bitmap(valid)
    return pa.Array.from_buffers(kind, len(values), [bitmap, pa.py_buffer(np.ascontiguousarray(values))])


def _bitmap(valid: Bools) -> pa.Buffer:
    return pa.py_buffer(np.packbits(valid, bitorder="little"))


def _spread(rows: Ints, n: int) -> pa.Array:
    """Indices that put value i in row `rows[i]` of n, and null elsewhere."""
    index = np.zeros(n, np.int64)
    absent: npt.NDArray[np.bool_] = np.ones(n, np.bool_)
    index[rows] = np.arange(len(rows))
    absent[rows] = False
    return pa.array(index, mask=absent)


def _scatter(mask: Bools | None, rows: Ints, n: int) -> Bools | None:
    if mask is None:
        return None
    spread = np.zeros(n, np.bool_)
    spread[rows] = mask
    return spread
