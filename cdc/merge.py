"""Merging: changelogs → current tables, all tables of a source to one common cut.

After every merge round that brings each table to the versions of one landed cut, the cut is recorded with the
current tables' versions: models and syncs read exactly these, so they never join the orders of now with the
customers of before. Cadence follows `merge_every_s`, and merging takes at most `merge_share` of the time unless
somebody waits for it. Where the operator allows tables to be stale for a while, a table of which little has changed is
put off, and the rounds between two cuts merge the others. How one table is merged is in cdc.lake.current; what is
unresolved there is read again by cdc.backfill.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cdc import metrics
from cdc.errors import CdcError, KeyChanged, SchemaConflict, Verdict
from cdc.freshness import Freshness
from cdc.lake.changelog import ChangelogTable
from cdc.lake.commits import HistoryGone
from cdc.lake.current import CurrentTable
from cdc.lake.lease import Lease
from cdc.land import LandedCut
from cdc.ports import ObjectStore
from cdc.schema import SchemaBook
from cdc.state import State
from cdc.table import TableId
from cdc.upkeep import Limits, Upkeep, UpkeepOrder, UpkeepOrders

log = logging.getLogger(__name__)

BLOCKED_S = 0.3
"""Pause before a table that waits for a snapshot's rows is looked at again."""
ASKED_S = 5.0
"""So long a wish to have everything merged holds."""
BUILT_ANEW_S = 5.0
"""The same where each look costs as much as its whole changelog."""

TAIL_SHARE = 0.1
"""Share of a table's rows from which on its unmerged tail is worth a merge: ten rows are rewritten for one that has
changed, whatever the table's size, and whoever reads the tail beside the table reads little more than the table."""


@dataclass(frozen=True, slots=True)
class Cadence:
    """Of `[lake]`: how often tables are merged at most, which share of the time that may take, and how stale a table
    may be before it is merged for a few changes (0: no staler than the share makes it)."""

    every_s: float
    share: float
    max_staleness_s: float


