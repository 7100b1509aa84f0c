"""Backlogs on a real Postgres, and slots that can be read again and again: what `make bench` and `make bench-peers`
share.

A backlog is built behind a slot that nobody reads; every measurement reads a copy of it, so all see the same bytes.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from connectors.postgres.embedded import EmbeddedPostgres

PUBLICATION = "bench"
SLOT = "bench"
KEPT = "bench_kept"

SETTINGS: dict[str, str | int] = {
    "wal_level": "logical",
    "max_wal_size": "16GB",
    "shared_buffers": "512MB",
    "max_replication_slots": 10,
    "max_wal_senders": 10,
    "logical_decoding_work_mem": "256MB",
    "synchronous_commit": "off",
}

WIDE = """
create table wide (
  id bigint primary key, small int, big bigint, amount numeric(12,2), title text, digest text,
  at timestamptz, day date, flag bool, ratio double precision)
"""
FILL_WIDE = """
insert into wide
select g, g %% 1000, g * 7, g / 100.0, 'title number ' || g, md5(g::text),
       '2026-01-01'::timestamptz + g * interval '1 second', '2020-01-01'::date + (g %% 2000), g %% 2 = 0, g / 3.0
from generate_series(1, %s) g
"""


@dataclass(frozen=True)
class Backlog:
    """A workload behind the slot KEPT. `end` is an LSN that the stream passes when it has sent everything."""

    name: str
    server: EmbeddedPostgres
    end: int
    changes: int

    @property
    def dsn(self) -> str:
        return self.server.dsn()


@contextmanager
def server() -> Iterator[EmbeddedPostgres]:
    """A private server, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="cdc-bench-") as folder:
        with EmbeddedPostgres(Path(folder) / "pg", settings=SETTINGS) as running:
            yield running


def prepare(running: EmbeddedPostgres, workload: str) -> None:
    """Tables, publication, and the slot behind which the backlog is going to lie."""
    with psycopg.connect(running.dsn(), autocommit=True) as connection:
        if workload == "pgbench":
            # One branch row a client: the figures are about decoding, not about waiting for each other's row locks.
            subprocess.run(
                [running.binary("pgbench"), "-i", "-s", "4", "-q", running.dsn()], check=True, capture_output=True
            )
        else:
            connection.execute(WIDE.encode())
        connection.execute(f"create publication {PUBLICATION} for all tables".encode())
        connection.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", [SLOT])


def fill(running: EmbeddedPostgres, workload: str, size: int) -> Backlog:
    """Write `size` transactions of pgbench, or one transaction of `size` rows, behind the slot."""
    with psycopg.connect(running.dsn(), autocommit=True) as connection:
        connection.execute("select pg_copy_logical_replication_slot(%s, %s)", [SLOT, KEPT])
        if workload == "pgbench":
            command = [running.binary("pgbench"), "-n", "-c", "4", "-j", "2", "-t", str(size // 4), running.dsn()]
            subprocess.run(command, check=True, capture_output=True)
            changes = size * 4
        else:
            connection.execute(FILL_WIDE.encode(), [size])
            changes = size
        connection.execute("set synchronous_commit = on")
        row = connection.execute("select pg_logical_emit_message(true, 'bench', 'end') - '0/0'::pg_lsn").fetchone()
        connection.execute("checkpoint")
    assert row is not None
    return Backlog(workload, running, int(row[0]), changes)


def rewind(backlog: Backlog, slot: str = SLOT) -> None:
    """Put `slot` back to the beginning of the backlog."""
    with psycopg.connect(backlog.dsn, autocommit=True) as connection:
        drop(backlog, slot)
        connection.execute("select pg_copy_logical_replication_slot(%s, %s)", [KEPT, slot])


def drop(backlog: Backlog, slot: str) -> None:
    """Drop a slot once nobody reads it any more."""
    with psycopg.connect(backlog.dsn, autocommit=True) as connection:
        for _ in range(200):
            row = connection.execute("select active from pg_replication_slots where slot_name = %s", [slot]).fetchone()
            if row is None:
                return
            if not row[0]:
                connection.execute("select pg_drop_replication_slot(%s)", [slot])
                return
            connection.execute("select pg_sleep(0.05)")
    raise RuntimeError(f"slot {slot} stays in use")
