"""What streams of partitions, filters, generated columns, truncations, origins and messages: a real server and daemon.

One daemon serves the module, on publications that were made by hand; each test works on tables of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from connectors.postgres.embedded import EmbeddedPostgres
from tests.support.daemon import Daemon, execute, in_one
from tests.support.postgres import create_database, drop_database
from tests.support.waiting import wait_until
from tests.support.witness import changelog

pytestmark = pytest.mark.matrix

TABLES = """
create table roots (id int, region text, note text, primary key (id, region)) partition by list (region)
create table roots_odd (note text, gone int, region text not null, id int not null)
alter table roots_odd drop gone
alter table roots attach partition roots_odd for values in ('odd')
create table roots_mid partition of roots for values in ('north', 'south') partition by list (region)
create table roots_north partition of roots_mid for values in ('north')
create table roots_south partition of roots_mid for values in ('south')
create table roots_rest partition of roots default
insert into roots values (1, 'odd', 'a'), (2, 'north', 'b'), (3, 'south', 'c'), (4, 'else', 'd')
create table full_root (id int primary key, n int, big text) partition by range (id)
alter table full_root alter big set storage external
alter table full_root replica identity full
create table full_one partition of full_root for values from (0) to (100)
insert into full_root select g, g, repeat(md5(g::text), 200) from generate_series(1, 4) g
create table leaves (id int primary key, note text) partition by range (id)
create table leaves_a partition of leaves for values from (0) to (10)
create table leaves_b partition of leaves for values from (10) to (20)
insert into leaves values (1, 'a'), (11, 'b')
create table parent (id int primary key, note text)
create table child (extra text, primary key (id)) inherits (parent)
insert into parent values (1, 'p')
insert into child values (2, 'c', 'x')
create table made (id int primary key, n int, doubled int generated always as (n * 2) stored)
insert into made (id, n) values (1, 1), (2, 2)
create table cut_root (id int primary key) partition by range (id)
create table cut_leaf partition of cut_root for values from (0) to (100)
create table cut_plain (id serial primary key, n int)
insert into cut_root select generate_series(1, 5)
insert into cut_plain (n) select generate_series(1, 5)
create table origins (id int primary key)
create table beside (id int)
"""
FILTERED = """
create table filtered (id int primary key, n int, secret text)
insert into filtered select g, g, 'xyzzy' || g from generate_series(1, 10) g
"""
BY_ROOT = "roots, full_root, parent, made, cut_root, cut_plain, origins, beside"


@pytest.fixture(scope="module")
def daemon(server: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    dsn = create_database(server, "publish_story")
    with psycopg.connect(dsn) as connection:
        version = connection.info.server_version
    execute(dsn, *TABLES.strip().splitlines(), *FILTERED.strip().splitlines())
    filtered = "filtered (id, n) where (id > 5)" if version >= 150000 else "filtered"
    sent = ", publish_generated_columns = stored" if version >= 180000 else ""
    execute(
        dsn,
        f"create publication by_root for table {BY_ROOT}, {filtered} with (publish_via_partition_root = true{sent})",
        "create publication by_leaf for table leaves",
    )
    source = {"publication": ["by_root", "by_leaf"], "messages": ["app.*"]}
    with Daemon(tmp_path_factory.mktemp("publish"), dsn, source=source) as running:
        yield running.start().settled()
    drop_database(server, "publish_story")


@pytest.fixture
def db(daemon: Daemon) -> Iterator[psycopg.Connection]:
    with psycopg.connect(daemon.dsn, autocommit=True) as connection:
        yield connection


def changes(daemon: Daemon, table: str) -> list[dict[str, Any]]:
    """The changes in a changelog, in order, snapshots left out; waits for what is committed."""
    assert daemon.ask("wait").code == 0
    return [r for r in changelog(daemon.lake, f"public.{table}").to_pylist() if r["_op"] in "cudt"]


def held(daemon: Daemon, sql: str) -> list[list[Any]]:
    rows: list[list[Any]] = daemon.ask("query", sql).document["rows"]
    return rows


def test_partitions_published_by_their_root_are_one_table_whatever_their_shape(daemon: Daemon) -> None:
    execute(
        daemon.dsn,
        "insert into roots values (5, 'odd', 'e'), (6, 'north', 'f'), (7, 'new', 'g')",
        "update roots set region = 'north' where id = 1",
        "update roots set region = 'odd' where id = 3",
        "update roots set note = 'changed' where id = 5",
        "delete from roots where id = 2",
        "create table roots_late partition of roots for values in ('late') partition by list (region)",
        "create table roots_late_1 partition of roots_late default",
        "insert into roots values (8, 'late', 'h')",
    )
    assert {t for t in daemon.tables() if "roots" in t} == {"public.roots"}
    ops = [r["_op"] for r in changes(daemon, "roots")]
    assert ops == ["c", "c", "c", "d", "c", "d", "c", "u", "d", "c"], "a row that moves leaves one and enters another"
    daemon.verified("roots")
    assert held(daemon, "select id, region, note from shop.roots order by id") == [
        [1, "north", "a"], [3, "odd", "c"], [4, "else", "d"], [5, "odd", "changed"], [6, "north", "f"],
        [7, "new", "g"], [8, "late", "h"],
    ]  # fmt: skip


def test_partitions_that_do_not_share_their_roots_full_identity_do_not_blank_what_they_do_not_send(
    daemon: Daemon,
) -> None:
    """The stream calls the old tuple of a key change whole, and it holds the partition's key alone."""
    execute(
        daemon.dsn,
        "update full_root set id = id + 10 where id = 1",
        "update full_root set n = 0 where id = 2",
        "delete from full_root where id = 3",
    )
    moved, plain, gone = changes(daemon, "full_root")
    assert (moved["_op"], moved["_before"]["id"], moved["id"]) == ("u", 1, 11)
    assert (moved["_unchanged"], plain["_unchanged"]) == (["big"], ["big"])
    assert (gone["_op"], gone["id"]) == ("d", 3)
    daemon.verified("full_root")


