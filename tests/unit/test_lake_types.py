"""A column whose type changes, and a table that takes another's name: what changelog and `current` then show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from cdc.batch import SNAPSHOT_SEQ, Boundary
from cdc.errors import SchemaConflict
from cdc.lake.changelog import ChangelogTable
from cdc.lake.current import CurrentTable, MergeResult, open_current
from cdc.lake.layout import changelog_path
from cdc.lake.rows import LakeRows
from cdc.lake.widening import common, in_lake, widens
from cdc.ports import Visibility
from cdc.table import Column, TableId, TableSchema
from connectors.local.store import LocalStore
from tests.support.changelogs import batch_of

TABLE = TableId("public", "orders")
INT, BIGINT, TEXT, NUMERIC, REAL, DOUBLE, TIMESTAMP = 23, 20, 25, 1700, 700, 701, 1114


def numeric(precision: int, scale: int) -> int:
    return (precision << 16 | scale) + 4


def schema_of(type_oid: int, typmod: int = -1, *, key: str = "id", oid: int = 7) -> TableSchema:
    return TableSchema(
        table=TABLE,
        oid=oid,
        columns=(
            Column(name="id", attnum=1, type_oid=BIGINT, type_name="bigint"),
            Column(name="n", attnum=2, type_oid=type_oid, typmod=typmod, type_name=f"type {type_oid}"),
        ),
        key=(key,),
    )


class Lake:
    """One table's changelog, as landing writes it, and its `current`."""

    def __init__(self, root: Path) -> None:
        self.root = root / "lake"
        self.store = LocalStore(self.root)
        self.scratch = root / "scratch"
        self.scratch.mkdir()
        self.changelog = ChangelogTable(self.store, "shop", TABLE)
        self.current = CurrentTable(self.store, "shop", TABLE, temp_dir=self.scratch)
        self.lsn = 0
        self.counter = 0

    def land(self, schema: TableSchema, rows: Sequence[dict[str, Any]]) -> None:
        self.lsn += 1
        writer = self.changelog.writer(self.scratch)
        for i, row in enumerate(rows):
            place = {"_lsn": self.lsn, "_seq": i, "_xid": 100 + self.lsn}
            if "_run" in row:
                place["_seq"] = SNAPSHOT_SEQ + self.counter
                self.counter += 1
            writer.add(batch_of(schema, [{**place, **row}]), chunk=0 if "_run" in row else None)
        writer.commit(Boundary(0, self.lsn, self.lsn))

    def run(self, schema: TableSchema, rows: Sequence[dict[str, Any]], name: str = "first") -> None:
        """A whole run that reads these rows."""

        def control(event: str) -> dict[str, Any]:
            kind = "first" if name == "first" else "resync"
            return {"_op": "s", "_run": name, "_raw": {"event": event, "kind": kind, "oid": str(schema.oid)}}

        self.land(schema, [control("begin")])
        self.land(schema, [{"_op": "r", "_run": name, **row} for row in rows] + [control("end")])

    def merge(self, schema: TableSchema) -> MergeResult:
        return self.current.merge(self.changelog, schema)

    def rows(self) -> list[dict[str, Any]]:
        found = open_current(self.store, "shop", TABLE)
        assert found is not None
        names = [n for n in found.schema.names if not n.startswith("_")]
        return sorted(found.to_table(columns=names).to_pylist(), key=lambda r: r["id"])

    def history(self) -> pa.Table:
        """The changelog as Delta's own reader shows it."""
        return DeltaTable(self.root / changelog_path("shop", TABLE)).to_pyarrow_table().sort_by("_lsn")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "before", "after", "kind"),
    [
        ((INT, -1), (BIGINT, -1), "7", str(1 << 40), pa.int64()),
        ((NUMERIC, numeric(10, 2)), (NUMERIC, numeric(14, 4)), "7.25", "123456789.1234", pa.decimal128(14, 4)),
        ((REAL, -1), (DOUBLE, -1), "0.5", "0.1", pa.float64()),
    ],
)
def test_a_wider_type_takes_the_column_over_and_old_rows_are_computed(
    lake: Lake, old: tuple[int, int], new: tuple[int, int], before: str, after: str, kind: pa.DataType
) -> None:
    narrow, wide = schema_of(*old), schema_of(*new)
    lake.run(narrow, [{"id": "1", "n": before}])
    lake.merge(narrow)
    lake.land(wide, [{"_op": "c", "id": "2", "n": after}])
    lake.merge(wide)
    changes = lake.history()
    assert changes.schema.field("n").type == kind, "one column holds both"
    assert [v for v in changes.column("n").to_pylist() if v is not None] == [r["n"] for r in lake.rows()]
    assert [str(r["n"]) for r in lake.rows()] == [str(pa.scalar(before).cast(kind).as_py()), after]
    files = [str(p) for p in (lake.root / changelog_path("shop", TABLE)).rglob("*.parquet")]
    seen = duckdb.sql(f"select n from read_parquet({sorted(files)!r}, union_by_name = true) where n is not null")
    assert len(seen.fetchall()) == 2
    lake.land(narrow, [{"_op": "c", "id": "3", "n": before}])  # narrowed again: the lake stays as wide
    assert lake.history().schema.field("n").type == kind


