"""`make bench-verify`: what `verify` of an equal table costs, beside the full copy and `COPY … TO STDOUT > /dev/null`.

One table with a row for each of `--rows`, ten columns of common types, snapshotted by a real daemon; then, three rounds
in turn: (a) the server's COPY over one connection, thrown away; (b) `cdc verify`; (c) `cdc verify --cells`, which
fetches and joins all rows. (b) and (c) are commands of their own, so their peak memory is theirs. (d): `--sample 10`.
Prints medians and ratios, and writes build/bench-verify.json. Figures of one run on one machine compare with each other
only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

from tests.support.daemon import ROOT, Daemon, execute
from tests.support.postgres import private_server

TABLE = """
create table bench as select i::int8 id, (i * 7) % 1000 customer, (random() * 1e9)::int8 reference,
 (random() * 1000)::numeric(12,2) amount, random() score, 'customer ' || i || ' ' || md5(i::text) name,
 md5((i * 3)::text) note, timestamptz '2026-01-01' + i * interval '1 second' created, date '2020-01-01' + i % 1000 due,
 i % 3 = 0 paid from generate_series(1, {rows}) i
"""
WAYS = {"checksums": (), "cells": ("--cells",), "sample of 10 %": ("--sample", "10")}


def copied(dsn: str) -> tuple[float, int]:
    """Seconds and bytes of one COPY of the table."""
    began, size = time.perf_counter(), 0
    with psycopg.connect(dsn) as connection, connection.cursor().copy("copy bench to stdout") as copy:
        for data in copy:
            size += len(data)
    return time.perf_counter() - began, size


def verified(daemon: Daemon, *more: str) -> dict[str, Any]:
    """One run of the command: its report, and what it took."""
    command = [sys.executable, "-m", "cdc", "--config", str(daemon.config_path), "--json", "verify", "bench", *more]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        took = time.perf_counter() - began
        out.seek(0)
        report = json.load(out)["tables"][0]
    assert os.waitstatus_to_exitcode(status) == 0, report
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": took, "cpu_s": cpu, "peak_rss_mb": usage.ru_maxrss / 1024, "fetched": report["fetched"]}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rows", type=int, default=5_000_000)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"copy": [], **{way: [] for way in WAYS}}
    with (
        tempfile.TemporaryDirectory(prefix="cdc-bench-") as folder,
        private_server(Path(folder) / "postgres", shared_buffers="256MB", max_wal_size="4GB") as server,
        Daemon(Path(folder) / "daemon", server.dsn(), lake={"merge_every_s": 5, "land_every_s": 5}) as daemon,
    ):
        execute(server.dsn(), TABLE.format(rows=given.rows), "alter table bench add primary key (id)", "vacuum analyze")
        daemon.start().settled(3600)
        for _ in range(given.rounds):
            seconds, size = copied(server.dsn())
            runs["copy"].append({"seconds": seconds, "bytes": size})
            for way, more in WAYS.items():
                runs[way].append(verified(daemon, *more))
                print(way, runs[way][-1], file=sys.stderr, flush=True)
    medians = {
        way: {name: statistics.median(run[name] for run in each) for name in each[0]} for way, each in runs.items()
    }
    copy_s = medians["copy"]["seconds"]
    for way, figures in medians.items():
        text = ", ".join(f"{name} {value:,.1f}" for name, value in figures.items())
        print(f"{way:15} {figures['seconds'] / copy_s:5.2f} × copy: {text}")
    result = Path("build/bench-verify.json")
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps({"rows": given.rows, "medians": medians, "runs": runs}, indent=2))


if __name__ == "__main__":
    main()
