"""What is ordered of a sync, and what one run of it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cdc.guarding import Trip
from cdc.sink import Rejected

DONE, STOPPED, INTERRUPTED, FAILED = "done", "stopped", "interrupted", "failed"
REPORTED, UNCONFIRMED = "reported", "unconfirmed"
"""Outcomes beside `partial` and `held`, which are conditions too. partial: rows were held or rejected, the others went
through. held: a guard holds the plan, nothing was sent. stopped: between two batches, on shutdown. interrupted: the
daemon died in it. reported: a reconcile that only looked. unconfirmed: it would delete, and nobody said --yes."""
APPLY, APPROVE, RETRY, RESYNC, RECONCILE = "apply", "approve", "retry", "resync", "reconcile"
REPORT, SOURCE, TARGET = "report", "source", "target"
"""Policies of a reconcile: look only; the source wins; the target wins."""

_REASONS_SHOWN, _KEYS_SHOWN = 3, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What an operator wants of a sync."""

    kind: str = APPLY
    sync: str
    plan: str = ""
    """Of an approval."""
    yes: bool = False
    policy: str = REPORT


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncRun:
    """What one run did. `counts`: those of the plan, and written, deleted, rejected, absent."""

    sync: str
    cause: str
    outcome: str
    run: str = ""
    plan: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    trips: tuple[Trip, ...] = ()
    drift: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """For operators: counts, keys and reasons; never values."""
        return {
            "sync": self.sync, "run": self.run, "cause": self.cause, "outcome": self.outcome, "plan": self.plan,
            "counts": self.counts, "held_by": [{"limit": t.limit, "text": t.text} for t in self.trips],
            "drift": self.drift, "error": self.error,
        }  # fmt: skip


def held_text(held: int, samples: Sequence[tuple[str, str]]) -> str:
    """How many rows were held, and some of their keys."""
    if not held:
        return ""
    shown = ", ".join(f"{key} ({reason})" for key, reason in samples[:_KEYS_SHOWN])
    return f"{held} rows held: {shown}{', …' if len(samples) > _KEYS_SHOWN else ''}"


def rejected_text(rejected: Sequence[Rejected], count: int) -> str:
    """By reason: how many, and some of their keys."""
    by_reason: dict[str, list[str]] = {}
    for each in rejected:
        by_reason.setdefault(each.reason, []).append(each.key)
    parts = []
    for reason, keys in sorted(by_reason.items(), key=lambda item: -len(item[1]))[:_REASONS_SHOWN]:
        more = ", …" if len(keys) > _KEYS_SHOWN else ""
        number = count if len(by_reason) == 1 else len(keys)
        parts.append(f"{number} rows rejected by the target: {reason}: {', '.join(keys[:_KEYS_SHOWN])}{more}")
    return "; ".join(parts)
