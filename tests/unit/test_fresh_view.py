"""Fresh views, one story at a time: each must show what the merge that follows it shows, or say why it does not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cdc import models
from cdc.batch import SNAPSHOT_SEQ
from cdc.errors import ModelFailed, StoreUnavailable
from cdc.instant import KnownByState, Shown, in_part_fact
from cdc.lake.changelog import ChangelogTable
from cdc.lake.commits import HistoryGone
from cdc.lake.current import CurrentTable, open_current
from cdc.lake.delta import DeltaLog
from cdc.lake.layout import current_path
from cdc.schema import SchemaBook, shape_fact
from cdc.state import open_state
from cdc.table import Column, TableId, TableSchema
from connectors.local.store import LocalStore
from tests.support.lakes import SmallLake
from tests.support.views import Told, cells, fresh_view, rows_of
from tests.unit.test_lake_current import ID, NOTE, SCHEMA, TABLE, Story

BODY = Column(name="body", attnum=3, type_oid=25, type_name="text")
PRICE = Column(name="price", attnum=4, type_oid=1700, typmod=(5 << 16 | 1) + 4, type_name="numeric(5,1)")
DAY = Column(name="day", attnum=5, type_oid=1082, type_name="date")
SIZE = Column(name="size", attnum=6, type_oid=701, type_name="double precision")
WIDE = TableSchema(table=TABLE, oid=7, columns=(ID, NOTE, BODY, PRICE), key=("id",))


class FreshStory(Story):
    """Each merge is looked at before it happens."""

    def __init__(self, root: Path, schema: TableSchema = SCHEMA) -> None:
        super().__init__(root, schema, bucket_rows=3)
        self.root = root

    def view(self, schema: TableSchema | None = None) -> Shown:
        self.root.mkdir(exist_ok=True)
        return fresh_view(self.changelog.store, "shop", schema or self.schema, self.root)

    def exact(self, schema: TableSchema | None = None) -> list[dict[str, Any]]:
        """The rows of `current` after a merge, which the view has shown before it."""
        view = self.view(schema)
        assert view.note == ""
        assert view.changelog == self.changelog.newest()
        found = rows_of(view)
        assert self.merge(schema).unresolved == []
        shown = open_current(self.changelog.store, "shop", TABLE)
        assert shown is not None
        merged = shown.to_table()
        assert found.schema.names == merged.schema.names
        assert cells(found) == cells(merged)
        return self.rows()


def test_changes_count_by_order_and_the_last_of_a_key_holds(tmp_path: Path) -> None:
    story = FreshStory(tmp_path)
    story.begin([story.row("c", id=str(n), note="old") for n in range(6)])
    newer = story.row("u", id="1", note="newer")
    older = {**newer, "note": "older", "_seq": newer["_seq"] - 1}
    story.land([newer, older, story.row("d", id="2"), story.row("c", id="9", note="new")])
    story.land([story.row("c", id="2", note="again"), story.row("u", id="7", note="moved", _before={"id": "3"})])
    story.land([story.row("d", id="9")])
    assert [(r["id"], r["note"]) for r in story.exact()] == [
        (0, "old"), (1, "newer"), (2, "again"), (4, "old"), (5, "old"), (7, "moved"),
    ]  # fmt: skip


def test_values_that_did_not_change_come_from_the_newest_row_that_has_them(tmp_path: Path) -> None:
    story = FreshStory(tmp_path, WIDE)
    first = [story.row("c", id=str(n), note="a", body=f"big {n}", price="NaN" if n else "1.0") for n in range(4)]
    story.begin(first)
    lacking = {"_unchanged": ["body", "price"]}
    story.land([story.row("u", id="1", note="b", **lacking), story.row("u", id="2", body="bigger", price="2.5")])
    story.land([story.row("u", id="2", note="c", **lacking), story.row("c", id="8", body="new", price="NaN")])
    story.land([story.row("u", id="8", note="d", _unchanged=["body"], price=None), story.row("d", id="3")])
    story.land([story.row("c", id="3", note="e", body="once more", price="NaN"), story.row("u", id="3", **lacking)])
    bodies = {r["id"]: r["body"] for r in story.exact()}
    assert bodies == {0: "big 0", 1: "big 1", 2: "bigger", 3: "once more", 8: "new"}


def test_a_value_that_nobody_knows_is_never_shown_as_another(tmp_path: Path) -> None:
    story = FreshStory(tmp_path, WIDE)
    story.begin([story.row("c", id="1", note="a", body="big")])
    story.land([story.row("u", id="2", note="b", _unchanged=["body"])])
    notes: list[str] = []
    sources = {"shop": [TABLE]}

    def ask(sql: str) -> list[dict[str, Any]]:
        found = models.query(story.changelog.store, sources, sql, fresh=Told(WIDE), note=notes.append)
        rows: list[dict[str, Any]] = found.to_pylist()
        return rows

    assert ask("select id, body from shop.orders") == [{"id": 1, "body": "big"}]
    (note,) = notes
    assert "as it is merged" in note
    assert ask("select id, note from shop.orders where id = 2") == [{"id": 2, "note": "b"}], "nobody asked for it"
    assert story.merge().unresolved == [("2",)]


@pytest.mark.parametrize("key", [("price",), ("day", "size"), ("note", "id")])
def test_rows_are_told_apart_by_any_key(tmp_path: Path, key: tuple[str, ...]) -> None:
    schema = TableSchema(table=TABLE, oid=7, columns=(ID, NOTE, PRICE, DAY, SIZE), key=key)
    story = FreshStory(tmp_path, schema)
    values = [
        {"id": "1", "note": "", "price": "NaN", "day": "infinity", "size": "0"},
        {"id": "2", "note": "a:b", "price": "0.0", "day": "infinity", "size": "-0"},
        {"id": "3", "note": "a", "price": "1.0", "day": "0044-03-15 BC", "size": "NaN"},
        {"id": "4", "note": "b", "price": "2.0", "day": "2020-02-02", "size": "0.1"},
        {"id": "5", "note": "c", "price": "3.0", "day": "2020-02-02", "size": "Infinity"},
    ]
    story.begin([story.row("c", **row) for row in values])
    first, second, third, fourth, fifth = values
    moved = {**fourth, **{name: fifth[name] for name in key}}
    story.land([story.row("d", **first), story.row("d", **fifth), story.row("u", **moved, _before=fourth)])
    story.land([story.row("u", **{**second, **({} if "id" in key else {"id": "22"})}), story.row("c", **first)])
    assert len(story.exact()) == 4
    story.land([story.row("d", **third)])
    assert len(story.exact()) == 3


def test_what_a_truncate_or_a_run_ends_is_gone(tmp_path: Path) -> None:
    story = FreshStory(tmp_path, WIDE)
    story.begin([story.row("c", id=str(n), note="old", body="b") for n in range(4)])
    story.land([story.control("begin", "run2", "resync")])
    story.merge()
    read = story.row("r", id="1", note="read", body="c")
    story.land([{**read, "_run": "run2", "_seq": SNAPSHOT_SEQ + read["_seq"]}])
    story.land([story.row("u", id="2", note="changed", _unchanged=["body"])])
    story.land([story.control("end", "run2", "resync")])
    story.land([story.row("u", id="2", note="changed again", _unchanged=["body"])])
    assert [(r["id"], r["note"]) for r in story.exact()] == [(1, "read"), (2, "changed again")]
    story.land([story.row("c", id="5", note="gone"), story.row("t"), story.row("c", id="6", note="alone")])
    assert [r["id"] for r in story.exact()] == [6]


def test_the_tail_is_shown_in_the_newest_shape(tmp_path: Path) -> None:
    narrow = replace(ID, type_oid=23, type_name="integer")
    story = FreshStory(tmp_path, TableSchema(table=TABLE, oid=7, columns=(narrow, NOTE, BODY), key=("id",)))
    story.begin([story.row("c", id=str(n), note="NaN", body="x") for n in range(3)])
    story.land([story.row("c", id="3", note="before", body="x"), story.row("u", id="1", _unchanged=["note", "body"])])
    late = replace(PRICE, missing="NaN")
    newer = TableSchema(table=TABLE, oid=7, columns=(ID, replace(NOTE, name="remark"), late), key=("id",), version=2)
    story.land([story.row("u", id="2", remark="after", price="2.0")], newer)
    story.land([story.row("u", id="1", remark="renamed", _unchanged=["price"])], newer)
    story.land([story.row("u", id="0", price="4.0", _unchanged=["remark"])], newer)
    assert [(r["id"], r["remark"]) for r in story.exact(newer)] == [
        (0, "NaN"), (1, "renamed"), (2, "after"), (3, "before"),
    ]  # fmt: skip


def test_a_commit_without_rows_may_bring_another_shape(tmp_path: Path) -> None:
    story = FreshStory(tmp_path)
    story.begin([story.row("c", id="1", note="a")])
    story.changelog.commit([], lsn=story.lsn)
    newer = replace(SCHEMA, columns=(ID, replace(NOTE, name="remark"), replace(PRICE, missing="2.5")), version=2)
    assert [(r["remark"], str(r["price"])) for r in story.exact(newer)] == [("a", "2.5")]


def test_columns_named_like_ours_do_not_meet_them(tmp_path: Path) -> None:
    names = ("@op", "@key0", "place", "merged")
    own = tuple(replace(NOTE, name=name, attnum=10 + i) for i, name in enumerate(names))
    story = FreshStory(tmp_path, TableSchema(table=TABLE, oid=7, columns=(ID, *own), key=("id",)))
    story.begin([story.row("c", id=str(n), place="here", **{"@op": "c", "@key0": "k"}) for n in range(3)])
    story.land([story.row("u", id="1", place="there", _unchanged=["@op"], **{"@key0": "d"})])
    assert [(r["id"], r["@op"], r["@key0"]) for r in story.exact()] == [(0, "c", "k"), (1, "c", "d"), (2, "c", "k")]


@pytest.mark.parametrize(
    ("rows", "schema", "why"),
    [
        ([{"_op": "u", "id": "5", "_before": {"id": "1"}, "_unchanged": ["note"]}], SCHEMA, "changed its key"),
        ([{"_op": "u", "id": None, "note": "b"}], SCHEMA, "whole key"),
        ([{"_op": "u", "id": "1", "_lsn": 0}], SCHEMA, "older than what is merged"),
        ([{"_op": "u", "id": "1", "note": "a"}], replace(SCHEMA, key=("note",)), "key"),
    ],
)
def test_what_cannot_be_told_is_shown_as_it_is_merged(
    tmp_path: Path, rows: Sequence[dict[str, Any]], schema: TableSchema, why: str
) -> None:
    story = FreshStory(tmp_path)
    story.begin([story.row("c", id="1", note="a")])
    story.land([{**story.row(row["_op"]), **row} for row in rows], schema)
    view = story.view(schema)
    assert why in view.note
    assert [(r["id"], r["note"]) for r in rows_of(view).to_pylist()] == [(1, "a")]


def test_a_type_that_may_not_hold_the_older_values_waits_for_the_merge(tmp_path: Path) -> None:
    story = FreshStory(tmp_path, WIDE)
    story.begin([story.row("c", id="1", price="1000.5")])
    shorter = replace(WIDE, columns=(ID, NOTE, BODY, replace(PRICE, typmod=(3 << 16 | 1) + 4)))
    story.land([story.row("c", id="2", price="10.5")], shorter)
    view = story.view(shorter)
    assert "column price has another type" in view.note
    assert rows_of(view).num_rows == 1


def test_rows_added_to_a_table_without_a_key_show(tmp_path: Path) -> None:
    schema = replace(SCHEMA, key=(), identity="f")
    story = FreshStory(tmp_path, schema)
    story.begin([story.row("c", id="1", note="a")], xmin="1", xmax="1", xip="")
    story.land([{**story.row("c", id="2", note="b"), "_xid": 200}])
    story.merge()
    story.land([{**story.row("c", id="2", note="b"), "_xid": 201}])
    assert [r["id"] for r in story.exact()] == [1, 2, 2]
    story.land([{**story.row("d", id="2", note="b"), "_xid": 202}])
    view = story.view()
    assert "no key" in view.note
    assert rows_of(view).num_rows == 3


def test_all_tables_are_shown_at_one_landed_position(tmp_path: Path) -> None:
    story = FreshStory(tmp_path)
    story.begin([story.row("c", id="1", note="a")])
    story.land([story.row("u", id="1", note="b")])
    landed = story.lsn - 1
    story.land([story.row("u", id="1", note="c")])
    for position, note in ((None, "c"), ((0, landed), "b"), ((0, 0), "a"), ((0, story.lsn), "c")):
        told = Told(SCHEMA, position)
        found = models.query(story.changelog.store, {"shop": [TABLE]}, "select note from shop.orders", fresh=told)
        assert found.to_pylist() == [{"note": note}], position


def test_a_changelog_is_read_as_far_as_its_table_and_alone_before_that_shows_anything(tmp_path: Path) -> None:
    story = FreshStory(tmp_path)

    def ask(sql: str, position: tuple[int, int] | None = None) -> list[dict[str, Any]]:
        found = models.query(story.changelog.store, {"shop": [TABLE]}, sql, fresh=Told(SCHEMA, position))
        rows: list[dict[str, Any]] = found.to_pylist()
        return rows

    story.land([story.control("begin"), story.row("c", id="1")])
    assert ask("select count(*) as n from shop.orders_changelog") == [{"n": 2}]
    story.land([story.control("end")], complete=True)
    story.merge()
    story.land([story.row("c", id="2")])
    story.land([story.row("c", id="3")])
    both = "select (select count(*) from shop.orders) as t, (select count(*) from shop.orders_changelog) as c"
    assert ask(both) == [{"t": 3, "c": 5}]
    assert ask(both, (0, story.lsn - 2)) == [{"t": 2, "c": 4}]


def test_a_query_outlives_merges_and_vacuums(tmp_path: Path) -> None:
    """Every commit moves a unit from one row to another; a merge takes objects away, a vacuum deletes them at once."""
    schema = TableSchema(table=TABLE, oid=7, columns=(ID, replace(BODY, type_oid=23)), key=("id",))
    story = FreshStory(tmp_path, schema)
    story.begin([story.row("c", id=str(n), body="100") for n in range(4)])
    done = threading.Event()

    def change() -> None:
        amounts = [100] * 4
        for n in range(12):
            amounts[n % 4] -= 1
            amounts[(n + 1) % 4] += 1
            story.land([story.row("u", id=str(k), body=str(amounts[k])) for k in (n % 4, (n + 1) % 4)])
            if n % 4 == 3:
                # Three times in all: a query begins four times.
                story.merge()
                story.current.vacuum(0)
        done.set()

    thread = threading.Thread(target=change)
    thread.start()
    asked = 0
    while not done.is_set():
        sql = "select sum(body)::int as n from shop.orders"
        found = models.query(story.changelog.store, {"shop": [TABLE]}, sql, fresh=Told(schema))
        assert found.to_pylist() == [{"n": 400}]
        asked += 1
    thread.join()
    assert asked > 1


class Elsewhere:
    """A store whose objects are no local files, so that they are copied; `copied` has the keys of those of `current`,
    and `before_copy` is called before each."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self.copied: list[str] = []
        self.before_copy: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get(self, key: str, *, into: Path | None = None) -> tuple[bytes, str] | None:
        if into is not None and "/current/" in key:
            self.copied.append(key)
            self.before_copy()
        return self._store.get(key, into=into)

    def location(self, key: str) -> tuple[str, dict[str, str]]:
        url, options = self._store.location(key)
        return (f"file://{url}", options) if key.endswith(".parquet") else (url, options)


