"""Making a slot waits for every transaction that has written: bounded, by name, and without leaving anything behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from cdc.config import SourceConfig
from cdc.errors import SourceUnavailable
from connectors.postgres.source import PostgresKind
from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until


@contextmanager
def open_transaction(dsn: str) -> Iterator[int]:
    """A session that has written and not ended; its process id."""
    with psycopg.connect(dsn, application_name="somebody") as connection:
        connection.execute("insert into notes values (1)")
        yield connection.info.backend_pid
        connection.rollback()


def left_behind(dsn: str, slot: str) -> tuple[int, int]:
    """Slots of that name, and sessions of ours."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(
            "select (select count(*) from pg_replication_slots where slot_name = %s),"
            " (select count(*) from pg_stat_activity where application_name like 'cdc%%' and datname = %s)",
            [slot, conninfo_to_dict(dsn)["dbname"]],
        ).fetchone()
    assert row is not None
    return row[0], row[1]


@pytest.mark.matrix
def test_creation_gives_up_in_bounded_time_naming_session_or_prepared_transaction(database: str) -> None:
    execute(database, "create table notes (id int)")
    slot = "slow_" + str(conninfo_to_dict(database)["dbname"])
    config = SourceConfig(name="shop", dsn=database, slot=slot, publication=(slot,), lock_timeout_s=0.2)
    admin = PostgresKind.admin(config)
    with open_transaction(database) as pid:
        with pytest.raises(SourceUnavailable, match=rf"waits for transactions .*pid {pid} \(somebody\), open since"):
            admin.setup(dry_run=False)
        assert "tried again" in admin_hint(admin)
        wait_until(lambda: left_behind(database, slot) == (0, 0), message="no slot and no session of ours to be left")

    with psycopg.connect(database) as connection:
        connection.execute("insert into notes values (2)")
        connection.execute("prepare transaction 'forgotten one'")
    with pytest.raises(SourceUnavailable, match="prepared transaction forgotten one, open since"):
        admin.setup(dry_run=False)
    assert "forgotten one" in admin.status().oldest_writer, "status names who holds WAL back"
    wait_until(lambda: left_behind(database, slot) == (0, 0))
    execute(database, "rollback prepared 'forgotten one'")

    admin.setup(dry_run=False)
    assert left_behind(database, slot)[0] == 1
    admin.teardown(dry_run=False)


def admin_hint(admin: object) -> str:
    try:
        admin.setup(dry_run=False)  # type: ignore[attr-defined]
    except SourceUnavailable as error:
        return error.hint
    raise AssertionError("it did not wait")


@pytest.mark.slow
def test_a_command_killed_while_it_waits_leaves_no_slot_and_no_session(tmp_path: Path, database: str) -> None:
    execute(database, "create table notes (id int)")
    daemon = Daemon(tmp_path, database, source={"lock_timeout_s": 2})
    with open_transaction(database):
        process = subprocess.Popen(
            [sys.executable, "-m", "cdc", "--config", str(daemon.config_path), "setup"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: left_behind(database, daemon.slot) == (1, 1), message="the slot to be in the making")
        process.kill()
        process.wait()
        wait_until(lambda: left_behind(database, daemon.slot) == (0, 0), message="the server to let go of it")


def test_a_daemon_waits_for_a_running_transaction_and_then_starts_by_itself(tmp_path: Path, database: str) -> None:
    execute(database, "create table notes (id int primary key)")
    with Daemon(tmp_path, database, source={"lock_timeout_s": 0.2}) as daemon:
        with open_transaction(database) as pid:
            daemon.start().in_phase("retry")
            assert f"pid {pid}" in daemon.source()["error"]
        daemon.settled().verified()
        assert daemon.source()["error"] == ""
