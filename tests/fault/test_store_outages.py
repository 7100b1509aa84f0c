"""A daemon whose store fails for a while, under load: it goes on by itself, and nothing is lost or doubled.

All its requests go through a proxy, deltalake's as well. It must be the same process and the same term of the lease all
the time: nobody else came, so there is nothing that a restart or an operator would be needed for.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from cdc.lake.layout import lease_key
from tests.support.buckets import s3_endpoint
from tests.support.daemon import SOURCE, Daemon, execute
from tests.support.postgres import create_database, private_server
from tests.support.scene import Scene
from tests.support.store_proxy import StoreProxy
from tests.support.waiting import wait_until
from tests.support.workload import Workload

pytestmark = pytest.mark.slow
TTL_S = 5
SEGMENT = 16 << 20


@pytest.fixture
def proxy(rng: random.Random) -> Iterator[StoreProxy]:
    with StoreProxy(s3_endpoint(), rng.randrange(1 << 30)) as proxy:
        yield proxy


def fence(scene: Scene) -> int:
    return int(_lease(scene)["fence"])


def run_out_since_s(scene: Scene) -> float:
    """For how long the lease has not been renewed, beyond its end; negative while it holds."""
    return time.time() - float(_lease(scene)["expires_at"])


def _lease(scene: Scene) -> dict[str, float]:
    found = scene.store.get(lease_key(SOURCE))
    assert found is not None
    return dict(json.loads(found[0]))


def storm(proxy: StoreProxy, scene: Scene) -> None:
    fault = proxy.fault("says", times=10**6, share=0.5)
    wait_until(lambda: fault.hits > 200, 300, "a storm of SlowDown")


def resets(proxy: StoreProxy, scene: Scene) -> None:
    fault = proxy.fault("reset", "PUT", times=10**6, share=0.3)
    wait_until(lambda: fault.hits > 30, 300, "writes that break off")


def lost_answers(proxy: StoreProxy, scene: Scene) -> None:
    data = proxy.fault("lost", "PUT", r"\.parquet$", times=10**6, share=0.2)
    commits = proxy.fault("lost", "PUT", r"\d{20}\.json$", times=10**6, share=0.2)
    small = proxy.fault("lost", "PUT", r"/_cdc/", times=10**6, share=0.5)
    wait_until(lambda: min(data.hits, commits.hits) > 6 and small.hits > 8, 300, "writes without an answer")


def skew(proxy: StoreProxy, scene: Scene) -> None:
    fault = proxy.fault("says", times=10**6, status=403, code="RequestTimeTooSkewed")
    wait_until(lambda: fault.hits > 30 and run_out_since_s(scene) > 0, 120, "a clock that is wrong for a while")
    wait_until(lambda: "RequestTimeTooSkewed" in scene.daemon.source()["error"], 60, scene.daemon.source)


def silence(proxy: StoreProxy, scene: Scene) -> None:
    """Connections stay open and no byte comes; what was sent arrives when it is over, whoever still waits for it."""
    proxy.freeze()
    wait_until(lambda: run_out_since_s(scene) > 30 - TTL_S, 120, "half a minute of silence")
    proxy.thaw()


def cuts(proxy: StoreProxy, scene: Scene) -> None:
    for _ in range(20):
        seen = len(proxy.requests)
        wait_until(lambda seen=seen: len(proxy.requests) > seen + 5, 60, "some requests")
        proxy.cut()


@pytest.mark.parametrize("fault", [storm, resets, lost_answers, skew, silence, cuts], ids=lambda f: f.__name__)
def test_what_passes_needs_nobody(
    fault: object, tmp_path: Path, database: str, rng: random.Random, proxy: StoreProxy
) -> None:
    assert callable(fault)
    scene = Scene(tmp_path, database, bucket=True, by_way_of=proxy.endpoint, lake={"lease_ttl_s": TTL_S})
    with scene.daemon as daemon, Workload(database, rng.randrange(1 << 30), pause_s=0.05) as workload:
        pid = daemon.start().streaming().pid
        wait_until(lambda: workload.committed > 20, 60, "some transactions")
        fault(proxy, scene)
        proxy.heal()
        at = workload.committed
        wait_until(lambda: workload.committed > at + 20, 60, "some transactions after it")
        workload.stop()
        assert scene.check() > 50
        assert (daemon.alive, daemon.pid, fence(scene)) == (True, pid, 1)
        assert daemon.source()["error"] == ""
        wait_until(lambda: run_out_since_s(scene) < 0, 30, "the lease to be held")
        assert daemon.stop() == 0


def retained(daemon: Daemon) -> int:
    """WAL that the server keeps for the slot; it lets go of some at its own checkpoints only."""
    with psycopg.connect(daemon.dsn, autocommit=True) as connection:
        connection.execute("checkpoint")
        row = connection.execute(
            "select (pg_current_wal_lsn() - restart_lsn)::int8 from pg_replication_slots where slot_name = %s",
            [daemon.slot],
        ).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("confirm_after", ["log", "landed"])
def test_an_outage_of_many_leases_under_load(
    confirm_after: str, tmp_path: Path, rng: random.Random, proxy: StoreProxy
) -> None:
    """Each part's retries are exhausted many times. Under `log` the source does not notice; under `landed` it keeps
    WAL, which is told, and not bridged: a lake that is away cannot be told that the log alone has it."""
    with private_server(tmp_path / "server", max_slot_wal_keep_size="1GB") as server:
        dsn = create_database(server, "busy")
        scene = Scene(
            tmp_path, dsn, bucket=True, by_way_of=proxy.endpoint, lake={"lease_ttl_s": TTL_S},
            source={"confirm_after": confirm_after, "heartbeat_every_s": 0.2, "wal_warn_at": ["48MB"],
                    "wal_confirm_at": ["64MB"], "wal_pause_at": ["96MB"]},
        )  # fmt: skip
        daemon = scene.daemon

        def write() -> None:
            at = workload.committed
            wait_until(lambda: workload.committed > at + 5, 60, "the source to be written to")
            execute(dsn, "select pg_switch_wal()")

        def is_flat() -> bool:
            return retained(daemon) <= 2 * SEGMENT

        def told() -> str:
            return f"{retained(daemon)} bytes are kept; {daemon.source()}\n{daemon.log_tail()}"

        with daemon, Workload(dsn, rng.randrange(1 << 30), pause_s=0.2) as workload:
            pid = daemon.start().streaming().pid
            wait_until(lambda: workload.committed > 20, 60, "some transactions")
            proxy.refuse()
            wait_until(lambda: run_out_since_s(scene) > 0, 60, "the lease to run out")
            for _ in range(10):
                write()
                if confirm_after == "log":
                    wait_until(is_flat, 60, told)
            wait_until(lambda: run_out_since_s(scene) > 6 * TTL_S, 120, "an outage of many leases")
            if confirm_after == "landed":
                wait_until(lambda: daemon.source()["guard"]["stage"] == "pause", 60, told)
                assert retained(daemon) > 96 << 20
            proxy.refuse(False)
            workload.stop()
            assert scene.check() > 50
            wait_until(is_flat, 60, told)
            wait_until(lambda: daemon.source()["guard"]["stage"] is None, 60, told)
            assert (daemon.alive, daemon.pid, fence(scene)) == (True, pid, 1)
            assert daemon.stop() == 0