class Landing(Told):
    """What a table's changelog says of its position, at each look."""

    def __init__(self, story: FreshStory, schema: TableSchema = SCHEMA) -> None:
        super().__init__(schema)
        object.__setattr__(self, "story", story)

    def landed(self, source: str) -> tuple[int, int] | None:
        return 0, self.story.lsn - 1  # type: ignore[attr-defined, no-any-return]


def test_a_merge_while_objects_are_copied_begins_nothing_anew(tmp_path: Path) -> None:
    """Each copy sees a landing and a merge: the view that was made stands all the same, and nothing is copied twice."""
    story = FreshStory(tmp_path)
    story.begin([story.row("c", id=str(n), note="old") for n in range(12)])
    story.land([story.row("u", id="1", note="new")])
    store = Elsewhere(story.changelog.store)
    live = [f"{current_path('shop', TABLE)}/{path}" for path in story.files()]

    def merge() -> None:
        story.land([story.row("u", id=str(story.lsn % 12), note="later")])
        story.merge()

    store.before_copy = merge
    sql = "select id, note from shop.orders where note <> 'old'"
    found = models.query(store, {"shop": [TABLE]}, sql, fresh=Landing(story), temp_dir=tmp_path)  # type: ignore[arg-type]
    assert found.to_pylist() == [{"id": 1, "note": "new"}]
    assert len(live) > 2
    assert sorted(store.copied) == sorted(live)


