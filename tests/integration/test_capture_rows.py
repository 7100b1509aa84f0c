"""What stands in the changelog and in `current` after each kind of change: a real server, a real daemon.

One daemon serves the module; each test works on tables of its own. That every table is equal is `verify`'s to say; here
the rows themselves are read, as a user of the lake would read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from connectors.postgres.embedded import EmbeddedPostgres
from tests.support.daemon import Daemon, execute, in_one
from tests.support.postgres import create_database, drop_database
from tests.support.waiting import wait_until
from tests.support.witness import changelog

pytestmark = pytest.mark.matrix

BIG = "repeat(md5('{}'), 200)"
TABLES = """
create table moved (id int primary key, n int, big text);
alter table moved alter big set storage external;
insert into moved select g, g, repeat(md5(g::text), 200) from generate_series(1, 5) g;
create table toast (id int primary key, n int, big text, bytes bytea);
alter table toast alter big set storage external, alter bytes set storage external;
insert into toast select g, g, repeat(md5(g::text), 200), decode(repeat(md5(g::text), 200), 'hex')
  from generate_series(1, 5) g;
create table cut_a (id int primary key);
create table cut_b (id int primary key, a int references cut_a);
insert into cut_a select generate_series(1, 5);
insert into cut_b select g, g from generate_series(1, 5) g;
create table origins (id int primary key);
create table marked (id int primary key);
create table marked_part (id int primary key, parent int references marked on delete cascade);
create table marked_log (id int generated always as identity primary key, parent int);
create function note_marked() returns trigger language plpgsql as
  'begin insert into marked_log (parent) values (new.id); return null; end';
create constraint trigger note_marked after insert on marked deferrable initially deferred
  for each row execute function note_marked();
