"""Models and syncs inside the daemon: a thread per target that runs what is due or ordered, one after the other.

Inputs are read at recorded cuts only (cdc.planning, cdc.models), so nothing here waits for a source; a target that is
slow or away does not stop the others. One result at a time is computed, whichever thread asks, for that is what takes
memory. Orders of the operator come from the main loop as promises and are worked off before what is due.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from cdc import metrics, registry
from cdc.condition import Alert
from cdc.config import Config
from cdc.due import known_tables
from cdc.errors import CdcError, ConfigError
from cdc.lake.ledger import LakeLedger
from cdc.models import run_model
from cdc.planning import cut_versions
from cdc.ports import ObjectStore
from cdc.sink import Sink
from cdc.state import State
from cdc.sync import SyncJob
from cdc.sync_run import Order
from cdc.table import TableId

if TYPE_CHECKING:
    from cdc.control import Pending

Answer = dict[str, Any]
ChangesOf = Callable[[], Mapping[tuple[str, TableId], int]]
"""Per table, the position of the last merged change that is not our own write."""


class Promise:
    """An order and, later, its answer or error; filled by a serving thread, polled by the main loop."""

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


class _Desk:
    """What one thread works off: orders, and the jobs of one target."""

    def __init__(self, sink: Sink | None = None) -> None:
        self.orders: queue.SimpleQueue[Promise] = queue.SimpleQueue()
        self.sink = sink
        self.jobs: list[SyncJob] = []

    def step(self, changes: ChangesOf, should_stop: Callable[[], bool]) -> bool:
        """Work off orders, then run each job that is due; whether anything was done."""
        worked = False
        while not self.orders.empty():
            self.orders.get().keep()
            worked = True
        for job in self.jobs:
            worked |= bool(job.step(changes(), should_stop=should_stop))
        return worked


class Serving:
    """`steps` are for a thread each; `model_run`, `sync_order` and `settled` may be called from another."""

    def __init__(
        self, config: Config, state: State, store: ObjectStore, changes: ChangesOf, alert: Alert = lambda _: None
    ) -> None:
        self._config = config
        self._state = state
        self._store = store
        self._changes = changes
        self._alert = alert
        self._directory = config.state_dir / "serving"
        self._stopping = False
        self._turn = threading.Lock()
        self._models = _Desk()
        self._desks: dict[str, _Desk] = {}
        self._jobs: dict[str, tuple[_Desk, SyncJob]] = {}
        self.origins = tuple(t.origin or f"cdc_{name}" for name, t in config.targets.items())
        """Replication origins that our own writes carry."""
        self._make_jobs()

    def _make_jobs(self) -> None:
        config = self._config
        units: dict[tuple[str, str], list[str]] = {}
        for name, sync in config.syncs.items():
            units.setdefault((sync.target, f"group {sync.group}" if sync.group else f"sync {name}"), []).append(name)
        for (target, _), names in units.items():
            desk = self._desks.get(target)
            if desk is None:
                section = config.targets[target]
                desk = _Desk(registry.sink_kind(section.type)(section, partial(LakeLedger, self._store)))
                self._desks[target] = desk
            assert desk.sink is not None
            job = SyncJob(
                [config.syncs[name] for name in names], config.models, config.targets, desk.sink, self._state,
                self._store, self._directory, alert=self._alert, turn=self._turn,
            )  # fmt: skip
            desk.jobs.append(job)
            self._jobs.update(dict.fromkeys(names, (desk, job)))

    def steps(self) -> dict[str, Callable[[], bool]]:
        """What threads are to repeat, by the threads' names: one for models, and one per target."""
        desks = {"models": self._models, **{f"target {name}": desk for name, desk in self._desks.items()}}
        return {name: self._step_of(desk) for name, desk in desks.items()}

    def _step_of(self, desk: _Desk) -> Callable[[], bool]:
        return lambda: desk.step(self._changes, lambda: self._stopping)

    def model_run(self, args: Mapping[str, Any]) -> Pending:
        """Have a model run now."""
        name = str(args["name"])
        if name not in self._config.models:
            raise ConfigError(f"the running daemon has no model {name!r}", hint="restart it with this configuration")
        return _ordered(self._models, lambda: self._run_model(name))

    def sync_order(self, args: Mapping[str, Any]) -> Pending:
        """Have a sync do what is ordered (`name`, `kind`, `plan`, `yes`, `policy`: cdc.sync.Order)."""
        desk, job = self._job(args)
        order = Order(
            sync=str(args["name"]), kind=str(args["kind"]), plan=str(args.get("plan", "")),
            yes=bool(args.get("yes")), policy=str(args.get("policy", "report")),
        )  # fmt: skip
        return _ordered(desk, lambda: job.obey(order, self._changes(), should_stop=lambda: self._stopping).to_json())

    def sync_forget(self, args: Mapping[str, Any]) -> Pending:
        """Have a sync forget what was sent; nothing is sent."""
        desk, job = self._job(args)
        return _ordered(desk, lambda: {"forgotten": job.forget(str(args["name"]))})

    def _job(self, args: Mapping[str, Any]) -> tuple[_Desk, SyncJob]:
        name = str(args["name"])
        if name not in self._jobs:
            raise ConfigError(f"the running daemon has no sync {name!r}", hint="restart it with this configuration")
        return self._jobs[name]

    def settled(self) -> bool:
        """Whether no sync is due on the cuts as they are."""
        changes = self._changes()
        desks = [self._models, *self._desks.values()]
        return all(d.orders.empty() and all(job.is_settled(changes) for job in d.jobs) for d in desks)

    def stop(self) -> None:
        """Let running syncs end between two batches. Thread-safe."""
        self._stopping = True

    def close(self) -> None:
        """Close the targets' connections; after the threads have ended."""
        for desk in self._desks.values():
            if desk.sink is not None:
                desk.sink.close()

    def _run_model(self, name: str) -> Answer:
        model = self._config.models[name]
        known = known_tables(self._state)
        history = self._state.start_history("model", name, "ordered")
        began = time.monotonic()
        try:
            with self._turn:
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


def _ordered(desk: _Desk, work: Callable[[], Answer]) -> Pending:
    promise = Promise(work)
    desk.orders.put(promise)
    return promise