def test_a_partition_with_rows_that_comes_or_goes_under_a_published_root_is_right_after_a_resync(
    daemon: Daemon,
) -> None:
    """No event tells of these rows; the root's snapshot reads what the root shows."""
    execute(
        daemon.dsn,
        "create table roots_came (note text, id int not null, region text not null)",
        "insert into roots_came values ('old', 100, 'came')",
        "alter table roots attach partition roots_came for values in ('came')",
        "insert into roots values (101, 'came', 'new')",
        "alter table roots detach partition roots_odd",
        "insert into roots_odd (id, region, note) values (102, 'odd', 'of no root')",
        "insert into roots values (103, 'odd', 'in the default partition now')",
    )
    assert daemon.ask("resync", "roots", "--wait").code == 0
    daemon.settled().verified("roots")
    kept = held(daemon, "select id from shop.roots where id > 99 or region = 'odd' order by id")
    assert kept == [[100], [101], [103]]
    execute(daemon.dsn, "update roots set note = 'moved', region = 'came' where id = 103")
    daemon.settled().verified("roots")


def test_partitions_published_one_by_one_are_tables_each_and_come_and_go(
    daemon: Daemon, db: psycopg.Connection
) -> None:
    execute(
        daemon.dsn,
        "update leaves set id = 12 where id = 1",
        "insert into leaves values (2, 'c'), (13, 'd')",
        "create table leaves_c partition of leaves for values from (20) to (30)",
        "insert into leaves values (21, 'early')",
        "update leaves set id = 22 where id = 11",
        "create table leaves_d (note text, id int primary key)",
        "insert into leaves_d values ('before', 31)",
        "alter table leaves attach partition leaves_d for values from (30) to (40)",
        # Detached, it is published no more.
        "alter table leaves detach partition leaves_b",
        "insert into leaves_b values (14, 'unseen')",
    )
    assert [r["_op"] for r in changes(daemon, "leaves_a")] == ["d", "c"]
    states = {"public.leaves_b": "removed", "public.leaves_c": "streaming", "public.leaves_d": "streaming"}
    wait_until(lambda: {t: daemon.tables().get(t, {}).get("state") for t in states} == states, message="all to be seen")
    execute(daemon.dsn, "insert into leaves values (23, 'late')", "update leaves set note = note || '!' where id = 31")
    daemon.settled().verified("leaves_a", "leaves_c", "leaves_d")
    assert held(daemon, "select id from shop.leaves_c order by id") == [[21], [22], [23]]
    assert held(daemon, "select id, note from shop.leaves_d") == [[31, "before!"]]
    landed = [(r["_op"], r["id"]) for r in changes(daemon, "leaves_b")]
    if db.info.server_version < 150000 and landed[3:] == [("c", 14)]:
        del landed[3]  # An open walsender of 14 goes on publishing what was detached.
    assert landed == [("c", 12), ("c", 13), ("d", 11)], "all that was published of it, and nothing else"
    assert "public.leaves" not in daemon.tables()


