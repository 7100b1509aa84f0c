"""Orders that wait for a store do not hold who took them, and are done in their order."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from cdc.aside import Aside
from cdc.errors import StoreUnavailable
from tests.support.waiting import wait_until


def test_what_blocks_holds_nobody_and_what_was_ordered_first_is_done_first() -> None:
    aside, mute, done = Aside(), threading.Event(), list[str]()

    def slow() -> dict[str, Any]:
        mute.wait(60)
        done.append("pause")
        return {"paused": True}

    def quick() -> dict[str, Any]:
        done.append("resume")
        return {"paused": False}

    first, second = aside.do(slow), aside.do(quick)
    assert (first(), second(), done) == (None, None, [])
    mute.set()
    assert wait_until(second) == {"paused": False}
    assert (first(), done) == ({"paused": True}, ["pause", "resume"])


def test_an_error_is_told_to_who_asked_and_ends_nothing() -> None:
    aside = Aside()

    def fails() -> dict[str, Any]:
        raise StoreUnavailable("the lake is away")

    failed = aside.do(fails)
    with pytest.raises(StoreUnavailable, match="is away"):
        wait_until(failed)
    assert wait_until(aside.do(lambda: {"done": True})) == {"done": True}
