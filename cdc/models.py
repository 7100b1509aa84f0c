"""SQL models: one SELECT over the lake's tables, and its result frozen as Parquet before anyone acts on it.

Guarantees: a model reads every input at the versions that it is given (one recorded cut), and nothing else on this
machine or its network; its result stands complete under its name or not at all; memory is bounded by the limit, rows
are streamed. NULL and duplicate keys are counted, not refused: whoever pushes the result holds those rows back.
Which model runs when is not decided here.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from cdc.errors import ModelFailed, StoreUnavailable
from cdc.fresh import UNKNOWN
from cdc.instant import Known, NoInstant
from cdc.lake.commits import HistoryGone
from cdc.metrics import MODEL_SECONDS
from cdc.ports import ObjectStore
from cdc.relations import (
    CHANGELOG_SUFFIX,
    MEMORY_LIMIT,
    THREADS,
    Relation,
    Sources,
    Versions,
    failure,
    first_line,
    named_relations,
    open_files,
    open_views,
    resolve,
)
from cdc.sqltext import literal, quoted
from cdc.table import TableId

if TYPE_CHECKING:
    import duckdb

TIMEOUT_S = 600.0
ROWS_MAX = 100_000
"""Rows that `query` gives back at most, unless told otherwise."""
_BATCH_ROWS = 64 * 1024
_ATTEMPTS = 4
"""How often a query begins, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelResult:
    """A result, frozen in `path`. `null_keys` and `duplicate_keys` count rows that cannot be told apart by the key."""

    path: Path
    schema: pa.Schema
    rows: int
    null_keys: int
    duplicate_keys: int
    inputs: frozenset[tuple[str, TableId]]
    seconds: float

    @property
    def held(self) -> int:
        return self.null_keys + self.duplicate_keys


def input_tables(sql: str, sources: Sources | None = None) -> set[tuple[str, TableId]]:
    """(source, table) of every table that the SELECT reads, by its current rows or its changelog. Runs nothing.

    Without `sources`, names are taken as they are written. With them, they become the tables as they are spelled at
    the source, and ModelFailed names those that do not exist. ModelFailed also if it is not exactly one SELECT.
    """
    names = named_relations(sql)
    if sources is None:
        return {(source, _as_written(name)) for source, name in names}
    relations, unknown = resolve(names, sources)
    if unknown:
        raise _unknown(unknown, sources)
    return {(r.source, r.table) for r in relations}


