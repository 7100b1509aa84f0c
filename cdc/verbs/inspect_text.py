"""What `cdc inspect` found, as text for a terminal; the cells that its page shows too. Names are made harmless."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cdc.console import bytes_text, seconds_text

if TYPE_CHECKING:
    from cdc.inspection import Ages, Changes, Inspection, KeyCandidate, TableFacts
    from cdc.verbs.call import Call

DAY_S = 86_400.0
IDENTITY = {"d": "default", "f": "full", "i": "index", "n": "nothing"}


def printable(text: str) -> str:
    """A name for a terminal: what would move its cursor or colour it is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show(call: Call, found: Inspection) -> None:
    """Everything, on standard output."""
    line = call.console.line
    line(f"source {found.source}: {found.server}, Postgres {found.version}, at {found.at}")
    line(f"measured over {seconds_text(found.interval_s)}; a round trip takes {found.round_trip_s * 1000:.1f} ms")
    line()
    _show_server(call, found)
    line()
    _show_tables(call, found.tables)
    _show_ages(call, found)
    _show_candidates(call, found.tables)
    _show_plan(call, found)
    _show_not_measured(call, found)
    line()
    for finding in found.findings:
        line(f"{finding.severity.upper():8}{printable(finding.object)}: {finding.name}: {printable(finding.message)}")
        if finding.fix:
            line(f"        mend it: {printable(finding.fix)}")
    verdict = "something endangers capture" if found.is_endangered else "nothing that endangers capture was found"
    line(f"{verdict}; rights and configuration: cdc check")


def _show_server(call: Call, found: Inspection) -> None:
    line, kept = call.console.line, found.retention
    if found.wal is not None:
        before = found.wal.bytes_per_hour_before
        told = f", {bytes_text(before)}/h since the counters were reset" if before is not None else ""
        line(f"WAL      {bytes_text(found.wal.bytes_per_hour)}/h, of the whole server{told}")
    limit = "no limit" if kept.keep_bytes is None else bytes_text(kept.keep_bytes)
    outage = f": a daemon may be down for {duration_text(found.outage_s)}" if found.outage_s is not None else ""
    line(f"keeps    {limit} per slot{outage}; pg_wal holds {bytes_text(kept.wal_dir_bytes)}")
    line(f"room     {kept.slots_left} slots and {kept.senders_left} senders left")
    line("settings " + ", ".join(f"{name} {value}" for name, value in kept.settings.items()))
    for slot in kept.slots:
        state = "active" if slot.active else "not active"
        ours = ", ours" if slot.ours else ""
        line(f"slot     {slot.name}: {slot.kind}, {state}{ours}, {bytes_text(slot.retained_bytes)} retained")
    for t in found.transactions:
        writes = ", has written" if t.writes else ""
        state = f", {t.state}" if t.state else ""
        line(f"open     {printable(t.who)}: {duration_text(t.seconds)}{state}{writes}")


def duration_text(seconds: float | None) -> str:
    """A duration for people, from milliseconds to days; `-` if it is not known."""
    if seconds is None or 1 <= abs(seconds) < 2 * DAY_S:
        return seconds_text(seconds)
    return f"{seconds * 1000:.0f} ms" if abs(seconds) < 1 else f"{seconds / DAY_S:,.0f} days"


def rate_text(changes: Changes | None) -> str:
    """Changes per second for people."""
    if changes is None or changes.per_second is None:
        return "-"
    return per_second_text(changes.per_second)


def per_second_text(rate: float) -> str:
    """A rate for people."""
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


def _show_tables(call: Call, tables: list[TableFacts]) -> None:
    rows = [
        (
            printable(str(t.table)),
            printable(", ".join(t.key)) or "none",
            IDENTITY.get(t.identity, t.identity),
            t.rows_estimated if t.rows_estimated is not None else "-",
            bytes_text(t.size.table_bytes if t.size else None),
            bytes_text(t.size.index_bytes if t.size else None),
            f"{t.space.unused_share:.0%}" if t.space is not None else "-",
            rate_text(t.changes),
            changes_text(t.changes),
            rate_text(t.changes_before),
        )
        for t in tables
    ]
    call.console.table(
        ("table", "key", "identity", "rows", "size", "indexes", "unused", "rate", "ins/upd/del", "before"), rows
    )


