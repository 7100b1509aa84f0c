"""One source that is compared periodically, from its tables to `current`: schedule, threads, the life of its tables.

Threads: run (when one is due: source → log), land (log → changelogs), merge (changelogs → current), lease (the right to
write the lake), follow (changelogs → their other forms). A run begins only when everything logged has landed and been
merged, so runs never overlap, and a run that was missed, or many, is done once. A run that failed is repeated with
growing pauses; what it read is not asked of the source again at once. What a run does is in cdc.periodic.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from cdc import metrics, registry
from cdc.capture import ConfirmGate
from cdc.config import Config, SourceConfig
from cdc.errors import CdcError, LeaseLost, SourceUnavailable, Standby, StoreConflict
from cdc.evolution import Evolution
from cdc.follow import Followers
from cdc.instant import in_part_fact
from cdc.ladder import Ladder, count_tables, operator_error
from cdc.lake.anchor import Anchor, AnchorState
from cdc.lake.changelog import ChangelogTable, highest_epoch, highest_fence, highest_landed
from cdc.lake.current import CurrentTable
from cdc.lake.lease import Lease
from cdc.lake.probe import require_promises
from cdc.land import Group, LandedCut, Lander, LandPoint, LogReader
from cdc.log import EventLog
from cdc.merge import Cadence, Merger
from cdc.periodic import FULL_KINDS, Halted, PeriodicRuns, cursor_fact, whole_fact
from cdc.periodic_origin import MODE, adopt_tables, settle_periodic
from cdc.places import Places
from cdc.ports import ObjectStore
from cdc.runs import Run
from cdc.schedule import Schedule
from cdc.schema import SchemaBook
from cdc.stage import Stage
from cdc.state import State
from cdc.status import history_fact, progress_fact, runs_fact, runs_now_fact
from cdc.table import TableId
from cdc.upkeep import Limits
from cdc.worker import Worker

log = logging.getLogger(__name__)

READ_S = 0.2
LAND_S = 0.05
PAUSE_S, PAUSE_MAX_S = 5.0, 300.0
"""First and longest pause behind a run that failed."""
HISTORY = "run"
"""Kind of the history's entries."""


