"""Changelogs for tests of the lake: rows given as dictionaries, written as the Parquet files of one Delta commit."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdc.batch import OPTIONAL, REQUIRED, Batch, batch_schema, system_type
from cdc.lake.delta import AddedFile, DeltaLog
from cdc.lake.layout import changelog_path
from cdc.table import TableSchema
from cdc.types import arrow_fields, build_raw, cast
from connectors.local.store import LocalStore

SYSTEM = (*REQUIRED, *OPTIONAL)


def batch_of(schema: TableSchema, rows: Sequence[Mapping[str, Any]]) -> Batch:
    """A batch of rows: system columns by name (`_before` and `_raw` as dictionaries), values as Postgres' text.

    What a column's type cannot hold goes to `_raw`, as the decoder does it.
    """
    n = len(rows)
    arrays: list[pa.Array] = []
    names: list[str] = []
    texts: list[pa.Array] = []
    masks: list[Any] = []
    image: list[pa.Array] = []
    before: list[pa.Array] = []
    for column in schema.columns:
        for prefix, out in (("", image), ("before.", before)):
            pick = [(r.get("_before") or {}) if prefix else r for r in rows]
            text = pa.array([p.get(column.name) for p in pick], pa.string())
            typed, mask = cast(column, text)
            out.append(typed)
            names.append(prefix + column.name)
            texts.append(text)
            masks.append(mask)
    raw = build_raw(names, texts, masks)
    for name in SYSTEM:
        if name == "_before":
            missing = pa.array([r.get("_before") is None for r in rows])
            arrays.append(pa.StructArray.from_arrays(before, fields=arrow_fields(schema), mask=missing))
        elif name == "_raw":
            controls = [r.get("_raw") for r in rows]
            if any(controls):
                raw = pa.array([list(c.items()) if c else None for c in controls], system_type("_raw", schema))
            arrays.append(raw if raw is not None else pa.nulls(n, system_type("_raw", schema)))
        else:
            default = 0 if name in ("_epoch", "_lsn", "_seq", "_xid") else None
            arrays.append(pa.array([r.get(name, default) for r in rows], system_type(name, schema)))
    data = pa.RecordBatch.from_arrays([*arrays, *image], schema=batch_schema(schema, OPTIONAL))
    return Batch(schema, data)


class Changelog:
    """A changelog that holds exactly the commits that a test writes."""

    def __init__(self, root: Path, schema: TableSchema, *, source: str = "shop") -> None:
        self.store = LocalStore(root)
        self.source = source
        self.table = schema.table
        self._log = DeltaLog(self.store, changelog_path(source, schema.table))
        self._root = root / changelog_path(source, schema.table)

    def commit(self, batches: Sequence[Batch], *, lsn: int, complete: bool = False, epoch: int = 0) -> int:
        """One commit of some batches, one file each; `complete`: it brings the end of a whole run. Its version."""
        adds = []
        fields: list[pa.Field] = []
        for batch in batches:
            path = f"{uuid.uuid4().hex}.parquet"
            self._root.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_batches([batch.data]), self._root / path, row_group_size=1 << 17)
            adds.append(AddedFile(path=path, size=(self._root / path).stat().st_size, rows=batch.data.num_rows))
            fields = [f for f in fields if f.name not in batch.data.schema.names] + list(batch.data.schema)
        tokens = {f"stream/{epoch}": lsn}
        if complete:
            tokens[f"complete/{epoch}/{batches[0].schema.oid}"] = 1
        if fields:
            self._log.open_or_create(pa.schema(fields))
        self._log.refresh()
        return self._log.commit(adds=adds, tokens=tokens)

    def newest(self) -> int:
        return self._log.refresh()
