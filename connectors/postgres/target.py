"""Postgres as a target of reverse ETL: rows and what we remember of them change in one transaction.

Guarantees: a batch and its acknowledgements (`cdc.cdc_sync_state`, in the target) commit together, so whoever dies
when, what is acknowledged has been written, and pushing again has no second effect; rows that are equal already are
not touched; a row that the target refuses is found by halving and left out, the others go through; transactions are
marked with our replication origin where the role may do that. Only the given columns are written.

Deliberately not here: retrying (the caller's supervisor does), deleting rows, and repeating the server's messages,
which may quote values: a rejected row's reason is the condition and the names of constraint and column.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg
import pyarrow as pa
from psycopg import errors as pg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pyarrow import csv

from cdc.config import password_of
from cdc.config_serving import TargetConfig
from cdc.errors import CdcError, FormatTooNew, TargetRejected, TargetUnavailable
from cdc.failpoints import failpoint
from cdc.ports import Finding, PushResult
from connectors.postgres.connection import describe, server_message
from connectors.postgres.target_rows import Unwritable, copy_csv
from connectors.postgres.target_table import TargetTable, quoted, read_table, split_name

_log = logging.getLogger(__name__)

STATE_FORMAT = 1
STATE_TABLE = "cdc.cdc_sync_state"
_CREATE_STATE = f"""
CREATE TABLE {STATE_TABLE} (
    sync text NOT NULL, key text NOT NULL, digest text NOT NULL, relation oid NOT NULL,
    acked_at timestamptz NOT NULL, PRIMARY KEY (sync, key)
)"""
_COMMENT = f"COMMENT ON TABLE {STATE_TABLE} IS 'What cdc has pushed into this database. Format {STATE_FORMAT}.'"

BEFORE_COMMIT = "sync.before_commit"
AFTER_COMMIT = "sync.after_commit"

ALL_REFUSED_ROWS = 500
"""A batch that begins with so many refused rows is a mistake in the sync, not in rows: telling them apart one by one
would keep the target busy for nothing."""

_ACK = f"""
INSERT INTO {STATE_TABLE} AS o (sync, key, digest, relation, acked_at)
SELECT %s, s.k, s.d, %s, pg_catalog.clock_timestamp() FROM pg_temp.cdc_stage s
ON CONFLICT (sync, key) DO UPDATE
SET digest = excluded.digest, relation = excluded.relation, acked_at = excluded.acked_at"""

# A row is acknowledged for the relation that it went into: after a DROP and CREATE everything is sent again.
_ACKNOWLEDGED = f"""
COPY (
    SELECT s.key, s.digest FROM {STATE_TABLE} s
    WHERE s.sync = {{}} AND EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = s.relation)
) TO STDOUT (FORMAT csv)"""

_ROW_ERRORS = (pg.DataError, pg.IntegrityError, pg.RaiseException, pg.PlpgsqlError, pg.CardinalityViolation)
_ROW_STATES = ("44", "54", "42501", "38", "39")
"""Beside those classes: WITH CHECK OPTION, a value too large for an index, row security, external routines."""

_ACKS_SCHEMA = pa.schema([("key", pa.string()), ("digest", pa.string())])


@dataclass(frozen=True, slots=True)
class _Push:
    """One batch on its way."""

    sync: str
    target: TargetTable
    rows: pa.Table
    acks: pa.Table
    insert: sql.Composed


class PostgresTarget:
    """A database that results are pushed into; connects at first use. Used by one thread."""

    def __init__(self, config: TargetConfig) -> None:
        self._config = config
        self._origin = config.origin or f"cdc_{config.name}"
        self._where = f"target {config.name}"
        self._connection: psycopg.Connection[Any] | None = None
        self._marks: bool | None = None
        self._unmarked_because = ""

    # ------------------------------------------------------------------ Sink

    def check(self, sync: str, table: str, columns: Sequence[str], key: Sequence[str]) -> list[Finding]:
        """Whether `table` can take `columns` by `key`, and what is missing around it; empty if all is well."""
        with self._transaction() as connection:
            findings = self._check_table(connection, table, columns, key)
            findings += self._check_state(connection)
            findings += self._check_origin(connection)
        at = f"target.{self._config.name}: sync.{sync}"
        return [Finding(name=f.name, severity=f.severity, message=f.message, fix=f.fix, object=at) for f in findings]

    def acknowledged(self, sync: str) -> pa.Table:
        """What the target has acknowledged: `key`, `digest`. Blocks for one read of the state table."""
        with self._transaction() as connection:
            if not _state_format(connection):
                return _ACKS_SCHEMA.empty_table()
            received = io.BytesIO()
            with connection.cursor().copy(sql.SQL(_ACKNOWLEDGED).format(sql.Literal(sync))) as copy:
                for part in copy:
                    received.write(part)
        return _parse_acks(received)

    def upsert(self, sync: str, table: str, key: Sequence[str], rows: pa.Table, acks: pa.Table) -> PushResult:
        """Write `rows` by `key` and remember `acks` (`key`, `digest`, row by row) in one transaction; durable then.

        Rows that the target refuses are in the result, unacknowledged. TargetRejected if it can take none of them
        (table, columns, privileges), TargetUnavailable if the same may go through later.
        """
        if rows.num_rows == 0:
            return PushResult(written=0)
        rejected: list[tuple[str, str]] = []
        with self._transaction(write=True) as connection:
            target = read_table(connection, table)
            target.require(rows.schema, key)
            push = _Push(sync, target, rows, acks, target.insert_statement(rows.column_names, key))
            self._begin_write(connection, rows.num_columns)
            self._attempt(connection, push, 0, rows.num_rows, rejected)
            if self._marks:
                connection.execute(
                    "SELECT pg_catalog.pg_replication_origin_xact_setup("
                    "pg_catalog.pg_current_wal_insert_lsn(), pg_catalog.clock_timestamp())"
                )
            failpoint(BEFORE_COMMIT)
        failpoint(AFTER_COMMIT)
        return PushResult(written=rows.num_rows - len(rejected), rejected=rejected)

    def origin(self) -> str:
        """The replication origin of our writes; empty once the target has refused to let us set one."""
        return "" if self._marks is False else self._origin

    def close(self) -> None:
        """Close the connection; the origin is free for another session. Idempotent."""
        connection, self._connection, self._marks = self._connection, None, None
        if connection is not None:
            connection.close()

    # ------------------------------------------------------------------ writing

    def _attempt(
        self, connection: psycopg.Connection[Any], push: _Push, start: int, stop: int, rejected: list[tuple[str, str]]
    ) -> None:
        """Write the rows [start, stop) under a savepoint; if the target refuses one of them, each half by itself."""
        try:
            with connection.transaction():
                self._write(connection, push, start, stop)
            return
        except psycopg.Error as error:
            if connection.broken or connection.closed or not _is_about_rows(error):
                raise
            if stop - start == 1:
                rejected.append((push.acks.column("key")[start].as_py(), _reason(error)))
                if len(rejected) == stop == ALL_REFUSED_ROWS:
                    raise TargetRejected(
                        f"{self._where}: refuses each of the first {stop} rows of a batch, the last one with "
                        f"{_reason(error)}",
                        hint="compare the query with the table; the batch was not written",
                    ) from error
                return
        middle = (start + stop) // 2
        self._attempt(connection, push, start, middle, rejected)
        self._attempt(connection, push, middle, stop, rejected)

    def _write(self, connection: psycopg.Connection[Any], push: _Push, start: int, stop: int) -> None:
        rows = push.rows.slice(start, stop - start)
        acks = push.acks.slice(start, stop - start)
        try:
            text = copy_csv([*rows.columns, acks.column("key"), acks.column("digest")])
        except Unwritable as error:
            raise TargetRejected(
                f"{self._where}: values of type {error} cannot be written to {push.target.name}",
                hint="choose a form in the query, for example to_json(…) or a cast to varchar",
            ) from error
        with connection.cursor() as cursor:
            with cursor.copy("COPY pg_temp.cdc_stage FROM STDIN (FORMAT csv)") as copy:
                copy.write(memoryview(text))
            cursor.execute(push.insert)
            cursor.execute(_ACK, (push.sync, push.target.oid))
            cursor.execute("TRUNCATE pg_temp.cdc_stage")

    def _begin_write(self, connection: psycopg.Connection[Any], width: int) -> None:
        """State table, origin, and the stage: texts only, so that every refusal comes from the INSERT, row by row."""
        self._require_state(connection)
        # Deferred constraints would fail at COMMIT, where no row can be told from another.
        connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        columns = ", ".join(f"c{i} text" for i in range(width))
        connection.execute(f"CREATE TEMP TABLE cdc_stage ({columns}, k text NOT NULL, d text NOT NULL) ON COMMIT DROP")

    def _require_state(self, connection: psycopg.Connection[Any]) -> None:
        if _state_format(connection):
            self._require_state_rights(connection)
            return
        try:
            with connection.transaction():
                # IF NOT EXISTS would ask for the privilege even where the schema exists.
                if connection.execute("SELECT pg_catalog.to_regnamespace('cdc') IS NULL").fetchone() == (True,):
                    connection.execute("CREATE SCHEMA cdc")
                connection.execute(_CREATE_STATE)
                connection.execute(_COMMENT)
        except pg.InsufficientPrivilege as error:
            raise TargetRejected(
                f"{self._where}: the role may not create {STATE_TABLE}, where acknowledgements are kept",
                hint=f"as an owner: CREATE SCHEMA cdc AUTHORIZATION {quoted(connection.info.user)}",
            ) from error
        except (pg.UniqueViolation, pg.DuplicateTable, pg.DuplicateSchema) as error:
            raise TargetUnavailable(f"{self._where}: another session creates {STATE_TABLE} just now") from error

    def _require_state_rights(self, connection: psycopg.Connection[Any]) -> None:
        """A refusal on the state table would look like one of each row."""
        row = connection.execute(
            "SELECT bool_and(pg_catalog.has_table_privilege(%s, p)) FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) p",
            (STATE_TABLE,),
        ).fetchone()
        if row != (True,):
            raise TargetRejected(
                f"{self._where}: the role may not write {STATE_TABLE}, where acknowledgements are kept",
                hint=_grant_state(connection),
            )

    # ------------------------------------------------------------------ connection

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[psycopg.Connection[Any]]:
        """One transaction under our settings, errors translated; a broken connection is closed and forgotten."""
        connection = self._connected()
        try:
            if write:
                self._mark(connection)
            with connection.transaction():
                _settle(connection, self._config.statement_timeout_s)
                yield connection
        except psycopg.Error as error:
            if connection.broken or connection.closed:
                self.close()
            raise self._translated(error) from error

    def _connected(self) -> psycopg.Connection[Any]:
        """The connection, opened anew if it has gone since it was last used (a restart of the server, a firewall)."""
        if self._connection is not None:
            try:
                self._connection.execute("SELECT 1")
                return self._connection
            except psycopg.Error:
                self.close()
        arguments: dict[str, Any] = {
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": round((self._config.statement_timeout_s + 10) * 1000),
            **conninfo_to_dict(self._config.dsn),
            "application_name": f"cdc {self._config.name}",
            "connect_timeout": max(2, round(self._config.connect_timeout_s)),
            "client_encoding": "UTF8",
        }
        password = password_of(self._config)
        if password is not None:
            arguments["password"] = password
        try:
            connection = psycopg.connect(make_conninfo(**arguments), autocommit=True)
        except psycopg.Error as error:
            raise self._translated(error) from error
        # Behind a pooler a prepared statement may be looked for in another session than it was made in.
        connection.prepare_threshold = None
        self._connection = connection
        return connection

    def _mark(self, connection: psycopg.Connection[Any]) -> None:
        """Put the session under our origin, once; where that is not allowed, remember it and go on unmarked."""
        if self._marks is not None:
            return
        self._unmarked_because = _set_up_origin(connection, self._origin)
        self._marks = not self._unmarked_because
        if self._unmarked_because:
            _log.warning(
                "writes are not marked with a replication origin: %s",
                self._unmarked_because,
                extra={"target": self._config.name, "origin": self._origin},
            )

    def _translated(self, error: psycopg.Error) -> CdcError:
        """Our error, by SQLSTATE; unknown ones are the operator's, never retried blindly."""
        where = f"{self._where} ({describe(self._config.dsn)})"
        text = f"{where}: {_reason(error)}"
        match error:
            case pg.ObjectInUse() if "origin" in str(error):
                return TargetUnavailable(
                    f"{where}: another session writes under replication origin {self._origin}, and an origin has "
                    "one session at a time",
                    hint="a daemon that just died frees it within moments; if two daemons push into this database, "
                    f"set another `origin` in [target.{self._config.name}] of one of them",
                )
            case pg.ConfigurationLimitExceeded() if "replication" in str(error):
                return TargetUnavailable(
                    f"{where}: no room for one more replication origin",
                    hint="raise max_active_replication_origins (max_replication_slots before version 18) and restart "
                    "the server, or drop origins that nobody uses: SELECT pg_replication_origin_drop(name)",
                )
            case pg.QueryCanceled():
                return TargetUnavailable(text, hint="raise statement_timeout_s, or lower batch_rows of the sync")
            case pg.LockNotAvailable():
                return TargetUnavailable(text, hint="another session holds locks on these rows; we try again")
            case pg.ReadOnlySqlTransaction():
                return TargetUnavailable(f"{where}: is read-only now", hint="the DSN should name the primary")
            case pg.InsufficientPrivilege():
                return TargetRejected(text, hint="`cdc check` lists what the role lacks")
            case pg.UndefinedTable() | pg.UndefinedColumn() | pg.UndefinedFunction():
                return TargetRejected(text, hint="the target changed; compare the sync's columns with the table")
        state = error.sqlstate
        if state is None:
            if re.search("authentication failed|no pg_hba.conf entry|no password supplied", str(error)):
                return TargetRejected(f"{where}: the login is refused", hint="check user and password reference")
            if 'database "' in str(error) and "does not exist" in str(error):
                return TargetRejected(f"{where}: the database does not exist", hint="check the dsn")
            return TargetUnavailable(f"{where}: {server_message(error)}")
        if state[:2] in ("08", "40", "53", "57", "58") or connection_lost(error):
            return TargetUnavailable(text)
        return TargetRejected(text)

    # ------------------------------------------------------------------ checking

    def _check_table(
        self, connection: psycopg.Connection[Any], table: str, columns: Sequence[str], key: Sequence[str]
    ) -> list[Finding]:
        try:
            return read_table(connection, table).problems(columns, key)
        except TargetRejected as error:
            message = str(error.args[0])
            return [Finding(name="table", severity="error", message=message, fix=error.hint, object=table)]

    def _check_state(self, connection: psycopg.Connection[Any]) -> list[Finding]:
        row = connection.execute(
            "SELECT pg_catalog.to_regclass(%s) IS NOT NULL, "
            "coalesce(pg_catalog.has_schema_privilege(pg_catalog.to_regnamespace('cdc')::oid, 'CREATE'), "
            "pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE')), "
            "pg_catalog.has_database_privilege(pg_catalog.current_database(), 'TEMPORARY')",
            (STATE_TABLE,),
        ).fetchone()
        exists, may_create, may_stage = row or (False, False, False)
        if exists:
            try:
                self._require_state_rights(connection)
            except TargetRejected as error:
                message = str(error.args[0])
                return [Finding(name="sync state", severity="error", message=message, fix=error.hint)]
        user, findings = quoted(connection.info.user), []
        if not exists and not may_create:
            findings.append(
                Finding(
                    name="sync state",
                    severity="error",
                    message=f"the role may not create {STATE_TABLE}, where acknowledgements are kept",
                    fix=f"CREATE SCHEMA cdc AUTHORIZATION {user}",
                )
            )
        if not may_stage:
            findings.append(
                Finding(
                    name="temporary tables",
                    severity="error",
                    message="the role may not create temporary tables, through which batches are written",
                    fix=f"GRANT TEMPORARY ON DATABASE {quoted(connection.info.dbname)} TO {user}",
                )
            )
        return findings

    def _check_origin(self, connection: psycopg.Connection[Any]) -> list[Finding]:
        missing = _missing_origin_rights(connection)
        if not missing:
            return []
        return [
            Finding(
                name="replication origin",
                severity="warning",
                message="the role may not mark its writes; if this database is captured too, they look like anyone's "
                "and start the sync once more (its plan is then empty)",
                fix=f"GRANT EXECUTE ON FUNCTION {', '.join(missing)} TO {quoted(connection.info.user)}",
            )
        ]


