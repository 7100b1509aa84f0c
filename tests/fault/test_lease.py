"""A daemon that could not renew its lease in time: it writes nothing until it has it again, and never if another took
it.

The process is stopped (SIGSTOP) or its lake taken away for longer than the lease lasts.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.buckets import new_bucket, s3_endpoint
from tests.support.daemon import SOURCE, Daemon, execute
from tests.support.store_proxy import StoreProxy
from tests.support.waiting import wait_until
from tests.support.witness import changelog

TTL_S = 5


@pytest.fixture
def daemon(tmp_path: Path, database: str) -> Daemon:
    execute(database, "create table orders (id int primary key, amount int)")
    return Daemon(tmp_path, database, lake={"lease_ttl_s": TTL_S})


def lease(daemon: Daemon) -> dict[str, Any]:
    return dict(json.loads((daemon.lake / SOURCE / "_cdc" / "lease.json").read_text()))


def has_run_out(daemon: Daemon) -> bool:
    return bool(time.time() > lease(daemon)["expires_at"])


def ids(daemon: Daemon) -> list[int]:
    found = changelog(daemon.lake, "public.orders", columns=("_op", "_epoch", "_lsn", "_seq", "id"))
    return sorted(row["id"] for row in found.to_pylist() if row["_op"] == "c")


@pytest.mark.slow
def test_a_daemon_that_slept_longer_than_its_lease_goes_on_if_nobody_came(daemon: Daemon) -> None:
    with daemon:
        daemon.start().settled()
        term = lease(daemon)["fence"]
        daemon.signal(signal.SIGSTOP)
        execute(daemon.dsn, "insert into orders select n, n from generate_series(1, 50) n")
        wait_until(lambda: has_run_out(daemon))
        daemon.signal(signal.SIGCONT)
        daemon.settled().verified()
        assert (lease(daemon)["fence"], has_run_out(daemon)) == (term, False)
        assert ids(daemon) == list(range(1, 51))


@pytest.mark.slow
def test_a_daemon_that_wakes_up_behind_its_successor_writes_nothing(daemon: Daemon, tmp_path: Path) -> None:
    other = Daemon(tmp_path / "other", daemon.dsn, lake={"url": str(daemon.lake), "lease_ttl_s": TTL_S})
    with daemon, other:
        daemon.start().settled()
        execute(daemon.dsn, "insert into orders select n, n from generate_series(1, 20) n")
        daemon.signal(signal.SIGSTOP)
        # As if it were another machine, whose processes nobody sees; and as if its sessions there were given up.
        path = daemon.lake / SOURCE / "_cdc" / "lease.json"
        path.write_text(json.dumps(lease(daemon) | {"place": "", "expires_at": 0}))
        execute(daemon.dsn, "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'cdc%'")
        other.start().streaming()
        execute(daemon.dsn, "insert into orders select n, n from generate_series(21, 40) n")
        other.settled()
        assert lease(daemon)["pid"] == other.pid

        daemon.signal(signal.SIGCONT)
        assert daemon.ended() == 1
        assert "another daemon" in daemon.log_tail()
        other.settled().verified()
        assert ids(daemon) == list(range(1, 41))


@pytest.mark.slow
def test_a_daemon_that_has_lost_only_its_store_lets_the_reserve_have_the_source(tmp_path: Path, database: str) -> None:
    """Its own way to the store is cut; that to the source is not, so nothing else would make it let go."""
    execute(database, "create table orders (id int primary key, amount int)")
    url, endpoint = f"s3://{new_bucket()}/lake", s3_endpoint()
    with StoreProxy(endpoint) as proxy:
        lake = {"url": url, "lease_ttl_s": TTL_S}
        first = Daemon(tmp_path / "first", database, lake={**lake, "endpoint_url": proxy.endpoint})
        reserve = Daemon(tmp_path / "reserve", database, lake={**lake, "endpoint_url": endpoint})
        with first, reserve:
            first.start().settled()
            reserve.start().in_phase("standby")
            proxy.refuse()
            proxy.cut()
            execute(database, "insert into orders select n, n from generate_series(1, 50) n")
            reserve.streaming(120)
            reserve.settled().verified()
            proxy.refuse(False)
            assert first.ended() == 1
            reserve.settled().verified()
