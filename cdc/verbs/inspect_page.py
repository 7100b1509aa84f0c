"""The page of `cdc inspect --html`: one HTML file with plots, readable in light and dark, offline and without scripts.

The page is built as a tree of elements, so whatever a table is called stays text: nothing is ever pasted into markup.
Plots are horizontal bars as inline SVG, coloured by the style sheet; their numbers stand in the tables below. It loads
nothing and holds no value of a row. What the numbers are is said in docs/inspect.md and, in short, on the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from xml.etree.ElementTree import Element, tostring

from cdc.console import bytes_text, seconds_text
from cdc.inspection import AGE_LABELS, Inspection, TableFacts
from cdc.verbs.inspect_text import (
    IDENTITY,
    ages_row,
    candidate_row,
    changes_text,
    duration_text,
    per_second_text,
    rate_text,
)

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1c1c1a; --soft: #5d5c57; --line: #e2e1dc;
  --bar1: #2467b5; --bar2: #d9822b; --bar3: #3a9a7c; --bar4: #8a6fb8; --good: #20744f; --warn: #8f5a00; --bad: #b3261e;
  --age0: #b3261e; --age1: #d3e3f5; --age2: #accbec; --age3: #84b1e0; --age4: #5c96d2; --age5: #3a7bbf; --age6: #225c99;
  --age7: #123d6b; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #1f1f1d; --ink: #eceae4; --soft: #a5a39b;
  --line: #393834; --bar1: #6aa6ea; --bar2: #eda258; --bar3: #62c0a2; --bar4: #b49ae0; --good: #6fcf9f; --warn: #e9b44c;
  --bad: #ff8a80; --age0: #ff8a80; --age1: #2b4a70; --age2: #355f8f; --age3: #4275ac; --age4: #568dc7; --age5: #78a9dd;
  --age6: #a3c8ee; --age7: #dcebfa; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 17px; margin: 36px 0 10px; }
p { margin: 6px 0; } .soft, figcaption, th { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 18px 0; }
.tile, figure, .finding { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 10px 14px; } .tile b { display: block; font-size: 20px; font-weight: 600; }
.tile span { color: var(--soft); font-size: 13px; }
figure { margin: 12px 0; padding: 14px 16px; } figcaption { font-size: 13px; margin-bottom: 8px; }
figcaption b { color: var(--ink); font-size: 15px; display: block; }
svg { display: block; width: 100%; min-width: 680px; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .value { fill: var(--soft); } svg .track { fill: var(--line); opacity: .45; } svg rect { stroke: var(--card); }
.key { display: inline-block; font-size: 13px; margin-right: 14px; white-space: nowrap; }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
.finding { padding: 8px 14px; margin: 8px 0; border-left-width: 4px; overflow-wrap: anywhere; }
.finding b { text-transform: uppercase; font-size: 12px; letter-spacing: .04em; margin-right: 8px; }
.error { border-left-color: var(--bad); } .warning { border-left-color: var(--warn); }
.info { border-left-color: var(--bar1); }
.error b, b.bad { color: var(--bad); } .warning b { color: var(--warn); } .info b { color: var(--bar1); }
b.good { color: var(--good); } .bar1 { fill: var(--bar1); background: var(--bar1); }
.bar2 { fill: var(--bar2); background: var(--bar2); } .bar3 { fill: var(--bar3); background: var(--bar3); }
.bar4 { fill: var(--bar4); background: var(--bar4); } .age0 { fill: var(--age0); background: var(--age0); }
.age1 { fill: var(--age1); background: var(--age1); } .age2 { fill: var(--age2); background: var(--age2); }
.age3 { fill: var(--age3); background: var(--age3); } .age4 { fill: var(--age4); background: var(--age4); }
.age5 { fill: var(--age5); background: var(--age5); } .age6 { fill: var(--age6); background: var(--age6); }
.age7 { fill: var(--age7); background: var(--age7); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; font-weight: 500; } th, td { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } td { overflow-wrap: anywhere; } .number { text-align: right; white-space: nowrap;
  padding-right: 18px; font-variant-numeric: tabular-nums; }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }
"""

BARS_MAX = 30
"""Tables in a plot, the largest; the tables below it have all."""
LABEL_WIDTH, BAR_WIDTH, VALUE_WIDTH, ROW_HEIGHT = 250, 580, 170, 26
LABEL_CHARACTERS = 36

