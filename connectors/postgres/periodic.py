"""All tables of a source in one snapshot, for periodic runs: no slot, no publication, no right but SELECT.

Guarantees: every table is locked in ACCESS SHARE mode before the snapshot is taken, so no rewrite shows it empty; all
tables are seen as of the same moment; `row_security = off`; COPY as CSV and the cast of the stream. Works on a primary
of any `wal_level` and on a standby. The snapshot stays open for the whole run. It writes nothing and compares nothing
(cdc.periodic does).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

import psycopg
import pyarrow as pa
from psycopg import sql

from cdc.config import SourceConfig, password_of
from cdc.errors import SourceUnavailable
from cdc.ports import Past, RowsRead, RunSnapshot, RunTable, SourceIdentity
from cdc.table import TableSchema
from cdc.types import build_raw, cast
from connectors.postgres import catalog
from connectors.postgres.connection import connect, describe, take_any_bytes, translated
from connectors.postgres.replication import parse_lsn
from connectors.postgres.snapshot import parse_csv

PIECE_BYTES = 2 << 20
"""Text of one piece at most, a longer row apart: it is held several times while it is cast."""

READABLE = """
select c.oid::int8, has_table_privilege(c.oid, 'select') and has_schema_privilege(c.relnamespace, 'usage'),
       row_security_active(c.oid), current_user::text
from pg_class c where c.oid = any(%s)
"""

SIZES = """
select c.oid::int8, coalesce(sum(pg_table_size(coalesce(t.relid, c.oid))), 0)::int8
from pg_class c left join lateral pg_partition_tree(c.oid) t on t.isleaf
where c.oid = any(%s) group by 1
"""

ALIVE = """
select coalesce(l.virtualxid, 'prepared ' || l.transactionid::text)
from pg_locks l left join pg_stat_activity a on a.pid = l.pid
where l.granted and l.mode = 'ExclusiveLock' and l.pid is distinct from pg_backend_pid()
  and (l.locktype = 'virtualxid' or (l.locktype = 'transactionid' and l.pid is null))
  and coalesce(a.datname, current_database()) = current_database()
"""
"""Every open transaction holds a lock on its virtual id, before it has written too; a prepared one only on its id."""

CLOCK = "select (extract(epoch from clock_timestamp()) * 1000000)::int8"

TAKEN = """
select pg_current_snapshot()::text,
       case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_insert_lsn() end::text,
       (extract(epoch from clock_timestamp()) * 1000000)::int8
"""

IDENTITY = """
select current_database(), (select oid::int8 from pg_database where datname = current_database()),
       case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_insert_lsn() end::text,
       has_function_privilege('pg_control_system()', 'execute')
         and has_function_privilege('pg_control_checkpoint()', 'execute')
