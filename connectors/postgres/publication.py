"""Whether the publications publish what `current` needs, and the SQL that makes and mends them.

A publication that leaves out an operation, or shows columns or rows in ways that do not go together, lets the lake
diverge and says nothing. Such a table is a finding of `check`, and it stops the stream and every snapshot, unless the
configuration declares it (`partial_operations`). Row filters and column lists by themselves are fine: what they hide is
hidden from snapshots and verify too.

It reads no rows and decides nothing about tables that are published whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

import psycopg
from psycopg import sql

from cdc.config import SourceConfig
from cdc.errors import SourceRefused
from cdc.ports import Finding
from cdc.table import TableId
from connectors.postgres import catalog
from connectors.postgres.catalog import OPERATIONS, Described, Published

MADE_BY_US = "made by cdc"
"""Comment on publications that `setup` made; `teardown` drops no others."""


def require_whole(where: str, tables: Iterable[Published], config: SourceConfig) -> None:
    """SourceRefused if what is published of a table could not be followed; names the table and the statement."""
    found = troubles(tables, config)
    if not found:
        return
    more = f" (and {len(found) - 1} more: see `cdc check`)" if len(found) > 1 else ""
    raise SourceRefused(f"{where}: {found[0].message}{more}", hint=found[0].fix)


def troubles(tables: Iterable[Published], config: SourceConfig) -> list[Finding]:
    """What is published in a way in which `current` could not equal the table; one finding per table at most."""
    return [finding for table in tables if (finding := _trouble(table, config)) is not None]


def _trouble(table: Published, config: SourceConfig) -> Finding | None:
    name = str(table.table)
    if len({part.columns for part in table.parts}) > 1:
        names = " and ".join(repr(part.publication) for part in table.parts)
        return Finding(
            name="column list",
            severity="error",
            message=f"publications {names} publish different columns of table {name}: Postgres cannot decode that",
            fix=f"alter publication {_quoted(table.parts[-1].publication)} drop table {_name(table.table)};"
            " -- or give it the same list of columns",
            object=name,
        )
    if any(fnmatchcase(name, pattern) for pattern in config.partial_operations):
        return None
    operations = {part.operations for part in table.parts}
    missing = [o for o in OPERATIONS if not any(o in of for of in operations)]
    partial = [part for part in table.parts if len(part.operations) < len(OPERATIONS)]
    if not missing and (not partial or len({part.row_filter for part in table.parts}) == 1):
        return None
    what = f"does not publish {', '.join(missing)}" if missing else "publishes operations under different row filters"
    return Finding(
        name="published operations",
        severity="error",
        message=f"publication {partial[0].publication!r} {what} of table {name}: `current` would differ from it",
        fix=f"alter publication {_quoted(partial[0].publication)} set (publish = 'insert, update, delete, truncate');"
        f' -- or declare it: partial_operations = ["{name}"]',
        object=name,
    )


def check(connection: psycopg.Connection[Any], config: SourceConfig) -> list[Finding]:
    """Findings about publications and the tables that they publish, or should."""
    there = catalog.published(connection, config)
    wanted = catalog.candidates(connection, config)
    oids = sorted(set(there) | set(wanted))
    described = catalog.describe(connection, oids)
    findings = _missing(connection, config)
    findings += [
        Finding(
            name="publication",
            severity="warning",
            message=f"table {table} is wanted, but publication {config.publication[0]!r} does not have it",
            fix="cdc setup",
            object=str(table),
        )
        for table in lacking(wanted, there, described).values()
    ]
    if not wanted and not there:
        findings.append(
            Finding(
                name="tables",
                severity="error",
                message=f"no table matches `tables` of source {config.name!r}",
                fix="check the globs; they match `schema.table`",
                object=config.name,
            )
        )
    findings += troubles(there.values(), config)
    for oid, published in there.items():
        if oid in described:
            findings += _check_columns(connection, published, described[oid])
            findings += _check_leaves(published, described[oid])
    return findings


def _missing(connection: psycopg.Connection[Any], config: SourceConfig) -> list[Finding]:
    """Publications that do not exist: with a slot that does, what lies between cannot be decoded."""
    rows = connection.execute(
        "select pubname from pg_publication where pubname = any(%s)", [list(config.publication)]
    ).fetchall()
    there = {name for (name,) in rows}
    return [
        Finding(
            name="publication",
            severity="warning",
            message=f"publication {name!r} does not exist yet",
            fix="cdc setup",
            object=name,
        )
        for name in config.publication
        if name not in there
    ]


def lacking(wanted: dict[int, TableId], there: Collection[int], described: dict[int, Described]) -> dict[int, TableId]:
    """Wanted tables that are not published, neither as themselves nor all of their partitions one by one."""
    return {
        oid: table
        for oid, table in wanted.items()
        if oid not in there
        and not (described[oid].leaves and all(leaf.oid in there for leaf in described[oid].leaves if leaf.kind == "r"))
    }


def _check_columns(connection: psycopg.Connection[Any], published: Published, described: Described) -> list[Finding]:
    """Generated columns that are not sent are absent from the lake: declared here, never NULL in silence."""
    schema = described.sent(published.columns)
    findings: list[Finding] = []
    stored = [name for name in schema.absent if name not in described.virtual]
    virtual = [name for name in schema.absent if name in described.virtual]
    name = _quoted(published.parts[0].publication)
    if stored:
        fix = "publish it with Postgres 18 or newer, or compute it in a model"
        if connection.info.server_version >= 180000:
            fix = f"alter publication {name} set (publish_generated_columns = stored); cdc resync {published.table}"
        findings.append(_absent(published.table, stored, "not published", fix))
    if virtual:
        findings.append(
            _absent(published.table, virtual, "virtual, which no publication sends", "compute it in a model")
        )
    sent = {c.name for c in schema.columns}
    torn = [k for k in described.schema.key if k not in sent]
    if torn:
        findings.append(
            Finding(
                name="key",
                severity="error",
                message=f"column {torn[0]!r} of the key of table {published.table} is not published: an update or"
                " delete stops the table",
                fix=f"alter publication {name} set table … -- with the whole key; or another replica identity",
                object=str(published.table),
            )
        )
    return findings


def _absent(table: TableId, columns: list[str], why: str, fix: str) -> Finding:
    names = ", ".join(columns)
    return Finding(
        name="generated columns",
        severity="info",
        message=f"generated columns of table {table} are absent from the lake: {names} ({why})",
        fix=fix,
        object=str(table),
    )


def _check_leaves(published: Published, described: Described) -> list[Finding]:
    """Partitions whose old rows are not what their root's name promises, or that are not in the stream at all."""
    findings: list[Finding] = []
    root = described.schema
    for leaf in described.leaves:
        if leaf.kind != "r":
            message = (
                f"partition {leaf.table} of {published.table} is a foreign table: its changes are not in the stream"
            )
            fix = f"alter table {_name(published.table)} detach partition {_name(leaf.table)};"
        elif not leaf.carries(root.key):
            message = (
                f"the replica identity of partition {leaf.table} does not hold the key of {published.table}:"
                " an update or delete stops the table"
            )
            fix = f"alter table {_name(leaf.table)} replica identity full;"
        else:
            continue
        findings.append(
            Finding(name="partition", severity="error", message=message, fix=fix, object=str(published.table))
        )
    return findings


