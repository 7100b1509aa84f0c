"""All SQL that reads the catalog: tables, columns, keys, publications.

One query describes columns for the stream's relations and for snapshots alike, so the same table gives the same
schema on both ways. Reads only; runs under the canonical settings (search_path = pg_catalog). It does not decide which
tables are wanted beyond the configured globs, and it registers nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import psycopg

from cdc.config import SourceConfig
from cdc.errors import ConfigError, SourceRefused
from cdc.table import Column, TableId, TableSchema
from cdc.types import overridden

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
       case when a.atthasmissing then array_to_string(a.attmissingval, '') end,
       a.attgenerated::text
from pg_attribute a
join pg_type t on t.oid = a.atttypid
join base b on b.oid = a.atttypid
join pg_type bt on bt.oid = b.base
left join pg_type et on et.oid = bt.typelem and et.typarray = bt.oid
left join base eb on eb.oid = et.oid
where a.attrelid = any(%s) and a.attnum > 0 and not a.attisdropped
order by a.attrelid, a.attnum
"""


def _key(of: str) -> str:
    """SQL of the columns of an index of table c. A deferrable index identifies nothing: Postgres does not use it, and
    within a transaction its values may meet."""
    return f"""
(select array_agg(k.attname order by k.n) from (
   select a.attname, u.n from pg_index i
   cross join lateral unnest(i.indkey::int2[]) with ordinality u(attnum, n)
   join pg_attribute a on a.attrelid = i.indrelid and a.attnum = u.attnum
   where i.indrelid = c.oid and u.n <= i.indnkeyatts and i.indislive and i.indimmediate and {of}) k)
"""


# Under NOTHING as under FULL the primary key tells rows apart, though no old tuple is sent.
_PRIMARY = _key("i.indisprimary")
_KEY = _key("case c.relreplident when 'i' then i.indisreplident else i.indisprimary end")

TABLES = f"""
select c.oid::int8, n.nspname, c.relname, c.relreplident::text, c.relkind::text, c.relfilenode::int8, {_KEY},
  {_PRIMARY}, array(select a.attnum from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and a.attisdropped)
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.oid = any(%s)
"""

LEAVES = f"""
select r.oid::int8, c.oid::int8, n.nspname, c.relname, c.relreplident::text, c.relkind::text, {_KEY}
from unnest(%s::oid[]) r(oid), pg_partition_tree(r.oid) t
join pg_class c on c.oid = t.relid join pg_namespace n on n.oid = c.relnamespace
where t.isleaf and c.relkind <> 'p'
order by 1, 2
"""

PUBLISHED = """
select c.oid::int8, p.schemaname, p.tablename, p.pubname, to_jsonb(p) -> 'attnames', to_jsonb(p) ->> 'rowfilter',
  array(select a.attname::text from pg_attribute a where a.attrelid = c.oid and a.attgenerated <> ''
        and current_setting('server_version_num')::int < 180000),
  pub.pubviaroot, pub.pubinsert, pub.pubupdate, pub.pubdelete, pub.pubtruncate,
  array(select a.relid::oid::int8 from pg_partition_ancestors(c.oid) a where a.relid <> c.oid)
from pg_publication_tables p
join pg_publication pub on pub.pubname = p.pubname
join pg_namespace n on n.nspname = p.schemaname
join pg_class c on c.relnamespace = n.oid and c.relname = p.tablename
where p.pubname = any(%s)
order by 2, 3, 4
"""

OPERATORS = """
select oc.opcintype::int8, ao.amopstrategy, n.nspname, o.oprname
from pg_opclass oc
join pg_am am on am.oid = oc.opcmethod and am.amname = 'btree'
join pg_amop ao on ao.amopfamily = oc.opcfamily and ao.amoplefttype = oc.opcintype
  and ao.amoprighttype = oc.opcintype and ao.amopstrategy in (3, 4, 5)
join pg_operator o on o.oid = ao.amopopr
join pg_namespace n on n.oid = o.oprnamespace
where oc.opcdefault and oc.opcintype = any(%s) and n.nspname <> 'pg_catalog'
"""

LISTED = """
select exists (
  select from pg_publication_rel r join pg_publication p on p.oid = r.prpubid
  where r.prrelid = %s and p.pubname = any(%s) and to_jsonb(r) ->> 'prattrs' is not null)
"""

NAMES = """
select attrelid::int8, attname from pg_attribute where attrelid = any(%s) and attnum > 0 and not attisdropped
"""

CANDIDATES = """
select c.oid::int8, n.nspname, c.relname
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p') and c.relpersistence = 'p' and not c.relispartition
  and n.nspname not in ('pg_catalog', 'information_schema', 'cdc') and n.nspname not like 'pg\\_%%'
order by 2, 3
"""