def test_what_keeps_changing_is_given_up_once(tmp_path: Path) -> None:
    story = FreshStory(tmp_path)
    story.begin([story.row("c", id="1", note="a")])
    asked = 0

    class Overtaken(Landing):
        def schema(self, source: str, changelog: ChangelogTable) -> TableSchema | None:
            nonlocal asked
            asked += 1
            story.land([story.row("u", id="1", note=str(asked))])
            story.merge()
            return SCHEMA

    with pytest.raises(StoreUnavailable, match="change faster"):
        models.query(story.changelog.store, {"shop": [TABLE]}, "select 1 from shop.orders", fresh=Overtaken(story))
    assert asked == 5


def test_a_state_of_before_does_not_decide_on_the_shape(tmp_path: Path) -> None:
    """A column was renamed, as another daemon has seen: the state that is left here knows the old name only."""
    story = FreshStory(tmp_path)
    story.begin([story.row("c", id="1", note="a"), story.row("c", id="2", note="b")])
    state = open_state(tmp_path / "state")
    book = SchemaBook(state, "shop")
    old = book.register(SCHEMA)
    with state.transaction() as tx:
        book.hold(TABLE, old.version, tx)
        state.set(shape_fact("shop", TABLE), [old.version, old.version, 0, 0, 0, False], tx=tx)
    newer = replace(SCHEMA, columns=(ID, replace(NOTE, name="remark")), version=2)
    changelog = ChangelogTable(story.changelog.store, "shop", TABLE)
    changelog.note_shape(SCHEMA, 0)
    known = KnownByState(state)
    assert known.schema("shop", changelog) == old
    story.land([story.row("u", id="1", remark="renamed")], newer)
    changelog.note_shape(newer, 1)

    def ask(name: str) -> list[dict[str, Any]]:
        sql = f"select id, {name} as v from shop.orders order by id"
        rows: list[dict[str, Any]] = models.query(
            story.changelog.store, {"shop": [TABLE]}, sql, fresh=known
        ).to_pylist()
        return rows

    assert ask("remark") == [{"id": 1, "v": "renamed"}, {"id": 2, "v": "b"}]
    # Known by name, but not yet where this state has landed.
    book.register(newer)
    assert ask("remark") == [{"id": 1, "v": "renamed"}, {"id": 2, "v": "b"}]
    state.close()


