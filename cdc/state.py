"""The durable state of one daemon: facts, sources, tables, pauses, checkpoints, cuts, and (cdc.runs) what was ordered.

One SQLite file (cdc.database) that also holds the index of the event log, so that positions, checkpoints and chunk
progress change in the same transaction as what they speak of. Every change is durable on return, or with the
transaction passed as `tx`. Values come out as frozen dataclasses; times are microseconds since 1970, 0 for unknown.
A source's logged position is written by the event log alone. With `confirm_after = "landed"` all of it is a cache.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdc.database import FORMAT, check_fields, now_us, to_json
from cdc.errors import InvariantBroken
from cdc.runs import HistoryEntry, Request, Run, Runs
from cdc.table import TableId

TABLE_STATES = ("new", "snapshotting", "streaming", "stopped", "removed")
PAUSE_KINDS = ("source", "table", "sink", "sync")
STATE_FILE = "state.db"
"""Name of the database inside `state_dir`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceState:
    """A source. (`epoch`, `lsn`, `end_lsn`) is the logged position if `positioned`; `head_lsn` the server's position
    and `committed_at` the commit time of the newest transaction when something was last appended."""

    name: str
    positioned: bool = False
    epoch: int = 0
    lsn: int = 0
    end_lsn: int = 0
    head_lsn: int = 0
    received_lsn: int = 0
    confirmed_lsn: int = 0
    committed_at: int = 0
    identity: dict[str, Any] | None = None
    phase: str = ""
    phase_since: int = 0
    error: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableState:
    """A table: its `state` of TABLE_STATES, why, what mends it, and how far each step is.

    `snapshot_seq` is the counter behind `_seq` of the rows that snapshots append; it never goes back.
    """

    source: str
    table: TableId
    oid: int = 0
    state: str = "new"
    reason: str = ""
    hint: str = ""
    rows: int = 0
    last_change_us: int = 0
    snapshot_seq: int = 0
    landed_lsn: int = 0
    current_lsn: int = 0
    state_since: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The last position at which all tables of a source were merged together, and their `current` Delta versions."""

    source: str
    lsn: int
    at_us: int
    versions: dict[TableId, int]


_SOURCE = (
    "name, positioned, epoch, lsn, end_lsn, head_lsn, received_lsn, confirmed_lsn, committed_at, identity, phase, "
    "phase_since, error, hint"
)
_SOURCE_FIELDS = frozenset(("received_lsn", "confirmed_lsn", "identity", "phase", "phase_since", "error", "hint"))
_TABLE = (
    "source, schema, name, oid, state, reason, hint, rows, last_change_us, snapshot_seq, landed_lsn, current_lsn, "
    "state_since"
)
_TABLE_FIELDS = frozenset(
    ("oid", "state", "reason", "hint", "rows", "last_change_us", "snapshot_seq", "landed_lsn", "current_lsn")
)


def _source(row: tuple[Any, ...]) -> SourceState:
    return SourceState(
        name=row[0],
        positioned=bool(row[1]),
        epoch=row[2],
        lsn=row[3],
        end_lsn=row[4],
        head_lsn=row[5],
        received_lsn=row[6],
        confirmed_lsn=row[7],
        committed_at=row[8],
        identity=None if row[9] is None else json.loads(row[9]),
        phase=row[10],
        phase_since=row[11],
        error=row[12],
        hint=row[13],
    )


def _table(row: tuple[Any, ...]) -> TableState:
    return TableState(
        source=row[0],
        table=TableId(row[1], row[2]),
        oid=row[3],
        state=row[4],
        reason=row[5],
        hint=row[6],
        rows=row[7],
        last_change_us=row[8],
        snapshot_seq=row[9],
        landed_lsn=row[10],
        current_lsn=row[11],
        state_since=row[12],
    )


class State(Runs):
    """`State(path)` opens or creates the file `path`; thread-safe; other processes may open it too."""

    def get(self, key: str) -> Any | None:
        """The JSON value of a fact, None if it was never set."""
        rows = self.query("select value from facts where key = ?", (key,))
        return json.loads(rows[0][0]) if rows else None

    def set(self, key: str, value: Any, tx: sqlite3.Connection | None = None) -> None:
        """Set a fact to a JSON value; None removes it."""
        with self.changing(tx) as connection:
            if value is None:
                connection.execute("delete from facts where key = ?", (key,))
            else:
                connection.execute("insert or replace into facts values (?, ?)", (key, to_json(value)))

    def sources(self) -> list[SourceState]:
        """Every source that was ever saved, by name."""
        return [_source(row) for row in self.query(f"select {_SOURCE} from sources order by name")]

    def source(self, name: str) -> SourceState | None:
        """What is known of a source, None if nothing."""
        rows = self.query(f"select {_SOURCE} from sources where name = ?", (name,))
        return _source(rows[0]) if rows else None

    def save_source(self, name: str, *, tx: sqlite3.Connection | None = None, **fields: Any) -> None:
        """Change fields of a source: `received_lsn`, `confirmed_lsn`, `identity` (JSON), `phase`, `error`, `hint`;
        `phase_since` follows `phase` unless given. The position is the event log's to write."""
        check_fields(fields, _SOURCE_FIELDS)
        if fields.get("identity") is not None:
            fields["identity"] = to_json(fields["identity"])
        with self.changing(tx) as connection:
            connection.execute("insert or ignore into sources (name) values (?)", (name,))
            if "phase" in fields and "phase_since" not in fields:
                now = connection.execute("select phase from sources where name = ?", (name,)).fetchone()[0]
                if now != fields["phase"]:
                    fields["phase_since"] = now_us()
            if fields:
                assignments = ", ".join(f"{field} = ?" for field in fields)
                connection.execute(f"update sources set {assignments} where name = ?", (*fields.values(), name))

    def tables(self, source: str | None = None) -> list[TableState]:
        """Every table that was ever saved, of one source or of all, by name."""
        condition, parameters = ("", ()) if source is None else ("where source = ?", (source,))
        sql = f"select {_TABLE} from tables {condition} order by source, schema, name"
        return [_table(row) for row in self.query(sql, parameters)]

    def table(self, source: str, table: TableId) -> TableState:
        """What is known of a table; one that was never saved is `new`."""
        sql = f"select {_TABLE} from tables where source = ? and schema = ? and name = ?"
        rows = self.query(sql, (source, *table))
        return _table(rows[0]) if rows else TableState(source=source, table=TableId(*table))

    def update_table(
        self, source: str, table: TableId, *, tx: sqlite3.Connection | None = None, **fields: Any
    ) -> TableState:
        """Change fields of a table, saving it if it is new: `oid`, `state`, `reason`, `hint`, `rows`,
        `last_change_us`, `snapshot_seq`, `landed_lsn`, `current_lsn`. InvariantBroken for an unknown state or a
        `snapshot_seq` that goes back."""
        check_fields(fields, _TABLE_FIELDS)
        if fields.get("state", "new") not in TABLE_STATES:
            raise InvariantBroken(f"a table cannot be in state {fields['state']!r}")
        where = "where source = ? and schema = ? and name = ?"
        with self.changing(tx) as connection:
            connection.execute(
                "insert or ignore into tables (source, schema, name, state_since) values (?, ?, ?, ?)",
                (source, *table, now_us()),
            )
            before = _table(connection.execute(f"select {_TABLE} from tables {where}", (source, *table)).fetchone())
            if fields.get("snapshot_seq", before.snapshot_seq) < before.snapshot_seq:
                raise InvariantBroken(f"the snapshot counter of {TableId(*table)} would go back")
            if fields.get("state", before.state) != before.state:
                fields["state_since"] = now_us()
            if fields:
                assignments = ", ".join(f"{field} = ?" for field in fields)
                connection.execute(f"update tables set {assignments} {where}", (*fields.values(), source, *table))
            row = connection.execute(f"select {_TABLE} from tables {where}", (source, *table)).fetchone()
        return _table(row)

    def pause(self, kind: str, name: str, *, tx: sqlite3.Connection | None = None) -> None:
        """Mark a source, table ("<source>/<schema>.<table>"), sink or sync as paused; survives restarts."""
        if kind not in PAUSE_KINDS:
            raise InvariantBroken(f"{kind!r} cannot be paused")
        with self.changing(tx) as connection:
            connection.execute("insert or ignore into pauses values (?, ?, ?)", (kind, name, now_us()))

    def resume(self, kind: str, name: str, *, tx: sqlite3.Connection | None = None) -> None:
        """Take the mark away, if there is one."""
        with self.changing(tx) as connection:
            connection.execute("delete from pauses where kind = ? and name = ?", (kind, name))

    def is_paused(self, kind: str, name: str) -> bool:
        return bool(self.query("select 1 from pauses where kind = ? and name = ?", (kind, name)))

    def pauses(self) -> dict[tuple[str, str], int]:
        """What is paused: (kind, name) → since when."""
        rows = self.query("select kind, name, since from pauses order by kind, name")
        return {(kind, name): since for kind, name, since in rows}

    def checkpoint(self, stage: str, source: str) -> dict[str, Any] | None:
        """Where a stage stands in a source's log, None if it never saved."""
        rows = self.query("select value from checkpoints where stage = ? and source = ?", (stage, source))
        return json.loads(rows[0][0]) if rows else None

    def checkpoints(self, source: str) -> dict[str, dict[str, Any]]:
        """All stages' checkpoints of one source, by stage."""
        rows = self.query("select stage, value from checkpoints where source = ? order by stage", (source,))
        return {stage: json.loads(value) for stage, value in rows}

    def save_checkpoint(
        self, stage: str, source: str, value: dict[str, Any], *, tx: sqlite3.Connection | None = None
    ) -> None:
        """Save a JSON object whose integer `offset` may not be lower than the saved one (InvariantBroken)."""
        offset = int(value["offset"])
        where = "where stage = ? and source = ?"
        with self.changing(tx) as connection:
            found = connection.execute(f"select value from checkpoints {where}", (stage, source)).fetchone()
            if found is not None:
                saved = json.loads(found[0])
                if saved["offset"] > offset:
                    raise InvariantBroken(f"checkpoint of stage {stage} for source {source} would go back to {offset}")
                if saved == value:
                    return
            connection.execute(
                "insert or replace into checkpoints values (?, ?, ?, ?)", (stage, source, to_json(value), now_us())
            )

    def reset_checkpoint(
        self, stage: str, source: str, value: dict[str, Any] | None, *, tx: sqlite3.Connection | None = None
    ) -> None:
        """Set a checkpoint to anything, or remove it (None): the one way for it to go back."""
        with self.changing(tx) as connection:
            connection.execute("delete from checkpoints where stage = ? and source = ?", (stage, source))
            if value is not None:
                int(value["offset"])
                connection.execute(
                    "insert into checkpoints values (?, ?, ?, ?)", (stage, source, to_json(value), now_us())
                )

    def save_cut(
        self,
        source: str,
        lsn: int,
        versions: dict[TableId, int],
        *,
        at_us: int | None = None,
        tx: sqlite3.Connection | None = None,
    ) -> None:
        """Record that at `lsn` the tables' `current` stood at these Delta versions; replaces the one before."""
        listed = [[*table, version] for table, version in sorted(versions.items())]
        with self.changing(tx) as connection:
            connection.execute(
                "insert or replace into cuts values (?, ?, ?, ?)",
                (source, lsn, now_us() if at_us is None else at_us, to_json(listed)),
            )

    def cut(self, source: str) -> Cut | None:
        """The last recorded cut of a source."""
        rows = self.query("select source, lsn, at_us, versions from cuts where source = ?", (source,))
        if not rows:
            return None
        name, lsn, at_us, listed = rows[0]
        versions = {TableId(schema, table): version for schema, table, version in json.loads(listed)}
        return Cut(source=name, lsn=lsn, at_us=at_us, versions=versions)


def open_state(state_dir: Path, *, create: bool = True, readonly: bool = False) -> State:
    """The state database of a `state_dir`."""
    return State(state_dir / STATE_FILE, create=create, readonly=readonly)


__all__ = [
    "FORMAT",
    "PAUSE_KINDS",
    "STATE_FILE",
    "TABLE_STATES",
    "Cut",
    "HistoryEntry",
    "Request",
    "Run",
    "SourceState",
    "State",
    "TableState",
    "open_state",
]
