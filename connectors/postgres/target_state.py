"""What the target itself remembers: `cdc.cdc_sync_state`, one row per sync and key that it has taken.

A row says with which content (digest), in which table (by OID, so that one that is dropped and made anew has taken
nothing), in which run and when. One more row per sync, with an empty key, holds the last run that committed anything:
it is written first in each transaction, so that two of one sync never overlap, and stays when the last row is deleted.

Format 2 added `run`; a table of format 1 is read as it is and altered in place at the first push.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
from psycopg import errors as pg
from psycopg import sql
from pyarrow import csv

from cdc.errors import FormatTooNew, TargetRejected, TargetUnavailable
from cdc.ports import Finding
from cdc.sink import ACKS, Assignment
from connectors.postgres.target_table import quoted

STATE_FORMAT = 2
STATE_TABLE = "cdc.cdc_sync_state"
_CREATE = f"""
CREATE TABLE {STATE_TABLE} (
    sync text NOT NULL, key text NOT NULL, digest text NOT NULL, relation oid NOT NULL,
    acked_at timestamptz NOT NULL, run text NOT NULL DEFAULT '', PRIMARY KEY (sync, key)
)"""
_UPGRADE = f"ALTER TABLE {STATE_TABLE} ADD COLUMN IF NOT EXISTS run text NOT NULL DEFAULT ''"
_COMMENT = f"COMMENT ON TABLE {STATE_TABLE} IS 'What cdc has pushed into this database. Format {STATE_FORMAT}.'"

_LAST_RUN = f"""
INSERT INTO {STATE_TABLE} AS o (sync, key, digest, relation, acked_at, run)
VALUES (%s, '', '', %s, pg_catalog.clock_timestamp(), %s)
ON CONFLICT (sync, key) DO UPDATE
SET relation = excluded.relation, acked_at = excluded.acked_at, run = excluded.run"""

_ACKNOWLEDGED = f"""
COPY (SELECT s.key, s.digest FROM {STATE_TABLE} s WHERE s.sync = {{}} AND s.relation = {{}} AND s.key <> '')
TO STDOUT (FORMAT csv)"""

_ALL_RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")


class State:
    """The state table, as this role finds it in this transaction."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        """Looks only. FormatTooNew; TargetRejected if the role has some of the rights that it needs and lacks others:
        to keep the acknowledgements elsewhere would then forget those that are there."""
        self._connection = connection
        self.format = _found_format(connection)
        """0: there is no table."""
        lacking, all_lacking, owner = _rights(connection) if self.format else ([], False, True)
        if lacking and not all_lacking:
            raise TargetRejected(
                f"the role may not {', '.join(lacking)} in {STATE_TABLE}, where acknowledgements are kept",
                hint=_grants(connection),
            )
        if self.format and self.format < STATE_FORMAT and not all_lacking and not owner:
            raise TargetRejected(
                f"{STATE_TABLE} has format {self.format}, and only its owner can give it format {STATE_FORMAT}",
                hint=f"as its owner: {_UPGRADE}; {_COMMENT}",
            )
        self.usable = not all_lacking if self.format else _may_create(connection)
        """Whether acknowledgements can be kept here."""

    def prepare(self) -> None:
        """Make the table, or bring it to the present format. TargetUnavailable if another session is doing it."""
        if self.format == STATE_FORMAT:
            return
        connection = self._connection
        try:
            with connection.transaction():
                if self.format:
                    connection.execute(_UPGRADE)
                else:
                    # IF NOT EXISTS would ask for the privilege even where the schema exists.
                    if connection.execute("SELECT pg_catalog.to_regnamespace('cdc') IS NULL").fetchone() == (True,):
                        connection.execute("CREATE SCHEMA cdc")
                    connection.execute(_CREATE)
                connection.execute(_COMMENT)
        except (pg.UniqueViolation, pg.DuplicateTable, pg.DuplicateSchema) as error:
            raise TargetUnavailable(f"another session creates {STATE_TABLE} just now") from error
        self.format = STATE_FORMAT

    def begin(self, sync: str, relation: int, run: str) -> None:
        """Note the run; waits for another transaction of the sync, such as one whose client was cut off in COMMIT."""
        self._connection.execute(_LAST_RUN, (sync, relation, run))

    def acknowledged(self, assignment: Assignment, relation: int) -> tuple[pa.Table, str]:
        """ACKS and the last run."""
        if not self.format:
            return ACKS.empty_table(), ""
        received = io.BytesIO()
        query = sql.SQL(_ACKNOWLEDGED).format(sql.Literal(assignment.sync), sql.Literal(relation))
        with self._connection.cursor().copy(query) as copy:
            for part in copy:
                received.write(part)
        last_run = ""
        if self.format >= STATE_FORMAT:
            row = self._connection.execute(
                f"SELECT run FROM {STATE_TABLE} WHERE sync = %s AND key = '' AND relation = %s",
                (assignment.sync, relation),
            ).fetchone()
            last_run = row[0] if row is not None else ""
        return _parsed(received), last_run

    def forget(self, sync: str) -> int:
        """Delete all rows of the sync; of how many keys."""
        if not self.format:
            return 0
        deleted = self._connection.execute(
            f"WITH d AS (DELETE FROM {STATE_TABLE} WHERE sync = %s RETURNING key) "
            "SELECT count(*) FROM d WHERE key <> ''",
            (sync,),
        ).fetchone()
        return deleted[0] if deleted is not None else 0


def state_findings(connection: psycopg.Connection[Any], mode: str) -> list[Finding]:
    """What the role lacks to keep acknowledgements in the target."""
    try:
        if State(connection).usable:
            return []
    except TargetRejected as error:
        return [Finding(name="sync state", severity="error", message=str(error.args[0]), fix=error.hint)]
    exists = _found_format(connection) > 0
    fix = _grants(connection) if exists else f"CREATE SCHEMA cdc AUTHORIZATION {quoted(connection.info.user)}"
    problem = f"the role may not {'write' if exists else 'create'} {STATE_TABLE}"
    if mode in ("insert", "append"):
        return [Finding(name="sync state", severity="error", message=f"{problem}, and {ONLY_WITH_STATE}", fix=fix)]
    return [
        Finding(
            name="sync state",
            severity="warning",
            message=f"{problem}: acknowledgements are kept in the daemon's state, after COMMIT. What was "
            "written is sent again, without effect, if the daemon dies in between; a target restored from a backup is "
            "not noticed; and if state_dir is lost, everything is sent again and rows that left the result meanwhile "
            "are not deleted",
            fix=fix,
        )
    ]


ONLY_WITH_STATE = (
    "modes insert and append need the acknowledgements in the transaction of the rows: sent again after a COMMIT whose "
    "answer was lost, append would write rows twice and insert reject those that it has written"
)


def _found_format(connection: psycopg.Connection[Any]) -> int:
    """Format of the state table, 0 if there is none; FormatTooNew if a newer version wrote it."""
    row = connection.execute(
        "SELECT c.oid, pg_catalog.obj_description(c.oid, 'pg_class') FROM pg_catalog.pg_class c "
        "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = 'cdc' AND c.relname = 'cdc_sync_state'"
    ).fetchone()
    if row is None:
        return 0
    match = re.search(r"Format (\d+)", row[1] or "")
    found = int(match[1]) if match else STATE_FORMAT
    if found > STATE_FORMAT:
        raise FormatTooNew(
            f"{STATE_TABLE} has format {found}, this version knows up to {STATE_FORMAT}",
            hint="run the newer version of cdc that wrote it",
        )
    return found


def _rights(connection: psycopg.Connection[Any]) -> tuple[list[str], bool, bool]:
    """Rights that the role lacks on the table, whether it can write nothing there at all, and whether it owns it."""
    row = connection.execute(
        "SELECT pg_catalog.has_schema_privilege(n.oid, 'USAGE'), "
        "ARRAY(SELECT p FROM pg_catalog.unnest(%s::text[]) p WHERE NOT pg_catalog.has_table_privilege(c.oid, p)), "
        "pg_catalog.pg_has_role(c.relowner, 'USAGE') "
        "FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = 'cdc' AND c.relname = 'cdc_sync_state'",
        (list(_ALL_RIGHTS),),
    ).fetchone()
    usage, lacking, owner = row or (False, list(_ALL_RIGHTS), False)
    if not usage:
        return list(_ALL_RIGHTS), True, owner
    return lacking, {"INSERT", "UPDATE", "DELETE"} <= set(lacking), owner


def _may_create(connection: psycopg.Connection[Any]) -> bool:
    row = connection.execute(
        "SELECT coalesce(pg_catalog.has_schema_privilege(n.oid, 'CREATE') "
        "AND pg_catalog.has_schema_privilege(n.oid, 'USAGE'), "
        "pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE')) "
        "FROM (SELECT pg_catalog.to_regnamespace('cdc')::oid AS oid) n"
    ).fetchone()
    return row == (True,)


def _grants(connection: psycopg.Connection[Any]) -> str:
    user = quoted(connection.info.user)
    return f"GRANT USAGE ON SCHEMA cdc TO {user}; GRANT {', '.join(_ALL_RIGHTS)} ON {STATE_TABLE} TO {user}"


def _parsed(received: io.BytesIO) -> pa.Table:
    size = received.tell()
    if size == 0:
        return ACKS.empty_table()
    received.seek(0)
    read = csv.read_csv(
        received,
        csv.ReadOptions(column_names=["key", "digest"], block_size=max(1 << 20, min(size, 1 << 30))),
        csv.ParseOptions(newlines_in_values=True),
        csv.ConvertOptions(column_types={"key": pa.string(), "digest": pa.string()}, strings_can_be_null=False),
    )
    return read.append_column("version", pa.array(np.zeros(read.num_rows, np.int64)))
