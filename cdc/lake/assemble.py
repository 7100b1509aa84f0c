"""Rows to write, cell by cell: from changes, from the row that the table holds, or a column's missing value.

Works on the indexes that cdc.lake.reduce gives; takes them in slices, so that only one slice exists twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdc.batch import RAW_TYPE
from cdc.errors import InvariantBroken
from cdc.lake.events import FIRST_COLUMN, Layout
from cdc.lake.reduce import MISSING, Reduced
from cdc.types import build_raw, cast


class Missing:
    """What rows that are older than a column show in it (`pg_attribute.attmissingval`)."""

    def __init__(self, layout: Layout) -> None:
        self._names = layout.names
        self.values: list[pa.Array] = []
        self.texts: list[str | None] = []
        for column, field in zip(layout.schema.columns, layout.fields, strict=True):
            value, mask = cast(column, pa.array([column.missing], pa.string()))
            self.values.append(value if value.type == field.type else value.cast(field.type))
            self.texts.append(column.missing if mask is not None and mask[0] else None)

    def array(self, column: int, n: int) -> pa.Array:
        """The missing value of a column, n times."""
        return self.values[column].take(pa.array(np.zeros(n, np.int64)))

    def fill(self, columns: list[pa.Array], raw: pa.Array, absent: list[int]) -> tuple[list[pa.Array], pa.Array]:
        """Rows of a file that lacks the columns `absent`, with their missing values; `raw` with the texts of those."""
        n = len(raw)
        filled = [self.array(i, n) if i in absent else column for i, column in enumerate(columns)]
        texts = [(self._names[i], text) for i in absent if (text := self.texts[i]) is not None]
        if texts:
            raw = pa.array([(row or []) + texts for row in raw.to_pylist()], RAW_TYPE)
        return filled, raw

    def given(self, column: int) -> bool:
        """Whether the missing value of a column is anything but NULL."""
        return self.values[column].null_count == 0 or self.texts[column] is not None


@dataclass(frozen=True, slots=True)
class TargetRows:
    """Existing rows that give values: targets `first` … of the reduction, at these `rows` of the arrays."""

    columns: list[pa.Array]
    raw: pa.Array
    first: int
    rows: np.ndarray


class Assembly:
    """The rows of one reduction. `events` is a table of `Layout.event_schema`."""

    def __init__(self, layout: Layout, missing: Missing, events: pa.Table, reduced: Reduced) -> None:
        events = events.combine_chunks()
        self._layout = layout
        self._missing = missing
        self._reduced = reduced
        self._n = events.num_rows
        self._columns = [_one(events.column(FIRST_COLUMN + i)) for i in range(len(layout.names))]
        self._raw = _one(events.column("raw"))
        self.system = {
            name: _one(events.column(name)) for name in ("key", "epoch", "lsn", "seq", "committed_at", "origin")
        }
        self.row_bytes = max(1, events.nbytes // max(1, self._n))

    def target_of(self) -> np.ndarray:
        """Per row to write the target row that gives it values, -1 if none does. It is one row at most: all columns
        follow the same parents."""
        out = np.full(len(self._reduced.upserts), -1, np.int64)
        for source in self._reduced.sources.values():
            np.maximum(out, source - self._n, out=out)
        return np.maximum(out, -1)

    def rows(self, positions: np.ndarray, target: TargetRows | None) -> tuple[list[pa.Array], pa.Array, np.ndarray]:
        """Columns of the layout, `_raw`, and the event index of the rows to write at `positions`."""
        final = self._reduced.upserts[positions]
        index = pa.array(final)
        columns: list[pa.Array] = []
        sources: dict[int, np.ndarray] = {}
        for i, values in enumerate(self._columns):
            source = self._reduced.sources.get(i)
            if source is None:
                columns.append(values.take(index))
                continue
            sources[i] = source[positions]
            columns.append(self._gather(sources[i], values, target.columns[i] if target else None, target, i))
        return columns, self._raw_of(final, columns, sources, target), final

    def _gather(
        self, source: np.ndarray, own: pa.Array, other: pa.Array | None, target: TargetRows | None, column: int | None
    ) -> pa.Array:
        """Cells from changes, target rows, and (for a column number) missing values, in the order of `source`."""
        parts: list[pa.Array] = []
        places: list[np.ndarray] = []
        groups = ((source >= 0) & (source < self._n), source >= self._n, source < 0)
        for which, mask in enumerate(groups):
            at = np.flatnonzero(mask)
            if not len(at):
                continue
            places.append(at)
            if which == 0:
                parts.append(own.take(pa.array(source[at])))
            elif which == 1:
                if target is None or other is None:
                    raise InvariantBroken("a row to write needs a target row that is not at hand")
                parts.append(other.take(pa.array(target.rows[source[at] - self._n - target.first])))
            elif (source[at] != MISSING).any():
                raise InvariantBroken("a row with unknown values was about to be written")
            elif column is None:
                parts.append(pa.nulls(len(at), own.type))
            else:
                parts.append(self._missing.array(column, len(at)))
        if len(parts) == 1:
            return parts[0]
        together = np.concatenate(places) if places else np.empty(0, np.int64)
        back = np.empty(len(together), np.int64)
        back[together] = np.arange(len(together))
        return pa.concat_arrays(parts).take(pa.array(back)) if parts else own.slice(0, 0)

    def _raw_of(
        self, final: np.ndarray, columns: list[pa.Array], sources: dict[int, np.ndarray], target: TargetRows | None
    ) -> pa.Array:
        """`_raw` of the rows: each text goes with the row that its cell came from."""
        if not sources:
            return self._raw.take(pa.array(final))
        names = set() if self._raw.null_count == len(self._raw) else set(pc.unique(self._raw.keys).to_pylist())
        if target is not None and target.raw.null_count < len(target.raw):
            names |= set(pc.unique(target.raw.keys).to_pylist())
        found: list[str] = []
        texts: list[pa.Array] = []
        for i, name in enumerate(self._layout.names):
            by_default = self._missing.texts[i] if i in sources else None
            if name not in names and by_default is None:
                continue
            source = sources.get(i, final)
            raw = self._gather(source, self._raw, target.raw if target else None, target, None)
            text = pc.map_lookup(raw, pa.scalar(name), "first")
            if by_default is not None:
                text = pc.if_else(pa.array(source == MISSING), pa.scalar(by_default), text)
            found.append(name)
            texts.append(pc.if_else(columns[i].is_null(), text, pa.scalar(None, pa.string())))
        masks = [text.is_valid().to_numpy(zero_copy_only=False) for text in texts]
        built = build_raw(found, texts, masks) if found else None
        return pa.nulls(len(final), RAW_TYPE) if built is None else built


def _one(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array."""
    if column.num_chunks == 1:
        return column.chunk(0)
    return column.combine_chunks() if column.num_chunks else pa.array([], column.type)
