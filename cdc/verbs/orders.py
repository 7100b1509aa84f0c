"""Verbs that order something of the daemon: resync, pause, resume, wait. All by durable requests (cdc.control)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cdc import control
from cdc.console import bytes_text, lsn_text, seconds_text
from cdc.errors import CdcError, TimedOut
from cdc.runs import RUNS_ENDED
from cdc.status import estimate_of, snapshot_progress
from cdc.table import TableId
from cdc.verbs.call import FAILED, FOUND, OK, Call, UsageError, resolve_tables, spellings, tables_of, unknown

if TYPE_CHECKING:
    from cdc.ports import SourceStatus
    from cdc.state import Run, State, TableState

Named = tuple[str, TableId]
"""Source and table."""


def resync(call: Call) -> int:
    """Order a new snapshot of tables, or of some of their rows, or cancel it."""
    names: list[str] = call.args.table
    cancel = names[:1] == ["cancel"] and (len(names) > 1 or call.args.all)
    names = names[1:] if cancel else names
    if call.args.where is not None and (cancel or not call.args.where.strip()):
        raise UsageError("--where takes a condition, and no `cancel`", hint='cdc resync TABLE --where "id > 1000"')
    if call.args.all == bool(names):
        raise UsageError("name tables, or --all of them", hint="example: cdc resync public.orders")
    more = {"where": call.args.where} if call.args.where is not None else {}
    with call.state() as state:
        known = tables_of(state, call.sources())
        tables = known if call.args.all else resolve_tables(known, names)
        ordered = [_order_table(call, state, "cancel_resync" if cancel else "resync", named, more) for named in tables]
        outcome = OK
        if call.args.wait and not cancel:
            control.require_daemon(state)
            runs = [(named, entry.get("run")) for named, entry in zip(tables, ordered, strict=True)]
            outcome = follow(call, state, runs, time.monotonic() + call.args.timeout)
    call.console.document({"cancelled" if cancel else "resyncs": ordered})
    return outcome


def pause(call: Call) -> int:
    """Let sources, tables, targets or syncs stand still."""
    return _pause_or_resume(call, "pause")


def resume(call: Call) -> int:
    """Let them go on."""
    return _pause_or_resume(call, "resume")


def wait(call: Call) -> int:
    """Return when everything committed before now (or up to --lsn) is in log, changelog and current."""
    deadline = time.monotonic() + call.args.timeout
    with call.state() as state:
        control.require_daemon(state)
        tables = resolve_tables(tables_of(state, call.sources()), call.args.table) if call.args.table else None
        sources = list(dict.fromkeys(s for s, _ in tables)) if tables else call.sources()
        if call.args.lsn is not None and len(sources) != 1:
            raise UsageError("--lsn is a position of one source", hint="name its tables with --table")
        reached, left_behind = {}, []
        for source in sources:
            chosen = [t for s, t in tables if s == source] if tables else None
            reached[source] = wait_for(call, state, source, chosen, deadline, lsn=call.args.lsn)
            left_behind += standing_still(state, source, chosen)
    call.console.document(
        {
            "reached": {s: {**answer, "lsn": lsn_text(answer["lsn"])} for s, answer in reached.items()},
            "stopped": [{"source": t.source, "table": str(t.table), "reason": t.reason} for t in left_behind],
        }
    )
    for source, answer in reached.items():
        call.console.line(f"{source}: the lake holds everything up to {lsn_text(answer['lsn'])}")
    for table in left_behind:
        call.console.line(f"  but not {table.table}, which is stopped: {table.reason}")
    return FOUND if left_behind else OK


def standing_still(state: State, source: str, tables: list[TableId] | None) -> list[TableState]:
    """Those of the tables (None: all of the source) that the daemon has stopped, so that no wait reaches them."""
    return [t for t in state.tables(source) if t.state == "stopped" and (tables is None or t.table in tables)]


def wait_for(
    call: Call, state: State, source: str, tables: list[TableId] | None, deadline: float, *, lsn: int | None = None
) -> dict[str, Any]:
    """Block until the lake holds what was committed at `source` before now, or up to `lsn`; the daemon's answer.

    Without `lsn` a barrier is written at the source first. TimedOut at `deadline` (monotonic).
    """
    target = lsn if lsn is not None else call.admin(source).barrier()
    return {**wait_lake(state, source, tables, target, deadline), "lsn": target}


def wait_lake(
    state: State, source: str, tables: list[TableId] | None, lsn: int, deadline: float, *, logged: bool = False
) -> dict[str, Any]:
    """Block until the lake's tables (None: all of the source) hold everything up to `lsn`, or what is `logged` by now;
    the daemon's answer.

    TimedOut at `deadline` (monotonic), NotRunning without a daemon.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimedOut("the time was over before the daemon could be asked")
    args = {"source": source, "lsn": lsn, "tables": [str(t) for t in tables] if tables is not None else []}
    args |= {"logged": True} if logged else {}
    return control.ask(state, "wait", args, timeout_s=left)


