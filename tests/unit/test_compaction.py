"""Small objects of a changelog become big ones, and nobody who reads notices."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdc import failpoints
from cdc.batch import Boundary
from cdc.errors import SourceUnavailable
from cdc.lake import compaction
from cdc.lake.changelog import ChangelogTable
from cdc.lake.compaction import FEW
from cdc.lake.current import MERGED, CurrentTable, open_current
from cdc.lake.delta import DeltaLog
from cdc.lake.layout import current_path
from cdc.table import TableSchema
from cdc.upkeep import Limits, Upkeep
from connectors.local.store import LocalStore
from tests.support.changelogs import batch_of
from tests.unit.test_lake_current import SCHEMA, TABLE

KEYLESS = TableSchema(table=TABLE, oid=7, columns=SCHEMA.columns, key=(), identity="f", version=1)


class Story:
    """A changelog, written as landing writes it, and its `current`."""

    def __init__(self, root: Path, schema: TableSchema = SCHEMA, *, object_bytes: int = 128 << 20) -> None:
        self.schema = schema
        self.store = LocalStore(root / "lake")
        self.temp = root / "temp"
        self.temp.mkdir()
        self.changelog = ChangelogTable(self.store, "shop", TABLE)
        self.current = CurrentTable(self.store, "shop", TABLE, temp_dir=self.temp)
        self.upkeep = Upkeep(
            self.store, ChangelogTable(self.store, "shop", TABLE), self.current, temp_dir=self.temp,
            limits=Limits(3600, object_bytes, 0),
        )  # fmt: skip
        self.lsn = 0

    def land(self, rows: Sequence[dict[str, Any]], schema: TableSchema | None = None) -> int:
        """One landing of some rows; the changelog's version."""
        self.lsn += 10
        values = [{"_lsn": self.lsn, "_seq": n, "_xid": 100 + self.lsn, **row} for n, row in enumerate(rows)]
        writer = self.changelog.writer(self.temp)
        writer.add(batch_of(schema or self.schema, values))
        return writer.commit(Boundary(0, self.lsn, self.lsn + 1)).version

    def begin(self, **facts: str) -> None:
        """A whole run without rows, merged."""
        writer = self.changelog.writer(self.temp)
        for seq, event in enumerate(("begin", "end")):
            raw = {"event": event, "kind": "first", "oid": "7", **facts}
            row = {"_op": "s", "_lsn": 0, "_seq": (1 << 62) + seq, "_run": "run1", "_raw": raw}
            writer.add(batch_of(self.schema, [row]), chunk=seq)
        writer.commit(Boundary(0, 0, 1))
        assert not self.merge().waiting

    def begin_more(self, run: str, counter: int) -> None:
        """A row that a run has read, at a position that has landed already."""
        counter += 10
        row = {"_op": "r", "_lsn": self.lsn, "_seq": (1 << 62) + counter, "_run": run, "id": f"{run}", "note": "read"}
        writer = self.changelog.writer(self.temp)
        writer.add(batch_of(self.schema, [row]), chunk=0)
        writer.commit(Boundary(0, self.lsn, self.lsn + 1))

    def merge(self, schema: TableSchema | None = None, **how: Any) -> Any:
        return self.current.merge(ChangelogTable(self.store, "shop", TABLE), schema or self.schema, **how)

    def objects(self) -> list[str]:
        log = DeltaLog(self.store, self.changelog.path)
        return sorted(f.path for f in log.files())

    def changes(self, version: int | None = None) -> list[dict[str, Any]]:
        log = DeltaLog(self.store, self.changelog.path)
        parts = [log.open_file(f.path).read() for f in log.files(version)]
        rows = pa.concat_tables(parts, promote_options="permissive").to_pylist()
        return sorted(rows, key=lambda r: (r["_lsn"], r["_seq"]))

    def rows(self) -> list[dict[str, Any]]:
        dataset = open_current(self.store, "shop", TABLE)
        assert dataset is not None
        return sorted(dataset.to_table(columns=["id", "note"]).to_pylist(), key=str)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    made = Story(tmp_path)
    made.begin()
    return made


