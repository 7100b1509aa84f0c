"""Verbs over the lake itself: ls, sql, compact, vacuum; and which tables it holds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdc.console import bytes_text
from cdc.errors import CdcError
from cdc.table import TableId
from cdc.verbs.call import FAILED, OK, Call, resolve_tables, tables_of

if TYPE_CHECKING:
    from cdc.instant import KnownByState


def list_tables(call: Call) -> int:
    """Tables of the lake, as they stand there."""
    from cdc.lake.layout import changelog_path, current_path

    rows: list[dict[str, Any]] = [
        {
            "source": source,
            "table": str(table),
            "current": _delta(call, current_path(source, table)),
            "changelog": _delta(call, changelog_path(source, table)),
        }
        for source, tables in lake_tables(call).items()
        for table in tables
    ]
    call.console.document({"lake": call.config.lake.url, "tables": rows})
    columns = ("rows", "size", "files", "small", "dead", "version")
    headers = ("table", *(f"current: {c}" if c == "rows" else c for c in columns))
    headers += tuple(f"changelog: {c}" if c == "rows" else c for c in columns)
    call.console.table(
        headers, [(f"{r['source']}.{r['table']}", *_cells(r["current"]), *_cells(r["changelog"])) for r in rows]
    )
    return OK


def sql(call: Call) -> int:
    """The SELECT of a table as it is now, for a DuckDB of one's own."""
    from cdc.instant import fresh_views, merged_view
    from cdc.relations import local_path

    known = [(source, table) for source, tables in lake_tables(call).items() for table in tables]
    ((source, table),) = resolve_tables(known, [call.args.table])

    def where(key: str) -> str:
        return call.store.location(key)[0]

    if call.args.merged:
        shown = merged_view(call.store, source, table, where)
    else:
        with known_tables(call) as told, tempfile.TemporaryDirectory(prefix="cdc-sql-") as folder:
            copies = Path(folder)

            def local(key: str) -> str:
                return local_path(call.store, key, copies)

            views = fresh_views(call.store, source, [table], told, where, local, temp_dir=copies)
            shown = views[table]
    if shown.note:
        call.console.note(f"{source}.{table} is shown as it is merged: {shown.note}")
    document = {"source": source, "table": str(table), **shown._asdict()}
    call.console.document(document)
    call.console.line(shown.sql)
    return OK


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


@contextmanager
def known_tables(call: Call) -> Iterator[KnownByState]:
    """What is known of tables beside their objects: by the daemon's state, where there is one."""
    from cdc.instant import KnownByState

    with call.state(readonly=True) if call.has_state else nullcontext() as state:
        yield KnownByState(call.store, state)


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
