"""`current`, one story at a time: what random programs do not reach, and what they would not explain."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from cdc import failpoints
from cdc.batch import SNAPSHOT_SEQ, Boundary
from cdc.errors import IdentityMissing, KeyChanged, SourceUnavailable, StoreConflict
from cdc.lake.changelog import ChangelogTable
from cdc.lake.current import CurrentTable, MergeResult, open_current
from cdc.lake.delta import DeltaLog
from cdc.lake.layout import current_path
from cdc.lake.reduce import SET, Events, Order, Orders, Targets, reduce
from cdc.table import Column, TableId, TableSchema
from connectors.local.store import LocalStore
from tests.support.changelogs import Changelog, batch_of

TABLE = TableId("public", "orders")
ID = Column(name="id", attnum=1, type_oid=20, type_name="bigint")
NOTE = Column(name="note", attnum=2, type_oid=25, type_name="text")
SCHEMA = TableSchema(table=TABLE, oid=7, columns=(ID, NOTE), key=("id",), version=1)


class Story:
    """A changelog and its `current`, with short ways to change and look."""

    def __init__(self, root: Path, schema: TableSchema = SCHEMA, *, bucket_rows: int = 250_000) -> None:
        self.schema = schema
        self.changelog = Changelog(root / "lake", schema)
        self.current = CurrentTable(
            self.changelog.store, "shop", TABLE, temp_dir=root / "scratch", bucket_rows=bucket_rows
        )
        self.lsn = 0
        self.seq = 0

    def row(self, op: str, **values: Any) -> dict[str, Any]:
        self.seq += 1
        return {"_op": op, "_lsn": self.lsn, "_seq": self.seq, "_xid": 100, **values}

    def land(
        self, rows: Sequence[dict[str, Any]], schema: TableSchema | None = None, *, complete: bool = False
    ) -> None:
        """One commit of the changelog."""
        self.changelog.commit([batch_of(schema or self.schema, [r]) for r in rows], lsn=self.lsn, complete=complete)
        self.lsn += 1

    def control(self, event: str, run: str = "run1", kind: str = "first", **facts: str) -> dict[str, Any]:
        raw = {"event": event, "kind": kind, "oid": "7", **facts}
        row = self.row("s", _run=run, _raw=raw)
        # What commits from now on has a later position than the log had when the run began.
        self.lsn += 1
        return {**row, "_seq": SNAPSHOT_SEQ + row["_seq"]}

    def begin(self, rows: Sequence[dict[str, Any]] = (), **facts: str) -> None:
        """The first run, complete, with these rows, merged."""
        begin = self.control("begin", **facts)
        self.land([begin, *({**row, "_lsn": self.lsn} for row in rows), self.control("end")], complete=True)
        assert not self.merge().waiting

    def merge(self, schema: TableSchema | None = None, **how: Any) -> MergeResult:
        return self.current.merge(ChangelogTable(self.changelog.store, "shop", TABLE), schema or self.schema, **how)

    def rows(self) -> list[dict[str, Any]]:
        dataset = open_current(self.changelog.store, "shop", TABLE)
        assert dataset is not None
        names = [n for n in dataset.schema.names if not n.startswith("_")]
        rows = dataset.to_table(columns=names).to_pylist()
        return sorted(rows, key=lambda r: str(r))

    def files(self) -> set[str]:
        return {f.path for f in DeltaLog(self.changelog.store, current_path("shop", TABLE)).files()}


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def test_nothing_is_shown_until_the_first_run_has_ended(story: Story) -> None:
    story.land([story.control("begin"), story.row("c", id="1", note="a")])
    result = story.merge()
    assert result.waiting
    assert result.version is None
    assert open_current(story.changelog.store, "shop", TABLE) is None
    story.land([story.control("end")], complete=True)
    assert story.merge(through=story.changelog.newest() - 1).waiting
    assert story.merge().rows_upserted == 1
    assert story.rows() == [{"id": 1, "note": "a"}]


def test_a_merge_that_is_repeated_changes_nothing(story: Story) -> None:
    story.begin([story.row("c", id="1", note="a")])
    version = story.current.version()
    result = story.merge()
    assert (result.version, result.rows_upserted, result.rows_deleted) == (version, 0, 0)


@pytest.mark.parametrize(("point", "happened"), [("merge.before_commit", False), ("merge.after_commit", True)])
def test_a_merge_that_fails_around_its_commit_leaves_one_whole_state(
    story: Story, monkeypatch: pytest.MonkeyPatch, point: str, happened: bool
) -> None:
    story.begin([story.row("c", id="1", note="a")])
    story.land([story.row("u", id="1", note="b")])
    monkeypatch.setattr(failpoints, "_armed", {point: ("error", 1)})
    monkeypatch.setattr(failpoints, "_passes", {})
    with pytest.raises(SourceUnavailable):
        story.merge()
    assert story.rows() == [{"id": 1, "note": "b" if happened else "a"}]
    data = {p.name for p in (tmp_of(story) / "current").glob("*.parquet")}
    assert len(data) == (2 if happened else 1)
    assert story.merge().rows_upserted == (0 if happened else 1)
    assert story.rows() == [{"id": 1, "note": "b"}]


def test_two_merges_at_once_end_in_a_conflict_and_one_result(story: Story, tmp_path: Path) -> None:
    story.begin([story.row("c", id="1", note="a")])
    story.land([story.row("u", id="1", note="b")])
    rival = CurrentTable(story.changelog.store, "shop", TABLE, temp_dir=tmp_path / "rival")
    store_file = LocalStore.put

    def put_after_the_rival(self: LocalStore, key: str, data: Any, **how: Any) -> str:
        LocalStore.put = store_file  # type: ignore[method-assign]
        rival.merge(ChangelogTable(story.changelog.store, "shop", TABLE), SCHEMA)
        return store_file(self, key, data, **how)

    LocalStore.put = put_after_the_rival  # type: ignore[method-assign]
    try:
        with pytest.raises(StoreConflict):
            story.merge()
    finally:
        LocalStore.put = store_file  # type: ignore[method-assign]
    assert story.merge().rows_upserted == 0
    assert story.rows() == [{"id": 1, "note": "b"}]


def test_an_older_row_that_arrives_late_does_not_undo_a_newer_one(story: Story) -> None:
    story.begin()
    early = story.row("r", id="1", note="old") | {"_run": "run2", "_seq": SNAPSHOT_SEQ + 50}
    story.land([])
    story.land([story.row("u", id="1", note="new")])
    story.merge()
    story.land([early, story.row("c", id="2", note="b")])
    assert story.merge().rows_upserted == 1
    assert story.rows() == [{"id": 1, "note": "new"}, {"id": 2, "note": "b"}]


def test_an_unchanged_toast_value_survives_moves_through_buckets(tmp_path: Path) -> None:
    story = Story(tmp_path, bucket_rows=4)
    story.begin([story.row("c", id=str(i), note=f"text {i}") for i in range(40)])
    assert len(story.files()) >= 8
    rotated = [
        story.row("u", id=str(i + 100), note=None, _unchanged=["note"], _before={"id": str(i)}) for i in range(40)
    ] + [
        story.row("u", id=str((i + 1) % 40), note=None, _unchanged=["note"], _before={"id": str(i + 100)})
        for i in range(40)
    ]
    story.land(rotated)
    result = story.merge()
    assert (result.rows_upserted, result.unresolved) == (40, [])
    assert story.rows() == sorted(({"id": (i + 1) % 40, "note": f"text {i}"} for i in range(40)), key=lambda r: str(r))


@pytest.mark.parametrize("together", [True, False], ids=["one commit", "two commits, one merge"])
def test_an_insert_and_an_update_that_leaves_its_big_value_alone_keep_it_in_one_merge(
    story: Story, together: bool
) -> None:
    story.begin()
    insert, update = story.row("c", id="1", note="big"), story.row("u", id="1", _unchanged=["note"])
    moved = story.row("u", id="2", _unchanged=["note"], _before={"id": "1", "note": None})
    story.land([insert, update, moved]) if together else (story.land([insert]), story.land([update, moved]))
    story.merge()
    assert story.rows() == [{"id": 2, "note": "big"}]


def test_a_value_that_nobody_knows_blocks_the_merge_until_its_row_is_read(story: Story) -> None:
    story.begin([story.row("c", id="1", note="a")])
    files = story.files()
    story.land([story.row("u", id="2", note=None, _unchanged=["note"]), story.row("c", id="3", note="c")])
    result = story.merge()
    assert result.unresolved == [("2",)]
    assert story.rows() == [{"id": 1, "note": "a"}]
    data = {p.name for p in (tmp_of(story) / "current").glob("*.parquet")}
    assert data == files
    story.land([story.row("r", id="2", note="read again") | {"_run": "run2", "_seq": SNAPSHOT_SEQ + 900}])
    assert story.merge().unresolved == []
    assert story.rows() == [{"id": 1, "note": "a"}, {"id": 2, "note": "read again"}, {"id": 3, "note": "c"}]


def tmp_of(story: Story) -> Path:
    root, _ = story.changelog.store.location("shop/public.orders")
    return Path(root)


def test_only_the_buckets_that_change_are_rewritten(tmp_path: Path) -> None:
    story = Story(tmp_path, bucket_rows=10)
    story.begin([story.row("c", id=str(i), note="a") for i in range(60)])
    before = story.files()
    assert len(before) >= 8
    story.land([story.row("u", id="7", note="b")])
    story.merge()
    assert len(story.files() - before) == 1
    assert len(before - story.files()) == 1


def test_a_growing_table_doubles_its_buckets_and_keeps_every_row(tmp_path: Path) -> None:
    story = Story(tmp_path, bucket_rows=10)
    story.begin([story.row("c", id=str(i), note="a") for i in range(10)])
    few = len(story.files())
    story.land([story.row("c", id=str(i), note="b") for i in range(10, 90)])
    story.merge()
    assert len(story.files()) > few
    assert [r["id"] for r in sorted(story.rows(), key=lambda r: r["id"])] == list(range(90))


def test_ghosts_go_at_the_end_of_a_run_that_began_in_an_earlier_merge(story: Story) -> None:
    story.begin([story.row("c", id="1", note="a"), story.row("c", id="2", note="ghost")])
    story.land([story.control("begin", "run2", "resync")])
    story.merge()
    story.land([story.row("r", id="1", note="a2") | {"_run": "run2", "_seq": SNAPSHOT_SEQ + 500}])
    story.merge()
    assert len(story.rows()) == 2
    story.land([story.row("u", id="3", note="c"), story.control("end", "run2", "resync")], complete=True)
    assert story.merge().rows_deleted == 1
    assert story.rows() == [{"id": 1, "note": "a2"}, {"id": 3, "note": "c"}]


def test_a_repair_removes_rows_from_buckets_that_are_not_theirs(tmp_path: Path) -> None:
    """No merge of ours puts them there, but another writer may; a change of their keys looks in another file."""
    story = Story(tmp_path, bucket_rows=10)
    story.begin([story.row("c", id=str(i), note="a") for i in range(1, 61)])
    folder = tmp_of(story) / "current"
    for path in folder.glob("*.parquet"):
        rows = pq.read_table(path)
        strays = [{**row, "id": -row["id"]} for row in rows.to_pylist()]
        pq.write_table(pa.concat_tables([rows, pa.Table.from_pylist(strays, rows.schema)]), path)
    story.land([story.row("u", id="7", note="b")])
    story.merge()
    assert len(story.rows()) > 100
    absent = [story.row("d", id=str(-i)) | {"_run": "run2", "_seq": SNAPSHOT_SEQ + 500 + i} for i in range(1, 61)]
    story.land([story.control("begin", "run2", "filtered"), *absent])
    story.land([story.control("end", "run2", "filtered")])
    story.merge()
    assert sorted(r["id"] for r in story.rows()) == list(range(1, 61))


def test_reading_single_keys_again_deletes_nothing(story: Story) -> None:
    story.begin([story.row("c", id="1", note="a")])
    story.land([story.control("begin", "run2", "keys"), story.control("end", "run2", "keys")])
    story.merge()
    assert story.rows() == [{"id": 1, "note": "a"}]


def test_a_new_column_shows_its_missing_value_in_rows_that_nobody_touches(tmp_path: Path) -> None:
    story = Story(tmp_path, bucket_rows=4)
    story.begin([story.row("c", id=str(i), note="a") for i in range(30)])
    added = Column(name="size", attnum=3, type_oid=23, type_name="integer", missing="5")
    wider = replace(SCHEMA, columns=(ID, NOTE, added), version=2)
    story.land([story.row("u", id="0", note="b", size="6")], wider)
    story.merge(wider)
    assert sorted({r["size"] for r in story.rows()}) == [5, 6]
    story.land([story.row("u", id="1", note="late", _unchanged=None)])
    story.merge(wider)
    assert {"id": 1, "note": "late", "size": 5} in story.rows()


def test_a_missing_value_that_the_type_cannot_hold_is_kept_as_text(story: Story) -> None:
    story.begin([story.row("c", id="1", note="a")])
    typmod = (4 << 16 | 1) + 4
    added = Column(name="n", attnum=3, type_oid=1700, typmod=typmod, type_name="numeric(4,1)", missing="NaN")
    wider = replace(SCHEMA, columns=(ID, NOTE, added), version=2)
    story.land([story.row("u", id="1", note="b")])
    story.merge(wider)
    dataset = open_current(story.changelog.store, "shop", TABLE)
    assert dataset is not None
    assert dataset.to_table().to_pylist()[0]["_raw"] == [("n", "NaN")]


def test_a_renamed_column_takes_its_values_along_and_a_recreated_one_does_not(tmp_path: Path) -> None:
    story = Story(tmp_path, bucket_rows=4)
    story.begin([story.row("c", id=str(i), note=f"n{i}") for i in range(12)])
    renamed = replace(SCHEMA, columns=(ID, replace(NOTE, name="remark")), version=2)
    story.land([story.row("u", id="3", remark=None, _unchanged=["remark"])], renamed)
    story.merge(renamed)
    assert {(r["id"], r["remark"]) for r in story.rows()} == {(i, f"n{i}") for i in range(12)}
    recreated = replace(SCHEMA, columns=(ID, replace(NOTE, name="remark", attnum=3)), version=3)
    story.land([story.row("u", id="3", remark="new")], recreated)
    story.merge(recreated)
    assert {(r["id"], r["remark"]) for r in story.rows()} == {(i, "new" if i == 3 else None) for i in range(12)}


def test_another_key_lays_the_rows_out_anew(tmp_path: Path) -> None:
    story = Story(tmp_path, bucket_rows=4)
    story.begin([story.row("c", id=str(i), note=f"n{i}") for i in range(12)])
    rekeyed = replace(SCHEMA, key=("note",), version=2)
    story.land([story.row("u", id="77", note="n3"), story.row("d", note="n4")], rekeyed)
    story.merge(rekeyed)
    expected = {(i, f"n{i}") for i in range(12) if i != 4} - {(3, "n3")} | {(77, "n3")}
    assert {(r["id"], r["note"]) for r in story.rows()} == expected


def test_own_writes_are_told_from_those_of_others(story: Story) -> None:
    story.begin()
    story.land([story.row("c", id="1", note="a", _origin="cdc_push")])
    assert not story.merge(own_origins=["cdc_push"]).foreign_change
    story.land([story.row("u", id="1", note="b", _origin="cdc_push"), story.row("u", id="1", note="c")])
    assert story.merge(own_origins=["cdc_push"]).foreign_change
    story.land([story.row("c", id="2", note="a", _origin="elsewhere")])
    assert story.merge(own_origins=["cdc_push"]).foreign_change


def test_an_old_version_stays_readable_until_it_is_vacuumed(story: Story) -> None:
    story.begin([story.row("c", id="1", note="a")])
    first = story.current.version()
    story.land([story.row("u", id="1", note="b")])
    story.merge()
    old = open_current(story.changelog.store, "shop", TABLE, first)
    assert old is not None
    assert old.to_table().column("note").to_pylist() == ["a"]
    assert story.current.vacuum(0) == 1
    assert story.rows() == [{"id": 1, "note": "b"}]


def test_vacuum_removes_what_a_killed_merge_left(story: Story) -> None:
    story.begin([story.row("c", id="1", note="a")])
    (live,) = story.files()
    orphan = tmp_of(story) / "current" / (live[: -len("0123456789ab.parquet")] + "0" * 12 + ".parquet")
    orphan.write_bytes(b"half")
    story.current.vacuum(0)
    assert orphan.exists()
    long_ago = time.time() - 7200
    os.utime(orphan, (long_ago, long_ago))
    assert story.current.vacuum(0) == 1
    assert not orphan.exists()
    assert story.rows() == [{"id": 1, "note": "a"}]


KEYLESS = replace(SCHEMA, key=())


def test_a_table_without_a_key_is_what_a_run_read_and_what_was_inserted_unseen(tmp_path: Path) -> None:
    story = Story(tmp_path, KEYLESS)
    story.land([story.control("begin", xmin="100", xmax="110", xip="105")])
    inserts = [("s", 100), ("u", 105), ("n", 111)]
    seen, unseen, newer = (story.row("c", id="1", note=note) | {"_xid": xid} for note, xid in inserts)
    story.land([seen, unseen])
    assert story.merge().waiting
    story.land(
        [story.row("r", id="1", note="s") | {"_run": "run1", "_seq": SNAPSHOT_SEQ + 99}, newer, story.control("end")],
        complete=True,
    )
    story.merge()
    assert [r["note"] for r in story.rows()] == ["n", "s", "u"]
    story.land([story.row("c", id="1", note="after") | {"_xid": 112}])
    story.merge()
    assert [r["note"] for r in story.rows()] == ["after", "n", "s", "u"]


def test_inserts_that_a_keyless_run_has_seen_are_left_out_after_its_end_too(tmp_path: Path) -> None:
    story = Story(tmp_path, KEYLESS)
    read = story.row("r", id="1", note="s") | {"_run": "run1", "_seq": SNAPSHOT_SEQ + 9}
    story.land([story.control("begin", xmin="100", xmax="110", xip=""), read, story.control("end")], complete=True)
    story.merge()
    story.land([story.row("c", id="1", note="s") | {"_xid": 104}])
    story.merge()
    assert len(story.rows()) == 1
    story.land([story.row("c", id="1", note="n") | {"_xid": 110}])
    story.merge()
    # Half the space of transaction ids later, 104 is another transaction.
    story.land([story.row("c", id="1", note="wrapped") | {"_xid": 104}])
    story.merge()
    assert [r["note"] for r in story.rows()] == ["n", "s", "wrapped"]


def test_a_keyless_table_swaps_at_the_end_of_a_resync_and_forgets_what_a_truncate_removed(tmp_path: Path) -> None:
    story = Story(tmp_path, KEYLESS)
    facts = {"xmin": "100", "xmax": "100", "xip": ""}
    story.begin([story.row("r", id="1", note="old") | {"_run": "run1", "_seq": SNAPSHOT_SEQ + 9}], **facts)
    story.land([story.control("begin", "run2", "resync", xmin="200", xmax="200", xip="")])
    story.land([story.row("c", id="2", note="during") | {"_xid": 201}])
    story.merge()
    assert [r["note"] for r in story.rows()] == ["old", "during"]
    read = story.row("r", id="3", note="read") | {"_run": "run2", "_seq": SNAPSHOT_SEQ + 99}
    story.land([read, story.control("end", "run2", "resync")], complete=True)
    story.merge()
    assert [r["note"] for r in story.rows()] == ["during", "read"]
    story.land([story.row("t") | {"_xid": 202}, story.row("c", id="4", note="fresh") | {"_xid": 202}])
    story.merge()
    assert [r["note"] for r in story.rows()] == ["fresh"]


@pytest.mark.parametrize("more", [{}, {"_before": {"id": "1", "note": "a"}, "_unchanged": ["note"]}])
def test_updates_without_the_whole_old_row_stop_a_table_without_a_key(tmp_path: Path, more: dict[str, Any]) -> None:
    story = Story(tmp_path, KEYLESS)
    story.begin([story.row("c", id="1", note="a")], xmin="1", xmax="1", xip="")
    story.land([story.row("u", id="1", note="x", **more)])
    with pytest.raises(IdentityMissing) as error:
        story.merge()
    assert "replica identity full" in error.value.hint


def test_one_of_several_equal_rows_goes_and_files_of_others_stay(tmp_path: Path) -> None:
    story = Story(tmp_path, KEYLESS)
    same, nothing = {"id": "1", "note": "a"}, {"id": None, "note": None}
    story.begin([story.row("c", **same)] * 3, xmin="1", xmax="1", xip="")
    for rows in ([same, nothing], [{"id": "2", "note": "b"}]):
        story.land([story.row("c", **row) for row in rows])
        story.merge()
    before = story.files()
    story.land([story.row("d", **same), story.row("u", id="1", note="c", _before=same)])
    result = story.merge()
    assert (result.rows_upserted, result.rows_deleted) == (1, 2)
    assert [r["note"] for r in story.rows()] == ["a", "a", "c", "b", None]
    assert story.files() & before, "one file held nothing that went"
    assert story.merge().rows_deleted == 0, "what is repeated changes nothing"


def test_what_a_table_without_a_key_shows_is_of_the_run_that_ended_not_of_one_that_began(tmp_path: Path) -> None:
    """Two begin rows may come with one version of the changelog."""
    story = Story(tmp_path, KEYLESS)
    story.lsn = 10
    first = [story.control("begin", xmin="50", xmax="50", xip=""), story.control("end")]
    story.land([*first, story.control("begin", run="run2", kind="resync", xmin="90", xmax="90", xip="")], complete=True)
    story.merge()
    story.land([story.row("c", id="1", note="a") | {"_xid": 60}])
    story.merge()
    assert story.rows() == [{"id": 1, "note": "a"}], "run1 did not see it, whatever run2 will have seen"
    story.land([story.control("end", run="run2", kind="resync")])
    story.merge()
    story.land([story.row("c", id="2", note="b") | {"_xid": 80}])
    story.merge()
    assert story.rows() == [], "run2 saw both, and read neither"


def test_a_new_columns_default_shows_in_old_rows_of_a_table_without_a_key(tmp_path: Path) -> None:
    story = Story(tmp_path, KEYLESS)
    story.begin([story.row("c", id="1", note="a")], xmin="1", xmax="1", xip="")
    grade = Column(name="grade", attnum=3, type_oid=23, type_name="integer", missing="7")
    newer = replace(KEYLESS, columns=(ID, replace(NOTE, name="text"), grade), version=2)
    story.land([story.row("c", id="2", text="b", grade="8")], newer)
    story.merge(newer)
    seen = [(r["id"], r["text"], r["grade"]) for r in story.rows()]
    assert seen == [(1, "a", 7), (2, "b", 8)]
    story.land([story.row("d", id="1", text="a", grade="7")], newer)
    story.merge(newer)
    assert [(r["id"], r["text"]) for r in story.rows()] == [(2, "b")]


def test_what_landing_wrote_is_what_current_shows(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "lake")
    changelog = ChangelogTable(store, "shop", TABLE)
    story = Story(tmp_path)
    writer = changelog.writer(tmp_path)
    story.lsn = 5
    chunks: list[tuple[list[dict[str, Any]], int | None]] = [
        ([story.control("begin")], 0),
        ([story.row("c", id="1", note="a"), story.row("u", id="1", note="b", _before={"id": "1", "note": "a"})], None),
        ([story.row("r", id="2", note="r") | {"_run": "run1", "_seq": SNAPSHOT_SEQ + 70}], 1),
        ([{**story.control("end"), "_seq": SNAPSHOT_SEQ + 71}], 2),
    ]
    for rows, chunk in chunks:
        writer.add(batch_of(SCHEMA, rows), chunk=chunk)
    writer.commit(Boundary(0, story.lsn, story.lsn))
    result = CurrentTable(store, "shop", TABLE, temp_dir=tmp_path / "scratch").merge(changelog, SCHEMA)
    assert (result.rows_upserted, result.last_lsn) == (2, story.lsn)
    assert story.rows() == [{"id": 1, "note": "b"}, {"id": 2, "note": "r"}]


def test_a_hot_key_with_a_hundred_thousand_updates_is_followed_to_its_value() -> None:
    n = 100_000
    places = Orders(np.zeros(n, np.int64), np.arange(1, n + 1), np.zeros(n, np.int64))
    events = Events(pa.array(["k"] * n), np.full(n, SET, np.uint8), places, np.full(n, 1, np.int32))
    target = Targets(pa.array(["k"]), Orders(np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)))
    reduced = reduce(events, target, np.array([[0], [1]], np.uint8))
    assert reduced.upserts.tolist() == [n - 1]
    assert reduced.sources[0].tolist() == [n]
    assert Order(0, 1, 2) < Order(0, 2, 0) < Order(1, 0, 0)


def test_a_resync_mends_a_table_that_another_writer_has_changed(story: Story) -> None:
    story.begin([story.row("c", id="1", note="a"), story.row("c", id="2", note="b")])
    DeltaTable(str(tmp_of(story) / "current")).delete("id = 2")
    assert story.rows() == [{"id": 1, "note": "a"}]
    begin = story.control("begin", "run2", "resync")
    read = [
        story.row("r", id=i, note=note) | {"_run": "run2", "_seq": SNAPSHOT_SEQ + 500 + int(i)}
        for i, note in (("1", "a"), ("2", "b"))
    ]
    story.land([begin, *read, story.control("end", "run2", "resync")], complete=True)
    story.merge()
    assert story.rows() == [{"id": 1, "note": "a"}, {"id": 2, "note": "b"}]


# ---- the key changes --------------------------------------------------------------------------------------------

BY_NOTE = replace(SCHEMA, key=("note",), identity="i", version=2)
WHOLE = replace(SCHEMA, key=(), identity="f", version=3)


class Landed(Story):
    """A story whose changelog is written by landing, so that objects say what their rows are known by."""

    def land(
        self, rows: Sequence[dict[str, Any]], schema: TableSchema | None = None, *, complete: bool = False
    ) -> None:
        writer = ChangelogTable(self.changelog.store, "shop", TABLE).writer(self.root)
        for row in rows:
            writer.add(batch_of(schema or self.schema, [row]))
        writer.commit(Boundary(0, self.lsn, self.lsn))
        self.lsn += 1

    def __init__(self, root: Path, schema: TableSchema = SCHEMA) -> None:
        super().__init__(root, schema)
        self.root = root


FIRST = [{"id": "1", "note": "a"}, {"id": "2", "note": "b"}]


@pytest.mark.parametrize("newer", [BY_NOTE, WHOLE], ids=["another key", "none"])
def test_changes_under_an_old_key_are_not_taken_for_changes_under_the_new_one(
    tmp_path: Path, newer: TableSchema
) -> None:
    """`update … set note = 'c' where id = 1` says nothing of the row whose note was 'a'."""
    story = Landed(tmp_path)
    story.begin([story.row("c", **row) for row in FIRST])
    story.land([story.row("u", id="1", note="c")])
    story.land([story.row("c", id="3", note="d")], newer)
    with pytest.raises(KeyChanged) as error:
        story.merge(newer)
    assert error.value.hint == "cdc resync public.orders"
    assert [r["note"] for r in story.rows()] == ["a", "b"], "what was shown stays"
    seen = {"xmin": "200", "xmax": "200", "xip": ""} if newer is WHOLE else {}
    run = [{**row, "_op": "r", "_run": "run2"} for row in ({"id": "1", "note": "c"}, {"id": "2", "note": "b"})]
    begin = story.control("begin", "run2", "resync", **seen)
    rows = [(made := story.row("r")) | row | {"_seq": SNAPSHOT_SEQ + made["_seq"]} for row in run]
    story.land([begin, *rows], newer)
    story.land([story.control("end", "run2", "resync")], newer)
    story.merge(newer)
    assert sorted(r["note"] for r in story.rows()) == ["b", "c"]


@pytest.mark.parametrize("newer", [BY_NOTE, WHOLE], ids=["another key", "none"])
def test_rows_are_laid_out_anew_when_only_whole_rows_came_under_the_old_key(tmp_path: Path, newer: TableSchema) -> None:
    story = Landed(tmp_path)
    story.begin([story.row("c", **row) for row in FIRST])
    story.land([story.row("c", id="3", note="c")])
    change = story.row("u", id="9", note="b", _before={"id": "2", "note": "b"} if newer is WHOLE else None)
    story.land([change, story.row("d", id="1", note="a")], newer)
    story.merge(newer)
    assert story.rows() == [{"id": 3, "note": "c"}, {"id": 9, "note": "b"}]
    story.land([story.row("d", id="3", note="c")], newer)
    story.merge(newer)
    story.land([story.row("u", id="9", note="z")])
    story.merge(newer)
    assert story.rows() == [{"id": 9, "note": "z"}], (
        "the newest change says which key is in force, not the newest schema"
    )


def test_a_merge_without_changes_keeps_the_key(tmp_path: Path) -> None:
    """A snapshot may know of a new key before the stream does, while two rows still meet under it."""
    story = Landed(tmp_path)
    story.begin([story.row("c", id="1", note="same"), story.row("c", id="2", note="same")])
    story.land([story.control("begin", "run2", "resync")], BY_NOTE)
    story.merge(BY_NOTE)
    assert len(story.rows()) == 2


def test_old_rows_that_are_not_whole_stop_a_table_without_a_key(tmp_path: Path) -> None:
    """As those of a partition with an identity of its own, under a root without one."""
    story = Landed(tmp_path, replace(WHOLE, identity="d"))
    story.begin([story.row("c", **row) for row in FIRST], xmin="1", xmax="1", xip="")
    story.land([story.row("d", id="1", note=None)])
    with pytest.raises(IdentityMissing) as error:
        story.merge()
    assert "replica identity full" in error.value.hint
