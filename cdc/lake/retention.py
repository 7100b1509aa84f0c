"""What a changelog lets go of: objects whose newest row was committed longer ago than is wanted.

Guarantees:
- An object goes whole, and only when every row of it is old enough; it leaves by one commit that removes nothing else
  (`dataChange` true: rows are gone, and whoever follows the table is to know). Its bytes stay until the vacuum.
- What `current` has not merged stays (`held`).
- The commit says up to which version objects have gone (token `trimmed`), so that whoever would build `current` anew of
  what is left knows that it is not all there was (cdc.lake.current).

It does not decide when (cdc.upkeep), and knows nothing of runs under way: not to be called while there is one.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Final

from cdc.failpoints import failpoint
from cdc.lake.commits import LEASE, TRIMMED
from cdc.lake.delta import DeltaLog, LiveFile
from cdc.lake.layout import PARTITION_KEY, date_column

_DAY_S: Final = 86_400.0


def commit_date(delta: DeltaLog) -> str | None:
    """The partition column of a changelog that holds the date of the commit; None if it holds another time's, or did:
    a row that is late by years has been committed today."""
    if PARTITION_KEY in delta.configuration():
        return None
    return date_column(delta.partition_columns())


def newest_s(file: LiveFile, date: str | None) -> float:
    """Unix time that no row of an object was committed after. `date`: the partition column of commit dates, if any.

    Rows land behind their commit, so the object's own age is a bound; of one that was joined later, the end of its day.
    """
    landed = file.added_ms / 1000
    with suppress(ValueError, TypeError):
        day = dt.date.fromisoformat(str(file.partition.get(date or "")))
        return min(landed, dt.datetime(day.year, day.month, day.day, tzinfo=dt.UTC).timestamp() + _DAY_S)
    return landed


def expired(files: Sequence[LiveFile], held: Collection[str], date: str | None, before_s: float) -> list[LiveFile]:
    """Those whose rows were all committed before a Unix time, and that nobody holds."""
    return [f for f in files if f.path not in held and newest_s(f, date) < before_s]


def let_go(delta: DeltaLog, version: int, files: Sequence[LiveFile], *, fence: int = 0) -> int:
    """Take objects of a version out of the table (`expired`); how many. Blocking; durable on return.

    `fence`: of the lease, 0 without one. StoreConflict if another writer took one of them away meanwhile.
    """
    if not files:
        return 0
    failpoint("retain.before_commit")
    delta.commit(removes=[f.path for f in files], tokens={TRIMMED: version, **({LEASE: fence} if fence else {})})
    failpoint("retain.after_commit")
    return len(files)


__all__ = ["commit_date", "expired", "let_go", "newest_s"]
