"""What an operator's command does at a Postgres source: check, set up, tear down, look, and wait for "now".

`check` and `status` have no side effects. `setup` creates the publication first and the slot second: a slot that is
older than its publication cannot decode what lies between them. Every statement that changes something is returned
as text, so that an operator can read or run it by hand. Each call has a connection of its own and its waits are
bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql

from cdc.config import SourceConfig, password_of
from cdc.errors import CdcError, SourceRefused, SourceUnavailable
from cdc.ports import Finding, SourceStatus
from cdc.table import TableSchema
from connectors.postgres import catalog, check, publication, slot
from connectors.postgres import ddl_events as ddl
from connectors.postgres.connection import connect, describe, translated
from connectors.postgres.identity import identity_findings
from connectors.postgres.replication import parse_lsn

STATUS = """
select case when pg_is_in_recovery() then pg_last_wal_receive_lsn() else pg_current_wal_lsn() end::text,
       pg_snapshot_xmin(pg_current_snapshot())::text::int8,
       (select setting::int8 from pg_settings where name = 'max_slot_wal_keep_size'),
       has_function_privilege('pg_ls_waldir()', 'execute'),
       (select count(*) from pg_stat_activity a where a.backend_type = 'client backend' and a.state = 'active'
        and a.pid <> pg_backend_pid() and a.application_name not like 'cdc%')
"""

WRITERS = """
select coalesce('pid ' || l.pid::text || coalesce(' (' || nullif(a.application_name, '') || ')', ''),
                'prepared transaction ' || p.gid, 'unknown')
         || coalesce(', open since ' || date_trunc('second', coalesce(a.xact_start, p.prepared))::text, '') who,
       coalesce(a.xact_start, p.prepared) began
from pg_locks l
left join pg_stat_activity a on a.pid = l.pid
left join pg_prepared_xacts p on p.transaction = l.transactionid
where l.locktype = 'transactionid' and l.mode = 'ExclusiveLock' and l.granted
  and l.pid is distinct from pg_backend_pid()
"""
"""Transactions of any database that have written and not ended: a slot's creation waits for them, and as long as one
is open, WAL from its begin on is kept. The begin of others' sessions needs pg_monitor."""

ESTIMATES = """
select n.nspname || '.' || c.relname, c.reltuples::int8
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p') and c.relpersistence = 'p' and c.reltuples >= 0
  and n.nspname not in ('pg_catalog', 'information_schema') and n.nspname not like 'pg\\_toast%'
limit 20000
"""
"""What the last VACUUM or ANALYZE counted; a table that none has met is not there."""

OLDEST_WRITER = f"select who from ({WRITERS}) w order by began nulls last limit 1"


