"""`make bench-current`: what it costs to keep `current` of a table that is updated all the time, by the table's size.

2,000 random rows a second are updated in tables of 100 thousand, 1 million and 10 million rows, each followed by a
daemon of its own with the default configuration, on a real Postgres. Prints per size: time and bytes that merging
takes per changed row, its share of the time, how long the unmerged tail gets, and how long it takes until a change has
landed, until `cdc query` shows it, and until it is merged; writes build/bench-current.json. Figures of one run on one
machine compare with each other only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

from connectors.postgres.embedded import EmbeddedPostgres
from tests.bench import backlog as bl
from tests.bench.steady import ROOT, SOURCE, Follower, Load, Story, every, fill, story

SIZES = (100_000, 1_000_000, 10_000_000)
RATE = 2_000
SECONDS = 300
PROBES = 3
"""How often it is asked how long a change takes until it shows."""
TABLE = f"{SOURCE}/public.items"


def run(server: EmbeddedPostgres, folder: Path, rows: int, rate: int, seconds: int, lake: dict[str, Any]) -> Any:
    """One size; its figures."""
    print(f"\n{rows:,} rows: filling the table", flush=True)
    fill(server, rows)
    with Follower(server, folder, lake=lake) as daemon:
        daemon.until(daemon.follows, "the first snapshot is merged")
        snapshot_mb = daemon.memory_mb()
        daemon.ask("wait", "--timeout", "600")
        before = daemon.metrics()
        print(f"{rows:,} rows: {rate:,} updates a second for {seconds} s", flush=True)
        with Load(server, folder, rows=rows, rate=rate, seconds=seconds) as load:
            visible = [visible_after(server, daemon, load, -number) for number in range(1, PROBES + 1)]
            load.end()
        ended = time.time()
        after = daemon.metrics()
        memory_mb, files = daemon.memory_mb(), daemon.files()
        found = story(daemon.lake / TABLE, load.began)
    return figures(found, load.began, ended, merge_s=_grown("cdc_merge_seconds_sum", before, after)) | {
        "rows": rows, "rate": rate, "cpu_s": _grown("process_cpu_seconds_total", before, after),
        "visible_after_s": visible, "peak_rss_mb": memory_mb, "peak_rss_mb_of_snapshot": snapshot_mb, "files": files,
    }  # fmt: skip


def visible_after(server: EmbeddedPostgres, daemon: Follower, load: Load, key: int) -> float | None:
    """Seconds from a row's commit until `cdc query` shows it; None if the load ended before."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("insert into items (id) values (%s)", (key,))
    began = time.monotonic()
    while load.running:
        if daemon.query(f"select 1 from {SOURCE}.items where id = {key}"):
            return time.monotonic() - began
        time.sleep(0.2)
    return None


def _grown(name: str, before: dict[str, float], after: dict[str, float]) -> float:
    return after.get(name, 0.0) - before.get(name, 0.0)


def figures(found: Story, began: float, ended: float, *, merge_s: float) -> dict[str, Any]:
    """What the commits between two times amount to; `merge_s`: time that merging took in them."""
    landings = [x for x in found.landings if x.at <= ended]
    merges = [x for x in found.merges if x.at <= ended]
    merged = sum(x.rows for x in landings if merges and x.version <= merges[-1].through)
    times = every(1.0, began, ended)
    tails = [(round(t - began), found.tail(t)) for t in times]
    ages = [found.age(t) for t in times]
    return {
        "seconds": ended - began,
        "landed_rows": sum(x.rows for x in landings),
        "merged_rows": merged,
        "merges": len(merges),
        "merge_share": merge_s / (ended - began),
        "merge_us_per_row": merge_s / merged * 1e6 if merged else None,
        "bytes_per_row": sum(x.bytes for x in merges) / merged if merged else None,
        "rows_rewritten_per_row": sum(x.rows for x in merges) / merged if merged else None,
        "landed_after_s": _spread([x.at - x.oldest for x in landings]),
        "merged_age_s": _spread(ages),
        "tail_rows": _spread([tail for _, tail in tails]),
        "tail_rows_by_third": [max(t for _, t in part) for part in _thirds(tails)],
        "tail": tails[:: max(1, len(tails) // 60)],
    }


def _spread(values: list[float] | list[int]) -> dict[str, float]:
    return {"median": statistics.median(values), "max": max(values)} if values else {}


def _thirds(values: list[Any]) -> list[list[Any]]:
    n = max(1, len(values) // 3)
    return [part for part in (values[:n], values[n : 2 * n], values[2 * n :]) if part]


def show(one: dict[str, Any]) -> None:
    """One size, in words."""
    shown = ", ".join(f"{s:.1f}" for s in one["visible_after_s"] if s is not None)
    print(
        f"  {one['rows']:,} rows: {one['merges']} merges of {one['merged_rows']:,} changed rows; share of the time"
        f" {one['merge_share']:.3f}\n"
        f"    per changed row: {one['merge_us_per_row'] or 0:,.1f} us, {one['bytes_per_row'] or 0:,.0f} bytes"
        f" ({one['rows_rewritten_per_row'] or 0:.1f} rows) rewritten\n"
        f"    landed after {one['landed_after_s']['median']:.1f} s (max {one['landed_after_s']['max']:.1f});"
        f" `cdc query` shows it after {shown or 'more than the load'} s;"
        f" current lacks {one['merged_age_s']['median']:.1f} s (max {one['merged_age_s']['max']:.1f})\n"
        f"    tail {one['tail_rows']['median']:,.0f} rows (max {one['tail_rows']['max']:,}; by thirds"
        f" {', '.join(f'{t:,}' for t in one['tail_rows_by_third'])})\n"
        f"    peak {one['peak_rss_mb']:.0f} MB (snapshot {one['peak_rss_mb_of_snapshot']:.0f}),"
        f" CPU {one['cpu_s']:.0f} s, files {one['files']}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="rows of the tables")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of load, per size")
    parser.add_argument("--rate", type=int, default=RATE, help="updated rows a second")
    parser.add_argument("--lake", type=json.loads, default={}, help="keys of [lake], as JSON")
    args = parser.parse_args()
    done = []
    with bl.server() as server, tempfile.TemporaryDirectory(prefix="cdc-bench-") as folder:
        for rows in args.sizes:
            place = Path(folder) / str(rows)
            done.append(run(server, place, rows, args.rate, args.seconds, args.lake))
            show(done[-1])
            shutil.rmtree(place)
    target = ROOT / "build" / "bench-current.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"lake": args.lake, "sizes": done}, indent=1))
    print(f"\nwritten to {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