class Merger:
    """Keeps the current tables of one source. `step` belongs to one thread; `ask` may be called from any."""

    def __init__(
        self,
        source: str,
        state: State,
        book: SchemaBook,
        store: ObjectStore,
        *,
        temp_dir: Path,
        cadence: Cadence,
        freshness: Freshness,
        upkeep: Limits,
        own_origins: Sequence[str],
        landed: Callable[[], LandedCut | None],
        wish: Callable[[TableId, Sequence[tuple[str, ...]]], None],
        read_anew: Callable[[TableId, str], None],
        stop_table: Callable[[TableId, CdcError], None],
        is_stopped: Callable[[TableId], bool],
        lease: Lease,
        may_vacuum: Callable[[TableId, int, float], bool] = lambda table, version, since: True,
    ) -> None:
        """`landed` gives the newest cut; `wish` asks for keys to be read again, `read_anew` for a whole table;
        `may_vacuum` as `Upkeep` has it, by table."""
        self._source = source
        self._state = state
        self._book = book
        self._store = store
        self._temp_dir = temp_dir
        self._cadence = cadence
        self._freshness = freshness
        self._limits = upkeep
        self._own_origins = tuple(own_origins)
        self._landed = landed
        self._wish = wish
        self._read_anew = read_anew
        self._stop_table = stop_table
        self._is_stopped = is_stopped
        self._lease = lease
        self._may_vacuum = may_vacuum
        self._pairs: dict[TableId, tuple[ChangelogTable, CurrentTable]] = {}
        self._upkeeps: dict[TableId, Upkeep] = {}
        self._orders = UpkeepOrders()
        self._asked_until = 0.0
        self._not_before = time.monotonic() + cadence.every_s
        self._round_s = 0.0
        """What merging all tables took last."""
        self._rows: dict[TableId, int] = {}
        self._versions: dict[TableId, int] = {}
        self._through: dict[TableId, int] = {}
        self._blocked: dict[TableId, float] = {}
        self._mended: dict[TableId, int] = {}
        self._saved: tuple[int, dict[TableId, int]] = (-1, {})
        self._changed: dict[TableId, int] = {}
        self.merged_end_lsn = 0
        """End LSN of the last cut that every table has been merged to."""
        self.changed_by_others: dict[TableId, int] = {}
        """Per table, the position at which a change that is not our own write was last merged, as far as the recorded
        cut holds it. Replaced, never changed."""

    def ask(self) -> None:
        """Merge the newest cut without waiting for the cadence. It holds for ASKED_S: who waits for longer asks again,
        so that one who has given up, or a table whose snapshot takes hours, does not switch the cadence off.
        Thread-safe."""
        self._asked_until = time.monotonic() + ASKED_S

    def step(self) -> bool:
        """Merge the tables that are due to the newest landed cut; all of them record it. True if there was something to
        merge."""
        cut = self._landed()
        asked_until = self._asked_until
        asked = time.monotonic() < asked_until or self._orders.are_open()
        if cut is None or (not asked and time.monotonic() < self._not_before):
            return False
        began = time.monotonic()
        worked, whole = False, True
        versions: dict[TableId, int] = {}
        put_off = set() if asked else self._put_off(cut)
        for table, through in cut.versions.items():
            if self._is_stopped(table) or table.is_own:
                continue
            if table in put_off:
                whole = False
                continue
            before = self._versions.get(table)
            try:
                merged = self._merge(table, through, cut.boundary.lsn)
            except CdcError as e:
                if e.verdict is not Verdict.OPERATOR:
                    raise
                if self._is_read_anew(table, through):
                    # What cannot be merged stands before the run's begin: with the run's end it no longer counts.
                    self._blocked[table] = time.monotonic() + (
                        BUILT_ANEW_S if isinstance(e, HistoryGone) else BLOCKED_S
                    )
                    whole = False
                    continue
                if isinstance(e, KeyChanged | HistoryGone):
                    self._read_anew(table, e.args[0])
                    whole = False
                    continue
                if isinstance(e, SchemaConflict) and self._mend(table, e):
                    whole = False
                    continue
                self._stop_table(table, e)
                continue
            whole &= merged is not None
            if merged is not None:
                versions[table] = merged
                worked |= before != merged
        if cut.common and not put_off:
            self._save_cut(cut.boundary.lsn, versions)
        if whole:
            self.merged_end_lsn = cut.boundary.end_lsn
            if self._asked_until == asked_until:
                # Nobody asked while this round ran, who may mean a newer cut.
                self._asked_until = 0.0
        if cut.common:
            # Behind the saved cut: what a vacuum removes must not be what it shows. Nobody waits for it.
            for table, through in cut.versions.items():
                if table in versions or table in put_off or self._is_apart(table):
                    self._tidy(table, self._through.get(table, through), between_cuts=bool(put_off))
            if not put_off:
                self._save_cut(cut.boundary.lsn, {table: self._versions[table] for table in versions})
        took = time.monotonic() - began
        if worked and not put_off:
            self._round_s = took
        self._not_before = began + (self._pause_s(took) if worked else 0.0)
        return worked

    def _pause_s(self, took_s: float) -> float:
        """From the begin of a round to that of the next."""
        return max(self._cadence.every_s, took_s / self._cadence.share)

    def _put_off(self, cut: LandedCut) -> set[TableId]:
        """Tables that are not worth a merge now. None if one of them would be staler than is allowed before the next
        chance to merge it: then all are merged, so that there is a cut."""
        allowed_s = self._cadence.max_staleness_s
        if not allowed_s:
            return set()
        behind = [t for t, v in cut.versions.items() if self._through.get(t, v) < v and not self._is_stopped(t)]
        tails = {table: self._freshness.tail(table) for table in behind}
        # No rows: what landed is not known, or none of it is new. That is found out by merging.
        little = {t for t, tail in tails.items() if 0 < tail.rows < TAIL_SHARE * self._rows[t]}
        next_s = self._round_s + (self._pause_s(self._round_s) if len(little) < len(tails) else 0.0)
        late = time.time() + next_s - allowed_s
        return set() if any(tails[t].since <= late for t in little) else little

    def _save_cut(self, lsn: int, versions: dict[TableId, int]) -> None:
        if self._saved != (lsn, versions):
            self._state.save_cut(self._source, lsn, versions)
            self._saved = lsn, dict(versions)
        if self._changed:
            # Behind it: a sync that hears of a change looks for it in the cut.
            self.changed_by_others = {**self.changed_by_others, **self._changed}
            self._changed.clear()

    def _mend(self, table: TableId, error: SchemaConflict) -> bool:
        """Have the table read again for a shape that its rows do not have; False if that was tried for this shape."""
        schema = self._book.held(table)
        version = 0 if schema is None else schema.version
        if self._mended.get(table) == version:
            return False
        self._mended[table] = version
        self._read_anew(table, error.args[0])
        return True

    def _is_read_anew(self, table: TableId, through: int) -> bool:
        """Whether a snapshot of the whole table is ordered, or running, or ends behind version `through`."""
        given_up = ("cancelled", "failed")
        runs = [r for r in self._state.runs(self._source, table) if r.kind in ("first", "resync")]
        runs = [r for r in runs if r.state not in given_up]
        if not runs:
            return False
        if any(r.state in ("pending", "running") for r in runs):
            return True
        landed = self._pair(table)[0].delta.token(f"run/{runs[-1].id}", through)
        return runs[-1].state == "done" and (-1 if landed is None else landed) < runs[-1].chunk_no

    def _merge(self, table: TableId, through: int, lsn: int) -> int | None:
        """Bring one table to a version of its changelog; the Delta version of `current`, None if it must wait."""
        schema = self._book.held(table) or self._book.latest(table)
        if schema is None:
            return None
        changelog, current = self._pair(table)
        if self._through.get(table, -1) >= through:
            return self._versions[table]
        if time.monotonic() < self._blocked.get(table, 0.0):
            return None
        self._lease.check()
        if table not in self._through:
            self._doubt(table, current, lsn)
        began = time.perf_counter()
        result = current.merge(changelog, schema, through=through, own_origins=self._own_origins)
        if result.unresolved or result.version is None:
            # Both wait for rows that a snapshot has yet to bring.
            self._blocked[table] = time.monotonic() + BLOCKED_S
            if result.unresolved and not self._is_read_anew(table, through):
                if result.key != schema.key:
                    raise KeyChanged(f"the key or replica identity of table {table} has changed")
                self._wish(table, result.unresolved)
            return None
        rows_now = current.rows()
        self._through[table], self._versions[table], self._rows[table] = through, result.version, rows_now
        self._freshness.merged(table, through)
        metrics.MERGE_SECONDS.labels(self._source).observe(time.perf_counter() - began)
        metrics.STAGE_SECONDS.labels("merge").inc(time.perf_counter() - began)
        rows = result.rows_upserted + result.rows_deleted
        metrics.MERGED_ROWS.labels(self._source, metrics.table_label(self._source, table)).inc(rows)
        if result.foreign_change:
            self._changed[table] = lsn
        self._state.update_table(self._source, table, current_lsn=lsn, rows=self._rows[table])
        return result.version

    def _doubt(self, table: TableId, current: CurrentTable, lsn: int) -> None:
        """What was merged behind the recorded cut before this merger began may have been changed by others: who did is
        not written down anywhere, and one run too many writes nothing."""
        cut = self._state.cut(self._source)
        if cut is not None and current.version() != cut.versions.get(table, current.version()):
            self._changed[table] = lsn

    # ---- upkeep ----

    def order_upkeep(self, table: TableId, kind: str) -> UpkeepOrder:
        """Have a table compacted or vacuumed (`kind`) as soon as it is merged and no run of it is under way.
        Thread-safe."""
        return self._orders.add(table, kind)

    def _is_apart(self, table: TableId) -> bool:
        """Whether only a table's upkeep is done: it has no `current`, or takes no part any more."""
        return table.is_own or self._state.table(self._source, table).state == "removed"

    def _tidy(self, table: TableId, through: int, *, between_cuts: bool) -> None:
        """Do what is due of the upkeep of a table, merged through a version, and what somebody waits for; nothing goes
        that the recorded cut may show. What fails here fails no merge: it is told, and tried again later."""
        upkeep = self._upkeep(table)
        orders = [o for o in self._orders.open(table) if o.kind == "compact" or not between_cuts]
        if not (orders or upkeep.is_due(only_joins=between_cuts)):
            return
        self._lease.check()
        began = time.perf_counter()
        try:
            if self._is_read_anew(table, through):
                return
            kinds = {order.kind for order in orders}
            done = upkeep.work(
                lambda: self._follow(table),
                compact="compact" in kinds,
                vacuum="vacuum" in kinds,
                only_joins=between_cuts,
            )
        except CdcError as e:
            if e.verdict is Verdict.FATAL:
                raise
            upkeep.put_off()
            log.warning("upkeep of %s failed: %s", table, e.args[0], extra={"source": self._source, "hint": e.hint})
            for order in orders:
                order.error = e
            return
        metrics.STAGE_SECONDS.labels("upkeep").inc(time.perf_counter() - began)
        for order in orders:
            order.note(done)

    def _upkeep(self, table: TableId) -> Upkeep:
        if table not in self._upkeeps:
            changelog, current = self._pair(table)
            self._upkeeps[table] = Upkeep(
                self._store,
                changelog,
                None if table.is_own else current,
                temp_dir=self._temp_dir,
                limits=self._limits,
                fence=self._lease.fence,
                may_vacuum=partial(self._may_vacuum, table),
            )
        return self._upkeeps[table]

    def _pair(self, table: TableId) -> tuple[ChangelogTable, CurrentTable]:
        if table not in self._pairs:
            changelog = ChangelogTable(self._store, self._source, table)
            current = CurrentTable(self._store, self._source, table, temp_dir=self._temp_dir)
            self._pairs[table] = changelog, current
        return self._pairs[table]

    def _follow(self, table: TableId) -> None:
        """Let `current` name the newest version of the changelog that has the same rows as the one it has merged:
        whoever reads both looks there, and the objects of older versions go."""
        changelog, current = self._pair(table)
        changelog.refresh()
        merged = current.merged()
        schema = self._book.held(table) or self._book.latest(table)
        if merged < 0 or schema is None or changelog.delta.rests_until(merged) == merged:
            return
        version = current.merge(changelog, schema, through=merged, own_origins=self._own_origins).version
        # None: another table has the name, and is not read to its end yet.
        if version is not None and table in self._versions:
            self._versions[table] = version
