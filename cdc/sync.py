"""A sync: a model's result pushed into a target, as the difference to what the target has acknowledged.

One run: read the inputs at one recorded cut → freeze the result → plan → write in batches, each acknowledged in the
target's own transaction. State moves only by those acknowledgements, so a run that dies anywhere is continued by the
next: what was acknowledged is unchanged then, the rest is planned again. A run changes nothing in the lake.

When: on `every_s`, or when others have changed an input. Changes under our own replication origin do not count, so a
sync that writes into a table that its own model reads comes to rest: its write is captured, merged, and starts
nothing. An unchanged result writes nothing, whatever started the run.

Deliberately not here: deletes, guards and approvals; rows of the target that others changed are not looked at.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdc import registry
from cdc.config import Config
from cdc.config_serving import ModelConfig, SyncConfig
from cdc.errors import CdcError, ConfigError, ModelFailed, Verdict
from cdc.metrics import SYNC_ROWS, SYNC_RUNS, SYNC_SECONDS
from cdc.models import run_model
from cdc.plan import Plan, make_plan
from cdc.ports import ObjectStore, Sink
from cdc.relations import MEMORY_LIMIT, THREADS, Sources, Versions, named_relations, resolve
from cdc.state import State
from cdc.table import TableId

_log = logging.getLogger(__name__)

FIRST, CHANGED, SCHEDULE, RESTART, REDEFINED = "first run", "data", "schedule", "restart", "new definition"
DONE, PARTIAL, FAILED, STOPPED, INTERRUPTED = "done", "partial", "failed", "stopped", "interrupted"
"""Outcomes. partial: rows were held or rejected, the others went through. stopped: between two batches, on shutdown.
interrupted: the daemon died in it. Whatever was acknowledged stays, and the next run does the rest."""

_RETRY_FIRST_S, _RETRY_MAX_S = 1.0, 60.0
_REASONS_SHOWN, _KEYS_SHOWN = 3, 3

Input = tuple[str, TableId]
"""A source's name and one of its tables."""
ChangedByOthers = Mapping[Input, int]
"""Per input, the commit LSN of the last merged change that did not come from one of our own origins; tables that
others have not changed since the daemon started may be missing. It may run ahead of the recorded cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncRun:
    """What one run did. `counts`: inserts, updates, unchanged, held, gone, written, rejected."""

    sync: str
    cause: str
    outcome: str
    plan: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    rejected: tuple[tuple[str, str], ...] = ()
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """For operators: counts, keys and reasons; never values."""
        return {
            "sync": self.sync,
            "cause": self.cause,
            "outcome": self.outcome,
            "plan": self.plan,
            "counts": self.counts,
            "error": self.error,
        }


class SyncJob:
    """One configured sync inside the daemon; used by one thread. `sink` may be shared with other syncs of its target.

    `directory` is for frozen results and plans, which may be lost; leftovers of a killed run are removed.
    """

    def __init__(
        self,
        config: SyncConfig,
        sink: Sink,
        state: State,
        store: ObjectStore,
        directory: Path,
        *,
        model: ModelConfig | None = None,
        memory_limit: str = MEMORY_LIMIT,
        threads: int = THREADS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.name = config.name
        self._sql = definition(config, model)
        self._sink = sink
        self._state = state
        self._store = store
        self._directory = directory / config.name
        self._limits: dict[str, Any] = {"memory_limit": memory_limit, "threads": threads}
        self._clock = clock
        self._inputs: frozenset[Input] | None = None
        self._seen: dict[str, int] | None = None
        self._due_since: float | None = None
        self._retry_at = 0.0
        self._retry_s = _RETRY_FIRST_S
        self.blocked = ""
        """Why it does not run by itself any more: an error that only the operator can mend."""
        for file in self._directory.glob("*.parquet*"):
            file.unlink()
        for entry in state.history("sync", self.name, limit=1):
            if entry.outcome == "running":
                state.finish_history(entry.id, INTERRUPTED, error="the daemon died in this run")

    def step(
        self,
        changed_by_others: ChangedByOthers,
        *,
        force: str = "",
        should_stop: Callable[[], bool] = lambda: False,
    ) -> SyncRun | None:
        """Run if it is due, or for the cause `force` if its inputs are complete; None if there was nothing to do.

        Blocks for the whole run; `should_stop` is asked between batches. An error of the model or the target is the
        run's outcome, not raised: RETRY is tried again after a growing pause, OPERATOR blocks the sync until it is
        forced or the daemon starts anew. FATAL errors are raised. Forced with incomplete inputs: ModelFailed.
        """
        if force:
            self._require_complete()
            return self._run(force, changed_by_others, should_stop)
        if self.blocked or self._is_paused() or self._clock() < self._retry_at:
            return None
        try:
            if self.waiting_for():
                return None
            cause = self._cause(changed_by_others)
        except ModelFailed as error:
            return self._failed(error, RESTART, None)
        if cause == CHANGED and not self._debounced():
            return None
        return self._run(cause, changed_by_others, should_stop) if cause else None

    def waiting_for(self) -> list[str]:
        """What is missing before it can run, in words; empty if every input is complete and stands in a cut."""
        inputs = self.inputs()
        if inputs is None:
            names = sorted(f"{schema}.{name}" for schema, name in named_relations(self._sql))
            return [f"not all of {', '.join(names)} are in the lake yet"]
        missing = []
        for source, table in sorted(inputs):
            state = self._state.table(source, table).state
            cut = self._state.cut(source)
            if state != "streaming":
                missing.append(f"{source}.{table} is {state}")
            elif cut is None or table not in cut.versions:
                missing.append(f"{source}.{table} is not merged yet")
        return missing

    def is_settled(self, changed_by_others: ChangedByOthers) -> bool:
        """Whether no run is due on the cuts as they are (a blocked, paused or retrying sync is not waited for)."""
        if self.blocked or self._is_paused() or self._clock() < self._retry_at:
            return True
        return bool(self.waiting_for()) or self._cause(changed_by_others) is None

    def inputs(self) -> frozenset[Input] | None:
        """The tables that its SQL reads; None as long as one of them is unknown. ModelFailed if the SQL is wrong."""
        if self._inputs is None:
            relations, unknown = resolve(named_relations(self._sql), self._sources())
            if unknown:
                return None
            self._inputs = frozenset((r.source, r.table) for r in relations)
        return self._inputs

    # ---- when ----

    def _cause(self, changed_by_others: ChangedByOthers) -> str | None:
        last = self._state.get(self._fact)
        if last is None:
            return FIRST
        if last["definition"] != self._fingerprint():
            return REDEFINED
        if self.config.every_s is not None:
            # Wall clock, so that it holds over a restart; a clock that was set back must not silence the sync.
            age_s = time.time() - last["started_at"]
            return SCHEDULE if age_s >= self.config.every_s or age_s < 0 else None
        now = self._positions(changed_by_others)
        if self._seen is None:
            if last["cuts"] != self._cut_lsns():
                # What others changed before we started is not known; one run too many writes nothing.
                return RESTART
            self._seen = now
        return CHANGED if self._seen != now else None

    def _debounced(self) -> bool:
        """Whether the change is old enough; a change that follows does not put the run off any further."""
        now = self._clock()
        if self._due_since is None:
            self._due_since = now
        return now - self._due_since >= self.config.debounce_s

    def _positions(self, changed_by_others: ChangedByOthers) -> dict[str, int]:
        """What others have changed, as far as the cuts hold it."""
        cuts = self._cut_lsns()
        return {
            f"{source}.{table}": min(changed_by_others[source, table], cuts[source])
            for source, table in sorted(self.inputs() or ())
            if (source, table) in changed_by_others
        }

    def _cut_lsns(self) -> dict[str, int]:
        cuts = {source: self._state.cut(source) for source in sorted({source for source, _ in self.inputs() or ()})}
        return {source: cut.lsn for source, cut in cuts.items() if cut is not None}

    def _is_paused(self) -> bool:
        return self._state.is_paused("sync", self.name) or self._state.is_paused("sink", self.config.target)

    def _require_complete(self) -> None:
        missing = self.waiting_for()
        if missing:
            raise ModelFailed(
                f"sync {self.name} cannot run: {'; '.join(missing)}",
                hint="`cdc status` shows how far the snapshots are",
            )

    # ---- running ----

    def _run(self, cause: str, changed_by_others: ChangedByOthers, should_stop: Callable[[], bool]) -> SyncRun:
        """One run, recorded in the history from its begin to its end."""
        self._due_since = None
        started, began = time.time(), self._clock()
        history = self._state.start_history("sync", self.name, cause)
        _log.info("sync run began", extra={"sync": self.name, "cause": cause})
        cuts = self._cuts()
        seen = self._positions(changed_by_others)
        last = {"definition": self._fingerprint(), "started_at": started, "cuts": self._cut_lsns()}
        try:
            run = self._push(cause, cuts, should_stop)
        except CdcError as error:
            return self._failed(error, cause, history)
        finally:
            for file in self._directory.glob("*.parquet*"):
                file.unlink(missing_ok=True)
        if run.outcome != STOPPED:
            self._state.set(self._fact, last)
            self._seen = seen
        self.blocked, self._retry_at, self._retry_s = "", 0.0, _RETRY_FIRST_S
        counts: dict[str, Any] = {**run.counts, "plan": run.plan}
        self._state.finish_history(history, run.outcome, counts=counts, error=run.error)
        self._count(run, self._clock() - began)
        return run

    def _push(self, cause: str, cuts: Versions, should_stop: Callable[[], bool]) -> SyncRun:
        plan = plan_sync(
            self.config, self._sql, self._sink, self._store, self._sources(), cuts, self._directory, **self._limits
        )
        written, stopped = 0, False
        rejected: list[tuple[str, str]] = []
        for rows, acks in plan.batches(self.config.batch_rows):
            if should_stop():
                stopped = True
                break
            pushed = self._sink.upsert(self.name, self.config.table, self.config.key, rows, acks)
            written += pushed.written
            rejected += pushed.rejected
        held = plan.counts.held
        outcome = STOPPED if stopped else PARTIAL if held or rejected else DONE
        return SyncRun(
            sync=self.name,
            cause=cause,
            outcome=outcome,
            plan=plan.id,
            counts={**plan.counts.to_json(), "written": written, "rejected": len(rejected)},
            rejected=tuple(rejected),
            error="; ".join(filter(None, [_held_text(held, plan.held), _rejected_text(rejected)])),
        )

    def _failed(self, error: CdcError, cause: str, history: int | None) -> SyncRun:
        """Record the failure and decide when it runs again; raises if the error is FATAL."""
        if history is None:
            history = self._state.start_history("sync", self.name, cause)
        self._state.finish_history(history, FAILED, error=str(error))
        SYNC_RUNS.labels(self.name, FAILED).inc()
        _log.warning("sync run failed", extra={"sync": self.name, "cause": cause, "error": str(error)})
        if error.verdict is Verdict.FATAL:
            raise error
        if error.verdict is Verdict.OPERATOR:
            self.blocked = str(error)
        else:
            self._retry_at = self._clock() + self._retry_s
            self._retry_s = min(self._retry_s * 2, _RETRY_MAX_S)
        return SyncRun(sync=self.name, cause=cause, outcome=FAILED, error=str(error))

    def _count(self, run: SyncRun, seconds: float) -> None:
        SYNC_RUNS.labels(self.name, run.outcome).inc()
        SYNC_SECONDS.labels(self.name).observe(seconds)
        for outcome in ("written", "rejected", "held", "unchanged"):
            SYNC_ROWS.labels(self.name, outcome).inc(run.counts[outcome])
        extra = {"sync": self.name, "cause": run.cause, "outcome": run.outcome, "plan": run.plan, **run.counts}
        _log.info("sync run ended", extra=extra)

    # ---- facts ----

    @property
    def _fact(self) -> str:
        return f"sync/{self.name}/last"

    def _fingerprint(self) -> str:
        """Changes when the sync is defined anew."""
        config = self.config
        content = [self._sql, config.target, config.table, list(config.key), config.mode]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def _sources(self) -> dict[str, list[TableId]]:
        found: dict[str, list[TableId]] = {}
        for table in self._state.tables():
            if table.state != "removed":
                found.setdefault(table.source, []).append(table.table)
        return found

    def _cuts(self) -> dict[str, dict[TableId, int]]:
        return cut_versions(self._state, {source for source, _ in self.inputs() or ()})


def definition(sync: SyncConfig, model: ModelConfig | None) -> str:
    """The SELECT that a sync pushes; ConfigError if it names a model that is not there, or a mode that is not built."""
    if sync.mode != "upsert":
        raise ConfigError(f'sync {sync.name}: mode "{sync.mode}" is not supported yet', hint='mode = "upsert"')
    if sync.model and model is None:
        raise ConfigError(f"sync {sync.name}: there is no model {sync.model}", hint=f"write [model.{sync.model}]")
    return model.sql if model is not None else sync.sql


def plan_sync(
    config: SyncConfig,
    sql: str,
    sink: Sink,
    store: ObjectStore,
    sources: Sources,
    cuts: Versions,
    directory: Path,
    *,
    memory_limit: str = MEMORY_LIMIT,
    threads: int = THREADS,
) -> Plan:
    """Freeze the result at `cuts` into `directory` and compare it with what the target has acknowledged.

    Writes nothing but files in `directory`. Blocks; ModelFailed, StoreUnavailable, TargetUnavailable, TargetRejected.
    """
    result = directory / "result.parquet"
    limits: dict[str, Any] = {"memory_limit": memory_limit, "threads": threads, "temp_dir": directory}
    run_model(store, sources, sql, config.key, result, name=config.model, cut=cuts, **limits)
    acknowledged = sink.acknowledged(config.name)
    return make_plan(result, acknowledged, config.key, directory / "plan.parquet", table=config.table, **limits)


def plan_now(config: Config, store: ObjectStore, sources: Sources, name: str) -> dict[str, Any]:
    """What an apply of the sync `name` would write now, for `cdc sync plan`: counts and keys, never values.

    Reads at the last recorded cuts, without them the newest versions; needs no daemon. Changes nothing anywhere.
    """
    section = config.syncs[name]
    sql = definition(section, config.models.get(section.model))
    target = config.targets[section.target]
    cuts: dict[str, dict[TableId, int]] = {}
    if config.state_path.is_file():
        state = State(config.state_path, create=False, readonly=True)
        try:
            cuts = cut_versions(state, set(sources))
        finally:
            state.close()
    sink = registry.sink_kind(target.type)(target)
    try:
        with tempfile.TemporaryDirectory(prefix="cdc-plan-") as folder:
            plan = plan_sync(section, sql, sink, store, sources, cuts, Path(folder))
            return {"sync": name, "target": section.target, "table": section.table, **plan.to_json()}
    finally:
        sink.close()


def cut_versions(state: State, sources: Collection[str]) -> dict[str, dict[TableId, int]]:
    """The recorded cuts of these sources, as `current` versions."""
    cuts = {source: state.cut(source) for source in sources}
    return {source: dict(cut.versions) for source, cut in cuts.items() if cut is not None}


def _held_text(held: int, samples: tuple[tuple[str, str], ...]) -> str:
    if not held:
        return ""
    shown = ", ".join(f"{key} ({reason})" for key, reason in samples[:_KEYS_SHOWN])
    return f"{held} rows held: {shown}{', …' if len(samples) > _KEYS_SHOWN else ''}"


def _rejected_text(rejected: list[tuple[str, str]]) -> str:
    """By reason: how many, and some of their keys."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in rejected:
        by_reason.setdefault(reason, []).append(key)
    parts = []
    for reason, keys in sorted(by_reason.items(), key=lambda item: -len(item[1]))[:_REASONS_SHOWN]:
        more = ", …" if len(keys) > _KEYS_SHOWN else ""
        parts.append(f"{len(keys)} rows rejected by the target: {reason}: {', '.join(keys[:_KEYS_SHOWN])}{more}")
    return "; ".join(parts)
