"""A changelog in an Iceberg catalog: the same objects, at a version that the snapshot names, whatever dies.

Read back by pyiceberg and compared with the changelog as Delta shows it. The catalog is a SQLite file.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.table import Table

from cdc.errors import SchemaConflict, StoreConflict, StoreRefused
from cdc.lake import iceberg as iceberg_module
from cdc.lake.compaction import FEW
from cdc.lake.iceberg import IcebergCatalog, RegisteredTable
from cdc.lake.spans import Followed, Span, Spans
from cdc.stage import Stage
from cdc.table import Column, TableSchema
from connectors.local.store import LocalStore
from tests.unit.test_compaction import Story
from tests.unit.test_follow import WIDER, changes, remove_dead
from tests.unit.test_lake_current import SCHEMA, TABLE

NAME = ("shop", f"{TABLE.schema}_{TABLE.name}")


def properties(root: Path) -> dict[str, str]:
    return {"type": "sql", "uri": f"sqlite:///{root}/catalog.db", "warehouse": f"file://{root}/warehouse"}


def stage_of(root: Path, go_on: Callable[[], None] = lambda: None) -> Stage[Span, Followed]:
    """A follower as a new process makes it."""
    store = LocalStore(root / "lake")
    spans = Spans(store, "shop", TABLE, states=True)
    catalog = IcebergCatalog(properties(root), "")
    table = RegisteredTable(store, "shop", TABLE, spans, catalog, keep_s=3600, go_on=go_on)
    return Stage("iceberg", spans, table)


def caught_up(stage: Stage[Span, Followed]) -> None:
    while stage.step(0).read:
        pass


def catalog(root: Path) -> Catalog:
    return load_catalog("cdc", **properties(root))


def table(root: Path) -> Table:
    return catalog(root).load_table(NAME)


def rows(root: Path) -> list[dict[str, Any]]:
    found = table(root).scan().to_arrow().to_pylist()
    return sorted(found, key=lambda r: (r["_lsn"], r["_seq"]))


def expected(story: Story, root: Path) -> list[dict[str, Any]]:
    """The changelog's rows as Delta shows them, with the columns that the Iceberg table has."""
    names = [f.name for f in table(root).schema().fields]
    return [{name: row.get(name) for name in names} for row in story.changes()]


def version(root: Path) -> int:
    snapshot = table(root).current_snapshot()
    assert snapshot is not None
    assert snapshot.summary is not None
    return int(snapshot.summary.additional_properties["cdc.version"])


@pytest.fixture
def story(tmp_path: Path) -> Story:
    made = Story(tmp_path)
    made.begin()
    return made


def test_a_table_has_the_rows_of_the_changelog_and_says_of_which_version(story: Story, tmp_path: Path) -> None:
    story.land([
        *changes(1, 2),
        {"_op": "u", "id": "2", "_unchanged": ["note"], "_before": {"id": "1", "note": "old"}},
        {"_op": "t", "_raw": {"cascade": "false"}},
    ])  # fmt: skip
    caught_up(stage_of(tmp_path))
    assert rows(tmp_path) == expected(story, tmp_path)
    assert version(tmp_path) == story.changelog.refresh()

    story.land(changes(3), WIDER)
    story.land(changes(4), WIDER)
    caught_up(stage_of(tmp_path))
    assert rows(tmp_path) == expected(story, tmp_path)
    assert "extra" in rows(tmp_path)[0], "older objects are read with the newer columns"
    assert version(tmp_path) == story.changelog.refresh()

    snapshots = len(table(tmp_path).snapshots())
    caught_up(stage_of(tmp_path))
    assert len(table(tmp_path).snapshots()) == snapshots, "nothing new, no snapshot"


@pytest.mark.slow
def test_types_that_grow_are_widened_and_objects_of_before_stay_readable(story: Story, tmp_path: Path) -> None:
    def shape(oid: int, name: str, version: int) -> TableSchema:
        columns = (*SCHEMA.columns, Column(name="n", attnum=9, type_oid=oid, type_name=name))
        return TableSchema(table=TABLE, oid=7, key=SCHEMA.key, version=version, columns=columns)

    for n, (oid, name) in enumerate([(21, "smallint"), (23, "integer"), (20, "bigint"), (25, "text")]):
        row = {**changes(n)[0], "n": str(n), "_before": {"id": "1", "n": str(n)}}
        story.land([row], shape(oid, name, n + 2))
        caught_up(stage_of(tmp_path))
        assert rows(tmp_path) == expected(story, tmp_path)
    kinds = {f.name: str(f.field_type) for f in table(tmp_path).schema().fields if f.name.startswith("n")}
    assert kinds == {"n": "long", "n@string": "string", "note": "string"}


