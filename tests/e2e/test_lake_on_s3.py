"""The lake in a bucket: what a daemon writes there is what its source has, whatever dies and whatever is lost.

The daemon is killed at named points of landing, merging and confirming, with its disk lost or not, while the source is
written to. At the end `verify` finds every table equal, each changelog holds each change exactly once, and readers that
know only Delta open the tables in the bucket.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.bucket_scene import BucketScene
from tests.support.buckets import endpoint_of
from tests.support.waiting import wait_until
from tests.support.workload import Workload

POINTS = (
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
)


@pytest.mark.parametrize("s3_server", ["moto", pytest.param("ceph", marks=pytest.mark.stores)])
def test_a_lake_in_a_bucket_survives_kills_and_a_lost_disk(
    s3_server: str, tmp_path: Path, database: str, rng: random.Random
) -> None:
    scene = BucketScene(tmp_path, database, endpoint_of(s3_server))
    with scene.daemon as daemon, Workload(database, rng.randrange(1 << 30), pause_s=0.05) as workload:
        first, second = rng.sample(POINTS, 2)
        scene.kill_at(first, disk_lost=False)
        scene.kill_at(second, disk_lost=True)
        daemon.start().streaming()
        at = workload.committed
        wait_until(lambda: workload.committed > at + 20, 60, "some transactions after the last kill")
        workload.stop()
        scene.check(tmp_path / "copy")


@pytest.mark.slow
@pytest.mark.parametrize("disk_lost", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_a_lake_in_a_bucket_survives_kills_at_one_point(
    point: str, disk_lost: bool, tmp_path: Path, database: str, rng: random.Random
) -> None:
    scene = BucketScene(tmp_path, database, endpoint_of("moto"))
    with scene.daemon as daemon, Workload(database, rng.randrange(1 << 30), pause_s=0.05) as workload:
        for _ in range(3):
            scene.kill_at(point, disk_lost=disk_lost)
        daemon.start().streaming()
        workload.stop()
        scene.check(tmp_path / "copy")
