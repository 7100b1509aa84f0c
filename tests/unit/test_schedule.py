"""When runs are due."""

from __future__ import annotations

import datetime as dt

import pytest

from cdc.schedule import Schedule


def at(text: str) -> float:
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC).timestamp()


@pytest.mark.parametrize(
    ("schedule", "began", "due"),
    [
        (Schedule(every="15m"), "2026-03-01 10:07:00", "2026-03-01 10:22:00"),
        (Schedule(cron="0 * * * *"), "2026-03-01 10:07:00", "2026-03-01 11:00:00"),
        (Schedule(cron="0 * * * *"), "2026-03-01 11:00:00", "2026-03-01 12:00:00"),
        (Schedule(cron="30 2 * * *"), "2026-03-29 02:30:00", "2026-03-30 02:30:00"),
        (Schedule(cron="0 0 29 2 *"), "2026-03-01 00:00:00", "2028-02-29 00:00:00"),
    ],
)
def test_the_next_run_is_due_after_the_last_one_began(schedule: Schedule, began: str, due: str) -> None:
    assert schedule.next_after(at(began)) == at(due)


def test_a_source_that_never_ran_is_due_and_missed_runs_are_one() -> None:
    schedule = Schedule(cron="*/5 * * * *")
    assert schedule.next_after(0) == 0
    began, now = at("2026-03-01 10:00:00"), at("2026-03-03 00:02:00")
    assert schedule.next_after(began) <= now, "576 were missed"
    assert schedule.next_after(now) == at("2026-03-03 00:05:00"), "and one run makes up for them"


@pytest.mark.parametrize("cron", ["", "* * * *", "0 0 31 2 *", "a b c d e", "60 * * * *"])
def test_what_is_no_schedule_is_refused(cron: str) -> None:
    with pytest.raises(ValueError, match=r"is no (cron expression|duration)"):
        Schedule(cron=cron)
