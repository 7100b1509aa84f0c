"""The process: puts the parts together from the configuration, serves orders, and ends in bounded time.

One pipeline per source, one worker for models and syncs, a main loop that polls requests and tells systemd, status and
metrics how things are. SIGTERM and SIGINT stop it with everything durable (what is in the log is; it lands after the
next start); a second signal ends it at once. Nothing is decided here about data.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cdc import __version__, control, metrics
from cdc.alerts import Alerts
from cdc.aside import Aside
from cdc.audit import Audit, Stopping
from cdc.config import Config
from cdc.control import Control, Pending
from cdc.errors import CdcError, ConfigError, SourceRefused, TimedOut
from cdc.ladder import operator_error
from cdc.lake.routing import open_lake
from cdc.land import Lander
from cdc.log import EventLog
from cdc.memory import keep_memory_low
from cdc.merge import Merger
from cdc.notify import Notifier
from cdc.periodic_pipeline import PeriodicPipeline
from cdc.pipeline import Pipeline
from cdc.ports import ObjectStore
from cdc.serving import Serving
from cdc.state import State, open_state
from cdc.table import TableId
from cdc.upkeep import UpkeepOrder
from cdc.worker import Worker

log = logging.getLogger(__name__)

TICK_S = 0.1
SWITCH_S = 0.0005
"""The receiving thread wakes for every burst; at Python's default of 5 ms it would wait that long behind the others."""
ONCE_TIMEOUT_S = 24 * 3600.0


