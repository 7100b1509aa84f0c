"""Rows of a changelog's objects read in bounded pieces, and written again as they are.

Memory is bounded by a row group. It does not decide which objects, and knows no store.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from cdc.lake.layout import KEY_METADATA, system_name
from cdc.lake.objects import GROUP_BYTES, GROUP_ROWS, writer_options

_READ_ROWS: Final = 1 << 14


def batches_of(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """The rows of a changelog's object, in order, with its metadata."""
    # A row group at a time: rows of many bytes stand in groups of few rows.
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(_READ_ROWS, row_groups=[group], use_threads=False):
            yield batch.replace_schema_metadata(file.schema_arrow.metadata)


class SameRows:
    """A local file that takes rows of one schema, encoded as the changelog's objects are. Errors are those of the disk
    and of Arrow."""

    def __init__(self, path: Path, schema: pa.Schema, prefix: str) -> None:
        self._writer = pq.ParquetWriter(path, schema, **_options(schema, prefix))
        self._held: list[pa.RecordBatch] = []
        self._held_rows = self._held_bytes = self._rows = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Append rows; they are written when a row group is full."""
        self._held.append(batch)
        self._rows += batch.num_rows
        self._held_rows += batch.num_rows
        self._held_bytes += batch.nbytes
        if self._held_rows >= GROUP_ROWS or self._held_bytes >= GROUP_BYTES:
            self._flush()

    def finish(self) -> int:
        """Write what is left, and the file's end; how many rows it has."""
        self._flush()
        self._writer.close()
        return self._rows

    def abandon(self) -> None:
        """After an error: let go of the file."""
        # It writes the file's end once more, and fails again: what failed first is what counts.
        with suppress(OSError, pa.ArrowException):
            self._writer.close()

    def _flush(self) -> None:
        if self._held:
            self._writer.write_table(pa.Table.from_batches(self._held), row_group_size=GROUP_ROWS)
        self._held, self._held_rows, self._held_bytes = [], 0, 0


def _options(schema: pa.Schema, prefix: str) -> dict[str, Any]:
    """Options of the writer for the schema of a changelog's object."""
    numbers = (schema.metadata or {}).get(KEY_METADATA.encode(), b"").decode().split(",")
    key = [f.name for f in schema if (f.metadata or {}).get(b"pg.attnum", b"").decode() in numbers]
    before = system_name("_before", prefix)
    kind = schema.field(before).type if before in schema.names else None
    return writer_options(prefix, key, kind)