def test_a_parent_and_its_child_stream_as_two_tables_and_hold_each_row_once(daemon: Daemon) -> None:
    execute(daemon.dsn, "update parent set note = note || '!'", "insert into child values (3, 'd', 'y')")
    daemon.settled().verified("parent", "child")
    assert held(daemon, "select id, note from shop.parent") == [[1, "p!"]]
    assert held(daemon, "select id, note, extra from shop.child order by id") == [[2, "c!", "x"], [3, "d", "y"]]


def test_rows_move_in_and_out_of_a_filter_and_a_hidden_column_stands_nowhere(
    daemon: Daemon, db: psycopg.Connection
) -> None:
    if db.info.server_version < 150000:
        pytest.skip("row filters and column lists begin with Postgres 15")
    execute(
        daemon.dsn,
        "update filtered set id = id + 100 where id = 1",
        "update filtered set id = -id where id = 10",
        "update filtered set n = 0, secret = 'xyzzy-new' where id in (2, 7)",
        "delete from filtered where id in (3, 8)",
        "insert into filtered values (4000, 1, 'xyzzy-more'), (-5, 1, 'xyzzy-out')",
    )
    assert [(r["_op"], r["id"]) for r in changes(daemon, "filtered")] == [
        ("c", 101), ("d", 10), ("u", 7), ("d", 8), ("c", 4000),
    ]  # fmt: skip
    daemon.verified("filtered")
    assert held(daemon, "select id, n from shop.filtered order by id") == [[6, 6], [7, 0], [9, 9], [101, 1], [4000, 1]]
    rows = changelog(daemon.lake, "public.filtered")
    assert "secret" not in rows.schema.names
    assert "secret" not in [f.name for f in rows.schema.field("_before").type]
    assert "xyzzy" not in str(rows.to_pylist())
    told = [daemon.ask(*words).document for words in (("tables",), ("status",), ("log", "ls"), ("log", "cat"))]
    assert "secret" not in str(told)
    assert "xyzzy" not in str(told)
    assert "xyzzy" not in daemon.log_path.read_text()


def test_a_stored_generated_column_is_captured_where_postgres_sends_it_and_declared_absent_where_not(
    daemon: Daemon, db: psycopg.Connection
) -> None:
    execute(daemon.dsn, "insert into made (id, n) values (3, 3)", "update made set n = 10 where id = 1")
    daemon.settled().verified("made")
    made = next(t for t in daemon.ask("tables").document["tables"] if t["table"] == "public.made")
    if db.info.server_version >= 180000:
        assert made["absent"] == []
        assert held(daemon, "select id, doubled from shop.made order by id") == [[1, 20], [2, 4], [3, 6]]
    else:
        assert made["absent"] == ["doubled"]
        assert "doubled" not in changelog(daemon.lake, "public.made").schema.names, "absent, not NULL"
        findings = daemon.ask("check").document["findings"]
        assert any("doubled" in f["message"] and f["severity"] == "info" for f in findings)