def connection_lost(error: psycopg.Error) -> bool:
    """Whether the session ended with this error."""
    return isinstance(error, psycopg.OperationalError) and error.sqlstate in (None, "25P03", "57P01", "57P02", "57P03")


def _is_about_rows(error: psycopg.Error) -> bool:
    """Whether another row might have gone through: constraints, values, triggers, row security."""
    return isinstance(error, _ROW_ERRORS) or (error.sqlstate or "").startswith(_ROW_STATES)


def _reason(error: psycopg.Error) -> str:
    """Condition and names; the server's own message may quote values of the row."""
    parts = [f"{type(error).__name__} ({error.sqlstate})" if error.sqlstate else type(error).__name__]
    for word, name in (("constraint", error.diag.constraint_name), ("column", error.diag.column_name)):
        if name:
            parts.append(f"{word} {name}")
    return ", ".join(parts)


def _settle(connection: psycopg.Connection[Any], statement_timeout_s: float) -> None:
    """Settings of this transaction only, so that a pooler between us and the server sees none of them stay.

    The search path stays the role's: triggers of the target's owner run under it.
    """
    timeout_ms = round(statement_timeout_s * 1000)
    settings = {
        "datestyle": "ISO",
        "timezone": "UTC",
        "lc_monetary": "C",
        "statement_timeout": str(timeout_ms),
        "lock_timeout": str(max(1, timeout_ms // 2)),
        "idle_in_transaction_session_timeout": str(timeout_ms),
    }
    calls = sql.SQL(", ").join(
        sql.SQL("pg_catalog.set_config({}, {}, true)").format(sql.Literal(k), sql.Literal(v))
        for k, v in settings.items()
    )
    connection.execute(sql.SQL("SELECT {}").format(calls))


def _grant_state(connection: psycopg.Connection[Any]) -> str:
    user = quoted(connection.info.user)
    return f"GRANT USAGE ON SCHEMA cdc TO {user}; GRANT SELECT, INSERT, UPDATE ON {STATE_TABLE} TO {user}"


_ORIGIN_FUNCTIONS = (
    "pg_catalog.pg_replication_origin_oid(text)",
    "pg_catalog.pg_replication_origin_create(text)",
    "pg_catalog.pg_replication_origin_session_is_setup()",
    "pg_catalog.pg_replication_origin_session_setup(text)",
    "pg_catalog.pg_replication_origin_xact_setup(pg_lsn, timestamptz)",
)


def _missing_origin_rights(connection: psycopg.Connection[Any]) -> list[str]:
    """Functions that the role may not call. Found by name and first arguments: newer versions add optional ones."""
    rows = connection.execute(
        "SELECT DISTINCT p.oid::pg_catalog.regprocedure::text FROM pg_catalog.pg_proc p "
        "WHERE p.pronamespace = 'pg_catalog'::pg_catalog.regnamespace AND p.proname = ANY(%s) "
        "AND NOT pg_catalog.has_function_privilege(p.oid, 'EXECUTE') ORDER BY 1",
        ([f.removeprefix("pg_catalog.").partition("(")[0] for f in _ORIGIN_FUNCTIONS],),
    ).fetchall()
    return [str(row[0]) for row in rows]


def _set_up_origin(connection: psycopg.Connection[Any], name: str) -> str:
    """Create the origin if it is not there and make it the session's. Empty, or why this is not possible here."""
    row = connection.execute("SELECT pg_catalog.pg_backend_pid()").fetchone()
    if row != (connection.info.backend_pid,):
        # The mark belongs to the session, and a pooler would lend the session, mark and all, to others.
        return "a connection pooler stands between us and the server"
    missing = _missing_origin_rights(connection)
    if missing:
        return f"the role lacks EXECUTE on {', '.join(missing)}"
    if connection.execute("SELECT pg_catalog.pg_replication_origin_session_is_setup()").fetchone() == (True,):
        return ""
    try:
        if connection.execute("SELECT pg_catalog.pg_replication_origin_oid(%s)", (name,)).fetchone() == (None,):
            with suppress(pg.UniqueViolation):  # another session was faster, which is as good
                connection.execute("SELECT pg_catalog.pg_replication_origin_create(%s)", (name,))
        connection.execute("SELECT pg_catalog.pg_replication_origin_session_setup(%s)", (name,))
    except pg.ObjectNotInPrerequisiteState:
        return "the server keeps no replication origins (max_active_replication_origins, max_replication_slots)"
    return ""


def _state_format(connection: psycopg.Connection[Any]) -> int:
    """Format of the state table, 0 if there is none; FormatTooNew if a newer version wrote it."""
    row = connection.execute(
        "SELECT c.oid IS NOT NULL, pg_catalog.obj_description(c.oid, 'pg_class') "
        "FROM (SELECT pg_catalog.to_regclass(%s)::oid AS oid) c",
        (STATE_TABLE,),
    ).fetchone()
    if row is None or not row[0]:
        return 0
    match = re.search(r"Format (\d+)", row[1] or "")
    found = int(match[1]) if match else STATE_FORMAT
    if found > STATE_FORMAT:
        raise FormatTooNew(
            f"{STATE_TABLE} has format {found}, this version knows up to {STATE_FORMAT}",
            hint="run the newer version of cdc that wrote it",
        )
    return found


def _parse_acks(received: io.BytesIO) -> pa.Table:
    size = received.tell()
    if size == 0:
        return _ACKS_SCHEMA.empty_table()
    received.seek(0)
    return csv.read_csv(
        received,
        csv.ReadOptions(column_names=_ACKS_SCHEMA.names, block_size=max(1 << 20, min(size, 1 << 30))),
        csv.ParseOptions(newlines_in_values=True),
        csv.ConvertOptions(column_types=_ACKS_SCHEMA, strings_can_be_null=False),
    )


__all__ = ["AFTER_COMMIT", "BEFORE_COMMIT", "STATE_TABLE", "PostgresTarget", "split_name"]