@pytest.mark.parametrize(
    ("old", "new", "before", "after", "name"),
    [
        ((INT, -1), (TEXT, -1), "7", "seven", "n@string"),
        ((TEXT, -1), (INT, -1), "7", "8", "n@int"),
        ((NUMERIC, numeric(38, 0)), (NUMERIC, numeric(38, 30)), "7", "0.5", "n@decimal"),
        ((TEXT, -1), (TIMESTAMP, -1), "x", "2026-01-01 00:00:00", "n@timestamp"),
    ],
)
def test_a_type_of_another_kind_gets_a_column_of_its_own_and_history_stays_as_it_was(
    lake: Lake, old: tuple[int, int], new: tuple[int, int], before: str, after: str, name: str
) -> None:
    one, two = schema_of(*old), schema_of(*new)
    lake.run(one, [{"id": "1", "n": before}])
    lake.merge(one)
    was = lake.rows()
    lake.land(two, [{"_op": "c", "id": "2", "n": after}])
    lake.land(two, [{"_op": "u", "id": "2", "n": after, "_before": {"id": "2", "n": after}}])
    changes = lake.history().to_pylist()
    assert [r["n"] for r in changes if r["_op"] == "r"] == [was[0]["n"]]
    assert {r["n"] for r in changes if r["id"] == 2} == {None}
    assert all(r[name] is not None for r in changes if r["id"] == 2)
    assert [r["_before"][name] for r in changes if r["_op"] == "u"] == [changes[-1][name]]
    if name in ("n@int", "n@timestamp"):  # the others are computed
        with pytest.raises(SchemaConflict, match="do not fit its new type"):
            lake.merge(two)
        assert lake.rows() == was, "what was shown stays until the table has been read again"
    lake.run(two, [{"id": "1", "n": after}, {"id": "2", "n": after}], name="again")
    lake.merge(two)
    assert [r["id"] for r in lake.rows()] == [1, 2]
    assert "n" in lake.rows()[0], "`current` keeps the source's names"
    lake.land(one, [{"_op": "c", "id": "3", "n": before}])  # and back: the first column goes on
    assert [r["n"] for r in lake.history().to_pylist() if r["id"] == 3] == [was[0]["n"]]


def test_a_key_of_another_type_is_matched_again_after_the_run(lake: Lake) -> None:
    one = schema_of(INT, key="n")
    two = schema_of(TEXT, key="n")
    lake.run(one, [{"id": "1", "n": "7"}])
    lake.merge(one)
    lake.land(two, [{"_op": "u", "id": "5", "n": "7"}])
    lake.run(two, [{"id": "5", "n": "7"}], name="again")
    lake.land(two, [{"_op": "d", "id": None, "n": "7", "_before": {"n": "7"}}, {"_op": "c", "id": "6", "n": "x"}])
    lake.merge(two)
    assert lake.rows() == [{"id": 6, "n": "x"}]


