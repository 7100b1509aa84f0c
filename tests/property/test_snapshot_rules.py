"""Each rule of snapshots is needed: with it the table comes out equal, with exactly this rule switched off it does not.

A scene is a schedule in which the race of its rule happens, by the machinery of the model test. A mutant takes the
place of the function that keeps the rule. The product has no switches for any of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from cdc import candidates, filtered, reading, window
from cdc.backfill import Backfill
from cdc.batch import SNAPSHOT_SEQ, Batch
from cdc.errors import InvariantBroken
from cdc.lake import events, keyless, scan
from cdc.lake.reduce import ABSENT, KNOWN, Barrier
from cdc.log import EventLog
from cdc.ports import Visibility
from cdc.runs import Run
from connectors.postgres.embedded import EmbeddedPostgres
from connectors.postgres.snapshot import PostgresSnapshotReader
from tests.support.oracle import differences
from tests.support.postgres import create_database, drop_database, private_server
from tests.support.programs import Writer
from tests.support.stepped import NotSettled, Stepped, replaced

BIG = "repeat(md5({}::text), 90)"
TURNS = 30
"""Enough for any snapshot here to come to its end, if nothing holds it up."""


class Scene:
    """One source with a few small tables, and the places where its race is made."""

    def __init__(self, stepped: Stepped, *statements: str, published: str = "t") -> None:
        self.stepped = stepped
        self.dsn = stepped.dsn
        self.admin = psycopg.connect(stepped.dsn, autocommit=True)
        self.filters: dict[str, str] = {}
        self._waiting: dict[str, tuple[Callable[[], Any], ...]] = {}
        stepped.between = self._at
        self.run(*statements, f"create publication {stepped.slot} for table {published}")

    def run(self, *statements: str) -> None:
        for statement in statements:
            self.admin.execute(statement.encode())

    def once(self, place: str, *acts: Callable[[], Any]) -> None:
        """When a place is passed for the first time from now on, do this."""
        self._waiting[place] = acts

    def _at(self, place: str) -> None:
        for act in self._waiting.pop(place, ()):
            act()

    def resync(self, table: str = "t") -> None:
        self.stepped.resync(table)

    def turns(self) -> None:
        """Time for whoever does not wait."""
        for _ in range(TURNS):
            self.stepped.turn()

    def spoil(self, updates: dict[str, str], predicate: str) -> None:
        """Make rows of `current` wrong, as a lost change would."""
        self.stepped.spoil("t", updates, predicate)
        self.stepped.prepared()

    def runs(self) -> list[Run]:
        """The runs of `t`, oldest first."""
        assert self.stepped.state is not None
        return [run for run in self.stepped.state.runs("shop") if run.table.name == "t"]

    def told(self, *tables: str) -> list[str]:
        """How source and lake differ."""
        return [
            line
            for table in tables or ("t",)
            for line in differences(self.dsn, self.stepped.lake, table, where=self.filters.get(table, ""))
        ]


KEYED = (
    "create table t (id int primary key, n int, big text)",
    "alter table t alter big set storage external",
    f"insert into t select g, 0, {BIG.format('g')} from generate_series(1, 25) g",
)
BARE = (
    "create table t (n int, text text)",
    "alter table t replica identity full",
    "insert into t select g, 'text' from generate_series(1, 25) g",
)


def unpublished_writer(stepped: Stepped) -> list[str]:
    """It wrote before its table was in the publication, and commits when it has been added."""
    scene = Scene(stepped, *KEYED, "create table other (id int primary key)", published="other")
    stepped.settled()
    writer = Writer(stepped.dsn, 1)
    writer.begin()
    writer.attempt("insert into t values (100, 1, 'before')")
    scene.run(f"alter publication {stepped.slot} add table t")
    stepped.clock.now += 10
    scene.turns()
    writer.end(True)
    writer.close()
    stepped.settled()
    return scene.told()


def unseen_commit(stepped: Stepped) -> list[str]:
    """A commit waits for its standby: streamed and logged, and no snapshot sees it."""
    scene = Scene(stepped, *KEYED)
    stepped.settled()
    hidden(scene, "update t set n = 1 where id = 5")
    return scene.told()


def hidden(scene: Scene, statement: str) -> None:
    writer = Writer(scene.dsn, 1)
    writer.begin()
    writer.attempt(statement)
    writer.commit_unseen()
    scene.stepped.captured()
    scene.resync()
    scene.turns()
    writer.show(scene.admin)
    writer.close()
    scene.stepped.settled()


def rewritten_before_the_lock(stepped: Stepped) -> list[str]:
    """An ALTER rewrites the table just before the snapshot's lock is taken."""
    scene = Scene(stepped, *KEYED)

    def rewritten() -> None:
        scene.run("alter table t alter n type int using n + 0")

    # The first time, it is only looked at how the table is best read.
    scene.once("reader.before_lock", lambda: scene.once("reader.before_lock", rewritten))
    stepped.prepared()
    stepped.until(lambda: any(r.state == "done" for r in scene.runs()), "the first snapshot to end")
    # As it is shown then: the next look at the catalog would find the rewrite, and have the table read anew.
    barrier = stepped.pipeline.admin.barrier()
    stepped.until(
        lambda: stepped.pipeline.has_reached(barrier), "the lake to hold it", parts=("capture", "land", "merge")
    )
    return scene.told()


