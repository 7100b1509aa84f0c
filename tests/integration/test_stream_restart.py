"""The stream of a real server, stopped where it hurts: in the middle of a COPY, while nobody reads, before a flush."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cdc.batch import Boundary
from cdc.capture import ConfirmGate, LogEnd, SourceStream
from cdc.config import SourceConfig
from cdc.log import EventLog
from cdc.schema import SchemaBook
from cdc.stage import Stage
from cdc.state import open_state
from connectors.postgres.replication import parse_lsn
from connectors.postgres.source import PostgresKind
from tests.support.daemon import execute
from tests.support.waiting import wait_until

ROWS = 10_000


class Captured:
    """A source's stream into an event log, without a daemon around it."""

    def __init__(self, dsn: str, directory: Path, **config: Any) -> None:
        slot = "restart_" + str(conninfo_to_dict(dsn)["dbname"])
        self.config = SourceConfig(
            name="shop", dsn=dsn, slot=slot, publication=(slot,), buffer_bytes=1 << 20, confirm_after="log", **config
        )
        self.admin = PostgresKind.admin(self.config)
        self.admin.setup(dry_run=False)
        self.state = open_state(directory)
        self.log = EventLog(directory / "log", self.state, bytes_max=1 << 30)
        confirmed = self.admin.status().confirmed_lsn
        self.log.set_position("shop", Boundary(1, confirmed - 1, confirmed))
        self.book = SchemaBook(self.state, "shop")
        self.start()

    def start(self) -> None:
        gate = ConfirmGate(epoch=1, confirm_after="log", save_anchor=_never, anchored_lsn=0, every_s=0)
        stream = SourceStream("shop", PostgresKind.source(self.config), self.book, gate, 1)
        self.stage: Stage[Any, Any] = Stage("capture", stream, LogEnd("shop", self.log))

    def read_through(self, lsn: int) -> None:
        def reached() -> bool:
            self.stage.step(0.2)
            return self.logged > lsn

        wait_until(reached, message=f"the log to pass {lsn:X}")

    @property
    def logged(self) -> int:
        at = self.log.position("shop")
        assert at is not None
        return at.end_lsn

    def ids(self) -> list[int]:
        """The ids of every change in the log, in order."""
        found: list[int] = []
        for record in self.log.records("shop", 0):
            schema = next(s for s in self.book.versions(record.table) if s.version == record.version)
            found += self.log.read(record, schema).column("id").to_pylist()
        return found

    def close(self) -> None:
        self.stage.close()
        self.log.close()
        self.state.close()


def _never(may_confirm_lsn: int, mode: str) -> None:
    raise AssertionError("nothing is anchored here")


@pytest.fixture
def captured(database: str, tmp_path: Path) -> Iterator[Captured]:
    execute(database, "create table orders (id int primary key, note text)")
    # Settings of a session: what the server does for this stream alone.
    made = Captured(make_conninfo(database, options="-c wal_sender_timeout=4s"), tmp_path)
    yield made
    made.close()


def copy_in(dsn: str, first: int, rows: int) -> None:
    with psycopg.connect(dsn) as connection, connection.cursor().copy("copy orders from stdin") as copy:
        for n in range(first, first + rows):
            copy.write_row((n, "x" * 500))


@pytest.mark.matrix
def test_a_copy_whose_rows_share_their_positions_survives_a_restart_in_its_middle(captured: Captured) -> None:
    dsn = captured.config.dsn
    execute(dsn, "insert into orders values (0, 'before')")
    captured.read_through(captured.admin.barrier())
    copy_in(dsn, 1, ROWS)
    with psycopg.connect(dsn) as connection:
        row = connection.execute("select pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    done = parse_lsn(row[0])
    execute(dsn, f"insert into orders values ({ROWS + 1}, 'behind')")
    after = captured.admin.barrier()
    for _ in range(2):
        # Until a part of it is in the log, and no position behind it: then the end.
        before = captured.log.end_offset("shop")
        wait_until(lambda before=before: captured.stage.step(0.2) and captured.log.end_offset("shop") > before)
        assert captured.logged < done, "a position behind the transaction stands for all of it"
        captured.stage.close()
        captured.start()
    captured.read_through(after)
    assert captured.ids() == list(range(ROWS + 2))


@pytest.mark.slow
def test_a_sink_blocked_three_times_wal_sender_timeout_keeps_its_connection_and_acknowledges_nothing(
    captured: Captured,
) -> None:
    dsn = captured.config.dsn
    captured.read_through(captured.admin.barrier())
    copy_in(dsn, 0, 5 * ROWS)
    after = captured.admin.barrier()
    with psycopg.connect(dsn, autocommit=True) as server:
        query = (
            "select s.active_pid, s.confirmed_flush_lsn, r.reply_time from pg_replication_slots s"
            " join pg_stat_replication r on r.pid = s.active_pid where s.slot_name = %s"
        )

        def now() -> tuple[Any, ...]:
            row = server.execute(query, [captured.config.slot]).fetchone()
            assert row is not None, "the connection was lost"
            return row

        pid, confirmed, began = now()
        # Nobody reads: what arrives fills the buffer, and replies go out all the same.
        wait_until(lambda: (now()[2] - began).total_seconds() > 12, message="replies over three timeouts")
        assert now()[:2] == (pid, confirmed), "the same connection, and nothing is acknowledged"
        captured.read_through(after)
        assert now()[0] == pid
    assert captured.ids() == list(range(5 * ROWS))


@pytest.mark.matrix
def test_a_heartbeat_comes_back_in_the_stream_and_carries_the_position_past_itself(captured: Captured) -> None:
    captured.read_through(captured.admin.barrier())
    execute(captured.config.dsn, "create table unpublished (n int)", "insert into unpublished values (1)")
    sent = captured.admin.barrier()
    captured.read_through(sent)
    assert captured.ids() == [], "it brings no row"
    wait_until(lambda: captured.stage.step(0.1) and captured.admin.status().confirmed_lsn > sent)
