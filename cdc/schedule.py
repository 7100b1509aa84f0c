"""When a periodic run is due: by an interval, or by a cron expression in UTC.

A pure function of when the last run began: a run that was missed, or many, are due once. It keeps no state, starts
nothing, and knows nothing of runs that are under way.
"""

from __future__ import annotations

import datetime as dt

from cronsim import CronSim, CronSimError

from cdc.units import duration_s


class Schedule:
    """Exactly one of `every` ("15m") and `cron` (five fields). ValueError if it is none."""

    def __init__(self, *, every: str = "", cron: str = "") -> None:
        self._cron = cron
        self._every_s = 0.0 if cron else duration_s(every)
        self.text = f"cron {cron}" if cron else f"every {every}"
        if cron:
            try:
                # A date that never comes is found by asking for it.
                next(CronSim(cron, dt.datetime(2000, 1, 1, tzinfo=dt.UTC)))
            except (CronSimError, StopIteration) as error:
                reason = str(error) or "it never comes"
                raise ValueError(f'"{cron}" is no cron expression of five fields: {reason}') from None

    def next_after(self, began_s: float) -> float:
        """When the next run is due (Unix seconds) after one that began then; 0: none ever began, it is due now."""
        if not began_s:
            return 0.0
        if not self._cron:
            return began_s + self._every_s
        return next(CronSim(self._cron, dt.datetime.fromtimestamp(began_s, dt.UTC))).timestamp()
