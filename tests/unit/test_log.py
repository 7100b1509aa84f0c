"""The event log by examples: what it takes, what it refuses, and what a full or failing disk does to it."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cdc import xids
from cdc.batch import SNAPSHOT_SEQ, Batch, Boundary, Portion
from cdc.errors import CdcError, FormatTooNew, InvariantBroken, LogCorrupt, LogFull, StreamRestarted
from cdc.log import EventLog
from cdc.ports import Visibility
from cdc.state import State, open_state
from tests.support.logs import (
    ORDERS,
    PEOPLE,
    SOURCE,
    Row,
    batch,
    chunk_rows,
    content,
    named_and_found,
    open_log,
    portion,
    rows_of,
    schema_of,
    transaction,
)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[State, EventLog]]:
    state, log = open_log(tmp_path)
    yield state, log
    log.close()
    state.close()


@pytest.fixture
def log(opened: tuple[State, EventLog]) -> EventLog:
    return opened[1]


def see(xmin: int, xmax: int, *running: int) -> Visibility:
    return Visibility(xmin=xmin, xmax=xmax, in_progress=frozenset(running))


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """A real disk limit: the kernel writes up to it and refuses the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_appended_is_read_back_in_order_with_its_position(log: EventLog) -> None:
    assert log.position(SOURCE) is None
    assert log.end_offset(SOURCE) == 0
    log.append(SOURCE, portion(transaction(10), transaction(11, schema=PEOPLE), lsn=11))
    log.append(SOURCE, portion(transaction(12), lsn=12, end_lsn=99))
    assert log.position(SOURCE) == Boundary(1, 12, 99)
    assert [r.offset for r in log.records(SOURCE, 0)] == [1, 2, 3]
    assert log.end_offset(SOURCE) == 3
    assert content(log) == [*rows_of(transaction(10)), *rows_of(transaction(11)), *rows_of(transaction(12))]
    assert [r.offset for r in log.records(SOURCE, 1, table=ORDERS.table)] == [3]


def test_batches_of_one_portion_are_logged_in_the_order_of_their_first_row(log: EventLog) -> None:
    log.append(SOURCE, portion(transaction(10), transaction(30), transaction(20, schema=PEOPLE), lsn=30))
    assert [r.first_lsn for r in log.records(SOURCE, 0)] == [10, 20, 30]


def test_optional_columns_and_truncates_are_remembered_in_the_index(log: EventLog) -> None:
    log.append(SOURCE, portion(batch(ORDERS, [Row(5, 0, 1, None)], op="t", run="r1"), transaction(6), lsn=6))
    first, second = log.records(SOURCE, 0)
    assert (first.has_truncate, first.optional) == (True, ("_run",))
    assert (second.has_truncate, second.optional) == (False, ())
    assert log.read(first, ORDERS).system("_run").to_pylist() == ["r1"]


def test_sources_share_the_log_and_do_not_see_each_other(log: EventLog) -> None:
    log.append("a", portion(transaction(10), lsn=10))
    log.append("b", portion(transaction(5, schema=PEOPLE), lsn=5))
    assert content(log, "a") == rows_of(transaction(10))
    assert content(log, "b") == rows_of(transaction(5))
    assert (log.end_offset("a"), log.end_offset("b")) == (1, 2)


def test_a_page_of_records_stops_before_its_bytes_but_never_before_one(log: EventLog) -> None:
    for lsn in range(1, 150):
        log.append(SOURCE, portion(transaction(lsn), lsn=lsn))
    size = log.records(SOURCE, 0)[0].bytes
    assert [r.offset for r in log.records(SOURCE, 10, bytes_max=1)] == [11]
    assert [r.offset for r in log.records(SOURCE, 0, bytes_max=size * 100)] == list(range(1, 101))
    assert [r.offset for r in log.records(SOURCE, 7, bytes_max=size * 100, limit=3)] == [8, 9, 10]
    assert len(log.records(SOURCE, 0, bytes_max=1 << 40)) == 149


