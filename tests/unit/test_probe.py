"""A store that breaks a promise is found by asking it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdc.errors import StoreConflict, StoreRefused
from cdc.lake.probe import broken_promises, require_promises
from cdc.ports import StoredObject
from connectors.local.store import LocalStore


class Overwrites(LocalStore):
    """Answers a conditional write with success, and overwrites."""

    def put(self, key: str, data: Any, *, if_absent: bool = False, if_match: str | None = None) -> str:
        return super().put(key, data)


class IgnoresEtags(LocalStore):
    def put(self, key: str, data: Any, *, if_absent: bool = False, if_match: str | None = None) -> str:
        return super().put(key, data, if_absent=if_absent)


class RefusesEtags(LocalStore):
    def put(self, key: str, data: Any, *, if_absent: bool = False, if_match: str | None = None) -> str:
        if if_match is not None:
            raise StoreConflict("never")
        return super().put(key, data, if_absent=if_absent)


class ListsLate(LocalStore):
    def list(self, prefix: str) -> Iterator[StoredObject]:
        return iter(())


class ReadsTheOld(LocalStore):
    def get(self, key: str, *, into: Path | None = None) -> tuple[bytes, str] | None:
        return None


class Keeps(LocalStore):
    def delete(self, keys: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("kind", "promise"),
    [
        (Overwrites, "put if absent"),
        (IgnoresEtags, "put if match"),
        (RefusesEtags, "put if match"),
        (ListsLate, "list after write"),
        (ReadsTheOld, "read after write"),
        (Keeps, "delete"),
    ],
)
def test_a_store_that_breaks_a_promise_is_refused_and_told_why(
    tmp_path: Path, kind: type[LocalStore], promise: str
) -> None:
    store = kind(tmp_path)
    assert [name for name, _ in broken_promises(store)] == [promise]
    with pytest.raises(StoreRefused, match=f"s3://there cannot hold a lake: {promise}: ") as refused:
        require_promises(store, "s3://there")
    assert "conditional writes" in refused.value.hint


def test_a_store_that_keeps_them_all_is_left_as_it_was(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert broken_promises(store) == []
    require_promises(store, "file:///there")
    assert list(store.list("")) == []
    assert [p.name for p in tmp_path.rglob("*") if p.is_dir()] == [], "no directory either"


def test_what_a_killed_probe_left_is_swept_and_a_store_that_kept_its_promises_is_not_asked_again(
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path)
    for key in ("_cdc/probe-old", "_cdc/probe-new", "shop/data"):
        store.put(key, b"x")
    os.utime(tmp_path / "_cdc/probe-old", (1, 1))
    require_promises(store, "file:///swept")
    assert sorted(o.key for o in store.list("")) == ["_cdc/probe-new", "shop/data"]
    require_promises(Overwrites(tmp_path), "file:///swept")
