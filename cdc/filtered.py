"""How a filtered resync goes through its rows: what is read next, and what is true once that is appended (rule 14).

Three phases, in this order: `where`, the rows that the filter names, in chunks of the key's order; `lake`, keys of the
lake that may not belong to it any more (cdc.candidates); `keys`, those that the operator named. What is looked up by
key is written if the source has it and ends in the lake if not. Which rows are where is decided by Postgres alone. The
run's details say how far it is, so it goes on after a restart; the keys of the phase `lake` are asked for anew then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cdc.appending import Step
from cdc.candidates import Candidates
from cdc.ports import RowsRead
from cdc.reading import Piece
from cdc.runs import Run

Key = tuple[str, ...]
KEYS_PER_CHUNK = 1000

Look = Callable[[], Candidates | None]
"""The candidates of a run now; None until the lake holds what the run has written."""


@dataclass(slots=True)
class FilteredRun:
    """One run's way, in this process."""

    looked_up: set[Key] = field(default_factory=set)
    waiting: list[Key] = field(default_factory=list)

    def next(self, run: Run, look: Look, rows_max: int) -> Piece | None:
        """The next piece; None if the lake has to be waited for."""
        phase = run.details.get("phase") or ("where" if run.where_sql else "keys")
        if phase == "where":
            return self._by_filter(run, rows_max)
        if phase == "lake":
            found = self._candidates(look)
            if found is None:
                return None
            if self.waiting:
                return self._some(self.waiting[:KEYS_PER_CHUNK], self._taken, done=False, details={})
            if not run.details.get("keys"):
                return self._some([], lambda: None, done=True, details={"phase": "end", "note": found})
            return self._named(run, {"note": found})
        return self._named(run, {})

    def _by_filter(self, run: Run, rows_max: int) -> Piece:
        def step(rows: RowsRead) -> Step:
            phase = {"phase": "lake"} if rows.done else {"phase": "where"}
            return Step(done=False, last_key=rows.last_key, details=phase)

        after = tuple(run.last_key) if run.last_key else None
        return Piece({"after": after, "rows_max": rows_max, "where": run.where_sql}, step)

    def _candidates(self, look: Look) -> str | None:
        """Fill `waiting`; what is to be said of the look if there is nothing left, None if it must wait."""
        if self.waiting:
            return ""
        found = look()
        if found is None:
            return None
        # A key that was written since and is still found cannot be told apart from one that was not: once is enough.
        self.waiting = [key for key in found.keys if key not in self.looked_up]
        return found.note

    def _taken(self) -> None:
        self.looked_up.update(self.waiting[:KEYS_PER_CHUNK])
        del self.waiting[:KEYS_PER_CHUNK]

    def _named(self, run: Run, details: dict[str, Any]) -> Piece:
        keys: list[Key] = [tuple(key) for key in run.details.get("keys") or ()]
        at = int(run.details.get("key_no", 0))
        some = keys[at : at + KEYS_PER_CHUNK]
        done = at + len(some) >= len(keys)
        details = {**details, "phase": "keys", "key_no": at + len(some)}
        return self._some(some, lambda: None, done=done, details=details)

    def _some(self, keys: Sequence[Key], taken: Callable[[], None], *, done: bool, details: dict[str, Any]) -> Piece:
        def step(rows: RowsRead) -> Step:
            return Step(done=done, asked=keys, details=details, appended=taken)

        return Piece({"keys": keys}, step)
