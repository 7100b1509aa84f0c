"""Batches of changes that were found by comparing: what a stream would have brought, made from two sides of rows.

An update carries the whole old row, a delete is it. No change has a transaction id of the source: several transactions
may be behind one of them, and none that was undone again between two looks. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cdc.batch import RAW_TYPE, TIMESTAMP_TYPE, Batch, batch_schema, system_type
from cdc.keys import BEFORE
from cdc.table import TableSchema

SLICE_ROWS = 1 << 15


@dataclass(frozen=True, slots=True)
class At:
    """Where the changes of one run stand, and when its snapshot was taken (µs)."""

    epoch: int
    lsn: int
    at_us: int


@dataclass(frozen=True, slots=True)
class Images:
    """Rows in the columns of a schema, with `_raw` or None."""

    columns: Sequence[pa.Array]
    raw: pa.Array | None
    rows: int

    def take(self, index: np.ndarray) -> Images:
        at = pa.array(index)
        raw = self.raw
        if raw is not None:
            raw = raw.take(at)
            raw = None if raw.null_count == len(raw) else raw
        return Images([c.take(at) for c in self.columns], raw, len(index))

    def slice(self, start: int, rows: int) -> Images:
        raw = None if self.raw is None else self.raw.slice(start, rows)
        rows = min(rows, self.rows - start)
        return Images([c.slice(start, rows) for c in self.columns], raw, rows)


def batches(
    schema: TableSchema, op: str, at: At, first_seq: int, rows: Images, before: Images | None = None
) -> Iterator[Batch]:
    """Changes `op` (c, u or d) with `_seq` from `first_seq` on, in batches of bounded size; `before`: the old rows of
    updates, in the same order."""
    for start in range(0, rows.rows, SLICE_ROWS):
        part = rows.slice(start, SLICE_ROWS)
        old = None if before is None else before.slice(start, SLICE_ROWS)
        yield _batch(schema, op, at, first_seq + start, part, old)


def _batch(schema: TableSchema, op: str, at: At, first_seq: int, rows: Images, before: Images | None) -> Batch:
    n = rows.rows

    def constant(value: int) -> pa.Array:
        return pa.array(np.full(n, value, np.int64))

    arrays: list[pa.Array] = [
        pa.repeat(op, n),
        constant(at.epoch),
        constant(at.lsn),
        pa.array(np.arange(first_seq, first_seq + n, dtype=np.int64)),
        constant(0),
        constant(at.at_us).cast(TIMESTAMP_TYPE),
    ]
    optional = ["_committed_at"]
    raw = rows.raw
    if before is not None and schema.columns:
        optional.append("_before")
        fields = list(system_type("_before", schema))
        arrays.append(pa.StructArray.from_arrays(list(before.columns), fields=fields))
        raw = _both(rows.raw, before.raw, n)
    if raw is not None and raw.null_count < n:
        optional.append("_raw")
        arrays.append(raw)
    arrow = batch_schema(schema, tuple(optional))
    return Batch(schema, pa.RecordBatch.from_arrays([*arrays, *rows.columns], schema=arrow))


def _both(new: pa.Array | None, old: pa.Array | None, rows: int) -> pa.Array | None:
    """Texts of the rows and, under names of their own, of the old ones. Rows that have some are few."""
    if old is None or old.null_count == rows:
        return new
    mine = new.to_pylist() if new is not None else [None] * rows
    texts = [
        [*(one or ()), *((BEFORE + name, text) for name, text in other or ())] or None
        for one, other in zip(mine, old.to_pylist(), strict=True)
    ]
    return pa.array(texts, RAW_TYPE)
