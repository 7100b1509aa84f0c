"""What the demo shows: the story line by line and, on a terminal, a live panel below it; plain lines elsewhere.

Knows how things look and nothing of how they come about. With `--json` everything goes to standard error, so that
standard output holds the document alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cdc.console import bytes_text, seconds_text
from cdc.demo.facts import Facts

PLAIN_EVERY_S = 3.0
REFRESH_PER_S = 4
PANEL_WIDTH = 104
STEPS = {
    "head": "the database's head",
    "received": "received",
    "logged": "in the event log",
    "landed": "in the lake",
    "confirmed": "confirmed to the database",
}
RATE_NAMES = {
    "transactions": "transactions",
    "captured": "changes captured",
    "landed": "rows landed",
    "merged": "rows merged",
}


class View:
    """`say` and its like print at once; the panel follows `facts` by itself while the view is entered."""

    def __init__(self, *, as_json: bool) -> None:
        self._console = Console(stderr=as_json, highlight=False, soft_wrap=True)
        self._began = time.monotonic()
        self._live: Live | None = None
        self._lines: threading.Thread | None = None
        self._ending = threading.Event()
        self.chapter = ""
        """What is going on now, in a few words."""
        self.facts: Callable[[], Facts | None] = lambda: None
        """Gives the newest facts; None: there are none."""

    @property
    def seconds(self) -> float:
        """Since the demo began."""
        return time.monotonic() - self._began

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._panel, console=self._console, refresh_per_second=REFRESH_PER_S, transient=True
            )
            self._live.start()
        else:
            self._lines = threading.Thread(target=self._plain_lines, name="demo-view", daemon=True)
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._lines is not None:
            self._lines.join(5.0)

    def say(self, text: str, style: str = "") -> None:
        """A line of the story."""
        self._line(Text(text, style))

    def command(self, words: str, result: str = "") -> None:
        """A command that the demo ran, and what came of it."""
        line = Text("$ cdc " + words, "bold cyan")
        if result:
            line.append("  → " + result, "not bold default")
        self._line(line)

    def event(self, text: str) -> None:
        """Something that happens to the shop or the daemon."""
        self._line(Text(text, "bold yellow"))

    def bare(self, text: str = "", style: str = "") -> None:
        """A line without the time in front."""
        self._console.print(Text(text, style))

    def _line(self, text: Text) -> None:
        self._console.print(Text(f"{self.seconds:5.1f} s  ", "dim").append(text))

    # ---- off a terminal ----

    def _plain_lines(self) -> None:
        while not self._ending.wait(PLAIN_EVERY_S):
            facts = self.facts()
            if facts is not None and facts.source:
                self._console.print(Text(f"{self.seconds:5.1f} s    {plain(facts)}"))

    # ---- on a terminal ----

    def _panel(self) -> RenderableType:
        facts = self.facts()
        if facts is None or not facts.source:
            return Text(f"{self.seconds:5.1f} s  {self.chapter} …", "bold")
        upper = Table.grid(padding=(0, 4))
        upper.add_row(_ladder(facts), _rates(facts))
        title = f"{self.seconds:.0f} s · {self.chapter}"
        width = min(PANEL_WIDTH, self._console.width)
        return Panel(Group(*_state(facts), Text(), upper, Text(), _tables(facts)), title=title, width=width)


def plain(facts: Facts) -> str:
    """One line of facts."""
    ladder = {step["step"]: step for step in facts.source.get("ladder", [])}
    landed = ladder.get("landed", {})
    lag = f"lake behind by {bytes_text(landed.get('lag_bytes'))}, {seconds_text(landed.get('lag_seconds'))}"
    rates = ", ".join(f"{facts.rates[name]:.0f} {text}/s" for name, text in RATE_NAMES.items() if name in facts.rates)
    rows = ", ".join(
        f"{name.removeprefix('public.')} {facts.lake_rows.get(name, 0)}/{count}"
        for name, count in facts.shop_rows.items()
    )
    return f"{_phase(facts)}; {lag}; {rates or 'daemon down'}; rows lake/shop: {rows}"


def _phase(facts: Facts) -> str:
    running = facts.document.get("daemon", {}).get("running")
    return str(facts.source.get("phase", "")) if running else "daemon down"


def _state(facts: Facts) -> list[Text]:
    daemon: Mapping[str, Any] = facts.document.get("daemon", {})
    text = Text("daemon ")
    if daemon.get("running"):
        text.append(f"pid {daemon['pid']}, {_phase(facts)}", "green")
    else:
        text.append("down", "bold red")
    slot = facts.source.get("slot", {})
    text.append(f" · slot {slot.get('name', '')}: {bytes_text(slot.get('retained_bytes'))} of WAL kept")
    text.append(f" · event log {bytes_text(facts.document.get('log', {}).get('bytes'))}")
    lines = [text, *(Text(_sync(sync)) for sync in facts.document.get("syncs", []))]
    if facts.source.get("error"):
        lines.append(Text(facts.source["error"], "red"))
    return lines


def _sync(sync: Mapping[str, Any]) -> str:
    last = sync["last_run"]
    what = "waits for its first run"
    if last is not None:
        counts = last["counts"]
        what = f"last run {last['outcome']}"
        if counts:
            what += f", {counts.get('written', 0):,} rows written, {counts.get('unchanged', 0):,} unchanged"
    return f"sync {sync['name']} into {sync['table']}: {what}"


def _ladder(facts: Facts) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("position")
    table.add_column("LSN")
    table.add_column("behind", justify="right", min_width=9)
    table.add_column("age", justify="right", min_width=7)
    for step in facts.source.get("ladder", []):
        head = step["step"] == "head"
        behind, age = bytes_text(step["lag_bytes"]), seconds_text(step["lag_seconds"])
        name = STEPS.get(step["step"], step["step"])
        table.add_row(name, step["lsn"] or "-", "" if head else behind, "" if head else age)
    return table


def _rates(facts: Facts) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("rate")
    table.add_column("per second", justify="right", min_width=10)
    for name, text in RATE_NAMES.items():
        rate = facts.rates.get(name)
        table.add_row(text, "-" if rate is None else f"{rate:,.0f}")
    return table


def _tables(facts: Facts) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("table")
    for name in ("rows in the shop", "rows in the lake"):
        table.add_column(name, justify="right")
    table.add_column("state", min_width=36, no_wrap=True)
    known = {entry["table"]: entry for entry in facts.tables}
    for name, rows in facts.shop_rows.items():
        lake, entry = facts.lake_rows.get(name), known.get(name)
        style = "green" if lake == rows else ""
        in_lake = Text("-" if lake is None else f"{lake:,}", style)
        table.add_row(name, f"{rows:,}", in_lake, _table_state(entry) if entry else Text("not seen yet"))
    return table


def _table_state(entry: Mapping[str, Any]) -> Text:
    snapshot = entry["snapshot"]
    if entry["reason"]:
        return Text(f"{entry['state']}: {entry['reason']}", "red")
    if snapshot is not None:
        return Text(f"{snapshot['kind']} snapshot: {snapshot['rows']:,} rows read", "yellow")
    return Text(entry["state"], "" if entry["state"] != "streaming" else "green")
