"""What of a chunk may be appended, given what the stream did to the table while the chunk was read: pure.

Rules 6, 8 and 11 of snapshots. Rows whose key was changed in the window by a transaction that the snapshot does not see
are left out, both keys of a key change counted. A key that the window leaves alive with TOAST values that no
message carried gets those values, and only those, from the chunk, under its last key. It makes the batches that
snapshots append; it reads no log and takes no lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdc.batch import RAW_TYPE, TIMESTAMP_TYPE, Batch, batch_schema
from cdc.keys import key_of, key_texts
from cdc.lake.reduce import CLEAR, KNOWN, SET, UNCHANGED, Events, Orders, Reduced, Targets, reduce
from cdc.ports import RowsRead, Visibility
from cdc.table import TableSchema
from cdc.types import build_raw, cast


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What all rows of one append share; `seq` is the `_seq` of its first row."""

    epoch: int
    lsn: int
    seq: int
    run: str
    at_us: int


@dataclass(frozen=True, slots=True)
class Reconciled:
    """`keep`: indexes of the chunk's rows to append. `fills`: rows that carry only unknown columns, or None."""

    keep: np.ndarray
    fills: Fills | None


@dataclass(frozen=True, slots=True)
class Fills:
    """Rows of only those columns that the window left unknown; `unchanged` names the others per row."""

    columns: list[pa.Array]
    raw: pa.Array | None
    unchanged: pa.Array
    rows: int


def must_read_again(schema: TableSchema, records: Sequence[tuple[int, bool]]) -> bool:
    """Rule 11: whether the window, as (schema version, has truncate) per record, makes the chunk void."""
    return any(version != schema.version or truncate for version, truncate in records)


def unseen(batch: Batch, visibility: Visibility) -> Batch:
    """The changes of transactions that the chunk's snapshot does not see. The others are in the chunk's rows
    already."""
    seen = visibility.sees(_ints(batch, "_xid").astype(np.uint32))
    return batch if not seen.any() else Batch(batch.schema, batch.data.filter(pa.array(~seen)))


def reconcile(schema: TableSchema, rows: RowsRead, window: Sequence[Batch]) -> Reconciled:
    """Apply rules 6 and 8 to a chunk of `schema` and the `unseen` changes of the window, of the same schema version
    and in
    order. Every transaction that the snapshot sees is in the log by now."""
    everything = np.arange(rows.rows)
    if not window or not schema.key:
        return Reconciled(everything, None)
    indexes = [next(i for i, c in enumerate(schema.columns) if c.name == k) for k in schema.key]
    chunk_keys = key_of([rows.columns[i] for i in indexes], rows.raw, schema.key)
    new = [key_texts(b, schema.key) for b in window]
    old = [key_texts(b, schema.key, before=True) for b in window]
    touched = pa.chunked_array([*new, *old], type=pa.string()).drop_null()
    left_out = pc.is_in(chunk_keys, value_set=touched.combine_chunks()).to_numpy(zero_copy_only=False)
    keep = everything[~left_out]
    if not any(b.has("_unchanged") for b in window):
        return Reconciled(keep, None)
    return Reconciled(keep, _fills(schema, rows, window, chunk_keys, new, old, np.flatnonzero(left_out)))


def absent(
    schema: TableSchema, asked: Sequence[tuple[str, ...]], rows: RowsRead, window: Sequence[Batch]
) -> tuple[list[pa.Array], pa.Array | None, int] | None:
    """Of the keys that were `asked` for those that the snapshot does not have, as the columns and `_raw` of rows that
    carry only their key, and how many; None if there are none. A key that the `unseen` changes of the window touch is
    left out: what they make of it is newer (rules 6, 14)."""
    indexes = [next(i for i, c in enumerate(schema.columns) if c.name == k) for k in schema.key]
    texts = [pa.array([key[i] for key in asked], pa.string()) for i in range(len(schema.key))]
    cast_keys = [cast(schema.columns[i], text) for i, text in zip(indexes, texts, strict=True)]
    raw = build_raw(list(schema.key), texts, [mask for _, mask in cast_keys])
    keys = key_of([typed for typed, _ in cast_keys], raw, schema.key)
    found = key_of([rows.columns[i] for i in indexes], rows.raw, schema.key)
    met = [found, *(key_texts(b, schema.key) for b in window), *(key_texts(b, schema.key, before=True) for b in window)]
    gone = ~pc.is_in(keys, value_set=pa.chunked_array(met, pa.string()).drop_null().combine_chunks()).to_numpy(
        zero_copy_only=False
    )
    _, first = np.unique(keys.to_numpy(zero_copy_only=False), return_index=True)
    once = np.zeros(len(keys), np.bool_)
    once[first] = True
    index = pa.array(np.flatnonzero(gone & once))
    if not len(index):
        return None
    columns = [pa.nulls(len(index), column.type) for column in rows.columns]
    for i, (typed, _) in zip(indexes, cast_keys, strict=True):
        columns[i] = typed.take(index)
    return columns, raw.take(index) if raw is not None else None, len(index)


def _fills(
    schema: TableSchema,
    rows: RowsRead,
    window: Sequence[Batch],
    chunk_keys: pa.Array,
    new: list[pa.Array],
    old: list[pa.Array],
    bases: np.ndarray,
) -> Fills | None:
    """Replay the window over the chunk's rows; what then still comes from a chunk's row is what is unknown."""
    keys = pa.chunked_array(new, type=pa.string()).combine_chunks()
    before = pa.chunked_array(old, type=pa.string()).combine_chunks()
    moved = pc.if_else(pc.equal(keys, before), pa.scalar(None, pa.string()), before)
    ops = pa.chunked_array([b.system("_op") for b in window]).combine_chunks()
    kind = np.where(pc.equal(ops, "d").to_numpy(zero_copy_only=False), CLEAR, SET)
    patterns, pattern = _patterns(schema, window)
    orders = Orders(*(np.concatenate([_ints(b, name) for b in window]) for name in ("_epoch", "_lsn", "_seq")))
    oldest = np.full(len(bases), -1, np.int64)
    reduced = reduce(
        Events(keys, kind, orders, pattern, moved),
        Targets(chunk_keys.take(pa.array(bases)), Orders(oldest, oldest, oldest)),
        patterns,
    )
    return _collect(schema, rows, window, bases, reduced, len(kind))


