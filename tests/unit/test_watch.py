"""What a change between two looks at the catalog means, case by case; and what the lake keeps of a look."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cdc.errors import FormatTooNew, LeaseLost
from cdc.fingerprint import Fingerprint, Part
from cdc.lake.fingerprints import Fingerprints
from cdc.lake.layout import fingerprints_key
from cdc.schema import SchemaBook, inherited
from cdc.state import open_state
from cdc.table import Column, TableId, TableSchema
from cdc.watch import after_upgrade, compare
from connectors.local.store import LocalStore

INT, TEXT, VARCHAR, BIGINT = 23, 25, 1043, 20
ID = Column(name="id", attnum=1, type_oid=INT)
NOTE = Column(name="note", attnum=2, type_oid=TEXT)
MORE = Column(name="more", attnum=3, type_oid=INT, missing="7")
SCHEMA = TableSchema(table=TableId("public", "t"), oid=100, columns=(ID, NOTE), key=("id",))
PLAIN = Fingerprint(
    schema=SCHEMA, membership=("1:2/table:3:4",), direct=True, storage=100, toast=103, marks={1: "9", 2: "9"}
)
"""A table that its publication names."""
SMALL = replace(PLAIN, toast=0)
WHOLE = replace(SMALL, membership=("1:2/all",), direct=False)
"""One without a toast table, published with all others."""
ROOT = replace(
    PLAIN, storage=0, toast=0, direct=False, parts=(Part(oid=7, storage=7, mark="a"), Part(oid=8, storage=8, mark="a"))
)
MOODS = replace(PLAIN, types={"50": {"name": "public.mood", "label/51": "sad", "label/52": "fine"}})
PAIRS = replace(PLAIN, types={"60": {"name": "public.pair", "attribute/1": "23,-1", "attribute/2": "25,-1"}})


def with_columns(before: Fingerprint, *columns: Column, **facts: Any) -> Fingerprint:
    return replace(before, schema=replace(before.schema, columns=columns), **facts)


def parts(*found: tuple[int, int, str, bool]) -> Fingerprint:
    return replace(ROOT, parts=tuple(Part(oid=o, storage=s, mark=m, clean=c) for o, s, m, c in found))


KEPT = ((7, 7, "a", True), (8, 8, "a", True))

NOTHING: dict[str, tuple[Fingerprint, Fingerprint]] = {
    "nothing happened": (PLAIN, PLAIN),
    "vacuum full of a table with toast": (PLAIN, replace(PLAIN, storage=200)),
    "the same, and its column's catalog entry changed": (PLAIN, replace(PLAIN, storage=200, marks={1: "9", 2: "10"})),
    "truncate of a table without toast that is published by name": (SMALL, replace(SMALL, storage=200)),
    "a copy that was swapped in, as pg_repack does it": (PLAIN, replace(PLAIN, storage=200, toast=203)),
    "a grant on a column": (PLAIN, replace(PLAIN, marks={1: "9", 2: "10"})),
    "a new label": (MOODS, replace(MOODS, types={"50": {**MOODS.types["50"], "label/53": "great"}})),
    "a renamed type": (MOODS, replace(MOODS, types={"50": {**MOODS.types["50"], "name": "public.feeling"}})),
    "a partition that was made as one": (ROOT, parts(*KEPT, (9, 9, "b", True))),
    "a value that a rewrite put into the rows": (
        with_columns(PLAIN, ID, NOTE, MORE),
        with_columns(PLAIN, ID, NOTE, replace(MORE, missing=None), storage=200),
    ),
}  # fmt: skip

COMPUTED: dict[str, tuple[Fingerprint, Fingerprint]] = {
    "a column with a default": (PLAIN, with_columns(PLAIN, ID, NOTE, MORE, marks={1: "9", 2: "9", 3: "10"})),
    "a dropped column": (PLAIN, with_columns(PLAIN, ID)),
    "a renamed column": (PLAIN, with_columns(PLAIN, ID, replace(NOTE, name="text"))),
    "text that becomes varchar": (PLAIN, with_columns(PLAIN, ID, replace(NOTE, type_oid=VARCHAR))),
    "a wider typmod without a rewrite": (PLAIN, with_columns(PLAIN, ID, replace(NOTE, typmod=99))),
    "another key": (PLAIN, replace(PLAIN, schema=replace(SCHEMA, key=("note",)))),
}

RESYNC: dict[str, tuple[str, Fingerprint, Fingerprint]] = {
    "out of the publication and back": ("publication", PLAIN, replace(PLAIN, membership=("1:2/table:5:6",))),
    "back in the publication": ("publication", replace(PLAIN, membership=()), PLAIN),
    "a rewrite by alter table, published with all tables": (
        "rewrite", replace(WHOLE, toast=103), replace(WHOLE, storage=200, toast=203)),
    "a rewrite of a table without toast: the column's entry changed": (
        "rewrite", SMALL, replace(SMALL, storage=200, marks={1: "10", 2: "9"})),
    "unlogged and back, published with all tables": ("rewrite", WHOLE, replace(WHOLE, storage=200)),
    "a truncate that is not published": (
        "rewrite", replace(PLAIN, truncates=False), replace(PLAIN, truncates=False, storage=200)),
    "a column and a rewrite: its missing value is forgotten": (
        "rewrite", PLAIN, with_columns(PLAIN, ID, NOTE, replace(MORE, missing=None), storage=200)),
    "a type that prints otherwise": ("type", PLAIN, with_columns(PLAIN, ID, replace(NOTE, type_oid=114))),
    "a wider type": ("type", PLAIN, with_columns(PLAIN, replace(ID, type_oid=BIGINT), NOTE, storage=200, toast=203)),
    "a renamed label": (
        "values", MOODS, replace(MOODS, types={"50": {**MOODS.types["50"], "label/51": "blue"}})),
    "labels that swapped their names": (
        "values", MOODS, replace(MOODS, types={"50": {"name": "public.mood", "label/51": "fine", "label/52": "sad"}})),
    "another attribute": ("values", PAIRS, replace(PAIRS, types={"60": {**PAIRS.types["60"], "attribute/3": "23,-1"}})),
    "an attribute less": (
        "values", PAIRS, replace(PAIRS, types={"60": {"name": "public.pair", "attribute/1": "23,-1"}})),
    "a partition that came with rows": ("partitions", ROOT, parts(*KEPT, (9, 9, "b", False))),
    "a partition that is gone": ("partitions", ROOT, parts(KEPT[0])),
    "a partition detached and attached again": ("partitions", ROOT, parts(KEPT[0], (8, 8, "c", True))),
    "a truncated partition": ("rewrite", ROOT, parts(KEPT[0], (8, 88, "a", True))),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTHING)
def test_what_provably_changes_no_row_is_passed_over(case: str) -> None:
    assert compare(*NOTHING[case]) == []


@pytest.mark.parametrize("case", COMPUTED)
def test_what_the_catalog_can_tell_is_computed(case: str) -> None:
    assert [(f.kind, f.answer) for f in compare(*COMPUTED[case])] == [("columns", "computed")]


@pytest.mark.parametrize("case", RESYNC)
def test_doubt_reads_the_table_again(case: str) -> None:
    kind, before, now = RESYNC[case]
    found = compare(before, now)
    assert (found[0].kind, {f.answer for f in found}) == (kind, {"resync"})


def test_an_upgraded_server_keeps_tables_and_types_and_gives_everything_else_anew() -> None:
    upgraded = replace(MOODS, membership=("91:2/table:93:4",), storage=900, toast=903, marks={1: "1", 2: "1"})
    assert compare(after_upgrade(MOODS, upgraded), upgraded) == []
    renamed = replace(upgraded, types={"50": {**MOODS.types["50"], "label/51": "blue"}})
    assert [f.kind for f in compare(after_upgrade(MOODS, renamed), renamed)] == ["values"]
    detached = replace(ROOT, parts=ROOT.parts[:1])
    assert [f.kind for f in compare(after_upgrade(ROOT, detached), detached)] == ["partitions"]


def test_a_missing_value_that_the_catalog_forgot_is_inherited(tmp_path: Path) -> None:
    book = SchemaBook(open_state(tmp_path), "shop")
    first = book.register(replace(SCHEMA, columns=(ID, NOTE, MORE)))
    rewritten = replace(SCHEMA, columns=(ID, NOTE, replace(MORE, missing=None)))
    assert book.register(rewritten) == first
    other = replace(rewritten, oid=101)
    assert inherited(other, [first]) == other, "another table"
    again = replace(rewritten, columns=(ID, NOTE, replace(MORE, attnum=4, missing=None)))
    assert inherited(again, [first]) == again, "another column"


def test_a_shape_that_came_back_is_the_newest_until_the_table_shows_another(tmp_path: Path) -> None:
    state = open_state(tmp_path)
    book = SchemaBook(state, "shop")
    wider = replace(SCHEMA, columns=(ID, NOTE, MORE))
    book.register(SCHEMA)
    book.register(wider)
    assert book.latest(SCHEMA.table) == replace(wider, version=2)
    book.note_newest(SCHEMA)
    assert book.latest(SCHEMA.table) == replace(SCHEMA, version=1)
    assert SchemaBook(state, "shop").latest(SCHEMA.table) == replace(SCHEMA, version=1)
    third = book.register(replace(SCHEMA, identity="f"))
    assert book.latest(SCHEMA.table) == third
    book.note_newest(third)
    assert book.latest(SCHEMA.table) == third


def test_the_lake_keeps_fingerprints_and_lets_one_writer_write(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    mine, other = Fingerprints(store, "shop"), Fingerprints(store, "shop")
    assert mine.load() == ("", {})
    other.load()
    prints = {
        SCHEMA.table: MOODS,
        TableId("public", "r"): replace(ROOT, schema=replace(SCHEMA, table=TableId("p", "r"))),
    }
    prints = {p.schema.table: p for p in prints.values()}
    mine.save("server", prints)
    assert Fingerprints(store, "shop").load() == ("server", prints)
    with pytest.raises(LeaseLost):
        other.save("server", {SCHEMA.table: PLAIN})
    mine.save("server", {**prints, SCHEMA.table: PLAIN})
    assert Fingerprints(store, "shop").load()[1][SCHEMA.table] == PLAIN
    key = fingerprints_key("shop")
    data, etag = store.get(key) or (b"", "")
    store.put(key, data.replace(b'"format":1', b'"format":9'), if_match=etag)
    with pytest.raises(FormatTooNew):
        Fingerprints(store, "shop").load()


def test_every_fact_of_a_fingerprint_survives_the_lake() -> None:
    full = replace(MOODS, parts=ROOT.parts, truncates=False, direct=False)
    again = Fingerprint.from_json(full.to_json())
    for field in dataclasses.fields(Fingerprint):
        assert getattr(again, field.name) == getattr(full, field.name), field.name
