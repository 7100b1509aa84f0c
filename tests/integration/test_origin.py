"""Where a source's history stands at a start: every disagreement between server, lake and log is an error that says
so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from cdc.batch import Boundary
from cdc.config import SourceConfig
from cdc.errors import SlotLost, SourceRefused
from cdc.lake.anchor import Anchor, AnchorState
from cdc.lake.layout import anchor_key
from cdc.log import EventLog
from cdc.origin import give_up, settle
from cdc.state import State
from connectors.local.store import LocalStore
from connectors.postgres.source import PostgresKind

pytestmark = pytest.mark.matrix


class Start:
    """A source that can be started again and again, with or without what was kept before."""

    def __init__(self, dsn: str, root: Path) -> None:
        self.root = root
        slot = "origin_" + dsn.rpartition("/")[2].partition("?")[0]
        self.config = SourceConfig(name="shop", dsn=dsn, slot=slot, publication=(slot,), tables=("public.*",))
        self.source = PostgresKind.source(self.config, application_name="test", temp_dir=root / "tmp")
        self.admin = PostgresKind.admin(self.config)
        self.store = LocalStore(root / "lake")
        self.disk = 0
        self.open_log()

    def open_log(self) -> None:
        folder = self.root / f"state-{self.disk}"
        self.log = EventLog(folder / "log", State(folder / "state.db"), bytes_max=1 << 30)

    def lose_disk(self) -> None:
        self.log.close()
        self.disk += 1
        self.open_log()

    def start(self, config: SourceConfig | None = None, *, landed_epoch: int = -1) -> AnchorState:
        return settle(
            config or self.config, self.source.identity(), self.admin, Anchor(self.store, "shop"), self.log,
            landed_epoch=lambda: landed_epoch,
        )  # fmt: skip

    def move_slot(self) -> None:
        """Someone else reads the slot."""
        with psycopg.connect(self.config.dsn, autocommit=True) as other:
            other.execute("insert into t select coalesce(max(id), 0) + 1 from t")
            other.execute("select pg_replication_slot_advance(%s, pg_current_wal_lsn())", [self.config.slot])


@pytest.fixture
def start(database: str, tmp_path: Path) -> Start:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create table t (id int primary key)")
    return Start(database, tmp_path)


def test_the_first_start_sets_up_and_begins_the_first_epoch(start: Start) -> None:
    state = start.start()
    status = start.admin.status()
    assert state.epoch == 1
    assert status.slot_exists
    assert start.log.position("shop") == Boundary(1, status.confirmed_lsn - 1, status.confirmed_lsn)
    assert start.start() == state, "starting again changes nothing"


def test_a_lake_with_data_and_no_anchor_begins_an_epoch_that_neither_lake_nor_log_has_anything_of(start: Start) -> None:
    assert start.start(landed_epoch=3).epoch == 4
    assert start.start(landed_epoch=3).epoch == 4, "the anchor tells from then on"
    start.store.delete([anchor_key("shop")])
    state = start.start(landed_epoch=3)
    assert state.epoch == 5, "the log has something of the fourth"
    confirmed = start.admin.status().confirmed_lsn
    assert start.log.position("shop") == Boundary(5, confirmed - 1, confirmed)


def test_another_lake_that_is_empty_is_filled_anew_whatever_the_log_holds(start: Start) -> None:
    """A new `lake.url` beside the old `state_dir`: what the log tells is in the old lake."""
    assert start.start().epoch == 1
    start.store = LocalStore(start.root / "another lake")
    state = start.start()
    assert (state.epoch, start.log.position("shop")[0]) == (2, 2)  # type: ignore[index]
    assert start.start() == state


def test_a_start_on_an_empty_disk_goes_on_where_the_slot_stands(start: Start) -> None:
    start.start()
    start.lose_disk()
    assert start.start().epoch == 1
    confirmed = start.admin.status().confirmed_lsn
    assert start.log.position("shop") == Boundary(1, confirmed - 1, confirmed)


def test_a_slot_that_is_gone_is_an_error_and_is_not_created_silently(start: Start) -> None:
    start.start()
    start.admin.teardown(dry_run=False)
    with pytest.raises(SlotLost, match="is gone") as lost:
        start.start()
    assert "cdc teardown" in lost.value.hint
    assert not start.admin.status().slot_exists


def test_after_a_teardown_the_next_start_begins_a_new_epoch(start: Start) -> None:
    start.start()
    give_up(Anchor(start.store, "shop"))
    start.admin.teardown(dry_run=False)
    state = start.start()
    assert (state.epoch, start.admin.status().slot_exists) == (2, True)
    position = start.log.position("shop")
    assert position is not None
    assert position.epoch == 2


def test_a_slot_that_someone_else_moved_is_noticed(start: Start) -> None:
    start.start()
    start.move_slot()
    with pytest.raises(SlotLost, match="moved ahead by someone else"):
        start.start()
    start.lose_disk()
    with pytest.raises(SlotLost, match="moved ahead by someone else"):
        start.start()


def test_a_state_directory_older_than_the_slot_is_refused(start: Start) -> None:
    state = start.start()
    anchor = Anchor(start.store, "shop")
    anchor.load()
    anchor.save(replace(state, may_confirm_lsn=1 << 60))
    # What a newer daemon has landed and confirmed, the older state directory does not know.
    start.move_slot()
    anchor.load()
    with pytest.raises((SourceRefused, SlotLost)):
        start.start()


def test_with_confirm_after_log_a_lost_log_is_a_loss_and_is_said(start: Start) -> None:
    config = replace(start.config, confirm_after="log")
    start.start(config)
    start.move_slot()
    start.lose_disk()
    with pytest.raises(SlotLost, match="the event log is gone"):
        start.start(config)


def test_another_database_or_slot_than_the_lake_was_filled_from_is_refused(start: Start) -> None:
    state = start.start()
    with pytest.raises(SourceRefused, match="the configuration names 'another'"):
        start.start(replace(start.config, slot="another"))
    anchor = Anchor(start.store, "shop")
    anchor.load()
    anchor.save(replace(state, system_id="7000000000000000000"))
    with pytest.raises(SourceRefused, match="of server 7000000000000000000"):
        start.start()


def test_a_server_that_is_behind_the_lake_is_refused(start: Start) -> None:
    state = start.start()
    anchor = Anchor(start.store, "shop")
    anchor.load()
    anchor.save(replace(state, may_confirm_lsn=1 << 60))
    with pytest.raises(SlotLost, match="restored from a backup"):
        start.start()


def test_a_slot_of_another_kind_is_refused_by_name(start: Start) -> None:
    with psycopg.connect(start.config.dsn, autocommit=True) as connection:
        connection.execute("select pg_create_physical_replication_slot(%s)", [start.config.slot])
    try:
        with pytest.raises(SourceRefused, match="physical"):
            start.start()
    finally:
        with psycopg.connect(start.config.dsn, autocommit=True) as connection:
            connection.execute("select pg_drop_replication_slot(%s)", [start.config.slot])
