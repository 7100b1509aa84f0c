"""The decoder on bytes that a real server wrote: what the generator of tests/support/wire.py claims, Postgres says."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import psycopg
import pytest

from tests.support.decoding import batches_of, decode, rows_of

pytestmark = pytest.mark.matrix

LONG = "".join(chr(33 + i * i * 7 % 90) for i in range(6_000))  # too long for its row, and does not compress away


@pytest.fixture
def shop(database: str) -> Iterator[psycopg.Connection]:
    """A slot with pgoutput over tables of every replica identity."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create table keyed (id int primary key, amount numeric(10,2), note text)")
        connection.execute("create table whole (id int, note text); alter table whole replica identity full")
        connection.execute("alter table keyed alter note set storage external")
        connection.execute("alter table whole alter note set storage external")
        connection.execute("create publication p for all tables")
        connection.execute("select pg_create_logical_replication_slot('decoder_' || current_database(), 'pgoutput')")
        yield connection
        connection.execute("select pg_drop_replication_slot('decoder_' || current_database())")


def frames(connection: psycopg.Connection) -> list[bytes]:
    """Everything that the slot has, as the replication protocol would frame it."""
    found = connection.execute(
        "select lsn - '0/0'::pg_lsn, data from pg_logical_slot_get_binary_changes('decoder_' || current_database(), "
        "null, null, 'proto_version', '1', 'publication_names', 'p', 'messages', 'true')"
    ).fetchall()
    return [b"w" + struct.pack(">QQq", int(lsn), int(lsn), 0) + bytes(data) for lsn, data in found]


@pytest.mark.parametrize("plan", ["columns", "rows"])
def test_inserts_updates_deletes_and_truncates_of_a_server_are_read_as_they_were_made(
    shop: psycopg.Connection, plan: str
) -> None:
    shop.execute("insert into keyed values (1, 'NaN', %s), (2, 1.5, null)", [LONG])
    with shop.transaction():
        shop.execute("update keyed set amount = 2.25 where id = 1")
        shop.execute("select pg_logical_emit_message(true, 'prefix', 'content')")
        shop.execute("update keyed set id = 3 where id = 1")
        shop.execute("delete from keyed where id = 2")
    shop.execute("insert into whole values (null, %s)", [LONG])
    shop.execute("update whole set id = 7")
    shop.execute("delete from whole")
    shop.execute("alter table keyed add column extra date default '2024-02-29'")
    shop.execute("insert into keyed values (9)")
    shop.execute("truncate keyed, whole")

    portions = decode(frames(shop), row_plan=plan)

    k, w = "public.keyed", "public.whole"
    rows = [row for row in rows_of(batches_of(portions)) if row.op != "t"]
    assert [(row.table, row.op, row.seq) for row in rows] == [
        *((k, "c", 0), (k, "c", 1), (k, "u", 0), (k, "u", 1), (k, "d", 2)),
        *((w, "c", 0), (w, "u", 0), (w, "d", 0), (k, "c", 0)),
    ]
    first, second, toasted, moved, gone, born, changed, dead, late = rows
    assert [str(row.image["amount"]) for row in (first, second, toasted, moved)] == ["None", "1.50", "2.25", "2.25"]
    assert (first.image["note"], first.raw) == (LONG, {"amount": "NaN"})
    assert (second.image["note"], second.raw) == (None, None)
    assert (toasted.unchanged, toasted.before) == (["note"], None)
    assert (moved.unchanged, moved.before) == (["note"], {"id": 1, "amount": None, "note": None})
    assert gone.image == {"id": 2, "amount": None, "note": None}
    assert born.image == {"id": None, "note": LONG}
    assert (changed.image, changed.before) == ({"id": 7, "note": LONG}, {"id": None, "note": LONG})
    assert dead.image == {"id": 7, "note": LONG}
    assert str(late.image["extra"]) == "2024-02-29"
    assert sorted(row.table for row in rows_of(batches_of(portions)) if row.op == "t") == [k, w]


def test_a_big_transaction_among_many_tables_is_decoded_by_both_plans_alike(shop: psycopg.Connection) -> None:
    for number in range(12):
        shop.execute(f"create table t{number} (id int primary key, at timestamptz, f float8, b bytea, a int[])")
    with shop.transaction():
        for number in range(12):
            shop.execute(
                f"insert into t{number} select i, now(), random(), decode('00ff', 'hex'), array[i, null] "
                "from generate_series(1, %s) i",
                [10 + number * 40],
            )
            shop.execute(f"update t{number} set f = 'NaN', at = 'infinity' where id % 7 = 0")
    stream = frames(shop)

    by_columns, by_rows = batches_of(decode(stream, row_plan="columns")), batches_of(decode(stream, row_plan="rows"))

    assert [b.data.num_rows for b in by_columns] == [b.data.num_rows for b in by_rows]
    assert all(a.data.serialize() == b.data.serialize() for a, b in zip(by_columns, by_rows, strict=True))
    counts = {f"public.t{n}": 10 + n * 40 + (10 + n * 40) // 7 for n in range(12)}
    assert {str(b.table): b.data.num_rows for b in by_columns} == counts
