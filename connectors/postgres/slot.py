"""One replication slot: what the server says of it, why it can serve no more, making it, dropping it.

The catalog's view grew from version to version (`conflicting` in 16, `failover`, `synced` and `invalidation_reason`
in 17), so rows are read as JSON and what a server does not have is unknown. Facts decide here, never the text of an
error: the same error may pass or stay. It does not decide what a lost slot means (cdc.origin does).
"""

from __future__ import annotations

from typing import Any, Final

import psycopg
from psycopg import sql

from cdc.errors import SourceRefused
from cdc.failpoints import failpoint
from cdc.ports import Finding

FAILOVER_SINCE: Final = 170000

WAITED_FOR: Final = """
select w.names, array(select trim(both ' "' from n) from unnest(string_to_array(w.names, ',')) n
                      where not exists (select from pg_replication_slots s
                                        where s.slot_name = trim(both ' "' from n) and s.active))
from (select coalesce(current_setting('synchronized_standby_slots', true), '') names) w
"""
"""The standbys that streams of failover slots wait for, and those of them that are not there."""

FAULTS: Final = {
    "wal_removed": (
        "the server has removed WAL that it needs",
        "raise max_slot_wal_keep_size so that it does not happen again",
    ),
    "rows_removed": (
        "rows of the catalog that it needs were removed while the server was a standby",
        "set hot_standby_feedback = on at standbys so that it does not happen again",
    ),
    "wal_level_insufficient": (
        "wal_level was below 'logical' on the primary while the server was a standby",
        "keep wal_level = 'logical' so that it does not happen again",
    ),
    "idle_timeout": (
        "nobody read it for idle_replication_slot_timeout",
        "raise idle_replication_slot_timeout (0: never) so that it does not happen again",
    ),
    "conflict": (
        "it was in conflict with the recovery of the server while that was a standby",
        "set hot_standby_feedback = on at standbys so that it does not happen again",
    ),
}
"""Why a slot was invalidated, by the server's word: what that means, and what keeps it from happening again."""


def find(connection: psycopg.Connection[Any], name: str) -> dict[str, Any] | None:
    """Our slot's row of pg_replication_slots, as JSON; None if there is none. SourceRefused if the name is another
    one's: a slot that we could not have made."""
    row = connection.execute(
        "select to_jsonb(s), current_database() from pg_replication_slots s where s.slot_name = %s", [name]
    ).fetchone()
    if row is None:
        return None
    slot, database = row
    if (slot["slot_type"], slot["plugin"], slot["database"]) != ("logical", "pgoutput", database):
        raise SourceRefused(
            f"slot {name!r} exists, but it is a {slot['slot_type']} slot with plugin {slot['plugin']!r}"
            f" in database {slot['database'] or ''!r}",
            hint="set another `slot` for this source in the configuration",
        )
    found: dict[str, Any] = slot
    return found


def fault_of(slot: dict[str, Any]) -> tuple[str, str]:
    """Why a row of pg_replication_slots, as JSON, can serve no more, and what keeps that from happening again; two
    empty texts if it can serve."""
    reason = slot.get("invalidation_reason")
    if reason is None and slot.get("conflicting") is True and slot.get("restart_lsn") is not None:
        # 16 says "conflicting" of every cause; only where WAL was removed, the slot lost its place in it.
        reason = "conflict"
    if reason is None and slot.get("wal_status") == "lost":
        reason = "wal_removed"
    if reason is not None:
        meaning, hint = FAULTS.get(reason, ("the server has invalidated it", ""))
        return f"{meaning} (invalidated: {reason})", hint
    if slot.get("temporary") is True:
        return "it is temporary, and goes with the session that made it", ""
    return "", ""


def drop(connection: psycopg.Connection[Any], name: str, *, dry_run: bool) -> list[str]:
    """Drop our slot, if it exists; the SQL."""
    if find(connection, name) is None:
        return []
    statement = sql.SQL("select pg_drop_replication_slot({})").format(sql.Literal(name))
    if not dry_run:
        connection.execute(statement)
        failpoint("slot.after_drop")
    return [statement.as_string(connection)]


def create_sql(connection: psycopg.Connection[Any], name: str, *, failover: bool) -> sql.Composed:
    """The statement that makes our slot. SourceRefused if it is to be a failover slot and the server has none."""
    if not failover:
        return sql.SQL("select pg_create_logical_replication_slot({}, 'pgoutput')").format(sql.Literal(name))
    if connection.info.server_version < FAILOVER_SINCE:
        raise SourceRefused(
            f"failover = true needs Postgres 17, and the server is {connection.info.server_version // 10000}: its"
            " standbys keep no logical slots",
            hint="remove `failover` from the source; after a promotion its tables are then snapshotted anew",
        )
    return sql.SQL("select pg_create_logical_replication_slot({}, 'pgoutput', failover => true)").format(
        sql.Literal(name)
    )


def alter_failover_command(name: str) -> str:
    """The command of the replication protocol (no SQL) that makes a failover slot of one that exists."""
    quoted = '"' + name.replace('"', '""') + '"'
    return f"ALTER_REPLICATION_SLOT {quoted} (FAILOVER true)"


def failover_findings(connection: psycopg.Connection[Any], slot: dict[str, Any]) -> list[Finding]:
    """What keeps a slot that is meant to outlive a promotion from doing so."""
    findings = []
    name = str(slot["slot_name"])
    if slot.get("failover") is not True:
        findings.append(
            Finding(
                name="failover",
                severity="warning",
                message=f"slot {name!r} is no failover slot: standbys do not keep it",
                fix="stop the daemon, then `cdc setup`: it alters the slot",
                object=name,
            )
        )
    row = connection.execute(WAITED_FOR).fetchone()
    wanted, lacking = row if row is not None else ("", [])
    if lacking:
        findings.append(
            Finding(
                name="synchronized_standby_slots",
                severity="error",
                message=f"the stream stands still until a standby has used {', '.join(map(repr, lacking))}, and that"
                " slot does not exist here, or nobody uses it",
                fix="alter system set synchronized_standby_slots = '<physical slots of the standbys>';"
                " select pg_reload_conf();",
                object=name,
            )
        )
    if not wanted:
        findings.append(
            Finding(
                name="synchronized_standby_slots",
                severity="warning",
                message="a standby can be promoted without changes that the lake holds already: then every table must"
                " be snapshotted anew",
                fix="alter system set synchronized_standby_slots = '<physical slots of the standbys>';"
                " select pg_reload_conf();",
                object=name,
            )
        )
    return findings
