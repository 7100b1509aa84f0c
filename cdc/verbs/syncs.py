"""Verbs of reverse ETL: what a sync would do, have it done, let a held plan through, and look back.

Only `plan` and `history` work without a daemon. Nothing here writes to a target: the daemon does.
"""

from __future__ import annotations

from typing import Any

from cdc import control, rowlog
from cdc.errors import CdcError
from cdc.verbs.call import FAILED, FOUND, OK, USAGE, Call, pick
from cdc.verbs.data import counts_text
from cdc.verbs.lake import lake_tables

ROWS_SHOWN = 100
_WHAT = {
    "apply": "pushes what differs from what the target has acknowledged",
    "approve": "sends exactly the plan that was approved",
    "retry": "sends the rows again that the last run could not get in; others wait",
    "resync": "sends every row again, and deletes what has left the result if the mode says so",
    "report": "reads the target and compares; writes nothing",
    "source": "reads the target, and sends the rows again that differ there",
    "target": "reads the target; rows that differ there count as sent, and stay as they are until the result changes",
}


def plan(call: Call) -> int:
    """What an apply would write now; 3 if rows are held, or a guard would hold the plan."""
    pick([call.args.name], list(call.config.syncs), "sync")
    from cdc import planning

    values = bool(call.args.show_values)
    if call.args.held:
        found = planning.plan_held(call.config, call.args.name, values=values)
    else:
        found = planning.plan_now(call.config, call.store, lake_tables(call), call.args.name, values=values)
    call.console.document(found)
    call.console.line(
        f"sync {found['sync']} → {found['target']} {found['table']} ({found['mode']}), plan {found['plan']}"
    )
    for action, samples in found["samples"].items():
        count = found[f"{action}s"]
        if count:
            call.console.line(f"  {action}: {count}: {_samples(samples)}{', …' if count > len(samples) else ''}")
    if found["differs"]:
        call.console.line(f"  columns that differ: {counts_text(found['differs'])}")
    gone = "" if found["deletes"] or not found["gone"] else f", gone from the result (left alone): {found['gone']}"
    call.console.line(f"  unchanged: {found['unchanged']}{gone}")
    if found["ignored"]:
        call.console.line(f"  changed, which mode {found['mode']} does not send: {found['ignored']}")
    if found["held"]:
        call.console.line(f"  held: {found['held']} rows whose key is NULL in part, or not unique")
        for held in found["held_samples"]:
            call.console.line(f"    {held['key']}: {held['reason']}")
    for trip in found["held_by"]:
        call.console.line(f"  would be held: {trip['text']} (guard.{trip['limit']})")
    return FOUND if found["held"] or found["held_by"] else OK


def apply(call: Call) -> int:
    """Have the daemon push now; 3 if rows were held or rejected, or a guard holds the plan."""
    return _order(call, "apply", {})


def approve(call: Call) -> int:
    """Let the plan of that id through, and no other; 3 if it is not the plan any more."""
    return _order(call, "approve", {"plan": call.args.plan})


def retry(call: Call) -> int:
    """Send the rejected rows again."""
    return _order(call, "retry", {})


def resync(call: Call) -> int:
    """Send every row again; what deletes needs --yes."""
    return _order(call, "resync", {"yes": call.args.yes})


def reconcile(call: Call) -> int:
    """Compare the target's rows with the result; 3 if they differ."""
    return _order(call, "reconcile", {"policy": call.args.policy})


def reset_state(call: Call) -> int:
    """Forget what was sent, and send nothing."""
    name = call.args.name
    pick([name], list(call.config.syncs), "sync")
    with call.state() as state:
        answer = control.ask(state, "sync_forget", {"name": name}, timeout_s=call.args.timeout)
    call.console.document({"sync": name, **answer})
    call.console.line(f"forgot {answer['forgotten']} acknowledgements of {name}; the next run takes every row for new")
    return OK


