"""What a snapshot run leaves in the log: its begin row, its chunks with their progress, its end row.

Everything here happens under the log's lock, in one append each: rows and the progress that says so are durable
together, or neither is (rules 8, 10, 12, 13, 15 of docs/snapshots.md). What was read and when it may be appended is
decided in cdc.backfill.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cdc import metrics
from cdc.batch import SNAPSHOT_SEQ, Batch
from cdc.log import EventLog
from cdc.ports import RowsRead, TableSnapshot
from cdc.ranges import advanced
from cdc.runs import Run
from cdc.state import State
from cdc.table import TableId, TableSchema
from cdc.window import Stamp, absent, absent_batch, control_batch, fill_batch, read_batch, reconcile

log = logging.getLogger(__name__)

WHOLE_KINDS = ("first", "resync")
"""Kinds of runs that read a whole table."""
KEPT_DETAILS = ("settle", "why", "keys")
"""What a run was ordered with: it stays whatever becomes of the run."""


def shape_fact(source: str, table: TableId) -> str:
    """Name of the fact that holds the schema version that the lake was last told of by a control row."""
    return f"shape:{source}/{table}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What of a run one chunk is: the keys that were asked for (None: whatever stood in a range), and what is true of
    the run once it is appended. `done`: nothing is behind it, in the run or in the range of that number. `appended`
    is called then."""

    done: bool
    asked: Sequence[tuple[str, ...]] | None = None
    last_key: tuple[str, ...] | None = None
    range: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    appended: Callable[[], None] = lambda: None


