"""Verbs over the event log: ls, cat, tail. They read beside the daemon, through a read-only state database."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cdc.console import bytes_text, lsn_text, plain
from cdc.errors import StreamRestarted
from cdc.verbs.call import OK, Call, resolve_tables, tables_of

if TYPE_CHECKING:
    from cdc.log import EventLog
    from cdc.records import LogRecord
    from cdc.state import State
    from cdc.table import TableId

HEADERS = ("offset", "source", "table", "kind", "rows", "bytes", "epoch", "first", "last", "run")


def list_records(call: Call) -> int:
    """Records, oldest first."""
    with _opened(call) as (state, log):
        records = _records(call, state, log, after=call.args.after, limit=call.args.limit)
    call.console.document({"records": [_document(r) for r in records]})
    call.console.table(HEADERS, [_row(r) for r in records])
    return OK


def cat(call: Call) -> int:
    """Rows of records: JSON lines, or one document with --json. Shows values: that is what it is asked for."""
    rows = []
    with _opened(call) as (state, log):
        for record in _records(call, state, log, after=call.args.after, limit=call.args.limit):
            for row in _read(state, log, record):
                if call.console.as_json:
                    rows.append(row)
                else:
                    call.console.raw(json.dumps(row, default=plain, ensure_ascii=False) + "\n")
    call.console.document({"rows": rows})
    return OK


def tail(call: Call) -> int:
    """The newest records, then those that come, until --timeout or Ctrl-C."""
    deadline = None if call.args.timeout is None else time.monotonic() + call.args.timeout
    shown: list[dict[str, Any]] = []
    with _opened(call) as (state, log):
        sources, _ = _chosen(call, state)
        after = {source: max(0, log.end_offset(source) - call.args.limit) for source in sources}
        if not call.console.as_json:
            call.console.line("  ".join(HEADERS))
        try:
            while deadline is None or time.monotonic() < deadline:
                for source in sources:
                    records = _records(call, state, log, after=after[source], limit=1000, source=source)
                    shown += _show(call, records)
                    after[source] = max([after[source], *(r.offset for r in records)])
                left = 0.5 if deadline is None else min(0.5, deadline - time.monotonic())
                time.sleep(max(0.0, left))
        except KeyboardInterrupt:
            call.console.note("")
    call.console.document({"records": shown})
    return OK


def _show(call: Call, records: list[LogRecord]) -> list[dict[str, Any]]:
    for record in records:
        call.console.line("  ".join(str(cell) for cell in _row(record)))
    return [_document(r) for r in records] if call.console.as_json else []


@contextmanager
def _opened(call: Call) -> Iterator[tuple[State, EventLog]]:
    from cdc.log import EventLog

    with call.state(readonly=True) as state:
        log = EventLog(call.config.log_dir, state, bytes_max=call.config.log_bytes_max)
        try:
            yield state, log
        finally:
            log.close()


def _chosen(call: Call, state: State) -> tuple[list[str], TableId | None]:
    """The sources, and the one table if one is named."""
    sources = call.sources([call.args.source] if call.args.source else [])
    if not call.args.table:
        return sources, None
    source, table = resolve_tables(tables_of(state, sources, with_own=True), [call.args.table])[0]
    return [source], table


def _records(
    call: Call, state: State, log: EventLog, *, after: int, limit: int, source: str | None = None
) -> list[LogRecord]:
    sources, table = _chosen(call, state)
    found = [r for s in sources if source in (None, s) for r in log.records(s, after, table=table, limit=limit)]
    return sorted(found, key=lambda r: r.offset)[:limit]


def _read(state: State, log: EventLog, record: LogRecord) -> list[dict[str, Any]]:
    """Rows of a record; none if it has left the log meanwhile."""
    from cdc.schema import SchemaBook

    try:
        batch = log.read(record, SchemaBook(state, record.source).get(record.table, record.version))
    except StreamRestarted:
        return []
    names, columns = batch.data.schema.names, [c.to_pylist() for c in batch.data.columns]
    start = batch.row_start
    where = {"offset": record.offset, "source": record.source, "table": str(record.table)}
    # System columns and the row image stand apart: a source column may have a system column's name.
    return [
        {
            **where,
            **{names[c]: columns[c][i] for c in range(start)},
            "row": {names[c]: columns[c][i] for c in range(start, len(names))},
        }
        for i in range(batch.data.num_rows)
    ]


def _document(record: LogRecord) -> dict[str, Any]:
    return {
        "offset": record.offset,
        "source": record.source,
        "table": str(record.table),
        "schema_version": record.version,
        "kind": record.kind,
        "rows": record.rows,
        "bytes": record.bytes,
        "epoch": record.epoch,
        "first_lsn": lsn_text(record.first_lsn) or None,
        "last_lsn": lsn_text(record.last_lsn) or None,
        "run": record.run,
        "chunk": record.chunk,
        "has_truncate": record.has_truncate,
    }


def _row(record: LogRecord) -> tuple[Any, ...]:
    run = f"{record.run} #{record.chunk}" if record.chunk is not None else record.run
    span = (lsn_text(record.first_lsn), lsn_text(record.last_lsn))
    size = bytes_text(record.bytes)
    return (record.offset, record.source, record.table, record.kind, record.rows, size, record.epoch, *span, run or "")