Bar = tuple[str, Sequence[float], str]
"""A name, its parts, and what stands behind the bar."""

HOW = (
    ("Rows, unused space", "counted in the table, or in a share of its blocks if it is bigger than 32 MB. Unused is"
     " what live rows and the fillfactor leave of the table's own file; indexes are not looked into."),
    ("Changes", "the server's counters at both ends of the interval. Sessions report to them about once a second."),
    ("WAL", "the distance of the server's write position, of all databases together."),
    ("Ages at change", "rows of now that a snapshot at the interval's begin did not see, by the time of reading minus"
     " the column; where the server dates commits (track_commit_timestamp), rows last changed within a day, by their"
     " commit. A row that changed twice counts once, a deleted one not at all."),
    ("Would-be keys", "rows grouped by the columns: all of a table up to 128 MB, else a share of its blocks."),
    ("First snapshots", "one chunk of each table, read by the COPY of snapshots and scaled to the table's rows. It is"
     " the reading at the source; decoding and landing are not in it."),
)  # fmt: skip


def page(found: Inspection) -> str:
    """The whole document."""
    main = _node(
        "main",
        _node("h1", "Source ", _name(found.source)),
        _node("p", _name(found.server), f", Postgres {found.version}, measured over {seconds_text(found.interval_s)}",
              f" until {found.at}", kind="soft"),
        _verdict(found),
        _tiles(found),
        *_findings(found),
        *_plots(found),
        *_all_tables(found),
        *_retention(found),
        *_not_measured(found),
        _node("h2", "How it was measured"),
        *(_node("p", _node("b", f"{what}: "), how, kind="soft") for what, how in HOW),
    )  # fmt: skip
    viewport = _node("meta", name="viewport", content="width=device-width, initial-scale=1")
    head = _node(
        "head", _node("meta", charset="utf-8"), viewport, _node("title", f"cdc inspect {found.source}"),
        _node("style", STYLE),
    )  # fmt: skip
    return "<!DOCTYPE html>\n" + tostring(_node("html", head, _node("body", main), lang="en"), "unicode", method="html")


def _node(tag: str, *content: Element | str, kind: str = "", **attributes: str) -> Element:
    """An element; texts and elements in it in their order."""
    made = Element(tag, {key.replace("_", "-"): value for key, value in attributes.items()})
    if kind:
        made.set("class", kind)
    for part in content:
        if isinstance(part, Element):
            made.append(part)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + part
        else:
            made.text = (made.text or "") + part
    return made


def _name(text: str) -> Element:
    """A name from the source: whichever way it is written, what stands around it keeps its direction."""
    return _node("bdi", text)


def _verdict(found: Inspection) -> Element:
    if found.is_endangered:
        return _node("p", _node("b", "Something endangers capture", kind="bad"), ": see the findings.")
    return _node("p", _node("b", "Nothing that endangers capture was found", kind="good"), ".")


def _tiles(found: Inspection) -> Element:
    rates = [t.changes.per_second or 0.0 for t in found.tables if t.changes is not None]
    size = sum(t.size.all_bytes for t in found.tables if t.size is not None)
    outage = duration_text(found.outage_s) if found.retention.keep_bytes is not None else "no limit"
    facts = [
        (str(len(found.tables)), "tables"),
        (bytes_text(size), "with indexes"),
        (per_second_text(sum(rates)), "rows changed"),
        (f"{bytes_text(found.wal.bytes_per_hour)}/h" if found.wal else "-", "WAL, whole server"),
        (outage, "a daemon may be down"),
        (duration_text(found.plan.seconds) if found.plan else "-", "to read everything once"),
    ]
    return _node("div", *(_node("div", _node("b", n), _node("span", what), kind="tile") for n, what in facts),
                 kind="tiles")  # fmt: skip


def _findings(found: Inspection) -> list[Element]:
    if not found.findings:
        return []
    order = {"error": 0, "warning": 1}
    shown = []
    for finding in sorted(found.findings, key=lambda f: order.get(f.severity, 2)):
        parts: list[Element | str] = [_node("b", finding.severity), _name(finding.message)]
        if finding.fix:
            parts += [_node("br"), _node("span", "mend it: ", kind="soft"), _node("code", finding.fix)]
        severity = finding.severity if finding.severity in order else "info"
        shown.append(_node("div", *parts, kind=f"finding {severity}"))
    return [_node("h2", "Findings"), *shown]


