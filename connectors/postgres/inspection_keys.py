"""Would-be keys of a table that has none: which columns might be one, and how many rows they do not tell apart.

Candidates come from unique indexes that are there, then from the planner's statistics (or, where there are none, from
a sample): single columns first, then two, then three. Each is counted, in the whole table if it is small enough, else
in a share of its blocks, and then what that proves is said with it. Counts only, never a value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from cdc.inspection import KeyCandidate
from connectors.postgres.catalog import Described
from connectors.postgres.inspection_rows import Readable

EXACT_BLOCKS = 16_384
"""128 MB at the usual block size: up to this a table's rows are all compared."""
CANDIDATES_MAX = 4
SAMPLE_ROWS = 20_000
COLUMNS_MAX = 12
"""Of a table without statistics, so many are looked at."""
NEARLY_ALL = 0.8
"""A column with as many different values per row may be a key but for a few duplicates."""
WIDTH_MAX = 100
"""Bytes; a longer value is hardly a key."""

RANKS = {
    20: 0, 21: 0, 23: 0, 26: 0, 2950: 0, 25: 0, 1043: 0, 1042: 0, 19: 0,  # integers, uuid, texts
    1082: 1, 1114: 1, 1184: 1, 869: 1, 1700: 2, 17: 2,  # times, inet, numeric, bytea
}  # fmt: skip
"""Types that may be (part of) a key, the likelier ones first."""

STATISTICS = """
select s.attname, s.n_distinct, s.null_frac, s.avg_width from pg_stats s
where s.schemaname = %s and s.tablename = %s and s.inherited = %s
"""

UNIQUE = """
select i.relname, array_agg(a.attname order by k.n), bool_and(a.attnotnull) and x.indimmediate
from pg_index x join pg_class i on i.oid = x.indexrelid
cross join lateral unnest(x.indkey::int2[]) with ordinality k(attnum, n)
join pg_attribute a on a.attrelid = x.indrelid and a.attnum = k.attnum
where x.indrelid = %s and x.indisunique and x.indisvalid and x.indpred is null and x.indexprs is null
  and k.n <= x.indnkeyatts
group by i.relname, x.indimmediate, x.indnkeyatts order by 3 desc, x.indnkeyatts, 1
"""


@dataclass(frozen=True, slots=True)
class _Spread:
    """How many different values a column has, about."""

    name: str
    rank: int
    distinct: float
    nulls: float
    """Share of rows."""
    width: float
    place: int


def would_be_keys(
    connection: psycopg.Connection[Any], read: Readable, described: Described, rows: int, may_go_on: Callable[[], bool]
) -> list[KeyCandidate]:
    """Candidates as they were counted, until one is unique or `may_go_on` says no."""
    found: list[KeyCandidate] = []
    for columns, found_by, index in itertools.islice(_candidates(connection, read, described, rows), CANDIDATES_MAX):
        if index:
            found.append(_guaranteed(columns, found_by, index))
        elif rows and may_go_on():
            found.append(_counted(connection, read, columns, found_by))
        if not found or found[-1].is_unique:
            break
    return found


