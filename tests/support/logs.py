"""Small batches and portions for tests of the event log, and what a log holds, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cdc.batch import SNAPSHOT_SEQ, Batch, Boundary, Portion, batch_schema
from cdc.log import EventLog
from cdc.state import State, open_state
from cdc.table import Column, TableId, TableSchema

SOURCE = "shop"


def schema_of(name: str, *, version: int = 1) -> TableSchema:
    columns = (
        Column(name="id", attnum=1, type_oid=20, type_name="bigint", not_null=True),
        Column(name="note", attnum=2, type_oid=25, type_name="text"),
    )
    return TableSchema(
        table=TableId("public", name), oid=sum(name.encode()), columns=columns, key=("id",), version=version
    )


ORDERS, PEOPLE = schema_of("orders"), schema_of("people")
SCHEMAS = {s.table: s for s in (ORDERS, PEOPLE)}


class Row(NamedTuple):
    """What tests compare."""

    lsn: int
    seq: int
    id: int
    note: str | None


def batch(schema: TableSchema, rows: Sequence[Row], *, epoch: int = 1, op: str = "c", run: str | None = None) -> Batch:
    optional = ("_run",) if run is not None else ()
    columns: list[Any] = [
        [op] * len(rows),
        [epoch] * len(rows),
        [r.lsn for r in rows],
        [r.seq for r in rows],
        [0] * len(rows),
    ]
    if run is not None:
        columns.append([run] * len(rows))
    columns += [[r.id for r in rows], [r.note for r in rows]]
    arrow = batch_schema(schema, optional)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, arrow, strict=True)]
    return Batch(schema, pa.RecordBatch.from_arrays(arrays, schema=arrow))


def rows_of(batch: Batch) -> list[Row]:
    values = zip(
        batch.system("_lsn").to_pylist(),
        batch.system("_seq").to_pylist(),
        batch.column("id").to_pylist(),
        batch.column("note").to_pylist(),
        strict=True,
    )
    return [Row(*v) for v in values]


def portion(
    *batches: Batch, lsn: int | None = None, epoch: int = 1, end_lsn: int | None = None, xids: Sequence[int] = ()
) -> Portion:
    """A portion that ends at `lsn` (None: inside the open transaction)."""
    boundary = None if lsn is None else Boundary(epoch, lsn, lsn + 1 if end_lsn is None else end_lsn)
    return Portion(
        batches=list(batches),
        boundary=boundary,
        xids=np.array(xids, np.uint32),
        xid_lsns=np.full(len(xids), lsn or 0, np.int64),
    )


def transaction(lsn: int, *, rows: int = 2, schema: TableSchema = ORDERS, size: int = 20, first_seq: int = 0) -> Batch:
    """Rows whose values follow from `lsn`, so that a reader can tell what should be there."""
    made = [Row(lsn, first_seq + i, lsn * 1000 + first_seq + i, f"{lsn}:" + "x" * size) for i in range(rows)]
    return batch(schema, made)


def chunk_rows(lsn: int, first: int, count: int) -> list[Row]:
    return [Row(lsn, SNAPSHOT_SEQ + first + i, first + i, f"read {first + i}") for i in range(count)]


def open_log(directory: Path, *, bytes_max: int = 1 << 30, segment_bytes: int = 64 << 20) -> tuple[State, EventLog]:
    state = open_state(directory)
    return state, EventLog(directory / "log", state, bytes_max=bytes_max, segment_bytes=segment_bytes)


def content(log: EventLog, source: str = SOURCE, after: int = 0) -> list[Row]:
    """Every row of a source in the order of the log, its bytes checked."""
    found: list[Row] = []
    for record in log.records(source, after):
        found += rows_of(log.read(record, SCHEMAS[record.table]))
    return found


def named_and_found(directory: Path, state: State) -> tuple[dict[str, int], dict[str, int]]:
    """Segment files with their lengths: as the index names them, and as they lie on the disk."""
    named = {f"{number:020d}.seg": end for number, end in state.query("select segment, bytes from segments")}
    found = {p.name: p.stat().st_size for p in (directory / "log").iterdir()}
    return named, found
