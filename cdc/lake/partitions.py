"""Where the rows of a changelog belong when a time of their own decides it, and their way there.

The partition column `_date` stays one text, in UTC, so a table may get another rule at any time: `2026-11-29` is a day,
`2026-11-29T13` an hour, `2026-11` a month. A row whose time is NULL, stands in `_raw` (infinite, before Christ), is not
known (a delete that brings only the key) or does not exist (truncates, control rows) is in the partition null, and
nothing else is: a dated partition holds exactly the rows of its period.

Rows are gathered and sorted by period before objects are made of them, in bounded memory: a snapshot of ten years by
day has one object open at a time. Counts what is late; does not decide when objects end or are committed.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdc.batch import OPTIONAL, REQUIRED, SYSTEM, Batch, batch_schema
from cdc.lake.objects import GROUP_BYTES, scratch_disk
from cdc.lake.spill import Spill
from cdc.lake.widening import SOURCE_NAME
from cdc.metrics import LATENESS_SECONDS
from cdc.table import PartitionBy, TableSchema
from cdc.types import arrow_fields, is_time

NO_PARTITION: Final = "__HIVE_DEFAULT_PARTITION__"
"""How readers of partitioned folders spell null."""
SORTED_BYTES: Final = 512 << 20
"""Rows that wait in a scratch file for their objects, as Arrow: more of them make fewer and bigger objects."""

_UNITS: Final = {"hour": "h", "day": "D", "month": "M"}
_NULL: Final = int(np.iinfo(np.int64).min)
"""numpy's NaT."""


def event_index(by: PartitionBy, schema: TableSchema, lake: pa.Schema) -> int | None:
    """Which of a schema version's columns is the one that `by` names; None if it has none that is a time. `lake`: the
    changelog's fields, by which a column is known again that has been renamed since."""
    fields = arrow_fields(schema)
    for i, f in enumerate(fields):
        if f.name == by.column:
            return i if is_time(f.type) else None
    former = {
        (f.metadata or {}).get(b"pg.attnum")
        for f in lake
        if (f.metadata or {}).get(SOURCE_NAME, f.name.encode()).decode() == by.column and is_time(f.type)
    } - {None}
    return next(
        (i for i, f in enumerate(fields) if (f.metadata or {}).get(b"pg.attnum") in former and is_time(f.type)), None
    )


def period_text(period: int, unit: str) -> str | None:
    """A period as `_date` has it; None for the one of rows without a time."""
    return None if period == _NULL else str(np.int64(period).view(f"datetime64[{_UNITS[unit]}]"))


def _periods(micros: np.ndarray, unit: str) -> np.ndarray:
    """Periods since 1970 of times in microseconds; NaT stays."""
    return micros.view("datetime64[us]").astype(f"datetime64[{_UNITS[unit]}]").view(np.int64)


def _micros(times: pa.Array) -> np.ndarray:
    """Dates or timestamps as microseconds since 1970, NaT where null."""
    if pa.types.is_date(times.type):
        times = times.cast(pa.timestamp("us"))
    return np.asarray(times.view(pa.int64()).fill_null(_NULL).to_numpy())


@dataclass(slots=True)
class Lateness:
    """How late rows came: commit time less event time. Of changes (`c`, `u`, `d`) only: a snapshot's rows are not late,
    they are read late. `late`: those whose period had ended when they were committed; `undated`: rows of the table
    without a time, a snapshot's too."""

    late: int = 0
    undated: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(LATENESS_SECONDS) + 1, np.int64))
    """Changes by the bounds of LATENESS_SECONDS, those beyond the last one last."""
    total_s: float = 0.0

    def note(self, batch: Batch, micros: np.ndarray, unit: str) -> None:
        ops = _plain(batch.system("_op"))
        has_time = micros != _NULL
        rows = pc.is_in(ops, value_set=pa.array(["c", "u", "d", "r"])).to_numpy(zero_copy_only=False)
        self.undated += int((rows & ~has_time).sum())
        changes = rows & has_time & pc.not_equal(ops, "r").to_numpy(zero_copy_only=False)
        committed = _micros(batch.system("_committed_at"))
        changes &= committed != _NULL
        event, commit = micros[changes], committed[changes]
        self.late += int((_periods(event, unit) < _periods(commit, unit)).sum())
        # A clock that is ahead makes no row early.
        late_s = np.maximum(0.0, commit.astype(np.float64) - event.astype(np.float64)) / 1e6
        self.counts += np.bincount(np.searchsorted(LATENESS_SECONDS, late_s), minlength=len(self.counts))
        self.total_s += float(late_s.sum())


