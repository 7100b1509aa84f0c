"""What the lake shows of a table at one version: its rows, and the changes in them that a snapshot does not see.

For `verify`. The version is pinned: `current` as it is when `pin` is called, and the changelog as far as that has
merged it, so what is counted twice is the same both times. Columns come under the source's names, in the order of its
schema, of the types that it wants where the lake's can be cast to them. Reads only; compares nothing. Memory is bounded
by a slice of a file, and by the keys that `unseen_keys` may return.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdc.errors import CdcError
from cdc.keys import BEFORE, key_of
from cdc.lake.bucket import slice_rows
from cdc.lake.current import MERGED
from cdc.lake.delta import DeltaLog
from cdc.lake.layout import changelog_path, current_path, system_name, system_prefix
from cdc.lake.widening import SOURCE_NAME, widens
from cdc.ports import ObjectStore, Visibility
from cdc.table import TableId, TableSchema
from cdc.types import arrow_fields, pg_text


class Unclear(CdcError):
    """What a snapshot does not see has truncated the table, changed its key, or changed too many rows."""


class Rows(NamedTuple):
    """Some rows: typed columns in the order of the schema, and what `_raw` holds beside them, under `names`."""

    columns: list[pa.Array]
    raw: pa.Array | None
    rows: int
    prefix: str = ""


class LakeRows:
    """One table. `held`: what the lake calls the columns of `schema`, where it is another name; `prefix`: what its
    system columns begin with."""

    def __init__(
        self,
        store: ObjectStore,
        source: str,
        table: TableId,
        schema: TableSchema,
        *,
        held: Mapping[str, str] | None = None,
        prefix: str | None = None,
    ) -> None:
        self._schema = schema
        self.names = [(held or {}).get(c.name, c.name) for c in schema.columns]
        self.key = [(held or {}).get(k, k) for k in schema.key]
        self._fields = arrow_fields(schema)
        self._prefix = prefix if prefix is not None else system_prefix(self.names)
        self._current = DeltaLog(store, current_path(source, table))
        self._changes = DeltaLog(store, changelog_path(source, table))
        self._where = f"table {table}"
        self.runs_from_us: int | None = None
        """Where changes have no transaction ids, because periodic runs found them: when the snapshot began, by the
        clock that runs are dated by. Then all that came later is unseen."""

    def pin(self) -> int:
        """From here on, everything is of the newest version; how many rows that has. CdcError if there is no `current`
        yet."""
        if not self._current.exists():
            raise CdcError(
                f"{self._where} has no current table yet", hint="its first snapshot has not ended: see `cdc status`"
            )
        self._current.refresh()
        return sum(live.rows for live in self._current.files())

    def current(self, keys: pa.Array | None = None) -> Iterator[Rows]:
        """The rows, slice by slice; with `keys` (canonical), those of them, where only the groups that have one are
        read whole."""
        for live in self._current.files():
            with self._current.open_file(live.path) as file:
                present = set(file.schema_arrow.names)
                raw = self._system("_raw")
                wanted = [n for n in [*self.names, raw] if n in present]
                groups = list(range(file.metadata.num_row_groups))
                if keys is not None:
                    groups = [g for g in groups if pc.any(pc.is_in(self._keys_of(file, g), value_set=keys)).as_py()]
                if not groups:
                    continue
                for read in file.iter_batches(slice_rows(file.metadata), row_groups=groups, columns=wanted):
                    batch = _plain(read)
                    if keys is not None:
                        batch = batch.filter(pc.is_in(self._canonical(batch), value_set=keys))
                    raws = batch.column(raw) if raw in present else None
                    yield Rows(self._columns(batch, present), raws, batch.num_rows)

    def _keys_of(self, file: pq.ParquetFile, group: int) -> pa.Array:
        raw = self._system("_raw")
        wanted = [n for n in [*self.key, raw] if n in file.schema_arrow.names]
        (batch,) = file.read_row_group(group, columns=wanted).combine_chunks().to_batches() or [None]
        return pa.array([], pa.string()) if batch is None else self._canonical(_plain(batch))

    def _canonical(self, batch: pa.RecordBatch) -> pa.Array:
        raw = self._system("_raw")
        raws = batch.column(raw) if raw in batch.schema.names else None
        kinds = [self._fields[self.names.index(k)].type for k in self.key]
        return key_of([_typed(batch.column(k), t) for k, t in zip(self.key, kinds, strict=True)], raws, self.key)

    def unseen_keys(self, visibility: Visibility, keys_max: int) -> dict[str, tuple[str, ...]]:
        """Keys that transactions outside a snapshot have changed, both keys of a key change: canonical → texts. Unclear
        if that cannot be told, or they are more than `keys_max`."""
        before, raw, op = self._system("_before"), self._system("_raw"), self._system("_op")
        found: dict[str, tuple[str, ...]] = {}
        for table in self._unseen(visibility, [*self.key, before, raw]):
            if pc.any(pc.equal(table.column(op), "t")).as_py():
                # It has no keys to leave out: what the snapshot has and the lake has not is all of its table.
                raise Unclear(f"{self._where} was truncated")
            if len(found) + table.num_rows > keys_max:
                raise Unclear(f"more than {keys_max} rows of {self._where} changed")
            for batch in table.to_batches():
                raws = batch.column(raw) if raw in batch.schema.names else None
                if not set(self.key) <= set(batch.schema.names):
                    raise Unclear(f"the key of {self._where} changed")
                self._note(found, [batch.column(k) for k in self.key], raws, "")
                if before in batch.schema.names:
                    old = batch.column(before)
                    if set(self.key) <= {f.name for f in old.type}:
                        self._note(found, [pc.struct_field(old, k) for k in self.key], raws, BEFORE)
        return found

    def unseen_rows(self, visibility: Visibility, changes: Mapping[str, bool]) -> Iterator[Rows]:
        """Rows of the changes that a snapshot does not see, by operation (True: their old tuples)."""
        op, before, raw = (self._system(n) for n in ("_op", "_before", "_raw"))
        if self.runs_from_us is not None:
            if any(True for _ in self._unseen(visibility, [])):
                # What was changed before the snapshot and what behind it is one change: nothing can be undone.
                raise Unclear(f"{self._where} was read by a run")
            return
        for table in self._unseen(visibility, [*self.names, before, raw]):
            if pc.any(pc.equal(table.column(op), "t")).as_py():
                raise Unclear(f"{self._where} was truncated")
            for wanted, old in changes.items():
                rows = table.filter(pc.equal(table.column(op), wanted)).combine_chunks()
                if not rows.num_rows:
                    continue
                held = pa.Table.from_struct_array(rows.column(before)) if old else rows
                (batch,) = held.combine_chunks().to_batches() or [None]
                columns = self._columns(batch, set(held.column_names))
                yield Rows(columns, rows.column(raw).combine_chunks(), rows.num_rows, BEFORE if old else "")

    def _columns(self, batch: pa.RecordBatch, present: set[str]) -> list[pa.Array]:
        return [
            _typed(batch.column(name), field.type) if name in present else pa.nulls(batch.num_rows, field.type)
            for name, field in zip(self.names, self._fields, strict=True)
        ]

    def _unseen(self, visibility: Visibility, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Rows of the changelog whose transactions the snapshot does not see, up to what `current` has merged. Files
        are passed over by statistics."""
        xid, op, at, later = self._system("_xid"), self._system("_op"), self._system("_committed_at"), self.runs_from_us
        merged = self._current.token(MERGED) if self._current.exists() else None
        if merged is not None and self._changes.exists() and merged > self._changes.version():
            self._changes.refresh()
        for live in self._changes.files(merged):
            with self._changes.open_file(live.path) as file:
                # A column whose type has changed has a name of its own there.
                held = {
                    (f.metadata or {}).get(SOURCE_NAME, f.name.encode()).decode(): f.name for f in file.schema_arrow
                }
                known = {held[c]: c for c in (xid, op, *([at] if later is not None else []), *columns) if c in held}
                index = file.schema_arrow.get_field_index(xid)
                for group in range(file.metadata.num_row_groups):
                    statistics = file.metadata.row_group(group).column(index).statistics
                    bounded = later is None and statistics is not None and statistics.has_min_max
                    if bounded and _all_seen(statistics, visibility):
                        continue
                    table = file.read_row_group(group, columns=list(known))
                    table = table.rename_columns([known[name] for name in table.column_names])
                    xids = table.column(xid).to_numpy()
                    mask = ~visibility.sees(xids.astype(np.uint32)) & (xids != 0)
                    if later is not None:
                        mask = table.column(at).cast(pa.int64()).to_numpy() >= later
                    if mask.any():
                        yield table.filter(pa.array(mask))

    def _note(
        self, found: dict[str, tuple[str, ...]], arrays: list[pa.Array], raw: pa.Array | None, prefix: str
    ) -> None:
        columns = [self._schema.column(k) for k in self._schema.key]
        canonical = key_of(arrays, raw, self.key, prefix=prefix).to_pylist()
        texts = [pg_text(a, c).to_pylist() for a, c in zip(arrays, columns, strict=True)]
        raws = raw.to_pylist() if raw is not None else [None] * len(canonical)
        for i, name in enumerate(canonical):
            if name is not None:
                kept = dict(raws[i] or ())
                found[name] = tuple(
                    str(t[i] if t[i] is not None else kept.get(prefix + k))
                    for t, k in zip(texts, self.key, strict=True)
                )

    def _system(self, name: str) -> str:
        return system_name(name, self._prefix)


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows with strings and bytes in the layout that we compute with, whoever wrote the file."""
    kinds = [_plain_type(f.type) for f in batch.schema]
    if kinds == batch.schema.types:
        return batch
    columns = [c if c.type == kind else c.cast(kind) for c, kind in zip(batch.columns, kinds, strict=True)]
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_binary_view(kind) or pa.types.is_large_binary(kind):
        return pa.binary()
    if pa.types.is_map(kind):
        return pa.map_(_plain_type(kind.key_type), _plain_type(kind.item_type))
    if pa.types.is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    return kind


def _typed(array: Any, kind: pa.DataType) -> pa.Array:
    """The column as its source's type has it, where that is as wide as the lake's; else as the lake has it."""
    if array.type == kind or not widens(array.type, kind):
        return array
    try:
        return pc.cast(array, kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return array


def _all_seen(statistics: pq.Statistics, visibility: Visibility) -> bool:
    """Whether the snapshot sees every transaction between the smallest and the largest of a row group."""
    if statistics.min <= 0 or not visibility.sees(np.array([statistics.min, statistics.max], np.uint32)).all():
        return False
    return not any(statistics.min <= xid & 0xFFFFFFFF <= statistics.max for xid in visibility.in_progress)
