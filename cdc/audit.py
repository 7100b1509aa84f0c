"""Verify in the background: each table once in `every_s`, one at a time, at a bounded share of the time.

What was found is in the history (and so in `status`), in metrics, in the log, and, if something differs, an alert. A
table is due when its last finished comparison began longer ago than `every_s`; what was missed while the daemon was
down is done once. Between any two pieces of work (each about a second) it rests as `time_share` says, and looks
whether to stop. Nothing that happens here stops anything else, and it repairs nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdc import metrics, registry
from cdc.config import Config
from cdc.errors import CdcError, TimedOut
from cdc.ports import ObjectStore
from cdc.state import State
from cdc.table import TableId
from cdc.verify import Asked, TableReport, held_shape, verify_table

log = logging.getLogger(__name__)

HISTORY = "verify"
"""Kind of its entries in the history; their name is `<source>.<schema>.<table>`."""
AWAIT_S = 300.0
"""How long the lake is awaited, the table's snapshot open."""
LOOK_S = 5.0
"""How often it is looked which table is due."""

AwaitLake = Callable[[str, TableId, int, float], int]
"""Blocks until `current` of a source's table holds everything up to a position, to a monotonic deadline; CdcError if
it cannot, or if the daemon stops."""


class Stopping(CdcError):
    """The daemon stops; the comparison is begun anew after its next start."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One comparison in the history."""

    outcome: str
    counts: dict[str, Any]
    error: str


class Audit:
    """All sources. `step` belongs to one thread."""

    def __init__(
        self,
        config: Config,
        state: State,
        store: ObjectStore,
        *,
        temp_dir: Path,
        stop: threading.Event,
        streams: Callable[[str], bool],
        await_lake: AwaitLake,
        alert: Callable[[dict[str, Any]], None],
    ) -> None:
        self._config = config
        self._state = state
        self._store = store
        self._temp_dir = temp_dir
        self._stop = stop
        self._streams = streams
        self._await_lake = await_lake
        self._alert = alert
        self._look_at = 0.0
        self._begun_us: dict[tuple[str, TableId], int] = {}

    def step(self) -> bool:
        """Compare the table that has waited longest, if one is due; whether one was. Never raises."""
        now = time.monotonic()
        if not self._config.verify.every_s or now < self._look_at:
            return False
        self._look_at = now + LOOK_S
        due = self._due()
        if due is None:
            return False
        self._look_at = 0.0
        self._compare(*due)
        return True

    def _due(self) -> tuple[str, TableId] | None:
        oldest: tuple[int, str, TableId] | None = None
        latest_us = int((time.time() - self._config.verify.every_s) * 1e6)
        for source in self._config.sources:
            if not self._streams(source):
                continue
            for known in self._state.tables(source):
                table = known.table
                if known.state != "streaming" or table.is_own or self._state.is_paused("table", f"{source}/{table}"):
                    continue
                begun_us = self._begun(source, table)
                if begun_us <= latest_us and (oldest is None or begun_us < oldest[0]):
                    oldest = (begun_us, source, table)
        return None if oldest is None else oldest[1:]

    def _begun(self, source: str, table: TableId) -> int:
        """When the last comparison that has ended began; 0: never."""
        known = self._begun_us.get((source, table))
        if known is None:
            entries = self._state.history(HISTORY, f"{source}.{table}", limit=2)
            known = next((e.started_at for e in entries if e.ended_at), 0)
            self._begun_us[source, table] = known
        return known

    def _compare(self, source: str, table: TableId) -> None:
        began_us = time.time_ns() // 1000
        entry = self._state.start_history(HISTORY, f"{source}.{table}", "schedule")
        try:
            report = self._report(source, table)
        except Exception as e:  # noqa: BLE001 - nothing that happens here may stop anything else
            # Its text is not ours and may hold values.
            report = TableReport(source, table, error=f"unexpected {type(e).__name__}")
        if self._stop.is_set() and report.error:
            return
        self._begun_us[source, table] = began_us
        outcome = _outcome(report)
        self._state.finish_history(entry, outcome.outcome, counts=outcome.counts, error=outcome.error)
        self._tell(report, outcome)

    def _report(self, source: str, table: TableId) -> TableReport:
        asked = self._config.verify
        deadline = time.monotonic() + asked.table_timeout_s
        section = self._config.sources[source]
        reader = registry.source_kind(section.type).comparer(section)

        def pace(took_s: float) -> None:
            if self._stop.wait(took_s * (1 / asked.time_share - 1)):
                raise Stopping("the daemon stops")
            if time.monotonic() > deadline:
                raise TimedOut(
                    f"table {table} was not compared within {asked.table_timeout_s:g} s",
                    hint="more time or a bigger share: [verify] table_timeout_s, time_share, sample_percent",
                )

        self._temp_dir.mkdir(parents=True, exist_ok=True)
        try:
            return verify_table(
                source, table, reader, self._store,
                lambda awaited, lsn: self._await_lake(source, awaited, lsn, min(deadline, time.monotonic() + AWAIT_S)),
                temp_dir=self._temp_dir,
                asked=Asked(
                    sample=asked.sample_percent, seed=time.time_ns() & 0x7FFFFFFF, pace=pace,
                    held=held_shape(self._config, self._state, source, table),
                ),
            )  # fmt: skip
        finally:
            reader.close()

    def _tell(self, report: TableReport, outcome: Outcome) -> None:
        facts = {"source": report.source, "table": str(report.table)}
        label = metrics.table_label(report.source, report.table)
        metrics.VERIFY_RUNS.labels(report.source, outcome.outcome).inc()
        if report.error:
            log.warning("a table could not be verified", extra={**facts, "why": report.error, "hint": report.hint})
            return
        metrics.VERIFY_TIME_SECONDS.labels(report.source, label).set(time.time())
        metrics.VERIFY_SECONDS.labels(report.source, label).set(report.seconds)
        metrics.VERIFY_ROWS.labels(report.source, label).set(report.rows)
        metrics.VERIFY_NOT_COMPARED.labels(report.source, label).set(report.not_compared)
        for kind, count in report.counts.items():
            metrics.VERIFY_DIFFERENT_ROWS.labels(report.source, label, kind).set(count)
        facts = {**facts, **outcome.counts}
        if not report.differs:
            log.info("a table is verified", extra=facts)
            return
        hint = f"`cdc verify {report.table}` names the keys, --repair mends them"
        log.error("the lake differs from the source", extra={**facts, "hint": hint})
        self._alert({"alert": "verify", **facts, "hint": hint})


def _outcome(report: TableReport) -> Outcome:
    outcome = (
        "failed" if report.error
        else "different" if report.differs
        else "equal" if report.equal
        else "not fully compared"
    )  # fmt: skip
    counts = {
        "rows": report.rows, **report.counts, "not_compared": report.not_compared, "fetched": report.fetched,
        "sample": report.sample, "seconds": report.seconds,
    }  # fmt: skip
    return Outcome(outcome, counts, report.error)