@pytest.mark.slow
def test_it_follows_joined_objects_before_the_old_ones_go(story: Story, tmp_path: Path) -> None:
    for n in range(FEW):
        story.land(changes(n))
    caught_up(stage_of(tmp_path))
    story.land(changes(100))
    story.merge()
    assert story.upkeep.compact(everything=True) > FEW
    caught_up(stage_of(tmp_path))
    remove_dead(story)
    assert rows(tmp_path) == expected(story, tmp_path)
    files = {Path(task.file.file_path).name for task in table(tmp_path).scan().plan_files()}
    assert files == {Path(path).name for path in story.objects()}


@pytest.mark.slow
def test_a_type_that_iceberg_cannot_widen_is_told_and_nothing_is_made_up(story: Story, tmp_path: Path) -> None:
    def shape(precision: int, scale: int, version: int) -> TableSchema:
        typmod = ((precision << 16) | scale) + 4
        amount = Column(name="amount", attnum=9, type_oid=1700, typmod=typmod, type_name="numeric")
        columns = (*SCHEMA.columns, amount)
        return TableSchema(table=TABLE, oid=7, key=SCHEMA.key, version=version, columns=columns)

    story.land([{**changes(1)[0], "amount": "1.50"}], shape(10, 2, 2))
    story.land([{**changes(2)[0], "amount": "2.50"}], shape(12, 2, 3))
    caught_up(stage_of(tmp_path))
    before = rows(tmp_path)
    assert before == expected(story, tmp_path)
    story.land([{**changes(3)[0], "amount": "1.5000"}], shape(14, 4, 4))
    with pytest.raises(SchemaConflict, match="decimal"):
        caught_up(stage_of(tmp_path))
    assert rows(tmp_path) == before
    catalog(tmp_path).drop_table(NAME)
    with pytest.raises(SchemaConflict, match="decimal"):
        caught_up(stage_of(tmp_path))


@pytest.mark.slow
def test_a_catalog_that_cannot_be_opened_is_told_without_its_properties(story: Story, tmp_path: Path) -> None:
    spans = Spans(story.store, "shop", TABLE, states=True)
    catalog = IcebergCatalog({"type": "hunter2"}, "")
    with pytest.raises(StoreRefused) as caught:
        RegisteredTable(story.store, "shop", TABLE, spans, catalog, keep_s=3600).resume()
    assert "hunter2" not in str(caught.value)


class Died(BaseException):
    """The process ends here."""