def test_small_objects_are_joined_and_every_version_reads_the_same(story: Story) -> None:
    for n in range(FEW):
        version = story.land([{"_op": "c", "id": str(n), "note": f"note {n}"}])
    story.merge()
    before, objects = story.changes(), story.objects()
    delta = DeltaLog(story.store, story.changelog.path)
    landed_ms = max(f.added_ms for f in delta.files())

    replaced = story.upkeep.compact()

    delta.refresh()
    assert [f.added_ms for f in delta.files()] == [landed_ms], "its rows are as old as before"

    assert (replaced, len(story.objects())) == (len(objects), 1)
    assert story.changes() == before
    assert story.changes(version) == before, "whoever reads the version before still can"
    assert story.upkeep.compact() == 0, "what is joined is not joined again"


def test_an_object_keeps_what_its_rows_are_known_by_and_how_it_is_encoded(story: Story) -> None:
    for n in range(FEW):
        story.land([{"_op": "u", "id": str(n), "note": "x", "_before": {"id": str(n), "note": "y"}}])
    story.merge()
    log = DeltaLog(story.store, story.changelog.path)
    old = {f.path: log.open_file(f.path) for f in log.files()}
    story.upkeep.compact()
    (path,) = set(story.objects()) - set(old)
    new = DeltaLog(story.store, story.changelog.path).open_file(path)
    one = next(f for p, f in old.items() if p not in story.objects())
    assert new.schema_arrow.equals(one.schema_arrow, check_metadata=True)

    def kinds(file: pq.ParquetFile) -> list[tuple[Any, ...]]:
        group = file.metadata.row_group(0)
        columns = [group.column(i) for i in range(group.num_columns)]
        return [(c.path_in_schema, c.encodings, c.compression, c.is_stats_set) for c in columns]

    assert kinds(new) == kinds(one)


@pytest.mark.parametrize("schema", [SCHEMA, KEYLESS], ids=["keyed", "keyless"])
def test_current_can_be_built_anew_when_the_objects_of_before_are_gone(tmp_path: Path, schema: TableSchema) -> None:
    story = Story(tmp_path, schema)
    story.begin(xmin="50", xmax="50", xip="")
    for n in range(FEW):
        story.land([{"_op": "c", "id": str(n), "note": "x"}])
    story.merge()
    story.upkeep.compact(everything=True)
    story.merge(through=story.current.merged())
    assert story.upkeep.vacuum() > 0
    story.land([{"_op": "c", "id": "100", "note": "later"}])
    story.merge()
    rows = story.rows()
    shutil.rmtree(tmp_path / "lake" / current_path("shop", TABLE))
    story.current = CurrentTable(story.store, "shop", TABLE, temp_dir=story.temp)
    story.merge()
    assert story.rows() == rows
    story.land([{"_op": "c", "id": "101", "note": "later"}])
    story.merge()
    assert len(story.rows()) == len(rows) + 1


def test_what_is_not_merged_is_left_alone_and_merged_later_all_the_same(story: Story) -> None:
    for n in range(FEW):
        story.land([{"_op": "c", "id": str(n), "note": "first"}])
    story.merge()
    for n in range(FEW):
        story.land([{"_op": "u", "id": str(n), "note": "second"}])
    waiting = set(story.objects()[-FEW:])
    assert story.upkeep.compact(everything=True) >= FEW
    assert waiting <= set(story.objects())
    story.merge()
    assert {r["note"] for r in story.rows()} == {"second"}


def test_current_follows_to_the_version_with_the_joined_objects_so_that_the_old_ones_may_go(story: Story) -> None:
    for n in range(FEW):
        story.land([{"_op": "c", "id": str(n), "note": "x"}])
    merged = story.current.merged() if story.merge() else -1
    rows = story.rows()
    story.upkeep.compact()
    story.merge(through=merged)
    followed = DeltaLog(story.store, current_path("shop", TABLE)).token(MERGED)
    assert followed == merged + 1
    assert story.upkeep.vacuum() == FEW + 1
    assert len(story.changes(followed)) == FEW + 2
    assert story.rows() == rows


