"""The guard: which plans may go by themselves, and which wait for somebody."""

from __future__ import annotations

import pytest

from cdc.config_serving import GuardConfig
from cdc.guarding import LastRun, trips
from cdc.plan import Counts

GUARD, NEVER = GuardConfig(), LastRun()


def limits(counts: Counts, last: LastRun = NEVER, shape: str = "", guard: GuardConfig = GUARD) -> list[str]:
    return [t.limit for t in trips(guard, counts, last, shape)]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (Counts(rows=1_000_000, inserts=1_000_000), []),
        (Counts(rows=1_000, acknowledged=1_000, updates=500, unchanged=500), []),
        (Counts(rows=1_000, acknowledged=1_000, updates=501), ["max_change_share"]),
        (Counts(rows=100, acknowledged=100, updates=100), []),
        (Counts(rows=1_000, acknowledged=1_000, resends=1_000), []),
        (Counts(rows=90, acknowledged=100, deletes=10), []),
        (Counts(rows=89, acknowledged=100, deletes=11), ["max_delete_share"]),
        (Counts(rows=98_999, acknowledged=100_000, deletes=1_001), ["max_delete_rows"]),
        (Counts(rows=0, acknowledged=3, deletes=3), ["allow_empty"]),
        (Counts(rows=0, acknowledged=3, gone=3), []),
        (Counts(rows=2, held=2, acknowledged=3, deletes=3), ["allow_empty"]),
        (Counts(rows=0), []),
        (Counts(rows=0, acknowledged=5_000, deletes=5_000), ["allow_empty", "max_delete_rows", "max_delete_share"]),
    ],
)
def test_shares_are_of_what_is_acknowledged_and_do_not_count_for_small_plans(
    counts: Counts, expected: list[str]
) -> None:
    assert limits(counts) == expected


def test_limits_of_a_configuration_count() -> None:
    counts = Counts(rows=0, acknowledged=5_000, deletes=5_000)
    wide = GuardConfig(max_delete_rows=10_000, max_delete_share=1.0, allow_empty=True)
    assert limits(counts, guard=wide) == []
    assert limits(Counts(rows=99, acknowledged=100, deletes=1), guard=GuardConfig(max_delete_rows=0)) == [
        "max_delete_rows"
    ]


def test_many_rejects_of_the_last_run_and_other_columns_at_the_target_hold_the_next() -> None:
    counts = Counts(rows=5, acknowledged=5)
    assert limits(counts, LastRun(written=40, rejected=10)) == []
    assert limits(counts, LastRun(written=40, rejected=11)) == ["max_reject_share"]
    assert limits(counts, LastRun(written=1, rejected=11, rows=900)) == [], "a few bad rows of many"
    assert (
        limits(counts, LastRun(shape="a"), "a")
        == limits(counts, LastRun(shape="a"), "")
        == limits(counts, NEVER, "b")
        == []
    )
    assert limits(counts, LastRun(shape="a"), "b") == ["allow_drift"]
    assert limits(counts, LastRun(shape="a"), "b", GuardConfig(allow_drift=True)) == []
