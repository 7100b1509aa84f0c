"""Parquet objects of a changelog: how rows are encoded, in bounded memory.

Rows are gathered into row groups and written as they come; an object of more than one row group grows in an unnamed
temporary file, which a crash leaves nothing of. It does not know Delta, tokens or where objects go.

The encoding was chosen by measurement (CPU s per million rows and bytes per row; pgbench updates | ten mixed columns):
pyarrow's defaults 0.40, 29.1 | 0.73, 61.0; the same with zstd 1 0.40, 17.9 | 0.96, 38.6; no dictionaries 0.24, 11.0 |
0.49, 26.9; dictionaries only for columns that repeat by nature and delta coding of positions 0.16, 7.0 | 0.41, 25.5;
statistics only of what readers prune by 0.15, 6.9 | 0.34, 25.5. zstd 3 costs a fifth more and saves a hundredth.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from cdc.batch import SYSTEM, Batch, system_type
from cdc.errors import StoreUnavailable
from cdc.lake.layout import IDENTITY_METADATA, KEY_METADATA, system_name
from cdc.lake.widening import SOURCE_NAME
from cdc.table import TableSchema
from cdc.types import arrow_fields

GROUP_ROWS: Final = 1 << 17
GROUP_BYTES: Final = 16 << 20
"""A row group is written at either; so this is what an open object holds in memory."""
OBJECT_BYTES: Final = 128 << 20
_CHUNKS_MAX: Final = 64

Upload = Callable[[Any], None]


@lru_cache(maxsize=1024)
def file_schema(schema: TableSchema, named: TableSchema, prefix: str) -> pa.Schema:
    """Columns of the changelog objects of one schema version: all system columns, then the version's own. `named`: the
    version with the names that the lake has for its columns. The file's metadata say what its rows are known by:
    attnums of the key, and the replica identity."""
    fields = lake_fields(schema, named)
    # Parquet cannot hold a struct without fields.
    names = [n for n in SYSTEM if fields or n != "_before"]
    columns = [pa.field(system_name(n, prefix), system_type(n, named)) for n in names] + fields
    key = ",".join(str(schema.column(name).attnum) for name in schema.key)
    return pa.schema(columns, metadata={KEY_METADATA: key, IDENTITY_METADATA: schema.identity})


def lake_fields(schema: TableSchema, named: TableSchema) -> list[pa.Field]:
    """The row image's fields; one that has another name in the lake says which it has at the source."""
    return [
        f if f.name == c.name else f.with_metadata({**(f.metadata or {}), SOURCE_NAME: c.name.encode()})
        for f, c in zip(arrow_fields(named), schema.columns, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What an object covers: rows and positions of its rows, and its size."""

    rows: int
    first_lsn: int
    last_lsn: int
    size: int


class OpenObject:
    """One Parquet object while it grows. `add` and `finish` raise StoreUnavailable if the temporary disk fails."""

    def __init__(self, schema: TableSchema, named: TableSchema, prefix: str, temp_dir: Path) -> None:
        self._schema = schema
        self._file_schema = file_schema(schema, named, prefix)
        self._options = writer_options(prefix, named.key, system_type("_before", named))
        self._temp_dir = temp_dir
        self._batches: list[Batch] = []
        self._pending_rows = 0
        self._pending_bytes = 0
        self._file: IO[bytes] | None = None
        self._writer: pq.ParquetWriter | None = None
        self.rows = 0
        self.first_lsn = 0
        self.last_lsn = 0

    @property
    def written_bytes(self) -> int:
        """Size so far without what is still in memory."""
        return 0 if self._file is None else self._file.tell()

    @property
    def held_bytes(self) -> int:
        """What is in memory, as Arrow."""
        return self._pending_bytes

    def add(self, batch: Batch) -> None:
        """Append rows of the object's schema version; they are encoded when a row group is full."""
        lsn = batch.system("_lsn")
        if not self.rows:
            self.first_lsn = lsn[0].as_py()
        self.last_lsn = lsn[-1].as_py()
        self.rows += batch.data.num_rows
        self._batches.append(batch)
        self._pending_rows += batch.data.num_rows
        self._pending_bytes += batch.data.nbytes
        if self._pending_rows >= GROUP_ROWS or self._pending_bytes >= GROUP_BYTES:
            with scratch_disk(self._temp_dir):
                if self._file is None:
                    self._file = tempfile.TemporaryFile(dir=self._temp_dir)  # noqa: SIM115  (closed by `abandon`)
                self._write(self._file)

    def finish(self, upload: Upload) -> Extent:
        """Hand the whole object to `upload` (a buffer, valid during the call), and close it."""
        with scratch_disk(self._temp_dir):
            if self._file is None:
                sink = pa.BufferOutputStream()
                self._write(sink)
                self._end()
                whole = sink.getvalue()
            else:
                if self._batches:
                    self._write(self._file)
                self._end()
                self._file.flush()
        if self._file is None:
            upload(whole)
            return self._extent(whole.size)
        try:
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                upload(mapped)
                return self._extent(len(mapped))
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Forget everything; idempotent."""
        self._batches.clear()
        self._writer = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _extent(self, size: int) -> Extent:
        return Extent(rows=self.rows, first_lsn=self.first_lsn, last_lsn=self.last_lsn, size=size)

    def _write(self, sink: Any) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(sink, self._file_schema, **self._options)
        columns = [self._column(i, field.type) for i, field in enumerate(self._file_schema)]
        table = pa.Table.from_arrays(columns, schema=self._file_schema)
        if len(self._batches) > _CHUNKS_MAX:
            table = table.combine_chunks()
        self._batches.clear()
        self._pending_rows = self._pending_bytes = 0
        self._writer.write_table(table, row_group_size=GROUP_ROWS)

    def _column(self, index: int, kind: pa.DataType) -> pa.ChunkedArray:
        """One column of the pending batches: system columns by name, the row image by its place."""
        system = [n for n in SYSTEM if self._schema.columns or n != "_before"]
        if index < len(system):
            name = system[index]
            chunks = [
                _as(b.system(name), kind) if b.has(name) else pa.nulls(b.data.num_rows, kind) for b in self._batches
            ]
        else:
            at = index - len(system)
            chunks = [b.data.column(b.row_start + at) for b in self._batches]
        return pa.chunked_array(chunks, kind)

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _as(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if array.type == kind:
        return array
    if pa.types.is_struct(kind):
        # The same fields under the lake's names.
        return pa.StructArray.from_arrays(array.flatten(), fields=list(kind), mask=array.is_null())
    return array.cast(kind)


def leaves(path: str, kind: pa.DataType) -> list[str]:
    """Parquet's names of the columns that hold a field `path` of type `kind`."""
    if pa.types.is_struct(kind):
        return [leaf for f in kind for leaf in leaves(f"{path}.{f.name}", f.type)]
    if pa.types.is_list(kind):
        return leaves(f"{path}.list.element", kind.value_type)
    if pa.types.is_map(kind):
        return [f"{path}.key_value.key", *leaves(f"{path}.key_value.value", kind.item_type)]
    return [path]


def writer_options(prefix: str, key: Sequence[str], before: pa.DataType | None) -> dict[str, Any]:
    """Options of the Parquet writer for an object with this key and this type of `_before` (None: it has none)."""

    def named(*names: str) -> list[str]:
        return [system_name(n, prefix) for n in names]

    unchanged, old = named("_unchanged", "_before")
    # Null counts of the old images let a merge pass over row groups in which no key changed.
    olds = [] if before is None else leaves(old, before)
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": [*named("_op", "_epoch", "_origin", "_run"), f"{unchanged}.list.element"],
        "column_encoding": dict.fromkeys(named("_lsn", "_seq", "_xid", "_committed_at"), "DELTA_BINARY_PACKED"),
        "write_statistics": [*named("_op", "_epoch", "_lsn", "_seq", "_xid", "_committed_at"), *key, *olds],
    }


@contextmanager
def scratch_disk(temp_dir: Path) -> Iterator[None]:
    """StoreUnavailable for what fails inside at the disk of `temp_dir`."""
    try:
        yield
    except OSError as e:
        raise StoreUnavailable(
            f"the temporary directory {temp_dir} cannot be written: {e.strerror}", hint="make room on its disk"
        ) from e
