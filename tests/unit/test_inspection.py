"""What follows from the numbers of an inspection: the plan of the first snapshots, and what endangers capture."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cdc.inspection import (
    AGE_BOUNDS_S,
    AGE_LABELS,
    CHUNK_HEAP_BYTES,
    ROUND_TRIPS_PER_CHUNK,
    WRITER_LONG_S,
    Ages,
    Inspection,
    KeyCandidate,
    OpenTransaction,
    Retention,
    SampleRead,
    Size,
    SlotFacts,
    TableFacts,
    Wal,
    judge,
    plan_snapshots,
)
from cdc.table import TableId
from cdc.verbs.inspect_text import candidate_row, duration_text, per_second_text, printable


def facts(name: str, *, rows: int, sample: SampleRead | None, key: tuple[str, ...] = ("id",)) -> TableFacts:
    return TableFacts(
        table=TableId("public", name), oid=1, kind="table", published=False, key=key, identity="d",
        rows_estimated=rows, sample=sample,
    )  # fmt: skip


def inspected(**changes: object) -> Inspection:
    kept = Retention(settings={}, slots=(), slots_left=1, senders_left=1, keep_bytes=None, wal_dir_bytes=None)
    found = Inspection(
        source="shop", at="", server="db:5432/shop", version="18", database="shop", interval_s=10.0,
        late_after_s=86_400.0, round_trip_s=0.0, wal=Wal(bytes=1 << 20, seconds=10.0), retention=kept, transactions=[],
        tables=[], counted_since=None,
    )  # fmt: skip
    return replace(found, **changes)  # type: ignore[arg-type]


def test_a_plan_scales_one_chunk_to_the_table_and_shares_the_tables_among_readers() -> None:
    big = facts("big", rows=10_000, sample=SampleRead(rows=1000, bytes=100_000, seconds=2.0, whole=False))
    small = facts("small", rows=7, sample=SampleRead(rows=10, bytes=1000, seconds=4.0, whole=True))
    mute = facts("mute", rows=5, sample=None)
    heap = facts("heap", rows=900, sample=SampleRead(rows=90, bytes=900, seconds=1.0, whole=False), key=())
    heap.size = Size(heap_bytes=2 * CHUNK_HEAP_BYTES + 1, table_bytes=0, index_bytes=0)
    tables = [big, small, mute, heap]

    plan = plan_snapshots(tables, chunk_rows=5000, chunk_bytes=250_000, readers=1, round_trip_s=0.01)
    per_chunk_s = 0.01 * ROUND_TRIPS_PER_CHUNK
    shown = {p.table.name: (p.strategy, p.chunk_rows, p.chunks, p.bytes) for p in plan.tables}
    assert shown == {
        "big": ("keys", 2500, 4, 1_000_000),  # a row has 100 bytes, so bytes bound the chunk
        "small": ("keys", 2500, 1, 1000),  # it was read to its end: there are no more rows, whatever was estimated
        "heap": ("blocks", 300, 3, 9000),
    }
    seconds = {p.table.name: p.seconds for p in plan.tables}
    assert seconds == pytest.approx(
        {"big": 20 + 4 * per_chunk_s, "small": 4 + per_chunk_s, "heap": 10 + 3 * per_chunk_s}
    )
    assert plan.unplanned == (TableId("public", "mute"),)
    assert plan.seconds == pytest.approx(sum(seconds.values()))

    two = plan_snapshots(tables, chunk_rows=5000, chunk_bytes=250_000, readers=2, round_trip_s=0.01)
    assert two.seconds == pytest.approx(seconds["big"]), "the others go beside the largest"


def test_an_empty_table_is_one_chunk() -> None:
    empty = facts("empty", rows=0, sample=SampleRead(rows=0, bytes=0, seconds=0.001, whole=True))
    [planned] = plan_snapshots([empty], chunk_rows=10, chunk_bytes=10, readers=1, round_trip_s=0).tables
    assert (planned.chunks, planned.bytes, planned.seconds) == (1, 0, 0.001)


def test_retention_that_lasts_less_than_an_hour_endangers() -> None:
    found = inspected()
    assert (found.outage_s, judge(found)) == (None, [])
    kept = replace(found.retention, keep_bytes=1 << 30)  # 1 GB at 0.1 MB/s
    found = inspected(retention=kept)
    assert found.outage_s == pytest.approx(10_240.0)
    assert judge(found) == []
    found = inspected(retention=kept, wal=Wal(bytes=1 << 20, seconds=10.0, bytes_before=1 << 30, seconds_before=1000.0))
    assert found.outage_s == pytest.approx(1000.0), "the busier of the two rates counts"
    found.findings = judge(found)
    assert [f.name for f in found.findings] == ["retention"]
    assert judge(found, streams=False) == [], "it has no slot"
    assert found.is_endangered


def test_who_writes_for_long_and_who_left_a_slot_behind_are_named() -> None:
    def opened(seconds: float | None, *, writes: bool) -> OpenTransaction:
        return OpenTransaction(who="pid 7", state="", seconds=seconds, writes=writes, holds_rows=True)

    harmless = [opened(WRITER_LONG_S - 1, writes=True), opened(99_999.0, writes=False), opened(None, writes=True)]
    assert judge(inspected(transactions=harmless)) == []
    [finding] = judge(inspected(transactions=[*harmless, opened(WRITER_LONG_S, writes=True)]))
    assert (finding.name, finding.severity, finding.object) == ("open transaction", "warning", "pid 7")

    slot = SlotFacts(
        name="old", kind="physical", ours=False, active=False, wal_status="extended", retained_bytes=11 << 30,
        safe_bytes=None,
    )  # fmt: skip
    active, ours, small, lost = (
        replace(slot, active=True), replace(slot, ours=True), replace(slot, retained_bytes=1),
        replace(slot, wal_status="lost"),
    )  # fmt: skip
    kept = inspected().retention
    assert judge(inspected(retention=replace(kept, slots=(active, ours, small, lost)))) == []
    [finding] = judge(inspected(retention=replace(kept, slots=(slot,))))
    assert finding.fix.startswith("select pg_drop_replication_slot('old')")


def test_a_candidate_is_unique_only_if_every_row_was_compared() -> None:
    whole = KeyCandidate(
        columns=("a", "b"), found_by="", exact=True, rows_read=10, rows_null=0, extra_rows=0, groups=0, largest_group=1,
        pairs_at_most=None,
    )  # fmt: skip
    assert whole.is_unique
    for changed in ({"exact": False}, {"rows_null": 1}, {"extra_rows": 1}, {"rows_read": 0}):
        assert not replace(whole, **changed).is_unique, changed
    assert replace(whole, exact=False, index="a_b").is_unique
    table = facts('or"ders', rows=10, sample=None, key=())
    table.candidates = [whole]
    [finding] = judge(inspected(tables=[table]))
    assert (finding.severity, finding.fix) == ("info", 'alter table "public"."or""ders" add primary key ("a", "b");')
    told = candidate_row(replace(whole, exact=False, pairs_at_most=40))[2]
    assert told == "in a sample of 10 rows: 0 duplicates; in the whole table at most about 40 pairs (95 %)"


def test_late_is_a_share_of_the_rows_that_have_the_column() -> None:
    ages = Ages(
        column="at", found_by="", rows=10.0, rows_seen=10, without=2.0, late=2.0, oldest_s=9.0, counts=(0.0,) * 8,
        read_share=1.0, changed_at="interval",
    )  # fmt: skip
    assert ages.late_share == 0.25
    assert replace(ages, without=10.0).late_share is None
    assert len(AGE_LABELS) == len(AGE_BOUNDS_S) + 1


def test_names_cannot_move_a_terminals_cursor_and_numbers_are_short() -> None:
    assert printable("naïve 表 'x'") == "naïve 表 'x'"
    assert printable("a\x1b[31m\nb\u202e") == "a\\x1b[31m\\nb\\u202e"
    shown = [duration_text(s) for s in (0.0123, 12.0, 86_400.0, 20_000_000.0, None)]
    assert shown == ["12 ms", "12.0 s", "24 h 00 min", "231 days", "-"]
    assert [per_second_text(r) for r in (0.0, 1.2345, 1320.7)] == ["0/s", "1.23/s", "1,321/s"]
