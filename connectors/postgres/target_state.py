"""What the target itself remembers: `cdc.cdc_sync_state`, one row per sync, table and key that it has taken.

A row says with which content (digest), in which table (by name, and by OID, so that one that is dropped and made anew
has taken nothing), in which run and when. One more row per sync and table, with an empty key, holds the last run that
committed anything: it is written first in each transaction, so that two of one sync never overlap, and stays when the
last row is deleted. Its digest says where the state was kept then (`_HOME`): in a copy of the database that a dump has
made all OIDs are others, and acknowledgements count by the table's name until the first push has put them right.

Format 2 added `run` and `relation_name`; a table of format 1 is read as it is and altered in place at the first push.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
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
from connectors.postgres.target_table import TargetTable, quoted, split_name

STATE_FORMAT = 2
STATE_TABLE = "cdc.cdc_sync_state"
_CREATE = f"""
CREATE TABLE {STATE_TABLE} (
    sync text NOT NULL, relation_name text NOT NULL, key text NOT NULL, digest text NOT NULL, relation oid NOT NULL,
    acked_at timestamptz NOT NULL, run text NOT NULL DEFAULT '', PRIMARY KEY (sync, relation_name, key)
)"""
_UPGRADE = f"""
ALTER TABLE {STATE_TABLE} ADD COLUMN run text NOT NULL DEFAULT '', ADD COLUMN relation_name text NOT NULL DEFAULT '';
UPDATE {STATE_TABLE} s SET relation_name = pg_catalog.format('%I.%I', n.nspname, c.relname)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = s.relation;
DELETE FROM {STATE_TABLE} WHERE relation_name = '';
ALTER TABLE {STATE_TABLE} DROP CONSTRAINT cdc_sync_state_pkey, ADD PRIMARY KEY (sync, relation_name, key)""".strip()
_COMMENT = f"COMMENT ON TABLE {STATE_TABLE} IS 'What cdc has pushed into this database. Format {STATE_FORMAT}.'"

_HOME = (
    "(SELECT pg_catalog.concat(d.oid, '/', o.tableoid) FROM pg_catalog.pg_database d "
    "WHERE d.datname = pg_catalog.current_database())"
)
"""SQL: OIDs of the database and of the state table `o`."""

_LAST_RUN = f"""
INSERT INTO {STATE_TABLE} AS o (sync, relation_name, key, digest, relation, acked_at, run)
VALUES (%s, %s, '', '', %s, pg_catalog.clock_timestamp(), %s)
ON CONFLICT (sync, relation_name, key) DO UPDATE
SET relation = excluded.relation, acked_at = excluded.acked_at, run = excluded.run RETURNING o.digest, {_HOME}"""

_LAST = f"""
SELECT o.run, o.relation, o.digest <> '' AND o.digest <> {_HOME} FROM {STATE_TABLE} o
WHERE o.sync = %s AND o.relation_name = %s AND o.key = ''"""

_ACKNOWLEDGED = f"COPY (SELECT s.key, s.digest FROM {STATE_TABLE} s WHERE {{}}) TO STDOUT (FORMAT csv)"

_BLOCK_BYTES = 8 << 20
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

    def begin(self, sync: str, table: TargetTable, run: str) -> None:
        """Note the run; waits for another transaction of the sync, such as one whose client was cut off in COMMIT. In a
        copy of the database, take over what the table of that name had acknowledged."""
        row = self._connection.execute(_LAST_RUN, (sync, table.identified, table.oid, run)).fetchone()
        noted, home = row or ("", "")
        if noted not in ("", home):
            self._connection.execute(
                f"UPDATE {STATE_TABLE} SET relation = %s WHERE sync = %s AND relation_name = %s",
                (table.oid, sync, table.identified),
            )
        if noted != home:
            self._connection.execute(
                f"UPDATE {STATE_TABLE} SET digest = %s WHERE sync = %s AND relation_name = %s AND key = ''",
                (home, sync, table.identified),
            )

    def acknowledged(self, assignment: Assignment, table: TargetTable) -> tuple[pa.Table, str]:
        """ACKS and the last run."""
        if not self.format:
            return ACKS.empty_table(), ""
        last_run, is_copy = "", False
        condition = sql.SQL("s.sync = {} AND s.key <> ''").format(sql.Literal(assignment.sync))
        if self.format >= STATE_FORMAT:
            row = self._connection.execute(_LAST, (assignment.sync, table.identified)).fetchone()
            if row is not None:
                is_copy = row[2]
                last_run = row[0] if is_copy or row[1] == table.oid else ""
            condition += sql.SQL(" AND s.relation_name = {}").format(sql.Literal(table.identified))
        if not is_copy:
            condition += sql.SQL(" AND s.relation = {}::pg_catalog.oid").format(sql.Literal(table.oid))
        with self._connection.cursor().copy(sql.SQL(_ACKNOWLEDGED).format(condition)) as copy:
            return _spilled(copy), last_run

    def forget(self, assignment: Assignment) -> int:
        """Delete all rows of the sync for the table of that name; of how many keys."""
        if not self.format:
            return 0
        condition, values = "sync = %s", [assignment.sync]
        if self.format >= STATE_FORMAT:
            condition += " AND relation_name = pg_catalog.format('%%I.%%I', %s::text, %s::text)"
            values += split_name(assignment.table)
        deleted = self._connection.execute(
            f"WITH d AS (DELETE FROM {STATE_TABLE} WHERE {condition} RETURNING key) "
            "SELECT count(*) FROM d WHERE key <> ''",
            values,
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


def _spilled(parts: Iterable[Any]) -> pa.Table:
    """The acknowledgements that come as CSV, mapped from a file that has no name any more: millions of them take
    little memory. OSError if the disk does not hold them."""
    with tempfile.TemporaryFile() as text, tempfile.NamedTemporaryFile(suffix=".arrow") as made:
        for part in parts:
            text.write(part)
        if not text.tell():
            return ACKS.empty_table()
        text.seek(0)
        reader = csv.open_csv(
            text,
            csv.ReadOptions(column_names=["key", "digest"], block_size=_BLOCK_BYTES),
            csv.ParseOptions(newlines_in_values=True),
            csv.ConvertOptions(column_types={"key": pa.string(), "digest": pa.string()}, strings_can_be_null=False),
        )
        with pa.ipc.new_file(made, ACKS) as writer:
            for batch in reader:
                versions = pa.array(np.zeros(batch.num_rows, np.int64))
                writer.write_batch(pa.record_batch([*batch.columns, versions], schema=ACKS))
        made.flush()
        return pa.ipc.open_file(pa.memory_map(made.name)).read_all()
