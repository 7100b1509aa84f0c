"""Real Postgres servers for tests: one shared server with a database per test, and private ones to break.

The server is started once per run. Each test that asks for `database` gets an empty database of its own, and all
that it leaves at the server (sessions, slots, prepared transactions, replication origins) is removed after it.
"""

from __future__ import annotations

import atexit
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from connectors.postgres.embedded import THROWAWAY, EmbeddedPostgres
from tests.support.waiting import wait_until

ROOMY: Mapping[str, str | int] = {
    "max_wal_senders": 50,
    "max_replication_slots": 50,
    "max_connections": 200,
    "max_prepared_transactions": 20,
    "shared_buffers": "32MB",
}

_numbers = itertools.count(1)


def private_server(directory: Path, *, port: int = 0, fresh: bool = False, **settings: str | int) -> EmbeddedPostgres:
    """A server that a test may stop, crash and reconfigure; use it as a context manager. Those that are not `fresh`
    share one system identifier, as copies of one data directory do."""
    server = EmbeddedPostgres(
        directory, port=port, settings={**THROWAWAY, **ROOMY, **settings}, reuse_template=not fresh
    )
    atexit.register(_remove_relocated, server)
    return server


def _remove_relocated(server: EmbeddedPostgres) -> None:
    """Data that had to lie outside the test's directory are not removed with it."""
    if server.data.is_symlink():
        server.remove()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """The shared server: don't stop it, don't change its settings."""
    with private_server(tmp_path_factory.mktemp("postgres")) as shared:
        yield shared


@pytest.fixture
def database(server: EmbeddedPostgres) -> Iterator[str]:
    """DSN of an empty database on the shared server, dropped after the test with everything that hangs on it."""
    name = f"test_{next(_numbers)}"
    create_database(server, name)
    yield server.dsn(name)
    drop_database(server, name)


def create_database(server: EmbeddedPostgres, name: str) -> str:
    """Make an empty database; its DSN."""
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return server.dsn(name)


def drop_database(server: EmbeddedPostgres, name: str) -> None:
    """Remove a database and what would keep it: sessions, slots, prepared transactions, origins that nobody uses."""
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        _drop_slots(admin, name)
        _roll_back_prepared(admin, server, name)
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
        for (origin,) in admin.execute("SELECT roname FROM pg_replication_origin").fetchall():
            admin.execute("SELECT pg_replication_origin_drop(%s)", (origin,))


def _drop_slots(admin: psycopg.Connection, name: str) -> None:
    def active() -> list[tuple[str]]:
        admin.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE database = %s AND active", (name,)
        )
        return admin.execute(
            "SELECT slot_name FROM pg_replication_slots WHERE database = %s AND active", (name,)
        ).fetchall()

    wait_until(lambda: not active(), 60, f"the slots of {name} to become free")
    admin.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", (name,))


def _roll_back_prepared(admin: psycopg.Connection, server: EmbeddedPostgres, name: str) -> None:
    prepared = admin.execute("SELECT gid FROM pg_prepared_xacts WHERE database = %s", (name,)).fetchall()
    if prepared:
        with psycopg.connect(server.dsn(name), autocommit=True) as inside:
            for (gid,) in prepared:
                inside.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
