"""A table partitioned by a time of its rows, from its snapshot to its readers, with kills in the midst of landings; and
landing on order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until
from tests.support.witness import Witness, assert_exactly_once

BY = """
[source.shop.table."public.events"]
partition_by = "happened_at:day"
[source.shop.table."public.plain"]
partition_by = "happened_at:day"
"""
MISPLACED = """
select count(*) from shop.events_changelog
where _date is distinct from strftime(coalesce(happened_at, made_at) at time zone 'UTC', '%Y-%m-%d')
"""
ON_ORDER = {"land_every_s": 3600}
"""Of [lake]: nothing lands by itself, each landing is one that somebody asked for."""
LANDING = ("land.before_upload", "land.before_commit", "land.after_commit", "land.between_tables", "land.after_cut")


def rows(daemon: Daemon, sql: str) -> list[list[object]]:
    answer = daemon.ask("query", sql)
    assert answer.code == 0, answer
    found: list[list[object]] = answer.document["rows"]
    return found


def tell_the_story(directory: Path, dsn: str, points: tuple[str, ...]) -> None:
    execute(
        dsn,
        "create table events (id int primary key, happened_at timestamptz, note text)",
        "create table plain (id int primary key)",
        "insert into events select g, timestamptz '2024-02-28 12:00+00' + g * interval '1 hour', 'old'"
        " from generate_series(1, 48) g",
        "insert into events values (100, null), (101, 'infinity'), (102, '0044-03-15 BC')",
    )
    with Daemon(directory, dsn, lake={} if points else ON_ORDER, more=BY) as daemon:
        findings = [f for f in daemon.ask("check").document["findings"] if f["name"] == "partition_by"]
        assert [(f["severity"], f["object"]) for f in findings] == [("error", "source.shop: public.plain")], findings
        assert "has no column 'happened_at'" in findings[0]["message"]
        assert daemon.ask("lake", "land", "now").code == 1, "no daemon has ever run"
        assert daemon.ask("setup").code == 0
        witness = Witness(dsn, f"witness_{daemon.slot}")
        for number, point in enumerate((*points, "")):
            daemon.start(failpoints=f"{point}=kill:{1 + number % 2}" if point else "").streaming()
            base = 1000 * (number + 1)
            execute(
                dsn,
                f"insert into events select {base} + g, now() - g * interval '20 hours' from generate_series(0, 9) g",
                f"update events set happened_at = happened_at + interval '1 day', note = 'moved' where id = {base + 1}",
                f"delete from events where id = {base + 2}",
                f"insert into plain values ({base})",
            )
            if point:
                assert daemon.ended() == -9, daemon.log_tail()
        daemon.settled()
        if points:
            assert daemon.stop() == 0
            daemon.configure("lake", **ON_ORDER)
            daemon.start().settled()
        execute(
            dsn,
            "alter table events rename column happened_at to made_at",
            "insert into events values (103, '2024-02-29 23:59:59.999999+00'), (104, '-infinity')",
        )
        wait_until(lambda: any("103" in str(r) for r in logged(daemon)), message=daemon.log_tail)
        assert rows(daemon, "select count(*) from shop.events_changelog where id = 103") == [[0]]
        landed = daemon.ask("lake", "land", "now")
        assert landed.code == 0, landed
        assert re.fullmatch(r"[0-9A-F]+/[0-9A-F]+", landed.document["sources"][0]["landed_lsn"])
        daemon.settled().verified()
        assert rows(daemon, "select _date, id from shop.events_changelog where id in (103, 104) order by id") == [
            ["2024-02-29", 103], [None, 104],
        ]  # fmt: skip
        assert rows(daemon, MISPLACED) == [[0]]
        per_day = "select _date, count(*) from shop.events_changelog where note = 'old' group by 1 order by 1"
        assert rows(daemon, per_day) == [["2024-02-28", 11], ["2024-02-29", 24], ["2024-03-01", 13]]
        undated = "select distinct id, _op from shop.events_changelog where _date is null and _op not in ('s', 'd')"
        assert rows(daemon, f"select * from ({undated}) order by 1") == [[100, "r"], [101, "r"], [102, "r"], [104, "c"]]
        assert (
            rows(daemon, "select distinct _op from shop.events_changelog where _op = 'd' and _date is not null") == []
        )
        assert_exactly_once(witness, daemon.lake, ["public.events", "public.plain"])
        undated = "select count(*) > 0, count(_date) from shop.plain_changelog"
        assert rows(daemon, undated) == [[True, 0]], "it has no such column, and loses nothing for that"
        metrics = daemon.http("/metrics")[1]
        late = re.search(r'cdc_late_rows_total\{source="shop",table="public.events"\} (\d+)', metrics)
        assert late, metrics
        assert int(late[1]) >= 1
        assert 'cdc_lateness_seconds_bucket{le="+Inf",source="shop",table="public.events"}' in metrics

        assert daemon.stop() == 0
        down = daemon.ask("lake", "land", "now")
        assert (down.code, down.document["error"]["kind"]) == (1, "NotRunning")


def logged(daemon: Daemon) -> list[object]:
    """Rows in the event log."""
    found: list[object] = daemon.ask("log", "cat", "--table", "events", "--limit", "1000").document["rows"]
    return found


@pytest.mark.slow
def test_rows_are_in_the_partition_of_their_time_from_snapshot_to_reader(tmp_path: Path, database: str) -> None:
    tell_the_story(tmp_path, database, ())


@pytest.mark.slow
def test_the_same_with_a_kill_at_every_point_of_a_landing(tmp_path: Path, database: str) -> None:
    tell_the_story(tmp_path, database, LANDING)
