"""Fresh views for tests: what one shows, and what a merge of the same changes comes to."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cdc.lake.current import CurrentTable, MergeResult
from cdc.lake.layout import current_path
from cdc.relations import Relation, open_views
from cdc.table import TableId, TableSchema
from connectors.local.store import LocalStore

Row = dict[str, Any]


@dataclass(frozen=True)
class Told:
    """What is known of the only table of a test."""

    shape: TableSchema
    position: tuple[int, int] | None = None

    def schema(self, source: str, table: TableId) -> TableSchema | None:
        return self.shape

    def landed(self, source: str) -> tuple[int, int] | None:
        return self.position


def shown(store: LocalStore, source: str, told: Told, scratch: Path) -> tuple[pa.Table, str]:
    """The rows of the fresh view, and why it is not fresh (empty if it is)."""
    notes: list[str] = []
    relation = Relation(source, told.shape.table)
    with open_views(store, [relation], fresh=told, note=notes.append, temp_dir=scratch) as connection:
        return connection.sql(f"select * from {relation}").to_arrow_table(), "".join(notes)


def merged(
    root: Path, source: str, schema: TableSchema, through: int, scratch: Path
) -> tuple[pa.Table | None, MergeResult]:
    """What the table shows after a merge through a version, made in a copy of the lake; None if it shows nothing."""
    copy = scratch / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy)
    store = LocalStore(copy)
    current = CurrentTable(store, source, schema.table, temp_dir=scratch, bucket_rows=3)
    result = current.merge(None, schema, through=through)  # type: ignore[arg-type]
    if result.version is None:
        return None, result
    relation = Relation(source, schema.table)
    with open_views(store, [relation], temp_dir=scratch) as connection:
        return connection.sql(f"select * from {relation}").to_arrow_table(), result


def cells(table: pa.Table) -> list[Row]:
    """All cells of all rows, in an order of their own."""
    rows = table.to_pylist()
    for row in rows:
        for name, value in row.items():
            if name.lstrip("_") == "raw" and value is not None:
                row[name] = sorted(value)
    return sorted(rows, key=repr)


__all__ = ["Told", "cells", "current_path", "merged", "shown"]