def test_what_is_shown_as_merged_is_of_the_recorded_cut_with_its_changelog(tmp_path: Path) -> None:
    story = FreshStory(tmp_path, WIDE)
    story.begin([story.row("c", id="1", note="a", body="x")])
    cut = {"shop": {TABLE: story.current.version() or 0}}
    story.land([story.row("u", id="1", note="b", body="x")])
    story.merge()
    story.land([story.row("u", id="2", note="c", _unchanged=["body"])])
    both = "select max(note) as n, (select count(*) from shop.orders_changelog) as c, max(body) as b from shop.orders"
    sources, store = {"shop": [TABLE]}, story.changelog.store
    for options, shown in (
        ({}, {"n": "b", "c": 4, "b": "x"}),
        ({"cut": cut}, {"n": "a", "c": 3, "b": "x"}),
        ({"cut": cut, "fresh": Told(WIDE)}, {"n": "a", "c": 3, "b": "x"}),
    ):
        assert models.query(store, sources, both, **options).to_pylist() == [shown], options  # type: ignore[arg-type]
    alone = "select count(*) as c from shop.orders_changelog"
    assert models.query(store, sources, alone).to_pylist() == [{"c": 4}]


def test_tables_that_are_not_of_one_instant_are_named(tmp_path: Path) -> None:
    story, other = FreshStory(tmp_path), TableId("public", "people")
    story.begin([story.row("c", id="1", note="a")])
    people = SmallLake(tmp_path / "lake")
    people.write_current("shop", "people", pa.table({"id": [1]}))
    sources, sql = {"shop": [TABLE, other]}, "select 1 from shop.orders, shop.people"

    def noted(sql: str = sql, **options: Any) -> list[str]:
        notes: list[str] = []
        models.query(story.changelog.store, sources, sql, note=notes.append, **options)
        return notes

    assert "not at one recorded cut" in noted()[0]
    assert "public.people of shop" in noted(cut={"shop": {TABLE: story.current.version() or 0}})[0]
    assert "not of one instant" in noted(fresh=Told(SCHEMA))[0]
    assert noted(fresh=Told(SCHEMA, (0, 0))) == []
    assert noted("select 1 from shop.orders") == []
    stopped = Told(SCHEMA, (0, 0), "is stopped: no key")
    assert noted("select 1 from shop.orders", fresh=stopped) == ["shop.orders is stopped: no key"]