def history(call: Call) -> int:
    """Runs of a sync, newest first; with a run, what became of its rows."""
    from cdc.status import history_entry

    name = call.args.name
    pick([name], list(call.config.syncs), "sync")
    with call.state(readonly=True) as state:
        entries = [history_entry(e) for e in state.history("sync", name, limit=1_000)]
    if call.args.run:
        return _rows(call, name, call.args.run, entries)
    entries = entries[: call.args.limit]
    call.console.document({"sync": name, "runs": entries})
    call.console.table(
        ("id", "run", "started", "ended", "cause", "outcome", "counts", "error"),
        [
            (
                e["id"], e["counts"].get("run", ""), e["started_at"], e["ended_at"], e["cause"], e["outcome"],
                counts_text({k: v for k, v in e["counts"].items() if v and k not in ("run", "plan")}), e["error"],
            )
            for e in entries
        ],
    )  # fmt: skip
    return OK


def _rows(call: Call, name: str, run: str, entries: list[dict[str, Any]]) -> int:
    """What became of the rows of one run, by its id or its number."""
    named = next((e["counts"].get("run", "") for e in entries if str(e["id"]) == run), run)
    found = rowlog.read(call.store, name, named) if named else None
    if found is None:
        raise CdcError(
            f"there are no rows of run {run} of sync {name}",
            hint="a run that sent nothing has none; history_retain says how long they are kept",
        )
    about, table = found
    rows = table.to_pylist()
    outcomes = dict.fromkeys(dict.fromkeys(r["outcome"] for r in rows), 0)
    for row in rows:
        outcomes[row["outcome"]] += 1
    call.console.document({"sync": name, **about, "rows": rows})
    call.console.line(f"run {about['run']}, plan {about['plan']}: {counts_text(outcomes)}")
    shown = sorted(rows, key=lambda r: bool(r["outcome"] == rowlog.WRITTEN))[:ROWS_SHOWN]
    call.console.table(
        ("key", "action", "columns", "outcome", "reason"),
        [(r["key"], r["action"], ", ".join(r["columns"] or ()), r["outcome"], r["reason"] or "") for r in shown],
    )
    if len(rows) > len(shown):
        call.console.note(f"{len(rows) - len(shown)} more rows: see --json")
    return OK


def _order(call: Call, kind: str, args: dict[str, Any]) -> int:
    name = call.args.name
    pick([name], list(call.config.syncs), "sync")
    call.console.note(f"{kind} {name}: {_WHAT[args.get('policy', kind)]}")
    with call.state() as state:
        answer = control.ask(state, "sync_order", {"name": name, "kind": kind, **args}, timeout_s=call.args.timeout)
    call.console.document({"name": name, **answer})
    for key in ("outcome", "run", "plan", "error"):
        if answer[key]:
            call.console.line(f"{key}: {answer[key]}")
    counts = answer["counts"]
    call.console.line(f"counts: {counts_text({k: v for k, v in counts.items() if v}) or 'nothing to do'}")
    if answer["outcome"] == "held":
        call.console.line(f"let it through: cdc sync approve {name} {answer['plan']}")
    drift = answer["drift"]
    if drift:
        call.console.line(f"at the target: {drift['missing']} rows missing, {drift['different']} different")
        for kind_, keys in drift["samples"].items():
            if keys:
                call.console.line(f"  {kind_}: {', '.join(keys)}")
        if drift["columns"]:
            call.console.line(f"  by column: {counts_text(drift['columns'])}")
    return _verdict(answer)


def _verdict(answer: dict[str, Any]) -> int:
    if answer["outcome"] in ("failed", "stopped"):
        return FAILED
    if answer["outcome"] == "unconfirmed" and answer["cause"] == "resync":
        return USAGE
    counts, drift = answer["counts"], answer["drift"]
    found = counts.get("held") or counts.get("rejected") or drift.get("missing") or drift.get("different")
    return FOUND if found or answer["outcome"] in ("held", "unconfirmed") else OK


def _samples(samples: list[dict[str, Any]]) -> str:
    texts = []
    for sample in samples:
        text = sample["key"]
        if sample.get("columns"):
            text += f" ({', '.join(sample['columns'])})"
        if "values" in sample:
            text += f" {sample['values']}"
        texts.append(text)
    return ", ".join(texts)
