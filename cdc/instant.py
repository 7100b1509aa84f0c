"""What a query over fresh views reads: of every table `current` and the tail of its changelog, at one instant.

All tables of a source are read up to one landed cut, so that a query joins what belongs together: the newest that the
daemon's state says has landed, or that some `current` has merged already. Without that state (it is a cache, and may be
lost, or of another day) each table is read up to its own newest version. A table whose tail cannot be shown exactly is
shown as it is merged, which may be an older instant, and the reason comes with it. `current` is always looked at before
its changelog, so what is between the two is never missed; and objects of `current` are asked for when the instant is
settled: their versions stay readable for as long as a vacuum leaves them, whatever is merged then. It reads, and runs
no SQL.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from cdc.errors import CdcError, IdentityMissing, KeyChanged, ModelFailed, SchemaConflict, StoreUnavailable
from cdc.fresh import Inexact, fresh_sql
from cdc.lake.changelog import ChangelogTable
from cdc.lake.commits import HistoryGone
from cdc.lake.current import MERGED, CurrentTable
from cdc.lake.delta import DeltaLog
from cdc.lake.layout import current_path
from cdc.lake.tail import look_through
from cdc.ports import ObjectStore
from cdc.schema import SchemaBook, same_shape
from cdc.sqltext import objects
from cdc.state import State
from cdc.table import TableId, TableSchema

_ATTEMPTS = 5

Position = tuple[int, int]
"""Epoch and commit LSN."""
Where = Callable[[str], str]
"""Key of an object → where DuckDB finds it."""


class NoInstant(StoreUnavailable):
    """What is to be read changes or goes away each time it is looked at: enough tries have been made."""


class Shown(NamedTuple):
    """A table at an instant: the SELECT, and the Delta versions that it stands for (None: no part of it). `note`: in
    what it is not what has landed up to the instant, as "is shown as it is merged: …"; empty if it is."""

    sql: str
    current: int | None
    changelog: int | None
    note: str = ""


class Instant(NamedTuple):
    """Tables of a source as they were at `until` (None: each at its newest, nobody knows of a common position)."""

    tables: dict[TableId, Shown]
    until: Position | None


class Known(Protocol):
    """What is known of the tables beside their objects."""

    def schema(self, source: str, changelog: ChangelogTable) -> TableSchema | None:
        """The shape that the lake has taken up to where it has landed, or a newer one; None if nobody knows."""

    def landed(self, source: str) -> Position | None:
        """The newest position at which all changelogs of the source stand; None if nobody knows."""

    def apart(self, source: str, table: TableId) -> str:
        """In what the table's changelog is not of that position, as "is stopped: …"; empty if it is."""


def in_part_fact(source: str) -> str:
    """Name of the fact that holds the position (epoch, LSN) up to which a periodic run may have landed in part only."""
    return f"in_part:{source}"


class KnownByState:
    """By the daemon's state, or if there is none (None) by what the changelogs themselves say."""

    def __init__(self, state: State | None) -> None:
        self._state = state

    def schema(self, source: str, changelog: ChangelogTable) -> TableSchema | None:
        announced, table = changelog.shape(), changelog.table
        if self._state is not None:
            book = SchemaBook(self._state, source)
            found = book.held(table) or book.latest(table)
            if found is not None and (announced is None or not _is_ahead(*announced, book)):
                return found
        return None if announced is None else announced[0]

    def landed(self, source: str) -> Position | None:
        saved = None if self._state is None else self._state.checkpoint("land", source)
        return (saved["epoch"], saved["lsn"]) if saved is not None and "lsn" in saved else None

    def apart(self, source: str, table: TableId) -> str:
        if self._state is None:
            return ""
        known = self._state.table(source, table)
        if known.state == "stopped":
            return f"is stopped, and stands where it did then: {known.reason}"
        if known.state == "removed":
            return "is not followed any more, and stands where it did then"
        if self._state.is_paused("table", f"{source}/{table}"):
            return "is paused, and stands where it did then"
        landed, in_part = self.landed(source), self._state.get(in_part_fact(source))
        if landed is not None and in_part is not None and landed <= tuple(in_part):
            return "is in the middle of a run, which may have landed in part only"
        return ""

    def cut(self, source: str) -> Mapping[TableId, int]:
        """The versions of `current` that were recorded together last; empty if nobody knows."""
        found = None if self._state is None else self._state.cut(source)
        return {} if found is None else found.versions


def _is_ahead(announced: TableSchema, number: int, book: SchemaBook) -> bool:
    """Whether the lake has taken a shape that the book has not heard of: another daemon's, after a move."""
    noted = book.announced(announced.table)
    if noted is not None and number > noted:
        return True
    return not any(same_shape(announced, version) for version in book.versions(announced.table))


