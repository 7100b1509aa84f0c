"""Whether an object store keeps the promises that a lake rests on: asked of the store itself, not of its maker.

There are stores that answer a conditional write with success and overwrite, stores that do not know the condition, and
stores whose listings come late. Each loses or doubles data in silence sooner or later, so none of them may hold a
lake. The probe is an object and a small Delta table under names of their own, removed again; a store that cannot be
reached raises its own errors.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import pyarrow as pa

from cdc.errors import CdcError, StoreConflict, StoreRefused
from cdc.lake.delta import DeltaLog
from cdc.ports import ObjectStore

_PREFIX: Final = "_cdc/probe-"
_OLD_S: Final = 3600.0
_KEPT: Final[set[str]] = set()
"""URLs of the stores that this process has asked, and that keep their promises."""
WHAT_TO_DO: Final = "use a store that decides conditional writes itself, and shows at once what was written"


def broken_promises(store: ObjectStore) -> list[tuple[str, str]]:
    """(promise, what happened instead); none if the store keeps them all. Blocking."""
    _sweep(store)
    key = f"{_PREFIX}{uuid.uuid4().hex}"
    try:
        broken = _broken(store, key) or _broken_by_delta(store, f"{key}-table")
    except BaseException:
        with suppress(CdcError):
            _remove(store, key)
        raise
    _remove(store, key)
    if store.get(key) is not None:
        broken.append(("delete", "a removed object is still there"))
    return broken


def _sweep(store: ObjectStore) -> None:
    """Remove what a probe that was killed has left."""
    before = (time.time() - _OLD_S) * 1e6
    old = [stored.key for stored in store.list(_PREFIX) if stored.modified_at_us < before]
    if old:
        store.delete(old)


def _remove(store: ObjectStore, key: str) -> None:
    store.delete([key, *(stored.key for stored in store.list(key) if stored.key != key)])


def _broken(store: ObjectStore, key: str) -> list[tuple[str, str]]:
    broken: list[tuple[str, str]] = []
    etag = store.put(key, b"first", if_absent=True)
    if store.get(key) != (b"first", etag):
        broken.append(("read after write", "an object just written reads back differently"))
    if not _conflicts(lambda: store.put(key, b"second", if_absent=True)):
        broken.append(("put if absent", "a conditional PUT overwrote an object that exists"))
    elif _conflicts(lambda: store.put(key, b"third", if_match=etag)):
        broken.append(("put if match", "a conditional PUT refused the right etag"))
    elif not _conflicts(lambda: store.put(key, b"fourth", if_match=etag)):
        broken.append(("put if match", "a conditional PUT ignored a wrong etag"))
    if key not in {stored.key for stored in store.list(_PREFIX)}:
        broken.append(("list after write", "an object just written is not listed"))
    return broken


def _broken_by_delta(store: ObjectStore, prefix: str) -> list[tuple[str, str]]:
    """The same of deltalake's own client, which makes most commits: it must come to the same place, and lose a race."""
    schema = pa.schema([pa.field("n", pa.int64())])
    one, other = DeltaLog(store, prefix), DeltaLog(store, prefix)
    one.open_or_create(schema)
    if store.get(f"{prefix}/_delta_log/{0:020d}.json") is None:
        return [("one place", "a commit of deltalake's client went elsewhere than our objects")]
    other.refresh()
    if (one.commit(tokens={"n": 1}), other.commit(tokens={"n": 2})) != (1, 2):
        return [("commits", "of two commits that were made upon one version, one replaced the other")]
    return []


def require_promises(store: ObjectStore, url: str) -> None:
    """StoreRefused if the store breaks a promise. One that keeps them is asked once in the life of a process."""
    if url in _KEPT:
        return
    broken = broken_promises(store)
    if broken:
        told = "; ".join(f"{promise}: {what}" for promise, what in broken)
        raise StoreRefused(f"the store at {url} cannot hold a lake: {told}", hint=WHAT_TO_DO)
    _KEPT.add(url)


def _conflicts(write: Callable[[], object]) -> bool:
    try:
        write()
    except StoreConflict:
        return True
    return False


__all__ = ["WHAT_TO_DO", "broken_promises", "require_promises"]
