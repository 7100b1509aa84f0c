"""A daemon keeps its changelogs in few objects while it works, and everybody reads on."""

from __future__ import annotations

from pathlib import Path

import pytest
from deltalake import DeltaTable

from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until
from tests.support.witness import Witness, assert_exactly_once


def objects(daemon: Daemon, table: str) -> int:
    return len(DeltaTable(str(daemon.lake / "shop" / table / "changelog")).file_uris())


def on_disk(daemon: Daemon, table: str) -> int:
    return len(list((daemon.lake / "shop" / table / "changelog").glob("_date=*/*.parquet")))


@pytest.mark.slow
def test_small_objects_are_joined_while_changes_come_and_no_reader_misses_a_row(tmp_path: Path, database: str) -> None:
    execute(
        database,
        "create table t (id int primary key, n int)",
        "create table heap (n int)",
        "alter table heap replica identity full",
        "insert into heap select g % 3 from generate_series(1, 30) g",
    )
    lake = {"compact_every_s": 0.2, "land_every_s": 0.05, "merge_every_s": 0.05}
    with Daemon(tmp_path, database, lake=lake) as daemon:
        daemon.start().settled()
        witness = Witness(database, f"witness_{daemon.slot}")
        for n in range(12):
            execute(
                database, f"insert into t values ({n}, 0)", f"update heap set n = n + 1 where ctid = '(0,{n % 20})'"
            )
            daemon.ask("wait")
        wait_until(lambda: objects(daemon, "public.t") < 10, message=daemon.log_tail)
        daemon.settled().verified()
        assert on_disk(daemon, "public.t") > 12, "readers of older versions still have theirs"

        for table in ("public.t", "public.heap"):
            (answer,) = daemon.ask("lake", "compact", table).document["tables"]
            assert answer["table"] == table
            assert objects(daemon, table) == 1
        shown = daemon.ask("query", "select count(*) from shop.t_changelog where _op = 'c'").document["rows"]
        assert shown == [[12]]
        assert assert_exactly_once(witness, daemon.lake, ["public.t", "public.heap"]) > 12

        removed = daemon.ask("lake", "vacuum").document["tables"]
        assert {t["table"]: t["removed"] for t in removed} == {"public.heap": 0, "public.t": 0}, (
            "they are not old enough"
        )
        daemon.kill()
        daemon.start()
        execute(database, "update heap set n = 0", "delete from t where id < 10")
        daemon.settled().verified()
        assert daemon.ask("query", "select count(*) from shop.t_changelog where _op = 'd'").document["rows"] == [[10]]
        assert assert_exactly_once(witness, daemon.lake, ["public.t", "public.heap"]) > 22
