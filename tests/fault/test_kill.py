"""The daemon is killed at named points while the source is written to, and nothing is lost or doubled.

Each area of the code has a lake of its own, on which the daemon is killed at one of the area's points, drawn anew for
each run, with a snapshot in progress. The oracle is at the end: `verify` finds every table equal, and every changelog
holds each change exactly once by the count of Postgres' own test_decoding per table, operation and transaction.
`make test-slow` kills at every point, at several passes.
"""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Mapping
from pathlib import Path

import psycopg
import pytest

from tests.support.daemon import ROOT, Daemon, execute
from tests.support.scene import Scene
from tests.support.waiting import wait_until
from tests.support.witness import Witness, assert_exactly_once
from tests.support.workload import Workload

# Each point, and up to which of its passes it strikes.
AREAS: Mapping[str, Mapping[str, int]] = {
    "append": {
        "capture.before_append": 15, "log.after_write": 15, "log.after_fsync": 15, "log.before_index": 15,
        "log.after_index": 15, "capture.after_append": 15,
    },
    "land": {
        "land.before_cut": 4, "land.before_upload": 8, "land.before_commit": 8, "land.after_commit": 8,
        "land.between_tables": 8, "land.after_cut": 4,
    },
    "confirm": {
        "confirm.before_anchor": 2, "confirm.after_anchor": 2, "capture.before_confirm": 2, "log.before_unlink": 1,
    },
    "snapshot and merge": {
        "backfill.after_snapshot": 6, "backfill.after_chunk": 10, "merge.before_commit": 6, "merge.after_commit": 6,
    },
    "upkeep": {"compact.before_commit": 3, "compact.after_commit": 3},
}  # fmt: skip
ELSEWHERE = {"sync.before_commit", "sync.after_commit"}
"""Points of reverse ETL: tests/integration/test_sync_postgres.py kills there."""
HTTP = {"http.before_ack", "http.after_ack", "ledger.after_put", "ledger.before_join", "ledger.after_join"}
"""Points of a target without transactions: tests/integration/test_sync_http.py kills there."""
PERIODIC = {
    "periodic.after_snapshot", "periodic.between_tables", "periodic.after_portion", "periodic.after_chunk",
    "periodic.before_boundary", "periodic.after_boundary",
}  # fmt: skip
"""Points of a periodic run: tests/e2e/test_periodic.py kills there."""
FILES = {
    "files.before_cut", "files.after_cut", "files.between_objects", "files.before_checkpoint", "files.after_checkpoint",
}  # fmt: skip
"""Points of a follower that writes plain files: tests/e2e/test_files.py kills there."""
ICEBERG = {"iceberg.before_commit", "iceberg.after_commit"}
"""Points of one that registers objects in a catalog: tests/e2e/test_iceberg.py kills there."""
HISTORY = ("origin.after_note", "slot.after_drop", "origin.after_setup", "origin.after_anchor")
"""Points of a new history: tests/fault/test_history.py kills there."""
LAKES = {"places.before_note"}
"""Points of a table's move to another lake: tests/e2e/test_lakes.py kills there."""
LAKE = {
    "vacuum.before_delete",
    "vacuum.after_current",
    "vacuum.after_delete",
    "lease.before_renewal",
    "lease.after_renewal",
}
"""Points of what is done to the lake now and then: tests/fault/test_crash_matrix.py kills there."""

RETENTION = {"retain.before_commit", "retain.after_commit"}
"""Points of what takes days to come: tests/unit/test_retention.py dies there."""

EVERY = [point for points in AREAS.values() for point in points]


def test_every_failpoint_is_struck_by_some_test() -> None:
    """A new failpoint must be named here; one that is gone must go here too."""
    named = set()
    for folder in ("cdc", "connectors"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            named |= set(re.findall(r'failpoint\("([^"]+)"\)', text))
            constants = set(re.findall(r"failpoint\(([A-Z_]+)\)", text))
            named |= {re.search(rf'^{name} = "([^"]+)"', text, re.M)[1] for name in constants}  # type: ignore[index]
    elsewhere = ELSEWHERE | HTTP | PERIODIC | FILES | ICEBERG | set(HISTORY)
    assert named == set(EVERY) | LAKE | LAKES | RETENTION | elsewhere


@pytest.mark.parametrize(
    "area", [pytest.param(a, marks=[pytest.mark.slow] if a in ("confirm", "upkeep") else []) for a in AREAS]
)
def test_nothing_is_lost_or_doubled_by_a_kill_in_one_area(
    area: str, tmp_path: Path, database: str, rng: random.Random
) -> None:
    scene = Scene(tmp_path, database)
    with scene.daemon as daemon, Workload(database, rng.randrange(1 << 30)) as workload:
        point, most = rng.choice(list(AREAS[area].items()))
        scene.kill_at(point, rng.randrange(1, most + 1))
        daemon.start().streaming()
        at = workload.committed
        wait_until(lambda: workload.committed > at + 20, 60, "some transactions after the last kill")
        workload.stop()
        assert scene.check() > 100


@pytest.mark.slow
@pytest.mark.parametrize("nth", [1, 2, 5])
@pytest.mark.parametrize("point", EVERY)
def test_nothing_is_lost_or_doubled_by_kills_at_one_point(
    point: str, nth: int, tmp_path: Path, database: str, rng: random.Random
) -> None:
    scene = Scene(tmp_path, database)
    with scene.daemon as daemon, Workload(database, rng.randrange(1 << 30)) as workload:
        for _ in range(3):
            scene.kill_at(point, nth)
        daemon.start().streaming()
        workload.stop()
        assert scene.check() > 100


@pytest.mark.slow
def test_a_transaction_too_big_to_wait_for_lands_once_however_often_we_die_in_it(tmp_path: Path, database: str) -> None:
    execute(database, "create table big (id int primary key, text text)", "create table small (id int primary key)")
    with Daemon(tmp_path, database) as daemon:
        daemon.start().settled()
        witness = Witness(database, f"witness_{daemon.slot}")
        daemon.kill()
        with psycopg.connect(database) as connection:
            connection.execute("insert into big select g, repeat(md5(g::text), 10) from generate_series(1, 100000) g")
            connection.execute("savepoint s")
            connection.execute("update big set text = 'rolled back' where id < 5000")
            connection.execute("rollback to savepoint s")
            connection.execute("insert into small values (1)")
            connection.execute("delete from big where id % 10 = 0")
        for point in ("capture.after_append=kill:8", "log.after_write=kill:12", "land.before_upload=kill",
                      "land.between_tables=kill"):  # fmt: skip
            assert daemon.start(failpoints=point).ended(60) == -signal.SIGKILL
        daemon.start().settled().verified()
        assert assert_exactly_once(witness, daemon.lake, ["public.big", "public.small"]) == 110_001
