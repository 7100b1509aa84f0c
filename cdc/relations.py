"""The lake's tables as DuckDB views, behind a wall: no network, no extension, no file but those of these tables.

`<source>.<table>` is a current table of schema public, `<source>."<schema>.<table>"` one of another schema, and the
suffix `_changelog` names its changelog. A view reads exactly the objects of one Delta version, under that version's
schema, so a column that an older object lacks is NULL and nothing depends on an extension. DuckDB costs tens of
megabytes: it is imported by the functions that need it, so a daemon without models never loads it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdc.errors import CdcError, ModelFailed, StoreUnavailable
from cdc.instant import Known, Shown, Where, fresh_views, merged_view
from cdc.lake.current import MERGED, CurrentTable
from cdc.lake.delta import DeltaLog
from cdc.lake.layout import changelog_path, current_path
from cdc.ports import ObjectStore
from cdc.sqltext import literal, objects, quoted
from cdc.table import TableId

if TYPE_CHECKING:
    import duckdb

CHANGELOG_SUFFIX = "_changelog"
MEMORY_LIMIT = "512MB"
THREADS = 2

Sources = Mapping[str, Collection[TableId]]
"""Source → its tables."""
Versions = Mapping[str, Mapping[TableId, int]]
"""Source → table → Delta version of its `current`: what a recorded cut holds (cdc.state.Cut.versions)."""

_RESERVED = frozenset(("memory", "temp", "system", "pg_catalog", "information_schema"))
_GLOB = frozenset("*?[")


@dataclass(frozen=True, slots=True, order=True)
class Relation:
    """One view: a table's current rows, or its changelog."""

    source: str
    table: TableId
    changelog: bool = False

    @property
    def name(self) -> str:
        """Its name inside the schema `source`."""
        plain = self.table.name if self.table.schema == "public" else str(self.table)
        return plain + (CHANGELOG_SUFFIX if self.changelog else "")

    def __str__(self) -> str:
        return f"{self.source}.{quoted(self.name) if '.' in self.name else self.name}"


def named_relations(sql: str) -> set[tuple[str, str]]:
    """(schema, name) of every table that one SELECT names, as written; parses only, binds and runs nothing.

    ModelFailed if it is not exactly one SELECT, or names a table without its source.
    """
    import duckdb

    with open_files() as connection:
        try:
            row = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchone()
        except duckdb.Error as error:
            raise ModelFailed(f"the SQL cannot be parsed: {first_line(error)}") from error
    tree: dict[str, Any] = json.loads(row[0]) if row else {"error": True}
    if tree.get("error"):
        if tree.get("error_type") == "not implemented":
            raise ModelFailed("the SQL is no SELECT", hint="a model is one SELECT; write a PIVOT as a subquery")
        raise ModelFailed(f"the SQL cannot be parsed: {tree.get('error_message', 'unknown reason')}")
    if len(tree["statements"]) != 1:
        raise ModelFailed(f"the SQL holds {len(tree['statements'])} statements", hint="a model is one SELECT")
    tables: set[tuple[str, str]] = set()
    common: set[str] = set()
    _collect(tree, tables, common)
    found = set()
    for schema, name in tables:
        if schema:
            found.add((schema, name))
        elif name.lower() not in common:
            raise ModelFailed(f'"{name}" names no source', hint=f"write <source>.{name}, as in shop.{name}")
    return found


def _collect(node: Any, tables: set[tuple[str, str]], common: set[str]) -> None:
    if isinstance(node, list):
        for item in node:
            _collect(item, tables, common)
    elif isinstance(node, dict):
        if node.get("type") == "BASE_TABLE":
            tables.add((node.get("schema_name") or "", node["table_name"]))
        for entry in (node.get("cte_map") or {}).get("map", ()):
            common.add(entry["key"].lower())
        for value in node.values():
            _collect(value, tables, common)


def resolve(names: Collection[tuple[str, str]], sources: Sources) -> tuple[set[Relation], set[tuple[str, str]]]:
    """The relations that `names` mean, and the names that mean none. As in DuckDB, letters' case does not count.

    ModelFailed where two tables answer to one name (they differ in case only, or one's name ends like a changelog's).
    """
    known: dict[tuple[str, str], list[Relation]] = {}
    for source, tables in sources.items():
        for table in tables:
            for relation in (Relation(source, table), Relation(source, table, changelog=True)):
                known.setdefault((source.lower(), relation.name.lower()), []).append(relation)
    found: set[Relation] = set()
    unknown: set[tuple[str, str]] = set()
    for schema, name in names:
        matches = known.get((schema.lower(), name.lower()), [])
        if len(matches) > 1:
            raise ModelFailed(
                f"{schema}.{name} may mean {' or '.join(_spelled(m) for m in matches)}",
                hint="DuckDB does not tell names apart by letters' case; rename one of the tables at the source",
            )
        if matches:
            found.add(matches[0])
        else:
            unknown.add((schema, name))
    return found, unknown