def test_a_keepalive_moves_only_the_end_and_an_older_one_moves_nothing(log: EventLog) -> None:
    log.append(SOURCE, portion(transaction(10), lsn=10))
    log.append(SOURCE, portion(lsn=10, end_lsn=500))
    log.append(SOURCE, portion(lsn=10, end_lsn=300))
    assert log.position(SOURCE) == Boundary(1, 10, 500)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (portion(transaction(11), lsn=9), "would go from"),
        (portion(transaction(10), lsn=11), "logged already"),
        (portion(transaction(9)), "logged already"),
        (portion(transaction(12), lsn=12, epoch=2), "would go from"),
        (portion(batch(ORDERS, [Row(11, 0, 1, "a")], epoch=2), lsn=11), "are of epoch"),
        (portion(batch(ORDERS, [Row(12, 0, 1, "a"), Row(11, 0, 2, "b")]), lsn=12), "not in order"),
        (portion(batch(ORDERS, [Row(11, 1, 1, "a"), Row(11, 1, 2, "b")]), lsn=11), "not in order"),
        (portion(batch(ORDERS, [Row(11, 0, 1, "a"), Row(12, 0, 2, "b")]), lsn=11), "mixes"),
        (portion(transaction(11), transaction(11), lsn=11), "second time"),
        (portion(transaction(11, schema=schema_of("orders", version=0)), lsn=11), "no schema book"),
    ],
)
def test_what_does_not_continue_the_log_is_refused_and_leaves_nothing(log: EventLog, wrong: Portion, told: str) -> None:
    log.append(SOURCE, portion(transaction(10), lsn=10))
    with pytest.raises(InvariantBroken, match=told):
        log.append(SOURCE, wrong)
    assert content(log) == rows_of(transaction(10))
    log.append(SOURCE, portion(transaction(11), lsn=11))
    assert log.end_offset(SOURCE) == 2


def test_a_batch_that_has_not_the_columns_of_its_schema_is_refused(log: EventLog) -> None:
    good = transaction(10)
    narrow = Batch(ORDERS, good.data.set_column(5, "id", pa.array([1, 2], pa.int32())))
    with pytest.raises(InvariantBroken, match="columns of its schema"):
        log.append(SOURCE, portion(narrow, lsn=10))


def test_an_open_transaction_becomes_complete_with_its_boundary(log: EventLog) -> None:
    log.append(SOURCE, portion(transaction(10), transaction(20), lsn=10))
    log.append(SOURCE, portion(transaction(20, first_seq=2)))
    assert log.position(SOURCE) == Boundary(1, 10, 11)
    with pytest.raises(InvariantBroken, match="second time"):
        log.append(SOURCE, portion(transaction(20, first_seq=2)))
    with pytest.raises(InvariantBroken, match="mixes"):
        log.append(SOURCE, portion(transaction(21)))
    with pytest.raises(InvariantBroken, match="before the open transaction"):
        log.append(SOURCE, portion(lsn=15))
    log.append(SOURCE, portion(transaction(20, first_seq=4), transaction(30), lsn=20))
    assert log.position(SOURCE) == Boundary(1, 20, 21)
    assert log.discard_open(SOURCE) == 1
    assert [r.lsn for r in content(log)] == [10] * 2 + [20] * 6


def test_a_discarded_transaction_comes_again_and_stands_once(log: EventLog) -> None:
    log.append(SOURCE, portion(transaction(10), transaction(20), lsn=10))
    held = log.records(SOURCE, 1)
    before = log.generation(SOURCE)
    assert log.discard_open(SOURCE) == 1
    assert log.generation(SOURCE) == before + 1
    assert log.end_offset(SOURCE) == 1
    log.append(SOURCE, portion(transaction(20), lsn=20))
    assert [r.offset for r in log.records(SOURCE, 0)] == [1, 3], "offsets are never used twice"
    assert content(log) == [*rows_of(transaction(10)), *rows_of(transaction(20))]
    assert rows_of(log.read(held[0], ORDERS)) == rows_of(transaction(20)), "a reader in between is not torn"
    assert log.discard_open(SOURCE) == 0
    assert log.generation(SOURCE) == before + 1


