"""Waiting for a condition with a deadline: the only place in the tests that sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class NotInTime(AssertionError):
    """The condition did not come true before the deadline."""


def wait_until(condition: Callable[[], T], timeout_s: float = 60.0, message: str | Callable[[], object] = "") -> T:
    """Call `condition` until its result is true, and return that. `message` says what was waited for; given as a
    function it is called at the end, to show the state then. An exception of the condition ends the waiting."""
    deadline = time.monotonic() + timeout_s
    pause_s = 0.001
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() >= deadline:
            told = message() if callable(message) else message
            raise NotInTime(
                f"not within {timeout_s:g} s: {told or getattr(condition, '__name__', condition)}; last: {result!r}"
            )
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.05)