class Appender:
    """The log's end of the runs of one source."""

    def __init__(self, source: str, event_log: EventLog, state: State) -> None:
        self._source = source
        self._log = event_log
        self._state = state

    def stamp(self, table: TableId, run: str, at_us: int) -> Stamp:
        """Rule 10: right after what is in the log, with a counter that never starts again. Under the log's lock."""
        position = self._log.position(self._source)
        assert position is not None
        seq = SNAPSHOT_SEQ + self._state.table(self._source, table).snapshot_seq
        return Stamp(epoch=position.epoch, lsn=position.lsn, seq=seq, run=run, at_us=at_us)

    def tell_shape(self, schema: TableSchema) -> None:
        """Append a control row in the table's newest schema version: the lake follows, though no change comes. Durable
        on return; done again it is another such row, which changes nothing."""
        table, at_us = schema.table, time.time_ns() // 1000
        with self._log.lock():
            if self._log.position(self._source) is None:
                return
            run = f"{at_us:014x}{secrets.token_hex(3)}"
            stamp = self.stamp(table, run, at_us)

            def note(tx: sqlite3.Connection) -> None:
                self._state.create_run(self._source, table, "shape", id=run, state="done", tx=tx)
                self._state.update_table(self._source, table, tx=tx, snapshot_seq=stamp.seq - SNAPSHOT_SEQ + 1)
                self._state.set(shape_fact(self._source, table), schema.version, tx)

            facts = {"event": "shape", "kind": "shape", "oid": str(schema.oid)}
            self._log.append_chunk(
                self._source, [control_batch(schema, facts, stamp)], run=run, chunk=0, kind="control", within=note
            )
        log.info("the catalog's shape is told to the lake", extra={"source": self._source, "table": str(table)})

    def begin(self, run: Run, schema: TableSchema, facts: dict[str, str]) -> None:
        """The begin row: what a whole run does not touch from here on is an orphan (rules 13, 15). Under the log's
        lock; a table that was stopped, or is gone, meanwhile stays so."""
        now = self._state.run(run.id)
        if now is None or now.state != "pending":
            return
        whole = run.kind in WHOLE_KINDS
        state = self._state.table(self._source, run.table).state
        # One that is gone comes back by a look at the catalog, which lets it take part again and orders its snapshot.
        refused = {"stopped": "the table is stopped", "removed": "the table is not published any more"}
        if state in refused or (not whole and state == "new"):
            why = refused.get(state, "the table has not been read as a whole yet")
            self._state.update_run(run.id, state="failed", reason=why)
            return
        stamp = self.stamp(run.table, run.id, time.time_ns() // 1000)
        facts = {"event": "begin", "kind": run.kind, "oid": str(schema.oid), **facts}

        def progress(tx: sqlite3.Connection) -> None:
            self._state.update_run(
                run.id, tx=tx, state="running", first_lsn=stamp.lsn, chunk_no=0, reason="",
                details={
                    "oid": schema.oid, "version": schema.version, "epoch": stamp.epoch, "begin_seq": stamp.seq,
                    **{k: run.details[k] for k in KEPT_DETAILS if k in run.details},
                },
            )  # fmt: skip
            self._state.set(shape_fact(self._source, run.table), schema.version, tx)
            begun = {"state": "snapshotting", "oid": schema.oid, "reason": "", "hint": ""} if whole else {}
            self._state.update_table(self._source, run.table, tx=tx, snapshot_seq=stamp.seq - SNAPSHOT_SEQ + 1, **begun)

        self._log.append_chunk(
            self._source, [control_batch(schema, facts, stamp)], run=run.id, chunk=0, kind="control", within=progress
        )
        log.info("snapshot run began", extra={"source": self._source, "table": str(run.table), "run": run.id})

    def append(
        self, run: Run, schema: TableSchema, snapshot: TableSnapshot, rows: RowsRead, window: list[Batch], step: Step
    ) -> None:
        """A chunk and its progress. Under the log's lock, `run` read under it; `window` holds what `snapshot` does not
        see of what the log has got since before it was taken."""
        if step.range is not None:
            details, done = advanced(run, step.range, step.last_key, step.done)
            step = replace(step, details=details, done=done)
        stamp = self.stamp(run.table, run.id, snapshot.taken_at_us)
        batches = self._batches(run, schema, rows, window, step, stamp)
        read = sum(b.data.num_rows for b in batches)
        total = run.rows + rows.rows
        # A chunk of nothing leaves no trace in the log: the lake would never be seen to have it.
        number = run.chunk_no + bool(batches)

        def progress(tx: sqlite3.Connection) -> None:
            self._state.update_run(
                run.id, tx=tx, chunk_no=number, rows=total, reason="",
                last_key=list(step.last_key) if step.last_key else run.last_key,
                details={
                    **run.details, "relfilenode": snapshot.relfilenode,
                    "bytes": run.details.get("bytes", 0) + rows.bytes, **step.details,
                },
                state="done" if step.done else "running",
            )  # fmt: skip
            changed: dict[str, object] = {"snapshot_seq": stamp.seq + read - SNAPSHOT_SEQ}
            if step.done and run.kind in WHOLE_KINDS:
                changed.update(state="streaming", reason="", hint="", rows=total)
            self._state.update_table(self._source, run.table, tx=tx, **changed)

        if batches:
            self._log.append_chunk(self._source, batches, run=run.id, chunk=number, kind="chunk", within=progress)
        else:
            with self._state.transaction() as tx:
                progress(tx)
        step.appended()
        metrics.SNAPSHOT_ROWS.labels(self._source, metrics.table_label(self._source, run.table)).inc(read)
        for batch in batches:
            metrics.count_kept_as_text(self._source, run.table, batch.kept_as_text())
        if step.done:
            log.info(
                "snapshot run ended",
                extra={"source": self._source, "table": str(run.table), "run": run.id, "rows": total},
            )

    def _batches(
        self, run: Run, schema: TableSchema, rows: RowsRead, window: list[Batch], step: Step, first: Stamp
    ) -> list[Batch]:
        """Rows to append, one behind the other from the stamp `first` on."""
        batches: list[Batch] = []

        def stamp() -> Stamp:
            taken = sum(b.data.num_rows for b in batches)
            return Stamp(epoch=first.epoch, lsn=first.lsn, seq=first.seq + taken, run=run.id, at_us=first.at_us)

        done = reconcile(schema, rows, window)
        if len(done.keep):
            kept = done.keep
            whole = len(kept) == rows.rows
            columns = rows.columns if whole else [c.take(kept) for c in rows.columns]
            raw = rows.raw if whole or rows.raw is None else rows.raw.take(kept)
            batches.append(read_batch(schema, columns, raw, stamp(), len(kept)))
        if done.fills is not None:
            batches.append(fill_batch(schema, done.fills, stamp()))
        gone = absent(schema, step.asked, rows, window) if step.asked is not None and run.kind != "keys" else None
        if gone is not None:
            batches.append(absent_batch(schema, gone[0], gone[1], stamp(), gone[2]))
        if step.done and run.kind != "keys":
            facts = {"event": "end", "kind": run.kind, "oid": str(schema.oid)}
            batches.append(control_batch(schema, facts, stamp()))
        return batches