class PostgresAdmin:
    """Implements `SourceAdmin`."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self._where = describe(config.dsn)

    def check(self) -> list[Finding]:
        findings: list[Finding] = []
        try:
            with self._connected() as connection:
                findings.append(
                    Finding(name="connection", severity="ok", message=f"connected to {self._where}", object=self._where)
                )
                findings += check.server_findings(connection, self._config, self._where)
                findings += check.role_findings(connection, self._config)
                findings += self._check_slot(connection)
                findings += self._check_tables(connection)
                findings += check.wal_findings(self._status(connection), self._config.slot)
        except CdcError as e:
            findings.append(
                Finding(name="connection", severity="error", message=e.args[0], fix=e.hint, object=self._where)
            )
        return findings

    def setup(
        self, *, dry_run: bool, anew: bool = False, only: int | None = None, ddl_events: bool = False
    ) -> list[str]:
        done: list[str] = []
        with self._connected() as connection:
            if only is not None:
                return self._run(connection, publication.add_sql(connection, self._config, only), dry_run=dry_run)
            if anew:
                done += slot.drop(connection, self._config.slot, dry_run=dry_run)
            for statement in publication.setup_sql(connection, self._config, self._where):
                done.append(statement)
                if not dry_run:
                    connection.execute(statement.encode())
            ours = slot.find(connection, self._config.slot)
            if ours is None or (anew and dry_run):
                slot_sql = slot.create_sql(connection, self._config.slot, failover=self._config.failover)
                done.append(slot_sql.as_string(connection))
                if not dry_run:
                    self._create_slot(connection, slot_sql)
            elif self._config.failover and ours.get("failover") is not True:
                done += self._alter_slot(connection, dry_run=dry_run)
            if ddl_events:
                done += self._run(connection, ddl.install_sql(connection), dry_run=dry_run)
        return done

    def _run(self, connection: psycopg.Connection[Any], statements: list[str], *, dry_run: bool) -> list[str]:
        for statement in statements if not dry_run else ():
            connection.execute(statement.encode())
        return statements

    def teardown(self, *, dry_run: bool) -> list[str]:
        done: list[str] = []
        with self._connected() as connection:
            done += slot.drop(connection, self._config.slot, dry_run=dry_run)
            done += self._run(connection, ddl.remove_sql(connection), dry_run=dry_run)
            for name in self._config.publication:
                comment = connection.execute(
                    "select obj_description(oid, 'pg_publication') from pg_publication where pubname = %s", [name]
                ).fetchone()
                # One that existed before us is not ours to drop.
                if comment is None or comment[0] != publication.MADE_BY_US:
                    continue
                statement = sql.SQL("drop publication {}").format(sql.Identifier(name))
                done.append(statement.as_string(connection))
                if not dry_run:
                    connection.execute(statement)
        return done

    def status(self) -> SourceStatus:
        with self._connected() as connection:
            return self._status(connection)

    def _status(self, connection: psycopg.Connection[Any]) -> SourceStatus:
        ours = slot.find(connection, self._config.slot) or {}
        row = connection.execute(STATUS).fetchone()
        assert row is not None
        head, xmin, keep_mb, may_look, active = row
        size = connection.execute("select sum(size)::int8 from pg_ls_waldir()").fetchone() if may_look else None
        writer = connection.execute(OLDEST_WRITER).fetchone()
        restart_lsn = parse_lsn(ours.get("restart_lsn"))
        fault, fault_hint = slot.fault_of(ours)
        return SourceStatus(
            head_lsn=parse_lsn(head),
            slot_exists=bool(ours),
            slot_active=ours.get("active") is True,
            slot_active_pid=ours.get("active_pid") or 0,
            confirmed_lsn=parse_lsn(ours.get("confirmed_flush_lsn")),
            restart_lsn=restart_lsn,
            retained_bytes=max(0, parse_lsn(head) - restart_lsn) if restart_lsn else 0,
            wal_status=ours.get("wal_status") or "",
            safe_wal_bytes=ours.get("safe_wal_size"),
            slot_fault=fault,
            slot_fault_hint=fault_hint,
            slot_failover=ours.get("failover") is True,
            oldest_xmin=xmin,
            wal_keep_bytes=keep_mb << 20 if keep_mb >= 0 else None,
            wal_dir_bytes=size[0] if size else None,
            active_clients=active,
            oldest_writer=writer[0] if writer else "",
            rows_estimated=dict(connection.execute(ESTIMATES).fetchall()),
        )

    def barrier(self) -> int:
        with self._connected() as connection:
            # A commit flushes everything before it, also commits of sessions with synchronous_commit = off.
            connection.execute("begin")
            connection.execute("set local synchronous_commit = local")
            row = connection.execute("select pg_logical_emit_message(true, 'cdc', 'barrier')::text").fetchone()
            connection.execute("commit")
        assert row is not None
        # The message's own position: its transaction carries the stream past it, however quiet the server is.
        return parse_lsn(row[0])

    @contextmanager
    def _connected(self, *, replication: bool = False) -> Iterator[psycopg.Connection[Any]]:
        config = self._config
        connection = connect(
            config.dsn,
            password=password_of(config),
            application_name="cdc admin",
            connect_timeout_s=config.connect_timeout_s,
            settings={
                "lock_timeout": f"{config.lock_timeout_s:g}s",
                "statement_timeout": f"{config.statement_timeout_s:g}s",
            },
            replication=replication,
        )
        try:
            with translated(self._where):
                yield connection
        finally:
            connection.close()

    def _alter_slot(self, connection: psycopg.Connection[Any], *, dry_run: bool) -> list[str]:
        """Make a failover slot of the one that exists; nobody may stream from it meanwhile."""
        slot.create_sql(connection, self._config.slot, failover=True)
        command = slot.alter_failover_command(self._config.slot)
        if not dry_run:
            with self._connected(replication=True) as walsender:
                walsender.execute(command.encode())
        return [command]

    def _create_slot(self, connection: psycopg.Connection[Any], statement: sql.Composed) -> None:
        """Bounded: making a slot waits for every transaction that has written, of whatever database. Past the bound we
        say whom it waits for; the server drops the half-made slot with the statement."""
        bound_s = 2 * self._config.lock_timeout_s
        for setting in ("lock_timeout", "statement_timeout"):
            connection.execute(f"set {setting} = '{bound_s:g}s'".encode())
        row = connection.execute("select now()").fetchone()
        assert row is not None
        try:
            connection.execute(statement)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled) as e:
            who = connection.execute(
                f"select who from ({WRITERS}) w where coalesce(began < %s, true) order by began".encode(), [row[0]]
            ).fetchall()
            raise SourceUnavailable(
                f"{self._where}: creating slot {self._config.slot!r} waits for transactions that have written and not"
                f" ended: {'; '.join(w[0] for w in who) or 'they have ended just now'}",
                hint="it is tried again; end them (pg_terminate_backend, rollback prepared) if they are forgotten ones",
            ) from e

    def _check_slot(self, connection: psycopg.Connection[Any]) -> list[Finding]:
        name = self._config.slot
        try:
            ours = slot.find(connection, name)
            if self._config.failover:
                slot.create_sql(connection, name, failover=True)
        except SourceRefused as e:
            return [Finding(name="slot", severity="error", message=e.args[0], fix=e.hint, object=name)]
        if ours is None:
            message = f"slot {name!r} does not exist yet"
            return [Finding(name="slot", severity="warning", message=message, fix="cdc setup", object=name)]
        fault, _ = slot.fault_of(ours)
        if fault:
            message = f"slot {name!r} cannot be read any more: {fault}"
            fix = f"cdc teardown {self._config.name}, then start again"
            return [Finding(name="slot", severity="error", message=message, fix=fix, object=name)]
        found = [Finding(name="slot", severity="ok", message=f"slot {name!r} exists", object=name)]
        return found + (slot.failover_findings(connection, ours) if self._config.failover else [])

    def _check_tables(self, connection: psycopg.Connection[Any]) -> list[Finding]:
        findings = publication.check(connection, self._config)
        there = catalog.published(connection, self._config)
        wanted = catalog.candidates(connection, self._config)
        described = catalog.describe(connection, sorted(set(there) | set(wanted)))
        lacking = publication.lacking(wanted, there, described)
        findings += check.access_findings(connection, self._config, [*there, *lacking], sorted(lacking))
        schemas = []
        for oid in [*there, *lacking]:
            if oid in described:
                findings += identity_findings(there.get(oid), described[oid])
                schema = described[oid].sent(there[oid].columns if oid in there else None)
                findings += self._check_table(connection, oid, schema)
                schemas.append(schema)
        findings += check.declared_findings(self._config, schemas)
        return findings + check.partition_findings(self._config, schemas)

    def _check_table(self, connection: psycopg.Connection[Any], oid: int, schema: TableSchema) -> list[Finding]:
        findings: list[Finding] = []
        row = connection.execute(
            "select has_table_privilege(%s::oid, 'select'), has_schema_privilege(relnamespace, 'usage'),"
            " current_user from pg_class where oid = %s::oid",
            [oid, oid],
        ).fetchone()
        if row is not None and not (row[0] and row[1]):
            findings.append(
                Finding(
                    name="select privilege",
                    severity="error",
                    message=f"role {row[2]!r} may not read {schema.table}",
                    fix=f'grant usage on schema {schema.table.schema} to "{row[2]}";'
                    f' grant select on {schema.table} to "{row[2]}";',
                    object=str(schema.table),
                )
            )
        return findings
