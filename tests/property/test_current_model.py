"""`current` against a model in plain Python: random changes, cut at random into commits and merges, with failures.

The model replays changes one by one over a dictionary. A merge sees them many at a time, in buckets, after crashes and
with other cuts; cell by cell it must come to the same, and where the model does not know a value, it must say so.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdc import failpoints
from cdc.batch import SNAPSHOT_SEQ
from cdc.errors import SourceUnavailable
from cdc.lake.current import CurrentTable, MergeResult, open_current
from cdc.table import Column, TableId, TableSchema
from tests.support.changelogs import Changelog, batch_of

TABLE = TableId("public", "items")
UNKNOWN = "?"
"""In the model: a value that no message carried."""

_COLUMNS = (
    Column(name="id", attnum=1, type_oid=23, type_name="integer"),
    Column(name="body", attnum=2, type_oid=25, type_name="text"),
    Column(name="price", attnum=3, type_oid=1700, typmod=(5 << 16 | 1) + 4, type_name="numeric(5,1)"),
)


def _schema(version: int, missing: str | None) -> TableSchema:
    added = (Column(name="late", attnum=4, type_oid=23, type_name="integer", missing=missing),)
    columns = _COLUMNS + (added if version == 2 else ())
    return TableSchema(table=TABLE, oid=7, columns=columns, key=("id",), version=version)


@dataclass
class Model:
    """Rows by key: value texts by column (a column that the row's writer did not have is not there), and order."""

    missing: str | None
    rows: dict[str, tuple[dict[str, str | None], int]] = field(default_factory=dict)
    begun: dict[str, int] = field(default_factory=dict)
    complete: bool = False

    def apply(self, at: int, row: dict[str, Any], version: int) -> None:
        match row["_op"]:
            case "t":
                self.rows.clear()
            case "s" if row["_raw"]["event"] == "begin":
                self.begun[row["_run"]] = at
            case "s":
                self.complete = True
                begun = self.begun[row["_run"]]
                self.rows = {k: (v, o) for k, (v, o) in self.rows.items() if o >= begun}
            case "d":
                self.rows.pop(row["id"], None)
            case _:
                before = row.get("_before")
                base = self.rows.pop(before["id"] if before else row["id"], ({}, 0))[0]
                known = row.get("_unchanged") or []
                values = dict(base)
                for column in _schema(version, None).columns:
                    name = column.name
                    before_it = base.get(name, self.missing if base else UNKNOWN)
                    values[name] = before_it if name in known else row.get(name)
                self.rows[row["id"]] = values, at

    def unresolved(self) -> set[tuple[str, ...]]:
        return {(k,) for k, (v, _) in self.rows.items() if UNKNOWN in v.values()}

    def shown(self, version: int) -> dict[str, dict[str, str | None]]:
        names = [c.name for c in _schema(version, None).columns]
        return {k: {n: v.get(n, self.missing) for n in names} for k, (v, _) in self.rows.items()}


def _shown(changelog: Changelog, names: list[str]) -> dict[str, dict[str, str | None]]:
    """What a reader of `current` sees: cells as texts, those of `_raw` too."""
    dataset = open_current(changelog.store, changelog.source, TABLE)
    assert dataset is not None
    rows = dataset.to_table().to_pylist()
    shown = {}
    for row in rows:
        raw = dict(row["_raw"] or ())
        assert set(raw) <= {n for n in names if row[n] is None}
        assert str(row["id"]) not in shown
        shown[str(row["id"])] = {n: raw.get(n, None if row[n] is None else str(row[n])) for n in names}
    return shown


_KEYS = st.integers(0, 5).map(str)
_TEXT = st.sampled_from(["", "x", "y", "long" * 20, None])
_PRICE = st.sampled_from(["1.0", "2.5", "NaN", None])
_UNCHANGED = st.sampled_from([None, None, ["body"], ["price"], ["body", "price"]])
_KINDS = st.sampled_from("cccuuuuuddmmmxtrrbe")


@st.composite
def _steps(draw: st.DrawFn) -> list[dict[str, Any]]:
    """One change of a program: an operation, a commit of the changelog, or a merge."""
    kind = draw(_KINDS)
    version = draw(st.sampled_from([1, 2]))
    row: dict[str, Any] = {"id": draw(_KEYS), "body": draw(_TEXT), "price": draw(_PRICE)}
    if draw(st.booleans()):
        row["late"] = draw(st.sampled_from(["1", "2", None]))
    unchanged = draw(_UNCHANGED)
    other = draw(_KEYS)
    match kind:
        case "c":
            return [{"_op": "c", **row, "v": version}]
        case "r":
            return [{"_op": "r", **row, "_unchanged": unchanged, "v": version}]
        case "u":
            return [{"_op": "u", **row, "_unchanged": unchanged, "v": version}]
        case "m":
            return [{"_op": "u", **row, "_unchanged": unchanged, "_before": {"id": other}, "v": version}]
        case "x":  # two keys swapped by way of a third
            moves = [(row["id"], "9"), (other, row["id"]), ("9", other)]
            changed = {"_op": "u", "_unchanged": ["body", "price"], "v": version, "late": "3"}
            return [{**changed, "id": new, "_before": {"id": old}} for old, new in moves]
        case "d":
            return [{"_op": "d", "id": row["id"], "v": version}]
        case "t":
            return [{"_op": "t", "v": version}]
        case "b":
            return [{"_op": "begin", "v": version}]
    return [{"_op": "end", "v": version}]


_CUT = st.sampled_from(["commit", "merge", "merge before", "merge after"]).map(lambda what: {"do": what})


@st.composite
def programs(draw: st.DrawFn) -> list[dict[str, Any]]:
    parts = draw(st.lists(st.one_of(_steps(), _steps(), _steps(), _CUT.map(lambda c: [c])), min_size=2, max_size=30))
    body = [step for part in parts for step in part]
    first = draw(st.integers(0, len(body)))
    if draw(st.booleans()):
        body.insert(draw(st.integers(0, len(body))), {"_op": "schema"})
    return [{"_op": "begin", "v": 1}, *body[:first], {"_op": "end", "v": 1}, *body[first:], {"do": "merge"}]


class Machine:
    """Runs a program against the changelog, `current`, and the model."""

    def __init__(self, root: Path, missing: str | None) -> None:
        self.missing = missing
        self.changelog = Changelog(root / "lake", _schema(1, missing))
        self.scratch = root / "scratch"
        self.model = Model(missing)
        self.version = 1
        self.pending: list[tuple[dict[str, Any], int]] = []
        self.at = 0
        self.runs = 0
        self.open_run: str | None = None
        self.ended = False
        self.landed: list[tuple[dict[str, Any], int]] = []
        self.through = -1
        self.merged = -1
        self.shown_version = 1

    def run(self, program: list[dict[str, Any]]) -> None:
        for step in program:
            match step:
                case {"do": "commit"}:
                    self.commit()
                case {"do": what}:
                    self.commit()
                    self.merge(what)
                case {"_op": "schema"}:
                    self.version = 2
                case _:
                    self.change(dict(step))

    def change(self, row: dict[str, Any]) -> None:
        version = min(row.pop("v"), self.version)
        self.at += 1
        if row["_op"] in ("begin", "end"):
            event = row["_op"]
            if event == "begin":
                self.runs += 1
                self.open_run = f"run{self.runs}"
            elif self.open_run is None:
                return
            facts = {"event": event, "kind": "first" if self.runs == 1 else "resync", "oid": "7"}
            row = {"_op": "s", "_run": self.open_run, "_raw": facts}
            if event == "end":
                self.open_run, self.ended = None, True
        if version == 1:
            row.pop("late", None)
        for name in row.get("_unchanged") or []:
            row[name] = None
        if (row.get("_before") or {}).get("id", "") == row.get("id"):
            row["_before"] = None
        # Two changes share a position: what a snapshot read stands behind both, even if it arrives first.
        snapshot = SNAPSHOT_SEQ if row["_op"] in "rs" else 0
        row |= {"_lsn": self.at // 2, "_seq": snapshot + self.at, "_xid": 5}
        self.pending.append((row, version))

    def commit(self) -> None:
        batches = []
        for row, version in self.pending:
            if batches and batches[-1][1] == version and ("_raw" in row) == ("_raw" in batches[-1][0][0]):
                batches[-1][0].append(row)
            else:
                batches.append(([row], version))
            self.landed.append((row, version))
        self.through = (
            self.changelog.commit(
                [batch_of(_schema(v, self.missing), rows) for rows, v in batches], lsn=self.at // 2, complete=self.ended
            )
            if self.pending
            else self.through
        )
        self.pending = []
        # A cut stands between two transactions: what comes later has a later position, also than what was read.
        self.at |= 1

    def merge(self, what: str) -> None:
        if self.through < 0:
            return
        with pytest.MonkeyPatch.context() as patch:
            if what != "merge":
                point = "merge.before_commit" if what == "merge before" else "merge.after_commit"
                patch.setattr(failpoints, "_armed", {point: ("error", 1)})
                patch.setattr(failpoints, "_passes", {})
                try:
                    self._merge()
                except SourceUnavailable:
                    patch.setattr(failpoints, "_armed", {})
        self.check(self._merge())

    def _merge(self) -> MergeResult:
        table = CurrentTable(self.changelog.store, self.changelog.source, TABLE, temp_dir=self.scratch, bucket_rows=3)
        return table.merge(None, _schema(self.version, self.missing))  # type: ignore[arg-type]

    def check(self, result: MergeResult) -> None:
        model = Model(self.missing)
        ordered = sorted(self.landed, key=lambda e: (e[0]["_lsn"], e[0]["_seq"]))
        for at, (row, version) in enumerate(ordered):
            model.apply(at, row, version)
        assert result.waiting is not model.complete
        if result.waiting:
            assert open_current(self.changelog.store, self.changelog.source, TABLE) is None
            return
        assert set(result.unresolved) == model.unresolved()
        if result.unresolved:
            return
        if self.through > self.merged:
            # A new column shows with the first merge that has something to merge.
            self.merged, self.shown_version = self.through, self.version
        names = [c.name for c in _schema(self.shown_version, None).columns]
        assert _shown(self.changelog, names) == model.shown(self.shown_version)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(program=programs(), missing=st.sampled_from([None, "7"]))
def test_current_equals_the_model_after_every_merge(program: list[dict[str, Any]], missing: str | None) -> None:
    with tempfile.TemporaryDirectory() as root:
        Machine(Path(root), missing).run(program)
