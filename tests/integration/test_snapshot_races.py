"""Snapshots against writers, each race made real: what the stream never carries, what is logged and not visible yet,
what changes while a chunk is read. Each test names the rule of docs/snapshots.md whose breach it would show.

The stream is held back by stopping the walsender's process, so that a chunk is read while the log stands still; nothing
here depends on who is faster.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from deltalake import DeltaTable

from tests.support.daemon import Daemon, execute
from tests.support.postgres import private_server
from tests.support.waiting import wait_until
from tests.support.witness import Witness, assert_exactly_once, changelog
from tests.support.workload import SCHEMA, TABLES, Workload


@contextmanager
def stream_held(daemon: Daemon) -> Iterator[None]:
    """Nothing comes over the stream while the block runs."""
    with psycopg.connect(daemon.dsn, autocommit=True) as connection:

        def active() -> int:
            row = connection.execute(
                "select active_pid from pg_replication_slots where slot_name = %s", [daemon.slot]
            ).fetchone()
            return row[0] if row and row[0] else 0

        pid = wait_until(active, 60, "the walsender")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def checksums_are_read(daemon: Daemon, since: str) -> None:
    """Wait until `verify` has hashed all rows in a snapshot that it took after `since`, and keeps it open."""
    with psycopg.connect(daemon.dsn, autocommit=True) as connection:
        wait_until(
            lambda: connection.execute(
                "select from pg_stat_activity where application_name = 'cdc verify' and datname = current_database()"
                " and query like '%%pg_relation_size%%' and state = 'idle in transaction' and query_start > %s", [since]
            ).fetchone() is not None,
            60,
            lambda: f"checksums to be read\n{daemon.log_tail()}",
        )  # fmt: skip


def chunk_is_read(daemon: Daemon, since: str) -> None:
    """Wait until a snapshot that began after `since` (the server's clock) has been read and closed."""
    with psycopg.connect(daemon.dsn, autocommit=True) as connection:
        wait_until(
            lambda: connection.execute(
                "select from pg_stat_activity where application_name = 'cdc snapshot' and datname = current_database()"
                " and query ilike 'rollback%%' and state = 'idle' and query_start > %s", [since]
            ).fetchone() is not None,
            60,
            lambda: f"a chunk to be read\n{daemon.log_tail()}",
        )  # fmt: skip


def clock(dsn: str) -> str:
    with psycopg.connect(dsn) as connection:
        row = connection.execute("select clock_timestamp()::text").fetchone()
    assert row
    return str(row[0])


def in_session(dsn: str, *statements: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def reason(daemon: Daemon, table: str) -> str:
    """Why the table's snapshot waits."""
    snapshot = daemon.tables().get(table, {}).get("snapshot")
    return str(snapshot["reason"]) if snapshot else ""


# ---- before the first snapshot -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True], ids=["open", "prepared"])
def test_rule_0_who_wrote_before_the_table_was_published_is_waited_for(
    prepared: bool, tmp_path: Path, database: str
) -> None:
    """The stream never carries a change that was made before its table was in the publication."""
    execute(database, "create table early (id int primary key)", "create table late (id int primary key, text text)")
    with Daemon(tmp_path, database, source={"tables": ["public.*"]}) as daemon:
        execute(database, f"create publication {daemon.slot} for table early")
        daemon.start().settled()
        daemon.stop()
        with psycopg.connect(database) as writer:
            writer.execute("insert into late values (1, 'before')")
            if prepared:
                writer.execute("prepare transaction 'late'")
            execute(database, f"alter publication {daemon.slot} add table late", "insert into late values (2, 'after')")
            daemon.start().streaming()
            why = wait_until(lambda: reason(daemon, "public.late"), 60, "the snapshot to wait")
            assert "waits for older transactions" in why
            assert (f"pid {writer.info.backend_pid}" if not prepared else "prepared transaction late") in why
            if prepared:
                writer.rollback()
                execute(database, "commit prepared 'late'")
            else:
                writer.commit()
        daemon.settled().verified()
        rows = daemon.ask("query", "select id, text from shop.late order by id").document["rows"]
        assert rows == [[1, "before"], [2, "after"]]


# ---- logged, and not visible -------------------------------------------------------------------------------------


def test_rule_1_a_commit_that_waits_for_a_standby_is_not_undone_by_a_chunk(tmp_path: Path) -> None:
    """Its WAL is streamed and logged while no snapshot sees it: a chunk would bring back the older row, for good."""
    with private_server(tmp_path / "postgres") as server:
        dsn = server.dsn()
        execute(
            dsn, "create table t (id int primary key, n int)", "insert into t select g, 0 from generate_series(1, 9) g"
        )
        with Daemon(tmp_path / "daemon", dsn) as daemon:
            daemon.start().settled()
            execute(dsn, "alter system set synchronous_standby_names = 'nobody'", "select pg_reload_conf()")
            with psycopg.connect(dsn, autocommit=True) as look:
                wait_until(lambda: look.execute("show synchronous_standby_names").fetchone() == ("nobody",), 60)
                # Returns when the standby has answered: not before we say so.
                commit = "set synchronous_commit = on", "update t set n = 1 where id = 5"
                writer = threading.Thread(target=in_session, args=(dsn, *commit), daemon=True)
                writer.start()
                # Asked of the lake, not of the log: what has landed leaves the log at once.
                row = "select n from shop.t where id = 5"
                wait_until(lambda: daemon.ask("query", row).document["rows"] == [[1]], 60, "the change to be streamed")
                assert look.execute("select n from t where id = 5").fetchone() == (0,), "the commit is not visible"
                daemon.ask("resync", "t")
                wait_until(lambda: "become visible" in reason(daemon, "public.t"), 60, "the snapshot to wait")
                execute(dsn, "alter system reset synchronous_standby_names", "select pg_reload_conf()")
                writer.join(60)
                assert look.execute("select n from t where id = 5").fetchone() == (1,)
            daemon.settled().verified()
            assert daemon.ask("query", row).document["rows"] == [[1]]


# ---- while a chunk is read ---------------------------------------------------------------------------------------

BIG = "repeat(md5({}::text), 100)"
SEEN = [
    "update t set id = 101 where id = 1",  # moves, and leaves its big value alone …
    f"insert into t values (1, 0, {BIG.format(1001)})",  # … and another row takes the old key
    "update t set id = 102 where id = 2",
    "delete from t where id = 6",
    "delete from t where id = 7",
    "update t set n = 1 where id = 8",
    "update t set id = 109 where id = 9",
    f"update t set big = {BIG.format(1010)} where id = 10",
    "update t set id = 111 where id = 11",
    f"update t set big = {BIG.format(1011)} where id = 111",
]
UNSEEN = [
    "update t set id = 202 where id = 102",
    "update t set id = 103 where id = 3",
    f"insert into t values (3, 0, {BIG.format(1003)})",
    "update t set n = 1 where id = 4",
    "delete from t where id = 5",
    f"insert into t values (7, 0, {BIG.format(1007)})",
    "update t set id = 108 where id = 8",
    "update t set id = 9 where id = 109",
    "update t set id = 110 where id = 10",
    "update t set id = 10 where id = 12",
    "update t set id = 211 where id = 111",
    "update t set id = 313, n = 5 where id = 13",
    "delete from t where id = 313",
    f"insert into t values (13, 1, {BIG.format(1013)})",
    "update t set n = n + 1",
]


@pytest.mark.parametrize("identity", ["default", "full"])
def test_rules_6_and_8_keys_that_move_around_a_chunk_keep_their_big_values(
    identity: str, tmp_path: Path, database: str
) -> None:
    """Changes that the chunk's snapshot has seen come on the stream after it was read, and so do those that it has not:
    also moves of keys whose big value no message carries."""
    execute(
        database,
        "create table t (id int primary key, n int, big text)",
        "alter table t alter big set storage external",
        f"alter table t replica identity {identity}",
        f"insert into t select g, 0, {BIG.format('g')} from generate_series(1, 40) g",
    )
    with Daemon(tmp_path, database) as daemon:
        daemon.start().settled()
        with stream_held(daemon):
            for statement in SEEN:
                execute(database, statement)
            since = clock(database)
            daemon.ask("resync", "t")
            chunk_is_read(daemon, since)
            for statement in UNSEEN:
                execute(database, statement)
        daemon.settled().verified()


def test_rule_11_what_is_truncated_rewritten_or_altered_while_a_chunk_is_read_is_read_again(
    tmp_path: Path, database: str
) -> None:
    execute(
        database,
        "create table t (id int primary key, n int, text text)",
        "insert into t select g, g, 'text ' || g from generate_series(1, 300) g",
    )
    with Daemon(tmp_path, database, source={"chunk_rows": 100}) as daemon:
        daemon.start().settled()
        for anew, statements in (
            (False, ["truncate t", "insert into t select g, 1, 'after truncate' from generate_series(50, 250) g"]),
            (True, ["vacuum full t", "update t set n = n + 1 where id % 3 = 0"]),
            (True, ["alter table t alter n type int using n * 2", "update t set n = n + 1 where id % 5 = 0"]),
            (True, ["alter table t add extra int default 7", "update t set n = n + 1 where id % 7 = 0"]),
            (True, ["alter table t drop text", "insert into t select g, g from generate_series(1000, 1010) g"]),
            (False, ["truncate t"]),
        ):
            # Its look at the catalog answers what the round before has left to be noticed: while the stream is held,
            # nothing could be.
            assert daemon.ask("resync", "t", "--wait").code == 0
            before = daemon.log_tail(1000).count("starts anew")
            with stream_held(daemon):
                # The chunk has seen this, so it waits for the stream before it is appended.
                execute(database, "update t set n = n + 1 where id < 60")
                since = clock(database)
                daemon.ask("resync", "t")
                chunk_is_read(daemon, since)
                execute(database, *statements)
            daemon.settled().verified()
            # A truncated chunk is read again; of another shape or another file, the whole run is.
            assert (daemon.log_tail(1000).count("starts anew") > before) == anew, statements


def test_snapshots_under_load_end_equal(tmp_path: Path, database: str, rng: random.Random) -> None:
    """Rules 6 to 12 at once: small chunks, a busy source, a first snapshot and a resync of every table."""
    execute(database, *SCHEMA.split(";\n"))
    with Daemon(tmp_path, database, source={"chunk_rows": 200}) as daemon:
        assert daemon.ask("setup").code == 0
        witness = Witness(database, f"witness_{daemon.slot}")
        with Workload(database, rng.randrange(1 << 30), pause_s=0.02):
            daemon.start().settled()
            assert daemon.ask("resync", *TABLES).code == 0
            daemon.settled()
        daemon.settled().verified()
        assert assert_exactly_once(witness, daemon.lake, TABLES) > 100
        for table in TABLES:
            rows = changelog(daemon.lake, table, columns=("_op", "_run", "_raw", "_epoch", "_lsn", "_seq"))
            ends = [dict(r["_raw"])["event"] for r in rows.to_pylist() if r["_op"] == "s"]
            assert ends.count("end") >= 2, f"{table}: {ends}"


def test_a_snapshot_whose_connections_die_goes_on_at_its_last_chunk(tmp_path: Path, database: str) -> None:
    execute(
        database,
        "create table t (id int primary key, n int)",
        "insert into t select g, g from generate_series(1, 8000) g",
    )

    def rows_read() -> int:
        table = daemon.tables().get("public.t", {"state": "new", "snapshot": None})
        if table["state"] == "streaming":
            return 8_000
        return int(table["snapshot"]["rows"]) if table["snapshot"] else 0

    with Daemon(tmp_path, database, source={"chunk_rows": 100}) as daemon:
        daemon.start().streaming()
        cut = 0
        for bound in (1_000, 3_000, 5_000):
            wait_until(lambda bound=bound: rows_read() >= bound, 60, "the snapshot to get there")
            with psycopg.connect(database, autocommit=True) as connection:
                cut += connection.execute(
                    "select count(pg_terminate_backend(pid)) from pg_stat_activity"
                    " where application_name = 'cdc snapshot' and datname = current_database()"
                ).fetchone()[0]
        daemon.settled().verified()
        assert cut >= 1, "the snapshot was over before its connection could be cut"
        # One run, whose rows were read once each.
        runs = changelog(daemon.lake, "public.t", columns=("_op", "_run", "_epoch", "_lsn", "_seq")).to_pylist()
        assert len({r["_run"] for r in runs}) == 1
        assert sum(r["_op"] == "r" for r in runs) == 8_000


# ---- the end of a run --------------------------------------------------------------------------------------------


def test_rule_13_a_resync_removes_ghosts_and_readers_never_see_a_hole(tmp_path: Path, database: str) -> None:
    execute(
        database,
        "create table t (id int primary key, n int)",
        "insert into t select g, g from generate_series(1, 500) g",
    )
    with Daemon(tmp_path, database, source={"chunk_rows": 20}) as daemon:
        daemon.start().settled()
        # What a lost change would look like: the source's row is gone, and the stream never says so.
        daemon.stop()
        ghost = daemon.lake / "shop" / "public.t" / "current"
        DeltaTable(str(ghost)).update(updates={"id": "id + 1000"}, predicate="id <= 3")
        daemon.start().streaming()
        answer = daemon.ask("verify", "t")
        assert answer.code == 3
        report = answer.document["tables"][0]
        assert (sorted(report["missing"]), sorted(report["extra"])) == (["1", "2", "3"], ["1001", "1002", "1003"])

        assert daemon.ask("resync", "t").code == 0
        counts = set()

        def over() -> bool:
            counts.add(DeltaTable(str(ghost)).to_pyarrow_table(columns=["id"]).num_rows)
            return daemon.tables()["public.t"]["snapshot"] is None

        wait_until(over, 60, "the resync to end")
        daemon.settled().verified()
        assert min(counts) >= 500, f"a reader saw {sorted(counts)} rows"


# ---- verify ------------------------------------------------------------------------------------------------------


def test_verify_leaves_out_what_its_snapshot_does_not_see_by_transaction_not_by_position(
    tmp_path: Path, database: str
) -> None:
    """A transaction that is open when the snapshot is taken has an id between those of others that it sees."""
    execute(
        database, "create table t (id int primary key, n int)", "insert into t select g, 0 from generate_series(1, 9) g"
    )
    with Daemon(tmp_path, database, lake={"land_every_s": 2}) as daemon:
        daemon.start().settled()
        for _ in range(3):
            with (
                psycopg.connect(database) as early,
                psycopg.connect(database) as held,
                psycopg.connect(database) as late,
            ):
                early.execute("update t set n = n + 1 where id = 1")
                held.execute("update t set n = n + 1 where id = 2")
                late.execute("update t set n = n + 1 where id = 3")
                early.commit()
                late.commit()
                # Verify reads its snapshot, then waits for the lake; meanwhile the held one commits.
                since = clock(database)
                with stream_held(daemon):
                    verify = daemon.begin("verify", "t", "--timeout", "60")
                    checksums_are_read(daemon, since)
                    held.commit()
                answer = verify()
                assert answer.code == 0, answer
