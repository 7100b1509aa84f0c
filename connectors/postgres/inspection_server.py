"""What `cdc inspect` asks of the server as a whole: settings, slots, room left, WAL, open transactions, counters.

Reads system views that every role may read; what needs more is None and named, with the grant. Of other sessions it
takes who they are, how long they have been at it and whether they write, never what they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from cdc.inspection import Changes, NotMeasured, OpenTransaction, Retention, SlotFacts
from connectors.postgres.replication import parse_lsn

SETTINGS = (
    "wal_level", "max_slot_wal_keep_size", "wal_keep_size", "max_wal_senders", "max_replication_slots",
    "wal_sender_timeout", "idle_replication_slot_timeout", "logical_decoding_work_mem", "track_commit_timestamp",
)  # fmt: skip

MARK = """
select extract(epoch from clock_timestamp())::float8,
       case when not pg_is_in_recovery() then pg_current_wal_insert_lsn()::text end,
       pg_current_snapshot()::text
"""

SERVER = """
select current_setting('server_version'), current_database(), pg_is_in_recovery(),
       has_function_privilege('pg_ls_waldir()', 'execute'), pg_has_role(current_user, 'pg_read_all_stats', 'usage'),
       (select stats_reset from pg_stat_database where datname = current_database()),
       extract(epoch from clock_timestamp()
               - (select stats_reset from pg_stat_database where datname = current_database()))::float8
"""

LIMITS = """
select (select setting::int8 from pg_settings where name = 'max_slot_wal_keep_size'),
       (select setting::int8 from pg_settings where name = 'max_wal_senders'),
       (select setting::int8 from pg_settings where name = 'max_replication_slots'),
       (select count(*) from pg_stat_replication)
"""

SLOTS = """
select slot_name::text, slot_type || coalesce(' (' || plugin::text || ')', ''), active, wal_status,
       coalesce(greatest(0, pg_wal_lsn_diff(
         case when pg_is_in_recovery() then pg_last_wal_receive_lsn() else pg_current_wal_lsn() end, restart_lsn)),
         0)::int8, safe_wal_size
from pg_replication_slots order by 5 desc, 1
"""

WAL_BEFORE = """
select wal_bytes::int8, extract(epoch from clock_timestamp() - stats_reset)::float8 from pg_stat_wal
"""

TRANSACTIONS = """
select * from (
  select 'pid ' || a.pid || ' (' || concat_ws(', ', nullif(a.application_name, ''), a.usename::text, a.datname::text)
           || ')',
         coalesce(a.state, ''), extract(epoch from clock_timestamp() - a.xact_start)::float8 seconds,
         a.backend_xid is not null, a.backend_xmin is not null
  from pg_stat_activity a
  where a.pid <> pg_backend_pid() and a.pid not in (select pid from pg_stat_replication)
    and (a.xact_start is not null or a.backend_xid is not null or a.backend_xmin is not null)
  union all
  select 'prepared transaction ' || gid, 'prepared', extract(epoch from clock_timestamp() - prepared)::float8,
         true, true
  from pg_prepared_xacts) t
order by seconds desc nulls last limit %s
"""
TRANSACTIONS_MAX = 20
"""The oldest; on a busy server there are always some."""

COUNTERS = """
with member(root, relid) as (
  select c.oid, c.oid from pg_class c where c.oid = any(%(oids)s) and c.relkind = 'r'
  union all
  select c.oid, t.relid from pg_class c, pg_partition_tree(c.oid) t
  where c.oid = any(%(oids)s) and c.relkind = 'p' and t.isleaf)
select root::int8, sum(pg_stat_get_tuples_inserted(relid))::int8, sum(pg_stat_get_tuples_updated(relid))::int8,
       sum(pg_stat_get_tuples_deleted(relid))::int8, sum(pg_stat_get_dead_tuples(relid))::int8,
       min(greatest(pg_stat_get_last_vacuum_time(relid), pg_stat_get_last_autovacuum_time(relid)))::text,
       min(greatest(pg_stat_get_last_analyze_time(relid), pg_stat_get_last_autoanalyze_time(relid)))::text
from member group by root
"""


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment at the server: its clock, its WAL's end (0 on a standby), and what a snapshot saw."""

    at_s: float
    lsn: int
    snapshot: str


@dataclass(frozen=True, slots=True)
class Server:
    version: str
    database: str
    standby: bool
    may_list_wal: bool
    may_see_sessions: bool
    counted_since: str | None
    counted_s: float | None


