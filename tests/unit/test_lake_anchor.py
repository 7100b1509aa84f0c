"""The anchor: what a daemon on an empty disk knows of its source; it never goes back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cdc.errors import FormatTooNew, InvariantBroken, StoreConflict
from cdc.lake.anchor import Anchor, AnchorState
from cdc.lake.layout import anchor_key
from connectors.local.store import LocalStore

FIRST = AnchorState(
    epoch=1, system_id="7291", timeline=1, database="shop", slot="cdc_shop", mode="landed", may_confirm_lsn=0x1000
)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def test_an_empty_lake_has_none_and_what_was_saved_is_what_the_next_daemon_loads(store: LocalStore) -> None:
    anchor = Anchor(store, "shop")
    assert anchor.load() is None
    anchor.save(FIRST)
    moved = replace(FIRST, may_confirm_lsn=0x2000, needs_resync=("public.a", "public.b"))
    anchor.save(moved)
    assert anchor.state == moved
    assert Anchor(store, "shop").load() == moved
    assert Anchor(store, "other").load() is None


def test_the_position_never_goes_back_within_an_epoch(store: LocalStore) -> None:
    anchor = Anchor(store, "shop")
    anchor.save(FIRST)
    with pytest.raises(InvariantBroken):
        anchor.save(replace(FIRST, may_confirm_lsn=0xFFF))
    with pytest.raises(InvariantBroken):
        anchor.save(replace(FIRST, epoch=0, may_confirm_lsn=0x9000))
    restored = replace(FIRST, epoch=2, may_confirm_lsn=0x10)
    anchor.save(restored)
    assert Anchor(store, "shop").load() == restored


def test_of_two_writers_the_slower_one_is_told(store: LocalStore) -> None:
    one, two = Anchor(store, "shop"), Anchor(store, "shop")
    one.load()
    two.load()
    one.save(FIRST)
    with pytest.raises(StoreConflict):
        two.save(replace(FIRST, slot="other"))
    assert two.load() == FIRST
    two.save(replace(FIRST, may_confirm_lsn=0x3000))
    with pytest.raises(StoreConflict):
        one.save(replace(FIRST, may_confirm_lsn=0x4000))
    assert Anchor(store, "shop").load() == replace(FIRST, may_confirm_lsn=0x3000)


def test_a_write_whose_answer_was_lost_is_recognised(store: LocalStore) -> None:
    anchor = Anchor(store, "shop")
    anchor.save(FIRST)
    moved = replace(FIRST, may_confirm_lsn=0x2000)
    # The object is already what this save is about to write: its own first try, of which it never heard.
    twin = Anchor(store, "shop")
    twin.load()
    twin.save(moved)
    anchor.save(moved)
    anchor.save(replace(moved, may_confirm_lsn=0x3000))
    assert Anchor(store, "shop").load() == replace(moved, may_confirm_lsn=0x3000)


def test_older_and_newer_formats(store: LocalStore) -> None:
    values = {"format": 1, "epoch": 1, "system_id": "1", "timeline": 1, "database": "d", "slot": "s", "mode": "log"}
    store.put(anchor_key("shop"), json.dumps({**values, "may_confirm_lsn": 5, "unknown": 1}).encode())
    found = Anchor(store, "shop").load()
    assert found is not None
    assert (found.may_confirm_lsn, found.needs_resync) == (5, ())
    store.put(anchor_key("shop"), json.dumps({**values, "format": 2}).encode())
    with pytest.raises(FormatTooNew):
        Anchor(store, "shop").load()
