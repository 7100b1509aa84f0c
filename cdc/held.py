"""A plan that waits for somebody's approval: its files, as they were when it was held, and the fact about it.

It stays until it is sent, replaced or dropped; a restart keeps it. A plan of another definition than the sync has now
is none: what was shown is not what would be sent. The fact is written behind the files, so what it names is whole.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cdc.condition import held_fact
from cdc.guarding import Trip
from cdc.plan import Plan, load
from cdc.sink import Assignment
from cdc.state import State


def held_folder(directory: Path, sync: str) -> Path:
    """Where the files of a sync's held plan are, below the folder of all syncs."""
    return directory / sync / "held"


class Held:
    """Of one sync. Used by one thread."""

    def __init__(self, sync: str, state: State, directory: Path) -> None:
        self._sync = sync
        self._state = state
        self._folder = held_folder(directory, sync)

    @property
    def fact(self) -> dict[str, Any] | None:
        """{plan, since (Unix s), counts, held_by, approved, definition}, or None if no plan is held."""
        return self._state.get(held_fact(self._sync)) if self._folder.is_dir() else None

    @property
    def approved(self) -> bool:
        """Whether it may be sent."""
        fact = self.fact
        return fact is not None and bool(fact["approved"])

    def keep(self, plan: Plan, trips: Sequence[Trip], definition: str) -> Plan:
        """Hold this plan, in place of one that is held; one without `trips` waits for others of its group only."""
        moved = plan.moved(self._folder)
        fact = {
            "plan": plan.id, "since": time.time(), "counts": asdict(plan.counts), "held_by": [asdict(t) for t in trips],
            "approved": not trips, "definition": definition,
        }  # fmt: skip
        self._state.set(held_fact(self._sync), fact)
        return moved

    def approve(self, plan: str) -> bool:
        """Whether that plan is the one that is held; it may be sent then."""
        fact = self.fact
        if fact is None or fact["plan"] != plan:
            return False
        self._state.set(held_fact(self._sync), {**fact, "approved": True})
        return True

    def load(self, assignment: Assignment) -> Plan:
        """The plan; ModelFailed if its files are not whole."""
        return load(self._folder, assignment)

    def recover(self, definition: str) -> bool:
        """After a start: whether a plan was held that is none any more (its files are lost, or the sync is defined
        anew). It is dropped."""
        fact = self._state.get(held_fact(self._sync))
        if fact is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            return False
        if self._folder.is_dir() and fact.get("definition") == definition:
            return False
        self.drop()
        return True

    def drop(self) -> bool:
        """Nothing is held any more; whether something was."""
        was = self._state.get(held_fact(self._sync)) is not None
        if was:
            self._state.set(held_fact(self._sync), None)
        shutil.rmtree(self._folder, ignore_errors=True)
        return was
