"""What replica identities and TOAST do to rows, from the server to `current`: every combination, and every switch.

One daemon serves the module. A snapshot brings half of the rows and the stream the others, then every row meets one
operation; `current` is compared with the table value by value, and by `verify`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from cdc import verify
from cdc.lake.rows import LakeRows
from cdc.table import TableId
from connectors.postgres.embedded import EmbeddedPostgres
from tests.support.daemon import Daemon, execute
from tests.support.postgres import create_database, drop_database
from tests.support.waiting import wait_until

pytestmark = pytest.mark.matrix

STORAGES = ("extended", "external", "main", "plain")
IDENTITIES = {
    "by_default": "",
    "by_index": "alter table {} replica identity using index {}_alt",
    "by_full": "alter table {} replica identity full",
    "by_full_without_key": "alter table {} drop constraint {}_pkey; alter table {} replica identity full",
    "by_nothing": "alter table {} replica identity nothing",
    "by_big_key": "alter table {} drop constraint {}_pkey; alter table {} add primary key (in_external)",
}
PLACEHOLDERS = ("__debezium_unavailable_value", "__cdc_unchanged__", "u", "null", "\\N", "", "(null)", "before.n")
COLUMNS = "id, alt, n, in_extended, in_external, in_main, in_plain"
VALUES = (
    "(select string_agg(md5({0}::text || g), '') from generate_series(1, 400) g),"
    " substr(repeat(md5({0}::text), 60), 1, 1900), repeat(md5('m' || {0}), 100), repeat(md5('p' || {0}), 30)"
)
OPERATIONS = {
    "insert": "",
    "update that leaves them alone": "update {t} set n = n + 100 where id = {id}",
    "twice": "update {t} set n = n + 1 where id = {id}; update {t} set n = n + 1 where id = {id}",
    "update of one": "update {t} set in_external = repeat(md5('new'), 59) || id where id = {id}",
    "update of all": "update {t} set in_extended = repeat('x', 9000), in_external = repeat(md5('y'), 58) || id,"
    " in_main = repeat('z', 5000), in_plain = 'w' where id = {id}",
    "to null": "update {t} set in_extended = null, in_main = null, in_plain = null where id = {id};"
    " update {t} set n = 0 where id = {id}",
    "key change": "update {t} set id = id + 1000, alt = alt || '!' where id = {id}",
    "key change with a new value": "update {t} set id = id + 1000, alt = alt || '!', in_extended = 'short' "
    "where id = {id}",
    "moved twice": "update {t} set id = id + 1000, alt = alt || '!' where id = {id};"
    " update {t} set id = id + 1000, alt = alt || '?', n = 5 where id = {id} + 1000",
    "delete": "delete from {t} where id = {id}",
    "again under its key": "delete from {t} where id = {id}; insert into {t} (id, alt, n, in_external)"
    " values ({id}, 'again {id}', 1, 'again {id}')",
}


def table_sql(name: str, identity: str) -> str:
    storages = ", ".join(f"alter in_{s} set storage {s}" for s in STORAGES)
    return (
        f"create table {name} (id int primary key, alt text not null, n int, in_extended text, in_external text,"
        f" in_main text, in_plain text); alter table {name} {storages};"
        f" create unique index {name}_alt on {name} (alt); {identity.replace('{}', name)}"
    )


def insert_sql(name: str, ids: list[int]) -> str:
    values = VALUES.format("i")
    return f"insert into {name} select i, 'alt ' || i, i, {values} from unnest(array{ids}) i"


SWITCHED = ("default", "using index switched_alt", "full", "nothing")
HEAP = ("using index heap_alt", "full", "nothing")
SETUP = [
    *(table_sql(name, identity) for name, identity in IDENTITIES.items()),
    table_sql("switched", ""),
    table_sql("heap", "alter table heap drop constraint heap_pkey"),
    "create table swapped (k int, text text, constraint swapped_key primary key (k))",
    "insert into swapped select 100 - g, 'row ' || g from generate_series(1, 50) g",
    "create table odd (day date, amount numeric(5,2), at timestamptz, n int, big text, primary key (day, amount, at))",
    "alter table odd alter big set storage external",
    "insert into odd select d::date, a::numeric, t::timestamptz, 0, repeat(md5(d || a || t), 90)"
    " from unnest(array['infinity', '0044-03-15 BC', '2020-02-02']) d,"
    " unnest(array['NaN', '1.5']) a, unnest(array['-infinity', '2020-02-02 00:00+00']) t",
    "create table parted (n int, text text, big text) partition by list (n)",
    "create table parted_a partition of parted for values in (1, 2)",
    "create table parted_b partition of parted default",
    *(f"alter table {t} replica identity full" for t in ("parted", "parted_a", "parted_b")),
    "alter table parted_a alter big set storage external",
    "insert into parted select g % 4, 'same', repeat(md5('b'), 90) from generate_series(1, 40) g",
    "create table torn (n int, text text) partition by list (n)",
    "create table torn_a partition of torn (primary key (text)) default",
    "create table later (n int, text text, price numeric(5,1))",
    "alter table later replica identity full",
    "insert into later select g % 3, 'same', 'NaN' from generate_series(1, 30) g",
    "create table altered (n int, gone text, was text, price numeric(5,1))",
    "alter table altered replica identity full",
    "insert into altered select g % 3, 'x', 'same', 'NaN' from generate_series(1, 30) g",
    "create table plain (n int)",
    'create table "No Key" (n int)',
]


@pytest.fixture(scope="module")
def daemon(server: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    dsn = create_database(server, "rows")
    execute(dsn, *SETUP)
    half = list(range(1, len(OPERATIONS) + 1))
    execute(dsn, *(insert_sql(name, half) for name in (*IDENTITIES, "switched", "heap")))
    with Daemon(tmp_path_factory.mktemp("rows"), dsn) as running:
        yield running.start().settled()
    drop_database(server, "rows")


def refused(db: psycopg.Connection, statement: str) -> bool:
    """Whether Postgres refuses a statement for want of an identity."""
    try:
        db.execute(statement.encode())
    except psycopg.errors.ObjectNotInPrerequisiteState as e:
        if "does not have a replica identity and publishes" not in str(e):
            raise
        return True
    return False


def in_source(daemon: Daemon, table: str, columns: str = COLUMNS) -> list[tuple[Any, ...]]:
    with psycopg.connect(daemon.dsn) as connection:
        return sorted(connection.execute(f"select {columns} from {table}".encode()).fetchall(), key=str)


def in_lake(daemon: Daemon, table: str, columns: str = COLUMNS) -> list[tuple[Any, ...]]:
    rows = daemon.ask("query", f"select {columns} from shop.{table}").document["rows"]
    return sorted(map(tuple, rows), key=str)


@pytest.mark.parametrize("table", IDENTITIES)
def test_every_operation_keeps_big_values_under_every_identity_and_storage(daemon: Daemon, table: str) -> None:
    with psycopg.connect(daemon.dsn, autocommit=True) as db:
        refuses = set()
        for number, (name, operation) in enumerate(OPERATIONS.items(), 1):
            refuses.add(name if operation and refused(db, operation.format(t=table, id=number)) else "")
        for number, operation in enumerate(OPERATIONS.values(), 101):
            with db.transaction():
                db.execute(insert_sql(table, [number]).encode())
                if not refuses - {""} and operation:
                    db.execute(operation.format(t=table, id=number).encode())
        for number, text in enumerate(PLACEHOLDERS, 201):
            db.execute(
                f"insert into {table} (id, alt, n, in_external, in_main) values (%s, %s, 1, %s, %s)".encode(),
                [number, f"{text} {number}", f"{text}{number}", text],
            )
            if not refuses - {""}:
                db.execute(f"update {table} set n = 2 where id = %s".encode(), [number])
    changing = {name for name, operation in OPERATIONS.items() if operation}
    assert refuses - {""} == (changing if table == "by_nothing" else set())
    assert daemon.ask("wait").code == 0
    assert in_lake(daemon, table) == in_source(daemon, table)
    daemon.verified(table)


def change(rng: random.Random, table: str, number: int) -> list[str]:
    """Statements that are right under any identity, or refused."""
    some = rng.randrange(1, len(OPERATIONS) + 1)
    return [
        insert_sql(table, [300 + number]),
        f"update {table} set n = n + 1 where id % 3 = {number % 3}",
        f"update {table} set alt = alt || '.' where id = {some}",
        f"update {table} set id = {1000 + number} where id = {some}",
        f"delete from {table} where id = {299 + number}",
        f"update {table} set in_external = 'changed {number}' where id % 5 = {number % 5}",
    ]


@pytest.mark.parametrize(("table", "identities"), [("switched", SWITCHED), ("heap", HEAP)])
@pytest.mark.parametrize("waiting", [True, False], ids=["merged between", "at once"])
def test_every_switch_of_the_identity_keeps_current_equal(
    daemon: Daemon, table: str, identities: tuple[str, ...], waiting: bool, rng: random.Random
) -> None:
    path = _through_all_pairs(identities)
    with psycopg.connect(daemon.dsn, autocommit=True) as db:
        for number, identity in enumerate(path, len(path) * waiting * 2):
            for statement in rng.sample(change(rng, table, number), 6):
                refused(db, statement)
            with db.transaction():
                # Half of a transaction before the switch, half behind it.
                db.execute(insert_sql(table, [500 + number]).encode())
                db.execute(f"alter table {table} replica identity {identity}".encode())
                if "nothing" not in identity:
                    db.execute(f"update {table} set n = -n where id = {500 + number}".encode())
            if waiting and number % 3 == 0:
                daemon.settled()
    daemon.settled()
    wait_until(lambda: daemon.tables()[f"public.{table}"]["state"] == "streaming", message=daemon.log_tail)
    daemon.settled().verified(table)
    assert in_lake(daemon, table) == in_source(daemon, table)


def _through_all_pairs(nodes: tuple[str, ...]) -> list[str]:
    """A walk that goes from each to each other once."""
    left = set(itertools.permutations(nodes, 2))
    walk, stack = [], [nodes[0]]
    while stack:
        step = next((pair for pair in sorted(left) if pair[0] == stack[-1]), None)
        if step is None:
            walk.append(stack.pop())
        else:
            left.remove(step)
            stack.append(step[1])
    return walk[::-1]


def test_keys_that_are_permuted_within_a_transaction_are_all_kept(daemon: Daemon) -> None:
    with psycopg.connect(daemon.dsn) as db:
        db.execute("update swapped set k = k + 1")  # From above: no two ever meet.
        db.execute("update swapped set k = -k where k in (60, 61)")
        db.execute("update swapped set k = 61 where k = -60")
        db.execute("update swapped set k = 60 where k = -61")
        db.execute("update swapped set k = 1000 where k = 70")
        db.execute("update swapped set k = 70 where k = 71")
        db.execute("update swapped set k = 71 where k = 1000")
    daemon.verified("swapped")
    assert in_lake(daemon, "swapped", "k, text") == in_source(daemon, "swapped", "k, text")


def test_keys_that_no_type_holds_are_keys(daemon: Daemon) -> None:
    execute(
        daemon.dsn,
        "update odd set n = n + 1 where day = 'infinity'",
        "update odd set day = '-infinity' where day = 'infinity' and amount = 'NaN'",
        "update odd set at = 'infinity' where day = '0044-03-15 BC' and at = '-infinity'",
        "update odd set amount = 'NaN', day = '0001-01-01 BC' where amount = 1.5 and day = '2020-02-02'",
        "delete from odd where day = 'infinity' and at = '-infinity'",
        "insert into odd values ('infinity', 'NaN', '-infinity', 7, 'new')",
    )
    daemon.verified("odd")
    assert daemon.ask("query", "select count(*), count(big) from shop.odd").document["rows"] == [[12, 12]]


def test_rows_without_a_key_move_between_partitions(daemon: Daemon) -> None:
    one = "ctid = (select min(ctid) from {t} where n = {n}) and tableoid = '{t}'::regclass"
    execute(
        daemon.dsn,
        f"update parted set n = 3 where {one.format(t='parted_a', n=1)}",
        f"update parted set n = 2, text = 'moved' where {one.format(t='parted_b', n=3)}",
        f"update parted set text = null where {one.format(t='parted_a', n=2)}",
        f"delete from parted where {one.format(t='parted_b', n=0)}",
        "insert into parted values (7, 'same', null), (7, 'same', null)",
        f"delete from parted where {one.format(t='parted_b', n=7)}",
    )
    daemon.verified("parted")
    assert in_lake(daemon, "parted", "n, text, big") == in_source(daemon, "parted", "n, text, big")


def test_rows_without_a_key_are_told_apart_in_the_newest_shape_of_their_table(daemon: Daemon) -> None:
    one = "ctid = (select min(ctid) from altered where n = {})"
    execute(
        daemon.dsn,
        f"delete from altered where {one.format(1)}",
        "alter table altered add filled numeric(5,1) default 'NaN', add plain text",
        f"delete from altered where {one.format(1)}",
        f"update altered set filled = 2 where {one.format(2)}",
        "alter table altered rename was to now_is",
        f"update altered set now_is = 'other' where {one.format(2)}",
        "alter table altered drop gone",
        f"delete from altered where {one.format(0)}",
        "insert into altered (n, now_is) values (0, 'same'), (1, 'same')",
        "alter table altered alter n type bigint",
        f"update altered set n = 5000000000 where {one.format(0)}",
    )
    daemon.settled().verified("altered")
    columns = "n, now_is, filled, plain"
    assert len(in_lake(daemon, "altered", columns)) == 29
    execute(daemon.dsn, "update altered set n = n + 1", "delete from altered where n = 3")
    daemon.settled().verified("altered")


def test_verify_undoes_what_its_snapshot_of_a_multiset_does_not_see(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = verify.verify_table

    def with_changes_behind(*args: Any, **more: Any) -> verify.TableReport:
        *rest, await_lake = args

        def changed_and_awaited(table: TableId, lsn: int) -> int:
            execute(daemon.dsn, *changes)
            assert daemon.ask("wait").code == 0
            return int(await_lake(table, lsn))

        return compare(*rest, changed_and_awaited, **more)

    monkeypatch.setattr(verify, "verify_table", with_changes_behind)
    one = "ctid = (select min(ctid) from later where n = 1)"
    changes = [
        f"update later set n = 2, price = 1.5 where {one}",
        f"delete from later where {one}",
        "insert into later values (1, 'same', 'NaN'), (1, 'same', null), (5, null, null)",
        "update later set n = 6, price = 'NaN' where n = 5",
        "delete from later where n = 6",
    ]
    daemon.verified("later")
    assert len(in_source(daemon, "later", "n")) == 31, "the changes have happened"
    with monkeypatch.context() as patch:
        patch.setattr(LakeRows, "unseen_rows", lambda *_: iter(()))
        assert daemon.ask("verify", "later").code == 3, "and would say so if it did not undo them"


def test_check_names_the_updates_that_postgres_will_refuse(daemon: Daemon) -> None:
    findings = [f for f in daemon.ask("check").document["findings"] if f["name"] == "replica identity"]
    told = {f["object"].rpartition(": ")[2]: f for f in findings}
    assert "public.by_default" not in told
    assert "public.by_full" not in told
    assert "multiset" in told["public.by_full_without_key"]["message"]
    assert "multiset" in told["public.parted"]["message"]
    assert "an update or delete stops the table" in told["public.torn"]["message"]
    for table, statement in (
        ("public.plain", 'alter table "public"."plain" add primary key (…); -- or: replica identity full'),
        ("public.No Key", 'alter table "public"."No Key" add primary key (…); -- or: replica identity full'),
        ("public.by_nothing", 'alter table "public"."by_nothing" replica identity default;'),
    ):
        with psycopg.connect(daemon.dsn, autocommit=True) as db, pytest.raises(psycopg.Error) as error:
            db.execute(b'update "' + table.removeprefix("public.").encode() + b'" set n = 1')
        assert str(error.value).splitlines()[0] in told[table]["message"]
        assert told[table]["fix"] == statement
