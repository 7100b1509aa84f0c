"""What a start makes of a table that stands elsewhere now, and what landing lets into which lake."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cdc.batch import Boundary
from cdc.config import LakeConfig, NamedLakeConfig, SourceConfig, TableConfig
from cdc.discovery import epoch_fact
from cdc.errors import SourceRefused, StoreRefused
from cdc.lake.anchor import Anchor, AnchorState, places_kept
from cdc.lake.layout import changelog_path
from cdc.lake.routing import RoutingStore
from cdc.log import EventLog, LogRecord
from cdc.places import Places, left_behind
from cdc.state import State
from cdc.table import TableId, TableSchema
from connectors.local.store import LocalStore
from tests.support.logs import ORDERS, PEOPLE, SOURCE, batch, chunk_rows, open_log, portion, transaction
from tests.unit.test_probe import Overwrites


@dataclass
class Scene:
    """A source of which something has landed, and its lakes."""

    directory: Path
    state: State
    log: EventLog
    eu: LocalStore

    def started(
        self, tables: dict[str, str], lakes: dict[str, str] | None = None, named: tuple[str, ...] = ("eu", "us")
    ) -> Places:
        """As a process that starts with this configuration."""
        own = {name: TableConfig(name=name, lake=lake) for name, lake in tables.items()}
        source = SourceConfig(name=SOURCE, table=own, lakes=lakes or {})
        others = {n: NamedLakeConfig(name=n, url=(self.directory / n).as_uri()) for n in named}
        lake = LakeConfig(url=(self.directory / "main").as_uri(), named=others)
        stores = {n: self.eu if n == "eu" else LocalStore(self.directory / n) for n in named}
        store = RoutingStore(
            LocalStore(self.directory / "main"), stores, lambda name, table: source.lake_of(str(table))
        )
        self.source, self.lake, self.store = source, lake, store
        self.anchor = Anchor(store, SOURCE)
        if self.anchor.load() is None:
            self.anchor.save(
                AnchorState(
                    epoch=1, system_id="1", timeline=1, database="d", slot="s", mode="landed", may_confirm_lsn=0
                )
            )
        places = Places(source, lake, store, self.state, self.log, self.anchor)
        places.settle()
        return places

    def lose_disk(self) -> None:
        """The next start has an empty one."""
        self.log.close()
        self.state.close()
        self.state, self.log = open_log(self.directory / "another disk")

    def records(self, table: TableId) -> list[LogRecord]:
        return self.log.records(SOURCE, 0, table=table)

    def runs(self, table: TableId) -> list[tuple[str, str]]:
        return [(r.kind, r.state) for r in self.state.runs(SOURCE, table)]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    state, log = open_log(tmp_path)
    log.set_position(SOURCE, Boundary(1, 1, 2))
    for lsn, schema in ((100, ORDERS), (200, PEOPLE)):
        state.update_table(SOURCE, schema.table, oid=schema.oid, state="streaming")
        log.append(SOURCE, portion(transaction(lsn, schema=schema), lsn=lsn))
    scene = Scene(tmp_path, state, log, LocalStore(tmp_path / "eu"))
    yield scene
    scene.log.close()
    scene.state.close()


def admit(scene: Scene, places: Places, schema: TableSchema) -> list[bool]:
    return [places.admits(record, schema) for record in scene.records(schema.table)]


def test_a_place_is_noted_before_the_first_record_lands_there(scene: Scene) -> None:
    places = scene.started({"public.people": "eu"})
    scene.anchor.change(lambda s: replace(s, places={}))
    assert admit(scene, places, PEOPLE) == [True]
    assert admit(scene, places, ORDERS) == [True]
    found = Anchor(scene.store, SOURCE).load()
    assert found is not None
    assert found.places == {
        "public.orders": ("", ORDERS.oid), "public.people": ((scene.directory / "eu").as_uri(), PEOPLE.oid)
    }  # fmt: skip


def test_without_other_lakes_nothing_is_noted(scene: Scene) -> None:
    places = scene.started({}, named=())
    scene.state.set(epoch_fact(SOURCE), 1)
    assert admit(scene, places, PEOPLE) == [True]
    places = scene.started({}, named=())
    assert scene.anchor.state is not None
    assert scene.anchor.state.places == {}


def test_a_lake_that_is_taken_out_of_the_configuration_and_comes_back_is_not_believed(scene: Scene) -> None:
    scene.started({"public.people": "eu"})
    scene.started({}, named=())
    scene.anchor.mark([PEOPLE.table], False)
    scene.lose_disk()
    scene.started({"public.people": "eu"})
    assert set(scene.anchor.marks()) == {"public.people"}


def test_what_a_lake_holds_of_a_table_that_went_on_elsewhere_counts_for_nothing_on_a_new_disk(scene: Scene) -> None:
    for lake in ("eu", "main"):
        places = scene.started({"public.people": lake})
        assert places.vouches(PEOPLE.table)
        scene.anchor.mark([PEOPLE.table], False)
    scene.lose_disk()
    places = scene.started({"public.people": "eu"})
    assert set(scene.anchor.marks()) == {"public.people"}


def test_what_a_lake_holds_of_a_table_that_nothing_is_noted_of_counts_for_nothing(scene: Scene) -> None:
    """Copied there, or kept below a new main lake. Landing may be faster with a note than discovery with its look."""
    scene.eu.put(f"{changelog_path(SOURCE, PEOPLE.table)}/x", b"")
    scene.lose_disk()
    places = scene.started({"public.people": "eu", "public.new": "eu"})
    assert set(scene.anchor.marks()) == {"public.people"}
    assert not places.vouches(TableId("public", "new"))


def test_half_a_snapshot_from_another_place_is_left_out_and_its_changes_are_not(scene: Scene) -> None:
    old = scene.state.create_run(SOURCE, PEOPLE.table, "first", state="running")
    rows = batch(PEOPLE, chunk_rows(200, 0, 3), op="r", run=old.id)
    scene.log.append_chunk(SOURCE, [rows], run=old.id, chunk=0)
    places = scene.started({"public.people": "eu"})
    assert scene.runs(PEOPLE.table) == [("first", "cancelled"), ("first", "pending")]
    assert scene.runs(ORDERS.table) == []
    assert scene.state.table(SOURCE, PEOPLE.table).state == "new"
    assert set(scene.anchor.marks()) == {"public.people"}
    new = scene.state.runs(SOURCE, PEOPLE.table)[-1]
    scene.log.append_chunk(SOURCE, [batch(PEOPLE, chunk_rows(200, 3, 3), op="r", run=new.id)], run=new.id, chunk=0)
    assert admit(scene, places, PEOPLE) == [True, False, True]
    assert admit(scene, scene.started({"public.people": "eu"}), PEOPLE) == [True, False, True], "also after a restart"
    assert len(scene.runs(PEOPLE.table)) == 2, "it has moved once"


def test_a_move_drops_the_table_from_the_recorded_cut_whose_versions_are_of_the_old_place(scene: Scene) -> None:
    scene.state.save_cut(SOURCE, 7, {PEOPLE.table: 3, ORDERS.table: 4})
    scene.started({"public.people": "eu"})
    cut = scene.state.cut(SOURCE)
    assert cut is not None
    assert cut.versions == {ORDERS.table: 4}


def test_every_way_between_lakes_is_a_move_and_staying_is_none(scene: Scene) -> None:
    for number, lake in enumerate(("eu", "us", "main", "eu", "main"), 1):
        scene.started({"public.people": lake})
        assert len(scene.runs(PEOPLE.table)) == number
        scene.started({"public.people": lake})
        assert len(scene.runs(PEOPLE.table)) == number
    assert scene.anchor.state is not None
    assert scene.anchor.state.places == {"public.people": ("", 0)}


def test_a_table_that_only_the_anchor_knows_is_marked_for_a_daemon_that_has_lost_its_disk(scene: Scene) -> None:
    scene.started({"hr.person": "eu"})
    place = (scene.directory / "eu").as_uri()
    scene.anchor.change(lambda s: replace(s, places={"hr.person": (place, 5)}))
    scene.started({})
    assert set(scene.anchor.marks()) == {"hr.person"}


def test_a_table_leaves_its_lake_by_a_new_name_only_where_somebody_has_said_so(scene: Scene) -> None:
    renamed = replace(PEOPLE, table=ORDERS.table)
    admit(scene, scene.started({"public.people": "eu"}), PEOPLE)
    with pytest.raises(SourceRefused, match=r"public\.orders was called public\.people") as refused:
        admit(scene, scene.started({"public.people": "eu"}), renamed)
    assert '[source.shop.table."public.orders"]' in refused.value.hint
    with pytest.raises(SourceRefused, match="nobody has said"):
        admit(scene, scene.started({"public.people": "eu"}, {"*.*": "us"}), renamed)
    assert admit(scene, scene.started({"public.people": "eu"}, {"*.*": "eu"}), renamed) == [True], "it stays there"
    assert admit(scene, scene.started({"public.people": "eu", "public.orders": "main"}), renamed) == [True]


def test_a_table_leaves_the_main_lake_by_a_new_name_only_where_somebody_has_said_so(scene: Scene) -> None:
    """Also one that nothing has landed of since there are other lakes."""
    renamed, lakes = replace(ORDERS, table=PEOPLE.table), {"public.peo*": "eu"}
    admit(scene, scene.started({}, lakes), ORDERS)
    with pytest.raises(SourceRefused, match=r"was called public\.orders, which stands in the lake .*main"):
        admit(scene, scene.started({}, lakes), renamed)
    scene.anchor.change(lambda s: replace(s, places={}))
    scene.state.set(epoch_fact(SOURCE), 1)
    places = scene.started({}, lakes)
    with pytest.raises(SourceRefused, match="nobody has said"):
        admit(scene, places, renamed)
    assert admit(scene, scene.started({"public.people": "eu"}, lakes), renamed) == [True]


def test_that_others_are_noted_decides_nothing_about_a_table_with_a_new_name(scene: Scene) -> None:
    """Discovery may know it under its new name before the first of its records is admitted."""
    admit(scene, scene.started({"public.people": "eu"}), PEOPLE)
    scene.state.set(epoch_fact(SOURCE), 1)
    scene.state.update_table(SOURCE, TableId("public", "called"), oid=PEOPLE.oid, state="new")
    places = scene.started({"public.people": "eu"})
    admit(scene, places, ORDERS)
    renamed = replace(PEOPLE, table=TableId("public", "called"))
    for lakes in ({}, {"public.called": "us"}):
        places = scene.started({"public.people": "eu"}, lakes)
        record = replace(scene.records(PEOPLE.table)[0], table=renamed.table)
        with pytest.raises(SourceRefused, match="nobody has said"):
            places.admits(record, renamed)


def test_a_table_that_was_renamed_within_its_lake_moves_by_a_glob_that_is_changed(scene: Scene) -> None:
    renamed = replace(PEOPLE, table=ORDERS.table)
    places = scene.started({})
    admit(scene, places, PEOPLE)
    assert admit(scene, places, renamed) == [True]
    assert admit(scene, scene.started({}, {"*.orders": "eu"}), renamed) == [True]


def test_in_a_new_history_an_oid_may_be_another_tables(scene: Scene) -> None:
    admit(scene, scene.started({"public.people": "eu"}), PEOPLE)
    state = scene.anchor.change(lambda s: replace(s, epoch=2, places=places_kept(s)))
    assert [oid for _, oid in state.places.values()] == [0]
    places = scene.started({"public.people": "eu"})
    assert admit(scene, places, replace(PEOPLE, table=ORDERS.table)) == [True]
    assert admit(scene, places, replace(ORDERS, oid=0)) == [True]


def test_a_store_that_breaks_a_promise_stops_those_that_land_there_and_no_other(scene: Scene) -> None:
    scene.eu = Overwrites(scene.directory / "eu")
    places = scene.started({"public.people": "eu"})
    with pytest.raises(StoreRefused, match=str(scene.directory / "eu")):
        admit(scene, places, PEOPLE)
    assert admit(scene, places, ORDERS) == [True]


def test_what_a_table_left_in_another_lake_is_told_with_its_place(scene: Scene) -> None:
    scene.started({"public.people": "eu", "public.orders": "main"})
    assert left_behind(scene.source, scene.lake, scene.store) == []
    key = f"{changelog_path(SOURCE, PEOPLE.table)}/x"
    for store in scene.store.stores.values():
        store.put(key, b"")
    found = left_behind(scene.source, scene.lake, scene.store)
    assert [f.object for f in found] == ["source.shop: public.people"] * 2
    assert [str(scene.directory / name) in f.fix for f, name in zip(found, ("main", "us"), strict=True)] == [True] * 2