def test_a_landing_between_the_merge_and_the_join_is_not_taken_for_merged(story: Story) -> None:
    for n in range(FEW):
        story.land([{"_op": "c", "id": str(n), "note": "x"}])
    story.merge()
    story.land([{"_op": "d", "id": "0"}])
    story.upkeep.compact()
    story.merge(through=story.current.merged())
    assert len(story.rows()) == FEW
    story.merge()
    assert len(story.rows()) == FEW - 1


def test_objects_of_another_shape_or_key_are_not_mixed(story: Story) -> None:
    other = TableSchema(table=TABLE, oid=7, columns=SCHEMA.columns, key=("id", "note"), version=2)
    for n in range(FEW - 2):
        story.land([{"_op": "c", "id": str(n), "note": "x"}])
        story.land([{"_op": "c", "id": str(n + 100), "note": "x"}], other)
    held = story.objects()
    assert _join(story) is None, "no kind has enough of them"
    assert story.objects() == held


@pytest.mark.parametrize("point", ["compact.before_commit", "compact.after_commit"])
def test_a_join_that_dies_around_its_commit_changes_no_row(
    story: Story, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    for n in range(FEW):
        story.land([{"_op": "c", "id": str(n), "note": "x"}])
    story.merge()
    before = story.changes()
    monkeypatch.setattr(failpoints, "_armed", {point: ("error", 1)})
    monkeypatch.setattr(failpoints, "_passes", {})
    with pytest.raises(SourceUnavailable):
        story.upkeep.compact()
    assert story.changes() == before
    story.upkeep.compact()
    assert story.changes() == before
    assert len(story.objects()) == 1


def test_what_grows_is_written_again_a_few_times_only(tmp_path: Path) -> None:
    story = Story(tmp_path, object_bytes=1 << 20)
    story.begin()
    landed = written = 0
    rng = random.Random(3)
    for n in range(120):
        note = "".join(rng.choice("abcdefgh") for _ in range(3000))
        story.land([{"_op": "c", "id": str(n), "note": note}])
        if n % 4 == 3:
            story.merge()
            while (joined := _join(story)) is not None:
                written += joined.bytes_after
    landed = sum(f.size for f in DeltaLog(story.store, story.changelog.path).files())
    assert len(story.objects()) < 40
    assert written < 4 * landed, f"{written} bytes were written for {landed}"
    assert [r["id"] for r in story.changes() if r["_op"] == "c"] == list(range(120))


def _join(story: Story, **how: Any) -> compaction.Joined | None:
    delta = DeltaLog(story.store, story.changelog.path)
    compactor = compaction.Compactor(story.store, delta, "_", temp_dir=story.temp, target_bytes=1 << 20)
    return compactor.join(delta.version(), [], **how)


def test_a_table_without_a_key_is_merged_on_after_its_run_s_begin_was_joined_and_removed(tmp_path: Path) -> None:
    story = Story(tmp_path, KEYLESS)
    story.begin(xmin="50", xmax="50", xip="")
    for n in range(FEW):
        story.land([{"_op": "c", "id": str(n), "note": "x"}])
    story.merge()
    assert story.upkeep.compact(everything=True) > FEW
    story.merge(through=story.current.merged())
    story.upkeep.vacuum()
    story.land([{"_op": "c", "id": "0", "note": "x"}])
    story.merge()
    assert [r["id"] for r in story.rows()] == [0, 0, 1, 2, 3, 4, 5, 6, 7]


def test_a_past_day_is_joined_whatever_the_sizes_once_nothing_comes_for_it_any_more(story: Story) -> None:
    day_us = 86_400_000_000
    now_us = time.time_ns() // 1000
    for n in range(3):
        row = {"_op": "c", "id": str(n), "note": "x" * 20 ** (n + 1), "_committed_at": now_us - 3 * day_us}
        story.land([row])
    story.merge()
    assert _join(story) is None, "there may be more to come"
    joined = _join(story, now_s=now_us / 1e6 + 4000)
    assert joined is not None
    assert joined.objects == 3
    assert _join(story, now_s=now_us / 1e6 + 4000) is None
