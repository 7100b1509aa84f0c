"""Limits on what a plan may do by itself: mass deletes, mass changes, an empty result, mass rejects, a changed target.

A plan over a limit is held until somebody approves it, before anything of it is sent. Shares are taken of the rows that
the target has acknowledged, and count only for plans that are not small, so that a table of five rows can change. What
an operator ordered by name is not questioned again: rows that a resync sends anew are no changes. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from cdc.config_serving import GuardConfig
from cdc.plan import Counts

SMALL_DELETES, SMALL_CHANGES, SMALL_REJECTS = 10, 100, 10
"""Up to so many rows no share is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trip:
    """A limit that a plan is over: its key in `[sync.NAME.guard]`, and what is the matter in words."""

    limit: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LastRun:
    """What the guard remembers of the run before: rows it wrote and rows that were rejected, and the target's shape."""

    written: int = 0
    rejected: int = 0
    rows: int = 0
    """Of its result."""
    shape: str = ""


def trips(guard: GuardConfig, counts: Counts, last: LastRun, shape: str) -> list[Trip]:
    """The limits that a plan with these counts is over; empty if it may go."""
    found = []

    def over(limit: str, text: str) -> None:
        found.append(Trip(limit=limit, text=text))

    known = counts.acknowledged
    if counts.rows == counts.held and counts.deletes and not guard.allow_empty:
        over("allow_empty", f"the result has no row to keep, while the target has {known:,} of it")
    if counts.deletes > guard.max_delete_rows:
        over("max_delete_rows", f"it deletes {counts.deletes:,} rows, more than {guard.max_delete_rows:,}")
    if counts.deletes > max(SMALL_DELETES, guard.max_delete_share * known):
        over("max_delete_share", f"it deletes {_share(counts.deletes, known)} of {known:,} rows")
    if counts.updates > max(SMALL_CHANGES, guard.max_change_share * known) and known:
        over("max_change_share", f"it changes {_share(counts.updates, known)} of {known:,} rows")
    # A few bad rows are tried again at every run, most of which write little else.
    tried = max(last.written + last.rejected, last.rows)
    if last.rejected > max(SMALL_REJECTS, guard.max_reject_share * tried):
        over("max_reject_share", f"the target rejected {last.rejected:,} of the last run's {tried:,} rows")
    if last.shape and shape and last.shape != shape and not guard.allow_drift:
        over("allow_drift", "the columns that it writes to have changed at the target since the last run")
    return found


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %" if whole else "all"
