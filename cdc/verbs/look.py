"""Verbs that look: status and tables. They read only, and work with the daemon up or down."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from cdc.console import bytes_text, seconds_text
from cdc.verbs.call import OK, Call

if TYPE_CHECKING:
    from cdc.state import State
    from cdc.table import TableSchema


def status(call: Call) -> int:
    """Phases, the ladder of positions, tables, syncs."""
    from cdc import status as gathering

    live = gathering.ask_sources(call.config)
    with call.state(readonly=True) if call.has_state else nullcontext() as state:
        document = gathering.gather(call.config, state, live)
    call.console.document(document)
    if not call.console.as_json:
        _show_status(call, document)
    return OK


def tables(call: Call) -> int:
    """Tables with key, identity, columns and types, and how each is held in the lake."""
    documents = []
    with call.state(readonly=True) if call.has_state else nullcontext() as state:
        for source in call.sources():
            documents += [_describe_table(source, schema) for schema in _schemas(call, state, source)]
    call.console.document({"tables": documents})
    for table in documents:
        key = ", ".join(table["key"]) or "none"
        call.console.line(f"{table['source']}.{table['table']}  key: {key}  identity: {table['identity']}")
        rows = [(c["name"], c["type"], "not null" if c["not_null"] else "", c["held"]) for c in table["columns"]]
        rows += [(name, "generated", "", "absent: the publication does not send it") for name in table["absent"]]
        call.console.table(("column", "type", "", "in the lake"), rows, indent="  ")
        call.console.line()
    return OK


_IDENTITY = {"d": "default", "f": "full", "i": "index", "n": "nothing"}


def _schemas(call: Call, state: State | None, source: str) -> list[TableSchema]:
    """What the daemon has noted of a source's tables; if it has noted nothing, what the catalog says now."""
    from cdc import registry
    from cdc.schema import SchemaBook

    if state is not None:
        book = SchemaBook(state, source)
        noted = [book.latest(t.table) for t in state.tables(source) if t.state != "removed"]
        if any(noted):
            return [schema for schema in noted if schema is not None]
    section = call.config.sources[source]
    return [t.schema for t in registry.source_kind(section.type).reader(section).tables().tables]


def _describe_table(source: str, schema: TableSchema) -> dict[str, Any]:
    from cdc.types import describe

    return {
        "source": source,
        "table": str(schema.table),
        "oid": schema.oid,
        "version": schema.version,
        "key": list(schema.key),
        "identity": _IDENTITY.get(schema.identity, schema.identity),
        "columns": [
            {"name": c.name, "attnum": c.attnum, "type": c.type_name, "not_null": c.not_null, "held": describe(c)}
            for c in schema.columns
        ],
        "absent": list(schema.absent),
    }


def _show_status(call: Call, document: dict[str, Any]) -> None:
    line = call.console.line
    daemon = document["daemon"]
    if daemon["running"]:
        line(f"daemon   running, pid {daemon['pid']}, since {daemon['started_at']}")
    elif daemon["pid"]:
        line(f"daemon   down; last sign of life {seconds_text(daemon['heartbeat_age_seconds'])} ago")
    else:
        line("daemon   not running")
    log = document["log"]
    line(f"log      {bytes_text(log['bytes'])} of {bytes_text(log['bytes_max'])}")
    line(f"lake     {document['lake']}")
    for source in document["sources"]:
        line()
        _show_source(call, source)
    if document["syncs"]:
        line()
        call.console.table(
            ("sync", "target", "last run", "outcome", "counts"), [_sync_row(s) for s in document["syncs"]]
        )


def _show_source(call: Call, source: dict[str, Any]) -> None:
    line = call.console.line
    paused = ", paused" if source["paused"] else ""
    since = f" since {source['phase_since']}" if source["phase_since"] else ""
    line(f"source {source['name']}: {source['phase']}{paused}{since}")
    if source["phase"] == "standby":
        line(f"  waits for its turn: {source['error']}")
    elif source["error"]:
        line(f"  ERROR {source['error']}")
    if source["hint"] and source["phase"] != "standby":
        line(f"  mend it: {source['hint']}")
    slot = source["slot"]
    if slot is None:
        _show_runs(call, source["runs"])
    elif slot.get("error"):
        line(f"  slot {slot['name']}: server not asked: {slot['error']}")
    elif not slot["exists"]:
        line(f"  slot {slot['name']}: does not exist (cdc setup, or cdc run, creates it)")
    else:
        active = f"active, pid {slot['active_pid']}" if slot["active"] else "not active"
        line(f"  slot {slot['name']}: {active}, wal_status {slot['wal_status']}, {_retained(slot)}")
        if source["guard"]["stage"]:
            line(f"  WAL guard: {source['guard']['note']}")
    steps = [
        (s["step"], s["lsn"] or "-", bytes_text(s["lag_bytes"]), seconds_text(s["lag_seconds"]))
        for s in source["ladder"]
    ]
    call.console.table(("step", "position", "behind", "age"), steps, indent="  ")
    if source["tables"]:
        line()
        rows = [
            (
                t["table"],
                t["state"] + (", paused" if t["paused"] else ""),
                t["rows"],
                t["last_change_at"] or "-",
                _note(t),
            )
            for t in source["tables"]
        ]
        call.console.table(("table", "state", "rows", "last change", ""), rows, indent="  ")
    if source["followers"]:
        _show_followers(call, source["followers"])