class Daemon:
    """`run` is the whole life of one process."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stop = threading.Event()
        self._signals = 0
        self._fatal: BaseException | None = None
        self._aside = Aside()
        self._pipelines: dict[str, Pipeline | PeriodicPipeline] = {}

    def run(self, *, once: bool = False) -> int:
        """Until a signal, or with `once` until everything committed before now has landed and due syncs have run.
        0 fine, 1 failed. Blocks; installs signal handlers when called in the main thread."""
        config = self._config
        keep_memory_low()
        sys.setswitchinterval(SWITCH_S)
        config.state_dir.mkdir(parents=True, exist_ok=True)
        with self._only_one(), self._signals_handled():
            # What a kill has left: nothing there outlives its process, and on a store that is far away it is much.
            shutil.rmtree(config.state_dir / "tmp", ignore_errors=True)
            state = open_state(config.state_dir)
            event_log = EventLog(
                config.log_dir, state, bytes_max=config.log_bytes_max, segment_bytes=config.log_segment_bytes
            )
            notifier = Notifier()
            server = None
            try:
                server = metrics.MetricsServer(config.metrics_listen, self._health)
                self._build(state, event_log)
                state.set("metrics_address", server.start())
                notifier.ready(f"{len(self._pipelines)} sources")
                log.info("started", extra={"pid": os.getpid(), "sources": len(self._pipelines)})
                self._loop(state, event_log, notifier, once)
                notifier.stopping("stopping")
                self._close(state)
                return self._outcome()
            finally:
                self._stop.set()
                if server is not None:
                    server.stop()
                notifier.close()
                event_log.close()
                state.close()

    # ---- building and ending ----

    def _build(self, state: State, event_log: EventLog) -> None:
        self._alerts = Alerts(self._config.alerts, self._stop)
        config = self._config
        store = open_lake(config)
        owner = f"{socket.gethostname()} pid {os.getpid()}"
        self._serving = Serving(config, state, store, self._changed_by_others, self._alerts.tell)
        for name, source in config.sources.items():
            made = PeriodicPipeline if source.is_periodic else Pipeline
            self._pipelines[name] = made(
                config, source, state, event_log, store,
                owner=owner, own_origins=self._serving.origins, stop=self._stop, on_fatal=self._on_fatal,
                alert=self._alerts.tell,
            )  # fmt: skip
        self._control = Control(state)
        self._control.serve(
            {
                "resync": lambda args: self._resync(state, args),
                "cancel_resync": self._cancel_resync,
                "pause": lambda args: self._pause(state, args, True),
                "resume": lambda args: self._pause(state, args, False),
                "wait": self._wait,
                "land": self._land,
                "upkeep": self._upkeep,
                "model_run": self._serving.model_run,
                "sync_order": self._serving.sync_order,
                "sync_forget": self._serving.sync_forget,
            }
        )
        self._serving_workers = [
            Worker(name, step, stop=self._stop, idle_s=0.2, on_fatal=self._on_fatal)
            for name, step in self._serving.steps().items()
        ]
        self._audit_worker = Worker("verify", self._audit(state, store).step, stop=self._stop, idle_s=1.0)
        for pipeline in self._pipelines.values():
            pipeline.start()
        for worker in self._serving_workers:
            worker.start()
        self._audit_worker.start()

    def _audit(self, state: State, store: ObjectStore) -> Audit:
        def await_lake(source: str, table: TableId, lsn: int, deadline: float) -> int:
            pipeline = self._pipelines[source]
            # On a quiet server nothing flushes what a read itself has written; the barrier's commit does.
            lsn = max(lsn, pipeline.admin.barrier())
            while not pipeline.has_reached(lsn):
                error = pipeline.operator_error()
                if error is not None:
                    raise error
                if self._stop.wait(TICK_S):
                    raise Stopping("the daemon stops")
                if time.monotonic() > deadline or not pipeline.streaming:
                    raise TimedOut(f"the lake has not come to what the source shows of {table}", hint="cdc status")
            return lsn

        return Audit(
            self._config, state, store, temp_dir=self._config.state_dir / "tmp" / "verify", stop=self._stop,
            streams=lambda name: self._pipelines[name].streaming, await_lake=await_lake, alert=self._alerts.tell,
        )  # fmt: skip

    def _changed_by_others(self) -> dict[tuple[str, TableId], int]:
        """Per table, the cut's position at which a change that is not our own write was last merged."""
        return {
            (name, table): lsn
            for name, pipeline in self._pipelines.items()
            if pipeline.prepared
            for table, lsn in dict(pipeline.merger.changed_by_others).items()
        }

    def _close(self, state: State) -> None:
        self._stop.set()
        self._serving.stop()
        deadline = time.monotonic() + self._config.shutdown_timeout_s
        for pipeline in self._pipelines.values():
            pipeline.close(deadline)
        for worker in (*self._serving_workers, self._audit_worker):
            worker.join(max(0.1, deadline - time.monotonic()))
        self._serving.close()
        self._alerts.close()
        self._control.close()
        state.set(control.DAEMON_FACT, None)
        log.info("stopped")

    def _outcome(self) -> int:
        return 1 if self._fatal is not None else 0

    def _on_fatal(self, error: BaseException) -> None:
        self._fatal = error
        self._stop.set()

    @contextmanager
    def _only_one(self) -> Iterator[None]:
        """One daemon per state directory; the lock ends with the process, however it ends."""
        path = self._config.state_dir / "daemon.lock"
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise ConfigError(
                    f"another daemon runs on state_dir {self._config.state_dir}",
                    hint="`cdc status` tells its pid; give each daemon a state_dir of its own",
                ) from e
            yield

    @contextmanager
    def _signals_handled(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, _frame: object) -> None:
            # Nothing that takes a lock, as an event does: the main thread may hold it, and would wait for itself.
            self._signals += 1
            if self._signals > 1:
                os._exit(128 + number)

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ---- the main loop ----

    def _loop(self, state: State, event_log: EventLog, notifier: Notifier, once: bool) -> None:
        started = time.time()
        metrics.BUILD.info({"version": __version__})
        metrics.START_TIME_SECONDS.set(started)
        metrics.LOG_LIMIT_BYTES.set(self._config.log_bytes_max)
        finished = self._finished() if once else None
        beat_at = 0.0
        while not self._stop.is_set() and not self._signals:
            now = time.monotonic()
            if now >= beat_at:
                beat_at = now + 1.0
                control.beat(state, started)
                for pipeline in self._pipelines.values():
                    pipeline.beat()
                metrics.LOG_BYTES.set(event_log.size_bytes())
                if self._workers_alive():
                    notifier.watchdog()
            self._control.poll_once()
            if finished is not None and finished() is not None:
                return
            self._stop.wait(TICK_S)

    def _workers_alive(self) -> bool:
        return self._fatal is None

    def _finished(self) -> Pending:
        """For `--once`: polled until everything committed before now is in the lake and due syncs have run."""
        finishing: dict[str, Callable[[], bool]] = {}
        following: dict[str, Callable[[], bool]] = {}
        deadline = time.monotonic() + ONCE_TIMEOUT_S

        def done() -> dict[str, Any] | None:
            if time.monotonic() > deadline:
                raise TimedOut("the run did not end in time")
            for name, pipeline in self._pipelines.items():
                error = pipeline.operator_error()
                if error is not None:
                    raise error
                if name not in finishing:
                    ended = pipeline.finishing()
                    if ended is None:
                        return None
                    finishing[name] = ended
                if not finishing[name]():
                    return None
                if name not in following:
                    following[name] = pipeline.followers.finishing()
                if not following[name]():
                    return None
            return {"done": True} if self._serving.settled() else None

        return done

    def _health(self) -> Mapping[str, Any]:
        sources = {
            name: {
                "streaming": p.streaming,
                "standby": p.standby,
                "error": p.error.args[0] if isinstance(p.error, CdcError) and not p.standby else None,
            }
            for name, p in self._pipelines.items()
        }
        well = all(s["streaming"] or s["standby"] for s in sources.values())
        return {"ok": self._fatal is None and well, "sources": sources}

    # ---- orders ----

    def _pipeline(self, args: Mapping[str, Any]) -> Pipeline | PeriodicPipeline:
        name = str(args["source"])
        if name not in self._pipelines:
            raise ConfigError(f"the running daemon has no source {name!r}", hint="restart it with this configuration")
        return self._pipelines[name]

    def _resync(self, state: State, args: dict[str, Any]) -> dict[str, Any] | Pending:
        pipeline, table = self._pipeline(args), _table(args["table"])
        where, keys = str(args.get("where") or ""), [tuple(map(str, key)) for key in args.get("keys") or ()]

        def order() -> dict[str, Any] | None:
            if not pipeline.prepared:
                return None
            before = [r.id for r in state.runs(pipeline.name, table, states=["pending", "running"]) if r.kind != "keys"]
            if where or "keys" in args:
                run, _ = pipeline.resync_rows(table, where, keys)
            else:
                run = pipeline.resync(table)
            joined, behind = run.id in before, before[-1] if before else None
            return {
                "run": run.id, "kind": run.kind, "joined": joined, "behind": None if joined else behind,
                "order": "joined" if joined else "queued" if behind else "new",
            }  # fmt: skip

        return order() or order

    def _cancel_resync(self, args: dict[str, Any]) -> dict[str, Any] | Pending:
        pipeline, table = self._pipeline(args), _table(args["table"])

        def cancel() -> dict[str, Any] | None:
            return {"runs": pipeline.cancel(table)} if pipeline.prepared else None

        return cancel() or cancel

    def _pause(self, state: State, args: Mapping[str, Any], pause: bool) -> dict[str, Any] | Pending:
        kind, name = str(args["kind"]), str(args["name"])
        answer = {"kind": kind, "name": name, "paused": pause}
        if kind == "table":
            source, _, text = name.partition("/")
            pipeline, table = self._pipeline({"source": source}), _table(text)

            def pause_table() -> dict[str, Any]:
                pipeline.pause_table(table, pause)
                return answer

            # It tells the lake, which may not answer.
            return self._aside.do(pause_table)
        if pause:
            state.pause(kind, name)
        else:
            state.resume(kind, name)
        return answer

    def _land(self, args: dict[str, Any]) -> Pending:
        pipeline = self._pipeline(args)
        asked: list[tuple[Lander, Callable[[], bool]]] = []

        def landed() -> dict[str, Any] | None:
            # What is logged lands also while the stream stands still.
            landing = [w for w in pipeline.workers if w.name.startswith("land:")]
            error = operator_error(landing) if pipeline.prepared else pipeline.operator_error()
            if error is not None:
                raise error
            if not pipeline.prepared:
                return None
            if not asked or asked[-1][0] is not pipeline.lander:
                # A new history has a new one, and a log without what was asked for.
                asked.append((pipeline.lander, pipeline.lander.ask()))
            return {"landed_lsn": pipeline.reached()["landed"]} if asked[-1][1]() else None

        return landed

    def _upkeep(self, args: dict[str, Any]) -> Pending:
        pipeline, table = self._pipeline(args), _table(args["table"])
        ordered: list[tuple[Merger, UpkeepOrder]] = []

        def done() -> dict[str, Any] | None:
            if not pipeline.prepared:
                return None
            if pipeline.rests(table):
                raise SourceRefused(f"table {table} stands still", hint="see its reason: cdc status")
            if not ordered or ordered[-1][0] is not pipeline.merger:
                # A new history has a new one, which knows nothing of orders given before.
                ordered.append((pipeline.merger, pipeline.merger.order_upkeep(table, str(args["kind"]))))
            order = ordered[-1][1]
            if order.error is not None:
                raise order.error
            pipeline.merger.ask()
            return order.done

        return done

    def _wait(self, args: dict[str, Any]) -> Pending:
        pipeline = self._pipeline(args)
        awaited: list[Callable[[], bool]] = []

        def reached() -> dict[str, Any] | None:
            error = pipeline.operator_error()
            if error is not None:
                raise error
            if not pipeline.prepared:
                return None
            if not awaited:
                logged = bool(args.get("logged"))
                awaited.append(pipeline.landing() if logged else pipeline.awaiting(int(args["lsn"])))
            if not awaited[0]():
                return None
            pipeline.beat()  # `status` is not to say less than what we answer
            return pipeline.reached()

        return reached


def _table(text: str) -> TableId:
    schema, _, name = text.partition(".")
    return TableId(schema, name)
