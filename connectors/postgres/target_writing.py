"""Batches into a target within one transaction, so that what it refuses are the rows that it refuses, and no others.

Each batch is staged and written whole. If that fails for a row (a constraint, a value, a trigger that raises, row
security), the batch is halved until the bad rows stand alone. Rows that are refused for what *another* row holds get a
second chance at the end of the call, those of all batches together, since the other row may be about to give it up:
constraints that can be deferred are; for other unique indexes the rows that change first take NULL or a value that
nobody has, then their final one, all under one savepoint. Whoever still cannot go through is left out, and the rest is
tried again without it.

What that costs: nothing unless a batch is refused; then the batch a few times more, and about 2 log2(n) statements per
bad row. Triggers of the target see the intermediate values. It is bounded by `ROUNDS_ROWS`: what is left then is
rejected, and goes through in a later run if it can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psycopg
from psycopg import errors as pg

from cdc.errors import TargetRejected
from cdc.sink import ADOPT, DELETE, INSERT, UPDATE, Batch, PushResult, Rejected
from connectors.postgres.target_errors import CONFLICTS, is_about_rows, reason
from connectors.postgres.target_rows import Unwritable, stage_csv
from connectors.postgres.target_statements import Rows, Statements
from connectors.postgres.target_table import TargetTable
from connectors.postgres.target_types import names_one_value

ALL_REFUSED_ROWS = 500
"""A batch that begins with so many refused rows, of a sync of which nothing has ever gone through, is a mistake in the
sync, not in rows: telling them apart one by one would keep the target busy for nothing. Rows refused for what others
hold do not count."""
BY_KEY = ("upsert", "mirror")
SLOW_TRIES = 20
"""Statements of a push that may run into the timeout: the batch twice, then its halves, down to the slow row."""
ROUNDS = 20
"""How often rows that wait for rows behind them are looked at again."""
ROUNDS_ROWS = 200_000
ROUND_COST_ROWS = 200
"""How many rows may be written in vain to find who is in the way."""


@dataclass(eq=False, slots=True)
class Part:
    """One batch, and what has become of its rows, by ordinal."""

    batch: Batch
    statements: Statements
    rejected: dict[int, Rejected] = field(default_factory=dict)
    absent: set[int] = field(default_factory=set)
    indexed: bool = False
    slow: bool = False
    """It ran into the timeout once."""
    shared: set[int] = field(default_factory=set)
    """With DELETE: rows that another acknowledged key names too, which stay."""
    vacated: set[int] = field(default_factory=set)
    """Rows for which room has been made and that have to be written, or room must not have been made."""

    def __len__(self) -> int:
        return int(self.batch.acks.num_rows)

    def key(self, n: int) -> str:
        return str(self.batch.acks.column("key")[n].as_py())

    def refuse(self, n: int, why: str, *, conflicts: bool = False) -> None:
        self.rejected[n] = Rejected(self.key(n), why, conflicts)

    def result(self) -> PushResult:
        return PushResult(
            rows=len(self),
            rejected=[self.rejected[n] for n in sorted(self.rejected)],
            absent=[self.key(n) for n in sorted(self.absent)],
        )


Group = list[tuple[Part, Rows]]
PartRow = tuple[Part, int]
Tie = tuple[PartRow, PartRow, str]
"""A row, another that has now what it wants, and the index under which they cannot both have it."""


@dataclass(slots=True)
class _Outcome:
    """Beside the rows that were taken: those without a counterpart, and those with several (mode update)."""

    absent: list[int] = field(default_factory=list)
    several: list[int] = field(default_factory=list)
    still: list[int] = field(default_factory=list)
    """Rows that are there after their DELETE."""


class Writing:
    """The batches of one transaction. Errors that are not about rows pass, and end the transaction."""

    def __init__(self, connection: psycopg.Connection[Any], where: str, *, keeps_state: bool) -> None:
        self._connection = connection
        self._where = where
        self._keeps_state = keeps_state
        self._parts: list[Part] = []
        self._postponed: Group = []
        self._slow_tries = 0
        # Deferred constraints would fail at COMMIT, where no row can be told from another.
        connection.execute("SET CONSTRAINTS ALL IMMEDIATE")

    def take(self, batch: Batch, table: TargetTable) -> None:
        """Stage and write the batch, as far as rows of others let it. TargetRejected if its rows have no text form, or
        the target refuses each of the first `ALL_REFUSED_ROWS`."""
        statements = statements_for(batch, table, len(self._parts))
        part = Part(batch, statements)
        self._parts.append(part)
        self._connection.execute(statements.create_stage())
        self._stage(part, range(len(part)))
        if batch.action not in (DELETE, ADOPT):
            if batch.assignment.mode == "update":
                self._connection.execute(statements.create_typed())
            if batch.assignment.mode in ("insert", "append") and self._keeps_state:
                self._connection.execute(statements.leave_out_taken())
        elif batch.action == DELETE and self._keeps_state:
            self._find_shared(part)
        self._write(part, range(len(part)))

    def finish(self) -> list[PushResult]:
        """Give what was refused for other rows its second chance; the results of all batches."""
        if self._postponed and not self._together(self._postponed):
            self._untangle({(part, n) for part, rows in self._postponed for n in rows if n not in part.rejected})
        return [part.result() for part in self._parts]

    # ------------------------------------------------------------------ staging

    def _stage(self, part: Part, rows: range) -> None:
        """Into the stage; texts that the server cannot read (a zero byte, another encoding) are found by halving."""
        try:
            text = stage_csv(part.batch, part.statements.columns, rows)
        except Unwritable as error:
            raise TargetRejected(
                f"{self._where}: values of type {error} cannot be written to {part.statements.table.name}",
                hint="choose a form in the query, for example to_json(…) or a cast to varchar",
            ) from error
        try:
            with self._connection.transaction():
                with self._connection.cursor().copy(part.statements.copy()) as copy:
                    copy.write(memoryview(text))
        except psycopg.Error as error:
            if not is_about_rows(error, self._connection):
                raise
            if len(rows) == 1:
                self._refuse(part, rows.start, error)
                return
            for half in _halves(rows):
                self._stage(part, range(half[0], half[-1] + 1))

    # ------------------------------------------------------------------ writing

    def _write(self, part: Part, rows: Rows) -> None:
        """Write the rows; halve what is refused. What is refused for other rows is postponed whole."""
        try:
            self._attempt(part, rows)
            return
        except psycopg.Error as error:
            if self._is_too_slow(error):
                if not part.slow:
                    part.slow = True
                    self._write(part, rows)
                    return
            elif not is_about_rows(error, self._connection):
                raise
            self._make_findable(part)
            if _conflicts(part, error):
                self._postponed.append((part, rows))
                return
            if len(rows) == 1:
                self._refuse(part, rows[0], error)
                return
        for half in _halves(rows):
            self._write(part, half)

    def _is_too_slow(self, error: psycopg.Error) -> bool:
        """Whether it may be one row's doing, a trigger's that it starts, and there are tries left to find it."""
        if not isinstance(error, pg.QueryCanceled) or self._connection.broken:
            return False
        self._slow_tries += 1
        return self._slow_tries <= SLOW_TRIES

    def _refuse(self, part: Part, n: int, error: psycopg.Error) -> None:
        part.refuse(n, reason(error))
        if part.batch.untried and n + 1 == len(part.rejected) == ALL_REFUSED_ROWS:
            raise TargetRejected(
                f"{self._where}: refuses each of the first {ALL_REFUSED_ROWS} rows of a batch, the last one with "
                f"{reason(error)}",
                hint="compare the query with the table; the batch was not written",
            ) from error

    def _attempt(self, part: Part, rows: Rows) -> None:
        """Write and acknowledge these rows under a savepoint, all or none."""
        with self._connection.transaction():
            outcome = self._execute(part, rows)
        _note(part, outcome)

    def _execute(self, part: Part, rows: Rows) -> _Outcome:
        statements, outcome = part.statements, _Outcome()
        if part.batch.action == DELETE:
            to_delete = [n for n in rows if n not in part.shared]
            self._connection.execute(statements.delete(to_delete))
            outcome.still = [n for (n,) in self._connection.execute(statements.still_there(to_delete))]
            rows = [n for n in rows if n not in set(outcome.still)]
        elif part.batch.action != ADOPT and part.batch.assignment.mode == "update":
            outcome = self._update(part, rows)
        elif part.batch.action != ADOPT:
            self._connection.execute(statements.insert(rows))
        if self._keeps_state:
            self._connection.execute(statements.acknowledge(rows))
        return outcome

    def _update(self, part: Part, rows: Rows) -> _Outcome:
        """Mode update: lock what matches, take out what matches nothing or too much, update the rest."""
        self._connection.execute(part.statements.type_rows(rows))
        found = np.asarray([n for (n,) in self._connection.execute(part.statements.lock_matches(rows))], np.int64)
        matched, counts = np.unique(found, return_counts=True)
        several = matched[counts > 1].tolist()
        if part.vacated.intersection(several):
            # Another session has just added a row: room was made in rows that are not written now.
            raise pg.CardinalityViolation("several rows, some of them with intermediate values")
        present = set(matched.tolist())
        absent = [n for n in rows if n not in present and n not in part.rejected]
        if absent or several:
            for statement in part.statements.leave_out([*absent, *several]):
                self._connection.execute(statement)
        update = part.statements.update(rows)
        if update is not None:
            self._connection.execute(update)
        return _Outcome(absent, several)

    def _make_findable(self, part: Part) -> None:
        """Before rows are written one by one. Two that are one row at the target must not pass one after the other."""
        if part.indexed:
            return
        self._connection.execute(part.statements.index_stage())
        part.indexed = True
        if len(part) > 1 and part.batch.action in (INSERT, UPDATE) and part.batch.assignment.mode in BY_KEY:
            self._connection.execute(part.statements.create_keys())
            self._type_keys(part, range(len(part)))
            twins = sorted(n for (n,) in self._connection.execute(part.statements.twins()))
            for n in twins:
                part.refuse(n, "another row of the result has this key in the target")
            self._connection.execute(part.statements.drop_staged(twins))

    def _type_keys(self, part: Part, rows: Rows) -> bool:
        """The keys as the target's values; those that it cannot read are left out. Whether all went."""
        if not rows:
            return True
        try:
            with self._connection.transaction():
                self._connection.execute(part.statements.type_keys(rows))
            return True
        except psycopg.Error as error:
            if not is_about_rows(error, self._connection):
                raise
        for half in _halves(rows) if len(rows) > 1 else ():
            self._type_keys(part, half)
        return False

    def _find_shared(self, part: Part) -> None:
        """Which keys to delete are in other words the key of a row that stays. Where texts of keys cannot be read as
        the target's values, none is taken for such."""
        columns = [part.statements.table.columns[k] for k in part.batch.assignment.key]
        kinds = [part.batch.rows.schema.field(c.name).type for c in columns]
        if all(
            names_one_value(kind, c.base_type[1], c.deterministic, bool(c.exact))
            for kind, c in zip(kinds, columns, strict=True)
        ):
            return
        self._connection.execute(part.statements.create_keys())
        self._type_keys(part, range(len(part)))
        try:
            with self._connection.transaction():
                part.shared = {n for (n,) in self._connection.execute(part.statements.shared())}
        except psycopg.Error as error:
            if not is_about_rows(error, self._connection):
                raise

    # ------------------------------------------------------------------ second chance

    def _together(self, group: Group) -> bool:
        """Write all of them at once, with constraints deferred and room made where they cannot be; whether it went."""
        outcomes = []
        try:
            with self._connection.transaction():
                self._connection.execute("SET CONSTRAINTS ALL DEFERRED")
                self._vacate(group, all_indexes=False)
                for part, rows in group:
                    outcomes.append((part, self._execute(part, rows)))
                self._connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        except psycopg.Error as error:
            if not is_about_rows(error, self._connection):
                raise
            return False
        for part, outcome in outcomes:
            _note(part, outcome)
        return True

    def _untangle(self, waiting: set[PartRow]) -> None:
        """Write the largest part of the postponed rows that goes through together; the rest is rejected."""
        left, ties = ROUNDS_ROWS, None
        for part, _ in waiting:
            self._make_findable(part)
        while waiting and left > 0:
            left -= max(len(waiting), ROUND_COST_ROWS)
            refused = self._refused_among(_grouped(waiting))
            if not refused:
                return
            ties = ties if ties is not None else self._ties(_grouped(waiting), set(refused))
            for row, name in _followers(ties, set(refused)).items():
                if row in waiting:
                    refused.setdefault(row, (f"wants what a refused row keeps, constraint {name}", True))
            for (part, n), (why, conflicts) in refused.items():
                part.refuse(n, why, conflicts=conflicts)
            waiting -= set(refused)
            if waiting and self._together(_grouped(waiting)):
                return
        for part, n in waiting:
            part.refuse(n, "waits for too many other rows; later runs try again", conflicts=True)

    def _ties(self, group: Group, refused: set[PartRow]) -> list[Tie]:
        """Who, not refused yet, wants a unique value that another row has now. Not all such are found, only those of
        plain indexes over pushed columns: it spares a round for each link of a chain."""
        owners: dict[tuple[int, str], PartRow] = {}
        wants: list[tuple[PartRow, tuple[int, str], str]] = []
        try:
            with self._connection.transaction():
                for part, rows in group:
                    oid = part.statements.table.oid
                    for n, key in self._connection.execute(part.statements.present(rows)):
                        owners[oid, key] = (part, n)
                    # What a column cannot hold has been refused: the others can be cast.
                    for name, statement in part.statements.holders([n for n in rows if (part, n) not in refused]):
                        wants += [((part, n), (oid, key), name) for n, key in self._connection.execute(statement)]
        except psycopg.Error as error:
            if not is_about_rows(error, self._connection):
                raise
            return []
        return [(row, owners[key], name) for row, key, name in wants if key in owners]

    def _refused_among(self, group: Group) -> dict[PartRow, tuple[str, bool]]:
        """Which of them are refused although all others have made room. If none is, they are written; else nothing."""
        waiting = group
        refused: dict[PartRow, tuple[str, bool]] = {}
        outcomes: list[tuple[Part, _Outcome]] = []
        with self._connection.transaction():
            self._vacate(group, all_indexes=True)
            # A row may wait for one behind it.
            for _ in range(ROUNDS):
                refused = {}
                for part, rows in waiting:
                    self._isolate(part, rows, refused, outcomes)
                again = _grouped(refused)
                if not again or sum(len(rows) for _, rows in again) == sum(len(rows) for _, rows in waiting):
                    break
                waiting = again
            if refused:
                raise psycopg.Rollback
        if not refused:
            for part, outcome in outcomes:
                _note(part, outcome)
        return refused

    def _isolate(
        self,
        part: Part,
        rows: Rows,
        refused: dict[PartRow, tuple[str, bool]],
        outcomes: list[tuple[Part, _Outcome]],
    ) -> None:
        try:
            with self._connection.transaction():
                outcome = self._execute(part, rows)
            outcomes.append((part, outcome))
            return
        except psycopg.Error as error:
            if not is_about_rows(error, self._connection):
                raise
            if len(rows) == 1:
                refused[part, rows[0]] = (reason(error), _conflicts(part, error))
                return
        for half in _halves(rows):
            self._isolate(part, half, refused, outcomes)

    def _vacate(self, group: Group, *, all_indexes: bool) -> None:
        """Make room; a batch whose intermediate values are refused stays as it is, and its rows see what comes."""
        for part, given in group:
            rows, part.vacated = given, set()
            try:
                with self._connection.transaction():
                    if part.batch.assignment.mode == "update":
                        several = {n for (n,) in self._connection.execute(part.statements.hit_several(given))}
                        rows = [n for n in given if n not in several]
                    statement = part.statements.vacate(rows, all_indexes=all_indexes)
                    if statement is None:
                        continue
                    self._connection.execute(statement)
                part.vacated = set(rows)
            except psycopg.Error as error:
                if not is_about_rows(error, self._connection):
                    raise


