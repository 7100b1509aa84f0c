"""How a target's transactions are marked as ours, so that capture knows them again.

With a replication origin where the role may set one: it marks each change, and costs nothing. Else (no right to it, no
room, a connection pooler, which would lend a marked session to others) with a transactional logical message, the first
thing that a transaction writes: prefix `cdc.origin`, content the origin's name. Where neither is possible, writes are
unmarked, and the log says so once.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import psycopg
from psycopg import errors as pg

from cdc.ports import Finding
from connectors.postgres.target_table import quoted

MESSAGE_PREFIX = "cdc.origin"

_ORIGIN_FUNCTIONS = (
    "pg_replication_origin_oid",
    "pg_replication_origin_create",
    "pg_replication_origin_session_is_setup",
    "pg_replication_origin_session_setup",
    "pg_replication_origin_xact_setup",
)
_MAY_NOT_CALL = """
SELECT DISTINCT p.oid::pg_catalog.regprocedure::text FROM pg_catalog.pg_proc p
WHERE p.pronamespace = 'pg_catalog'::pg_catalog.regnamespace AND p.proname = ANY(%s)
  AND NOT pg_catalog.has_function_privilege(p.oid, 'EXECUTE') ORDER BY 1"""

_ROOM = """
SELECT (SELECT count(*) FROM pg_catalog.pg_replication_origin),
       EXISTS (SELECT FROM pg_catalog.pg_replication_origin WHERE roname = %s),
       s.setting::int, s.name
FROM pg_catalog.pg_settings s WHERE s.name IN ('max_active_replication_origins', 'max_replication_slots')
ORDER BY s.name LIMIT 1"""


class Marks:
    """How the transactions of one session are marked: settled at its first write, then the same for all."""

    def __init__(self, connection: psycopg.Connection[Any], name: str) -> None:
        """Make the origin if it is missing and set it. psycopg.Error, also if another session has it."""
        may_emit = _may_emit(connection)
        try:
            self.because = _set_up_origin(connection, name)
            """Why there is no origin; empty: there is one."""
        except pg.ConfigurationLimitExceeded:
            if not may_emit:
                raise
            self.because = "the server has no room for one more"
        self.by_origin = not self.because
        self.by_message = not self.by_origin and may_emit
        self._name = name

    def begin(self, connection: psycopg.Connection[Any]) -> None:
        """To be called before anything is written in a transaction."""
        if self.by_message:
            connection.execute(
                # As bytes: a text would be in the database's encoding, and who reads it does not know that.
                "SELECT pg_catalog.pg_logical_emit_message(true, %s::text, pg_catalog.convert_to(%s::text, 'UTF8'))",
                (MESSAGE_PREFIX, self._name),
            )

    def end(self, connection: psycopg.Connection[Any]) -> None:
        """To be called before COMMIT. An origin without it would date the transaction to the year 2000."""
        if self.by_origin:
            connection.execute(
                "SELECT pg_catalog.pg_replication_origin_xact_setup("
                "pg_catalog.pg_current_wal_insert_lsn(), pg_catalog.clock_timestamp())"
            )


def origin_findings(connection: psycopg.Connection[Any], name: str) -> list[Finding]:
    """What the mark lacks, and what it takes of what the server has only few of."""
    missing = _may_not_call(connection, _ORIGIN_FUNCTIONS)
    user, found = quoted(connection.info.user), []
    if missing and _may_emit(connection):
        found.append(
            Finding(
                name="replication origin",
                severity="warning",
                message="the role may not set a replication origin; a logical message marks each transaction instead, "
                "one more WAL record in each",
                fix=f"GRANT EXECUTE ON FUNCTION {', '.join(missing)} TO {user}",
            )
        )
    elif missing:
        found.append(
            Finding(
                name="replication origin",
                severity="warning",
                message="the role may not mark its writes; if this database is captured too, they look like anyone's "
                "and start the sync once more (its plan is then empty)",
                fix=f"GRANT EXECUTE ON FUNCTION {', '.join(missing)} TO {user}",
            )
        )
    if missing:
        return found
    row = connection.execute(_ROOM, (name,)).fetchone()
    if row is None or row[1]:
        return found
    used, _, limit, setting = row
    free = max(0, limit - used)
    found.append(
        Finding(
            name="replication origins",
            severity="info" if free else "warning",
            message=f"the first push will make replication origin {name} and keep one of {setting} = {limit}: "
            f"{used} are taken, {free} free; subscriptions need one each too",
            fix="" if free else f"ALTER SYSTEM SET {setting} = {limit + 5}",
        )
    )
    return found


def _may_not_call(connection: psycopg.Connection[Any], names: tuple[str, ...]) -> list[str]:
    """Functions that the role may not call. Found by name only: newer versions add optional arguments."""
    return [str(row[0]) for row in connection.execute(_MAY_NOT_CALL, (list(names),)).fetchall()]


def _may_emit(connection: psycopg.Connection[Any]) -> bool:
    """Whether a logical message can mark: where the WAL is not logical, nobody could read it."""
    row = connection.execute("SELECT pg_catalog.current_setting('wal_level')").fetchone()
    return row == ("logical",) and not _may_not_call(connection, ("pg_logical_emit_message",))


def _set_up_origin(connection: psycopg.Connection[Any], name: str) -> str:
    """Create the origin if it is not there and make it the session's. Empty, or why this is not possible here."""
    row = connection.execute("SELECT pg_catalog.pg_backend_pid()").fetchone()
    if row != (connection.info.backend_pid,):
        # The mark belongs to the session, and a pooler would lend the session, mark and all, to others.
        return "a connection pooler stands between us and the server"
    missing = _may_not_call(connection, _ORIGIN_FUNCTIONS)
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