def _spelled(relation: Relation) -> str:
    return f"{'the changelog of ' if relation.changelog else ''}{relation.source}.{relation.table}"


@contextmanager
def open_views(
    store: ObjectStore,
    relations: Collection[Relation],
    versions: Versions | None = None,
    *,
    fresh: Known | None = None,
    note: Callable[[str], None] = lambda _: None,
    paths: set[str] | None = None,
    temp_dir: Path | None = None,
    memory_limit: str = MEMORY_LIMIT,
    threads: int = THREADS,
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection with a view per relation, closed afterwards; it can read these tables' objects only.

    `versions`: the `current` versions of a cut; tables that it does not name, or None: the newest. A changelog is read
    as of the version that its `current` has merged, so that both tell of one position. `fresh`: instead of that, tables
    are shown with the changes that have landed and are not merged, all of a source at one instant (cdc.instant), its
    changelogs too; a changelog that no table stands beside is read to its newest version. `note` takes a sentence for
    each table that is not of one instant with the others; `paths` takes the files that the views read. DuckDB spills to
    `temp_dir` (its own folder there), or fails at the memory limit if that is None. Objects of a store that is no local
    directory are copied there first, for as long as the connection is open: the wall has no door to the network.
    """
    # Made where there is something to copy.
    copies = (temp_dir or Path(tempfile.gettempdir())) / f"objects-{uuid.uuid4().hex}"
    paths = set() if paths is None else paths

    def where(key: str) -> str:
        path = local_path(store, key, copies)
        paths.add(path)
        return path

    try:
        if fresh is not None:
            views = _fresh(store, relations, fresh, where, copies, note)
        else:
            views = _as_merged(store, relations, versions, where, note)
        with open_files(paths, temp_dir, memory_limit, threads) as connection:
            for relation, body in views:
                _create_view(connection, relation, body)
            connection.execute("SET lock_configuration = true")
            yield connection
    finally:
        shutil.rmtree(copies, ignore_errors=True)


@contextmanager
def open_files(
    paths: Collection[str] = (), temp_dir: Path | None = None, memory_limit: str = "64MB", threads: int = 1
) -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty database in memory that may open `paths` (absolute) and nothing else; closed afterwards."""
    import duckdb

    settings: dict[str, Any] = {
        "memory_limit": memory_limit,
        "threads": threads,
        "temp_directory": "" if temp_dir is None else str(temp_dir / f"duckdb-{os.getpid()}"),
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
        "allow_persistent_secrets": False,
        # Otherwise a name that is no table would be looked up among the variables of whoever called us.
        "python_enable_replacements": False,
        "preserve_insertion_order": False,
    }
    try:
        connection = duckdb.connect(":memory:", config=settings)
    except duckdb.Error as error:
        raise ModelFailed(f"DuckDB does not start: {first_line(error)}") from error
    with connection:
        connection.execute("SET TimeZone = 'UTC'")
        if paths:
            connection.execute(f"SET allowed_paths = [{', '.join(map(literal, paths))}]")
        connection.execute("SET enable_external_access = false")
        yield connection


def _create_view(connection: duckdb.DuckDBPyConnection, relation: Relation, body: str) -> None:
    import duckdb

    if relation.source.lower() in _RESERVED:
        raise ModelFailed(
            f"a source called {relation.source} cannot be read by SQL: DuckDB keeps that name for itself",
            hint="rename the source",
        )
    try:
        connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(relation.source)}")
        connection.execute(f"CREATE VIEW {quoted(relation.source)}.{quoted(relation.name)} AS {body}")
    except (duckdb.IOException, duckdb.PermissionException) as error:
        # A path that is not there is looked for as a pattern, which the wall forbids.
        raise StoreUnavailable(
            f"an object of {relation} cannot be read", hint="a vacuum may have come between; the next run reads on"
        ) from error
    except duckdb.Error as error:
        raise ModelFailed(f"{relation} cannot be shown: {first_line(error)}") from error


def _as_merged(
    store: ObjectStore,
    relations: Collection[Relation],
    versions: Versions | None,
    where: Where,
    note: Callable[[str], None],
) -> list[tuple[Relation, str]]:
    """The views of tables as they are merged, at these versions or the newest."""
    for source, tables in sorted(_by_source(relations).items()):
        named = (versions or {}).get(source, {})
        if len(tables) > 1 and (unnamed := sorted(str(table) for table in tables if table not in named)):
            note(f"{', '.join(unnamed)} of {source}: as merged last, not at one recorded cut with the other tables")
    views: list[tuple[Relation, str]] = []
    merged: dict[tuple[str, TableId], Shown] = {}
    for relation in sorted(relations):
        version = (versions or {}).get(relation.source, {}).get(relation.table)
        named_table = (relation.source, relation.table)
        if not relation.changelog:
            merged[named_table] = merged_view(store, *named_table, where, version)
            views.append((relation, merged[named_table].sql))
            continue
        beside = merged.get(named_table)
        behind = _merged(store, relation, version) if beside is None else beside.changelog
        views.append((relation, _changelog(store, relation, behind, where)))
    return views


