"""What changes rows and publishes nothing is noticed, answered and told; `verify` is the oracle. Real processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until

pytestmark = pytest.mark.matrix

SOON = {"watch_every_s": 0.2}

TABLES = [
    "create type mood as enum ('sad', 'fine')",
    "create type pair as (a int, b text)",
    "create domain feeling as mood",
    "create table plain (id int primary key, n int, note text)",
    "insert into plain select g, g, 'note ' || g from generate_series(1, 300) g",
    "create table small (id int primary key, n int)",
    "insert into small select g, g from generate_series(1, 50) g",
    "create table moods (id int primary key, m mood, ms mood[], f feeling, p pair)",
    "insert into moods select g, 'fine', '{sad,fine}', 'sad', row(g, 'x'::text)::pair from generate_series(1, 20) g",
    "create table root (id int primary key, v text) partition by range (id)",
    "create table leaf_a partition of root for values from (0) to (100)",
    "create table leaf_b partition of root for values from (100) to (200)",
    "insert into root select g, 'v' || g from generate_series(1, 199) g",
    "create table fence (id int primary key)",
]


class Told:
    """What a daemon has told about the tables so far."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.fences = 0

    def of(self, table: str) -> tuple[str, str, str] | None:
        found = self.daemon.tables()[f"public.{table}"]["finding"]
        return (found["kind"], found["answer"], found["at"]) if found else None

    def after(self, table: str, change: Callable[[], None], *also: str) -> tuple[str, str]:
        """Make a change, wait until something new is told about the table and answered; kind and answer."""
        before = self.of(table)
        change()
        wait_until(lambda: self.of(table) != before, 60, lambda: f"{table}\n{self.daemon.log_tail()}")
        found = self.of(table)
        assert found is not None
        self.daemon.settled().verified(table, *also)
        return found[0], found[1]

    def nothing_after(self, table: str, *statements: str) -> None:
        """After these, a whole look later, nothing new is told about the table, and it is equal to its source."""
        before = self.of(table)
        execute(self.daemon.dsn, *statements)
        self.fences += 1
        self.after("fence", lambda: execute(self.daemon.dsn, f"alter table fence add c{self.fences} int"), table)
        assert self.of(table) == before, statements


@pytest.fixture
def daemon(tmp_path: Path, database: str) -> Daemon:
    execute(database, *TABLES)
    # Before 18 a stream stands still where the publication did not exist when it was written.
    return Daemon(tmp_path, database, source={**SOON, "on_slot_lost": "resync"})


def test_changes_without_events_are_noticed_and_answered_while_it_streams(daemon: Daemon) -> None:
    dsn, publication = daemon.dsn, daemon.slot
    with daemon:
        told = Told(daemon.start().settled())

        def told_after(table: str, *statements: str) -> tuple[str, str]:
            return told.after(table, lambda: execute(dsn, *statements))

        assert told_after("plain", "alter table plain add c int default 7") == ("columns", "computed")
        rows = daemon.ask("query", "select count(*) from shop.plain where c = 7").document["rows"]
        assert rows == [[300]], "the old rows' value is in the catalog"
        told.nothing_after("plain", "alter table plain alter c set default 9", "vacuum full plain")
        assert told_after("small", "alter table small alter n type int using n + 1") == ("rewrite", "resync")
        told.nothing_after("small", "cluster small using small_pkey", "vacuum full small", "truncate small")
        told.nothing_after("plain", "truncate plain", "insert into plain values (1, 1, 'a'), (2, 2, 'b')")
        assert told_after("plain", "alter table plain add d float default random()") == ("rewrite", "resync")
        assert told_after("plain", "alter table plain alter note type jsonb using to_jsonb(note)") == ("type", "resync")
        assert told_after("moods", "alter type mood rename value 'fine' to 'good'") == ("values", "resync")
        told.nothing_after("moods", "alter type mood add value 'great'")
        assert told_after("moods", "alter type pair add attribute c int") == ("values", "resync")
        assert told_after("root", "truncate leaf_a") == ("rewrite", "resync")
        assert told_after("root", "alter table root detach partition leaf_b") == ("partitions", "resync")
        execute(dsn, "update leaf_b set v = 'quiet'")
        attach = "alter table root attach partition leaf_b for values from (100) to (200)"
        assert told_after("root", attach) == ("partitions", "resync")
        told.nothing_after(
            "root",
            "create table leaf_c partition of root for values from (200) to (300)",
            "insert into root values (250, 'in c')",
            # In one transaction: nobody sees it before it is attached.
            "begin; create table leaf_d (like root including all);"
            " alter table root attach partition leaf_d for values from (300) to (400); commit",
        )
        told.nothing_after("root", "insert into root values (350, 'in d')")
        out_and_in = (
            f"alter publication {publication} drop table plain",
            "insert into plain (id, n) values (1000, 1000)",
            f"alter publication {publication} add table plain",
        )
        assert told_after("plain", *out_and_in) == ("publication", "resync")


def test_what_happened_while_the_daemon_was_down_is_noticed_also_on_an_empty_disk(daemon: Daemon) -> None:
    dsn, publication = daemon.dsn, daemon.slot
    with daemon:
        daemon.start().settled()
        assert daemon.stop() == 0
        execute(
            dsn,
            "alter table plain add c text default 'old'",
            "alter table small alter n type int using -n",
            "alter type mood rename value 'sad' to 'blue'",
            "truncate leaf_b",
        )
        daemon.start().settled()
        told = Told(daemon)
        wait_until(lambda: told.of("root"), 60, daemon.log_tail)
        daemon.settled().verified()
        assert [told.of(t)[:2] for t in ("plain", "small", "moods", "root")] == [  # type: ignore[index]
            ("columns", "computed"),
            ("rewrite", "resync"),
            ("values", "resync"),
            ("rewrite", "resync"),
        ]

        assert daemon.stop() == 0
        shutil.rmtree(daemon.state_dir)
        execute(dsn, "alter table plain add d int default 5", f"drop publication {publication}")
        with psycopg.connect(dsn) as connection:
            connection.execute("update small set n = 0")
            connection.execute("delete from plain where id <= 10")
        names = "plain, small, moods, root, fence"
        execute(
            dsn,
            f"create publication {publication} for table {names} with (publish_via_partition_root = true)",
        )
        daemon.start().settled()
        wait_until(lambda: told.of("small"), 60, daemon.log_tail)
        daemon.settled().verified()
        assert told.of("small")[:2] == ("publication", "resync")  # type: ignore[index]
        rows = daemon.ask("query", "select count(*) from shop.plain where d = 5").document["rows"]
        assert rows == [[290]]
