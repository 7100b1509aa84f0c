"""Verify: source and `current`, compared cell by cell at one position.

A snapshot S of the table is taken under the same rules as any other; then the lake is awaited up to a position read
after S. What transactions that S does not see have changed by then is left out (by transaction id, not by position) and
compared in a round of its own; what remains after the last round is reported as not compared, never as equal. Rows
go to temporary Parquet files and are joined there by DuckDB under a memory limit, so size does not matter.

Runs in the operator's process, changes nothing, and shows keys only: values never leave the temporary files unless
asked.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdc.errors import CdcError, SourceRefused
from cdc.keys import key_of
from cdc.lake.bucket import slice_rows
from cdc.lake.delta import DeltaLog
from cdc.lake.layout import changelog_path, current_path, system_name, system_prefix
from cdc.lake.widening import SOURCE_NAME
from cdc.ports import ObjectStore, RowsRead, SnapshotReader, Visibility
from cdc.table import TableId, TableSchema
from cdc.types import arrow_fields, pg_text

KEY = "__cdc_key"
RAW = "__cdc_raw"
ROUNDS = 6
ROUND_KEYS = 20_000
"""Keys that one later round compares; they are named one by one in its query."""
LONG = 256
"""A longer text is compared by its digest."""
SHOWN = 1000
"""Keys listed per kind of difference; all are counted."""
MEMORY = "256MB"

Await = Callable[[TableId, int], int]
"""Blocks until `current` of a table holds everything up to a position; the position that it holds then."""


@dataclass(slots=True)
class TableReport:
    """What was found in one table. Key lists are cut at SHOWN; counts are not. `values` only on request."""

    source: str
    table: TableId
    rows: int = 0
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"missing": 0, "extra": 0, "different": 0})
    columns: dict[str, int] = field(default_factory=dict)
    not_compared: int = 0
    error: str = ""
    hint: str = ""
    values: list[dict[str, Any]] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.error and not any(self.counts.values()) and not self.not_compared


def verify_table(
    source: str,
    table: TableId,
    reader: SnapshotReader,
    store: ObjectStore,
    await_lake: Await,
    *,
    temp_dir: Path,
    chunk_rows: int = 100_000,
    show_values: bool = False,
) -> TableReport:
    """Compare one table. Blocks for as long as reading and waiting take; errors end in the report, not in a raise."""
    import duckdb

    report = TableReport(source, table)
    with tempfile.TemporaryDirectory(prefix="verify-", dir=temp_dir) as folder:
        try:
            schema = next((t.schema for t in reader.tables(table).tables), None)
            if schema is None:
                raise SourceRefused(f"table {table} is not published by source {source}", hint="cdc setup")
            comparison = _Comparison(report, reader, store, await_lake, Path(folder), schema, chunk_rows, show_values)
            comparison.run()
        except CdcError as e:
            report.error, report.hint = str(e.args[0]), e.hint
        except duckdb.Error as e:
            # Its text may quote values.
            report.error = f"table {table} could not be compared: {type(e).__name__}"
            report.hint = "verify it without --show-values: long values are compared by digests then"
        finally:
            reader.end()
    return report


class _Void(Exception):
    """A transaction that the snapshot does not see has truncated the table or changed its key: the round is void."""


class _Comparison:
    """One table's rounds."""

    def __init__(
        self,
        report: TableReport,
        reader: SnapshotReader,
        store: ObjectStore,
        await_lake: Await,
        folder: Path,
        schema: TableSchema,
        chunk_rows: int,
        show_values: bool,
    ) -> None:
        self._report = report
        self._reader = reader
        self._store = store
        self._await = await_lake
        self._folder = folder
        self._schema = schema
        self._chunk_rows = chunk_rows
        self._show_values = show_values
        self._prefix = system_prefix(c.name for c in schema.columns)
        self._runs_from_us: int | None = None
        """Where changes have no transaction ids: when the snapshot began, by the clock that runs are dated by."""

    def run(self) -> None:
        left_out: dict[str, tuple[str, ...]] | None = None
        for number in range(ROUNDS):
            try:
                left_out = self._round(number, left_out)
            except _Void:
                continue
            if not left_out or len(left_out) > ROUND_KEYS:
                break
        if left_out is None:
            raise CdcError(
                f"table {self._report.table} was truncated or altered in each of {ROUNDS} rounds: nothing could be"
                " compared",
                hint="verify it again when it is at rest",
            )
        self._report.not_compared = len(left_out)

    def _round(self, number: int, keys: dict[str, tuple[str, ...]] | None) -> dict[str, tuple[str, ...]]:
        """Compare all rows, or those of `keys` (canonical → texts); the keys that this round could not compare."""
        snapshot = self._reader.begin(self._schema)
        self._schema = snapshot.schema
        self._runs_from_us = snapshot.taken_at_us if snapshot.by_runs else None
        theirs = self._folder / f"source-{number}.parquet"
        ours = self._folder / f"lake-{number}.parquet"
        rows = self._write(theirs, self._read_source(None if keys is None else list(keys.values())))
        self._reader.end()
        self._await(self._report.table, snapshot.lsn)
        current = DeltaLog(self._store, current_path(self._report.source, self._report.table))
        if not current.exists():
            raise CdcError(
                f"table {self._report.table} has no current table yet",
                hint="its first snapshot has not ended: see `cdc status`",
            )
        unseen = self._unseen(snapshot.visibility)
        wanted = None if keys is None else pa.array(list(keys), pa.string())
        self._write(ours, self._read_current(current, wanted))
        if keys is None:
            self._report.rows = rows
        if self._schema.key:
            self._compare(theirs, ours, pa.array(list(unseen), pa.string()))
            return unseen if keys is None else {k: t for k, t in unseen.items() if k in keys}
        if snapshot.by_runs and any(True for _ in self._changelog(snapshot.visibility, [])):
            # What was changed before the snapshot and what behind it is one change: nothing can be undone.
            raise _Void
        self._compare_multisets(theirs, ours, snapshot.visibility)
        return {}

    def _changelog(self, visibility: Visibility, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Rows of the changelog whose transactions the snapshot does not see. Files are passed over by statistics."""
        changelog = DeltaLog(self._store, changelog_path(self._report.source, self._report.table))
        xid, op = system_name("_xid", self._prefix), system_name("_op", self._prefix)
        later, at = self._runs_from_us, system_name("_committed_at", self._prefix)
        for live in changelog.files():
            with changelog.open_file(live.path) as file:
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

    def _unseen(self, visibility: Visibility) -> dict[str, tuple[str, ...]]:
        """Keys that transactions outside the snapshot have changed, both keys of a key change: canonical → texts."""
        key = self._schema.key
        before, raw, op = (system_name(n, self._prefix) for n in ("_before", "_raw", "_op"))
        found: dict[str, tuple[str, ...]] = {}
        for table in self._changelog(visibility, [*key, before, raw]):
            if pc.any(pc.equal(table.column(op), "t")).as_py():
                # It has no keys to leave out: what the snapshot has and the lake has not is all of its table.
                raise _Void
            for batch in table.to_batches():
                raws = batch.column(raw) if raw in batch.schema.names else None
                if not set(key) <= set(batch.schema.names):
                    raise _Void
                self._note(found, [batch.column(k) for k in key], raws, "")
                if before in batch.schema.names:
                    old = batch.column(before)
                    fields = {f.name for f in old.type}
                    if set(key) <= fields:
                        self._note(found, [pc.struct_field(old, k) for k in key], raws, "before.")
        return found

    def _note(
        self, found: dict[str, tuple[str, ...]], arrays: list[pa.Array], raw: pa.Array | None, prefix: str
    ) -> None:
        key = self._schema.key
        if not key:
            return
        canonical = key_of(arrays, raw, key, prefix=prefix).to_pylist()
        texts = [pg_text(a, self._schema.column(k)).to_pylist() for a, k in zip(arrays, key, strict=True)]
        raws = raw.to_pylist() if raw is not None else [None] * len(canonical)
        for i, name in enumerate(canonical):
            if name is not None:
                kept = dict(raws[i] or ())
                found[name] = tuple(
                    str(t[i] if t[i] is not None else kept.get(prefix + k)) for t, k in zip(texts, key, strict=True)
                )

    def _read_source(self, keys: list[tuple[str, ...]] | None) -> Iterator[pa.Table]:
        after: tuple[str, ...] | None = None
        while True:
            rows = self._reader.read(after=after, keys=keys, rows_max=0 if keys else self._chunk_rows)
            if rows.rows:
                yield self._source_table(rows)
            if rows.done:
                return
            after = rows.last_key

    def _source_table(self, rows: RowsRead) -> pa.Table:
        names = [c.name for c in self._schema.columns]
        arrays = dict(zip(names, rows.columns, strict=True))
        key = self._key_column([arrays[k] for k in self._schema.key], rows.raw, rows.rows)
        return pa.table({KEY: key, RAW: _raw_text(rows.raw, rows.rows, names), **_positional(rows.columns)})

    def _read_current(self, current: DeltaLog, wanted: pa.Array | None) -> Iterator[pa.Table]:
        raw_name = system_name("_raw", self._prefix)
        names = [c.name for c in self._schema.columns]
        lake = {f.name: f.type for f in current.schema()}
        for live in current.files():
            with current.open_file(live.path) as file:
                present = set(file.schema_arrow.names)
                wanted_columns = [n for n in [*names, raw_name] if n in present]
                for batch in file.iter_batches(batch_size=slice_rows(file.metadata), columns=wanted_columns):
                    columns = [
                        batch.column(n) if n in present else pa.nulls(batch.num_rows, lake.get(n, pa.string()))
                        for n in names
                    ]
                    raw = batch.column(raw_name) if raw_name in present else None
                    by_name = dict(zip(names, columns, strict=True))
                    key = self._key_column([by_name[k] for k in self._schema.key], raw, batch.num_rows)
                    table = pa.table({KEY: key, RAW: _raw_text(raw, batch.num_rows, names), **_positional(columns)})
                    if wanted is not None:
                        table = table.filter(pc.is_in(key, value_set=wanted))
                    yield table

    def _key_column(self, arrays: Sequence[pa.Array], raw: pa.Array | None, rows: int) -> pa.Array:
        if not self._schema.key:
            return pa.nulls(rows, pa.string())
        return key_of(list(arrays), raw, self._schema.key)

    def _write(self, path: Path, tables: Iterator[pa.Table]) -> int:
        """Spill to one Parquet file; the rows written. An empty side has the columns too."""
        writer: pq.ParquetWriter | None = None
        rows = 0
        try:
            for table in tables:
                if writer is None:
                    writer = pq.ParquetWriter(path, table.schema, compression="zstd", compression_level=1)
                table = table.cast(writer.schema)
                writer.write_table(table if self._show_values else _digested(table))
                rows += table.num_rows
        finally:
            if writer is not None:
                writer.close()
        return rows

    def _compare(self, theirs: Path, ours: Path, unseen: pa.Array) -> None:
        """Full outer join on the key; differences into the report."""
        if not theirs.exists() and not ours.exists():
            return
        database = self._database(theirs, ours)
        database.register("unseen", pa.table({KEY: unseen}))
        differs = " or ".join(f"t.{c} is distinct from o.{c}" for c in self._columns(theirs, ours)) or "false"
        database.execute(
            f"create temp table found as select coalesce(t.{KEY}, o.{KEY}) as key,"
            f" case when o.{KEY} is null then 'missing' when t.{KEY} is null then 'extra' else 'different' end as kind"
            f" from theirs t full outer join ours o on t.{KEY} = o.{KEY}"
            f" where (t.{KEY} is null or o.{KEY} is null or {differs})"
            f" and coalesce(t.{KEY}, o.{KEY}) not in (select {KEY} from unseen)"
        )
        self._collect(database)
        if self._show_values and any(self._report.counts.values()):
            query = (
                f"select f.kind, f.key, t.* exclude ({KEY}), o.* exclude ({KEY}) from found f"
                f" left join theirs t on t.{KEY} = f.key left join ours o on o.{KEY} = f.key limit {SHOWN}"
            )
            self._report.values += database.execute(query).to_arrow_table().to_pylist()
        self._count_by_column(database)
        database.close()

    def _count_by_column(self, database: Any) -> None:
        if not self._schema.columns or not self._report.counts["different"]:
            return
        counts = ", ".join(
            f"count(*) filter (where t.c{i} is distinct from o.c{i})" for i in range(len(self._schema.columns))
        )
        row = database.execute(
            f"select {counts} from found f join theirs t on t.{KEY} = f.key join ours o on o.{KEY} = f.key"
            " where f.kind = 'different'"
        ).fetchone()
        for column, count in zip(self._schema.columns, row, strict=True):
            if count:
                self._report.columns[column.name] = self._report.columns.get(column.name, 0) + int(count)

    def _compare_multisets(self, theirs: Path, ours: Path, visibility: Visibility) -> None:
        """A table without a key holds rows, equal ones several times; what S does not see is undone on the lake's
        side: what was added later is taken off, what was removed is put back."""
        later, gone = self._folder / "later.parquet", self._folder / "gone.parquet"
        for path, changes in ((later, {"c": False, "u": False}), (gone, {"d": False, "u": True})):
            path.unlink(missing_ok=True)
            self._write(path, self._changed_rows(visibility, changes))
        if not theirs.exists() and not ours.exists():
            return
        database = self._database(theirs, ours)
        columns = ", ".join(self._columns(theirs, ours))
        plus = f" union all select {columns} from read_parquet('{gone}')" if gone.exists() else ""
        minus = f" except all select {columns} from read_parquet('{later}')" if later.exists() else ""
        lake = f"((select {columns} from ours{plus}){minus})"
        for kind, one, other in (
            ("missing", f"select {columns} from theirs", lake),
            ("extra", lake, f"select {columns} from theirs"),
        ):
            row = database.execute(f"select count(*) from ({one} except all {other})").fetchone()
            self._report.counts[kind] += int(row[0]) if row else 0
        database.close()

    def _changed_rows(self, visibility: Visibility, changes: dict[str, bool]) -> Iterator[pa.Table]:
        """Rows of the changes that S does not see, by operation (True: their old tuples)."""
        names = [c.name for c in self._schema.columns]
        fields = arrow_fields(self._schema)
        op, before, raw = (system_name(n, self._prefix) for n in ("_op", "_before", "_raw"))
        for table in self._changelog(visibility, [*names, before, raw]):
            for wanted, old in changes.items():
                rows = table.filter(pc.equal(table.column(op), wanted)).combine_chunks()
                held = pa.Table.from_struct_array(rows.column(before)) if old else rows
                columns = [
                    held.column(f.name).combine_chunks() if f.name in held.column_names else pa.nulls(len(rows), f.type)
                    for f in fields
                ]
                text = _raw_text(rows.column(raw).combine_chunks(), len(rows), names, prefix="before." if old else "")
                yield pa.table({**_positional(columns), RAW: text})

    def _columns(self, theirs: Path, ours: Path) -> list[str]:
        return [*(f"c{i}" for i in range(len(self._schema.columns))), RAW]

    def _database(self, theirs: Path, ours: Path) -> Any:
        import duckdb

        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY,
            "threads": 2,
            "temp_directory": str(self._folder),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
        database = duckdb.connect(":memory:", config=settings)
        for name, path, other in (("theirs", theirs, ours), ("ours", ours, theirs)):
            # A side without rows has no file: it has the other side's columns.
            where = "" if path.exists() else " limit 0"
            database.execute(
                f"create view {name} as select * from read_parquet('{path if not where else other}'){where}"
            )
        return database

    def _collect(self, database: Any) -> None:
        for kind in ("missing", "extra", "different"):
            row = database.execute("select count(*) from found where kind = ?", [kind]).fetchone()
            self._report.counts[kind] += int(row[0])
            shown: list[str] = getattr(self._report, kind)
            keys = database.execute(
                f"select key from found where kind = ? order by key limit {SHOWN - len(shown)}", [kind]
            ).fetchall()
            shown += [k for (k,) in keys]


def _digested(table: pa.Table) -> pa.Table:
    """The rows with long texts and bytes as digests: what is joined must fit into memory, whatever the rows hold."""
    for i, name in enumerate(table.column_names):
        kind = table.schema.field(i).type
        if name == KEY or not (pa.types.is_string(kind) or pa.types.is_binary(kind)):
            continue
        column = table.column(i).combine_chunks()
        mask = pc.fill_null(pc.greater(pc.binary_length(column), LONG), False)
        if pc.any(mask).as_py():
            values = column.cast(pa.binary())
            long = values.filter(mask)
            # No text of Postgres begins with a zero byte, so no value is taken for another's digest.
            digests = [b"\0" + hashlib.sha256(value.as_buffer()).hexdigest().encode() for value in long]
            short = pc.replace_with_mask(values, mask, pa.array(digests, pa.binary()))
            table = table.set_column(i, name, short.cast(kind))
    return table


def _all_seen(statistics: pq.Statistics, visibility: Visibility) -> bool:
    """Whether the snapshot sees every transaction between the smallest and the largest of a row group."""
    if statistics.min <= 0 or not visibility.sees(np.array([statistics.min, statistics.max], np.uint32)).all():
        return False
    return not any(statistics.min <= xid & 0xFFFFFFFF <= statistics.max for xid in visibility.in_progress)


def _positional(columns: Sequence[pa.Array]) -> dict[str, pa.Array]:
    """Columns under names that no source column can clash with."""
    return {f"c{i}": column for i, column in enumerate(columns)}


def _raw_text(raw: pa.Array | None, rows: int, names: Sequence[str], *, prefix: str = "") -> pa.Array:
    """`_raw` as one comparable text per row, only of the columns that the source has (with `prefix`: of old tuples)."""
    if raw is None or raw.null_count == rows:
        return pa.nulls(rows, pa.string())
    kept = {prefix + name: name for name in names}
    texts = []
    for entries in raw.to_pylist():
        known = sorted((kept[k], v) for k, v in entries or () if k in kept)
        texts.append(repr(known) if known else None)
    return pa.array(texts, pa.string())