def _fresh(
    store: ObjectStore,
    relations: Collection[Relation],
    known: Known,
    where: Where,
    temp_dir: Path,
    note: Callable[[str], None],
) -> list[tuple[Relation, str]]:
    """The views of tables with what has landed, each source at one instant."""
    views: list[tuple[Relation, str]] = []
    rows = _by_source(r for r in relations if not r.changelog)
    instants = {
        source: fresh_views(store, source, sorted(tables), known, where, where, temp_dir=temp_dir)
        for source, tables in sorted(rows.items())
    }
    for source, tables in sorted(_by_source(relations).items()):
        if source in instants and instants[source].until is None and len(tables) > 1:
            note(f"tables of {source} are not of one instant: nobody knows up to where all of them have landed")
    for relation in sorted(relations):
        instant = instants.get(relation.source)
        shown = None if instant is None else instant.tables.get(relation.table)
        if not relation.changelog:
            assert shown is not None
            if shown.note:
                note(f"{relation} {shown.note}")
            views.append((relation, shown.sql))
            continue
        if shown is not None:
            behind = shown.changelog
        elif instant is not None and instant.until is not None:
            current = CurrentTable(store, relation.source, relation.table, temp_dir=temp_dir)
            behind = current.landed_until(instant.until, least=-1)
        else:
            behind = None
        views.append((relation, _changelog(store, relation, behind, where)))
    return views


def _by_source(relations: Iterable[Relation]) -> dict[str, set[TableId]]:
    found: dict[str, set[TableId]] = {}
    for relation in relations:
        found.setdefault(relation.source, set()).add(relation.table)
    return found


def _changelog(store: ObjectStore, relation: Relation, version: int | None, where: Where) -> str:
    """The SELECT of a changelog at a version (None: the newest)."""
    delta = DeltaLog(store, changelog_path(relation.source, relation.table))
    if not delta.exists():
        raise ModelFailed(f"{relation} is not in the lake yet", hint="`cdc status` shows how far its snapshot is")
    files = [where(f"{delta.prefix}/{file.path}") for file in delta.files(version)]
    return objects(delta.schema(version), files, delta.partition_columns())


def _merged(store: ObjectStore, relation: Relation, current_version: int | None) -> int | None:
    """The changelog's version that a version of `current` (None: the newest) stands for; None (the newest) if nothing
    is merged."""
    delta = DeltaLog(store, current_path(relation.source, relation.table))
    return delta.token(MERGED, current_version) if delta.exists() else None


def local_path(store: ObjectStore, key: str, copies: Path) -> str:
    """Where DuckDB finds an object: in place, or a copy of it in the folder `copies`, which is made."""
    location, options = store.location(key)
    if options or not location.startswith("/"):
        copy = copies / key
        if copy.exists():
            return str(copy)
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise StoreUnavailable(f"objects cannot be copied to {copies}: {e.strerror}", hint="make room there") from e
        part = copy.with_name(copy.name + ".part")
        if store.get(key, into=part) is None:
            raise StoreUnavailable(
                f"{key} is not in the lake any more", hint="a vacuum may have come between; the next run reads on"
            )
        part.replace(copy)
        location = str(copy)
    if _GLOB & set(location):
        raise ModelFailed(
            "the lake's path holds one of * ? [, which DuckDB would take for a pattern", hint="move the lake"
        )
    return location


def first_line(error: Exception) -> str:
    """What DuckDB says first; the rest quotes the statement."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def failure(error: Exception) -> CdcError:
    """Our error for one of DuckDB's. Messages about the statement are shown; those about values are not repeated."""
    import duckdb

    if isinstance(error, duckdb.OutOfMemoryException):
        return ModelFailed("the query needs more memory than it may use", hint="aggregate earlier, or read fewer rows")
    if isinstance(error, duckdb.PermissionException):
        return ModelFailed("the query reaches for something outside the lake", hint="it may read its tables only")
    if isinstance(error, duckdb.IOException | duckdb.HTTPException):
        return StoreUnavailable("an object of the lake cannot be read", hint="a vacuum may have come between")
    if isinstance(error, duckdb.InterruptException):
        return ModelFailed("the query was interrupted")
    if isinstance(error, duckdb.ParserException | duckdb.BinderException | duckdb.CatalogException):
        return ModelFailed(first_line(error))
    return ModelFailed(
        f"the query fails on the lake's values ({type(error).__name__.removesuffix('Exception')})",
        hint="run it with `cdc query` to see which value; try_cast() gives NULL where a cast fails",
    )
