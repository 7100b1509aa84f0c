"""What `cdc inspect` measures by reading rows of one table: its space, a chunk as snapshots read it, ages at change.

Every read is bounded: a small table is read whole, of a bigger one a share of its blocks (`TABLESAMPLE SYSTEM`, always
the same ones), and the server's time-outs hold. Only counts, sums and ages leave the server, and the CSV of the sampled
chunk, which is counted and thrown away. Which columns might be a key is measured in inspection_keys.py.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from cdc.inspection import AGE_BOUNDS_S, Ages, SampleRead, Size, Space
from connectors.postgres.catalog import Described
from connectors.postgres.connection import take_any_bytes
from connectors.postgres.inspection_server import Mark

SAMPLE_BLOCKS = 4096
"""32 MB at the usual block size: tables up to this are read whole, of others about so much."""
TAIL_BLOCKS = 1024
"""New rows of a growing table stand in its last blocks: so many are read beside the sample."""
RECENT_S = 86_400.0
"""Where commits are dated by the server, changes of the last day are taken."""

SIZES = """
with member(relid) as (
  select c.oid from pg_class c where c.oid = %(oid)s and c.relkind = 'r'
  union all
  select t.relid from pg_class c, pg_partition_tree(c.oid) t
  where c.oid = %(oid)s and c.relkind = 'p' and t.isleaf)
select coalesce(sum(pg_relation_size(m.relid)), 0)::int8, coalesce(sum(pg_table_size(m.relid)), 0)::int8,
       coalesce(sum(pg_indexes_size(m.relid)), 0)::int8, coalesce(sum(greatest(c.reltuples, 0)), 0)::float8,
       coalesce(sum(c.relpages), 0)::int8, current_setting('block_size')::int8,
       coalesce(min((select option_value::int from pg_options_to_table(c.reloptions)
                     where option_name = 'fillfactor')), 100)
from member m join pg_class c on c.oid = m.relid
"""

STORAGE = """
select attname, attstorage in ('e', 'x') from pg_attribute where attrelid = %s and attnum > 0 and not attisdropped
"""
"""Columns; whether their big values are stored apart."""

DATED = """
select a.attname, coalesce(pg_get_expr(d.adbin, d.adrelid), ''),
       exists (select from pg_index i where i.indrelid = a.attrelid and i.indkey[0] = a.attnum and i.indisvalid),
       a.atttypid in (1082, 1114, 1184), a.attgenerated = ''
