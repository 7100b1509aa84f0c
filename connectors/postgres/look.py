"""One look at the catalog: everything there that decides which rows the published tables show, in one snapshot.

Reads only catalogs that every role may read, in one repeatable-read transaction of a few queries, so a watch every few
seconds costs little. Waits for no lock of a table but, briefly, of partitions that are new to it. What a change
means is decided in cdc.watch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg

from cdc.config import SourceConfig
from cdc.fingerprint import Catalog, Fingerprint, Part, Unpublished
from cdc.table import TableId
from connectors.postgres import catalog, publication
from connectors.postgres.replication import parse_lsn

PUBLICATIONS = """
select p.oid::int8, p.xmin::text, p.puballtables, p.pubtruncate,
       coalesce(obj_description(p.oid, 'pg_publication'), '') = %s,
       case when not pg_is_in_recovery() then pg_current_wal_insert_lsn()::text end
from pg_publication p where p.pubname = any(%s)
"""

LISTED = """
select prpubid::int8, prrelid::int8, 'table:' || oid || ':' || xmin::text from pg_publication_rel
"""

SCHEMAS = """
select pnpubid::int8, pnnspid::int8, 'schema:' || oid || ':' || xmin::text from pg_publication_namespace
"""

FACTS = """
select c.oid::int8, c.relnamespace::int8, c.relfilenode::int8, c.reltoastrelid::int8, t.xmin::text
from pg_class c join pg_type t on t.oid = c.reltype where c.oid = any(%s)
"""
"""The entry of the table's row type changes when the table is renamed or moved to another schema, and hardly else."""

ABOVE = """
with recursive up(oid, ancestor, marks) as (
  select i.inhrelid, i.inhparent, i.xmin::text from pg_inherits i join pg_class c on c.oid = i.inhrelid
  where c.relispartition and c.oid = any(%s)
  union all
  select u.oid, i.inhparent, u.marks || '.' || i.xmin::text from up u join pg_inherits i on i.inhrelid = u.ancestor)
select u.oid::int8, u.ancestor::int8, u.marks, c.relnamespace::int8 from up u join pg_class c on c.oid = u.ancestor
"""

BELOW = """
with recursive tree(root, oid, mark, pristine) as (
  select i.inhparent, i.inhrelid, i.xmin::text, {pristine} from pg_inherits i
  join pg_class p on p.oid = i.inhparent and p.relkind = 'p'
  join pg_class c on c.oid = i.inhrelid join pg_type t on t.oid = c.reltype
  where i.inhparent = any(%s)
  union all
  select r.root, i.inhrelid, i.xmin::text, {pristine} from tree r join pg_inherits i on i.inhparent = r.oid
  join pg_class c on c.oid = i.inhrelid join pg_type t on t.oid = c.reltype)
select t.root::int8, c.oid::int8, c.relfilenode::int8, t.mark, t.pristine and c.relfilenode in (0, c.oid),
       c.relkind = 'r' and c.relfilenode = c.oid
from tree t join pg_class c on c.oid = t.oid order by 1, 2
""".replace(
    "{pristine}",
    "i.xmin = t.xmin and i.xmax = '0'::xid and t.xmax = '0'::xid and i.cmin::text::int8 - t.cmin::text::int8 <= 2",
)
"""CREATE TABLE … PARTITION OF makes the row type and its place in the tree within one statement, two commands apart;
CREATE TABLE and ATTACH in one transaction are further apart, in two transactions have two ids. (No command of a
transaction that was rolled back has written over either: xmax.) A file that was never replaced is named by the OID."""

MARKS = """
select a.attrelid::int8, a.attnum, a.xmin::text || coalesce('/' || d.oid, '')
from pg_attribute a
left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum and a.attgenerated <> ''
where a.attrelid = any(%s) and a.attnum > 0 and not a.attisdropped
"""

