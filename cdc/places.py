"""Where the tables of one source stand among the lakes: a table that moved is read anew, and none moves by accident.

The configuration says which lake a table stands in. Where its rows landed last stands in the lake's anchor, noted
before the first of them lands there; of a table without a note, that is the main lake. A start that finds the two to
differ knows that the history of the table stays behind: it says so, marks the table and orders a first snapshot for
the new place, before anything lands. What was left in the old place is nobody's any more; it is never read, merged or
removed again, and what it says of itself counts for nothing should the table come back.

A table that was renamed at its source would leave its lake without anybody having decided it, so it stops until the
configuration says where it goes. Nothing is copied here, and nothing is removed.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from cdc.config import LakeConfig, NamedLakeConfig, SourceConfig
from cdc.discovery import epoch_fact
from cdc.errors import SourceRefused
from cdc.failpoints import failpoint
from cdc.lake.anchor import Anchor, AnchorState
from cdc.lake.layout import table_path, tables_in
from cdc.lake.probe import require_promises
from cdc.lake.routing import stores_of
from cdc.log import EventLog, LogRecord
from cdc.ports import Finding, ObjectStore
from cdc.state import State
from cdc.table import TableId, TableSchema

log = logging.getLogger(__name__)

MAIN = ""
"""The place of everything that no other lake is named for."""


def place_of(lake: LakeConfig, name: str) -> str:
    """What tells the place of a lake from others: its URL, and its server where one is named. A lake that differs from
    `[lake]` in its options only (a storage class) is the same place."""
    place = _place(lake.named[name]) if name else MAIN
    return MAIN if place == _place(lake) else place


def _place(lake: LakeConfig | NamedLakeConfig) -> str:
    return lake.url.rstrip("/") + (f" at {lake.endpoint_url}" if lake.endpoint_url else "")


class Places:
    """The tables of one source. `settle` while no other part is at work; `admits` belongs to landing."""

    def __init__(
        self,
        source: SourceConfig,
        lake: LakeConfig,
        store: ObjectStore,
        state: State,
        event_log: EventLog,
        anchor: Anchor,
    ) -> None:
        self._source = source
        self._lake = lake
        self._store = store
        self._stores = stores_of(store, lake)
        self._state = state
        self._log = event_log
        self._anchor = anchor
        self._stale: dict[str, int] = {}
        """Tables that moved, and the log's end then."""

    def of(self, table: TableId) -> str:
        """The place of a table, as the configuration has it."""
        return place_of(self._lake, self._source.lake_of(str(table)))

    def vouches(self, table: TableId) -> bool:
        """Whether what the table's lake holds of it is its last state, as far as the anchor tells."""
        state = self._anchor.state
        return state is None or _noted(state, table) == self.of(table)

    def settle(self) -> None:
        """Have tables that stand elsewhere now read anew; the anchor has their new places when this returns. Done
        again by the next start if we die in between. On a new disk this lists the source in the stores."""
        state = self._anchor.state
        if state is None:
            return
        saved = self._state.checkpoint("land", self._source.name)
        landed = int(saved["offset"]) if saved else 0
        self._stale = {t: at for t, at in (self._state.get(self._fact) or {}).items() if at > landed}
        known = {t.table for t in self._state.tables(self._source.name)}
        # On a new disk only the stores can show that another lake has something of a table that nothing is noted of.
        held = known or (set(tables_in(self._store, self._source.name)) if self._lake.named else set())
        tables = held | {_table(name) for name in state.places}
        moved = {t: _noted(state, t) for t in tables if _noted(state, t) != self.of(t)}
        for table, before in sorted(moved.items()):
            log.warning(
                "table %s stands in another lake now: it %s there, and what it left stays where it was",
                table, "goes on" if table.is_own else "is read anew",
                extra={"source": self._source.name, "table": str(table), "left": self._url(before),
                       "place": self._url(self.of(table))},
            )  # fmt: skip
            if table in known and not table.is_own:
                self._order(table, before)
        if moved:
            failpoint("places.before_note")
        self._anchor.mark([t for t in moved if not t.is_own], True)
        oids = self._oids(state)
        self._note({t: (self.of(t), _oid(state, t) or oids.get(t, 0)) for t in moved})

    def admits(self, record: LogRecord, schema: TableSchema) -> bool:
        """Whether a record belongs where its table stands now; that is noted before the first lands there.

        Stop the table: SourceRefused, if it would leave its lake with its name; StoreRefused, if its store breaks a
        promise, which is asked before the first of its records.
        """
        table = record.table
        if record.kind != "change" and record.offset <= self._stale.get(str(table), -1):
            # Half of a snapshot that began in another place: its end would make the other half look complete.
            return False
        place, state = self.of(table), self._anchor.state
        assert state is not None
        is_noted = state.places.get(str(table)) == (place, schema.oid)
        if not is_noted:
            self._refuse_leaving(table, schema.oid, place, state)
        if name := self._source.lake_of(str(table)):
            # Not with the lease, as the main one is: one that is away holds up only who writes there.
            url, store = self._stores[name]
            require_promises(store, url)
        if not is_noted and (place != MAIN or self._lake.named or str(table) in state.places):
            self._note({table: (place, schema.oid)})
        return True

    def _note(self, places: dict[TableId, tuple[str, int]]) -> None:
        """Let the anchor have these places, and the OIDs of all known tables that it has none of, those of the main
        lake with them: at once, for they are many. By its OID a table is known again that leaves by a new name."""

        def noted(state: AnchorState) -> AnchorState:
            known = self._oids(state).items() if self._lake.named else ()
            quiet = {
                str(t): (self.of(t), oid) for t, oid in known if not _oid(state, t) and self.of(t) == _noted(state, t)
            }
            merged = {**state.places, **quiet, **{str(table): at for table, at in places.items()}}
            return replace(state, places=dict(sorted(merged.items())))

        self._anchor.change(noted)

    def _oids(self, state: AnchorState) -> dict[TableId, int]:
        """OIDs of the tables that are known and there in this history, without those that the anchor has under another
        name: who has taken a new name is not for us to vouch for."""
        if self._state.get(epoch_fact(self._source.name)) != state.epoch:
            return {}
        names: dict[int, set[str]] = {}
        for name, (_, oid) in state.places.items():
            names.setdefault(oid, set()).add(name)
        there = [t for t in self._state.tables(self._source.name) if t.oid and t.state != "removed"]
        return {t.table: t.oid for t in there if not t.table.is_own and names.get(t.oid, set()) <= {str(t.table)}}

    def _order(self, table: TableId, before: str) -> None:
        """Let the state know the table as one that nothing has landed of, and order its first snapshot."""
        name, reason = self._source.name, f"it stood in {self._url(before)} before"
        self._stale[str(table)] = self._log.end_offset(name)
        cut = self._state.cut(name)
        with self._log.lock(), self._state.transaction() as tx:
            for run in self._state.runs(name, table, states=["pending", "running"]):
                self._state.update_run(run.id, tx=tx, state="cancelled", reason=reason)
            self._state.set(self._fact, self._stale, tx=tx)
            if self._state.table(name, table).state == "removed":
                return
            # As discovery and periodic runs order what must be read whole.
            details = {"settle": True, "whole": True, "why": reason}
            self._state.create_run(name, table, "first", reason=reason, details=details, tx=tx)
            self._state.update_table(name, table, tx=tx, state="new", reason="", hint="")
            if cut is not None and table in cut.versions:
                rest = {t: version for t, version in cut.versions.items() if t != table}
                self._state.save_cut(name, cut.lsn, rest, at_us=cut.at_us, tx=tx)

    def _refuse_leaving(self, table: TableId, table_oid: int, place: str, state: AnchorState) -> None:
        own = self._source.table.get(str(table))
        if own is not None and own.lake:
            return
        for name, (other, oid) in state.places.items():
            if oid and oid == table_oid and name != str(table) and other != place:
                raise SourceRefused(
                    f"table {table} was called {name}, which stands in the lake {self._url(other)}; nobody has said"
                    " where it goes",
                    hint=f'set lake in [source.{self._source.name}.table."{table}"] ("main" is [lake] itself),'
                    f" start again, and `cdc resync {table}`",
                )

    def _url(self, place: str) -> str:
        return place or self._lake.url

    @property
    def _fact(self) -> str:
        return f"moved:{self._source.name}"


