"""When a table is merged, if the operator allows it to be stale: big tables wait for many changes, and what must not
wait does not. What a merge does is not looked at here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cdc.batch import Boundary
from cdc.freshness import LANDINGS_MAX, Freshness, freshness_fact, lag_seconds
from cdc.lake.changelog import ChangelogTable
from cdc.lake.compaction import FEW
from cdc.lake.current import CurrentTable, open_current
from cdc.lake.delta import DeltaLog
from cdc.lake.layout import changelog_path
from cdc.land import LandedCut
from cdc.merge import Cadence, Merger
from cdc.metrics import TABLE_LAG_SECONDS, UNMERGED_ROWS
from cdc.schema import SchemaBook
from cdc.state import State, open_state
from cdc.table import TableId, TableSchema
from cdc.upkeep import Limits
from connectors.local.store import LocalStore
from tests.support.changelogs import batch_of
from tests.support.waiting import wait_until
from tests.unit.test_lake_current import SCHEMA

BIG, SMALL = TableId("public", "big"), TableId("public", "small")
BIG_ROWS, SMALL_ROWS = 1000, 20
ALLOWED_S = 100.0


class Shop:
    """Two tables that land and are merged; the clock is the machine's, changes are as old as is said."""

    def __init__(self, root: Path, *, max_staleness_s: float = ALLOWED_S) -> None:
        self.state: State = open_state(root / "state")
        self.store = LocalStore(root / "lake")
        self.temp = root / "temp"
        self.temp.mkdir()
        self.book = SchemaBook(self.state, "shop")
        self.freshness = Freshness("shop")
        self.allowed_s = max_staleness_s
        self.schemas: dict[TableId, TableSchema] = {}
        self.versions: dict[TableId, int] = {}
        self.lsn = 0
        for oid, (table, rows) in enumerate(((BIG, BIG_ROWS), (SMALL, SMALL_ROWS))):
            self.schemas[table] = self.book.register(replace(SCHEMA, table=table, oid=oid))
            self.state.update_table("shop", table, state="streaming")
            self._snapshot(table, rows)
        self.merger = self.begin()
        self.merger.step()

    def begin(self) -> Merger:
        """A merger that has merged nothing yet."""
        held: Any = SimpleNamespace(check=lambda: None, fence=0)
        return Merger(
            "shop", self.state, self.book, self.store, temp_dir=self.temp,
            cadence=Cadence(0, 1.0, self.allowed_s), freshness=self.freshness, upkeep=Limits(3600, 128 << 20, 3600),
            own_origins=("cdc_crm",), landed=self._landed, wish=_never, read_anew=_never, stop_table=_never,
            is_stopped=lambda table: False, lease=held,
        )  # fmt: skip

    def _landed(self) -> LandedCut:
        return LandedCut(Boundary(0, self.lsn, self.lsn + 1), dict(self.versions))

    def _snapshot(self, table: TableId, rows: int) -> None:
        facts = {"kind": "first", "oid": str(self.schemas[table].oid)}
        begin, end = ({"_op": "s", "_raw": {"event": event, **facts}} for event in ("begin", "end"))
        values = [begin, *({"_op": "r", "id": str(n), "note": "old"} for n in range(rows)), end]
        values = [{"_lsn": 0, "_seq": (1 << 62) + n, "_run": str(table), **row} for n, row in enumerate(values)]
        writer = ChangelogTable(self.store, "shop", table).writer(self.temp)
        for chunk, part in enumerate((values[:1], values[1:-1], values[-1:])):
            writer.add(batch_of(self.schemas[table], part), chunk=chunk)
        self._commit(table, writer.commit(Boundary(0, 0, 1)).version, len(values))

    def update(self, table: TableId, rows: int, *, age_s: float = 0.0) -> None:
        """So many rows change, in one landing."""
        self.lsn += 10
        values = [{"_op": "u", "_lsn": self.lsn, "_seq": n, "id": str(n), "note": "new"} for n in range(rows)]
        writer = ChangelogTable(self.store, "shop", table).writer(self.temp)
        writer.add(batch_of(self.schemas[table], values))
        self.freshness.read(table, int((time.time() - age_s) * 1e6))
        self._commit(table, writer.commit(Boundary(0, self.lsn, self.lsn + 1)).version, rows)

    def _commit(self, table: TableId, version: int, rows: int) -> None:
        self.versions[table] = version
        self.freshness.landed(table, version, rows)

    def step(self) -> set[TableId]:
        """One step; which tables it merged."""
        before = self._merged()
        self.merger.step()
        return {table for table, version in self._merged().items() if version != before[table]}

    def _merged(self) -> dict[TableId, int]:
        return {t: CurrentTable(self.store, "shop", t, temp_dir=self.temp).merged() for t in (BIG, SMALL)}

    def objects(self, table: TableId) -> list[str]:
        return [f.path for f in DeltaLog(self.store, changelog_path("shop", table)).files()]

    def cut_lsn(self) -> int:
        found = self.state.cut("shop")
        assert found is not None
        assert set(found.versions) == {BIG, SMALL}
        return found.lsn


