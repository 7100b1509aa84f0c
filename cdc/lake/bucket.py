"""Files of `current`: one hash bucket of keys per file, rewritten whole when one of its rows changes.

Reading finds the rows of given keys by the key and order columns alone; writing streams the old file through, leaves
out what goes, and puts a row that needs values of the old one beside it. So memory is bounded by the changes of one
bucket and a slice of the old file, never by the table.

A file's name says what it is: bucket, number of buckets, and fingerprints of the key and of the layout it was written
with. Does not decide what survives (cdc.lake.reduce), and commits nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdc.batch import RAW_TYPE, TIMESTAMP_TYPE
from cdc.errors import CdcError, SchemaConflict, StoreUnavailable
from cdc.keys import bucket_of, key_of
from cdc.lake.assemble import Missing
from cdc.lake.events import FileShape, Layout, columns_of, file_keys, raw_in_layout
from cdc.lake.layout import CURRENT_SYSTEM, system_name, system_prefix
from cdc.lake.objects import leaves
from cdc.lake.reduce import ABSENT, KNOWN, UNCHANGED, Order, Orders
from cdc.ports import ObjectStore

SLICE_ROWS = 1 << 15
GROUP_ROWS = 1 << 16
GROUP_BYTES = 16 << 20
SAMPLE_ROWS = 4096
OLDEST = Order(0, 0, -1)

_SYSTEM_TYPES = {
    "_epoch": pa.int64(),
    "_lsn": pa.int64(),
    "_seq": pa.int64(),
    "_committed_at": TIMESTAMP_TYPE,
    "_origin": pa.string(),
    "_raw": RAW_TYPE,
}
_NAME = re.compile(r"(\d{5})-of-(\d{5})-([0-9a-f]{8})-([0-9a-f]{8})-[0-9a-f]+\.parquet")


class BucketName(NamedTuple):
    """What the name of a bucket's file says."""

    bucket: int
    of: int
    key: str
    layout: str

    def path(self) -> str:
        """A new file's path; no two are equal."""
        return f"{self.bucket:05d}-of-{self.of:05d}-{self.key}-{self.layout}-{uuid.uuid4().hex[:12]}.parquet"


def parse_name(path: str) -> BucketName | None:
    """The name behind a path; None if the file is not a bucket."""
    found = _NAME.fullmatch(path)
    return None if found is None else BucketName(int(found[1]), int(found[2]), found[3], found[4])


def current_schema(layout: Layout) -> pa.Schema:
    """Arrow schema of `current`: the source columns, then the system columns."""
    prefix = system_prefix(layout.names)
    system = [pa.field(system_name(name, prefix), _SYSTEM_TYPES[name]) for name in CURRENT_SYSTEM]
    return pa.schema([*layout.fields, *system])


def key_fingerprint(layout: Layout) -> str:
    """Changes when rows live in other buckets: another key, or another text of the same key."""
    texts = [str(t) for i in layout.key_index if _printed_by_type(t := layout.fields[i].type)]
    return _digest([*(layout.attnums[i] for i in layout.key_index), *texts])


def _printed_by_type(kind: pa.DataType) -> bool:
    return bool(pa.types.is_decimal(kind) or pa.types.is_floating(kind) or pa.types.is_nested(kind))


def layout_fingerprint(layout: Layout) -> str:
    """Changes when a file of before may have to be rewritten."""
    columns = [(c.attnum, c.name, c.missing) for c in layout.schema.columns]
    return _digest([columns, [str(f.type) for f in layout.fields], system_prefix(layout.names)])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


class ObjectGone(CdcError):
    """An object that the table shows is not in the store."""


