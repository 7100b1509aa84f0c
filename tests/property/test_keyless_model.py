"""`current` of a table without a key against a model: a multiset under random transactions, snapshots, cuts, crashes.

The model is the source: transactions commit there in an order, and the stream brings them later in the same order. A
snapshot sees what has committed, its transactions in progress stand in the begin row. At every merge the lake's rows
must be, with their numbers, those of the source at the position that the lake has reached.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdc import failpoints
from cdc.batch import SNAPSHOT_SEQ
from cdc.errors import Diverged, SourceUnavailable
from cdc.lake import keyless
from cdc.lake.current import CurrentTable, MergeResult, open_current
from cdc.table import Column, TableId, TableSchema
from tests.support.changelogs import Changelog, batch_of

TABLE = TableId("public", "heap")
COLUMNS = (
    Column(name="n", attnum=1, type_oid=23, type_name="integer"),
    Column(name="body", attnum=2, type_oid=25, type_name="text"),
    Column(name="price", attnum=3, type_oid=1700, typmod=(5 << 16 | 1) + 4, type_name="numeric(5,1)"),
    Column(name="size", attnum=4, type_oid=701, type_name="double precision"),
    Column(name="day", attnum=5, type_oid=1082, type_name="date"),
)
LATE = Column(name="late", attnum=6, type_oid=1700, typmod=(5 << 16 | 1) + 4, type_name="numeric(5,1)")
VALUES: dict[str, list[str | None]] = {
    "n": ["1", "2", None],
    "body": ["", "-", "1:x", "x" * 5000, None],
    "price": ["1.0", "NaN", None],
    "size": ["0", "-0", "NaN", "Infinity", "0.1"],
    "day": ["2020-02-02", "infinity", "0044-03-15 BC", None],
    "late": ["7.0", "NaN", None],
}
Row = tuple[str | None, ...]
Change = tuple[str, Row | None, Row | None]
"""Operation, old row, new row."""


def schema_of(version: int, missing: str | None) -> TableSchema:
    late = (Column(**{**_facts(LATE), "missing": missing}),) if version == 2 else ()
    return TableSchema(table=TABLE, oid=7, columns=COLUMNS + late, identity="f", version=version)


def _facts(column: Column) -> dict[str, Any]:
    return {name: getattr(column, name) for name in column.__dataclass_fields__}


@dataclass
class Transaction:
    xid: int
    lsn: int
    version: int
    changes: list[Change]


@dataclass
class Source:
    """The table, and what its stream has yet to bring."""

    rng: random.Random
    missing: str | None
    rows: list[Row] = field(default_factory=list)
    version: int = 1
    next_xid: int = 100
    lsn: int = 1000
    begun: list[int] = field(default_factory=list)
    stream: list[Transaction] = field(default_factory=list)

    def begin(self) -> None:
        """A transaction that takes its id now and commits some time later."""
        self.begun.append(self.next_xid)
        self.next_xid += 1

    def commit(self) -> None:
        if not self.begun or self.rng.random() < 0.5:
            self.begin()
        xid = self.begun.pop(self.rng.randrange(len(self.begun)))
        changes = [self._change() for _ in range(self.rng.randrange(1, 6))]
        self.lsn += 1
        self.stream.append(Transaction(xid, self.lsn, self.version, changes))

    def alter(self) -> None:
        if self.version == 1:
            self.version = 2
            self.rows = [(*row, self.missing) for row in self.rows]

    def _change(self) -> Change:
        kind = self.rng.choices("cudt", [6, 5, 4, 0.2])[0]
        if kind == "t":
            self.rows.clear()
            return "t", None, None
        if kind == "c" or not self.rows:
            new = self._row()
            self.rows.append(new)
            return "c", None, new
        old = self.rows.pop(self.rng.randrange(len(self.rows)))
        if kind == "d":
            return "d", old, None
        new = self._row(old)
        self.rows.append(new)
        return "u", old, new

    def _row(self, near: Row | None = None) -> Row:
        if self.rows and self.rng.random() < 0.4:
            return self.rng.choice(self.rows)
        names = [c.name for c in schema_of(self.version, None).columns]
        if near is None or self.rng.random() < 0.3:
            return tuple(self.rng.choice(VALUES[name]) for name in names)
        at = self.rng.randrange(len(names))
        return tuple(self.rng.choice(VALUES[n]) if i == at else near[i] for i, n in enumerate(names))


@dataclass
class Run:
    name: str
    lsn: int
    version: int
    rows: list[Row]
    seen_to: int
    """LSN of the last transaction that its snapshot sees."""


class Machine:
    """The source, a changelog that lags behind it, and `current`."""

    def __init__(self, root: Path, seed: int, missing: str | None) -> None:
        self.rng = random.Random(seed)
        self.missing = missing
        self.source = Source(self.rng, missing)
        self.changelog = Changelog(root / "lake", schema_of(1, missing))
        self.scratch = root / "scratch"
        self.pending: list[tuple[dict[str, Any], int]] = []
        self.lsn = 1000
        self.seq = SNAPSHOT_SEQ
        self.state: list[Row] = []
        self.state_version = 1
        self.run: Run | None = None
        self.swapped: Run | None = None
        self.ended = self.complete = False
        self.runs = 0
        self.registered = 1

    def step(self, what: str) -> None:
        getattr(self, f"do_{what}")()

    def do_commit(self) -> None:
        self.source.commit()

    def do_begin(self) -> None:
        self.source.begin()

    def do_alter(self) -> None:
        self.source.alter()

    def do_stream(self) -> None:
        """The stream brings one more transaction."""
        if not self.source.stream:
            return
        transaction = self.source.stream.pop(0)
        self.lsn = transaction.lsn
        names = [c.name for c in schema_of(transaction.version, None).columns]
        if transaction.version > self.state_version:
            self.state_version = 2
            self.state = [(*row, self.missing) for row in self.state]
        self.registered = max(self.registered, transaction.version)
        for seq, (op, old, new) in enumerate(transaction.changes):
            row: dict[str, Any] = {"_op": op, "_lsn": self.lsn, "_seq": seq, "_xid": transaction.xid}
            image = new if new is not None else old
            row |= dict(zip(names, image, strict=True)) if image is not None else {}
            if op == "u" and old is not None:
                row["_before"] = dict(zip(names, old, strict=True))
            self.pending.append((row, transaction.version))
            if op == "t":
                self.state.clear()
            if old is not None:
                self.state.remove(old)
            if new is not None:
                self.state.append(new)

    def do_read(self) -> None:
        """A snapshot run begins: everything logged is seen, and what has committed and is still to come."""
        if self.run is not None:
            return
        source = self.source
        self.runs += 1
        seen_to = source.stream[-1].lsn if source.stream else self.lsn
        self.run = Run(f"run{self.runs}", self.lsn, source.version, list(source.rows), seen_to)
        self.registered = max(self.registered, source.version)
        facts = {
            "xmin": str(min(source.begun, default=source.next_xid)),
            "xmax": str(source.next_xid),
            "xip": ",".join(map(str, source.begun)),
        }
        self._control("begin", **facts)

    def do_chunk(self) -> None:
        """Some rows of the run, or its end."""
        if self.run is None:
            return
        names = [c.name for c in schema_of(self.run.version, None).columns]
        for _ in range(self.rng.randrange(1, 8)):
            if not self.run.rows:
                self._control("end")
                self.swapped, self.run, self.ended = self.run, None, True
                return
            row = self.run.rows.pop()
            self._read_row({"_op": "r", **dict(zip(names, row, strict=True))})

    def _control(self, event: str, **facts: str) -> None:
        kind = "first" if self.runs == 1 else "resync"
        self._read_row({"_op": "s", "_raw": {"event": event, "kind": kind, "oid": "7", **facts}})

    def _read_row(self, row: dict[str, Any]) -> None:
        assert self.run is not None
        self.seq += 1
        # The position is that of the log when the row was appended, whatever the begin row's is.
        place = {"_run": self.run.name, "_lsn": self.lsn, "_seq": self.seq, "_xid": 0}
        self.pending.append((row | place, self.run.version))

    def do_land(self) -> None:
        batches: list[tuple[list[dict[str, Any]], int]] = []
        for row, version in self.pending:
            alike = batches and batches[-1][1] == version and ("_raw" in row) == ("_raw" in batches[-1][0][0])
            if alike and self.rng.random() < 0.9:
                batches[-1][0].append(row)
            else:
                batches.append(([row], version))
        if batches:
            made = [batch_of(schema_of(v, self.missing), rows) for rows, v in batches]
            self.changelog.commit(made, lsn=self.lsn, complete=self.ended)
            self.complete |= self.ended
        self.pending = []

    def do_merge(self) -> None:
        self.do_land()
        point = self.rng.choice(["", "", "merge.before_commit", "merge.after_commit"])
        with pytest.MonkeyPatch.context() as patch:
            if point:
                patch.setattr(failpoints, "_armed", {point: ("error", 1)})
                patch.setattr(failpoints, "_passes", {})
                try:
                    self._merge()
                except SourceUnavailable:
                    patch.setattr(failpoints, "_armed", {})
            self._check(self._merge())

    def _merge(self) -> MergeResult:
        table = CurrentTable(self.changelog.store, self.changelog.source, TABLE, temp_dir=self.scratch)
        return table.merge(None, schema_of(self.registered, self.missing))  # type: ignore[arg-type]

    def _check(self, result: MergeResult) -> None:
        assert result.waiting is not self.complete
        if result.waiting:
            return
        rows, version = self.state, self.state_version
        if self.swapped is not None and self.lsn < self.swapped.seen_to:
            return  # The lake is ahead of the stream; it is looked at when the stream has come that far.
        dataset = open_current(self.changelog.store, self.changelog.source, TABLE)
        assert dataset is not None
        names = [n for n in dataset.schema.names if not n.startswith("_")]
        if len(names) > len(COLUMNS) and version == 1:
            rows = [(*row, self.missing) for row in rows]
        names = names[: len(rows[0])] if rows else names
        held = dataset.to_table().to_pylist()
        assert Counter(_shown(row, names) for row in held) == Counter(map(_canonical, rows))

    def finish(self) -> None:
        while self.source.stream:
            self.do_stream()
        if self.runs == 0:
            self.do_read()
        while self.run is not None:
            self.do_chunk()
        self.do_merge()


def _canonical(row: Row) -> tuple[str | None, ...]:
    """-0 and 0 are two values, written as Python does it."""
    return tuple(str(float(v)) if i == 3 and v is not None else v for i, v in enumerate(row))


def _shown(row: dict[str, Any], names: list[str]) -> tuple[str | None, ...]:
    raw = dict(row["_raw"] or ())
    return tuple(raw.get(n, None if row[n] is None else str(row[n])) for n in names)


STEPS = [
    ("commit", 8),
    ("begin", 2),
    ("stream", 6),
    ("read", 1),
    ("chunk", 3),
    ("land", 2),
    ("merge", 3),
    ("alter", 0.3),
]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32), length=st.integers(30, 100), missing=st.sampled_from([None, "7.0", "NaN"]))
def test_a_table_without_a_key_is_a_multiset(seed: int, length: int, missing: str | None) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        # Few bytes make many parts, files and slices of what is otherwise one.
        patch.setattr(keyless, "PART_BYTES", rng.choice([1 << 8, 1 << 25]))
        patch.setattr(keyless, "FILE_BYTES", rng.choice([1, 1 << 27]))
        machine = Machine(Path(root), seed, missing)
        for what in rng.choices([s for s, _ in STEPS], [w for _, w in STEPS], k=length):
            machine.step(what)
        machine.finish()


def test_a_row_that_goes_and_is_nowhere_is_a_divergence(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 1, None)
    machine.do_read()
    machine.do_chunk()
    machine.do_merge()
    old: Row = ("1", "x", None, "0.1", None)
    for number, change in enumerate([("d", old, None), ("u", old, ("2", *old[1:]))], 1):
        machine.source.lsn += 1
        machine.source.stream.append(Transaction(100, machine.source.lsn, 1, [change]))  # type: ignore[list-item]
        machine.state.append(old)
        machine.do_stream()
        machine.do_land()
        with pytest.raises(Diverged, match=f"public\\.heap: rows .* are not in its current table: {number} ") as told:
            machine._merge()
        assert told.value.hint == "cdc resync public.heap"