def test_after_a_restart_the_open_transaction_must_be_discarded_before_anything_is_appended(tmp_path: Path) -> None:
    state, log = open_log(tmp_path)
    log.append(SOURCE, portion(transaction(10), transaction(20), lsn=10))
    state.close()
    _, log = open_log(tmp_path)
    with pytest.raises(InvariantBroken, match="not discarded"):
        log.append(SOURCE, portion(transaction(20), lsn=20))
    assert log.discard_open(SOURCE) == 1
    log.append(SOURCE, portion(transaction(20), lsn=20))
    assert len(content(log)) == 4


def test_a_chunk_and_what_belongs_to_it_are_one_append(opened: tuple[State, EventLog]) -> None:
    state, log = opened
    log.append(SOURCE, portion(transaction(10), transaction(20), lsn=10))
    run = state.create_run(SOURCE, ORDERS.table, "first", state="running")
    with log.lock():
        rows = batch(ORDERS, chunk_rows(10, 0, 3), op="r", run=run.id)
        end = log.append_chunk(
            SOURCE,
            [rows],
            run=run.id,
            chunk=0,
            within=lambda tx: state.update_run(run.id, tx=tx, chunk_no=0, rows=3) and None,
        )
    assert end == log.end_offset(SOURCE) == 3
    record = log.records(SOURCE, 2)[0]
    assert (record.kind, record.run, record.chunk) == ("chunk", run.id, 0)
    found = state.run(run.id)
    assert found is not None
    assert found.rows == 3
    assert log.discard_open(SOURCE) == 1, "the chunk is complete, whatever is open around it"
    assert [r.offset for r in log.records(SOURCE, 0)] == [1, 3]


def test_a_chunk_whose_progress_cannot_be_saved_leaves_nothing(opened: tuple[State, EventLog]) -> None:
    state, log = opened
    log.append(SOURCE, portion(transaction(10), lsn=10))
    size = log.size_bytes()

    def fail(tx: object) -> None:
        raise KeyError("progress")

    with pytest.raises(KeyError):
        log.append_chunk(SOURCE, [batch(ORDERS, chunk_rows(10, 0, 3), op="r")], run="r", chunk=0, within=fail)
    assert (log.end_offset(SOURCE), log.size_bytes()) == (1, size)
    log.append(SOURCE, portion(transaction(11), lsn=11))
    assert [r.offset for r in log.records(SOURCE, 0)] == [1, 2]
    assert len(content(log)) == 4
    assert state.query("select count(*) from segments")[0][0] == 2, "the cut segment is not written to again"


def test_an_empty_chunk_still_saves_its_progress(opened: tuple[State, EventLog]) -> None:
    state, log = opened
    log.append(SOURCE, portion(transaction(10), lsn=10))
    saved = log.append_chunk(SOURCE, [], run="r", chunk=1, within=lambda tx: state.set("progress", 1, tx))
    assert (saved, state.get("progress")) == (1, 1)


@pytest.mark.parametrize(
    ("lsn", "first", "told"), [(9, 0, "logged position"), (11, 0, "logged position"), (10, -SNAPSHOT_SEQ, "ordinals")]
)
def test_snapshot_rows_stand_right_behind_the_logged_position_or_are_refused(
    log: EventLog, lsn: int, first: int, told: str
) -> None:
    rows = batch(ORDERS, chunk_rows(lsn, first, 1), op="r")
    with pytest.raises(InvariantBroken, match="no position"):
        log.append_chunk(SOURCE, [rows], run="r", chunk=0)
    log.append(SOURCE, portion(transaction(10), lsn=10))
    with pytest.raises(InvariantBroken, match=told):
        log.append_chunk(SOURCE, [rows], run="r", chunk=0)


