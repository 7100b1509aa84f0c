"""The demo's story from the first table to the last comparison, with a real daemon and the real command line.

Everything is judged from outside: tables by `cdc verify`, pushed scores by reading the model from the lake and the
table from the shop. What happens here between the steps (a kill, an ALTER TABLE, a resync) happens while the traffic
runs.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from cdc.demo.facts import Watch
from cdc.demo.folder import MODEL_SQL, SYNC, shown
from cdc.demo.processes import DemoFailed, Interrupts, Outcome, Processes
from cdc.demo.shop import Shop, Traffic
from cdc.demo.view import View

CALM_S = 120.0
"""Bound of what takes a few seconds on an idle machine."""
RESYNCED = "public.orders"
COLUMN_AT, KILL_AT, MODEL_AT, RESYNC_AT = 0.1, 0.3, 0.55, 0.75
"""When things happen, as shares of the duration that begins when the first snapshots are done; later if what comes
before takes longer."""


@dataclass
class Verdict:
    """What the demo has shown; becomes its JSON document."""

    tables: list[dict[str, Any]] = field(default_factory=list)
    scores_equal: bool = False
    scores: int = 0
    transactions: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        return bool(self.tables) and all(table["equal"] for table in self.tables) and self.scores_equal


class Story:
    """One demo. `tell` is all of it but `keep_running`; the caller cleans up after either."""

    def __init__(
        self,
        shop: Shop,
        config: Path,
        processes: Processes,
        watch: Watch,
        view: View,
        interrupts: Interrupts,
        duration_s: float,
    ) -> None:
        self._shop = shop
        self._config = config
        self._processes = processes
        self._watch = watch
        self._view = view
        self._interrupts = interrupts
        self._duration_s = duration_s
        self._traffic: Traffic | None = None
        self._streaming_since = 0.0

    def tell(self) -> Verdict:
        """Run it all; DemoFailed if a step does not work, Interrupted."""
        self._check()
        self._begin()
        self._at(COLUMN_AT, self._add_column)
        self._at(KILL_AT, self._kill)
        self._at(MODEL_AT, self._score)
        self._at(RESYNC_AT, self._resync)
        verdict = Verdict()
        self._at(1.0, lambda: self._end_traffic(verdict))
        self._settle(verdict)
        self._verify(verdict)
        return verdict

    def end(self) -> None:
        """Stop the daemon as a service manager would; DemoFailed if it does not end well."""
        self._view.chapter = "stopping"
        began = self._view.seconds
        code = self._processes.stop_daemon()
        if code != 0:
            raise DemoFailed(f"the daemon ended with code {code} after SIGTERM")
        self._view.event(f"SIGTERM: the daemon stopped in {self._view.seconds - began:.1f} s")

    def keep_running(self) -> None:
        """Traffic again, until somebody interrupts (raises Interrupted)."""
        self._start_traffic()
        self._view.chapter = "everything keeps running; Ctrl-C ends it"
        while True:
            self._check_all()
            self._interrupts.sleep(0.2)

    # ---- the steps ----

    def _check(self) -> None:
        self._view.chapter = "checking"
        found = self._run("check").document["findings"]
        warnings = [finding for finding in found if finding["severity"] == "warning"]
        self._view.command("check", f"0 errors, {len(warnings)} warnings")
        for finding in warnings:
            self._view.say(f"  {finding['object']}: {finding['message']}")

    def _begin(self) -> None:
        """Traffic first, so that the first snapshots are taken of tables that are being written."""
        self._view.chapter = "first snapshots, while the shop is being written"
        self._start_traffic()
        began = self._view.seconds
        self._start_daemon("started while the shop is being written: first snapshots")
        self._until(self._all_streaming, "first snapshots of all tables")
        rows = sum(self._watch.facts.lake_rows.values())
        self._streaming_since = self._view.seconds
        took = self._streaming_since - began
        self._view.say(f"first snapshots done in {took:.1f} s, beside the traffic: {rows:,} rows in the lake")

    def _add_column(self) -> None:
        self._view.chapter = "streaming"
        self._view.event(f"shop> {self._shop.add_column()};")
        self._view.say("new orders use the column from now on")

    def _kill(self) -> None:
        pid = self._processes.kill_daemon()
        self._view.chapter = "the daemon is dead, the shop goes on"
        self._view.event(f"kill -9 {pid}: the daemon is gone in the middle of its work")
        self._interrupts.sleep(1.0)
        self._start_daemon("started again")
        self._view.chapter = "catching up"
        outcome = self._run("wait", "--timeout", f"{CALM_S:g}")
        self._view.command("wait", f"the lake holds all that was committed before; {outcome.seconds:.1f} s")
        self._view.chapter = "streaming"

    def _score(self) -> None:
        self._view.chapter = "a model over the lake, pushed back into the shop"
        model = self._run("model", "run", SYNC).document
        self._view.command(f"model run {SYNC}", f"{model['counts']['rows']:,} customers")
        self._apply()

    def _resync(self) -> None:
        self._view.chapter = f"a resync of {RESYNCED}, while it is being written"
        outcome = self._run("resync", RESYNCED, "--wait", "--timeout", f"{CALM_S:g}")
        self._view.command(f"resync {RESYNCED} --wait", f"read again and merged in {outcome.seconds:.1f} s")
        self._view.chapter = "streaming"

    def _end_traffic(self, verdict: Verdict) -> None:
        assert self._traffic is not None
        self._traffic.stop()
        done = self._traffic.done()
        verdict.transactions, verdict.kinds = done.transactions, dict(done.kinds)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(done.kinds.items(), key=lambda item: -item[1]))
        self._view.event(f"traffic ends: {done.transactions:,} transactions ({kinds})")

    def _settle(self, verdict: Verdict) -> None:
        """The last changes into the lake, the last scores into the shop, and those into the lake again."""
        self._view.chapter = "the last changes"
        outcome = self._run("wait", "--timeout", f"{CALM_S:g}")
        self._view.command("wait", f"{outcome.seconds:.1f} s")
        self._apply()
        pushed = self._shop.scores()
        model = self._model()
        verdict.scores, verdict.scores_equal = len(model), pushed == model
        if verdict.scores_equal:
            self._view.say(f"scores in the shop equal the model over the lake: {len(model):,} customers", "green")
        else:
            wrong = sum(pushed.get(key) != model.get(key) for key in pushed.keys() | model.keys())
            self._view.say(f"{wrong} scores in the shop DIFFER from the model over the lake", "bold red")

    def _verify(self, verdict: Verdict) -> None:
        self._view.chapter = "comparing every cell of every table"
        outcome = self._run("verify", "--timeout", f"{CALM_S:g}", timeout_s=2 * CALM_S, allowed=(0, 1, 3, 4))
        verdict.tables = outcome.document["tables"]
        good = sum(bool(table["equal"]) for table in verdict.tables)
        self._view.command("verify", f"{good} of {len(verdict.tables)} tables equal, {outcome.seconds:.1f} s")
        for table in verdict.tables:
            if table["equal"]:
                self._view.say(f"  {table['table']}: equal, {table['rows']:,} rows, by {table['by']}", "green")
            else:
                reason = table["error"] or f"{table['counts']}, {table['not_compared']} not compared"
                self._view.say(f"  {table['table']}: NOT EQUAL: {reason}", "bold red")
        missing = set(self._shop.tables) - {table["table"] for table in verdict.tables}
        if missing:
            raise DemoFailed(f"verify did not compare {', '.join(sorted(missing))}")

    # ---- parts of them ----

    def _at(self, share: float, step: Callable[[], None]) -> None:
        """Do it when that share of the duration has passed, or at once if it has."""
        due = self._streaming_since + share * self._duration_s
        while self._view.seconds < due:
            self._check_all()
            self._interrupts.sleep(min(0.1, max(0.0, due - self._view.seconds)))
        self._check_all()
        step()

    def _check_all(self) -> None:
        self._interrupts.check()
        self._processes.check_daemon()
        if self._traffic is not None and self._traffic.error is not None:
            raise DemoFailed(f"the traffic failed: {self._traffic.error}")

    def _start_traffic(self) -> None:
        self._traffic = self._shop.traffic()
        self._watch.traffic = self._traffic
        self._traffic.start()

    def _start_daemon(self, text: str) -> None:
        """Start it, and wait until it serves orders: commands refuse to wait for one that is not there."""
        self._processes.start_daemon()
        pid = self._processes.daemon_pid
        self._view.event(f"daemon {text}, pid {pid}")
        self._until(lambda: self._watch.facts.serving_pid == pid, "the daemon to serve orders")

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        def checked() -> bool:
            self._check_all()
            stopped = [t for t in self._watch.facts.tables if t["state"] == "stopped"]
            if stopped:
                raise DemoFailed(f"{stopped[0]['table']} is stopped: {stopped[0]['reason']}", hint=stopped[0]["hint"])
            return condition()

        self._processes.wait(checked, what, CALM_S)

    def _all_streaming(self) -> bool:
        """Snapshots are done, and what they read is in the lake's current tables."""
        facts = self._watch.facts
        ready = {t["table"] for t in facts.tables if t["state"] == "streaming" and t["snapshot"] is None}
        return ready >= set(self._shop.tables) and facts.lake_rows.keys() >= set(self._shop.tables)

    def _apply(self) -> None:
        run = self._run("sync", "apply", SYNC).document
        counts = run["counts"]
        changed = f"{counts['inserts']:,} new, {counts['updates']:,} changed, {counts['unchanged']:,} unchanged"
        # Syncs run by themselves too, when what they read has changed.
        pushed = f"{counts['written']:,} rows written" if counts["written"] else "the daemon had pushed all by itself"
        self._view.command(f"sync apply {SYNC}", f"{changed}; {pushed}")

    def _model(self) -> dict[int, tuple[int, Decimal]]:
        """The model over the lake's current tables, by `cdc query`."""
        result = self._run("query", MODEL_SQL, "--format", "json").document
        places = {name: place for place, name in enumerate(result["columns"])}
        return {
            int(row[places["customer_id"]]): (int(row[places["orders"]]), Decimal(str(row[places["value"]])))
            for row in result["rows"]
        }

    def _run(self, *words: str, timeout_s: float = CALM_S + 15.0, allowed: Sequence[int] = (0,)) -> Outcome:
        outcome = self._processes.command(words, timeout_s=timeout_s, allowed=allowed)
        self._check_all()
        return outcome


def look_commands(config: Path, program: str) -> list[list[str]]:
    """Three commands that look into the lake and need nothing else."""
    cdc = [program, "--config", shown(config)]
    best = "select customer_id, orders, value, _origin from shop.customer_scores order by value desc limit 5"
    history = "select _op, count(*) as changes, max(_committed_at) as newest from shop.orders_changelog group by 1"
    return [[*cdc, "query", best], [*cdc, "query", history], [*cdc, "lake", "ls"]]


def as_typed(words: Sequence[str]) -> str:
    """A command as one would type it in a shell."""
    return " ".join(
        f'"{word}"' if " " in word and not set('"$`\\!') & set(word) else shlex.quote(word) for word in words
    )