@pytest.mark.slow
@pytest.mark.parametrize("point", ["iceberg.before_commit", "iceberg.after_commit"])
def test_a_death_beside_the_commit_doubles_nothing(
    story: Story, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    story.land(changes(1))
    caught_up(stage_of(tmp_path))
    story.land(changes(2))
    story.merge()
    story.upkeep.compact(everything=True)

    def dies(name: str) -> None:
        if name == point:
            raise Died

    with monkeypatch.context() as patched:
        patched.setattr(iceberg_module, "failpoint", dies)
        with pytest.raises(Died):
            caught_up(stage_of(tmp_path))
    came = point == "iceberg.after_commit"
    assert (version(tmp_path) == story.changelog.refresh()) is came
    caught_up(stage_of(tmp_path))
    assert rows(tmp_path) == expected(story, tmp_path)


def test_of_two_writers_one_is_refused(story: Story, tmp_path: Path) -> None:
    caught_up(stage_of(tmp_path))
    story.land(changes(1))

    def meanwhile() -> None:
        caught_up(stage_of(tmp_path))

    calls: list[int] = []
    with pytest.raises(StoreConflict):
        caught_up(stage_of(tmp_path, lambda: meanwhile() if not calls and not calls.append(1) else None))  # type: ignore[func-returns-value]
    assert rows(tmp_path) == expected(story, tmp_path)


@pytest.mark.slow
def test_what_others_did_to_the_table_is_undone(story: Story, tmp_path: Path) -> None:
    story.land(changes(1, 2))
    caught_up(stage_of(tmp_path))
    table(tmp_path).delete("id = 1")
    table(tmp_path).append(pa.table({"id": pa.array([77], pa.int32())}))
    story.land(changes(3))
    caught_up(stage_of(tmp_path))
    assert rows(tmp_path) == expected(story, tmp_path)


@pytest.mark.slow
def test_a_table_that_was_dropped_is_filled_anew(story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iceberg_module, "EXPIRE_EVERY_S", 0.0)
    story.land(changes(1, 2))
    stage = stage_of(tmp_path)
    caught_up(stage)
    catalog(tmp_path).drop_table(NAME)
    with pytest.raises(StoreConflict):
        caught_up(stage)
    caught_up(stage)
    assert rows(tmp_path) == expected(story, tmp_path)


@pytest.mark.slow
def test_a_changelog_made_anew_replaces_the_rows_of_the_old_one(story: Story, tmp_path: Path) -> None:
    for n in range(5):
        story.land(changes(n))
    caught_up(stage_of(tmp_path))
    other = Story(tmp_path / "other")
    other.begin()
    other.land(changes(100))
    shutil.rmtree(tmp_path / "lake" / story.changelog.path)
    shutil.copytree(tmp_path / "other" / "lake" / story.changelog.path, tmp_path / "lake" / story.changelog.path)
    caught_up(stage_of(tmp_path))
    assert rows(tmp_path) == expected(other, tmp_path)


@pytest.mark.slow
def test_a_table_of_that_name_that_is_another_ones_is_left_alone(story: Story, tmp_path: Path) -> None:
    made = catalog(tmp_path)
    made.create_namespace("shop")
    made.create_table(NAME, schema=pa.schema([("a", pa.int64())]))
    with pytest.raises(SchemaConflict, match="another one's"):
        caught_up(stage_of(tmp_path))


@pytest.mark.slow
def test_old_snapshots_go_with_what_they_alone_have_named(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iceberg_module, "EXPIRE_EVERY_S", 0.0)
    stage = stage_of(tmp_path)
    for n in range(6):
        story.land(changes(n))
        caught_up(stage)
    first = table(tmp_path).snapshots()[0].snapshot_id
    table(tmp_path).manage_snapshots().create_tag(first, "audit").commit()
    assert len(table(tmp_path).snapshots()) == 6
    downstream: Any = stage._downstream
    downstream._keep_s = -1.0
    story.merge()
    story.upkeep.compact(everything=True)
    caught_up(stage)
    assert {s.snapshot_id for s in table(tmp_path).snapshots()} == {first, table(tmp_path).metadata.current_snapshot_id}
    table(tmp_path).manage_snapshots().remove_tag("audit").commit()
    story.land(changes(7))
    caught_up(stage)
    assert len(table(tmp_path).snapshots()) == 1
    newest = table(tmp_path).current_snapshot()
    assert newest is not None
    needed = {newest.manifest_list, *(m.manifest_path for m in newest.manifests(table(tmp_path).io))}
    there = {f"file://{path}" for path in (tmp_path / "warehouse").rglob("*.avro")}
    assert there == needed
    assert rows(tmp_path) == expected(story, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_landing_joining_and_dying_shows_a_version_of_the_changelog(
    tmp_path: Path, rng: random.Random, seed: int
) -> None:
    rng = random.Random(f"{rng.random()} {seed}")
    story = Story(tmp_path)
    story.begin()
    for step in range(40):
        match rng.choice(["land"] * 4 + ["follow", "die", "join", "run"]):
            case "land":
                story.land(changes(step, day=rng.choice([1, 2])), rng.choice([SCHEMA, WIDER]))
            case "run":
                story.begin_more(f"run{step}", step)
            case "follow":
                caught_up(stage_of(tmp_path))
                assert rows(tmp_path) == expected(story, tmp_path)
            case "die":
                left = [rng.randrange(1, 6)]

                def go_on(left: list[int] = left) -> None:
                    left[0] -= 1
                    if not left[0]:
                        raise Died

                with suppress(Died):
                    caught_up(stage_of(tmp_path, go_on))
            case "join":
                story.merge(WIDER)
                story.upkeep.compact(everything=True)
    caught_up(stage_of(tmp_path))
    assert rows(tmp_path) == expected(story, tmp_path)
