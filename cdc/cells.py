"""Two heaps of rows, compared cell by cell: spilled to Parquet files and joined by DuckDB under a memory limit.

So size does not matter. A long value is compared by its digest. Knows neither source nor lake; keys come as canonical
strings, beside the texts by which a server knows them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdc.errors import CdcError
from cdc.keys import bucket_of

T = TypeVar("T")

KEY = "__cdc_key"
TEXTS = "__cdc_texts"
RAW = "__cdc_raw"
KINDS = ("missing", "extra", "different")
LONG = 256
"""A longer text is compared by its digest."""
MEMORY_BYTES = 96 << 20
COLUMNS_AT_ONCE = 64
"""Columns of a join: each takes buffers of its own, whatever the number of rows."""
COLUMN_BYTES = 1 << 20
"""What each further column may add where all are compared at once, as rows without a key are."""
PART_ROWS = 100_000
"""Rows that are joined at once, about: a join's memory is that of its hash table."""
PARTS_MAX = 64
WAITING_ROWS = 1 << 16
"""Rows of all parts that wait to be written in groups."""


@dataclass(slots=True)
class Found:
    """What differs. `keys`: per kind the first canonical keys, and `texts` the same as a server knows them; `counts`
    and `columns` count all. `values` only on request."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    keys: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    texts: list[tuple[str, ...]] = field(default_factory=list)
    columns: dict[str, int] = field(default_factory=dict)
    values: list[dict[str, Any]] = field(default_factory=list)


class Cells:
    """The two sides of one comparison, in files of `folder`. Tables have KEY, TEXTS (a struct; or neither: multisets),
    RAW, and the columns `c0`, `c1`, … under these positions."""

    def __init__(self, folder: Path, names: Sequence[str], *, rows: int = 0, show_values: bool = False) -> None:
        """`rows`: how many are expected on a side; by that, keys are spread over parts that are joined one by one."""
        self._folder = folder
        self._names = names
        self._show_values = show_values
        self._parts = max(1, min(PARTS_MAX, -(-rows // PART_ROWS)))
        self._files: dict[tuple[str, int], Path] = {}

    def write(self, side: str, tables: Iterable[pa.Table]) -> int:
        """Spill one side (`theirs`, `ours`, and of multisets `later`, `gone`); the rows written."""
        writers: dict[int, _Part] = {}
        rows = 0
        schema: pa.Schema | None = None
        try:
            for table in tables:
                schema = schema or table.schema
                table = table.cast(schema)
                rows += table.num_rows
                for part, chosen in self._split(table if self._show_values else _digested(table)):
                    if part not in writers:
                        path = self._files[side, part] = self._folder / f"{side}-{part}.parquet"
                        writers[part] = _Part(path, schema, WAITING_ROWS // self._parts)
                    writers[part].add(chosen)
        finally:
            for writer in writers.values():
                writer.close()
            # What comes next has a memory limit of its own, which knows nothing of what we hold.
            pa.default_memory_pool().release_unused()
        return rows

    def _split(self, table: pa.Table) -> Iterator[tuple[int, pa.Table]]:
        if self._parts == 1 or KEY not in table.column_names:
            yield 0, table
            return
        places = bucket_of(table.column(KEY), self._parts)
        order = np.argsort(places, kind="stable")
        ends = np.searchsorted(places[order], np.arange(self._parts + 1))
        for part in range(self._parts):
            if ends[part] < ends[part + 1]:
                yield part, table.take(pa.array(order[ends[part] : ends[part + 1]]))

    def compare(self, unseen: Iterable[str], *, shown_max: int, texts_max: int) -> Found:
        """Full outer join on the key; keys of `unseen` are left out."""
        found = Found()
        left_out = pa.table({KEY: pa.array(list(unseen), pa.string())})
        for part in range(self._parts):
            if self._has("theirs", part) or self._has("ours", part):
                with self._database(part) as database:
                    database.register("unseen", left_out)
                    self._join(database, found, shown_max, texts_max)
        return found

    def _join(self, database: Any, found: Found, shown_max: int, texts_max: int) -> None:
        kept = f"not in (select {KEY} from unseen)"
        database.execute(
            f"create temp table found as select coalesce(t.{KEY}, o.{KEY}) as key,"
            f" coalesce(t.{TEXTS}, o.{TEXTS}) as texts,"
            f" case when o.{KEY} is null then 'missing' else 'extra' end as kind"
            f" from theirs t full outer join ours o on t.{KEY} = o.{KEY}"
            f" where (t.{KEY} is null or o.{KEY} is null) and coalesce(t.{KEY}, o.{KEY}) {kept}"
            # Of a key that the lake has several times, each may be equal to the one row of the source.
            f" union all select {KEY}, any_value({TEXTS}), 'extra' from ours"
            f" where {KEY} {kept} group by {KEY} having count(*) > 1"
        )
        for columns in pieces(self._columns(), COLUMNS_AT_ONCE):
            differs = " or ".join(f"t.{c} is distinct from o.{c}" for c in columns)
            database.execute(
                f"insert into found select t.{KEY}, any_value(t.{TEXTS}), 'different'"
                f" from theirs t join ours o on t.{KEY} = o.{KEY} where ({differs}) and t.{KEY} {kept}"
                f" and t.{KEY} not in (select key from found where kind = 'different') group by t.{KEY}"
            )
        for kind in KINDS:
            (count,) = database.execute("select count(*) from found where kind = ?", [kind]).fetchone()
            found.counts[kind] += int(count)
            query = f"select key from found where kind = ? order by key limit {shown_max - len(found.keys[kind])}"
            found.keys[kind] += [k for (k,) in database.execute(query, [kind]).fetchall()]
        query = f"select texts from found order by key limit {texts_max - len(found.texts)}"
        found.texts += [tuple(texts.values()) for (texts,) in database.execute(query).fetchall()]
        if self._show_values and len(found.values) < shown_max:
            query = (
                f"select f.kind, f.key, t.* exclude ({KEY}, {TEXTS}), o.* exclude ({KEY}, {TEXTS}) from found f"
                f" left join theirs t on t.{KEY} = f.key left join ours o on o.{KEY} = f.key"
                f" limit {shown_max - len(found.values)}"
            )
            found.values += database.execute(query).to_arrow_table().to_pylist()
        self._count_columns(database, found)

    def compare_multisets(self) -> Found:
        """Rows without a key, equal ones several times. What `ours` has got since (`later`) is taken off, and what it
        has lost (`gone`) put back."""
        found = Found()
        if not self._files:
            return found
        wide = max(0, len(self._names) - COLUMNS_AT_ONCE)
        with self._database(0, MEMORY_BYTES + wide * COLUMN_BYTES) as database:
            columns = ", ".join(self._columns())

            def side(name: str) -> str:
                return f"select {columns} from read_parquet('{self._files[name, 0]}')"

            plus = f" union all {side('gone')}" if self._has("gone", 0) else ""
            minus = f" except all {side('later')}" if self._has("later", 0) else ""
            lake, source = f"((select {columns} from ours{plus}){minus})", f"select {columns} from theirs"
            for kind, one, other in (("missing", source, lake), ("extra", lake, source)):
                (count,) = database.execute(f"select count(*) from ({one} except all {other})").fetchone()
                found.counts[kind] = int(count)
        return found

    def _has(self, side: str, part: int) -> bool:
        return (side, part) in self._files

    def _count_columns(self, database: Any, found: Found) -> None:
        if not self._names or not found.counts["different"]:
            return
        for some in pieces(list(enumerate(self._names)), COLUMNS_AT_ONCE):
            counts = ", ".join(f"count(*) filter (where t.c{i} is distinct from o.c{i})" for i, _ in some)
            row = database.execute(
                f"select {counts} from found f join theirs t on t.{KEY} = f.key join ours o on o.{KEY} = f.key"
                " where f.kind = 'different'"
            ).fetchone()
            for (_, name), count in zip(some, row, strict=True):
                if count:
                    found.columns[name] = found.columns.get(name, 0) + int(count)

    def _columns(self) -> list[str]:
        return [*(f"c{i}" for i in range(len(self._names))), RAW]

    @contextmanager
    def _database(self, part: int, memory: int = MEMORY_BYTES) -> Iterator[Any]:
        import duckdb  # not before something differs

        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{memory >> 10}KiB",
            "threads": 2,
            "temp_directory": str(self._folder),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "preserve_insertion_order": False,
        }
        try:
            with duckdb.connect(":memory:", config=settings) as database:
                for name in ("theirs", "ours"):
                    # A side without rows has no file: it has another side's columns.
                    path = self._files.get((name, part)) or next(iter(self._files.values()))
                    where = "" if self._has(name, part) else " limit 0"
                    database.execute(f"create view {name} as select * from read_parquet('{path}'){where}")
                yield database
        except duckdb.Error as e:
            # Its text may quote values.
            raise CdcError(
                f"the cells could not be compared: {type(e).__name__}",
                hint="verify without --show-values: long values are compared by digests then",
            ) from e


class _Part:
    """A file of one side, written in groups of rows."""

    def __init__(self, path: Path, schema: pa.Schema, group_rows: int) -> None:
        self._group_rows = group_rows
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", compression_level=1)
        self._waiting: list[pa.Table] = []

    def add(self, rows: pa.Table) -> None:
        self._waiting.append(rows)
        if sum(t.num_rows for t in self._waiting) >= self._group_rows:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
            self._waiting.clear()


def raw_texts(raw: pa.Array | None, rows: int, names: Sequence[str], held: Sequence[str], prefix: str = "") -> pa.Array:
    """`_raw` as one comparable text per row: only of the columns `names`, which are called `held` there."""
    if raw is None or raw.null_count == rows:
        return pa.nulls(rows, pa.string())
    kept = {prefix + one: name for one, name in zip(held, names, strict=True)}
    texts = []
    for entries in raw.to_pylist():
        known = sorted((kept[k], v) for k, v in entries or () if k in kept)
        texts.append(repr(known) if known else None)
    return pa.array(texts, pa.string())


def positional(columns: Sequence[pa.Array]) -> dict[str, pa.Array]:
    """Columns under names that no source column can clash with."""
    return {f"c{i}": column for i, column in enumerate(columns)}


def pieces(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """The items, so many at a time."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


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