def _show_followers(call: Call, followers: list[dict[str, Any]]) -> None:
    """The other forms of the changelogs."""
    rows = []
    for f in followers:
        note = f"{f['error']}; mend it: {f['hint']}" if f["error"] else ""
        rows.append((f["table"], f["form"], seconds_text(f["lag_seconds"]), note))
    call.console.line()
    call.console.table(("table", "also as", "age", ""), rows, indent="  ")


def _show_runs(call: Call, runs: dict[str, Any]) -> None:
    """A source without a slot: its schedule and its runs."""
    since, table = runs["running_since"], runs["table"]
    now = f"reading {table or '…'} since {since}" if since else f"next run {runs['next_at'] or 'now'}"
    waiting = f" ({runs['waiting']})" if runs["waiting"] else ""
    call.console.line(f"  runs: {runs['strategy']}, {runs['schedule']}; {now}{waiting}")
    for entry in runs["history"][:3]:
        counts = ", ".join(f"{k} {v}" for k, v in entry["counts"].items() if v)
        call.console.line(f"    {entry['started_at']} {entry['cause']}: {entry['outcome']} {entry['error'] or counts}")


def _retained(slot: dict[str, Any]) -> str:
    """What the slot keeps, against the server's limit and what lies on its disk."""
    limit, disk = slot["wal_keep_bytes"], slot["wal_dir_bytes"]
    text = f"{bytes_text(slot['retained_bytes'])} retained"
    text += f" of {bytes_text(limit)} allowed" if limit is not None else ", no limit (max_slot_wal_keep_size)"
    return text + (f", pg_wal holds {bytes_text(disk)}" if disk is not None else "")


def _note(table: dict[str, Any]) -> str:
    snapshot = table["snapshot"]
    parts = []
    if snapshot:
        parts.append(f"{snapshot['kind']} snapshot {snapshot['state']}: {_progress(snapshot)}")
        if snapshot["strategy"]:
            ranges = f"{snapshot['ranges_done']} of {snapshot['ranges']} ranges"
            parts.append(f"by {snapshot['strategy']}, {ranges}: {snapshot['chosen']}")
        parts += [snapshot["why"], snapshot["reason"] if snapshot["reason"] != snapshot["why"] else ""]
    verified = table["verified"]
    if verified and verified["outcome"] not in ("equal", "running"):
        parts.append(f"verify at {verified['started_at']}: {verified['outcome']}")
    parts += [table["reason"], f"mend it: {table['hint']}" if table["hint"] else ""]
    return "; ".join(part for part in parts if part)


def _progress(snapshot: dict[str, Any]) -> str:
    estimated, rate, left = (snapshot[name] for name in ("rows_estimated", "rows_per_second", "remaining_seconds"))
    text = f"{snapshot['rows']} rows" + (f" of about {estimated}" if estimated else "")
    text += f" in {snapshot['chunks']} chunks" if snapshot["chunks"] else ""
    text += f", {bytes_text(snapshot['bytes'])}" if snapshot["bytes"] else ""
    text += f", {rate:.0f} rows/s" if rate else ""
    return text + (f", about {seconds_text(left)} left" if left else "")


def _sync_row(sync: dict[str, Any]) -> tuple[str, ...]:
    last = sync["last_run"]
    name = sync["name"] + (" (paused)" if sync["paused"] else "")
    waits = "waits: " + "; ".join(sync["waits_for"]) if sync["waits_for"] else ""
    if last is None:
        return (name, sync["target"], "never", "", waits)
    counts = ", ".join(f"{key} {value}" for key, value in last["counts"].items())
    told = "; ".join(filter(None, [sync["why"], sync["hint"]])) if sync["condition"] not in ("fine", "partial") else ""
    told = told or waits or last["error"] or counts
    return (name, sync["target"], last["ended_at"] or last["started_at"], last["outcome"], told)
