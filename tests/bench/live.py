"""A big insert while the daemon follows: how long until all of it has landed, with streaming on and off.

Two daemons, each with a slot and a lake of its own, take turns on one server: the one whose turn it is catches up, the
insert runs, and the time is taken from its beginning, and from its commit, to the Delta commit that holds the last row.
"""

from __future__ import annotations

import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg

from cdc.state import State
from tests.bench import backlog as bl
from tests.bench.bench import DEADLINE_S, ROOT, prepare_daemon

MODES = ("on", "off")


def slot(streaming: str) -> str:
    return f"{bl.SLOT}_{streaming}"


def measure(size: int, rounds: int) -> dict[str, Any]:
    """All rounds; the figures."""
    print("\nlive_insert: preparing", flush=True)
    seconds: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    with bl.server() as running, tempfile.TemporaryDirectory(prefix="cdc-bench-") as folder:
        bl.prepare(running, "bulk_insert")
        for mode in MODES:
            with psycopg.connect(running.dsn(), autocommit=True) as connection:
                # Postgres' default, so that a server that streams begins early.
                connection.execute("alter database postgres set logical_decoding_work_mem = '64MB'")
                connection.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", [slot(mode)])
            prepare_daemon(running.dsn(), Path(folder) / mode, mode, slot(mode))
        with psycopg.connect(running.dsn(), autocommit=True) as connection:
            bl.drop(bl.Backlog("live_insert", running, 0, 0), bl.SLOT)
            for number in range(rounds):
                for mode in MODES if number % 2 == 0 else MODES[::-1]:
                    seconds[mode].append(insert(connection, Path(folder) / mode, size))
                told = ", ".join(f"{mode} {seconds[mode][-1][0]:.2f} s" for mode in MODES)
                print(f"  round {number + 1}: {told}", flush=True)
    return report(seconds)


def insert(connection: psycopg.Connection[Any], folder: Path, size: int) -> tuple[float, float]:
    """One insert with this daemon; seconds from its beginning and from its commit until it has landed."""
    command = [sys.executable, "-m", "cdc", "--config", str(folder / "cdc.toml"), "run"]
    with (folder / "log").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            connection.execute("truncate wide")
            landed(connection, folder)
            began = time.time()
            connection.execute(bl.FILL_WIDE.encode(), [size])
            committed = time.time()
            done = landed(connection, folder)
        finally:
            process.terminate()
            process.wait(60)
    return done - began, done - committed


def landed(connection: psycopg.Connection[Any], folder: Path) -> float:
    """When everything that is committed now had landed, by the daemon's own word."""
    connection.execute("set synchronous_commit = on")
    row = connection.execute("select pg_logical_emit_message(true, 'bench', 'end') - '0/0'::pg_lsn").fetchone()
    connection.execute("set synchronous_commit = off")
    assert row is not None
    state = folder / "state" / "state.db"
    with closing(State(state, create=False)) as orders:
        orders.post_request("wait", {"source": "bench", "lsn": int(row[0]), "tables": []})
    query = "select saved_at from checkpoints where stage = 'land' and json_extract(value, '$.end_lsn') >= ?"
    deadline = time.time() + DEADLINE_S
    while time.time() < deadline:
        with closing(sqlite3.connect(f"file:{state}?mode=ro", uri=True, timeout=5)) as look:
            found = look.execute(query, [int(row[0])]).fetchone()
        if found:
            return float(found[0]) / 1e6
        time.sleep(0.1)
    raise RuntimeError(f"the daemon did not land the insert:\n{(folder / 'log').read_text()[-3000:]}")


def report(seconds: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Print the medians; the figures."""
    figures: dict[str, Any] = {}
    for place, name in enumerate(("from_begin_s", "from_commit_s")):
        medians = {mode: statistics.median(run[place] for run in seconds[mode]) for mode in MODES}
        figures[name] = {**medians, "off_by_on": medians["off"] / medians["on"]}
        print(
            f"  live_insert {name}: streaming on {medians['on']:.2f} s, off {medians['off']:.2f} s:"
            f" off/on {medians['off'] / medians['on']:.2f}",
            flush=True,
        )
    figures["seconds"] = seconds
    return figures
