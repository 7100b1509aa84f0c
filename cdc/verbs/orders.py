"""Verbs that order something of the daemon: resync, pause, resume, wait. All by durable requests (cdc.control)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from cdc import control
from cdc.console import lsn_text
from cdc.errors import CdcError, TimedOut
from cdc.table import TableId
from cdc.verbs.call import FAILED, FOUND, OK, Call, UsageError, resolve_tables, spellings, tables_of, unknown

if TYPE_CHECKING:
    from cdc.state import Run, State, TableState

Named = tuple[str, TableId]
"""Source and table."""


def resync(call: Call) -> int:
    """Order a new snapshot of tables, or cancel one."""
    names: list[str] = call.args.table
    if call.args.where is not None:
        raise UsageError("resync --where is not supported yet", hint="leave it out: the whole table is read again")
    cancel = names[0] == "cancel" and len(names) > 1
    with call.state() as state:
        tables = resolve_tables(tables_of(state, call.sources()), names[1:] if cancel else names)
        ordered = [_order_table(call, state, "cancel_resync" if cancel else "resync", named) for named in tables]
        outcome = OK
        if call.args.wait and not cancel:
            control.require_daemon(state)
            outcome = follow(call, state, tables, ordered, time.monotonic() + call.args.timeout)
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


def order_resync(state: State, named: Named) -> dict[str, Any] | None:
    """Order a resync; the daemon's answer, None if it is down (the order stands)."""
    source, table = named
    return control.order(state, "resync", {"source": source, "table": str(table)})


def follow(call: Call, state: State, tables: list[Named], ordered: list[dict[str, Any]], deadline: float) -> int:
    """Show the runs' progress on standard error until all have ended and landed; FAILED if one did not end well."""
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} rows"),
        TimeElapsedColumn(),
    )
    failed: list[str] = []
    with Progress(*columns, console=RichConsole(stderr=True), disable=call.console.as_json) as progress:
        bars = {named: progress.add_task(str(named[1]), total=_estimate(state, named)) for named in tables}
        open_runs = {named: entry.get("run") for named, entry in zip(tables, ordered, strict=True)}
        while open_runs:
            for named, run_id in list(open_runs.items()):
                run = _run_of(state, named, run_id)
                if run is None:
                    continue
                progress.update(bars[named], completed=run.rows)
                if run.state in ("done", "cancelled", "failed"):
                    del open_runs[named]
                    progress.update(bars[named], total=run.rows, completed=run.rows)
                    if run.state != "done":
                        failed.append(f"{named[1]}: {run.state}{': ' + run.reason if run.reason else ''}")
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


def _order_table(call: Call, state: State, verb: str, named: Named) -> dict[str, Any]:
    source, table = named
    answer = control.order(state, verb, {"source": source, "table": str(table)})
    what = "resync cancelled" if verb == "cancel_resync" else "resync ordered"
    call.console.line(f"{source}.{table}: {what if answer is not None else _STANDS}")
    return {"source": source, "table": str(table), "served": answer is not None, **(answer or {})}


def _run_of(state: State, named: Named, run_id: str | None) -> Run | None:
    """The run that was ordered; without its id, the newest one of the table."""
    if run_id is not None:
        return state.run(run_id)
    runs = state.runs(*named)
    return runs[-1] if runs else None


def _estimate(state: State, named: Named) -> float | None:
    rows = state.table(*named).rows
    return float(rows) if rows else None


def _pause_until(state: State, deadline: float, message: str) -> None:
    if time.monotonic() > deadline:
        raise TimedOut(message, hint="cdc status")
    if not control.is_running(state):
        raise CdcError("the daemon stopped; the resync goes on when it runs again", hint="cdc run")
    time.sleep(0.2)
