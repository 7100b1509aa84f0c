"""A source's history breaks off while the daemon runs or is down, and a new one begins by policy.

The daemon is killed at every step of that; whatever it dies at, the next start does the rest: one new epoch, every
table snapshotted anew, nothing of the time without a slot missing.
"""

from __future__ import annotations

import signal
from pathlib import Path

import psycopg
import pytest

from tests.fault.test_kill import HISTORY
from tests.support.copies import scalar
from tests.support.daemon import Daemon, execute
from tests.support.postgres import private_server
from tests.support.waiting import wait_until
from tests.support.witness import SYSTEM, changelog


@pytest.fixture
def tables(database: str) -> str:
    execute(
        database,
        "create table kept (id int primary key, n int)",
        "insert into kept select g, 0 from generate_series(1, 300) g",
        "create table bare (n int)",
        "insert into bare select g from generate_series(1, 50) g",
    )
    return database


def drop_slot(dsn: str, slot: str, *, make_anew: bool = False) -> None:
    """Take the slot away, from whoever reads it; with `make_anew` put another one of its name in its place."""
    with psycopg.connect(dsn, autocommit=True) as connection:

        def dropped() -> bool:
            connection.execute(
                "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = %s and active",
                [slot],
            )
            try:
                connection.execute("select pg_drop_replication_slot(%s)", [slot])
            except psycopg.errors.ObjectInUse:
                return False
            connection.execute("insert into kept values (1000, 1), (1001, 1)")
            connection.execute("delete from kept where id in (1, 1000)")
            connection.execute("insert into bare values (1000)")
            if make_anew:
                connection.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])
            return True

        wait_until(dropped, message="the slot to go")


def positions(daemon: Daemon, table: str) -> list[tuple[int, int, int]]:
    rows = changelog(daemon.lake, table, columns=SYSTEM)
    return list(zip(*(rows.column(c).to_pylist() for c in ("_epoch", "_lsn", "_seq")), strict=True))


def test_a_new_history_is_begun_once_however_often_we_die_in_it(tmp_path: Path, tables: str) -> None:
    with Daemon(tmp_path, tables, source={"on_slot_lost": "resync"}) as daemon:
        daemon.start().settled()
        assert daemon.stop() == 0
        drop_slot(tables, daemon.slot, make_anew=True)
        for point in HISTORY:
            assert daemon.start(failpoints=f"{point}=kill").ended(60) == -signal.SIGKILL, point
        execute(tables, "update kept set n = 2 where id = 7")
        daemon.start().settled().verified()
        told = daemon.source()
        assert told["epoch"] == 2, "each of them did what was left to do"
        assert "dropped and made anew" in told["epoch_why"]
        for table in ("public.kept", "public.bare"):
            seen = positions(daemon, table)
            assert len(seen) == len(set(seen)), f"{table}: nothing is there twice"
            assert {epoch for epoch, _, _ in seen} == {1, 2}


@pytest.mark.parametrize("confirm_after", ["landed", "log"])
def test_a_slot_that_is_made_anew_under_the_running_daemon_is_noticed_and_mended(
    tmp_path: Path, tables: str, confirm_after: str
) -> None:
    with Daemon(tmp_path, tables, source={"on_slot_lost": "resync", "confirm_after": confirm_after}) as daemon:
        daemon.start().settled()
        pid = daemon.pid
        drop_slot(tables, daemon.slot, make_anew=True)
        wait_until(lambda: daemon.source()["epoch"] == 2, message=daemon.log_tail)
        daemon.settled().verified()
        assert (daemon.alive, daemon.pid) == (True, pid), "it is the same process"
        assert all(t["state"] == "streaming" for t in daemon.tables().values())


@pytest.mark.slow
def test_a_slot_that_is_made_anew_while_snapshots_are_read_mixes_no_history_into_another(
    tmp_path: Path, tables: str
) -> None:
    execute(tables, "insert into bare select g from generate_series(1, 3000) g")
    execute(tables, "insert into kept select g, 0 from generate_series(2000, 5000) g")
    with Daemon(tmp_path, tables, source={"on_slot_lost": "resync", "chunk_rows": 100}) as daemon:
        daemon.start().settled()
        for epoch in (2, 3):
            for table in ("kept", "bare"):
                assert daemon.ask("resync", table).code == 0
            wait_until(
                lambda: any((t["snapshot"] or {}).get("chunks", 0) > 2 for t in daemon.tables().values()),
                message="a snapshot to be under way",
            )
            drop_slot(tables, daemon.slot, make_anew=True)
            execute(tables, "delete from kept where id = 1001", f"update kept set n = {epoch} where id % 7 = 0")
            wait_until(lambda epoch=epoch: daemon.source()["epoch"] == epoch, message=daemon.log_tail)
            daemon.settled().verified()


@pytest.mark.slow
def test_a_slot_that_is_invalidated_under_the_running_daemon_is_told_and_mended(tmp_path: Path) -> None:
    with private_server(
        tmp_path / "postgres", max_slot_wal_keep_size="1MB", min_wal_size="32MB", max_wal_size="32MB"
    ) as server:
        dsn = server.dsn()
        execute(dsn, "create table kept (id int primary key, n int)")
        with Daemon(tmp_path / "daemon", dsn) as daemon:
            daemon.start().settled()
            daemon.signal(signal.SIGSTOP)

            def invalidated() -> bool:
                execute(dsn, "insert into kept select coalesce(max(id), 0) + 1 from kept", "select pg_switch_wal()",
                        "checkpoint")  # fmt: skip
                return scalar(dsn, "select wal_status from pg_replication_slots") == "lost"

            wait_until(invalidated, message="the slot to be invalidated")
            daemon.signal(signal.SIGCONT)
            daemon.in_phase("operator")
            told = daemon.source()
            assert "(invalidated: wal_removed)" in told["error"]
            assert "raise max_slot_wal_keep_size" in told["hint"]
            assert "server has removed WAL" in told["slot"]["fault"]
            assert daemon.http("/health")[0] == 503
            assert daemon.stop() == 0
            daemon.configure("source.shop", on_slot_lost="resync")
            daemon.start().settled().verified()
            assert daemon.source()["epoch"] == 2
