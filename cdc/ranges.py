"""The ranges that a whole run reads side by side, and how far each is: what of its details that is.

A place is a tuple of texts that the reader gave and understands: a key, or a block. Nothing here compares places.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from cdc.ports import Plan
from cdc.runs import Run

Place = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """`at`: where to go on (None: at the first row). `to`: where it ends (None: at the last row)."""

    at: Place | None
    to: Place | None
    done: bool = False


def details_of(plan: Plan) -> dict[str, Any]:
    """A plan as details of its run."""
    ranges = [[_listed(at), _listed(to), False] for at, to in plan.ranges]
    return {"strategy": plan.strategy, "chosen": plan.why, "ranges": ranges}


def ranges_of(run: Run) -> list[Range]:
    """The ranges of a run; one that was never planned has one."""
    listed = run.details.get("ranges")
    if listed is None:
        return [Range(tuple(run.last_key) if run.last_key else None, None)]
    return [Range(_tuple(at), _tuple(to), done) for at, to, done in listed]


def first_free(run: Run, taken: Collection[int]) -> int | None:
    """The first range that is not done and not `taken`."""
    return next((i for i, r in enumerate(ranges_of(run)) if not r.done and i not in taken), None)


def advanced(run: Run, number: int, at: Place | None, done: bool) -> tuple[dict[str, Any], bool]:
    """The run's details when a range has come to `at`, and whether nothing is left then."""
    if "ranges" not in run.details:
        return {}, done
    ranges = [list(r) for r in run.details["ranges"]]
    ranges[number] = [_listed(at) or ranges[number][0], ranges[number][1], done]
    return {"ranges": ranges}, all(r[2] for r in ranges)


def _listed(place: Place | None) -> list[str] | None:
    return None if place is None else list(place)


def _tuple(place: list[str] | None) -> Place | None:
    return None if place is None else tuple(place)
