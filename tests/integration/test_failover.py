"""A standby is promoted, a server is restored, a slot is invalidated: real servers, and what a start makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from cdc.errors import SlotLost, SourceRefused
from cdc.ports import Finding
from connectors.postgres.embedded import EmbeddedPostgres
from connectors.postgres.replication import parse_lsn
from tests.support.copies import caught_up, promote, restore_of, scalar, standby_of
from tests.support.daemon import execute
from tests.support.postgres import private_server
from tests.support.reading import SLOT, Reader
from tests.support.waiting import wait_until

pytestmark = pytest.mark.matrix


@pytest.fixture
def servers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def primary_in(servers: ExitStack, directory: Path, **settings: str | int) -> EmbeddedPostgres:
    server = servers.enter_context(private_server(directory / "primary", **settings))
    execute(server.dsn(), "create table t (id int primary key)", "insert into t select generate_series(1, 10)")
    return server


def test_a_standby_promoted_without_the_slot_stops_the_source_and_by_policy_begins_anew(
    tmp_path: Path, servers: ExitStack
) -> None:
    primary = primary_in(servers, tmp_path)
    standby = servers.enter_context(standby_of(primary, tmp_path / "standby", name="standby_1"))
    reader = Reader(primary.dsn(), tmp_path)
    reader.read_to_now()
    caught_up(primary, standby)
    with pytest.raises(SourceRefused, match="standby"):
        reader.settle(standby.dsn())
    primary.stop()
    promote(standby)

    with pytest.raises(SlotLost, match=r"is gone.*timeline 1 of the server became 2.*no synchronized copy") as lost:
        reader.settle(standby.dsn())
    assert "cdc teardown shop" in lost.value.hint
    assert "failover = true" in lost.value.hint
    state = reader.settle(standby.dsn(), on_slot_lost="resync")
    assert (state.epoch, state.timeline) == (2, 2)
    assert scalar(standby.dsn(), f"select count(*) from pg_replication_slots where slot_name = '{SLOT}'") == 1
    execute(standby.dsn(), "insert into t values (100)")
    assert reader.read_to_now() > state.may_confirm_lsn


def test_a_standby_promoted_with_the_synchronized_slot_goes_on_in_the_same_epoch(
    tmp_path: Path, servers: ExitStack
) -> None:
    primary = primary_in(servers, tmp_path)
    reader = Reader(primary.dsn(), tmp_path, failover=True)
    if primary.version < 17:
        with pytest.raises(SourceRefused, match="failover = true needs Postgres 17"):
            reader.settle()
        return
    reader.settle()
    assert [f.name for f in findings(reader) if f.severity == "warning"] == ["synchronized_standby_slots"]
    execute(primary.dsn(), "alter system set synchronized_standby_slots = 'standby_1'", "select pg_reload_conf()")
    standby = servers.enter_context(
        standby_of(primary, tmp_path / "standby", name="standby_1", sync_replication_slots="on")
    )
    ready = "select count(*) from pg_replication_slots where synced and not temporary"

    def synchronized() -> bool:
        # A standby takes a slot over once that has passed the place at which the standby began to keep WAL for it.
        execute(primary.dsn(), "select pg_log_standby_snapshot()", "select txid_current()")
        reader.read_to_now()
        return scalar(standby.dsn(), ready) == 1

    wait_until(synchronized, message="the slot to be synchronized")
    end = reader.read_to_now()
    held = f"select confirmed_flush_lsn from pg_replication_slots where slot_name = '{SLOT}'"
    wait_until(
        lambda: parse_lsn(str(scalar(standby.dsn(), held))) >= end, message="the standby to hold the slot's position"
    )
    caught_up(primary, standby)
    primary.stop()
    promote(standby)

    state = reader.settle(standby.dsn())
    assert (state.epoch, state.timeline) == (1, 2), "nothing was lost: the history goes on"
    # The promoted server has the old one's setting: it would wait for a standby that it does not have.
    assert [f.severity for f in findings(reader) if f.name == "synchronized_standby_slots"] == ["error"]
    execute(standby.dsn(), "alter system reset synchronized_standby_slots", "select pg_reload_conf()")
    execute(standby.dsn(), "insert into t values (100)")
    before = reader.log.end_offset("shop")
    reader.read_to_now()
    records = [r for r in reader.log.records("shop", before) if r.kind == "change"]
    assert [(str(r.table), r.rows) for r in records] == [("public.t", 1)]


def findings(reader: Reader) -> list[Finding]:
    return reader.admin.check()


def test_a_slot_without_failover_is_told_and_altered_by_setup(tmp_path: Path, servers: ExitStack) -> None:
    primary = primary_in(servers, tmp_path)
    if primary.version < 17:
        return
    reader = Reader(primary.dsn(), tmp_path)
    reader.settle()
    reader.config = replace(reader.config, failover=True)
    assert "failover" in [f.name for f in findings(reader) if f.severity == "warning"]
    admin = reader.admin
    assert admin.setup(dry_run=True) == [f'ALTER_REPLICATION_SLOT "{SLOT}" (FAILOVER true)']
    assert not admin.status().slot_failover
    admin.setup(dry_run=False)
    assert admin.status().slot_failover
    assert admin.setup(dry_run=False) == []


def test_a_restore_to_a_point_in_time_below_what_we_hold_is_a_new_history(tmp_path: Path, servers: ExitStack) -> None:
    primary = primary_in(servers, tmp_path, wal_keep_size="256MB")
    reader = Reader(primary.dsn(), tmp_path)
    reader.read_to_now()
    ends: list[int] = []

    def between() -> str:
        execute(primary.dsn(), "insert into t values (100)")
        point = str(scalar(primary.dsn(), "select pg_current_wal_insert_lsn()::text"))
        execute(primary.dsn(), "insert into t values (101)")
        ends.append(reader.read_to_now())
        return point

    restored = servers.enter_context(restore_of(primary, tmp_path / "restored", between=between))
    assert scalar(restored.dsn(), "select max(id) from t") == 100, "what we hold of 101, the server never had"
    with pytest.raises(
        SlotLost, match=r"timeline 2 branched off timeline 1 at 0/\w+, below the position 0/\w+"
    ) as lost:
        reader.settle(restored.dsn())
    assert f"0/{ends[0]:X}" in str(lost.value)
    state = reader.settle(restored.dsn(), on_slot_lost="resync")
    assert (state.epoch, state.timeline) == (2, 2)
    assert reader.settle() == state


@pytest.mark.slow
def test_a_restore_to_a_point_behind_what_we_hold_goes_on(tmp_path: Path, servers: ExitStack) -> None:
    primary = primary_in(servers, tmp_path, wal_keep_size="256MB")
    reader = Reader(primary.dsn(), tmp_path)

    def between() -> str:
        reader.read_to_now()
        execute(primary.dsn(), "insert into t values (100)")
        return str(scalar(primary.dsn(), "select pg_current_wal_insert_lsn()::text"))

    restored = servers.enter_context(restore_of(primary, tmp_path / "restored", between=between))
    state = reader.settle(restored.dsn())
    assert (state.epoch, state.timeline) == (1, 2)
    before = reader.log.end_offset("shop")
    reader.read_to_now()
    assert sum(r.rows for r in reader.log.records("shop", before)) == 1


def test_a_slot_that_needed_removed_wal_is_lost_and_says_so(tmp_path: Path, servers: ExitStack) -> None:
    primary = primary_in(servers, tmp_path, max_slot_wal_keep_size="1MB", min_wal_size="32MB", max_wal_size="32MB")
    reader = Reader(primary.dsn(), tmp_path)
    reader.read_to_now()
    with psycopg.connect(primary.dsn(), autocommit=True) as connection:

        def lost() -> bool:
            connection.execute("insert into t select coalesce(max(id), 0) + 1 from t")
            connection.execute("select pg_switch_wal()")
            connection.execute("checkpoint")
            return reader.status.wal_status == "lost"

        wait_until(lost, message="the slot to be lost")
    with pytest.raises(SlotLost, match=r"cannot be read any more: .*removed WAL.*\(invalidated: wal_removed\)") as told:
        reader.settle()
    assert "max_slot_wal_keep_size" in told.value.hint
    with pytest.raises(SlotLost, match=SLOT):
        reader.open()
    assert reader.settle(on_slot_lost="resync").epoch == 2
    reader.read_to_now()


def test_a_slot_that_was_idle_for_too_long_is_lost_and_says_so(tmp_path: Path, servers: ExitStack) -> None:
    primary = primary_in(servers, tmp_path)
    if primary.version < 18:
        assert (
            scalar(primary.dsn(), "select count(*) from pg_settings where name = 'idle_replication_slot_timeout'") == 0
        )
        return
    reader = Reader(primary.dsn(), tmp_path)
    reader.read_to_now()
    execute(primary.dsn(), "alter system set idle_replication_slot_timeout = '1s'", "select pg_reload_conf()")

    def lost() -> bool:
        execute(primary.dsn(), "checkpoint")
        return bool(reader.status.slot_fault)

    wait_until(lost, message="the slot to be invalidated")
    with pytest.raises(SlotLost, match=r"nobody read it.*\(invalidated: idle_timeout\)") as told:
        reader.settle()
    assert "idle_replication_slot_timeout" in told.value.hint
    with pytest.raises(SlotLost, match=SLOT):
        reader.open()
    execute(primary.dsn(), "alter system reset idle_replication_slot_timeout", "select pg_reload_conf()")
    assert reader.settle(on_slot_lost="resync").epoch == 2