def test_a_position_is_set_forward_or_into_a_new_epoch_and_never_back(tmp_path: Path, log: EventLog) -> None:
    log.set_position(SOURCE, Boundary(1, 100, 101))
    log.append(SOURCE, portion(transaction(110), transaction(120), lsn=110, xids=[900]))
    for back in (Boundary(1, 109, 200), Boundary(0, 500, 500)):
        with pytest.raises(InvariantBroken, match="would go back"):
            log.set_position(SOURCE, back)
    assert log.hidden(SOURCE, see(1, 2))
    log.set_position(SOURCE, Boundary(2, 7, 8))
    assert not log.hidden(SOURCE, see(1, 2)), "another history's transaction ids say nothing"
    assert not EventLog(tmp_path / "log", open_state(tmp_path, readonly=True), bytes_max=1).hidden(SOURCE, see(1, 2))
    assert log.generation(SOURCE) == 1, "the open transaction went with its epoch"
    log.append(SOURCE, portion(batch(ORDERS, [Row(8, 0, 1, "a")], epoch=2), lsn=8, epoch=2))
    assert [r.lsn for r in content(log)] == [110, 110, 8]


def test_a_snapshot_is_told_to_wait_while_it_does_not_see_a_logged_transaction(tmp_path: Path) -> None:
    state, log = open_log(tmp_path)
    wide = 5 << 32
    log.append(SOURCE, portion(lsn=10, xids=[100, 101]))
    log.append(SOURCE, portion(lsn=20, xids=[103]))
    for _ in range(2):
        assert not log.hidden(SOURCE, see(wide + 104, wide + 104))
        assert log.hidden(SOURCE, see(wide + 103, wide + 103))
        assert log.hidden(SOURCE, see(wide + 101, wide + 104, wide + 101))
        assert not log.hidden(SOURCE, see(wide + 102, wide + 104, wide + 102))
        assert not log.hidden(SOURCE, see(wide + 103, wide + 103), through_lsn=10), "only what was logged till then"
        assert log.hidden(SOURCE, see(wide + 103, wide + 103), through_lsn=20)
        state.close()
        state, log = open_log(tmp_path)


def test_transaction_ids_are_compared_across_the_turn_of_their_32_bits(log: EventLog) -> None:
    log.append(SOURCE, portion(lsn=10, xids=[(1 << 32) - 2, 5]))
    turn = 3 << 32
    assert not log.hidden(SOURCE, see(turn + 6, turn + 6))
    assert log.hidden(SOURCE, see(turn + 5, turn + 5))
    assert log.hidden(SOURCE, see(turn - 2, turn + 6, turn - 2))


def test_pruned_transaction_ids_are_gone_and_the_others_are_not(tmp_path: Path) -> None:
    state, log = open_log(tmp_path)
    for lsn in range(1, 601):
        log.append(SOURCE, portion(lsn=lsn, xids=[1000 + lsn]))
    assert log.prune_xids(SOURCE, 1201) == 200
    for _ in range(2):
        assert state.query("select count(*) from xids")[0][0] < 300, "packed, not one row for each"
        assert log.hidden(SOURCE, see(1600, 1601, 1600))
        assert log.hidden(SOURCE, see(1201, 1601, 1201))
        assert not log.hidden(SOURCE, see(1600, 1601, 1600), through_lsn=599), "the newest keep their own position"
        assert not log.hidden(SOURCE, see(1601, 1601))
        assert not log.hidden(SOURCE, see(1200, 1601, 1200)), "1200 was pruned"
        state.close()
        state, log = open_log(tmp_path)


def test_when_the_index_of_transaction_ids_is_full_what_it_forgot_counts_as_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xids, "IDS_MAX", 10)
    state, log = open_log(tmp_path)
    for lsn in range(1, 12):
        log.append(SOURCE, portion(lsn=lsn, xids=[100 + lsn]))
    assert state.query("select count(*) from xids")[0][0] == 5
    for _ in range(2):
        assert log.hidden(SOURCE, see(104, 120, 104)), "forgotten, so nobody knows"
        assert not log.hidden(SOURCE, see(107, 120))
        assert log.hidden(SOURCE, see(107, 120, 111))
        state.close()
        state, log = open_log(tmp_path)
    log.prune_xids(SOURCE, 107)
    assert not log.hidden(SOURCE, see(104, 120, 104))