def changed_in_the_window(stepped: Stepped) -> list[str]:
    """A row changes while its chunk is read."""
    scene = Scene(stepped, *KEYED)
    stepped.settled()
    scene.once("reader.before_read", lambda: scene.run("update t set n = 2 where id = 3", "delete from t where id = 4"))
    scene.once("reader.read", stepped.captured)
    scene.resync()
    stepped.settled()
    return scene.told()


def column_added(stepped: Stepped) -> list[str]:
    """A row was written before its table got a column, and is merged when the lake has the column."""
    scene = Scene(stepped, *KEYED)
    stepped.settled()
    scene.run("update t set n = 5 where id = 1", "insert into t values (50, 1, 'new')")
    scene.run("alter table t add late int default 7", "insert into t values (51, 1, 'newer', 8)")
    stepped.settled()
    return scene.told()


def big_value_left_alone(stepped: Stepped) -> list[str]:
    """What the lake has of a big value is wrong; its row changes, without it, while the chunk that mends it is read."""
    scene = Scene(stepped, *KEYED)
    stepped.settled()
    scene.spoil({"big": "'wrong'"}, "id <= 3")
    scene.once(
        "reader.before_read", lambda: scene.run("update t set n = 1 where id = 1", "update t set id = 102 where id = 2")
    )
    scene.once("reader.read", stepped.captured)
    scene.resync()
    stepped.settled()
    return scene.told()


def moved_into_the_filter(stepped: Stepped) -> list[str]:
    """A row comes into the publication's filter, and the message does not carry its big value."""
    scene = Scene(stepped, *KEYED, published="t where (id % 2 = 0)")
    scene.filters["t"] = "id % 2 = 0"
    stepped.settled()
    scene.run("update t set id = 100 where id = 1")
    stepped.settled()
    return scene.told()


def spoilt_on_a_quiet_source(stepped: Stepped) -> list[str]:
    """Rows of `current` are wrong, and between two snapshots nothing has moved the log."""
    scene = Scene(stepped, *KEYED)
    stepped.settled()
    scene.spoil({"n": "n + 1"}, "id < 20")
    scene.resync()
    stepped.settled()
    return scene.told()


def ghosts(stepped: Stepped) -> list[str]:
    """The lake holds rows that the source has not."""
    scene = Scene(stepped, *KEYED)
    stepped.settled()
    scene.spoil({"id": "id + 1000"}, "id <= 3")
    scene.resync()
    stepped.settled()
    return scene.told()


def wrong_by_the_filter(stepped: Stepped) -> list[str]:
    """Rows that a filter would name are wrong in the lake: by it they are there and should not be, or the other way."""
    scene = Scene(stepped, *KEYED, "update t set n = id % 3")
    stepped.settled()
    stepped.spoil("t", {"n": "1"}, "id = 3")
    stepped.spoil("t", {"id": "id + 1000"}, "id = 4")
    scene.spoil({"n": "5"}, "id = 7")
    stepped.resync_rows("t", "n = 1")
    stepped.settled()
    return scene.told()


def keyless_before(stepped: Stepped) -> list[str]:
    """The snapshot of a table without a key has seen what the stream brings behind it."""
    scene = Scene(stepped, *BARE)
    stepped.settled()
    scene.run("insert into t values (100, 'seen')", "delete from t where n = 3", "update t set n = 30 where n = 4")
    scene.once("reader.begun", lambda: scene.run("insert into t values (101, 'unseen')"))
    scene.resync()
    for _ in range(5):
        stepped.step("backfill")
    stepped.settled()
    return scene.told()


def keyless_unseen(stepped: Stepped) -> list[str]:
    """The snapshot of a table without a key would not see what has been logged."""
    scene = Scene(stepped, *BARE)
    stepped.settled()
    hidden(scene, "insert into t values (100, 'hidden')")
    return scene.told()


# ---- mutants ----


def nobody_has_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PostgresSnapshotReader, "writers", lambda reader: {})


def nothing_is_hidden(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EventLog, "hidden", lambda *_, **__: False)


def snapshot_before_the_lock(patch: pytest.MonkeyPatch) -> None:
    def locked(connection: psycopg.Connection[Any]) -> None:
        connection.execute("select pg_current_snapshot()")

    patch.setattr(Locks, "before", staticmethod(locked))
    replaced(patch, reading._same_file, lambda *_: None)


