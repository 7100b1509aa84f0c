"""Upkeep of one table in the lake: small objects joined, what nobody reads any more removed.

Belongs to the thread that merges the table, which asks between merges: so it takes its time from merging's share and is
never in the way of landing. Each step is a commit of its own, safe to die in: what a join has replaced stays until the
vacuum, what it has written and not committed is an orphan like those of landing, and goes with these (at the start).

It does not decide which objects fit together (cdc.lake.compaction), nor what readers may still need beyond
`vacuum_after_s`.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from cdc import metrics
from cdc.errors import CdcError, StoreConflict
from cdc.failpoints import failpoint
from cdc.lake.changelog import ChangelogTable
from cdc.lake.compaction import Compactor
from cdc.lake.current import CurrentTable
from cdc.ports import ObjectStore
from cdc.table import TableId

log = logging.getLogger(__name__)

FIRST_VACUUM_S = 300.0
RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Of `[lake]`: how often is looked, where objects stop growing, and how long readers may take."""

    every_s: float
    object_bytes: int
    vacuum_after_s: float


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
        # Soon after the start: a daemon that is started often would never come to it.
        self._vacuum_at = time.monotonic() + min(limits.vacuum_after_s, FIRST_VACUUM_S)

    @property
    def is_compaction_due(self) -> bool:
        return time.monotonic() >= self._compact_at

    @property
    def is_vacuum_due(self) -> bool:
        return time.monotonic() >= self._vacuum_at

    def put_off(self) -> None:
        """After a failure: not again before its time."""
        now = time.monotonic()
        self._compact_at = max(self._compact_at, now + max(self._limits.every_s, RETRY_S))
        self._vacuum_at = max(self._vacuum_at, now + max(self._limits.every_s, RETRY_S))

    def compact(self, *, everything: bool = False) -> int:
        """One join of small objects of the changelog, of `everything` that is small or of what is worth it; how many
        were replaced. Blocking; durable on return. Only while no run of the table is under way: what has been merged of
        it may have to be read again."""
        self._compact_at = time.monotonic() + self._limits.every_s
        merged, newest = self._current.merged(), self._changelog.refresh()
        delta = self._changelog.delta
        held = {path for _, path in delta.files_added(merged, newest)}
        if self._compactor is None:
            prefix = self._changelog.stored_prefix()
            self._compactor = Compactor(
                self._store, delta, prefix, temp_dir=self._temp_dir, target_bytes=self._limits.object_bytes
            )
        try:
            joined = self._compactor.join(newest, held, all_sizes=everything)
        except StoreConflict:
            log.info("objects were replaced by another writer meanwhile", extra={"delta_table": self._changelog.path})
            return 0
        if joined is None:
            return 0
        self._compact_at = 0.0  # there may be more
        metrics.COMPACTED_OBJECTS.inc(joined.objects)
        return joined.objects

    def vacuum(self) -> int:
        """Remove objects that no version of the last `vacuum_after_s` shows; how many. Only when `current` names the
        newest version of the changelog that has its rows."""
        self._vacuum_at = time.monotonic() + max(self._limits.vacuum_after_s, self._limits.every_s)
        failpoint("vacuum.before_delete")
        gone = self._current.vacuum(self._limits.vacuum_after_s)
        failpoint("vacuum.after_current")
        gone += self._changelog.delta.vacuum(self._limits.vacuum_after_s)
        failpoint("vacuum.after_delete")
        if gone:
            metrics.VACUUMED_OBJECTS.inc(gone)
        return gone


@dataclass(slots=True)
class UpkeepOrder:
    """Somebody waits for it. `done`: objects that were joined, and that were removed; `error`: why not. Neither: it is
    not done yet."""

    kind: str
    joined: int = 0
    done: dict[str, int] | None = None
    error: CdcError | None = None


class UpkeepOrders:
    """What was ordered by hand, by table. Any thread."""

    def __init__(self) -> None:
        self._orders: dict[TableId, list[UpkeepOrder]] = {}
        self._lock = threading.Lock()

    def add(self, table: TableId, kind: str) -> UpkeepOrder:
        """A new order."""
        order = UpkeepOrder(kind)
        with self._lock:
            self._orders.setdefault(table, []).append(order)
        return order

    def open(self, table: TableId) -> list[UpkeepOrder]:
        """Those of the table that are not done."""
        with self._lock:
            left = [o for o in self._orders.get(table, []) if o.done is None and o.error is None]
            self._orders[table] = left
            return list(left)


__all__ = ["Limits", "Upkeep", "UpkeepOrder", "UpkeepOrders"]