def changes_text(changes: Changes | None) -> str:
    """Inserts, updates and deletes."""
    return f"{changes.inserts}/{changes.updates}/{changes.deletes}" if changes is not None else "-"


def _show_ages(call: Call, found: Inspection) -> None:
    aged = [(t, t.ages) for t in found.tables if t.ages is not None]
    if aged:
        call.console.line()
        call.console.line(f"age of rows when they changed; late is older than {duration_text(found.late_after_s)}")
        rows = [(printable(str(t.table)), *ages_row(ages)) for t, ages in aged]
        call.console.table(("table", "by column", "found", "rows", "late", "oldest", "measured"), rows, indent="  ")


def ages_row(ages: Ages) -> tuple[str, ...]:
    """Column, how it was found, rows, late share, oldest, how it was measured."""
    share = f"{ages.late_share:.1%}" if ages.late_share is not None else "-"
    how = f"{ages.rows_seen} rows in {ages.read_share:.0%} of the table, by {ages.changed_at}"
    return printable(ages.column), ages.found_by, f"{ages.rows:.0f}", share, duration_text(ages.oldest_s), how


def _show_candidates(call: Call, tables: list[TableFacts]) -> None:
    rows = [(printable(str(t.table)), *candidate_row(c)) for t in tables for c in t.candidates]
    if rows:
        call.console.line()
        call.console.line("would-be keys of tables that have none")
        call.console.table(("table", "columns", "found", "result"), rows, indent="  ")


def candidate_row(candidate: KeyCandidate) -> tuple[str, str, str]:
    """Columns, how they were found, and what was counted."""
    c = candidate
    if c.index:
        result = "unique and never null, by the index"
    else:
        among = f"all {c.rows_read} rows" if c.exact else f"a sample of {c.rows_read} rows"
        result = f"in {among}: {c.extra_rows} duplicates"
        if c.extra_rows:
            result += f" ({c.groups} values, the commonest {c.largest_group} times)"
        if c.rows_null:
            result += f", {c.rows_null} with nulls"
        if c.pairs_at_most is not None:
            result += f"; in the whole table at most about {c.pairs_at_most} pairs (95 %)"
    return printable(", ".join(c.columns)), printable(c.found_by), result


def _show_plan(call: Call, found: Inspection) -> None:
    plan = found.plan
    if plan is None:
        return
    samples = {t.table: t.sample for t in found.tables}
    rows = []
    for p in plan.tables:
        sample = samples[p.table]
        speed = f"{bytes_text(sample.bytes / sample.seconds)}/s" if sample and sample.seconds else "-"
        rows.append(
            (printable(str(p.table)), p.strategy, p.chunks, p.chunk_rows, bytes_text(p.bytes), speed,
             duration_text(p.seconds))
        )  # fmt: skip
    call.console.line()
    call.console.line("first snapshots, from one chunk of each table")
    call.console.table(("table", "by", "chunks", "rows each", "to read", "speed", "time"), rows, indent="  ")
    lacking = f"; {len(plan.unplanned)} tables are not in it" if plan.unplanned else ""
    call.console.line(
        f"  in all {bytes_text(plan.bytes)} in {duration_text(plan.seconds)}, readers: {plan.readers}{lacking}"
    )


def _show_not_measured(call: Call, found: Inspection) -> None:
    every = [(found.server, n) for n in found.not_measured]
    every += [(str(t.table), n) for t in found.tables for n in t.not_measured]
    if every:
        call.console.line()
        call.console.line("not measured")
        rows = [(printable(o), n.what, printable(n.why), printable(n.fix)) for o, n in every]
        call.console.table(("where", "what", "why", "mend it"), rows, indent="  ")
