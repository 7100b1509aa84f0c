"""Schema changes in order with the data: a real server, one daemon, `verify` as the oracle.

Each case is a little history of one table: what it was, what happens to it, and what the lake must say of it after. It
can be played while the daemon streams, while it is down, and inside one transaction that also holds a rolled-back
savepoint, on tables of their own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from deltalake import DeltaTable

from tests.support.daemon import SOURCE, Daemon, execute


@dataclass(frozen=True)
class Case:
    """`{t}` stands for the table's name; `steps` run one after the other, with rows written in between."""

    name: str
    steps: tuple[str, ...]
    kinds: tuple[str, ...]
    create: str = "create table {t} (id int primary key, a int, b text)"
    rows: tuple[str, ...] = field(default=("insert into {t} values ({n}, {n}, 'b{n}')",))
    touch: str = "update {t} set id = id"
    after: str = "update {t} set id = id where id = 1"


BIG_A = "insert into {t} values ({n}, 3000000000, 'b')"
CASES = (
    Case("add_column", ("alter table {t} add c int default 7",), ("add_column",)),
    Case("drop_column", ("alter table {t} drop a",), ("drop_column",)),
    Case("rename_column", ("alter table {t} rename a to c",), ("rename_column",)),
    Case(
        "swap_two_names",
        ("alter table {t} add c int", "update {t} set c = -a", "alter table {t} rename a to x",
         "alter table {t} rename c to a", "alter table {t} rename x to c"),
        ("add_column", "rename_column"),
    ),
    Case("drop_and_add_again", ("alter table {t} drop a", "alter table {t} add a int"), ("add_column", "drop_column")),
    Case("widen", ("alter table {t} alter a type bigint",), ("change_type",), after=BIG_A.replace("{n}", "900")),
    Case("widen_numeric", ("alter table {t} alter n type numeric(14,4)",), ("change_type",),
         create="create table {t} (id int primary key, n numeric(10,2))",
         rows=("insert into {t} values ({n}, {n}.25)",), after="insert into {t} values (900, 123456789.1234)"),
    Case("narrow", ("alter table {t} alter a type smallint",), ("change_type",)),
    Case("narrow_scale", ("alter table {t} alter n type numeric(10,1)",), ("change_type",),
         create="create table {t} (id int primary key, n numeric(10,2))",
         rows=("insert into {t} values ({n}, {n}.25)",)),
    Case("int_to_text", ("alter table {t} alter a type text using 'a' || a",), ("change_type",),
         after="insert into {t} values (900, 'nine', 'b')"),
    Case("text_to_int", ("alter table {t} alter b type int using length(b)",), ("change_type",),
         after="insert into {t} values (900, 9, 9)"),
    Case("there_and_back", ("alter table {t} alter a type text using 'a' || a", "alter table {t} alter a type int"
         " using length(a)"), ("change_type",)),
    Case("widen_the_key", ("alter table {t} alter id type bigint",), ("change_type",),
         after="insert into {t} values (3000000000, 1, 'b')"),
    Case("key_of_another_type", ("alter table {t} alter id type text using 'k' || id",), ("change_type",),
         after="insert into {t} values ('x', 1, 'b')"),
    Case("change_key", ("alter table {t} drop constraint {t}_pkey, add primary key (b)",),
         ("change_key", "change_not_null")),
    Case("key_of_two", ("alter table {t} drop constraint {t}_pkey, add primary key (id, b)",),
         ("change_key", "change_not_null")),
    Case("add_a_key", ("alter table {t} add primary key (id)",), ("change_key", "change_not_null"),
         create="create table {t} (id int, a int, b text)",
         touch="insert into {t} select max(id) + 1, 1, 'x' from {t}", after="update {t} set a = 100 where id = 1"),
    Case("set_not_null", ("alter table {t} alter a set not null",), ("change_not_null",)),
    Case("change_identity", ("alter table {t} replica identity full",), ("change_identity",)),
    Case("rename_and_back", ("alter table {t} rename a to c", "alter table {t} rename c to a"), ("rename_column",)),
    Case("add_then_drop", ("alter table {t} add c int", "alter table {t} drop c"), ("add_column", "drop_column")),
)  # fmt: skip


Wanted = Callable[[str, int], bool]


def started(daemon: Daemon, wanted: Wanted) -> Daemon:
    """With tables for the wanted cases, read and streaming."""
    execute(daemon.dsn, "create table told (id int primary key)", "insert into told values (1)")
    for how in WAYS:
        for i, case in enumerate(CASES):
            if wanted(how, i):
                execute(daemon.dsn, case.create.format(t=f"{how}_{case.name}"))
                fill(daemon.dsn, case, f"{how}_{case.name}", 1, 5)
    return daemon.start().settled()


def fill(dsn: str, case: Case, table: str, first: int, last: int) -> None:
    with psycopg.connect(dsn) as connection:
        for n in range(first, last + 1):
            for row in case.rows:
                connection.execute(row.format(t=table, n=n).encode())


def announced(daemon: Daemon) -> list[dict[str, Any]]:
    path = daemon.lake / SOURCE / "_schema_changes"
    if not any((path / "_delta_log").glob("*.json")):
        return []  # Its folder is there a moment before its first commit.
    return sorted(DeltaTable(path).to_pyarrow_table().to_pylist(), key=lambda r: r["lsn"])


