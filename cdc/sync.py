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
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from cdc import rowlog
from cdc.applying import Work, apply, apply_together
from cdc.condition import BLOCKED, FINE, HELD, PARTIAL, Alert, Condition, waits_fact
from cdc.config_serving import ModelConfig, SyncConfig, TargetConfig
from cdc.due import CHANGED, RESTART, ChangedByOthers, Due, known_tables, last_fact, require_complete
from cdc.errors import CdcError, ConfigError, DiskFailed, ModelFailed, Verdict
from cdc.guarding import Trip, trips
from cdc.held import Held
from cdc.metrics import SYNC_ROWS, SYNC_RUNS, SYNC_SECONDS
from cdc.plan import Asked, Plan
from cdc.planning import Planner, definition, generation_fact, remembered
from cdc.ports import ObjectStore
from cdc.sink import Sink
from cdc.state import Cut, State
from cdc.sync_run import (
    APPLY,
    APPROVE,
    DONE,
    FAILED,
    INTERRUPTED,
    RECONCILE,
    REPORT,
    REPORTED,
    RESYNC,
    RETRY,
    SOURCE,
    STOPPED,
    TARGET,
    UNCONFIRMED,
    Order,
    SyncRun,
    held_text,
    rejected_text,
)
from cdc.units import duration_s

_log = logging.getLogger(__name__)

_RETRY_FIRST_S, _RETRY_MAX_S = 1.0, 60.0
_TIDY_EVERY_S = 3_600.0


class _Member:
    """One sync of a job."""

    def __init__(
        self, config: SyncConfig, planner: Planner, due: Due, condition: Condition, held: Held, rows: Path
    ) -> None:
        self.config, self.planner, self.due, self.condition, self.held = config, planner, due, condition, held
        self.name = config.name
        self.rows = rows
        self.waits: list[str] | None = None


