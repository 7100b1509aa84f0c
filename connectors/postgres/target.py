"""Postgres as a target of reverse ETL: rows and what we remember of them change in one transaction.

Guarantees: batches and their acknowledgements (`cdc.cdc_sync_state`, in the target) commit together, so whoever dies
when, what is acknowledged has been written, and pushing again has no second effect, in no mode; rows that are equal
already are not touched; rows that the target refuses are found and left out, the others go through; transactions are
marked as ours where the role may do that. Only the assigned columns are written.

Where the role may keep no state there, acknowledgements go to a ledger after COMMIT. Then an answer that was lost
leaves rows unacknowledged that were written: they are sent again, without effect. Modes insert and append are refused
there.

Deliberately not here: retrying what takes longer than a moment (the caller's supervisor does). A trigger of the target
that suppresses a row, or changes it, has its way: the row counts as taken, unless it was to be deleted and is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from cdc.config_serving import TargetConfig
from cdc.errors import CdcError, TargetRejected, TargetUnavailable
from cdc.failpoints import failpoint
from cdc.ports import Finding
from cdc.sink import (
    ACKS,
    ADOPT,
    DELETE,
    Acknowledged,
    Assignment,
    Batch,
    Drift,
    Ledger,
    Ledgers,
    PushResult,
)
from connectors.postgres.target_drift import differences
from connectors.postgres.target_errors import AGAIN
from connectors.postgres.target_origin import origin_findings
from connectors.postgres.target_session import Session
from connectors.postgres.target_state import STATE_TABLE, State, state_findings
from connectors.postgres.target_table import TargetTable, parents_first, quoted, read_table
from connectors.postgres.target_writing import ALL_REFUSED_ROWS, Writing

BEFORE_COMMIT = "sync.before_commit"
AFTER_COMMIT = "sync.after_commit"

TRIES = 5
"""Of a transaction that met a deadlock, a serialization failure or a lock that was not released in time."""


class PostgresTarget:
    """A database that results are pushed into; connects at first use. Used by one thread."""

    def __init__(self, config: TargetConfig, ledgers: Ledgers) -> None:
        self._config = config
        self._ledgers = ledgers
        self._known: dict[str, Ledger] = {}
        self._session = Session(config)

    # ------------------------------------------------------------------ Sink

    def check(self, assignment: Assignment) -> list[Finding]:
        """Whether the table can take the assignment, and what is missing around it; empty if all is well."""
        with self._session.transaction() as connection:
            try:
                findings = read_table(connection, assignment.table).problems(assignment)
            except TargetRejected as error:
                message = str(error.args[0])
                findings = [
                    Finding(name="table", severity="error", message=message, fix=error.hint, object=assignment.table)
                ]
            findings += state_findings(connection, assignment.mode)
            findings += _stage_findings(connection)
            findings += origin_findings(connection, self._session.origin)
        at = f"target.{self._config.name}: sync.{assignment.sync}"
        return [Finding(name=f.name, severity=f.severity, message=f.message, fix=f.fix, object=at) for f in findings]

    def acknowledged(self, assignment: Assignment) -> Acknowledged:
        """What the target has acknowledged for the table that is there now. Blocks for one read of the state table.

        `shape` covers the pushed columns (name, type, NOT NULL, generated, identity) and those that an INSERT would
        lack; without state in the target also which table it is, since a ledger cannot tell an old one from a new.
        """
        with self._session.transaction() as connection:
            table = read_table(connection, assignment.table)
            state = State(connection)
            if state.usable:
                rows, last_run = state.acknowledged(assignment, table)
                return Acknowledged(rows=rows, shape=table.shape(assignment), last_run=last_run)
        return Acknowledged(
            rows=self._ledger(assignment.sync).read(), shape=table.shape(assignment, "table", table.oid)
        )

    def push(self, batches: Iterable[Batch]) -> list[PushResult]:
        """Write the batches and remember their acknowledgements in one transaction; durable on return.

        All batches are held in memory. Deadlocks, serialization failures and locks that are not released in time are
        tried again a few times, the whole transaction anew. Rows of modes insert and append that are acknowledged
        with this very digest are not written again: to send them again, forget first.
        """
        given = list(batches)
        retrying = Retrying(
            retry=retry_if_exception(_goes_again),
            stop=stop_after_attempt(TRIES),
            wait=wait_random_exponential(multiplier=0.1, max=2),
            reraise=True,
        )
        results, keeps_state = retrying(self._push_once, [b for b in given if b.acks.num_rows])
        failpoint(AFTER_COMMIT)
        written = iter(results)
        found = [next(written) if b.acks.num_rows else PushResult(rows=0) for b in given]
        if keeps_state:
            return found
        return [self._ledgered(batch, result) for batch, result in zip(given, found, strict=True)]

    def forget(self, assignment: Assignment) -> int:
        """Forget all acknowledgements of the sync for its table, of one that was dropped too; how many there were."""
        with self._session.transaction(write=True) as connection:
            state = State(connection)
            if state.usable:
                return state.forget(assignment)
        ledger = self._ledger(assignment.sync)
        known = pc.sum(pc.not_equal(ledger.read().column("digest"), "")).as_py() or 0
        ledger.forget()
        return int(known)

    def close(self) -> None:
        """Close the connection; the origin is free for another session. Idempotent."""
        self._session.close()

    # ------------------------------------------------------------------ Ordering, Comparing

    def order(self, assignments: Sequence[Assignment]) -> list[Assignment]:
        """Tables that are referred to before those that refer to them."""
        with self._session.transaction() as connection:
            return parents_first(connection, list(assignments))

    def drift(self, assignment: Assignment, batches: Iterable[Batch]) -> Iterator[Sequence[Drift]]:
        """How the target differs from these rows, batch by batch, each in a transaction that leaves nothing.

        A value that the column could not hold at all is DIFFERENT, without naming the column.
        """
        for batch in batches:
            with self._session.transaction() as connection:
                table = read_table(connection, assignment.table)
                table.require(assignment, batch.rows.schema)
                with connection.transaction(force_rollback=True):
                    found = differences(connection, table, assignment, batch)
            yield found

    def origin(self) -> str:
        """The name that marks our writes; empty once the target has refused to let us mark them."""
        marks = self._session.marks
        return "" if marks is not None and not (marks.by_origin or marks.by_message) else self._session.origin

    # ------------------------------------------------------------------ writing

    def _push_once(self, batches: Sequence[Batch]) -> tuple[list[PushResult], bool]:
        """One transaction; its results, and whether the acknowledgements are in it."""
        if not batches:
            return [], True
        with self._session.transaction(write=True) as connection:
            tables = {b.assignment.table: read_table(connection, b.assignment.table) for b in batches}
            for batch in batches:
                with_rows = batch.rows.schema if batch.action not in (DELETE, ADOPT) else None
                tables[batch.assignment.table].require(batch.assignment, with_rows)
            keeps_state = self._begin_state(connection, batches, tables)
            writing = Writing(connection, self._session.where, keeps_state=keeps_state)
            for batch in batches:
                writing.take(batch, tables[batch.assignment.table])
            results = writing.finish()
            if not keeps_state:
                # On record before the COMMIT, whose answer may be lost: until it is heard these rows are in doubt.
                for batch, result in zip(batches, results, strict=True):
                    self._ledger(batch.assignment.sync).record(attempts=_taken(batch, result))
            failpoint(BEFORE_COMMIT)
        return results, keeps_state

    def _begin_state(
        self, connection: psycopg.Connection[Any], batches: Sequence[Batch], tables: dict[str, TargetTable]
    ) -> bool:
        """Whether acknowledgements are kept in the target; if so, everything is ready for them."""
        state = State(connection)
        if not state.usable:
            without_key = next((b.assignment for b in batches if b.assignment.mode in ("insert", "append")), None)
            if without_key is not None:
                (problem,) = state_findings(connection, without_key.mode)
                raise TargetRejected(f"{self._session.where}: {problem.message}", hint=problem.fix)
            return False
        state.prepare()
        runs = {(b.assignment.sync, b.assignment.table): b.run for b in batches}
        for sync, table in sorted(runs):  # in one order, so that two of us do not wait for each other
            state.begin(sync, tables[table], runs[sync, table])
        return True

    def _ledger(self, sync: str) -> Ledger:
        """One object per sync, which remembers what it has read."""
        if sync not in self._known:
            self._known[sync] = self._ledgers(sync)
        return self._known[sync]

    def _ledgered(self, batch: Batch, result: PushResult) -> PushResult:
        """Acknowledge in the ledger what has been committed; what it does not take is sent again, without effect."""
        taken = _taken(batch, result)
        acks = pa.table([taken.column("key"), taken.column("digest"), pc.add(taken.column("version"), 1)], schema=ACKS)
        try:
            self._ledger(batch.assignment.sync).record(acks=acks)
        except CdcError as error:
            return PushResult(
                rows=result.rows,
                rejected=result.rejected,
                absent=result.absent,
                unsent=acks.column("key").to_pylist(),
                error=error,
            )
        return result


def _taken(batch: Batch, result: PushResult) -> pa.Table:
    """The acknowledgements of the rows that were neither refused nor absent."""
    left_out = {*(r.key for r in result.rejected), *result.absent}
    keys = batch.acks.column("key")
    return batch.acks.filter(pc.invert(pc.is_in(keys, pa.array(list(left_out), pa.string()))))


def _goes_again(error: BaseException) -> bool:
    return isinstance(error, TargetUnavailable) and isinstance(error.__cause__, AGAIN)


def _stage_findings(connection: psycopg.Connection[Any]) -> list[Finding]:
    row = connection.execute(
        "SELECT pg_catalog.has_database_privilege(pg_catalog.current_database(), 'TEMPORARY')"
    ).fetchone()
    if row == (True,):
        return []
    return [
        Finding(
            name="temporary tables",
            severity="error",
            message="the role may not create temporary tables, through which batches are written",
            fix=f"GRANT TEMPORARY ON DATABASE {quoted(connection.info.dbname)} TO {quoted(connection.info.user)}",
        )
    ]


__all__ = ["AFTER_COMMIT", "ALL_REFUSED_ROWS", "BEFORE_COMMIT", "STATE_TABLE", "PostgresTarget"]