def setup_sql(connection: psycopg.Connection[Any], config: SourceConfig, where: str) -> list[str]:
    """What is missing of the configured publications, as statements."""
    statements: list[str] = []
    wanted = catalog.candidates(connection, config)
    existing = {
        r[0]: r[1]
        for r in connection.execute(
            "select pubname, obj_description(oid, 'pg_publication') from pg_publication where pubname = any(%s)",
            [list(config.publication)],
        ).fetchall()
    }
    missing = [p for p in config.publication if p not in existing]
    if len(config.publication) > 1 and missing:
        raise SourceRefused(
            f"{where}: publication {missing[0]!r} does not exist",
            hint="create it, or name one publication only: `cdc setup` then makes it",
        )
    name = config.publication[0]
    if missing:
        if not wanted:
            raise SourceRefused(
                f"{where}: no table matches `tables` of source {config.name!r}",
                hint="check the globs; they match `schema.table`",
            )
        tables = sql.SQL(", ").join(sql.Identifier(*t) for t in wanted.values())
        statements.append(
            sql.SQL("create publication {} for table {} with (publish_via_partition_root = true)")
            .format(sql.Identifier(name), tables)
            .as_string(connection)
        )
        comment = sql.SQL("comment on publication {} is {}").format(sql.Identifier(name), sql.Literal(MADE_BY_US))
        statements.append(comment.as_string(connection))
    elif existing[name] == MADE_BY_US:
        there = catalog.published(connection, config)
        absent = lacking(wanted, there, catalog.describe(connection, list(wanted)))
        statements += [add_statement(name, table) for table in absent.values()]
    return statements


def add_sql(connection: psycopg.Connection[Any], config: SourceConfig, oid: int) -> list[str]:
    """The statement that adds one wanted table to the publication, if that was made by us."""
    table = catalog.candidates(connection, config).get(oid)
    ours = connection.execute(
        "select 1 from pg_publication where pubname = %s and obj_description(oid, 'pg_publication') = %s",
        [config.publication[0], MADE_BY_US],
    ).fetchone()
    return [add_statement(config.publication[0], table)] if table is not None and ours is not None else []


def add_statement(publication: str, table: TableId) -> str:
    """The statement that adds a table to a publication."""
    return f"alter publication {_quoted(publication)} add table {_name(table)}"


def _quoted(name: str) -> str:
    """An identifier as it stands in a statement; always quoted: it may be a word that Postgres keeps for itself."""
    return '"' + name.replace('"', '""') + '"'


def _name(table: TableId) -> str:
    return ".".join(_quoted(part) for part in table)
