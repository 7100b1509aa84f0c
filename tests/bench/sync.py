"""`make bench-sync`: what planning and applying a sync cost.

Planning: `--rows` result rows of which `--changes` differ from what was acknowledged, the rest is equal: seconds and
peak memory of a process that plans, beside one that only opens DuckDB over the same result and counts it (the engine's
floor), `--rounds` rounds each. Applying: `--changes` upserts, half of them updates, through `PostgresTarget.push` in
batches of `--batch-rows`, beside plain psycopg with the same rows (COPY of Python tuples into a temporary table, one
INSERT … ON CONFLICT, a transaction per batch, nothing acknowledged), in turn on tables of equal content. Prints medians
and the ratio, and writes build/bench-sync.json. Figures of one run on one machine compare with each other only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa

from cdc.models import frozen
from cdc.plan import Plan, make_plan
from cdc.sink import ACKS, Assignment, Batch
from connectors.postgres.target import PostgresTarget
from tests.support.daemon import ROOT
from tests.support.postgres import private_server
from tests.support.targets import assigned, no_ledgers, target_config

COLUMNS = ("id", "customer", "amount", "name", "note", "created", "paid")
DDL = """
CREATE TABLE {name} (id bigint PRIMARY KEY, customer int, amount numeric(12,2), name text, note text,
    created timestamptz, paid boolean)"""
RESULT = """
COPY (
    SELECT i AS id, (i * 7 % 1000)::INT AS customer, ((i * 31 + {seed}) % 100000 / 100)::DECIMAL(12,2) AS amount,
           'customer ' || i || ' ' || md5(i::VARCHAR) AS name, md5((i * 3 + {seed})::VARCHAR) AS note,
           TIMESTAMPTZ '2026-01-01 00:00:00+00' + to_seconds(i) AS created, i % 3 = 0 AS paid
    FROM (SELECT unnest(range({begin}, {end})) AS i)
) TO '{path}' (FORMAT parquet)"""


def assignment_of(table: str) -> Assignment:
    return assigned(COLUMNS, table=table, sync=f"bench {table}")


def write_result(path: Path, begin: int, end: int, seed: int) -> None:
    import duckdb

    with duckdb.connect() as connection:
        connection.execute(RESULT.format(begin=begin, end=end, seed=seed, path=path))


# ---------------------------------------------------------------------- planning


def acknowledged_by(plan: Plan, rows: int) -> pa.Table:
    """As if all that the plan writes had been taken."""
    return pa.concat_tables([batch.acks.cast(ACKS) for batch in plan.writes(rows)])


def prepared(folder: Path, rows: int, changes: int) -> None:
    """A result, and acknowledgements that lack the last half of `changes` and hold others for the first half."""
    result = folder / "result.parquet"
    write_result(result, 0, rows, 0)
    whole = make_plan(result, ACKS.empty_table(), assignment_of("public.bench"), folder / "whole")
    acks = acknowledged_by(whole, 100_000).slice(changes // 2)
    digests = acks.column("digest").to_pylist()
    half = changes - changes // 2
    digests[:half] = ["other"] * half
    changed = acks.set_column(1, "digest", pa.array(digests, pa.string()))
    with pa.OSFile(str(folder / "acks.arrow"), "wb") as file, pa.ipc.new_file(file, ACKS) as writer:
        writer.write_table(changed)
    shutil.rmtree(whole.folder)


def child(folder: Path, what: str) -> None:
    """One planning, or the floor of it, in a process of its own."""
    # Mapped, as the target hands them over.
    mapped = pa.ipc.open_file(pa.memory_map(str(folder / "acks.arrow"))).read_all()
    acks = mapped if what == "plan" else None
    began, spent = time.perf_counter(), time.process_time()
    counts: dict[str, Any] = {}
    if acks is not None:
        plan = make_plan(folder / "result.parquet", acks, assignment_of("public.bench"), folder / "plan")
        counts = asdict(plan.counts)
    else:
        with frozen(folder / "result.parquet", temp_dir=folder) as (connection, relation):
            connection.execute(f"SELECT count(*) FROM {relation}").fetchone()
    took = time.perf_counter() - began
    print(json.dumps({"seconds": took, "cpu_s": time.process_time() - spent, "peak_rss_mb": peak_rss_mb(), **counts}))


def peak_rss_mb() -> float:
    """Of this process since its exec; getrusage would count what its parent held when it forked."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def planning(folder: Path, rows: int, changes: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    prepared(folder, rows, changes)
    runs: dict[str, list[dict[str, Any]]] = {"floor": [], "plan": []}
    for _ in range(rounds):
        for what, each in runs.items():
            command = [sys.executable, "-m", "tests.bench.sync", "--child", what, "--folder", str(folder)]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            each.append(json.loads(done.stdout))
            print(what, each[-1], file=sys.stderr, flush=True)
    planned = {(run["inserts"] + run["updates"], run["unchanged"]) for run in runs["plan"]}
    assert planned == {(changes, rows - changes)}, planned
    return runs


