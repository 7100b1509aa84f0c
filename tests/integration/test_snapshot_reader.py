"""The snapshot reader alone: how it cuts a table into chunks, whatever the rows are like."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from cdc.config import SourceConfig
from cdc.ports import RowsRead
from connectors.postgres.snapshot import PostgresSnapshotReader

pytestmark = pytest.mark.matrix

CHUNK_BYTES = 1 << 20
VALUE_BYTES = 100_000


@pytest.fixture
def db(database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def reader(database: str) -> Iterator[PostgresSnapshotReader]:
    made = PostgresSnapshotReader(
        SourceConfig(name="shop", dsn=database, publication=("p",), slot="s", chunk_bytes=CHUNK_BYTES)
    )
    yield made
    made.end()
    made.close()


def read_all(reader: PostgresSnapshotReader, rows_max: int = 1000) -> Iterator[RowsRead]:
    """Chunks of the one published table, all from one snapshot."""
    (schema,) = (found.schema for found in reader.tables().tables)
    reader.begin(schema)
    after = None
    while True:
        rows = reader.read(after=after, rows_max=rows_max)
        yield rows
        if rows.done:
            return
        after = rows.last_key


@pytest.mark.parametrize(
    "table",
    [
        "create table t (id int primary key, v text)",
        "create table t (id int, v text)",
        "create table t (id int, v text) partition by hash (id);"
        "create table t0 partition of t for values with (modulus 2, remainder 0);"
        "create table t1 (v text, id int); alter table t attach partition t1 for values with (modulus 2, remainder 1)",
    ],
    ids=["key", "no key", "partitions without a key"],
)
def test_a_chunk_of_big_rows_ends_at_its_bytes_and_none_is_lost(
    db: psycopg.Connection, reader: PostgresSnapshotReader, table: str
) -> None:
    db.execute(table)
    db.execute("create publication p for table t with (publish_via_partition_root = true)")
    # Small rows first: how big the rows are that come next cannot be known from those before.
    db.execute("insert into t select i, 'small' from generate_series(1, 2000) i")
    db.execute(f"insert into t select i, repeat(md5(i::text), {VALUE_BYTES // 32}) from generate_series(2001, 2060) i")
    found: dict[int, str] = {}
    count = 0
    for n, rows in enumerate(read_all(reader)):
        if n == 0:
            db.execute("insert into t select i, 'later' from generate_series(3001, 3100) i")
        ids, values = (column.to_pylist() for column in rows.columns)
        count += rows.rows
        found.update(zip(ids, values, strict=True))
        # A keyless table's least chunk is a block, which refers to any number of big values.
        if table.count("primary key"):
            assert sum(map(len, values)) <= CHUNK_BYTES + VALUE_BYTES + 100
    expected = dict(db.execute("select id, v from t where id < 3000").fetchall())
    assert (count, found) == (2060, expected)


def test_an_empty_table_and_empty_partitions_are_read_to_their_end(
    db: psycopg.Connection, reader: PostgresSnapshotReader
) -> None:
    db.execute("create table t (id int, v text) partition by list (id)")
    db.execute("create publication p for table t with (publish_via_partition_root = true)")
    assert [(r.rows, r.done) for r in read_all(reader)] == [(0, True)]
    reader.end()
    db.execute("create table t1 partition of t for values in (1)")
    db.execute("create table t2 partition of t for values in (2)")
    db.execute("insert into t values (2, 'two')")
    chunks = list(read_all(reader))
    assert sum(r.rows for r in chunks) == 1


WORDS = ("a", "A", "b", "B", "ä", "Ä", "z", "Z", "10", "9", "-", "a-b", "ab", "ß", "ss", "é", "e", "E", "_", "ı", "A b")


def test_keys_are_walked_in_the_order_of_their_own_collation(
    db: psycopg.Connection, reader: PostgresSnapshotReader
) -> None:
    known = "select collname from pg_collation where collname in ('C', 'C.utf8', 'en_US.utf8', 'en-x-icu', 'tr-x-icu')"
    db.execute("create table t (n int, word text)")
    db.execute("create publication p for table t")
    for (collation,) in db.execute(known).fetchall():
        db.execute(f'drop table t; create table t (word text collate "{collation}" primary key)')
        db.execute("alter publication p add table t")
        with db.cursor() as cursor:
            cursor.executemany("insert into t values (%s)", [(w,) for w in WORDS])
        read = [word for rows in read_all(reader, rows_max=2) for word in rows.columns[0].to_pylist()]
        assert sorted(read) == sorted(WORDS), collation
        reader.end()


def test_keys_that_ignore_case_are_walked_once_each(db: psycopg.Connection, reader: PostgresSnapshotReader) -> None:
    db.execute("create extension citext")
    db.execute("create table t (word citext, n int, primary key (word, n))")
    db.execute("create publication p for table t")
    rows = [(word, n) for n, word in enumerate(WORDS * 3)]
    with db.cursor() as cursor:
        cursor.executemany("insert into t values (%s, %s)", rows)
    read = [
        pair for r in read_all(reader, rows_max=2) for pair in zip(*(c.to_pylist() for c in r.columns), strict=True)
    ]
    assert sorted(read) == sorted(rows)
    # By key, exactly those: to the type "a" and "A" are one.
    (schema,) = (found.schema for found in reader.tables().tables)
    reader.end()
    reader.begin(schema)
    some = reader.read(keys=[("a", "0"), ("A", "0"), ("Z", "7"), ("z", "7")])
    assert sorted(zip(*(c.to_pylist() for c in some.columns), strict=True)) == [("Z", 7), ("a", 0)]


@pytest.mark.parametrize(
    ("columns", "fill", "strategy"),
    [
        ("id int primary key", "g", "blocks"),
        ("id int primary key", "g", "keys"),
        ("a int, b text, primary key (a, b)", "g * 7919 % 500, 'k' || g", "blocks"),
        ("a int, b text, primary key (a, b)", "g * 7919 % 500, 'k' || g", "keys"),
        ("a citext primary key", "'K' || g", "keys"),
    ],
    ids=["blocks", "one key", "blocks of two keys", "two keys", "its own operators"],
)
def test_ranges_together_are_the_table_and_meet_nowhere(
    columns: str, fill: str, strategy: str, db: psycopg.Connection, reader: PostgresSnapshotReader
) -> None:
    db.execute("create extension citext")
    names = "a, b" if "b text" in columns else columns.split()[0]
    db.execute(f"create table t (big text, {columns}) with (fillfactor = 10)".encode())
    db.execute("alter table t alter big set storage external")
    db.execute("create publication p for table t")
    db.execute(f"insert into t ({names}) select {fill} from generate_series(1, 60000) g".encode())
    if strategy == "keys":
        db.execute("update t set big = repeat('x', 9000) where ctid = '(0,1)'")
    (schema,) = (found.schema for found in reader.tables().tables)
    plan = reader.begin(schema).plan(32)
    assert plan.strategy == strategy, plan.why
    assert len(plan.ranges) >= 2
    found: list[tuple[object, ...]] = []
    for at, to in plan.ranges:
        more = {"blocks": 300} if strategy == "blocks" else {"rows_max": 7000}
        while True:
            rows = reader.read(after=at, **({"through": to} if to is not None else {}), **more)
            found += zip(*(column.to_pylist() for column in rows.columns[1:]), strict=True)
            at = rows.last_key or at
            if rows.done:
                break
    assert len(found) == len(set(found)) == 60_000