def test_truncate_stands_in_order_in_every_table_that_it_empties(daemon: Daemon) -> None:
    in_one(
        daemon.dsn,
        [
            "insert into cut_root values (50)",
            "insert into cut_plain (n) values (50)",
            "truncate cut_root, cut_plain restart identity cascade",
            "insert into cut_root values (1), (60)",
            "insert into cut_plain (n) values (60)",
        ],
    )
    assert [(r["_op"], r["id"], r["_seq"]) for r in changes(daemon, "cut_root")] == [
        ("c", 50, 0), ("t", None, 2), ("c", 1, 3), ("c", 60, 4),
    ]  # fmt: skip
    assert [(r["_op"], r["n"], r["_seq"]) for r in changes(daemon, "cut_plain")] == [
        ("c", 50, 1), ("t", None, 2), ("c", 60, 5),
    ]  # fmt: skip
    daemon.verified("cut_root", "cut_plain")
    execute(daemon.dsn, "truncate cut_root", "insert into cut_root values (7)")
    daemon.settled().verified("cut_root")
    # Of a partition under a published root Postgres says nothing; resync is what mends it.
    execute(daemon.dsn, "truncate cut_leaf", "insert into cut_root values (8)")
    assert [r["_op"] for r in changes(daemon, "cut_root")][-3:] == ["t", "c", "c"]
    assert daemon.ask("resync", "cut_root", "--wait").code == 0
    daemon.settled().verified("cut_root")


def test_every_origin_is_captured_and_a_time_that_its_writer_did_not_set_is_unknown(
    daemon: Daemon, db: psycopg.Connection
) -> None:
    db.execute("select pg_replication_origin_create('publish_story')")
    db.execute("select pg_replication_origin_session_setup('publish_story')")
    with db.transaction():
        db.execute("select pg_replication_origin_xact_setup('0/1234', '2020-02-02 02:02:02+00')")
        db.execute("insert into origins values (1)")
    with db.transaction():
        db.execute("select pg_replication_origin_xact_setup('0/1235', '2000-01-01 00:00:00+00')")
        db.execute("insert into origins values (2)")
    db.execute("insert into origins values (3)")
    db.execute("select pg_replication_origin_session_reset()")
    db.execute("insert into origins values (4)")
    rows = changes(daemon, "origins")
    assert [(r["id"], r["_origin"]) for r in rows] == [
        (1, "publish_story"), (2, "publish_story"), (3, "publish_story"), (4, None),
    ]  # fmt: skip
    assert rows[0]["_committed_at"].year == 2020
    assert [r["_committed_at"] is None for r in rows[:2]] == [False, True]
    daemon.verified("origins")


def test_messages_land_once_in_their_own_changelog_whatever_becomes_of_the_daemon(daemon: Daemon) -> None:
    def emit(transactional: bool, prefix: str, content: str) -> str:
        return f"select pg_logical_emit_message({transactional}, '{prefix}', '{content}')"

    with psycopg.connect(daemon.dsn) as connection:
        connection.execute("insert into beside values (1)")
        connection.execute(emit(True, "app.order", "between"))
        connection.execute("insert into beside values (2)")
    with psycopg.connect(daemon.dsn) as connection:
        connection.execute(emit(True, "app.order", "rolled back"))
        connection.execute(emit(False, "app.audit", "stays"))
        connection.rollback()
    execute(daemon.dsn, emit(True, "unwanted", "x"), emit(True, "cdc", "x"))
    assert daemon.ask("wait").code == 0
    daemon.kill()
    execute(daemon.dsn, emit(False, "app.audit", "while it was down"), emit(True, "app.order", "and this"))
    daemon.start().settled()
    execute(daemon.dsn, emit(True, "app.bytes", "last"))
    assert daemon.ask("wait").code == 0
    rows = changelog(daemon.lake, "cdc._messages").to_pylist()
    assert [(r["prefix"], r["content"], r["transactional"], r["_op"]) for r in rows] == [
        ("app.order", b"between", True, "c"), ("app.audit", b"stays", False, "c"),
        ("app.audit", b"while it was down", False, "c"), ("app.order", b"and this", True, "c"),
        ("app.bytes", b"last", True, "c"),
    ]  # fmt: skip
    one, two = changes(daemon, "beside")
    assert (rows[0]["_lsn"], rows[0]["_xid"]) == (one["_lsn"], one["_xid"])
    assert one["_seq"] < rows[0]["_seq"] < two["_seq"]
    assert daemon.tables()["cdc._messages"]["state"] == "streaming"
    query = 'select count(*) from shop."cdc._messages_changelog"'
    assert held(daemon, query) == [[5]]
    daemon.verified()
