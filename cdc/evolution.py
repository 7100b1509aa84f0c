"""What landing does when a table comes in another shape: judge it by the table's contract, announce it, go on.

In order with the data: a shape holds from the position of the first record that has it. `evolve` takes it, and orders
the table to be read anew where nothing tells what its old rows show now; `freeze` keeps the lake's columns and leaves
the rest out; `stop` stops the table until somebody accepts the shape by a resync. Each change is a row of the lake's
`_schema_changes` (exactly once), a log line, a metric, and an alert.

Also keeps which table (OID) a name meant: changes of another table under the name order a new snapshot too. What is
known is in the state database and, for a daemon that lost it, in the changelog's configuration. It writes nothing of
the tables' own and belongs to the landing thread; `accept` may be called from any.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

from cdc import metrics
from cdc.batch import Batch
from cdc.differences import Difference, differences, frozen, projected, reading_reason
from cdc.errors import SchemaConflict
from cdc.lake.changelog import ChangelogTable
from cdc.lake.notes import SCHEMA_CHANGES, SCHEMA_CHANGES_COLUMNS, Note, NotesTable
from cdc.ports import ObjectStore
from cdc.runs import Run
from cdc.schema import SchemaBook, shape_fact
from cdc.state import State
from cdc.table import TableId, TableSchema

log = logging.getLogger(__name__)

ReadAnew = Callable[[TableId, str], None]
"""Marks in the lake that a table needs a snapshot, and orders it; durable on return."""
Alert = Callable[[dict[str, Any]], None]
"""Tells whoever is to be told; returns at once."""


def name_fact(source: str, oid: int) -> str:
    """Name of the fact that holds under which name the changes of a table came last, as far as they have landed."""
    return f"name:{source}/{oid}"


@dataclass(frozen=True, slots=True)
class Shape:
    """A table's shape from a position on. `seen`: the version that the source shows; `held`: the one that the lake
    takes, another only where the table is frozen. `number` counts what was announced of the table. `told`: the catalog
    showed it, and the stream may still bring changes in older shapes."""

    seen: int
    held: int
    epoch: int
    lsn: int
    number: int = 0
    told: bool = False


class Evolution:
    """Shapes of one source's tables."""

    def __init__(
        self,
        source: str,
        state: State,
        book: SchemaBook,
        store: ObjectStore,
        *,
        contract: Callable[[str], str],
        read_anew: ReadAnew,
        alert: Alert,
    ) -> None:
        self._source = source
        self._state = state
        self._book = book
        self._store = store
        self._contract = contract
        self._read_anew = read_anew
        self._alert = alert
        self._notes = NotesTable(store, source, SCHEMA_CHANGES, SCHEMA_CHANGES_COLUMNS)
        self._shapes: dict[TableId, Shape | None] = {}
        self._names: dict[int, tuple[TableId, int]] = {}
        self._pending: list[Note] = []
        self._changed: set[TableId] = set()
        self._reshaped: set[TableId] = set()
        self._used: set[TableId] = set()

    # ---- while records come ----

    def admit(self, batch: Batch, *, lsn: int, judged: bool, changelog: ChangelogTable) -> Batch:
        """The rows as the lake takes them. `judged`: they were read under the shape that holds at their place, which
        the begin row of a run was not. SchemaConflict if the contract stops the table."""
        schema = batch.schema
        told = not judged and _tells_shape(batch)
        known = self._shape(schema.table, changelog)
        if judged and known is not None and known.told:
            judged = schema.version >= known.seen
            if schema.version == known.seen:
                known = self._shapes[schema.table] = replace(known, told=False)
                self._changed.add(schema.table)
        judged = judged or told
        frozen_now = self._contract(str(schema.table)) == "freeze"
        if judged:
            thawed = known is not None and known.held != known.seen and not frozen_now
            if known is None or known.seen != schema.version or thawed:
                known = self._judge(schema, known, int(batch.system("_epoch")[0].as_py()), lsn)
                known = self._shapes[schema.table] = replace(known, told=told)
            self._note_name(schema, lsn)
        held = known.held if known is not None else schema.version
        if held == schema.version or not frozen_now or (not judged and self._state.get(self._accepted(schema.table))):
            return batch
        kept = self._book.get(schema.table, held)
        return projected(batch, kept if judged else frozen(kept, schema))

    def _judge(self, schema: TableSchema, known: Shape | None, epoch: int, lsn: int) -> Shape:
        """The shape that holds from here on."""
        table = schema.table
        if known is None:
            shape = Shape(schema.version, schema.version, epoch, lsn)
        else:
            shape = self._judge_change(schema, known, epoch, lsn)
        self._shapes[table] = shape
        self._changed.add(table)
        return shape

    def _judge_change(self, schema: TableSchema, known: Shape, epoch: int, lsn: int) -> Shape:
        table = schema.table
        before, held = self._book.get(table, known.seen), self._book.get(table, known.held)
        shape = Shape(schema.version, schema.version, epoch, lsn, known.number)
        found = differences(before, schema)
        answer = self._contract(str(table))
        if self._state.get(self._accepted(table)):
            answer = "accepted"
            self._used.add(table)
        try:
            if answer == "stop" and found:
                kinds = ", ".join(sorted({d.kind for d in found}))
                raise SchemaConflict(
                    f"table {table} came in another shape ({kinds}), and its contract is to stop (on_schema_change)",
                    hint=f"`cdc resync {table}` accepts the new shape",
                )
            if answer == "freeze":
                shape = replace(shape, held=self._freeze(schema, held))
        except SchemaConflict:
            # The shape stays as it was; only that this was announced is to be remembered.
            stopped = replace(known, number=known.number + 1)
            self._announce(table, schema, found, "stop", stopped)
            self._shapes[table] = stopped
            self._changed.add(table)
            raise
        doubtful = self._book.is_doubtful(table, schema.version)
        reason = reading_reason(held, self._book.get(table, shape.held), doubtful=doubtful)
        if known.held != known.seen and answer != "freeze":
            reason = reason or "it is not frozen any more"
        if reason:
            answer = f"{answer}, read anew"
            self._read_anew(table, reason)
        if found:
            shape = replace(shape, number=known.number + 1)
            self._announce(table, schema, found, answer, shape)
            self._reshaped.add(table)
        return shape

    def _freeze(self, schema: TableSchema, held: TableSchema) -> int:
        kept = frozen(held, schema)
        left_out = {c.attnum for c in schema.columns} - {c.attnum for c in kept.columns}
        label = metrics.table_label(self._source, schema.table)
        metrics.COLUMNS_LEFT_OUT.labels(self._source, label).set(len(left_out))
        return self._book.register(replace(kept, version=0)).version

    def _note_name(self, schema: TableSchema, lsn: int) -> None:
        """Under which name a table's changes come. Those under another one are not in this folder."""
        table = schema.table
        known = self._names.get(schema.oid)
        if known is None:
            saved = self._state.get(name_fact(self._source, schema.oid))
            known = (TableId(*saved), -1) if saved else None
        self._names[schema.oid] = (table, lsn)
        if known is not None and known[0] == table:
            return
        self._changed.add(table)
        shape = self._shapes[table]
        if known is None or shape is None:
            return
        old, until = known
        if not self._is_covered(schema, until):
            self._read_anew(table, f"it was called {old}")
        shape = self._shapes[table] = replace(shape, number=shape.number + 1)
        self._reshaped.add(table)
        difference = Difference(kind="rename_table", before=str(old), after=str(table))
        self._announce(table, schema, [difference], "read anew", replace(shape, lsn=lsn))

    def _is_covered(self, schema: TableSchema, until: int) -> bool:
        """Whether a run that is ordered or under way reads everything that came under the other name."""

        def covers(run: Run) -> bool:
            if run.kind not in ("first", "resync"):
                return False
            begun = until >= 0 and run.details.get("oid") == schema.oid and run.first_lsn >= until
            return run.state == "pending" or begun

        return any(covers(r) for r in self._state.runs(self._source, schema.table, states=["pending", "running"]))

    def _announce(
        self, table: TableId, schema: TableSchema, found: list[Difference], answer: str, shape: Shape
    ) -> None:
        for difference in found:
            values = {
                "at": time.time_ns() // 1000,
                "epoch": shape.epoch,
                "lsn": shape.lsn,
                "table": str(table),
                "oid": schema.oid,
                "kind": difference.kind,
                "before": json.dumps(difference.before),
                "after": json.dumps(difference.after),
                "answer": answer,
            }
            self._pending.append(Note(f"table/{table}", shape.number, values))

    # ---- at a cut ----

    def announce(self, changelog: Callable[[TableId], ChangelogTable]) -> None:
        """Before the rows of a cut: make its changes of shape visible in the lake, and tell of them."""
        for note in self._notes.append(self._pending):
            row = note.values
            told = {k: row[k] for k in ("table", "oid", "kind", "answer")}
            log.warning("schema change", extra={"source": self._source, **told})
            label = metrics.table_label(self._source, _table(row["table"]))
            metrics.SCHEMA_CHANGES.labels(self._source, label, row["kind"]).inc()
            self._alert({"alert": "schema_change", "source": self._source, **row})
        self._pending.clear()
        for table in self._reshaped:
            shape = self._shapes[table]
            assert shape is not None
            changelog(table).note_shape(self._book.get(table, shape.seen), shape.number)
        self._reshaped.clear()

    def commit(self) -> None:
        """After the rows of a cut: remember it all. Not inside a transaction."""
        if not self._changed:
            return
        with self._state.transaction() as tx:
            for table in self._changed:
                shape = self._shapes.get(table)
                if shape is not None:
                    self._book.hold(table, shape.held, tx)
                    self._state.set(self._shape_key(table), astuple(shape), tx=tx)
                if table in self._used:
                    self._state.set(self._accepted(table), None, tx=tx)
            for oid, (table, _) in self._names.items():
                if table in self._changed:
                    self._state.set(name_fact(self._source, oid), list(table), tx=tx)
        self._changed.clear()
        self._used.clear()

    def forget(self) -> None:
        """Drop what was not committed: its records come again."""
        self._shapes.clear()
        self._names.clear()
        self._pending.clear()
        self._changed.clear()
        self._reshaped.clear()
        self._used.clear()

    def accept(self, table: TableId) -> None:
        """The next shape of a stopped table is taken as it is. Thread-safe."""
        self._state.set(self._accepted(table), True)

    # ---- what is known ----

    def _shape(self, table: TableId, changelog: ChangelogTable) -> Shape | None:
        if table not in self._shapes:
            saved = self._state.get(self._shape_key(table))
            shape = Shape(*saved) if saved else None
            if shape is None and (noted := changelog.shape()) is not None:
                version = self._book.register(replace(noted[0], version=0)).version
                shape = Shape(version, version, 0, -1, noted[1])
            self._shapes[table] = shape
        return self._shapes[table]

    def _shape_key(self, table: TableId) -> str:
        return shape_fact(self._source, table)

    def _accepted(self, table: TableId) -> str:
        return f"accepted:{self._source}/{table}"


def _tells_shape(batch: Batch) -> bool:
    """Whether it is the control row of a shape that no change has shown yet (cdc.backfill)."""
    return dict(batch.system("_raw")[0].as_py() or ()).get("event") == "shape"


def _table(text: str) -> TableId:
    schema, _, name = text.partition(".")
    return TableId(schema, name)
