"""What has landed shows at once, although merges are rare; and a query shows one instant, whatever merges."""

from __future__ import annotations

import threading
from pathlib import Path

import duckdb
import psycopg
import pytest

from tests.support.buckets import new_bucket, s3_endpoint
from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until

SEEN = "select id, note, length(body) from shop.orders order by id"


def no_longer_asked_to_merge(daemon: Daemon, database: str) -> str:
    """Whoever waited for a merge may have asked for the next cut's too. The note of order 1 that stays merged."""
    one = "select note from shop.orders where id = 1"
    for n in range(10):
        execute(database, f"update orders set note = 'old {n}' where id = 1")
        wanted = [[f"old {n}"]]
        wait_until(lambda wanted=wanted: daemon.ask("query", one).document["rows"] == wanted, message=daemon.log_tail)
        merged = daemon.ask("query", "--merged", one).document["rows"]
        if merged != wanted:
            execute(database, "update orders set note = 'old' where id = 1")
            return str(merged[0][0])
    raise AssertionError("it merges all the time")


def test_changes_show_as_soon_as_they_have_landed(tmp_path: Path, database: str) -> None:
    execute(
        database,
        "create table orders (id int primary key, note text, body text)",
        "alter table orders alter column body set storage external",
        "insert into orders select g, 'old', repeat('x', 4000) from generate_series(1, 3) g",
    )
    with Daemon(tmp_path, database, lake={"merge_every_s": 3600}) as daemon:
        daemon.start().settled()
        merged_note = no_longer_asked_to_merge(daemon, database)
        execute(
            database,
            "insert into orders values (4, 'new', 'y')",
            "update orders set note = 'changed' where id = 2",
            "delete from orders where id = 3",
        )
        wanted = [[1, "old", 4000], [2, "changed", 4000], [4, "new", 1]]
        wait_until(lambda: daemon.ask("query", SEEN).document["rows"] == wanted, message=daemon.log_tail)
        answer = daemon.ask("query", SEEN)
        assert (answer.document["notes"], answer.notes) == ([], "")
        merged = [[1, merged_note, 4000], [2, "old", 4000], [3, "old", 4000]]
        assert daemon.ask("query", "--merged", SEEN).document["rows"] == merged

        # For whoever asks elsewhere, with the daemon up or down.
        printed = daemon.ask("lake", "sql", "orders").document
        assert (printed["source"], printed["table"], printed["note"]) == ("shop", "public.orders", "")
        daemon.kill()
        for document, rows in (
            (printed, wanted),
            (daemon.ask("lake", "sql", "orders").document, wanted),
            (daemon.ask("lake", "sql", "orders", "--merged").document, merged),
        ):
            found = duckdb.sql(f"select id, note, length(body) from ({document['sql']}) order by id").fetchall()
            assert [list(row) for row in found] == rows
        # And without what the daemon knows.
        (daemon.state_dir / "state.db").rename(tmp_path / "gone")
        assert daemon.ask("query", SEEN).document["rows"] == wanted


@pytest.mark.slow
def test_a_query_is_of_one_instant_while_the_daemon_merges(tmp_path: Path, database: str) -> None:
    """Every transaction moves one unit from a table to another: their sum is always the same."""
    execute(
        database,
        "create table giving (id int primary key, n int)",
        "create table taking (id int primary key, n int)",
        "insert into giving select g, 100 from generate_series(1, 20) g",
        "insert into taking select g, 0 from generate_series(1, 20) g",
    )
    lake = {"land_every_s": 0.05, "merge_every_s": 0.3, "compact_every_s": 0.2}
    with Daemon(tmp_path, database, lake=lake) as daemon:
        daemon.start().settled()
        done = threading.Event()

        def move() -> None:
            with psycopg.connect(database) as connection:
                n = 0
                while not done.is_set():
                    n += 1
                    connection.execute("update giving set n = n - 1 where id = %s", (n % 20 + 1,))
                    connection.execute("update taking set n = n + 1 where id = %s", (n % 20 + 1,))
                    connection.commit()

        mover = threading.Thread(target=move)
        mover.start()
        try:
            sums = "select (select sum(n)::int from shop.giving), (select sum(n)::int from shop.taking)"
            moved = []
            for _ in range(15):
                ((given, taken),) = daemon.ask("query", sums).document["rows"]
                assert given + taken == 2000
                moved.append(taken)
        finally:
            done.set()
            mover.join()
        assert moved == sorted(moved)
        assert moved[-1] > moved[0]


@pytest.mark.slow
def test_changes_in_a_bucket_show_too_and_are_printed_by_their_addresses(tmp_path: Path, database: str) -> None:
    execute(database, "create table orders (id int primary key, note text)", "insert into orders values (1, 'a')")
    url = f"s3://{new_bucket()}/lake"
    lake = {"url": url, "endpoint_url": s3_endpoint(), "merge_every_s": 3600}
    with Daemon(tmp_path, database, lake=lake) as daemon:
        daemon.start().settled()
        no_longer_asked_to_merge(daemon, database)
        printed = daemon.ask("lake", "sql", "orders").document
        assert printed["note"] == ""
        assert f"'{url}/shop/public.orders/current/" in printed["sql"]
        assert f"'{url}/shop/public.orders/changelog/" in printed["sql"]
