"""One table's two sides, what its source has and what the lake holds, cut into parts and compared part by part.

The source's rows are handed over in any order and sorted into parts by the hash of their key, on disk when they do not
fit; the lake's too, bucket by bucket (cdc.lake.held). So memory is bounded by two parts, whatever the table's size.
What is equal is decided in cdc.compare; what becomes of a difference, by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdc.batch import RAW_TYPE
from cdc.changes import Images
from cdc.compare import Found, Rows, as_multisets, by_key
from cdc.errors import SchemaConflict
from cdc.keys import bucket_of, key_of, row_texts
from cdc.lake.held import HeldRows
from cdc.lake.spill import Spill
from cdc.ports import RowsRead
from cdc.table import TableSchema
from cdc.types import arrow_fields

PART_BYTES = 4 << 20
"""Bytes of a table, as its source or Parquet count them, that are compared at once."""
PART_ROWS = 1 << 15
PARTS_MAX = 1 << 12
SPILL_BYTES = 4 << 20
"""Rows of one side that are held before they go to disk, sorted."""


class Comparison:
    """The two sides of one table: what the source has is handed over, what the lake holds is read part by part."""

    def __init__(
        self,
        schema: TableSchema,
        shape: TableSchema,
        held: HeldRows,
        folder: Path,
        *,
        source_bytes: int,
        partial: bool,
        check: Callable[[], None],
    ) -> None:
        """`schema`: what the source shows; `shape`: what the lake holds of it (another only where it is frozen);
        `source_bytes`: how big the table is there. `partial`: not all rows of the source will come, so none is missed.
        `check` is called between pieces of work, and may raise."""
        self._schema = schema
        self._shape = shape
        self._held = held
        self._partial = partial
        self._check = check
        names = [c.name for c in schema.columns]
        self._key_index = [names.index(k) for k in schema.key]
        self._parts = _parts(held, 0 if partial else source_bytes)
        numbered = [pa.field(str(i), f.type) for i, f in enumerate(arrow_fields(schema))]
        rows = pa.schema([pa.field("key", pa.string()), *numbered, pa.field("raw", RAW_TYPE)])
        self._new = Spill(folder / "new", rows, memory_bytes=SPILL_BYTES)
        self._old = Spill(folder / "old", held.schema, memory_bytes=SPILL_BYTES)
        # Of a frozen table only the columns that the lake holds count.
        numbers = {c.attnum: i for i, c in enumerate(schema.columns)}
        self._pairs = [(i, numbers[c.attnum]) for i, c in enumerate(shape.columns) if c.attnum in numbers]
        self._old_names = [shape.columns[i].name for i, _ in self._pairs]
        self._new_names = [schema.columns[j].name for _, j in self._pairs]

    def take(self, piece: RowsRead) -> None:
        """Rows of the source."""
        if not piece.rows:
            return
        if self._schema.key:
            keys = key_of([piece.columns[i] for i in self._key_index], piece.raw, self._schema.key)
        else:
            keys = self._text(piece.columns, piece.raw, piece.rows, new=True)
        raw = piece.raw if piece.raw is not None else pa.nulls(piece.rows, RAW_TYPE)
        batch = pa.RecordBatch.from_arrays([keys, *piece.columns, raw], schema=self._new.schema)
        self._new.add(batch, bucket_of(keys, self._parts))

    def parts(self) -> Iterator[tuple[Images, Images, Found]]:
        """Part by part: both sides in the columns of the schema, and what is different between them."""
        wanted = set(self._new.parts()) if self._partial else set(range(self._parts))
        for bucket in range(self._held.buckets):
            mine = [part for part in range(bucket, self._parts, self._held.buckets) if part in wanted]
            if not mine:
                continue
            self._take_held(bucket)
            for part in mine:
                self._check()
                new, old = self._new.read(part).combine_chunks(), self._old.read(part).combine_chunks()
                if new.num_rows or old.num_rows:
                    found = self._found(old, new)
                    if found.rows:
                        yield self._as_now(old), _images(new), found
            pa.default_memory_pool().release_unused()

    def _take_held(self, bucket: int) -> None:
        """Sort the lake's rows of a bucket into its parts; what was left of the bucket before is not wanted."""
        self._old.close()
        for batch in self._held.slices(bucket):
            if not self._schema.key:
                columns = batch.columns
                keys = self._text(columns[1:-1], columns[-1], batch.num_rows, new=False)
                batch = pa.RecordBatch.from_arrays([keys, *columns[1:]], schema=self._old.schema)
            self._old.add(batch, bucket_of(batch.column(0), self._parts))

    def close(self) -> None:
        self._new.close()
        self._old.close()

    def _found(self, old: pa.Table, new: pa.Table) -> Found:
        keys_old, keys_new = _one(old.column(0)), _one(new.column(0))
        if not self._schema.key:
            return as_multisets(keys_old, keys_new)
        columns_old = [_one(old.column(1 + i)) for i, _ in self._pairs]
        columns_new = [
            _cast(_one(new.column(1 + j)), old.schema.field(1 + i).type, self._shape) for i, j in self._pairs
        ]
        last = new.num_columns - 1
        found = by_key(
            Rows(keys_old, columns_old, _one(old.column(old.num_columns - 1))),
            Rows(keys_new, columns_new, _one(new.column(last))),
            self._new_names,
            self._old_names,
        )
        if self._partial:
            found = replace(found, deleted=np.empty(0, np.int64))
        return found

    def _text(self, columns: list[pa.Array], raw: pa.Array | None, rows: int, *, new: bool) -> pa.Array:
        """A row's whole content, in the columns that both sides have."""
        kinds = arrow_fields(self._shape)
        picked = [_cast(columns[j], kinds[i].type, self._shape) if new else columns[i] for i, j in self._pairs]
        names = self._new_names if new else self._old_names
        return row_texts(picked, raw, names, rows=rows)

    def _as_now(self, old: pa.Table) -> Images:
        """Rows of the lake in the columns of the schema; null where the lake has none."""
        if self._shape is self._schema:
            return _images(old)
        places = {j: i for i, j in self._pairs}
        columns = [
            _cast(_one(old.column(1 + places[j])), f.type, self._shape)
            if j in places
            else pa.nulls(old.num_rows, f.type)
            for j, f in enumerate(arrow_fields(self._schema))
        ]
        return Images(columns, _one(old.column(old.num_columns - 1)), old.num_rows)


def _parts(held: HeldRows, source_bytes: int) -> int:
    """A power of two of parts, each small enough to be held in memory on both sides."""
    size, rows, n = max(source_bytes, held.bytes), held.rows, held.buckets
    while n < PARTS_MAX and (size > n * PART_BYTES or rows > n * PART_ROWS):
        n *= 2
    return n


def _images(table: pa.Table) -> Images:
    columns = [_one(table.column(i)) for i in range(1, table.num_columns - 1)]
    return Images(columns, _one(table.column(table.num_columns - 1)), table.num_rows)


def _cast(array: pa.Array, kind: pa.DataType, shape: TableSchema) -> pa.Array:
    if array.type == kind:
        return array
    try:
        return pc.cast(array, kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise SchemaConflict(
            f"table {shape.table} is frozen (on_schema_change), and the lake cannot hold what its columns show now",
            hint=f"`cdc resync {shape.table}` accepts the new shape",
        ) from None


def _one(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return column.combine_chunks() if column.num_chunks else pa.array([], column.type)
