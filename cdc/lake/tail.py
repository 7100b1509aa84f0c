"""The tail of a changelog: what `current` has not merged, looked through for what a reader of its objects must know.

Reads operations, positions, keys and the names of unchanged columns; of values nothing else. It says which objects have
one shape, which columns some row does not carry, and whether keys moved; and it refuses (`Inexact`) what cannot be
replayed by whoever reads columns of files only: rows without their key, a key change of a row that lacks values, values
that may or may not fit a new type, changes that are older than what is merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdc.errors import CdcError
from cdc.lake.bucket import orders_of
from cdc.lake.current import Outlook
from cdc.lake.events import FileShape, Patterns, attnum_of, convert, file_keys, moved, ops_of, pattern_numbers
from cdc.lake.reduce import ABSENT, KNOWN, UNCHANGED
from cdc.lake.widening import SOURCE_NAME, widens

_ROWS = 1 << 16


class Inexact(CdcError):
    """What a merge would come to cannot be told by reading the objects; the text says why."""


@dataclass(slots=True)
class Group:
    """Objects of one shape. `states`: what their rows know of each column of the layout, but for what `_unchanged`
    names; `unchanged`, `raw`: whether some row has a value in these columns."""

    shape: FileShape
    states: np.ndarray
    paths: list[str] = field(default_factory=list)
    unchanged: bool = False
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Tail:
    """`patterns`: matrix of KNOWN, UNCHANGED, ABSENT, one row per combination that occurs, one column per column of the
    layout. `moved`: whether some row changed its key."""

    groups: list[Group]
    patterns: np.ndarray
    moved: bool


def look_through(outlook: Outlook, open_changelog: Callable[[str], pq.ParquetFile]) -> Tail:
    """Look through the tail of an outlook; Inexact if SQL over its objects would not come to what a merge does."""
    if not outlook.layout.key_index and not outlook.settled:
        raise Inexact("the table has no key, and more than new rows has come")
    found = _Look(outlook)
    for path in outlook.tail:
        with open_changelog(path) as file:
            found.add(path, file)
    return Tail(list(found.groups.values()), found.patterns.matrix[sorted(found.used)], found.moved)


class _Look:
    def __init__(self, outlook: Outlook) -> None:
        self._layout = outlook.layout
        self._newest = outlook.newest or outlook.landed
        self._truncated = max(outlook.scan.truncates, default=None)
        self.groups: dict[tuple[object, ...], Group] = {}
        self.patterns = Patterns(len(outlook.layout.names))
        self.used: set[int] = {0}
        self.moved = False

    def add(self, path: str, file: pq.ParquetFile) -> None:
        shape = FileShape(file.schema_arrow, self._layout)
        name = tuple((f.name, str(f.type), attnum_of(f), (f.metadata or {}).get(SOURCE_NAME)) for f in shape.schema)
        if name not in self.groups:
            self.groups[name] = Group(shape, states_of(shape))
        group = self.groups[name]
        group.paths.append(path)
        if self._layout.key_index and shape.key_names is None:
            raise Inexact("some changes are known by another key")
        wanted = [shape.system[n] for n in ("_op", "_epoch", "_lsn", "_seq", "_unchanged", "_raw") if n in shape.system]
        keys = shape.key_names or []
        old = [f"{shape.system['_before']}.{key}" for key in keys if "_before" in shape.system]
        for data in file.iter_batches(_ROWS, columns=[*wanted, *keys, *old]):
            self._rows(data, group)

    def _rows(self, data: pa.RecordBatch, group: Group) -> None:
        shape = group.shape
        changes = np.isin(ops_of(data, shape), np.frombuffer(b"crud", np.uint8))
        if self._truncated is not None:
            changes &= ~orders_of(data, shape).older_than(self._truncated)
        if not changes.any():
            return
        data = data.filter(pa.array(changes))
        self._refuse_late(data, shape)
        numbers = pattern_numbers(data, shape, self.patterns, group.states)
        self.used |= set(np.unique(numbers).tolist())
        group.unchanged |= "_unchanged" in shape.system and _has_any(data, shape.system["_unchanged"])
        group.raw |= "_raw" in shape.system and _has_any(data, shape.system["_raw"])
        if not shape.key_names:
            return
        keys = file_keys(data, shape)
        if keys.null_count:
            raise Inexact("some changes do not say their whole key")
        is_moved, _ = moved(data, shape, ops_of(data, shape), keys)
        self.moved |= bool(is_moved.any())
        if (is_moved & (numbers != 0)).any():
            raise Inexact("a row changed its key, and some of its values stand in older rows only")

    def _refuse_late(self, data: pa.RecordBatch, shape: FileShape) -> None:
        """Rows that stand before what is merged would have to be weighed against each of its rows."""
        newest = self._newest
        if newest is not None and orders_of(data, shape).older_than(newest._replace(seq=newest.seq + 1)).any():
            raise Inexact("some changes are older than what is merged")


def states_of(shape: FileShape) -> np.ndarray:
    """What a file knows of each column of the layout. Inexact if that depends on its values."""
    states = np.full(len(shape.source), KNOWN, np.uint8)
    for i, (name, field_) in enumerate(zip(shape.source, shape.layout.fields, strict=True)):
        if name is None:
            states[i] = ABSENT
            continue
        kind = shape.schema.field(name).type
        if certain(kind, field_.type):
            continue
        if convert(pa.nulls(0, kind), field_.type) is not None:
            raise Inexact(f"column {shape.layout.names[i]} has another type, which may not hold its older values")
        states[i] = UNCHANGED
    return states


def certain(old: pa.DataType, new: pa.DataType) -> bool:
    """Whether every value of the one type converts to the other, the same for a merge and for SQL."""
    if convert(pa.nulls(0, old), new) is None:
        return False
    text = pa.types.is_integer(old) and pa.types.is_string(new)
    sibling = pa.types.is_string(new) or pa.types.is_binary(new)
    return bool(text or (sibling and not pa.types.is_integer(old)) or widens(old, new))


def _has_any(data: pa.RecordBatch, name: str) -> bool:
    return bool(pc.count(data.column(name)).as_py())
