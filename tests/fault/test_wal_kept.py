"""What a slot costs its server: a quiet database keeps no WAL of a busy server, and a lake that is away is bridged."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from cdc.lake.anchor import Anchor
from connectors.local.store import LocalStore
from connectors.postgres.embedded import EmbeddedPostgres
from tests.support.daemon import SOURCE, Daemon, execute
from tests.support.postgres import create_database, private_server
from tests.support.waiting import wait_until

SEGMENT = 16 << 20


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A server of its own: how far its WAL has got is what is tested."""
    with private_server(
        tmp_path_factory.mktemp("busy"), max_slot_wal_keep_size="1GB", wal_writer_delay="10s"
    ) as server:
        create_database(server, "busy")
        execute(server.dsn("busy"), "create table noise (n int)")
        yield server


def fill(dsn: str, segments: int) -> None:
    """So much WAL, of transactions of this database; a checkpoint lets slots move on."""
    for n in range(segments):
        execute(dsn, f"insert into noise values ({n})", "select pg_switch_wal()")
    execute(dsn, "checkpoint")


def retained(daemon: Daemon) -> int:
    with psycopg.connect(daemon.dsn) as connection:
        row = connection.execute(
            "select (pg_current_wal_lsn() - restart_lsn)::int8 from pg_replication_slots where slot_name = %s",
            [daemon.slot],
        ).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.matrix
def test_a_quiet_database_keeps_no_wal_of_a_busy_server_nor_of_tables_that_nobody_captures(
    tmp_path: Path, busy: EmbeddedPostgres
) -> None:
    quiet = create_database(busy, "quiet")
    execute(quiet, "create table orders (id int primary key)", "create table noise (n int)")
    with Daemon(tmp_path, quiet, source={"tables": ["public.orders"], "heartbeat_every_s": 0.2}) as daemon:
        daemon.start().settled()
        for place in (busy.dsn("busy"), quiet):
            fill(place, 8)
            assert retained(daemon) > 0

            def let_go(place: str = place) -> bool:
                # A slot's WAL is let go in steps, at the server's own snapshots of who is running.
                execute(place, "insert into noise values (0)", "checkpoint")
                return retained(daemon) <= SEGMENT

            wait_until(let_go, message=lambda: f"{retained(daemon)} bytes are kept\n{daemon.log_tail()}")
        execute(quiet, "insert into orders values (1)")
        daemon.settled().verified()
        assert daemon.stop() == 0
    daemon.ask("teardown")


def test_wait_waits_for_commits_that_were_not_flushed(tmp_path: Path, busy: EmbeddedPostgres) -> None:
    """With synchronous_commit = off a commit reaches the stream when its WAL is flushed: here, in ten seconds."""
    dsn = create_database(busy, "asynchronous")
    execute(dsn, "create table orders (id int primary key)")
    with Daemon(tmp_path, dsn) as daemon:
        daemon.start().settled()
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("set synchronous_commit = off")
            for n in range(20):
                connection.execute("insert into orders values (%s)", [n])
        assert daemon.ask("wait", "--timeout", "60").code == 0
        assert daemon.ask("query", "select count(*) from shop.orders").document["rows"] == [[20]]
        daemon.verified()
        assert daemon.stop() == 0
    daemon.ask("teardown")


@pytest.mark.slow
@pytest.mark.parametrize("paused", [False, True])
def test_a_slot_that_is_let_go_frees_its_wal_and_begins_a_new_history(
    tmp_path: Path, busy: EmbeddedPostgres, paused: bool
) -> None:
    dsn = create_database(busy, f"dropped_{paused}".lower())
    execute(dsn, "create table noise (n int primary key)", "create table orders (id int primary key)")
    source = {"heartbeat_every_s": 0.2, "wal_warn_at": [], "wal_confirm_at": [], "wal_drop_at": ["64MB"]}
    with Daemon(tmp_path, dsn, source=source, lake={"land_every_s": 3600}) as daemon:
        daemon.start().settled()
        if paused:
            daemon.ask("pause")
            daemon.in_phase("paused")
        fill(dsn, 8)
        wait_until(lambda: daemon.source()["epoch"] == 2, message=lambda: f"{daemon.source()}\n{daemon.log_tail()}")
        assert "wal_drop_at" in daemon.source()["epoch_why"]
        assert retained(daemon) <= SEGMENT
        daemon.ask("resume")
        execute(dsn, "insert into orders values (1)")
        daemon.settled().verified()
        assert daemon.source()["guard"]["stage"] is None
        assert daemon.stop() == 0
    daemon.ask("teardown")


def anchor_mode(daemon: Daemon) -> str:
    state = Anchor(LocalStore(daemon.lake), SOURCE).load()
    assert state is not None
    return state.mode


@pytest.mark.slow
def test_a_lake_that_is_behind_is_bridged_and_a_disk_lost_meanwhile_is_said(
    tmp_path: Path, busy: EmbeddedPostgres
) -> None:
    dsn = create_database(busy, "bridged")
    execute(dsn, "create table noise (n int primary key)")
    numbers = itertools.count()

    def write(segments: int) -> None:
        for _ in range(segments):
            execute(dsn, f"insert into noise values ({next(numbers)})", "select pg_switch_wal()")
        execute(dsn, "checkpoint")

    def stage() -> str | None:
        return daemon.source()["guard"]["stage"]

    def let_go() -> bool:
        write(1)
        return retained(daemon) <= 2 * SEGMENT

    source = {"heartbeat_every_s": 0.2, "wal_warn_at": ["32MB"], "wal_confirm_at": ["64MB"], "wal_pause_at": []}
    with Daemon(tmp_path, dsn, source=source, lake={"land_every_s": 3600}) as daemon:
        daemon.start().settled()
        assert (stage(), anchor_mode(daemon)) == (None, "landed")
        write(8)
        wait_until(lambda: stage() == "confirm", message=lambda: f"{daemon.source()}\n{daemon.log_tail()}")
        assert anchor_mode(daemon) == "log", "before the first position was confirmed that had not landed"
        assert "losing state_dir now costs a resync" in daemon.source()["guard"]["note"]
        wait_until(let_go, message=lambda: f"{retained(daemon)} bytes are kept\n{daemon.log_tail()}")
        assert stage() == "confirm", "the lake is as far behind as before"

        daemon.settled().verified()
        wait_until(lambda: stage() is None, message="the guard to be calm again")
        wait_until(lambda: daemon.settled() and anchor_mode(daemon) == "landed", message="everything has landed")

        write(8)
        wait_until(lambda: stage() == "confirm", message=daemon.log_tail)
        wait_until(let_go, message=lambda: f"{retained(daemon)} bytes are kept\n{daemon.log_tail()}")
        daemon.kill()
        daemon.start().settled().verified()
        write(8)
        wait_until(lambda: stage() == "confirm", message=daemon.log_tail)
        wait_until(let_go, message=lambda: f"{retained(daemon)} bytes are kept\n{daemon.log_tail()}")
        daemon.kill()
        shutil.rmtree(daemon.state_dir)
        daemon.start().in_phase("operator")
        assert "the event log is gone" in daemon.source()["error"]
        assert daemon.stop() == 0
    daemon.ask("teardown")
