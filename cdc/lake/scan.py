"""First look at the changelog's new files: everything that concerns a merge as a whole, before any row is handled.

Reads operations and origins of all rows, keys only where a row group has old tuples, row images never. Finds truncates
and the begins and ends of snapshot runs (as barriers of the reduction), the keys that rows which lack values moved
between, and how many rows of each kind there are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdc.lake.events import FileShape, Patterns, linked_hashes, ops_of
from cdc.lake.reduce import Barrier, Order

FULL_RUNS = frozenset(("first", "resync"))
"""Kinds of runs that read the whole table: what they did not meet is an orphan."""
BATCH_ROWS = 1 << 16


@dataclass(frozen=True, slots=True)
class Control:
    """A control row of a snapshot run."""

    run: str
    event: str
    kind: str
    order: Order
    facts: Mapping[str, str]
    version: int
    """Changelog version that brought it."""


@dataclass(slots=True)
class Scan:
    """What the new files hold. `linked`: sorted hashes of the keys whose changes must be seen together."""

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys("crudts", 0))
    bytes: int = 0
    foreign: bool = False
    truncates: list[Order] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    linked: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    @property
    def changes(self) -> int:
        return sum(n for op, n in self.rows.items() if op in "crud")

    def begins(self) -> list[Control]:
        return [c for c in self.controls if c.event == "begin" and c.kind in FULL_RUNS]

    def ends(self) -> list[Control]:
        return [c for c in self.controls if c.event == "end" and c.kind in FULL_RUNS]

    @property
    def repairs(self) -> bool:
        """Whether a run ends that read some rows again because somebody doubts them."""
        return any(c.event == "end" and c.kind == "filtered" for c in self.controls)


class Scanner:
    """Collects a Scan over files. `own_origins`: changes under these origins are not foreign."""

    def __init__(self, own_origins: Collection[str]) -> None:
        self._own = pa.array(sorted(own_origins), pa.string())
        self._linked: list[np.ndarray] = []
        self.found = Scan()

    def add(self, file: pq.ParquetFile, shape: FileShape, patterns: Patterns, version: int) -> None:
        """Look through one file, which came with this changelog version."""
        for group in range(file.num_row_groups):
            self.found.bytes += file.metadata.row_group(group).total_byte_size
            self._operations(file, shape, group, version)
            if _has_old_tuples(file, shape, group):
                self._moves(file, shape, patterns, group)

    def finish(self) -> Scan:
        if self._linked:
            self.found.linked = np.unique(np.concatenate(self._linked))
        return self.found

    def _operations(self, file: pq.ParquetFile, shape: FileShape, group: int, version: int) -> None:
        names = [shape.system[name] for name in ("_op", "_origin") if name in shape.system]
        special = False
        for data in file.iter_batches(BATCH_ROWS, [group], columns=names):
            ops = ops_of(data, shape)
            counts = np.bincount(ops, minlength=128)
            for op in self.found.rows:
                self.found.rows[op] += int(counts[ord(op)])
            special = special or bool(counts[ord("t")] or counts[ord("s")])
            self.found.foreign = self.found.foreign or self._any_foreign(data, shape, ops)
        if special:
            self._special(file, shape, group, version)

    def _any_foreign(self, data: pa.RecordBatch, shape: FileShape, ops: np.ndarray) -> bool:
        changes = ops != ord("s")
        if "_origin" not in shape.system:
            return bool(changes.any())
        origin = data.column(data.schema.get_field_index(shape.system["_origin"]))
        own = pc.is_in(origin, value_set=self._own).to_numpy(zero_copy_only=False)
        return bool((changes & ~own).any())

    def _special(self, file: pq.ParquetFile, shape: FileShape, group: int, version: int) -> None:
        """Truncates and control rows of a row group that has some."""
        wanted = ("_op", "_epoch", "_lsn", "_seq", "_run", "_raw")
        names = [shape.system[name] for name in wanted if name in shape.system]
        for data in file.iter_batches(BATCH_ROWS, [group], columns=names):
            ops = ops_of(data, shape)
            rows = np.flatnonzero((ops == ord("t")) | (ops == ord("s")))
            if not len(rows):
                continue
            picked = data.take(pa.array(rows))
            values = {name: picked.column(shape.system[name]).to_pylist() for name in wanted if name in shape.system}
            for i in range(len(rows)):
                order = Order(values["_epoch"][i], values["_lsn"][i], values["_seq"][i])
                if values["_op"][i] == "t":
                    self.found.truncates.append(order)
                else:
                    self._control(values["_run"][i], dict(values["_raw"][i] or ()), order, version)

    def _control(self, run: str, facts: dict[str, str], order: Order, version: int) -> None:
        event, kind = facts.get("event", ""), facts.get("kind", "")
        self.found.controls.append(Control(run, event, kind, order, facts, version))

    def _moves(self, file: pq.ParquetFile, shape: FileShape, patterns: Patterns, group: int) -> None:
        assert shape.key_names is not None
        system = [shape.system[name] for name in ("_op", "_unchanged", "_raw") if name in shape.system]
        old = [f"{shape.system['_before']}.{name}" for name in shape.key_names]
        for data in file.iter_batches(BATCH_ROWS, [group], columns=[*system, *shape.key_names, *old]):
            hashes = linked_hashes(data, shape, patterns)
            if len(hashes):
                self._linked.append(np.unique(hashes))


def barriers_of(scan: Scan, begins: Mapping[str, Order]) -> list[Barrier]:
    """Barriers of a merge. `begins`: begin rows of runs that earlier merges have seen."""
    known = {**begins, **{c.run: c.order for c in scan.begins()}}
    barriers = [Barrier(order, order) for order in scan.truncates]
    barriers += [Barrier(end.order, known[end.run]) for end in scan.ends() if end.run in known]
    return sorted(barriers)


def _has_old_tuples(file: pq.ParquetFile, shape: FileShape, group: int) -> bool:
    """Whether a row group holds old tuples; reads one column of them, which costs next to nothing if there are none."""
    if "_before" not in shape.system or not shape.key_names:
        return False
    name = shape.system["_before"]
    for data in file.iter_batches(BATCH_ROWS, [group], columns=[f"{name}.{shape.key_names[0]}"]):
        column = data.column(name)
        if column.null_count < len(column):
            return True
    return False