TYPES = """
with recursive used(relid, oid) as (
  select attrelid, atttypid from pg_attribute
  where attrelid = any(%s) and attnum > 0 and not attisdropped and atttypid >= 16384
  union
  select u.relid, x.oid from used u join pg_type t on t.oid = u.oid
  cross join lateral (
    select t.typbasetype where t.typtype = 'd'
    union all select t.typelem where t.typelem <> 0
    union all select r.rngsubtype from pg_range r where r.rngtypid = t.oid or r.rngmultitypid = t.oid
    union all select a.atttypid from pg_attribute a
      where t.typtype = 'c' and a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped) x(oid)
  where x.oid >= 16384)
select u.relid::int8, u.oid::text, 'name', n.nspname || '.' || t.typname
from used u join pg_type t on t.oid = u.oid and t.typtype in ('c', 'e') join pg_namespace n on n.oid = t.typnamespace
union all
select u.relid::int8, u.oid::text, 'label/' || e.oid, e.enumlabel from used u join pg_enum e on e.enumtypid = u.oid
union all
select u.relid::int8, u.oid::text, 'attribute/' || a.attnum, a.atttypid || ',' || a.atttypmod
from used u join pg_type t on t.oid = u.oid and t.typtype = 'c'
join pg_attribute a on a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped
order by 1, 2, 3
"""
"""Below 16384 are the server's own types."""

PARTITIONS_FOLLOWED_SINCE = 150000
"""A walsender of an older server remembers of each table that it has met whether it is published, and as what. ATTACH
and DETACH do not make it forget (pgoutput.c: rel_sync_cache_relation_cb), a change of the publication or a new
walsender does."""

EMPTY = "select pg_relation_size(%s::oid) = 0 and (%s or coalesce(pg_stat_get_tuples_inserted(%s::oid), 0) = 0)"
"""Where the walsender may have met it before, a table that has lost all its rows is not as good as a new one."""

EMPTY_TIMEOUT = "1s"
"""How long a partition's lock is waited for to see whether it has rows."""


@dataclass(slots=True)
class _Memberships:
    """Which entries publish what: per publication a mark, per relation and schema the entries."""

    whole: list[tuple[str, bool]] = field(default_factory=list)
    heads: dict[int, tuple[str, bool]] = field(default_factory=dict)
    tables: dict[int, list[tuple[int, str]]] = field(default_factory=dict)
    schemas: dict[int, list[tuple[int, str]]] = field(default_factory=dict)

    def of(
        self, oid: int, namespace: int, row_type: str, above: Iterable[tuple[int, str, int]]
    ) -> tuple[list[str], bool, bool]:
        """Entries that publish a table, whether it is named itself, and whether its TRUNCATE is published."""
        found = [(f"{head}/all", truncates) for head, truncates in self.whole]
        named = [(p, entry) for p, entry in self.tables.get(oid, ()) if p in self.heads]
        entries = list(named)
        # A table that moves to another schema leaves what is published by schema; back again, nobody sees it.
        entries += [(p, f"{entry}:{row_type}") for p, entry in self.schemas.get(namespace, ())]
        for ancestor, path, its_namespace in above:
            inherited = [*self.tables.get(ancestor, ()), *self.schemas.get(its_namespace, ())]
            entries += [(p, f"{entry}>{path}") for p, entry in inherited]
        for pub, entry in entries:
            if pub in self.heads:
                head, truncates = self.heads[pub]
                found.append((f"{head}/{entry}", truncates))
        return sorted(text for text, _ in found), bool(named), any(truncates for _, truncates in found)