# --- plots ------------------------------------------------------------------------------------------------------------


def _plots(found: Inspection) -> list[Element]:
    plots = [
        _figure("Size", "bytes on the server's disk", ("live rows", "unused", "TOAST and maps", "indexes"), "bar",
                _bars(found.tables, _size_parts, lambda parts: bytes_text(sum(parts)))),
        _figure("Changes", f"rows within {seconds_text(found.interval_s)}", ("inserts", "updates", "deletes"), "bar",
                _bars(found.tables, _change_parts, lambda parts: f"{sum(parts):,.0f}")),
        _figure("Age of rows when they changed", "share of the rows that were inserted or updated", AGE_LABELS, "age",
                _age_bars(found.tables)),
        _figure("First snapshots", "seconds of reading at the source", ("time",), "bar", _plan_bars(found)),
    ]  # fmt: skip
    return [_node("h2", "Plots"), *plots]


def _size_parts(table: TableFacts) -> list[float]:
    size = table.size
    if size is None:
        return []
    unused = min(table.space.unused_bytes, size.heap_bytes) if table.space is not None else 0
    return [size.heap_bytes - unused, unused, size.table_bytes - size.heap_bytes, size.index_bytes]


def _change_parts(table: TableFacts) -> list[float]:
    changes = table.changes
    return [changes.inserts, changes.updates, changes.deletes] if changes is not None else []


def _bars(
    tables: Iterable[TableFacts], parts: Callable[[TableFacts], list[float]], told: Callable[[list[float]], str]
) -> list[Bar]:
    bars: list[Bar] = [(str(table.table), values, told(values)) for table in tables if sum(values := parts(table)) > 0]
    return sorted(bars, key=lambda bar: -sum(bar[1]))


def _age_bars(tables: Iterable[TableFacts]) -> list[Bar]:
    """Of each table's changed rows the shares, so that each bar is full."""
    bars: list[Bar] = []
    for table in tables:
        ages = table.ages
        if ages is not None and (dated := sum(ages.counts)):
            late = f"{ages.late_share:.1%} late" if ages.late_share is not None else ""
            bars.append((str(table.table), [count / dated for count in ages.counts], late))
    return bars


def _plan_bars(found: Inspection) -> list[Bar]:
    plans = found.plan.tables if found.plan is not None else ()
    bars: list[Bar] = [(str(p.table), [p.seconds], f"{duration_text(p.seconds)}, chunks: {p.chunks}") for p in plans]
    return sorted(bars, key=lambda bar: -sum(bar[1]))


def _figure(title: str, unit: str, parts: Sequence[str], colours: str, bars: list[Bar]) -> Element:
    first = 0 if colours == "age" else 1
    kinds = [f"{colours}{i}" for i in range(first, first + len(parts))]
    caption = _node("figcaption", _node("b", title), unit)
    if not bars:
        return _node("figure", caption, _node("p", "nothing to show", kind="soft"))
    if len(bars) > BARS_MAX:
        caption = _node("figcaption", _node("b", title), f"{unit}; the {BARS_MAX} largest of {len(bars)}")
    keys = [_node("span", _node("i", kind=kind), part, kind="key") for kind, part in zip(kinds, parts, strict=True)]
    legend = [_node("p", *keys, kind="soft")] if len(parts) > 1 else []
    plot = _node("div", _plot(title, parts, kinds, bars[:BARS_MAX]), kind="scroll")
    return _node("figure", caption, *legend, plot)


def _plot(title: str, parts: Sequence[str], kinds: Sequence[str], bars: list[Bar]) -> Element:
    largest = max(sum(values) for _, values, _ in bars)
    width, height = LABEL_WIDTH + BAR_WIDTH + VALUE_WIDTH, ROW_HEIGHT * len(bars)
    rows: list[Element] = []
    for i, (name, values, told) in enumerate(bars):
        top = i * ROW_HEIGHT
        short = name if len(name) <= LABEL_CHARACTERS else name[: LABEL_CHARACTERS - 1] + "…"
        middle = f"{top + ROW_HEIGHT / 2 + 4:g}"
        rows.append(_node("text", short, _node("title", name), x=str(LABEL_WIDTH - 10), y=middle, text_anchor="end"))
        at = float(LABEL_WIDTH)
        rows.append(_rect(at, top, BAR_WIDTH, "track"))
        for part, kind, value in zip(parts, kinds, values, strict=True):
            length = value / largest * BAR_WIDTH
            if length > 0:
                rows.append(_rect(at, top, max(length, 1.0), kind, f"{name}: {part}"))
            at += length
        rows.append(_node("text", told, x=str(LABEL_WIDTH + BAR_WIDTH + 10), y=middle, kind="value"))
    return _node("svg", *rows, viewBox=f"0 0 {width} {height}", role="img", aria_label=title)