create table whole (id int primary key, n int, big text);
alter table whole alter big set storage external;
alter table whole replica identity full;
insert into whole select g, g, repeat(md5(g::text), 200) from generate_series(1, 5) g;
create table grown (id int primary key, n int);
insert into grown select g, g from generate_series(1, 5) g;
create table by_index (a int, b text not null, n int);
create unique index by_b on by_index (b);
alter table by_index replica identity using index by_b;
insert into by_index values (1, 'one', 1), (2, 'two', 2);
create table counted (id int primary key);
create table passed_over (id int primary key);
create schema "Odd.Schema";
create table "Odd.Schema"."odd ""name"" %41" ("_op" int, "a b" text, "Ä" text, primary key ("a b", "_op"));
create table unheld (id int primary key, amount numeric(10,2), day date, at timestamptz, grid int[]);
create table bare (n int, text text);
create table heap (n int, text text, big text, amount numeric(5,1), size float8);
alter table heap alter big set storage external;
alter table heap replica identity full;
insert into heap select 1, 'same', repeat(md5('1'), 200), 'NaN', '-0' from generate_series(1, 4);
insert into heap values (2, null, null, null, 0), (2, null, null, null, '-0'), (2, '', null, 1, 'NaN');
create table sullen (n int, text text) partition by list (n);
create table sullen_1 partition of sullen for values in (1);
alter table sullen_1 add primary key (text);
insert into sullen values (1, 'one');
create table deferred (k int primary key deferrable initially deferred, text text);
alter table deferred replica identity full;
insert into deferred select g, 'row ' || g from generate_series(1, 5) g;
"""
ODD = 'Odd.Schema.odd "name" %41'


@pytest.fixture(scope="module")
def daemon(server: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    dsn = create_database(server, "capture_rows")
    execute(dsn, *TABLES.split(";\n"))
    with Daemon(tmp_path_factory.mktemp("capture"), dsn, source={"exclude": ["public.passed_*"]}) as running:
        yield running.start().settled()
    drop_database(server, "capture_rows")


@pytest.fixture
def db(daemon: Daemon) -> Iterator[psycopg.Connection]:
    with psycopg.connect(daemon.dsn, autocommit=True) as connection:
        yield connection


def changes(daemon: Daemon, table: str) -> list[dict[str, Any]]:
    """The changes in a changelog, in order, snapshots left out; waits for what is committed."""
    assert daemon.ask("wait").code == 0
    return [r for r in changelog(daemon.lake, f"public.{table}").to_pylist() if r["_op"] in "cudt"]


def now_in(daemon: Daemon, sql: str) -> list[list[Any]]:
    rows: list[list[Any]] = daemon.ask("query", sql).document["rows"]
    return rows


def test_a_key_change_is_one_update_with_the_old_key_and_keeps_the_big_value(daemon: Daemon) -> None:
    in_one(
        daemon.dsn, ["update moved set id = 10 where id = 1", f"insert into moved values (1, 7, {BIG.format('new')})"]
    )
    update, insert = changes(daemon, "moved")
    assert (update["_op"], update["id"], update["_before"]["id"]) == ("u", 10, 1)
    assert (update["_unchanged"], update["big"], update["n"]) == (["big"], None, 1)
    assert (insert["_op"], insert["id"], insert["_before"], insert["_unchanged"]) == ("c", 1, None, None)
    assert insert["_lsn"] == update["_lsn"]
    daemon.verified("moved")


def test_an_unchanged_toast_value_is_unknown_in_the_changelog_and_kept_in_current(daemon: Daemon) -> None:
    execute(
        daemon.dsn,
        "update toast set n = 100 where id = 1",
        f"update toast set big = {BIG.format('other')} where id = 2",
        "update toast set big = null where id = 3",
        "update toast set n = 101 where id = 3",
        "delete from toast where id = 4",
    )
    one, two, three, again, gone = changes(daemon, "toast")
    assert (one["_unchanged"], one["big"], one["bytes"]) == (["big", "bytes"], None, None)
    assert (two["_unchanged"], two["big"] is None, two["bytes"]) == (["bytes"], False, None)
    assert (three["_unchanged"], three["big"]) == (["bytes"], None)
    assert (again["_unchanged"], again["big"]) == (["bytes"], None), "a NULL is known: only bytes is not"
    assert (gone["_op"], gone["id"], gone["n"], gone["_unchanged"]) == ("d", 4, None, None)
    held = now_in(daemon, "select id, n, length(big), octet_length(bytes) from shop.toast order by id")
    assert held == [[1, 100, 6400, 3200], [2, 2, 6400, 3200], [3, 101, None, 3200], [5, 5, 6400, 3200]]
    daemon.verified("toast")


def test_a_truncate_of_several_tables_stands_once_in_each_changelog(daemon: Daemon) -> None:
    in_one(daemon.dsn, ["insert into cut_a values (100)", "truncate cut_a, cut_b", "insert into cut_a values (101)"])
    before, truncate, after = changes(daemon, "cut_a")
    (other,) = changes(daemon, "cut_b")
    assert [r["_op"] for r in (before, truncate, after, other)] == ["c", "t", "c", "t"]
    assert {(r["_lsn"], r["_xid"]) for r in (before, truncate, after, other)} == {(before["_lsn"], before["_xid"])}
    assert (before["_seq"], truncate["_seq"], other["_seq"], after["_seq"]) == (0, 1, 1, 2)
    assert (now_in(daemon, "select id from shop.cut_a"), now_in(daemon, "select id from shop.cut_b")) == ([[101]], [])
    execute(daemon.dsn, "insert into cut_b values (1, 101)", "truncate cut_a cascade")
    assert [r["_op"] for r in changes(daemon, "cut_b")] == ["t", "c", "t"]
    daemon.verified("cut_a", "cut_b")


def test_a_transaction_of_an_origin_names_it(daemon: Daemon, db: psycopg.Connection) -> None:
    db.execute("select pg_replication_origin_create('capture_rows')")
    db.execute("insert into origins values (1)")
    # A session whose first commit is under the origin: nobody has set a time yet.
    with psycopg.connect(daemon.dsn, autocommit=True) as fresh:
        fresh.execute("select pg_replication_origin_session_setup('capture_rows')")
        fresh.execute("insert into origins values (2)")
        with fresh.transaction():
            fresh.execute("select pg_replication_origin_xact_setup('0/1234', '2020-02-02 02:02:02+00')")
            fresh.execute("insert into origins values (3)")
        fresh.execute("select pg_replication_origin_session_reset()")
    db.execute("insert into origins values (4)")
    rows = changes(daemon, "origins")
    assert [(r["id"], r["_origin"]) for r in rows] == [(1, None), (2, "capture_rows"), (3, "capture_rows"), (4, None)]
    assert rows[1]["_committed_at"] is None, "its writer set none: 0 on the wire is no time"
    assert rows[2]["_committed_at"] == datetime(2020, 2, 2, 2, 2, 2, tzinfo=UTC), "the commit time of the origin"
    daemon.verified("origins")


def test_a_message_marks_a_transaction_with_its_cascades_and_deferred_triggers(daemon: Daemon) -> None:
    """As a writer does it that may not set origins. A savepoint that is rolled back does not matter to the mark."""
    mark = "select pg_logical_emit_message(true, 'cdc.origin', 'cdc_crm')"
    execute(daemon.dsn, "insert into marked select generate_series(1, 2)", "insert into marked_part values (1, 1)")
    in_one(
        daemon.dsn,
        [
            mark, "savepoint s", "insert into marked values (9)", "rollback to s", "savepoint s",
            "insert into marked values (3)", "release s", "delete from marked where id = 1",
        ],
    )  # fmt: skip
    in_one(daemon.dsn, ["delete from marked where id = 2", mark, "insert into marked values (4)"])
    found = {
        name: [(r["_op"], r[column], r["_origin"]) for r in changes(daemon, name)]
        for name, column in (("marked", "id"), ("marked_part", "id"), ("marked_log", "parent"))
    }
    assert found == {
        "marked": [
            ("c", 1, None), ("c", 2, None), ("c", 3, "cdc_crm"), ("d", 1, "cdc_crm"),
            ("d", 2, None), ("c", 4, "cdc_crm"),
        ],
        "marked_part": [("c", 1, None), ("d", 1, "cdc_crm")],
        "marked_log": [("c", 1, None), ("c", 2, None), ("c", 3, "cdc_crm"), ("c", 4, "cdc_crm")],
    }  # fmt: skip
    daemon.verified("marked", "marked_part", "marked_log")


def test_replica_identity_full_brings_the_whole_old_row(daemon: Daemon) -> None:
    execute(
        daemon.dsn,
        "update whole set n = 100 where id = 1",
        "update whole set id = 20 where id = 2",
        "delete from whole where id = 3",
    )
    plain, moved, gone = changes(daemon, "whole")
    assert plain["_before"] == {"id": 1, "n": 1, "big": plain["big"]}
    assert (len(plain["big"]), plain["_unchanged"]) == (6400, None), "the old tuple holds what the new one leaves out"
    assert (moved["id"], moved["_before"]["id"], len(moved["big"])) == (20, 2, 6400)
    assert (gone["_op"], gone["id"], gone["n"], len(gone["big"])) == ("d", 3, 3, 6400)
    daemon.verified("whole")


def test_a_new_column_shows_its_default_in_rows_that_were_never_written_again(daemon: Daemon) -> None:
    execute(
        daemon.dsn,
        "insert into grown values (6, 6)",
        "alter table grown add plain text, add filled int default 7, add dated date default '2020-02-02'",
        "insert into grown values (7, 7, 'seven', 8, null)",
        "update grown set n = 10 where id = 1",
        "alter table grown alter filled set default 9",
        "insert into grown (id) values (8)",
        "alter table grown rename n to number",
        "update grown set number = 20 where id = 2",
        "alter table grown drop plain",
        "delete from grown where id = 3",
    )
    rows = changes(daemon, "grown")
    assert [r["_op"] for r in rows] == ["c", "c", "u", "c", "u", "d"]
    daemon.verified("grown")
    held = now_in(daemon, "select id, number, filled, cast(dated as text) from shop.grown order by id")
    assert held == [
        [1, 10, 7, "2020-02-02"], [2, 20, 7, "2020-02-02"], [4, 4, 7, "2020-02-02"], [5, 5, 7, "2020-02-02"],
        [6, 6, 7, "2020-02-02"], [7, 7, 8, None], [8, None, 9, "2020-02-02"],
    ]  # fmt: skip


def test_a_key_may_be_another_unique_index(daemon: Daemon) -> None:
    execute(
        daemon.dsn,
        "update by_index set n = 10 where b = 'one'",
        "update by_index set b = 'zwei' where b = 'two'",
        "insert into by_index values (null, 'three', 3)",
        "delete from by_index where b = 'one'",
    )
    assert [(r["_op"], r["b"]) for r in changes(daemon, "by_index")] == [
        ("u", "one"), ("u", "zwei"), ("c", "three"), ("d", "one"),
    ]  # fmt: skip
    assert now_in(daemon, "select b, n from shop.by_index order by b") == [["three", 3], ["zwei", 2]]
    daemon.verified("by_index")


def test_ordinals_count_the_changes_of_a_transaction_and_nothing_that_was_rolled_back(
    daemon: Daemon, db: psycopg.Connection
) -> None:
    with psycopg.connect(daemon.dsn) as connection:
        connection.execute("insert into counted values (1), (2)")
        connection.execute("savepoint s")
        connection.execute("insert into counted values (3)")
        connection.execute("rollback to savepoint s")
        connection.execute("insert into counted values (4)")
        row = connection.execute("select pg_current_xact_id()::text::int8, clock_timestamp()").fetchone()
    assert row
    db.execute("insert into passed_over values (1)")
    rows = changes(daemon, "counted")
    assert [(r["id"], r["_seq"], r["_xid"]) for r in rows] == [(1, 0, row[0]), (2, 1, row[0]), (4, 2, row[0])]
    assert len({r["_lsn"] for r in rows}) == 1
    assert 0 <= (rows[0]["_committed_at"] - row[1]).total_seconds() < 5
    tables = {t["table"] for t in daemon.ask("lake", "ls").document["tables"]}
    assert "public.counted" in tables
    assert "public.passed_over" not in tables, "it is excluded by the configuration"


def test_odd_names_and_system_names_are_held(daemon: Daemon) -> None:
    table = '"Odd.Schema"."odd ""name"" %41"'
    execute(
        daemon.dsn,
        f"insert into {table} values (1, 'x', 'y'), (2, '', null), (3, E'line\\nbreak', '\\')",
        f'update {table} set "_op" = 4 where "_op" = 1',
        f'delete from {table} where "_op" = 2',
    )
    assert daemon.ask("wait").code == 0
    assert ODD in daemon.tables()
    quoted = ODD.replace('"', '""')
    rows = now_in(daemon, f'select "_op", "a b", "Ä" from shop."{quoted}" order by 1')
    assert rows == [[3, "line\nbreak", "\\"], [4, "x", "y"]]
    daemon.verified(ODD)


def test_values_that_a_type_cannot_hold_are_kept_as_text_and_compared(daemon: Daemon) -> None:
    execute(
        daemon.dsn,
        "insert into unheld values (1, 'NaN', 'infinity', '-infinity', '{{1,2},{3,4}}')",
        "insert into unheld values (2, 1.5, '0044-03-15 BC', now(), '{1}')",
        "update unheld set amount = 2 where id = 1",
        "update unheld set amount = 'NaN' where id = 2",
    )
    first, _, again, _ = changes(daemon, "unheld")
    assert (first["amount"], first["day"], first["at"], first["grid"]) == (None, None, None, None)
    assert dict(first["_raw"]) == {"amount": "NaN", "day": "infinity", "at": "-infinity", "grid": "{{1,2},{3,4}}"}
    assert set(dict(again["_raw"])) == {"day", "at", "grid"}
    daemon.verified("unheld")


def test_a_table_without_a_key_holds_its_inserts(daemon: Daemon) -> None:
    execute(
        daemon.dsn,
        "insert into bare values (1, 'same'), (1, 'same'), (null, null)",
        "insert into bare values (1, 'same')",
    )
    assert [r["_op"] for r in changes(daemon, "bare")] == ["c"] * 4
    daemon.verified("bare")
    execute(daemon.dsn, "truncate bare", "insert into bare values (2, 'new')")
    daemon.verified("bare")


def test_of_several_equal_rows_without_a_key_one_is_updated_or_deleted(daemon: Daemon) -> None:
    one = "ctid = (select min(ctid) from heap where n = 1)"
    execute(
        daemon.dsn,
        f"update heap set text = 'other' where {one}",
        f"delete from heap where {one}",
        "delete from heap where size::text = '-0' and n = 2",
        "insert into heap select * from heap where n = 1 limit 1",
        "begin; insert into heap (n) values (9), (9); update heap set n = 8 where n = 9; delete from heap where n = 8;"
        " insert into heap (n) values (7); commit",
    )
    assert sum(r["_op"] == "u" for r in changes(daemon, "heap")) == 3
    held = now_in(daemon, "select n, text, count(*), max(length(big)) from shop.heap group by all order by all")
    found = {(n, text): (rows, size) for n, text, rows, size in held}
    assert found.pop((2, None)) == (1, None)
    assert found.pop((2, "")) == (1, None)
    assert found.pop((7, None)) == (1, None)
    assert sum(rows for rows, _ in found.values()) == 4
    assert {size for _, size in found.values()} == {6400}
    daemon.verified("heap")
    assert daemon.ask("resync", "heap").code == 0
    execute(daemon.dsn, "update heap set n = n + 1", "delete from heap where n = 3")
    daemon.settled().verified("heap")
    execute(daemon.dsn, "update heap set n = n + 1", "truncate heap", "insert into heap (n) values (1), (1)")
    daemon.verified("heap")


def test_keys_that_meet_for_a_moment_within_a_transaction_are_all_kept(daemon: Daemon) -> None:
    """A deferrable primary key holds at the commit only; as a key it would lose rows."""
    in_one(daemon.dsn, ["update deferred set k = k + 1", "update deferred set k = 10 - k"])
    daemon.verified("deferred")
    assert now_in(daemon, "select k, text from shop.deferred order by k") == [[10 - k, f"row {k - 1}"] for k in
                                                                             (6, 5, 4, 3, 2)]  # fmt: skip


def test_a_table_whose_changes_do_not_say_which_row_they_mean_stops_alone_and_says_what_mends_it(
    daemon: Daemon,
) -> None:
    """A partition has a key of its own, its root has none: an update comes without the old row."""
    execute(daemon.dsn, "update sullen set text = 'uno'", "insert into bare values (3, 'goes on')")

    def stopped() -> dict[str, Any] | None:
        table = daemon.tables()["public.sullen"]
        return table if table["state"] == "stopped" else None

    told = wait_until(stopped, message="the table to stop")
    assert told["reason"]
    assert "replica identity full" in told["hint"]
    waited = daemon.ask("wait")
    assert (waited.code, [t["table"] for t in waited.document["stopped"]]) == (3, ["public.sullen"])
    assert daemon.source()["phase"] == "streaming"
    daemon.verified("bare")

    execute(daemon.dsn, "alter table sullen replica identity full", "alter table sullen_1 replica identity full")
    assert daemon.ask("resync", "sullen").code == 0
    daemon.settled().verified("sullen")
    execute(daemon.dsn, "update sullen set text = 'eins'")
    daemon.settled().verified("sullen")
    assert now_in(daemon, "select n, text from shop.sullen") == [[1, "eins"]]


def test_columns_renamed_dropped_and_added_while_nobody_listened_keep_their_values(
    database: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The catalog is ahead of the stream then: a message's columns are not the catalog's of now."""
    execute(
        database, "create table t (id int primary key, a text, b int, c text)", "insert into t values (1, 'a', 1, 'c')"
    )
    with Daemon(tmp_path_factory.mktemp("renamed"), database) as daemon:
        daemon.start().settled()
        daemon.kill()
        execute(
            database,
            "insert into t values (2, 'a2', 2, 'c2')",
            "alter table t rename a to was_a",
            "insert into t values (3, 'a3', 3, 'c3')",
            "alter table t drop b",
            "insert into t values (4, 'a4', 'c4')",
            "alter table t add d int default 9",
            "update t set c = 'changed' where id in (1, 2)",
            "alter table t rename c to a",
            "insert into t values (5, 'a5', 'c5', 10)",
        )
        daemon.start().settled().verified()
        assert now_in(daemon, "select id, was_a, a, d from shop.t order by id") == [
            [1, "a", "changed", 9], [2, "a2", "changed", 9], [3, "a3", "c3", 9],
            [4, "a4", "c4", 9], [5, "a5", "c5", 10],
        ]  # fmt: skip


