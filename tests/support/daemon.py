"""A real daemon for tests: its configuration, its process, and its commands.

`python -m cdc run` is started as an operator would start it, with failpoints armed through its environment, and ended
by its process id. Commands run in a process of their own (`cdc`) or, where only their answer matters, in the
test's own process (`ask`): the same code without the second that a start of Python costs.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psycopg
from psycopg.conninfo import conninfo_to_dict

from cdc.cli import main
from cdc.state import State
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
SOURCE = "shop"
FAST: Mapping[str, Any] = {"land_every_s": 0.2, "merge_every_s": 0.2, "merge_share": 1.0}
"""Of [lake]: tests wait for the lake all the time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command said: its exit code, its JSON document, and what went to standard error."""

    code: int
    document: Any
    notes: str


class Daemon:
    """One configuration, and at most one process that runs on it. As a context manager it leaves no process behind."""

    def __init__(
        self,
        directory: Path,
        dsn: str,
        *,
        source: Mapping[str, Any] | None = None,
        lake: Mapping[str, Any] | None = None,
        top: Mapping[str, Any] | None = None,
        more: str = "",
    ) -> None:
        """Keys of the sections are those of the configuration; `more` is TOML that is appended. Slot and publication
        are named after the database, so that tests on one server do not meet."""
        self.directory = directory
        self.dsn = dsn
        self.slot = f"cdc_{conninfo_to_dict(dsn)['dbname']}"
        self.state_dir = directory / "state"
        self.lake = directory / "lake"
        self.log_path = directory / "daemon.log"
        self.config_path = directory / "cdc.toml"
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self._sections: dict[str, dict[str, Any]] = {
            "": {
                "state_dir": "state",
                "metrics_listen": "127.0.0.1:0",
                "log_format": "text",
                "shutdown_timeout_s": 10,
                **(top or {}),
            },
            f"source.{SOURCE}": {"dsn": dsn, "slot": self.slot, "publication": self.slot, **(source or {})},
            "lake": {"url": "lake", **FAST, **(lake or {})},
        }
        self._more = more
        self.configure()

    # ---- configuration ----

    def configure(self, section: str = "", **values: Any) -> None:
        """Change keys of one section, or add it, and write the file; it holds from the next start on."""
        self._sections.setdefault(section, {}).update(values)
        lines = []
        for name, keys in self._sections.items():
            lines += [f"[{name}]"] if name else []
            lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items() if value is not None]
        self.config_path.write_text("\n".join([*lines, self._more, ""]))

    # ---- the process ----

    def start(self, *, failpoints: str = "", once: bool = False, environment: Mapping[str, str] | None = None) -> Self:
        """Start the process; returns at once."""
        assert not self.alive, "it runs already"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("CDC_", "PG"))}
        clean |= {"PYTHONPATH": str(ROOT), "CDC_FAILPOINTS": failpoints, **(environment or {})}
        command = [sys.executable, "-m", "cdc", "--config", str(self.config_path), "run", *(["--once"] if once else [])]
        with self.log_path.open("ab") as log:
            log.write(f"--- start {failpoints}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command, env=clean, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory
            )
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None, "never started"
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        assert self.process is not None, "never started"
        self.process.kill()
        self.process.wait(10)

    def signal(self, number: int = signal.SIGTERM) -> None:
        assert self.process is not None, "never started"
        self.process.send_signal(number)

    def stop(self, timeout_s: float = 60.0) -> int:
        """SIGTERM, and wait; the exit code."""
        self.signal()
        return self.ended(timeout_s)

    def ended(self, timeout_s: float = 60.0) -> int:
        """Wait for the process to end; its exit code (negative: the signal that ended it)."""
        assert self.process is not None, "never started"
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the daemon did not end within {timeout_s:g} s\n{self.log_tail()}") from None

    def died_at(self, point: str, *, disk_lost: bool = False, timeout_s: float = 180.0) -> None:
        """Wait until it has killed itself at a failpoint that it was started with; `disk_lost`: and its state with
        it."""
        wait_until(lambda: not self.alive, timeout_s, lambda: f"to die at {point}\n{self.log_tail()}")
        assert self.ended() == -signal.SIGKILL, f"{point}\n{self.log_tail()}"
        if disk_lost:
            self.lose_disk()

    def lose_disk(self) -> None:
        """Of one that does not run: everything that it has beside the lake."""
        shutil.rmtree(self.state_dir)

    def log_tail(self, lines: int = 40) -> str:
        """The end of its log, for messages of failed assertions."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.alive:
            self.kill()
        if kind is not None:
            sys.stderr.write(f"\n{self.log_tail(80)}\n")

    # ---- commands ----

    def cdc(self, *words: str, timeout_s: float = 120.0) -> Answer:
        """A command as a process of its own, with --json."""
        done = subprocess.run(
            [sys.executable, "-m", "cdc", "--config", str(self.config_path), "--json", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        try:
            return Answer(done.returncode, json.loads(done.stdout), done.stderr)
        except json.JSONDecodeError:
            raise AssertionError(f"cdc {' '.join(words)} wrote no JSON: {done.stdout!r}\n{done.stderr}") from None

    def begin(self, *words: str) -> Callable[[], Answer]:
        """Start a command as a process of its own, with --json; what is returned waits for its answer."""
        process = subprocess.Popen(
            [sys.executable, "-m", "cdc", "--config", str(self.config_path), "--json", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

        def answer() -> Answer:
            try:
                out, err = process.communicate(timeout=180)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            return Answer(process.returncode, json.loads(out), err)

        return answer

    def ask(self, *words: str) -> Answer:
        """A command in this process, with --json."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["--config", str(self.config_path), "--json", *words])
        return Answer(code, json.loads(out.getvalue()), err.getvalue())

    def source(self) -> dict[str, Any]:
        """What `status` says of the source."""
        found: dict[str, Any] = self.ask("status").document["sources"][0]
        return found

    def tables(self) -> dict[str, dict[str, Any]]:
        """What `status` says of the tables, by name."""
        return {t["table"]: t for t in self.source()["tables"]}

    def streaming(self, timeout_s: float = 60.0) -> Self:
        """Wait until this very process streams."""
        return self.in_phase("streaming", timeout_s)

    def in_phase(self, phase: str, timeout_s: float = 60.0) -> Self:
        """Wait until the source is in this phase, by word of this very process."""

        def reached() -> bool:
            assert self.alive, f"the daemon has ended\n{self.log_tail()}"
            # Before the first start has written its state, `status` has nothing to show.
            document = self.ask("status").document
            return bool(
                "daemon" in document
                and document["daemon"]["pid"] == self.pid
                and document["sources"][0]["phase"] == phase
            )

        wait_until(reached, timeout_s, lambda: f"phase {phase}\n{self.log_tail()}")
        return self

    def settled(self, timeout_s: float = 120.0) -> Self:
        """Wait until `current` holds everything that is committed now, and no snapshot is under way."""
        self.streaming(timeout_s)

        def quiet() -> bool:
            assert self.alive, f"the daemon has ended\n{self.log_tail()}"
            states = self.tables().values()
            return bool(states) and not any(t["snapshot"] or t["state"] in ("new", "snapshotting") for t in states)

        wait_until(quiet, timeout_s, lambda: f"snapshots to end: {self.tables()}\n{self.log_tail()}")
        answer = self.ask("wait", "--timeout", f"{timeout_s:g}")
        assert answer.code == 0, f"{answer}\n{self.log_tail()}"
        return self

    def verified(self, *tables: str, timeout_s: float = 120.0) -> Self:
        """Assert that `verify` finds every table (or these) equal to its source."""
        answer = self.ask("verify", *tables, "--timeout", f"{timeout_s:g}")
        told = [{k: v for k, v in t.items() if v} for t in answer.document.get("tables", []) if not t["equal"]]
        assert answer.code == 0, f"{told or answer}\n{self.log_tail()}"
        assert answer.document["equal"] is True
        return self

    def http(self, path: str) -> tuple[int, str]:
        """GET from the daemon's local port: status and body."""
        state = State(self.state_dir / "state.db", create=False, readonly=True)
        try:
            address = state.get("metrics_address")
        finally:
            state.close()
        where = address if isinstance(address, str) else ":".join(map(str, address))
        try:
            with urllib.request.urlopen(f"http://{where}{path}", timeout=30) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def execute(dsn: str, *statements: str) -> None:
    """Run statements, each a transaction of its own."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def in_one(dsn: str, statements: Iterable[str]) -> None:
    """Run statements as one transaction."""
    with psycopg.connect(dsn) as connection:
        for statement in statements:
            connection.execute(statement.encode())
