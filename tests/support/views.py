"""Fresh views for tests: what one shows, and what a merge of the same changes comes to."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import duckdb
import pyarrow as pa

from cdc.instant import Shown, fresh_views
from cdc.lake.changelog import ChangelogTable
from cdc.lake.current import CurrentTable, MergeResult, open_current
from cdc.table import TableId, TableSchema
from connectors.local.store import LocalStore


@dataclass(frozen=True)
class Told:
    """What is known of the only table of a test."""

    shape: TableSchema | None
    position: tuple[int, int] | None = None
    why_apart: str = ""

    def schema(self, source: str, changelog: ChangelogTable) -> TableSchema | None:
        return self.shape

    def landed(self, source: str) -> tuple[int, int] | None:
        return self.position

    def apart(self, source: str, table: TableId) -> str:
        return self.why_apart


def fresh_view(store: LocalStore, source: str, schema: TableSchema, scratch: Path) -> Shown:
    """The fresh view of a table in the shape `schema`."""

    def place(key: str) -> str:
        return store.location(key)[0]

    instant = fresh_views(store, source, [schema.table], Told(schema), place, place, temp_dir=scratch)
    return instant.tables[schema.table]


def rows_of(view: Shown) -> pa.Table:
    """What a view shows, in a DuckDB that anybody may have."""
    return _duckdb().sql(view.sql).to_arrow_table()


@cache
def _duckdb() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"threads": 1})


def merged(
    root: Path, source: str, schema: TableSchema, through: int, scratch: Path
) -> tuple[pa.Table | None, MergeResult]:
    """What a table shows after a merge through a version, made in a copy of the lake; None if it shows nothing."""
    copy = scratch / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy)
    store = LocalStore(copy)
    current = CurrentTable(store, source, schema.table, temp_dir=scratch, bucket_rows=3)
    result = current.merge(None, schema, through=through)  # type: ignore[arg-type]
    shown = open_current(store, source, schema.table)
    return None if shown is None else shown.to_table(), result


def cells(table: pa.Table) -> list[str]:
    """All cells of all rows as texts (NaN is NaN, and -0 is not 0), in an order of their own."""
    rows = table.to_pylist()
    for row in rows:
        for name, value in row.items():
            if name.strip("_") == "raw" and value is not None:
                row[name] = sorted(value)
    return sorted(map(repr, rows))
