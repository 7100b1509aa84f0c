"""Which tables a source has, and what happened to them that the stream does not show.

Each look compares the catalog with the fingerprints that the lake keeps, so what happened while no daemon ran, or while
its disk was lost, is found like everything else. A finding is answered before it is forgotten: the lake is told that
the table needs a resync, the resync is ordered, and only then are the fingerprints of now saved; a look that dies
in between finds the same again. The mark goes when a whole run that began after it has landed. What a change
means is decided in cdc.watch, how a table is read in cdc.backfill. Looks belong to one thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Protocol

from cdc import metrics
from cdc.appending import shape_fact
from cdc.backfill import Backfill
from cdc.errors import CdcError, Verdict
from cdc.evolution import name_fact
from cdc.fingerprint import Catalog, Fingerprint, Unpublished
from cdc.lake.changelog import ChangelogTable
from cdc.lake.fingerprints import Fingerprints
from cdc.lake.scan import FULL_RUNS
from cdc.ports import ObjectStore, SnapshotReader, SourceAdmin
from cdc.schema import SchemaBook, inherited
from cdc.state import State, TableState
from cdc.table import TableId, TableSchema
from cdc.watch import CatalogFinding, after_upgrade, compare

log = logging.getLogger(__name__)


def finding_fact(source: str, table: TableId) -> str:
    """Name of the fact that holds the last finding about a table."""
    return f"finding:{source}/{table}"


def epoch_fact(source: str) -> str:
    """Name of the fact that says which epoch of a source the known tables are of."""
    return f"epoch:{source}"


def unpublished_fact(source: str) -> str:
    """Name of the fact that lists wanted tables that no publication has."""
    return f"unpublished:{source}"


class Tables(Protocol):
    """What discovery may say about tables: kept by the pipeline."""

    def mark(self, tables: Iterable[TableId], needs: bool) -> None:
        """Tell the lake that tables need a resync, or no longer do; durable on return."""

    def marks(self) -> dict[str, int]:
        """Tables that need a resync, and since when (0: since before this process)."""

    def take_part(self, table: TableId, takes_part: bool) -> None:
        """Let a table be followed, or not: one that is gone. What the stream still brings of it lands."""

    def rests(self, table: TableId) -> bool:
        """Whether a table is stopped, paused or gone."""

    def reopen_stream(self, why: str) -> None:
        """Have the stream opened anew where it stands. No snapshot begins or goes on before that."""


class Discovery:
    """The looks of one source."""

    def __init__(
        self,
        source: str,
        reader: SnapshotReader,
        admin: SourceAdmin,
        state: State,
        book: SchemaBook,
        store: ObjectStore,
        backfill: Backfill,
        tables: Tables,
        *,
        epoch: int,
        server: str,
        vouches: Callable[[TableId], bool] = lambda table: True,
    ) -> None:
        """`server`: its system identifier. `vouches`: whether what a table's lake holds of it is the last that is
        known, and not what it left there once."""
        self._source = source
        self._reader = reader
        self._admin = admin
        self._state = state
        self._book = book
        self._store = store
        self._backfill = backfill
        self._tables = tables
        self._epoch = epoch
        self._server = server
        self._vouches = vouches
        self._saved = Fingerprints(store, source)
        self._prints: dict[TableId, Fingerprint] | None = None
        self._refused: set[int] = set()
        self._followed: dict[TableId, tuple[int, TableSchema]] = {}
        """Tables whose shape the lake has, and when that was so."""
        self._called: set[tuple[int, TableId]] = set()
        """Tables (OID, name) that had another name meanwhile, and for which that has been answered."""

    def look(self) -> bool:
        """Take notice of tables that came, went or changed, and order what follows. True if another look is due at
        once, because the publication was extended."""
        prints = self._load()
        catalog = self._reader.tables()
        known = {t.table: t for t in self._state.tables(self._source)}
        history = epoch_fact(self._source)
        # What was known is of another history (or of none): the lake alone tells which snapshots are complete.
        anew = self._state.get(history) != self._epoch
        if anew:
            for run in self._state.runs(self._source, states=["pending", "running"]):
                self._state.update_run(run.id, state="cancelled", reason="the source's history began anew")
        failed = {r.table for r in self._state.runs(self._source, states=["failed"]) if r.kind in FULL_RUNS}
        found: dict[TableId, list[CatalogFinding]] = {}
        first: list[tuple[TableId, str]] = []
        for now in catalog.tables:
            table, before = now.schema.table, known.get(now.schema.table)
            stored = prints.get(table)
            if anew or before is None or before.state == "removed" or before.oid != now.schema.oid:
                self._adopt(now, None if anew else before, stored, first, found)
            elif stored is not None and stored != now.kept():
                found[table] = compare(stored, now)
            else:
                found[table] = self._wandered(now.schema) or (self._given_up(table) if table in failed else [])
            older = [stored.schema] if stored is not None else []
            schema = inherited(now.schema, older)
            prints[table] = (now if schema is now.schema else replace(now, schema=schema)).kept()
        moved = bool(first) or any(f.kind in ("partitions", "publication") for fs in found.values() for f in fs)
        sticks = catalog.partitions_stick and moved and not anew
        if sticks:
            # Before the snapshots that answer it: what follows them must come as the partitions are now.
            self._tables.reopen_stream("tables or partitions came or went")
        self._answer(found, first, settle=sticks)
        self._called |= {(prints[t].schema.oid, t) for t, fs in found.items() if any(f.kind == "renamed" for f in fs)}
        for now in catalog.tables:
            self._follow_shape(prints[now.schema.table])
        if anew:
            self._state.set(history, self._epoch)
        self._retire(catalog, known, prints)
        self._saved.save(self._server, prints)
        self._clear_marks()
        return self._extend(catalog, known, prints)

    def _load(self) -> dict[TableId, Fingerprint]:
        if self._prints is None:
            server, prints = self._saved.load()
            if server and server != self._server:
                now = {t.schema.table: t for t in self._reader.tables().tables}
                prints = {t: after_upgrade(p, now[t]) if t in now else p for t, p in prints.items()}
            self._prints = prints
        return self._prints

    def _wandered(self, schema: TableSchema) -> list[CatalogFinding]:
        """A table that had another name between two looks, and changes under it, which are not in this folder. Its next
        change would tell landing; here it is told although none may come."""
        oid, table = schema.oid, schema.table
        saved = self._state.get(name_fact(self._source, oid))
        called = TableId(*saved) if saved else table
        # Once: rows of the run that answers it bring the name, but an empty table has none.
        if called == table or (oid, table) in self._called or self._backfill.is_ordered(table):
            return []
        return [CatalogFinding(kind="renamed", message=f"it was called {called}, and its changes came under that name")]

    def _given_up(self, table: TableId) -> list[CatalogFinding]:
        """A table whose newest snapshot found it unpublished, and that is there at this look as it was at the last one:
        nothing else would order what was given up."""
        runs = [r for r in self._state.runs(self._source, table) if r.kind in FULL_RUNS]
        if not runs or runs[-1].state != "failed" or self._tables.rests(table):
            return []
        return [CatalogFinding(kind="publication", message="its snapshot was given up while it was not published")]

    # ---- tables that are new here ----

    def _adopt(
        self,
        now: Fingerprint,
        before: TableState | None,
        stored: Fingerprint | None,
        first: list[tuple[TableId, str]],
        found: dict[TableId, list[CatalogFinding]],
    ) -> None:
        """A table that is new here: its snapshot is done if the lake says so for this epoch and OID."""
        table, oid = now.schema.table, now.schema.oid
        tokens = ChangelogTable(self._store, self._source, table).tokens()
        counter = max(tokens.snapshot_seq + 1, self._state.table(self._source, table).snapshot_seq)
        known_oid = stored.schema.oid if stored is not None else before.oid if before is not None else oid
        if known_oid not in (0, oid):
            found[table] = [CatalogFinding(kind="recreated", message="another table has its name now")]
        elif stored is not None:
            found[table] = compare(stored, now)
        came_back = before is not None and (before.state == "removed" or before.oid not in (0, oid))
        whole = tokens.complete(self._epoch, oid) and str(table) not in self._tables.marks()
        left = whole and not self._vouches(table)
        complete = whole and not came_back and not left
        self._tables.take_part(table, True)
        state = "streaming" if complete else "new"
        self._state.update_table(self._source, table, oid=oid, state=state, reason="", hint="", snapshot_seq=counter)
        if not complete:
            why = "its lake holds what it left there once" if left else ""
            first.append((table, "table came back" if came_back else why))

    def _follow_shape(self, now: Fingerprint) -> None:
        """Let the lake have the shape that the catalog shows, also of a table that nobody writes to."""
        table = now.schema.table
        followed = self._book.grown, now.schema
        if self._followed.get(table) == followed:
            return
        schema = self._book.note_newest(now.schema)
        state = self._state.table(self._source, table).state
        if state != "streaming" or self._tables.rests(table) or self._backfill.is_ordered(table):
            return  # A snapshot brings it, or a later look.
        told = self._state.get(shape_fact(self._source, table))
        if told == schema.version:
            self._followed[table] = followed
            return
        if told is None and ChangelogTable(self._store, self._source, table).has_columns(schema):
            self._state.set(shape_fact(self._source, table), schema.version)
            return
        self._backfill.tell_shape(schema)

    # ---- findings ----

    def _answer(
        self, found: dict[TableId, list[CatalogFinding]], first: list[tuple[TableId, str]], *, settle: bool
    ) -> None:
        """Mark in the lake, order, tell: in this order, so that nothing that was told is forgotten."""
        reread = {t: f[0] for t, f in found.items() if f and f[0].answer == "resync"}
        self._tables.mark([*reread, *(t for t, why in first if why)], True)
        for table, why in first:
            reason = reread[table].message if table in reread else why
            self._backfill.order(table, "first", reason, settle=settle or bool(reason))
        for table, finding in reread.items():
            if table not in dict(first) and not self._tables.rests(table):
                self._backfill.order(table, "resync", finding.message, settle=True)
        for table, findings in found.items():
            # The most telling one last: it is what stays in `status`.
            for finding in reversed(findings):
                self._tell(table, finding)

    def _tell(self, table: TableId, finding: CatalogFinding) -> None:
        metrics.CATALOG_FINDINGS.labels(self._source, finding.kind).inc()
        level = logging.WARNING if finding.answer == "resync" else logging.INFO
        log.log(
            level,
            "table %s: %s",
            table,
            finding.message,
            extra={"source": self._source, "table": str(table), "kind": finding.kind, "answer": finding.answer},
        )
        fact = {**asdict(finding), "at_us": time.time_ns() // 1000}
        self._state.set(finding_fact(self._source, table), fact)

    def _retire(self, catalog: Catalog, known: dict[TableId, TableState], prints: dict[TableId, Fingerprint]) -> None:
        """Tables that are not published any more: the lake is told, for what happens to them now is not seen."""
        there = {t.schema.table for t in catalog.tables}
        outside = {u.table: u for u in catalog.unpublished}
        names = {t.schema.oid: t.schema.table for t in catalog.tables}
        gone = [b for t, b in known.items() if t not in there and not t.is_own]
        self._tables.mark([b.table for b in gone if b.state != "removed"], True)
        for before in gone:
            table, left = before.table, outside.get(before.table)
            now = names.get(before.oid)
            if now is not None:
                reason, hint = f"renamed to {now}, where it goes on", ""
            elif left is None:
                reason, hint = "it was dropped or renamed, or is not selected or not published any more", "cdc setup"
            elif left.oid == before.oid:
                reason, hint = "not in the publication any more", left.fix
            else:
                reason, hint = "it was dropped; another table has its name now, which is not published", left.fix
            if before.state == "removed" and (before.reason, before.hint) == (reason, hint):
                continue
            # Also of one that is gone already: why it is may change, and with it what mends it.
            log.warning(
                "table %s: %s", table, reason, extra={"source": self._source, "table": str(table), "hint": hint}
            )
            metrics.CATALOG_FINDINGS.labels(self._source, "removed").inc()
            self._backfill.retire(table, reason, hint)
            self._tables.take_part(table, False)
        for table in prints.keys() - there:
            prints[table] = replace(prints[table], membership=())

    def _clear_marks(self) -> None:
        """Take the mark from tables whose whole run, begun after the mark, has landed to its end. It may have been
        ordered before: an order joins one that is pending."""
        done = []
        for table, since in self._marked():
            runs = [r for r in self._state.runs(self._source, table) if r.kind in FULL_RUNS]
            if self._tables.rests(table) or not runs or runs[-1].state != "done" or runs[-1].started_at < since:
                continue
            changelog = ChangelogTable(self._store, self._source, table)
            if changelog.tokens().run(runs[-1].id) >= runs[-1].chunk_no:
                done.append(table)
        self._tables.mark(done, False)

    def _marked(self) -> list[tuple[TableId, int]]:
        marks = self._tables.marks()
        known = [t.table for t in self._state.tables(self._source)] if marks else []
        return [(table, marks[str(table)]) for table in known if str(table) in marks]

    # ---- tables that are wanted ----

    def _extend(self, catalog: Catalog, known: dict[TableId, TableState], prints: dict[TableId, Fingerprint]) -> bool:
        """Add wanted tables to a publication that is ours. One that was in it and was taken out stays out: that was
        somebody's decision."""

        def was_in(wanted: Unpublished) -> bool:
            before, stored = known.get(wanted.table), prints.get(wanted.table)
            return wanted.oid in (before.oid if before else 0, stored.schema.oid if stored else 0)

        new = [u for u in catalog.unpublished if not was_in(u) and u.oid not in self._refused] if catalog.own else []
        added = False
        for wanted in new:
            try:
                for statement in self._admin.setup(dry_run=False, only=wanted.oid):
                    log.info("a new table is wanted", extra={"source": self._source, "sql": statement})
                added = True
            except CdcError as e:
                if e.verdict is not Verdict.OPERATOR:
                    raise
                self._refused.add(wanted.oid)
                log.warning(
                    "table %s is wanted, but cannot be added to the publication: %s",
                    wanted.table,
                    e.args[0],
                    extra={"source": self._source, "table": str(wanted.table), "hint": wanted.fix},
                )
        listed = [[str(u.table), u.fix] for u in catalog.unpublished if u not in new or u.oid in self._refused]
        if self._state.get(unpublished_fact(self._source)) != (listed or None):
            self._state.set(unpublished_fact(self._source), listed or None)
        return added