def order_resync(state: State, named: Named, keys: Sequence[tuple[str, ...]] | None = None) -> str | None:
    """Order a resync of a table, or of the rows with these keys; its run, None if the daemon did not answer in time
    (the order stands). RequestFailed if it refuses."""
    source, table = named
    more = {} if keys is None else {"keys": [list(key) for key in keys]}
    answer = control.order(state, "resync", {"source": source, "table": str(table), **more})
    return None if answer is None else answer.get("run")


def follow(call: Call, state: State, runs: Sequence[tuple[Named, str | None]], deadline: float) -> int:
    """Show the runs' progress (without an id: the table's newest) on standard error until all have ended and landed;
    FAILED if one did not end well."""
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn(),
    )  # fmt: skip
    failed: list[str] = []
    tables = list(dict.fromkeys(named for named, _ in runs))
    servers = _servers(call, [source for source, _ in tables])
    with Progress(*columns, console=RichConsole(stderr=True), disable=call.console.as_json) as progress:
        bars = {place: progress.add_task(str(named[1]), total=None, told="") for place, (named, _) in enumerate(runs)}
        left = dict(enumerate(runs))
        while left:
            for place, (named, run_id) in list(left.items()):
                run = _run_of(state, named, run_id)
                if run is None:
                    continue
                estimated = estimate_of(run, state.table(*named), servers.get(named[0]))
                if run.state in RUNS_ENDED:
                    del left[place]
                    estimated = run.rows
                    if run.state != "done":
                        failed.append(f"{named[1]}: {run.state}{': ' + run.reason if run.reason else ''}")
                told = _told(run, estimated)
                progress.update(bars[place], total=estimated or None, completed=run.rows, told=told)
            _pause_until(state, deadline, "the snapshot has not ended in time; it goes on")
        for source in [] if failed else dict.fromkeys(s for s, _ in tables):
            chosen = [t for s, t in tables if s == source]
            if call.config.sources[source].is_periodic:
                # To wait for "now" would order another run.
                wait_lake(state, source, chosen, 0, deadline, logged=True)
            else:
                wait_for(call, state, source, chosen, deadline)
            failed += [f"{t.table}: stopped: {t.reason}" for t in standing_still(state, source, chosen)]
    for text in failed:
        call.console.note(text)
    return FAILED if failed else OK


def _servers(call: Call, sources: Sequence[str]) -> dict[str, SourceStatus]:
    """What the sources' servers say, for their estimates; one that does not answer is left out."""
    found = {}
    for source in dict.fromkeys(sources):
        with suppress(CdcError):
            found[source] = call.admin(source).status()
    return found