def test_a_full_log_refuses_says_how_full_it_is_and_goes_on_when_it_is_trimmed(tmp_path: Path) -> None:
    _, log = open_log(tmp_path, bytes_max=30_000, segment_bytes=4_000)
    lsn = 1
    while log.size_bytes() < 27_500:
        log.append(SOURCE, portion(transaction(lsn, size=1000), lsn=lsn))
        lsn += 1
    with pytest.raises(LogFull, match=r"holds 2[789]\.\d KB of at most 30\.0 KB and 2\.\d KB more") as refused:
        log.append(SOURCE, portion(transaction(lsn, size=1000), lsn=lsn))
    assert "log_bytes_max" in refused.value.hint
    assert log.position(SOURCE) == Boundary(1, lsn - 1, lsn)
    assert log.size_bytes() <= 30_000
    log.append(SOURCE, portion(lsn=lsn - 1, end_lsn=lsn + 5))
    freed = log.trim({SOURCE: 5})
    assert freed > 0
    assert content(log, after=5) == [r for n in range(6, lsn) for r in rows_of(transaction(n, size=1000))]
    log.append(SOURCE, portion(transaction(lsn, size=1000), lsn=lsn))


def test_a_log_full_of_one_open_transaction_says_so(tmp_path: Path) -> None:
    _, log = open_log(tmp_path, bytes_max=30_000)
    for n in range(10):
        log.append(SOURCE, portion(transaction(7, first_seq=2 * n, size=1000)))
    with pytest.raises(LogFull, match="has not ended"):
        log.append(SOURCE, portion(transaction(7, first_seq=20, rows=10, size=1000)))
    assert log.trim({SOURCE: 1000}) == 0, "nobody can have passed what may be void"
    assert log.discard_open(SOURCE) > 0
    assert log.trim({SOURCE: 1001}) > 0
    assert log.size_bytes() == 0


def test_trim_keeps_a_segment_until_the_readers_of_every_source_have_passed_it(tmp_path: Path) -> None:
    state, log = open_log(tmp_path)
    log.append("a", portion(transaction(10), lsn=10))
    log.append("b", portion(transaction(10), lsn=10))
    assert log.trim({"a": 1}) == 0
    assert len(content(log, "a")) == 2
    held = log.records("a", 0)[0]
    assert log.trim({"b": 2}) > 0
    assert (log.size_bytes(), log.records("a", 0), log.records("b", 0)) == (0, [], [])
    assert (log.end_offset("a"), log.end_offset("b")) == (1, 2)
    with pytest.raises(StreamRestarted, match="no longer"):
        log.read(held, ORDERS)
    log.append("a", portion(transaction(11), lsn=11))
    assert log.end_offset("a") == 3
    assert named_and_found(tmp_path, state)[0] == named_and_found(tmp_path, state)[1]


def test_a_disk_that_takes_only_part_of_a_write_leaves_a_usable_log(tmp_path: Path) -> None:
    state, log = open_log(tmp_path)
    log.append(SOURCE, portion(transaction(10), lsn=10))
    big = transaction(11, rows=100, size=100_000)
    with files_no_longer_than(4_000_000), pytest.raises(LogFull, match="no space left"):
        log.append(SOURCE, portion(big, lsn=11))
    assert log.position(SOURCE) == Boundary(1, 10, 11)
    assert named_and_found(tmp_path, state)[0] == named_and_found(tmp_path, state)[1], "the torn bytes are gone"
    log.append(SOURCE, portion(big, lsn=11))
    log.append(SOURCE, portion(transaction(12), lsn=12))
    expected = [*rows_of(transaction(10)), *rows_of(big), *rows_of(transaction(12))]
    assert content(log) == expected
    log.close()
    state.close()
    assert content(open_log(tmp_path)[1]) == expected


