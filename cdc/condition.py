"""How a sync stands, and who is told: one alert when it changes for the worse, one when it is well again.

Conditions: fine · partial (rows were rejected or held) · failing (runs fail, and are tried again) · held (a plan waits
for approval) · blocked (only the operator can mend it). The condition is a fact of the state database, so a restart
neither repeats nor forgets an alert; losing it repeats one. Failures that pass by themselves are no news until they
come FAILING_AFTER times in a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cdc import metrics
from cdc.state import State

FINE, PARTIAL, FAILING, HELD, BLOCKED = "fine", "partial", "failing", "held", "blocked"
FAILING_AFTER = 3

Alert = Callable[[dict[str, Any]], None]


def condition_fact(sync: str) -> str:
    """Key of the fact: {condition, since (Unix s), text, hint, failures}."""
    return f"sync/{sync}/condition"


def held_fact(sync: str) -> str:
    """Key of the fact about a plan that waits for approval: {plan, since (Unix s), counts, held_by, approved}."""
    return f"sync/{sync}/held"


def waits_fact(sync: str) -> str:
    """Key of the fact about what a sync waits for, in words."""
    return f"sync/{sync}/waits"


class Condition:
    """Of one sync. Used by one thread."""

    def __init__(self, sync: str, state: State, alert: Alert) -> None:
        self._sync = sync
        self._state = state
        self._alert = alert
        metrics.SYNC_HELD.labels(sync).set(float(self.now == HELD))

    @property
    def hint(self) -> str:
        """What was told to do about it."""
        return str(self._fact().get("hint", ""))

    @property
    def now(self) -> str:
        """The condition as it was last told."""
        return str(self._fact()["condition"])

    def failed(self, text: str, hint: str) -> None:
        """A run failed and will be tried again."""
        fact = self._fact()
        failures = fact.get("failures", 0) + 1
        if failures < FAILING_AFTER and fact["condition"] != FAILING:
            self._state.set(condition_fact(self._sync), {**fact, "failures": failures})
        else:
            self.be(FAILING, text, hint)

    def be(self, condition: str, text: str = "", hint: str = "", *, again: bool = False) -> None:
        """From now on it is so; tells if that is new, or (`again`) the same for a new reason."""
        before = self._fact()
        if before["condition"] == condition and not again:
            if before.get("failures"):
                self._state.set(condition_fact(self._sync), {**before, "failures": 0})
            return
        now = time.time()
        self._state.set(
            condition_fact(self._sync),
            {"condition": condition, "since": now, "text": text, "hint": hint, "failures": 0},
        )
        metrics.SYNC_HELD.labels(self._sync).set(float(condition == HELD))
        told: dict[str, Any] = {"alert": "sync", "sync": self._sync, "condition": condition, "was": before["condition"]}
        if condition == FINE:
            told["text"] = f"well again after {now - before['since']:.0f} s"
        else:
            told |= {"text": text, "hint": hint}
        self._alert(told)

    def _fact(self) -> dict[str, Any]:
        return self._state.get(condition_fact(self._sync)) or {"condition": FINE, "since": time.time()}
