"""A gigabyte of text, split over many rows: half is there before, half comes by the stream; memory stays bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.daemon import Daemon, execute

ROWS, ROW_KB = 10_000, 50
PEAK_MB = 700


def peak_mb(pid: int) -> int:
    """The most memory that a process has had resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) >> 10


@pytest.mark.slow
def test_a_gigabyte_of_text_passes_through_bounded_memory(database: str, tmp_path: Path) -> None:
    def rows(first: int) -> str:
        # Differs from row to row, so that neither side can hold one value for all.
        return (
            f"insert into texts select g, repeat(md5(g::text) || E'\\n,\"\\\\', {ROW_KB * 1024 // 36})"
            f" from generate_series({first}, {first + ROWS - 1}) g"
        )

    execute(database, "create table texts (id int primary key, body text)", rows(1))
    with Daemon(tmp_path, database, lake={"land_every_s": 2, "merge_every_s": 2}) as daemon:
        daemon.start().settled(600)
        after_snapshot = peak_mb(daemon.pid)
        execute(database, rows(ROWS + 1), "update texts set body = body || '!' where id % 1000 = 0")
        daemon.settled(600)
        after_stream = peak_mb(daemon.pid)
        daemon.verified(timeout_s=600)
        query = "select count(*), sum(length(body)), count(*) filter (where body like '%!') from shop.texts"
        ((count, length, changed),) = daemon.ask("query", query).document["rows"]
        assert (count, changed) == (2 * ROWS, 2 * ROWS // 1000)
        assert int(length) > 2 * ROWS * (ROW_KB - 1) * 1024
        assert (after_snapshot < PEAK_MB, after_stream < PEAK_MB) == (True, True), (after_snapshot, after_stream)
