"""Upkeep of one table in the lake: small objects joined, old ones let go or put into a cheaper class of storage, what
nobody reads any more removed, the log of its versions kept short.

Belongs to the thread that merges the table, which asks between merges: so it takes its time from merging's share and is
never in the way of landing. Each step is a commit of its own, safe to die in: what a join has replaced, and what
retention has let go, stays until the vacuum; what a join has written and not committed is an orphan like those of
landing, and goes with these.

It does not decide which objects fit together (cdc.lake.compaction), which have expired (cdc.lake.retention) or rest
(cdc.lake.cooling), nor what readers may still need beyond `vacuum_after_s`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from cdc import metrics
from cdc.config import LakeConfig, SourceConfig
from cdc.errors import CdcError, StoreConflict, StoreUnavailable
from cdc.failpoints import failpoint
from cdc.lake.changelog import ChangelogTable
from cdc.lake.commits import HistoryGone
from cdc.lake.compaction import Compactor
from cdc.lake.cooling import Cooler
from cdc.lake.current import CurrentTable
from cdc.lake.naming import JOINED
from cdc.lake.retention import commit_date, expired, let_go
from cdc.ports import ObjectStore, TieredStore
from cdc.table import TableId

log = logging.getLogger(__name__)

FIRST_VACUUM_S = 300.0
RETRY_S = 30.0
HELD_S = 600.0
"""How often it is tried again where a follower holds back a vacuum."""
AGED_EVERY_S: Final = 3600.0
"""How often is looked for what has become old: ages are counted in days."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of `[lake]`: how often is looked, where objects stop growing, how long readers may take, and at what age objects
    of changelogs are put away or let go (infinite: never)."""

    every_s: float
    object_bytes: int
    vacuum_after_s: float
    retain_s: float = math.inf
    cold_after_s: float = math.inf
    cold_class: str = ""
    retain_own_s: dict[str, float] = field(default_factory=dict)
    """Tables (`schema.name`) that say otherwise than `retain_s`."""

    @staticmethod
    def of(lake: LakeConfig, source: SourceConfig) -> Limits:
        """What the configuration says for a source's tables."""
        own = {name: table.retain_s for name, table in source.table.items() if table.retain_s is not None}
        kept = lake.changelog
        return Limits(
            lake.compact_every_s, lake.object_bytes_target, lake.vacuum_after_s,
            retain_s=kept.retain_s, cold_after_s=kept.cold_after_s, cold_class=kept.cold_storage_class,
            retain_own_s=own,
        )  # fmt: skip

    def retain_of(self, table: TableId) -> float:
        """How long that table's changelog keeps an object behind its newest row, in seconds."""
        return self.retain_own_s.get(str(table), self.retain_s)


@dataclass(slots=True)
class Done:
    """Numbers of objects: joined, let go by retention, put away, removed for good."""

    joined: int = 0
    expired: int = 0
    cooled: int = 0
    removed: int = 0


