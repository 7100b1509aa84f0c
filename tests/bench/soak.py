"""`make soak`: does anything grow, or fall behind, while a daemon follows a steady load for half an hour?

2,000 random rows a second of a table are updated on a real Postgres; a daemon with the default configuration follows.
Memory, files of the lake, unmerged rows and what the table lacks are sampled every few seconds by the daemon's own
metrics and from outside. Prints medians of the first and the last third and the maximum, each against its bound, and
ends with exit code 3 if a bound is broken. The first two merges do not count. Writes build/soak.json.

What replaced files leave behind stays for `vacuum_after_s`, an hour at least: those are bounded by their rate, which
is told, and not by this test.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltalake import DeltaTable

from tests.bench import backlog as bl
from tests.bench.steady import ROOT, SOURCE, Follower, Load, fill, story

EVERY_S = 5.0
TABLE = f"{SOURCE}/public.items"
LAND_EVERY_S = 10.0
LANDED_WITHIN_S = LAND_EVERY_S + 2
LOAD_SHARE = 0.95
WARM_MERGES = 2

Samples = list[dict[str, float]]


@dataclass(frozen=True, slots=True)
class Series:
    """Something that is watched. `grown`: by how much the last third's median may exceed the first one's, as a factor
    and an absolute; `most`: what no sample may exceed."""

    name: str
    unit: str
    grown: tuple[float, float] | None = None
    most: float | None = None

    def verdict(self, values: list[float]) -> dict[str, Any]:
        third = max(1, len(values) // 3)
        first, last = statistics.median(values[:third]), statistics.median(values[-third:])
        broken = self.most is not None and max(values) > self.most
        if self.grown is not None:
            broken |= last > first * self.grown[0] + self.grown[1]
        return {"first": first, "last": last, "max": max(values), "broken": broken}

    @property
    def bound(self) -> str:
        most = [] if self.most is None else [f"never above {self.most:g}"]
        grown = [] if self.grown is None else [f"last at most {self.grown[0]:g} x first + {self.grown[1]:g}"]
        return "; ".join([*most, *grown]) or "told only"


def watched(rate: int, staleness_s: float) -> list[Series]:
    """Everything, with its bounds. `staleness_s`: what the operator allows, 0 if nothing is said."""
    stale_most = staleness_s + LANDED_WITHIN_S if staleness_s else None
    return [
        Series("memory", "MB", grown=(1.2, 32)),
        Series("live files of the changelog", "", grown=(1.5, 24)),
        Series("live files of current", "", grown=(1.5, 4)),
        Series("files in all", ""),
        Series("event log", "MB", grown=(1.5, 64)),
        Series("unlanded for", "s", most=LANDED_WITHIN_S),
        Series("unmerged for", "s", grown=(1.5, LAND_EVERY_S), most=stale_most),
        Series("unmerged rows", "", grown=(1.5, rate * LAND_EVERY_S)),
    ]  # fmt: skip


def sample(daemon: Follower) -> dict[str, float]:
    """How things are now, by the names of `watched`."""
    figures, files = daemon.metrics(), daemon.files()
    live = {name: len(DeltaTable(str(daemon.lake / TABLE / name)).file_uris()) for name in ("changelog", "current")}
    return {
        "at": time.time(),
        "memory": daemon.memory_mb("VmRSS"),
        "live files of the changelog": live["changelog"],
        "live files of current": live["current"],
        "files in all": sum(files.values()),
        "event log": figures["cdc_log_bytes"] / 2**20,
        "unlanded for": figures["cdc_table_lag_seconds{landed}"],
        "unmerged for": figures["cdc_table_lag_seconds{merged}"],
        "unmerged rows": figures["cdc_unmerged_rows"],
        "changes": figures["cdc_changes_total"],
        "merge seconds": figures["cdc_merge_seconds_sum"],
        "merges": figures["cdc_merge_seconds_count"],
    }


def soak(rows: int, rate: int, seconds: int, lake: dict[str, Any]) -> tuple[Samples, dict[str, Any]]:
    """The samples, and what is known afterwards only."""
    with following(rows, lake) as (daemon, load_for):
        samples = []
        with load_for(rate, seconds) as load:
            while load.running:
                time.sleep(EVERY_S)
                samples.append(sample(daemon))
                if len(samples) % 12 == 0:
                    print(f"  {told(samples[-1])}", flush=True)
            load.end()
        daemon.ask("wait", "--timeout", "600")
        equal = daemon.ask("verify")
        found = story(daemon.lake / TABLE, load.began)
    first, last = samples[0], samples[-1]
    took = last["at"] - first["at"]
    return samples, {
        "changes_per_s": (last["changes"] - first["changes"]) / took,
        "merge_share": (last["merge seconds"] - first["merge seconds"]) / took,
        "files_per_minute": (last["files in all"] - first["files in all"]) / took * 60,
        "landed_after_max_s": max(x.at - x.oldest for x in found.landings),
        "landings": len(found.landings),
        "merges": len(found.merges),
        "verify": equal,
    }


@contextmanager
def following(rows: int, lake: dict[str, Any]) -> Iterator[tuple[Follower, Callable[[int, int], Load]]]:
    """A daemon that has its first snapshot behind it, and what starts the load."""
    with bl.server() as server, tempfile.TemporaryDirectory(prefix="cdc-soak-") as folder:
        print(f"a table of {rows:,} rows, and its first snapshot", flush=True)
        fill(server, rows)
        with Follower(server, Path(folder) / "daemon", lake=lake) as daemon:
            daemon.until(daemon.follows, "the first snapshot is merged")
            daemon.ask("wait", "--timeout", "600")
            yield daemon, lambda rate, s: Load(server, Path(folder), rows=rows, rate=rate, seconds=s)


def told(one: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.0f}" for name, value in one.items() if name != "at")


def settled(samples: Samples) -> Samples:
    """Without the begin, in which the first merges find little to do; two thirds of the samples at least."""
    begin = samples[0]["merges"]
    first = next((n for n, s in enumerate(samples) if s["merges"] >= begin + WARM_MERGES), len(samples))
    return samples[min(first, len(samples) // 3) :]


def report(samples: Samples, after: dict[str, Any], rate: int, staleness_s: float) -> list[str]:
    """Print the verdicts; the names of what is broken."""
    broken, counted = [], settled(samples)
    print(f"\n{'':28} {'first third':>12} {'last third':>12} {'max':>12}   bound")
    for series in watched(rate, staleness_s):
        verdict = series.verdict([s[series.name] for s in counted])
        name = f"{series.name} ({series.unit})" if series.unit else series.name
        figures = " ".join(f"{verdict[k]:>12,.1f}" for k in ("first", "last", "max"))
        print(f"{name:28} {figures}   {series.bound}{'  BROKEN' if verdict['broken'] else ''}")
        if verdict["broken"]:
            broken.append(series.name)
    if after["changes_per_s"] < LOAD_SHARE * rate:
        broken.append("load")
    if after["landed_after_max_s"] > LANDED_WITHIN_S:
        broken.append("landed after")
    print(
        f"\n{after['changes_per_s']:,.0f} changes/s (bound: {LOAD_SHARE:g} of the load), {after['landings']} landings,"
        f" {after['merges']} merges ({after['merge_share']:.3f} of the time),"
        f" {after['files_per_minute']:.0f} more files a minute"
        f"\na change had landed after {after['landed_after_max_s']:.1f} s at most"
        f" (bound: {LANDED_WITHIN_S:g} s); verify: equal"
    )
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rate", type=int, default=2_000, help="updated rows a second")
    parser.add_argument("--lake", type=json.loads, default={}, help="keys of [lake], as JSON")
    args = parser.parse_args()
    staleness_s = float(args.lake.get("current", {}).get("max_staleness_s", 0))
    samples, after = soak(args.rows, args.rate, int(args.minutes * 60), args.lake)
    broken = report(samples, after, args.rate, staleness_s)
    target = ROOT / "build" / "soak.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"lake": args.lake, "after": after, "broken": broken, "samples": samples}, indent=1))
    print(f"written to {target.relative_to(ROOT)}")
    if broken:
        print(f"broken: {', '.join(broken)}", file=sys.stderr)
    return 3 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
