"""Sources that are compared periodically: random work, whatever is killed, and the lake equals the source."""

from __future__ import annotations

import random
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from cdc.instant import in_part_fact
from cdc.state import open_state
from tests.support.daemon import Daemon, execute
from tests.support.periodic import Workload, periodic
from tests.support.waiting import wait_until

ROWS = 5_000_000
RSS_MAX_MB = 300

POINTS = [
    "periodic.after_snapshot", "periodic.between_tables", "periodic.after_portion", "periodic.after_chunk",
    "periodic.before_boundary", "periodic.after_boundary", "land.before_cut", "land.before_commit",
    "land.after_commit", "land.between_tables", "land.after_cut", "log.before_index", "log.after_index",
    "confirm.before_anchor", "confirm.after_anchor",
]  # fmt: skip


def peak_rss_mb(daemon: Daemon) -> float:
    for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmHWM")


def assert_nothing_is_missing(daemon: Daemon) -> None:
    """Everything but deletes: what the lake has too much of is what strategy "cursor" does not see."""
    document = daemon.ask("verify").document
    for table in document["tables"]:
        assert not table["error"], table
        keyed = table["table"] in ("public.orders", "public.pairs", "public.swaps")
        wrong = {k: n for k, n in table["counts"].items() if n and not (keyed and k == "extra")}
        assert (wrong, table["not_compared"]) == ({}, 0), f"{table}\n{daemon.log_tail()}"


def check(daemon: Daemon, strategy: str) -> None:
    daemon.settled()
    if strategy == "diff":
        daemon.verified()
    else:
        assert_nothing_is_missing(daemon)


def is_up(daemon: Daemon) -> bool:
    """Whether this very process answers (before its first start has written its state, there is no status)."""
    document = daemon.ask("status").document
    return bool("daemon" in document and document["daemon"]["pid"] == daemon.pid)


def die_somewhere(daemon: Daemon, rng: random.Random) -> str:
    """Start it so that it dies at a random place, or is killed when a run got past that; the place."""
    point = f"{rng.choice(POINTS)}=kill:{rng.choice([1, 1, 2, 3])}"
    daemon.start(failpoints=point)
    wait_until(lambda: not daemon.alive or is_up(daemon), 60)
    if daemon.alive:
        daemon.begin("wait", "--timeout", "30")()
    if daemon.alive:
        daemon.kill()
    return point


def tell(folder: Path, dsn: str, rng: random.Random, strategy: str, rounds: int, *, deaths: bool) -> None:
    source = {"strategy": strategy, "cursor_lag_s": 0.0} if strategy == "cursor" else {}
    if strategy == "cursor":
        source["cursor"] = "updated_at"
    with Workload(dsn, rng) as workload, periodic(folder, dsn, source) as daemon:
        workload.work(5)
        daemon.start()
        if deaths:
            check(daemon, strategy)
        for _ in range(rounds):
            if rng.random() < 0.5 and not workload.is_late:
                workload.begin_late()
            workload.work(rng.randrange(1, 8))
            if deaths and rng.random() < 0.6:
                daemon.kill()
                if rng.random() < 0.4:
                    shutil.rmtree(folder / "state")
                died = die_somewhere(daemon, rng)
                if rng.random() < 0.3:
                    shutil.rmtree(folder / "state")
                workload.work(1)
                daemon.start()
                daemon.log_path.open("a").write(f"--- had died at {died}\n")
            if workload.is_late and rng.random() < 0.6:
                daemon.settled()
                workload.commit_late()
            check(daemon, strategy)
        workload.commit_late()
        if strategy == "cursor":
            tables = [t for t, seen in daemon.settled().tables().items() if seen["state"] != "removed"]
            assert daemon.ask("resync", *tables, "--wait").code == 0
            daemon.verified()
        assert daemon.stop() == 0


@pytest.mark.parametrize("strategy", ["diff", "cursor"])
def test_a_few_rounds_of_random_work(database: str, tmp_path: Path, rng: random.Random, strategy: str) -> None:
    tell(tmp_path, database, rng, strategy, 1, deaths=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", ["diff", "cursor"])
@pytest.mark.parametrize("number", range(3))
def test_many_rounds_with_deaths_and_lost_disks(database: str, tmp_path: Path, strategy: str, number: int,
                                                rng: random.Random) -> None:  # fmt: skip
    tell(tmp_path, database, random.Random(rng.random() + number), strategy, 15, deaths=True)


@pytest.mark.slow
def test_a_run_that_landed_in_part_is_known_after_the_disk_is_lost(database: str, tmp_path: Path) -> None:
    names = ("a", "b", "c")
    execute(database, *(f"create table {name} (id int primary key)" for name in names))
    with periodic(tmp_path, database) as daemon:
        daemon.start().settled()
        assert daemon.stop() == 0
        execute(database, *(f"insert into {name} values (1)" for name in names))
        daemon.start(failpoints="land.between_tables=kill:1")
        wait_until(lambda: not daemon.alive or is_up(daemon), 60)
        daemon.begin("wait", "--timeout", "20")()
        wait_until(lambda: not daemon.alive, 20)
        shutil.rmtree(daemon.state_dir)
        daemon.start()

        def noted() -> object:
            state = open_state(daemon.state_dir, create=False, readonly=True)
            with closing(state):
                return state.get(in_part_fact("shop"))

        wait_until(lambda: is_up(daemon) and noted() is not None, message=daemon.log_tail)
        daemon.settled()
        assert daemon.ask("query", "select count(*) from shop.a, shop.b").document["notes"] == [], "a run came after it"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", ["diff", "cursor"])
def test_five_million_rows_are_compared_in_little_memory(database: str, tmp_path: Path, strategy: str) -> None:
    execute(
        database,
        "create table big (id bigint primary key, a int, b bigint, c numeric(12,2), d float8, e text, f text, g date,"
        " h bool, updated_at timestamptz default now())",
        f"insert into big select g, g % 1000, g * 7, g / 3.0, random(), 'text ' || g, md5(g::text), '2026-01-01',"
        f" g % 2 = 0 from generate_series(1, {ROWS}) g",
        "create index on big (updated_at)",
    )
    source = {"strategy": strategy, "tables": ["public.big"]}
    if strategy == "cursor":
        source |= {"cursor": "updated_at", "cursor_lag_s": 0}
    with periodic(tmp_path, database, source) as daemon:
        daemon.start().settled(1200)
        for part in range(3):
            execute(
                database,
                f"update big set e = 'changed', updated_at = now() where id % 100 = {part}",
                f"insert into big select {ROWS} + {part} * 1000 + g, 1 from generate_series(1, 900) g",
            )
            assert daemon.ask("wait", "--timeout", "1200").code == 0
        execute(database, "delete from big where id % 50 = 0")
        assert daemon.ask("resync", "big", "--wait").code == 0
        peak = peak_rss_mb(daemon)
        daemon.verified(timeout_s=1200)
        counts = [run["counts"] for run in daemon.source()["runs"]["history"] if run["outcome"] == "done"]
        assert sum(c["updated"] for c in counts) == 3 * ROWS // 100 + 9 + 18  # of those inserted before
        assert sum(c["inserted"] for c in counts) == 2700
        assert sum(c["deleted"] for c in counts) == ROWS // 50 + 3 * 18
        assert daemon.stop(120) == 0
    assert peak < RSS_MAX_MB