def _told(run: Run, estimated: int | None) -> str:
    """How far a run is: rows, bytes, rate, remaining time, and what it waits for."""
    known = snapshot_progress(run, estimated, run.ended_at / 1e6 if run.ended_at else time.time())
    text = f"{run.rows:,} rows"
    if run.state in RUNS_ENDED:
        return f"{text}, {run.state}"
    text += f" of about {estimated:,}" if estimated else ""
    text += f", {bytes_text(known['bytes'])}" if known["bytes"] else ""
    text += f", {known['rows_per_second']:,.0f} rows/s" if known["rows_per_second"] else ""
    text += f", {seconds_text(known['remaining_seconds'])} left" if known["remaining_seconds"] else ""
    return text + (f" ({run.reason})" if run.reason and run.reason != known["why"] else "")


def pause_targets(call: Call, known: list[Named], names: list[str]) -> list[tuple[str, str]]:
    """(kind, name) of what is to pause; a name may carry its kind in front. UsageError if unknown or ambiguous."""
    config = call.config
    if not names:
        return [("source", name) for name in config.sources]
    options: dict[str, list[tuple[str, str]]] = {}
    for kind, existing in (("source", config.sources), ("sink", config.targets), ("sync", config.syncs)):
        for name in existing:
            options.setdefault(name, []).append((kind, name))
            options.setdefault(f"{kind}:{name}", []).append((kind, name))
    for source, table in known:
        for spelling in spellings(source, table):
            options.setdefault(spelling, []).append(("table", f"{source}/{table}"))
            options.setdefault(f"table:{spelling}", []).append(("table", f"{source}/{table}"))
    found: list[tuple[str, str]] = []
    # A table's pause is named "<source>/<schema>.<table>" in the state database: a source's name has no slash.
    for name in names:
        matches = options.get(name, [])
        if not matches:
            raise unknown("source, table, target or sync", name, list(options))
        if len(matches) > 1:
            raise UsageError(
                f"{name} names several things",
                hint="write " + " or ".join(f"{k}:{n.replace('/', '.')}" for k, n in matches),
            )
        found.append(matches[0])
    return found


def _pause_or_resume(call: Call, verb: str) -> int:
    done = []
    with call.state() as state:
        for kind, name in pause_targets(call, tables_of(state, call.sources()), call.args.name):
            answer = control.order(state, verb, {"kind": kind, "name": name})
            shown = name.replace("/", ".")
            done.append({"kind": kind, "name": shown, "served": answer is not None})
            what = "paused" if verb == "pause" else "resumed"
            call.console.line(f"{kind} {shown}: {what if answer is not None else _STANDS}")
    call.console.document({"verb": verb, "targets": done})
    return OK


_STANDS = "ordered; takes effect when the daemon runs"


def _order_table(call: Call, state: State, verb: str, named: Named, more: dict[str, Any]) -> dict[str, Any]:
    source, table = named
    answer = control.order(state, verb, {"source": source, "table": str(table), **more})
    told = _STANDS if answer is None else "resync cancelled" if verb == "cancel_resync" else _ordered(answer)
    call.console.line(f"{source}.{table}: {told}")
    return {"source": source, "table": str(table), "served": answer is not None, **(answer or {})}


def _ordered(answer: dict[str, Any]) -> str:
    """What the daemon made of an order."""
    run = answer.get("run")
    match answer.get("order"):
        case "joined":
            return f"joined run {run}, which is ordered already"
        case "queued":
            return f"resync ordered, run {run}, queued behind run {answer['behind']}"
    return f"resync ordered, run {run}"


def _run_of(state: State, named: Named, run_id: str | None) -> Run | None:
    """The run that was ordered; without its id, the newest one of the table."""
    if run_id is not None:
        return state.run(run_id)
    runs = state.runs(*named)
    return runs[-1] if runs else None


def _pause_until(state: State, deadline: float, message: str) -> None:
    if time.monotonic() > deadline:
        raise TimedOut(message, hint="cdc status")
    if not control.is_running(state):
        raise CdcError("the daemon stopped; the resync goes on when it runs again", hint="cdc run")
    time.sleep(0.2)