@dataclass(frozen=True, slots=True)
class Counters:
    """A table's counters at one moment; partitions added up."""

    changes: Changes
    dead_rows: int
    vacuumed_at: str | None
    analyzed_at: str | None


def mark(connection: psycopg.Connection[Any]) -> Mark:
    """Now, at the server."""
    at_s, lsn, snapshot = _one(connection, MARK)
    return Mark(at_s, parse_lsn(lsn), snapshot)


def server(connection: psycopg.Connection[Any]) -> Server:
    version, database, standby, waldir, sessions, since, counted_s = _one(connection, SERVER)
    return Server(
        version, database, standby, waldir, sessions, since.isoformat() if since is not None else None, counted_s
    )


def missing_rights(facts: Server, role: str) -> list[NotMeasured]:
    """What the role may not see of the server, with the grant that mends it."""
    fix = f'grant pg_monitor to "{role}";'
    missing = []
    if not facts.may_list_wal:
        missing.append(NotMeasured(what="size of pg_wal", why="not measured: needs pg_monitor", fix=fix))
    if not facts.may_see_sessions:
        missing.append(
            NotMeasured(what="how long transactions of others are open", why="not measured: needs pg_monitor", fix=fix)
        )
    if facts.counted_s is None:
        missing.append(
            NotMeasured(
                what="changes per table over a long time",
                why="the server does not say since when it counts them (pg_stat_database.stats_reset is null)",
            )
        )
    return missing


def retention(connection: psycopg.Connection[Any], facts: Server, slot: str) -> Retention:
    """Settings and slots, and what is left for one more."""
    settings = connection.execute(
        "select name, current_setting(name) from pg_settings where name = any(%s)", [list(SETTINGS)]
    ).fetchall()
    keep_mb, senders_max, slots_max, senders = _one(connection, LIMITS)
    slots = tuple(
        SlotFacts(
            name=name, kind=kind, ours=name == slot, active=active, wal_status=wal_status, retained_bytes=retained,
            safe_bytes=safe,
        )
        for name, kind, active, wal_status, retained, safe in connection.execute(SLOTS).fetchall()
    )  # fmt: skip
    waldir = _one(connection, "select sum(size)::int8 from pg_ls_waldir()")[0] if facts.may_list_wal else None
    return Retention(
        settings=dict(sorted(settings)),
        slots=slots,
        slots_left=max(0, slots_max - len(slots)),
        senders_left=max(0, senders_max - senders),
        keep_bytes=keep_mb << 20 if keep_mb >= 0 else None,
        wal_dir_bytes=waldir,
    )


def wal_before(connection: psycopg.Connection[Any]) -> tuple[int | None, float | None]:
    """Bytes of WAL since the counters were reset, and seconds since then."""
    row = connection.execute(WAL_BEFORE).fetchone()
    return (row[0], row[1]) if row is not None else (None, None)


def transactions(connection: psycopg.Connection[Any]) -> list[OpenTransaction]:
    """Open transactions of others, longest first; those whose begin we may not know at the end."""
    return [
        OpenTransaction(who=who, state=state, seconds=seconds, writes=writes, holds_rows=holds)
        for who, state, seconds, writes, holds in connection.execute(TRANSACTIONS, [TRANSACTIONS_MAX]).fetchall()
    ]


def counters(connection: psycopg.Connection[Any], oids: Sequence[int]) -> dict[int, Counters]:
    """Counters of each table, by OID; those of a partitioned table are its partitions'."""
    rows = connection.execute(COUNTERS, {"oids": list(oids)}).fetchall()
    return {
        oid: Counters(
            Changes(inserts=inserts or 0, updates=updates or 0, deletes=deletes or 0, seconds=None), dead or 0,
            vacuumed, analyzed,
        )
        for oid, inserts, updates, deletes, dead, vacuumed, analyzed in rows
    }  # fmt: skip


NO_CHANGES = Changes(inserts=0, updates=0, deletes=0, seconds=None)


def changed(before: Changes, after: Changes, seconds: float | None) -> Changes:
    """What was added between two looks. Counters that were reset in between count from 0."""
    begin = before if after.inserts >= before.inserts and after.all >= before.all else NO_CHANGES
    return Changes(
        inserts=after.inserts - begin.inserts,
        updates=max(0, after.updates - begin.updates),
        deletes=max(0, after.deletes - begin.deletes),
        seconds=seconds,
    )


def _one(connection: psycopg.Connection[Any], query: str) -> tuple[Any, ...]:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return tuple(row)
