"""What lies between the reading of a chunk and its append: the log may have landed and been trimmed meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from cdc.backfill import Backfill
from cdc.batch import Boundary
from cdc.log import EventLog
from cdc.ports import RowsRead, TableSnapshot, Visibility
from cdc.schema import SchemaBook
from cdc.state import State
from cdc.table import TableSchema
from tests.support.logs import ORDERS, SOURCE, Row, batch, content, open_log, portion
from tests.support.waiting import wait_until

SEEN_AT = 100
"""LSN at which the snapshot is taken; every transaction from this id on is later than it."""


class Reader:
    """Three rows, read at SEEN_AT."""

    def tables(self, only: object = None) -> Any:
        return SimpleNamespace(tables=[SimpleNamespace(schema=replace(ORDERS, version=0))])

    def writers(self) -> dict[str, str]:
        return {}

    def begin(self, schema: TableSchema) -> TableSnapshot:
        seen = Visibility(xmin=SEEN_AT, xmax=SEEN_AT, in_progress=frozenset())
        return TableSnapshot(
            visibility=seen, schema=replace(ORDERS, version=0), relfilenode=1, lsn=SEEN_AT, taken_at_us=1
        )

    def read(
        self, *, after: object = None, keys: Sequence[tuple[str, ...]] | None = None, rows_max: int = 0
    ) -> RowsRead:
        columns = [pa.array([1, 2, 3], pa.int64()), pa.array(["old"] * 3)]
        return RowsRead(columns=columns, raw=None, rows=3, last_key=("3",), done=True)

    def end(self) -> None:
        pass


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[tuple[State, EventLog, Backfill]]:
    state, log = open_log(tmp_path, bytes_max=100_000)
    log.set_position(SOURCE, Boundary(1, 10, 11))
    made = Backfill(
        SOURCE, Reader(), log, state, SchemaBook(state, SOURCE), chunk_rows=10,
        landed_lsn=lambda table: -1, stop_table=lambda table, error: None, nudge=lambda: 0,
    )  # fmt: skip
    yield state, log, made
    state.close()


def read_a_chunk(log: EventLog, backfill: Backfill) -> None:
    backfill.order(ORDERS.table, "resync")
    wait_until(lambda: backfill.step() and log.end_offset(SOURCE) > 0, message="the run to begin")
    backfill.step()
    assert backfill.step() is False, "the stream has not reached what the chunk has seen"


def ends(backfill: Backfill) -> bool:
    backfill.step()
    return backfill.idle


def read_rows(log: EventLog) -> list[Row]:
    return [row for row in content(log) if row.note == "old"]


def test_what_came_after_a_chunk_was_read_is_left_out_of_it_although_it_has_landed_and_was_trimmed(
    parts: tuple[State, EventLog, Backfill],
) -> None:
    _, log, backfill = parts
    read_a_chunk(log, backfill)
    later = batch(ORDERS, [Row(SEEN_AT + 10, 0, 2, "new")])
    log.append(SOURCE, portion(replace_xid(later, SEEN_AT + 1), lsn=SEEN_AT + 10, xids=[SEEN_AT + 1]))
    log.trim({SOURCE: log.end_offset(SOURCE)})
    wait_until(lambda: ends(backfill), message="the chunk to be appended")
    assert [row.id for row in read_rows(log)] == [1, 3]
    assert log.trim({SOURCE: log.end_offset(SOURCE)}) > 0, "nothing is held any more"


def test_a_chunk_whose_window_had_to_make_room_is_read_again(parts: tuple[State, EventLog, Backfill]) -> None:
    state, log, backfill = parts
    read_a_chunk(log, backfill)
    for n in range(30):
        lsn = SEEN_AT - 40 + n
        log.append(SOURCE, portion(batch(ORDERS, [Row(lsn, 0, 2, "x" * 9_000)]), lsn=lsn))
        log.trim({SOURCE: log.end_offset(SOURCE)})
    log.append(SOURCE, portion(lsn=SEEN_AT + 10))
    wait_until(lambda: ends(backfill), message="the chunk to be read again")
    (run,) = state.runs(SOURCE, ORDERS.table)
    assert (run.state, run.rows) == ("done", 3)


@pytest.mark.parametrize("stands", ["stopped", "removed"])
def test_a_run_that_was_ordered_does_not_take_back_the_stop_of_its_table(
    parts: tuple[State, EventLog, Backfill], stands: str
) -> None:
    """Two parts find out at once that a table's rows are in doubt and that its shape is not to be taken, or that it is
    gone: it would be shown as streaming, and never merged."""
    state, log, backfill = parts
    run = backfill.order(ORDERS.table, "resync")
    state.update_table(SOURCE, ORDERS.table, state=stands, reason="frozen")
    wait_until(lambda: ends(backfill), message="the run to be given up")
    after = state.run(run.id)
    assert after is not None
    assert (after.state, state.table(SOURCE, ORDERS.table).state) == ("failed", stands)
    assert read_rows(log) == []


def test_a_run_that_is_cancelled_while_a_lane_reads_it_stops_nothing(tmp_path: Path) -> None:
    """Another lane looks around meanwhile, and finds nothing to do."""
    state, log = open_log(tmp_path, bytes_max=100_000)
    log.set_position(SOURCE, Boundary(1, 10, 11))
    looked: list[bool] = []

    class Cancelled(Reader):
        def read(self, **how: Any) -> RowsRead:
            backfill.retire(ORDERS.table, "dropped", "")
            looked.append(backfill.step(1))
            return super().read()

    backfill = Backfill(
        SOURCE, Cancelled(), log, state, SchemaBook(state, SOURCE), chunk_rows=10, more_readers=[Cancelled()],
        landed_lsn=lambda table: -1, stop_table=lambda table, error: None, nudge=lambda: 0,
    )  # fmt: skip
    backfill.order(ORDERS.table, "resync")
    wait_until(lambda: backfill.step() is not None and looked, message="a chunk to be read")
    log.append(SOURCE, portion(lsn=SEEN_AT + 10))
    wait_until(lambda: ends(backfill), message="the lane to be free")
    assert (looked, read_rows(log), state.table(SOURCE, ORDERS.table).state) == ([False], [], "removed")
    state.close()


def replace_xid(changes: Any, xid: int) -> Any:
    data = changes.data
    index = data.schema.get_field_index("_xid")
    changed = data.set_column(index, data.schema.field(index), pa.array([xid] * data.num_rows, pa.int64()))
    return replace(changes, data=changed)


def test_a_first_snapshot_begins_behind_what_was_written_before_it_was_ordered(tmp_path: Path) -> None:
    """A slot may be older than the first snapshot: what the stream still brings must not count as met by the run, for
    a leaf that was truncated in silence meanwhile would come back."""
    state, log = open_log(tmp_path, bytes_max=100_000)
    log.set_position(SOURCE, Boundary(1, 10, 11))
    backfill = Backfill(
        SOURCE, Reader(), log, state, SchemaBook(state, SOURCE), chunk_rows=10,
        landed_lsn=lambda table: -1, stop_table=lambda table, error: None, nudge=lambda: 50,
    )  # fmt: skip
    run = backfill.order(ORDERS.table, "first")

    def waits() -> bool:
        backfill.step()
        now = state.run(run.id)
        return now is not None and "waits for the stream" in now.reason

    wait_until(waits, message="the run to wait")
    backlog = batch(ORDERS, [Row(40, 0, 9, "gone")])
    log.append(SOURCE, portion(backlog, lsn=40, xids=[5]))
    log.append(SOURCE, portion(lsn=60))
    wait_until(lambda: backfill.step() and log.end_offset(SOURCE) > 1, message="the run to begin")
    began = state.run(run.id)
    assert began is not None
    assert (began.state, began.first_lsn >= 50) == ("running", True)
    state.close()
