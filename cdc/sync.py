"""A sync: a model's result pushed into a target, as the difference to what the target has acknowledged.

One run: read the inputs at one recorded cut → freeze the result → plan → guard → write in batches, each acknowledged
with its effect. State moves only by those acknowledgements, so a run that dies anywhere is continued by the next: what
was acknowledged is unchanged then, the rest is planned again. A run changes nothing in the lake's tables.

A plan over a limit of the guard is held: its files stay as they are until it is approved, and exactly they are then
sent. Runs go on meanwhile; one whose plan is within the limits replaces what is held. Syncs of one group are one job:
planned at the same cuts, held together, written in one transaction.

When a run is due is in cdc.due; what is planned in cdc.plan; how it is sent in cdc.applying. Rows of the target that
others changed are looked at by `reconcile` only.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from cdc import rowlog
from cdc.applying import Work, apply, apply_together
from cdc.condition import BLOCKED, FINE, HELD, PARTIAL, Alert, Condition, held_fact
from cdc.config_serving import ModelConfig, SyncConfig
from cdc.due import CHANGED, RESTART, ChangedByOthers, Due, known_tables, last_fact, require_complete
from cdc.errors import CdcError, ConfigError, ModelFailed, Verdict
from cdc.guarding import Trip, trips
from cdc.metrics import SYNC_ROWS, SYNC_RUNS, SYNC_SECONDS
from cdc.plan import Asked, Plan, load
from cdc.planning import Planner, assignment_of, cut_versions, definition, generation_fact, remembered
from cdc.ports import ObjectStore
from cdc.sink import Rejected, Sink
from cdc.state import State
from cdc.units import duration_s

_log = logging.getLogger(__name__)

DONE, STOPPED, INTERRUPTED, FAILED = "done", "stopped", "interrupted", "failed"
REPORTED, UNCONFIRMED = "reported", "unconfirmed"
"""Outcomes beside `partial` and `held`, which are conditions too. partial: rows were held or rejected, the others went
through. held: a guard holds the plan, nothing was sent. stopped: between two batches, on shutdown. interrupted: the
daemon died in it. reported: a reconcile that only looked. unconfirmed: it would delete, and nobody said --yes."""
APPLY, APPROVE, RETRY, RESYNC, RECONCILE = "apply", "approve", "retry", "resync", "reconcile"
REPORT, SOURCE, TARGET = "report", "source", "target"
"""Policies of a reconcile: look only; the source wins; the target wins."""

_RETRY_FIRST_S, _RETRY_MAX_S = 1.0, 60.0
_REASONS_SHOWN, _KEYS_SHOWN = 3, 3
_TIDY_EVERY_S = 3_600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What an operator wants of a sync."""

    kind: str = APPLY
    sync: str
    plan: str = ""
    """Of an approval."""
    yes: bool = False
    policy: str = REPORT


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncRun:
    """What one run did. `counts`: those of the plan, and written, deleted, rejected, absent."""

    sync: str
    cause: str
    outcome: str
    run: str = ""
    plan: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    trips: tuple[Trip, ...] = ()
    drift: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """For operators: counts, keys and reasons; never values."""
        return {
            "sync": self.sync, "run": self.run, "cause": self.cause, "outcome": self.outcome, "plan": self.plan,
            "counts": self.counts, "held_by": [{"limit": t.limit, "text": t.text} for t in self.trips],
            "drift": self.drift, "error": self.error,
        }  # fmt: skip


class _Member:
    """One sync of a job."""

    def __init__(self, config: SyncConfig, planner: Planner, due: Due, condition: Condition, folder: Path) -> None:
        self.config, self.planner, self.due, self.condition = config, planner, due, condition
        self.name = config.name
        self.held, self.rows = folder / "held", folder / "rows"


@dataclass(slots=True)
class _Step:
    """A member's part of one run."""

    member: _Member
    run: str
    history: int
    plan: Plan | None = None
    trips: list[Trip] = field(default_factory=list)
    work: Work | None = None


