"""The changelog: every change lands once, together with its position, whatever dies in between."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from cdc.batch import SNAPSHOT_SEQ, Batch, Boundary, batch_schema
from cdc.errors import InvariantBroken, LeaseLost, SchemaConflict, StoreConflict
from cdc.lake import changelog as changelog_module
from cdc.lake.changelog import ChangelogTable, highest_epoch, highest_fence, highest_landed
from cdc.lake.delta import DeltaLog
from cdc.lake.naming import LANDED
from cdc.table import Column, TableId, TableSchema
from connectors.local.store import LocalStore

TABLE = TableId("public", "t")
ROOT = Path(__file__).parents[2]
NOON = 1_714_564_800_000_000  # 2024-05-01 12:00 UTC
HOUR = 3_600_000_000


def version_of(*names: str, version: int = 1, first_attnum: int = 1) -> TableSchema:
    columns = [Column(name="id", attnum=1, type_oid=20, type_name="bigint")]
    columns += [Column(name=n, attnum=first_attnum + 1 + i, type_oid=25, type_name="text") for i, n in enumerate(names)]
    return TableSchema(table=TABLE, oid=16384, columns=tuple(columns), key=("id",), version=version)


V1 = version_of("name")
V2 = version_of("name", "extra", version=2)


def batch(schema: TableSchema, lsns: Sequence[int], *, at: Sequence[int | None] | None = None, **more: Any) -> Batch:
    """Changes at these commit LSNs; `id` tells them apart. `more`: further system columns, a value or a list."""
    n = len(lsns)
    values: dict[str, Any] = {
        "_op": ["c"] * n, "_epoch": [1] * n, "_lsn": list(lsns), "_seq": list(range(n)), "_xid": [7] * n,
    }  # fmt: skip
    if at is not None:
        values["_committed_at"] = list(at)
    values |= {k: v if isinstance(v, list) else [v] * n for k, v in more.items()}
    optional = tuple(o for o in ("_origin", "_run", "_committed_at", "_before", "_unchanged", "_raw") if o in values)
    target = batch_schema(schema, optional)
    arrays = [pa.array(values[f.name], f.type) for f in list(target)[: 5 + len(optional)]]
    for column in schema.columns:
        own = [lsn * 10 + i for i, lsn in enumerate(lsns)]
        arrays.append(pa.array(own if column.name == "id" else [f"{column.name} {v}" for v in own]))
    return Batch(schema, pa.RecordBatch.from_arrays(arrays, schema=target))


def run_rows(schema: TableSchema, lsn: int, counters: Sequence[int], run: str, **more: Any) -> Batch:
    seqs = [SNAPSHOT_SEQ + c for c in counters]
    return batch(schema, [lsn] * len(seqs), **{"_op": "r", "_run": run, "_seq": seqs, "_xid": 0, **more})


def control(lsn: int, counter: int, run: str, event: str, kind: str = "first") -> Batch:
    facts = [("event", event), ("kind", kind), ("oid", "16384")]
    return run_rows(V1, lsn, [counter], run, _op="s", _raw=[facts])


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "lake")


def opened(store: LocalStore) -> ChangelogTable:
    return ChangelogTable(store, "shop", TABLE)


def land(store: LocalStore, temp: Path, lsn: int, *batches: Batch, chunk: int | None = None) -> ChangelogTable:
    table = opened(store)
    writer = table.writer(temp, fence=1)
    for b in batches:
        writer.add(b, chunk=chunk)
    writer.commit(Boundary(1, lsn, lsn + 8))
    return table


def ids(store: LocalStore) -> list[int]:
    log = opened(store).delta
    return sorted(i for f in log.files() for i in log.open_file(f.path).read(["id"])["id"].to_pylist())


def test_what_lands_is_read_back_cell_by_cell_by_arrow_duckdb_and_delta(store: LocalStore, tmp_path: Path) -> None:
    wanted = batch(
        V1, [100, 100, 200], at=[NOON, NOON, None], _op=["c", "u", "d"], _origin=[None, "cdc_crm", None],
        _before=[None, {"id": 5, "name": None}, None], _unchanged=[None, ["name"], None],
        _raw=[None, None, [("name", "x")]],
    )  # fmt: skip
    table = land(store, tmp_path, 200, wanted)
    (first, second) = sorted(table.delta.files(), key=lambda f: f.path)
    read = pa.concat_tables(table.delta.open_file(f.path).read() for f in (first, second))
    for name in wanted.data.schema.names:
        assert read[name].to_pylist() == wanted.data[name].to_pylist(), name
    assert read["_run"].null_count == 3
    assert read.schema.field("id").metadata[b"pg.attnum"] == b"1"
    location, _ = store.location(table.path)
    rows = duckdb.sql(
        f"select _op, _lsn, _seq, _xid, id, name, _before.id, _unchanged, _date "
        f"from read_parquet('{location}/*/*.parquet', hive_partitioning=true) order by _lsn, _seq"
    ).fetchall()
    today = dt.datetime.now(dt.UTC).date()
    assert rows[0] == ("c", 100, 0, 7, 1000, "name 1000", None, None, dt.date(2024, 5, 1))
    assert rows[1][6:] == (5, ["name"], dt.date(2024, 5, 1))
    assert abs((rows[2][8] - today).days) <= 1
    assert DeltaTable(location).metadata().partition_columns == ["_date"]
    assert pa.table(DeltaTable(location).get_add_actions())["num_records"].to_pylist() in ([1, 2], [2, 1])


def test_rows_that_have_landed_are_left_out_when_they_come_again(store: LocalStore, tmp_path: Path) -> None:
    land(store, tmp_path, 200, batch(V1, [100, 150, 200]))
    table = opened(store)
    writer = table.writer(tmp_path)
    assert writer.add(batch(V1, [100, 150, 200])) == 0
    assert writer.add(batch(V1, [150, 200, 201, 300])) == 2
    landed = writer.commit(Boundary(1, 300, 308))
    assert (landed.rows, landed.version) == (2, 2)
    assert ids(store) == [1000, 1501, 2002, 2012, 3003]
    assert table.tokens().stream(1) == opened(store).tokens().stream(1) == 300
    assert opened(store).tokens().stream(2) == -1


def test_what_all_changelogs_of_a_source_say_at_most(store: LocalStore, tmp_path: Path) -> None:
    found = highest_epoch(store, "shop"), highest_fence(store, "shop"), highest_landed(store, "shop", 1)
    assert found == (-1, 0, -1)
    other = replace(V1, table=TableId("public", "other"))
    for schema, epoch, lsn, fence in ((V1, 1, 200, 7), (other, 1, 100, 0), (other, 3, 50, 4)):
        writer = ChangelogTable(store, "shop", schema.table).writer(tmp_path, fence=fence)
        writer.add(batch(schema, [lsn], _epoch=epoch))
        writer.commit(Boundary(epoch, lsn, lsn + 8))
    found = highest_epoch(store, "shop"), highest_fence(store, "shop"), highest_landed(store, "shop", 1)
    assert found == (3, 7, 200)


def test_a_commit_without_rows_is_none(store: LocalStore, tmp_path: Path) -> None:
    land(store, tmp_path, 200, batch(V1, [200]))
    table = opened(store)
    writer = table.writer(tmp_path)
    writer.add(batch(V1, [200]))
    assert writer.commit(Boundary(1, 900, 900)) == (0, 0, 1)
    assert table.refresh() == 1
    empty = ChangelogTable(store, "shop", TableId("public", "never"))
    assert empty.writer(tmp_path).commit(Boundary(1, 9, 9)).version == -1
    assert not empty.exists()


def test_a_new_epoch_lands_below_the_old_ones_position(store: LocalStore, tmp_path: Path) -> None:
    land(store, tmp_path, 900, batch(V1, [900]))
    table = opened(store)
    writer = table.writer(tmp_path)
    assert writer.add(batch(V1, [10], _epoch=2)) == 1
    writer.commit(Boundary(2, 10, 18))
    tokens = opened(store).tokens()
    assert (tokens.stream(1), tokens.stream(2), tokens.epoch) == (900, 10, 2)


def test_rows_of_the_epoch_before_land_once_though_the_boundary_is_of_the_next(
    store: LocalStore, tmp_path: Path
) -> None:
    """They were logged and had not landed when a new history began. A crash after the commit brings them again."""
    land(store, tmp_path, 100, batch(V1, [100]))
    left_over, first_of_next = batch(V1, [200, 300]), batch(V1, [10], _epoch=2)
    for _ in range(2):
        writer = opened(store).writer(tmp_path)
        writer.add(left_over)
        writer.add(first_of_next)
        writer.commit(Boundary(2, 10, 20))
    assert ids(store) == [100, 1000, 2000, 3001]
    tokens = opened(store).tokens()
    assert (tokens.stream(1), tokens.stream(2)) == (300, 10)


def test_chunks_land_once_by_their_counter_and_a_run_ends_with_its_end_row(store: LocalStore, tmp_path: Path) -> None:
    begin, chunk, end = control(50, 0, "r1", "begin"), run_rows(V1, 50, [1, 2, 3], "r1"), control(50, 4, "r1", "end")
    table = land(store, tmp_path, 50, begin, chunk=0)
    assert (table.tokens().run("r1"), table.tokens().snapshot_seq) == (0, 0)
    land(store, tmp_path, 50, begin, chunk, chunk=0)  # log order: what comes again is known by its counter
    assert not opened(store).tokens().complete(1, 16384)
    table = opened(store)
    writer = table.writer(tmp_path)
    assert writer.add(begin, chunk=0) == 0
    assert writer.add(chunk, chunk=0) == 0
    assert writer.add(end, chunk=1) == 1
    writer.commit(Boundary(1, 50, 58))
    tokens = opened(store).tokens()
    assert (tokens.run("r1"), tokens.snapshot_seq, tokens.run("other")) == (1, 4, -1)
    assert tokens.complete(1, 16384)
    assert not tokens.complete(2, 16384)
    assert not tokens.complete(1, 99)
    assert len(ids(store)) == 5


def test_a_chunk_at_an_older_position_leaves_the_streams_token(store: LocalStore, tmp_path: Path) -> None:
    land(store, tmp_path, 200, batch(V1, [200]))
    land(store, tmp_path, 150, run_rows(V1, 150, [0], "r1"), chunk=1)
    assert opened(store).tokens().stream(1) == 200
    assert len(ids(store)) == 2


def test_the_end_of_a_run_over_some_rows_completes_nothing(store: LocalStore, tmp_path: Path) -> None:
    land(store, tmp_path, 50, control(50, 0, "r1", "end", kind="filter"), chunk=1)
    assert not opened(store).tokens().complete(1, 16384)


def test_a_counter_used_twice_stops_instead_of_losing_rows(store: LocalStore, tmp_path: Path) -> None:
    land(store, tmp_path, 50, run_rows(V1, 50, [0, 1, 2], "r1"), chunk=1)
    with pytest.raises(InvariantBroken, match="used before"):
        opened(store).writer(tmp_path).add(run_rows(V1, 60, [0, 1], "r2"), chunk=1)


def test_rows_beyond_the_boundary_never_land(store: LocalStore, tmp_path: Path) -> None:
    writer = opened(store).writer(tmp_path)
    writer.add(batch(V1, [100, 300]))
    with pytest.raises(InvariantBroken):
        writer.commit(Boundary(1, 200, 208))
    writer.abandon()
    assert ids(store) == []


def test_a_batch_out_of_order_is_not_filtered_by_guess(store: LocalStore, tmp_path: Path) -> None:
    land(store, tmp_path, 200, batch(V1, [200]))
    with pytest.raises(InvariantBroken, match="order"):
        opened(store).writer(tmp_path).add(batch(V1, [150, 300, 160, 400]))


def test_each_schema_version_has_objects_of_its_own_columns(store: LocalStore, tmp_path: Path) -> None:
    table = land(store, tmp_path, 300, batch(V1, [100]), batch(V2, [200]), batch(V1, [250]), batch(V2, [300]))
    found = {
        tuple(n for n in table.delta.open_file(f.path).schema_arrow.names if not n.startswith("_")): f.rows
        for f in table.delta.files()
    }
    assert found == {("id", "name"): 2, ("id", "name", "extra"): 2}
    assert {"extra", "name", "_date"} <= set(opened(store).delta.schema().names)
    inner = opened(store).delta.schema().field("_before").type
    assert [f.name for f in inner] == ["id", "name", "extra"]


def test_rows_are_filed_by_commit_date_in_utc_and_unknown_ones_by_receipt(store: LocalStore, tmp_path: Path) -> None:
    writer = opened(store).writer(tmp_path)
    midnight = NOON + 12 * HOUR
    times = [midnight - 1, None, midnight, midnight - 2, -1]
    writer.add(batch(V1, [1, 2, 3, 4, 5], at=times), receipt=dt.date(2030, 1, 2))
    writer.add(batch(V1, [6]), receipt=dt.date(2030, 1, 2))
    writer.commit(Boundary(1, 6, 14))
    log = opened(store).delta
    found = {f.partition["_date"]: log.open_file(f.path).read(["_lsn"])["_lsn"].to_pylist() for f in log.files()}
    assert found == {"2024-05-01": [1, 4], "2024-05-02": [3], "2030-01-02": [2, 6], "1969-12-31": [5]}
    assert all(f.path.startswith(f"_date={f.partition['_date']}/1-") for f in log.files())


def test_a_big_transaction_is_not_held_in_memory(store: LocalStore, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    writer = opened(store).writer(tmp_path)
    before, peak, total = pa.total_allocated_bytes(), 0, 0
    for _ in range(75):
        n = 2_000
        text = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(2000), n, [None, pa.py_buffer((rng.integers(97, 122, n * 2000, np.uint8)).tobytes())]
        )
        data = batch(V1, [500]).data
        columns = [data.column(i).take(pa.array(np.zeros(n, np.int64))) for i in range(data.num_columns - 1)]
        b = Batch(
            V1, pa.RecordBatch.from_arrays([*columns, text.cast(pa.binary()).cast(pa.string())], schema=data.schema)
        )
        total += b.data.nbytes
        writer.add(b)
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert total > 280e6
    assert peak < 60e6
    landed = writer.commit(Boundary(1, 500, 508))
    assert landed.rows == 150_000
    assert sum(f.rows for f in opened(store).delta.files()) == 150_000


def test_objects_of_an_open_transaction_are_invisible_until_its_commit_and_gone_if_abandoned(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changelog_module, "OBJECT_BYTES", 1)
    big = batch(V1, list(range(100, 140_100)))
    table = opened(store)
    writer = table.writer(tmp_path)
    writer.add(big)
    assert [o for o in store.list("shop/") if o.key.endswith(".parquet")]
    assert ids(store) == []
    writer.abandon()
    writer.abandon()
    assert not [o for o in store.list("shop/") if o.key.endswith(".parquet")]
    writer = table.writer(tmp_path, fence=3)
    writer.add(big)
    assert table.orphans(term=3, kind=LANDED) == []  # a writer of this process still means to commit them
    assert opened(store).orphans(term=3) == []  # nor does another thread, which does not know of it, touch its term's
    writer.commit(Boundary(1, 140_099, 140_107))
    assert len(ids(store)) == 140_000


def test_of_two_writers_one_lands_and_the_other_starts_again(store: LocalStore, tmp_path: Path) -> None:
    land(store, tmp_path, 50, batch(V1, [50]))
    one, two = opened(store).writer(tmp_path, fence=3), opened(store).writer(tmp_path, fence=3)
    one.add(batch(V1, [100, 200]))
    two.add(batch(V1, [100]))
    one.commit(Boundary(1, 200, 208))
    with pytest.raises(StoreConflict):
        two.commit(Boundary(1, 100, 108))
    two.abandon()
    assert ids(store) == [500, 1000, 2001]
    assert len(opened(store).orphans(term=3, kind=LANDED)) == 1  # after an attempt, only `reclaim` may judge
    assert opened(store).reclaim(term=3, kind=LANDED) == 1
    assert ids(store) == [500, 1000, 2001]


def test_a_former_holder_of_the_lease_cannot_land(store: LocalStore, tmp_path: Path) -> None:
    writer = opened(store).writer(tmp_path, fence=2)
    writer.add(batch(V1, [100]))
    writer.commit(Boundary(1, 100, 108))
    late = opened(store).writer(tmp_path, fence=1)
    late.add(batch(V1, [200]))
    with pytest.raises(LeaseLost):
        late.commit(Boundary(1, 200, 208))
    assert ids(store) == [1000]


def test_a_former_holder_that_wakes_up_behind_the_reclaim_of_its_objects_cannot_land(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    land(store, tmp_path, 50, batch(V1, [50]))
    late = opened(store).writer(tmp_path, fence=1)
    late.add(batch(V1, [100]))
    before = DeltaLog.commit

    def slept(self: DeltaLog, **how: object) -> int:
        monkeypatch.setattr(DeltaLog, "commit", before)
        assert opened(store).reclaim(term=2) == 1
        return before(self, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(DeltaLog, "commit", slept)
    with pytest.raises(LeaseLost):
        late.commit(Boundary(1, 100, 108))
    assert ids(store) == [500]


def test_an_object_that_was_committed_while_orphans_were_looked_for_stays(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = opened(store).writer(tmp_path, fence=1)
    late.add(batch(V1, [100]))
    monkeypatch.setattr(changelog_module, "OBJECT_BYTES", 1)
    looking, orphans = opened(store), ChangelogTable.orphans

    def found_just_before(self: ChangelogTable, **how: object) -> list[str]:
        late._finish(next(iter(late._open)))
        found = orphans(self, **how)  # type: ignore[arg-type]
        late.commit(Boundary(1, 100, 108))
        return found

    monkeypatch.setattr(ChangelogTable, "orphans", found_just_before)
    assert looking.reclaim(term=2) == 0
    assert ids(store) == [1000]


def test_objects_of_another_release_are_nobody_s_only_when_they_are_old(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    land(store, tmp_path, 50, batch(V1, [50]))
    key = f"{opened(store).path}/_date=2026-01-01/1-{50:016x}-{50:016x}-0123456789ab.parquet"
    store.put(key, b"rows")
    assert opened(store).orphans(term=7, kind=LANDED) == []
    monkeypatch.setattr(changelog_module, "UNKNOWN_S", -1)
    assert opened(store).orphans(term=7, kind=LANDED) == [key]


_LAND = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/unit")
from test_lake_changelog import LocalStore, V1, batch, ids, land
store = LocalStore(Path(sys.argv[1]))
land(store, Path(sys.argv[2]), 200, batch(V1, [100, 200]))
print(*ids(store))
"""


