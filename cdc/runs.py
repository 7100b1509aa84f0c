"""What was ordered and what was done: snapshot runs, requests of operators, history of syncs and models.

Every change is durable on return, or with the transaction passed as `tx`. Times are microseconds since 1970, 0 for
"not yet". Histories are bounded per name. It records; deciding what runs next is the daemon's.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cdc.database import Database, check_fields, now_us, to_json
from cdc.errors import InvariantBroken
from cdc.table import TableId

RUN_STATES = ("pending", "running", "done", "cancelled", "failed")
RUNS_ENDED = ("done", "cancelled", "failed")
HISTORY_KEPT = 1000
REQUESTS_KEPT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One snapshot of one table. `chunk_no` is the last appended chunk (-1: none), `last_key` its last key's texts.

    `details` is progress beyond that: keys to be read again, facts of the table when the run began.
    """

    id: str
    source: str
    table: TableId
    kind: str
    state: str
    chunk_no: int
    last_key: list[str] | None
    first_lsn: int
    rows: int
    created_at: int
    started_at: int
    ended_at: int
    where_sql: str
    reason: str
    details: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an operator asked of the daemon. Open until `answered_at` is set; then `result` or `error` is."""

    id: int
    verb: str
    args: dict[str, Any]
    posted_at: int
    answered_at: int
    result: dict[str, Any] | None
    error: str | None

    @property
    def answered(self) -> bool:
        return self.answered_at != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One run of a sync or a model. `outcome` is 'running' until it ended."""

    id: int
    kind: str
    name: str
    cause: str
    started_at: int
    ended_at: int
    outcome: str
    counts: dict[str, Any] = field(default_factory=dict)
    error: str = ""


_RUN = (
    "id, source, schema, name, kind, state, chunk_no, last_key, first_lsn, rows, created_at, started_at, ended_at, "
    "where_sql, reason, details"
)
_RUN_FIELDS = frozenset(
    ("state", "chunk_no", "last_key", "first_lsn", "rows", "started_at", "ended_at", "reason", "details", "where_sql")
)
_REQUEST = "id, verb, args, posted_at, answered_at, result, error"
_HISTORY = "id, kind, name, cause, started_at, ended_at, outcome, counts, error"


def _run(row: tuple[Any, ...]) -> Run:
    return Run(
        id=row[0],
        source=row[1],
        table=TableId(row[2], row[3]),
        kind=row[4],
        state=row[5],
        chunk_no=row[6],
        last_key=None if row[7] is None else json.loads(row[7]),
        first_lsn=row[8],
        rows=row[9],
        created_at=row[10],
        started_at=row[11],
        ended_at=row[12],
        where_sql=row[13],
        reason=row[14],
        details=json.loads(row[15]),
    )


def _request(row: tuple[Any, ...]) -> Request:
    return Request(
        id=row[0],
        verb=row[1],
        args=json.loads(row[2]),
        posted_at=row[3],
        answered_at=row[4],
        result=None if row[5] is None else json.loads(row[5]),
        error=row[6],
    )


def _entry(row: tuple[Any, ...]) -> HistoryEntry:
    return HistoryEntry(
        id=row[0],
        kind=row[1],
        name=row[2],
        cause=row[3],
        started_at=row[4],
        ended_at=row[5],
        outcome=row[6],
        counts=json.loads(row[7]),
        error=row[8],
    )


