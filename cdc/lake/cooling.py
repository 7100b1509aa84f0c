"""Old objects of a changelog put into a cheaper class of storage, where they rest until retention lets them go.

Guarantees:
- The store rewrites an object in place: the same bytes under the same key. No version of the table changes, so nobody
  who reads notices but by the price.
- Where an object lies is what the store says when it lists them: nothing else remembers it. So it happens once to each
  object, whatever dies, and goes on where it stopped.
- One call takes a bounded time.

It takes what it is given for finished: that nothing will be joined any more is for cdc.upkeep to know.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Final

from cdc.lake.delta import LiveFile
from cdc.lake.retention import expired
from cdc.ports import TieredStore

COLD_BYTES_MIN: Final = 128 << 10
"""What is smaller stays: it is charged as this much in cold classes, and each object costs a request to move."""
COLD_BYTES_MAX: Final = 5 << 30
"""What S3 copies in one request; what is bigger stays too."""
_TURN_S: Final = 5.0


class Cooler:
    """Of one changelog, at `path`, whose objects are to rest in `storage_class`."""

    def __init__(self, store: TieredStore, path: str, storage_class: str) -> None:
        self._store = store
        self._below = f"{path}/"
        self._class = storage_class
        self._cold: set[str] | None = None

    def cold(self) -> set[str]:
        """Paths of objects that rest. Lists the changelog at the first call."""
        if self._cold is None:
            listed = self._store.list(self._below)
            self._cold = {o.key.removeprefix(self._below) for o in listed if o.storage_class == self._class}
        return self._cold

    def cool(
        self, files: Sequence[LiveFile], held: Collection[str], date: str | None, before_s: float
    ) -> tuple[int, bool]:
        """Put away those of a version's files whose rows were all committed before a Unix time; how many, and whether
        more are left for the next turn. Blocking; durable on return."""
        cold, cooled = self.cold(), 0
        until = time.monotonic() + _TURN_S
        for file in expired(files, held, date, before_s):
            if file.path in cold or not COLD_BYTES_MIN <= file.size <= COLD_BYTES_MAX:
                continue
            if time.monotonic() >= until:
                return cooled, True
            # One that is gone has been vacuumed: nothing to put away.
            cooled += self._store.move(f"{self._below}{file.path}", self._class)
            cold.add(file.path)
        return cooled, False


__all__ = ["COLD_BYTES_MAX", "COLD_BYTES_MIN", "Cooler"]
