"""The daemon dies at every named point of what it does to the lake, and may lose its disk: on a directory, in a bucket.

The source is written to all the while, and a snapshot is in progress. The oracle is tests/support/scene.py's.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.buckets import endpoint_of
from tests.support.scene import Scene
from tests.support.waiting import wait_until
from tests.support.workload import Workload

POINTS = (
    "land.before_cut",
    "land.before_upload",
    "land.before_commit",
    "land.after_commit",
    "land.between_tables",
    "land.after_cut",
    "confirm.before_anchor",
    "confirm.after_anchor",
    "capture.before_confirm",
    "backfill.after_chunk",
    "merge.before_commit",
    "merge.after_commit",
    "compact.before_commit",
    "compact.after_commit",
    "vacuum.before_delete",
    "vacuum.after_current",
    "vacuum.after_delete",
    "lease.before_renewal",
    "lease.after_renewal",
)
UPKEEP = {"lease_ttl_s": 5, "compact_every_s": 2, "vacuum_after_s": 0, "object_bytes_target": "1MB"}
"""Of [lake]: what is done now and then is done every few seconds."""
PAUSE_S = 0.05


@pytest.mark.parametrize(
    "s3_server", [pytest.param("moto", marks=pytest.mark.slow), pytest.param("ceph", marks=pytest.mark.stores)]
)
def test_a_lake_in_a_bucket_survives_a_kill_and_a_lost_disk(
    s3_server: str, tmp_path: Path, database: str, rng: random.Random
) -> None:
    scene = Scene(tmp_path, database, bucket=True, endpoint=endpoint_of(s3_server))
    with scene.daemon as daemon, Workload(database, rng.randrange(1 << 30), pause_s=PAUSE_S) as workload:
        scene.kill_at(rng.choice([p for p in POINTS if p.startswith(("land", "merge"))]), disk_lost=True)
        daemon.start().streaming()
        at = workload.committed
        wait_until(lambda: workload.committed > at + 20, 60, "some transactions after the kill")
        workload.stop()
        assert scene.check() > 50


@pytest.mark.slow
@pytest.mark.parametrize("disk_lost", [False, True], ids=["killed", "disk lost"])
@pytest.mark.parametrize("bucket", [False, True], ids=["local", "bucket"])
@pytest.mark.parametrize("point", POINTS)
def test_a_lake_survives_kills_at_one_point(
    point: str, bucket: bool, disk_lost: bool, tmp_path: Path, database: str, rng: random.Random
) -> None:
    scene = Scene(tmp_path, database, bucket=bucket, lake=UPKEEP)
    with scene.daemon as daemon, Workload(database, rng.randrange(1 << 30), pause_s=PAUSE_S) as workload:
        for _ in range(2):
            scene.kill_at(point, disk_lost=disk_lost)
        daemon.start().streaming()
        workload.stop()
        assert scene.check() > 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bucket", [False, True], ids=["local", "bucket"])
def test_a_lake_survives_a_hundred_random_rounds(
    bucket: bool, tmp_path: Path, database: str, rng: random.Random
) -> None:
    """Killed at a random point or at a random moment, one time in three with the disk lost."""
    scene = Scene(tmp_path, database, bucket=bucket, lake=UPKEEP)
    counted = 0
    with scene.daemon as daemon:
        for _ in range(10):
            with Workload(database, rng.randrange(1 << 30), pause_s=PAUSE_S) as workload:
                for _ in range(10):
                    disk_lost = rng.random() < 1 / 3
                    if rng.random() < 0.5:
                        scene.kill_at(rng.choice(POINTS), rng.randrange(1, 4), disk_lost=disk_lost)
                        continue
                    daemon.start()
                    until = workload.committed + rng.randrange(60)
                    wait_until(lambda until=until: workload.committed >= until, 60, "transactions")  # type: ignore[misc]
                    assert daemon.alive, daemon.log_tail()
                    daemon.kill()
                    if disk_lost:
                        daemon.lose_disk()
                daemon.start().streaming()
                workload.stop()
            now = scene.check()
            assert now > counted, "nothing was written"
            counted = now
            daemon.kill()