OPERATIONS = ("insert", "update", "delete", "truncate")


@dataclass(frozen=True, slots=True)
class Part:
    """What one publication shows of a table: columns (None: all), row filter (None: all rows), operations."""

    publication: str
    columns: frozenset[str] | None
    row_filter: str | None
    operations: frozenset[str]


@dataclass(frozen=True, slots=True)
class Published:
    """A table as all configured publications together show it; those of one table add up, as Postgres does it."""

    oid: int
    table: TableId
    parts: tuple[Part, ...]

    @property
    def columns(self) -> frozenset[str] | None:
        """Names of the published columns. None: all but generated ones, which no publication sends before 18."""
        lists = [part.columns for part in self.parts]
        return None if None in lists else frozenset().union(*(names for names in lists if names is not None))

    @property
    def row_filter(self) -> str | None:
        """SQL of which rows are published; None: all."""
        filters = [part.row_filter for part in self.parts]
        return None if None in filters else " or ".join(f"({text})" for text in dict.fromkeys(filters))


@dataclass(frozen=True, slots=True)
class Leaf:
    """A partition that holds rows; `key` are the columns of its identity."""

    oid: int
    table: TableId
    identity: str
    kind: str
    key: tuple[str, ...]

    def carries(self, key: Collection[str]) -> bool:
        """Whether its old tuples have these columns. One without any is no danger: Postgres refuses its updates."""
        return self.kind != "r" or self.identity in "fn" or set(key) <= set(self.key)


@dataclass(frozen=True, slots=True)
class Described:
    """A table's catalog entry.

    `schema` is without generated columns, which publications send only on request: `generated` has them, `sent` puts
    in those that are sent. `leaves` are the partitions of a partitioned table, `primary` the primary key.
    """

    schema: TableSchema
    kind: str
    relfilenode: int
    generated: tuple[Column, ...] = ()
    virtual: frozenset[str] = frozenset()
    leaves: tuple[Leaf, ...] = ()
    primary: tuple[str, ...] = ()
    dropped: frozenset[int] = frozenset()
    """Attnums of columns that are gone."""

    def sent(self, names: Collection[str] | None) -> TableSchema:
        """The schema with the columns that are published (`Published.columns`). A key that is not published whole is
        none: rows that differ in what is missing would be taken for one."""
        columns = self.schema.columns
        if names is not None:
            columns = tuple(c for c in (*columns, *self.generated) if c.name in names)
            columns = tuple(sorted(columns, key=lambda c: c.attnum))
        kept = {c.name for c in columns}
        return replace(
            self.schema,
            columns=columns,
            key=self.schema.key if set(self.schema.key) <= kept and not self.is_torn(kept) else (),
            absent=tuple(c.name for c in self.generated if c.name not in kept),
        )

    def is_torn(self, names: Collection[str]) -> bool:
        """Whether old tuples with these columns lack a part of the key: a generated column that is not sent, or what
        the identity of a partition does not hold."""
        missing = {c.name for c in self.generated if c.name not in names}
        return bool(missing & set(self.schema.key)) or not all(leaf.carries(self.schema.key) for leaf in self.leaves)


def selected(config: SourceConfig, table: TableId) -> bool:
    """Whether the configuration's globs want the table. No globs: everything that is published, but what cdc itself
    keeps in a database that is also a target."""
    if table.is_own:
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
    """Selected tables of the configured publications, as the stream names them: where one publishes a partition by
    its root, the changes come as the root's, whatever another one says of the partition."""
    if config.is_periodic:
        return read_whole(connection, config)
    rows = connection.execute(PUBLISHED, [list(config.publication)]).fetchall()
    roots = {row[0] for row in rows if row[7]}
    found: dict[int, Published] = {}
    for oid, schema, name, publication, columns, row_filter, unsent, _, *flags, ancestors in rows:
        table = TableId(schema, name)
        if roots.intersection(ancestors) or not selected(config, table):
            continue
        operations = frozenset(operation for operation, sent in zip(OPERATIONS, flags, strict=True) if sent)
        # Before 18 no generated column is sent, though 15 lists them.
        names = frozenset(columns) - frozenset(unsent) if columns is not None else None
        part = Part(publication, names, row_filter, operations)
        before = found[oid].parts if oid in found else ()
        found[oid] = Published(oid, table, (*before, part))
    return found


def as_read(described: Described, published: Published, config: SourceConfig) -> TableSchema:
    """A table as snapshots and runs read it. Runs know every old row whole, whatever its replica identity."""
    schema = declared(described.sent(published.columns), config)
    return replace(schema, identity="f") if config.is_periodic else schema