@contextmanager
def connect_lake(
    store: ObjectStore,
    sources: Sources,
    cut: Versions | None = None,
    memory_limit: str = MEMORY_LIMIT,
    *,
    temp_dir: Path | None = None,
    threads: int = THREADS,
    changelogs: bool = True,
) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB over all of these tables (and their changelogs), at the versions of `cut` or the newest.

    Costs a read of every table's log and footers: `query` and `run_model` open only what their SQL names. The
    connection is for one thread; it is closed on exit. It refuses files, network, extensions and settings.
    """
    relations = [Relation(source, table) for source, tables in sources.items() for table in tables]
    if changelogs:
        relations += [Relation(r.source, r.table, changelog=True) for r in relations]
    with open_views(store, relations, cut, temp_dir=temp_dir, memory_limit=memory_limit, threads=threads) as connection:
        yield connection


def query(
    store: ObjectStore,
    sources: Sources,
    sql: str,
    *,
    cut: Versions | None = None,
    fresh: Known | None = None,
    note: Callable[[str], None] = lambda _: None,
    temp_dir: Path | None = None,
    memory_limit: str = MEMORY_LIMIT,
    threads: int = THREADS,
    rows_max: int = ROWS_MAX,
    timeout_s: float = TIMEOUT_S,
) -> pa.Table:
    """Result of one SELECT over the lake, cut off after `rows_max` rows. For operators: errors may quote values.

    `fresh`: with the changes that have landed and are not merged, as `open_views` shows them, and `cut` is for where
    that fails; `note` takes a sentence for each table that cannot be shown so. Begins again, a few times, where a merge
    and a vacuum took objects away; without the cut where its own are gone.
    """
    relations, unknown = resolve(named_relations(sql), sources)
    known = {source.lower() for source in sources}
    if missing := {name for name in unknown if name[0].lower() in known}:
        raise _unknown(missing, sources)
    for attempt in range(_ATTEMPTS):
        notes: list[str] = []
        paths: set[str] = set()
        try:
            with open_views(
                store, relations, cut, fresh=fresh, note=notes.append, paths=paths,
                temp_dir=temp_dir, memory_limit=memory_limit, threads=threads,
            ) as connection:  # fmt: skip
                found = _run_query(connection, paths, sql, rows_max, timeout_s)
        except _NotKnown:
            fresh = None
            note(f"every table is shown as it is merged: {UNKNOWN.removeprefix('cdc: ')}")
        except NoInstant:
            raise
        except (StoreUnavailable, HistoryGone):
            if attempt + 1 == _ATTEMPTS:
                raise
            if fresh is None and attempt and any((cut or {}).values()):
                cut = None
                note("the recorded cut is not there any more: every table is shown as it was merged last")
        else:
            for text in notes:
                note(text)
            return found
    raise StoreUnavailable("objects of the lake go away while they are read", hint="raise lake.vacuum_after_s")


class _NotKnown(Exception):
    """The fresh view needs a value that is nowhere."""


def _run_query(
    connection: duckdb.DuckDBPyConnection, paths: Collection[str], sql: str, rows_max: int, timeout_s: float
) -> pa.Table:
    import duckdb

    try:
        with _bounded(connection, timeout_s):
            # The relation of a DESCRIBE or SHOW cannot be limited; of a SELECT it is, before it is computed.
            reader = connection.sql(sql).to_arrow_reader(_BATCH_ROWS)
            return _first_rows(reader, rows_max)
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        # What happens while rows are handed over comes as Arrow's error, with DuckDB's text.
        text = str(error)
        if UNKNOWN in text:
            raise _NotKnown from error
        # A path that is not there is looked for as a pattern, which the wall forbids.
        if ("IO Error" in text or ("Permission Error" in text and "/**/" in text)) and any(p in text for p in paths):
            raise StoreUnavailable(
                "an object of the lake cannot be read", hint="a vacuum may have come between; ask again"
            ) from error
        if "IO Error" in text:
            raise ModelFailed(
                f"the query cannot use its temporary files: {first_line(error)}",
                hint=f"make room in {tempfile.gettempdir()} (TMPDIR names another place), or aggregate earlier",
            ) from error
        raise ModelFailed(first_line(error)) from error


def run_model(
    store: ObjectStore,
    sources: Sources,
    sql: str,
    key: Sequence[str],
    path: Path,
    *,
    name: str = "",
    cut: Versions | None = None,
    temp_dir: Path | None = None,
    memory_limit: str = MEMORY_LIMIT,
    threads: int = THREADS,
    timeout_s: float = TIMEOUT_S,
) -> ModelResult:
    """Run one SELECT over `sources` at `cut` and freeze its result as the Parquet file `path` (replaced, atomically).

    Blocks for the query, at most `timeout_s`. ModelFailed if the SQL is wrong, its result lacks a key column or has a
    type that Parquet cannot hold; StoreUnavailable if an object cannot be read now.
    """
    import duckdb

    started = time.monotonic()
    relations, unknown = resolve(named_relations(sql), sources)
    if unknown:
        raise _unknown(unknown, sources)
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        options = {"temp_dir": temp_dir or path.parent, "memory_limit": memory_limit, "threads": threads}
        with open_views(store, relations, cut, **options) as connection, _bounded(connection, timeout_s):  # type: ignore[arg-type]
            rows, schema = _freeze(connection, sql, key, partial)
        partial.replace(path)
        null_keys, duplicate_keys = _key_faults(path, key, memory_limit, threads, temp_dir or path.parent)
    except duckdb.Error as error:
        raise failure(error) from error
    finally:
        partial.unlink(missing_ok=True)
    seconds = time.monotonic() - started
    if name:
        MODEL_SECONDS.labels(name).observe(seconds)
    return ModelResult(
        path=path,
        schema=schema,
        rows=rows,
        null_keys=null_keys,
        duplicate_keys=duplicate_keys,
        inputs=frozenset((r.source, r.table) for r in relations),
        seconds=seconds,
    )


def _freeze(connection: duckdb.DuckDBPyConnection, sql: str, key: Sequence[str], path: Path) -> tuple[int, pa.Schema]:
    """Stream the result into a Parquet file."""
    reader = connection.sql(sql).to_arrow_reader(_BATCH_ROWS)
    schema = pa.schema([_plain(field) for field in reader.schema])
    missing = [column for column in key if column not in schema.names]
    if missing:
        raise ModelFailed(
            f"the result has no column {', '.join(missing)}, which the key names",
            hint=f"its columns: {', '.join(schema.names)}",
        )
    repeated = sorted({n for n in schema.names if [m.lower() for m in schema.names].count(n.lower()) > 1})
    if repeated:
        raise ModelFailed(f"the result has several columns {', '.join(repeated)}", hint="give each its own name")
    rows = 0
    with path.open("wb") as file:
        try:
            with pq.ParquetWriter(file, schema, compression="zstd", compression_level=1) as writer:
                for batch in reader:
                    rows += batch.num_rows
                    writer.write_batch(batch.cast(schema))
        except pa.ArrowNotImplementedError as error:
            raise ModelFailed(f"the result has a type that cannot be kept ({error})", hint="cast it") from error
        file.flush()
        os.fsync(file.fileno())
    return rows, schema


def _plain(field: pa.Field) -> pa.Field:
    """Dictionaries (enums) as their values, so that a result reads the same everywhere."""
    if pa.types.is_dictionary(field.type):
        return field.with_type(field.type.value_type)
    if pa.types.is_interval(field.type):
        raise ModelFailed(f"column {field.name} is an interval, which cannot be kept", hint="cast it to varchar")
    return field


def _key_faults(path: Path, key: Sequence[str], memory_limit: str, threads: int, temp_dir: Path) -> tuple[int, int]:
    """Rows whose key is NULL in part, and rows that share their key with another."""
    names = ", ".join(map(quoted, key))
    complete = " AND ".join(f"{quoted(column)} IS NOT NULL" for column in key)
    with frozen(path, memory_limit=memory_limit, threads=threads, temp_dir=temp_dir) as (connection, relation):
        row = connection.execute(
            f"SELECT coalesce(sum(n) FILTER (NOT whole), 0)::BIGINT, "
            f"coalesce(sum(n) FILTER (whole AND n > 1), 0)::BIGINT "
            f"FROM (SELECT {complete} AS whole, count(*) AS n FROM {relation} GROUP BY whole, {names})"
        ).fetchone()
    return (int(row[0]), int(row[1])) if row else (0, 0)


@contextmanager
def frozen(
    *paths: Path, memory_limit: str = MEMORY_LIMIT, threads: int = THREADS, temp_dir: Path | None = None
) -> Iterator[tuple[duckdb.DuckDBPyConnection, str]]:
    """DuckDB over frozen results and nothing else: the connection, and the first one as an item of FROM (it has the
    column `file_row_number`)."""
    with open_files([str(p.absolute()) for p in paths], temp_dir, memory_limit, threads) as connection:
        yield connection, f"read_parquet({literal(str(paths[0].absolute()))}, file_row_number = true)"


@contextmanager
def _bounded(connection: duckdb.DuckDBPyConnection, timeout_s: float) -> Iterator[None]:
    """Interrupt what runs on the connection after `timeout_s`."""
    import duckdb

    expired = threading.Event()

    def interrupt() -> None:
        expired.set()
        connection.interrupt()

    timer = threading.Timer(timeout_s, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except duckdb.InterruptException as error:
        if expired.is_set():
            raise ModelFailed(f"the query took longer than {timeout_s:g} s", hint="make it cheaper") from error
        raise
    finally:
        timer.cancel()


def _first_rows(reader: pa.RecordBatchReader, rows_max: int) -> pa.Table:
    batches, rows = [], 0
    for batch in reader:
        batches.append(batch.slice(0, rows_max - rows))
        rows += batches[-1].num_rows
        if rows >= rows_max:
            break
    return pa.Table.from_batches(batches, reader.schema)


def _as_written(name: str) -> TableId:
    schema, dot, rest = name.partition(".")
    return TableId(schema, rest) if dot else TableId("public", name)


def _unknown(names: set[tuple[str, str]], sources: Sources) -> ModelFailed:
    asked = ", ".join(sorted(f"{schema}.{name}" for schema, name in names))
    known = sorted(str(Relation(source, table)) for source, tables in sources.items() for table in tables)
    listed = ", ".join(known[:20]) + (", …" if len(known) > 20 else "") if known else "none yet"
    return ModelFailed(f"there is no table {asked} in the lake", hint=f"tables: {listed}")


__all__ = [
    "CHANGELOG_SUFFIX",
    "ModelResult",
    "Sources",
    "Versions",
    "connect_lake",
    "input_tables",
    "query",
    "run_model",
]
