"""How far a source's changes have come: in the log, in the changelogs, in the current tables.

Asks for landing and merging where somebody waits for them. It moves nothing itself, and knows neither the server's head
nor what was confirmed. Any thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from cdc import metrics
from cdc.errors import CdcError, Verdict
from cdc.land import Lander
from cdc.log import EventLog
from cdc.merge import Merger
from cdc.state import State
from cdc.worker import Worker


class Ladder:
    """The steps of one source. Before `stand_on` nothing has been reached but what is logged."""

    def __init__(self, source: str, event_log: EventLog) -> None:
        self._source = source
        self._log = event_log
        self._parts: tuple[Lander, Merger] | None = None

    def stand_on(self, lander: Lander, merger: Merger) -> None:
        """From now on these land and merge."""
        self._parts = lander, merger

    def logged(self) -> int:
        """End LSN up to which the log holds everything, 0 if it has no position."""
        position = self._log.position(self._source)
        return position.end_lsn if position is not None else 0

    def reached(self) -> dict[str, int]:
        """End LSNs up to which the log, the changelogs and the current tables hold everything."""
        landed, merged = 0, 0
        if self._parts is not None:
            point = self._parts[0].landed
            landed, merged = point.end_lsn if point is not None else 0, self._parts[1].merged_end_lsn
        return {"logged": self.logged(), "landed": landed, "merged": merged}

    def has_reached(self, end_lsn: int) -> bool:
        """Whether log, changelogs and current tables hold everything up to `end_lsn`; asks for what is missing."""
        reached = self.reached()
        if self._parts is not None and reached["logged"] >= end_lsn > reached["landed"]:
            self._parts[0].ask()
        if self._parts is not None and reached["landed"] >= end_lsn > reached["merged"]:
            self._parts[1].ask()
        return min(reached.values()) >= end_lsn


def operator_error(workers: Sequence[Worker]) -> CdcError | None:
    """An error of a part that only an operator can mend."""
    errors = (w.error for w in workers)
    return next((e for e in errors if isinstance(e, CdcError) and e.verdict is not Verdict.RETRY), None)


def count_tables(state: State, source: str) -> None:
    """Set the gauge of tables by state."""
    states = [t.state for t in state.tables(source)]
    for name in ("new", "snapshotting", "streaming", "stopped", "removed"):
        metrics.TABLES.labels(source, name).set(states.count(name))
