"""The batch: changes of one table in one schema version, as an Arrow record batch; the only unit that moves.

Column order: system columns, then the row image. System columns that are null in every row (`_origin`, `_run`,
`_committed_at`, `_before`, `_unchanged`, `_raw`) may be left out of a batch in memory and in the log: absent means
null. `_op`, `_epoch`, `_lsn`, `_seq`, `_xid` are always there. Rows are ordered by (`_epoch`, `_lsn`, `_seq`).
A source column whose name collides with a system column makes all system columns of that table take a second
underscore, in the lake only: in memory the row image's fields stand after the system columns and are found by index.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdc.table import TableId, TableSchema
from cdc.types import arrow_fields

REQUIRED = ("_op", "_epoch", "_lsn", "_seq", "_xid")
OPTIONAL = ("_origin", "_run", "_committed_at", "_before", "_unchanged", "_raw")
SYSTEM = REQUIRED + OPTIONAL

RAW_TYPE = pa.map_(pa.string(), pa.string())
TIMESTAMP_TYPE = pa.timestamp("us", tz="UTC")
SNAPSHOT_SEQ = 1 << 62
"""`_seq` of the first row read by a snapshot after a position; every change of the stream has a lower one."""


class Boundary(NamedTuple):
    """A point between two transactions of a source.

    `lsn` is the commit LSN of the last transaction before it (Begin and Commit carry it), `end_lsn` where that
    transaction's WAL ends, or a later position up to which the stream is known to hold nothing more (a keepalive).
    Order and tokens use (`epoch`, `lsn`); confirming uses `end_lsn`.
    """

    epoch: int
    lsn: int
    end_lsn: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes of one table in one schema version.

    `data` has the columns of `batch_schema(schema, optional)`, where `optional` are those of OPTIONAL that it holds.
    All rows are of complete transactions, or all of the one transaction whose Commit has not been read yet.
    """

    schema: TableSchema
    data: pa.RecordBatch

    @property
    def table(self) -> TableId:
        return self.schema.table

    def system(self, name: str) -> pa.Array:
        """A system column; nulls of the right type if the batch leaves it out."""
        index = self._system_index(name)
        if index < 0:
            return pa.nulls(self.data.num_rows, system_type(name, self.schema))
        return self.data.column(index)

    def has(self, name: str) -> bool:
        return self._system_index(name) >= 0

    def column(self, name: str) -> pa.Array:
        """A column of the row image by its source name."""
        return self.data.column(self.row_start + self._row_index(name))

    def kept_as_text(self) -> dict[str, int]:
        """How many values of each column are kept as text in `_raw`, those of old row images included; what control
        rows say there is no value."""
        counts: dict[str, int] = {}
        if self.has("_raw"):
            raw = self.system("_raw")
            own = {column.name for column in self.schema.columns}
            with_values = pc.and_(raw.is_valid(), pc.not_equal(self.system("_op"), "s"))
            for entry in pc.value_counts(raw.filter(with_values).keys).to_pylist():
                name = entry["values"] if entry["values"] in own else entry["values"].removeprefix("before.")
                counts[name] = counts.get(name, 0) + entry["counts"]
        return counts

    @property
    def row_start(self) -> int:
        """Index of the first column of the row image."""
        return self.data.num_columns - len(self.schema.columns)

    @property
    def optional(self) -> tuple[str, ...]:
        """The optional system columns that `data` holds, in the order of OPTIONAL."""
        return tuple(self.data.schema.names[len(REQUIRED) : self.row_start])

    def _row_index(self, name: str) -> int:
        for i, column in enumerate(self.schema.columns):
            if column.name == name:
                return i
        raise KeyError(name)

    def _system_index(self, name: str) -> int:
        names = self.data.schema.names[: self.row_start]
        return names.index(name) if name in names else -1


@dataclass(slots=True)
class Portion:
    """What one read of a source yields: batches in order per table, and the boundary that they reach.

    `boundary` is None while the stream is still inside the transaction that the portion began in or before. Batches
    whose rows have an `_lsn` beyond `boundary.lsn` belong to the open transaction. `xids` and `xid_lsns` (uint32,
    int64, same length) list the transactions that became complete in this portion, also those without rows for us.
    `head_lsn` is the server's position when the newest frame was sent; `received_bytes` the wire bytes behind it.
    """

    batches: list[Batch] = field(default_factory=list)
    boundary: Boundary | None = None
    xids: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))
    xid_lsns: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    head_lsn: int = 0
    received_bytes: int = 0
    messages: int = 0
    ddl: bool = False
    """Whether the source says in it that its catalog was changed."""
    committed_at_us: int = 0


def system_type(name: str, schema: TableSchema) -> pa.DataType:
    """Arrow type of a system column in the batches of `schema`."""
    match name:
        case "_op" | "_origin" | "_run":
            return pa.string()
        case "_epoch" | "_lsn" | "_seq" | "_xid":
            return pa.int64()
        case "_committed_at":
            return TIMESTAMP_TYPE
        case "_before":
            return pa.struct(arrow_fields(schema))
        case "_unchanged":
            return pa.list_(pa.string())
        case "_raw":
            return RAW_TYPE
    raise KeyError(name)


@lru_cache(maxsize=4096)
def batch_schema(schema: TableSchema, optional: tuple[str, ...] = OPTIONAL) -> pa.Schema:
    """Arrow schema of a batch of `schema` that holds these optional system columns."""
    system = [pa.field(name, system_type(name, schema)) for name in REQUIRED + optional]
    return pa.schema(system + arrow_fields(schema))
