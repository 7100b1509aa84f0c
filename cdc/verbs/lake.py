"""Verbs over the lake itself: ls, sql, land, compact, vacuum; and which tables it holds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdc.config import MAIN_LAKE
from cdc.console import bytes_text, lsn_text, time_text
from cdc.errors import CdcError, TimedOut
from cdc.table import TableId
from cdc.verbs.call import FAILED, OK, TIMED_OUT, Call, resolve_tables, tables_of

if TYPE_CHECKING:
    from cdc.instant import KnownByState


def list_tables(call: Call) -> int:
    """Tables of the lake, as they stand there, and what will become of their changelogs."""
    held = [(source, table) for source, tables in lake_tables(call).items() for table in tables]
    if call.args.table:
        held = resolve_tables(held, call.args.table)
    rows = [_entry(call, source, table) for source, table in held]
    call.console.document({"lake": call.config.lake.url, "tables": rows})
    many = bool(call.config.lake.named)
    lines = [
        (f"{r['source']}.{r['table']}", *((r["lake"],) if many else ()), part, *_cells(r[part]))
        for r in rows
        for part in ("current", "changelog")
        if r[part] is not None
    ]
    sizes = ("rows", "size", "files", "small", "dead", "version", "log")
    call.console.table(("table", *(("lake",) if many else ()), "", *sizes, "from", "to", "cold", "goes next"), lines)
    return OK


def _entry(call: Call, source: str, table: TableId) -> dict[str, Any]:
    from cdc.lake.inventory import inventory, lifecycle
    from cdc.lake.layout import changelog_path, current_path
    from cdc.upkeep import Limits

    limits = Limits.of(call.config.lake, call.config.sources[source])
    # An eighth of where objects stop growing.
    small = limits.object_bytes // 8
    path = changelog_path(source, table)
    changelog = inventory(call.store, path, small_bytes=small, cold_class=limits.cold_class)
    if changelog is not None:
        ages = lifecycle(
            call.store,
            path,
            retain_s=limits.retain_of(table),
            cold_after_s=limits.cold_after_s,
            cold_class=limits.cold_class,
        )
        changelog |= {
            what: None if found is None else {**found, "at": time_text(found["at"])} for what, found in ages.items()
        }
    return {
        "source": source,
        "table": str(table),
        "lake": call.config.sources[source].lake_of(str(table)) or MAIN_LAKE,
        "current": inventory(call.store, current_path(source, table), small_bytes=small),
        "changelog": changelog,
    }


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

            instant = fresh_views(call.store, source, [table], told, where, local, temp_dir=copies)
            shown = instant.tables[table]
    if shown.note:
        call.console.note(f"{source}.{table} {shown.note}")
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


def _cells(part: dict[str, Any]) -> tuple[Any, ...]:
    sizes = bytes_text(part["bytes"]), part["files"], part["small_files"], bytes_text(part["dead_bytes"])
    cold = bytes_text(part["cold_bytes"]) if part["cold_files"] else "-"
    goes = part.get("expires")
    next_text = "-" if goes is None else f"{goes['at'][:10]} {bytes_text(goes['bytes'])}"
    dates = part["oldest_date"] or "-", part["newest_date"] or "-"
    return part["rows"], *sizes, part["version"], part["log_entries"], *dates, cold, next_text


@contextmanager
def known_tables(call: Call) -> Iterator[KnownByState]:
    """What is known of tables beside their objects: by the daemon's state, where there is one that we may read. It says
    on standard error if there is one that we may not."""
    from cdc.instant import KnownByState

    with ExitStack() as opened:
        state = None
        try:
            if call.has_state:
                state = opened.enter_context(call.state(readonly=True))
                # What is damaged, or of an older release, opens all the same.
                state.tables()
        except CdcError as e:
            state = None
            call.console.note(f"without the daemon's state, each table is as new as it is by itself: {e}")
        yield KnownByState(state)
