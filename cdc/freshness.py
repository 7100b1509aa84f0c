"""What each table of a source still lacks in its changelog and in `current`, and since when.

Landing and merging tell it as they go; merging asks it whether a merge is worth its cost, the main loop what to show.
A table lacks something since the oldest change in question was committed at the source, by the source's clock, so a
daemon that stood still does not look fresh.

In memory, of one history of the source. It knows what landing has read of the log since the start, so while landing
stands still, look at the source's lag. Thread-safe; nothing blocks.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from cdc import metrics
from cdc.state import State
from cdc.table import TableId

LANDINGS_MAX = 256
"""Landings of one table that are told apart; beyond that the newest two count as one."""
RESTING = ("stopped", "removed")


class Tail(NamedTuple):
    """What landed and is not merged: how many rows, and when (Unix s) the oldest was committed; infinite if none."""

    rows: int
    since: float


@dataclass(slots=True)
class _Landing:
    version: int
    rows: int
    since: float


def freshness_fact(source: str) -> str:
    """Key of the fact in which the daemon notes, each second, what tables lack: {table: {step: Unix s since when}} with
    the steps `landed` and `merged`; a table that is not named lacks nothing."""
    return f"freshness:{source}"


class Freshness:
    """Of one source's tables."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._open: dict[TableId, float] = {}
        self._landings: dict[TableId, list[_Landing]] = {}
        self._shown: set[str] = set()

    # ---- landing tells ----

    def read(self, table: TableId, oldest_us: int | None) -> None:
        """Rows were read from the log, the oldest committed then (None: not known)."""
        now = time.time()
        # Whatever the source's clock says, it was not committed after it was read.
        since = now if oldest_us is None else min(now, oldest_us / 1e6)
        with self._lock:
            self._open[table] = min(since, self._open.get(table, math.inf))

    def landed(self, table: TableId, version: int, rows: int) -> None:
        """What was read of a table is in this version of its changelog; `rows` of it had not been there before."""
        with self._lock:
            since = self._open.pop(table, math.inf)
            if not rows or table.is_own:
                return
            landings = self._landings.setdefault(table, [])
            if len(landings) >= LANDINGS_MAX:
                last = landings.pop()
                rows, since = rows + last.rows, min(since, last.since)
            landings.append(_Landing(version, rows, since))

    def settled(self) -> None:
        """Nothing that was read waits to be landed."""
        with self._lock:
            self._open.clear()

    # ---- merging tells and asks ----

    def merged(self, table: TableId, through: int) -> None:
        """`current` holds this version of the changelog."""
        with self._lock:
            left = [x for x in self._landings.pop(table, []) if x.version > through]
            if left:
                self._landings[table] = left

    def tail(self, table: TableId) -> Tail:
        """What has landed since the start and is not merged."""
        with self._lock:
            landings = self._landings.get(table, ())
            return Tail(sum(x.rows for x in landings), min((x.since for x in landings), default=math.inf))

    # ---- the main loop shows ----

    def tell(self, state: State) -> None:
        """Set the metrics, and note the fact for `status`. Tables that rest are not followed, so nothing is told."""
        now = time.time()
        lacking: dict[str, dict[str, float]] = {}
        shown: dict[str, tuple[float, float, int]] = {}
        for known in state.tables(self._source):
            if known.state in RESTING:
                self._forget(known.table)
                continue
            tail = self.tail(known.table)
            landed = self._open.get(known.table, math.inf)
            steps = {"landed": landed, "merged": landed if known.table.is_own else min(landed, tail.since)}
            if since := {step: at for step, at in steps.items() if at < math.inf}:
                lacking[str(known.table)] = since
            label = metrics.table_label(self._source, known.table)
            ages = [max(0.0, now - at) if at < math.inf else 0.0 for at in steps.values()]
            # Tables beyond the bound of series share one: it shows the worst of them, and all rows.
            other = shown.get(label, (0.0, 0.0, 0))
            shown[label] = max(other[0], ages[0]), max(other[1], ages[1]), other[2] + tail.rows
        for label, (landed_s, merged_s, rows) in shown.items():
            metrics.TABLE_LAG_SECONDS.labels(self._source, label, "landed").set(landed_s)
            metrics.TABLE_LAG_SECONDS.labels(self._source, label, "merged").set(merged_s)
            metrics.UNMERGED_ROWS.labels(self._source, label).set(rows)
        for label in self._shown - shown.keys():
            metrics.UNMERGED_ROWS.remove(self._source, label)
            for step in ("landed", "merged"):
                metrics.TABLE_LAG_SECONDS.remove(self._source, label, step)
        self._shown = set(shown)
        if lacking != state.get(freshness_fact(self._source)):
            state.set(freshness_fact(self._source), lacking)

    def _forget(self, table: TableId) -> None:
        with self._lock:
            self._open.pop(table, None)
            self._landings.pop(table, None)


def lag_seconds(fact: dict[str, Any] | None, table: TableId, now: float) -> dict[str, float | None]:
    """For `status`: how old the oldest change is that the table's changelog (`landed`) and its current (`merged`) lack,
    by the daemon's fact; 0 for none, None if it is not known."""
    if fact is None:
        return {"landed": None, "merged": None}
    since = fact.get(str(table)) or {}
    return {s: round(max(0.0, now - since[s]), 3) if s in since else 0.0 for s in ("landed", "merged")}
