"""`make bench-snapshot`: how fast a table gets from Postgres into landed Parquet, beside a plain COPY of it.

A table of 5,000,000 rows and ten columns is snapshotted by the daemon with 1, 2 and 4 readers, from the run's begin
row to the Delta commit that holds its end, while `COPY … TO STDOUT > /dev/null` over one connection takes turns with
it. Then pgbench runs on the same server, before and during a snapshot. Prints medians and ratios, and writes
build/bench-snapshot.json. Figures of one run on one machine compare with each other only.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg

from cdc.errors import ConfigError
from cdc.state import State
from connectors.postgres.embedded import EmbeddedPostgres
from tests.bench import backlog as bl

ROOT = Path(__file__).resolve().parents[2]
ROWS = 5_000_000
ROUNDS = 3
READERS = (1, 2, 4)
DEADLINE_S = 900.0
LOAD_S = 15
TABLE = """
create table items (
  id bigint primary key, customer int, amount numeric(12,2), note text, at timestamptz, day date, ok boolean,
  score double precision, state text, small smallint)
"""
FILL = """
insert into items select g, g % 9973, (g % 100000) / 7.0, 'note of item ' || g,
  timestamptz '2026-01-01' + g * '1 s'::interval,
  date '2026-01-01' + (g % 365)::int, g % 3 = 0, g * 0.37, (array['new','paid','sent','done'])[1 + g % 4], g % 1000
from generate_series(1::bigint, ROWS) g
"""
CONFIG = """
state_dir = "{folder}/state"
metrics_listen = "127.0.0.1:0"

[source.bench]
dsn = "{dsn}"
slot = "bench_snapshot"
publication = "bench_snapshot"
tables = ["public.items"]
readers = {readers}

[lake]
url = "file://{folder}/lake"
land_every_s = 1
# The benchmark ends with the changelog.
merge_every_s = 3600
"""


def copy_out(server: EmbeddedPostgres) -> float:
    """Seconds of a plain COPY of the table to nowhere, by psql."""
    began = time.perf_counter()
    command = [server.binary("psql"), "-qX", "-d", server.dsn(), "-c", "copy items to stdout"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


class Snapshot:
    """One first snapshot by a daemon of its own, on an empty lake."""

    def __init__(self, server: EmbeddedPostgres, folder: Path, readers: int) -> None:
        self._server = server
        self._folder = folder
        self.peak_rss_mb = 0.0
        self.seconds = 0.0
        self.strategy = ""
        forget(server)
        folder.mkdir()
        (folder / "cdc.toml").write_text(CONFIG.format(folder=folder, dsn=server.dsn(), readers=readers))
        self._output = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cdc", "--config", str(folder / "cdc.toml"), "run"],
            cwd=ROOT, stdout=self._output, stderr=self._output,
        )  # fmt: skip

    def follow(self) -> None:
        """Until the end of the run has landed."""
        deadline = time.monotonic() + DEADLINE_S
        try:
            while not self._landed():
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the snapshot did not land:\n{(self._folder / 'log').read_text()[-3000:]}")
                time.sleep(0.05)
            for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self.peak_rss_mb = int(line.split()[1]) / 1024
        finally:
            self._process.terminate()
            self._process.wait(60)
            self._output.close()

    def _landed(self) -> bool:
        try:
            opened = State(self._folder / "state" / "state.db", create=False, readonly=True)
        except ConfigError:
            # The daemon has not made it yet.
            return False
        with closing(opened) as state:
            run = next((r for r in state.runs("bench") if r.kind == "first" and r.state == "done"), None)
            if run is None:
                return False
            end = state.query("select max(offset) from records where run = ?", (run.id,))[0][0]
            saved = state.query(
                "select saved_at from checkpoints where stage = 'land' and json_extract(value, '$.offset') >= ?",
                (end or 0,),
            )
            if end is not None and not saved:
                return False
            # Its records are gone when they have landed and were trimmed: then the checkpoint is behind them.
            at = saved[0][0] if saved else run.ended_at
            self.seconds = (at - run.started_at) / 1e6
            self.strategy = str(run.details.get("strategy"))
            return True


def forget(server: EmbeddedPostgres) -> None:
    """Slot and publication of the run before."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = 'bench_snapshot'"
        )
        connection.execute("drop publication if exists bench_snapshot")


def latency(server: EmbeddedPostgres, seconds: int) -> dict[str, float]:
    """pgbench's mean and 95th percentile of latency, in ms, at 200 transactions a second."""
    with tempfile.TemporaryDirectory() as folder:
        command = [server.binary("pgbench"), "-n", "-c", "2", "-R", "200", "-T", str(seconds), "-l", server.dsn()]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        times = sorted(int(line.split()[2]) / 1000 for log in Path(folder).glob("pgbench_log.*") for line in log.open())
    mean = re.search(r"latency average = ([\d.]+)", done.stdout)
    return {"mean_ms": float(mean[1]) if mean else 0.0, "p95_ms": times[int(len(times) * 0.95)] if times else 0.0}


def measure(rows: int, rounds: int, readers: tuple[int, ...]) -> dict[str, Any]:
    print(f"building a table of {rows:,} rows", flush=True)
    with bl.server() as server, tempfile.TemporaryDirectory(prefix="cdc-bench-") as folder:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(TABLE)
            connection.execute(FILL.replace("ROWS", str(rows)).encode())
            connection.execute("vacuum analyze items")
        subprocess.run([server.binary("pgbench"), "-i", "-s", "2", "-q", server.dsn()], check=True, capture_output=True)
        copies: list[float] = []
        runs: dict[int, list[Snapshot]] = {n: [] for n in readers}
        for number in range(rounds):
            for n in readers[number % len(readers) :] + readers[: number % len(readers)]:
                copies.append(copy_out(server))
                run = Snapshot(server, Path(folder) / f"{number}-{n}", n)
                run.follow()
                runs[n].append(run)
                shutil.rmtree(Path(folder) / f"{number}-{n}")
                print(f"  round {number + 1}: COPY {copies[-1]:.2f} s, {n} readers {run.seconds:.2f} s", flush=True)
        alone = latency(server, LOAD_S)
        run = Snapshot(server, Path(folder) / "load", 2)
        beside = latency(server, LOAD_S)
        run.follow()
        forget(server)
    copy_s = statistics.median(copies)
    figures: dict[str, Any] = {"rows": rows, "copy_s": copies, "copy_rows_per_s": rows / copy_s, "readers": {}}
    for n, several in runs.items():
        took = statistics.median(r.seconds for r in several)
        figures["readers"][n] = {
            "seconds": [r.seconds for r in several], "rows_per_s": rows / took, "ratio": copy_s / took,
            "peak_rss_mb": max(r.peak_rss_mb for r in several), "strategy": several[0].strategy,
        }  # fmt: skip
        print(
            f"  {n} readers: {rows / took:,.0f} rows/s, {copy_s / took:.2f} of COPY ({rows / copy_s:,.0f} rows/s),"
            f" peak {figures['readers'][n]['peak_rss_mb']:.0f} MB, by {several[0].strategy}"
        )
    figures["pgbench"] = {"alone": alone, "during": beside}
    print(f"  pgbench alone {alone}, during a snapshot with 2 readers {beside}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--readers", type=int, nargs="+", default=list(READERS))
    args = parser.parse_args()
    figures = measure(args.rows, args.rounds, tuple(args.readers))
    target = ROOT / "build" / "bench-snapshot.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(figures, indent=1))
    print(f"\nwritten to {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