def kinds_of(daemon: Daemon, table: str) -> list[str]:
    return sorted(r["kind"] for r in announced(daemon) if r["table"] == f"public.{table}")


def live(daemon: Daemon, case: Case, table: str) -> None:
    """While the daemon streams."""
    for step in case.steps:
        execute(daemon.dsn, step.format(t=table), case.touch.format(t=table))
    execute(daemon.dsn, case.after.format(t=table))


def down(daemon: Daemon, case: Case, table: str) -> None:
    """While the daemon is down: it meets the messages with the newest catalog."""
    for step in case.steps:
        execute(daemon.dsn, *(text.format(t=table) for text in (case.touch, step, case.touch)))
    execute(daemon.dsn, case.after.format(t=table))


def inside(daemon: Daemon, case: Case, table: str) -> None:
    """Inside a transaction that also takes a change of shape back."""
    touch = case.touch.format(t=table).encode()
    with psycopg.connect(daemon.dsn) as connection:
        connection.execute(touch)
        connection.execute("savepoint s")
        connection.execute(f"alter table {table} add gone int default 5".encode())
        connection.execute(touch)
        connection.execute("rollback to s")
        connection.execute(touch)
        for step in case.steps:
            connection.execute(step.format(t=table).encode())
            connection.execute(touch)
        connection.execute(case.after.format(t=table).encode())


def follow(daemon: Daemon, wanted: Wanted) -> None:
    """Play the wanted cases, each way, and compare."""
    played = [(how, c) for how in WAYS for i, c in enumerate(CASES) if wanted(how, i)]
    for how, case in played:
        if how != "down":
            WAYS[how](daemon, case, f"{how}_{case.name}")
    if any(how == "down" for how, _ in played):
        daemon.stop()
        for how, case in played:
            if how == "down":
                down(daemon, case, f"down_{case.name}")
        daemon.start()
    daemon.settled(120)
    tables = [f"{how}_{case.name}" for how, case in played]
    daemon.verified(*tables, timeout_s=120)
    states = daemon.tables()
    assert {t: states[f"public.{t}"]["reason"] for t in tables if states[f"public.{t}"]["state"] != "streaming"} == {}
    for how, case in played:
        if how == "live":
            assert set(case.kinds) <= set(kinds_of(daemon, f"live_{case.name}")), case.name
    assert not [r for r in announced(daemon) if "gone" in (r["after"] or "")], "what was rolled back never was"


WAYS: dict[str, Callable[[Daemon, Case, str], None]] = {"live": live, "down": down, "inside": inside}


@pytest.mark.matrix
def test_every_change_of_shape_is_followed_and_told_once(tmp_path: Path, database: str) -> None:
    """Each case one way; which one changes from case to case."""

    def wanted(how: str, i: int) -> bool:
        return list(WAYS)[i % 3] == how

    with Daemon(tmp_path, database) as daemon:
        follow(started(daemon, wanted), wanted)
        announcements_stand_once(daemon)


@pytest.mark.slow
def test_every_change_of_shape_is_followed_in_every_way(tmp_path: Path, database: str) -> None:
    def wanted(how: str, i: int) -> bool:
        return list(WAYS)[i % 3] != how

    with Daemon(tmp_path, database) as daemon:
        follow(started(daemon, wanted), wanted)


def announcements_stand_once(daemon: Daemon) -> None:
    """One row with its position and what changed, one count, and nothing more after a restart."""
    execute(daemon.dsn, "alter table told add c int", "insert into told values (2, 2)")
    daemon.settled().verified("told")
    (row,) = [r for r in announced(daemon) if r["table"] == "public.told"]
    assert (row["kind"], row["before"], row["answer"]) == ("add_column", "null", "evolve")
    assert json.loads(row["after"])["name"] == "c"
    assert row["lsn"] > 0
    metric = 'cdc_schema_changes_total{kind="add_column",source="shop",table="public.told"} 1.0'
    assert metric in daemon.http("/metrics")[1]
    daemon.stop()
    daemon.start().settled()
    assert [r["kind"] for r in announced(daemon) if r["table"] == "public.told"] == ["add_column"]


def test_a_shape_that_changed_before_the_disk_was_lost_is_noticed_all_the_same(tmp_path: Path, database: str) -> None:
    """What the lake itself remembers of a table's shape is what a daemon on an empty disk compares with."""
    execute(database, "create table told (id int primary key, a int)", "insert into told values (1, 1)")
    with Daemon(tmp_path, database) as daemon:
        daemon.start().settled().kill()
        shutil.rmtree(daemon.state_dir)
        execute(database, "alter table told alter a type text using 'a' || a", "insert into told values (2, 'two')")
        daemon.start().settled().verified("told")
        assert kinds_of(daemon, "told") == ["change_type"]
        daemon.kill()
        shutil.rmtree(daemon.state_dir)
        execute(database, "insert into told values (3, 'three')")
        daemon.start().settled().verified("told")
        assert kinds_of(daemon, "told") == ["change_type"], "told once"
