"""What `cdc check` finds at a Postgres server beside slot, publication and tables: settings, room, role, path, release.

Every finding that is no `ok` names the statement that mends it. Reads only; one connection, the caller's. It does not
decide whether a daemon may start: what a start cannot do without fails there by itself, with the same words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
from psycopg import sql

from cdc.config import SourceConfig
from cdc.errors import SourceRefused
from cdc.ports import Finding, SourceStatus
from cdc.table import TableSchema
from cdc.types import arrow_type, is_time
from connectors.postgres import catalog
from connectors.postgres.connection import MANY_HOSTS, MANY_HOSTS_FIX, POOLER, POOLER_FIX, many_hosts

SETTINGS = """
select name, setting from pg_settings
where name in ('wal_level', 'max_replication_slots', 'max_wal_senders', 'max_slot_wal_keep_size', 'wal_sender_timeout',
               'idle_replication_slot_timeout')
"""

FACTS = """
select (select count(*) from pg_replication_slots), (select count(*) from pg_stat_replication), pg_is_in_recovery(),
       exists (select from pg_replication_slots where slot_name = %(slot)s),
       exists (select from pg_replication_slots where slot_name = %(slot)s and active),
       pg_backend_pid()
"""

ROLE = """
select r.rolname, r.rolsuper, r.rolconnlimit,
       r.rolsuper or r.rolreplication or exists (
         select from pg_roles g where g.rolname = 'rds_replication' and pg_has_role(r.oid, g.oid, 'member')),
       pg_has_role(r.oid, 'pg_monitor', 'usage'),
       has_database_privilege(r.oid, current_database(), 'create'), current_database(),
       (select p.oid::regprocedure::text from pg_proc p
        where p.proname = 'pg_logical_emit_message' and p.proargtypes[2] = 'text'::regtype
          and not has_function_privilege(r.oid, p.oid, 'execute') limit 1)