class Looker:
    """Looks of one process at one source."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self._known_parts: set[int] = set()

    def look(
        self, connection: psycopg.Connection[Any], only: TableId | None = None
    ) -> tuple[list[catalog.Published], Catalog]:
        """What is published, and the catalog as one snapshot shows it; with `only`, of at most that table."""
        connection.execute("begin isolation level repeatable read read only")
        try:
            found, seen, new_parts = self._look(connection, only)
        finally:
            connection.execute("commit")  # of nothing: it only read
        if not new_parts:
            return found, seen
        empty = self._empty(connection, new_parts)
        self._known_parts |= set(new_parts)
        return found, replace(seen, tables=[_with_clean(t, empty) for t in seen.tables])

    def _look(
        self, connection: psycopg.Connection[Any], only: TableId | None
    ) -> tuple[list[catalog.Published], Catalog, list[int]]:
        """What is seen, and the partitions in it that have to be looked into."""
        config = self._config
        lsn, own, memberships = self._memberships(connection)
        found = catalog.published(connection, config)
        if only is not None:
            found = {oid: p for oid, p in found.items() if p.table == only}
        wanted = {} if only is not None else catalog.candidates(connection, config)
        oids = list(found)
        described = catalog.describe(connection, sorted({*oids, *wanted}))
        roots = [oid for oid in oids if oid in described and described[oid].kind == "p"]
        with connection.pipeline():
            facts_rows = connection.execute(FACTS, [oids])
            above_rows = connection.execute(ABOVE, [oids])
            below_rows = connection.execute(BELOW, [roots])
            mark_rows = connection.execute(MARKS, [oids])
            type_rows = connection.execute(TYPES, [oids])
        facts = {row[0]: row[1:] for row in facts_rows.fetchall()}
        above: dict[int, list[tuple[int, str, int]]] = {}
        for oid, ancestor, path, namespace in above_rows.fetchall():
            above.setdefault(oid, []).append((ancestor, path, namespace))
        parts, new_parts = self._parts(below_rows.fetchall())
        marks: dict[int, dict[int, str]] = {}
        for oid, attnum, mark in mark_rows.fetchall():
            marks.setdefault(oid, {})[attnum] = mark
        types: dict[int, dict[str, dict[str, str]]] = {}
        for oid, name, part, text in type_rows.fetchall():
            types.setdefault(oid, {}).setdefault(name, {})[part] = text
        tables = []
        for oid, published in found.items():
            # What was made after the transaction's snapshot is seen by the next look.
            if oid not in described or oid not in facts:
                continue
            namespace, storage, toast, row_type = facts[oid]
            entries, named, truncates = memberships.of(oid, namespace, row_type, above.get(oid, ()))
            tables.append(
                Fingerprint(
                    schema=catalog.declared(described[oid].sent(published.columns), config),
                    membership=tuple(entries),
                    truncates=truncates,
                    direct=named and described[oid].kind == "r",
                    storage=storage,
                    toast=toast,
                    marks=marks.get(oid, {}),
                    types=types.get(oid, {}),
                    parts=tuple(parts.get(oid, ())),
                )
            )
        unpublished = [
            Unpublished(table=table, oid=oid, fix=publication.add_statement(config.publication[0], table))
            for oid, table in publication.lacking(wanted, found, described).items()
        ]
        seen = Catalog(
            lsn=lsn,
            tables=tables,
            unpublished=unpublished,
            own=own,
            partitions_stick=connection.info.server_version < PARTITIONS_FOLLOWED_SINCE,
        )
        return list(found.values()), seen, new_parts

    def _memberships(self, connection: psycopg.Connection[Any]) -> tuple[int, bool, _Memberships]:
        names = list(self._config.publication)
        by_schema = connection.info.server_version >= 150000
        with connection.pipeline():
            publications = connection.execute(PUBLICATIONS, [publication.MADE_BY_US, names])
            listed = connection.execute(LISTED)
            schemas = connection.execute(SCHEMAS) if by_schema else None
        found = _Memberships()
        lsn, own = 0, False
        for oid, mark, whole, truncates, ours, position in publications.fetchall():
            lsn, own = parse_lsn(position), ours and len(names) == 1
            head = f"{oid}:{mark}", bool(truncates)
            found.heads[oid] = head
            if whole:
                found.whole.append(head)
        for pub, relation, entry in listed.fetchall():
            found.tables.setdefault(relation, []).append((pub, entry))
        for pub, namespace, entry in schemas.fetchall() if schemas is not None else ():
            found.schemas.setdefault(namespace, []).append((pub, entry))
        return lsn, own, found

    def _parts(self, rows: Sequence[tuple[int, int, int, str, bool, bool]]) -> tuple[dict[int, list[Part]], list[int]]:
        """Partitions by root, and those of them that may be new and have to be looked into."""
        parts: dict[int, list[Part]] = {}
        unclear = []
        for root, oid, storage, mark, pristine, has_first_file in rows:
            parts.setdefault(root, []).append(Part(oid=oid, storage=storage, mark=mark, clean=pristine))
            if not pristine and has_first_file and oid not in self._known_parts:
                unclear.append(oid)
        return parts, unclear

    def _empty(self, connection: psycopg.Connection[Any], oids: list[int]) -> set[int]:
        """Which of the relations have no rows; one that is locked counts as having some."""
        empty = set()
        followed = connection.info.server_version >= PARTITIONS_FOLLOWED_SINCE
        for oid in oids:
            try:
                connection.execute("begin read only")
                connection.execute(f"set local lock_timeout = '{EMPTY_TIMEOUT}'".encode())
                row = connection.execute(EMPTY, [oid, followed, oid]).fetchone()
                if row is not None and row[0]:
                    empty.add(oid)
            except psycopg.errors.LockNotAvailable:
                pass
            finally:
                connection.execute("commit")  # of nothing: it only read
        return empty


def _with_clean(found: Fingerprint, empty: set[int]) -> Fingerprint:
    if not any(p.oid in empty for p in found.parts):
        return found
    return replace(found, parts=tuple(replace(p, clean=p.clean or p.oid in empty) for p in found.parts))
