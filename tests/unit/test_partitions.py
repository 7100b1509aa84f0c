"""Changelogs partitioned by a time of their rows: every row once, and in the partition where it belongs."""

from __future__ import annotations

import datetime as dt
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable

from cdc import metrics
from cdc.batch import Batch, Boundary, batch_schema
from cdc.lake import changelog as changelog_module
from cdc.lake import partitions
from cdc.lake.changelog import PARTITION_KEY, ChangelogTable, ChangelogWriter
from cdc.lake.compaction import Compactor
from cdc.relations import Relation, open_views
from cdc.table import Column, PartitionBy, TableId, TableSchema
from connectors.local.store import LocalStore

TABLE = TableId("public", "events")
ROOT = Path(__file__).parents[2]
TYPES = {"timestamptz": (1184, "timestamp with time zone"), "timestamp": (1114, "timestamp without time zone"),
         "date": (1082, "date"), "text": (25, "text")}  # fmt: skip
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
COMMITTED = dt.datetime(2026, 11, 29, 13, 30, tzinfo=dt.UTC)
"""When everything is committed, unless a test says otherwise."""

Time = dt.datetime | dt.date | None


def schema(kind: str = "timestamptz", name: str = "at", *, attnum: int = 2, version: int = 1) -> TableSchema:
    """`id`, a time `name`, and `note`."""
    oid, spelled = TYPES[kind]
    columns = (
        Column(name="id", attnum=1, type_oid=20, type_name="bigint"),
        Column(name=name, attnum=attnum, type_oid=oid, type_name=spelled),
        Column(name="note", attnum=9, type_oid=25, type_name="text"),
    )
    return TableSchema(table=TABLE, oid=16384, columns=columns, key=("id",), version=version)


def batch(
    of: TableSchema, lsn: int, times: Sequence[Any], *, ops: str = "", committed: Sequence[dt.datetime | None] = (),
    raw: Sequence[Any] | None = None, notes: Sequence[str] = (),
) -> Batch:  # fmt: skip
    """One transaction of rows with these times; `id` is `lsn` and the row's number."""
    n = len(times)
    optional = ("_committed_at",) + (("_raw",) if raw is not None else ())
    target = batch_schema(of, optional)
    at = list(committed) or [COMMITTED] * n
    system = [list(ops or "c" * n), [1] * n, [lsn] * n, list(range(n)), [7] * n, at]
    system += [list(raw)] if raw is not None else []
    image: list[Any] = [[lsn * 1_000_000 + i for i in range(n)], list(times), list(notes) or [f"note {lsn}"] * n]
    arrays = [pa.array(values, f.type) for values, f in zip([*system, *image], target, strict=True)]
    return Batch(of, pa.RecordBatch.from_arrays(arrays, schema=target))


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "lake")


def table_of(store: LocalStore, by: str | None = "at:day") -> ChangelogTable:
    return ChangelogTable(store, "shop", TABLE, partition_by=PartitionBy.of(by) if by else None)


def land(table: ChangelogTable, temp: Path, *batches: Batch) -> ChangelogWriter:
    writer = table.writer(temp)
    for b in batches:
        writer.add(b)
    last = max(b.data.column(2)[-1].as_py() for b in batches)
    writer.commit(Boundary(1, last, last + 8))
    assert not list(temp.glob("sorted-*")), "no scratch file is left"
    return writer


def found(store: LocalStore) -> dict[str | None, list[int]]:
    """Ids by partition, those of an object in its order."""
    log = table_of(store).delta
    ids: dict[str | None, list[int]] = defaultdict(list)
    for f in sorted(log.files(), key=lambda f: f.path):
        ids[f.partition["_date"]] += log.open_file(f.path).read(["id"])["id"].to_pylist()
    return dict(ids)


def expected(time: Time, unit: str) -> str | None:
    """The partition of a time, by another way than the code's."""
    if time is None:
        return None
    return time.strftime({"hour": "%Y-%m-%dT%H", "day": "%Y-%m-%d", "month": "%Y-%m"}[unit]).rjust(
        {"hour": 13, "day": 10, "month": 7}[unit], "0"
    )


