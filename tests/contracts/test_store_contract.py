"""The object store contract (cdc.ports.ObjectStore), one text for every implementation.

A new store joins by a factory in STORES. What only a local directory can break (a full disk, a killed writer) stands at
the end.
"""

from __future__ import annotations

import fcntl
import mmap
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cdc.errors import ConfigError, InvariantBroken, StoreConflict, StoreUnavailable
from cdc.lake.probe import broken_promises
from cdc.lake.routing import RoutingStore
from cdc.ports import ObjectStore
from cdc.table import TableId
from connectors.local.store import LocalStore
from connectors.s3.store import S3Store
from tests.support.buckets import endpoint_of, new_bucket, s3_endpoint
from tests.support.waiting import wait_until


def routing(main: ObjectStore, *others: ObjectStore) -> RoutingStore:
    """One of several, with tables in each."""
    names = ["", *map(str, range(len(others)))]

    def lake_of(source: str, table: TableId) -> str:
        return names[(len(source) + len(table.name)) % len(names)]

    return RoutingStore(main, dict(zip(names[1:], others, strict=True)), lake_of)


STORES: dict[str, Callable[[Path], ObjectStore]] = {
    "local": lambda root: LocalStore(root),
    "routing": lambda root: routing(*(LocalStore(root.with_name(f"{root.name}-{n}")) for n in range(3))),
    "s3": lambda root: S3Store(new_bucket(), "some/where", {"endpoint_url": s3_endpoint()}),
    "ceph": lambda root: S3Store(new_bucket(endpoint_of("ceph")), "some/where", {"endpoint_url": endpoint_of("ceph")}),
}
REAL = {"ceph"}
"""Servers that `make test-stores` needs, and that not every machine has."""
ROOT = Path(__file__).parents[2]


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.stores] if name in REAL else []) for name in sorted(STORES)]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return STORES[request.param](tmp_path / "lake")


def test_what_was_put_is_what_is_read_with_the_same_etag(store: ObjectStore) -> None:
    etag = store.put("a/b/c.json", b"one")
    assert store.get("a/b/c.json") == (b"one", etag)
    assert [(o.key, o.size, o.etag) for o in store.list("a/")] == [("a/b/c.json", 3, etag)]


def test_bytes_can_go_into_a_file_which_is_replaced(store: ObjectStore, tmp_path: Path) -> None:
    data, copy = os.urandom(3 << 20), tmp_path / "copy"
    etag = store.put("a/b", data)
    copy.write_bytes(b"longer" * len(data))
    assert store.get("a/b", into=copy) == (b"", etag)
    assert copy.read_bytes() == data
    assert store.get("a/nothing", into=tmp_path / "nothing") is None
    assert not (tmp_path / "nothing").exists()


def test_an_object_that_is_not_there_is_none_and_its_deletion_no_error(store: ObjectStore) -> None:
    store.put("a/b", b"")
    assert store.get("a/nothing") is None
    assert store.get("a/b/below-an-object") is None
    assert store.get("a") is None
    store.delete(["a/nothing", "nowhere/at/all", "a/b"])
    assert store.get("a/b") is None
    assert list(store.list("")) == []


