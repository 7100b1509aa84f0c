"""What an operator's command does at a Postgres source that is compared periodically: check, look, and tell "now".

There is nothing to set up and nothing to tear down: no slot, no publication. `check` asks for what a run needs and for
nothing else. Reads only; each call has a connection of its own and its waits are bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql

from cdc.config import SourceConfig, password_of
from cdc.errors import CdcError
from cdc.ports import Finding, SourceStatus
from cdc.table import TableSchema
from cdc.types import DATE, INT2, INT4, INT8, TIMESTAMP, TIMESTAMPTZ
from connectors.postgres import catalog, check
from connectors.postgres.connection import (
    MANY_HOSTS,
    MANY_HOSTS_FIX,
    POOLER,
    POOLER_FIX,
    connect,
    describe,
    many_hosts,
    translated,
)
from connectors.postgres.replication import parse_lsn

FACTS = """
select pg_backend_pid(), pg_is_in_recovery(), current_user::text,
       current_setting('hot_standby_feedback'),
       has_function_privilege('pg_control_system()', 'execute')
"""

POSITION = """
select case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_insert_lsn() end::text
"""

MAY_READ = """
select c.oid::int8, has_table_privilege(c.oid, 'select') and has_schema_privilege(c.relnamespace, 'usage')
from pg_class c where c.oid = any(%s)
"""

INDEXED = """
select exists (select from pg_index i join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
               where i.indrelid = %s and a.attname = %s and i.indisvalid and i.indpred is null)
"""

CURSOR_TYPES = frozenset({INT2, INT4, INT8, DATE, TIMESTAMP, TIMESTAMPTZ})


class PeriodicAdmin:
    """Implements `SourceAdmin`."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self._where = describe(config.dsn)

    def check(self) -> list[Finding]:
        try:
            with self._connected() as connection:
                connected = f"connected to {self._where}"
                findings = [Finding(name="connection", severity="ok", message=connected, object=self._where)]
                findings += self._check_server(connection)
                findings += self._check_tables(connection)
        except CdcError as e:
            return [Finding(name="connection", severity="error", message=e.args[0], fix=e.hint, object=self._where)]
        return findings

    def setup(
        self, *, dry_run: bool, anew: bool = False, only: int | None = None, ddl_events: bool = False
    ) -> list[str]:
        return []

    def teardown(self, *, dry_run: bool) -> list[str]:
        return []

    def status(self) -> SourceStatus:
        return SourceStatus(head_lsn=self.barrier(), slot_exists=False)

    def barrier(self) -> int:
        """The server's position now; nothing is written. A run that begins from now on sees what is committed."""
        with self._connected() as connection:
            row = connection.execute(POSITION).fetchone()
        assert row is not None
        return parse_lsn(row[0])

    @contextmanager
    def _connected(self) -> Iterator[psycopg.Connection[Any]]:
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
        )
        try:
            with translated(self._where):
                yield connection
        finally:
            connection.close()

    def _check_server(self, connection: psycopg.Connection[Any]) -> Iterator[Finding]:
        row = connection.execute(FACTS).fetchone()
        assert row is not None
        pid, standby, user, feedback, may_identify = row
        if pid != connection.info.backend_pid:
            yield Finding(name="pooler", severity="error", message=POOLER, fix=POOLER_FIX, object=self._where)
        if many_hosts(self._config.dsn):
            yield Finding(name="hosts", severity="error", message=MANY_HOSTS, fix=MANY_HOSTS_FIX, object=self._where)
        if standby and feedback == "off":
            yield Finding(
                name="standby",
                severity="warning",
                message="the server is a standby without hot_standby_feedback: it may cancel a long run",
                fix="on the standby: alter system set hot_standby_feedback = on; select pg_reload_conf();",
                object=self._where,
            )
        if standby and self._config.strategy == "cursor":
            yield Finding(
                name="late commits",
                severity="warning",
                message="a standby does not tell which transactions are open: what commits later than cursor_lag_s"
                " after its cursor's value is found by the next full comparison only",
                fix="point the dsn at the primary, or raise cursor_lag_s above your longest transaction",
                object=self._where,
            )
        if not may_identify:
            yield Finding(
                name="server identity",
                severity="info",
                message=f"role {user!r} may not read the server's system identifier: it is told apart by the number of"
                " its database only",
                fix=f"grant execute on function pg_control_system(), pg_control_checkpoint() to"
                f" {sql.Identifier(user).as_string(connection)}; -- optional",
                object=user,
            )

    def _check_tables(self, connection: psycopg.Connection[Any]) -> list[Finding]:
        config = self._config
        tables = catalog.published(connection, config)
        if not tables:
            return [
                Finding(
                    name="tables",
                    severity="error",
                    message=f"no table matches `tables` of source {config.name!r}",
                    fix="check the globs; they match `schema.table`",
                    object=config.name,
                )
            ]
        findings = check.access_findings(connection, config, list(tables), [])
        may_read = dict(connection.execute(MAY_READ, [list(tables)]).fetchall())
        schemas = []
        for oid, found in catalog.describe(connection, list(tables)).items():
            schema = found.sent(tables[oid].columns)
            schemas.append(schema)
            if not may_read[oid]:
                findings.append(self._unreadable(connection, schema))
            findings += self._check_table(connection, schema)
        findings += check.declared_findings(config, schemas)
        return findings + check.partition_findings(config, schemas)

    def _unreadable(self, connection: psycopg.Connection[Any], schema: TableSchema) -> Finding:
        table = schema.table
        role = sql.Identifier(connection.info.user).as_string(connection)
        names = [sql.Identifier(*parts).as_string(connection) for parts in ((table.schema,), table)]
        return Finding(
            name="select privilege",
            severity="error",
            message=f"role {connection.info.user!r} may not read {table}",
            fix=f"grant usage on schema {names[0]} to {role}; grant select on {names[1]} to {role};",
            object=str(table),
        )

    def _check_table(self, connection: psycopg.Connection[Any], schema: TableSchema) -> Iterator[Finding]:
        table, cursor = str(schema.table), self._config.cursor
        if not schema.key:
            yield Finding(
                name="key",
                severity="info",
                message=f"table {table} has no primary key: its rows are compared as a multiset, an update is a delete"
                " and an insert",
                fix="alter table … add primary key (…); -- optional",
                object=table,
            )
        if not cursor:
            return
        column = next((c for c in schema.columns if c.name == cursor), None)
        if column is None or not schema.key or column.type_oid not in CURSOR_TYPES:
            why = (
                f"has no column {cursor!r}" if column is None
                else "has no primary key" if not schema.key
                else f"has {cursor!r} as {column.type_name}, which is no date, timestamp or integer"
            )  # fmt: skip
            yield Finding(
                name="cursor",
                severity="warning",
                message=f"table {table} {why}: every run reads it whole",
                fix='a source of its own with strategy = "diff" tells how often that is',
                object=table,
            )
            return
        row = connection.execute(INDEXED, [schema.oid, cursor]).fetchone()
        if row is None or not row[0]:
            name = sql.Identifier(*schema.table).as_string(connection)
            yield Finding(
                name="cursor index",
                severity="warning",
                message=f"table {table} has no index on {cursor!r}: every run scans it whole",
                fix=f"create index concurrently on {name} ({sql.Identifier(cursor).as_string(connection)});",
                object=table,
            )
        if not column.not_null:
            yield Finding(
                name="cursor nulls",
                severity="info",
                message=f"column {cursor!r} of table {table} may be NULL: such rows are read by every run",
                object=table,
            )
