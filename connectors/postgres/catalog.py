"""All SQL that reads the catalog: tables, columns, keys, publications.

One query describes columns for the stream's relations and for snapshots alike, so the same table gives the same
schema on both ways. Reads only; runs under the canonical settings (search_path = pg_catalog). It does not decide which
tables are wanted beyond the configured globs, and it registers nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import psycopg

from cdc.config import SourceConfig
from cdc.table import Column, TableId, TableSchema

OWN_SCHEMA = "cdc"
"""Where reverse ETL keeps its acknowledgements."""

COLUMNS = """
with recursive base(oid, base, typmod) as (
  select oid, oid, -1 from pg_type where typtype <> 'd'
  union all
  select d.oid, b.base, case when d.typtypmod >= 0 then d.typtypmod else b.typmod end
  from pg_type d join base b on d.typbasetype = b.oid where d.typtype = 'd')
select a.attrelid::int8, a.attname, a.attnum, b.base::int8,
       case when t.typtype = 'd' then b.typmod else a.atttypmod end,
       format_type(a.atttypid, a.atttypmod),
       case when et.typdelim = ',' or eb.base = 'box'::regtype then eb.base else 0 end::int8, a.attnotnull,
       case when a.atthasmissing then array_to_string(a.attmissingval, '') end
from pg_attribute a
join pg_type t on t.oid = a.atttypid
join base b on b.oid = a.atttypid
join pg_type bt on bt.oid = b.base
left join pg_type et on et.oid = bt.typelem and et.typarray = bt.oid
left join base eb on eb.oid = et.oid
where a.attrelid = any(%s) and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
order by a.attrelid, a.attnum
"""

TABLES = """
select c.oid::int8, n.nspname, c.relname, c.relreplident::text, c.relkind::text, c.relfilenode::int8,
  (select array_agg(k.attname order by k.n) from (
     select a.attname, u.n from pg_index i
     cross join lateral unnest(i.indkey::int2[]) with ordinality u(attnum, n)
     join pg_attribute a on a.attrelid = i.indrelid and a.attnum = u.attnum
     where i.indrelid = c.oid and u.n <= i.indnkeyatts and i.indislive and
       case c.relreplident when 'i' then i.indisreplident when 'n' then false else i.indisprimary end) k)
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.oid = any(%s)
"""

PUBLISHED = """
select c.oid::int8, p.schemaname, p.tablename, to_jsonb(p) -> 'attnames', to_jsonb(p) ->> 'rowfilter'
from pg_publication_tables p
join pg_namespace n on n.nspname = p.schemaname
join pg_class c on c.relnamespace = n.oid and c.relname = p.tablename
where p.pubname = any(%s)
order by 2, 3
"""

CANDIDATES = """
select c.oid::int8, n.nspname, c.relname
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p') and c.relpersistence = 'p' and not c.relispartition
  and n.nspname not in ('pg_catalog', 'information_schema', 'cdc') and n.nspname not like 'pg\\_%%'
order by 2, 3
"""


@dataclass(frozen=True, slots=True)
class Published:
    """A table as the publications show it: the columns of its list (None: all) and its row filter (None: all rows)."""

    oid: int
    table: TableId
    columns: frozenset[str] | None
    row_filter: str | None


@dataclass(frozen=True, slots=True)
class Described:
    """A table's catalog entry."""

    schema: TableSchema
    kind: str
    relfilenode: int


def selected(config: SourceConfig, table: TableId) -> bool:
    """Whether the configuration's globs want the table. No globs: everything that is published, but what cdc itself
    keeps in a database that is also a target."""
    if table.schema == OWN_SCHEMA:
        return False
    name = str(table)
    wanted = not config.tables or any(fnmatchcase(name, pattern) for pattern in config.tables)
    return wanted and not any(fnmatchcase(name, pattern) for pattern in config.exclude)


def candidates(connection: psycopg.Connection[Any], config: SourceConfig) -> dict[int, TableId]:
    """Permanent tables that the configuration wants, published or not; partitions stand behind their root."""
    rows = connection.execute(CANDIDATES).fetchall()
    tables = {oid: TableId(schema, name) for oid, schema, name in rows}
    return {oid: table for oid, table in tables.items() if selected(config, table)}


def published(connection: psycopg.Connection[Any], config: SourceConfig) -> dict[int, Published]:
    """Selected tables of the configured publications. Several publications of a table add up, as Postgres does it."""
    found: dict[int, Published] = {}
    for oid, schema, name, columns, row_filter in connection.execute(PUBLISHED, [list(config.publication)]).fetchall():
        table = TableId(schema, name)
        if not selected(config, table):
            continue
        names = frozenset(columns) if columns is not None else None
        before = found.get(oid)
        if before is not None:
            names = None if names is None or before.columns is None else names | before.columns
            both = row_filter is not None and before.row_filter is not None
            row_filter = f"({before.row_filter}) or ({row_filter})" if both else None
        found[oid] = Published(oid, table, names, row_filter)
    return found


def describe(connection: psycopg.Connection[Any], oids: Sequence[int]) -> dict[int, Described]:
    """Schema (version 0) of each table that exists, generated columns left out: publications do not send them."""
    columns: dict[int, list[Column]] = {}
    for oid, name, attnum, type_oid, typmod, type_name, element, not_null, missing in connection.execute(
        COLUMNS, [list(oids)]
    ).fetchall():
        columns.setdefault(oid, []).append(
            Column(
                name=name,
                attnum=attnum,
                type_oid=type_oid,
                typmod=typmod,
                type_name=type_name,
                element_oid=element,
                not_null=not_null,
                missing=missing,
            )
        )
    found: dict[int, Described] = {}
    for oid, schema, name, identity, kind, relfilenode, key in connection.execute(TABLES, [list(oids)]).fetchall():
        table_schema = TableSchema(
            table=TableId(schema, name),
            oid=oid,
            columns=tuple(columns.get(oid, ())),
            key=tuple(key or ()),
            identity=identity,
        )
        found[oid] = Described(table_schema, kind, relfilenode)
    return found


def restricted(schema: TableSchema, columns: frozenset[str] | None) -> TableSchema:
    """The schema with only the columns of a publication's column list."""
    if columns is None:
        return schema
    return TableSchema(
        table=schema.table,
        oid=schema.oid,
        columns=tuple(c for c in schema.columns if c.name in columns),
        key=tuple(k for k in schema.key if k in columns),
        identity=schema.identity,
    )


def type_facts(connection: psycopg.Connection[Any], oids: Sequence[int]) -> dict[int, tuple[int, int, int, str]]:
    """Base type, its typmod, array element's base type and name of types by OID, for columns the catalog lost."""
    query = COLUMNS.partition("select a.attrelid")[0] + (
        "select t.oid::int8, b.base::int8, b.typmod,"
        " case when et.typdelim = ',' or eb.base = 'box'::regtype then eb.base else 0 end::int8,"
        " format_type(t.oid, null)"
        " from pg_type t join base b on b.oid = t.oid join pg_type bt on bt.oid = b.base"
        " left join pg_type et on et.oid = bt.typelem and et.typarray = bt.oid"
        " left join base eb on eb.oid = et.oid where t.oid = any(%s)"
    )
    return {
        oid: (base, typmod, element, name)
        for oid, base, typmod, element, name in connection.execute(query, [list(oids)]).fetchall()
    }
