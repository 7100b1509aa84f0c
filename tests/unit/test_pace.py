"""How much a snapshot reads at once, how fast, and when not at all; and how far the ranges of a run are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cdc import pace
from cdc.pace import ChunkSize, LoadLimit, RateLimit
from cdc.ports import Plan
from cdc.ranges import Range, advanced, details_of, first_free, ranges_of
from cdc.runs import Run
from cdc.table import TableId

BOUNDS = {"rows_max": 100_000, "bytes_max": 10_000_000}


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pace, "time", made)
    return made


@pytest.mark.parametrize("rows_per_s", [700.0, 30_000.0])
def test_a_chunk_comes_to_about_a_second_and_stays_there(rows_per_s: float) -> None:
    size = ChunkSize(20_000)
    for _ in range(10):
        size.learn(size.size / rows_per_s, int(size.size), int(size.size) * 50, **BOUNDS)
    assert size.size == pytest.approx(rows_per_s, rel=0.05)


def test_a_chunk_holds_to_its_rows_and_bytes_and_grows_by_steps() -> None:
    size = ChunkSize(1_000)
    size.learn(1e-6, 1_000, 1_000, **BOUNDS)
    assert size.size == 4_000
    for _ in range(10):
        size.learn(0.001, int(size.size), int(size.size) * 50, **BOUNDS)
    assert size.size == pytest.approx(100_000, rel=0.01)
    for _ in range(10):
        size.learn(0.001, int(size.size), int(size.size) * 1_000, **BOUNDS)
    assert size.size == pytest.approx(9_000, rel=0.01)
    size.learn(3600.0, 9_000, 9_000, **BOUNDS)
    assert size.size == pytest.approx(2_250, rel=0.01), "one slow chunk is not taken for the rule"
    empty = ChunkSize(1.0)
    empty.learn(1000.0, 0, 0, **BOUNDS)
    assert empty.size == 1.0


def test_what_all_readers_read_is_held_to_the_rates(clock: Clock) -> None:
    limit = RateLimit(1_000, 50_000)
    assert limit.chunk_bounds(100_000, 10_000_000) == (1_000, 50_000)
    assert limit.wait_s() == 0
    limit.took(500, 100_000)
    assert limit.wait_s() == pytest.approx(2.0), "the tighter of the two"
    limit.took(1_000, 0)
    assert limit.wait_s() == pytest.approx(3.0), "of several readers together"
    clock.now += 60
    assert limit.wait_s() == 0
    limit.took(1_000, 0)
    assert limit.wait_s() == pytest.approx(1.0), "time that nobody used is not saved up"
    free = RateLimit(0, 0)
    free.took(10**9, 10**12)
    assert (free.wait_s(), free.chunk_bounds(7, 8)) == (0, (7, 8))


def test_a_busy_source_is_asked_once_a_second_and_only_while_something_is_to_be_read(clock: Clock) -> None:
    asked: list[int] = []

    def active() -> int:
        asked.append(1)
        return 5 + len(asked)

    limit = LoadLimit(6, active)
    assert limit.why(idle=True) == ""
    assert limit.why(idle=False) == ""
    assert limit.why(idle=False) == ""
    assert len(asked) == 1
    clock.now += 1.5
    assert limit.why(idle=False) == "is paused: 7 clients are active (more than 6)"
    assert LoadLimit(0, active).why(idle=False) == ""
    assert len(asked) == 2


RUN = Run(
    id="r", source="s", table=TableId("public", "t"), kind="first", state="running", chunk_no=3, last_key=None,
    first_lsn=1, rows=0, created_at=1, started_at=1, ended_at=0, where_sql="", reason="", details={},
)  # fmt: skip


def test_ranges_end_one_by_one_in_any_order_and_the_run_with_the_last() -> None:
    plan = Plan(
        strategy="keys", why="it is so", ranges=[(None, ("5", "b")), (("5", "b"), ("9", "a")), (("9", "a"), None)]
    )
    run = replace(RUN, details=details_of(plan))
    assert ranges_of(run)[1] == Range(("5", "b"), ("9", "a"))
    assert [first_free(run, taken) for taken in ([], [0], [0, 1, 2])] == [0, 1, None]
    for number, at, done, all_done in (
        (2, ("12", "x"), False, False), (0, ("5", "b"), True, False), (2, None, True, False),
        (1, ("6", "c"), False, False), (1, None, True, True),
    ):  # fmt: skip
        details, ended = advanced(run, number, at, done)
        assert ended is all_done
        run = replace(run, details={**run.details, **details})
    assert ranges_of(run)[1:] == [Range(("6", "c"), ("9", "a"), True), Range(("12", "x"), None, True)]


def test_a_run_that_was_never_planned_has_one_range_that_goes_on_at_its_last_key() -> None:
    run = replace(RUN, last_key=["7"])
    assert ranges_of(run) == [Range(("7",), None)]
    assert advanced(run, 0, ("8",), True) == ({}, True)
    assert advanced(run, 0, ("8",), False) == ({}, False)