def _patterns(schema: TableSchema, window: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Which columns each event carries: distinct patterns (the first: all), and the pattern of each event."""
    names = [c.name for c in schema.columns]
    known: dict[tuple[str, ...], int] = {(): 0}
    pattern: list[int] = []
    for batch in window:
        for unchanged in batch.system("_unchanged").to_pylist():
            pattern.append(known.setdefault(tuple(unchanged or ()), len(known)))
    matrix = np.full((len(known), len(names)), KNOWN, np.int8)
    for unchanged, number in known.items():
        matrix[number, [names.index(n) for n in unchanged]] = UNCHANGED
    return matrix, np.array(pattern, np.int64)


def _collect(
    schema: TableSchema, rows: RowsRead, window: Sequence[Batch], bases: np.ndarray, reduced: Reduced, events: int
) -> Fills | None:
    """Rows are few here (an update that left a TOAST value alone while its chunk was read), so they go one by one."""
    starts = np.cumsum([0, *(b.data.num_rows for b in window)])
    names = [c.name for c in schema.columns]
    parts: list[list[pa.Array]] = [[] for _ in names]
    raws: list[list[tuple[str, str]] | None] = []
    unchanged: list[list[str]] = []
    for place, event in enumerate(reduced.upserts):
        from_chunk = {
            column: int(bases[source[place] - events])
            for column, source in reduced.sources.items()
            if source[place] >= events
        }
        if not from_chunk:
            continue
        at = int(np.searchsorted(starts, event, side="right")) - 1
        batch, row = window[at], int(event - starts[at])
        raw = dict(batch.system("_raw")[row].as_py() or [])
        kept = {n: v for n, v in raw.items() if n in schema.key}
        for i, name in enumerate(names):
            if i in from_chunk:
                parts[i].append(rows.columns[i].slice(from_chunk[i], 1))
                values = dict(rows.raw[from_chunk[i]].as_py() or []) if rows.raw is not None else {}
                kept.update({n: v for n, v in values.items() if n == name})
            elif name in schema.key:
                parts[i].append(batch.column(name).slice(row, 1))
            else:
                parts[i].append(pa.nulls(1, rows.columns[i].type))
        raws.append(sorted(kept.items()) or None)
        unchanged.append([n for i, n in enumerate(names) if i not in from_chunk and n not in schema.key])
    if not raws:
        return None
    return Fills(
        columns=[pa.concat_arrays(p) for p in parts],
        raw=pa.array(raws, RAW_TYPE) if any(raws) else None,
        unchanged=pa.array(unchanged, pa.list_(pa.string())),
        rows=len(raws),
    )


def _ints(batch: Batch, name: str) -> np.ndarray:
    return np.asarray(batch.system(name).to_numpy(zero_copy_only=False))


def read_batch(
    schema: TableSchema, columns: Sequence[pa.Array], raw: pa.Array | None, stamp: Stamp, rows: int
) -> Batch:
    """An `r` batch of whole rows."""
    return _batch(schema, "r", list(columns), raw, None, stamp, rows)


def fill_batch(schema: TableSchema, fills: Fills, stamp: Stamp) -> Batch:
    """An `r` batch of rows that carry only some columns."""
    return _batch(schema, "r", fills.columns, fills.raw, fills.unchanged, stamp, fills.rows)


def absent_batch(schema: TableSchema, columns: list[pa.Array], raw: pa.Array | None, stamp: Stamp, rows: int) -> Batch:
    """A `d` batch of keys that a filtered run found absent; `_run` tells them from deletes of the stream."""
    return _batch(schema, "d", columns, raw, None, stamp, rows)


def control_batch(schema: TableSchema, facts: dict[str, str], stamp: Stamp) -> Batch:
    """An `s` row: begin or end of a run, `facts` in its `_raw`."""
    empty = [pa.nulls(1, f.type) for f in batch_schema(schema, ())][5:]
    return _batch(schema, "s", empty, pa.array([list(facts.items())], RAW_TYPE), None, stamp, 1)


def _batch(
    schema: TableSchema,
    op: str,
    columns: list[pa.Array],
    raw: pa.Array | None,
    unchanged: pa.Array | None,
    stamp: Stamp,
    rows: int,
) -> Batch:
    def constant(value: int) -> pa.Array:
        return pa.array(np.full(rows, value, np.int64))

    arrays: list[pa.Array] = [
        pa.repeat(op, rows),
        constant(stamp.epoch),
        constant(stamp.lsn),
        pa.array(np.arange(stamp.seq, stamp.seq + rows, dtype=np.int64)),
        constant(0),
        pa.repeat(stamp.run, rows),
        constant(stamp.at_us).cast(TIMESTAMP_TYPE),
    ]
    optional = ["_run", "_committed_at"]
    if unchanged is not None:
        optional.append("_unchanged")
        arrays.append(unchanged)
    if raw is not None:
        optional.append("_raw")
        arrays.append(raw)
    arrow = batch_schema(schema, tuple(optional))
    return Batch(schema, pa.RecordBatch.from_arrays([*arrays, *columns], schema=arrow))