@pytest.mark.parametrize(
    ("kind", "unit"), [("timestamptz", "hour"), ("timestamptz", "day"), ("timestamp", "month"), ("date", "day")]
)
def test_all_partitions_together_hold_every_row_and_each_its_own(
    store: LocalStore, tmp_path: Path, kind: str, unit: str, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    # Scratch files, and objects made before the commit.
    monkeypatch.setattr(partitions, "GROUP_BYTES", rng.choice([1, 4_000, 1 << 24]))
    monkeypatch.setattr(changelog_module, "SORTED_BYTES", rng.choice([10_000, 1 << 29]))
    shape = schema(kind)

    def some() -> Time:
        if rng.random() < 0.1:
            return None
        # Around the turn of days, before 1970, and in the first and last years that Arrow's text forms are plain for.
        centre = rng.choice(
            [COMMITTED, EPOCH, dt.datetime(1, 1, 2, tzinfo=dt.UTC), dt.datetime(9999, 12, 30, tzinfo=dt.UTC)]
        )
        time = centre.replace(tzinfo=dt.UTC if kind == "timestamptz" else None) + dt.timedelta(
            hours=rng.randrange(-20, 20), microseconds=rng.randrange(-2, 2)
        )
        return time.date() if kind == "date" else time

    oracle: dict[str | None, list[int]] = defaultdict(list)
    batches = []
    for lsn in range(1, 12):
        times = [some() for _ in range(rng.randrange(1, 40))]
        batches.append(batch(shape, lsn, times))
        for i, time in enumerate(times):
            oracle[expected(time, unit)].append(lsn * 1_000_000 + i)
    table = table_of(store, f"at:{unit}")
    land(table, tmp_path, *batches)
    assert found(store) == oracle
    # The same by readers that know nothing of us.
    data = DeltaTable(str(tmp_path / "lake" / table.path)).to_pyarrow_table(columns=["id", "_date"])
    told: dict[str | None, set[int]] = defaultdict(set)
    for id_, date in zip(data["id"].to_pylist(), data["_date"].to_pylist(), strict=True):
        told[date].add(id_)
    assert told == {date: set(ids) for date, ids in oracle.items()}
    with open_views(store, [Relation("shop", TABLE, changelog=True)]) as views:
        rows = views.execute("select _date, count(*) from shop.events_changelog group by 1").fetchall()
    assert dict(rows) == {date: len(ids) for date, ids in oracle.items()}


def test_what_has_no_time_is_in_the_partition_null_and_nothing_is_lost(store: LocalStore, tmp_path: Path) -> None:
    shape, day = schema(), dt.datetime(2020, 2, 29, 23, tzinfo=dt.UTC)
    rows = batch(
        shape, 100, [day, None, None, None, day, None, None, None], ops="ccudduts",
        raw=[None, None, [("at", "infinity")], None, None, None, None, [("event", "end"), ("kind", "filtered")]],
    )  # fmt: skip
    writer = land(table_of(store), tmp_path, rows)
    dated, undated = found(store)["2020-02-29"], found(store)[None]
    # The delete that brings its old row is with the row, the one that brings the key alone is not.
    assert dated == [100_000_000, 100_000_004]
    assert undated == [100_000_001, 100_000_002, 100_000_003, 100_000_005, 100_000_006, 100_000_007]
    assert (writer.lateness.undated, writer.lateness.late) == (4, 2)
    paths = [f.path for f in table_of(store).delta.files() if f.partition["_date"] is None]
    assert all(p.startswith("_date=__HIVE_DEFAULT_PARTITION__/1-") for p in paths)


@pytest.mark.parametrize("by", [None, "at:day"])
def test_a_filter_by_any_column_finds_its_rows(store: LocalStore, tmp_path: Path, by: str | None) -> None:
    """deltalake makes conditions of what Delta's log says of each file, and takes what it does not say for null."""
    table = table_of(store, by)
    land(table, tmp_path, batch(schema(), 100, [COMMITTED, COMMITTED - dt.timedelta(days=3), None]))
    changes = DeltaTable(str(tmp_path / "lake" / table.path)).to_pyarrow_dataset()
    for condition in (
        pc.field("id") == 100_000_001, pc.field("at") < COMMITTED, pc.field("at").is_null(), pc.field("_lsn") == 100,
        pc.field("_xid") == 7, pc.field("note") == "note 100", pc.field("_committed_at") == COMMITTED,
    ):  # fmt: skip
        assert changes.to_table(filter=condition).num_rows in (1, 3), condition
    if by is not None:
        assert changes.to_table(filter=pc.field("_date") == "2026-11-26").column("id").to_pylist() == [100_000_001]


def test_late_rows_are_counted_with_their_lateness_and_a_snapshots_are_not(store: LocalStore, tmp_path: Path) -> None:
    ago = [
        COMMITTED - dt.timedelta(seconds=s) for s in (-60, 0, 5, 3600, 13 * 3600 + 1800, 13 * 3600 + 1801, 40 * 86400)
    ]
    writer = land(
        table_of(store), tmp_path,
        batch(schema(), 100, [*ago, None]),
        batch(schema(), 200, ago, ops="r" * 7),
        batch(schema(), 300, ago[:1], committed=[None]),
    )  # fmt: skip
    late = writer.lateness
    # 13:30 less thirteen hours and a half is still the same day.
    assert (late.late, late.undated) == (2, 1)
    assert dict(zip([*metrics.LATENESS_SECONDS, "more"], late.counts.tolist(), strict=True)) == {
        1.0: 2, 10.0: 1, 60.0: 0, 600.0: 0, 3600.0: 1, 6 * 3600.0: 0, 86400.0: 2, 7 * 86400.0: 0, 30 * 86400.0: 0,
        365 * 86400.0: 1, "more": 0,
    }  # fmt: skip
    assert late.total_s == 5 + 3600 + 13 * 3600 + 1800 + 13 * 3600 + 1801 + 40 * 86400


def test_a_snapshot_of_many_days_is_bounded_in_memory_and_open_files(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    group, days_n = 500_000, 100
    monkeypatch.setattr(partitions, "GROUP_BYTES", group)
    opened: list[int] = []
    write = ChangelogWriter._write

    def watched(self: ChangelogWriter, partition: str | None, part: Batch) -> None:
        write(self, partition, part)
        opened.append(len(self._open))

    monkeypatch.setattr(ChangelogWriter, "_write", watched)
    days = [COMMITTED - dt.timedelta(days=d) for d in range(days_n)] * 30
    before, peak, total = pa.total_allocated_bytes(), 0, 0
    writer = table_of(store).writer(tmp_path)
    for lsn in range(1, 41):
        rng.shuffle(days)
        b = batch(schema(), lsn, days, ops="r" * len(days))
        total += b.data.nbytes
        writer.add(b)
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert total > 15 * group
    assert peak < 4 * group, "what waits is on disk"
    assert len(list(tmp_path.glob("sorted-*"))) == 1, "in one file"
    assert writer.commit(Boundary(1, 40, 48)).rows == 40 * len(days)
    assert max(opened) == 1, "one object after the other"
    assert {f.rows for f in table_of(store).delta.files()} == {1_200}, "one of each day for the whole landing"


def test_a_renamed_column_is_the_same_and_one_that_is_no_time_leaves_rows_undated(
    store: LocalStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    day = dt.datetime(2020, 5, 1, tzinfo=dt.UTC)
    land(table_of(store), tmp_path, batch(schema(), 1, [day]))
    land(table_of(store), tmp_path, batch(schema(name="made_at", version=2), 2, [day]))
    assert not [r for r in caplog.records if r.levelname == "ERROR"]
    # A daemon that knows nothing of the time before: the lake tells it.
    land(table_of(store), tmp_path, batch(schema(name="made_at", version=2), 3, [day]))
    assert found(store) == {"2020-05-01": [1_000_000, 2_000_000, 3_000_000]}
    # Another column, and the old one made anew as something else.
    land(table_of(store), tmp_path, batch(schema(name="other_at", attnum=5, version=3), 4, [day]))
    land(table_of(store), tmp_path, batch(schema("text", attnum=6, version=4), 5, ["2020-05-01"]))
    assert found(store)[None] == [4_000_000, 5_000_000]
    told = [r for r in caplog.records if r.levelname == "ERROR"]
    assert [(r.table, r.partition_by) for r in told] == [("public.events", "at:day")] * 2  # type: ignore[attr-defined]
    # A time again, in a column of the lake that has another name.
    land(table_of(store), tmp_path, batch(schema("date", attnum=7, version=5), 6, [dt.date(2020, 5, 1)]))
    assert found(store)["2020-05-01"][-1] == 6_000_000


def test_another_rule_holds_for_what_lands_from_then_on_and_the_table_says_since_when(
    store: LocalStore, tmp_path: Path
) -> None:
    day = dt.datetime(2020, 5, 1, 7, tzinfo=dt.UTC)

    def said() -> dict[str, Any]:
        said: dict[str, Any] = json.loads(table_of(store).delta.configuration().get(PARTITION_KEY, "{}"))
        return said

    for lsn, by in enumerate((None, "at:day", "at:day", "at:hour", "at:month", None), 1):
        table = table_of(store, by)
        before = table.version()
        land(table, tmp_path, batch(schema(), lsn, [day]))
        if lsn == 1:
            assert said() == {}
        elif lsn != 3:
            assert said() == {"by": by or "", "since": before + 1}
            assert table.version() == before + 2
    assert {date: [i // 1_000_000 for i in ids] for date, ids in found(store).items()} == {
        "2026-11-29": [1, 6], "2020-05-01": [2, 3], "2020-05-01T07": [4], "2020-05": [5],
    }  # fmt: skip


def test_a_join_stays_within_a_partition_and_leaves_big_objects_of_past_ones_alone(
    store: LocalStore, tmp_path: Path, rng: random.Random
) -> None:
    # Months: of a past one and of the present one alike the text is less than today's.
    now = dt.datetime.now(dt.UTC)
    times = [None, now, now - dt.timedelta(days=40), now - dt.timedelta(days=2_500)]
    for lsn in range(1, 7):
        rows = [time for time in times for _ in range(rng.randrange(1, 5))]
        land(table_of(store, "at:month"), tmp_path, batch(schema(), lsn, rows))
    log = table_of(store).delta
    compactor = Compactor(store, log, "_", temp_dir=tmp_path, target_bytes=1 << 20)

    def joined(at: dt.datetime) -> dict[str | None, int]:
        """Objects of each partition when nothing is worth a join any more."""
        wanted = {date: sorted(ids) for date, ids in found(store).items()}
        log.refresh()
        while compactor.join(log.version(), set(), now_s=at.timestamp()) is not None:
            assert {date: sorted(ids) for date, ids in found(store).items()} == wanted
        dates = [f.partition["_date"] for f in log.files()]
        assert all(f.path.startswith(f"_date={f.partition['_date'] or partitions.NO_PARTITION}/") for f in log.files())
        return {date: dates.count(date) for date in wanted}

    def bulk(lsn: int, rows: int) -> Batch:
        return batch(schema(), lsn, [times[2]] * rows, notes=[rng.randbytes(8).hex() for _ in range(rows)])

    last = expected(times[2], "month")
    assert list(joined(now).values()) == [6] * 4, "few, and they have just come"
    quiet = now + dt.timedelta(seconds=3_700)
    open_month = expected(quiet, "month")
    assert joined(quiet) == {expected(t, "month"): 6 if expected(t, "month") == open_month else 1 for t in times}

    # One late row does not have a big object written again, again and again; many do it once.
    land(table_of(store, "at:month"), tmp_path, bulk(10, 12_000))
    assert joined(quiet)[last] == 2
    for lsn in range(11, 18):
        land(table_of(store, "at:month"), tmp_path, batch(schema(), lsn, [times[2]]))
        assert joined(quiet)[last] == 2, "the small ones are joined"
    land(table_of(store, "at:month"), tmp_path, bulk(20, 3_000))
    assert joined(quiet)[last] == 1