# ---------------------------------------------------------------------- applying


def batches_of(folder: Path, table: str, begin: int, end: int, seed: int, rows: int) -> list[Batch]:
    """A plan's batches, read before the clock runs."""
    path = folder / f"apply-{seed}.parquet"
    write_result(path, begin, end, seed)
    plan = make_plan(path, ACKS.empty_table(), assignment_of(table), folder / "apply")
    found = list(plan.writes(rows))
    shutil.rmtree(plan.folder)
    return found


def by_us(target: PostgresTarget, batches: list[Batch]) -> float:
    began = time.perf_counter()
    for batch in batches:
        (result,) = target.push([batch])
        assert result.written == batch.rows.num_rows
    return time.perf_counter() - began


def by_hand(connection: psycopg.Connection, table: str, batches: list[Batch]) -> float:
    """What one would write by hand: no acknowledgements, no halving, no check of the catalog."""
    names = ", ".join(COLUMNS)
    sets = ", ".join(f"{c} = excluded.{c}" for c in COLUMNS if c != "id")
    given = [list(zip(*(c.to_pylist() for c in batch.rows.select(COLUMNS).columns), strict=True)) for batch in batches]
    began = time.perf_counter()
    for rows in given:
        with connection.transaction():
            connection.execute(f"CREATE TEMP TABLE stage (LIKE {table}) ON COMMIT DROP")
            with connection.cursor().copy(f"COPY stage ({names}) FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(row)
            connection.execute(
                f"INSERT INTO {table} ({names}) SELECT {names} FROM stage ON CONFLICT (id) DO UPDATE SET {sets}"
            )
    return time.perf_counter() - began


def applying(folder: Path, changes: int, batch_rows: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {"push": [], "by hand": []}
    with (
        private_server(folder / "postgres", shared_buffers="256MB") as server,
        psycopg.connect(server.dsn(), autocommit=True) as connection,
    ):
        target = PostgresTarget(target_config(server.dsn()), no_ledgers)
        for name in ("public.ours", "public.theirs"):
            connection.execute(DDL.format(name=name))
        for seed, (begin, end) in enumerate(_windows(changes, rounds)):
            for way, table in (("push", "public.ours"), ("by hand", "public.theirs")):
                batches = batches_of(folder, table, begin, end, seed, batch_rows)
                took = by_us(target, batches) if way == "push" else by_hand(connection, table, batches)
                if seed:  # the first round fills the tables
                    runs[way].append({"seconds": took, "rows_per_s": changes / took})
                    print(way, runs[way][-1], file=sys.stderr, flush=True)
        target.close()
        difference = connection.execute("SELECT count(*) FROM (TABLE public.ours EXCEPT TABLE public.theirs) d")
        assert difference.fetchone() == (0,)
    return runs


def _windows(changes: int, rounds: int) -> Iterator[tuple[int, int]]:
    """Each half over what is there, half new."""
    for number in range(rounds + 1):
        begin = number * (changes // 2)
        yield begin, begin + changes


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rows", type=int, default=1_000_000)
    arguments.add_argument("--changes", type=int, default=10_000)
    arguments.add_argument("--batch-rows", type=int, default=5_000)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--child", choices=("plan", "floor"), help=argparse.SUPPRESS)
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        child(given.folder, given.child)
        return
    with tempfile.TemporaryDirectory(prefix="cdc-bench-") as text:
        folder = Path(text)
        runs = {
            **planning(folder, given.rows, given.changes, given.rounds),
            **applying(folder, given.changes, given.batch_rows, given.rounds),
        }
    medians = {
        way: {name: statistics.median(run[name] for run in each) for name in each[0]} for way, each in runs.items()
    }
    floor, plan = medians["floor"], medians["plan"]
    beyond = plan["peak_rss_mb"] - floor["peak_rss_mb"]
    print(
        f"planning {given.rows:,} rows, {given.changes:,} changes: {plan['seconds']:.2f} s, "
        f"{plan['cpu_s']:.2f} CPU s, {plan['peak_rss_mb']:.0f} MB, {beyond:.0f} MB beyond DuckDB's floor of "
        f"{floor['peak_rss_mb']:.0f} MB"
    )
    push, hand = medians["push"]["seconds"], medians["by hand"]["seconds"]
    print(
        f"applying {given.changes:,} upserts: {push:.2f} s by us, {hand:.2f} s by plain COPY and INSERT … ON CONFLICT: "
        f"{push / hand:.2f} ×"
    )
    path = Path("build/bench-sync.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({"rows": given.rows, "changes": given.changes, "medians": medians, "runs": runs}, indent=2)
    )


if __name__ == "__main__":
    main()
