"""THE loop: read after checkpoint → write idempotently → save checkpoint → confirm upstream.

Every hop is one use of `Stage`: source → log, log → lake. The proof of delivery lives here: an upstream is opened at
what the downstream says it holds, and is told that it may forget only what the downstream has returned as durable.
So dying between any two lines repeats work and loses none; the downstream makes the repetition invisible.

`step()` is one bounded turn: it waits for input no longer than it is told, never sleeps and never retries. Retrying
is the supervisor's: after an error the stage closes both ends, and the next step opens them again from durable
state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

ItemT = TypeVar("ItemT")
PointT = TypeVar("PointT")
ReadT_co = TypeVar("ReadT_co", covariant=True)
AfterT_contra = TypeVar("AfterT_contra", contravariant=True)
WrittenT_contra = TypeVar("WrittenT_contra", contravariant=True)
DurableT_co = TypeVar("DurableT_co", covariant=True)


class Upstream(Protocol[ReadT_co, AfterT_contra]):
    """Where a stage reads."""

    def open(self, after: AfterT_contra) -> None:
        """Go to just behind `after`."""

    def read(self, timeout_s: float) -> ReadT_co | None:
        """The next item in order, None if there is none in time."""

    def confirm(self, durable: AfterT_contra) -> None:
        """Everything up to `durable` is safe downstream; idempotent, never backwards."""

    def close(self) -> None:
        """Let go; idempotent."""


class Downstream(Protocol[WrittenT_contra, DurableT_co]):
    """Where a stage writes."""

    def resume(self) -> DurableT_co:
        """The point that is durable here; forget everything that is only buffered."""

    def write(self, item: WrittenT_contra) -> DurableT_co | None:
        """Take an item. The point that is durable now, or None if nothing new is."""

    def tick(self) -> DurableT_co | None:
        """Called when there was nothing to read: make durable what is due. As `write`."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step did."""

    read: bool
    durable: bool


class Stage(Generic[ItemT, PointT]):
    """One hop. Not thread-safe: one thread steps it."""

    def __init__(self, name: str, upstream: Upstream[ItemT, PointT], downstream: Downstream[ItemT, PointT]) -> None:
        self.name = name
        self._upstream = upstream
        self._downstream = downstream
        self._is_open = False

    def step(self, timeout_s: float) -> Progress:
        """One bounded turn; raises whatever either end raises, after closing both."""
        try:
            if not self._is_open:
                held = self._downstream.resume()
                self._upstream.open(held)
                self._is_open = True
                # Confirming may be what failed, or what the process died before.
                self._upstream.confirm(held)
            item = self._upstream.read(timeout_s)
            durable = self._downstream.tick() if item is None else self._downstream.write(item)
            if durable is not None:
                self._upstream.confirm(durable)
            return Progress(item is not None, durable is not None)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the upstream; what is durable stays durable. Idempotent."""
        self._is_open = False
        self._upstream.close()