def fresh_views(
    store: ObjectStore,
    source: str,
    tables: Collection[TableId],
    known: Known,
    where: Where,
    local: Where,
    *,
    temp_dir: Path,
) -> Instant:
    """The tables of one source at one instant. `local`: key of an object → a file of it that can be opened here.

    `where` is asked when it is settled which objects are to be read, and not before. ModelFailed for a table that shows
    nothing yet, NoInstant if what is to be read keeps going away.
    """
    views = [_View(store, source, table, where, local, temp_dir) for table in tables]
    gone: StoreUnavailable | None = None
    for _ in range(_ATTEMPTS):
        try:
            positions = [view.current.position() for view in views]
            until = known.landed(source)
            if until is not None:
                until = max(until, *positions)
            seen = {view.table: view.look(known, until) for view in views}
            # A merge of a later cut came between, and its table cannot be shown but as it is merged.
            if until is not None and any(found.position > until for found in seen.values()):
                continue
            return Instant({t: found.shown(known.apart(source, t)) for t, found in seen.items()}, until)
        except StoreUnavailable as e:
            gone = e
    if gone is not None:
        raise NoInstant(gone.args[0], hint=gone.hint) from gone
    raise NoInstant(f"the tables of {source} change faster than they can be looked at", hint="ask again")


def merged_view(store: ObjectStore, source: str, table: TableId, where: Where, version: int | None = None) -> Shown:
    """A table as a version of its `current` (None: the newest) shows it. ModelFailed if it shows nothing yet."""
    delta, version, through = _merged_version(store, source, table, version)
    return Shown(_objects(delta, version, where), version, through)


def _merged_version(store: ObjectStore, source: str, table: TableId, version: int | None) -> tuple[DeltaLog, int, int]:
    """A version of `current`, and the changelog's version that it holds."""
    delta = DeltaLog(store, current_path(source, table))
    hint = "`cdc status` shows how far its snapshot is"
    if not delta.exists():
        raise ModelFailed(f"{source}.{table} is not in the lake yet", hint=hint)
    version = delta.version() if version is None else version
    through = delta.token(MERGED, version)
    if through is None:
        raise ModelFailed(f"{source}.{table} shows nothing yet", hint=hint)
    return delta, version, through


def _objects(delta: DeltaLog, version: int, where: Where) -> str:
    return objects(delta.schema(version), [where(f"{delta.prefix}/{file.path}") for file in delta.files(version)])


class _Seen(NamedTuple):
    """A table that was looked at: what a view of it stands for, and how its SELECT is written."""

    current: int | None
    changelog: int
    position: Position
    sql: Callable[[], str]
    why_merged: str = ""

    def shown(self, apart: str) -> Shown:
        merged = f"is shown as it is merged: {self.why_merged}" if self.why_merged else ""
        return Shown(self.sql(), self.current, self.changelog, "; ".join(filter(None, (merged, apart))))


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

    def look(self, known: Known, until: Position | None) -> _Seen:
        """The table up to a position, or as it is merged, which may be behind it."""
        try:
            return self._fresh(known, until)
        except (Inexact, KeyChanged, IdentityMissing, SchemaConflict, HistoryGone) as e:
            return self._merged(e)

    def _fresh(self, known: Known, until: Position | None) -> _Seen:
        newest = self._changes.refresh()
        if newest < 0:
            return self._merged()
        # A shape is announced before its rows: none up to this version has a newer one.
        schema = known.schema(self._source, self._changes)
        if schema is None:
            raise Inexact("nobody has noted its columns")
        through = newest if until is None else self.current.landed_until(until)
        outlook = self.current.outlook(schema, through=through, open_changelog=self._open)
        if outlook is None:
            return self._merged()
        tail = look_through(outlook, self._open)
        # Once without places: what cannot be written is refused before anything is copied for it.
        fresh_sql(outlook, tail, str, str)
        below, behind = current_path(self._source, self.table), self._changes.path

        def sql() -> str:
            return fresh_sql(
                outlook, tail, lambda path: self._where(f"{below}/{path}"), lambda path: self._where(f"{behind}/{path}")
            )

        return _Seen(outlook.version, outlook.through, self.current.position(outlook.through), sql)

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._local(f"{self._changes.path}/{path}"))
        except (OSError, pa.ArrowException) as e:
            raise StoreUnavailable(f"{path} cannot be read: {type(e).__name__}", hint="ask again") from e

    def _merged(self, why: CdcError | None = None) -> _Seen:
        try:
            delta, version, through = _merged_version(self._store, self._source, self.table, None)
        except ModelFailed as e:
            if why is None:
                raise
            raise ModelFailed(f"{e.args[0]}: {why.args[0]}", hint=why.hint or e.hint) from why
        return _Seen(
            version,
            through,
            self.current.position(through),
            lambda: _objects(delta, version, self._where),
            "" if why is None else why.args[0],
        )


__all__ = [
    "Instant",
    "Known",
    "KnownByState",
    "NoInstant",
    "Position",
    "Shown",
    "Where",
    "fresh_views",
    "in_part_fact",
    "merged_view",
]
