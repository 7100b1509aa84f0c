"""The connection to the source breaks in every way that connections break, and slots go where they should not.

What mends itself is taken up again without a loss; what does not is told in `status`, with what mends it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.support.daemon import Daemon, execute
from tests.support.postgres import private_server
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until
from tests.support.witness import Witness, assert_exactly_once
from tests.support.workload import SCHEMA, TABLES, Workload


@pytest.fixture
def tables(database: str) -> str:
    execute(database, *SCHEMA.split(";\n"))
    return database


@contextmanager
def watched(daemon: Daemon, dsn: str, seed: int) -> Iterator[None]:
    """The block runs under load; after it everything must be there once, and equal."""
    assert daemon.ask("setup").code == 0
    witness = Witness(dsn, f"witness_{daemon.slot}")
    daemon.start().streaming()
    wait_until(lambda: walsender(dsn, daemon.slot), 60, "the stream")
    with Workload(dsn, seed) as workload:
        yield
        at = workload.committed
        wait_until(lambda: workload.committed > at + 10, 60, "transactions after the fault")
    daemon.settled().verified()
    assert assert_exactly_once(witness, daemon.lake, TABLES) > 10


def walsender(dsn: str, slot: str) -> int:
    """Process id of the walsender that serves the slot, 0 if none does."""
    with psycopg.connect(dsn) as connection:
        row = connection.execute(
            "select coalesce(active_pid, 0) from pg_replication_slots where slot_name = %s", [slot]
        ).fetchone()
    return row[0] if row else 0


@pytest.mark.slow
def test_a_terminated_walsender_costs_nothing(tmp_path: Path, tables: str, rng: random.Random) -> None:
    with Daemon(tmp_path, tables) as daemon, watched(daemon, tables, rng.randrange(1 << 30)):
        pid, before = daemon.pid, 0
        for _ in range(3):
            before = wait_until(lambda before=before: (p := walsender(tables, daemon.slot)) != before and p, 60)
            execute(tables, f"select pg_terminate_backend({before})")
        wait_until(lambda: walsender(tables, daemon.slot) not in (0, before), 60, "the stream to come back")
        assert (daemon.alive, daemon.pid) == (True, pid), "it is the same process"


def test_a_server_that_crashes_and_recovers_is_taken_up_again(tmp_path: Path, rng: random.Random) -> None:
    with private_server(tmp_path / "postgres") as server:
        execute(server.dsn(), *SCHEMA.split(";\n"))
        with Daemon(tmp_path / "daemon", server.dsn()) as daemon:
            assert daemon.ask("setup").code == 0
            witness = Witness(server.dsn(), "witness")
            daemon.start().streaming()
            with Workload(server.dsn(), rng.randrange(1 << 30)) as workload:
                wait_until(lambda: workload.committed > 50, 60, "some transactions")
            server.kill()
            daemon.in_phase("retry")
            told = daemon.source()
            assert told["error"], "status says why"
            assert told["slot"]["exists"] is None, "nobody knows while the server is away"
            wait_until(lambda: daemon.http("/health")[0] == 503, 60, "the health page to say so")
            server.start()
            with Workload(server.dsn(), rng.randrange(1 << 30)) as workload:
                wait_until(lambda: workload.committed > 50, 60, "more transactions")
            daemon.settled().verified()
            assert daemon.source()["error"] == ""
            assert daemon.http("/health")[0] == 200
            assert assert_exactly_once(witness, daemon.lake, TABLES) > 100


@pytest.mark.slow
def test_a_dropped_slot_is_told_and_a_teardown_begins_anew(tmp_path: Path, tables: str) -> None:
    with Daemon(tmp_path, tables) as daemon:
        daemon.start().settled()
        with psycopg.connect(tables, autocommit=True) as connection:

            def dropped() -> bool:
                pid = walsender(tables, daemon.slot)
                if pid:
                    connection.execute("select pg_terminate_backend(%s)", [pid])
                try:
                    connection.execute("select pg_drop_replication_slot(%s)", [daemon.slot])
                except psycopg.errors.ObjectInUse:
                    return False
                return True

            wait_until(dropped, 60, "the slot to go")
        execute(tables, "insert into bare values (1, 'nobody ever streams this')")

        daemon.in_phase("operator")
        told = daemon.source()
        assert told["slot"]["exists"] is False
        assert f"slot {daemon.slot!r} is gone" in told["error"]
        assert "cdc teardown" in told["hint"]
        assert daemon.ask("wait", "--timeout", "5").code == 1, "it does not wait for what cannot come"
        assert daemon.alive, "it stays up to be looked at"

        assert daemon.stop() == 0
        daemon.start().in_phase("operator")
        told = daemon.source()
        assert "is gone" in told["error"], "the next start knows it too"
        assert "cdc teardown" in told["hint"]
        assert daemon.stop() == 0

        assert daemon.ask("teardown").code == 0
        daemon.start().settled().verified()
        assert daemon.source()["epoch"] == 2


@pytest.mark.slow
def test_a_slot_that_somebody_moved_ahead_is_told(tmp_path: Path, tables: str) -> None:
    with Daemon(tmp_path, tables) as daemon:
        daemon.start().settled()
        assert daemon.stop() == 0
        execute(tables, "insert into bare values (1, 'skipped by somebody')", "checkpoint",
                f"select pg_replication_slot_advance('{daemon.slot}', pg_current_wal_lsn())")  # fmt: skip
        daemon.start().in_phase("operator")
        told = daemon.source()
        assert "moved ahead by someone else" in told["error"]
        assert "cdc teardown" in told["hint"]
        assert daemon.stop() == 0

        assert daemon.ask("teardown").code == 0
        daemon.start().settled().verified()


def test_cut_frozen_and_refused_connections_cost_nothing(tmp_path: Path, tables: str, rng: random.Random) -> None:
    with Proxy(tables) as proxy, Daemon(tmp_path, proxy.dsn) as daemon:
        with watched(daemon, tables, rng.randrange(1 << 30)):
            for _ in range(2):
                before = walsender(tables, daemon.slot)
                proxy.cut()
                wait_until(lambda before=before: walsender(tables, daemon.slot) not in (0, before), 60)

            before = walsender(tables, daemon.slot)
            proxy.freeze()
            with psycopg.connect(tables, autocommit=True) as connection:
                position = connection.execute("select pg_current_wal_lsn()").fetchone()
                assert position
                # Work goes on at the server while nothing passes.
                more = "select pg_current_wal_lsn() - %s > 200000"
                wait_until(lambda: connection.execute(more, [position[0]]).fetchone() == (True,), 60)
            proxy.thaw()
            daemon.streaming()
            assert walsender(tables, daemon.slot) == before, "it is the same connection"

            proxy.refuse()
            daemon.in_phase("retry")
            assert daemon.source()["error"]
            proxy.refuse(False)
            daemon.streaming()


def test_a_server_that_says_nothing_any_more_is_given_up_and_asked_anew(
    tmp_path: Path, tables: str, rng: random.Random
) -> None:
    with Proxy(tables) as proxy:
        with Daemon(tmp_path, proxy.dsn, source={"receive_timeout_s": 2, "connect_timeout_s": 2}) as daemon:
            with watched(daemon, tables, rng.randrange(1 << 30)):
                proxy.freeze()
                wait_until(lambda: "silent for 2 s" in daemon.log_tail(), 60, daemon.log_tail)
                assert daemon.alive
                proxy.thaw()
                daemon.streaming()
