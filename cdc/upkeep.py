"""Upkeep of one table in the lake: small objects joined, what nobody reads any more removed.

Belongs to the thread that merges the table, which asks between merges: so it takes its time from merging's share and is
never in the way of landing. Each step is a commit of its own, safe to die in: what a join has replaced stays until the
vacuum, what it has written and not committed is an orphan, and goes with them.

It does not decide which objects fit together (cdc.lake.compaction), nor what readers may still need beyond
`vacuum_after_s`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from cdc import metrics
from cdc.errors import StoreConflict
from cdc.lake.changelog import ChangelogTable
from cdc.lake.compaction import Compactor
from cdc.lake.current import CurrentTable
from cdc.land import ORPHAN_S
from cdc.ports import ObjectStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Of `[lake]`: how often is looked, where objects stop growing, and how long readers may take."""

    every_s: float
    object_bytes: int
    vacuum_after_s: float


@dataclass(slots=True)
class UpkeepOrder:
    """Somebody waits for it. `done`: objects that were joined, and that were removed; None before that."""

    kind: str
    done: dict[str, int] | None = None


class Upkeep:
    """Of one table. Not thread-safe."""

    def __init__(
        self, store: ObjectStore, changelog: ChangelogTable, current: CurrentTable, *, temp_dir: Path, limits: Limits
    ) -> None:
        self._store = store
        self._changelog = changelog
        self._current = current
        self._temp_dir = temp_dir
        self._limits = limits
        self._compactor: Compactor | None = None
        self._compact_at = time.monotonic() + limits.every_s
        self._vacuum_at = time.monotonic() + limits.vacuum_after_s

    @property
    def is_compaction_due(self) -> bool:
        return time.monotonic() >= self._compact_at

    @property
    def is_vacuum_due(self) -> bool:
        return time.monotonic() >= self._vacuum_at

    def compact(self, *, everything: bool = False) -> int:
        """Join small objects of the changelog, once, or until nothing is left; how many were replaced. Blocking;
        durable on return. Only while no run of the table is under way: its begin may have to be read again."""
        self._compact_at = time.monotonic() + self._limits.every_s
        merged, newest = self._current.merged(), self._changelog.refresh()
        delta = self._changelog.delta
        held = {path for _, path in delta.files_added(merged, newest)}
        if self._compactor is None:
            prefix = self._changelog.stored_prefix()
            self._compactor = Compactor(
                self._store, delta, prefix, temp_dir=self._temp_dir, target_bytes=self._limits.object_bytes
            )
        replaced = 0
        try:
            while (joined := self._compactor.join(held, all_sizes=everything)) is not None:
                replaced += joined.objects
                if not everything:
                    self._compact_at = 0.0  # there may be more
                    break
        except StoreConflict:
            log.info("objects were replaced by another writer meanwhile", extra={"delta_table": self._changelog.path})
        if replaced:
            metrics.COMPACTED_OBJECTS.inc(replaced)
        return replaced

    def vacuum(self) -> int:
        """Remove objects that no version of the last `vacuum_after_s` shows, and what crashes left; how many."""
        self._vacuum_at = time.monotonic() + self._limits.vacuum_after_s
        gone = self._current.vacuum(self._limits.vacuum_after_s)
        gone += self._changelog.delta.vacuum(self._limits.vacuum_after_s)
        gone += self._changelog.reclaim(ORPHAN_S)
        if gone:
            metrics.VACUUMED_OBJECTS.inc(gone)
        return gone


__all__ = ["Limits", "Upkeep", "UpkeepOrder"]
