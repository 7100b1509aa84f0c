"""How much a snapshot reads at once, and how fast: pure arithmetic on a clock.

A chunk aims at a second of reading and is bounded by rows and bytes; what all readers of a source read together is
bounded by rates. It does not know what a chunk is made of: its size may be rows or blocks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

TARGET_S = 1.0
"""So long one chunk is meant to be read."""
GROWTH = 4.0
FIRST_ROWS = 20_000
FIRST_BLOCKS = 512
ACTIVE_S = 1.0
"""How often the server is asked how busy it is."""


@dataclass(slots=True)
class ChunkSize:
    """The size of one run's next chunk, in whatever it is counted in."""

    size: float

    def learn(self, took_s: float, rows: int, bytes_: int, *, rows_max: int, bytes_max: int) -> None:
        """Take notice of a chunk of the present size. Grows fourfold at most, and never beyond what would have held
        both bounds."""
        factor = TARGET_S / max(took_s, 1e-3)
        if rows:
            factor = min(factor, rows_max / rows)
        if bytes_:
            # A chunk that is cut at its bytes is read in part for nothing.
            factor = min(factor, 0.9 * bytes_max / bytes_)
        self.size = max(1.0, self.size * min(GROWTH, max(1 / GROWTH, factor)))


class RateLimit:
    """What all readers of a source may read a second. Thread-safe; 0 is no limit."""

    def __init__(self, rows_per_s: float, bytes_per_s: float) -> None:
        self._rates = (rows_per_s, bytes_per_s)
        self._free_at = 0.0
        self._lock = threading.Lock()

    def chunk_bounds(self, rows_max: int, bytes_max: int) -> tuple[int, int]:
        """The bounds of a chunk under the rates: a chunk is no more than a second's worth."""
        rows, bytes_ = self._rates
        return (
            min(rows_max, max(1, int(rows))) if rows else rows_max,
            min(bytes_max, max(1, int(bytes_))) if bytes_ else bytes_max,
        )

    def wait_s(self) -> float:
        """How long the next chunk has to wait."""
        return max(0.0, self._free_at - time.monotonic())

    def took(self, rows: int, bytes_: int) -> None:
        """A chunk was read."""
        due = max((n / rate for n, rate in zip((rows, bytes_), self._rates, strict=True) if rate), default=0.0)
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + due


class LoadLimit:
    """Whether the source is too busy for snapshots: more than `limit` clients are active; 0: it is not looked at."""

    def __init__(self, limit: int, active: Callable[[], int]) -> None:
        self._limit = limit
        self._active = active
        self._ask_at = 0.0
        self._why = ""

    def why(self, idle: bool) -> str:
        """Why snapshots must wait; empty if they need not. `idle`: nobody wants to know. Asks the server, once a second
        at most; its errors are the caller's."""
        now = time.monotonic()
        if idle or not self._limit:
            # What was found is old by the time that somebody wants to know again.
            self._why = ""
        elif now >= self._ask_at:
            self._ask_at = now + ACTIVE_S
            active = self._active()
            self._why = f"is paused: {active} clients are active (more than {self._limit})"
            self._why = self._why if active > self._limit else ""
        return self._why