"""

CONTROL = """
select (select system_identifier from pg_control_system())::text, (select timeline_id from pg_control_checkpoint())
"""


class PostgresRunReader:
    """Implements `RunReader`; keeps one connection, reopened when it broke."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self._where = describe(config.dsn)
        self._connection: psycopg.Connection[Any] | None = None
        self._described: dict[int, catalog.Described] = {}

    def identity(self) -> SourceIdentity:
        with translated(self._where):
            connection = self._ready()
            row = connection.execute(IDENTITY).fetchone()
            assert row is not None
            database, oid, position, may_look = row
            # Where a provider took that away, the database's number must do: it says less.
            control = connection.execute(CONTROL).fetchone() if may_look else (f"database {oid}", 0)
            assert control is not None
            return SourceIdentity(
                system_id=str(control[0]),
                timeline=int(control[1]),
                database=database,
                server_version=connection.info.server_version,
                head_lsn=parse_lsn(position),
            )

    def begin(self) -> RunSnapshot:
        self.end()
        with translated(self._where):
            connection = self._ready()
            published = catalog.published(connection, self._config)
            refused = self._refused(connection, published)
            sizes = dict(connection.execute(SIZES, [[oid for oid in published if oid not in refused]]).fetchall())
            before = catalog.describe(connection, list(published))
            clock = connection.execute(CLOCK).fetchone()
            alive = frozenset(name for (name,) in connection.execute(ALIVE).fetchall())
            try:
                self._lock(connection, [before[oid] for oid in published if oid in before and oid not in refused])
            except psycopg.errors.UndefinedTable as e:
                raise SourceUnavailable(f"{self._where}: a table was dropped or renamed while the run began") from e
            taken = connection.execute(TAKEN).fetchone()
            assert clock is not None
            assert taken is not None
            self._described = catalog.describe(connection, list(published))
            tables = []
            for oid, found in self._described.items():
                if oid not in refused and (oid not in before or found.schema.table != before[oid].schema.table):
                    raise SourceUnavailable(f"{self._where} table {found.schema.table} was renamed while the run began")
                schema = catalog.as_read(found, published[oid], self._config)
                tables.append(
                    RunTable(
                        schema=schema, storage=found.relfilenode, bytes=sizes.get(oid, 0), refused=refused.get(oid)
                    )
                )
        return RunSnapshot(
            lsn=parse_lsn(taken[1]),
            taken_at_us=int(taken[2]),
            clock_us=int(clock[0]),
            alive=alive,
            tables=tables,
        )

    def read(self, schema: TableSchema, past: Past | None = None) -> Generator[RowsRead]:
        described = self._described[schema.oid]
        relation = sql.SQL("{}" if described.kind == "p" else "only {}").format(sql.Identifier(*schema.table))
        where: sql.Composable = sql.SQL("")
        if past is not None:
            column = schema.column(past.column)
            where = sql.SQL("where {0} >= {1}::{2} or {0} is null").format(
                sql.Identifier(past.column), sql.Literal(past.least), sql.SQL(column.type_name)
            )
        with translated(f"{self._where} table {schema.table}"):
            connection = self._ready()
            connection.execute("savepoint piece")
            try:
                if not schema.columns:
                    row = connection.execute(sql.SQL("select count(*) from {} {}").format(relation, where)).fetchone()
                    yield RowsRead(columns=[], raw=None, rows=int(row[0]) if row else 0, last_key=None, done=True)
                else:
                    names = sql.SQL(", ").join(sql.Identifier(c.name) for c in schema.columns)
                    query = sql.SQL("copy (select {} from {} {}) to stdout (format csv)").format(names, relation, where)
                    with closing(self._pieces(connection, query)) as pieces:
                        for data in pieces:
                            yield typed(schema, data)
            except BaseException:
                # Also where whoever reads gave up in between: the snapshot is for the other tables too.
                if not connection.closed:
                    connection.execute("rollback to savepoint piece")
                raise
            connection.execute("release savepoint piece")

    def _pieces(self, connection: psycopg.Connection[Any], query: sql.Composed) -> Generator[pa.Buffer]:
        """What a COPY sends, cut between rows: the server sends them one by one."""
        any_bytes = take_any_bytes(connection, local=True)
        with connection.cursor() as cursor, cursor.copy(query) as copy:
            out = pa.BufferOutputStream()
            for data in copy:
                out.write(data)
                if out.tell() >= PIECE_BYTES:
                    yield out.getvalue()
                    out = pa.BufferOutputStream()
            if out.tell():
                yield out.getvalue()
        if any_bytes:
            connection.execute("set local client_encoding to 'UTF8'")

    def end(self) -> None:
        self._described = {}
        connection = self._connection
        if connection is None or connection.closed:
            return
        if connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
            try:
                connection.execute("rollback")
            except psycopg.Error:
                self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ready(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            config = self._config
            self._connection = connect(
                config.dsn,
                password=password_of(config),
                application_name="cdc run",
                connect_timeout_s=config.connect_timeout_s,
                settings={
                    "lock_timeout": f"{config.lock_timeout_s:g}s",
                    # One COPY reads one whole table.
                    "statement_timeout": f"{config.run_timeout_s:g}s",
                    "row_security": "off",
                },
            )
        return self._connection

    def _refused(
        self, connection: psycopg.Connection[Any], published: dict[int, catalog.Published]
    ) -> dict[int, tuple[str, str]]:
        """Tables that our role cannot read whole, and what mends that."""
        refused: dict[int, tuple[str, str]] = {}
        for oid, readable, hidden, user in connection.execute(READABLE, [list(published)]).fetchall():
            table = published[oid].table
            role = sql.Identifier(user).as_string(connection)
            if not readable:
                name = sql.Identifier(*table).as_string(connection)
                schema = sql.Identifier(table.schema).as_string(connection)
                fix = f"grant usage on schema {schema} to {role}; grant select on {name} to {role};"
                fix += f" then cdc resync {table}"
                refused[oid] = f"role {user!r} may not read {table}", fix
            elif hidden:
                fix = f'alter role {role} bypassrls; then cdc resync {table} (or exclude = ["{table}"])'
                refused[oid] = f"policies hide rows of {table} from role {user!r}", fix
        return refused

    def _lock(self, connection: psycopg.Connection[Any], tables: list[catalog.Described]) -> None:
        """LOCK TABLE takes no snapshot: the first query behind it does."""
        connection.execute("begin isolation level repeatable read read only")
        for found in sorted(tables, key=lambda t: t.schema.table):
            pattern = (
                "lock table {} in access share mode" if found.kind == "p" else "lock table only {} in access share mode"
            )
            connection.execute(sql.SQL(pattern).format(sql.Identifier(*found.schema.table)))


def typed(schema: TableSchema, data: pa.Buffer) -> RowsRead:
    """The rows of COPY's CSV as the stream would have them."""
    names = [c.name for c in schema.columns]
    texts = parse_csv(data, names)
    columns, masks = [], []
    for column, text in zip(schema.columns, texts, strict=True):
        values, mask = cast(column, text)
        columns.append(values)
        masks.append(mask)
    return RowsRead(columns=columns, raw=build_raw(names, texts, masks), rows=len(texts[0]), last_key=None, done=False)