def test_rows_that_move_into_a_row_filter_are_read_again_for_what_no_message_carries(
    server: EmbeddedPostgres, database: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rule 9 of snapshots: Postgres sends an insert whose big value is "unchanged", and the lake never saw the row."""
    with psycopg.connect(database) as connection:
        if connection.info.server_version < 150000:
            return  # no row filters
    execute(
        database,
        "create table t (id int primary key, n int, hidden text, big text)",
        "alter table t alter big set storage external",
        "insert into t select g, g, 'secret', repeat(md5(g::text), 200) from generate_series(1, 20) g",
    )
    with Daemon(tmp_path_factory.mktemp("filter"), database) as daemon:
        execute(database, f"create publication {daemon.slot} for table t (id, n, big) where (id > 10)")
        daemon.start().settled().verified()
        execute(database, "update t set id = id + 100 where id in (1, 2)", "update t set id = 3 - id where id = 11",
                "update t set n = 0 where id in (3, 12)", "update t set id = 200 where id = 101")  # fmt: skip
        daemon.settled().verified()
        held = now_in(daemon, "select count(*), min(length(big)), min(id), max(id) from shop.t")
        assert held == [[11, 6400, 12, 200]]
        assert "hidden" not in daemon.ask("query", "select * from shop.t").document["columns"]
