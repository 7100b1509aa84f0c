"""Models and syncs inside the daemon: one thread that runs what is due or ordered, one after the other.

Inputs are read at recorded cuts only (cdc.sync, cdc.models), so nothing here waits for a source. Orders of the
operator come from the main loop as promises and are worked off before what is due. A target that fails does not
stop the others.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cdc import metrics, registry
from cdc.config import Config
from cdc.errors import CdcError, ConfigError
from cdc.models import run_model
from cdc.ports import ObjectStore, Sink
from cdc.state import State
from cdc.sync import SyncJob, SyncRun, cut_versions
from cdc.table import TableId

if TYPE_CHECKING:
    from cdc.control import Pending

Answer = dict[str, Any]
ChangesOf = Callable[[], Mapping[tuple[str, TableId], int]]
"""Per table, the position of the last merged change that is not our own write."""


class Promise:
    """An order and, later, its answer or error; filled by the serving thread, polled by the main loop."""

    def __init__(self, work: Callable[[], Answer]) -> None:
        self._work = work
        self._answer: Answer | None = None
        self._error: CdcError | None = None

    def keep(self) -> None:
        """Do the work; errors other than ours are the thread's."""
        try:
            self._answer = self._work()
        except CdcError as e:
            self._error = e

    def __call__(self) -> Answer | None:
        if self._error is not None:
            raise self._error
        return self._answer


class Serving:
    """`step` belongs to one thread; `model_run` and `sync_apply` may be called from another."""

    def __init__(self, config: Config, state: State, store: ObjectStore, changes: ChangesOf) -> None:
        self._config = config
        self._state = state
        self._store = store
        self._changes = changes
        self._directory = config.state_dir / "serving"
        self._orders: queue.SimpleQueue[Promise] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._jobs: dict[str, SyncJob] = {}
        self._stopping = False
        self.origins = tuple(t.origin or f"cdc_{name}" for name, t in config.targets.items())
        """Replication origins that our own writes carry."""

    def step(self) -> bool:
        """Work off orders, then run each sync that is due; whether anything was done."""
        worked = False
        while not self._orders.empty():
            self._orders.get().keep()
            worked = True
        for name in self._config.syncs:
            worked |= self._job(name).step(self._changes(), should_stop=lambda: self._stopping) is not None
        return worked

    def model_run(self, args: Mapping[str, Any]) -> Pending:
        """Have a model run now."""
        name = str(args["name"])
        if name not in self._config.models:
            raise ConfigError(f"the running daemon has no model {name!r}", hint="restart it with this configuration")
        return self._order(lambda: self._run_model(name))

    def sync_apply(self, args: Mapping[str, Any]) -> Pending:
        """Have a sync run now."""
        name = str(args["name"])
        if name not in self._config.syncs:
            raise ConfigError(f"the running daemon has no sync {name!r}", hint="restart it with this configuration")

        def apply() -> Answer:
            run = self._job(name).step(self._changes(), force="ordered", should_stop=lambda: self._stopping)
            assert isinstance(run, SyncRun)
            return run.to_json()

        return self._order(apply)

    def settled(self) -> bool:
        """Whether no sync is due on the cuts as they are."""
        changes = self._changes()
        return self._orders.empty() and all(self._job(n).is_settled(changes) for n in self._config.syncs)

    def stop(self) -> None:
        """Let a running sync end between two batches. Thread-safe."""
        self._stopping = True

    def close(self) -> None:
        """Close the targets' connections; after the thread has ended."""
        for sink in self._sinks.values():
            sink.close()

    def _order(self, work: Callable[[], Answer]) -> Pending:
        promise = Promise(work)
        self._orders.put(promise)
        return promise

    def _job(self, name: str) -> SyncJob:
        if name not in self._jobs:
            sync = self._config.syncs[name]
            if sync.target not in self._sinks:
                target = self._config.targets[sync.target]
                self._sinks[sync.target] = registry.sink_kind(target.type)(target)
            self._jobs[name] = SyncJob(
                sync,
                self._sinks[sync.target],
                self._state,
                self._store,
                self._directory,
                model=self._config.models.get(sync.model),
            )
        return self._jobs[name]

    def _run_model(self, name: str) -> Answer:
        model = self._config.models[name]
        known: dict[str, list[TableId]] = {}
        for table in self._state.tables():
            if table.state != "removed":
                known.setdefault(table.source, []).append(table.table)
        history = self._state.start_history("model", name, "ordered")
        began = time.monotonic()
        try:
            result = run_model(
                self._store,
                known,
                model.sql,
                model.key,
                self._directory / "models" / f"{name}.parquet",
                name=name,
                cut=cut_versions(self._state, set(known)),
            )
        except CdcError as e:
            self._state.finish_history(history, "failed", error=str(e))
            metrics.MODEL_RUNS.labels(name, "failed").inc()
            raise
        counts = {"rows": result.rows, "held": result.held}
        self._state.finish_history(history, "done", counts=counts)
        metrics.MODEL_RUNS.labels(name, "done").inc()
        return {
            "model": name,
            "outcome": "done",
            "counts": counts,
            "seconds": round(time.monotonic() - began, 3),
            "result": str(result.path),
        }
