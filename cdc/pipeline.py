"""One source from its slot to its current tables: the parts, their threads, and the life of its tables.

Threads: capture (source → log), land (log → changelogs), merge (changelogs → current), backfill (snapshots and
discovery of tables), guard (what the slot costs its server), lease (the right to write the lake), follow (changelogs
→ their other forms). They meet only in the log, the state database and the lake, so none blocks another; the log is the
buffer. It holds the rules by which a table begins, stops alone and comes back. What each part does is in its own
module.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from cdc import metrics, registry
from cdc.backfill import Backfill
from cdc.batch import Boundary, Portion
from cdc.candidates import Candidates, candidates
from cdc.capture import ConfirmGate, LogEnd, SourceStream
from cdc.config import Config, SourceConfig
from cdc.discovery import Discovery
from cdc.errors import (
    CdcError,
    LeaseLost,
    SourceRefused,
    SourceUnavailable,
    Standby,
    StoreConflict,
    Undecodable,
)  # fmt: skip
from cdc.evolution import Evolution
from cdc.follow import Followers
from cdc.guard import Guard
from cdc.heads import Heads
from cdc.ladder import Ladder, count_tables, operator_error
from cdc.lake.anchor import Anchor, AnchorState
from cdc.lake.changelog import ChangelogTable, highest_epoch, highest_fence, highest_landed
from cdc.lake.lease import Lease
from cdc.lake.probe import require_promises
from cdc.land import Group, Lander, LandPoint, LogReader
from cdc.log import EventLog
from cdc.merge import Cadence, Merger
from cdc.origin import give_up, settle
from cdc.pace import LoadLimit, RateLimit
from cdc.places import Places
from cdc.ports import ObjectStore, SourceIdentity
from cdc.runs import Run
from cdc.schema import SchemaBook
from cdc.stage import Stage
from cdc.state import State
from cdc.status import history_fact, progress_fact
from cdc.table import TableId, TableSchema
from cdc.upkeep import Limits
from cdc.worker import Worker

log = logging.getLogger(__name__)

READ_S = 0.2
"""Longest wait of one step for input: how soon a stop is seen."""
LAND_S = 0.05
"""The same for landing: how soon it is seen that somebody waits."""
LOOK_S = 20.0
"""How often the server is asked for its slot, and logged transaction ids that no snapshot can miss are forgotten."""


class Pipeline:
    """Everything of one source. Built before its source can be reached; the capture thread prepares it."""

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
        self._alert = alert
        self.name = source.name
        self._config = config
        self._source_config = source
        self._state = state
        self._log = event_log
        self._store = store
        self._own_origins = own_origins
        self._stop = stop
        kind = registry.source_kind(source.type)
        self._temp = config.state_dir / "tmp" / source.name
        self._source = kind.source(source, application_name="cdc", temp_dir=self._temp / "stream")
        self._reader = kind.reader(source)
        self.admin = kind.admin(source)
        self._book = SchemaBook(state, source.name)
        floor = partial(highest_fence, store, source.name)
        self._lease = Lease(store, source.name, owner, ttl_s=config.lake.lease_ttl_s, floor=floor)
        self._anchor = Anchor(store, source.name)
        self._places = Places(source, config.lake, store, state, event_log, self._anchor)
        self.followers = Followers(self.name, config.lake, state, store, self._temp / "follow", self._lease)
        self._prepared = threading.Event()
        self._built = self._settled = False
        self._let_go = self._reopen = ""
        lanes = range(1, source.readers + 1)
        self._more_readers = [kind.reader(source) for _ in lanes]
        parts = ("land", "merge", "backfill", "guard", *(f"backfill:{lane}" for lane in lanes))
        self._turns = {part: threading.Lock() for part in parts}
        self._load = LoadLimit(source.snapshot_pause_active, lambda: self.admin.status().active_clients)
        self._resting = False
        self._stopped: set[TableId] = set()
        self._gone: set[TableId] = set()
        self._caught_up_at: dict[str, float] = {}
        self._heads = Heads()
        self._ladder = Ladder(self.name, event_log)
        self._discover_at = self._look_at = 0.0
        self._shapes_seen = 0
        self._prune: tuple[int, list[int]] = (0, [])
        worker = partial(Worker, stop=stop, on_error=self._note_error, on_fatal=on_fatal)
        self.workers = [
            worker(f"{part}:{self.name}", step, idle_s=idle_s)
            for part, step, idle_s in (
                ("capture", self._capture_step, 0.2),
                ("land", lambda: self._in_turn("land", self._land_step), 0.2),
                ("merge", lambda: self._in_turn("merge", self._merge_step), 0.1),
                ("backfill", lambda: self._in_turn("backfill", self._backfill_step), 0.05),
                ("guard", lambda: self._in_turn("guard", lambda: self.guard.step()), 0.2),
                ("lease", self._lease.keep, 0.2),
            )
        ]
        more = {f"backfill:{self.name}:{lane}": partial(self._lane_step, lane) for lane in lanes}
        more |= {f"follow-{form}:{self.name}": partial(self.followers.step, form) for form in self.followers.forms}
        self.workers += [worker(name, step, idle_s=0.05) for name, step in more.items()]

    # ---- life ----

    def start(self) -> None:
        """Start the threads; returns at once."""
        for worker in self.workers:
            worker.start()

    def close(self, deadline: float) -> None:
        """After `stop` was set: wait for the threads, then let go of source, reader and lease."""
        for worker in self.workers:
            worker.join(max(0.1, deadline - time.monotonic()))
        if self._prepared.is_set():
            self._capture.close()
        self._source.close()
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
        if isinstance(error, (SourceUnavailable,)):
            metrics.UP.labels(self.name).set(0)

    # ---- capture ----

    def begin_anew(self, why: str) -> None:
        """Let the slot go and begin a new history: a slot made anew, every table snapshotted again. Thread-safe; done
        by the capture thread, and repeated by it until it is done."""
        self._let_go = why

    def _capture_step(self) -> bool:
        try:
            return self._capture_once()
        except Undecodable as e:
            self._settled = False
            if self._source_config.on_slot_lost != "resync":
                raise
            self.begin_anew(e.args[0])
            return False
        except BaseException:
            # Whatever cut the stream: where it may go on is looked at anew, at what is the same server or another one.
            self._settled = False
            metrics.UP.labels(self.name).set(0)
            raise

    def _capture_once(self) -> bool:
        landed = self._source_config.confirm_after == "landed"
        if landed and self._prepared.is_set() and self._lease.is_long_over():
            # Nothing lands by us any more: a daemon in reserve that has the lease is to get the source as well.
            self._capture.close()
            self._lease.check()
        paused = self._paused()
        if self._let_go and self._prepared.is_set():
            self._capture.close()
            give_up(self._anchor, self._let_go)
            # Also of a source that is paused: what the slot keeps is freed now.
            self._settle()
            self._let_go = ""
        if self._reopen and self._prepared.is_set():
            log.info("the stream is opened anew", extra={"source": self.name, "why": self._reopen})
            self._capture.close()
            self._settled = False
            self._reopen = ""
        if not self._settled and not (paused and self._prepared.is_set()):
            self._settle()
        if paused:
            self._capture.close()
            self._state.save_source(self.name, phase="paused")
            self._resting = True
            self._settled = False
            metrics.UP.labels(self.name).set(0)
            return False
        progress = self._capture.step(READ_S)
        if self._resting:
            self._resting = False
            self._state.save_source(self.name, phase="streaming")
        metrics.UP.labels(self.name).set(1)
        return progress.read

    def _settle(self) -> None:
        """Look where the source's history stands, and (re)build the parts if it is another one than before."""
        first = not self._built
        if first:
            if self.workers[0].error is None:
                self._state.save_source(self.name, phase="starting")
            self._lease.acquire()
            require_promises(self._store, self._config.lake.url)
        identity = self._source.identity()
        with ExitStack() as turns:
            anchor = settle(
                self._source_config, identity, self.admin, self._anchor, self._log,
                landed_lsn=partial(highest_landed, self._store, self.name),
                landed_epoch=partial(highest_epoch, self._store, self.name),
                still=lambda: self._hold_still(turns),
            )  # fmt: skip
            self._note_identity(identity, anchor)
            if first or anchor.epoch != self._epoch:
                # Also where the history was begun by an attempt before this one, which then failed.
                self._hold_still(turns)
                self._build(anchor)
            else:
                self._gate.settled(anchor.mode)
        self._built = self._settled = True
        self._prepared.set()
        if first:
            self._state.save_source(self.name, phase="streaming", error="", hint="")

    def _hold_still(self, turns: ExitStack) -> None:
        """Until `turns` is closed, no other part is at work: what it does belongs to the history that ends."""
        if not self._prepared.is_set():
            return
        self._prepared.clear()
        turns.callback(self._prepared.set)
        self.backfill.halt()
        for turn in self._turns.values():
            turns.enter_context(turn)

    def _in_turn(self, part: str, step: Callable[[], bool]) -> bool:
        if not self._prepared.wait(READ_S):
            return False
        with self._turns[part]:
            # It may have been cleared between the two.
            return self._prepared.is_set() and step()

    def _note_identity(self, identity: SourceIdentity, anchor: AnchorState) -> None:
        self._state.set(history_fact(self.name), {"epoch": anchor.epoch, "why": anchor.why})
        self._state.save_source(
            self.name,
            identity={
                "system_id": identity.system_id,
                "timeline": identity.timeline,
                "database": identity.database,
                "server_version": identity.server_version,
            },
        )

    def _build(self, anchor: AnchorState) -> None:
        """The parts, for one epoch. No part is at work."""
        if self._built:
            self._capture.close()
            self.lander.abandon()
            log.info("a new epoch began", extra={"source": self.name, "epoch": anchor.epoch})
        lake = self._config.lake
        self._epoch = anchor.epoch
        self._places.settle()
        self._discover_at = self._look_at = 0.0
        self._prune = 0, []
        self._heads.clear()
        self._caught_up_at.clear()
        (self._temp / "land").mkdir(parents=True, exist_ok=True)
        tables = self._state.tables(self.name)
        self._stopped = {t.table for t in tables if t.state in ("stopped", "removed")}
        self._gone = {t.table for t in tables if t.state == "removed"}
        self._stopped |= {t.table for t in tables if self._state.is_paused("table", f"{self.name}/{t.table}")}
        self._gate = ConfirmGate(
            epoch=self._epoch,
            confirm_after=self._source_config.confirm_after,
            save_anchor=self._save_anchor,
            anchored_lsn=anchor.may_confirm_lsn,
            every_s=self._source_config.confirm_every_s,
            anchored_mode=anchor.mode,
            logged_lsn=self._ladder.logged(),
        )
        self.evolution = Evolution(
            self.name, self._state, self._book, self._store,
            contract=self._source_config.contract, read_anew=self.read_anew, alert=self._alert,
        )  # fmt: skip
        self.guard = Guard(
            self._source_config, self.admin, self._state,
            reached=self.reached, bridge=lambda on: self._gate.bridge(on, self._log.position(self.name)),
            let_go=self.begin_anew, streaming=lambda: self.streaming,
        )  # fmt: skip
        self.lander: Lander = Lander(
            self.name, self._log, self._state, self._book, self._store,
            epoch=self._epoch, temp_dir=self._temp / "land", land_every_s=lake.land_every_s, land_bytes=lake.land_bytes,
            lease=self._lease, stop_table=self.stop_table, is_stopped=self.is_passed_over, evolution=self.evolution,
            partition_by=self._source_config.partition_by,
            admits=self._places.admits,
        )  # fmt: skip
        self.backfill = Backfill(
            self.name, self._reader, self._log, self._state, self._book,
            chunk_rows=self._source_config.chunk_rows, landed_lsn=self._landed_lsn, stop_table=self.stop_table,
            nudge=self.admin.barrier, candidates=self._candidates, more_readers=self._more_readers,
            chunk_bytes=self._source_config.chunk_bytes,
            rate=RateLimit(self._source_config.snapshot_rows_per_s, self._source_config.snapshot_bytes_per_s),
        )  # fmt: skip
        self.merger = Merger(
            self.name, self._state, self._book, self._store,
            temp_dir=self._temp / "merge", freshness=self.lander.freshness,
            cadence=Cadence(lake.merge_every_s, lake.merge_share, lake.current.max_staleness_s),
            upkeep=Limits.of(lake, self._source_config),
            own_origins=self._own_origins, landed=lambda: self.lander.landed_cut,
            wish=self.backfill.wish, read_anew=self.read_anew, stop_table=self.stop_table, is_stopped=self.rests,
            lease=self._lease, may_vacuum=self.followers.may_vacuum,
        )  # fmt: skip
        self._ladder.stand_on(self.lander, self.merger)
        self.discovery = Discovery(
            self.name, self._reader, self.admin, self._state, self._book, self._store, self.backfill, self,
            epoch=self._epoch, server=anchor.system_id, vouches=self._places.vouches,
        )  # fmt: skip
        reader = LogReader(self.name, self._log, self._state, self._gate, self.lander.due_in_s)
        self.log_end = LogEnd(self.name, self._log)
        stream = SourceStream(self.name, self._source, self._book, self._gate, self._epoch)
        self._capture: Stage[Portion, Boundary | None] = Stage(f"capture:{self.name}", stream, self.log_end)
        self._land: Stage[Group, LandPoint] = Stage(f"land:{self.name}", reader, self.lander)

    def _save_anchor(self, may_confirm_lsn: int, mode: str) -> None:
        self._lease.check()
        epoch = self._epoch

        def further(known: AnchorState) -> AnchorState:
            if known.epoch != epoch:
                return known
            return replace(known, mode=mode, may_confirm_lsn=max(may_confirm_lsn, known.may_confirm_lsn))

        try:
            self._anchor.change(further)
        except StoreConflict as e:
            raise LeaseLost(f"source {self.name}: another daemon wrote the lake's anchor", hint="run only one") from e

    # ---- the other parts ----

    def _land_step(self) -> bool:
        progress = self._land.step(LAND_S)
        return progress.read

    def _merge_step(self) -> bool:
        return self.merger.step()

    def _backfill_step(self) -> bool:
        if self._paused():
            return False
        now = time.monotonic()
        grown = self._book.grown + self.log_end.ddl_seen
        # DDL in the stream, or a shape that nobody knew: whatever else that ALTER did is looked for at once.
        if now >= self._discover_at or grown != self._shapes_seen:
            again = self.discovery.look()
            self._shapes_seen = grown
            self._discover_at = now if again else now + self._source_config.watch_every_s
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._prune = self.admin.status().oldest_xmin, self.backfill.takes()
        xmin, taking = self._prune
        if xmin and not any(old % 2 and old == new for old, new in zip(taking, self.backfill.takes(), strict=True)):
            # Snapshots that were being taken then know what they miss; a later one cannot begin below that.
            self._log.prune_xids(self.name, xmin)
            self._prune = 0, []
        return self.backfill.step(pause=self._pause())

    def _lane_step(self, lane: int) -> bool:
        """A step of a reader that works beside the first one."""

        def step() -> bool:
            return self.backfill.open and not self._paused() and self.backfill.step(lane, self._pause())

        return self._in_turn(f"backfill:{lane}", step)

    def _pause(self) -> str:
        """Why snapshots must not read now; empty if they may."""
        if self._reopen:
            return "waits for the stream to be opened anew"
        if self.guard.pauses_snapshots:
            return "is paused by the WAL guard"
        return self._load.why(idle=not self.backfill.open)

    # ---- tables ----

    def mark(self, tables: Iterable[TableId], needs: bool) -> None:
        """Tell the lake that tables need a resync, or no longer do; durable on return."""
        self._anchor.mark(tables, needs)

    def marks(self) -> dict[str, int]:
        """Tables that need a resync, and since when (0: since before this process)."""
        return self._anchor.marks()

    def take_part(self, table: TableId, takes_part: bool) -> None:
        """Let a table be followed, or not: one that is gone."""
        self._gone.discard(table)
        if not takes_part:
            self._stopped.add(table)
            self._gone.add(table)
        elif not self._state.is_paused("table", f"{self.name}/{table}"):
            self._stopped.discard(table)

    def rests(self, table: TableId) -> bool:
        """Whether a table is stopped, paused or gone."""
        return table in self._stopped

    def reopen_stream(self, why: str) -> None:
        """Have the capture thread open the stream anew where the log ends; until then no snapshot begins or goes on.
        Thread-safe."""
        self._reopen = why

    def is_passed_over(self, table: TableId) -> bool:
        """Whether a table's changes do not land. The catalog is ahead of the stream: what was published of a table
        before it went still comes, and belongs into its changelog."""
        return table in self._stopped and table not in self._gone

    def _landed_lsn(self, table: TableId) -> int:
        return ChangelogTable(self._store, self.name, table).tokens().stream(self._epoch)

    def stop_table(self, table: TableId, error: CdcError) -> None:
        """Let one table stand still; first the lake is told that it needs a resync, then its changes are passed
        over."""
        self.mark([table], True)
        # Under the log's lock no run of the table begins, goes on or ends: none may take the stop back.
        with self._log.lock():
            self._stopped.add(table)
            self._gone.discard(table)
            for run in self._state.runs(self.name, table, states=["pending", "running"]):
                self._state.update_run(run.id, state="failed", reason=error.args[0])
            self._state.update_table(self.name, table, state="stopped", reason=error.args[0], hint=error.hint)
        log.error(
            error.args[0],
            extra={"source": self.name, "table": str(table), "error": type(error).__name__, "hint": error.hint},
        )

    def read_anew(self, table: TableId, reason: str) -> None:
        """Order a snapshot of a table whose rows nothing else tells any more. Until it has landed, the lake says so,
        for a daemon that loses its disk meanwhile."""
        self.mark([table], True)
        log.warning("a table is read anew", extra={"source": self.name, "table": str(table), "why": reason})
        self.backfill.order(table, "resync", reason, settle=True)
        self._discover_at = min(self._discover_at, time.monotonic())

    def pause_table(self, table: TableId, pause: bool) -> None:
        """A paused table takes no part and holds nothing back; on resume it is snapshotted anew."""
        name = f"{self.name}/{table}"
        if pause:
            # Paused first: a table that takes part loses its mark when a snapshot of it has landed.
            self._state.pause("table", name)
            if self._prepared.is_set():
                self.mark([table], True)
            self._stopped.add(table)
            self._gone.discard(table)
            return
        if self._state.is_paused("table", name):
            self._state.resume("table", name)
            # Ordered first: what is merged until then may not fit what the table missed.
            self.backfill.order(table, "resync", "resumed")
            self._stopped.discard(table)

    def resync(self, table: TableId, kind: str = "resync") -> Run:
        """Order a new snapshot; a stopped table takes part again from here on."""
        known = self._state.table(self.name, table)
        if known.state in ("stopped", "new"):
            kind = "first"
        if known.state == "stopped":
            self.evolution.accept(table)
        # Whoever orders it may know of something that the next look would find: what follows it must come right.
        self._discover_at = min(self._discover_at, time.monotonic())
        with self._log.lock():
            run = self.backfill.order(table, kind, "ordered")
            if known.state == "stopped":
                self._stopped.discard(table)
                self._state.update_table(self.name, table, state="new", reason="", hint="")
        return run

    def resync_rows(self, table: TableId, where: str, keys: Sequence[tuple[str, ...]]) -> tuple[Run, bool]:
        """Order that some rows are read anew, and whether that was ordered before. SourceRefused for a table that
        stands still or has no key."""
        if self._state.table(self.name, table).state == "stopped":
            raise SourceRefused(f"table {table} is stopped", hint=f"read all of it: `cdc resync {table}`")
        return self.backfill.order_filtered(table, where, keys, "ordered")

    def _candidates(self, run: Run, schema: TableSchema) -> Candidates | None:
        """Rows of the lake that a filtered run has to ask for; None, with a word to whom it waits for, if too early."""
        found = candidates(self._store, self.name, schema, run, temp_dir=self._temp / "land")
        if found is None:
            self.lander.ask()
            self.merger.ask()
        return found

    # ---- waiting and telling ----

    @property
    def discovered(self) -> bool:
        """Whether the publication has been looked at since the start."""
        return self._discover_at > 0.0

    @property
    def prepared(self) -> bool:
        return self._prepared.is_set()

    def reached(self) -> dict[str, int]:
        """End LSNs up to which the log, the changelogs and the current tables hold everything."""
        return self._ladder.reached()

    def has_reached(self, end_lsn: int) -> bool:
        """Whether they hold everything up to `end_lsn`; asks for what is missing."""
        return self._prepared.is_set() and self._ladder.has_reached(end_lsn)

    def awaiting(self, end_lsn: int) -> Callable[[], bool]:
        """Whether everything up to `end_lsn` is in the lake."""
        return lambda: self.has_reached(end_lsn)

    def landing(self) -> Callable[[], bool]:
        """Whether what is logged now is in the lake."""
        return self.awaiting(self._ladder.logged())

    def finishing(self) -> Callable[[], bool] | None:
        """For `--once`, when tables are found and snapshotted: whether what was committed before now is in the lake."""
        if not self.prepared or not self.discovered or not self.backfill.idle:
            return None
        # Behind the last snapshot's rows: they stand at a position that had landed before they were read.
        return self.awaiting(self.admin.barrier())

    def cancel(self, table: TableId) -> list[str]:
        """Take back the table's resyncs; their runs' ids."""
        return self.backfill.cancel(table)

    def operator_error(self) -> CdcError | None:
        """An error of a part that only an operator can mend."""
        return operator_error(self.workers)

    def beat(self) -> None:
        """Write what `status` shows, once a second."""
        if not self._prepared.is_set():
            return
        reached = self.reached()
        steps = {**reached, "confirmed": self._gate.allowed}
        head, now = self.log_end.received_lsn, time.time()
        self._heads.note(head, now, min(steps.values()))
        for step, lsn in steps.items():
            since = self._caught_up_at[step] = self._heads.held_all_at(lsn)
            metrics.LAG_BYTES.labels(self.name, step).set(max(0, head - lsn))
            metrics.LAG_SECONDS.labels(self.name, step).set(now - since)
        self._state.save_source(self.name, received_lsn=head, confirmed_lsn=self._gate.allowed)
        facts: dict[str, Any] = {
            "landed_lsn": reached["landed"],
            "merged_lsn": reached["merged"],
            "caught_up_at": {**self._caught_up_at, "received": now},
        }
        self._state.set(progress_fact(self.name), facts)
        count_tables(self._state, self.name)
        self.lander.freshness.tell(self._state)
