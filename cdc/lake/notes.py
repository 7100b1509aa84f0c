"""Small tables of a source that landing appends to beside the tables' own: one Delta table, rows exactly once.

Rows come under a name with a number that only grows; what stands at or below the name's token is left out, so appending
again after a crash changes nothing. Created by the first row. Not thread-safe; landing alone writes here.

Rows are few, so it is its own upkeep: when it has become many objects, whoever appends joins them first. Nothing ever
expires here.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from cdc.errors import CdcError, Verdict
from cdc.lake.delta import AddedFile, DeltaLog
from cdc.lake.layout import source_path
from cdc.ports import ObjectStore

log = logging.getLogger(__name__)

OBJECTS_MAX: Final = 64
_SMALL_BYTES: Final = 1 << 20
_VACUUM_S: Final = 7 * 86_400.0
"""The longest time that readers of any table are given."""

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
            self._tidy()
        landed = {name: self.delta.token(name) if exists else None for name in {r.name for r in rows}}
        fresh = [r for r in rows if (known := landed[r.name]) is None or r.number > known]
        if not fresh:
            return []
        self.delta.open_or_create(self._columns)
        added = self._put(pa.Table.from_pylist([r.values for r in fresh], self._columns))
        names = {r.name for r in fresh}
        self.delta.commit(
            adds=[added],
            tokens={name: max(r.number for r in fresh if r.name == name) for name in names},
            expect={name: landed[name] for name in names},
        )
        return fresh

    def _put(self, rows: pa.Table) -> AddedFile:
        path = f"{uuid.uuid4().hex}.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd")
        data = sink.getvalue()
        self._store.put(f"{self.delta.prefix}/{path}", data)
        return AddedFile(path=path, size=data.size, rows=rows.num_rows)

    def _tidy(self) -> None:
        """Join small objects if they are many, and remove what nobody reads any more. What fails here is tried again at
        the next append, and keeps nobody from appending."""
        small = [f for f in self.delta.files() if f.size < _SMALL_BYTES]
        if len(small) < OBJECTS_MAX:
            return
        try:
            parts = []
            for found in small:
                with self.delta.open_file(found.path) as file:
                    parts.append(file.read())
            joined = self._put(pa.concat_tables(parts, promote_options="default"))
            self.delta.commit(adds=[joined], removes=[f.path for f in small], data_change=False)
            self.delta.vacuum(_VACUUM_S, untracked=True)
            self.delta.tidy_log()
        except CdcError as e:
            if e.verdict is Verdict.FATAL:
                raise
            log.warning("objects were not joined: %s", e.args[0], extra={"delta_table": self.delta.prefix})
