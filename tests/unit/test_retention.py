"""What retention lets go is gone for good, and nothing else is: no row of `current`, nothing that is still needed."""

from __future__ import annotations

import datetime as dt
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cdc import failpoints
from cdc.batch import Boundary
from cdc.errors import SourceUnavailable
from cdc.lake.changelog import ChangelogTable
from cdc.lake.commits import TRIMMED, HistoryGone
from cdc.lake.compaction import FEW
from cdc.lake.current import CurrentTable
from cdc.lake.delta import CHECKPOINT_EVERY, DeltaLog
from cdc.lake.inventory import inventory, lifecycle
from cdc.lake.layout import current_path
from cdc.lake.retention import newest_s
from cdc.table import TableId, TableSchema
from cdc.upkeep import Limits, Upkeep
from tests.support.changelogs import batch_of
from tests.unit.test_compaction import KEYLESS, Story
from tests.unit.test_lake_current import SCHEMA, TABLE
from tests.unit.test_upkeep import Scene

DAY_S = 86_400.0
RETAIN_S = 10 * DAY_S


class Kept(Story):
    """A changelog that keeps ten days, and its `current`."""

    def __init__(self, root: Path, schema: TableSchema = SCHEMA) -> None:
        super().__init__(root, schema)
        self.upkeep = self._upkeep(self.current)
        self.runs = 0

    def _upkeep(self, current: CurrentTable) -> Upkeep:
        return Upkeep(
            self.store, ChangelogTable(self.store, "shop", TABLE), current, temp_dir=self.temp,
            limits=Limits(3600, 128 << 20, 0, retain_s=RETAIN_S),
        )  # fmt: skip

    def later(self, days: float) -> int:
        """Upkeep so many days from now; how many objects retention lets go. `current` follows."""
        gone, _ = self.upkeep.age(now_s=time.time() + days * DAY_S)
        self.merge(through=self.current.merged())
        return gone

    def run(self, rows: Sequence[dict[str, Any]]) -> None:
        """A whole run that reads these rows, landed."""
        self.lsn += 10
        self.runs += 1
        run, seq = f"run{self.runs + 1}", (1 << 62) + 100 * self.runs
        sees = str(100 + self.lsn)
        facts = {"kind": "resync", "oid": "7", "xmin": sees, "xmax": sees, "xip": ""}
        writer = self.changelog.writer(self.temp)
        control = {"_op": "s", "_lsn": self.lsn, "_run": run}
        read = [{"_op": "r", "_lsn": self.lsn, "_seq": seq + 1 + n, "_run": run, **r} for n, r in enumerate(rows)]
        begin = {**control, "_seq": seq, "_raw": {"event": "begin", **facts}}
        end = {**control, "_seq": seq + 1 + len(rows), "_raw": {"event": "end", **facts}}
        for chunk, part in enumerate([[begin], read, [end]]):
            if part:
                writer.add(batch_of(self.schema, part), chunk=chunk)
        writer.commit(Boundary(0, self.lsn, self.lsn + 1))

    def lose_current(self) -> None:
        shutil.rmtree(Path(self.store.location(current_path("shop", TABLE))[0]))
        self.current = CurrentTable(self.store, "shop", TABLE, temp_dir=self.temp)
        self.upkeep = self._upkeep(self.current)

    def lose_commits(self, below: int) -> None:
        """The log of the changelog is cleaned, as another writer might do it."""
        delta = DeltaLog(self.store, self.changelog.path)
        delta._require().create_checkpoint()
        self.store.delete([f"{self.changelog.path}/_delta_log/{n:020d}.json" for n in range(below)])


@pytest.fixture(params=[SCHEMA, KEYLESS], ids=["keyed", "keyless"])
def story(tmp_path: Path, request: pytest.FixtureRequest) -> Kept:
    made = Kept(tmp_path, request.param)
    made.begin(xmin="50", xmax="50", xip="")
    return made


def rows_of(*ids: int) -> list[dict[str, Any]]:
    return [{"_op": "c", "id": str(n), "note": "x"} for n in ids]


def test_what_is_old_leaves_and_current_keeps_its_rows(story: Kept) -> None:
    story.land(rows_of(1, 2))
    story.merge()
    rows, objects = story.rows(), story.objects()
    assert story.later(9) == 0
    assert story.objects() == objects
    assert story.later(11) == len(objects)
    assert story.objects() == []
    assert story.rows() == rows
    assert story.current.merged() == story.changelog.refresh(), "current names the version that a vacuum leaves"
    assert story.upkeep.vacuum() == len(objects)
    assert [o.key for o in story.store.list(f"{story.changelog.path}/_date")] == []
    story.land(rows_of(3))
    story.merge()
    assert [r["id"] for r in story.rows()] == [1, 2, 3]
    assert story.later(0) == 0


