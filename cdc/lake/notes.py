"""Small tables of a source that landing appends to beside the tables' own: one Delta table, rows exactly once.

Rows come under a name with a number that only grows; what stands at or below the name's token is left out, so appending
again after a crash changes nothing. Created by the first row. Not thread-safe; landing alone writes here.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdc.lake.delta import AddedFile, DeltaLog
from cdc.lake.layout import source_path
from cdc.ports import ObjectStore

SCHEMA_CHANGES = "_schema_changes"
SCHEMA_CHANGES_COLUMNS = pa.schema(
    [
        pa.field("at", pa.timestamp("us", tz="UTC")),
        pa.field("epoch", pa.int64()),
        pa.field("lsn", pa.int64()),
        pa.field("table", pa.string()),
        pa.field("oid", pa.int64()),
        pa.field("kind", pa.string()),
        pa.field("before", pa.string()),
        pa.field("after", pa.string()),
        pa.field("answer", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Note:
    """One row. `name` and `number` tell whether it is there already."""

    name: str
    number: int
    values: dict[str, Any]


class NotesTable:
    """The table `name` of a source, with these columns."""

    def __init__(self, store: ObjectStore, source: str, name: str, columns: pa.Schema) -> None:
        self._store = store
        self._columns = columns
        self.delta = DeltaLog(store, f"{source_path(source)}/{name}")

    def append(self, rows: Sequence[Note]) -> list[Note]:
        """Make rows visible that are not yet; those. Durable on return; StoreConflict if another writer was quicker."""
        if not rows:
            return []
        exists = self.delta.exists()
        if exists:
            self.delta.refresh()
        landed = {name: self.delta.token(name) if exists else None for name in {r.name for r in rows}}
        fresh = [r for r in rows if (known := landed[r.name]) is None or r.number > known]
        if not fresh:
            return []
        self.delta.open_or_create(self._columns)
        path = f"{uuid.uuid4().hex}.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([r.values for r in fresh], self._columns), sink, compression="zstd")
        data = sink.getvalue()
        self._store.put(f"{self.delta.prefix}/{path}", data)
        names = {r.name for r in fresh}
        self.delta.commit(
            adds=[AddedFile(path=path, size=data.size, rows=len(fresh))],
            tokens={name: max(r.number for r in fresh if r.name == name) for name in names},
            expect={name: landed[name] for name in names},
        )
        return fresh
