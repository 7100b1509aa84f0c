"""A source that is compared periodically, story by story: rights, schedules, commands, strategies, histories."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.support.copies import caught_up, standby_of
from tests.support.daemon import Daemon, execute
from tests.support.periodic import periodic
from tests.support.postgres import private_server
from tests.support.waiting import wait_until
from tests.support.witness import changelog

ORDERS = (
    "create table orders (id int primary key, note text, updated_at timestamptz default now())",
    "create index on orders (updated_at)",
    "insert into orders select g, 'note ' || g from generate_series(1, 50) g",
)
CURSOR = {"strategy": "cursor", "cursor": "updated_at", "cursor_lag_s": 0}


def history(daemon: Daemon) -> list[dict[str, Any]]:
    """Runs of the source, newest first."""
    found: list[dict[str, Any]] = daemon.source()["runs"]["history"]
    return found


def changes(daemon: Daemon, table: str) -> list[tuple[str, Any]]:
    """Operation and id of what the changelog has of a table beside snapshots, in order."""
    rows = changelog(daemon.lake, f"public.{table}", columns=("_op", "_epoch", "_lsn", "_seq", "id")).to_pylist()
    return [(r["_op"], r["id"]) for r in rows if r["_op"] in "cud"]


def rows_of(daemon: Daemon, what: str) -> list[list[Any]]:
    rows: list[list[Any]] = daemon.ask("query", what).document["rows"]
    return rows


# ---- rights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """DSNs of a server without logical decoding: of its owner, and of a role that may read its tables."""
    settings = {"wal_level": "replica", "max_replication_slots": 0, "max_wal_senders": 0}
    with private_server(tmp_path / "server", **settings) as server:
        owner = server.dsn()
        execute(owner, *ORDERS, "create table secret (id int primary key)", "create role reader login",
                "grant usage on schema public to reader", "grant select on orders to reader")  # fmt: skip
        yield owner, make_conninfo(owner, user="reader")


@pytest.mark.matrix
def test_a_role_that_may_only_select_and_a_server_without_slots(bare: tuple[str, str], tmp_path: Path) -> None:
    owner, reader = bare
    daemon = periodic(tmp_path, reader, {"tables": ["public.orders"]})
    findings = daemon.ask("check").document["findings"]
    assert [f for f in findings if f["severity"] == "error"] == []
    assert daemon.ask("setup").document["sources"] == {"shop": []}
    with daemon:
        daemon.start().settled().verified()
        execute(owner, "update orders set note = 'new' where id = 1", "delete from orders where id = 2",
                "insert into orders values (99, 'more')")  # fmt: skip
        assert daemon.ask("wait").code == 0
        assert changes(daemon, "orders") == [("d", 2), ("u", 1), ("c", 99)]
        daemon.verified()
        assert daemon.ask("resync", "orders", "--wait").code == 0
        source = daemon.source()
        assert (source["slot"], source["error"]) == (None, "")
        assert source["runs"]["schedule"] == "every 300d"
        assert {run["outcome"] for run in source["runs"]["history"]} == {"done"}
        assert daemon.stop() == 0
    with psycopg.connect(owner) as connection:
        assert connection.execute("select count(*) from pg_publication").fetchone() == (0,)
    assert daemon.ask("teardown").code == 0
    # The history was given up; what the lake holds is compared with all the same.
    with daemon:
        daemon.start().settled().verified()
        assert daemon.source()["epoch"] == 2
        assert changes(daemon, "orders") == [("d", 2), ("u", 1), ("c", 99)]


@pytest.mark.slow
def test_a_table_that_may_not_be_read_stops_alone_and_check_names_the_grant(
    bare: tuple[str, str], tmp_path: Path
) -> None:
    owner, reader = bare
    daemon = periodic(tmp_path, reader)
    errors = [f for f in daemon.ask("check").document["findings"] if f["severity"] == "error"]
    assert [f["name"] for f in errors] == ["select privilege"]
    assert 'grant select on "public"."secret" to "reader"' in errors[0]["fix"]
    with daemon:
        daemon.start().streaming()
        wait_until(lambda: len(daemon.tables()) == 2)
        secret = daemon.tables()["public.secret"]
        assert (secret["state"], "may not read" in secret["reason"]) == ("stopped", True)
        execute(owner, "grant select on secret to reader", "insert into secret values (7)")
        assert daemon.ask("resync", "secret", "--wait").code == 0
        daemon.settled().verified()
        assert rows_of(daemon, "select id from shop.secret") == [[7]]


def test_check_says_what_a_cursor_lacks(database: str, tmp_path: Path) -> None:
    execute(
        database,
        *ORDERS,
        "create table plain (id int primary key)",
        "create table unindexed (id int primary key, updated_at timestamptz not null)",
        "create table texts (id int primary key, updated_at text)",
    )
    findings = periodic(tmp_path, database, CURSOR).ask("check").document["findings"]
    found = {(f["name"], f["object"].rpartition(" ")[2]) for f in findings if f["severity"] in ("info", "warning")}
    assert {n for n in found if n[0].startswith("cursor")} == {
        ("cursor nulls", "public.orders"),
        ("cursor", "public.plain"),
        ("cursor index", "public.unindexed"),
        ("cursor", "public.texts"),
    }


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_once_does_one_run_and_ends(database: str, tmp_path: Path) -> None:
    execute(database, *ORDERS)
    with periodic(tmp_path, database) as daemon:
        assert daemon.start(once=True).ended(60) == 0
        execute(database, "delete from orders where id = 5")
        assert daemon.start(once=True).ended(60) == 0
        assert [run["outcome"] for run in history(daemon)] == ["done", "done"]
        assert rows_of(daemon, "select count(*) from shop.orders") == [[49]]


@pytest.mark.slow
def test_runs_come_by_themselves_and_a_daemon_that_was_down_does_the_missed_ones_once(
    database: str, tmp_path: Path
) -> None:
    execute(database, *ORDERS)
    with periodic(tmp_path, database, {"every": "1s"}) as daemon:
        daemon.start()
        wait_until(lambda: len(history(daemon)) >= 3)
        execute(database, "delete from orders where id = 5")
        wait_until(lambda: rows_of(daemon, "select count(*) from shop.orders") == [[49]])
        daemon.stop()
        daemon.configure("source.shop", every="1h")
        runs = len(history(daemon))
        daemon.start().streaming()
        wait_until(lambda: daemon.source()["runs"]["next_at"])
        assert len(history(daemon)) == runs, "the last one began less than an hour ago"


@pytest.mark.slow
def test_a_pause_holds_runs_back_and_a_paused_table_takes_no_part(database: str, tmp_path: Path) -> None:
    execute(database, *ORDERS, "create table other (id int primary key)")
    with periodic(tmp_path, database) as daemon:
        daemon.start().settled()
        assert daemon.ask("pause", "orders").code == 0
        execute(database, "insert into other values (1)", "insert into orders values (100)")
        assert daemon.ask("wait").code == 0
        assert rows_of(daemon, "select count(*) from shop.orders") == [[50]]
        assert rows_of(daemon, "select count(*) from shop.other") == [[1]]
        assert daemon.ask("resume", "orders").code == 0
        daemon.settled().verified()
        assert daemon.ask("pause", "shop").code == 0
        daemon.in_phase("paused")
        assert daemon.ask("wait", "--timeout", "1").code == 4
        assert daemon.ask("resume", "shop").code == 0
        daemon.settled()


@pytest.mark.slow
def test_all_tables_of_a_run_stand_at_one_position_and_are_of_one_moment(database: str, tmp_path: Path) -> None:
    execute(database, "create table a (id int primary key)", "create table b (id int primary key)")
    with periodic(tmp_path, database) as daemon:
        daemon.start().settled()
        with psycopg.connect(database) as connection:
            connection.execute("insert into a select generate_series(1, 100)")
            connection.execute("insert into b select generate_series(1, 100)")
        daemon.settled()
        places = [
            set(
                changelog(daemon.lake, f"public.{t}", columns=("_op", "_epoch", "_lsn", "_seq"))["_lsn"].to_pylist()[
                    -100:
                ]
            )
            for t in ("a", "b")
        ]
        assert len(places[0]) == 1
        assert places[0] == places[1]


@pytest.mark.slow
def test_a_wrong_server_is_refused(database: str, tmp_path: Path) -> None:
    execute(database, *ORDERS)
    with periodic(tmp_path / "one", database) as daemon:
        daemon.start().settled()
        assert daemon.stop() == 0
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("create database elsewhere")
        try:
            other = make_conninfo(database, dbname="elsewhere")
            execute(other, ORDERS[0])
            daemon.configure("source.shop", dsn=other)
            daemon.start().in_phase("operator")
            assert "the dsn leads to database 'elsewhere'" in daemon.source()["error"]
            assert rows_of(daemon, "select count(*) from shop.orders") == [[50]]
        finally:
            daemon.kill()
            with psycopg.connect(database, autocommit=True) as connection:
                connection.execute("drop database elsewhere with (force)")


@pytest.mark.slow
def test_a_lost_disk_costs_a_comparison_and_nothing_else(database: str, tmp_path: Path) -> None:
    execute(database, *ORDERS)
    with periodic(tmp_path, database) as daemon:
        daemon.start().settled()
        daemon.kill()
        shutil.rmtree(daemon.state_dir)
        execute(database, "update orders set note = 'x' where id = 3")
        daemon.start().settled().verified()
        assert changes(daemon, "orders") == [("u", 3)]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["land.after_cut", "land.between_tables", "land.after_commit"])
def test_what_landed_before_the_disk_was_lost_is_not_found_again(database: str, tmp_path: Path, place: str) -> None:
    execute(database, *ORDERS, "create table loose (id int)", "insert into loose values (1), (1), (2)")
    with periodic(tmp_path, database) as daemon:
        daemon.start().settled()
        assert daemon.stop() == 0
        execute(database, "update orders set note = 'x' where id = 3", "delete from orders where id = 4",
                "insert into loose values (1)", "delete from loose where id = 2")  # fmt: skip
        daemon.start(failpoints=f"{place}=kill").streaming()
        daemon.begin("wait", "--timeout", "30")
        assert daemon.ended() == -9
        shutil.rmtree(daemon.state_dir)
        daemon.start().settled().verified()
        assert sorted(changes(daemon, "orders")) == [("d", 4), ("u", 3)]
        assert sorted(changes(daemon, "loose")) == [("c", 1), ("d", 2)]


@pytest.mark.slow
def test_a_restored_server_begins_a_new_epoch_and_only_what_differs_changes(tmp_path: Path) -> None:
    with private_server(tmp_path / "server", fresh=True) as server:
        execute(server.dsn(), *ORDERS)
        server.stop()
        shutil.copytree(server.data, tmp_path / "copy", symlinks=True)
        server.start()
        with periodic(tmp_path / "cdc", server.dsn()) as daemon:
            noise = "select repeat(md5(g::text), 20) t from generate_series(1, 60000) g"
            execute(
                server.dsn(), f"create table noise as {noise}", "drop table noise", "delete from orders where id > 40"
            )
            daemon.start().settled()
            server.stop()
            shutil.rmtree(server.data)
            shutil.copytree(tmp_path / "copy", server.data, symlinks=True)
            server.start()
            daemon.settled().verified()
            assert daemon.source()["epoch"] == 2
            assert changes(daemon, "orders") == [("c", n) for n in range(41, 51)]


# ---- by cursor -------------------------------------------------------------------------------------------------------


def read_of_last(daemon: Daemon) -> int:
    count: int = history(daemon)[0]["counts"]["read"]
    return count


@pytest.mark.slow
def test_a_cursor_reads_what_is_new_and_finds_ties_nulls_and_late_commits(database: str, tmp_path: Path) -> None:
    execute(database, *ORDERS)
    with periodic(tmp_path, database, CURSOR) as daemon, psycopg.connect(database) as late:
        daemon.start()
        for _ in range(4):  # what was open at the first runs has ended, and the marks have moved past the first rows
            daemon.settled()
            execute(database, "update orders set note = note || '.', updated_at = now() where id = 50")
        assert read_of_last(daemon) < 10
        late.execute("select 1")  # takes its time, and writes nothing yet
        for n in range(4):
            execute(database, f"insert into orders values ({100 + n}, 'tie', '2020-01-01'), ({200 + n}, null, null)",
                    f"update orders set updated_at = now() where id = {n + 1}")  # fmt: skip
            daemon.settled()
        assert rows_of(daemon, "select count(*) from shop.orders where id >= 200") == [[4]]
        assert rows_of(daemon, "select count(*) from shop.orders where id between 100 and 199") == [[0]], "too old"
        late.execute("insert into orders values (300, 'late')")
        daemon.settled()
        execute(database, "insert into orders values (301, 'after')")
        late.commit()
        daemon.settled()
        assert rows_of(daemon, "select id from shop.orders where id >= 300 order by 1") == [[300], [301]]
        execute(database, "delete from orders where id = 301")
        daemon.settled()
        assert rows_of(daemon, "select count(*) from shop.orders where id = 301") == [[1]], "deletes are not seen"
        assert daemon.ask("resync", "orders", "--wait").code == 0
        daemon.verified()
        assert changes(daemon, "orders").count(("u", 49)) == 0, "read again is not changed"


@pytest.mark.slow
def test_a_full_comparison_comes_when_it_is_due(database: str, tmp_path: Path) -> None:
    execute(database, *ORDERS)
    with periodic(tmp_path, database, {**CURSOR, "full_every": "1s"}) as daemon:
        daemon.start().settled()
        execute(database, "delete from orders where id = 7")
        wait_until(
            lambda: daemon.ask("wait").code == 0 and rows_of(daemon, "select count(*) from shop.orders") == [[49]]
        )


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_table_that_cannot_be_read_stops_alone_and_the_run_goes_on(database: str, tmp_path: Path) -> None:
    with psycopg.connect(database) as connection:
        if connection.info.server_version < 180000:
            pytest.skip("has no virtual columns, which fail when they are read")
    execute(
        database,
        "create table a_bad (id int primary key, v int generated always as (1 / (id - 300000)) virtual)",
        "insert into a_bad select generate_series(1, 300000)",
        *ORDERS,
    )
    with periodic(tmp_path, database) as daemon:
        daemon.start().streaming()
        wait_until(lambda: daemon.tables().get("public.a_bad", {}).get("state") == "stopped", 60, daemon.log_tail)
        assert "division by zero" in daemon.tables()["public.a_bad"]["reason"]
        wait_until(lambda: daemon.tables()["public.orders"]["rows"] == 50, 60, daemon.log_tail)
        execute(database, "delete from a_bad where id = 300000")
        assert daemon.ask("resync", "a_bad", "--wait").code == 0
        daemon.settled().verified()


@pytest.mark.slow
def test_partitions_inheritance_and_tables_without_columns(database: str, tmp_path: Path) -> None:
    execute(
        database,
        "create table parted (id int, at date, note text, primary key (id, at)) partition by range (at)",
        "create table parted_1 partition of parted for values from ('2020-01-01') to ('2021-01-01')",
        "create table parted_2 partition of parted for values from ('2021-01-01') to ('2022-01-01')",
        "insert into parted select g, date '2020-01-01' + g * 7, 'p' from generate_series(1, 90) g",
        "create table parent (id int primary key)",
        "create table child (extra text) inherits (parent)",
        "insert into parent values (1)",
        "insert into child values (1, 'same number'), (2, 'other')",
        "create table bare ()",
        "insert into bare default values",
        "insert into bare default values",
    )
    with periodic(tmp_path, database) as daemon:
        daemon.start().settled().verified()
        assert sorted(daemon.tables()) == ["public.bare", "public.child", "public.parent", "public.parted"]
        execute(
            database,
            "update parted set at = at + 365 where id < 5",
            "delete from parted where id = 60",
            "delete from child where id = 1",
            "insert into bare default values",
            "alter table parted detach partition parted_2",
        )
        daemon.settled().verified()
        assert rows_of(daemon, "select count(*) from shop.bare") == [[3]]


@pytest.mark.slow
def test_a_contract_holds_for_runs_too(database: str, tmp_path: Path) -> None:
    execute(database, "create table cold (id int primary key, a int)", "create table strict (id int primary key)",
            "insert into cold values (1, 1), (2, 2)", "insert into strict values (1)")  # fmt: skip
    more = (
        '[source.shop.table."public.cold"]\non_schema_change = "freeze"\n'
        '[source.shop.table."public.strict"]\non_schema_change = "stop"\n'
    )
    with periodic(tmp_path, database, more=more) as daemon:
        daemon.start().settled()
        execute(database, "alter table cold add column b int default 7", "alter table cold rename column a to renamed",
                "update cold set renamed = 20 where id = 2", "insert into cold values (3, 3, 3)",
                "alter table strict add column more text")  # fmt: skip
        assert daemon.ask("wait").code == 3
        assert rows_of(daemon, "select * exclude (_epoch, _lsn, _seq, _committed_at, _origin, _raw)"
                               " from shop.cold order by id") == [[1, 1], [2, 20], [3, 3]]  # fmt: skip
        assert changes(daemon, "cold") == [("u", 2), ("c", 3)]
        assert daemon.tables()["public.strict"]["state"] == "stopped"
        execute(database, "insert into strict values (2, 'x')")
        assert daemon.ask("resync", "strict", "--wait").code == 0
        daemon.settled().verified("strict")


@pytest.mark.slow
def test_what_was_a_stream_goes_on_as_runs_and_back(database: str, tmp_path: Path) -> None:
    execute(database, *ORDERS, "create table loose (v int)", "insert into loose values (1), (1)")
    keys = {"slot": None, "publication": None, "tables": ["public.*"]}
    with Daemon(tmp_path, database, source=keys) as daemon:
        daemon.slot = "cdc_shop"
        daemon.start().settled()
        assert daemon.stop() == 0
        daemon.configure("source.shop", mode="snapshot", every="1h")
        daemon.start().in_phase("operator")
        assert "was filled by a stream" in daemon.source()["error"]
        assert daemon.stop() == 0
        daemon.configure("source.shop", mode="stream", every=None)
        assert daemon.ask("teardown", "--yes").code == 0
        execute(database, "delete from orders where id = 9", "insert into loose values (2)")
        daemon.configure("source.shop", mode="snapshot", every="1h")
        daemon.start().settled().verified()
        assert changes(daemon, "orders") == [("d", 9)]
        execute(database, "delete from loose where v = 2")
        daemon.settled().verified()
        assert daemon.stop() == 0
        assert daemon.ask("teardown").code == 0
        daemon.configure("source.shop", mode="stream", every=None)
        execute(database, "delete from orders where id = 10")
        daemon.start().settled().verified()
        assert daemon.source()["epoch"] == 3
        assert daemon.stop() == 0
        assert daemon.ask("teardown", "--yes").code == 0


@pytest.mark.slow
def test_a_standby_is_read_like_a_primary(tmp_path: Path) -> None:
    with (
        private_server(tmp_path / "primary", fresh=True) as primary,
        standby_of(primary, tmp_path / "standby", name="standby_1") as standby,
    ):
        execute(primary.dsn(), *ORDERS)
        caught_up(primary, standby)
        with periodic(tmp_path / "cdc", standby.dsn()) as daemon:
            assert [f for f in daemon.ask("check").document["findings"] if f["severity"] == "error"] == []
            daemon.start().settled().verified()
            execute(primary.dsn(), "delete from orders where id = 1", "update orders set note = 'x' where id = 2")
            caught_up(primary, standby)
            daemon.settled().verified()
            assert changes(daemon, "orders") == [("d", 1), ("u", 2)]
