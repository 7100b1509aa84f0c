"""Old objects of a changelog in a bucket are put into another class of storage: once, and nobody who reads notices."""

from __future__ import annotations

import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest

from cdc.batch import Boundary
from cdc.errors import StoreUnavailable
from cdc.lake import cooling
from cdc.lake.changelog import ChangelogTable
from cdc.lake.current import CurrentTable
from cdc.lake.delta import DeltaLog
from cdc.lake.inventory import inventory
from cdc.ports import TieredStore
from cdc.upkeep import Limits, Upkeep
from connectors.s3.store import S3Store
from tests.support.buckets import new_bucket, s3_endpoint
from tests.support.changelogs import batch_of
from tests.unit.test_lake_current import SCHEMA, TABLE

DAY_S = 86_400.0
LIMITS = Limits(3600, 8 << 20, 3600, retain_s=90 * DAY_S, cold_after_s=30 * DAY_S, cold_class="GLACIER_IR")


class Bucket:
    """A changelog in a bucket, merged, with rows of big values."""

    def __init__(self, temp: Path, rng: random.Random) -> None:
        endpoint = s3_endpoint()
        self.bucket = new_bucket()
        self.store = S3Store(self.bucket, "lake", {"endpoint_url": endpoint, "sse": "AES256"})
        self.client: Any = boto3.client("s3", endpoint_url=endpoint)
        self.temp, self.rng, self.lsn = temp, rng, 0
        self.changelog = ChangelogTable(self.store, "shop", TABLE)
        self.current = CurrentTable(self.store, "shop", TABLE, temp_dir=temp)
        facts = {"kind": "first", "oid": "7"}
        controls = [
            {"_op": "s", "_seq": (1 << 62) + n, "_run": "run1", "_raw": {"event": event, **facts}}
            for n, event in enumerate(("begin", "end"))
        ]
        self.land(controls, chunk=0)
        self.merge()

    def upkeep(self) -> Upkeep:
        """As a process that has just started has it."""
        current = CurrentTable(self.store, "shop", TABLE, temp_dir=self.temp)
        return Upkeep(
            self.store, ChangelogTable(self.store, "shop", TABLE), current, temp_dir=self.temp, limits=LIMITS
        )  # fmt: skip

    def land(self, rows: list[dict[str, Any]], chunk: int | None = None) -> None:
        self.lsn += 10
        values = [{"_lsn": self.lsn, "_seq": n, "_xid": 100, **row} for n, row in enumerate(rows)]
        writer = self.changelog.writer(self.temp)
        writer.add(batch_of(SCHEMA, values), chunk=chunk)
        writer.commit(Boundary(0, self.lsn, self.lsn + 1))

    def insert(self, number: int, *, size: int = 400_000) -> None:
        note = self.rng.randbytes(size // 2).hex()
        self.land([{"_op": "c", "id": str(number), "note": note}])

    def merge(self) -> None:
        assert self.current.merge(ChangelogTable(self.store, "shop", TABLE), SCHEMA).version is not None

    def classes(self) -> dict[str, str]:
        """Class of storage of each live object."""
        live = {f.path for f in DeltaLog(self.store, self.changelog.path).files()}
        below = f"{self.changelog.path}/"
        listed = {o.key.removeprefix(below): o.storage_class for o in self.store.list(below)}
        return {path: listed[path] for path in live}


@pytest.fixture
def bucket(tmp_path: Path, rng: random.Random) -> Bucket:
    return Bucket(tmp_path, rng)


def moved(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys that are moved from now on."""
    keys: list[str] = []
    real = S3Store.move

    def noted(self: S3Store, key: str, storage_class: str) -> bool:
        keys.append(key)
        return real(self, key, storage_class)

    monkeypatch.setattr(S3Store, "move", noted)
    return keys


def test_an_object_is_moved_with_all_that_it_is(bucket: Bucket) -> None:
    store: TieredStore = bucket.store
    assert isinstance(bucket.store, TieredStore)
    store.put("some/object", b"x" * 1000)
    assert store.move("some/object", "GLACIER_IR")
    assert store.move("some/object", "GLACIER_IR"), "again is no harm"
    (found,) = store.list("some/")
    assert (found.storage_class, found.size) == ("GLACIER_IR", 1000)
    head = bucket.client.head_object(Bucket=bucket.bucket, Key="lake/some/object")
    assert head["ServerSideEncryption"] == "AES256"
    assert "cdc-write" in head["Metadata"], "by which its writer knows it again"
    got = store.get("some/object")
    assert got is not None
    assert got[0] == b"x" * 1000
    assert not store.move("no/object", "GLACIER_IR")


@pytest.mark.slow
def test_objects_are_joined_first_and_then_put_away_once(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        bucket.insert(number)
    bucket.merge()
    keys = moved(bucket, monkeypatch)
    upkeep, later = bucket.upkeep(), time.time() + 31 * DAY_S
    assert upkeep.compact(everything=True) == 4
    assert upkeep.age(cool=False, now_s=later) == (0, 0)
    assert keys == [], "there may be more to join"
    assert upkeep.age(now_s=later - 5 * DAY_S) == (0, 0)
    assert upkeep.age(now_s=later) == (0, 1)
    assert set(bucket.classes().values()) == {"GLACIER_IR"}
    for again in (upkeep, bucket.upkeep()):
        assert again.age(now_s=later) == (0, 0)
    assert len(keys) == 1

    for number in range(3, 6):
        bucket.insert(number)
    bucket.merge()
    (cold,) = [path for path, kind in bucket.classes().items() if kind == "GLACIER_IR"]
    for late in (bucket.upkeep(), upkeep):
        while late.compact(everything=True):
            pass
        assert cold in bucket.classes(), "what has been put away is not joined with what came later"
    found = inventory(bucket.store, bucket.changelog.path, small_bytes=1, cold_class="GLACIER_IR")
    assert found is not None
    assert (found["cold_files"], found["files"]) == (1, 2)
    assert found["cold_bytes"] > 200_000
    assert bucket.current.rows() == 6
    assert upkeep.age(now_s=time.time() + 92 * DAY_S)[0] == 2, "and in the end retention lets it go"


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        bucket.insert(number)
    bucket.insert(3, size=1000)
    bucket.merge()
    later = time.time() + 31 * DAY_S
    real = S3Store.move
    calls: list[str] = []

    def fails_at_the_second(self: S3Store, key: str, storage_class: str) -> bool:
        calls.append(key)
        if len(calls) == 2:
            raise StoreUnavailable("a blink")
        return real(self, key, storage_class)

    monkeypatch.setattr(S3Store, "move", fails_at_the_second)
    with pytest.raises(StoreUnavailable):
        bucket.upkeep().age(now_s=later)
    monkeypatch.setattr(cooling, "_TURN_S", -1.0)
    upkeep = bucket.upkeep()
    assert upkeep.age(now_s=later) == (0, 0)
    assert upkeep._age_at == 0.0, "a turn that is over is not the end"
    monkeypatch.setattr(cooling, "_TURN_S", 5.0)
    assert upkeep.age(now_s=later) == (0, 2)
    assert len(set(calls)) == 3
    assert len(calls) == 4
    assert sorted(bucket.classes().values()) == ["GLACIER_IR"] * 3 + ["STANDARD"] * 2, "small ones stay"


@pytest.mark.slow
def test_what_is_not_merged_is_not_put_away(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.insert(1)
    keys = moved(bucket, monkeypatch)
    assert bucket.upkeep().age(now_s=time.time() + 31 * DAY_S) == (0, 0)
    assert keys == []


@pytest.mark.slow
def test_a_class_that_is_refused_keeps_nothing_else_from_being_done(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.insert(1)
    bucket.merge()

    def refused(self: S3Store, key: str, storage_class: str) -> bool:
        raise StoreUnavailable("no such class")

    monkeypatch.setattr(S3Store, "move", refused)
    upkeep, real = bucket.upkeep(), time.time
    monkeypatch.setattr("cdc.upkeep.time", SimpleNamespace(time=lambda: real() + 31 * DAY_S, monotonic=time.monotonic))
    vacuumed: list[Upkeep] = []
    monkeypatch.setattr(Upkeep, "vacuum", lambda self: vacuumed.append(self) or 0)
    with pytest.raises(StoreUnavailable, match="no such class"):
        upkeep.work(lambda: None, vacuum=True)
    assert vacuumed == [upkeep]