class Runs(Database):
    """The tables `runs`, `requests` and `history`."""

    def create_run(
        self,
        source: str,
        table: TableId,
        kind: str,
        *,
        id: str | None = None,
        state: str = "pending",
        first_lsn: int = 0,
        where_sql: str = "",
        reason: str = "",
        details: dict[str, Any] | None = None,
        tx: sqlite3.Connection | None = None,
    ) -> Run:
        """A new run; the id is made (sortable by time) unless given. InvariantBroken if the id exists."""
        _check_state(state)
        at = now_us()
        run_id = id if id is not None else f"{at:014x}{secrets.token_hex(3)}"
        started = at if state == "running" else 0
        with self.changing(tx) as connection:
            connection.execute(
                "insert into runs (id, source, schema, name, kind, state, first_lsn, created_at, started_at, "
                "where_sql, reason, details) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    run_id,
                    source,
                    *table,
                    kind,
                    state,
                    first_lsn,
                    at,
                    started,
                    where_sql,
                    reason,
                    to_json(details or {}),
                ),
            )
            row = connection.execute(f"select {_RUN} from runs where id = ?", (run_id,)).fetchone()
        return _run(row)

    def update_run(self, id: str, *, tx: sqlite3.Connection | None = None, **fields: Any) -> Run:
        """Change fields of a run (`state`, `chunk_no`, `last_key`, `first_lsn`, `rows`, `reason`, `details`,
        `where_sql`, `started_at`, `ended_at`); the two times follow `state` unless given. InvariantBroken if there is
        no such run or `chunk_no` would go back."""
        check_fields(fields, _RUN_FIELDS)
        with self.changing(tx) as connection:
            found = connection.execute(f"select {_RUN} from runs where id = ?", (id,)).fetchone()
            if found is None:
                raise InvariantBroken(f"there is no snapshot run {id}")
            run = _run(found)
            if fields.get("chunk_no", run.chunk_no) < run.chunk_no:
                raise InvariantBroken(f"chunk number of snapshot run {id} would go back from {run.chunk_no}")
            state = fields.get("state", run.state)
            _check_state(state)
            if state == "running" and not run.started_at:
                fields.setdefault("started_at", now_us())
            if state in RUNS_ENDED and not run.ended_at:
                fields.setdefault("ended_at", now_us())
            for name in ("last_key", "details"):
                if fields.get(name) is not None:
                    fields[name] = to_json(fields[name])
            if fields:
                assignments = ", ".join(f"{name} = ?" for name in fields)
                connection.execute(f"update runs set {assignments} where id = ?", (*fields.values(), id))
            row = connection.execute(f"select {_RUN} from runs where id = ?", (id,)).fetchone()
        return _run(row)

    def run(self, id: str) -> Run | None:
        """The run of that id, None if there is none."""
        rows = self.query(f"select {_RUN} from runs where id = ?", (id,))
        return _run(rows[0]) if rows else None

    def runs(
        self, source: str | None = None, table: TableId | None = None, *, states: Sequence[str] | None = None
    ) -> list[Run]:
        """Runs in the order of their creation."""
        conditions, parameters = ["true"], []
        if source is not None:
            conditions.append("source = ?")
            parameters.append(source)
        if table is not None:
            conditions.append("schema = ? and name = ?")
            parameters += list(table)
        if states is not None:
            conditions.append(f"state in ({', '.join('?' * len(states))})")
            parameters += list(states)
        sql = f"select {_RUN} from runs where {' and '.join(conditions)} order by number"
        return [_run(row) for row in self.query(sql, parameters)]

    def post_request(self, verb: str, args: dict[str, Any] | None = None) -> int:
        """Leave an order for the daemon; its id."""
        with self.transaction() as connection:
            cursor = connection.execute(
                "insert into requests (verb, args, posted_at) values (?, ?, ?)", (verb, to_json(args or {}), now_us())
            )
            return int(cursor.lastrowid or 0)

    def open_requests(self) -> list[Request]:
        """Unanswered requests, oldest first."""
        rows = self.query(f"select {_REQUEST} from requests where answered_at = 0 order by id")
        return [_request(row) for row in rows]

    def answer_request(
        self,
        id: int,
        *,
        result: dict[str, Any] | None = None,
        error: str | None = None,
        tx: sqlite3.Connection | None = None,
    ) -> None:
        """Close a request; the first answer stands. Old answered ones are forgotten."""
        with self.changing(tx) as connection:
            connection.execute(
                "update requests set answered_at = ?, result = ?, error = ? where id = ? and answered_at = 0",
                (now_us(), None if result is None else to_json(result), error, id),
            )
            connection.execute("delete from requests where answered_at <> 0 and id <= ?", (id - REQUESTS_KEPT,))

    def request(self, id: int) -> Request:
        """A request by id; KeyError if there is none (any more)."""
        rows = self.query(f"select {_REQUEST} from requests where id = ?", (id,))
        if not rows:
            raise KeyError(id)
        return _request(rows[0])

    def start_history(self, kind: str, name: str, cause: str, *, tx: sqlite3.Connection | None = None) -> int:
        """A run of a sync or model (`kind` 'sync' or 'model') begins; its id."""
        with self.changing(tx) as connection:
            cursor = connection.execute(
                "insert into history (kind, name, cause, started_at) values (?, ?, ?, ?)", (kind, name, cause, now_us())
            )
            connection.execute(
                "delete from history where kind = ? and name = ? and id <= (select id from history "
                "where kind = ? and name = ? order by id desc limit 1 offset ?)",
                (kind, name, kind, name, HISTORY_KEPT),
            )
            return int(cursor.lastrowid or 0)

    def finish_history(
        self,
        id: int,
        outcome: str,
        *,
        counts: dict[str, Any] | None = None,
        error: str = "",
        tx: sqlite3.Connection | None = None,
    ) -> None:
        """It ended, with these counts, or with an error (never row values)."""
        with self.changing(tx) as connection:
            connection.execute(
                "update history set ended_at = ?, outcome = ?, counts = ?, error = ? where id = ?",
                (now_us(), outcome, to_json(counts or {}), error, id),
            )

    def history(self, kind: str, name: str | None = None, *, limit: int = 50) -> list[HistoryEntry]:
        """The newest entries first."""
        condition, parameters = ("", [kind]) if name is None else ("and name = ?", [kind, name])
        sql = f"select {_HISTORY} from history where kind = ? {condition} order by id desc limit ?"
        return [_entry(row) for row in self.query(sql, [*parameters, limit])]


def _check_state(state: str) -> None:
    if state not in RUN_STATES:
        raise InvariantBroken(f"a snapshot run cannot be in state {state!r}")
