"""A changelog in plain files: each row in one object, under a name that never comes again, whatever dies in between.

The oracle is the changelog itself, read through Delta, and a run that nothing disturbed.
"""

from __future__ import annotations

import io
import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdc import follow
from cdc.config import FilesConfig, IcebergConfig, LakeConfig
from cdc.errors import FormatTooNew, StoreConflict, StoreUnavailable
from cdc.follow import Followers, followers_fact
from cdc.lake import spans as spans_module
from cdc.lake.compaction import FEW
from cdc.lake.files import PlainFiles
from cdc.lake.layout import files_path
from cdc.lake.routing import RoutingStore
from cdc.lake.spans import Followed, FollowerLost, Span, Spans
from cdc.ports import ObjectStore, StoredObject
from cdc.stage import Stage
from cdc.state import State, open_state
from cdc.table import Column, TableId, TableSchema
from connectors.local.store import LocalStore
from tests.unit.test_compaction import Story
from tests.unit.test_lake_current import SCHEMA, TABLE

WIDER = TableSchema(
    table=TABLE, oid=7, key=SCHEMA.key, version=2,
    columns=(*SCHEMA.columns, Column(name="extra", attnum=9, type_oid=23, type_name="integer")),
)  # fmt: skip
FILES = files_path("shop", TABLE)


class Died(BaseException):
    """The process ends here."""


class Deadly:
    """A store in which the process dies at the n-th write: before it, or when it has been done."""

    def __init__(self, store: ObjectStore, nth: int, *, done: bool) -> None:
        self._store = store
        self._left = nth
        self._done = done

    def put(self, key: str, data: Any, *, if_absent: bool = False, if_match: str | None = None) -> str:
        self._left -= 1
        if not self._left and not self._done:
            raise Died
        etag = self._store.put(key, data, if_absent=if_absent, if_match=if_match)
        if not self._left:
            raise Died
        return etag

    def get(self, key: str, *, into: Path | None = None) -> tuple[bytes, str] | None:
        return self._store.get(key, into=into)

    def list(self, prefix: str) -> Iterator[StoredObject]:
        return self._store.list(prefix)

    def delete(self, keys: Sequence[str]) -> None:
        self._store.delete(keys)

    def location(self, key: str) -> tuple[str, dict[str, str]]:
        return self._store.location(key)


def stage_of(
    root: Path, store: ObjectStore | None = None, *, form: str = "jsonl", object_bytes: int = 1 << 20
) -> Stage[Span, Followed]:
    """A follower as a new process makes it: nothing is known but the lake."""
    store = store or LocalStore(root / "lake")
    spans = Spans(store, "shop", TABLE)
    files = PlainFiles(store, "shop", TABLE, spans, temp_dir=root / "scratch", form=form, object_bytes=object_bytes)
    return Stage("files", spans, files)


def caught_up(stage: Stage[Span, Followed]) -> None:
    while stage.step(0).read:
        pass


def written(root: Path) -> dict[str, bytes]:
    """The objects that readers see, by name."""
    folder = root / "lake" / FILES
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("_")
    }


def rows_of(name: str, data: bytes) -> list[dict[str, Any]]:
    if name.endswith(".parquet"):
        return pq.read_table(io.BytesIO(data)).to_pylist()
    with pa.CompressedInputStream(io.BytesIO(data), "zstd") as stream:
        return [json.loads(line) for line in stream.read().decode().split("\n") if line]


def in_files(root: Path) -> list[tuple[int, int, str | None]]:
    """Every row of every object: position and key."""
    rows = [row for name, data in written(root).items() for row in rows_of(name, data)]
    return sorted((r["_lsn"], r["_seq"], r.get("id")) for r in rows)


def in_changelog(story: Story) -> list[tuple[int, int, str | None]]:
    return sorted((r["_lsn"], r["_seq"], r["id"]) for r in story.changes())


@pytest.fixture
def story(tmp_path: Path) -> Story:
    made = Story(tmp_path)
    made.begin()
    return made


def changes(*ids: int, day: int = 1) -> list[dict[str, Any]]:
    return [{"_op": "c", "id": str(i), "note": f'note "{i}"', "_committed_at": day * 86_400_000_000} for i in ids]


