"""From walked tuples to a batch: texts are cast, system columns added. Both row plans end here.

A row plan (columns.py, rows.py) yields an Image: Postgres' text of every cell, still untyped. Everything that decides
what a batch says is in this module, so the two plans can only differ in how they walk the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cdc.batch import TIMESTAMP_TYPE, Batch, batch_schema, system_type
from cdc.errors import SchemaConflict
from cdc.table import TableSchema
from cdc.types import build_raw, cast
from connectors.postgres.buffer import Bools, Bytes, Ints
from connectors.postgres.messages import DELETE, INSERT, TRUNCATE, UPDATE, Relation

UNKNOWN_TIME = np.iinfo(np.int64).min
"""A transaction's commit time in Tagged, when nobody knows it."""

_OPS = np.zeros(256, np.uint8)
_OPS[[INSERT, UPDATE, DELETE, TRUNCATE]] = np.frombuffer(b"cudt", np.uint8)


@dataclass(slots=True)
class Image:
    """The cells of some rows of one relation, as text; columns in the order of the table's schema.

    `texts` holds the row images (for deletes: the old tuple), null where NULL or not sent; `unchanged` masks the cells
    whose value the message did not carry. `old` numbers the updates that carried an old tuple, `old_texts` are theirs.
    """

    texts: list[pa.Array]
    unchanged: list[Bools | None]
    old: Ints | None = None
    old_texts: list[pa.Array] = field(default_factory=list)


@dataclass(slots=True)
class Rows:
    """Row messages of one relation in stream order: kind byte, its position, end of its frame."""

    kind: Bytes
    start: Ints
    end: Ints


@dataclass(slots=True)
class Tagged:
    """What the transaction says of each row: system columns as arrays of the rows' length."""

    epoch: int
    lsn: Ints
    seq: Ints
    xid: Ints
    committed: Ints
    origin: pa.Array | None


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

    def batch(self, kind: Bytes, image: Image, tagged: Tagged) -> Batch:
        """The batch of these rows; optional system columns only where some row has one."""
        columns, masks = self._cast(image.texts)
        raw_texts, raw_masks = list(image.texts), masks
        optional: dict[str, pa.Array] = {}
        if tagged.origin is not None and tagged.origin.null_count < len(kind):
            optional["_origin"] = tagged.origin
        known = tagged.committed != UNKNOWN_TIME
        if known.any():
            optional["_committed_at"] = _numbers(TIMESTAMP_TYPE, tagged.committed, known)
        if image.old is not None:
            before, old_masks = self._before(image, len(kind))
            optional["_before"] = before
            if any(mask is not None for mask in old_masks):
                spread = _spread(image.old, len(kind))
                raw_texts += [text.take(spread) for text in image.old_texts]
                raw_masks = masks + [_scatter(mask, image.old, len(kind)) for mask in old_masks]
        unchanged = self._unchanged(image.unchanged, len(kind))
        if unchanged is not None:
            optional["_unchanged"] = unchanged
        if any(mask is not None for mask in raw_masks):
            names = [column.name for column in self.schema.columns]
            names += ["before." + name for name in names]
            raw = build_raw(names[: len(raw_texts)], raw_texts, raw_masks)
            if raw is not None:
                optional["_raw"] = raw
        return self._assemble(kind, tagged, optional, columns)

    def truncate(self, tagged: Tagged) -> Batch:
        """The one-row batch of a TRUNCATE: nothing but system columns."""
        kind = np.full(len(tagged.seq), TRUNCATE, np.uint8)
        nulls = [pa.nulls(len(kind), pa.string()) for _ in self.schema.columns]
        return self.batch(kind, Image(nulls, [None] * len(nulls)), tagged)

    def _assemble(self, kind: Bytes, tagged: Tagged, optional: dict[str, pa.Array], columns: list[pa.Array]) -> Batch:
        n = len(kind)
        ops = pa.StringArray.from_buffers(
            n, pa.py_buffer(np.arange(n + 1, dtype=np.int32)), pa.py_buffer(_OPS.take(kind))
        )
        numbers = (np.full(n, tagged.epoch, np.int64), tagged.lsn, tagged.seq, tagged.xid)
        system = [ops, *(_numbers(pa.int64(), values) for values in numbers)]
        names = tuple(optional)
        schema = self._schemas.get(names)
        if schema is None:
            schema = self._schemas[names] = batch_schema(self.schema, names)
        return Batch(self.schema, pa.RecordBatch.from_arrays([*system, *optional.values(), *columns], schema=schema))

    def _cast(self, texts: list[pa.Array]) -> tuple[list[pa.Array], list[Bools | None]]:
        cells = [cast(column, text) for column, text in zip(self.schema.columns, texts, strict=True)]
        return [values for values, _ in cells], [mask for _, mask in cells]

    def _before(self, image: Image, n: int) -> tuple[pa.Array, list[Bools | None]]:
        assert image.old is not None
        columns, masks = self._cast(image.old_texts)
        bitmap = None
        if len(image.old) < n:
            spread = _spread(image.old, n)
            columns = [column.take(spread) for column in columns]
            present = np.zeros(n, np.bool_)
            present[image.old] = True
            bitmap = _bitmap(present)
        return pa.StructArray.from_buffers(self._before_type, n, [bitmap], children=columns), masks

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
