"""A small object that is replaced by compare-and-swap: what one wrote without hearing of it is no other's work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cdc.errors import StoreConflict, StoreUnavailable
from cdc.lake.document import Document
from connectors.local.store import LocalStore


class Mute(LocalStore):
    """Does what it is told, and fails to say so, while `mute`."""

    mute = False

    def put(self, key: str, data: Any, *, if_absent: bool = False, if_match: str | None = None) -> str:
        etag = super().put(key, data, if_absent=if_absent, if_match=if_match)
        if self.mute:
            raise StoreUnavailable("no answer")
        return etag


@pytest.fixture
def store(tmp_path: Path) -> Mute:
    return Mute(tmp_path)


def unheard(store: Mute, document: Document, data: bytes) -> None:
    store.mute = True
    with pytest.raises(StoreUnavailable):
        document.write(data)
    store.mute = False


def content(store: Mute) -> bytes:
    found = store.get("k")
    assert found is not None
    return found[0]


@pytest.mark.parametrize("there", [None, b"0"])
def test_a_write_that_happened_unheard_is_followed_by_the_next_one(store: Mute, there: bytes | None) -> None:
    document = Document(store, "k")
    if there is not None:
        document.write(there)
    unheard(store, document, b"1")
    document.write(b"2")
    unheard(store, document, b"3")
    document.write(b"3")
    document.write(b"4")
    assert content(store) == b"4"


def test_a_write_that_happens_when_it_was_read_that_it_had_not_is_still_ours(store: Mute) -> None:
    document = Document(store, "k")
    document.write(b"0")
    etag = document._etag
    unheard(store, document, b"1")
    store.put("k", b"0")  # as if it were still on its way …
    assert document.read() == b"0"
    store.put("k", b"1")  # … and came now
    assert document._etag != etag
    document.write(b"2")
    assert content(store) == b"2"


def test_what_another_writer_has_written_is_not_replaced(store: Mute) -> None:
    document, other = Document(store, "k"), Document(store, "k")
    document.write(b"0")
    assert other.read() == b"0"
    unheard(store, document, b"1")
    assert other.read() == b"1"
    other.write(b"theirs")
    with pytest.raises(StoreConflict):
        document.write(b"2")
    assert content(store) == b"theirs"
    store.delete(["k"])
    with pytest.raises(StoreConflict):
        document.write(b"2")
    assert document.read() is None
    document.write(b"3")
    assert content(store) == b"3"
