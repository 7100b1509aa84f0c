"""Verbs over the lake itself: ls, land, compact, vacuum; and which tables it holds."""

from __future__ import annotations

from typing import Any

from cdc.config import MAIN_LAKE
from cdc.console import bytes_text, lsn_text
from cdc.errors import CdcError, TimedOut
from cdc.table import TableId
from cdc.verbs.call import FAILED, OK, TIMED_OUT, Call, resolve_tables, tables_of


def list_tables(call: Call) -> int:
    """Tables of the lake, as they stand there."""
    from cdc.lake.layout import changelog_path, current_path

    rows: list[dict[str, Any]] = [
        {
            "source": source,
            "table": str(table),
            "lake": call.config.sources[source].lake_of(str(table)) or MAIN_LAKE,
            "current": _delta(call, current_path(source, table)),
            "changelog": _delta(call, changelog_path(source, table)),
        }
        for source, tables in lake_tables(call).items()
        for table in tables
    ]
    call.console.document({"lake": call.config.lake.url, "tables": rows})
    many = bool(call.config.lake.named)
    columns = ("rows", "size", "files", "small", "dead", "version")
    headers = ("table", *(("lake",) if many else ()), *(f"current: {c}" if c == "rows" else c for c in columns))
    headers += tuple(f"changelog: {c}" if c == "rows" else c for c in columns)
    lines = [
        (f"{r['source']}.{r['table']}", *((r["lake"],) if many else ()), *_cells(r["current"]), *_cells(r["changelog"]))
        for r in rows
    ]
    call.console.table(headers, lines)
    return OK


def land(call: Call) -> int:
    """Have the daemon land what is logged now, and wait until it has."""
    from cdc import control

    names, codes = call.sources(), [OK]
    answers: list[dict[str, Any]] = []
    with call.state() as state:
        wanted = [{"source": name} for name in names]
        for name, answer in zip(
            names, control.ask_all(state, "land", wanted, timeout_s=call.args.timeout), strict=True
        ):
            entry: dict[str, Any] = {"source": name, "landed_lsn": None, "error": ""}
            if isinstance(answer, CdcError):
                entry["error"] = answer.args[0]
                codes.append(TIMED_OUT if isinstance(answer, TimedOut) else FAILED)
                call.console.note(f"{name}: {answer}")
            else:
                entry["landed_lsn"] = lsn_text(answer["landed_lsn"]) or None
                call.console.line(f"{name}: landed up to {entry['landed_lsn'] or 'where it began'}")
            answers.append(entry)
    call.console.document({"sources": answers})
    # One that failed needs somebody; one that is slow needs time.
    return FAILED if FAILED in codes else max(codes)


def compact(call: Call) -> int:
    """Have the daemon join the small objects of changelogs."""
    return _upkeep(call, "compact", "objects joined")


def vacuum(call: Call) -> int:
    """Have the daemon remove what no version of the last `vacuum_after_s` shows."""
    return _upkeep(call, "vacuum", "objects removed")


def _upkeep(call: Call, kind: str, what: str) -> int:
    from cdc import control

    answers: list[dict[str, Any]] = []
    with call.state() as state:
        known = tables_of(state, call.sources())
        tables = resolve_tables(known, call.args.table) if call.args.table else known
        wanted = [{"source": source, "table": str(table), "kind": kind} for source, table in tables]
        for (source, table), answer in zip(
            tables, control.ask_all(state, "upkeep", wanted, timeout_s=call.args.timeout), strict=True
        ):
            entry: dict[str, Any] = {"source": source, "table": str(table), "joined": 0, "removed": 0, "error": ""}
            if isinstance(answer, CdcError):
                entry["error"] = answer.args[0]
                call.console.note(f"{source}.{table}: {answer}")
            else:
                entry |= answer
                call.console.line(f"{source}.{table}: {entry['joined' if kind == 'compact' else 'removed']} {what}")
            answers.append(entry)
    call.console.document({"tables": answers})
    return FAILED if any(entry["error"] for entry in answers) else OK


def lake_tables(call: Call) -> dict[str, list[TableId]]:
    """The tables that the lake holds, by configured source, as the store lists them: needs no state of the daemon."""
    from cdc.lake.layout import tables_in

    return {source: tables_in(call.store, source) for source in call.sources()}


def _delta(call: Call, path: str) -> dict[str, Any] | None:
    """Version, files, rows and size of a Delta table, how many of its files are small (an eighth of the size where
    they stop growing), and the bytes of objects that its newest version does not show; None if there is none."""
    from cdc.lake.delta import DeltaLog

    table = DeltaLog(call.store, path)
    if not table.exists():
        return None
    files = table.files()
    small = call.config.lake.object_bytes_target // 8
    live = {f"{path}/{f.path}" for f in files}
    stored = (o for o in call.store.list(f"{path}/") if not o.key.startswith(f"{path}/_delta_log/"))
    return {
        "path": path,
        "version": table.version(),
        "files": len(files),
        "rows": sum(f.rows for f in files),
        "bytes": sum(f.size for f in files),
        "small_files": sum(f.size < small for f in files),
        "dead_bytes": sum(o.size for o in stored if o.key not in live),
    }


def _cells(table: dict[str, Any] | None) -> tuple[Any, ...]:
    if table is None:
        return ("-",) * 6
    sizes = bytes_text(table["bytes"]), table["files"], table["small_files"], bytes_text(table["dead_bytes"])
    return (table["rows"], *sizes, table["version"])