@pytest.mark.parametrize("when", ["inside", "commit"])
def test_a_database_that_cannot_be_written_leaves_a_usable_log(tmp_path: Path, when: str) -> None:
    state, log = open_log(tmp_path)
    log.append(SOURCE, portion(transaction(10), lsn=10))
    size = log.size_bytes()
    rows = batch(ORDERS, chunk_rows(10, 0, 3), op="r")
    # What fits into the page cache is written at the commit, what does not is written before.
    value = "x" * (20_000_000 if when == "inside" else 1_000_000)
    wal = tmp_path / "state.db-wal"
    with files_no_longer_than(wal.stat().st_size + 20_000), pytest.raises(CdcError, match="state database"):
        log.append_chunk(SOURCE, [rows], run="r", chunk=0, within=lambda tx: state.set("big", value, tx))
    assert (log.end_offset(SOURCE), state.get("big")) == (1, None)
    assert (log.size_bytes() > size) == (when == "commit"), "what a failed commit wrote may still come to life"
    log.append_chunk(SOURCE, [rows], run="r", chunk=0)
    log.append(SOURCE, portion(transaction(11), lsn=11))
    assert [r.offset for r in log.records(SOURCE, 0)] == ([1, 2, 3] if when == "inside" else [1, 3, 4])
    expected = [*rows_of(transaction(10)), *rows_of(rows), *rows_of(transaction(11))]
    assert content(log) == expected
    log.close()
    state.close()
    state, log = open_log(tmp_path)
    assert content(log) == expected
    assert named_and_found(tmp_path, state)[0] == named_and_found(tmp_path, state)[1]


def test_a_kernel_that_takes_a_few_bytes_at_a_time_gets_them_all_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: real(fd, [views[0][:333], *views[1:1]], at))
    _, log = open_log(tmp_path)
    log.append(SOURCE, portion(transaction(10), transaction(11, size=1000), transaction(12), lsn=12))
    assert [r.lsn for r in content(log)] == [10, 10, 11, 11, 12, 12]


def test_offsets_are_not_used_again_after_everything_was_trimmed_and_the_process_started_anew(tmp_path: Path) -> None:
    state, log = open_log(tmp_path)
    log.append(SOURCE, portion(transaction(10), lsn=10))
    log.trim({SOURCE: 1})
    state.close()
    _, log = open_log(tmp_path)
    assert (log.size_bytes(), log.position(SOURCE)) == (0, Boundary(1, 10, 11))
    log.append(SOURCE, portion(transaction(11), lsn=11))
    assert [r.offset for r in log.records(SOURCE, 0)] == [2]


