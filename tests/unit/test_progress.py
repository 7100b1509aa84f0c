"""How far a snapshot run is, as `status` and `resync --wait` tell it: never more than is known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cdc.ports import SourceStatus
from cdc.state import State, open_state
from cdc.status import estimate_of, snapshot_progress
from cdc.table import TableId

ORDERS = TableId("public", "orders")
SERVER = SourceStatus(head_lsn=1, slot_exists=True, rows_estimated={"public.orders": 4000})


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    opened = open_state(tmp_path)
    opened.update_table("shop", ORDERS, rows=500)
    yield opened
    opened.close()


def test_rate_and_remaining_time_are_means_since_the_run_began(state: State) -> None:
    made = state.create_run("shop", ORDERS, "resync", state="running")
    details = {"bytes": 5000, "strategy": "keys"}
    run = state.update_run(made.id, rows=1000, chunk_no=4, details=details, reason="waits for somebody")
    told = snapshot_progress(run, estimate_of(run, state.table("shop", ORDERS), SERVER), run.started_at / 1e6 + 10)
    assert (told["rows"], told["rows_estimated"], told["chunks"]) == (1000, 4000, 5)
    assert (told["rows_per_second"], told["remaining_seconds"]) == (100, 30)
    assert (told["bytes"], told["strategy"], told["reason"]) == (5000, "keys", "waits for somebody")


def test_what_is_not_known_is_null(state: State) -> None:
    table = state.table("shop", ORDERS)
    waiting = state.create_run("shop", ORDERS, "resync")
    told = snapshot_progress(waiting, estimate_of(waiting, table, None), 1e9)
    assert (told["rows_estimated"], told["rows_per_second"], told["remaining_seconds"]) == (500, None, None), (
        "without the server, the last run's count must do"
    )
    new = state.create_run("shop", TableId("public", "new"), "first")
    assert estimate_of(new, state.table("shop", TableId("public", "new")), SERVER) is None
    part = state.create_run("shop", ORDERS, "filtered", where_sql="id > 5")
    assert estimate_of(part, table, SERVER) is None, "how many rows meet a condition, nobody knows"
    keys = state.create_run("shop", ORDERS, "filtered", details={"keys": [["1"], ["2"]]})
    assert estimate_of(keys, table, SERVER) == 2


def test_an_estimate_that_the_run_has_passed_is_raised(state: State) -> None:
    made = state.create_run("shop", ORDERS, "resync", state="running")
    run = state.update_run(made.id, rows=9000)
    told = snapshot_progress(run, estimate_of(run, state.table("shop", ORDERS), SERVER), run.started_at / 1e6 + 1)
    assert (told["rows_estimated"], told["remaining_seconds"]) == (9000, 0)
