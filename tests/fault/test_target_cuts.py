"""The connection to a target breaks at every message of a push in turn, before it arrives and before its answer does.

Whatever the moment: the target holds all of the push with its acknowledgements or nothing of it, the error says that it
may be tried again, and the next run, planned against what is acknowledged, ends where an undisturbed one does, with
every effect once by the log of a trigger: also where the answer to a COMMIT was lost, also for rows that are appended.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import psycopg
import pytest

from cdc.errors import TargetUnavailable
from connectors.postgres.target import PostgresTarget
from tests.support.statement_cuts import LOST_ANSWER, LOST_ASKING, CuttingWire
from tests.support.target_programs import DDL, Wanted, contents, planned, rejected_of
from tests.support.targets import MemoryLedgers, key_text, target_config
from tests.support.waiting import wait_until

DATES = [f"2024-01-0{i}" for i in range(1, 6)]
BEFORE: Wanted = {
    "parents": {str(i): {"id": i, "u": f"u{i}", "n": i, "d": DATES[i], "note": "old"} for i in (1, 2, 3)},
    "children": {"1": {"id": 1, "parent": 3, "tag": "t"}},
    "events": {},
}
AFTER: Wanted = {
    "parents": {
        "1": {"id": 1, "u": "u2", "n": 2, "d": DATES[2], "note": "new"},
        "2": {"id": 2, "u": "u1", "n": 1, "d": DATES[1], "note": "new"},
        "4": {"id": 4, "u": "u4", "n": 4, "d": DATES[4], "note": "bad"},
    },
    "children": {"2": {"id": 2, "parent": 2, "tag": "t"}},
    "events": {"1": {"id": 1, "note": "e1"}},
}
"""A swap under three unique columns, a refused row, deletes of a child and its parent, an insert, an append."""
HELD = {
    "parents": {i: row for i, row in AFTER["parents"].items() if i != "4"},
    "children": AFTER["children"],
}
RESET = "TRUNCATE public.parents, public.children, public.events, public.seen; DROP SCHEMA IF EXISTS cdc CASCADE"


class Cutting:
    """A target behind a wire that breaks, and what it does."""

    def __init__(self, dsn: str, db: psycopg.Connection, wire: CuttingWire, *, in_ledger: bool) -> None:
        self.db, self.wire, self.in_ledger = db, wire, in_ledger
        self.ledgers = MemoryLedgers()
        self.broken = PostgresTarget(target_config(wire.dsn), self.ledgers)

    def close(self) -> None:
        self.broken.close()

    def reset(self) -> None:
        self.broken.close()
        sessions = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cdc crm' AND datname = current_database()"
        )
        wait_until(lambda: self.db.execute(sessions).fetchone() == (0,))
        self.db.execute(RESET)
        self.ledgers.by_sync.clear()
        self.wire.arm(None)
        self.run(BEFORE)
        self.broken.close()
        wait_until(lambda: self.db.execute(sessions).fetchone() == (0,))

    def run(self, wanted: Wanted) -> set[tuple[str, str]]:
        """Plan and push in one call; the rejects. Without state in the target nothing can be appended."""
        batches = planned(self.broken, wanted if not self.in_ledger else {**wanted, "events": {}}, 50, "r")
        return rejected_of(batches, self.broken.push(batches))

    def run_if_reached(self, wanted: Wanted) -> tuple[set[tuple[str, str]]] | None:
        try:
            return (self.run(wanted),)
        except TargetUnavailable:
            return None

    def cut_at(self, message: int, how: str) -> bool:
        """One push that breaks there, and what must hold; False if it ended before."""
        self.reset()
        self.db.execute("TRUNCATE public.seen")
        self.wire.arm(message, how)
        cuts = self.wire.cuts
        try:
            self.run(AFTER)
        except TargetUnavailable:
            pass
        else:
            if self.wire.cuts == cuts:
                return False
        assert contents(self.db) in (contents_of(BEFORE), HELD), (message, how)
        (rejected,) = wait_until(lambda: self.run_if_reached(AFTER), 60, "the cut session to end")
        assert rejected == {("parents", key_text(4))}
        assert contents(self.db) == HELD
        events = self.db.execute("SELECT id, note FROM public.events").fetchall()
        assert events == ([] if self.in_ledger else [(1, "e1")]), (message, how)
        effects = self.db.execute(
            "SELECT relation, op, id, count(*) FROM public.seen WHERE content IS NULL OR content ~ 'new|t' "
            "GROUP BY 1, 2, 3 HAVING count(*) > CASE WHEN relation = 'parents' AND op = 'UPDATE' THEN 2 ELSE 1 END"
        ).fetchall()
        assert effects == [], (message, how)
        return True


def contents_of(wanted: Wanted) -> Wanted:
    return {sync: wanted[sync] for sync in ("parents", "children")}


@pytest.fixture(params=[False, True], ids=["state in the target", "state in a ledger"])
def cutting(database: str, request: pytest.FixtureRequest) -> Iterator[Cutting]:
    with psycopg.connect(database, autocommit=True) as db:
        db.execute(DDL)  # type: ignore[arg-type]
        dsn, role = database, f"cut_{os.getpid()}"
        if request.param:
            db.execute(f"DROP ROLE IF EXISTS {role}; CREATE ROLE {role} LOGIN")  # type: ignore[arg-type]
            db.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")  # type: ignore[arg-type]
            dsn = psycopg.conninfo.make_conninfo(database, user=role)
        with CuttingWire(dsn) as wire:
            scene = Cutting(dsn, db, wire, in_ledger=request.param)
            yield scene
            scene.close()
        if request.param:
            owned = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"
            wait_until(lambda: db.execute(owned, (role,)).fetchone() == (0,))
            db.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")  # type: ignore[arg-type]


def messages(cutting: Cutting) -> int:
    """How many the undisturbed run sends."""
    cutting.reset()
    cutting.wire.arm(None)
    assert cutting.run(AFTER) == {("parents", key_text(4))}
    return cutting.wire.seen


def test_some_messages_are_lost(cutting: Cutting, rng: random.Random) -> None:
    count = messages(cutting)
    assert count > 50
    chosen = {*rng.sample(range(1, count), 6), *range(count - 1, count + 1)}
    for message in sorted(chosen):
        assert cutting.cut_at(message, rng.choice((LOST_ASKING, LOST_ANSWER)))
    assert cutting.cut_at(count, LOST_ANSWER), "the COMMIT"


@pytest.mark.slow
@pytest.mark.parametrize("how", [LOST_ASKING, LOST_ANSWER])
def test_each_message_is_lost_in_turn(cutting: Cutting, how: str) -> None:
    message = 1
    while cutting.cut_at(message, how):
        message += 1
    assert message > 50
