"""Transactions that fit into no memory, through a real daemon; streamed by the server and not."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable

from tests.support import savepoints
from tests.support.daemon import SOURCE, Daemon, execute
from tests.support.waiting import wait_until
from tests.support.witness import changelog

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

RSS_MAX_MB = 300


def peak_rss_mb(daemon: Daemon) -> float:
    for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmHWM")


def landed_rows(daemon: Daemon, table: str) -> int:
    path = daemon.lake / SOURCE / f"public.{table}" / "changelog"
    if not DeltaTable.is_deltatable(str(path)):
        return 0
    actions = DeltaTable(str(path)).get_add_actions(flatten=True)
    return sum(actions["num_records"].to_pylist())


def assert_streamed(daemon: Daemon, streaming: str) -> None:
    """Assert that the server streamed transactions of this daemon's slot before their commit, or did not."""
    query = "select stream_txns from pg_stat_replication_slots where slot_name = %s"

    def streamed() -> int:
        with psycopg.connect(daemon.dsn, autocommit=True) as connection:
            row = connection.execute(query, [daemon.slot]).fetchone()
            return int(row[0]) if row else 0

    if streaming == "on":
        wait_until(streamed)
    else:
        assert streamed() == 0


def started(folder: Path, dsn: str, streaming: str) -> Daemon:
    """A daemon that has taken its first snapshots, on a server that streams early."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f"alter database {name} set logical_decoding_work_mem = '1MB'".encode())
    lake = {"land_every_s": 2, "merge_every_s": 3600}
    return Daemon(folder, dsn, source={"streaming": streaming}, lake=lake).start().settled()


@pytest.mark.parametrize("streaming", ["on", "off"])
def test_ten_million_rows_in_one_transaction_pass_in_little_memory(
    database: str, tmp_path: Path, streaming: str
) -> None:
    count = 10_000_000
    execute(database, "create table big (id bigint primary key, n int, note text)")
    with started(tmp_path, database, streaming) as daemon:
        before = landed_rows(daemon, "big")
        execute(database, f"insert into big select g, g % 1000, 'note ' || g from generate_series(1, {count}) g")
        wait_until(lambda: landed_rows(daemon, "big") == before + count, 900, daemon.log_tail)
        peak = peak_rss_mb(daemon)
        assert_streamed(daemon, streaming)
        assert daemon.stop(60) == 0

    rows = changelog(daemon.lake, "public.big", columns=("_op", "_epoch", "_lsn", "_seq", "id"))
    rows = rows.filter(pc.equal(rows.column("_op"), "c"))
    assert len(rows.column("_lsn").unique()) == 1
    ordinals = rows.column("_seq").to_numpy()
    assert (ordinals == range(count)).all()
    assert (rows.column("id").to_numpy() == ordinals + 1).all()
    assert not any((tmp_path / "state" / "tmp" / SOURCE / "stream").glob("*"))
    assert peak < RSS_MAX_MB


@pytest.mark.parametrize("streaming", ["on", "off"])
def test_ten_thousand_savepoints_pass_and_those_rolled_back_leave_nothing(
    database: str, tmp_path: Path, streaming: str
) -> None:
    execute(database, "create table kept (id bigint primary key, note text)")
    program = """
        do $$ begin
          for i in 1..10000 loop
            begin
              insert into kept select i * 100 + g, md5(g::text) from generate_series(1, 20) g;
              if i % 3 = 0 then raise exception 'back'; end if;
            exception when raise_exception then null;
            end;
          end loop;
        end $$
    """
    with started(tmp_path, database, streaming) as daemon:
        before = landed_rows(daemon, "kept")
        execute(database, program)
        wait_until(lambda: landed_rows(daemon, "kept") == before + 6667 * 20, 600, daemon.log_tail)
        peak = peak_rss_mb(daemon)
        assert_streamed(daemon, streaming)

    rows = changelog(daemon.lake, "public.kept", columns=("_op", "_epoch", "_lsn", "_seq", "id"))
    rows = rows.filter(pc.equal(rows.column("_op"), "c"))
    assert rows.column("_seq").to_pylist() == list(range(6667 * 20))
    assert rows.column("id").to_pylist() == [i * 100 + g for i in range(1, 10001) if i % 3 for g in range(1, 21)]
    assert peak < RSS_MAX_MB


@pytest.mark.parametrize("streaming", ["on", "off"])
def test_a_value_of_256_megabytes_passes(database: str, tmp_path: Path, streaming: str) -> None:
    size = 256 << 20
    execute(database, "create table wide (id int primary key, note text)")
    with started(tmp_path, database, streaming) as daemon:
        execute(database, f"insert into wide select 1, repeat('0123456789abcdef', {size // 16})")
        wait_until(lambda: landed_rows(daemon, "wide") > 0 and "c" in ops(daemon), 600, daemon.log_tail)

    rows = changelog(daemon.lake, "public.wide")
    rows = rows.filter(pc.equal(rows.column("_op"), "c"))
    assert pc.binary_length(rows.column("note")).to_pylist() == [size]


def changes(daemon: Daemon, source: str, table: str) -> pa.Table:
    """What the stream brought of a table, columns in the order of their names."""
    rows = changelog(daemon.lake, f"public.{table}", source=source)
    rows = rows.filter(pc.is_in(rows.column("_op"), pa.array(["c", "u", "d", "t"])))
    return rows.select(sorted(rows.column_names)).combine_chunks()


def ops(daemon: Daemon) -> set[str]:
    return set(changelog(daemon.lake, "public.wide", columns=("_op", "_epoch", "_lsn", "_seq"))["_op"].to_pylist())


def test_the_changelogs_of_a_streamed_source_and_of_one_that_is_not_are_the_same_whatever_is_killed(
    database: str, tmp_path: Path, rng: random.Random
) -> None:
    execute(database, *savepoints.SCHEMA.strip().split(";\n"))
    with psycopg.connect(database, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f"alter database {name} set logical_decoding_work_mem = '64kB'".encode())
    other = f'[source.whole]\ndsn = "{database}"\nslot = "whole_{name}"\npublication = "whole_{name}"\n'
    with Daemon(tmp_path, database, source={"streaming": "on"}, more=other) as daemon:
        daemon.start().settled()
        errors: list[Exception] = []

        def write() -> None:
            try:
                for first in (1, 801, 1601):
                    savepoints.run(database, rng, transactions=15, statements=30, first=first)
            except Exception as error:  # noqa: BLE001 - raised in the test
                errors.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        for _ in range(3):
            writer.join(rng.uniform(0.5, 3.0))
            daemon.kill()
            daemon.start().streaming()
        writer.join()
        assert not errors
        daemon.settled().verified()

    for table in savepoints.TABLES:
        streamed, whole = (changes(daemon, source, table) for source in (SOURCE, "whole"))
        assert streamed.num_rows == whole.num_rows
        assert streamed.equals(whole), table
