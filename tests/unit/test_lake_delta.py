"""One Delta table: what a commit rests on is checked in the version that it is committed upon."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from cdc.errors import CdcError, FormatTooNew, InvariantBroken, SchemaConflict, StoreConflict, StoreUnavailable
from cdc.lake.commits import HistoryGone
from cdc.lake.delta import CHECKPOINT_EVERY, AddedFile, DeltaLog
from connectors.local.store import LocalStore

NUMBER = {"pg.attnum": "1", "pg.type": "integer"}
SCHEMA = pa.schema(
    [
        pa.field("a", pa.int32(), metadata=NUMBER),
        pa.field("_before", pa.struct([pa.field("a", pa.int32(), metadata=NUMBER)])),
        pa.field("_date", pa.string()),
    ]
)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def opened(store: LocalStore) -> DeltaLog:
    log = DeltaLog(store, "s/p.t/changelog")
    log.open_or_create(SCHEMA, partition_by=["_date"])
    return log


def added(store: LocalStore, name: str, rows: int = 1) -> AddedFile:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": pa.array(range(rows), pa.int32())}), sink)
    data = sink.getvalue()
    path = f"_date=2024-05-01/{name}.parquet"
    store.put(f"s/p.t/changelog/{path}", data)
    return AddedFile(path=path, size=data.size, rows=rows, partition={"_date": "2024-05-01"})


def test_every_type_of_the_contract_and_its_metadata_survive(store: LocalStore) -> None:
    kinds = {
        "bool": pa.bool_(), "i2": pa.int16(), "i4": pa.int32(), "i8": pa.int64(), "f4": pa.float32(),
        "f8": pa.float64(), "dec": pa.decimal128(38, 10), "text": pa.string(), "bin": pa.binary(),
        "date": pa.date32(), "ts": pa.timestamp("us"), "tz": pa.timestamp("us", tz="UTC"),
        "list": pa.list_(pa.int16()), "list_ts": pa.list_(pa.timestamp("us")), "map": pa.map_(pa.string(), pa.string()),
    }  # fmt: skip
    fields = [pa.field(n, k, metadata={"pg.type": n, "pg.attnum": str(i)}) for i, (n, k) in enumerate(kinds.items())]
    schema = pa.schema([*fields, pa.field("_before", pa.struct(fields))])
    DeltaLog(store, "t").open_or_create(schema)
    found = DeltaLog(store, "t").schema()
    assert found.names == schema.names
    for f in schema:
        again = found.field(f.name)
        assert again.metadata == f.metadata, f.name
        assert DeltaLog(store, "t").evolve([f]) == 0, f"{f.name} counts as changed"
    assert [f.metadata for f in found.field("_before").type] == [f.metadata for f in fields]


def test_new_columns_and_new_fields_of_structs_are_added_once(store: LocalStore) -> None:
    log = opened(store)
    ntz = pa.field("n", pa.timestamp("us"), metadata={"pg.attnum": "2"})
    grown = pa.field("_before", pa.struct([pa.field("a", pa.int32(), metadata=NUMBER), ntz]))
    assert log.evolve([*SCHEMA, ntz, grown]) == 1
    assert log.evolve([*SCHEMA, ntz, grown]) == 1
    found = DeltaLog(store, log.prefix).schema()
    assert found.field("n").metadata == {b"pg.attnum": b"2"}
    assert [f.name for f in found.field("_before").type] == ["a", "n"]
    log.commit(adds=[added(store, "x")], tokens={"stream/1": 5})
    assert log.files()[0].rows == 1


def test_a_column_made_anew_gets_its_new_number(store: LocalStore) -> None:
    log = opened(store)
    log.evolve([pa.field("a", pa.int32(), metadata={**NUMBER, "pg.attnum": "7"})])
    assert DeltaLog(store, log.prefix).schema().field("a").metadata[b"pg.attnum"] == b"7"


def test_what_the_table_cannot_hold_stops_before_anything_is_written(store: LocalStore) -> None:
    log = opened(store)
    with pytest.raises(SchemaConflict, match="column a is int32"):
        log.evolve([pa.field("a", pa.string()), pa.field("new", pa.string())])
    with pytest.raises(SchemaConflict, match=r"_before\.a"):
        log.evolve([pa.field("_before", pa.struct([pa.field("a", pa.string())]))])
    with pytest.raises(SchemaConflict, match="case only"):
        log.evolve([pa.field("A", pa.int32())])
    assert log.refresh() == 0
    with pytest.raises(SchemaConflict, match="case only"):
        DeltaLog(store, "other").open_or_create(pa.schema([pa.field("x", pa.int32()), pa.field("X", pa.int32())]))
    assert not DeltaLog(store, "other").exists()


def test_a_wider_type_is_taken_and_the_narrower_one_stays_readable(store: LocalStore, tmp_path: Path) -> None:
    log = opened(store)
    log.commit(adds=[added(store, "x")], tokens={"stream/1": 5})
    wider = pa.struct([pa.field("a", pa.int64())])
    log.evolve([pa.field("a", pa.int64(), metadata=NUMBER), pa.field("_before", wider)])
    table = pa.table({"a": pa.array([1 << 40], pa.int64())})
    pq.write_table(table, tmp_path / log.prefix / "wide.parquet")
    log.commit(adds=[AddedFile(path="wide.parquet", size=1, rows=1, partition={"_date": "2026-01-01"})])
    found = DeltaLog(store, log.prefix).schema()
    assert (found.field("a").type, found.field("_before").type) == (pa.int64(), wider)
    assert found.field("a").metadata == {k.encode(): v.encode() for k, v in NUMBER.items()}
    assert log.evolve([pa.field("a", pa.int16(), metadata=NUMBER)]) == log.version(), "a narrower one changes nothing"
    assert log.token("stream/1") == 5
    log.evolve([pa.field("a", pa.int64(), metadata={**NUMBER, "pg.type": "bigint"})])
    assert DeltaLog(store, log.prefix).configuration()["cdc.format"] == "1"


def test_a_schema_is_replaced_in_the_commit_of_its_files(store: LocalStore, tmp_path: Path) -> None:
    log = opened(store)
    log.commit(adds=[added(store, "x")], tokens={"stream/1": 5})
    schema = pa.schema([pa.field("a", pa.timestamp("us")), pa.field("b", pa.int32()), SCHEMA.field("_date")])
    version = log.commit(
        adds=[added(store, "y")], removes=[log.files()[0].path], tokens={"stream/1": 6}, expect={"stream/1": 5},
        schema=schema, configuration={"cdc.note": "text"},
    )  # fmt: skip
    again = DeltaLog(store, log.prefix)
    assert again.schema().equals(schema), "the column that is gone is gone"
    assert [f.path for f in again.files()] == [f.path for f in log.files()]
    assert (again.token("stream/1"), again.version()) == (6, version)
    assert again.configuration()["cdc.note"] == "text"
    assert again.schema(version - 1).equals(SCHEMA, check_metadata=False), "the version before is as it was"
    assert again.files_added(version - 1, version) == [(version, log.files()[0].path)]
    with pytest.raises(StoreConflict, match="token stream/1 is 6"):
        log.commit(tokens={"stream/1": 7}, expect={"stream/1": 5}, schema=SCHEMA)


def test_two_writers_of_one_schema_version_do_not_overwrite_each_other(store: LocalStore) -> None:
    one = opened(store)
    other = DeltaLog(store, one.prefix)
    assert other.version() == 0
    one.evolve([pa.field("one", pa.int32())])
    other.evolve([pa.field("other", pa.int32())])
    assert {"one", "other"} <= set(DeltaLog(store, one.prefix).schema().names)


def test_tables_of_others_and_of_newer_releases_are_refused(store: LocalStore, tmp_path: Path) -> None:
    DeltaTable.create(tmp_path / "foreign", schema=SCHEMA)
    with pytest.raises(SchemaConflict, match="something else made"):
        DeltaLog(store, "foreign").open_or_create(SCHEMA)
    DeltaTable.create(
        tmp_path / "newer", schema=SCHEMA, configuration={"cdc.format": "2"}, raise_if_key_not_exists=False
    )
    with pytest.raises(FormatTooNew):
        DeltaLog(store, "newer").exists()


def test_files_and_tokens_become_visible_together_and_old_versions_keep_theirs(store: LocalStore) -> None:
    log = opened(store)
    first, second = added(store, "x", 3), added(store, "y", 4)
    assert log.commit(adds=[first], tokens={"stream/1": 100, "run/a": 0}) == 1
    assert log.commit(adds=[second], removes=[first.path], tokens={"stream/1": 200}) == 2
    other = DeltaLog(store, log.prefix)
    assert [(f.path, f.rows, f.partition) for f in other.files()] == [(second.path, 4, {"_date": "2024-05-01"})]
    assert [f.path for f in other.files(1)] == [first.path]
    assert (other.token("stream/1"), other.token("stream/1", 1), other.token("none")) == (200, 100, None)
    assert other.tokens() == {"stream/1": 200, "run/a": 0}
    assert other.removed_paths() == {first.path}
    assert other.open_file(second.path).read().num_rows == 4


def test_tokens_removals_and_additions_are_found_behind_checkpoints(store: LocalStore, tmp_path: Path) -> None:
    log = opened(store)
    files = [added(store, f"f{i}") for i in range(4)]
    log.commit(adds=files[:2], tokens={"run/early": 3})
    log.commit(removes=[files[0].path], tokens={})
    for i in range(110):
        log.commit(tokens={"stream/1": i})
    log.commit(adds=files[2:3], tokens={"stream/1": 500})
    log.commit(adds=files[3:], tokens={}, data_change=False)
    assert (tmp_path / log.prefix / "_delta_log/_last_checkpoint").exists()
    other = DeltaLog(store, log.prefix)
    assert other.tokens() == {"run/early": 3, "stream/1": 500}
    assert other.tokens() == {app: other.token(app) for app in other.tokens()}
    assert other.removed_paths() == {files[0].path}
    # A file that only rearranges rows brings no change.
    assert other.files_added(0, other.version()) == [(1, files[0].path), (1, files[1].path), (113, files[2].path)]
    assert other.files_added(1, 112) == []
    store.delete([f"{log.prefix}/_delta_log/{1:020d}.json"])
    with pytest.raises(HistoryGone):
        other.files_added(0, 5)


def test_a_writer_that_was_overtaken_is_checked_in_the_newer_version(store: LocalStore) -> None:
    one, two = opened(store), opened(store)
    one.commit(adds=[added(store, "x")], tokens={"stream/1": 100})
    # `two` still stands at version 0: the tokens that it would check there say nothing.
    with pytest.raises(StoreConflict, match="stream/1 is 100"):
        two.commit(adds=[added(store, "y")], tokens={"stream/1": 120}, expect={"stream/1": None})
    with pytest.raises(InvariantBroken, match="go back"):
        opened(store).commit(tokens={"stream/1": 99})
    one.commit(tokens={"lease": 1})
    assert two.commit(adds=[added(store, "z")], tokens={"stream/1": 120}, expect={"stream/1": 100}) == 3
    assert DeltaLog(store, one.prefix).tokens() == {"stream/1": 120, "lease": 1}
    assert len(DeltaLog(store, one.prefix).files()) == 2


def test_a_stale_writer_cannot_set_a_token_back(store: LocalStore) -> None:
    one, two = opened(store), opened(store)
    one.commit(tokens={"stream/1": 100})
    with pytest.raises(InvariantBroken):
        two.commit(tokens={"stream/1": 50})
    assert DeltaLog(store, one.prefix).token("stream/1") == 100


def test_only_a_live_file_can_be_removed_also_by_a_writer_that_lost_a_race(store: LocalStore) -> None:
    one = opened(store)
    x = added(store, "x")
    one.commit(adds=[x])
    two = opened(store)
    one.commit(removes=[x.path])
    with pytest.raises(StoreConflict, match="not live"):
        two.commit(adds=[added(store, "y")], removes=[x.path])
    assert DeltaLog(store, one.prefix).files() == []


def test_writers_that_race_all_get_through_exactly_once(store: LocalStore) -> None:
    opened(store)
    versions: dict[int, list[int]] = {}

    def work(i: int) -> None:
        log = DeltaLog(store, "s/p.t/changelog")
        for n in range(8):
            file = added(store, f"w{i}-{n}")
            while True:
                try:
                    versions.setdefault(i, []).append(log.commit(adds=[file], tokens={f"w/{i}": n}))
                    break
                except StoreConflict:
                    continue

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    log = DeltaLog(store, "s/p.t/changelog")
    assert sorted(v for vs in versions.values() for v in vs) == list(range(1, 25))
    assert len(log.files()) == 24
    assert len({f.path for f in log.files()}) == 24
    assert log.tokens() == {"w/0": 7, "w/1": 7, "w/2": 7}


def test_a_commit_that_happened_but_reported_a_failure_is_recognised(store: LocalStore, tmp_path: Path) -> None:
    log = DeltaLog(store, "t")
    log.open_or_create(SCHEMA, configuration={"delta.checkpointInterval": "1"})
    log.commit(tokens={"stream/1": 1})
    # The checkpoint that follows the commit cannot be written: deltalake raises, and yet the commit stands.
    directory = tmp_path / "t/_delta_log"
    (directory / "_last_checkpoint").unlink()
    (directory / "_last_checkpoint").mkdir()
    (directory / "_last_checkpoint/in_the_way").touch()
    for i in range(2, 5):
        (directory / f"{i:020d}.checkpoint.parquet").mkdir()
        (directory / f"{i:020d}.checkpoint.parquet/in_the_way").touch()
    assert log.commit(tokens={"stream/1": 2}, metadata={"note": "x"}) == 2
    actions = [orjson.loads(x) for x in (directory / f"{2:020d}.json").read_bytes().splitlines()]
    assert [a["txn"]["version"] for a in actions if "txn" in a] == [2]
    assert not (directory / f"{3:020d}.json").exists()


def test_a_store_that_fails_says_so_and_the_table_stays(store: LocalStore, tmp_path: Path) -> None:
    log = opened(store)
    log.commit(tokens={"stream/1": 1})
    with pytest.raises(StoreUnavailable):
        log.open_file("_date=2024-05-01/none.parquet")
    if os.geteuid() != 0:  # root may write anywhere
        directory = tmp_path / log.prefix / "_delta_log"
        directory.chmod(0o555)
        try:
            with pytest.raises(StoreUnavailable):
                log.commit(tokens={"stream/1": 2})
        finally:
            directory.chmod(0o755)
    assert log.commit(tokens={"stream/1": 3}, expect={"stream/1": 1}) == 2
    with pytest.raises(CdcError):
        DeltaLog(store, "no/table").token("x")
    with pytest.raises(HistoryGone):
        log.token("stream/1", 99)


def test_paths_that_delta_would_escape_are_refused(store: LocalStore) -> None:
    with pytest.raises(InvariantBroken):
        opened(store).commit(adds=[AddedFile(path="a b.parquet", size=1, rows=1, partition={"_date": "x"})])


@pytest.mark.parametrize("what", ["commit", "token", "files", "refresh", "removes"])
def test_a_table_at_rest_is_read_anew_when_the_log_that_it_stands_on_was_cleaned(store: LocalStore, what: str) -> None:
    x = added(store, "x")
    writer = opened(store)
    writer.commit(adds=[x], tokens={"stream/1": 100})
    resting, held = DeltaLog(store, writer.prefix), x.path
    assert resting.version() == 1
    writer.commit(configuration={"delta.logRetentionDuration": "interval 0 seconds"})
    for _ in range(CHECKPOINT_EVERY):
        writer.commit(configuration={"cdc.some": "more"})
    writer.tidy_log()
    assert store.get(f"{writer.prefix}/_delta_log/{1:020d}.json") is None
    if what == "commit":
        assert resting.commit(tokens={"stream/1": 200}, expect={"stream/1": 100}) > CHECKPOINT_EVERY
    elif what == "token":
        assert resting.token("stream/1") == 100
    elif what == "files":
        assert [f.path for f in resting.files()] == [held]
    elif what == "refresh":
        assert resting.refresh() == writer.version()
    else:
        # No token tells it before the attempt, and whether that happened cannot be read: whoever tries it tries again.
        with pytest.raises(StoreUnavailable):
            resting.commit(removes=[held])
        resting.commit(removes=[held])
        assert resting.files() == []


def test_vacuum_deletes_removed_files_only(store: LocalStore, tmp_path: Path) -> None:
    log = opened(store)
    x, y = added(store, "x"), added(store, "y")
    log.commit(adds=[x, y])
    log.commit(removes=[x.path])
    assert log.vacuum(3600) == 0
    time_ago = time.time() - 90_000
    os.utime(tmp_path / log.prefix / x.path, (time_ago, time_ago))
    version = log.version()
    assert log.vacuum(0) == 1
    assert (log.vacuum(0), log.refresh()) == (0, version), (
        "what is gone is not deleted again, and no commit tells of it"
    )
    assert not (tmp_path / log.prefix / x.path).exists()
    assert [f.path for f in DeltaLog(store, log.prefix).files()] == [y.path]


def test_an_older_token_is_told_although_the_log_was_cleaned_behind_a_checkpoint(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    log = DeltaLog(store, "t")
    log.open_or_create(SCHEMA)
    for number in range(105):
        log.commit(tokens={"often": number, **({"once": 7} if number == 3 else {})})
    for version in range(50):
        (tmp_path / f"t/_delta_log/{version:020d}.json").unlink()
    fresh = DeltaLog(store, "t")
    assert [fresh.token(name, 80) for name in ("often", "once", "never")] == [79, 7, None]
    assert [log.token(name, 80) for name in ("often", "once", "never")] == [79, 7, None]
    assert fresh.tokens() == {"often": 104, "once": 7}


def test_credentials_that_were_renewed_are_used_from_then_on(tmp_path: Path) -> None:
    """A role's are lent for an hour; the table is open for days."""

    lent: dict[str, str] = {}

    class Lent(LocalStore):
        def location(self, key: str) -> tuple[str, dict[str, str]]:
            return super().location(key)[0], dict(lent)

    store = Lent(tmp_path)
    log = DeltaLog(store, "t")
    log.open_or_create(SCHEMA)
    before = log._require()
    assert log._require() is before
    lent["aws_session_token"] = "new"
    assert log._require() is not before
    assert log._require()._storage_options == lent
    assert log.commit(tokens={"a": 1}) == 1