def test_the_state_tells_which_tables_stand_apart(tmp_path: Path) -> None:
    state = open_state(tmp_path / "state")
    known = KnownByState(state)
    assert known.apart("shop", TABLE) == ""
    state.update_table("shop", TABLE, state="stopped", reason="no key")
    assert "is stopped, and stands where it did then: no key" in known.apart("shop", TABLE)
    state.update_table("shop", TABLE, state="streaming")
    state.pause("table", f"shop/{TABLE}")
    assert "paused" in known.apart("shop", TABLE)
    state.resume("table", f"shop/{TABLE}")
    state.save_checkpoint("land", "shop", {"offset": 1, "epoch": 1, "lsn": 5, "end_lsn": 6})
    state.set(in_part_fact("shop"), [1, 5])
    assert "in part" in known.apart("shop", TABLE)
    state.save_checkpoint("land", "shop", {"offset": 2, "epoch": 1, "lsn": 6, "end_lsn": 7})
    assert known.apart("shop", TABLE) == ""
    state.close()


def test_a_changelog_beside_another_table_is_of_its_instant(tmp_path: Path) -> None:
    story, other = FreshStory(tmp_path), TableId("public", "people")
    story.begin([story.row("c", id="1", note="a")])
    SmallLake(tmp_path / "lake").write_current("shop", "people", pa.table({"id": [1]}))
    story.land([story.row("u", id="1", note="b")])
    until = (0, story.lsn - 1)
    story.land([story.row("u", id="1", note="c")])
    story.merge()
    sql = "select count(*) as n from shop.orders_changelog"
    for asked, rows in ((sql, 5), (f"{sql}, shop.people", 4)):
        found = models.query(story.changelog.store, {"shop": [TABLE, other]}, asked, fresh=Told(SCHEMA, until))
        assert found.to_pylist() == [{"n": rows}]