def test_a_flipped_bit_is_found_when_the_record_is_read(tmp_path: Path) -> None:
    _, log = open_log(tmp_path)
    log.append(SOURCE, portion(transaction(10), transaction(11), lsn=11))
    first, second = log.records(SOURCE, 0)
    path = tmp_path / "log" / f"{second.segment:020d}.seg"
    data = bytearray(path.read_bytes())
    data[second.start + second.bytes // 2] ^= 1
    path.write_bytes(data)
    assert rows_of(log.read(first, ORDERS)) == rows_of(transaction(10))
    with pytest.raises(LogCorrupt, match=rf"record 2 .*{path.name}, byte {second.start}.*checksum"):
        log.read(second, ORDERS)


@pytest.mark.parametrize("damage", ["shorter", "gone", "other", "newer"])
def test_a_log_without_the_bytes_that_its_index_names_does_not_open(tmp_path: Path, damage: str) -> None:
    state, log = open_log(tmp_path)
    log.append(SOURCE, portion(transaction(10), lsn=10))
    log.close()
    state.close()
    path = tmp_path / "log" / f"{1:020d}.seg"
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[7 if damage == "newer" else 8] = 9
        path.write_bytes(data[:-1] if damage == "shorter" else data)
    (tmp_path / "log" / f"{77:020d}.seg").write_bytes(b"unnamed")
    with pytest.raises(FormatTooNew if damage == "newer" else LogCorrupt, match="segment"):
        open_log(tmp_path)
    assert (tmp_path / "log" / f"{77:020d}.seg").exists(), "nothing is removed from a log that is not understood"


def test_a_record_is_read_only_in_its_own_schema_version(log: EventLog) -> None:
    log.append(SOURCE, portion(transaction(10), lsn=10))
    with pytest.raises(InvariantBroken, match="schema version 1"):
        log.read(log.records(SOURCE, 0)[0], replace(ORDERS, version=2))


def test_the_log_refuses_to_be_called_inside_a_state_transaction(opened: tuple[State, EventLog]) -> None:
    state, log = opened
    with state.transaction(), pytest.raises(InvariantBroken, match="inside a state transaction"):
        log.append(SOURCE, portion(lsn=10))


@pytest.mark.parametrize("what", ["record", "position", "close"])
def test_a_waiting_reader_is_woken_by_a_record_by_the_position_and_by_the_end(log: EventLog, what: str) -> None:
    log.append(SOURCE, portion(transaction(1), lsn=1))
    assert log.wait(SOURCE, 0, 0)
    assert not log.wait(SOURCE, 1, 0.01)
    woken: list[bool] = []
    thread = threading.Thread(target=lambda: woken.append(log.wait(SOURCE, 1, 60)))
    thread.start()
    for lsn in range(2, 1000):
        # The thread may come to wait only after the first of these: it is woken by the next one then.
        match what:
            case "record":
                log.append(SOURCE, portion(transaction(lsn)) if lsn == 2 else portion(transaction(2, first_seq=lsn)))
            case "position":
                log.append(SOURCE, portion(lsn=lsn))
            case "close":
                log.close()
        thread.join(0.01)
        if not thread.is_alive():
            break
    assert woken == [what != "close"]


def test_another_process_looks_on_without_touching_anything(tmp_path: Path) -> None:
    _, log = open_log(tmp_path)
    log.append(SOURCE, portion(transaction(10), lsn=10))
    (tmp_path / "log" / f"{50:020d}.seg").write_bytes(b"being written just now")
    seen = open_state(tmp_path, readonly=True)
    looking = EventLog(tmp_path / "log", seen, bytes_max=1 << 30)
    assert content(looking) == rows_of(transaction(10))
    assert (tmp_path / "log" / f"{50:020d}.seg").exists()
    log.append(SOURCE, portion(transaction(11), lsn=11, xids=[5]))
    assert looking.wait(SOURCE, 1, 20)
    assert looking.position(SOURCE) == log.position(SOURCE)
    assert looking.end_offset(SOURCE) == 2
    assert looking.size_bytes() == log.size_bytes()
    assert looking.hidden(SOURCE, see(5, 5))
    for change in (
        lambda: looking.append(SOURCE, portion(lsn=12)),
        lambda: looking.trim({SOURCE: 1}),
        lambda: looking.discard_open(SOURCE),
        lambda: looking.append_chunk(SOURCE, [], run="r", chunk=0),
        lambda: looking.set_position(SOURCE, Boundary(1, 50, 50)),
        lambda: looking.prune_xids(SOURCE, 1),
    ):
        with pytest.raises(InvariantBroken, match="to be read"):
            change()


def test_head_and_commit_time_go_along_with_the_position(opened: tuple[State, EventLog]) -> None:
    state, log = opened
    first = portion(transaction(10), lsn=10)
    first.head_lsn, first.committed_at_us = 500, 1_700_000_000_000_000
    log.append(SOURCE, first)
    second = portion(lsn=10, end_lsn=400)
    second.head_lsn = 450
    log.append(SOURCE, second)
    known = state.source(SOURCE)
    assert known is not None
    assert (known.lsn, known.end_lsn, known.head_lsn, known.committed_at) == (10, 400, 500, 1_700_000_000_000_000)


def test_many_batches_are_written_in_one_append(log: EventLog) -> None:
    made = [transaction(lsn) for lsn in range(1, 1500)]
    log.append(SOURCE, portion(*made, lsn=1499))
    assert len(log.records(SOURCE, 0)) == 1499
    assert np.all(np.diff([r.start for r in log.records(SOURCE, 0)]) > 0)
    assert len(content(log)) == 2998
