"""`make bench`: how fast changes get from a slot into the landed changelog, beside Postgres' own receiver and the
floor.

Ways over copies of the same slot, three rounds in rotated order: (a) `pg_recvlogical -f /dev/null`; (b) our receive
loop, throwing everything away; (c) the daemon, from the start of its stream to the Delta commit that holds the last
change; for the big transaction also (d) the same daemon with streaming = "on", and then the same insert while the
daemon runs, with and without it (live.py). Prints medians and their ratios, and writes build/bench.json. Figures of
one run on one machine compare with each other only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

from cdc.state import State
from connectors.postgres.connection import connect
from connectors.postgres.replication import Receiver, format_lsn, start_statement
from tests.bench import backlog as bl

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"pgbench": 200_000, "bulk_insert": 1_000_000}
ROUNDS = 3
DEADLINE_S = 600.0
STAGES = ("receive", "decode", "log", "land")

CONFIG = """
state_dir = "{folder}/state"
metrics_listen = "127.0.0.1:0"

[source.bench]
dsn = "{dsn}"
slot = "{slot}"
publication = "{publication}"
streaming = "{streaming}"

[lake]
url = "file://{folder}/lake"
# The benchmark ends with the changelog; merging has one of its own.
merge_every_s = 3600
"""


def recvlogical(log: bl.Backlog) -> float:
    """(a): seconds of pg_recvlogical until the end of the backlog."""
    bl.rewind(log)
    options = [f"-o{o}" for o in ("proto_version=1", f"publication_names={bl.PUBLICATION}", "messages=true")]
    command = [log.server.binary("pg_recvlogical"), "-d", log.dsn, "--slot", bl.SLOT, "--start", "--no-loop"]
    began = time.perf_counter()
    subprocess.run([*command, "-f", "/dev/null", "--endpos", format_lsn(log.end), *options], check=True)
    return time.perf_counter() - began


def floor(log: bl.Backlog) -> float:
    """(b), in a process of its own: seconds of the receive loop until the end of the backlog."""
    bl.rewind(log)
    command = [sys.executable, "-m", "tests.bench.bench", "--floor", log.dsn, str(log.end)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return float(done.stdout)


def receive_and_forget(dsn: str, end: int) -> float:
    """The floor itself."""
    connection = connect(dsn, password=None, application_name="floor", connect_timeout_s=10, replication=True)
    began = time.perf_counter()
    start = start_statement(bl.SLOT, 0, (bl.PUBLICATION,))
    receiver = Receiver(connection, start=start, where="floor", buffer_bytes=32 << 20)
    while True:
        blob = receiver.take(1.0)
        if blob is None:
            continue
        last = blob.data[len(blob.data) - int(blob.lengths[-1]) :]
        position = struct.unpack_from("!Q", last, 1 if last[0] == ord("k") else 9)[0]
        if position >= end:
            took = time.perf_counter() - began
            receiver.close()
            return took


class DaemonRun:
    """(c), (d): one run of the daemon over the backlog, on a copy of the prepared state and lake."""

    def __init__(self, log: bl.Backlog, prepared: Path, folder: Path, streaming: str) -> None:
        bl.rewind(log)
        shutil.copytree(prepared, folder)
        self.peak_rss_mb = 0.0
        self.cpu_s = 0.0
        self.stages: dict[str, float] = {}
        self._state = folder / "state" / "state.db"
        write_config(folder, log.dsn, streaming)
        # What `cdc wait` would order: land as soon as the log has everything up to the end, not when the clock says so.
        with closing(State(self._state, create=False)) as state:
            state.post_request("wait", {"source": "bench", "lsn": log.end, "tables": []})
        with (folder / "log").open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "cdc", "--config", str(folder / "cdc.toml"), "run"],
                cwd=ROOT, stdout=output, stderr=output,
            )  # fmt: skip
        try:
            self._follow(process, log, folder)
        finally:
            process.terminate()
            process.wait(60)
        self.wall_s = self._landed_at - self._stream_at

    def _follow(self, process: subprocess.Popen[bytes], log: bl.Backlog, folder: Path) -> None:
        spawned = time.time()
        deadline = spawned + DEADLINE_S
        while True:
            if process.poll() is not None or time.time() > deadline:
                raise RuntimeError(f"the daemon did not land the backlog:\n{(folder / 'log').read_text()[-3000:]}")
            self._look_at_process(process.pid)
            # The daemon notes the time itself, so looking seldom is exact, and takes nothing of the two cores.
            reached = self._query(
                "select saved_at from checkpoints where stage = 'land' and json_extract(value, '$.end_lsn') >= ?",
                log.end,
            )
            if reached:
                self._landed_at = reached / 1e6
                break
            time.sleep(0.1)
        since = self._query("select phase_since from sources where phase = 'streaming'")
        self._stream_at = int(since or 0) / 1e6
        if not spawned <= self._stream_at <= self._landed_at:
            raise RuntimeError("the stream's beginning was not noted")
        self._look_at_process(process.pid)
        self._read_stages()

    def _look_at_process(self, pid: int) -> None:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                self.peak_rss_mb = int(line.split()[1]) / 1024
        self.cpu_s = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")

    def _query(self, sql: str, *parameters: Any) -> Any:
        try:
            connection = sqlite3.connect(f"file:{self._state}?mode=ro", uri=True, timeout=5)
            try:
                row = connection.execute(sql, parameters).fetchone()
            finally:
                connection.close()
        except sqlite3.OperationalError:
            return None
        return row[0] if row else None

    def _read_stages(self) -> None:
        address = json.loads(self._query("select value from facts where key = 'metrics_address'") or '""')
        if not address:
            return
        url = address if address.startswith("http") else f"http://{address}"
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith("cdc_stage_seconds_total{"):
                    name = line.partition('stage="')[2].partition('"')[0]
                    self.stages[name] = float(line.rpartition(" ")[2])


def write_config(folder: Path, dsn: str, streaming: str = "off", slot: str = bl.SLOT) -> None:
    text = CONFIG.format(folder=folder, dsn=dsn, slot=slot, publication=bl.PUBLICATION, streaming=streaming)
    (folder / "cdc.toml").write_text(text)


def prepare_daemon(dsn: str, folder: Path, streaming: str = "off", slot: str = bl.SLOT) -> None:
    """First snapshots, before the backlog: what is measured is the stream."""
    folder.mkdir()
    write_config(folder, dsn, streaming, slot)
    command = [sys.executable, "-m", "cdc", "--config", str(folder / "cdc.toml"), "run", "--once"]
    subprocess.run(command, cwd=ROOT, check=True)


def measure(workload: str, size: int, rounds: int) -> dict[str, Any]:
    """All rounds of one workload; the figures of build/bench.json."""
    print(f"\n{workload}: building the backlog", flush=True)
    with bl.server() as running, tempfile.TemporaryDirectory(prefix="cdc-bench-") as folder:
        prepared = Path(folder) / "prepared"
        bl.prepare(running, workload)
        prepare_daemon(running.dsn(), prepared)
        log = bl.fill(running, workload, size)
        a: list[float] = []
        b: list[float] = []
        c: list[DaemonRun] = []
        d: list[DaemonRun] = []
        ways = [
            lambda n: a.append(recvlogical(log)),
            lambda n: b.append(floor(log)),
            lambda n: c.append(DaemonRun(log, prepared, Path(folder) / f"off-{n}", "off")),
        ]
        if workload == "bulk_insert":
            ways.append(lambda n: d.append(DaemonRun(log, prepared, Path(folder) / f"on-{n}", "on")))
        for number in range(rounds):
            first = number % len(ways)
            for way in ways[first:] + ways[:first]:
                way(number)
            told = f"  round {number + 1}: a {a[-1]:.2f} s, b {b[-1]:.2f} s, c {c[-1].wall_s:.2f} s"
            print(told + (f", d {d[-1].wall_s:.2f} s" if d else ""), flush=True)
        figures = report(workload, log.changes, a, b, c)
        if d:
            figures["streaming"] = compare(d, c)
        return figures


def report(workload: str, changes: int, a: list[float], b: list[float], c: list[DaemonRun]) -> dict[str, Any]:
    """Print the medians; the figures."""
    wall = statistics.median(run.wall_s for run in c)
    figures = {
        "ratio": statistics.median(a) / wall,
        "floor_ratio": statistics.median(b) / wall,
        "changes_per_s": changes / wall,
        "cpu_s_per_million": statistics.median(run.cpu_s for run in c) / changes * 1e6,
        "peak_rss_mb": max(run.peak_rss_mb for run in c),
        "seconds": {"pg_recvlogical": a, "floor": b, "daemon": [run.wall_s for run in c]},
        "stages_s": {s: statistics.median(run.stages.get(s, 0.0) for run in c) for s in STAGES},
    }
    print(
        f"  {workload}: a/c {figures['ratio']:.2f}, b/c {figures['floor_ratio']:.2f},"
        f" {figures['changes_per_s']:,.0f} changes/s, {figures['cpu_s_per_million']:.1f} CPU s per million"
        f" (start of the process included), peak {figures['peak_rss_mb']:.0f} MB"
    )
    stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in figures["stages_s"].items())
    print(f"  where the time went (receive: CPU, others: wall, side by side): {stages}", flush=True)
    return figures


def compare(on: list[DaemonRun], off: list[DaemonRun]) -> dict[str, Any]:
    """Print what streaming gains; the figures."""
    wall = {name: statistics.median(run.wall_s for run in runs) for name, runs in (("on", on), ("off", off))}
    print(
        f"  streaming on {wall['on']:.2f} s, off {wall['off']:.2f} s: off/on {wall['off'] / wall['on']:.2f},"
        f" peak {max(run.peak_rss_mb for run in on):.0f} MB and {max(run.peak_rss_mb for run in off):.0f} MB",
        flush=True,
    )
    seconds = {"on": [run.wall_s for run in on], "off": [run.wall_s for run in off]}
    return {"off_by_on": wall["off"] / wall["on"], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--floor", nargs=2, metavar=("DSN", "END"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full workload")
    parser.add_argument("workload", nargs="*", default=list(SIZES))
    args = parser.parse_args()
    if args.floor:
        print(receive_and_forget(args.floor[0], int(args.floor[1])))
        return
    figures = {w: measure(w, int(SIZES[w] * args.scale), args.rounds) for w in args.workload}
    if "bulk_insert" in figures:
        from tests.bench import live

        figures["live_insert"] = live.measure(int(SIZES["bulk_insert"] * args.scale), args.rounds)
    target = ROOT / "build" / "bench.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"workloads": figures}, indent=1))
    print(f"\nwritten to {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