def test_what_shows_nothing_yet_is_no_empty_table(tmp_path: Path) -> None:
    story = FreshStory(tmp_path)
    store = story.changelog.store
    story.land([story.control("begin"), story.row("c", id="1")])
    DeltaLog(store, current_path("shop", TABLE)).open_or_create(pa.schema([("id", pa.int64())]))
    with pytest.raises(ModelFailed, match="shows nothing yet"):
        models.query(store, {"shop": [TABLE]}, "select 1 from shop.orders")
    with pytest.raises(ModelFailed, match="shows nothing yet: nobody has noted its columns"):
        models.query(store, {"shop": [TABLE]}, "select 1 from shop.orders", fresh=Told(None))


def test_history_that_is_gone_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = FreshStory(tmp_path)
    story.begin([story.row("c", id="1", note="a")])
    asked = []

    def outlook(*args: object, **options: object) -> None:
        asked.append(args)
        raise HistoryGone("it has gone", hint="resync it")

    monkeypatch.setattr(CurrentTable, "outlook", outlook)
    assert story.view().note == "is shown as it is merged: it has gone"
    assert len(asked) == 1


def test_without_a_state_no_row_is_shown_in_an_older_shape(tmp_path: Path) -> None:
    """Another shape lands between the look at the shape and the look at the changes."""
    story = FreshStory(tmp_path)
    story.begin([story.row("c", id="1", note="a")])
    changelog = ChangelogTable(story.changelog.store, "shop", TABLE)
    changelog.note_shape(SCHEMA, 0)
    story.land([story.row("u", id="1", note="b")])
    newer = replace(SCHEMA, columns=(ID, replace(NOTE, name="remark")), version=2)

    class Overtaken(KnownByState):
        def schema(self, source: str, changelog: ChangelogTable) -> TableSchema | None:
            found = super().schema(source, changelog)
            ChangelogTable(story.changelog.store, "shop", TABLE).note_shape(newer, 1)
            story.land([story.row("u", id="1", remark="c")], newer)
            return found

    sql = "select * exclude (_epoch, _lsn, _seq, _committed_at, _origin, _raw) from shop.orders"
    sources, store = {"shop": [TABLE]}, story.changelog.store
    assert models.query(store, sources, sql, fresh=Overtaken(None)).to_pylist() == [{"id": 1, "note": "b"}]
    assert models.query(store, sources, sql, fresh=KnownByState(None)).to_pylist() == [{"id": 1, "remark": "c"}]
