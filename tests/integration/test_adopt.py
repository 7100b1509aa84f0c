"""`cdc adopt`: another server is the continuation, by an operator's word and what can be checked of it.

Stands in for pg_upgrade: a second cluster with the same tables and rows, its WAL behind the first one's, and a slot of
the same name made before anybody writes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cdc.lake.anchor import Anchor
from connectors.local.store import LocalStore
from connectors.postgres.embedded import EmbeddedPostgres
from connectors.postgres.replication import parse_lsn
from tests.support.copies import scalar, upgraded
from tests.support.daemon import Daemon, execute
from tests.support.postgres import private_server
from tests.support.waiting import wait_until

pytestmark = pytest.mark.matrix

TABLES = ("create table t (id int primary key, note text)", "create table bare (n int)")


def carried_over(server: EmbeddedPostgres, slot: str, *, beyond: int) -> None:
    """What pg_upgrade does: positions go on behind the old server's, publication and slot are there."""
    while parse_lsn(str(scalar(server.dsn(), "select pg_current_wal_lsn()::text"))) <= beyond:
        execute(server.dsn(), "select pg_switch_wal()", "select txid_current()")
    execute(
        server.dsn(),
        "insert into t select g, 'old' from generate_series(1, 20) g",
        "insert into bare select generate_series(1, 5)",
        f"create publication {slot} for table t, bare with (publish_via_partition_root = true)",
        f"select pg_create_logical_replication_slot('{slot}', 'pgoutput')",
    )


@pytest.mark.parametrize("confirm_after", ["landed", pytest.param("log", marks=pytest.mark.slow)])
def test_after_an_upgrade_the_history_goes_on_once_it_is_adopted(tmp_path: Path, confirm_after: str) -> None:
    with private_server(tmp_path / "old") as old, private_server(tmp_path / "new", fresh=True) as new:
        execute(old.dsn(), *TABLES, "insert into t select g, 'old' from generate_series(1, 20) g")
        execute(old.dsn(), "insert into bare select generate_series(1, 5)")
        execute(new.dsn(), *TABLES)
        with Daemon(tmp_path / "daemon", old.dsn(), source={"confirm_after": confirm_after}) as daemon:
            daemon.start().settled()
            assert daemon.ask("adopt", "shop").code == 1, "not while the daemon runs"
            assert daemon.stop() == 0
            assert daemon.ask("adopt", "shop").document["adopted"] is False, "it is the lake's server already"

            daemon.configure("source.shop", dsn=new.dsn())
            refused = daemon.ask("adopt", "shop")
            assert (refused.code, refused.document["error"]["kind"]) == (1, "SlotLost")
            assert "no replication slot" in refused.document["error"]["message"]
            beyond = parse_lsn(str(scalar(old.dsn(), "select pg_current_wal_lsn()::text")))
            carried_over(new, daemon.slot, beyond=beyond)

            daemon.start().in_phase("operator")
            told = daemon.source()
            assert "the dsn leads to database 'postgres' of server" in told["error"]
            assert "cdc adopt shop" in told["hint"]
            assert daemon.stop() == 0
            looked = daemon.ask("adopt", "shop", "--dry-run")
            assert (looked.code, looked.document["adopted"]) == (0, False)

            done = daemon.ask("adopt", "shop")
            assert (done.code, done.document["adopted"]) == (0, True), done
            assert parse_lsn(done.document["held_lsn"]) <= beyond < parse_lsn(done.document["at_lsn"])
            assert done.document["missing"] == []
            anchor = Anchor(LocalStore(daemon.lake), "shop").load()
            assert anchor is not None
            knows_a_lost_log = anchor.may_confirm_lsn < parse_lsn(done.document["at_lsn"])
            assert knows_a_lost_log == (confirm_after == "log")
            execute(new.dsn(), "insert into t values (21, 'new')", "update t set note = 'new' where id = 3")
            daemon.start().settled().verified()
            assert daemon.source()["epoch"] == 1, "the history goes on"
            assert daemon.stop() == 0
            again = daemon.ask("adopt", "shop")
            assert (again.code, again.document["adopted"]) == (0, False), "a second time there is nothing to do"


@pytest.mark.slow
def test_a_true_pg_upgrade_is_adopted_and_the_slot_that_it_carries_over_goes_on(tmp_path: Path) -> None:
    with private_server(tmp_path / "old") as old, private_server(tmp_path / "new", fresh=True) as new:
        if old.version < 17 or not old.binary("pg_upgrade").exists():
            pytest.skip("pg_upgrade carries slots over from Postgres 17 on, and not every package has it")
        execute(old.dsn(), *TABLES, "insert into t select g, 'old' from generate_series(1, 20) g")
        execute(old.dsn(), "insert into bare select generate_series(1, 5)")
        with Daemon(tmp_path / "daemon", old.dsn()) as daemon:
            daemon.start().settled()
            execute(old.dsn(), "update t set note = 'still old' where id < 5")
            daemon.settled()
            confirmed = f"select confirmed_flush_lsn::text from pg_replication_slots where slot_name = '{daemon.slot}'"
            written = scalar(old.dsn(), "select pg_current_wal_insert_lsn()::text")
            wait_until(
                lambda: parse_lsn(str(scalar(old.dsn(), confirmed))) >= parse_lsn(str(written)),
                message="the slot to be confirmed",
            )
            assert daemon.stop() == 0
            old.stop()
            upgraded(old, new)
            new.start()
            execute(new.dsn(), "insert into t values (21, 'new')", "update t set note = 'new' where id = 3")
            daemon.configure("source.shop", dsn=new.dsn())
            daemon.start().in_phase("operator")
            assert "cdc adopt shop" in daemon.source()["hint"]
            assert daemon.stop() == 0
            done = daemon.ask("adopt", "shop")
            assert (done.code, done.document["adopted"]) == (0, True), done
            daemon.start().settled().verified()
            assert daemon.source()["epoch"] == 1, "the history goes on, and no table was read again"
            assert "snapshot run began" not in daemon.log_path.read_text().rpartition("--- start")[2]


def test_a_server_whose_positions_lie_below_what_we_hold_is_no_continuation(tmp_path: Path) -> None:
    with private_server(tmp_path / "old") as old, private_server(tmp_path / "new", fresh=True) as new:
        execute(new.dsn(), *TABLES)
        carried_over(new, "cdc_postgres", beyond=0)
        execute(old.dsn(), *TABLES, *["select pg_switch_wal(), txid_current()"] * 4)
        with Daemon(tmp_path / "daemon", old.dsn()) as daemon:
            daemon.start().settled()
            assert daemon.stop() == 0
            daemon.configure("source.shop", dsn=new.dsn())
            refused = daemon.ask("adopt", "shop")
            assert refused.code == 1
            assert "it is no continuation" in refused.document["error"]["message"]
            assert "cdc teardown shop" in refused.document["error"]["hint"]
