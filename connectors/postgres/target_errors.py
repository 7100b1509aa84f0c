"""What an error of a target means: one about rows, one that another try may mend, or one for the operator.

Reasons are the condition and the names of constraint and column: the server's own messages may quote values of the row,
and are never repeated.
"""

from __future__ import annotations

import re

import psycopg
from psycopg import errors as pg

from cdc.errors import CdcError, TargetRejected, TargetUnavailable
from connectors.postgres.connection import server_message

_ROW_ERRORS = (pg.DataError, pg.IntegrityError)
_ROW_STATES = ("44", "54", "P0", "20", "21", "09", "27", "38", "39", "55000", "0A000")
"""Beside those classes: WITH CHECK OPTION, a value too large for an index, and what triggers raise, or run into."""
_SERVER_CLASSES = re.compile("0[0-3890ABFLPZ]|10|2[0-8BDF]|3[489BDF]|4[024]|5[34578]|72|F0|HV|P0|XX")
"""Classes of SQLSTATE that the server uses: any other is a trigger's own."""
_REFUSES_ROWS = ("ExecWithCheckOptions", "exec_stmt_raise", "")
"""Where the server raises a 42501 that is about the row: row security and triggers' own; elsewhere the role lacks a
right. Its functions' names tell them apart, since its texts are translated."""

CONFLICTS = (pg.UniqueViolation, pg.ForeignKeyViolation, pg.ExclusionViolation, pg.RestrictViolation)
"""Refused for what another row holds."""

AGAIN = (pg.DeadlockDetected, pg.SerializationFailure, pg.LockNotAvailable)
"""The transaction had no effect, and the same one may go through a moment later."""


def connection_lost(error: psycopg.Error) -> bool:
    """Whether the session ended with this error."""
    return isinstance(error, psycopg.OperationalError) and error.sqlstate in (None, "25P03", "57P01", "57P02", "57P03")


def is_about_rows(error: psycopg.Error, connection: psycopg.Connection) -> bool:
    """Whether another row might have gone through: constraints, values, triggers, row security."""
    if connection.broken or connection.closed:
        return False
    state = error.sqlstate
    if state is None:
        return False
    if state == "42501":
        return (error.diag.source_function or "") in _REFUSES_ROWS
    return isinstance(error, _ROW_ERRORS) or state.startswith(_ROW_STATES) or _SERVER_CLASSES.match(state) is None


def reason(error: psycopg.Error) -> str:
    """Condition and names; never values."""
    parts = [f"{type(error).__name__} ({error.sqlstate})" if error.sqlstate else type(error).__name__]
    for word, name in (("constraint", error.diag.constraint_name), ("column", error.diag.column_name)):
        if name:
            parts.append(f"{word} {name}")
    return ", ".join(parts)


def translated(error: psycopg.Error, where: str, origin: str, section: str) -> CdcError:
    """Our error, by SQLSTATE; unknown ones are the operator's, never retried blindly."""
    text = f"{where}: {reason(error)}"
    match error:
        case pg.ObjectInUse() if "origin" in str(error):
            return TargetUnavailable(
                f"{where}: another session writes under replication origin {origin}, and an origin has "
                "one session at a time",
                hint="a daemon that just died frees it within moments; if two daemons push into this database, "
                f"set another `origin` in [{section}] of one of them",
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
            return TargetRejected(
                text,
                hint="`cdc check` lists what the role lacks on the table; a default's sequence or what a trigger uses "
                "is in the server's log",
            )
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
