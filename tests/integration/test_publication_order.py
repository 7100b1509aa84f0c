"""Publications that come late: after the slot, or to a table with a backlog. Decoding goes by the catalog of then."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until
from tests.support.witness import changelog

pytestmark = pytest.mark.matrix


def test_a_slot_older_than_its_publication_says_so_and_teardown_recovers(database: str, tmp_path: Path) -> None:
    with Daemon(tmp_path, database) as daemon:
        execute(
            database,
            "create table t (id int primary key)",
            "insert into t values (1)",
            f"select pg_create_logical_replication_slot('{daemon.slot}', 'pgoutput')",
            "insert into t values (2)",
            f"create publication {daemon.slot} for table t",
            "insert into t values (3)",
        )
        with psycopg.connect(database) as connection:
            version = connection.info.server_version
        daemon.start()
        if version < 180000:
            daemon.in_phase("operator")
            told = wait_until(lambda: (s := daemon.source())["error"] and s, message="the error")
            assert f'publication "{daemon.slot}" does not exist' in told["error"]
            assert "cdc teardown" in told["hint"]
            daemon.stop()
            assert daemon.cdc("teardown").code == 0
            execute(database, f"drop publication if exists {daemon.slot}", "insert into t values (4)")
            daemon.start()
        # From 18 on such a publication is passed over in decoding: the first snapshot has what it left out.
        daemon.settled().verified()
        execute(database, "update t set id = 20 where id = 2", "insert into t values (5)")
        daemon.settled().verified()


def test_a_table_added_with_a_backlog_has_its_changes_from_then_on_and_is_exact(database: str, tmp_path: Path) -> None:
    execute(
        database, "create table t (id int primary key)", "create table late (id int primary key, n int)",
        "insert into late select g, g from generate_series(1, 100) g",
    )  # fmt: skip
    with Daemon(tmp_path, database) as daemon:
        execute(database, f"create publication {daemon.slot} for table t")
        daemon.start().settled()
        daemon.kill()
        with psycopg.connect(database) as writer:
            # Begun before the table is published, and committed after.
            writer.execute("insert into late values (1000, 0)")
            execute(
                database,
                "update late set n = -1 where id <= 10",
                f"alter publication {daemon.slot} add table late",
                "update late set n = -2 where id between 5 and 15",
                "delete from late where id > 90",
            )
            writer.execute("insert into late values (1001, 0)")
        execute(database, "insert into late values (2000, 0)")
        daemon.start()
        wait_until(lambda: daemon.tables().get("public.late", {}).get("state") == "streaming", message="the table")
        daemon.settled().verified()
        changes = [(r["_op"], r["id"]) for r in changelog(daemon.lake, "public.late").to_pylist() if r["_op"] in "cud"]
        assert changes.count(("u", 10)) == 1, "what was written before is not in the stream: the snapshot has it"
        assert ("c", 2000) in changes
        assert sum(op == "d" for op, _ in changes) == 10