def test_each_row_stands_once_in_order_under_its_date(story: Story, tmp_path: Path) -> None:
    story.land([*changes(1, 2), *changes(3, day=2)])
    stage = stage_of(tmp_path)
    caught_up(stage)
    first = written(tmp_path)
    story.land(changes(4, day=2))
    story.land(changes(5, day=2))
    caught_up(stage)

    assert in_files(tmp_path) == in_changelog(story)
    found = written(tmp_path)
    assert {name: found[name] for name in first} == first, "what is written is never touched again"
    (late,) = set(found) - set(first)
    assert late.startswith("_date=1970-01-03/")
    assert late.endswith(".jsonl.zst")
    assert [(r["id"], r["note"]) for r in rows_of(late, found[late])] == [(4, 'note "4"'), (5, 'note "5"')]
    assert not stage.step(0).durable, "and nothing more is written"
    assert written(tmp_path) == found


def test_what_a_row_does_not_know_is_left_out(story: Story, tmp_path: Path) -> None:
    story.land([
        {"_op": "u", "id": "1", "_unchanged": ["note"]},
        {"_op": "u", "id": "2", "note": None, "_before": {"id": "1", "note": "old"}},
    ])  # fmt: skip
    caught_up(stage_of(tmp_path))
    first, second = [r for n, d in written(tmp_path).items() for r in rows_of(n, d) if r["_op"] == "u"]
    assert first["_unchanged"] == ["note"]
    assert not {"note", "_before"} & set(first)
    assert second["note"] is None
    assert "_unchanged" not in second
    assert second["_before"]["note"] == "old"


SMALL = 12_000
"""Bytes: some of the changelog's objects go into one."""


class Matrix:
    """A changelog that a follower has yet to read, and what it writes undisturbed."""

    def __init__(self, root: Path, story: Story, form: str, landings: int) -> None:
        self.root, self.form = root, form
        for n in range(landings):
            story.land([*changes(n, n + 10), *changes(n + 20, day=2)], WIDER if n == 2 else SCHEMA)
        shutil.copytree(root / "lake", root / "undisturbed" / "lake")
        caught_up(stage_of(root / "undisturbed", form=form, object_bytes=SMALL))
        self.expected = written(root / "undisturbed")

    def dies_at(self, nth: int, *, done: bool) -> bool:
        """Whether a follower dies at that write; the next process has another configuration, and ends its work."""
        died = self.root / "died"
        shutil.rmtree(died, ignore_errors=True)
        shutil.copytree(self.root / "lake", died / "lake")
        deadly = Deadly(LocalStore(died / "lake"), nth, done=done)
        try:
            caught_up(stage_of(died, deadly, form=self.form, object_bytes=SMALL))
        except Died:
            # Before its first checkpoint nothing has been said of how the objects are cut.
            other = SMALL if nth == 1 and not done else 1
            caught_up(stage_of(died, form=self.form, object_bytes=other))
            assert written(died) == self.expected, f"died at write {nth}"
            return True
        return False