def _rect(x: float, top: int, width: float, kind: str, title: str = "") -> Element:
    content = [_node("title", title)] if title else []
    return _node("rect", *content, x=f"{x:.1f}", y=str(top + 4), width=f"{width:.1f}", height=str(ROW_HEIGHT - 8),
                 rx="2", kind=kind)  # fmt: skip


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(
    title: str, headers: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()
) -> list[Element]:
    right = set(numbers)
    body = [
        _node("tr", *(_node("td", _name(cell), kind="number" if i in right else "") for i, cell in enumerate(row)))
        for row in rows
    ]
    if not body:
        return []
    names = [_node("th", header, kind="number" if i in right else "") for i, header in enumerate(headers)]
    head = _node("thead", _node("tr", *names))
    return [_node("h2", title), _node("div", _node("table", head, _node("tbody", *body)), kind="scroll")]


def _all_tables(found: Inspection) -> list[Element]:
    rows = [
        (
            str(t.table),
            ", ".join(t.key) or "none",
            IDENTITY.get(t.identity, t.identity),
            f"{t.rows_estimated:,}" if t.rows_estimated is not None else "-",
            bytes_text(t.size.table_bytes if t.size else None),
            bytes_text(t.size.index_bytes if t.size else None),
            f"{t.space.unused_share:.0%}" if t.space is not None else "-",
            rate_text(t.changes),
            changes_text(t.changes),
        )
        for t in found.tables
    ]
    headers = ("table", "key", "identity", "rows", "size", "indexes", "unused", "rate", "ins/upd/del")
    ages = [(str(t.table), *ages_row(t.ages)) for t in found.tables if t.ages is not None]
    candidates = [(str(t.table), *candidate_row(c)) for t in found.tables for c in t.candidates]
    plans = found.plan.tables if found.plan is not None else ()
    planned = [
        (str(p.table), p.strategy, str(p.chunks), f"{p.chunk_rows:,}", bytes_text(p.bytes), duration_text(p.seconds))
        for p in plans
    ]
    late = f"Age of rows when they changed (late: older than {duration_text(found.late_after_s)})"
    return [
        *_table("Tables", headers, rows, range(3, 9)),
        *_table(late, ("table", "by column", "found", "rows", "late", "oldest", "measured"), ages, (3, 4, 5)),
        *_table("Would-be keys of tables that have none", ("table", "columns", "found", "result"), candidates),
        *_table("First snapshots", ("table", "by", "chunks", "rows each", "to read", "time"), planned, range(2, 6)),
    ]


def _retention(found: Inspection) -> list[Element]:
    kept = found.retention
    room = [("slots left", str(kept.slots_left)), ("senders left", str(kept.senders_left)),
            ("pg_wal", bytes_text(kept.wal_dir_bytes))]  # fmt: skip
    slots = [
        (s.name, s.kind, "active" if s.active else "not active", s.wal_status or "-", bytes_text(s.retained_bytes))
        for s in kept.slots
    ]
    opened = [
        (t.who, t.state or "-", duration_text(t.seconds), "yes" if t.writes else "no") for t in found.transactions
    ]
    return [
        *_table("Retention", ("setting", "value"), [*room, *kept.settings.items()]),
        *_table("Slots", ("slot", "kind", "", "wal_status", "retained"), slots, (4,)),
        *_table("Open transactions, the longest", ("who", "state", "open for", "has written"), opened, (2,)),
    ]


def _not_measured(found: Inspection) -> list[Element]:
    rows = [(found.server, n.what, n.why, n.fix) for n in found.not_measured]
    rows += [(str(t.table), n.what, n.why, n.fix) for t in found.tables for n in t.not_measured]
    return _table("Not measured", ("where", "what", "why", "mend it"), rows)
