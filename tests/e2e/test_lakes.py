"""Tables that may not leave their region stand in a lake of their own: nothing of them is written anywhere else.

The oracle of what is where is the directories themselves; of what is in it, `verify`.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from connectors.s3.store import S3Store
from tests.support.buckets import new_bucket, s3_endpoint
from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until
from tests.support.workload import SCHEMA, TABLES, Workload

POINTS = (
    "places.before_note", "land.before_commit", "land.between_tables", "land.after_cut", "backfill.after_snapshot",
    "backfill.after_chunk", "merge.before_commit", "confirm.after_anchor",
)  # fmt: skip
"""Where the daemon is killed while tables move at random."""


@pytest.fixture
def tables(database: str) -> str:
    execute(
        database,
        "create schema hr",
        "create table hr.person (id int primary key, name text)",
        "insert into hr.person select g, 'Person ' || g from generate_series(1, 300) g",
        "create table orders (id int primary key, person int, note text)",
        "insert into orders select g, g % 300 + 1, 'Order ' || g from generate_series(1, 300) g",
    )
    return database


def regional(directory: Path, dsn: str) -> Daemon:
    daemon = Daemon(directory, dsn)
    daemon.configure("lake.eu", url="eu")
    daemon.configure("source.shop.lakes", **{'"hr.*"': "eu"})
    return daemon


def folders(lake: Path) -> set[str]:
    """What stands below the source in a lake."""
    return {path.name for path in (lake / "shop").iterdir()} if (lake / "shop").exists() else set()


def anchor(daemon: Daemon) -> dict[str, Any]:
    return dict(json.loads((daemon.lake / "shop/_cdc/source.json").read_text()))


def objects(lake: Path) -> dict[str, int]:
    return {str(p.relative_to(lake)): p.stat().st_mtime_ns for p in lake.rglob("*") if p.is_file()}


def is_up(daemon: Daemon) -> bool:
    """Whether this very process streams."""
    found = daemon.ask("status").document
    return bool("daemon" in found and found["daemon"]["pid"] == daemon.pid and daemon.source()["phase"] == "streaming")


def storage_classes(store: S3Store, prefix: str) -> dict[str, set[str]]:
    """Classes of the objects below a prefix, by the last part of their names."""
    found: dict[str, set[str]] = {}
    for stored in store.list(prefix):
        head = store._client.head_object(Bucket=store._bucket, Key=store._name(stored.key))
        found.setdefault(stored.key.rpartition(".")[2], set()).add(head.get("StorageClass", "STANDARD"))
    return found


@pytest.mark.slow
def test_a_table_lives_in_its_own_lake_and_one_that_moves_is_read_anew_there(tmp_path: Path, tables: str) -> None:
    eu = tmp_path / "eu"
    with regional(tmp_path, tables) as daemon:
        daemon.start().settled().verified()
        assert folders(eu) == {"hr.person"}
        assert folders(daemon.lake) == {"public.orders", "_cdc"}
        joined = daemon.ask("query", 'select count(*) from shop.orders o join shop."hr.person" p on o.person = p.id')
        assert joined.document["rows"] == [[300]]
        assert {t["table"] for t in daemon.ask("lake", "ls").document["tables"]} == {"hr.person", "public.orders"}
        assert daemon.stop() == 0
        execute(tables, "update orders set note = 'while nobody looked' where id = 7")
        left = objects(daemon.lake / "shop" / "public.orders")
        daemon.configure('source.shop.table."public.orders"', lake="eu")
        daemon.start().settled().verified()
        assert folders(eu) == {"hr.person", "public.orders"}
        assert objects(daemon.lake / "shop" / "public.orders") == left, "what was left is left alone"
        runs = daemon.ask("query", "select count(distinct _run) from shop.orders_changelog where _op = 'r'")
        assert runs.document["rows"] == [[1]]
        told = [f for f in daemon.ask("check").document["findings"] if f["name"] == "left behind"]
        assert [f["object"] for f in told] == ["source.shop: public.orders"]
        assert str(daemon.lake) in told[0]["fix"]


@pytest.mark.slow
def test_a_table_that_is_renamed_out_of_its_lake_stops_before_a_row_of_it_leaves(tmp_path: Path, tables: str) -> None:
    with regional(tmp_path, tables) as daemon:
        daemon.start().settled()
        execute(
            tables,
            "alter table hr.person set schema public",
            "update person set name = 'Person X' where id = 1",
        )
        wait_until(lambda: daemon.tables().get("public.person", {}).get("state") == "stopped", message=daemon.log_tail)
        stopped = daemon.tables()["public.person"]
        assert "was called hr.person" in stopped["reason"]
        assert '[source.shop.table."public.person"]' in stopped["hint"]
        assert folders(daemon.lake) <= {"public.orders", "_cdc", "_schema_changes"}
        assert daemon.stop() == 0
        daemon.configure('source.shop.table."public.person"', lake="eu")
        daemon.start().settled().verified()
        assert "public.person" in folders(tmp_path / "eu")
        assert "public.person" not in folders(daemon.lake)


@pytest.mark.slow
def test_there_and_back_with_the_disk_lost_each_time_loses_nothing(tmp_path: Path, tables: str) -> None:
    """What the old place has looks whole to whoever knows only that place; the anchor knows better, also when the move
    before is long done."""
    with regional(tmp_path, tables) as daemon:
        daemon.configure("source.shop", watch_every_s=0.2)
        daemon.start().settled()
        for number, lake in enumerate(("eu", "main", "eu", "main")):
            wait_until(lambda: anchor(daemon)["needs_resync"] == [], message=daemon.log_tail)
            assert daemon.stop() == 0
            if number != 1:
                shutil.rmtree(daemon.state_dir)
            daemon.configure('source.shop.table."public.orders"', lake=lake)
            execute(tables, f"update orders set note = 'in {lake} {number}' where id % 4 = {number}")
            daemon.start().settled().verified()
            execute(tables, f"delete from orders where id = {100 + number}")
            daemon.settled()
        daemon.verified()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stream", "snapshot"])
def test_a_table_that_is_renamed_out_of_the_main_lake_stops_too(tmp_path: Path, tables: str, mode: str) -> None:
    with regional(tmp_path, tables) as daemon:
        if mode == "snapshot":
            daemon.configure("source.shop", mode=mode, every="1s", slot=None, publication=None)
        daemon.start().settled()
        execute(tables, "alter table orders set schema hr", "update hr.orders set note = 'X' where id = 1")
        wait_until(lambda: daemon.tables().get("hr.orders", {}).get("state") == "stopped", message=daemon.log_tail)
        assert "was called public.orders" in daemon.tables()["hr.orders"]["reason"]
        assert folders(tmp_path / "eu") == {"hr.person"}


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["kept", "lost"])
def test_a_new_main_lake_beside_one_that_is_kept_reads_everything_anew(tmp_path: Path, tables: str, disk: str) -> None:
    """The kept changelogs know more of positions, and of leases, than the new main lake."""
    with regional(tmp_path, tables) as daemon:
        for _ in range(2):
            daemon.start().settled()
            assert daemon.stop() == 0
        if disk == "lost":
            shutil.rmtree(daemon.state_dir)
        daemon.configure("lake", url="lake2")
        daemon.lake = tmp_path / "lake2"
        execute(tables, "update hr.person set name = 'Person X' where id = 1")
        daemon.start().settled()
        execute(tables, "update hr.person set name = 'Person Y' where id = 1")
        daemon.settled().verified()
        assert anchor(daemon)["epoch"] == 2


@pytest.mark.slow
def test_a_move_that_dies_in_the_middle_is_done_by_the_next_start(tmp_path: Path, tables: str) -> None:
    with regional(tmp_path, tables) as daemon:
        daemon.start().settled()
        assert daemon.stop() == 0
        daemon.configure('source.shop.table."public.orders"', lake="eu")
        for number in range(2):
            execute(tables, f"update orders set note = 'again' where id % 2 = {number}")
            assert daemon.start(failpoints="places.before_note=kill").ended() == -signal.SIGKILL
        daemon.start(failpoints="backfill.after_chunk=kill").ended()
        execute(tables, "delete from orders where id = 8")
        daemon.start().settled().verified()
        runs = daemon.ask("query", "select count(distinct _run) from shop.orders_changelog where _op = 'r'")
        assert runs.document["rows"] == [[1]]


@pytest.mark.slow
def test_a_snapshot_that_was_half_done_in_one_lake_is_done_whole_in_the_other(tmp_path: Path, tables: str) -> None:
    """Chunks of it are in the old place, others in the log: nobody may take the end of it for a whole table."""
    execute(tables, "insert into orders select g, 0, 'Order ' || g from generate_series(1000, 4000) g")
    with regional(tmp_path, tables) as daemon:
        daemon.configure("source.shop", chunk_rows=100, readers=1)
        daemon.start(failpoints="backfill.after_chunk=kill:12").ended()
        assert folders(daemon.lake) >= {"public.orders"}
        daemon.configure('source.shop.table."public.orders"', lake="eu")
        daemon.start().settled().verified()
        runs = daemon.ask("query", "select count(distinct _run) from shop.orders_changelog where _op = 'r'")
        assert runs.document["rows"] == [[1]]


@pytest.mark.slow
def test_a_table_that_is_compared_periodically_moves_too(tmp_path: Path, tables: str) -> None:
    with Daemon(
        tmp_path, tables, source={"mode": "snapshot", "every": "1h", "slot": None, "publication": None}
    ) as daemon:
        daemon.configure("lake.eu", url="eu")
        daemon.start().settled()
        assert daemon.stop() == 0
        execute(tables, "update hr.person set name = 'Person X' where id % 2 = 0")
        daemon.configure("source.shop.lakes", **{'"hr.*"': "eu"})
        daemon.start().settled().verified()
        assert folders(tmp_path / "eu") == {"hr.person"}


@pytest.mark.slow
def test_lakes_in_two_buckets_and_a_class_of_storage_for_one_table(tmp_path: Path, tables: str) -> None:
    endpoint = s3_endpoint()
    urls = {name: f"s3://{new_bucket()}/{name}" for name in ("main", "eu")}
    stores = {name: S3Store.from_url(url, {"endpoint_url": endpoint}) for name, url in urls.items()}
    execute(tables, "create table archive (id int primary key)", "insert into archive values (1)")
    with Daemon(tmp_path, tables, lake={"url": urls["main"], "endpoint_url": endpoint}) as daemon:
        daemon.configure("lake.eu", url=urls["eu"], endpoint_url=endpoint)
        daemon.configure("lake.ia", url=urls["main"], endpoint_url=endpoint)
        daemon.configure("lake.ia.options", storage_class="STANDARD_IA")
        daemon.configure("source.shop.lakes", **{'"hr.*"': "eu", '"*.archive"': "ia"})
        daemon.start().settled().verified()
        there = {name: {o.key.split("/")[1] for o in store.list("shop/")} for name, store in stores.items()}
        assert there == {"main": {"_cdc", "public.orders", "public.archive"}, "eu": {"hr.person"}}
        classes = storage_classes(stores["main"], "shop/public.archive/")
        assert classes["parquet"] == {"STANDARD_IA"}
        assert storage_classes(stores["main"], "shop/public.orders/")["parquet"] == {"STANDARD"}
        joined = daemon.ask("query", 'select count(*) from shop.orders o join shop."hr.person" p on o.person = p.id')
        assert joined.document["rows"] == [[300]]
        assert daemon.stop() == 0
        shutil.rmtree(daemon.state_dir)
        daemon.configure('source.shop.table."public.orders"', lake="eu")
        execute(tables, "delete from orders where id = 8", "update hr.person set name = 'Person X' where id = 1")
        daemon.start().settled().verified()
        assert {o.key.split("/")[1] for o in stores["eu"].list("shop/")} == {"hr.person", "public.orders"}


@pytest.mark.slow
def test_a_lake_that_is_away_holds_its_source_until_its_tables_are_paused(tmp_path: Path, tables: str) -> None:
    eu, away = tmp_path / "eu", tmp_path / "away"
    with regional(tmp_path, tables) as daemon:
        daemon.start().settled()
        eu.rename(away)
        eu.write_text("no directory")
        execute(tables, "update hr.person set name = 'Person X' where id = 1", "update orders set note = 'X'")
        wait_until(lambda: "hr.person" in daemon.source()["error"], message=daemon.log_tail)
        assert daemon.ask("pause", "hr.person").code == 0
        daemon.settled().verified("public.orders")
        assert daemon.stop() == 0
        execute(tables, "update orders set note = 'Y'")
        daemon.start().settled().verified("public.orders")
        eu.unlink()
        away.rename(eu)
        assert daemon.ask("resume", "hr.person").code == 0
        daemon.settled().verified()


@pytest.mark.slow
def test_tables_that_move_at_random_under_traffic_kills_and_lost_disks_are_equal_in_the_end(
    tmp_path: Path, database: str, rng: random.Random
) -> None:
    execute(database, *SCHEMA.split(";\n"))
    with Daemon(tmp_path, database, source={"chunk_rows": 150, "confirm_every_s": 0.3}) as daemon:
        assert daemon.ask("setup").code == 0
        for lake in ("eu", "us"):
            daemon.configure(f"lake.{lake}", url=lake)
        with Workload(database, rng.randrange(1 << 30), pause_s=0.05) as workload:
            for _ in range(8):
                for table in rng.sample(TABLES, 2):
                    daemon.configure(f'source.shop.table."{table}"', lake=rng.choice(("main", "eu", "us")))
                point = f"{rng.choice(POINTS)}=kill:{rng.randrange(1, 4)}"
                daemon.start(failpoints=point)
                wait_until(lambda: not daemon.alive or is_up(daemon), 120, daemon.log_tail)
                until = workload.committed + 30
                wait_until(lambda until=until: not daemon.alive or workload.committed > until, 60, "traffic")
                if daemon.alive:
                    daemon.kill()
                if rng.random() < 0.3:
                    shutil.rmtree(daemon.state_dir, ignore_errors=True)
            daemon.start().streaming(120)
            workload.stop()
        daemon.settled().verified()
        assert not any("_cdc" in folders(tmp_path / lake) for lake in ("eu", "us"))