from pg_attribute a left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
where a.attrelid = %s and a.attnum > 0 and not a.attisdropped order by a.attnum
"""
"""Columns; whether each is a date or a timestamp."""

FILLED_WITH_NOW = re.compile(
    r"now\(\)|current_(timestamp|date)|(clock|transaction|statement)_timestamp|localtime", re.I
)
OF_CREATION = re.compile(
    r"^(date_?)?(created|creation|inserted|occurred|happened|received|recorded|ordered|placed|event|entry|logged)", re.I
)
OF_CHANGE = re.compile(r"updat|modif|chang|delet|expir|due|last|valid|until|end|synced|process", re.I)

EXTERNAL_BYTES = 2032
"""A row that is larger has values stored apart, where it may, until it is not; each leaves a pointer."""
POINTER_BYTES = 18


@dataclass(frozen=True, slots=True)
class Readable:
    """A table as it is read: its name in FROM, its size, and the share of its blocks that a bounded read takes."""

    relation: sql.Composed
    partitioned: bool
    size: Size
    rows_estimated: int
    block_bytes: int
    fillfactor: int

    @property
    def blocks(self) -> int:
        return self.size.heap_bytes // self.block_bytes

    def share(self, blocks_max: int = SAMPLE_BLOCKS) -> float:
        return min(1.0, blocks_max / self.blocks) if self.blocks else 1.0

    def sampled(self, share: float) -> sql.Composed:
        """The table, or a share of its blocks, as an item of FROM; the same blocks each time."""
        if share >= 1:
            return sql.SQL("{} as r").format(self.relation)
        percent = sql.Literal(share * 100)
        return sql.SQL("{} as r tablesample system ({}) repeatable (1)").format(self.relation, percent)


def readable(connection: psycopg.Connection[Any], described: Described) -> Readable:
    """Sizes as they are now; takes ACCESS SHARE for a moment."""
    row = connection.execute(SIZES, {"oid": described.schema.oid}).fetchone()
    assert row is not None
    heap, table, indexes, tuples, pages, block_bytes, fillfactor = row
    blocks = heap // block_bytes
    # As the planner does it: as many rows per block as when the table was last analysed.
    rows = round(tuples / pages * blocks) if pages else 0
    partitioned = described.kind == "p"
    name = sql.Identifier(*described.schema.table)
    return Readable(
        relation=sql.SQL("{}" if partitioned else "only {}").format(name),
        partitioned=partitioned,
        size=Size(heap_bytes=heap, table_bytes=table, index_bytes=indexes),
        rows_estimated=rows,
        block_bytes=block_bytes,
        fillfactor=fillfactor,
    )


def space(connection: psycopg.Connection[Any], read: Readable, described: Described) -> tuple[Space, int]:
    """How much of the heap live rows fill, and how many rows there are; exact if the whole table was read."""
    share = read.share()
    query = sql.SQL("select count(*), coalesce(sum({}), 0)::int8 from {}").format(
        _row_bytes(connection, described), read.sampled(share)
    )
    row = connection.execute(query).fetchone()
    assert row is not None
    live = round(row[1] / share)
    usable = read.blocks * (read.block_bytes - 24) * read.fillfactor // 100
    return Space(live_bytes=live, unused_bytes=max(0, usable - live), read_share=share), round(row[0] / share)


def _row_bytes(connection: psycopg.Connection[Any], described: Described) -> sql.Composed:
    """SQL of what a row takes in its block: header, columns up to a multiple of 8, and its pointer. Values that may be
    stored apart are, from the largest on, until the row is small: what is larger than a row may be stands elsewhere for
    certain, and of smaller ones together no more than that stays."""
    outside = dict(connection.execute(STORAGE, [described.schema.oid]).fetchall())
    within, apart = [sql.SQL("0").format()], [sql.SQL("0").format()]
    for column in (*described.schema.columns, *described.generated):
        if column.name in described.virtual:
            continue
        size = sql.SQL("coalesce(pg_column_size(r.{}), 0)").format(sql.Identifier(column.name))
        if outside.get(column.name):
            pattern = sql.SQL("case when {0} > {1} then {2} else {0} end")
            apart.append(pattern.format(size, sql.Literal(EXTERNAL_BYTES), sql.Literal(POINTER_BYTES)))
        else:
            within.append(size)
    return sql.SQL("(24 + ({0}) + least({1}, greatest({2}, {3} - ({0}))) + 7) / 8 * 8 + 4").format(
        sql.SQL(" + ").join(within), sql.SQL(" + ").join(apart), sql.Literal(POINTER_BYTES * (len(apart) - 1)),
        sql.Literal(EXTERNAL_BYTES),
    )  # fmt: skip


def sample_read(
    connection: psycopg.Connection[Any],
    read: Readable,
    described: Described,
    *,
    by_key: bool,
    rows_max: int,
    bytes_max: int,
) -> SampleRead:
    """Read the table's first chunk by the COPY of snapshots, and throw it away. A time-out of the server ends it: what
    came until then counts. `connection` is for this alone: its encoding may be any afterwards."""
    schema = described.schema
    take_any_bytes(connection)
    order = sql.SQL("order by {}").format(_names(schema.key)) if by_key else sql.SQL("")
    query = sql.SQL("copy (select {} from {} {} limit {}) to stdout (format csv)").format(
        _names([c.name for c in schema.columns]), read.relation, order, sql.Literal(rows_max)
    )
    rows, size, whole = 0, 0, True
    began = time.monotonic()
    try:
        with connection.cursor() as cursor, cursor.copy(query) as copy:
            for data in copy:  # one row each
                rows += 1
                size += len(data)
                if size > bytes_max:
                    raise _Enough
        whole = rows < rows_max
    except _Enough:
        whole = False
    except psycopg.errors.QueryCanceled:
        if not rows:
            raise
        whole = False
    return SampleRead(rows=rows, bytes=size, seconds=time.monotonic() - began, whole=whole)


class _Enough(Exception):
    """The chunk is as large as one may be."""


def age_column(connection: psycopg.Connection[Any], oid: int, wanted: str) -> tuple[str, str] | None:
    """The column that says when a row's event was, and how it was found; None if there is none."""
    columns = connection.execute(DATED, [oid]).fetchall()
    if wanted:
        return next(((name, "--age-column") for name, _, _, dated, _ in columns if name == wanted and dated), None)
    dated = [(name, default, indexed) for name, default, indexed, is_dated, own in columns if is_dated and own]
    others = [c for c in dated if not OF_CHANGE.search(c[0])]
    for name, default, _ in others:
        if FILLED_WITH_NOW.search(default):
            return name, "its default is the time of the insert"
    for name, _, _ in others:
        if OF_CREATION.search(name):
            return name, "by its name"
    for name, _, indexed in others:
        if indexed:
            return name, "an index begins with it"
    return (others[0][0], "the only date or time") if len(others) == 1 else None