from pg_roles r where r.rolname = current_user
"""

HIDDEN_BY_POLICIES = """
select n.nspname, c.relname, c.relowner = (select oid from pg_roles where rolname = current_user)
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.oid = any(%s) and row_security_active(c.oid)
order by 1, 2
"""

FOREIGN_TABLES = """
select n.nspname, c.relname, pg_get_userbyid(c.relowner)
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.oid = any(%s) and not pg_has_role(current_user, c.relowner, 'usage')
order by 1, 2
"""

CONNECTIONS_NEEDED = 8
"""Stream, catalog, snapshots, guard, and commands beside them."""
KEEP_LEAST_BYTES = 1 << 30
"""A limit of WAL below this is used up by a short pause of a busy daemon."""
SENDER_LEAST_MS = 10_000
"""Status goes out every 5 s."""

ADVISORIES: Sequence[tuple[int, int, str]] = tuple(
    (
        release,
        fixed,
        "logical decoding can fail with 'invalid memory alloc request size' once tables are altered while other"
        " transactions run, and then never gets past that place",
    )
    for release, fixed in ((130021, 130022), (140018, 140019), (150013, 150014), (160009, 160010), (170005, 170006))
)
"""Releases with a fault that slots run into: (that release, the one that mends it, what happens)."""


def server_findings(connection: psycopg.Connection[Any], config: SourceConfig, where: str) -> list[Finding]:
    """Settings, free slots and senders, standby, release, and what stands between us and the server."""
    settings = dict(connection.execute(SETTINGS).fetchall())
    row = connection.execute(FACTS, {"slot": config.slot}).fetchone()
    assert row is not None
    slots, senders, standby, has_slot, active, backend_pid = row
    findings: list[Finding] = []

    def find(name: str, severity: str, message: str, fix: str) -> None:
        findings.append(Finding(name=name, severity=severity, message=message, fix=fix, object=where))

    if settings["wal_level"] != "logical":
        find(
            "wal_level", "error", f"wal_level is {settings['wal_level']!r}, logical replication needs 'logical'",
            "alter system set wal_level = 'logical'; -- then restart the server",
        )  # fmt: skip
    for setting, used, needed in (
        ("max_replication_slots", slots, not has_slot),
        ("max_wal_senders", senders, not active),
    ):
        if needed and int(settings[setting]) <= used:
            find(
                setting, "error", f"{setting} is {settings[setting]} and all are used",
                f"alter system set {setting} = {used + 2}; -- then restart the server",
            )  # fmt: skip
    if standby:
        find(
            "standby", "error", "the server is a standby: snapshots there leave out running transactions",
            "point the source's dsn at the primary",
        )  # fmt: skip
    if backend_pid != connection.info.backend_pid:
        find("pooler", "error", POOLER, POOLER_FIX)
    if many_hosts(config.dsn):
        find("hosts", "error", MANY_HOSTS, MANY_HOSTS_FIX)
    findings += _limits(settings, where)
    findings += advisories(connection.info.server_version, where)
    return findings


def advisories(server_version: int, where: str) -> list[Finding]:
    """Known faults of this very release that slots run into."""
    return [
        Finding(
            name="release",
            severity="warning",
            message=f"Postgres {_release(release)}: {what}",
            fix=f"upgrade to {_release(fixed)} or later",
            object=where,
        )
        for release, fixed, what in ADVISORIES
        if server_version == release
    ]


def _release(version: int) -> str:
    return f"{version // 10_000}.{version % 10_000}"


def _limits(settings: dict[str, str], where: str) -> Iterator[Finding]:
    """Settings under which a slot is lost too early, or never."""
    keep = int(settings["max_slot_wal_keep_size"])  # in MB
    if keep == -1:
        yield Finding(
            name="max_slot_wal_keep_size",
            severity="info",
            message="a slot that is not read keeps WAL without a limit",
            fix="alter system set max_slot_wal_keep_size = '100GB'; -- the disk's share that WAL may take",
            object=where,
        )
    elif keep << 20 < KEEP_LEAST_BYTES:
        yield Finding(
            name="max_slot_wal_keep_size",
            severity="warning",
            message=f"the slot is lost as soon as {keep} MB of WAL wait for it; then every table is read anew",
            fix="alter system set max_slot_wal_keep_size = '100GB'; -- the disk's share that WAL may take",
            object=where,
        )
    timeout = int(settings["wal_sender_timeout"])  # in ms
    if timeout == 0:
        yield Finding(
            name="wal_sender_timeout",
            severity="warning",
            message="the server never gives up a connection whose other end is gone: the slot stays taken",
            fix="alter system set wal_sender_timeout = '60s'; select pg_reload_conf();",
            object=where,
        )
    elif timeout < SENDER_LEAST_MS:
        yield Finding(
            name="wal_sender_timeout",
            severity="warning",
            message=f"the server gives a connection up after {timeout} ms of silence: a busy machine is cut off",
            fix="alter system set wal_sender_timeout = '60s'; select pg_reload_conf();",
            object=where,
        )
    if int(settings.get("idle_replication_slot_timeout", 0)):
        yield Finding(
            name="idle_replication_slot_timeout",
            severity="warning",
            message="the slot is lost when the daemon is down for longer than this; then every table is read anew",
            fix="alter system set idle_replication_slot_timeout = 0; select pg_reload_conf();",
            object=where,
        )


def role_findings(connection: psycopg.Connection[Any], config: SourceConfig) -> list[Finding]:
    """What the role may not do, with the GRANT that is missing."""
    row = connection.execute(ROLE).fetchone()
    assert row is not None
    user, superuser, limit, may_replicate, may_monitor, may_create, database, emit = row
    role = sql.Identifier(user).as_string(connection)
    findings: list[Finding] = []

    def find(name: str, severity: str, message: str, fix: str) -> None:
        findings.append(Finding(name=name, severity=severity, message=message, fix=fix, object=user))

    if not may_replicate:
        find(
            "replication privilege", "error", f"role {user!r} may not replicate",
            f"alter role {role} replication; -- Amazon RDS: grant rds_replication to {role};",
        )  # fmt: skip
    if emit:
        find("message privilege", "error",
             f"role {user!r} may not write logical messages: heartbeat, wait, verify and quiet snapshots need them",
             f"grant execute on function pg_catalog.{emit} to {role};")  # fmt: skip
    if not superuser and 0 <= limit < CONNECTIONS_NEEDED:
        find("connection limit", "error",
             f"role {user!r} may have {limit} connections, {CONNECTIONS_NEEDED} are needed",
             f"alter role {role} connection limit {CONNECTIONS_NEEDED};")  # fmt: skip
    if not may_monitor:
        find("monitor privilege", "info",
             f"role {user!r} does not see the size of pg_wal, nor what other sessions do that hold WAL back",
             f"grant pg_monitor to {role}; -- optional")  # fmt: skip
    missing = connection.execute(
        "select name from unnest(%s::text[]) name where not exists (select from pg_publication where pubname = name)",
        [list(config.publication)],
    ).fetchall()
    if missing and not may_create:
        find("publication privilege", "error",
             f"publication {missing[0][0]!r} does not exist, and role {user!r} may not create it",
             f"let the tables' owner create it, or: grant create on database"
             f" {sql.Identifier(database).as_string(connection)} to {role};")  # fmt: skip
    return findings


def access_findings(
    connection: psycopg.Connection[Any], config: SourceConfig, oids: Sequence[int], unpublished: Sequence[int]
) -> list[Finding]:
    """Tables whose rows policies hide from us, and tables that `setup` would publish but that others own."""
    user = connection.info.user
    role = sql.Identifier(user).as_string(connection)
    findings = [
        Finding(
            name="row security",
            severity="error",
            message=f"policies hide rows of {schema}.{name} from role {user!r}: a snapshot of it is refused",
            fix=(f"alter table {_name(connection, schema, name)} no force row level security;" if is_owner
                 else f"alter role {role} bypassrls; -- or leave the table out: exclude = [\"{schema}.{name}\"]"),
            object=f"{schema}.{name}",
        )
        for schema, name, is_owner in connection.execute(HIDDEN_BY_POLICIES, [list(oids)]).fetchall()
    ]  # fmt: skip
    publication = sql.Identifier(config.publication[0]).as_string(connection)
    findings += [
        Finding(
            name="table owner",
            severity="error",
            message=f"only the owner of {schema}.{name} can publish it, role {user!r} is not",
            fix=f"as {owner}: alter publication {publication} add table {_name(connection, schema, name)};"
            f" -- or, if it does not exist: create publication {publication} for table …",
            object=f"{schema}.{name}",
        )
        for schema, name, owner in connection.execute(FOREIGN_TABLES, [list(unpublished)]).fetchall()
    ]
    return findings


def declared_findings(config: SourceConfig, schemas: Sequence[TableSchema]) -> list[Finding]:
    """Types that the configuration declares for columns that are not there, or that cannot be held so."""
    found = []
    by_name = {str(schema.table): schema for schema in schemas}
    for table, section in config.table.items():
        schema = by_name.get(table)
        names = {c.name for c in schema.columns} if schema is not None else set()
        for name in sorted(section.columns.keys() - names):
            what = f"table {table} has no column {name!r}" if schema is not None else f"table {table} is not captured"
            found.append(
                Finding(
                    name="declared column",
                    severity="warning",
                    message=f"{what}, but a type is declared for it",
                    fix=f'mend [source.{config.name}.table."{table}"] columns.{name}',
                    object=table,
                )
            )
        try:
            if schema is not None:
                catalog.declared(schema, config)
        except SourceRefused as e:
            found.append(Finding(name="declared column", severity="error", message=e.args[0], fix=e.hint, object=table))
    return found


def partition_findings(config: SourceConfig, schemas: Sequence[TableSchema]) -> list[Finding]:
    """Times that the configuration partitions tables by, and that are not there, or are no times."""
    found = []
    by_name = {str(schema.table): schema for schema in schemas}
    for table in config.table:
        by, schema = config.partition_by(table), by_name.get(table)
        if by is None:
            continue
        column = next((c for c in schema.columns if c.name == by.column), None) if schema is not None else None
        if schema is None:
            what = f"table {table} is not captured"
        elif column is None:
            what = f"table {table} has no column {by.column!r}"
        elif not is_time(arrow_type(column)) or (declared := config.declared(table, by.column)):
            kind = column.type_name if not is_time(arrow_type(column)) else f"declared as {declared}"
            what = f"column {by.column!r} of table {table} is {kind}, no date, timestamp or timestamptz"
        else:
            continue
        found.append(
            Finding(
                name="partition_by",
                severity="warning" if schema is None else "error",
                message=f"{what}, but partition_by names it" + ("" if schema is None else ": rows land without a date"),
                fix=f'mend [source.{config.name}.table."{table}"] partition_by',
                object=table,
            )
        )
    return found


def wal_findings(status: SourceStatus, slot: str) -> list[Finding]:
    """What the slot keeps, against the server's limit and its disk."""
    if not status.slot_exists:
        return []
    limit = status.wal_keep_bytes
    against = f"max_slot_wal_keep_size is {limit >> 20} MB" if limit is not None else "there is no limit"
    disk = f"pg_wal holds {status.wal_dir_bytes >> 20} MB" if status.wal_dir_bytes is not None else ""
    held = f"; the oldest open transaction is {status.oldest_writer}" if status.oldest_writer else ""
    near = limit is not None and status.retained_bytes > limit // 2
    message = f"slot {slot!r} keeps {status.retained_bytes >> 20} MB of WAL; {against}"
    return [
        Finding(
            name="retained WAL",
            severity="warning" if near else "ok",
            message=f"{message}, {disk}{held}" if disk else message + held,
            fix="start the daemon, or look why it is behind: cdc status" if near else "",
            object=slot,
        )
    ]


def _name(connection: psycopg.Connection[Any], schema: str, name: str) -> str:
    return sql.Identifier(schema, name).as_string(connection)
