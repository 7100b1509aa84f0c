"""The lake in a bucket: what a daemon writes there is what its source has, whatever dies and whatever is lost.

The daemon is killed at named points of landing, merging and confirming, with its disk lost or not, while the source is
written to. At the end `verify` finds every table equal, each changelog holds each change exactly once, and readers that
know only Delta open the tables in the bucket.
"""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
from deltalake import DeltaTable

from connectors.s3.store import S3Store
from tests.support.buckets import copy_of, endpoint_of, new_bucket
from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until
from tests.support.witness import Witness, assert_exactly_once
from tests.support.workload import SCHEMA, TABLES, Workload

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


class Scene:
    """The workload's tables, their witness, and a daemon whose lake is a bucket."""

    def __init__(self, directory: Path, dsn: str, s3_server: str = "moto") -> None:
        execute(dsn, *SCHEMA.split(";\n"))
        self.url, self.endpoint = f"s3://{new_bucket(s3_server)}/some/lake", endpoint_of(s3_server)
        self.store = S3Store.from_url(self.url, {"endpoint_url": self.endpoint})
        self.daemon = Daemon(
            directory,
            dsn,
            source={"chunk_rows": 1000, "confirm_every_s": 0.3},
            lake={"url": self.url, "endpoint_url": self.endpoint},
        )
        assert self.daemon.ask("setup").code == 0
        self.witness = Witness(dsn, f"witness_{self.daemon.slot}")

    def kill_at(self, point: str, *, disk_lost: bool) -> None:
        self.daemon.start(failpoints=f"{point}=kill")
        wait_until(lambda: not self.daemon.alive, 60, lambda: f"to die at {point}\n{self.daemon.log_tail()}")
        assert self.daemon.ended() == -signal.SIGKILL, f"{point}\n{self.daemon.log_tail()}"
        if disk_lost:
            shutil.rmtree(self.daemon.state_dir)

    def check(self, directory: Path) -> None:
        self.daemon.settled().verified()
        assert assert_exactly_once(self.witness, copy_of(self.store, directory), TABLES) > 50
        counted = self.daemon.ask("query", "select count(*) from shop.items").document["rows"]
        location, options = self.store.location("shop/public.items/current")
        assert [[DeltaTable(location, storage_options=options).to_pyarrow_table().num_rows]] == counted


@pytest.mark.parametrize("s3_server", ["moto", pytest.param("ceph", marks=pytest.mark.stores)])
def test_a_lake_in_a_bucket_survives_kills_and_a_lost_disk(
    s3_server: str, tmp_path: Path, database: str, rng: random.Random
) -> None:
    scene = Scene(tmp_path, database, s3_server)
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
    scene = Scene(tmp_path, database)
    with scene.daemon as daemon, Workload(database, rng.randrange(1 << 30), pause_s=0.05) as workload:
        for _ in range(3):
            scene.kill_at(point, disk_lost=disk_lost)
        daemon.start().streaming()
        workload.stop()
        scene.check(tmp_path / "copy")