def _never(*_: object) -> None:
    raise AssertionError("not here")


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    made = Shop(tmp_path)
    yield made
    made.state.close()


def test_a_wish_that_nobody_repeats_ends(shop: Shop) -> None:
    """Else one table whose snapshot takes hours would keep every landing merged at once."""
    shop.update(BIG, 5)
    shop.merger.ask()
    assert shop.step() == {BIG}
    shop.update(BIG, 5)
    shop.merger._asked_until = time.monotonic() + 0.05
    wait_until(lambda: time.monotonic() > shop.merger._asked_until)
    assert shop.step() == set()


def test_a_table_waits_until_a_tenth_of_it_has_changed(shop: Shop) -> None:
    shop.update(BIG, 99)
    assert shop.step() == set()
    shop.update(BIG, 1)
    assert shop.step() == {BIG}
    assert shop.freshness.tail(BIG).rows == 0


def test_nothing_waits_where_the_operator_sets_no_bound(tmp_path: Path) -> None:
    shop = Shop(tmp_path, max_staleness_s=0)
    shop.update(BIG, 1)
    assert shop.step() == {BIG}
    shop.state.close()


def test_a_cut_is_recorded_only_where_no_table_was_put_off(shop: Shop) -> None:
    began = shop.cut_lsn()
    shop.update(BIG, 5)
    shop.update(SMALL, 5)
    assert shop.step() == {SMALL}, "one waits for no other"
    assert shop.cut_lsn() == began, "models read both tables where both stood last"
    assert shop.merger.merged_end_lsn == began + 1
    shop.merger.ask()
    assert shop.step() == {BIG}
    assert shop.cut_lsn() == shop.lsn
    assert shop.merger.merged_end_lsn == shop.lsn + 1


def test_all_are_merged_before_one_is_staler_than_is_allowed(shop: Shop) -> None:
    shop.update(BIG, 1, age_s=ALLOWED_S - 60)
    shop.update(SMALL, 1)
    assert shop.step() == set()
    shop.update(BIG, 1, age_s=ALLOWED_S + 1)
    assert shop.step() == {BIG, SMALL}, "so that there is a cut"
    assert shop.cut_lsn() == shop.lsn


def test_small_objects_are_joined_between_cuts_and_what_the_cut_shows_stays(shop: Shop) -> None:
    cut = shop.state.cut("shop")
    assert cut is not None
    shop.update(BIG, 1)
    for _ in range(FEW + 1):
        shop.update(SMALL, 5)
        assert shop.step() == {SMALL}
    before = len(shop.objects(SMALL))
    shop.merger._upkeeps[SMALL]._compact_at = shop.merger._upkeeps[SMALL]._vacuum_at = 0.0
    shop.step()
    assert len(shop.objects(SMALL)) <= before - FEW + 1
    assert shop.merger._upkeeps[SMALL].is_due(), "behind the next cut"
    assert shop.state.cut("shop") == cut
    old = open_current(shop.store, "shop", SMALL, cut.versions[SMALL])
    assert old is not None
    assert set(old.to_table(columns=["note"]).column("note").to_pylist()) == {"old"}
    shop.merger.ask()
    shop.step()
    assert not shop.merger._upkeeps[SMALL].is_due()


