"""The rows that `current` holds of a table, in a given shape, bucket by bucket: what a comparison begins from.

A file of a table with a key holds one bucket of keys, so the rows of a bucket are found without looking at the others;
a table without a key is one bucket. Rows of files that lack a column show its missing value. Reads one version of the
table, changes nothing, and holds one slice of a file in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from cdc.batch import RAW_TYPE
from cdc.keys import bucket_of, key_of
from cdc.lake.assemble import Missing
from cdc.lake.bucket import Fetcher, OldFile, key_fingerprint, parse_name
from cdc.lake.delta import DeltaLog
from cdc.lake.events import Layout
from cdc.lake.layout import current_path
from cdc.ports import ObjectStore
from cdc.table import TableId, TableSchema


class HeldRows:
    """`current` as it stands now, in the shape `schema`. `scratch` is for copies of files that are not local."""

    def __init__(self, store: ObjectStore, source: str, table: TableId, schema: TableSchema, scratch: Path) -> None:
        prefix = current_path(source, table)
        log = DeltaLog(store, prefix)
        self._layout = Layout(schema)
        self._missing = Missing(self._layout)
        self._fetcher = Fetcher(store, prefix, scratch)
        self._files = log.files() if log.exists() else []
        key = key_fingerprint(self._layout)
        named = ((f, parse_name(f.path)) for f in self._files)
        # A file that was laid out by another key may hold rows of any part.
        self._of = [(f, n.bucket, n.of) if n is not None and n.key == key else (f, 0, 1) for f, n in named]
        self.schema = pa.schema(
            [pa.field("key", pa.string())]
            + [pa.field(str(i), f.type) for i, f in enumerate(self._layout.fields)]
            + [pa.field("raw", RAW_TYPE)]
        )

    @property
    def rows(self) -> int:
        return sum(f.rows for f in self._files)

    @property
    def bytes(self) -> int:
        """Bytes of the rows as Parquet encodes them, before they are compressed."""
        total = 0
        for live in self._files:
            metadata = self._fetcher.open(live.path).metadata
            total += sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        return total

    @property
    def buckets(self) -> int:
        """Number of buckets that the files are of, a power of two; 1 if the table has no key."""
        return max((of for _, _, of in self._of), default=1)

    def slices(self, bucket: int) -> Iterator[pa.RecordBatch]:
        """Rows of one of the buckets, a few megabytes at a time: their keys (null without a key), columns of the shape
        and `_raw`, as `schema` has them. SchemaConflict if a value does not fit its column's type."""
        names = [self._layout.names[i] for i in self._layout.key_index]
        for live, own, of in self._of:
            if bucket % of != own:
                continue
            old = OldFile(self._fetcher.open(live.path), self._layout, None)
            for _, data, columns, raw in old.slices(self._missing):
                n = data.num_rows
                keys = key_of([columns[i] for i in self._layout.key_index], raw, names) if names else _no_keys(n)
                batch = pa.RecordBatch.from_arrays([keys, *columns, _map(raw, n)], schema=self.schema)
                if of < self.buckets:
                    batch = batch.filter(pa.array(bucket_of(keys, self.buckets) == bucket))
                yield batch


def _no_keys(rows: int) -> pa.Array:
    return pa.nulls(rows, pa.string())


def _map(raw: pa.Array, rows: int) -> pa.Array:
    """`_raw` in the type that ours have."""
    if raw.null_count == rows:
        return pa.nulls(rows, RAW_TYPE)
    return raw if raw.type == RAW_TYPE else raw.cast(RAW_TYPE)