def test_what_is_not_merged_stays_whatever_its_age(story: Kept) -> None:
    story.land(rows_of(1))
    story.merge()
    story.land(rows_of(2))
    waiting = story.objects()[-1]
    story.later(30)
    assert story.objects() == [waiting]
    story.merge()
    assert [r["id"] for r in story.rows()] == [1, 2]


def test_what_has_landed_is_known_when_it_comes_again(story: Kept) -> None:
    story.land(rows_of(1))
    story.merge()
    story.later(30)
    writer = ChangelogTable(story.store, "shop", TABLE).writer(story.temp)
    again = [{"_lsn": story.lsn, "_xid": 7, **row} for row in rows_of(1)]
    assert writer.add(batch_of(story.schema, again)) == 0
    assert ChangelogTable(story.store, "shop", TABLE).tokens().complete(0, 7)


def test_current_is_not_built_of_what_is_left_but_of_a_run_that_began_later(story: Kept) -> None:
    story.land(rows_of(1, 2))
    story.merge()
    story.later(30)
    story.land(rows_of(3))
    story.lose_current()
    with pytest.raises(HistoryGone, match="no longer holds"):
        story.merge()
    assert story.current.version() is None, "half a table is never shown"
    story.run([{"id": "1", "note": "x"}, {"id": "3", "note": "x"}])
    story.merge()
    assert [r["id"] for r in story.rows()] == [1, 3]
    story.land(rows_of(4))
    story.lose_current()
    story.merge()
    assert [r["id"] for r in story.rows()] == [1, 3, 4]


def test_a_row_that_was_deleted_does_not_come_back_with_a_joined_object(story: Kept) -> None:
    """Its insert stands in an object with later changes, its delete in one that has gone."""
    story.land(rows_of(1))
    story.land([{"_op": "d", "id": "1", "note": "x", "_before": {"id": "1", "note": "x"}}])
    (deleted,) = [f for f in story.objects() if f"-{story.lsn:016x}-" in f]
    story.land(rows_of(2))
    story.merge()
    delta = DeltaLog(story.store, story.changelog.path)
    delta.commit(removes=[deleted], tokens={TRIMMED: delta.version()})
    story.lose_current()
    with pytest.raises(HistoryGone):
        story.merge()