class Fetcher:
    """Opens data files: in place if the store is a local directory, else by way of a scratch copy."""

    def __init__(self, store: ObjectStore, prefix: str, scratch: Path) -> None:
        self._store = store
        self._prefix = prefix
        self._scratch = scratch

    def open(self, path: str) -> pq.ParquetFile:
        """A Parquet file by its path in the table. Blocking; StoreUnavailable if it cannot be read."""
        key = f"{self._prefix}/{path}"
        location, options = self._store.location(key)
        try:
            if not options and location.startswith("/"):
                return pq.ParquetFile(location, buffer_size=1 << 18)
            copy = self._scratch / hashlib.sha256(key.encode()).hexdigest()
            if not copy.exists():
                partial = copy.with_suffix(".part")
                if self._store.get(key, into=partial) is None:
                    raise FileNotFoundError(path)
                partial.rename(copy)
            return pq.ParquetFile(copy, buffer_size=1 << 18)
        except FileNotFoundError as e:
            raise ObjectGone(f"{key} is not there any more", hint="bring it back: somebody has deleted it") from e
        except (OSError, pa.ArrowException) as e:
            raise StoreUnavailable(f"{key} cannot be read: {type(e).__name__}") from e


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of a file that live in bucket `bucket` of `of`; a file made before the buckets were doubled has more."""

    bucket: int
    of: int


@dataclass(frozen=True, slots=True)
class Found:
    """Rows of existing files: `file` numbers the files, `row` the rows in each; in that order. `doomed`: whether the
    files have rows older than the final threshold."""

    keys: pa.Array
    orders: Orders
    file: np.ndarray
    row: np.ndarray
    doomed: bool


class OldFile:
    """One file of `current` with its shape under the newest layout. `newest`: the highest order that a row merged so
    far can have; one that says more was not written by us."""

    def __init__(self, parquet: pq.ParquetFile, layout: Layout, part: Part | None, newest: Order | None = None) -> None:
        self.parquet = parquet
        self._newest = newest
        self.shape = FileShape(parquet.schema_arrow, layout)
        self.part = part
        self.states = np.zeros(len(layout.names), np.uint8)
        """What the slice that was read last knows of each column: KNOWN, or UNCHANGED where its values do not fit."""

    def orders(self, data: pa.RecordBatch) -> Orders:
        """Orders of rows of the file. One that cannot be true counts as the oldest of all: whatever a snapshot or the
        stream says of its key then holds, and a whole run that does not meet it removes it."""
        found = orders_of(data, self.shape)
        if self._newest is None:
            return found
        n = len(found)
        wrong = Orders(*(np.full(n, part) for part in self._newest)).older_than(found)
        if not wrong.any():
            return found
        return Orders(
            *(np.where(wrong, old, part) for old, part in zip(OLDEST, (found.epoch, found.lsn, found.seq), strict=True))
        )

    def require(self, rows: bool) -> None:
        """SchemaConflict if `rows` of the slice that was read last are needed and some of their values do not fit."""
        if rows and (self.states == UNCHANGED).any():
            layout = self.shape.layout
            name = layout.names[int(np.flatnonzero(self.states == UNCHANGED)[0])]
            raise SchemaConflict(
                f"table {layout.schema.table}: existing values of column {name} do not fit its new type",
                hint=f"cdc resync {layout.schema.table}",
            )

    def stale(self, missing: Missing) -> bool:
        """Whether readers would see wrong values in it under the newest layout."""
        layout = self.shape.layout
        present = {field.name for field in self.shape.schema}
        for i, name in enumerate(self.shape.source):
            if name is None:
                # Absent reads as NULL; a dropped column of the same name would show through.
                if missing.given(i) or layout.names[i] in present:
                    return True
            elif name != layout.names[i] or self.shape.schema.field(name).type != layout.fields[i].type:
                return True
        return self.shape.system.get("_lsn") != system_name("_lsn", system_prefix(layout.names))

    def has_strays(self) -> bool:
        """Whether any row is not of the part."""
        return any(not mine.all() for _, _, _, mine in self.located())

    def located(self) -> Iterator[tuple[int, pa.Array, Orders, np.ndarray]]:
        """(first row, keys, orders, mask of the part's rows) of each slice."""
        shape = self.shape
        if shape.key_names is None:
            raise SchemaConflict(
                f"table {shape.layout.schema.table}: its key has a column that existing rows lack",
                hint=f"cdc resync {shape.layout.schema.table}",
            )
        names = [*shape.key_names, *(shape.system[n] for n in ("_epoch", "_lsn", "_seq", "_raw"))]
        first = 0
        for data in self.parquet.iter_batches(GROUP_ROWS, columns=names, use_threads=False):
            keys = file_keys(data, shape)
            yield first, keys, self.orders(data), self._mine(keys)
            first += data.num_rows

    def slices(
        self, missing: Missing, *, lenient: bool = False
    ) -> Iterator[tuple[int, pa.RecordBatch, list[pa.Array], pa.Array]]:
        """(first row, system columns, columns of the layout, `_raw`) of each slice of the file. SchemaConflict for
        values that do not fit their column's type; if `lenient` they are null there: see `states` and `require`."""
        shape = self.shape
        names = [name for name in shape.source if name is not None] + list(shape.system.values())
        first = 0
        rows = slice_rows(self.parquet.metadata)
        for data in self.parquet.iter_batches(rows, columns=names, use_threads=False):
            columns, states = columns_of(data, shape)
            self.states = np.where(states == UNCHANGED, UNCHANGED, KNOWN).astype(np.uint8)
            self.require(not lenient)
            raw = raw_in_layout(data.column(shape.system["_raw"]), shape.renames)
            columns, raw = missing.fill(columns, raw, np.flatnonzero(states == ABSENT).tolist())
            yield first, data, columns, raw
            first += data.num_rows

    def mine(self, columns: list[pa.Array], raw: pa.Array) -> np.ndarray:
        """Mask of the rows of the part, by columns of the layout."""
        layout = self.shape.layout
        names = [layout.names[i] for i in layout.key_index]
        return self._mine(key_of([columns[i] for i in layout.key_index], raw, names))

    def _mine(self, keys: pa.Array) -> np.ndarray:
        if self.part is None:
            return np.ones(len(keys), np.bool_)
        return np.asarray(bucket_of(keys, self.part.of) == self.part.bucket)


def orders_of(data: pa.RecordBatch, shape: FileShape) -> Orders:
    """Orders of rows of a file."""
    arrays = [data.column(shape.system[name]) for name in ("_epoch", "_lsn", "_seq")]
    # Where another writer left none it counts as none.
    arrays = [pc.fill_null(a, -1) if a.null_count else a for a in arrays]
    return Orders(*(a.to_numpy(zero_copy_only=False) for a in arrays))


def slice_rows(metadata: pq.FileMetaData) -> int:
    """Rows to read at once, so that a slice stays within a few megabytes."""
    total = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    row = max(1, total // max(1, metadata.num_rows))
    return int(min(SLICE_ROWS, max(64, (8 << 20) // row)))


def find(files: Sequence[OldFile], wanted: pa.Array, threshold: Order | None) -> Found:
    """The rows with one of the `wanted` keys, and whether any row of the part is older than `threshold`."""
    keys: list[pa.Array] = [pa.array([], pa.string())]
    orders = [Orders(*(np.empty(0, np.int64) for _ in range(3)))]
    file: list[np.ndarray] = [np.empty(0, np.int64)]
    row: list[np.ndarray] = [np.empty(0, np.int64)]
    doomed = False
    for number, old in enumerate(files):
        for first, texts, places, mine in old.located():
            hit = pc.is_in(texts, value_set=wanted).to_numpy(zero_copy_only=False) & mine
            at = np.flatnonzero(hit)
            keys.append(texts.take(pa.array(at)))
            orders.append(places.take(at))
            file.append(np.full(len(at), number))
            row.append(at + first)
            if threshold is not None and not doomed:
                doomed = bool((places.older_than(threshold) & mine).any())
    return Found(pa.concat_arrays(keys), Orders.concat(orders), np.concatenate(file), np.concatenate(row), doomed)


def _repetitive(rows: pa.RecordBatch) -> list[str]:
    """Parquet's names of the columns that are worth a dictionary, judged by some rows: one of values that hardly repeat
    costs a third of all encoding and decoding, and makes the file bigger by a quarter."""
    some = rows.slice(0, SAMPLE_ROWS)
    return [
        leaf
        for field, column in zip(rows.schema, some.columns, strict=True)
        if pa.types.is_nested(field.type) or pc.count_distinct(column).as_py() <= len(some) // 2
        for leaf in leaves(field.name, field.type)
    ]


class BucketWriter:
    """Writes one file of `current` to a scratch path, in row groups of bounded size."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self._schema = schema
        self._writer: pq.ParquetWriter | None = None
        self._held: list[pa.RecordBatch] = []
        self._held_rows = 0
        self._held_bytes = 0
        self.rows = 0

    def add(self, columns: list[pa.Array], system: list[pa.Array]) -> None:
        """Rows: columns of the layout and the system columns in the order of CURRENT_SYSTEM."""
        batch = pa.RecordBatch.from_arrays([*columns, *system], schema=self._schema)
        if not batch.num_rows:
            return
        self._held.append(batch)
        self._held_rows += batch.num_rows
        self._held_bytes += batch.nbytes
        self.rows += batch.num_rows
        if self._held_rows >= GROUP_ROWS or self._held_bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> int:
        """Finish the file; its size in bytes, 0 (and no file) if it has no rows."""
        self._flush()
        if self._writer is None:
            return 0
        self._writer.close()
        self._writer = None
        return self.path.stat().st_size

    def abandon(self) -> None:
        """Drop the file; idempotent."""
        self._held.clear()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._held:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self.path,
                self._schema,
                compression="zstd",
                compression_level=1,
                write_page_index=False,
                use_dictionary=_repetitive(max(self._held, key=len)),
            )
        self._writer.write_table(pa.Table.from_batches(self._held, self._schema), row_group_size=self._held_rows)
        self._held, self._held_rows, self._held_bytes = [], 0, 0
