"""A source whose server streams big transactions: confirmed, cut and opened again while they are open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc.batch import Boundary, Portion
from cdc.config import SourceConfig
from cdc.errors import SourceRefused, StreamRestarted
from cdc.table import TableId, TableSchema
from connectors.postgres import spool
from connectors.postgres.replication import Receiver
from connectors.postgres.source import PostgresKind
from tests.support.waiting import wait_until

pytestmark = pytest.mark.matrix

ROWS = 6000


class Forgetful:
    """Schemas without a memory."""

    def register(self, schema: TableSchema) -> TableSchema:
        return schema

    def versions(self, table: TableId) -> list[TableSchema]:
        return []

    def held(self, table: TableId) -> TableSchema | None:
        return None


class Reading:
    """A source on a slot of its own, what was read from it, and a session with an open transaction."""

    def __init__(self, dsn: str, folder: Path) -> None:
        name = "streaming_" + dsn.rpartition("/")[2].partition("?")[0]
        self.folder = folder
        self.session = psycopg.connect(dsn)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("create table t (id bigint primary key, note text)")
            connection.execute(
                f"alter database {connection.info.dbname} set logical_decoding_work_mem = '64kB'".encode()
            )
        self.config = SourceConfig(
            name="shop", dsn=dsn, slot=name, publication=(name,), tables=("public.*",), streaming="on"
        )
        PostgresKind.admin(self.config).setup(dry_run=False)
        self.source = PostgresKind.source(self.config, application_name="test", temp_dir=folder)
        self.portions: list[Portion] = []

    def begin(self) -> None:
        """Write much, and wait until the server has sent of it."""
        self.session.execute("insert into t select g, md5(g::text) from generate_series(1, %s) g", [ROWS])
        self.read(lambda: sum(portion.messages for portion in self.portions) > ROWS // 2)

    def other(self, *statements: str) -> None:
        with psycopg.connect(self.config.dsn, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def ask(self, query: str) -> Any:
        with psycopg.connect(self.config.dsn, autocommit=True) as connection:
            row = connection.execute(query.encode()).fetchone()
            assert row is not None
            return row[0]

    def open(self, after: Boundary | None = None) -> None:
        self.portions = []
        self.source.open(after, Forgetful(), 1)

    def read(self, done: Callable[[], bool]) -> None:
        def step() -> bool:
            portion = self.source.read(0.1)
            if portion is not None:
                self.portions.append(portion)
            return done()

        wait_until(step, message="the stream")

    @property
    def rows(self) -> list[tuple[int, int, str | None]]:
        """Key, ordinal and origin of every row read."""
        return [
            row
            for portion in self.portions
            for batch in portion.batches
            for row in zip(
                batch.column("id").to_pylist(),
                batch.system("_seq").to_pylist(),
                batch.system("_origin").to_pylist(),
                strict=True,
            )
        ]

    @property
    def boundary(self) -> Boundary:
        return [portion.boundary for portion in self.portions if portion.boundary is not None][-1]


@pytest.fixture
def reading(database: str, tmp_path: Path) -> Iterator[Reading]:
    reading = Reading(database, tmp_path / "stream")
    yield reading
    reading.source.close()
    reading.session.close()
    assert not reading.folder.exists()


WHOLE = [(n, n - 1, None) for n in range(1, ROWS + 1)]


def test_confirming_while_a_transaction_is_streamed_loses_nothing_of_it(reading: Reading) -> None:
    reading.open()
    before = reading.ask("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
    reading.begin()
    reading.other("insert into t values (-1)")
    reading.read(lambda: bool(reading.rows))
    reading.other("select pg_switch_wal()")
    reached = reading.boundary
    assert reached.end_lsn > before
    reading.source.confirm(reached.end_lsn)
    slot = f"from pg_replication_slots where slot_name = '{reading.config.slot}'"
    reading.read(lambda: reading.ask(f"select confirmed_flush_lsn - '0/0'::pg_lsn {slot}") >= reached.end_lsn)
    reading.source.close()

    reading.open(reached)
    reading.session.commit()
    reading.read(lambda: len(reading.rows) == ROWS)

    assert reading.rows == WHOLE


def test_a_stream_that_is_cut_inside_of_a_replayed_transaction_brings_all_of_it_again(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "PORTION_BYTES", 20_000)
    reading.open()
    reading.begin()
    reading.session.commit()
    reading.read(lambda: 0 < len(reading.rows) < ROWS)
    assert all(portion.boundary is None or portion.boundary.lsn == 0 for portion in reading.portions)
    reading.source.close()

    reading.open()
    reading.read(lambda: len(reading.rows) == ROWS)

    assert reading.rows == WHOLE
    assert len(reading.portions[-1].xids) == 1


def test_where_origins_come_to_be_a_transaction_says_its_origin_all_the_same(reading: Reading) -> None:
    origin = "origin_" + reading.config.slot
    reading.open()
    reading.other(f"select pg_replication_origin_create('{origin}')")
    reading.session.execute("select pg_replication_origin_session_setup(%s)", [origin])
    reading.session.commit()
    # A server takes the origin from the first thing that it decodes; after this, that is no change of a row.
    reading.session.execute("create table other (id int)")
    reading.begin()
    reading.session.commit()
    with pytest.raises(StreamRestarted):
        reading.read(lambda: bool(reading.rows))
    assert not reading.rows

    reading.open()
    reading.read(lambda: len(reading.rows) == ROWS)

    assert reading.rows == [(id_, seq, origin) for id_, seq, _ in WHOLE]


def test_what_our_disk_may_not_hold_comes_whole(reading: Reading) -> None:
    small = replace(reading.config, buffer_bytes=1 << 16, spool_bytes_max=1 << 16)
    reading.source = PostgresKind.source(small, application_name="test", temp_dir=reading.folder)
    reading.open()
    with pytest.raises(StreamRestarted, match="come whole"):
        reading.begin()
    reading.source.close()
    assert not reading.folder.exists()

    reading.open()
    reading.session.commit()
    reading.read(lambda: len(reading.rows) == ROWS)
    assert reading.rows == WHOLE


def test_what_a_server_fails_to_stream_comes_whole(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(receiver: Receiver, timeout_s: float) -> None:
        error = SourceRefused("could not map filenumber")
        raise error from psycopg.errors.InternalError_("could not map filenumber")

    reading.open()
    reading.begin()
    with monkeypatch.context() as patch:
        patch.setattr(Receiver, "take", fail)
        with pytest.raises(StreamRestarted):
            reading.source.read(0.1)
    reading.source.close()

    reading.open()
    reading.other("insert into t values (-1)")
    reading.read(lambda: bool(reading.rows))
    assert sum(portion.messages for portion in reading.portions) < 100
    reading.session.commit()
    reading.read(lambda: len(reading.rows) == ROWS + 1)

    assert reading.rows == [(-1, 0, None), *WHOLE]