class SyncJob:
    """One configured sync inside the daemon, or the syncs of one group; used by one thread. `sink` may be shared with
    other jobs of its target.

    `directory` is for frozen results, plans and row logs; but for held plans it may be lost; leftovers of a killed run
    are removed.
    """

    def __init__(
        self,
        configs: Sequence[SyncConfig],
        models: Mapping[str, ModelConfig],
        sink: Sink,
        state: State,
        store: ObjectStore,
        directory: Path,
        *,
        alert: Alert = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        **limits: Any,
    ) -> None:
        self._sink = sink
        self._state = state
        self._store = store
        self._clock = clock
        self._alert = alert
        self._members: list[_Member] = []
        for config in configs:
            sql = definition(config, models.get(config.model))
            folder = directory / config.name
            planner = Planner(config, sql, sink, store, folder, **limits)
            due = Due(config, sql, state, clock)
            self._members.append(_Member(config, planner, due, Condition(config.name, state, alert), folder))
        self._retry_at = 0.0
        self._retry_s = _RETRY_FIRST_S
        self._tidied: dict[str, float] = {}
        self.blocked = ""
        """Why it does not run by itself any more: an error that only the operator can mend."""
        for member in self._members:
            self._recover(member)

    def _recover(self, member: _Member) -> None:
        """After a start: what a killed run left."""
        member.planner.clear()
        if not member.held.is_dir():
            self._state.set(held_fact(member.name), None)
        rowlog.upload(self._store, member.name, member.rows)
        for entry in self._state.history("sync", member.name, limit=1):
            if entry.outcome == "running":
                self._state.finish_history(entry.id, INTERRUPTED, error="the daemon died in this run")

    # ---- when ----

    def step(
        self, changed_by_others: ChangedByOthers, *, should_stop: Callable[[], bool] = lambda: False
    ) -> list[SyncRun]:
        """Run if it is due; empty if there was nothing to do. Blocks for the whole run; `should_stop` is asked between
        batches. An error of a model or the target is the run's outcome, not raised: RETRY is tried again after a
        growing pause, OPERATOR blocks the job until it is ordered or the daemon starts anew. FATAL errors are raised.
        """
        if self._rests():
            return []
        try:
            if self._is_approved():
                return self._send_approved(should_stop)
            if self.waiting_for():
                return []
            causes = {m.name: m.due.cause(changed_by_others) for m in self._members}
        except ModelFailed as error:
            return self._failed(error, RESTART, [])
        found = next((c for c in causes.values() if c and c != CHANGED), None)
        if found is None and any(causes[m.name] and m.due.debounced() for m in self._members):
            found = CHANGED
        return self._run(found, changed_by_others, should_stop) if found else []

    def waiting_for(self) -> list[str]:
        """What is missing before it runs by itself, in words; empty if nothing is."""
        return [text for m in self._members for text in (*m.due.incomplete(), *m.due.lagging())]

    def is_settled(self, changed_by_others: ChangedByOthers) -> bool:
        """Whether no run is due on the cuts as they are (a blocked, paused or retrying sync is not waited for)."""
        if self._rests() or self.waiting_for():
            return True
        return all(m.due.cause(changed_by_others) is None for m in self._members)

    def _rests(self) -> bool:
        paused = any(
            self._state.is_paused("sync", m.name) or self._state.is_paused("sink", m.config.target)
            for m in self._members
        )
        return bool(self.blocked) or paused or self._clock() < self._retry_at

    # ---- orders ----

    def obey(
        self, order: Order, changed_by_others: ChangedByOthers, *, should_stop: Callable[[], bool] = lambda: False
    ) -> SyncRun:
        """Do what an operator orders, also while the sync is paused or blocked. ModelFailed if its inputs are not
        complete; another error is the run's outcome."""
        member = self._member(order.sync)
        for each in self._members:
            require_complete(each.name, each.due)
        if order.kind == RESYNC and member.config.mode == "insert":
            raise ConfigError(
                f"sync {member.name} only inserts, so what the target has cannot be sent to it again",
                hint=f"`cdc sync reset-state {member.name}` forgets what was sent",
            )
        if order.kind == APPROVE and self._approve(member, order.plan):
            runs = self._send_approved(should_stop) if self._is_approved() else [self._still_held(member)]
        else:
            cause = "ordered" if order.kind == APPLY else order.kind
            alone = [member] if order.kind in (RETRY, RESYNC, RECONCILE) else self._members
            runs = self._run(cause, changed_by_others, should_stop, order, alone)
        return next(r for r in runs if r.sync == member.name)

    def forget(self, sync: str) -> int:
        """Forget what was sent, and a held plan with it; how many acknowledgements there were. Sends nothing."""
        member = self._member(sync)
        self._drop_held()
        return self._sink.forget(assignment_of(member.config, list(member.config.columns) or member.config.key))

    def _member(self, sync: str) -> _Member:
        return next(m for m in self._members if m.name == sync)

    # ---- running ----

    def _run(
        self,
        cause: str,
        changed_by_others: ChangedByOthers,
        should_stop: Callable[[], bool],
        order: Order | None = None,
        members: Sequence[_Member] | None = None,
    ) -> list[SyncRun]:
        """One run, recorded in the history from its begin to its end."""
        steps: list[_Step] = []
        began = self._clock()
        try:
            for member in members or self._members:
                member.due.begins()
                steps.append(self._begin(member, cause))
            for step in steps:
                self._plan(step, cause, changed_by_others, order)
            early = self._unasked(steps, cause, order) or self._hold(steps, cause, order)
            return early or self._apply(steps, cause, should_stop, began)
        except CdcError as error:
            return self._failed(error, cause, steps)
        finally:
            for step in steps:
                step.member.planner.clear()

    def _begin(self, member: _Member, cause: str) -> _Step:
        run = rowlog.new_run_id(time.time())
        _log.info("sync run began", extra={"sync": member.name, "cause": cause, "run": run})
        return _Step(member, run, self._state.start_history("sync", member.name, cause))

    def _plan(self, step: _Step, cause: str, changed: ChangedByOthers, order: Order | None) -> None:
        member, state = step.member, self._state
        cuts, lsns = cut_versions(state, {s for s, _ in member.due.inputs() or ()}), member.due.cut_lsns()
        before = state.get(last_fact(member.name)) or {}
        about: dict[str, Any] = {
            "sync": member.name, "cause": cause, "model": member.config.model,
            "definition": member.due.fingerprint(),
            "inputs": {
                source: {"lsn": lsns[source], "versions": {str(t): v for t, v in tables.items()}}
                for source, tables in cuts.items()
            },
            "last": {"definition": member.due.fingerprint(), "started_at": time.time(), "cuts": lsns},
            "positions": member.due.positions(changed),
        }  # fmt: skip
        assignment = member.planner.freeze(known_tables(state), cuts)
        asked = Asked(generation=int(state.get(generation_fact(member.name)) or 0), about=about)
        if order is not None and order.kind == RESYNC:
            asked = replace(asked, resync=True)
        elif order is not None and order.kind == RETRY:
            asked = replace(asked, only=self._rejected_keys(member, before))
        elif order is not None and order.kind == RECONCILE:
            drift = member.planner.drift(assignment)
            about["drift"] = drift.to_json()
            adopts = order.policy == TARGET
            keys = {REPORT: [], SOURCE: [*drift.missing, *drift.different], TARGET: drift.different}[order.policy]
            only = pa.chunked_array([pa.array(keys, pa.string())])
            asked = replace(asked, only=only, again=not adopts, adopt=adopts)
        about["kind"] = order.kind if order is not None else APPLY
        step.plan, acknowledged = member.planner.plan(assignment, asked)
        step.plan.about.update(shape=acknowledged.shape, last_run=acknowledged.last_run)
        step.trips = trips(member.config.guard, step.plan.counts, remembered(before), acknowledged.shape)
        if order is not None and order.kind == RETRY:
            step.trips = [t for t in step.trips if t.limit != "max_reject_share"]
        self._look_back(member, before.get("acked_run"), acknowledged.last_run)

    def _rejected_keys(self, member: _Member, before: Mapping[str, Any]) -> pa.ChunkedArray:
        rowlog.upload(self._store, member.name, member.rows)
        return rowlog.rejected_keys(self._store, member.name, str(before.get("run", "")))

    def _look_back(self, member: _Member, expected: str | None, found: str | None) -> None:
        """A target that was restored from its backup has the acknowledgements of that backup. The plan is right all the
        same, but somebody should know why so much is sent. Runs' names sort by time; a later one than expected is of a
        run that failed."""
        if found is None or not expected or found >= expected:
            return
        text = f"the target stands at run {found or 'none'}, not at the last one, {expected}: was it restored?"
        hint = f"what it lacks is sent again; `cdc sync reconcile {member.name}` compares its rows too"
        _log.warning(text, extra={"sync": member.name, "hint": hint})
        self._alert({"alert": "sync", "sync": member.name, "condition": "target went back", "text": text, "hint": hint})

    def _unasked(self, steps: Sequence[_Step], cause: str, order: Order | None) -> list[SyncRun]:
        """The end of a run that is not to write: a reconcile that only looks, a delete that nobody confirmed, an
        approval of another plan. Empty if it goes on."""
        if order is None:
            return []
        outcome, text = "", ""
        for step in steps:
            assert step.plan is not None
            if order.kind == RECONCILE and order.policy == REPORT:
                outcome = REPORTED
            elif order.kind == RESYNC and step.plan.counts.deletes and not order.yes:
                outcome = UNCONFIRMED
                text = f"it deletes {step.plan.counts.deletes} rows too: say --yes"
            elif order.kind == APPROVE and step.member.name == order.sync and step.plan.id != order.plan:
                outcome = UNCONFIRMED
                text = f"the plan is another one by now, {step.plan.id}: look at it with `cdc sync plan {order.sync}`"
        return [self._ended(s, cause, outcome, error=text) for s in steps] if outcome else []

    # ---- holding ----

    def _hold(self, steps: Sequence[_Step], cause: str, order: Order | None) -> list[SyncRun]:
        """Keep the plans and send nothing, if one of them is over a limit; empty if they may go."""
        approved = order.plan if order is not None and order.kind == APPROVE else ""
        over = [s for s in steps if s.trips and s.plan is not None and s.plan.id != approved]
        if not over:
            return []
        for step in steps:
            member, plan = step.member, step.plan
            assert plan is not None
            before = self._state.get(last_fact(member.name)) or {}
            member.due.ran(plan.about["positions"], {**before, **plan.about["last"]})
            kept = self._state.get(held_fact(member.name))
            if kept is not None and member.held.is_dir() and order is None:
                # Whoever was called in the night finds the plan that the alert named.
                continue
            step.plan = plan.moved(member.held)
            held = {
                "plan": plan.id, "since": time.time(), "counts": asdict(plan.counts),
                "held_by": [asdict(t) for t in step.trips], "approved": not step.trips,
            }  # fmt: skip
            self._state.set(held_fact(member.name), held)
            if step.trips:
                text = "; ".join(t.text for t in step.trips)
                hint = f"`cdc sync plan {member.name}` shows it; `cdc sync approve {member.name} {plan.id}` sends it"
                member.condition.be(HELD, text, hint, again=kept is not None and kept["plan"] != plan.id)
        return [self._ended(s, cause, HELD, error=self._why_held(s)) for s in steps]

    def _why_held(self, step: _Step) -> str:
        held = self._state.get(held_fact(step.member.name))
        texts = [t.text for t in step.trips]
        if held is not None and step.plan is not None and held["plan"] != step.plan.id:
            texts.append(f"plan {held['plan']} waits for approval")
        return "; ".join(texts)

    def _approve(self, member: _Member, plan: str) -> bool:
        """Whether that plan is the one that is held; it is approved then."""
        held = self._state.get(held_fact(member.name))
        if held is None or held["plan"] != plan or not member.held.is_dir():
            return False
        self._state.set(held_fact(member.name), {**held, "approved": True})
        return True

    def _is_approved(self) -> bool:
        held = [self._state.get(held_fact(m.name)) for m in self._members]
        return any(held) and all(h is not None and h["approved"] for h in held)

    def _still_held(self, member: _Member) -> SyncRun:
        waiting = [m.name for m in self._members if not (self._state.get(held_fact(m.name)) or {}).get("approved")]
        return SyncRun(
            sync=member.name, cause=APPROVE, outcome=HELD, error=f"its group waits for approval of {', '.join(waiting)}"
        )

    def _send_approved(self, should_stop: Callable[[], bool]) -> list[SyncRun]:
        """Send the plans that were held, as they are: what was acknowledged meanwhile is left out."""
        steps = [self._begin(m, "approved") for m in self._members]
        began = self._clock()
        try:
            for step in steps:
                config = step.member.config
                held = load(step.member.held, assignment_of(config, list(config.columns) or config.key))
                step.plan = held
                acknowledged = self._sink.acknowledged(held.assignment)
                step.work = Work(config, held, step.run, self._row_log(step), known=acknowledged.rows)
            return self._apply(steps, "approved", should_stop, began)
        except CdcError as error:
            if isinstance(error, ModelFailed):
                self._drop_held()
            return self._failed(error, "approved", steps)

    def _drop_held(self) -> None:
        for member in self._members:
            if self._state.get(held_fact(member.name)) is not None:
                self._state.set(held_fact(member.name), None)
            shutil.rmtree(member.held, ignore_errors=True)

    # ---- writing ----

    def _apply(
        self, steps: Sequence[_Step], cause: str, should_stop: Callable[[], bool], began: float
    ) -> list[SyncRun]:
        """Send the plans and record what became of them."""
        works = []
        for step in steps:
            assert step.plan is not None
            self._state.set(generation_fact(step.member.name), step.plan.about["generation"])
            step.work = step.work or Work(step.member.config, step.plan, step.run, self._row_log(step))
            works.append(step.work)
        try:
            if len(works) == 1:
                apply(self._sink, works[0], should_stop)
            else:
                apply_together(self._sink, works, should_stop)
        finally:
            for work in works:
                work.log.close()
        runs = [self._applied(step, cause) for step in steps]
        if not any(r.outcome == STOPPED for r in runs):
            self._drop_held()
        self.blocked, self._retry_at, self._retry_s = "", 0.0, _RETRY_FIRST_S
        for step, run in zip(steps, runs, strict=True):
            self._count(run, self._clock() - began)
            self._keep_rows(step.member)
        return runs

    def _applied(self, step: _Step, cause: str) -> SyncRun:
        member, plan, work = step.member, step.plan, step.work
        assert plan is not None
        assert work is not None
        done, held = work.applied, plan.counts.held
        outcome = STOPPED if done.stopped else PARTIAL if held or done.rejects else DONE
        text = "; ".join(filter(None, [_held_text(held, plan.held), _rejected_text(done.rejected, done.rejects)]))
        if outcome != STOPPED:
            self._remember(step)
            hint = f"`cdc sync history {member.name} {step.run}` lists them; `cdc sync retry {member.name}` tries again"
            member.condition.be(FINE) if outcome == DONE else member.condition.be(PARTIAL, text, hint)
        return self._ended(step, cause, outcome, error=text)

    def _remember(self, step: _Step) -> None:
        """The fact about a run that came to its end. One for some rows only leaves open what is due, and a reconcile
        also which rows were rejected."""
        assert step.plan is not None
        assert step.work is not None
        member, about, done = step.member, step.plan.about, step.work.applied
        fact = {"acked_run": step.run if done.written or done.deleted else about["last_run"]}
        if about["kind"] != RECONCILE:
            fact |= {"run": step.run, "shape": about["shape"], "written": done.written, "rejected": done.rejects}
        if about["kind"] in (RETRY, RECONCILE):
            before = self._state.get(last_fact(member.name))
            if before is not None:
                self._state.set(last_fact(member.name), {**before, **fact})
        else:
            member.due.ran(about["positions"], {**about["last"], **fact})

    def _row_log(self, step: _Step) -> rowlog.RowLog:
        assert step.plan is not None
        left_out = ("last", "positions", "drift", "kind")
        about = {k: v for k, v in step.plan.about.items() if k not in left_out}
        return rowlog.RowLog(step.member.rows, step.run, {"plan": step.plan.id, **about})

    def _keep_rows(self, member: _Member) -> None:
        """Row logs go into the lake; those that are too old leave it, looked for now and then."""
        rowlog.upload(self._store, member.name, member.rows)
        now = self._clock()
        if now < self._tidied.get(member.name, 0.0):
            return
        self._tidied[member.name] = now + _TIDY_EVERY_S
        try:
            rowlog.tidy(self._store, member.name, time.time() - duration_s(member.config.history_retain))
        except CdcError as error:
            _log.warning("old row logs stay", extra={"sync": member.name, "error": type(error).__name__})

    # ---- ends ----

    def _ended(self, step: _Step, cause: str, outcome: str, *, error: str = "") -> SyncRun:
        """Record the end of a member's part."""
        plan, work = step.plan, step.work
        counts: dict[str, int] = asdict(plan.counts) if plan is not None else {}
        if work is not None:
            done = work.applied
            counts |= {
                "written": done.written, "deleted": done.deleted, "rejected": done.rejects, "absent": done.absent
            }  # fmt: skip
        run = SyncRun(
            sync=step.member.name,
            cause=cause,
            outcome=outcome,
            run=step.run,
            plan=plan.id if plan is not None else "",
            counts=counts,
            trips=tuple(step.trips),
            drift=plan.about.get("drift", {}) if plan is not None else {},
            error=error,
        )
        self._state.finish_history(
            step.history, outcome, counts={**counts, "plan": run.plan, "run": run.run}, error=error
        )
        return run

    def _failed(self, error: CdcError, cause: str, steps: Sequence[_Step]) -> list[SyncRun]:
        """Record the failure and decide when it runs again; raises if the error is FATAL."""
        runs = [self._ended(s, cause, FAILED, error=str(error)) for s in steps]
        if not steps:
            runs = [self._ended(self._begin(m, cause), cause, FAILED, error=str(error)) for m in self._members]
        for run in runs:
            SYNC_RUNS.labels(run.sync, FAILED).inc()
            _log.warning("sync run failed", extra={"sync": run.sync, "cause": cause, "error": str(error)})
            self._keep_rows(self._member(run.sync))
        if error.verdict is Verdict.FATAL and not isinstance(error, ConfigError):
            raise error
        message, operator = str(error.args[0]), error.verdict is not Verdict.RETRY
        for run in runs:
            condition = self._member(run.sync).condition
            condition.be(BLOCKED, message, error.hint) if operator else condition.failed(message, error.hint)
        if operator:
            self.blocked = str(error)
        else:
            self._retry_at = self._clock() + self._retry_s
            self._retry_s = min(self._retry_s * 2, _RETRY_MAX_S)
        return runs

    def _count(self, run: SyncRun, seconds: float) -> None:
        SYNC_RUNS.labels(run.sync, run.outcome).inc()
        SYNC_SECONDS.labels(run.sync).observe(seconds)
        for outcome in ("written", "deleted", "rejected", "absent", "held", "unchanged"):
            SYNC_ROWS.labels(run.sync, outcome).inc(run.counts[outcome])
        extra = {"sync": run.sync, "cause": run.cause, "outcome": run.outcome, "plan": run.plan, "run": run.run}
        _log.info("sync run ended", extra={**extra, **run.counts})


def _held_text(held: int, samples: Sequence[tuple[str, str]]) -> str:
    if not held:
        return ""
    shown = ", ".join(f"{key} ({reason})" for key, reason in samples[:_KEYS_SHOWN])
    return f"{held} rows held: {shown}{', …' if len(samples) > _KEYS_SHOWN else ''}"


def _rejected_text(rejected: Sequence[Rejected], count: int) -> str:
    """By reason: how many, and some of their keys."""
    by_reason: dict[str, list[str]] = {}
    for each in rejected:
        by_reason.setdefault(each.reason, []).append(each.key)
    parts = []
    for reason, keys in sorted(by_reason.items(), key=lambda item: -len(item[1]))[:_REASONS_SHOWN]:
        more = ", …" if len(keys) > _KEYS_SHOWN else ""
        number = count if len(by_reason) == 1 else len(keys)
        parts.append(f"{number} rows rejected by the target: {reason}: {', '.join(keys[:_KEYS_SHOWN])}{more}")
    return "; ".join(parts)
