"""What the demo asks of its shop: a throw-away database with data, traffic, and a table that takes results back.

Implementations are found through the entry point group `cdc.demos`; one is made with the folder that it may use and
does nothing before `start`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Protocol


class Done(Protocol):
    """What the traffic has done so far: transactions in all, and by kind."""

    @property
    def transactions(self) -> int: ...
    @property
    def kinds(self) -> Mapping[str, int]: ...


class Traffic(Protocol):
    """Live changes by a thread of its own, from `start` to `stop`."""

    error: Exception | None
    """Why it ended by itself, if it did."""

    def start(self) -> None: ...
    def stop(self) -> None:
        """Bounded, idempotent."""

    def done(self) -> Done:
        """Thread-safe."""


class Shop(Protocol):
    """A database server of our own. Methods block; `row_counts` may be called from any thread."""

    tables: Sequence[str]
    """Its tables, as schema.table."""
    scores_table: str
    """The one of them that takes results."""
    column_added: str
    """What `add_column` adds, as schema.table.column."""

    @property
    def title(self) -> str:
        """What it is, for people."""

    def start(self, checkpoint: Callable[[], None]) -> Mapping[str, int]:
        """Start the server and load it; rows per table. Calls `checkpoint` between its steps, which may raise."""

    def connection_keys(self, role: str) -> Mapping[str, str]:
        """Keys of a configuration's section that lead here, for `role` "source" or "target"."""

    def row_counts(self) -> Mapping[str, int]:
        """Rows of every table, at one moment."""

    def scores(self) -> Mapping[int, tuple[int, Decimal]]:
        """What has been pushed back: orders and value per customer."""

    def add_column(self) -> str:
        """Add a column in the middle of the traffic, which uses it from then on; the statement."""

    def traffic(self) -> Traffic:
        """New traffic, not started."""

    def session_command(self) -> str:
        """A shell command that opens a session while the server runs."""

    def stop(self) -> None:
        """End traffic and server; bounded, idempotent."""

    def remove(self) -> None:
        """Stop, and delete the server's data, also those of an earlier process."""


ShopFactory = Callable[[Path], Shop]
