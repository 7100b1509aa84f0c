"""A steady load of random updates on one table, a daemon that follows it, and what its lake looked like meanwhile:
what `make bench-current` and `make soak` share.

The daemon is an operator's: its own process, its defaults. When something became visible is read afterwards from the
Delta logs of its lake (the time of each commit's file), so that looking costs the daemon nothing.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import subprocess
import sys
import time
import urllib.request
from bisect import bisect_right
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
import pyarrow.compute as pc
import pyarrow.parquet as pq
from prometheus_client.parser import text_string_to_metric_families

from cdc.cli import main
from cdc.errors import ConfigError
from cdc.state import State
from connectors.postgres.embedded import EmbeddedPostgres
from tests.bench.snapshot import FILL, TABLE

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "bench"
ROWS_PER_TRANSACTION = 20
DEADLINE_S = 900.0
UPDATE = """
update items set amount = amount + 1, state = 'seen' where id = any(array(
  select 1 + (random() * (ROWS - 1))::bigint from generate_series(1, COUNT)))
"""
CONFIG = """
state_dir = "{folder}/state"
metrics_listen = "127.0.0.1:0"
log_format = "text"

[source.{source}]
dsn = "{dsn}"
slot = "bench_steady"
publication = "bench_steady"
tables = ["public.items"]

[lake]
url = "file://{folder}/lake"
{lake}
"""


def fill(server: EmbeddedPostgres, rows: int) -> None:
    """The table, made anew with so many rows."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("drop table if exists items")
        connection.execute(TABLE)
        connection.execute(FILL.replace("ROWS", str(rows)).encode())
        connection.execute("vacuum analyze items")
        connection.execute("checkpoint")


class Load:
    """pgbench, which updates `rate` random rows a second for `seconds`; as a context manager it leaves no process."""

    def __init__(self, server: EmbeddedPostgres, folder: Path, *, rows: int, rate: int, seconds: int) -> None:
        script = folder / "update.sql"
        count = min(ROWS_PER_TRANSACTION, rate)
        script.write_text(UPDATE.replace("ROWS", str(rows)).replace("COUNT", str(count)).replace("\n", " ") + "\n")
        command = [
            server.binary("pgbench"), "-n", "-c", "2", "-R", str(rate / count), "-T", str(seconds),
            "-f", str(script), server.dsn(),
        ]  # fmt: skip
        self.seconds = seconds
        self.began = time.time()
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.running:
            self._process.kill()
            self._process.wait()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """Wait for its end; RuntimeError if it failed."""
        _, errors = self._process.communicate(timeout=self.seconds + 60)
        if self._process.returncode != 0:
            raise RuntimeError(f"pgbench failed:\n{errors[-2000:]}")