class Upkeep:
    """Of one table. `current`: None for one that has only a changelog. `fence`: of the lease. Not thread-safe."""

    def __init__(
        self,
        store: ObjectStore,
        changelog: ChangelogTable,
        current: CurrentTable | None,
        *,
        temp_dir: Path,
        limits: Limits,
        fence: int = 0,
        may_vacuum: Callable[[int, float], bool] = lambda version, since: True,
    ) -> None:
        """`may_vacuum`: whether nobody has still to read what was in the changelog before a Unix time, up to a version:
        only then it may go."""
        self._store = store
        self._changelog = changelog
        self._current = current
        self._temp_dir = temp_dir
        self._limits = limits
        self._fence = fence
        self._may_vacuum = may_vacuum
        self._retain_s = limits.retain_of(changelog.table)
        self._compactor: Compactor | None = None
        tiered = store if limits.cold_class and isinstance(store, TieredStore) else None
        self._cooler = Cooler(tiered, changelog.path, limits.cold_class) if tiered is not None else None
        now = time.monotonic()
        self._compact_at = now + limits.every_s
        # Soon after the start: a daemon that is started often would never come to it.
        self._vacuum_at = now + min(limits.vacuum_after_s, FIRST_VACUUM_S)
        self._age_at = now + FIRST_VACUUM_S
        self._ages = math.isfinite(min(self._retain_s, limits.cold_after_s))
        # What the process before this one has left goes at once.
        self._reclaims = True

    def is_due(self, *, only_joins: bool = False) -> bool:
        """Whether anything is, or a join."""
        now = time.monotonic()
        others = math.inf if only_joins else min(self._vacuum_at, self._age_at if self._ages else math.inf)
        return now >= min(self._compact_at, others) or self._reclaims

    def put_off(self) -> None:
        """After a failure: not again before its time."""
        later = time.monotonic() + max(self._limits.every_s, RETRY_S)
        self._compact_at = max(self._compact_at, later)
        self._vacuum_at = max(self._vacuum_at, later)
        self._age_at = max(self._age_at, later)
        self._reclaims = False  # with the next vacuum

    def work(
        self, follow: Callable[[], None], *, compact: bool = False, vacuum: bool = False, only_joins: bool = False
    ) -> Done:
        """Whatever is due, and what somebody has asked for: one bounded piece of it. Blocking; each step is durable by
        itself. `follow` brings `current` to the newest version of the changelog that has its rows. `only_joins`: what
        a version has shown stays.

        Only while no run of the table is under way: what has been merged of it may have to be read again.
        """
        done, now = Done(), time.monotonic()
        vacuum = not only_joins and (vacuum or now >= self._vacuum_at)
        ageing = not only_joins and self._ages and (vacuum or now >= self._age_at)
        if vacuum or self._reclaims:
            done.removed = self.reclaim()
        if compact or ageing or now >= self._compact_at:
            done.joined = self.compact(everything=compact)
        failed: StoreUnavailable | None = None
        if ageing:
            try:
                done.expired, done.cooled = self.age(cool=not done.joined)
            except StoreUnavailable as e:
                # A class of storage that is refused must not keep what is dead from going.
                failed = e
        follow()
        if vacuum:
            done.removed += self.vacuum()
            follow()
        if failed is not None:
            raise failed
        return done

    def compact(self, *, everything: bool = False) -> int:
        """One join of small objects of the changelog, of `everything` that is small or of what is worth it; how many
        were replaced."""
        self._compact_at = time.monotonic() + self._limits.every_s
        newest, held = self._newest()
        if self._compactor is None:
            self._compactor = Compactor(
                self._store,
                self._changelog.delta,
                self._changelog.stored_prefix(),
                temp_dir=self._temp_dir,
                target_bytes=self._limits.object_bytes,
                term=self._fence,
            )
        # What has been put away is not touched again.
        held |= self._cooler.cold() if self._cooler is not None else set()
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

    def age(self, *, cool: bool = True, now_s: float | None = None) -> tuple[int, int]:
        """Let go what is older than is kept, and put away what is to rest, if there is nothing to join any more
        (`cool`): what has been put away is never joined. How many objects each. `now_s`: Unix time."""
        now_s = time.time() if now_s is None else now_s
        self._age_at = time.monotonic() + AGED_EVERY_S
        newest, held = self._newest()
        delta = self._changelog.delta
        gone = cooled = 0
        if math.isfinite(self._retain_s):
            old = expired(delta.files(newest), held, commit_date(delta), now_s - self._retain_s)
            # A follower that has had everything since an object landed has had it.
            read = [f for f in old if self._may_vacuum(newest, f.added_ms / 1000)]
            try:
                gone = let_go(delta, newest, read, fence=self._fence)
            except StoreConflict:
                log.info("objects were taken by another writer", extra={"delta_table": self._changelog.path})
        if gone:
            metrics.EXPIRED_OBJECTS.inc(gone)
            log.info("objects left the changelog", extra={"delta_table": self._changelog.path, "objects": gone})
        if self._cooler is not None:
            more = not cool
            if cool:
                before_s = now_s - self._limits.cold_after_s
                cooled, more = self._cooler.cool(delta.files(), held, commit_date(delta), before_s)
                metrics.COOLED_OBJECTS.inc(cooled)
            self._age_at = 0.0 if more else self._age_at
        return gone, cooled

    def reclaim(self) -> int:
        """Remove objects that nobody will commit any more; how many."""
        self._reclaims = False
        return self._changelog.reclaim(term=self._fence, kind=JOINED)

    def vacuum(self) -> int:
        """Remove objects that no version of the last `vacuum_after_s` shows; how many. And entries of the logs that are
        old enough. Only when `current` names the newest version of the changelog that has its rows. Those of the
        changelog stay while a follower needs them."""
        self._vacuum_at = time.monotonic() + max(self._limits.vacuum_after_s, self._limits.every_s)
        failpoint("vacuum.before_delete")
        gone = 0 if self._current is None else self._current.vacuum(self._limits.vacuum_after_s)
        failpoint("vacuum.after_current")
        if self._may_vacuum(self._changelog.refresh(), time.time() - self._limits.vacuum_after_s):
            gone += self._changelog.delta.vacuum(self._limits.vacuum_after_s)
        else:
            log.info("a follower has not read what a vacuum would remove", extra={"delta_table": self._changelog.path})
            self._vacuum_at = time.monotonic() + max(self._limits.every_s, HELD_S)
        failpoint("vacuum.after_delete")
        if self._is_read_to_its_end():
            self._changelog.delta.tidy_log()
        if gone:
            metrics.VACUUMED_OBJECTS.inc(gone)
        return gone

    def _is_read_to_its_end(self) -> bool:
        """Whether nobody merges on from an older version of the changelog, whose commits are needed for that."""
        delta = self._changelog.delta
        merged = delta.version() if self._current is None else self._current.merged()
        return merged >= 0 and delta.rests_until(merged) == delta.version()

    def _newest(self) -> tuple[int, set[str]]:
        """The newest version of the changelog, and the objects in it that `current` has not merged; all of them if the
        log does not tell any more."""
        if self._current is None:
            return self._changelog.refresh(), set()
        merged, newest, delta = self._current.merged(), self._changelog.refresh(), self._changelog.delta
        try:
            return newest, {path for _, path in delta.files_added(merged, newest)}
        except HistoryGone:
            return newest, {f.path for f in delta.files(newest)}


@dataclass(slots=True)
class UpkeepOrder:
    """Somebody waits for it. `done`: what was done, in numbers of objects; `error`: why not. Neither: it is not done
    yet."""

    kind: str
    total: Done = field(default_factory=Done)
    done: dict[str, int] | None = None
    error: CdcError | None = None

    def note(self, did: Done) -> None:
        """Take in what one piece of work did. A vacuum is done with one; joins go on until there is nothing to join."""
        self.total.joined += did.joined if self.kind == "compact" else 0
        if self.kind == "vacuum":
            self.total.expired, self.total.cooled, self.total.removed = did.expired, did.cooled, did.removed
        if self.kind == "vacuum" or not did.joined:
            self.done = asdict(self.total)


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

    def are_open(self) -> bool:
        """Whether somebody waits for any table."""
        with self._lock:
            return any(o.done is None and o.error is None for orders in self._orders.values() for o in orders)

    def open(self, table: TableId) -> list[UpkeepOrder]:
        """Those of the table that are not done."""
        with self._lock:
            left = [o for o in self._orders.get(table, []) if o.done is None and o.error is None]
            self._orders[table] = left
            return list(left)


__all__ = ["Done", "Limits", "Upkeep", "UpkeepOrder", "UpkeepOrders"]
