"""Objects like those of Postgres' own regression database: whatever it can name and hold is captured, or left alone.

One daemon on a publication FOR ALL TABLES serves the module. Each object goes through snapshot, stream, `current`,
`verify`, `query`, `status` and `tables`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from connectors.postgres.embedded import EmbeddedPostgres
from tests.support.daemon import Daemon, execute
from tests.support.postgres import create_database, drop_database
from tests.support.waiting import wait_until
from tests.support.witness import changelog

pytestmark = pytest.mark.matrix

NAMES = [
    'quoted "twice""', "with.dots.", "new\nline", " spaces ", "back\\slash", "per%cent %s %41", "naïve☃ 表", "UPPER",
    "select", "_lsn", "_op", "_cdc", "_messages", "{braces} {0}", "a,b;c=(d)\te", "x" * 63, "ü" * 31, "it's", "@41",
    "..",
]  # fmt: skip
"""Each is the name of a schema, of a table in it, and of columns."""
WIDE = 1600

KEYED = """
create type pair as (a int, "b c" text)
create type mood as enum ('sad', 'it''s ok', 'very, "happy"')
create domain code as text check (value <> '')
create domain number as numeric(6, 2)
create table by_composite (k pair primary key, n int)
insert into by_composite values (row(1, 'x'), 1), (row(1, 'a "quoted", one'), 2), (row(2, ''), 3)
create table by_array (k int[] primary key, n int)
insert into by_array values ('{1,2}', 1), ('{}', 2), ('{{1},{2}}', 3), ('{NULL}', 4)
create table by_enum (k mood primary key, n int)
insert into by_enum values ('sad', 1), ('it''s ok', 2), ('very, "happy"', 3)
create table by_domain (k code, l number, n int, primary key (k, l))
insert into by_domain values ('a', 1.5, 1), (E'b\\n', 'NaN', 2), ('c', -2, 3)
create table by_range (k int4range primary key, n int)
insert into by_range values ('[1,5)', 1), ('empty', 2), ('(,)', 3)
create table by_bytes (k bytea primary key, n int)
insert into by_bytes values ('', 1), ('\\x00ff', 2), ('abc', 3)
create table by_moment (k timestamptz primary key, n int)
insert into by_moment values ('infinity', 1), ('0044-03-15 BC', 2), ('2020-02-02', 3)
create table documents (body jsonb)
insert into documents values ('{"a": [1, null, "x"]}'), (null), ('"text"'), ('{}')
"""
KEYED_TABLES = ["composite", "array", "enum", "domain", "range", "bytes", "moment"]
LEFT_ALONE = """
create unlogged table left_unlogged (id int primary key)
create view left_view as select 1 one
create materialized view left_mat as select 1 one
create sequence left_sequence
create foreign data wrapper nowhere
create server nowhere foreign data wrapper nowhere
create foreign table left_foreign (id int) server nowhere
"""
NOTHING = """
create table nothing ()
insert into nothing default values
insert into nothing default values
"""


def odd(name: str) -> sql.Identifier:
    return sql.Identifier(name, name)


def make_odd(connection: psycopg.Connection[Any], name: str) -> None:
    """A schema, a table and three columns of one odd name; the second column is called like a system column."""
    connection.execute(sql.SQL("create schema {}").format(sql.Identifier(name)))
    columns = [name, "id" if name != "_seq" else "key", name[:60] + "2"]
    connection.execute(
        sql.SQL("create table {} ({} text, {} int primary key, {} text)").format(
            odd(name), *(sql.Identifier(c) for c in columns)
        )
    )
    connection.execute(sql.SQL("insert into {} values ('a', 1, 'b'), ('', 2, null)").format(odd(name)))


@pytest.fixture(scope="module")
def daemon(server: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    dsn = create_database(server, "odd_objects")
    execute(dsn, *KEYED.strip().splitlines(), *LEFT_ALONE.strip().splitlines(), *NOTHING.strip().splitlines())
    wide = ", ".join(f"c{i} int" for i in range(2, WIDE + 1))
    with psycopg.connect(dsn, autocommit=True) as connection:
        for name in NAMES:
            make_odd(connection, name)
        connection.execute(f"create table wide (c1 int primary key, {wide})".encode())
        connection.execute("insert into wide (c1, c2, c1600) values (1, 2, 3), (2, null, null)")
        connection.execute("create publication odd_objects for all tables")
    with Daemon(tmp_path_factory.mktemp("odd"), dsn, source={"publication": "odd_objects"}) as running:
        yield running.start().settled(120)
    drop_database(server, "odd_objects")


@pytest.fixture
def db(daemon: Daemon) -> Iterator[psycopg.Connection]:
    with psycopg.connect(daemon.dsn, autocommit=True) as connection:
        yield connection


def rows_of(daemon: Daemon, query: str) -> list[list[Any]]:
    answer = daemon.ask("query", query)
    assert answer.code == 0, answer
    rows: list[list[Any]] = answer.document["rows"]
    return rows


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def test_names_that_postgres_allows_are_held_as_they_are(daemon: Daemon, db: psycopg.Connection) -> None:
    for name in NAMES:
        column = sql.Identifier(name)
        db.execute(sql.SQL("insert into {} values ('c', 3, 'd')").format(odd(name)))
        db.execute(sql.SQL("update {} set {} = 'new' where id = 1").format(odd(name), column))
        db.execute(sql.SQL("delete from {} where id = 2").format(odd(name)))
    daemon.settled().verified(*(f"{name}.{name}" for name in NAMES))
    told = {t["table"]: t for t in daemon.ask("tables").document["tables"]}
    for name in NAMES:
        assert [c["name"] for c in told[f"{name}.{name}"]["columns"]] == [name, "id", name[:60] + "2"]
        table = f"shop.{quoted(f'{name}.{name}')}"
        rows = rows_of(daemon, f"select {quoted(name)}, id, {quoted(name[:60] + '2')} from {table} order by id")
        assert rows == [["new", 1, "b"], ["c", 3, "d"]], name


def test_keys_of_composite_array_enum_and_domain_types_identify_rows(daemon: Daemon, db: psycopg.Connection) -> None:
    for table in (f"by_{kind}" for kind in KEYED_TABLES):
        db.execute(f"update {table} set n = 10 where n = 1".encode())
        db.execute(f"delete from {table} where n = 2".encode())
    db.execute("insert into by_enum values ('it''s ok', 5)")
    db.execute("update by_composite set k = row(7, null) where n = 10")
    db.execute("update by_array set k = '{9,NULL}' where n = 10")
    db.execute("insert into documents values ('[1.10, 1e400]')")
    daemon.settled().verified(*(f"by_{kind}" for kind in KEYED_TABLES), "documents")
    for kind in KEYED_TABLES:
        counts = {"array": 3, "enum": 3}
        assert rows_of(daemon, f"select count(*) from shop.by_{kind}") == [[counts.get(kind, 2)]]
    assert rows_of(daemon, "select k from shop.by_enum order by n") == [
        ['very, "happy"'], ["it's ok"], ["sad"],
    ]  # fmt: skip
    assert rows_of(daemon, "select count(*), count(body) from shop.documents") == [[5, 4]]


def test_sixteen_hundred_columns_are_held(daemon: Daemon, db: psycopg.Connection) -> None:
    db.execute("insert into wide (c1, c800) values (3, 800)")
    db.execute("update wide set c1600 = 1600 where c1 = 1")
    db.execute("delete from wide where c1 = 2")
    daemon.settled().verified("wide")
    assert rows_of(daemon, "select c1, c2, c800, c1600 from shop.wide order by c1") == [
        [1, 2, None, 1600], [3, None, 800, None],
    ]  # fmt: skip
    wide = next(t for t in daemon.ask("tables").document["tables"] if t["table"] == "public.wide")
    assert len(wide["columns"]) == WIDE


def test_a_table_without_columns_counts_its_rows(daemon: Daemon, db: psycopg.Connection) -> None:
    db.execute("insert into nothing default values")
    daemon.settled().verified("nothing")
    assert daemon.tables()["public.nothing"]["rows"] == 3
    assert [r["_op"] for r in changelog(daemon.lake, "public.nothing").to_pylist() if r["_op"] in "rc"] == list("rrc")


def test_what_is_no_permanent_table_is_left_alone(daemon: Daemon, db: psycopg.Connection) -> None:
    db.execute("create temporary table left_temporary (id int primary key)")
    db.execute("insert into left_temporary values (1)")
    db.execute("insert into left_unlogged values (1)")
    db.execute("refresh materialized view left_mat")
    db.execute("select nextval('left_sequence')")
    assert daemon.ask("wait").code == 0
    assert [t for t in daemon.tables() if "left" in t] == []
    assert not any("left_" in f["message"] for f in daemon.ask("check").document["findings"])


def test_a_table_made_while_we_stream_is_captured_from_its_first_row(daemon: Daemon, db: psycopg.Connection) -> None:
    make_odd(db, 'made "later"')
    db.execute("create table later as select 1 as n")
    wait_until(
        lambda: {"public.later", 'made "later".made "later"'} <= set(daemon.tables()), message="both to be found"
    )
    db.execute("insert into later values (2)")
    daemon.settled().verified("later", 'made "later".made "later"')