class Follower:
    """A daemon on an empty lake. As a context manager it leaves no process, slot or publication behind."""

    def __init__(self, server: EmbeddedPostgres, folder: Path, *, lake: Mapping[str, Any] | None = None) -> None:
        """`lake`: keys of [lake]; tables in it are sections below it."""
        self._server = server
        self.folder = folder
        self.lake = folder / "lake"
        folder.mkdir()
        plain = {k: v for k, v in (lake or {}).items() if not isinstance(v, Mapping)}
        lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
        for name, section in (lake or {}).items():
            if isinstance(section, Mapping):
                lines += [f"[lake.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in section.items())]
        self.config = folder / "cdc.toml"
        self.config.write_text(CONFIG.format(folder=folder, dsn=server.dsn(), source=SOURCE, lake="\n".join(lines)))

    def __enter__(self) -> Self:
        forget(self._server)
        self.ask("setup")
        self._output = (self.folder / "log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cdc", "--config", str(self.config), "run"],
            cwd=ROOT, stdout=self._output, stderr=self._output,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(60)
        self._output.close()
        forget(self._server)

    def ask(self, *command: str) -> Any:
        """The JSON answer of one command."""
        done = subprocess.run(
            [sys.executable, "-m", "cdc", "--config", str(self.config), *command, "--json"],
            cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"cdc {' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return json.loads(done.stdout)

    def query(self, sql: str) -> list[Any]:
        """Rows that `cdc query` gives; in this process, which has Python started already."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            code = main(["--config", str(self.config), "--json", "query", sql])
        if code != 0:
            raise RuntimeError(f"cdc query failed: {out.getvalue()[-2000:]}")
        rows: list[Any] = json.loads(out.getvalue())["rows"]
        return rows

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition, as long as the daemon lives."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{what}: not so\n{(self.folder / 'log').read_text()[-3000:]}")
            time.sleep(0.2)

    def follows(self) -> bool:
        """Whether the first snapshot is in `current`."""
        try:
            opened = State(self.folder / "state" / "state.db", create=False, readonly=True)
        except ConfigError:
            return False
        with closing(opened) as state:
            return any(t.state == "streaming" and t.current_lsn and t.rows for t in state.tables(SOURCE))

    def metrics(self) -> dict[str, float]:
        """Samples by name, with the labels in braces where there are several of a name; summed over labels else."""
        with closing(State(self.folder / "state" / "state.db", create=False, readonly=True)) as state:
            address = state.get("metrics_address")
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
                for value in sample.labels.values():
                    found[f"{sample.name}{{{value}}}"] = sample.value
        return found

    def memory_mb(self, which: str = "VmHWM") -> float:
        """The greatest resident set until now, or (`VmRSS`) the present one."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{which}:"):
                return int(line.split()[1]) / 1024
        return 0.0

    def files(self) -> dict[str, int]:
        """Files in the lake: data of changelogs and of current, and what stands in their logs."""
        found = {"changelog": 0, "current": 0, "_delta_log": 0}
        for path in self.lake.rglob("*"):
            for part in ("_delta_log", "changelog", "current"):
                if part in path.parts and path.suffix in (".parquet", ".json"):
                    found[part] += 1
                    break
        return found


def forget(server: EmbeddedPostgres) -> None:
    """Slot and publication of the daemon before."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = 'bench_steady'"
        )
        connection.execute("drop publication if exists bench_steady")


# ---- what the Delta logs tell ----


@dataclass(frozen=True, slots=True)
class Landing:
    """One commit of the changelog: when it was there, its rows, and when the oldest and newest had been committed."""

    at: float
    version: int
    rows: int
    oldest: float
    newest: float


@dataclass(frozen=True, slots=True)
class Merge:
    """One commit of `current`: when it was there, the changelog's version that it holds, and what it wrote."""

    at: float
    through: int
    rows: int
    bytes: int


@dataclass(slots=True)
class Story:
    """The commits of one table since `since` (Unix s), in order."""

    since: float
    landings: list[Landing] = field(default_factory=list)
    merges: list[Merge] = field(default_factory=list)

    def tail(self, at: float) -> int:
        """Rows that had landed and were not merged at that time."""
        landed = self._landed(at)
        return sum(x.rows for x in landed if x.version > self._through(at))

    def age(self, at: float) -> float:
        """How far `current` was behind the source, in seconds: since the newest change that it held was committed."""
        merged = [x.newest for x in self._landed(at) if x.version <= self._through(at)]
        return at - max(merged, default=self.since)

    def _landed(self, at: float) -> list[Landing]:
        return self.landings[: bisect_right(self.landings, at, key=lambda x: x.at)]

    def _through(self, at: float) -> int:
        done = bisect_right(self.merges, at, key=lambda x: x.at)
        return self.merges[done - 1].through if done else -1


def story(table: Path, since: float) -> Story:
    """Read the Delta logs under `table` (the folder with `changelog` and `current`)."""
    found = Story(since)
    for version, at, actions in _commits(table / "changelog", since):
        added = [a["add"] for a in actions if a.get("add", {}).get("dataChange")]
        files = [pq.read_table(table / "changelog" / a["path"], columns=["_committed_at"]) for a in added]
        ends = [pc.min_max(f.column(0)).as_py() for f in files if f.num_rows]
        if ends:
            oldest = min(e["min"].timestamp() for e in ends)
            newest = max(e["max"].timestamp() for e in ends)
            found.landings.append(Landing(at, version, sum(f.num_rows for f in files), oldest, newest))
    for _, at, actions in _commits(table / "current", since):
        tokens = {a["txn"]["appId"]: int(a["txn"]["version"]) for a in actions if "txn" in a}
        if "changelog" in tokens:
            added = [a["add"] for a in actions if "add" in a]
            rows = sum(json.loads(a["stats"])["numRecords"] for a in added)
            found.merges.append(Merge(at, tokens["changelog"], rows, sum(a["size"] for a in added)))
    return found


def _commits(table: Path, since: float) -> list[tuple[int, float, list[dict[str, Any]]]]:
    found = []
    for path in sorted((table / "_delta_log").glob("*.json")):
        at = path.stat().st_mtime
        if at >= since and path.stem.isdigit():
            actions = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
            found.append((int(path.stem), at, actions))
    return found


def every(seconds: float, since: float, until: float) -> list[float]:
    """Points in time."""
    return list(itertools.takewhile(lambda t: t < until, itertools.count(since + seconds, seconds)))
