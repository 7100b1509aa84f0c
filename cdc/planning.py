"""From a sync's definition to its plan: the inputs read once at one recorded cut, compared with the target.

The result is frozen in a Parquet file first, and everything after reads that file: never a live query. Writes nothing
but files in its folder. Also how the target differs from the result, where it can be read back (`drift`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdc import registry
from cdc.condition import held_fact
from cdc.config import Config
from cdc.config_serving import ModelConfig, SyncConfig, TargetConfig
from cdc.due import known_tables, last_fact
from cdc.errors import CdcError, ConfigError, ModelFailed, TargetRejected
from cdc.guarding import LastRun, trips
from cdc.held import held_folder
from cdc.lake.ledger import LakeLedger
from cdc.models import query, run_model
from cdc.plan import SAMPLES, Asked, Plan, key_of, load, make_plan
from cdc.ports import ObjectStore
from cdc.relations import MEMORY_LIMIT, THREADS, Sources, Versions
from cdc.sink import ACKS, DIFFERENT, INSERT, Acknowledged, Assignment, Batch, Comparing, Drift, Sink
from cdc.state import State
from cdc.table import TableId

_DRIFT_ROWS = 10_000


@dataclass(slots=True)
class Drifted:
    """How a target differs from a whole result."""

    missing: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    columns: Counter[str] = field(default_factory=Counter)

    def add(self, found: Sequence[Drift]) -> None:
        """Count these too."""
        for drift in found:
            (self.different if drift.kind == DIFFERENT else self.missing).append(drift.key)
            self.columns.update(drift.columns)

    def to_json(self) -> dict[str, Any]:
        """Counts, columns, and some keys."""
        return {
            "missing": len(self.missing), "different": len(self.different), "columns": dict(self.columns),
            "samples": {"missing": self.missing[:SAMPLES], "different": self.different[:SAMPLES]},
        }  # fmt: skip


def definition(sync: SyncConfig, model: ModelConfig | None) -> str:
    """The SELECT that a sync pushes; ConfigError if it names a model that is not there."""
    if sync.model and model is None:
        raise ConfigError(f"sync {sync.name}: there is no model {sync.model}", hint=f"write [model.{sync.model}]")
    return model.sql if model is not None else sync.sql


def assignment_of(sync: SyncConfig, target: TargetConfig, columns: Sequence[str]) -> Assignment:
    """What the sync writes where, when its result has these columns (by the target's names)."""
    request = sync.request
    return Assignment(
        sync=sync.name,
        table=sync.table or (f"{request.method} {request.path}" if request is not None else ""),
        key=sync.key,
        mode=sync.mode,
        place=" ".join(filter(None, (target.name, target.url))),
        columns=tuple(columns),
        keep=frozenset(sync.keep),
        fill=frozenset(sync.fill),
        request=request,
        delete_request=sync.delete_request,
    )


class Planner:
    """Plans of one sync, one at a time. `folder` is for its files, which may be lost. `turn` is held while a result is
    computed or compared."""

    def __init__(
        self,
        config: SyncConfig,
        target: TargetConfig,
        sql: str,
        sink: Sink,
        store: ObjectStore,
        folder: Path,
        *,
        turn: AbstractContextManager[Any] | None = None,
        memory_limit: str = MEMORY_LIMIT,
        threads: int = THREADS,
    ) -> None:
        self._config = config
        self._target = target
        self._sql = sql
        self._sink = sink
        self._store = store
        self._folder = folder
        self._turn = turn or nullcontext()
        self._limits: dict[str, Any] = {"memory_limit": memory_limit, "threads": threads, "temp_dir": folder}
        self._result = folder / "result.parquet"

    def freeze(self, sources: Sources, cuts: Versions) -> Assignment:
        """Read the result at `cuts` into a file, replacing the one before. Blocks; ModelFailed, StoreUnavailable."""
        config = self._config
        self._folder.mkdir(parents=True, exist_ok=True)
        key = [config.columns.get(c, c) for c in config.key]
        with self._turn:
            run_model(self._store, sources, self._sql, key, self._result, name=config.model, cut=cuts, **self._limits)
        return self.assignment(list(config.columns) or pq.read_schema(self._result).names)

    def assignment(self, columns: Sequence[str] = ()) -> Assignment:
        """The sync's, for a result with these columns (by default those that the configuration names)."""
        config = self._config
        return assignment_of(config, self._target, columns or list(config.columns) or config.key)

    def plan(self, assignment: Assignment, asked: Asked) -> tuple[Plan, Acknowledged]:
        """Compare the frozen result with what the target has acknowledged. Blocks; ModelFailed, TargetUnavailable,
        TargetRejected."""
        acknowledged = self._sink.acknowledged(assignment)
        folder = self._folder / "plan"
        mapping = self._config.columns or None
        with self._turn:
            made = make_plan(
                self._result, acknowledged.rows, assignment, folder, mapping=mapping, asked=asked, **self._limits
            )
        return made, replace(acknowledged, rows=ACKS.empty_table())

    def drift(self, assignment: Assignment) -> Drifted:
        """How the target differs from the frozen result. Blocks; TargetRejected if it cannot be read back."""
        if not isinstance(self._sink, Comparing):
            raise TargetRejected(
                f"the target of sync {self._config.name} cannot be read back, so nothing can be compared",
                hint=f"`cdc sync resync {self._config.name}` sends everything again",
            )
        found = Drifted()
        for part in self._sink.drift(assignment, self._whole(assignment)):
            found.add(part)
        return found

    def _whole(self, assignment: Assignment) -> Iterator[Batch]:
        """Every row of the frozen result that has a key of its own in it."""
        names = [self._config.columns.get(c, c) for c in assignment.columns]
        with pq.ParquetFile(self._result) as file:
            for read in file.iter_batches(batch_size=_DRIFT_ROWS, columns=names):
                rows = pa.Table.from_batches([read]).select(names).rename_columns(list(assignment.columns))
                keys = key_of(rows, assignment.key)
                whole = keys.is_valid()
                rows, keys = rows.filter(whole), keys.filter(whole)
                acks = pa.table([keys, pa.repeat("", len(keys)), pa.nulls(len(keys), pa.int64())], schema=ACKS)
                yield Batch(assignment=assignment, action=INSERT, rows=rows, acks=acks)

    def clear(self) -> None:
        """Delete its files, but for what was moved away."""
        for path in self._folder.glob("result.parquet*"):
            path.unlink(missing_ok=True)
        for path in self._folder.glob("plan*"):
            shutil.rmtree(path, ignore_errors=True)


def plan_now(
    config: Config, store: ObjectStore, sources: Sources, name: str, *, values: bool = False
) -> dict[str, Any]:
    """What an apply of the sync `name` would write now, for `cdc sync plan`; with `values`, samples show new values.

    Reads at the last recorded cuts, without them the newest versions; needs no daemon. Changes nothing anywhere.
    """
    section = config.syncs[name]
    sql = definition(section, config.models.get(section.model))
    target = config.targets[section.target]
    cuts: dict[str, dict[TableId, int]] = {}
    last: dict[str, Any] = {}
    generation = 0
    with _looked_into(config) as state:
        if state is not None:
            cuts = cut_versions(state, set(sources))
            last = state.get(last_fact(name)) or {}
            generation = int(state.get(generation_fact(name)) or 0)
    sink = registry.sink_kind(target.type)(target, partial(LakeLedger, store))
    try:
        with tempfile.TemporaryDirectory(prefix="cdc-plan-") as folder:
            planner = Planner(section, target, sql, sink, store, Path(folder))
            assignment = planner.freeze(sources, cuts)
            plan, acknowledged = planner.plan(assignment, Asked(generation=generation))
            found = trips(section.guard, plan.counts, remembered(last), acknowledged.shape)
            return {
                "sync": name, "target": section.target, "table": section.place, "mode": section.mode,
                **plan.to_json(values=values), "held_by": [asdict(t) for t in found],
            }  # fmt: skip
    finally:
        sink.close()


def plan_held(config: Config, name: str, *, values: bool = False) -> dict[str, Any]:
    """The plan of the sync `name` that waits for approval, as `plan_now` tells plans; ModelFailed if none does."""
    section = config.syncs[name]
    with _looked_into(config) as state:
        fact = state.get(held_fact(name)) if state is not None else None
    if fact is None:
        raise ModelFailed(f"no plan of sync {name} is held", hint=f"`cdc sync plan {name}` shows one of now")
    assignment = assignment_of(section, config.targets[section.target], list(section.columns) or section.key)
    plan = load(held_folder(config.state_dir / "serving", name), assignment)
    return {
        "sync": name, "target": section.target, "table": section.place, "mode": section.mode,
        **plan.to_json(values=values), "held_by": fact["held_by"],
    }  # fmt: skip


def result_columns(config: Config, sync: SyncConfig, store: ObjectStore) -> list[str]:
    """Columns that the sync pushes, by the target's names; empty as long as the lake does not have what it reads."""
    with _looked_into(config) as state:
        if sync.columns or state is None:
            return list(sync.columns)
        sources = known_tables(state)
        sql = definition(sync, config.models.get(sync.model))
        try:
            found = query(store, sources, f"SELECT * FROM ({sql}) LIMIT 0", cut=cut_versions(state, set(sources)))
        except CdcError:
            return []
        return list(found.schema.names)


@contextmanager
def _looked_into(config: Config) -> Iterator[State | None]:
    """The state, to read from beside a daemon; None if there is none yet."""
    if not config.state_path.is_file():
        yield None
        return
    state = State(config.state_path, create=False, readonly=True)
    try:
        yield state
    finally:
        state.close()


def remembered(last: Mapping[str, Any]) -> LastRun:
    """What the guard knows of the last run, by its fact."""
    return LastRun(
        written=last.get("written", 0), rejected=last.get("rejected", 0), rows=last.get("rows", 0),
        shape=last.get("shape", ""),
    )  # fmt: skip


def generation_fact(sync: str) -> str:
    """Key of the fact that counts the resyncs that were ordered."""
    return f"sync/{sync}/generation"


def cut_versions(state: State, sources: Collection[str]) -> dict[str, dict[TableId, int]]:
    """The recorded cuts of these sources, as `current` versions."""
    cuts = {source: state.cut(source) for source in sources}
    return {source: dict(cut.versions) for source, cut in cuts.items() if cut is not None}
