"""Where a run of strategy "cursor" begins to read: which rows may be new since the last one.

A row that becomes visible between two runs was written by a transaction that was open at the first one, or began later.
One that began later took its value of the column after the first run: it is past the highest value that was read then.
For one that was open, it is past what had been read before *it* began. So each run notes its highest value, and the
transactions that were open just before its snapshot, each with the mark of two runs before it was first seen (two, for
what begins between the look and the snapshot). `lag` is added for clocks that are not the server's.

Values are integers: a number, days, or microseconds since 1970. Null is in no order: such rows are always read. The
first two or three runs read the whole table, because what was open then has no such mark. A column that is written with
older values, or not at all, is not seen; nor are deletes: that only a full comparison finds. Pure, JSON in and out.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cdc.table import Column
from cdc.types import DATE, INT2, INT4, INT8, TIMESTAMP, TIMESTAMPTZ

NUMBERS = frozenset({INT2, INT4, INT8})
KINDS = frozenset({*NUMBERS, DATE, TIMESTAMP, TIMESTAMPTZ})
DAY_US = 86_400_000_000
ZONES_US = 14 * 3_600_000_000
"""A timestamp without a zone may be ahead of UTC by so much."""
MARKS = 3
EARLIEST_US = -62_135_000_000_000_000
"""About the year 1, where the types of Python end."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What the runs of one table have come to. `marks`: the highest values of the last runs, newest last (None: nothing
    was read). `open`: transactions that were open at the last run, with the value from which on their rows are to be
    read (None: from the first one on). `full_at`: when the table was last read whole (Unix seconds)."""

    version: int
    storage: int
    full_at: float
    marks: tuple[int | None, ...]
    open: dict[str, int | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version, "storage": self.storage, "full_at": self.full_at,
            "marks": list(self.marks), "open": self.open,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Memory:
        return cls(data["version"], data["storage"], data["full_at"], tuple(data["marks"]), data["open"])

    def begin(self, alive: Collection[str]) -> int | None:
        """The value from which on the next run must read; None: the whole table, because nothing less is certain.
        `alive`: transactions that are open just before its snapshot."""
        if len(self.marks) < MARKS - 1:
            return None
        lows = [self.marks[-2]]
        for name, low in self.open.items():
            # What one that is still open writes comes to light when it has ended: then its rows are looked for.
            if low is not None or name not in alive:
                lows.append(low)
        return None if None in lows else min(low for low in lows if low is not None)

    def after(self, mark: int | None, alive: Collection[str], *, full_at: float | None = None) -> Memory:
        """What a run leaves that has read to `mark`; `full_at`: it has read the whole table, then."""
        low = self.marks[-2] if len(self.marks) >= MARKS - 1 else None
        still = {name: self.open.get(name, low) for name in sorted(alive)}
        highest = max((m for m in (mark, self.marks[-1] if self.marks else None) if m is not None), default=None)
        marks = (*self.marks, highest)[-MARKS:]
        return Memory(self.version, self.storage, self.full_at if full_at is None else full_at, marks, still)


def fresh(version: int, storage: int, full_at: float, mark: int | None, alive: Collection[str]) -> Memory:
    """What the first run leaves, which has read the whole table: what is open then may be about to show anything."""
    return Memory(version, storage, full_at, (mark,), dict.fromkeys(sorted(alive)))


def highest(values: pa.Array, column: Column, clock_us: int) -> int | None:
    """The highest value of a column of the kinds that have marks, but none that is ahead of the clock; None if there is
    none. What is ahead is read again until its time has come."""
    found = pc.max(values)
    if not found.is_valid:
        return None
    if column.type_oid in NUMBERS:
        return int(found.as_py())
    if column.type_oid == DATE:
        return min(int(found.value), (clock_us + ZONES_US) // DAY_US)
    return min(int(found.value), clock_us if column.type_oid == TIMESTAMPTZ else clock_us + ZONES_US)


def text_of(value: int, column: Column, lag_s: float) -> str:
    """A value less the lag, as the source reads it."""
    if column.type_oid in NUMBERS:
        return str(value)
    if column.type_oid == DATE:
        if (value - lag_s / 86_400) * DAY_US < EARLIEST_US:
            return "-infinity"
        return (dt.date(1970, 1, 1) + dt.timedelta(days=value - int(-(-lag_s // 86_400)))).isoformat()
    if value - lag_s * 1e6 < EARLIEST_US:
        return "-infinity"
    moment = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=value - round(lag_s * 1e6))
    zone = "+00" if column.type_oid == TIMESTAMPTZ else ""
    return f"{moment.replace(tzinfo=None).isoformat(sep=' ')}{zone}"


__all__ = ["KINDS", "Memory", "fresh", "highest", "text_of"]
