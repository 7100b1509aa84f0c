"""When the next request may go: so many a second, and none while the target asks for a pause. Thread-safe."""

from __future__ import annotations

import threading
import time


class Pace:
    """`per_s` requests a second; 0: no limit."""

    def __init__(self, per_s: float) -> None:
        self._interval_s = 1 / per_s if per_s else 0.0
        self._lock = threading.Lock()
        self._next = 0.0
        self._held_until = 0.0

    def hold(self, seconds: float) -> None:
        """No request within so many seconds."""
        with self._lock:
            self._held_until = max(self._held_until, time.monotonic() + seconds)

    def wait(self, stop: threading.Event) -> bool:
        """Block until it is our turn; False if `stop` was set before."""
        with self._lock:
            turn = max(time.monotonic(), self._next)
            self._next = turn + self._interval_s
        while (left_s := max(turn, self._held_until) - time.monotonic()) > 0:
            if stop.wait(left_s):
                return False
        return not stop.is_set()


__all__ = ["Pace"]