def statements_for(batch: Batch, table: TargetTable, number: int) -> Statements:
    """The statements of a batch. With ADOPT nothing but the acknowledgements is staged."""
    columns: Sequence[str] = ()
    if batch.action == DELETE:
        columns = batch.assignment.key
    elif batch.action != ADOPT:
        columns = batch.assignment.columns
    return Statements(
        table=table,
        assignment=batch.assignment,
        action=batch.action,
        columns=tuple(columns),
        number=number,
        run=batch.run,
    )


def _conflicts(part: Part, error: psycopg.Error) -> bool:
    """Whether the row may go through once another is written. In mode insert, its own key in the table stays there."""
    if not isinstance(error, CONFLICTS):
        # A constraint trigger may ask for rows of a batch behind this one; whatever it raises then.
        return part.statements.table.checks_later and not isinstance(error, (pg.DataError, pg.QueryCanceled))
    if part.batch.assignment.mode != "insert":
        return True
    table = part.statements.table
    key = {table.columns[k].attnum for k in part.batch.assignment.key}
    return not any(i.name == error.diag.constraint_name and i.columns == key for i in table.indexes)


def _followers(ties: list[Tie], rows: set[PartRow]) -> dict[PartRow, str]:
    """Who waits for one of the rows, at any distance, and under which index."""
    waiting: dict[PartRow, list[tuple[PartRow, str]]] = {}
    for row, other, name in ties:
        waiting.setdefault(other, []).append((row, name))
    found: dict[PartRow, str] = {}
    ahead = list(rows)
    while ahead:
        for row, name in waiting.get(ahead.pop(), ()):
            if row not in found:
                found[row] = name
                ahead.append(row)
    return found


def _note(part: Part, outcome: _Outcome) -> None:
    part.absent.update(outcome.absent)
    for n in outcome.several:
        part.refuse(n, "the key hits several rows")
    for n in outcome.still:
        part.refuse(n, "still there after its DELETE: row security, a rule or a trigger kept it")


def _grouped(rows: Any) -> Group:
    """(part, ordinal) pairs by part, in the batches' order."""
    by_part: dict[Part, list[int]] = {}
    for part, n in rows:
        by_part.setdefault(part, []).append(n)
    return [(part, sorted(by_part[part])) for part in sorted(by_part, key=lambda p: p.statements.number)]


def _halves(rows: Rows) -> Iterator[Rows]:
    middle = len(rows) // 2
    yield rows[:middle]
    yield rows[middle:]
