"""Where a run by cursor begins: a model of transactions that take their values, and commit whenever they like."""

from __future__ import annotations

import datetime as dt
import random

import pyarrow as pa
import pytest

from cdc.cursor import KINDS, Memory, fresh, highest, text_of
from cdc.table import Column
from cdc.types import DATE, INT4, TIMESTAMP, TIMESTAMPTZ

HOUR_US = 3_600_000_000


def column(type_oid: int) -> Column:
    return Column(name="c", attnum=1, type_oid=type_oid)


class Server:
    """A clock, open transactions with the value that they took when they began, and rows that are visible since."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.clock = 1000
        self.open: dict[str, int] = {}
        self.rows: dict[int, int] = {}
        self.begun = 0

    def step(self) -> None:
        self.clock += self.rng.randrange(3)
        if self.rng.random() < 0.5:
            self.begun += 1
            self.open[f"t{self.begun}"] = self.clock
        elif self.open:
            name = self.rng.choice(sorted(self.open))
            # Most end soon; a few stay open for long.
            if self.rng.random() < 0.7 or int(name[1:]) % 5:
                self.rows[len(self.rows)] = self.open.pop(name)


@pytest.mark.parametrize("lag", [0, 2])
def test_no_row_is_passed_over_whenever_its_transaction_commits(rng: random.Random, lag: int) -> None:
    partial = 0
    for _ in range(200):
        server = Server(rng)
        seen: set[int] = set()
        memory: Memory | None = None
        for _ in range(rng.randrange(3, 25)):
            for _ in range(rng.randrange(12)):
                server.step()
            alive = set(server.open)
            for _ in range(rng.randrange(8)):
                server.step()  # between the look at what is open and the snapshot
            low = memory.begin(alive) if memory is not None else None
            read = {row for row, value in server.rows.items() if low is None or value >= low - lag}
            partial += low is not None and len(read) < len(server.rows)
            seen |= read
            mark = max((server.rows[row] for row in read), default=None)
            memory = fresh(1, 1, 0.0, mark, alive) if memory is None else memory.after(mark, alive)
            memory = Memory.from_json(memory.to_json())
            # One that had been open since before the first run may be found one run later.
            owed = {row for row in server.rows if row not in seen}
            assert not owed or any(memory.open.get(name, 0) is None for name in alive), "a row was passed over"
        assert memory is not None
        low = memory.begin(server.open)
        seen |= {row for row, value in server.rows.items() if low is None or value >= low}
        assert seen == set(server.rows)
    assert partial > 200, "most runs read a part only"


def test_a_value_ahead_of_the_clock_does_not_carry_the_mark_away() -> None:
    now = 1_000_000 * HOUR_US
    values = pa.array([now - 5, now + 99 * HOUR_US, None], pa.timestamp("us", tz="UTC"))
    assert highest(values, column(TIMESTAMPTZ), now) == now
    assert highest(values.cast(pa.timestamp("us")), column(TIMESTAMP), now) == now + 14 * HOUR_US
    assert highest(pa.array([5, 900, None], pa.int32()), column(INT4), now) == 900
    assert highest(pa.array([None], pa.int32()), column(INT4), now) is None
    far = pa.array([dt.date(9999, 1, 1)], pa.date32())
    assert highest(far, column(DATE), now) == (now + 14 * HOUR_US) // (24 * HOUR_US)


def test_marks_are_written_as_the_source_reads_them() -> None:
    at = 1_767_225_600_000_001
    assert text_of(at, column(TIMESTAMPTZ), 0) == "2026-01-01 00:00:00.000001+00"
    assert text_of(at, column(TIMESTAMP), 1.5) == "2025-12-31 23:59:58.500001"
    assert text_of(20_454, column(DATE), 1) == "2025-12-31"
    assert text_of(-7, column(INT4), 300) == "-7"
    assert text_of(-62_135_596_800_000_000, column(TIMESTAMP), 300) == "-infinity"
    assert text_of(-719_162, column(DATE), 300) == "-infinity"
    assert {DATE, TIMESTAMP, TIMESTAMPTZ, INT4} <= KINDS
