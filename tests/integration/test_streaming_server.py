"""What a real server streams of transactions that have not committed, against what it sends of them afterwards."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc.errors import ProtocolError
from tests.support import savepoints
from tests.support.damage import KINDS, damaged
from tests.support.decoding import Row, batches_of, decode, decode_streamed, in_table_order, rows_of
from tests.support.streaming import kind

pytestmark = pytest.mark.matrix

PEEK = (
    "select lsn - '0/0'::pg_lsn, data from pg_logical_slot_peek_binary_changes('peek_' || current_database(), null, "
    "null, 'proto_version', {version}, {streaming} 'publication_names', 'p', 'messages', 'true')"
)


@pytest.fixture
def peeked(database: str) -> Iterator[psycopg.Connection[Any]]:
    """A slot over all tables that are going to be; reading it moves nothing."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create publication p for all tables")
        connection.execute("select pg_create_logical_replication_slot('peek_' || current_database(), 'pgoutput')")
        yield connection
        connection.execute("select pg_drop_replication_slot('peek_' || current_database())")


def peek(connection: psycopg.Connection[Any], *, streaming: bool, immediate: bool = False) -> list[bytes]:
    """Everything that the slot has, framed; streamed in blocks of 64 kB, or change by change."""
    connection.execute("set logical_decoding_work_mem = '64kB'")
    if connection.info.server_version >= 160000:
        how = "immediate" if immediate else "buffered"
        connection.execute(f"set debug_logical_replication_streaming = {how}".encode())
    statement = PEEK.format(version="'2'" if streaming else "'1'", streaming="'streaming', 'on'," if streaming else "")
    found = connection.execute(statement.encode()).fetchall()
    return [b"w" + struct.pack(">QQq", int(lsn), int(lsn), 0) + bytes(data) for lsn, data in found]


def both(
    connection: psycopg.Connection[Any], folder: Path, rng: random.Random, *, immediate: bool = False
) -> tuple[list[Row], Counter[bytes]]:
    """The rows of the slot, asserted to be the same streamed and not; and the kinds of messages of the stream.

    `immediate`: streamed change by change, where the server can (16 and later).
    """
    plain = decode(peek(connection, streaming=False))
    frames = peek(connection, streaming=True, immediate=immediate)
    cuts = sorted(rng.randint(0, len(frames)) for _ in range(10))
    portions = decode_streamed(frames, cuts, folder=folder / "spool", memory_bytes=rng.choice((0, 100_000, 1 << 30)))
    rows = in_table_order(rows_of(batches_of(plain)))
    assert first_difference(in_table_order(rows_of(batches_of(portions))), rows) is None
    ours, theirs = ([(x, y) for p in ps for x, y in zip(p.xids, p.xid_lsns, strict=True)] for ps in (portions, plain))
    # A streamed transaction comes also if nothing of it is published.
    assert first_difference([one for one in ours if one in theirs], theirs) is None
    return rows, Counter(map(kind, frames))


def first_difference(ours: list[Any], theirs: list[Any]) -> Any:
    """A comparison of long lists that pytest does not have to explain."""
    return next((pair for pair in zip_longest(ours, theirs) if pair[0] != pair[1]), None)


def applied(rows: list[Row]) -> dict[str, Counter[tuple[Any, ...]]]:
    """What the tables hold after these changes; `id` tells rows apart in all of them."""
    tables: dict[str, dict[int, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row.lsn, row.seq)):
        held = tables.setdefault(row.table.removeprefix("public."), {})
        if row.op == "t":
            held.clear()
            continue
        before = (row.before or row.image)["id"]
        gone = held.pop(before) if row.op in "ud" else {}
        if row.op in "cu":
            unchanged = row.unchanged or ()
            held[row.image["id"]] = {c: gone[c] if c in unchanged else v for c, v in row.image.items()}
    columns = ("id", "n", "note", "long")
    return {t: Counter(tuple(h.get(c) for c in columns) for h in held.values()) for t, held in tables.items()}


def write_for_certain(connection: psycopg.Connection[Any]) -> None:
    """A transaction that is streamed, with a savepoint that is rolled back: a random program may have none."""
    with connection.transaction():
        insert = "insert into keyed select (1e12 + g)::int8, g, md5(g::text) from generate_series({}, {}) g"
        connection.execute(insert.format(1, 1000).encode())
        with connection.transaction(force_rollback=True):
            connection.execute(insert.format(1001, 2000).encode())
        connection.execute(insert.format(2001, 2500).encode())


@pytest.mark.parametrize("number", range(2))
def test_random_savepoints_say_the_same_streamed_and_not_and_what_the_tables_hold(
    peeked: psycopg.Connection[Any], tmp_path: Path, rng: random.Random, number: int
) -> None:
    rng.seed(rng.randrange(1 << 32) + number)
    peeked.execute(savepoints.SCHEMA.encode())
    savepoints.run(peeked.info.dsn, rng, transactions=12, statements=20)
    write_for_certain(peeked)

    rows, messages = both(peeked, tmp_path, rng)
    both(peeked, tmp_path, rng, immediate=True)

    assert min(messages[b"c"], messages[b"A"]) > 0, messages
    held = applied(rows)
    for table in savepoints.TABLES:
        long = "long" if table in savepoints.SHARED else "null"
        found = peeked.execute(f"select id, n, note, {long} from {table}".encode()).fetchall()
        assert held.get(table, Counter()) == Counter(found), table


