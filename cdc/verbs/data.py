"""Verbs over data: verify, query, model run."""

from __future__ import annotations

import csv
import io
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdc import control
from cdc.errors import CdcError, TimedOut
from cdc.table import TableId
from cdc.verbs.call import FAILED, FOUND, OK, TIMED_OUT, Call, pick, resolve_tables, tables_of
from cdc.verbs.lake import known_tables, lake_tables
from cdc.verbs.orders import Named, follow, order_resync, standing_still, wait_lake

if TYPE_CHECKING:
    import pyarrow as pa

    from cdc.state import State
    from cdc.verify import TableReport

MEMORY_LIMIT = "1GB"
"""Memory of one `cdc query`; what does not fit spills to temporary files."""
KEYS_PER_ORDER = 5_000
"""Keys that one order of a repair names."""
SHOWN_ROWS, WRITTEN_ROWS = 1_000, 1_000_000
"""Rows of a query at most, as a table and in other formats, unless --limit says otherwise."""


def verify(call: Call) -> int:
    """Compare source and current; 0 equal, 3 different or not compared, 1 if a table could not be read."""
    from cdc.memory import keep_memory_low

    keep_memory_low()
    with call.state() as state:
        control.require_daemon(state)
        known = tables_of(state, call.sources())
        tables = resolve_tables(known, call.args.table) if call.args.table else known
        reports, timed_out = _verify_tables(call, state, tables)
        repaired = [r for r in reports if r.differs] if call.args.repair else []
        if repaired:
            _repair(call, state, repaired)
            again, timed_out = _verify_tables(call, state, [(r.source, r.table) for r in repaired])
            fresh = {(r.source, r.table): r for r in again}
            reports = [fresh.get((r.source, r.table), r) for r in reports]
    equal = all(r.equal for r in reports)
    names = [f"{r.source}.{r.table}" for r in repaired]
    call.console.document({"equal": equal, "repaired": names, "tables": [_report(r) for r in reports]})
    for report in reports:
        _show_report(call, report)
    if timed_out:
        return TIMED_OUT
    if any(r.error for r in reports):
        return FAILED
    return OK if equal else FOUND


def query(call: Call) -> int:
    """DuckDB over the lake: tables with what has landed and is not merged yet, or as they are merged."""
    from cdc import models

    notes: list[str] = []
    form = "json" if call.console.as_json else call.args.format
    limit = call.args.limit or (SHOWN_ROWS if form == "table" else WRITTEN_ROWS)
    with known_tables(call) as known, tempfile.TemporaryDirectory(prefix="cdc-query-") as folder:
        result = models.query(
            call.store,
            lake_tables(call),
            call.args.sql,
            cut={source: known.cut(source) for source in call.sources()},
            fresh=None if call.args.merged else known,
            note=notes.append,
            temp_dir=Path(folder),
            memory_limit=MEMORY_LIMIT,
            rows_max=limit + 1,
            timeout_s=call.args.timeout,
        )
    for note in notes:
        call.console.note(note)
    if result.num_rows > limit:
        result = result.slice(0, limit)
        call.console.note(f"there are more rows than {limit}: see --limit")
    if form == "json":
        rows = list(zip(*(column.to_pylist() for column in result.columns), strict=True))
        call.console.document({"columns": result.schema.names, "rows": rows, "notes": notes}, always=True)
    elif form == "csv":
        call.console.raw(_csv(result))
    else:
        columns = [column.to_pylist() for column in result.columns]
        call.console.table(result.schema.names, list(zip(*columns, strict=True)))
    return OK


def model_run(call: Call) -> int:
    """Have the daemon run a model now: its SQL, its key, and what of its rows would be held."""
    name = call.args.name
    pick([name], list(call.config.models), "model")
    with call.state() as state:
        answer = control.ask(state, "model_run", {"name": name}, timeout_s=call.args.timeout)
    call.console.document({"name": name, **answer})
    for key, value in answer.items():
        call.console.line(f"{key}: {counts_text(value) if isinstance(value, dict) else value}")
    return FOUND if answer["counts"].get("held") else OK