def changed_rows_stay_in(patch: pytest.MonkeyPatch) -> None:
    kept = window.reconcile

    def reconcile(schema: Any, rows: Any, batches: Any) -> window.Reconciled:
        return replace(kept(schema, rows, batches), keep=np.arange(rows.rows))

    replaced(patch, kept, reconcile)


def absent_is_null(patch: pytest.MonkeyPatch) -> None:
    kept = events.columns_of

    def columns_of(*args: Any, **words: Any) -> Any:
        columns, states = kept(*args, **words)
        return columns, np.where(states == ABSENT, np.uint8(KNOWN), states)

    replaced(patch, kept, columns_of)


def nothing_is_filled_in(patch: pytest.MonkeyPatch) -> None:
    replaced(patch, window._fills, lambda *_: None)


def nothing_is_read_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Backfill, "wish", lambda *_: None)


def counter_begins_again(patch: pytest.MonkeyPatch) -> None:
    kept = window.read_batch

    def read_batch(schema: Any, columns: Any, raw: Any, stamp: window.Stamp, rows: int) -> Batch:
        return kept(schema, columns, raw, replace(stamp, seq=SNAPSHOT_SEQ), rows)

    replaced(patch, kept, read_batch)


def position_of_the_beginning(patch: pytest.MonkeyPatch) -> None:
    kept = window.read_batch

    def read_batch(schema: Any, columns: Any, raw: Any, stamp: window.Stamp, rows: int) -> Batch:
        return kept(schema, columns, raw, replace(stamp, lsn=0), rows)

    replaced(patch, kept, read_batch)


def orphans_stay(patch: pytest.MonkeyPatch) -> None:
    def barriers_of(found: scan.Scan, begins: Any) -> list[Barrier]:
        return sorted(Barrier(order, order) for order in found.truncates)

    replaced(patch, scan.barriers_of, barriers_of)


def deleted_by_the_filter(patch: pytest.MonkeyPatch) -> None:
    kept = filtered.FilteredRun._some

    def some(self: filtered.FilteredRun, *args: Any, **words: Any) -> filtered.Piece:
        return filtered.Piece({"keys": []}, kept(self, *args, **words).step)

    patch.setattr(filtered.FilteredRun, "_some", some)


def nobody_is_asked_for(patch: pytest.MonkeyPatch) -> None:
    replaced(patch, candidates.candidates, lambda *_, **__: candidates.Candidates())


def nothing_was_seen(patch: pytest.MonkeyPatch) -> None:
    kept = keyless.swap_of

    def swap_of(begin: Any) -> keyless.Swap:
        return replace(kept(begin), visibility=Visibility(xmin=3, xmax=3, in_progress=frozenset()))

    replaced(patch, kept, swap_of)


@dataclass(frozen=True, slots=True)
class Case:
    rule: str
    scene: Callable[[Stepped], list[str]]
    mutant: Callable[[pytest.MonkeyPatch], None]
    settings: dict[str, Any]


CASES = [
    Case("0", unpublished_writer, nobody_has_written, {}),
    Case("1", unseen_commit, nothing_is_hidden, {}),
    Case("2", rewritten_before_the_lock, snapshot_before_the_lock, {"watch_every_s": 1e6}),
    Case("6", changed_in_the_window, changed_rows_stay_in, {}),
    Case("7", column_added, absent_is_null, {}),
    Case("8", big_value_left_alone, nothing_is_filled_in, {}),
    Case("9", moved_into_the_filter, nothing_is_read_again, {}),
    Case("10", spoilt_on_a_quiet_source, counter_begins_again, {}),
    Case("10-position", spoilt_on_a_quiet_source, position_of_the_beginning, {}),
    Case("13", ghosts, orphans_stay, {}),
    Case("14", wrong_by_the_filter, deleted_by_the_filter, {}),
    Case("14-candidates", wrong_by_the_filter, nobody_is_asked_for, {}),
    Case("16", keyless_before, nothing_was_seen, {}),
    Case("16-unseen", keyless_unseen, nothing_is_hidden, {}),
]


