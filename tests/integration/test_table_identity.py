"""Names that move between tables, contracts, and shapes that change between the chunks of a snapshot.

A table's folder follows its name, its identity is its OID: `current` never shows rows of two tables, whoever has the
name. One daemon serves the module; each story works on tables of its own, and `verify` is the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from deltalake import DeltaTable

from connectors.postgres.embedded import EmbeddedPostgres
from tests.support.daemon import SOURCE, Daemon, execute, in_one
from tests.support.postgres import create_database, drop_database
from tests.support.waiting import wait_until

PAIRS = ("live", "inside", "down")
CONTRACTS = """
[source.shop.table."public.frozen"]
on_schema_change = "freeze"
[source.shop.table."public.frozen_type"]
on_schema_change = "freeze"
[source.shop.table."public.strict"]
on_schema_change = "stop"
"""


@pytest.fixture(scope="module")
def daemon(server: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    dsn = create_database(server, "table_identity")
    execute(dsn, "create schema other")
    for name in (
        *(f"{side}_{how}" for how in PAIRS for side in ("left", "right")),
        "moved",
        "wanders",
        "again",
        "here",
        "there",
    ):
        execute(
            dsn,
            f"create table {name} (id int primary key, a int, whose text)",
            f"insert into {name} select g, g, '{name}' from generate_series(1, 20) g",
        )
    for name in ("frozen", "frozen_type", "strict"):
        execute(
            dsn,
            f"create table {name} (id int primary key, a int, b text)",
            f"insert into {name} select g, g, 'b' from generate_series(1, 5) g",
        )
    execute(dsn, "create table wide (id int primary key, a int, b text)")
    more = {"watch_every_s": 0.5, "chunk_rows": 40}
    with Daemon(tmp_path_factory.mktemp("identity"), dsn, source=more, more=CONTRACTS) as running:
        yield running.start().settled()
    drop_database(server, "table_identity")


def owners(daemon: Daemon, table: str) -> set[str]:
    """Whose rows `current` shows under a name, in every version that it ever had."""
    path = daemon.lake / SOURCE / table / "current"
    newest = DeltaTable(path).version()
    found: set[str] = set()
    for version in range(1, newest + 1):
        shown = DeltaTable(path, version=version).to_pyarrow_table(columns=["whose"])
        whose = set(shown.column("whose").to_pylist())
        assert len(whose) <= 1, f"version {version} of {table} shows rows of {whose}"
        found |= whose
    return found


def followed(daemon: Daemon, *tables: str) -> None:
    """Equal to the source, once what was ordered has been read."""
    wait_until(
        lambda: {daemon.tables().get(t, {}).get("state") for t in tables} == {"streaming"},
        message=lambda: f"{daemon.tables()}\n{daemon.log_tail()}",
    )
    daemon.settled().verified(*tables)


def kinds(daemon: Daemon, table: str) -> list[str]:
    path = daemon.lake / SOURCE / "_schema_changes"
    begun = any((path / "_delta_log").glob("*.json"))  # its folder is there a moment before
    rows = DeltaTable(path).to_pyarrow_table().to_pylist() if begun else []
    return [r["kind"] for r in sorted(rows, key=lambda r: r["lsn"]) if r["table"] == table]


def swap(how: str) -> list[str]:
    return [
        f"update left_{how} set a = -a where id < 5",
        f"alter table left_{how} rename to between_{how}",
        f"alter table right_{how} rename to left_{how}",
        f"alter table between_{how} rename to right_{how}",
        f"update left_{how} set a = a + 1 where id = 1",
        f"delete from right_{how} where id = 2",
    ]


@pytest.mark.matrix
@pytest.mark.parametrize("how", PAIRS)
def test_two_tables_that_swap_their_names_are_never_mixed(daemon: Daemon, how: str) -> None:
    if how == "down":
        daemon.stop()
    (in_one if how == "inside" else lambda dsn, steps: execute(dsn, *steps))(daemon.dsn, swap(how))
    if how == "down":
        daemon.start()
    tables = [f"public.left_{how}", f"public.right_{how}"]
    wait_until(
        lambda: all("replace_table" in kinds(daemon, t) for t in tables),
        message=lambda: f"{kinds(daemon, tables[0])}\n{daemon.log_tail()}",
    )
    followed(daemon, *tables)
    for table, sides in zip(tables, (("left", "right"), ("right", "left")), strict=True):
        assert owners(daemon, table) == {f"{s}_{how}" for s in sides}


def test_a_renamed_table_goes_on_under_its_new_name_and_the_old_one_stays(daemon: Daemon) -> None:
    execute(daemon.dsn, "update moved set a = 100 where id = 1", "alter table moved rename to moved_on")
    execute(daemon.dsn, "insert into moved_on values (100, 1, 'moved')")
    followed(daemon, "public.moved_on")
    state = wait_until(lambda: (t := daemon.tables()["public.moved"])["state"] == "removed" and t)
    assert "public.moved_on" in state["reason"]
    assert daemon.ask("query", "select count(*) from shop.moved").document["rows"] == [[20]]


def test_a_table_that_takes_its_old_name_again_is_read_anew(daemon: Daemon) -> None:
    execute(
        daemon.dsn,
        "alter table wanders set schema other",
        "update other.wanders set a = 7 where id = 7",
        "alter table other.wanders set schema public",
        "update wanders set a = 8 where id = 8",
    )
    wait_until(lambda: "rename_table" in kinds(daemon, "public.wanders"), message=daemon.log_tail)
    followed(daemon, "public.wanders")


def test_two_tables_that_swap_names_and_swap_back_between_two_looks_are_read_anew(daemon: Daemon) -> None:
    """No look at the catalog sees it, and no later change tells: what came under the other name is missed here."""
    swap_both = (
        "alter table here rename to nowhere",
        "alter table there rename to here",
        "alter table nowhere rename to there",
    )
    in_one(
        daemon.dsn, [*swap_both, "update there set a = 7 where id = 7", "delete from there where id = 9", *swap_both]
    )
    wait_until(lambda: daemon.log_tail(1000).count("it was called public.there") >= 1, message=daemon.log_tail)
    followed(daemon, "public.here", "public.there")
    assert daemon.ask("query", "select a from shop.here where id in (7, 9)").document["rows"] == [[7]]


def test_a_table_made_anew_under_its_name_replaces_the_old_one_at_the_end_of_its_run(daemon: Daemon) -> None:
    in_one(
        daemon.dsn,
        [
            "drop table again",
            "create table again (id int primary key, a int, whose text)",
            f"alter publication {daemon.slot} add table again",
            "insert into again select g, -g, 'new' from generate_series(1, 30) g",
        ],
    )
    execute(daemon.dsn, "update again set a = 0 where id = 1")
    wait_until(
        lambda: daemon.ask("query", "select count(*) from shop.again").document["rows"] == [[30]],
        message=daemon.log_tail,
    )
    followed(daemon, "public.again")
    assert owners(daemon, "public.again") == {"again", "new"}


def shown(daemon: Daemon, table: str) -> list[dict[str, Any]]:
    found = DeltaTable(daemon.lake / SOURCE / f"public.{table}" / "current").to_pyarrow_table().to_pylist()
    rows = [{k: v for k, v in r.items() if not k.startswith("_")} for r in found]
    return sorted(rows, key=lambda r: r["id"])


def stopped(daemon: Daemon, table: str) -> dict[str, Any]:
    return wait_until(
        lambda: (t := daemon.tables()[f"public.{table}"])["state"] == "stopped" and t, message=daemon.log_tail
    )


def test_a_frozen_table_keeps_its_columns_and_takes_what_fits(daemon: Daemon) -> None:
    execute(
        daemon.dsn,
        "alter table frozen add c int default 3",
        "alter table frozen rename b to renamed",
        "insert into frozen values (6, 6, 'six', 6)",
        "alter table frozen drop a",
        "update frozen set renamed = 'one' where id = 1",
        "insert into frozen values (7, 'seven', 7)",
    )
    wait_until(lambda: "drop_column" in kinds(daemon, "public.frozen"), message=daemon.log_tail)
    rows = shown(daemon.settled(), "frozen")
    assert rows[0] == {"id": 1, "a": None, "b": "one"}
    assert rows[1] == {"id": 2, "a": 2, "b": "b"}, "a row that nothing changed has what it had"
    assert rows[5:] == [{"id": 6, "a": 6, "b": "six"}, {"id": 7, "a": None, "b": "seven"}]
    left_out = 'cdc_columns_left_out{source="shop",table="public.frozen"} 1.0'
    wait_until(lambda: left_out in daemon.http("/metrics")[1], message=daemon.log_tail)
    assert daemon.tables()["public.frozen"]["state"] == "streaming"


def test_a_type_that_does_not_fit_stops_a_frozen_table_until_it_is_accepted(daemon: Daemon) -> None:
    execute(
        daemon.dsn, "alter table frozen_type alter a type text using 'a' || a", "delete from frozen_type where id = 5"
    )
    assert "changed its type" in stopped(daemon, "frozen_type")["reason"]
    assert [r["a"] for r in shown(daemon, "frozen_type")] == [1, 2, 3, 4, 5]
    assert daemon.ask("resync", "frozen_type").code == 0
    followed(daemon, "public.frozen_type")
    assert [r["a"] for r in shown(daemon, "frozen_type")] == ["a1", "a2", "a3", "a4"]


def test_a_strict_table_stops_at_any_change_and_a_resync_accepts_it(daemon: Daemon) -> None:
    execute(daemon.dsn, "alter table strict add c int", "insert into strict values (6, 6, 'six', 6)")
    state = stopped(daemon, "strict")
    assert "add_column" in state["reason"]
    assert "cdc resync public.strict" in state["hint"]
    assert daemon.ask("resync", "strict").code == 0
    followed(daemon, "public.strict")
    assert kinds(daemon, "public.strict") == ["add_column", "add_column"], "stopped, then accepted"
    execute(daemon.dsn, "alter table strict drop c", "delete from strict where id = 6")
    assert "drop_column" in stopped(daemon, "strict")["reason"], "only that one change was accepted"
    assert daemon.ask("resync", "strict").code == 0
    followed(daemon, "public.strict")


ALTERS: tuple[Callable[[int], str], ...] = (
    lambda n: f"alter table wide add c{n} int default {n}",
    lambda n: f"alter table wide rename a to a{n}" if n == 1 else "alter table wide alter b type varchar(90)",
    lambda n: f"alter table wide drop c{n - 2}",
)


def test_a_table_that_is_altered_between_the_chunks_of_its_snapshot_is_read_anew(daemon: Daemon) -> None:
    execute(daemon.dsn, "insert into wide select g, g, 'b' from generate_series(1, 2000) g")
    daemon.settled()
    assert daemon.ask("resync", "wide").code == 0
    with psycopg.connect(daemon.dsn, autocommit=True) as connection:
        for n, alter in enumerate(ALTERS):
            begun = wait_until(lambda: daemon.tables()["public.wide"]["snapshot"], message=daemon.log_tail)
            wait_until(
                lambda run=begun["run"]: (
                    (s := daemon.tables()["public.wide"]["snapshot"]) is None or s["run"] != run or s["chunks"] > 2
                ),
                message=daemon.log_tail,
            )
            connection.execute(alter(n).encode())
            connection.execute(f"update wide set id = id where id % 7 = {n}".encode())
            if daemon.tables()["public.wide"]["snapshot"] is None:
                assert daemon.ask("resync", "wide").code == 0
    followed(daemon, "public.wide")
