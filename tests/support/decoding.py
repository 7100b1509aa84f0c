"""From decoded batches back to rows, and from a wire's own list of changes to the rows that they must become.

The second is an oracle: it does not import the decoder, and converts Postgres' text with Python's own types.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cdc.batch import Batch, Portion
from cdc.table import Column, TableId, TableSchema
from connectors.postgres.pgoutput import Decoder, Relation
from connectors.postgres.spool import Spool
from tests.support.wire import (
    BOOL,
    BYTEA,
    DATE,
    FLOAT8,
    INT2,
    INT4,
    INT8,
    NUMERIC,
    TIMESTAMP,
    TIMESTAMPTZ,
    Cell,
    Change,
    Value,
    WireColumn,
)

_UTC = dt.UTC


@dataclass
class Row:
    """A change as a reader of batches sees it; `image` and `before` by column name."""

    table: str
    op: str
    lsn: int
    seq: int
    xid: int
    committed: dt.datetime | None
    origin: str | None
    image: dict[str, Any]
    before: dict[str, Any] | None
    unchanged: list[str] | None
    raw: dict[str, str] | None


def resolve(relation: Relation) -> TableSchema | None:
    """Tables named "hidden…" are not selected, columns named "dropped" are left out."""
    if relation.name.startswith("hidden"):
        return None
    columns = [
        Column(name=c.name, attnum=i, type_oid=c.type_oid, typmod=c.typmod)
        for i, c in enumerate(relation.columns, 1)
        if c.name != "dropped"
    ]
    key = tuple(c.name for c in relation.columns if c.is_key and c.name != "dropped")
    return TableSchema(
        table=TableId(relation.schema, relation.name),
        oid=relation.oid,
        columns=tuple(columns),
        key=key,
        identity=relation.identity,
    )


def decode(frames: Sequence[bytes], cuts: Iterable[int] = (), **options: Any) -> list[Portion]:
    """Feed the frames in the runs between these cuts to a new decoder."""
    decoder = Decoder(resolve, epoch=3, **options)
    edges = [0, *sorted(cuts), len(frames)]
    return [decoder.feed(frames[a:b]) for a, b in pairwise(edges)]


def decode_streamed(
    frames: Sequence[bytes], cuts: Iterable[int] = (), *, folder: Path, memory_bytes: int = 1 << 20, **options: Any
) -> list[Portion]:
    """The same for a stream of protocol 2: through a new spool, each run between cuts a blob."""
    decoder = Decoder(resolve, epoch=3, **options)
    spool = Spool(folder, memory_bytes=memory_bytes, bytes_max=1 << 30)
    edges = [0, *sorted(cuts), len(frames)]
    portions = []
    try:
        for a, b in pairwise(edges):
            if a == b:
                continue
            lengths = np.fromiter(map(len, frames[a:b]), np.int64, b - a)
            for part in spool.take(b"".join(frames[a:b]), lengths, in_transaction=decoder.in_transaction):
                if part.aborted is None:
                    portions.append(decoder.feed_blob(part.data, part.lengths))
                else:
                    portions.append(decoder.feed_spooled(part.data, part.lengths, part.aborted))
            assert spool.held_bytes <= memory_bytes
    finally:
        spool.close()
    return portions


def batches_of(portions: Iterable[Portion]) -> list[Batch]:
    return [batch for portion in portions for batch in portion.batches]


def rows_of(batches: Iterable[Batch]) -> list[Row]:
    """Every row, batch by batch; the batches are checked for what all of them promise."""
    return [row for batch in batches for row in _rows(batch)]


def _rows(batch: Batch) -> Iterable[Row]:
    batch.data.validate(full=True)
    assert batch.data.num_rows > 0
    for name in batch.optional:
        assert batch.system(name).null_count < batch.data.num_rows, f"{name} is there for nothing"
    system = {
        name: batch.system(name).to_pylist()
        for name in (
            "_op",
            "_epoch",
            "_lsn",
            "_seq",
            "_xid",
            "_origin",
            "_committed_at",
            "_before",
            "_unchanged",
            "_raw",
        )
    }
    names = [c.name for c in batch.schema.columns]
    cells = [batch.data.column(batch.row_start + i).to_pylist() for i in range(len(names))]
    assert set(system["_epoch"]) == {3}
    for i in range(batch.data.num_rows):
        raw = system["_raw"][i]
        yield Row(
            table=str(batch.table),
            op=system["_op"][i],
            lsn=system["_lsn"][i],
            seq=system["_seq"][i],
            xid=system["_xid"][i],
            committed=system["_committed_at"][i],
            origin=system["_origin"][i],
            image={name: column[i] for name, column in zip(names, cells, strict=True)},
            before=system["_before"][i],
            unchanged=system["_unchanged"][i],
            raw=None if raw is None else dict(raw),
        )


def expected(change: Change) -> Row | None:
    """The row that this change must become; None if its table is not selected."""
    if change.table.name.startswith("hidden"):
        return None
    kept = [(i, c) for i, c in enumerate(change.table.columns) if c.name != "dropped"]
    raw: dict[str, str] = {}
    unchanged: list[str] = []
    image: dict[str, Any] = {}
    source = change.old if change.op == "d" else change.new
    for i, column in kept:
        cell: Value = Cell.NULL if source is None else source[i]
        if cell is Cell.UNCHANGED and change.old is not None:
            old = change.old[i]
            if isinstance(old, bytes):
                cell = old
        if cell is Cell.UNCHANGED:
            unchanged.append(column.name)
        image[column.name] = _value(column, cell, raw, column.name)
    before = None
    if change.op == "u" and change.old is not None:
        before = {c.name: _value(c, change.old[i], raw, "before." + c.name) for i, c in kept}
    return Row(
        table=f"{change.table.schema or 'pg_catalog'}.{change.table.name}",
        op=change.op,
        lsn=change.lsn,
        seq=change.seq,
        xid=change.xid,
        committed=None if change.committed_us is None else _moment(change.committed_us),
        origin=change.origin,
        image=image,
        before=before,
        unchanged=unchanged or None,
        raw=raw or None,
    )


def in_table_order(rows: Iterable[Row]) -> list[Row]:
    """Order is promised per table only."""
    return sorted(rows, key=lambda row: row.table)


def _moment(us: int) -> dt.datetime:
    return dt.datetime(1970, 1, 1, tzinfo=_UTC) + dt.timedelta(microseconds=us)


def _value(column: WireColumn, cell: Value, raw: dict[str, str], name: str) -> Any:
    if isinstance(cell, Cell):
        return None
    text = cell.decode()
    value = _typed(column.type_oid, text)
    if value is None:
        raw[name] = text
    return value


def _typed(type_oid: int, text: str) -> Any:
    """Python's value of the text, None where the contract's type cannot hold it."""
    if type_oid == BOOL:
        return text == "t"
    if type_oid == BYTEA:
        return bytes.fromhex(text[2:])
    if type_oid in (INT2, INT4, INT8):
        return int(text)
    if type_oid == FLOAT8:
        return float(text)
    if type_oid == NUMERIC:
        return None if text == "NaN" else Decimal(text)
    if type_oid in (DATE, TIMESTAMP, TIMESTAMPTZ):
        year = text.split("-")[0]
        if not year.isdigit() or len(year) > 4 or text.endswith("BC"):
            return None
        return dt.date.fromisoformat(text) if type_oid == DATE else dt.datetime.fromisoformat(text)
    return text