def ages(
    connection: psycopg.Connection[Any],
    read: Readable,
    column: tuple[str, str],
    *,
    since: Mark,
    until: Mark,
    late_after_s: float,
    commits_dated: bool,
) -> Ages:
    """How old rows were when they changed: the rows of now that a snapshot at `since` did not see, or, where the server
    dates commits, those that were last changed within a day."""
    share = read.share()
    strata: list[tuple[sql.Composed, sql.Composable, float]] = [(read.sampled(share), sql.SQL("true"), share)]
    if share < 1 and not read.partitioned:
        split = sql.Literal(f"({max(0, read.blocks - TAIL_BLOCKS)},0)")
        tail = sql.SQL("{} as r").format(read.relation)
        strata = [
            (read.sampled(share), sql.SQL("r.ctid < {}::tid").format(split), share),
            (tail, sql.SQL("r.ctid >= {}::tid").format(split), 1.0),
        ]
    when: sql.Composable = sql.SQL("pg_xact_commit_timestamp(r.xmin)")
    which: sql.Composable = sql.SQL("{} >= to_timestamp({})").format(when, sql.Literal(until.at_s - RECENT_S))
    if not commits_dated:
        # Not the interval's end: by now there are rows from behind it.
        when = sql.SQL("clock_timestamp()")
        which = _unseen(since.snapshot)
    sums = [0.0] * (3 + len(AGE_BOUNDS_S) + 1)
    seen, oldest = 0, None
    for source, condition, part in strata:
        query = _age_query(source, sql.SQL("{} and {}").format(condition, which), when, column[0], late_after_s)
        row = connection.execute(query).fetchone()
        assert row is not None
        sums = [total + count / part for total, count in zip(sums, row[1:], strict=True)]
        seen += row[1]
        oldest = max((a for a in (oldest, row[0]) if a is not None), default=None)
    tail_share = min(1.0, TAIL_BLOCKS / read.blocks) if len(strata) > 1 else 0.0
    return Ages(
        column=column[0],
        found_by=column[1],
        rows=sums[0],
        rows_seen=seen,
        without=sums[1],
        late=sums[2],
        oldest_s=oldest,
        counts=tuple(sums[3:]),
        read_share=min(1.0, share * (1 - tail_share) + tail_share),
        changed_at="commit timestamp" if commits_dated else "interval",
    )


def _age_query(
    source: sql.Composed, condition: sql.Composed, when: sql.Composable, column: str, late_after_s: float
) -> sql.Composed:
    """One row: the oldest age, rows, rows without, late ones, and rows per bound."""
    own = sql.SQL("r.{}").format(sql.Identifier(column))
    bounds = sql.Literal(list(AGE_BOUNDS_S))
    per_bound = [
        sql.SQL("count(*) filter (where width_bucket(age, {}::float8[]) = {})").format(bounds, sql.Literal(i))
        for i in range(len(AGE_BOUNDS_S) + 1)
    ]
    return sql.SQL(
        "select max(age), count(*), count(*) filter (where age is null), count(*) filter (where age >= {late}),"
        " {counts} from (select case when isfinite({own})"
        " then (extract(epoch from {when}) - extract(epoch from {own}::timestamptz))::float8 end age"
        " from {source} where {condition}) a"
    ).format(
        late=sql.Literal(late_after_s), counts=sql.SQL(", ").join(per_bound), own=own, when=when, source=source,
        condition=condition,
    )  # fmt: skip


def _unseen(snapshot: str) -> sql.Composed:
    """Rows whose last writer the snapshot did not see. A row carries 32 bits of its writer's id: ages of ids are
    compared first, which passes over old rows, and only then is the whole id put together from the snapshot's."""
    xmin, xmax = map(int, snapshot.split(":")[:2])
    return sql.SQL(
        "case when age(r.xmin) between 1 and age({low}::xid) then not pg_visible_in_snapshot("
        "({high}::int8 + age({high32}::xid) - age(r.xmin))::text::xid8, {snapshot}::pg_snapshot) else false end"
    ).format(
        low=sql.Literal(str(xmin & 0xFFFFFFFF)), high=sql.Literal(xmax), high32=sql.Literal(str(xmax & 0xFFFFFFFF)),
        snapshot=sql.Literal(snapshot),
    )  # fmt: skip


def _names(names: list[str] | tuple[str, ...]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))
