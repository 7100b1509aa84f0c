"""Records of the event log: a batch on its way into the log, and its row in the index.

Guarantees: what is serialised here has exactly the columns that readers of its schema version will assume, its rows
rise, and it carries the checksum of its bytes. It neither writes nor reads files (cdc.segments) nor decides what
follows on what (cdc.log).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdc.batch import REQUIRED, Batch, batch_schema
from cdc.errors import InvariantBroken
from cdc.table import TableId


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One batch in the log. `kind` is 'change', or for what snapshots append 'chunk' or 'control'."""

    offset: int
    source: str
    table: TableId
    version: int
    rows: int
    bytes: int
    epoch: int
    first_lsn: int
    last_lsn: int
    kind: str
    run: str | None
    chunk: int | None
    has_truncate: bool
    optional: tuple[str, ...]
    segment: int
    start: int
    crc32: int


@dataclass(slots=True)
class Entry:
    """A batch on its way into the log."""

    table: TableId
    version: int
    rows: int
    buffer: pa.Buffer
    crc32: int
    epoch: int
    first: tuple[int, int]
    last: tuple[int, int]
    has_truncate: bool
    optional: tuple[str, ...]


COLUMNS = (
    "offset, source, schema, name, version, rows, bytes, epoch, first_lsn, last_lsn, kind, run, chunk, has_truncate, "
    "optional, segment, start, crc32"
)


def record_of(row: tuple[Any, ...]) -> LogRecord:
    return LogRecord(
        offset=row[0],
        source=row[1],
        table=TableId(row[2], row[3]),
        version=row[4],
        rows=row[5],
        bytes=row[6],
        epoch=row[7],
        first_lsn=row[8],
        last_lsn=row[9],
        kind=row[10],
        run=row[11],
        chunk=row[12],
        has_truncate=bool(row[13]),
        optional=tuple(filter(None, row[14].split(","))),
        segment=row[15],
        start=row[16],
        crc32=row[17],
    )


def entry_of(batch: Batch) -> Entry:
    """Serialised, summed and checked: the batch has the shape that its readers will assume, and its rows rise."""
    data, optional = batch.data, batch.optional
    if batch.schema.version <= 0:
        raise InvariantBroken(f"a batch of {batch.table} has a schema that is in no schema book")
    if not data.schema.equals(batch_schema(batch.schema, optional)):
        raise InvariantBroken(f"a batch of {batch.table} does not have the columns of its schema version")
    epoch, lsn, seq = (data.column(REQUIRED.index(name)).to_numpy() for name in ("_epoch", "_lsn", "_seq"))
    if not bool(np.all((lsn[1:] > lsn[:-1]) | ((lsn[1:] == lsn[:-1]) & (seq[1:] > seq[:-1])))):
        raise InvariantBroken(f"rows of a batch of {batch.table} are not in order")
    if not bool(np.all(epoch == epoch[0])):
        raise InvariantBroken(f"a batch of {batch.table} spans two epochs")
    buffer = data.serialize()
    return Entry(
        table=batch.table,
        version=batch.schema.version,
        rows=data.num_rows,
        buffer=buffer,
        crc32=zlib.crc32(buffer),
        epoch=int(epoch[0]),
        first=(int(lsn[0]), int(seq[0])),
        last=(int(lsn[-1]), int(seq[-1])),
        has_truncate=bool(pc.any(pc.equal(data.column(0), "t")).as_py()),
        optional=optional,
    )


def index_row(
    source: str, entry: Entry, offset: int, segment: int, start: int, marks: tuple[str, str | None, int | None]
) -> tuple[Any, ...]:
    """An index row, in the order of COLUMNS."""
    return (
        offset,
        source,
        *entry.table,
        entry.version,
        entry.rows,
        entry.buffer.size,
        entry.epoch,
        entry.first[0],
        entry.last[0],
        *marks,
        entry.has_truncate,
        ",".join(entry.optional),
        segment,
        start,
        entry.crc32,
    )