@pytest.mark.parametrize(
    ("point", "orphans"), [("land.before_upload", 0), ("land.before_commit", 1), ("land.after_commit", 0)]
)
def test_a_landing_killed_at_any_step_loses_and_doubles_nothing(
    store: LocalStore, tmp_path: Path, point: str, orphans: int
) -> None:
    command = [sys.executable, "-c", _LAND, str(tmp_path / "lake"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CDC_FAILPOINTS": f"{point}=kill"}
    died = subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=60, capture_output=True)
    assert died.returncode == -9, died.stderr.decode()
    assert len(opened(store).orphans(term=2)) == orphans
    assert opened(store).orphans(term=1) == []
    del environment["CDC_FAILPOINTS"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=60, capture_output=True)
    assert done.stdout.split() == [b"1000", b"2001"]
    assert opened(store).reclaim(term=2) == orphans
    assert ids(store) == [1000, 2001]


def test_a_column_named_like_a_system_column_moves_all_of_them(store: LocalStore, tmp_path: Path) -> None:
    odd = version_of("_LSN")
    table = land(store, tmp_path, 100, batch(odd, [100]))
    names = table.delta.open_file(table.delta.files()[0].path).schema_arrow.names
    assert {"__lsn", "__op", "_LSN", "id"} <= set(names)
    assert "_op" not in names
    assert table.delta.partition_columns() == ["__date"]
    # Once decided it stays, also for versions without the column.
    land(store, tmp_path, 200, batch(version_of("name", version=2, first_attnum=5), [200]))
    assert "_op" not in opened(store).delta.schema().names


def test_a_collision_that_comes_later_stops_the_table(store: LocalStore, tmp_path: Path) -> None:
    land(store, tmp_path, 100, batch(V1, [100]))
    with pytest.raises(SchemaConflict, match="_date"):
        opened(store).writer(tmp_path).add(batch(version_of("name", "_date", version=2), [200]))


def test_a_table_without_columns_is_counted(store: LocalStore, tmp_path: Path) -> None:
    bare = TableSchema(table=TABLE, oid=1, columns=(), version=1)
    table = land(store, tmp_path, 100, batch(bare, [100, 100]))
    assert [f.rows for f in table.delta.files()] == [2]


def test_statistics_let_readers_pass_over_what_they_do_not_need(store: LocalStore, tmp_path: Path) -> None:
    table = land(store, tmp_path, 900, batch(V1, [100, 900]))
    file = table.delta.open_file(table.delta.files()[0].path)
    columns = [file.metadata.row_group(0).column(i) for i in range(file.metadata.num_columns)]
    by_path = {c.path_in_schema: c for c in columns}
    assert (by_path["_lsn"].statistics.min, by_path["_lsn"].statistics.max) == (100, 900)
    assert (by_path["_xid"].statistics.min, by_path["_xid"].statistics.max) == (7, 7)
    assert by_path["_before.name"].statistics.null_count == 2
    assert "DELTA_BINARY_PACKED" in by_path["_lsn"].encodings
    assert {c.compression for c in columns} == {"ZSTD"}
    add = pa.table(DeltaTable(store.location(table.path)[0]).get_add_actions(flatten=True)).to_pylist()[0]
    told = {name: value for name, value in add.items() if name.startswith(("min.", "max.", "null_count."))}
    assert not any(value is not None for value in told.values()), "of all columns or of none: see decision 47"


def test_many_small_batches_make_few_row_groups(store: LocalStore, tmp_path: Path) -> None:
    table = land(store, tmp_path, 2000, *[batch(V1, [lsn]) for lsn in range(1, 2001)])
    (file,) = table.delta.files()
    assert pq.ParquetFile(f"{store.location(table.path)[0]}/{file.path}").num_row_groups == 1
    assert ids(store) == [lsn * 10 for lsn in range(1, 2001)]