def test_an_unchanged_value_of_a_renamed_lake_column_stays_unknown(lake: Lake) -> None:
    one, two = schema_of(INT), schema_of(TEXT)
    lake.run(one, [{"id": "1", "n": "7"}])
    lake.run(two, [{"id": "1", "n": "long"}], name="again")
    lake.land(two, [{"_op": "u", "id": "1", "n": None, "_unchanged": ["n"]}])
    lake.merge(two)
    assert lake.rows() == [{"id": 1, "n": "long"}]


def test_another_table_under_the_name_is_not_shown_before_it_was_read_to_its_end(lake: Lake) -> None:
    one, two = schema_of(INT), schema_of(INT, oid=8)
    lake.run(one, [{"id": "1", "n": "1"}, {"id": "2", "n": "2"}])
    lake.merge(one)
    shown = lake.rows()
    lake.land(two, [{"_op": "u", "id": "1", "n": "100"}])
    assert lake.merge(two).waiting
    assert lake.rows() == shown, "no row of the one among the rows of the other"
    lake.run(two, [{"id": "1", "n": "100"}], name="again")
    lake.merge(two)
    assert lake.rows() == [{"id": 1, "n": 100}]
    lake.land(one, [{"_op": "c", "id": "9", "n": "9"}])
    assert lake.merge(one).waiting, "the first one came back: its last run says nothing of now"


def test_a_dropped_column_is_gone_from_current_and_stays_in_the_changelog(lake: Lake) -> None:
    one = schema_of(INT)
    two = replace(one, columns=one.columns[:1])
    lake.run(one, [{"id": "1", "n": "1"}, {"id": "2", "n": "2"}])
    lake.merge(one)
    lake.land(two, [{"_op": "u", "id": "1"}])
    lake.merge(two)
    assert lake.rows() == [{"id": 1}, {"id": 2}]
    assert "n" in lake.history().schema.names


def test_types_that_one_column_can_hold() -> None:
    assert common(pa.int16(), pa.int64()) == pa.int64()
    assert common(pa.decimal128(10, 2), pa.decimal128(8, 4)) == pa.decimal128(12, 4)
    assert common(pa.decimal128(38, 0), pa.decimal128(10, 2)) is None
    assert common(pa.list_(pa.int32()), pa.list_(pa.int64())) == pa.list_(pa.int64())
    assert common(pa.timestamp("us"), pa.timestamp("us", "UTC")) is None, "which zone the text was in is not known"
    assert common(pa.int32(), pa.decimal128(12, 0)) is None
    assert common(pa.int32(), pa.float64()) is None
    assert widens(pa.int32(), pa.int64())
    assert not widens(pa.int64(), pa.int32())
    assert not widens(pa.decimal128(10, 2), pa.decimal128(12, 1))


def test_a_name_that_the_source_itself_has_is_not_taken() -> None:
    extra = Column(name="n@string", attnum=3, type_oid=INT, type_name="integer")
    schema = replace(schema_of(TEXT), columns=(*schema_of(TEXT).columns, extra))
    named = in_lake(schema, {"id": pa.int64(), "n": pa.int32()})
    assert [c.name for c in named.columns] == ["id", "n@string@", "n@string"]


def test_verify_finds_the_keys_of_changes_under_the_name_that_the_lake_has_for_them(lake: Lake) -> None:
    one, two = schema_of(INT, key="n"), schema_of(TEXT, key="n")
    lake.run(one, [{"id": "1", "n": "7"}])
    lake.land(two, [{"_op": "c", "id": "5", "n": "x"}])
    rows = LakeRows(lake.store, "shop", TABLE, two)
    seen = Visibility(xmin=100 + lake.lsn, xmax=100 + lake.lsn, in_progress=frozenset())
    assert rows.unseen_keys(seen, 10) == {"x": ("x",)}