class PeriodicPipeline:
    """Everything of one such source. Built before its source can be reached; the run thread prepares it."""

    def __init__(
        self,
        config: Config,
        source: SourceConfig,
        state: State,
        event_log: EventLog,
        store: ObjectStore,
        *,
        owner: str,
        own_origins: Sequence[str],
        stop: threading.Event,
        on_fatal: Callable[[BaseException], None],
        alert: Callable[[dict[str, Any]], None] = lambda alert: None,
    ) -> None:
        self.name = source.name
        self._config = config
        self._source_config = source
        self._state = state
        self._log = event_log
        self._store = store
        self._own_origins = own_origins
        self._stop = stop
        self._alert = alert
        kind = registry.source_kind(source.type)
        self._reader = kind.runs(source)
        self.admin = kind.admin(source)
        self._temp = config.state_dir / "tmp" / source.name
        self._schedule = Schedule(every=source.every, cron=source.cron)
        self._book = SchemaBook(state, source.name)
        self._ladder = Ladder(source.name, event_log)
        floor = partial(highest_fence, store, source.name)
        self._lease = Lease(store, source.name, owner, ttl_s=config.lake.lease_ttl_s, floor=floor)
        self._anchor = Anchor(store, source.name)
        self._places = Places(source, config.lake, store, state, event_log, self._anchor)
        self.followers = Followers(self.name, config.lake, state, store, self._temp / "follow", self._lease)
        self._stopped: set[TableId] = set()
        self._prepared = threading.Event()
        self._epoch = 0
        self._settled = False
        self._turns = {part: threading.Lock() for part in ("land", "merge")}
        self._orders = threading.Lock()
        self._wanted = 0
        """Number of the run that somebody waits for; no more than one behind the one that is under way."""
        self._begun = 0
        self._ended: tuple[int, int] = (0, 0)
        """The last run that ended well, and the position that it reached."""
        self._failed: CdcError | None = None
        self._not_before = 0.0
        self._pause_s = PAUSE_S
        self._waiting = ""
        worker = partial(Worker, stop=stop, on_error=self._note_error, on_fatal=on_fatal)
        self.workers = [
            worker(f"{part}:{self.name}", step, idle_s=idle_s)
            for part, step, idle_s in (
                ("run", self._run_step, 0.1),
                ("land", lambda: self._in_turn("land", lambda: self._land.step(LAND_S).read), 0.2),
                ("merge", lambda: self._in_turn("merge", lambda: self.merger.step()), 0.1),
                ("lease", self._lease.keep, 0.2),
            )
        ]
        self.workers += [
            worker(f"follow-{form}:{self.name}", partial(self.followers.step, form), idle_s=0.05)
            for form in self.followers.forms
        ]

    # ---- life ----

    def start(self) -> None:
        """Start the threads; returns at once."""
        shutil.rmtree(self._temp / "run", ignore_errors=True)
        # A run that the process before this one did not end.
        for entry in self._state.history(HISTORY, self.name, limit=1):
            if entry.outcome == "running":
                self._state.finish_history(entry.id, "interrupted")
        self._tell()
        for worker in self.workers:
            worker.start()

    def close(self, deadline: float) -> None:
        """After `stop` was set: wait for the threads, then let go of reader and lease."""
        for worker in self.workers:
            worker.join(max(0.1, deadline - time.monotonic()))
        self._reader.close()
        self._lease.release(max(2.0, deadline - time.monotonic()))
        self._state.save_source(self.name, phase="stopped")

    @property
    def error(self) -> BaseException | None:
        """What a part stands still for, if one does."""
        return next((w.error for w in self.workers if w.error is not None), None)

    @property
    def standby(self) -> bool:
        """Whether another daemon has the source, and this one waits."""
        return isinstance(self.workers[0].error, Standby)

    @property
    def streaming(self) -> bool:
        """Whether runs are done when they are due."""
        return self._prepared.is_set() and not self._paused() and self.workers[0].error is None

    def _paused(self) -> bool:
        return self._state.is_paused("source", self.name)

    def _note_error(self, error: CdcError | None) -> None:
        if error is None:
            if self.error is None:
                self._state.save_source(self.name, error="", hint="", phase="streaming")
            return
        phase = "standby" if isinstance(error, Standby) else error.verdict.value
        self._state.save_source(self.name, error=error.args[0], hint=error.hint, phase=phase)
        if isinstance(error, SourceUnavailable):
            metrics.UP.labels(self.name).set(0)

    def _show_phase(self, phase: str) -> None:
        """It is asked often, and written when it is another one."""
        known = self._state.source(self.name)
        if known is None or known.phase != phase:
            self._state.save_source(self.name, phase=phase)

    # ---- runs ----

    def _run_step(self) -> bool:
        if not self._settled:
            self._settle()
        if self._paused():
            self._show_phase("paused")
            return False
        if self._failed is not None and time.monotonic() < self._not_before:
            # It is told again, so that it is not taken for mended; nothing is read for that.
            raise self._failed.with_traceback(None)
        cause = self._due()
        if cause is None:
            self._show_phase("streaming")
            return False
        self._waiting = "" if self._is_base_whole() else "waits for the last run to land and to be merged"
        if self._waiting:
            return False
        self._clear_marks()
        try:
            self._do_run(cause)
        except Halted:
            return False
        return True

    def _due(self) -> str | None:
        """Why a run is due now, None if none is."""
        if self._wanted > self._begun:
            return "ordered"
        pending = self._state.runs(self.name, states=["pending", "running"])
        if any(r.kind in FULL_KINDS and self._takes_part(r.table) for r in pending):
            return "ordered"
        return "schedule" if time.time() >= self.next_at else None

    @property
    def next_at(self) -> float:
        """When the schedule wants the next run (Unix seconds)."""
        return self._schedule.next_after(self._began_at)

    @property
    def _began_at(self) -> float:
        return float((self._state.get(runs_fact(self.name)) or {}).get("began_at") or 0)

    def _do_run(self, cause: str) -> None:
        self._settle()
        with self._orders:
            self._begun += 1
            number = self._begun
        began = time.time()
        history = self._state.start_history(HISTORY, self.name, cause)
        self._show_phase("reading")
        self._tell(since=began)
        try:
            counts = self._runs.run()
        except Halted:
            self._state.finish_history(history, "interrupted")
            self._tell()
            raise
        except BaseException as e:
            known = e if isinstance(e, CdcError) else None
            self._state.finish_history(history, "failed", error=str(known.args[0]) if known else type(e).__name__)
            metrics.RUNS.labels(self.name, "failed").inc()
            self._settled = False
            # A copy: the error itself holds on to everything that was being compared.
            self._failed = type(known)(str(known.args[0]), hint=known.hint) if known else None
            self._not_before = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
            self._tell()
            raise
        self._failed, self._pause_s = None, PAUSE_S
        self._state.finish_history(history, "done", counts=counts.to_json())
        metrics.RUNS.labels(self.name, "done").inc()
        metrics.RUN_SECONDS.labels(self.name).observe(time.time() - began)
        metrics.UP.labels(self.name).set(1)
        # From its begin: what is committed while it reads is for the next one.
        self._tell(began_at=began)
        self._ended = (number, self._ladder.logged())
        self._show_phase("streaming")
        log.info("run ended", extra={"source": self.name, "cause": cause, **counts.to_json()})
        self.lander.ask()
        self.merger.ask()

    def _tell(self, *, since: float = 0.0, began_at: float | None = None) -> None:
        """What `status` shows of runs; `since`: one is under way."""
        began = began_at if began_at is not None else self._began_at
        self._state.set(runs_fact(self.name), {"began_at": began, "since": since})

    def _is_base_whole(self) -> bool:
        """Whether `current` holds everything that was logged, of every table that is to be compared with it; asks for
        what is missing."""
        position = self._log.position(self.name)
        landed = self.lander.landed
        if position is None or landed is None or landed[:2] < position[:2]:
            self.lander.ask()
            return False
        saved = self._state.checkpoint("land", self.name)
        if self._log.end_offset(self.name) > (int(saved["offset"]) if saved else 0):
            self.lander.ask()
            return False
        for known in self._state.tables(self.name):
            if known.state in ("removed", "stopped") or self.rests(known.table) or known.table.is_own:
                continue
            if self._is_read_whole(known.table):
                continue
            changelog = ChangelogTable(self._store, self.name, known.table)
            current = CurrentTable(self._store, self.name, known.table, temp_dir=self._temp / "merge")
            if changelog.refresh() > current.merged():
                self.merger.ask()
                return False
        return True

    def _is_read_whole(self, table: TableId) -> bool:
        """Whether the next run does not compare the table with what the lake holds, but replaces that."""
        if str(table) in self._anchor.marks():
            return True
        runs = self._state.runs(self.name, table, states=["pending", "running"])
        if any(r.kind in FULL_KINDS and r.details.get("whole") for r in runs):
            return True
        oid = self._state.table(self.name, table).oid
        tokens = ChangelogTable(self._store, self.name, table).tokens()
        return not any(tokens.complete(e, oid) for e in range(1, self._epoch + 1))

    # ---- preparing ----

    def _settle(self) -> None:
        """Look where the source's history stands, and (re)build the parts if it is another one than before."""
        first = not self._prepared.is_set()
        if first:
            if self.workers[0].error is None:
                self._show_phase("starting")
            self._lease.acquire()
            require_promises(self._store, self._config.lake.url)
        identity = self._reader.identity()
        with ExitStack() as turns:
            settled = settle_periodic(
                self._source_config, identity, self._anchor, self._log,
                landed_lsn=partial(highest_landed, self._store, self.name),
                landed_epoch=partial(highest_epoch, self._store, self.name),
                still=lambda: self._hold_still(turns),
            )  # fmt: skip
            anchor = settled.anchor
            self._state.set(history_fact(self.name), {"epoch": anchor.epoch, "why": anchor.why})
            self._state.save_source(
                self.name,
                identity={
                    "system_id": identity.system_id, "timeline": identity.timeline,
                    "database": identity.database, "server_version": identity.server_version,
                },
            )  # fmt: skip
            if anchor.epoch != self._epoch:
                self._hold_still(turns)
                self._build(anchor, settled.doubtful_lsn)
        self._prepared.set()
        self._settled = True

    def _hold_still(self, turns: ExitStack) -> None:
        """Until `turns` is closed, neither landing nor merging is at work."""
        if not self._prepared.is_set():
            return
        self._prepared.clear()
        turns.callback(self._prepared.set)
        for turn in self._turns.values():
            turns.enter_context(turn)

    def _in_turn(self, part: str, step: Callable[[], bool]) -> bool:
        if not self._prepared.wait(READ_S):
            return False
        with self._turns[part]:
            return self._prepared.is_set() and step()

    def _build(self, anchor: AnchorState, doubtful_lsn: int) -> None:
        """The parts, for one epoch. No part is at work."""
        if self._epoch:
            self.lander.abandon()
        lake, name = self._config.lake, self.name
        self._epoch = anchor.epoch
        if doubtful_lsn:
            # For who reads what has landed, daemon or not.
            self._state.set(in_part_fact(name), [self._epoch, doubtful_lsn])
        self._places.settle()
        adopt_tables(name, self._state, self._book, self._store, self._epoch)
        (self._temp / "land").mkdir(parents=True, exist_ok=True)
        self._stopped = {t.table for t in self._state.tables(name) if t.state == "stopped"}
        self.evolution = Evolution(
            name, self._state, self._book, self._store,
            contract=self._source_config.contract, read_anew=self.read_anew, alert=self._alert,
        )  # fmt: skip
        self.lander: Lander = Lander(
            name, self._log, self._state, self._book, self._store,
            epoch=self._epoch, temp_dir=self._temp / "land", land_every_s=lake.land_every_s, land_bytes=lake.land_bytes,
            lease=self._lease, stop_table=self.stop_table, is_stopped=self.rests, evolution=self.evolution,
            partition_by=self._source_config.partition_by,
            admits=self._places.admits,
        )  # fmt: skip
        self.merger = Merger(
            name, self._state, self._book, self._store,
            temp_dir=self._temp / "merge", freshness=self.lander.freshness,
            cadence=Cadence(lake.merge_every_s, lake.merge_share, lake.current.max_staleness_s),
            upkeep=Limits.of(lake, self._source_config),
            own_origins=self._own_origins, landed=lambda: self._landed_cut(doubtful_lsn),
            wish=lambda table, keys: self.read_whole(table, "values that nobody knows"), read_anew=self.read_whole,
            stop_table=self.stop_table, is_stopped=self.rests, lease=self._lease,
            may_vacuum=self.followers.may_vacuum,
        )  # fmt: skip
        self._ladder.stand_on(self.lander, self.merger)
        gate = ConfirmGate(
            epoch=self._epoch, confirm_after="landed", save_anchor=self._save_anchor,
            anchored_lsn=anchor.may_confirm_lsn, every_s=self._source_config.confirm_every_s,
        )  # fmt: skip
        reader = LogReader(name, self._log, self._state, gate, self.lander.due_in_s)
        self._land: Stage[Group, LandPoint] = Stage(f"land:{name}", reader, self.lander)
        self._runs = PeriodicRuns(
            self._source_config, self._reader, self._log, self._state, self._book, self._store,
            epoch=self._epoch, temp_dir=self._temp / "run", marks=lambda: set(self._anchor.marks()),
            stop_table=self.stop_table, rests=self.rests, halted=self._stop.is_set, make_room=self._make_room,
        )  # fmt: skip

    def _landed_cut(self, doubtful_lsn: int) -> LandedCut | None:
        """The newest cut. One at which a run may have landed in part only is merged, because the next run compares with
        it, but no model reads it."""
        cut = self.lander.landed_cut
        if cut is not None and doubtful_lsn and cut.boundary.lsn <= doubtful_lsn:
            return replace(cut, common=False)
        return cut

    def _make_room(self) -> None:
        self.lander.ask()
        self._stop.wait(READ_S)

    def _save_anchor(self, may_confirm_lsn: int, mode: str) -> None:
        self._lease.check()
        epoch = self._epoch

        def further(known: AnchorState) -> AnchorState:
            if known.epoch != epoch:
                return known
            return replace(known, mode=MODE, may_confirm_lsn=max(may_confirm_lsn, known.may_confirm_lsn))

        try:
            self._anchor.change(further)
        except StoreConflict as e:
            raise LeaseLost(f"source {self.name}: another daemon wrote the lake's anchor", hint="run only one") from e

    # ---- tables ----

    def _clear_marks(self) -> None:
        """Everything logged has landed: tables that were read whole since they were marked are whole."""
        marks, done = self._anchor.marks(), []
        for known in self._state.tables(self.name) if marks else ():
            since = marks.get(str(known.table))
            runs = [r for r in self._state.runs(self.name, known.table) if r.kind in FULL_KINDS]
            if since is None or not runs or self.rests(known.table):
                continue
            if runs[-1].state == "done" and runs[-1].chunk_no >= 0 and runs[-1].created_at >= since:
                done.append(known.table)
        self._anchor.mark(done, False)

    def _takes_part(self, table: TableId) -> bool:
        return not self.rests(table) and not self._state.is_paused("table", f"{self.name}/{table}")

    def rests(self, table: TableId) -> bool:
        """Whether a table is stopped."""
        return table in self._stopped

    def stop_table(self, table: TableId, error: CdcError) -> None:
        """Let one table stand still; first the lake is told that it must be read whole, then its changes are passed
        over."""
        self._anchor.mark([table], True)
        with self._log.lock():
            self._stopped.add(table)
            for run in self._state.runs(self.name, table, states=["pending", "running"]):
                self._state.update_run(run.id, state="failed", reason=error.args[0])
            self._state.update_table(self.name, table, state="stopped", reason=error.args[0], hint=error.hint)
        log.error(
            error.args[0],
            extra={"source": self.name, "table": str(table), "error": type(error).__name__, "hint": error.hint},
        )

    def read_anew(self, table: TableId, reason: str) -> None:
        """For a shape that came: order that its table is read whole, unless the run that brought it has done that."""
        latest = self._book.latest(table)
        if latest is None or self._state.get(whole_fact(self.name, table)) != latest.version:
            self.read_whole(table, reason)

    def read_whole(self, table: TableId, reason: str) -> None:
        """Order that a table is read whole; until that has landed, the lake says that it must be."""
        self._anchor.mark([table], True)
        log.warning("a table is read anew", extra={"source": self.name, "table": str(table), "why": reason})
        self._order(table, reason, whole=True)

    def _order(self, table: TableId, reason: str, *, whole: bool) -> Run:
        """A run that reads the table whole, or compares all of it; one that is pending is joined."""
        for run in self._state.runs(self.name, table, states=["pending"]):
            if run.kind in FULL_KINDS:
                details = {**run.details, "whole": True} if whole else run.details
                return self._state.update_run(run.id, details=details)
        details = {"whole": True} if whole else {}
        return self._state.create_run(self.name, table, "resync", reason=reason, details=details)

    def pause_table(self, table: TableId, pause: bool) -> None:
        """A paused table takes no part in runs; on resume the next one compares all of it."""
        if pause:
            self._state.pause("table", f"{self.name}/{table}")
        elif self._state.is_paused("table", f"{self.name}/{table}"):
            self._state.resume("table", f"{self.name}/{table}")
            self._state.set(cursor_fact(self.name, table), None)

    def resync(self, table: TableId, kind: str = "resync") -> Run:
        """Order a run that compares all of a table. A stopped one takes part again, and is read whole."""
        known = self._state.table(self.name, table)
        if known.state == "stopped":
            self.evolution.accept(table)
        with self._log.lock():
            run = self._order(table, "ordered", whole=known.state == "stopped")
            if known.state == "stopped":
                self._stopped.discard(table)
                self._state.update_table(self.name, table, state="new", reason="", hint="")
        return run

    def resync_rows(self, table: TableId, where: str, keys: Sequence[tuple[str, ...]]) -> tuple[Run, bool]:
        """Order that some rows are read anew, and whether that was ordered before. A run compares whole tables, so it
        is the same as `resync`."""
        known = {run.id for run in self._state.runs(self.name, table, states=["pending"])}
        run = self.resync(table)
        return run, run.id in known

    def cancel(self, table: TableId) -> list[str]:
        """Take back resyncs of a table that have not begun, and that nothing but an operator asked for."""
        pending = self._state.runs(self.name, table, states=["pending"])
        cancelled = [r.id for r in pending if r.kind == "resync" and not r.details.get("whole")]
        for run in cancelled:
            self._state.update_run(run, state="cancelled")
        return cancelled

    # ---- waiting and telling ----

    @property
    def prepared(self) -> bool:
        return self._prepared.is_set()

    def awaiting(self, end_lsn: int) -> Callable[[], bool]:
        """Order a run; whether one that began after this call is in the lake. (A position alone would not do: what has
        a lower one may become visible later.)"""
        with self._orders:
            number = self._begun + 1
        return self._behind_run(number)

    def landing(self) -> Callable[[], bool]:
        """Whether what is logged now is in the lake; no run is ordered."""
        lsn = self._ladder.logged()
        return lambda: self.has_reached(lsn)

    def finishing(self) -> Callable[[], bool] | None:
        """For `--once`: whether one run of this process is in the lake."""
        return self._behind_run(1) if self.prepared else None

    def _behind_run(self, number: int) -> Callable[[], bool]:
        with self._orders:
            self._wanted = max(self._wanted, number)

        def reached() -> bool:
            ended, lsn = self._ended
            return ended >= number and self.has_reached(lsn)

        return reached

    def reached(self) -> dict[str, int]:
        """End LSNs up to which the log, the changelogs and the current tables hold everything."""
        return self._ladder.reached()

    def has_reached(self, end_lsn: int) -> bool:
        """Whether they hold everything up to `end_lsn`; asks for what is missing."""
        return self._prepared.is_set() and self._ladder.has_reached(end_lsn)

    def operator_error(self) -> CdcError | None:
        """An error of a part that only an operator can mend."""
        return operator_error(self.workers)

    def beat(self) -> None:
        """Write what `status` shows, once a second."""
        if not self._prepared.is_set():
            return
        reached, now = self.reached(), time.time()
        head = reached["logged"]
        for step, lsn in reached.items():
            metrics.LAG_BYTES.labels(self.name, step).set(max(0, head - lsn))
        if began := self._began_at:
            metrics.LAG_SECONDS.labels(self.name, "logged").set(now - began)
        self._state.save_source(self.name, received_lsn=head, confirmed_lsn=reached["landed"])
        caught_up = {step: began for step, lsn in {**reached, "confirmed": reached["landed"]}.items() if lsn >= head}
        facts: dict[str, Any] = {
            "landed_lsn": reached["landed"], "merged_lsn": reached["merged"],
            "caught_up_at": {**caught_up, "received": began},
        }  # fmt: skip
        self._state.set(progress_fact(self.name), facts)
        told = {"next_at": self.next_at, "table": self._runs.now, "waiting": self._waiting}
        if told != self._state.get(runs_now_fact(self.name)):
            self._state.set(runs_now_fact(self.name), told)
        count_tables(self._state, self.name)
        self.lander.freshness.tell(self._state)