def test_every_kind_of_buffer_is_written_whole(store: ObjectStore, tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000
    (tmp_path / "source").write_bytes(data)
    with (tmp_path / "source").open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for key, buffer in (("m", mapped), ("v", memoryview(data)), ("b", bytearray(data))):
            store.put(key, buffer)
            found = store.get(key)
            assert found is not None
            assert found[0] == data
        assert mapped[:] == data


def test_if_absent_writes_once(store: ObjectStore) -> None:
    store.put("k", b"first", if_absent=True)
    with pytest.raises(StoreConflict):
        store.put("k", b"second", if_absent=True)
    found = store.get("k")
    assert found is not None
    assert found[0] == b"first"


def test_if_match_writes_only_over_the_version_that_was_read(store: ObjectStore) -> None:
    old = store.put("k", b"aaaa")
    new = store.put("k", b"bbbb", if_match=old)
    assert new != old
    with pytest.raises(StoreConflict):
        store.put("k", b"cccc", if_match=old)
    store.delete(["k"])
    with pytest.raises(StoreConflict):
        store.put("k", b"dddd", if_match=new)
    assert store.get("k") is None


def test_etags_of_quick_replacements_with_equal_size_all_differ(store: ObjectStore) -> None:
    etags = [store.put("k", b"%04d" % i) for i in range(100)]
    assert len(set(etags)) == 100


def test_keys_are_listed_in_order_of_the_whole_key_and_by_any_prefix(store: ObjectStore) -> None:
    keys = ["s/t-1/x", "s/t/a", "s/t/b/c", "s/t.json", "s/t0", "s/u/z", "r"]
    for key in keys:
        store.put(key, key.encode())
    assert [o.key for o in store.list("")] == sorted(keys)
    assert [o.key for o in store.list("s/t")] == sorted(k for k in keys if k.startswith("s/t"))
    assert [o.key for o in store.list("s/t/")] == ["s/t/a", "s/t/b/c"]
    assert [o.key for o in store.list("s/t/b")] == ["s/t/b/c"]
    assert list(store.list("nothing/")) == []


def test_keys_of_tables_are_listed_in_order_and_deleted_whichever_table_they_are_of(store: ObjectStore) -> None:
    keys = [f"s/public.{name}/{part}/x" for name in ("a", "ab", "abc", "b", "zz") for part in ("changelog", "current")]
    keys += ["s/_cdc/lease.json", "s/_notes/x", "other/public.a/x", "_cdc/probe"]
    for key in keys:
        store.put(key, key.encode())
    assert [o.key for o in store.list("")] == sorted(keys)
    assert [o.key for o in store.list("s/public.a")] == sorted(k for k in keys if k.startswith("s/public.a"))
    assert [o.key for o in store.list("s/public.a/")] == ["s/public.a/changelog/x", "s/public.a/current/x"]
    assert all(store.get(key, into=None) is not None for key in keys)
    store.delete(keys[::2])
    assert [o.key for o in store.list("")] == sorted(keys[1::2])


def test_a_key_cannot_leave_the_store(store: ObjectStore) -> None:
    for key in ("../x", "a/../../x", "/etc/x", "a//b", "", "a/."):
        with pytest.raises(InvariantBroken):
            store.put(key, b"")


def _count_up(root: Path, times: int) -> None:
    store = STORES["local"](root)
    done = 0
    while done < times:
        found = store.get("counter")
        assert found is not None
        try:
            store.put("counter", b"%d" % (int(found[0]) + 1), if_match=found[1])
            done += 1
        except StoreConflict:
            continue


def test_conditional_writes_of_processes_and_threads_lose_no_update(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("counter", b"0")
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_count_up, args=(tmp_path, 60)) for _ in range(2)]
    threads = [threading.Thread(target=_count_up, args=(tmp_path, 60)) for _ in range(2)]
    for w in [*workers, *threads]:
        w.start()
    for w in [*workers, *threads]:
        w.join(60)
    found = store.get("counter")
    assert found is not None
    assert int(found[0]) == 240


def test_of_many_that_create_an_object_at_once_one_wins(store: ObjectStore) -> None:
    won: list[int] = []
    gate = threading.Barrier(8)

    def create(i: int) -> None:
        gate.wait()
        try:
            store.put("k", b"%d" % i, if_absent=True)
            won.append(i)
        except StoreConflict:
            pass

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    found = store.get("k")
    assert found is not None
    assert won == [int(found[0])]


def test_objects_bigger_than_one_request_are_written_whole(store: ObjectStore) -> None:
    data = os.urandom(1 << 20) * 17
    assert store.get("k") is None
    etag = store.put("k", data)
    assert etag
    assert store.get("k") == (data, etag)
    with pytest.raises(StoreConflict):
        store.put("k", data[::-1], if_absent=True)
    newer = store.put("k", data[::-1], if_match=etag)
    with pytest.raises(StoreConflict):
        store.put("k", data, if_match=etag)
    assert store.get("k") == (data[::-1], newer)


def test_it_may_hold_a_lake(store: ObjectStore) -> None:
    assert broken_promises(store) == []
    assert list(store.list("")) == []


# ---- what only a local directory can do ----


def _files(root: Path) -> list[str]:
    return sorted(p.name for p in root.rglob("*") if p.is_file() and p.name != ".cdc-store.lock")


