"""Small lakes for tests of what reads them: current tables and changelogs, written as the product lays them out.

What is written stands in real Delta tables under the real paths, with system columns; how the product itself builds
them is for other tests.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdc.lake.delta import AddedFile, DeltaLog
from cdc.lake.layout import DATE, changelog_path, current_path
from cdc.ports import ObjectStore
from cdc.table import TableId
from connectors.local.store import LocalStore

_numbers = itertools.count()


class SmallLake:
    """A lake in a directory."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.store: ObjectStore = LocalStore(root)

    def write_current(self, source: str, table: str, rows: pa.Table, *, parts: int = 1) -> int:
        """Replace what `current` shows, in one commit; the new Delta version."""
        delta = DeltaLog(self.store, current_path(source, table_id(table)))
        stamped = _stamped(rows)
        delta.open_or_create(stamped.schema)
        old = [f.path for f in delta.files()]
        size = -(-stamped.num_rows // parts)
        slices = [stamped.slice(start, size) for start in range(0, stamped.num_rows, size)] if size else []
        adds = [self._write(delta, part, "") for part in slices]
        merged = DeltaLog(self.store, changelog_path(source, table_id(table)))
        tokens = {"changelog": max(merged.version(), 0)}
        return delta.commit(adds=adds, removes=old, tokens=tokens)

    def append_changelog(self, source: str, table: str, rows: pa.Table, *, date: str = "2026-01-02") -> int:
        """Add changes of one date; the new Delta version. `rows` has `_op` beside the source's columns."""
        delta = DeltaLog(self.store, changelog_path(source, table_id(table)))
        delta.open_or_create(rows.schema.append(pa.field(DATE, pa.string())), partition_by=[DATE])
        return delta.commit(adds=[self._write(delta, rows, f"{DATE}={date}/", {DATE: date})])

    def _write(
        self, delta: DeltaLog, rows: pa.Table, folder: str, partition: dict[str, str | None] | None = None
    ) -> AddedFile:
        path = f"{folder}{next(_numbers):08d}.parquet"
        out = pa.BufferOutputStream()
        pq.write_table(rows, out)
        data = out.getvalue()
        self.store.put(f"{delta.prefix}/{path}", data)
        return AddedFile(path=path, size=data.size, rows=rows.num_rows, partition=partition or {})


def table_id(name: str) -> TableId:
    schema, dot, rest = name.partition(".")
    return TableId(schema, rest) if dot else TableId("public", name)


def _stamped(rows: pa.Table) -> pa.Table:
    system: dict[str, Any] = {
        "_epoch": pa.array([1] * rows.num_rows, pa.int64()),
        "_lsn": pa.array([1] * rows.num_rows, pa.int64()),
        "_seq": pa.array(range(rows.num_rows), pa.int64()),
        "_committed_at": pa.nulls(rows.num_rows, pa.timestamp("us", tz="UTC")),
        "_origin": pa.nulls(rows.num_rows, pa.string()),
        "_raw": pa.nulls(rows.num_rows, pa.map_(pa.string(), pa.string())),
    }
    for name, column in system.items():
        rows = rows.append_column(name, column)
    return rows