def left_behind(source: SourceConfig, lake: LakeConfig, store: ObjectStore) -> list[Finding]:
    """For `check`: tables of a source that have objects in another lake than theirs. One listing, cut off at its first
    object, for each table that another lake is or was named for, and each place."""
    anchor = Anchor(store, source.name).load()
    noted = {name for name, (place, _) in anchor.places.items() if place != MAIN} if anchor is not None else set()
    findings = []
    stores = stores_of(store, lake)
    for name in sorted(noted | {t.name for t in source.table.values() if t.lake}):
        own, path = place_of(lake, source.lake_of(name)), table_path(source.name, _table(name))
        others = {place_of(lake, other): each for other, (_, each) in reversed(stores.items())}
        others.pop(own)
        for _, each in sorted(others.items()):
            if next(each.list(f"{path}/"), None) is None:
                continue
            left = each.location(path)[0]
            findings.append(
                Finding(
                    name="left behind",
                    severity="warning",
                    message=f"it stands in {own or lake.url}; what another lake has of it is kept up by nobody",
                    fix=f"remove {left}/ once {name} is in its new place and nobody reads the old one",
                    object=f"source.{source.name}: {name}",
                )
            )
    return findings


def _noted(state: AnchorState, table: TableId) -> str:
    return state.places.get(str(table), (MAIN, 0))[0]


def _oid(state: AnchorState, table: TableId) -> int:
    return state.places.get(str(table), (MAIN, 0))[1]


def _table(text: str) -> TableId:
    schema, _, name = text.partition(".")
    return TableId(schema, name)