def test_syncs_hear_of_a_change_when_the_cut_has_it(shop: Shop) -> None:
    shop.update(BIG, 1)
    shop.update(SMALL, 5)
    shop.step()
    assert shop.merger.changed_by_others == {BIG: 0, SMALL: 0}, "a change is merged, but in no cut"
    shop.merger.ask()
    shop.step()
    assert shop.merger.changed_by_others == {BIG: shop.lsn, SMALL: shop.lsn}


def test_what_landed_before_the_start_is_merged_at_once(shop: Shop) -> None:
    """How much it is, nobody knows any more."""
    shop.update(BIG, 1)
    shop.freshness = Freshness("shop")
    shop.merger = shop.begin()
    assert shop.step() == {BIG}
    assert shop.cut_lsn() == shop.lsn


def test_a_version_without_known_rows_is_merged_at_once(shop: Shop) -> None:
    """A landing whose answer was lost is found in the lake, and its rows are not counted as landed."""
    shop.update(BIG, 1)
    shop.merger.ask()
    shop.step()
    shop.lsn += 10
    writer = ChangelogTable(shop.store, "shop", BIG).writer(shop.temp)
    writer.add(batch_of(shop.schemas[BIG], [{"_op": "u", "_lsn": shop.lsn, "_seq": 0, "id": "1", "note": "lost"}]))
    shop._commit(BIG, writer.commit(Boundary(0, shop.lsn, shop.lsn + 1)).version, 0)
    assert shop.step() == {BIG}


def test_what_a_table_lacks_is_told_by_step_and_forgotten_when_it_has_it(shop: Shop) -> None:
    def told() -> tuple[dict[str, float | None], float, float, float]:
        shop.freshness.tell(shop.state)
        landed, merged = (TABLE_LAG_SECONDS.labels("shop", str(BIG), s)._value.get() for s in ("landed", "merged"))
        fact = shop.state.get(freshness_fact("shop"))
        return lag_seconds(fact, BIG, time.time()), landed, merged, UNMERGED_ROWS.labels("shop", str(BIG))._value.get()

    assert told() == ({"landed": 0.0, "merged": 0.0}, 0, 0, 0)
    shop.freshness.read(BIG, int((time.time() - 50) * 1e6))
    lag, landed, merged, rows = told()
    assert 50 <= (lag["landed"] or 0) == lag["merged"] < 60
    assert 50 <= landed == merged < 60
    assert rows == 0
    shop.update(BIG, 7)
    lag, landed, merged, rows = told()
    assert (lag["landed"], landed, rows) == (0.0, 0, 7)
    assert 50 <= merged < 60
    shop.merger.ask()
    shop.step()
    assert told() == ({"landed": 0.0, "merged": 0.0}, 0, 0, 0)
    assert lag_seconds(None, BIG, 0) == {"landed": None, "merged": None}


def test_a_table_that_rests_is_not_told_of(shop: Shop) -> None:
    shop.update(BIG, 7)
    shop.freshness.tell(shop.state)
    assert str(BIG) in (shop.state.get(freshness_fact("shop")) or {})
    shop.state.update_table("shop", BIG, state="stopped", reason="for a test")
    shop.freshness.tell(shop.state)
    assert str(BIG) not in (shop.state.get(freshness_fact("shop")) or {})
    assert ("shop", str(BIG)) not in UNMERGED_ROWS._metrics


def test_landings_that_nobody_merges_take_bounded_room() -> None:
    freshness = Freshness("shop")
    for version in range(3 * LANDINGS_MAX):
        freshness.read(BIG, version * 1_000_000)
        freshness.landed(BIG, version, 2)
    assert len(freshness._landings[BIG]) == LANDINGS_MAX
    assert freshness.tail(BIG) == (6 * LANDINGS_MAX, 0.0)
    freshness.merged(BIG, 9)
    assert freshness.tail(BIG) == (6 * LANDINGS_MAX - 20, 10.0)
    freshness.merged(BIG, 3 * LANDINGS_MAX)
    assert freshness.tail(BIG).rows == 0
