"""What a query over fresh views reads: of every table `current` and the tail of its changelog, at one instant.

All tables of a source are read up to one landed cut, so that a query joins what belongs together: the newest that the
daemon's state says has landed, or that some `current` has merged already. Without that state (it is a cache, and may be
lost) each table is read up to its own newest version. A table whose tail cannot be shown exactly is shown as it is
merged, which may be an older instant, and the reason comes with it. `current` is always looked at before its changelog,
so what is between the two is never missed. It reads, and runs no SQL.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from cdc.errors import IdentityMissing, KeyChanged, ModelFailed, SchemaConflict, StoreUnavailable
from cdc.fresh import Inexact, fresh_sql
from cdc.lake.changelog import ChangelogTable
from cdc.lake.commits import HistoryGone
from cdc.lake.current import MERGED, CurrentTable
from cdc.lake.delta import DeltaLog
from cdc.lake.layout import current_path
from cdc.lake.tail import look_through
from cdc.ports import ObjectStore
from cdc.schema import SchemaBook
from cdc.sqltext import objects
from cdc.state import State
from cdc.table import TableId, TableSchema

_ATTEMPTS = 5

Position = tuple[int, int]
"""Epoch and commit LSN."""
Where = Callable[[str], str]
"""Key of an object → where DuckDB finds it."""


class Shown(NamedTuple):
    """A table at an instant: the SELECT, and the Delta versions that it stands for (None: no part of it). `note`: why
    changes that have landed are not in it, empty if all are."""

    sql: str
    current: int | None
    changelog: int | None
    note: str = ""


class Known(Protocol):
    """What is known of the tables beside their objects."""

    def schema(self, source: str, table: TableId) -> TableSchema | None:
        """The shape that the lake has taken up to where it has landed; None if nobody knows."""

    def landed(self, source: str) -> Position | None:
        """The newest position at which all changelogs of the source stand; None if nobody knows."""


class KnownByState:
    """By the daemon's state, or if there is none (None) by what the changelogs themselves say."""

    def __init__(self, store: ObjectStore, state: State | None) -> None:
        self._store = store
        self._state = state

    def schema(self, source: str, table: TableId) -> TableSchema | None:
        if self._state is not None:
            book = SchemaBook(self._state, source)
            found = book.held(table) or book.latest(table)
            if found is not None:
                return found
        noted = ChangelogTable(self._store, source, table).shape()
        return None if noted is None else noted[0]

    def landed(self, source: str) -> Position | None:
        saved = None if self._state is None else self._state.checkpoint("land", source)
        return (saved["epoch"], saved["lsn"]) if saved is not None and "lsn" in saved else None


def fresh_views(
    store: ObjectStore,
    source: str,
    tables: Collection[TableId],
    known: Known,
    where: Where,
    local: Where,
    *,
    temp_dir: Path,
) -> dict[TableId, Shown]:
    """The tables of one source at one instant. `local`: key of an object → a file of it that can be opened here.

    ModelFailed for a table that shows nothing yet, StoreUnavailable if what is to be read keeps going away.
    """
    views = [_View(store, source, table, where, local, temp_dir) for table in tables]
    for attempt in range(_ATTEMPTS):
        positions = [view.current.position() for view in views]
        until = known.landed(source)
        if until is not None:
            until = max(until, *positions)
        found = {
            view.table: view.shown(known.schema(source, view.table), until, last=attempt + 1 == _ATTEMPTS)
            for view in views
        }
        # A merge that came between may be of a later cut: then the tables are not of one instant.
        late = until is not None and any(view.current.position() > until for view in views)
        if not late and None not in found.values():
            return {table: shown for table, shown in found.items() if shown is not None}
    raise StoreUnavailable(f"the tables of {source} change faster than they can be looked at", hint="ask again")


def merged_view(store: ObjectStore, source: str, table: TableId, where: Where, version: int | None = None) -> Shown:
    """A table as a version of its `current` (None: the newest) shows it. ModelFailed if it shows nothing yet."""
    delta = DeltaLog(store, current_path(source, table))
    if not delta.exists():
        raise ModelFailed(f"{source}.{table} is not in the lake yet", hint="`cdc status` shows how far its snapshot is")
    files = [where(f"{delta.prefix}/{file.path}") for file in delta.files(version)]
    version = delta.version() if version is None else version
    return Shown(objects(delta.schema(version), files), version, delta.token(MERGED, version))


class _View:
    """One table on its way to a view."""

    def __init__(
        self, store: ObjectStore, source: str, table: TableId, where: Where, local: Where, temp_dir: Path
    ) -> None:
        self._store = store
        self._source = source
        self.table = table
        self.current = CurrentTable(store, source, table, temp_dir=temp_dir)
        self._changes = ChangelogTable(store, source, table)
        self._where = where
        self._local = local

    def shown(self, schema: TableSchema | None, until: Position | None, *, last: bool) -> Shown | None:
        """The table up to a position, or as it is merged; None if what is to be read has gone, and this is not the last
        attempt."""
        try:
            return self._fresh(schema, until)
        except (Inexact, KeyChanged, IdentityMissing, SchemaConflict) as e:
            return self._merged(e.args[0])
        except (HistoryGone, StoreUnavailable) as e:
            if not last:
                return None
            if isinstance(e, StoreUnavailable):
                raise
            return self._merged(e.args[0])

    def _fresh(self, schema: TableSchema | None, until: Position | None) -> Shown:
        if not self._changes.exists():
            return self._merged()
        if schema is None:
            raise Inexact("nobody has noted its columns")
        through = None if until is None else self.current.landed_until(until)
        outlook = self.current.outlook(schema, through=through, open_changelog=self._open)
        if outlook is None:
            return self._merged()
        tail = look_through(outlook, self._open)
        below, behind = current_path(self._source, self.table), self._changes.path
        sql = fresh_sql(
            outlook, tail, lambda path: self._where(f"{below}/{path}"), lambda path: self._where(f"{behind}/{path}")
        )
        return Shown(sql, outlook.version, outlook.through)

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._local(f"{self._changes.path}/{path}"))
        except (OSError, pa.ArrowException) as e:
            raise StoreUnavailable(f"{path} cannot be read: {type(e).__name__}", hint="ask again") from e

    def _merged(self, note: str = "") -> Shown:
        return merged_view(self._store, self._source, self.table, self._where)._replace(note=note)


__all__ = ["Known", "KnownByState", "Position", "Shown", "Where", "fresh_views", "merged_view"]
