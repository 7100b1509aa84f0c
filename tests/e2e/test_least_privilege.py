"""The whole story under roles without superuser: exactly the grants of docs/operations.md, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until


@contextmanager
def roles(dsn: str) -> Iterator[str]:
    """Make roles beginning with this name; they go with everything that they own."""
    name = f"least_{conninfo_to_dict(dsn)['dbname']}"
    try:
        yield name
    finally:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename like %s",
                               [name + "%"])  # fmt: skip
            for (role,) in connection.execute(
                "select rolname from pg_roles where rolname like %s", [name.replace("_", "\\_") + "%"]
            ).fetchall():
                connection.execute(f"drop owned by {role} cascade; drop role {role}".encode())


def tell_story(daemon: Daemon, owner_dsn: str) -> None:
    """check, setup, snapshot, stream, resync, verify, wait, heartbeat, status, teardown."""
    assert [f for f in daemon.ask("check").document["findings"] if f["severity"] == "error"] == []
    assert daemon.ask("setup").code == 0
    with daemon:
        daemon.start().settled().verified()
        execute(owner_dsn, "insert into orders values (3, 'streamed')", "update orders set note = 'new' where id = 1",
                "delete from orders where id = 2", "truncate notes")  # fmt: skip
        daemon.settled().verified()
        assert daemon.ask("resync", "orders", "--wait").code == 0
        daemon.verified()
        # The server's WAL grows and nothing of it is ours: the heartbeat is allowed, too.
        execute(owner_dsn, "create table noise (text text)")
        execute(owner_dsn, "insert into noise select repeat(md5(g::text), 100) from generate_series(1, 2000) g")
        daemon.settled()
        source = daemon.source()
        assert (source["slot"]["exists"], source["error"]) == (True, "")
        assert source["slot"]["retained_bytes"] is not None
        assert source["slot"]["wal_dir_bytes"] is None, "that needs pg_monitor"
        assert "permission denied" not in daemon.log_path.read_text()
        assert daemon.stop() == 0
    assert daemon.ask("teardown").code == 0
    assert daemon.source()["slot"]["exists"] is False


@pytest.mark.matrix
def test_with_replication_and_select_and_a_publication_of_the_owner(tmp_path: Path, database: str) -> None:
    slot = f"cdc_{conninfo_to_dict(database)['dbname']}"
    execute(
        database,
        "create table orders (id int primary key, note text)",
        "create table notes (id int primary key)",
        "insert into orders values (1, 'old'), (2, 'gone')",
        "insert into notes values (1)",
    )
    with roles(database) as role:
        execute(
            database,
            f"create role {role} login replication",
            f"grant usage on schema public to {role}",
            f"grant select on all tables in schema public to {role}",
            f"create publication {slot} for table orders, notes",
        )
        mine = make_conninfo(database, user=role)
        tell_story(Daemon(tmp_path, mine, source={"tables": ["public.orders", "public.notes"]}), database)
        with psycopg.connect(database) as connection:
            assert connection.execute("select pubname from pg_publication").fetchall() == [(slot,)], "not ours to drop"


@pytest.mark.slow
@pytest.mark.matrix
def test_with_create_on_the_database_and_tables_of_its_own(tmp_path: Path, database: str) -> None:
    with roles(database) as role:
        name = conninfo_to_dict(database)["dbname"]
        execute(
            database,
            f"create role {role} login replication",
            f"grant create on database {name} to {role}",
            f"grant create, usage on schema public to {role}",
        )
        mine = make_conninfo(database, user=role)
        execute(
            mine,
            "create table orders (id int primary key, note text)",
            "create table notes (id int primary key)",
            "insert into orders values (1, 'old'), (2, 'gone')",
            "insert into notes values (1)",
        )
        tell_story(Daemon(tmp_path, mine, source={"tables": ["public.orders", "public.notes"]}), mine)
        with psycopg.connect(database) as connection:
            assert connection.execute("select pubname from pg_publication").fetchall() == []


@pytest.mark.slow
def test_pg_monitor_shows_the_size_of_pg_wal_and_row_security_keeps_a_table_out_aloud(
    tmp_path: Path, database: str
) -> None:
    slot = f"cdc_{conninfo_to_dict(database)['dbname']}"
    execute(
        database,
        "create table orders (id int primary key)",
        "create table hidden (id int primary key)",
        "insert into orders values (1)",
        "insert into hidden values (1)",
        "alter table hidden enable row level security",
    )
    with roles(database) as role:
        execute(
            database,
            f"create role {role} login replication",
            f"grant pg_monitor to {role}",
            f"grant select on all tables in schema public to {role}",
            f"create publication {slot} for table orders, hidden",
        )
        with Daemon(tmp_path, make_conninfo(database, user=role)) as daemon:
            daemon.start().streaming()
            wait_until(
                lambda: daemon.tables().get("public.hidden", {}).get("state") == "stopped", message=daemon.tables
            )
            assert "row-level security" in daemon.tables()["public.hidden"]["reason"]
            assert daemon.source()["slot"]["wal_dir_bytes"] > 0
            execute(database, f"alter role {role} bypassrls")
            assert daemon.ask("resync", "hidden", "--wait").code == 0
            daemon.settled().verified()
