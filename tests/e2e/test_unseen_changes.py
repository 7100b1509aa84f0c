"""What changes rows and publishes nothing is noticed, answered and told; `verify` is the oracle. Real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import psycopg
import pytest
from deltalake import DeltaTable

from tests.support.daemon import SOURCE, Daemon, execute
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

    def all(self) -> dict[str, tuple[str, str, str] | None]:
        found = {t.removeprefix("public."): facts["finding"] for t, facts in self.daemon.tables().items()}
        return {t: (f["kind"], f["answer"], f["at"]) if f else None for t, f in found.items()}

    def of(self, table: str) -> tuple[str, str, str] | None:
        return self.all().get(table)

    def after(self, statements: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, str]]:
        """Run the statements of each table, wait until something new is told about each, and until it is answered;
        kind and answer per table."""
        before = self.all()
        for of_table in statements.values():
            execute(self.daemon.dsn, *of_table)

        def all_new() -> bool:
            now = self.all()
            return all(now[table] not in (None, before.get(table)) for table in statements)

        wait_until(all_new, message=self.daemon.log_tail)
        now = self.all()
        self.daemon.settled().verified(*statements)
        return {table: found[:2] for table in statements if (found := now[table])}

    def nothing_after(self, table: str, *statements: str) -> None:
        """After these, a whole look later, nothing new is told about any other table than the fence."""
        before = {**self.all(), "fence": None}
        execute(self.daemon.dsn, *statements)
        self.fences += 1
        self.after({"fence": (f"alter table fence add c{self.fences} int",)})
        assert {**self.all(), "fence": None} == before, statements
        self.daemon.verified(table)


@pytest.fixture
def daemon(tmp_path: Path, database: str) -> Daemon:
    execute(database, *TABLES)
    # Before 18 a stream stands still where the publication did not exist when it was written.
    return Daemon(tmp_path, database, source={**SOON, "on_slot_lost": "resync"})


def test_changes_without_events_are_noticed_and_answered_while_it_streams(daemon: Daemon) -> None:
    dsn, publication = daemon.dsn, daemon.slot
    with daemon:
        told = Told(daemon.start().settled())
        assert told.after(
            {
                "plain": ("alter table plain add c int default 7",),
                "small": ("alter table small alter n type int using n + 1",),
                "moods": ("alter type mood rename value 'fine' to 'good'",),
                "root": ("truncate leaf_a",),
            }
        ) == {
            "plain": ("columns", "computed"),
            "small": ("rewrite", "resync"),
            "moods": ("values", "resync"),
            "root": ("rewrite", "resync"),
        }
        rows = daemon.ask("query", "select count(*) from shop.plain where c = 7").document["rows"]
        assert rows == [[300]], "the old rows' value is in the catalog"
        told.nothing_after(
            "plain",
            "alter table plain alter c set default 9",
            "vacuum full plain",
            "cluster small using small_pkey",
            "truncate small",
            "insert into small values (7, 7)",
            "alter type mood add value 'great'",
            "create table leaf_c partition of root for values from (200) to (300)",
            "insert into root values (250, 'in c')",
            # In one transaction: nobody sees it before it is attached.
            "begin; create table leaf_d (like root including all);"
            " alter table root attach partition leaf_d for values from (300) to (400); commit",
        )
        execute(dsn, "insert into root values (350, 'in d')")
        assert told.after(
            {
                "plain": ("alter table plain add d float default random()",),
                "moods": ("alter type pair add attribute c int",),
                "root": ("alter table root detach partition leaf_b", "update leaf_b set v = 'quiet'"),
                "small": (
                    f"alter publication {publication} drop table small",
                    "insert into small values (1000, 1000)",
                    f"alter publication {publication} add table small",
                ),
            }
        ) == {
            "plain": ("rewrite", "resync"),
            "moods": ("values", "resync"),
            "root": ("partitions", "resync"),
            "small": ("publication", "resync"),
        }
        assert told.after(
            {
                "plain": ("alter table plain alter note type jsonb using to_jsonb(note)",),
                "root": ("alter table root attach partition leaf_b for values from (100) to (200)",),
            }
        ) == {"plain": ("type", "resync"), "root": ("partitions", "resync")}
        daemon.verified()


@pytest.mark.slow
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
        wait_until(lambda: told.of("root"), message=daemon.log_tail)
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
        wait_until(lambda: told.of("small"), message=daemon.log_tail)
        daemon.settled().verified()
        assert told.of("small")[:2] == ("publication", "resync")  # type: ignore[index]
        rows = daemon.ask("query", "select count(*) from shop.plain where d = 5").document["rows"]
        assert rows == [[290]]


def test_a_resync_begins_behind_what_the_stream_still_brings_from_before_the_change(daemon: Daemon) -> None:
    """Rows that were written before a partition was detached are not met again by the resync that answers it."""
    dsn = daemon.dsn
    with daemon:
        told = Told(daemon.start().settled())
        with psycopg.connect(dsn) as connection:
            row = connection.execute("select active_pid from pg_replication_slots where slot_name = %s", [daemon.slot])
            (sender,) = row.fetchone() or (0,)
        os.kill(sender, signal.SIGSTOP)
        try:
            execute(
                dsn,
                "delete from root where id < 150",
                "insert into root select g, 'late' from generate_series(100, 120) g",
                "alter table root detach partition leaf_b",
            )
            wait_until(lambda: told.of("root"), message=daemon.log_tail)
            waits = "waits for the stream to reach what it answers"
            wait_until(lambda: (daemon.tables()["public.root"]["snapshot"] or {}).get("reason") == waits)
            why = daemon.tables()["public.root"]["snapshot"]["why"]
            assert why.startswith("partitions were attached or detached")
        finally:
            os.kill(sender, signal.SIGCONT)
        daemon.settled().verified("root")
        assert daemon.ask("query", "select count(*) from shop.root").document["rows"] == [[0]]


@pytest.mark.slow
def test_an_answer_that_was_under_way_when_the_disk_was_lost_is_not_forgotten(daemon: Daemon) -> None:
    with daemon:
        daemon.start().settled()
        assert daemon.stop() == 0
        execute(
            daemon.dsn, "alter table small alter n type int using n + 1", "alter type mood rename value 'sad' to 'blue'"
        )
        # The fingerprints of now are in the lake, the rows are not.
        daemon.start(failpoints="backfill.after_snapshot=kill").ended(60)
        shutil.rmtree(daemon.state_dir)
        daemon.start().settled()
        daemon.verified()
        anchor = json.loads((daemon.lake / "shop/_cdc/source.json").read_text())
        wait_until(lambda: not json.loads((daemon.lake / "shop/_cdc/source.json").read_text())["needs_resync"])
        assert anchor["epoch"] == 1


@pytest.mark.slow
def test_a_table_dropped_and_made_again_is_not_lost_with_all_signals_green(daemon: Daemon) -> None:
    dsn, publication = daemon.dsn, daemon.slot

    def state(table: str) -> str:
        found = daemon.tables().get(f"public.{table}")
        return str(found["state"]) if found else ""

    with daemon:
        told = Told(daemon.start().settled())
        again = (
            "drop table small",
            "create table small (id int primary key, n int)",
            "insert into small values (1, 1)",
        )
        assert told.after({"small": again}) == {"small": ("recreated", "resync")}
        assert daemon.ask("query", "select count(*) from shop.small").document["rows"] == [[1]]
        execute(dsn, "create table newcomer (id int primary key)", "insert into newcomer values (1)")
        wait_until(lambda: state("newcomer") == "streaming", message=daemon.log_tail)
        daemon.settled().verified("newcomer")

        # What somebody takes out of the publication stays out, and the statement that mends it is shown.
        execute(dsn, f"alter publication {publication} drop table plain", "update plain set n = 0")
        wait_until(lambda: state("plain") == "removed", message=daemon.log_tail)
        told.nothing_after("moods", "select 1")
        removed = daemon.tables()["public.plain"]
        add = f'alter publication "{publication}" add table "public"."plain"'
        assert (removed["state"], removed["hint"]) == ("removed", add)
        assert daemon.source()["unpublished"] == [{"table": "public.plain", "fix": add}]
        assert told.after({"plain": (removed["hint"],)}) == {"plain": ("publication", "resync")}
        assert daemon.source()["unpublished"] == []

        # A publication that is not ours is not touched, and what is told of a table that is gone is what is so now.
        execute(
            dsn, f"comment on publication {publication} is 'mine'", f"alter publication {publication} drop table plain"
        )
        wait_until(lambda: state("plain") == "removed", message=daemon.log_tail)
        execute(dsn, "drop table plain", "create table plain (a int)")
        dropped = "it was dropped; another table has its name now, which is not published"
        wait_until(lambda: daemon.tables()["public.plain"]["reason"] == dropped, message=daemon.log_tail)
        told.nothing_after("moods", "select 1")
        removed = daemon.tables()["public.plain"]
        assert (removed["state"], removed["reason"], removed["hint"]) == ("removed", dropped, add)
        execute(dsn, removed["hint"], "insert into plain values (1), (1)")
        wait_until(lambda: state("plain") == "streaming", message=daemon.log_tail)
        daemon.settled().verified()


def test_event_triggers_make_the_daemon_look_at_once_and_go_with_teardown(daemon: Daemon) -> None:
    daemon.configure(f"source.{SOURCE}", watch_every_s=3600)
    shown = daemon.ask("setup", "--ddl-events", "--dry-run").document["sources"][SOURCE]
    assert [s for s in shown if s.startswith("create event trigger")] == [
        f"create event trigger {name} on {event} execute function cdc.ddl_event()"
        for name, event in (
            ("cdc_ddl_end", "ddl_command_end"),
            ("cdc_ddl_drop", "sql_drop"),
            ("cdc_ddl_rewrite", "table_rewrite"),
        )
    ]
    assert daemon.ask("setup", "--ddl-events").code == 0
    assert daemon.ask("setup", "--ddl-events").document["sources"][SOURCE] == []
    with daemon:
        told = Told(daemon.start().settled())
        assert told.after(
            {
                "moods": ("alter type mood rename value 'fine' to 'good'",),
                "root": ("alter table root detach partition leaf_b",),
                "small": ("begin; alter table small alter n type int using n + 1; drop table fence; commit",),
            }
        ) == {"moods": ("values", "resync"), "root": ("partitions", "resync"), "small": ("rewrite", "resync")}
        wait_until(lambda: daemon.tables()["public.fence"]["state"] == "removed", message=daemon.log_tail)
        assert daemon.stop() == 0
    assert daemon.ask("teardown", "--yes").code == 0
    with psycopg.connect(daemon.dsn) as connection:
        left = connection.execute("select count(*) from pg_event_trigger").fetchone()
    assert left == (0,)


@pytest.mark.slow
def test_readers_never_see_a_resync_under_load_half_done_or_going_back(daemon: Daemon) -> None:
    dsn, publication = daemon.dsn, daemon.slot
    execute(dsn, "update small set n = 0")
    daemon.configure(f"source.{SOURCE}", chunk_rows=7)
    with daemon:
        told = Told(daemon.start().settled())
        done = threading.Event()

        def count_up() -> None:
            with psycopg.connect(dsn, autocommit=True) as connection:
                while not done.is_set():
                    connection.execute("update small set n = n + 1 where id % 5 = (random() * 4)::int")

        writer = threading.Thread(target=count_up)
        writer.start()
        try:
            for _ in range(2):
                before = told.of("small")
                execute(dsn, f"alter publication {publication} drop table small",
                        f"alter publication {publication} add table small")  # fmt: skip
                wait_until(lambda before=before: told.of("small") != before, message=daemon.log_tail)  # type: ignore[misc]
                daemon.settled()
        finally:
            done.set()
            writer.join()
        daemon.settled().verified("small")
        current = DeltaTable(str(daemon.lake / "shop/public.small/current"))
        seen: dict[int, int] = {}
        for version in range(1, current.version() + 1):
            current.load_as_version(version)
            rows = {r["id"]: r["n"] for r in current.to_pyarrow_table(columns=["id", "n"]).to_pylist()}
            assert (not rows and not seen) or len(rows) == 50, version
            assert all(rows[key] >= n for key, n in seen.items()), version
            seen = rows
        assert current.version() > 5