def _candidates(
    connection: psycopg.Connection[Any], read: Readable, described: Described, rows: int
) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Columns, how they were found, and the index that guarantees them if one does; likeliest first, none twice."""
    seen: set[frozenset[str]] = set()
    for index, columns, guarantees in connection.execute(UNIQUE, [described.schema.oid]).fetchall():
        seen.add(frozenset(columns))
        yield tuple(columns), f"unique index {index}", index if guarantees else ""
    spreads, found_by = _spreads(connection, read, described, rows)
    for columns in _combinations(spreads, rows):
        if frozenset(columns) not in seen:
            seen.add(frozenset(columns))
            yield columns, found_by, ""


def _combinations(spreads: list[_Spread], rows: int) -> Iterator[tuple[str, ...]]:
    """Single columns that are nearly unique, then the likeliest pairs and triples that could be."""
    usable = [s for s in spreads if s.width <= WIDTH_MAX and s.distinct > 1]
    single = [s for s in usable if s.distinct >= NEARLY_ALL * rows * (1 - s.nulls)]
    for spread in sorted(single, key=lambda s: (s.nulls > 0, s.rank, s.place)):
        yield (spread.name,)
    parts = sorted((s for s in usable if s not in single), key=lambda s: (s.nulls > 0, s.rank, -s.distinct, s.place))
    for size in (2, 3):
        enough = [
            group
            for group in itertools.combinations(parts[:COLUMNS_MAX], size)
            if math.prod(s.distinct for s in group) >= NEARLY_ALL * rows
        ]
        for group in sorted(enough, key=lambda g: (any(s.nulls > 0 for s in g), sum(s.rank for s in g)))[:2]:
            yield tuple(s.name for s in sorted(group, key=lambda s: s.place))


def _spreads(
    connection: psycopg.Connection[Any], read: Readable, described: Described, rows: int
) -> tuple[list[_Spread], str]:
    schema = described.schema
    columns = {c.name: (RANKS[c.type_oid], i) for i, c in enumerate(schema.columns) if c.type_oid in RANKS}
    known = connection.execute(STATISTICS, [*schema.table, read.partitioned]).fetchall()
    if known:
        return [
            _Spread(
                name=name,
                rank=columns[name][0],
                distinct=-distinct * rows if distinct < 0 else distinct,
                nulls=nulls,
                width=width,
                place=columns[name][1],
            )
            for name, distinct, nulls, width in known
            if name in columns
        ], "by the planner's statistics"
    names = list(columns)[:COLUMNS_MAX]
    if not names:
        return [], ""
    facts = sql.SQL(", ").join(
        sql.SQL("count({0}), count(distinct {0}), coalesce(avg(pg_column_size({0})), 0)::float8").format(
            sql.Identifier(name)
        )
        for name in names
    )
    query = sql.SQL("select count(*), {} from (select {} from {} limit {}) s").format(
        facts, sql.SQL(", ").join(map(sql.Identifier, names)), read.sampled(read.share()), sql.Literal(SAMPLE_ROWS)
    )
    row = connection.execute(query).fetchone()
    assert row is not None
    seen = row[0]
    found = []
    for i, name in enumerate(names):
        filled, distinct, width = row[1 + 3 * i : 4 + 3 * i]
        # What has hardly any repetition in the sample goes on having other values; what has few values has no more.
        scaled = distinct / seen * rows if seen and distinct > seen / 10 else distinct
        nulls = 1 - filled / seen if seen else 0.0
        found.append(_Spread(name, columns[name][0], scaled, nulls, width, columns[name][1]))
    return found, "by a sample"


def _counted(
    connection: psycopg.Connection[Any], read: Readable, columns: tuple[str, ...], found_by: str
) -> KeyCandidate:
    share = 1.0 if read.blocks <= EXACT_BLOCKS else read.share()
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    has_null = sql.SQL(" or ").join(sql.SQL("{} is null").format(sql.Identifier(c)) for c in columns)
    query = sql.SQL(
        "select coalesce(sum(n), 0)::int8, coalesce(sum(n) filter (where has_null), 0)::int8,"
        " coalesce(sum(n - 1) filter (where not has_null), 0)::int8, count(*) filter (where n > 1 and not has_null),"
        " coalesce(max(n) filter (where not has_null), 0)"
        " from (select count(*) n, ({}) has_null from {} group by {}) g"
    ).format(has_null, read.sampled(share), names)
    row = connection.execute(query).fetchone()
    assert row is not None
    rows_read, rows_null, extra, groups, largest = row
    exact = share >= 1
    return KeyCandidate(
        columns=columns,
        found_by=found_by,
        exact=exact,
        rows_read=rows_read,
        rows_null=rows_null,
        extra_rows=extra,
        groups=groups,
        largest_group=largest,
        # Both rows of a pair are read with the square of the share; none seen among so many is likely up to 3 expected.
        pairs_at_most=math.ceil(3 / share**2) if not exact and extra == 0 else None,
    )


def _guaranteed(columns: tuple[str, ...], found_by: str, index: str) -> KeyCandidate:
    return KeyCandidate(
        columns=columns, found_by=found_by, exact=False, rows_read=0, rows_null=0, extra_rows=0, groups=0,
        largest_group=0, pairs_at_most=None, index=index,
    )  # fmt: skip
