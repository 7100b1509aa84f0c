"""`cdc demo`: the whole thing on an embedded Postgres, from the first snapshot to a last comparison of every cell.

Guarantees: exit code 0 only if `verify` found every table equal and the pushed scores equal the model; no process is
left behind, however it ends. It leaves its folder (configuration, lake, the daemon's log) to look at.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdc import registry
from cdc.config import LakeConfig
from cdc.console import Console
from cdc.demo import folder
from cdc.demo.facts import Watch
from cdc.demo.processes import Interrupted, Interrupts, Processes
from cdc.demo.shop import Shop
from cdc.demo.story import Story, Verdict, as_typed, look_commands
from cdc.demo.view import View
from cdc.errors import CdcError, ConfigError

OK, FAILED, FOUND = 0, 1, 3


def run_demo(
    duration_s: float, keep: bool, directory: Path | None, console: Console, *, lake: Mapping[str, str]
) -> int:
    """Run it; blocks for its whole length. 0 all equal, 3 not, 1 a step failed, 128 + signal if interrupted.

    `lake`: url and endpoint_url of another place than the folder, which must be empty. ConfigError if the folder or
    that place cannot be used. Main thread only: it takes SIGINT, SIGTERM and SIGHUP.
    """
    place = (directory or folder.DEFAULT).absolute()
    _forget_server_defaults()
    shop: Shop = registry.demo_shop("postgres")(place)
    if lake:
        _check_empty(LakeConfig(url=lake.get("url", ""), endpoint_url=lake.get("endpoint_url", "")))
    with Interrupts() as interrupts, folder.held(place) as replaced:
        return _Demo(shop, place, replaced, interrupts, console, lake).run(duration_s, keep)


class _Demo:
    """One run in a folder that is ours."""

    def __init__(
        self,
        shop: Shop,
        place: Path,
        replaced: bool,
        interrupts: Interrupts,
        console: Console,
        lake: Mapping[str, str],
    ) -> None:
        self._lake = lake
        self._shop = shop
        self._place = place
        self._replaced = replaced
        self._interrupts = interrupts
        self._console = console
        self._view = View(as_json=console.as_json)
        self._processes = Processes(place / "cdc.toml", place / "daemon.log", interrupts)
        self._watch: Watch | None = None

    def run(self, duration_s: float, keep: bool) -> int:
        verdict: Verdict | None = None
        try:
            with self._view:
                story = self._prepare(duration_s)
                verdict = story.tell()
                verdict.seconds = round(self._view.seconds, 1)
                if keep:
                    self._show(verdict, keep)
                    story.keep_running()
                story.end()
        except Interrupted:
            if verdict is None:
                self._clean_up()
                self._shop.remove()
                name = signal.Signals(self._interrupts.number).name
                self._view.say(f"{name}: ended; no process is left, lake and logs stay in {folder.shown(self._place)}")
                self._console.document({"equal": False, "interrupted": name})
                return 128 + self._interrupts.number
        except CdcError as error:
            tail = self._processes.log_tail()
            self._clean_up()
            return self._failed(error, tail)
        finally:
            self._clean_up()
        assert verdict is not None
        if verdict.equal:  # else the server's files are evidence
            self._shop.remove()
        if not keep:
            self._show(verdict, keep)
        self._console.document(self._document(verdict))
        return OK if verdict.equal else FOUND

    def _prepare(self, duration_s: float) -> Story:
        view, place = self._view, folder.shown(self._place)
        view.say(f"folder {place}" + (": what the demo before left there is replaced" if self._replaced else ""))
        view.chapter = "starting a Postgres and filling a shop"
        self._shop.remove()
        folder.clear(self._place)
        rows = self._shop.start(self._interrupts.check)
        view.say(f"shop is open: {self._shop.title}, {sum(rows.values()):,} rows in {len(rows)} tables")
        config = folder.write_config(
            self._place,
            self._shop.connection_keys("source"),
            self._shop.connection_keys("target"),
            self._shop.scores_table,
            self._lake,
        )
        view.say(f"configuration to read: {folder.shown(config)}; daemon's log: {place}/daemon.log")
        self._watch = watch = Watch(config, self._shop)
        watch.start()
        view.facts = lambda: watch.facts
        return Story(self._shop, config, self._processes, watch, view, self._interrupts, duration_s)

    def _clean_up(self) -> None:
        """End every process; idempotent, bounded."""
        if self._watch is not None:
            self._watch.end()
        self._processes.close()
        self._shop.stop()

    def _failed(self, error: CdcError, tail: Sequence[str]) -> int:
        self._view.say(f"FAILED: {error.args[0]}", "bold red")
        if error.hint:
            self._view.bare(error.hint)
        if tail:
            self._view.bare(f"the end of {folder.shown(self._place / 'daemon.log')}:", "bold")
            for line in tail:
                self._view.bare(f"  {line}")
        self._console.document({"equal": False, "error": {"kind": type(error).__name__, "message": str(error.args[0])}})
        return FAILED

    def _show(self, verdict: Verdict, keep: bool) -> None:
        bare = self._view.bare
        bare()
        if verdict.equal:
            bare(
                f"Everything is equal after {verdict.seconds:.0f} s: {len(verdict.tables)} tables, "
                f"and {verdict.scores:,} pushed scores.",
                "bold green",
            )
        else:
            bare("NOT EQUAL: see above. That must not happen; please report it with the folder.", "bold red")
        bare(
            f"The lake: {self._lake.get('url') or folder.shown(self._place / 'lake')}   "
            f"(Delta tables; the configuration: {folder.shown(self._place / 'cdc.toml')})"
        )
        bare("Look into it:", "bold")
        for words in self._look():
            bare(f"  {as_typed(words)}", "cyan")
        if keep:
            bare("Until Ctrl-C the shop, its traffic and the daemon keep running:", "bold")
            bare(f"  {self._shop.session_command()}", "cyan")
            bare(f"  {as_typed([*self._look()[0][:3], 'status'])}", "cyan")

    def _look(self) -> list[list[str]]:
        return look_commands(self._place / "cdc.toml", _program())

    def _document(self, verdict: Verdict) -> dict[str, Any]:
        return {
            "equal": verdict.equal,
            "seconds": verdict.seconds,
            "tables": verdict.tables,
            "scores": {"equal": verdict.scores_equal, "rows": verdict.scores},
            "transactions": verdict.transactions,
            "kinds": verdict.kinds,
            "directory": str(self._place),
            "config": str(self._place / "cdc.toml"),
            "lake": self._lake.get("url") or str(self._place / "lake"),
            "commands": self._look(),
        }


def _check_empty(lake: LakeConfig) -> None:
    """What an earlier demo left in a bucket is of another database, and is not ours to delete."""
    if not lake.url:
        raise ConfigError("--endpoint-url is of a bucket", hint="name it: --lake s3://BUCKET/PREFIX")
    if next(iter(registry.lake_store(lake).list("")), None) is not None:
        raise ConfigError(f"{lake.url} is not empty", hint="name another prefix for the demo's lake")


def _program() -> str:
    """How the user called us, so that what we print works when it is pasted."""
    program = Path(sys.argv[0])
    return folder.shown(program.absolute()) if program.name == "cdc" and program.exists() else "cdc"


def _forget_server_defaults() -> None:
    """libpq takes defaults from PG… variables of the environment; they mean another server than the demo's."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
