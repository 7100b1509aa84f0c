"""When a sync runs: on a schedule, or when others have changed an input; and what it waits for.

A sync runs only on complete inputs: every table that its SQL reads has its first snapshot behind it and stands in a
recorded cut, so that all are read at one position. Changes under our own replication origins do not count, so a sync
that writes into a table that its own model reads comes to rest. It reads the state database and changes nothing there
but through `ran`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from cdc.config_serving import SyncConfig
from cdc.errors import ModelFailed
from cdc.freshness import freshness_fact, lag_seconds
from cdc.relations import named_relations, resolve
from cdc.schedule import Schedule
from cdc.state import State
from cdc.table import TableId

FIRST, CHANGED, SCHEDULE, RESTART, REDEFINED = "first run", "data", "schedule", "restart", "new definition"
UNFINISHED = "unfinished"
"""What an order, or a plan that is not held any more, has left undone."""

Input = tuple[str, TableId]
"""A source's name and one of its tables."""
ChangedByOthers = Mapping[Input, int]
"""Per input, the commit LSN of the last merged change that did not come from one of our own origins; tables that
others have not changed since the daemon started may be missing. It may run ahead of the recorded cut."""


def last_fact(sync: str) -> str:
    """Key of the fact about the last run that came to its end: {definition, started_at (Unix s), cuts, …}."""
    return f"sync/{sync}/last"


class Due:
    """Of one sync. `clock` is monotonic."""

    def __init__(self, config: SyncConfig, sql: str, state: State, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._sql = sql
        self._state = state
        self._clock = clock
        self._schedule = Schedule(cron=config.cron) if config.cron else None
        self._inputs: frozenset[Input] | None = None
        self._seen: dict[str, int] | None = None
        self._due_since: float | None = None

    def inputs(self) -> frozenset[Input] | None:
        """The tables that its SQL reads; None as long as one of them is unknown. ModelFailed if the SQL is wrong."""
        if self._inputs is None:
            relations, unknown = resolve(named_relations(self._sql), known_tables(self._state))
            if unknown:
                return None
            self._inputs = frozenset((r.source, r.table) for r in relations)
        return self._inputs

    def incomplete(self) -> list[str]:
        """What is missing before it can run at all, in words; empty if every input is whole and stands in a cut."""
        inputs = self.inputs()
        if inputs is None:
            names = sorted(f"{schema}.{name}" for schema, name in named_relations(self._sql))
            return [f"not all of {', '.join(names)} are in the lake yet"]
        missing = []
        for source, table in sorted(inputs):
            state = self._state.table(source, table).state
            cut = self._state.cut(source)
            if state != "streaming":
                missing.append(f"{source}.{table} is {state}")
            elif cut is None or table not in cut.versions:
                missing.append(f"{source}.{table} is not merged yet")
        return missing

    def lagging(self) -> list[str]:
        """Inputs that lack changes older than `max_lag_s`, in words; empty if none does, or if there is no bound."""
        bound, now, found = self._config.max_lag_s, time.time(), []
        for source, table in sorted(self.inputs() or ()) if bound else ():
            lag = lag_seconds(self._state.get(freshness_fact(source)), table, now)["merged"] or 0.0
            known = self._state.source(source)
            if known is not None and known.error:
                # Nothing tells what the source has written since it was last heard.
                lag = max(lag, now - known.phase_since / 1e6)
            if lag > bound:
                found.append(f"{source}.{table} is {lag:.0f} s behind, more than max_lag_s = {bound:g}")
        return found

    def cause(self, changed_by_others: ChangedByOthers) -> str | None:
        """Why it is due on the cuts as they are; None if it is not. Does not wait for `debounce_s`."""
        last = self._state.get(last_fact(self._config.name))
        if last is None:
            return FIRST
        if last["definition"] != self.fingerprint():
            return REDEFINED
        if last.get("due"):
            return UNFINISHED
        if self._schedule is not None or self._config.every_s is not None:
            # Wall clock, so that it holds over a restart; a clock that was set back must not silence the sync.
            now, began = time.time(), float(last["started_at"])
            if self._schedule is not None:
                due = now >= self._schedule.next_after(began)
            else:
                due = now - began >= (self._config.every_s or 0.0)
            return SCHEDULE if due or now < began else None
        now_at = self.positions(changed_by_others)
        if self._seen is None:
            if last["cuts"] != self.cut_lsns():
                # What others changed before we started is not known; one run too many writes nothing.
                return RESTART
            self._seen = now_at
        return CHANGED if self._seen != now_at else None

    def debounced(self) -> bool:
        """Whether the change is old enough; a change that follows does not put the run off any further."""
        now = self._clock()
        if self._due_since is None:
            self._due_since = now
        return now - self._due_since >= self._config.debounce_s

    def begins(self) -> None:
        """A run begins: the next change is debounced anew."""
        self._due_since = None

    def stays_due(self) -> None:
        """Something is left undone: a run is due whatever changes."""
        last = self._state.get(last_fact(self._config.name))
        if last is not None:
            self._state.set(last_fact(self._config.name), {**last, "due": True})

    def ran(self, positions: dict[str, int], last: Mapping[str, Any]) -> None:
        """A run that had read its inputs at these positions came to its end; `last` is the fact about it."""
        self._state.set(last_fact(self._config.name), dict(last))
        self._seen = positions

    def positions(self, changed_by_others: ChangedByOthers, cuts: Mapping[str, int] | None = None) -> dict[str, int]:
        """What others have changed, as far as the cuts hold it (their LSNs by source; left out, those of now)."""
        cuts = self.cut_lsns() if cuts is None else cuts
        return {
            f"{source}.{table}": min(changed_by_others[source, table], cuts[source])
            for source, table in sorted(self.inputs() or ())
            if (source, table) in changed_by_others and source in cuts
        }

    def cut_lsns(self) -> dict[str, int]:
        """Position of the recorded cut of each source that it reads."""
        cuts = {source: self._state.cut(source) for source in sorted({source for source, _ in self.inputs() or ()})}
        return {source: cut.lsn for source, cut in cuts.items() if cut is not None}

    def fingerprint(self) -> str:
        """Changes when the sync is defined anew."""
        config = self._config
        content: list[Any] = [self._sql, config.target, config.table, list(config.key), config.mode]
        for more in (sorted(config.columns.items()), config.keep, config.fill, config.request, config.delete_request):
            if more:
                content.append(repr(more))
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def known_tables(state: State) -> dict[str, list[TableId]]:
    """The tables of each source that the lake has, those that are gone left out."""
    found: dict[str, list[TableId]] = {}
    for table in state.tables():
        if table.state != "removed":
            found.setdefault(table.source, []).append(table.table)
    return found


def require_complete(sync: str, due: Due) -> None:
    """ModelFailed unless the sync could run now."""
    missing = due.incomplete()
    if missing:
        raise ModelFailed(
            f"sync {sync} cannot run: {'; '.join(missing)}", hint="`cdc status` shows how far the snapshots are"
        )