class Locks:
    """What happens right before a snapshot's lock is asked for."""

    @staticmethod
    def before(connection: psycopg.Connection[Any]) -> None:
        """Nothing, in the product."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """One whose commits wait for a standby that is not there, if their session asks for it."""
    directory = tmp_path_factory.mktemp("rules")
    with private_server(directory, synchronous_standby_names="nobody", synchronous_commit="local") as server:
        yield server


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_with_the_rule_a_table_is_equal_and_without_it_is_not(
    case: Case, server: EmbeddedPostgres, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert outcome(case, server, tmp_path / "kept", mutated=False) == []
    assert outcome(case, server, tmp_path / "broken", mutated=True) != []


def outcome(case: Case, server: EmbeddedPostgres, directory: Path, *, mutated: bool) -> list[str]:
    """How source and lake differ at the end; of a mutant also that it never comes to rest, or that the product notices
    that its own order is broken."""
    name = f"rule_{case.rule.replace('-', '_')}_{mutated}".lower()
    dsn = create_database(server, name)
    try:
        with pytest.MonkeyPatch.context() as patch:
            stepped = Stepped(directory, dsn, patch, chunk_rows=10, **case.settings)
            watch_locks(patch, stepped)
            if mutated:
                case.mutant(patch)
                stepped.rounds_max = 40
            with stepped:
                try:
                    return case.scene(stepped)
                except (NotSettled, InvariantBroken) as error:
                    if not mutated:
                        raise
                    return [str(error)]
    finally:
        drop_database(server, name)


def watch_locks(patch: pytest.MonkeyPatch, stepped: Stepped) -> None:
    """Pass a place of its own right before a snapshot's lock is asked for."""
    execute = psycopg.Connection.execute

    def executed(connection: psycopg.Connection[Any], query: Any, *args: Any, **words: Any) -> Any:
        if not isinstance(query, (str, bytes)) and query.as_string(connection).startswith("lock table"):
            Locks.before(connection)
            stepped.pass_by("reader.before_lock")
        return execute(connection, query, *args, **words)

    patch.setattr(psycopg.Connection, "execute", executed)


# ---- what random programs have found ----


@pytest.fixture
def scene(server: EmbeddedPostgres, tmp_path: Path) -> Iterator[Scene]:
    dsn = create_database(server, "scene")
    with pytest.MonkeyPatch.context() as patch, Stepped(tmp_path, dsn, patch, watch_every_s=50.0) as stepped:
        yield Scene(stepped, *KEYED, "create table zebra (id int primary key)", published="t, zebra")
    drop_database(server, "scene")


def test_an_order_that_joins_one_that_waits_takes_the_mark_away_when_it_is_done(scene: Scene) -> None:
    """The lake would ask for another snapshot for ever, and get one from every daemon that loses its disk."""
    stepped = scene.stepped
    stepped.settled()
    scene.resync()
    scene.run(f"alter publication {stepped.slot} drop table t", "delete from t where id < 5")
    scene.run(f"alter publication {stepped.slot} add table t")
    stepped.settled()  # with no table marked
    assert [r.state for r in scene.runs()] == ["done", "done"], "the order of the finding has joined the operator's"
    assert scene.told() == []


def test_a_table_that_leaves_the_publication_while_it_is_read_is_read_when_it_is_back(scene: Scene) -> None:
    stepped = scene.stepped
    scene.once("reader.read", lambda: scene.run(f"alter publication {stepped.slot} drop table t"))
    stepped.until(
        lambda: any(r.state == "failed" for r in scene.runs()),
        "the run to end",
        parts=("capture", "backfill"),
    )
    scene.run("delete from t where id < 5", f"alter publication {stepped.slot} add table t")
    stepped.settled()
    assert scene.told() == []


def test_a_snapshot_that_was_given_up_is_ordered_again_although_the_catalog_looks_as_before(scene: Scene) -> None:
    """It found the table unpublished; the look that saw it come back had joined that very order."""
    stepped = scene.stepped
    stepped.settled()
    scene.resync()
    assert stepped.state is not None
    stepped.state.update_run(scene.runs()[-1].id, state="failed", reason="not in the publication")
    stepped.until(lambda: scene.runs()[-1].state == "done", "the table to be read all the same")
    assert [r.state for r in scene.runs()] == ["done", "failed", "done"]
    stepped.settled()
    assert scene.told() == []


def test_some_rows_that_wait_for_the_lake_let_the_whole_table_be_read_before(
    server: EmbeddedPostgres, tmp_path: Path
) -> None:
    """What the lake lacks is to come with the whole table, whose run waits for the one that waits for the lake."""
    dsn = create_database(server, "waits")
    with pytest.MonkeyPatch.context() as patch, Stepped(tmp_path, dsn, patch) as stepped:
        scene = Scene(stepped, *KEYED, published="t where (id % 2 = 0)")
        scene.filters["t"] = "id % 2 = 0"
        stepped.settled()
        scene.run("update t set id = 100 where id = 1")
        stepped.resync_rows("t", "n = 1")
        stepped.until(
            lambda: scene.runs()[-1].details.get("phase") == "lake",
            "the rows to be read",
            parts=("capture", "land", "backfill"),
        )
        scene.resync()
        stepped.settled()
        assert [(r.kind, r.state) for r in scene.runs()[1:4]] == [
            ("filtered", "cancelled"), ("resync", "done"), ("filtered", "done"),
        ]  # fmt: skip
        assert scene.told() == []
    drop_database(server, "waits")