class EventRows:
    """Rows of one schema version on their way to the partitions of their times. At most one row group is in memory, the
    rest in one file below `temp_dir`. StoreUnavailable if that disk fails. Not thread-safe."""

    def __init__(self, schema: TableSchema, index: int | None, unit: str, temp_dir: Path, lateness: Lateness) -> None:
        """`index`: of the column whose values decide (`event_index`); None: no row has a time. `lateness`: where it is
        noted how late rows are."""
        self._schema = schema
        self._lateness = lateness
        self._index = index
        self._unit = unit
        self._temp_dir = temp_dir
        path = temp_dir / f"sorted-{secrets.token_hex(6)}"
        self._spill = Spill(path, batch_schema(schema), memory_bytes=GROUP_BYTES // 2)
        self._gathered: list[Batch] = []
        self._gathered_bytes = 0
        self.bytes = 0
        """What has been added, as Arrow."""

    @property
    def held_bytes(self) -> int:
        """What of it is in memory."""
        return self._gathered_bytes

    def add(self, batch: Batch) -> None:
        """Take rows, in order."""
        self._lateness.note(batch, self._times(batch), self._unit)
        self._gathered.append(batch)
        self._gathered_bytes += batch.data.nbytes
        self.bytes += batch.data.nbytes
        if self._gathered_bytes >= GROUP_BYTES:
            self._sort()

    def drain(self) -> Iterator[tuple[str | None, Iterator[Batch]]]:
        """Every partition that has rows, with its rows in their order. Once only."""
        self._sort()
        for period in self._spill.parts():
            yield period_text(period, self._unit), self._rows(period)

    def close(self) -> None:
        """Drop everything; idempotent."""
        self._gathered = []
        self._spill.close()

    def _rows(self, period: int) -> Iterator[Batch]:
        with scratch_disk(self._temp_dir):
            for data in self._spill.batches(period):
                yield Batch(self._schema, _without_nulls(data))

    def _times(self, batch: Batch) -> np.ndarray:
        if self._index is None:
            return np.full(batch.data.num_rows, _NULL)
        return _micros(batch.data.column(batch.row_start + self._index))

    def _sort(self) -> None:
        """Hand what was gathered to the scratch file at once: by many small batches each part would cost more than its
        rows."""
        if not self._gathered:
            return
        gathered, self._gathered, self._gathered_bytes = self._gathered, [], 0
        periods = np.concatenate([_periods(self._times(b), self._unit) for b in gathered])
        table = pa.Table.from_batches([_with_nulls(b) for b in gathered], batch_schema(self._schema))
        start = 0
        with scratch_disk(self._temp_dir):
            for data in table.combine_chunks().to_batches():
                self._spill.add(data, periods[start : start + data.num_rows])
                start += data.num_rows


def _plain(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _with_nulls(batch: Batch) -> pa.RecordBatch:
    """A batch's columns with all system columns among them."""
    target = batch_schema(batch.schema)
    system = [_plain(batch.system(name)) for name in SYSTEM]
    rows = [batch.data.column(batch.row_start + i) for i in range(len(batch.schema.columns))]
    return pa.RecordBatch.from_arrays([*system, *rows], schema=target)


def _without_nulls(data: pa.RecordBatch) -> pa.RecordBatch:
    """The same without optional system columns that hold nothing."""
    empty = {
        i for i in range(len(REQUIRED), len(REQUIRED) + len(OPTIONAL)) if data.column(i).null_count == data.num_rows
    }
    return data.select([i for i in range(data.num_columns) if i not in empty])


__all__ = ["NO_PARTITION", "SORTED_BYTES", "EventRows", "Lateness", "event_index"]