def test_what_a_follower_has_not_read_stays(story: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    story.land(rows_of(1, 2))
    story.merge()
    asked: list[float] = []
    monkeypatch.setattr(story.upkeep, "_may_vacuum", lambda version, since: asked.append(since) or False)
    assert story.later(30) == 0
    assert asked
    assert max(asked) <= time.time(), "since when the follower must have had everything: when the object landed"
    monkeypatch.setattr(story.upkeep, "_may_vacuum", lambda version, since: True)
    assert story.later(30) > 0


@pytest.mark.parametrize("trimmed", [False, True])
def test_a_merge_whose_commits_were_cleaned_away_goes_on_by_itself(story: Kept, trimmed: bool) -> None:
    """It stood still, and landing did not, for longer than the log keeps its commits."""
    story.land(rows_of(1, 2))
    story.merge()
    if trimmed:
        story.later(30)
    story.land([{"_op": "d", "id": "1", "note": "x", "_before": {"id": "1", "note": "x"}}])
    story.land(rows_of(3))
    story.lose_commits(story.changelog.version())
    if trimmed:
        with pytest.raises(HistoryGone):
            story.merge()
        story.run([{"id": "2", "note": "x"}, {"id": "3", "note": "x"}])
    story.merge()
    assert [r["id"] for r in story.rows()] == [2, 3]
    story.land(rows_of(4))
    story.merge()
    assert [r["id"] for r in story.rows()] == [2, 3, 4]


def test_the_end_of_a_run_is_merged_though_the_commits_since_its_begin_are_gone(tmp_path: Path) -> None:
    story = Kept(tmp_path, KEYLESS)
    story.begin(xmin="50", xmax="50", xip="")
    story.land(rows_of(1))
    story.run([{"id": "1", "note": "x"}, {"id": "2", "note": "x"}])
    story.land(rows_of(3))
    story.merge()
    story.lose_commits(story.changelog.version())
    story.land(rows_of(4))
    story.merge()
    assert [r["id"] for r in story.rows()] == [1, 2, 3, 4]


def test_a_value_that_an_update_leaves_alone_is_known_though_its_change_has_gone(tmp_path: Path) -> None:
    story = Kept(tmp_path)
    story.begin()
    story.land([{"_op": "c", "id": "1", "note": "long"}])
    story.merge()
    story.later(30)
    story.land([{"_op": "u", "id": "1", "note": None, "_unchanged": ["note"]}])
    assert story.merge().unresolved == []
    assert story.rows() == [{"id": 1, "note": "long"}]


@pytest.mark.parametrize("point", ["retain.before_commit", "retain.after_commit"])
def test_dying_around_the_commit_changes_nothing(story: Kept, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    story.land(rows_of(1))
    story.merge()
    monkeypatch.setattr(failpoints, "_armed", {point: ("error", 1)})
    monkeypatch.setattr(failpoints, "_passes", {})
    with pytest.raises(SourceUnavailable):
        story.later(30)
    story.later(30)
    assert story.objects() == []
    assert [r["id"] for r in story.rows()] == [1]
    assert story.current.merged() == story.changelog.refresh()


def test_an_object_is_as_old_as_its_day_however_late_it_was_joined(tmp_path: Path) -> None:
    story = Kept(tmp_path)
    story.begin()
    at = time.time() - 20 * DAY_S
    for n in range(FEW):
        story.land([{**row, "_committed_at": int(at * 1e6)} for row in rows_of(n)])
    story.merge()
    assert story.upkeep.compact(everything=True) == FEW
    (joined,) = [f for f in DeltaLog(story.store, story.changelog.path).files() if f.rows == FEW]
    assert at < newest_s(joined, "_date") <= at + DAY_S
    assert newest_s(joined, "another") > at + 19 * DAY_S
    assert story.later(0) == 1


# ---- beside merges ----


class KeptScene(Scene):
    """The merger of a changelog that keeps ten days; what it orders is noted."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.ordered: list[str] = []
        self.merger._limits = Limits(3600, 128 << 20, 3600, retain_s=RETAIN_S)
        self.merger._read_anew = lambda table, why: self.ordered.append(why)

    def aged(self, monkeypatch: pytest.MonkeyPatch, days: float) -> None:
        """From now on it is so many days later."""
        real = time.time
        shifted = SimpleNamespace(time=lambda: real() + days * DAY_S, monotonic=time.monotonic)
        monkeypatch.setattr("cdc.upkeep.time", shifted)
        if TABLE in self.merger._upkeeps:
            self.merger._upkeeps[TABLE]._age_at = 0.0


@pytest.fixture
def scene(tmp_path: Path) -> Any:
    made = KeptScene(tmp_path)
    yield made
    made.state.close()


def test_retention_waits_for_the_end_of_a_run(scene: KeptScene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.insert(1, 2)
    scene.merger.step()
    run = scene.state.create_run("shop", TABLE, "resync")
    scene.aged(monkeypatch, 30)
    scene.merger.step()
    assert len(scene.objects()) == 3
    scene.state.update_run(run.id, state="cancelled")
    scene.merger.step()
    assert scene.objects() == []
    assert scene.cut() == scene.current.version()
    assert [r["id"] for r in scene.rows()] == [1, 2]


def test_a_current_that_is_gone_is_read_anew_and_the_reason_told(
    scene: KeptScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.insert(1)
    scene.merger.step()
    scene.aged(monkeypatch, 30)
    scene.merger.step()
    shutil.rmtree(Path(scene.store.location(current_path("shop", TABLE))[0]))
    scene.insert(2)
    scene.merger._pairs.clear()
    scene.merger._upkeeps.clear()
    scene.merger.step()
    (why,) = scene.ordered
    assert "no longer holds" in why


def test_an_order_by_hand_lets_go_what_is_old(scene: KeptScene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.insert(1)
    scene.merger.step()
    scene.aged(monkeypatch, 30)
    order = scene.merger.order_upkeep(TABLE, "vacuum")
    scene.merger.step()
    assert order.done == {"joined": 0, "expired": 2, "cooled": 0, "removed": 0}


def test_a_table_without_current_has_its_upkeep_too(scene: KeptScene, monkeypatch: pytest.MonkeyPatch) -> None:
    own = TableId("cdc", "_messages")
    schema = TableSchema(table=own, oid=1, columns=SCHEMA.columns, key=(), version=1)
    changelog = ChangelogTable(scene.store, "shop", own)
    for n in range(FEW):
        writer = changelog.writer(scene.temp)
        writer.add(batch_of(schema, [{"_op": "c", "_lsn": 10 * n, "_seq": 0, "id": str(n), "note": "x"}]))
        version = writer.commit(Boundary(0, 10 * n, 10 * n)).version
    landed = scene._landed
    monkeypatch.setattr(
        scene.merger, "_landed", lambda: type(landed())(landed().boundary, {**landed().versions, own: version})
    )
    scene.merger.step()
    order = scene.merger.order_upkeep(own, "compact")
    for _ in range(3):
        scene.merger.step()
    assert order.done is not None
    assert order.done["joined"] == FEW
    scene.aged(monkeypatch, 30)
    scene.merger._upkeeps[own]._age_at = 0.0
    scene.merger.step()
    assert DeltaLog(scene.store, changelog.path).files() == []


# ---- the log of the table's versions ----


def test_the_log_is_cleaned_behind_merges_and_never_by_a_landing(tmp_path: Path) -> None:
    story = Kept(tmp_path)
    story.begin()
    delta = DeltaLog(story.store, story.changelog.path)
    delta.commit(configuration={"delta.logRetentionDuration": "interval 0 seconds"})
    for n in range(CHECKPOINT_EVERY + 5):
        story.land(rows_of(n))
    entries = [o.key for o in story.store.list(f"{story.changelog.path}/_delta_log/") if o.key.endswith(".json")]
    assert len(entries) > CHECKPOINT_EVERY, "nobody has merged them"
    assert delta.checkpointed() >= CHECKPOINT_EVERY - 1
    story.merge()
    story.upkeep.vacuum()
    left = [o.key for o in story.store.list(f"{story.changelog.path}/_delta_log/") if o.key.endswith(".json")]
    assert len(left) < 15
    story.land(rows_of(1000))
    story.merge()
    assert len(story.rows()) == CHECKPOINT_EVERY + 6


def test_a_checkpoint_is_made_where_commits_have_gone_without(tmp_path: Path) -> None:
    story = Kept(tmp_path)
    story.begin()
    delta = DeltaLog(story.store, story.changelog.path)
    for n in range(CHECKPOINT_EVERY + 2):  # commits of our own making, behind which none is made
        delta.commit(configuration={"cdc.some": str(n)})
    assert delta.checkpointed() == -1
    story.merge(through=story.current.merged())
    story.upkeep.vacuum()
    assert delta.checkpointed() >= CHECKPOINT_EVERY


# ---- what is told of it ----


def test_the_inventory_tells_what_is_there_and_what_goes_next(tmp_path: Path) -> None:
    story = Kept(tmp_path)
    story.begin()
    now = time.time()
    for days in (3, 8, 8):
        story.land([{**row, "_committed_at": int((now - days * DAY_S) * 1e6)} for row in rows_of(days)])
    story.merge()
    path = story.changelog.path
    found = inventory(story.store, path, small_bytes=1 << 20)
    assert found is not None
    assert (found["files"], found["small_files"], found["small_ratio"], found["dead_bytes"]) == (4, 4, 1.0, 0)
    assert found["oldest_date"] == str(dt.datetime.fromtimestamp(now - 8 * DAY_S, dt.UTC).date())
    assert found["newest_date"] == str(dt.datetime.fromtimestamp(now, dt.UTC).date())
    assert found["log_entries"] == found["version"] + 1, "no checkpoint yet"
    next_days = lifecycle(story.store, path, retain_s=RETAIN_S, cold_after_s=math.inf)
    assert next_days["cools"] is None
    assert next_days["expires"]["files"] == 2
    assert now + 2 * DAY_S < next_days["expires"]["at"] <= now + 3 * DAY_S
    assert story.later(4) == 2
    after = inventory(story.store, path, small_bytes=1 << 20)
    assert after is not None
    assert (after["files"], after["dead_bytes"]) == (2, next_days["expires"]["bytes"])
    assert inventory(story.store, "no/table", small_bytes=1) is None


def test_a_table_that_is_gone_lets_go_and_one_that_stands_still_does_not(
    scene: KeptScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.insert(1, 2)
    run = scene.state.create_run("shop", TABLE, "resync")
    writer = scene.changelog.writer(scene.temp)
    row = {"_op": "s", "_lsn": scene.lsn, "_seq": (1 << 62) + 9, "_run": run.id, "_raw": {"event": "gap"}}
    writer.add(batch_of(scene.schema, [row]), chunk=3)
    scene.through = writer.commit(Boundary(0, scene.lsn, scene.lsn + 1)).version
    scene.state.update_run(run.id, state="done", chunk_no=3)
    scene.merger.step()
    scene.merger._is_stopped = lambda table: True
    scene.aged(monkeypatch, 30)
    scene.state.update_table("shop", TABLE, state="stopped")
    scene.merger.step()
    assert len(scene.objects()) == 4
    scene.state.update_table("shop", TABLE, state="removed")
    scene.merger._pairs.clear()  # as a process that has just started has it
    scene.merger._upkeeps.clear()
    scene.merger._upkeep(TABLE)._age_at = 0.0
    scene.merger.step()
    assert scene.objects() == []
    assert scene.current.merged() == DeltaLog(scene.store, scene.changelog.path).version()
    assert [r["id"] for r in scene.rows()] == [1, 2]
