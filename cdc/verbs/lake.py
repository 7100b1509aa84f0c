"""Verbs over the lake itself: ls, compact, vacuum; and which tables it holds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from cdc.console import bytes_text
from cdc.table import TableId
from cdc.verbs.call import OK, Call, resolve_tables, tables_of

if TYPE_CHECKING:
    from cdc.ports import ObjectStore


def list_tables(call: Call) -> int:
    """Tables of the lake, as they stand there."""
    from cdc.lake.layout import changelog_path, current_path

    rows: list[dict[str, Any]] = [
        {
            "source": source,
            "table": str(table),
            "current": _delta(call.store, current_path(source, table)),
            "changelog": _delta(call.store, changelog_path(source, table)),
        }
        for source, tables in lake_tables(call).items()
        for table in tables
    ]
    call.console.document({"lake": call.config.lake.url, "tables": rows})
    headers = ("table", "current: rows", "size", "files", "version", "changelog: rows", "size", "files", "version")
    call.console.table(
        headers, [(f"{r['source']}.{r['table']}", *_cells(r["current"]), *_cells(r["changelog"])) for r in rows]
    )
    return OK


def compact(call: Call) -> int:
    """Have the daemon join the small objects of changelogs."""
    return _upkeep(call, "compact", "objects joined")


def vacuum(call: Call) -> int:
    """Have the daemon remove what no version of the last `vacuum_after_s` shows."""
    return _upkeep(call, "vacuum", "objects removed")


def _upkeep(call: Call, kind: str, what: str) -> int:
    from cdc import control

    deadline = time.monotonic() + call.args.timeout
    answers: list[dict[str, Any]] = []
    with call.state() as state:
        known = tables_of(state, call.sources())
        for source, table in resolve_tables(known, call.args.table) if call.args.table else known:
            args = {"source": source, "table": str(table), "kind": kind}
            answer = control.ask(state, "upkeep", args, timeout_s=max(0.1, deadline - time.monotonic()))
            answers.append({"source": source, "table": str(table), **answer})
            number = answer["joined"] if kind == "compact" else answer["removed"]
            call.console.line(f"{source}.{table}: {number} {what}")
    call.console.document({"tables": answers})
    return OK


def lake_tables(call: Call) -> dict[str, list[TableId]]:
    """The tables that the lake holds, by configured source, as the store lists them: needs no state of the daemon."""
    from cdc.lake.layout import tables_in

    return {source: tables_in(call.store, source) for source in call.sources()}


def _delta(store: ObjectStore, path: str) -> dict[str, Any] | None:
    """Version, files, rows and size of a Delta table; None if there is none."""
    from cdc.lake.delta import DeltaLog

    table = DeltaLog(store, path)
    if not table.exists():
        return None
    files = table.files()
    return {
        "path": path,
        "version": table.version(),
        "files": len(files),
        "rows": sum(f.rows for f in files),
        "bytes": sum(f.size for f in files),
    }


def _cells(table: dict[str, Any] | None) -> tuple[Any, ...]:
    if table is None:
        return ("-", "-", "-", "-")
    return (table["rows"], bytes_text(table["bytes"]), table["files"], table["version"])