@dataclass(slots=True)
class _Step:
    """A member's part of one run."""

    member: _Member
    run: str
    history: int
    plan: Plan | None = None
    trips: list[Trip] = field(default_factory=list)
    work: Work | None = None

    @property
    def made(self) -> Plan:
        """Its plan, once there is one."""
        assert self.plan is not None
        return self.plan

    @property
    def is_partial(self) -> bool:
        """Whether it is for some rows only: what is due, and what is held for all of them, is not done with it."""
        return self.made.about["kind"] in (RETRY, RECONCILE)


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
        targets: Mapping[str, TargetConfig],
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
            planner = Planner(config, targets[config.target], sql, sink, store, folder, **limits)
            due = Due(config, sql, state, clock)
            held = Held(config.name, state, directory)
            condition = Condition(config.name, state, alert)
            self._members.append(_Member(config, planner, due, condition, held, folder / "rows"))
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
        try:
            if member.held.recover(member.due.fingerprint()):
                member.due.stays_due()
        except CdcError as error:
            _log.warning("a held plan was left alone", extra={"sync": member.name, "error": str(error)})
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
            if self._waits():
                return []
            causes = {m.name: m.due.cause(changed_by_others) for m in self._members}
        except ModelFailed as error:
            return self._failed(error, RESTART, [])
        found = next((c for c in causes.values() if c and c != CHANGED), None)
        if found is None and any(causes[m.name] and m.due.debounced() for m in self._members):
            found = CHANGED
        return self._run(found, changed_by_others, should_stop) if found else []

    def _waits(self) -> bool:
        """Whether it has to wait; noted for `status` where that has changed."""
        for member in self._members:
            waits = [*member.due.incomplete(), *member.due.lagging()]
            if waits != member.waits:
                self._state.set(waits_fact(member.name), waits)
                member.waits = waits
        return any(m.waits for m in self._members)

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
        self._leave_what_is_redefined()
        if order.kind == RESYNC and member.config.mode == "insert":
            raise ConfigError(
                f"sync {member.name} only inserts, so what the target has cannot be sent to it again",
                hint=f"`cdc sync reset-state {member.name}` forgets what was sent",
            )
        if order.kind == APPROVE and member.held.approve(order.plan):
            runs = self._send_approved(should_stop) if self._is_approved() else [self._still_held(member)]
        else:
            cause = "ordered" if order.kind == APPLY else order.kind
            alone = [member] if order.kind in (RETRY, RESYNC, RECONCILE) else self._members
            runs = self._run(cause, changed_by_others, should_stop, order, alone)
            if order.kind in (APPLY, RESYNC) and any(r.outcome in (FAILED, STOPPED) for r in runs):
                for each in alone:
                    each.due.stays_due()
        return next(r for r in runs if r.sync == member.name)

    def forget(self, sync: str) -> int:
        """Forget what was sent, and a held plan with it; how many acknowledgements there were. Sends nothing."""
        member = self._member(sync)
        self._drop_held(due=True)
        last = self._state.get(last_fact(sync))
        if last is not None:
            self._state.set(last_fact(sync), {**last, "acked_run": None})
        return self._sink.forget(member.planner.assignment())

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
            # Read once: whatever is cut meanwhile is for the next run, of all members alike.
            sources = {source for step in steps for source, _ in step.member.due.inputs() or ()}
            cuts = {source: cut for source in sorted(sources) if (cut := self._state.cut(source)) is not None}
            for step in steps:
                self._plan(step, cause, changed_by_others, order, cuts)
            early = self._unasked(steps, cause, order) or self._hold(steps, cause, order)
            return early or self._apply(steps, cause, should_stop, began)
        except CdcError as error:
            return self._failed(error, cause, steps)
        except OSError as error:
            return self._failed(_disk_failed(error), cause, steps)
        finally:
            for step in steps:
                step.member.planner.clear()

    def _begin(self, member: _Member, cause: str) -> _Step:
        run = rowlog.new_run_id(time.time())
        _log.info("sync run began", extra={"sync": member.name, "cause": cause, "run": run})
        return _Step(member, run, self._state.start_history("sync", member.name, cause))

    def _plan(
        self, step: _Step, cause: str, changed: ChangedByOthers, order: Order | None, cuts: Mapping[str, Cut]
    ) -> None:
        member, state = step.member, self._state
        own = {source for source, _ in member.due.inputs() or ()}
        versions = {source: dict(cut.versions) for source, cut in cuts.items() if source in own}
        lsns = {source: cut.lsn for source, cut in cuts.items() if source in own}
        before = state.get(last_fact(member.name)) or {}
        about: dict[str, Any] = {
            "sync": member.name, "cause": cause, "model": member.config.model,
            "definition": member.due.fingerprint(),
            "inputs": {
                source: {"lsn": lsns[source], "versions": {str(t): v for t, v in tables.items()}}
                for source, tables in versions.items()
            },
            "last": {"definition": member.due.fingerprint(), "started_at": time.time(), "cuts": lsns},
            "positions": member.due.positions(changed, lsns),
        }  # fmt: skip
        assignment = member.planner.freeze(known_tables(state), versions)
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
        self._look_back(member, before, acknowledged.last_run)

    def _rejected_keys(self, member: _Member, before: Mapping[str, Any]) -> pa.ChunkedArray:
        rowlog.upload(self._store, member.name, member.rows)
        return rowlog.rejected_keys(self._store, member.name, str(before.get("run", "")))

    def _look_back(self, member: _Member, before: Mapping[str, Any], found: str | None) -> None:
        """A target that was restored from its backup has the acknowledgements of that backup. The plan is right all the
        same, but somebody should know why so much is sent. Runs' names sort by time; a later one than expected is of a
        run that failed."""
        expected = before.get("acked_run")
        if found is None or not expected or found >= expected or before.get("went_back") == found:
            return
        self._state.set(last_fact(member.name), {**before, "went_back": found})
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
            if order.kind == RECONCILE and order.policy == REPORT:
                outcome = REPORTED
            elif order.kind == RESYNC and step.made.counts.deletes and not order.yes:
                outcome = UNCONFIRMED
                text = f"it deletes {step.made.counts.deletes} rows too: say --yes"
            elif order.kind == APPROVE and step.member.name == order.sync and step.made.id != order.plan:
                outcome = UNCONFIRMED
                text = f"the plan is another one by now, {step.made.id}: look at it with `cdc sync plan {order.sync}`"
        return [self._ended(s, cause, outcome, error=text) for s in steps] if outcome else []

    # ---- holding ----

    def _hold(self, steps: Sequence[_Step], cause: str, order: Order | None) -> list[SyncRun]:
        """Keep the plans and send nothing, if one of them is over a limit; empty if they may go."""
        approved = order.plan if order is not None and order.kind == APPROVE else ""
        if not any(s.trips and s.made.id != approved for s in steps):
            return []
        if order is not None:
            self.blocked = ""
        for step in steps:
            member, plan = step.member, step.made
            if step.is_partial:
                # What is held for all rows stays, and this one is not worth an approval.
                continue
            kept = member.held.fact
            if kept is None or order is not None:
                step.plan = member.held.keep(plan, step.trips, plan.about["definition"])
                kept = member.held.fact
            assert kept is not None
            if kept["held_by"]:
                text = "; ".join(trip["text"] for trip in kept["held_by"])
                hint = (
                    f"`cdc sync plan {member.name} --held` shows it; "
                    f"`cdc sync approve {member.name} {kept['plan']}` sends it"
                )
                # Another plan than the one that was told is news.
                member.condition.be(HELD, text, hint, again=member.condition.hint != hint)
            # Last: until then a run is due, which holds it again.
            before = self._state.get(last_fact(member.name)) or {}
            member.due.ran(plan.about["positions"], {**before, "due": False, **plan.about["last"]})
        return [self._ended(s, cause, HELD, error=self._why_held(s)) for s in steps]

    def _why_held(self, step: _Step) -> str:
        held = step.member.held.fact
        texts = [t.text for t in step.trips]
        if held is not None and held["plan"] != step.made.id:
            texts.append(f"plan {held['plan']} waits for approval")
        return "; ".join(texts)

    def _is_approved(self) -> bool:
        held = [m.held for m in self._members if m.held.fact is not None]
        return bool(held) and all(h.approved for h in held)

    def _still_held(self, member: _Member) -> SyncRun:
        waiting = [m.name for m in self._members if m.held.fact is not None and not m.held.approved]
        return SyncRun(
            sync=member.name, cause=APPROVE, outcome=HELD, error=f"its group waits for approval of {', '.join(waiting)}"
        )

    def _send_approved(self, should_stop: Callable[[], bool]) -> list[SyncRun]:
        """Send the plans that were held, as they are: what was acknowledged meanwhile is left out."""
        steps = [self._begin(m, "approved") for m in self._members if m.held.fact is not None]
        began = self._clock()
        try:
            for step in steps:
                held = step.member.held.load(step.member.planner.assignment())
                step.plan = held
                acknowledged = self._sink.acknowledged(held.assignment)
                step.work = Work(step.member.config, held, step.run, self._row_log(step), known=acknowledged.rows)
            return self._apply(steps, "approved", should_stop, began)
        except CdcError as error:
            if isinstance(error, ModelFailed):
                self._drop_held(due=True)
            return self._failed(error, "approved", steps)
        except OSError as error:
            return self._failed(_disk_failed(error), "approved", steps)

    def _leave_what_is_redefined(self) -> None:
        """A held plan of another definition than the sync has now is not sent."""
        if any(m.held.recover(m.due.fingerprint()) for m in self._members):
            self._drop_held(due=True)

    def _drop_held(self, *, due: bool = False) -> None:
        """Nothing is held any more. `due`: what was held is not sent by anything else, so a run is."""
        for member in self._members:
            if member.held.drop() and due:
                member.due.stays_due()

    # ---- writing ----

    def _apply(
        self, steps: Sequence[_Step], cause: str, should_stop: Callable[[], bool], began: float
    ) -> list[SyncRun]:
        """Send the plans and record what became of them."""
        works = []
        is_partial = any(s.is_partial for s in steps)
        if cause != "approved" and any(s.made.counts.writes for s in steps):
            # What comes now is newer than what is held, which must not be sent over it any more.
            self._drop_held(due=is_partial)
        for step in steps:
            known = int(self._state.get(generation_fact(step.member.name)) or 0)
            self._state.set(generation_fact(step.member.name), max(step.made.about["generation"], known))
            step.work = step.work or Work(step.member.config, step.made, step.run, self._row_log(step))
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
        if not is_partial and not any(r.outcome == STOPPED for r in runs):
            self._drop_held()
        self.blocked, self._retry_at, self._retry_s = "", 0.0, _RETRY_FIRST_S
        for step, run in zip(steps, runs, strict=True):
            self._count(run, self._clock() - began)
            self._keep_rows(step.member)
        return runs

    def _applied(self, step: _Step, cause: str) -> SyncRun:
        member, plan, work = step.member, step.made, step.work
        assert work is not None
        done, held = work.applied, plan.counts.held
        outcome = STOPPED if done.stopped else PARTIAL if held or done.rejects else DONE
        text = "; ".join(filter(None, [held_text(held, plan.held), rejected_text(done.rejected, done.rejects)]))
        if outcome != STOPPED:
            self._remember(step)
            hint = f"`cdc sync history {member.name} {step.run}` lists them; `cdc sync retry {member.name}` tries again"
            if step.is_partial and member.held.fact is not None:
                pass  # a plan waits, whatever became of these rows
            elif outcome == DONE:
                member.condition.be(FINE)
            else:
                member.condition.be(PARTIAL, text, hint)
        return self._ended(step, cause, outcome, error=text)

    def _remember(self, step: _Step) -> None:
        """The fact about a run that came to its end. One for some rows only leaves open what is due, and a reconcile
        also which rows were rejected."""
        assert step.work is not None
        member, about, done = step.member, step.made.about, step.work.applied
        fact = {"acked_run": step.run if done.written or done.deleted else about["last_run"]}
        if about["kind"] != RECONCILE:
            fact |= {"run": step.run, "shape": about["shape"], "written": done.written, "rejected": done.rejects}
            fact["rows"] = step.made.counts.rows
        if step.is_partial:
            before = self._state.get(last_fact(member.name))
            if before is not None:
                self._state.set(last_fact(member.name), {**before, **fact})
        else:
            member.due.ran(about["positions"], {**about["last"], **fact})

    def _row_log(self, step: _Step) -> rowlog.RowLog:
        left_out = ("last", "positions", "drift", "kind")
        about = {k: v for k, v in step.made.about.items() if k not in left_out}
        return rowlog.RowLog(step.member.rows, step.run, {"plan": step.made.id, **about})

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


def _disk_failed(error: OSError) -> DiskFailed:
    return DiskFailed(
        f"the files of a run cannot be written: {error.strerror or type(error).__name__}",
        hint="make room on the disk of state_dir",
    )
