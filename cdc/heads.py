"""Where the server's head was, and when: so it is known how old is what a step lacks. In memory; of one thread."""

from __future__ import annotations

import bisect

HEADS_MAX = 4096
"""Positions of the head that are remembered, one a second."""


class Heads:
    """Positions of one source's head with the times (Unix s) at which they were noted, oldest first."""

    def __init__(self) -> None:
        self._noted: list[tuple[int, float]] = []

    def clear(self) -> None:
        """Forget all: another history begins."""
        self._noted.clear()

    def note(self, head: int, now: float, needed_lsn: int) -> None:
        """Remember when the server's head was where; what is older than the furthest step needs is dropped."""
        noted = self._noted
        if noted and noted[-1][0] == head:
            noted.pop()
        noted.append((head, now))
        while len(noted) > 1 and noted[1][0] <= needed_lsn:
            noted.pop(0)
        if len(noted) > HEADS_MAX:
            # Far behind for long: the ages lose precision, not range.
            noted[1:-1] = noted[1:-1:2]

    def held_all_at(self, lsn: int) -> float:
        """When a step that has come to `lsn` held everything that there was: the age of what it lacks, at most."""
        place = bisect.bisect_right(self._noted, lsn, key=lambda seen: seen[0])
        return self._noted[max(0, place - 1)][1]
