"""Measures a Postgres source before anybody relies on it: what `cdc inspect` shows.

Guarantees: reads only (the sessions are read only), takes no lock beyond ACCESS SHARE and waits briefly for it, reads
of each table a bounded part, and all of it within a budget of time. It works for a role with less than it could have,
and before `cdc setup`: what is not to be had is said with what mends it. It writes no value of a row anywhere. What the
numbers mean is decided in cdc.inspection; rights and configuration are `cdc check`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import psycopg
from psycopg import sql

from cdc.config import SourceConfig, password_of
from cdc.errors import CdcError
from cdc.inspection import (
    Ages,
    Inspection,
    NotMeasured,
    Request,
    SampleRead,
    TableFacts,
    Wal,
    judge,
    plan_snapshots,
)
from cdc.ports import Finding
from connectors.postgres import catalog, check, inspection_keys, inspection_rows, inspection_server
from connectors.postgres.connection import connect, describe, server_message, translated
from connectors.postgres.identity import identity_findings, quoted
from connectors.postgres.inspection_rows import Readable
from connectors.postgres.plan import plan

STATEMENT_S = 10.0
"""No statement runs longer, whatever the configuration allows others."""
LOCK_S = 2.0
ROUND_TRIPS = 5
"""So many are timed; the shortest counts."""
ROWS = "everything that reads rows"

ACCESS = """
select c.oid::int8, has_table_privilege(c.oid, 'select'), has_schema_privilege(c.relnamespace, 'usage')
from pg_class c where c.oid = any(%s)
"""

T = TypeVar("T")


@dataclass(slots=True)
class _Table:
    """One table under inspection."""

    facts: TableFacts
    described: catalog.Described
    may_read: bool = True
    readable: Readable | None = None
    findings: list[Finding] = field(default_factory=list)


class PostgresInspector:
    """Implements `SourceInspector`."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self._where = describe(config.dsn)
        self._streams = config.mode == "stream"
        """Whether slot, WAL and identities matter to it."""
        self._deadline = 0.0

    def inspect(self, request: Request, say: Callable[[str], None]) -> Inspection:
        with self._connected() as connection, translated(self._where):
            self._deadline = time.monotonic() + request.budget_s
            server = inspection_server.server(connection)
            tables = self._tables(connection)
            oids = [table.described.schema.oid for table in tables]
            before = inspection_server.counters(connection, oids)
            begin, began = inspection_server.mark(connection), time.monotonic()
            say(f"{len(tables)} tables; counting changes for {request.interval_s:g} s, reading samples meanwhile")
            for table in sorted(tables, key=lambda t: -(t.readable.size.heap_bytes if t.readable else 0)):
                self._read_table(connection, table)
            waited_s = max(0.0, began + request.interval_s - time.monotonic())
            time.sleep(waited_s)
            self._deadline += waited_s  # the budget is for reading
            after, end = inspection_server.counters(connection, oids), inspection_server.mark(connection)
            for table in tables:
                oid, facts = table.described.schema.oid, table.facts
                if oid in before and oid in after and not server.standby:
                    _count(facts, before[oid], after[oid], end.at_s - begin.at_s, server.counted_s)
            say("looking at the rows that changed")
            self._read_ages(connection, tables, request, begin, end)
            return self._conclude(connection, request, server, tables, begin, end)

    def _conclude(
        self,
        connection: psycopg.Connection[Any],
        request: Request,
        server: inspection_server.Server,
        tables: Sequence[_Table],
        begin: inspection_server.Mark,
        end: inspection_server.Mark,
    ) -> Inspection:
        not_measured = inspection_server.missing_rights(server, connection.info.user)
        wal = None
        if server.standby:
            why = "the server is a standby: it writes none of its own, and does not count what it replays"
            not_measured.append(
                NotMeasured(what="WAL and changes", why=why, fix="point the source's dsn at the primary")
            )
        else:
            so_far, since_s = inspection_server.wal_before(connection)
            wal = Wal(
                bytes=end.lsn - begin.lsn, seconds=end.at_s - begin.at_s, bytes_before=so_far, seconds_before=since_s
            )
        round_trip_s = _round_trip(connection)
        facts = [table.facts for table in tables]
        inspection = Inspection(
            source=self._config.name,
            at=datetime.fromtimestamp(end.at_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            server=self._where,
            version=server.version,
            database=server.database,
            interval_s=end.at_s - begin.at_s,
            late_after_s=request.late_after_s,
            round_trip_s=round_trip_s,
            wal=wal,
            retention=inspection_server.retention(connection, server, self._config.slot),
            transactions=inspection_server.transactions(connection),
            tables=facts,
            counted_since=server.counted_since,
            plan=plan_snapshots(
                facts,
                chunk_rows=self._config.chunk_rows,
                chunk_bytes=self._config.chunk_bytes,
                readers=self._config.readers,
                round_trip_s=round_trip_s,
            ),
            not_measured=not_measured,
        )
        inspection.findings = [
            *(check.server_findings(connection, self._config, self._where) if self._streams else ()),
            *(finding for table in tables for finding in table.findings),
            *judge(inspection, streams=self._streams),
        ]
        return inspection

    def _tables(self, connection: psycopg.Connection[Any]) -> list[_Table]:
        """What the configuration wants, published or not, with sizes and what the catalog alone says against it."""
        published = catalog.published(connection, self._config)
        described = catalog.describe(connection, sorted({*catalog.candidates(connection, self._config), *published}))
        # Partitions that are published by their own names are captured as tables of their own, and their root is none.
        split = {
            o for o, d in described.items() if o not in published and any(leaf.oid in published for leaf in d.leaves)
        }
        wanted = sorted(described.keys() - split)
        access = {
            oid: (may_select, may_use)
            for oid, may_select, may_use in connection.execute(ACCESS, [wanted]).fetchall()
        }  # fmt: skip
        hidden = {f.object: f for f in check.access_findings(connection, self._config, wanted, [])}
        tables = []
        for oid, found in sorted(described.items(), key=lambda item: item[1].schema.table):
            if oid in split:
                continue
            shown = published.get(oid)
            schema = found.schema if shown is None else found.sent(shown.columns)
            facts = TableFacts(
                table=schema.table,
                oid=oid,
                kind="partitioned" if found.kind == "p" else "table",
                published=shown is not None,
                key=schema.key,
                identity=schema.identity,
            )
            table = _Table(facts, found, findings=identity_findings(shown, found) if self._streams else [])
            if refusal := _refusal(connection, found, *access.get(oid, (True, True))) or hidden.get(str(schema.table)):
                table.may_read = False
                table.findings.append(refusal)
                facts.not_measured.append(NotMeasured(what=ROWS, why=refusal.message, fix=refusal.fix))
            table.readable = self._within_budget(facts, "size", partial(inspection_rows.readable, connection, found))
            if table.readable is not None:
                facts.rows_estimated = table.readable.rows_estimated
                facts.size = table.readable.size
            tables.append(table)
        return tables

    def _read_table(self, connection: psycopg.Connection[Any], table: _Table) -> None:
        """Everything that rows are read for, but for ages."""
        facts, read, described = table.facts, table.readable, table.described
        foreign = [leaf.table for leaf in described.leaves if leaf.kind != "r"]
        if foreign and table.may_read:
            # Its rows are on another server: how many we would read there nobody can tell.
            table.may_read = False
            why = f"partition {foreign[0]} is a foreign table"
            facts.not_measured.append(NotMeasured(what=ROWS, why=why))
        if read is None or not table.may_read:
            return
        if counted := self._within_budget(facts, "space", lambda: inspection_rows.space(connection, read, described)):
            facts.space, facts.rows_estimated = counted
        facts.sample = self._within_budget(
            facts, "a snapshot's chunk", lambda: self._read_chunk(facts, read, described)
        )
        if not facts.key:
            facts.candidates = (
                self._within_budget(
                    facts,
                    "would-be keys",
                    lambda: inspection_keys.would_be_keys(
                        connection, read, described, facts.rows_estimated or 0, self._has_time
                    ),
                )
                or []
            )

    def _read_chunk(self, facts: TableFacts, read: Readable, described: catalog.Described) -> SampleRead:
        with self._connected() as connection:
            facts.strategy = plan(connection, described, 1).strategy if facts.key else "blocks"
            return inspection_rows.sample_read(
                connection, read, described,
                by_key=facts.strategy == "keys", rows_max=self._config.chunk_rows, bytes_max=self._config.chunk_bytes,
            )  # fmt: skip

    def _read_ages(
        self,
        connection: psycopg.Connection[Any],
        tables: Sequence[_Table],
        request: Request,
        begin: inspection_server.Mark,
        end: inspection_server.Mark,
    ) -> None:
        row = connection.execute("select current_setting('track_commit_timestamp')::bool").fetchone()
        commits_dated = bool(row and row[0])
        for table in tables:
            facts = table.facts
            if table.readable is None or not table.may_read:
                continue
            column = inspection_rows.age_column(connection, facts.oid, request.age_column)
            why, fix = "", ""
            if column is None:
                why, fix = "no column says when a row came to be", "--age-column NAME"
                if request.age_column:
                    why = f"it has no date or timestamp named {request.age_column!r}"
            elif facts.changes is not None and not (facts.changes.inserts or facts.changes.updates or commits_dated):
                why, fix = "no row was inserted or updated within the interval", "a longer --interval"
            else:
                measure = partial(
                    self._ages_of, connection, table, column, begin, end, request.late_after_s, commits_dated
                )
                facts.ages = self._within_budget(facts, "ages", measure)
            if why:
                facts.not_measured.append(NotMeasured(what="ages", why=why, fix=fix))

    def _ages_of(
        self,
        connection: psycopg.Connection[Any],
        table: _Table,
        column: tuple[str, str],
        begin: inspection_server.Mark,
        end: inspection_server.Mark,
        late_after_s: float,
        commits_dated: bool,
    ) -> Ages:
        # It may have grown: new rows stand at its end.
        read = inspection_rows.readable(connection, table.described)
        return inspection_rows.ages(
            connection, read, column, since=begin, until=end, late_after_s=late_after_s, commits_dated=commits_dated
        )

    def _has_time(self) -> bool:
        return time.monotonic() < self._deadline

    def _within_budget(self, facts: TableFacts, what: str, measure: Callable[[], T]) -> T | None:
        if not self._has_time():
            facts.not_measured.append(
                NotMeasured(what=what, why="the time for reading rows was used up", fix="a larger --budget")
            )
            return None
        return _measured(facts, what, measure)

    @contextmanager
    def _connected(self) -> Iterator[psycopg.Connection[Any]]:
        config = self._config
        connection = connect(
            config.dsn,
            password=password_of(config),
            application_name="cdc inspect",
            connect_timeout_s=config.connect_timeout_s,
            settings={
                "default_transaction_read_only": "on",
                "lock_timeout": f"{min(LOCK_S, config.lock_timeout_s):g}s",
                "statement_timeout": f"{min(STATEMENT_S, config.statement_timeout_s):g}s",
                "row_security": "off",
                "max_parallel_workers_per_gather": "0",
                "idle_session_timeout": "0",  # it is idle while changes are counted
            },
        )
        try:
            yield connection
        finally:
            connection.close()


def _measured(facts: TableFacts, what: str, measure: Callable[[], T]) -> T | None:
    """What `measure` gives; None, with the reason in `not_measured`, if the server does not let us have it."""
    try:
        return measure()
    except CdcError as e:
        why, fix = e.args[0], e.hint
    except psycopg.errors.QueryCanceled:
        why, fix = "it takes longer than statement_timeout allows, or was cancelled", ""
    except psycopg.errors.LockNotAvailable:
        why, fix = "another session holds a lock that shuts readers out", "when it has ended"
    except psycopg.errors.InsufficientPrivilege as e:
        why, fix = server_message(e), "grant what the message names to our role"
    except psycopg.Error as e:
        if e.sqlstate is None or e.sqlstate[:2] in ("08", "57"):
            raise  # it is the connection or the server that ended
        # A foreign partition cannot be sampled, a value does not fit the encoding: this number is not to be had.
        why, fix = server_message(e), ""
    facts.not_measured.append(NotMeasured(what=what, why=why, fix=fix))
    return None


def _count(
    facts: TableFacts,
    before: inspection_server.Counters,
    after: inspection_server.Counters,
    seconds: float,
    counted_s: float | None,
) -> None:
    facts.changes = inspection_server.changed(before.changes, after.changes, seconds)
    facts.changes_before = inspection_server.changed(inspection_server.NO_CHANGES, after.changes, counted_s)
    facts.dead_rows = after.dead_rows
    facts.vacuumed_at, facts.analyzed_at = after.vacuumed_at, after.analyzed_at


def _refusal(
    connection: psycopg.Connection[Any], described: catalog.Described, may_select: bool, may_use: bool
) -> Finding | None:
    """The right to read that our role lacks."""
    if may_select and may_use:
        return None
    table, user = described.schema.table, connection.info.user
    role = sql.Identifier(user).as_string(connection)
    schema = sql.Identifier(table.schema).as_string(connection)
    return Finding(
        name="select privilege",
        severity="error",
        message=f"role {user!r} may not read {table}",
        fix=f"grant usage on schema {schema} to {role}; grant select on {quoted(table)} to {role};",
        object=str(table),
    )


def _round_trip(connection: psycopg.Connection[Any]) -> float:
    times = []
    for _ in range(ROUND_TRIPS):
        began = time.monotonic()
        connection.execute("select 1")
        times.append(time.monotonic() - began)
    return min(times)