def test_a_relation_that_a_rolled_back_subtransaction_said_first_is_said_again(
    peeked: psycopg.Connection[Any], tmp_path: Path, rng: random.Random
) -> None:
    peeked.execute(savepoints.SCHEMA.encode())
    with peeked.transaction():
        with peeked.transaction(force_rollback=True):
            peeked.execute("alter table own_0 add column gone int")
            peeked.execute("insert into own_0 select g, g, 'lost', g from generate_series(1, 2000) g")
        peeked.execute("insert into own_0 select g, g, 'kept' from generate_series(1, 2000) g")
    peeked.execute("insert into own_0 values (0, 0, 'next')")

    rows, messages = both(peeked, tmp_path, rng)

    assert [row.image["note"] for row in rows] == ["kept"] * 2000 + ["next"]
    assert all("gone" not in row.image for row in rows)
    assert messages[b"A"] == 1


def test_a_prepared_transaction_is_no_change_until_commit_prepared(
    peeked: psycopg.Connection[Any], tmp_path: Path, rng: random.Random
) -> None:
    peeked.execute(savepoints.SCHEMA.encode())
    gid = peeked.info.dbname
    for low, name, rows in ((0, "small", 1), (10_000, "big", 3000), (20_000, "undone", 3000)):
        peeked.execute("begin")
        peeked.execute("insert into keyed select g, g, %s from generate_series(%s + 1, %s) g", [name, low, low + rows])
        peeked.execute(f"prepare transaction '{gid}_{name}'".encode())

    assert both(peeked, tmp_path, rng)[0] == []
    peeked.execute(f"rollback prepared '{gid}_undone'".encode())
    peeked.execute(f"commit prepared '{gid}_small'".encode())
    assert [row.image["note"] for row in both(peeked, tmp_path, rng)[0]] == ["small"]
    peeked.execute("insert into whole values (1)")
    peeked.execute(f"commit prepared '{gid}_big'".encode())

    rows, _ = both(peeked, tmp_path, rng)

    assert Counter(row.image["note"] for row in rows) == {"small": 1, "big": 3000, None: 1}


def test_rows_around_a_logical_message_come_whole(
    peeked: psycopg.Connection[Any], tmp_path: Path, rng: random.Random
) -> None:
    peeked.execute(savepoints.SCHEMA.encode())
    with peeked.transaction():
        peeked.execute("insert into keyed select g, g from generate_series(1, 1000) g")
        peeked.execute("select pg_logical_emit_message(true, 'mine', repeat('x', 5000))")
        peeked.execute("select pg_logical_emit_message(false, 'mine', 'now')")
        peeked.execute("insert into keyed select g, g from generate_series(1001, 2000) g")

    rows, messages = both(peeked, tmp_path, rng)
    both(peeked, tmp_path, rng, immediate=True)

    assert [(row.image["id"], row.seq) for row in rows] == [(n, n - 1) for n in range(1, 2001)]
    assert messages[b"M"] == 2


def test_a_mark_is_that_of_the_whole_transaction_streamed_or_not(
    peeked: psycopg.Connection[Any], tmp_path: Path, rng: random.Random
) -> None:
    """As cdc writes where it may not set origins: the mark, then rows below savepoints, some of them rolled back."""
    peeked.execute(savepoints.SCHEMA.encode())
    with peeked.transaction():
        peeked.execute("select pg_logical_emit_message(true, 'cdc.origin', 'cdc_crm')")
        for low in range(0, 3000, 1000):
            with peeked.transaction(force_rollback=low == 1000):
                peeked.execute("insert into keyed select g, g from generate_series(%s + 1, %s) g", [low, low + 1000])
    peeked.execute("insert into keyed values (-1, -1)")

    rows, messages = both(peeked, tmp_path, rng)
    both(peeked, tmp_path, rng, immediate=True)

    found = [(row.image["id"], row.seq, row.origin) for row in rows]
    ours = [*range(1, 1001), *range(2001, 3001)]
    assert found == [(n, seq, "cdc_crm") for seq, n in enumerate(ours)] + [(-1, 0, None)]
    assert messages[b"S"] > 1


def test_recorded_streams_with_damage_are_refused_or_become_valid_batches(
    peeked: psycopg.Connection[Any], tmp_path: Path, rng: random.Random
) -> None:
    peeked.execute(savepoints.SCHEMA.encode())
    savepoints.run(peeked.info.dsn, rng, transactions=3, statements=8)
    write_for_certain(peeked)
    for streaming in (False, True):
        recorded = peek(peeked, streaming=streaming)
        outcomes: Counter[str] = Counter()
        for _ in range(40):
            frames = damaged(recorded, rng.choices(KINDS, k=rng.randint(1, 3)), rng)
            try:
                if streaming:
                    portions = decode_streamed(frames, range(0, len(frames), 501), folder=tmp_path / "spool")
                else:
                    portions = decode(frames)
            except ProtocolError:
                outcomes["refused"] += 1
                continue
            for batch in batches_of(portions):
                batch.data.validate(full=True)
            outcomes["read"] += 1
        assert outcomes["refused"] > 0, outcomes
