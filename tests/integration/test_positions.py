"""Our position against the slot's: replayed, gone on from, or refused with both of them shown; never skipped.

In the test's own process, on a real server: what a daemon would do, stopped between any two steps. Whole daemons are in
tests/fault/test_history.py, promoted and restored servers in test_failover.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from cdc import failpoints
from cdc.console import lsn_text
from cdc.errors import SlotLost, SourceRefused, SourceUnavailable
from cdc.origin import begin_anew
from cdc.state import SourceState
from cdc.status import ladder
from connectors.postgres.source import PostgresKind
from tests.fault.test_kill import HISTORY
from tests.support.daemon import execute
from tests.support.reading import Reader
from tests.support.waiting import wait_until

pytestmark = pytest.mark.matrix


@pytest.fixture
def reader(database: str, tmp_path: Path) -> Reader:
    execute(database, "create table t (id int primary key)")
    return Reader(database, tmp_path, slot="position_" + database.rpartition("/")[2])


def insert(reader: Reader, *ids: int) -> None:
    execute(reader.config.dsn, *(f"insert into t values ({i})" for i in ids))


def remake_slot(reader: Reader) -> None:
    execute(
        reader.config.dsn,
        f"select pg_drop_replication_slot('{reader.config.slot}')",
        f"select pg_create_logical_replication_slot('{reader.config.slot}', 'pgoutput')",
    )


def shown(text: str) -> set[int]:
    """The positions that a message shows."""
    return {(int(high, 16) << 32) | int(low, 16) for high, low in re.findall(r"\b([0-9A-F]+)/([0-9A-F]+)\b", text)}


def test_a_slot_behind_our_position_replays_nothing_that_we_hold_and_skips_nothing(reader: Reader) -> None:
    reader.settle()
    insert(reader, 1, 2)
    end = reader.read_to_now(confirm=False)
    assert reader.status.confirmed_lsn < end, "the slot stands behind us"
    offset = reader.log.end_offset("shop")
    insert(reader, 3)
    reader.read_to_now()
    assert reader.rows_since(offset) == 1, "what we held was not sent again, what is new was"
    assert reader.settle().epoch == 1


def test_on_an_empty_disk_everything_behind_the_slots_position_is_read_again(reader: Reader) -> None:
    insert(reader, 1)
    reader.settle()
    insert(reader, 2, 3)
    reader.read_to_now(confirm=False)
    reader.open_disk()
    reader.settle()
    insert(reader, 4)
    reader.read_to_now()
    assert reader.rows_since(0) == 3


def test_an_old_copy_of_the_state_is_refused_and_both_positions_are_shown(reader: Reader) -> None:
    reader.settle()
    insert(reader, 1)
    old_end = reader.read_to_now()
    copy = reader.copy_disk()
    insert(reader, 2)
    reader.read_to_now()
    confirmed = reader.status.confirmed_lsn
    reader.open_disk(copy)
    with pytest.raises(SourceRefused, match="state_dir is older") as refused:
        reader.settle()
    assert shown(str(refused.value)) == {old_end, confirmed}
    assert "move state_dir away" in refused.value.hint
    reader.open_disk()
    assert reader.settle().epoch == 1, "an empty disk is no loss: the lake has it"


@pytest.mark.parametrize("confirm_after", ["landed", "log"])
def test_a_slot_that_was_dropped_and_made_anew_while_we_were_down_is_lost_and_both_positions_are_shown(
    reader: Reader, confirm_after: str
) -> None:
    reader.settle(confirm_after=confirm_after)
    insert(reader, 1)
    end = reader.read_to_now()
    remake_slot(reader)
    with pytest.raises(SlotLost, match="dropped and made anew") as lost:
        reader.settle()
    assert {end, reader.status.confirmed_lsn} <= shown(str(lost.value))
    assert "cdc teardown shop" in lost.value.hint
    assert 'on_slot_lost = "resync"' in lost.value.hint
    before = reader.status.confirmed_lsn
    with pytest.raises(SlotLost):
        reader.settle()
    assert reader.status.confirmed_lsn == before, "nothing is done without being told to"
    assert reader.settle(on_slot_lost="resync").epoch == 2


def test_a_slot_that_is_gone_shows_what_is_lost_to_it(reader: Reader) -> None:
    reader.settle()
    end = reader.read_to_now()
    execute(reader.config.dsn, f"select pg_drop_replication_slot('{reader.config.slot}')")
    insert(reader, 1)
    with pytest.raises(SlotLost, match="is gone") as lost:
        reader.settle()
    told = shown(str(lost.value))
    assert end in told
    assert max(told) > end, "and where the server stands"


def test_a_start_position_that_the_server_would_silently_raise_is_refused(reader: Reader) -> None:
    reader.settle()
    insert(reader, 1)
    before = reader.position
    reader.read_to_now()
    # Between the look at the slot and the opening of the stream, somebody moved it: here, we ourselves.
    with pytest.raises(SlotLost, match="would be left out") as lost:
        reader.open(before)
    assert shown(str(lost.value)) == {before.end_lsn, reader.status.confirmed_lsn}
    wait_until(lambda: not reader.status.slot_active, message="the slot to be free")
    reader.open().close()


def test_a_death_between_the_slots_confirmation_and_anything_saved_is_no_mismatch(reader: Reader) -> None:
    reader.settle()
    insert(reader, 1)
    end = reader.read_to_now()
    assert reader.status.confirmed_lsn == end == reader.position.end_lsn
    # Nothing was written after the confirmation; what was written before it is all that the next start has.
    for disk in (reader.copy_disk(), None):
        reader.open_disk(disk)
        state = reader.settle()
        assert (state.epoch, state.may_confirm_lsn) == (1, end)
        assert reader.position.end_lsn == end


def test_a_long_open_transaction_keeps_wal_though_everything_is_confirmed_and_both_lags_are_told(
    reader: Reader,
) -> None:
    reader.settle()
    with psycopg.connect(reader.config.dsn) as open_one:
        open_one.execute("insert into t values (1)")

        def held_back() -> bool:
            # The slot's restart position moves on only from one list of running transactions to the next.
            execute(reader.config.dsn, "checkpoint", "select pg_logical_emit_message(false, 'x', repeat('x', 100000))")
            reader.read_to_now()
            status = reader.status
            return status.confirmed_lsn - status.restart_lsn > 200_000

        wait_until(held_back, message="the two positions to part")
        status = reader.status
        steps = {s.step: s for s in ladder(SourceState(name="shop"), status, {}, 0.0)}
        confirmed_lag = steps["confirmed"].lag_bytes
        assert confirmed_lag is not None
        assert confirmed_lag < 100_000 < 200_000 < status.retained_bytes
        open_one.rollback()


def test_under_log_a_lost_log_is_told_and_a_change_to_landed_claims_nothing_that_has_not_landed(reader: Reader) -> None:
    reader.settle(confirm_after="log")
    insert(reader, 1)
    reader.read_to_now()
    state = reader.settle(confirm_after="landed")
    assert state.mode == "log", "what is confirmed has not landed yet"
    assert reader.settle() == state, "which is no reason to think that somebody moved the slot"
    reader.open_disk()
    with pytest.raises(SlotLost, match="the event log is gone"):
        reader.settle()


def test_an_older_epochs_state_is_an_empty_disk_and_a_newer_ones_is_refused(reader: Reader) -> None:
    reader.settle()
    reader.read_to_now()
    old = reader.copy_disk()
    remake_slot(reader)
    assert reader.settle(on_slot_lost="resync").epoch == 2
    reader.read_to_now()
    new = reader.disk
    reader.open_disk(old)
    assert reader.settle().epoch == reader.position.epoch == 2
    lake = reader.anchor.state
    assert lake is not None
    reader.open_disk(new)
    reader.store.delete(["shop/_cdc/source.json"])
    reader.anchor.load()
    reader.anchor.save(type(lake)(**{f: getattr(lake, f) for f in lake.__slots__} | {"epoch": 1}))
    with pytest.raises(SourceRefused, match="state_dir is of epoch 2, the lake only of epoch 1"):
        reader.settle()


@pytest.mark.parametrize("point", HISTORY)
def test_a_new_history_that_was_cut_short_is_begun_by_the_next_look(
    reader: Reader, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader.settle()
    reader.read_to_now()
    identity = PostgresKind.source(reader.config, application_name="test").identity()
    monkeypatch.setattr(failpoints, "_armed", {point: ("error", 1)})
    monkeypatch.setattr(failpoints, "_passes", {})
    with pytest.raises(SourceUnavailable, match=point):
        begin_anew(reader.config, identity, reader.admin, reader.anchor, reader.log, why="told to")
    insert(reader, 7)
    state = reader.settle()
    assert (state.epoch, state.why, state.slot) == (2, "told to", reader.config.slot)
    assert reader.position.epoch == 2
    assert reader.position.end_lsn == reader.status.confirmed_lsn == state.may_confirm_lsn
    assert reader.settle() == state
    insert(reader, 8)
    offset = reader.log.end_offset("shop")
    reader.read_to_now()
    assert reader.rows_since(offset) in (1, 2), lsn_text(state.may_confirm_lsn)