def test_a_death_at_a_write_leaves_the_same_names_and_bytes(story: Story, tmp_path: Path, rng: random.Random) -> None:
    matrix = Matrix(tmp_path, story, "jsonl", 2)
    assert 1 < len(matrix.expected) < len(story.objects()), "some objects have the rows of several"
    assert matrix.dies_at(rng.randrange(1, len(matrix.expected) + 3), done=rng.random() < 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_death_at_any_write_leaves_the_same_names_and_bytes(story: Story, tmp_path: Path, form: str) -> None:
    matrix = Matrix(tmp_path, story, form, 8)
    assert 3 < len(matrix.expected) < len(story.objects())
    for done in (False, True):
        deaths = 0
        while matrix.dies_at(deaths + 1, done=done):
            deaths += 1
        assert deaths == len(matrix.expected) + 2


@pytest.mark.slow
def test_rows_of_two_shapes_stand_in_one_file_of_lines_and_in_two_of_parquet(story: Story, tmp_path: Path) -> None:
    story.land(changes(1))
    story.land(changes(2), WIDER)
    story.land(changes(3), WIDER)
    shutil.copytree(tmp_path / "lake", tmp_path / "other" / "lake")
    caught_up(stage_of(tmp_path))
    caught_up(stage_of(tmp_path / "other", form="parquet"))
    lines, parquet = written(tmp_path), written(tmp_path / "other")
    assert in_files(tmp_path) == in_files(tmp_path / "other") == in_changelog(story)
    assert len([n for n in lines if "1970-01-02" in n]) == 1
    two = sorted(n for n in parquet if "1970-01-02" in n)
    assert [[row["id"] for row in rows_of(n, parquet[n])] for n in two] == [[1], [2, 3]]


def test_joins_and_vacuums_before_a_follower_comes_cost_it_no_row_and_double_none(story: Story, tmp_path: Path) -> None:
    for n in range(FEW):
        story.land(changes(n))
    stage = stage_of(tmp_path)
    caught_up(stage)
    for n in range(FEW):
        story.land(changes(100 + n))
    story.merge()
    assert story.upkeep.compact(everything=True) > FEW
    story.land(changes(1000))
    caught_up(stage)
    assert in_files(tmp_path) == in_changelog(story), "joined objects are read as they were"

    for n in range(FEW):
        story.land(changes(2000 + n))
    story.begin_more("run2", 2)
    story.merge()
    assert story.upkeep.compact(everything=True) > FEW
    remove_dead(story)
    caught_up(stage_of(tmp_path))
    assert in_files(tmp_path) == in_changelog(story), "what a follower comes too late for stands in the joined ones"
    assert len({r[:2] for r in in_files(tmp_path)}) == len(in_files(tmp_path))


def remove_dead(story: Story) -> None:
    """What a vacuum does whose time has come."""
    live = set(story.objects())
    folder = Path(story.store.location(story.changelog.path)[0])
    for path in folder.rglob("*.parquet"):
        if "_delta_log" not in str(path) and str(path.relative_to(folder)) not in live:
            path.unlink()


@pytest.mark.slow
def test_a_follower_that_is_switched_on_late_begins_with_all_there_is(story: Story, tmp_path: Path) -> None:
    for n in range(FEW):
        story.land(changes(n))
    story.merge()
    story.upkeep.compact(everything=True)
    remove_dead(story)
    caught_up(stage_of(tmp_path))
    story.land(changes(100))
    caught_up(stage_of(tmp_path))
    assert in_files(tmp_path) == in_changelog(story)


def test_a_cut_whose_objects_are_gone_says_so_and_begins_anew_when_its_folder_is_moved_away(
    story: Story, tmp_path: Path
) -> None:
    for n in range(FEW):
        story.land(changes(n))
    with pytest.raises(Died):
        caught_up(stage_of(tmp_path, Deadly(LocalStore(tmp_path / "lake"), 2, done=True)))
    story.merge()
    story.upkeep.compact(everything=True)
    remove_dead(story)
    before = written(tmp_path)
    with pytest.raises(FollowerLost) as caught:
        caught_up(stage_of(tmp_path))
    assert FILES in caught.value.hint
    assert written(tmp_path) == before, "it makes nothing up"
    (tmp_path / "lake" / FILES).rename(tmp_path / "away")
    caught_up(stage_of(tmp_path))
    assert in_files(tmp_path) == in_changelog(story)


def test_a_changelog_made_anew_is_not_taken_for_the_old_one(story: Story, tmp_path: Path) -> None:
    story.land(changes(1))
    stage = stage_of(tmp_path)
    caught_up(stage)
    shutil.rmtree(tmp_path / "lake" / story.changelog.path)
    other = Story(tmp_path / "other")
    other.begin()
    shutil.copytree(tmp_path / "other" / "lake" / story.changelog.path, tmp_path / "lake" / story.changelog.path)
    with pytest.raises(FollowerLost):
        caught_up(stage_of(tmp_path))


def test_a_former_writer_that_wakes_up_changes_nothing(story: Story, tmp_path: Path) -> None:
    story.land(changes(1))
    former = stage_of(tmp_path)
    caught_up(former)
    story.land(changes(2))
    caught_up(stage_of(tmp_path))
    story.land(changes(3))
    expected = written(tmp_path)
    with pytest.raises(StoreConflict):
        caught_up(former)
    assert written(tmp_path) == expected


def test_a_checkpoint_of_a_newer_release_is_refused(story: Story, tmp_path: Path) -> None:
    caught_up(stage_of(tmp_path))
    checkpoint = tmp_path / "lake" / FILES / "_checkpoint.json"
    checkpoint.write_text(checkpoint.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(FormatTooNew):
        caught_up(stage_of(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1, "cut": null, "more": 1}'])
def test_a_broken_checkpoint_stops_the_follower_and_nothing_else(story: Story, tmp_path: Path, text: str) -> None:
    caught_up(stage_of(tmp_path))
    (tmp_path / "lake" / FILES / "_checkpoint.json").write_text(text)
    with pytest.raises(FollowerLost, match="is not as it was written"):
        caught_up(stage_of(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_any_order_of_landing_joining_removing_and_dying_gives_each_row_once(
    tmp_path: Path, rng: random.Random, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(f"{rng.random()} {seed}")
    monkeypatch.setattr(spans_module, "SPAN_VERSIONS", 5)
    story = Story(tmp_path)
    story.begin()
    in_cut = False
    for step in range(60):
        match rng.choice(["land"] * 5 + ["follow", "die", "die", "join", "vacuum", "run"]):
            case "land":
                story.land(changes(step, day=rng.choice([1, 2])), rng.choice([SCHEMA, WIDER]))
            case "run":
                story.begin_more(f"run{step}", step)
            case "follow":
                caught_up(stage_of(tmp_path, object_bytes=rng.choice([1, 5000])))
                in_cut = False
            case "die":
                store = Deadly(LocalStore(tmp_path / "lake"), rng.randrange(1, 9), done=rng.random() < 0.5)
                try:
                    caught_up(stage_of(tmp_path, store, object_bytes=rng.choice([1, 5000])))
                    in_cut = False
                except Died:
                    in_cut = True
            case "join":
                story.merge(WIDER)
                story.upkeep.compact(everything=True)
            case "vacuum" if not in_cut:  # a vacuum waits for what has been begun
                remove_dead(story)
    caught_up(stage_of(tmp_path))
    assert in_files(tmp_path) == in_changelog(story)


# ---- all followers of a source ----

HELD: Any = SimpleNamespace(check=lambda: None, held=lambda: True)
"""A lease."""


class Scene:
    """Followers of a source with two tables, of which one has a changelog."""

    def __init__(self, root: Path, story: Story) -> None:
        self.root, self.story = root, story
        self.state: State = open_state(root / "state")
        for table in (TABLE, TableId("public", "other"), TableId("private", "t")):
            self.state.update_table("shop", table, state="streaming")
        self.followers = self.made()

    def made(self, store: ObjectStore | None = None) -> Followers:
        files = FilesConfig(tables=("shop.public.*",), every_s=0.001)
        return Followers(
            "shop", LakeConfig(url="file:///lake", files=files), self.state, store or self.story.store,
            self.root / "scratch", HELD,
        )  # fmt: skip

    def finish(self, followers: Followers | None = None) -> None:
        followers = followers or self.followers
        finished = followers.finishing()
        while not finished():
            followers.step("files")

    @property
    def told(self) -> dict[str, dict[str, Any]]:
        return {fact["table"]: fact for fact in self.state.get(followers_fact("shop"))}


@pytest.fixture
def scene(tmp_path: Path, story: Story) -> Iterator[Scene]:
    made = Scene(tmp_path, story)
    yield made
    made.state.close()


def test_tables_that_the_globs_name_are_followed_and_told_of(scene: Scene, tmp_path: Path) -> None:
    scene.story.land(changes(1))
    scene.finish()
    assert in_files(tmp_path) == in_changelog(scene.story)
    assert set(scene.told) == {str(TABLE), "public.other"}
    assert scene.told[str(TABLE)]["version"] == scene.story.changelog.refresh()
    assert scene.told[str(TABLE)]["clear_at"] > time.time() - 60


def test_one_that_fails_stops_alone_tells_why_and_goes_on_when_it_is_mended(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "RETRY_S", 0.0)
    scene.finish()
    checkpoint = tmp_path / "lake" / FILES / "_checkpoint.json"
    good = checkpoint.read_text()
    checkpoint.write_text(good.replace('"format": 1', '"format": 2'))
    followers = scene.made()
    with pytest.raises(FormatTooNew):
        scene.finish(followers)
    assert "format 2" in scene.told[str(TABLE)]["error"]
    assert scene.told[str(TABLE)]["hint"]
    assert not scene.told["public.other"]["error"]
    checkpoint.write_text(good)
    scene.finish(followers)
    assert not scene.told[str(TABLE)]["error"]


def test_a_vacuum_waits_for_a_follower_but_not_for_ever(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    followers = scene.followers
    newest = scene.story.land(changes(1))
    now = time.time()
    assert followers.may_vacuum(TableId("private", "t"), newest, now), "nobody follows it"
    assert not followers.may_vacuum(TABLE, newest, now), "the follower may have anything still to read"
    scene.finish()
    assert followers.may_vacuum(TABLE, newest, time.time()), "it has read everything"
    newest = scene.story.land(changes(2))
    assert not followers.may_vacuum(TABLE, newest, time.time())
    assert followers.may_vacuum(TABLE, newest, now), "what is removed then was read before"

    monkeypatch.setattr(follow, "HOLD_S", 0.0)
    with caplog.at_level(logging.ERROR):
        assert followers.may_vacuum(TABLE, newest, time.time())
        assert followers.may_vacuum(TABLE, newest, time.time())
    assert len([r for r in caplog.records if "gets no further" in r.message]) == 1


def test_a_catalog_that_does_not_answer_does_not_hold_the_files(scene: Scene) -> None:
    """Each form has a thread of its own."""
    scene.story.land(changes(1))
    followers = scene.followers
    followers._turns["iceberg"] = follow._Turn()  # as if it were configured, and its thread stood still in a request
    finished = followers.finishing()
    followers.step("files")
    while followers.step("files"):
        pass
    assert in_files(scene.root) == in_changelog(scene.story)
    assert not finished(), "who waits for all waits for that one too"


def test_no_iceberg_table_takes_bounds_of_keys_out_of_another_lake(scene: Scene, tmp_path: Path) -> None:
    main, eu = scene.story.store, LocalStore(tmp_path / "eu")
    store = RoutingStore(main, {"eu": eu}, lambda source, table: "eu" if table == TABLE else "")
    followers = Followers(
        "shop",
        LakeConfig(
            url="file:///lake",
            files=FilesConfig(tables=("shop.public.*",)),
            iceberg=IcebergConfig(tables=("shop.public.*",), catalog={"type": "in-memory"}),
        ),
        scene.state, store, tmp_path / "scratch", HELD,
    )  # fmt: skip
    assert followers._forms(TABLE) == ["files"]
    assert followers._forms(TableId("public", "other")) == ["files", "iceberg"]


def test_one_that_looks_once_a_day_is_not_late_between_its_looks(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.story.land(changes(1))
    scene.finish()
    (follower,) = [f for f in scene.followers._followers.values() if f.table == TABLE]
    follower.progress_at, follower.due_at = time.monotonic() - 80_000, time.monotonic() + 6_400
    newest = scene.story.land(changes(2))
    assert not scene.followers.may_vacuum(TABLE, newest, time.time())
    follower.due_at = time.monotonic() - 80_000
    assert scene.followers.may_vacuum(TABLE, newest, time.time())


def test_what_is_read_and_not_written_yet_is_still_needed(story: Story) -> None:
    newest = story.land(changes(1))
    spans = Spans(story.store, "shop", TABLE)
    spans.open(Followed())
    span = spans.read(0)
    assert span is not None
    assert not spans.is_clear(newest, 1.0)
    spans.confirm(Followed(span.last, span.through))
    assert spans.is_clear(newest, 1.0)


def test_upkeep_asks_before_it_removes(story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, float]] = []

    def may(answer: bool) -> Callable[[int, float], bool]:
        return lambda version, since: asked.append((version, since)) or answer  # type: ignore[func-returns-value]

    removed: list[str] = []
    delta = story.upkeep._changelog.delta
    monkeypatch.setattr(delta, "vacuum", lambda retention_s: removed.append("changelog") or 1)
    story.merge()
    for answer in (False, True):
        monkeypatch.setattr(story.upkeep, "_may_vacuum", may(answer))
        story.upkeep.vacuum()
    assert removed == ["changelog"]
    assert asked[0][0] == story.changelog.refresh()
    assert asked[0][1] <= time.time()


@pytest.mark.slow
def test_an_outage_of_the_store_is_over_when_it_is_over(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "RETRY_S", 0.0)
    scene.story.land(changes(1))

    class Away(Deadly):
        def put(self, key: str, data: Any, *, if_absent: bool = False, if_match: str | None = None) -> str:
            try:
                return super().put(key, data, if_absent=if_absent, if_match=if_match)
            except Died:
                raise StoreUnavailable("no answer") from None

    for nth in (1, 2, 3):
        scene.finish(scene.made(Away(scene.story.store, nth, done=True)))
        assert in_files(tmp_path) == in_changelog(scene.story)
        assert not any(fact["error"] for fact in scene.told.values())
        scene.story.land(changes(10 + nth))