def test_a_write_waits_for_whoever_holds_the_lock(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    etag = store.put("k", b"old")
    results: list[str] = []
    with (tmp_path / ".cdc-store.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        writer = threading.Thread(target=lambda: results.append(store.put("k", b"new", if_match=etag)))
        writer.start()
        wait_until(lambda: any(tmp_path.glob(".cdc-put-*")), message="a finished temporary file")
        writer.join(0.3)
        assert results == []
        assert store.get("k") == (b"old", etag)
    writer.join(30)
    assert store.get("k") == (b"new", results[0])


def test_an_object_that_is_being_written_is_not_listed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("t/a", b"")
    data = bytes(96 << 20)
    writer = threading.Thread(target=lambda: store.put("t/x", data))
    writer.start()
    wait_until(lambda: len(list((tmp_path / "t").iterdir())) > 1, message="a temporary file")
    seen: set[tuple[str, int]] = set()
    while writer.is_alive():
        seen.update((o.key, o.size) for o in store.list("t/"))
    assert seen <= {("t/a", 0), ("t/x", len(data))}
    assert [o.key for o in store.list("t/")] == ["t/a", "t/x"]


def test_versions_are_told_apart_although_the_clock_goes_back(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("k", b"1")
    future = time.time() + 86_400
    os.utime(tmp_path / "k", (future, future))
    (ahead,) = store.list("k")
    store.put("k", b"2")
    (now,) = store.list("k")
    assert now.etag != ahead.etag
    assert now.modified_at_us >= ahead.modified_at_us


def test_temporary_files_of_the_day_before_yesterday_are_removed_younger_ones_stay(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("t/a", b"")
    for name, age_s in ((".cdc-put-old", 200_000), (".cdc-put-young", 60)):
        (tmp_path / "t" / name).write_bytes(b"half")
        os.utime(tmp_path / "t" / name, (time.time() - age_s,) * 2)
    assert [o.key for o in store.list("")] == ["t/a"]
    assert _files(tmp_path) == [".cdc-put-young", "a"]


_PUT_UNDER_LIMIT = """
import resource, signal, sys
from pathlib import Path
from cdc.errors import StoreUnavailable
from connectors.local.store import LocalStore
from connectors.s3.store import S3Store
from tests.support.buckets import new_bucket, s3_endpoint
store = LocalStore(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    store.put("table/big", bytes(8 << 20))
except StoreUnavailable as e:
    sys.exit(7)
"""


def test_a_disk_that_takes_no_more_leaves_no_half_object(tmp_path: Path) -> None:
    before = LocalStore(tmp_path).put("table/big", b"old")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", _PUT_UNDER_LIMIT, str(tmp_path)], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 7
    assert LocalStore(tmp_path).get("table/big") == (b"old", before)
    assert _files(tmp_path) == ["big"]


_PUT_FOREVER = """
import sys
from pathlib import Path
from connectors.local.store import LocalStore
from connectors.s3.store import S3Store
from tests.support.buckets import new_bucket, s3_endpoint
store = LocalStore(Path(sys.argv[1]))
i = 0
while True:
    store.put(f"t/{i:06d}", bytes([i % 256]) * (2 << 20))
    i += 1
"""


def test_a_killed_writer_leaves_only_whole_objects(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with subprocess.Popen([sys.executable, "-c", _PUT_FOREVER, str(tmp_path)], cwd=ROOT) as writer:
        try:
            wait_until(lambda: len(list(store.list("t/"))) >= 5, message="five objects")
        finally:
            writer.kill()
    found = list(store.list("t/"))
    assert len(found) >= 5
    for i, o in enumerate(found):
        data = store.get(o.key)
        assert data is not None
        assert data[0] == bytes([i % 256]) * (2 << 20), o.key


def test_a_file_where_a_directory_is_needed_is_unavailable_not_lost(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"")
    with pytest.raises(StoreUnavailable):
        store.put("a/b", b"")
    assert store.get("a") is not None


def test_urls_that_name_no_local_directory_are_refused(tmp_path: Path) -> None:
    assert LocalStore.from_url(f"file://{tmp_path}").location("x") == (f"{tmp_path}/x", {})
    assert LocalStore.from_url(str(tmp_path)).location("") == (str(tmp_path), {})
    for url in ("file://host/path", "relative/path", f"file://{tmp_path}/a%2520b"):
        with pytest.raises(ConfigError):
            LocalStore.from_url(url)
    with pytest.raises(ConfigError):
        LocalStore.from_url(f"file://{tmp_path}", {"region": "x"})