def _verify_tables(call: Call, state: State, tables: list[Named]) -> tuple[list[TableReport], bool]:
    """A report per table, and whether time ran out."""
    from cdc import registry
    from cdc.verify import Asked, held_shape, verify_table

    deadline = time.monotonic() + call.args.timeout
    reports, timed_out = [], False

    def pace(took_s: float) -> None:
        nonlocal timed_out
        if time.monotonic() > deadline:
            timed_out = True
            raise TimedOut("the time was over before the table was compared", hint="give it more: --timeout")

    with tempfile.TemporaryDirectory(prefix="cdc-verify-") as folder:
        for source, table in tables:

            def await_lake(awaited: TableId, lsn: int, source: str = source) -> int:
                nonlocal timed_out
                # On a quiet server nothing flushes what a read itself has written (hint bits, pruning), and what is not
                # flushed is not streamed: the barrier's commit takes the stream past the position.
                lsn = max(lsn, call.admin(source).barrier())
                try:
                    wait_lake(state, source, [awaited], lsn, deadline)
                except TimedOut:
                    timed_out = True
                    raise
                for stopped in standing_still(state, source, [awaited]):
                    raise CdcError(f"the table is stopped: {stopped.reason}", hint=stopped.hint)
                return lsn

            section = call.config.sources[source]
            reader = registry.source_kind(section.type).comparer(section)
            call.console.note(f"comparing {source}.{table}")
            asked = Asked(
                sample=call.args.sample or 100.0, seed=time.time_ns() & 0x7FFFFFFF,
                show_values=call.args.show_values, by_cells=call.args.cells,
                held=held_shape(call.config, state, source, table), pace=pace,
            )  # fmt: skip
            reports.append(
                verify_table(source, table, reader, call.store, await_lake, temp_dir=Path(folder), asked=asked)
            )
            reader.close()
    return reports, timed_out


def _repair(call: Call, state: State, reports: list[TableReport]) -> None:
    """Have the rows that differ read anew, by their keys; where there are no keys, or too many, the whole table. Blocks
    to the end."""
    from cdc.cells import pieces

    runs: list[tuple[Named, str | None]] = []
    for report in reports:
        named = (report.source, report.table)
        count = sum(report.counts.values())
        if report.repair is None:
            call.console.note(f"reading {report.source}.{report.table} anew: {count} rows differ")
            runs.append((named, order_resync(state, named)))
            continue
        call.console.note(f"reading {count} rows of {report.source}.{report.table} anew")
        # One after the other: the log and the source are to serve others too.
        runs += [(named, order_resync(state, named, keys)) for keys in pieces(report.repair, KEYS_PER_ORDER)]
    if follow(call, state, runs, time.monotonic() + call.args.timeout) != OK:
        raise CdcError("the repairing resync did not end well", hint="cdc status shows why")


def _report(report: TableReport) -> dict[str, Any]:
    told = asdict(report)
    del told["repair"]
    return {**told, "table": str(report.table), "equal": report.equal}


def _show_report(call: Call, report: TableReport) -> None:
    line = call.console.line
    name = f"{report.source}.{report.table}"
    if report.error:
        line(f"{name}: not compared: {report.error}" + (f" ({report.hint})" if report.hint else ""))
        return
    verdict = "equal" if report.equal else "DIFFERENT" if any(report.counts.values()) else "not fully compared"
    rest = f", {report.not_compared} keys not compared: they changed in every round" if report.not_compared else ""
    rest += f", a sample of {report.sample:g} %" if report.sample < 100 else ""
    rest += f", by cells: {report.why}" if report.by == "cells" else ""
    line(f"{name}: {verdict}, {report.rows} rows{rest}")
    if report.left_out:
        line(f"  not in the lake, which is frozen: {', '.join(report.left_out)}")
    for kind, keys in (("missing", report.missing), ("extra", report.extra), ("different", report.different)):
        if report.counts[kind]:
            more = ", …" if report.counts[kind] > len(keys[:20]) else ""
            line(f"  {kind} in the lake: {report.counts[kind]}: {', '.join(keys[:20])}{more}")
    if report.columns:
        line("  by column: " + counts_text(report.columns))
    for entry in report.values:
        line(f"  {entry}")


def counts_text(counts: dict[str, Any]) -> str:
    """Names and numbers on one line."""
    return ", ".join(f"{key} {value}" for key, value in counts.items())


def _csv(result: pa.Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(result.schema.names)
    columns = [column.to_pylist() for column in result.columns]
    writer.writerows(zip(*columns, strict=True))
    return out.getvalue()