def read_whole(connection: psycopg.Connection[Any], config: SourceConfig) -> dict[int, Published]:
    """Selected tables of a source without publications: all rows and all columns, generated ones too."""
    tables = candidates(connection, config)
    columns: dict[int, set[str]] = {oid: set() for oid in tables}
    for oid, name in connection.execute(NAMES, [list(tables)]).fetchall():
        columns[oid].add(name)
    return {
        oid: Published(oid, table, (Part("", frozenset(columns[oid]), None, frozenset(OPERATIONS)),))
        for oid, table in tables.items()
    }


def has_column_list(connection: psycopg.Connection[Any], oid: int, config: SourceConfig) -> bool:
    """Whether a publication names the columns that it sends of a table."""
    row = connection.execute(LISTED, [oid, list(config.publication)]).fetchone()
    return bool(row and row[0])


def declared(schema: TableSchema, config: SourceConfig) -> TableSchema:
    """The schema with the types that the configuration declares for its columns. SourceRefused if a column cannot be
    held so."""
    try:
        columns = tuple(overridden(c, config.declared(str(schema.table), c.name)) for c in schema.columns)
    except ConfigError as e:
        raise SourceRefused(f"source {config.name} table {schema.table}: {e.args[0]}", hint=e.hint) from e
    return replace(schema, columns=columns)


def describe(connection: psycopg.Connection[Any], oids: Sequence[int]) -> dict[int, Described]:
    """The catalog's entry (schema version 0) of each table that exists."""
    columns: dict[int, list[Column]] = {}
    generated: dict[int, list[Column]] = {}
    virtual: set[tuple[int, str]] = set()
    for oid, name, attnum, type_oid, typmod, type_name, element, not_null, missing, kind in connection.execute(
        COLUMNS, [list(oids)]
    ).fetchall():
        column = Column(
            name=name,
            attnum=attnum,
            type_oid=type_oid,
            typmod=typmod,
            type_name=type_name,
            element_oid=element,
            not_null=not_null,
            missing=missing,
        )
        (generated if kind else columns).setdefault(oid, []).append(column)
        if kind == "v":
            virtual.add((oid, name))
    rows = connection.execute(TABLES, [list(oids)]).fetchall()
    partitions = leaves(connection, [row[0] for row in rows if row[4] == "p"])
    found: dict[int, Described] = {}
    for oid, schema, name, identity, kind, relfilenode, key, primary, dropped in rows:
        own = tuple(partitions.get(oid, ()))
        if identity == "f" and any(leaf.kind == "r" and leaf.identity != "f" for leaf in own):
            # A setting that partitions do not inherit: what they write is no whole old row, whatever the stream says.
            identity = "d"
        table_schema = TableSchema(
            table=TableId(schema, name),
            oid=oid,
            columns=tuple(columns.get(oid, ())),
            key=tuple(key or ()),
            identity=identity,
        )
        hidden = tuple(generated.get(oid, ()))
        names = frozenset(c.name for c in hidden if (oid, c.name) in virtual)
        found[oid] = Described(
            table_schema, kind, relfilenode, hidden, names, own, tuple(primary or ()), frozenset(dropped)
        )
    return found


def leaves(connection: psycopg.Connection[Any], roots: Sequence[int]) -> dict[int, list[Leaf]]:
    """The partitions with rows below each partitioned table."""
    found: dict[int, list[Leaf]] = {}
    if roots:
        for root, oid, schema, name, identity, kind, key in connection.execute(LEAVES, [list(roots)]).fetchall():
            found.setdefault(root, []).append(Leaf(oid, TableId(schema, name), identity, kind, tuple(key or ())))
    return found


@dataclass(frozen=True, slots=True)
class Operators:
    """How an extension's type (citext, ltree) is compared in its own order: operators as (schema, name)."""

    equal: tuple[str, str]
    at_least: tuple[str, str]
    greater: tuple[str, str]


def operators(connection: psycopg.Connection[Any], schema: TableSchema) -> dict[str, Operators]:
    """Operators of the key columns whose types keep theirs outside of pg_catalog; the others are compared as written.

    Under our search_path `>` between two citext values means that of text, while ORDER BY sorts by the type's own
    order: a walk along the key would pass rows over.
    """
    types = {name: schema.column(name).type_oid for name in schema.key}
    found: dict[int, dict[int, tuple[str, str]]] = {}
    for type_oid, strategy, *operator in connection.execute(OPERATORS, [list(types.values())]).fetchall():
        found.setdefault(type_oid, {})[strategy] = (operator[0], operator[1])
    return {name: Operators(*(found[oid][n] for n in (3, 4, 5))) for name, oid in types.items() if oid in found}


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
