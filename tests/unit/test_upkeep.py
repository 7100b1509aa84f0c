"""Upkeep between merges: whatever fails in it, merging goes on, cuts tell the truth, and orders are answered."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cdc.batch import Boundary
from cdc.errors import StoreUnavailable
from cdc.freshness import Freshness
from cdc.lake import compaction
from cdc.lake.compaction import FEW, Compactor
from cdc.lake.current import CurrentTable
from cdc.lake.delta import DeltaLog
from cdc.land import LandedCut
from cdc.merge import Cadence, Merger
from cdc.schema import SchemaBook
from cdc.state import State, open_state
from cdc.upkeep import Limits
from tests.unit.test_compaction import Story
from tests.unit.test_lake_current import TABLE

DONE = {"joined": 0, "expired": 0, "cooled": 0, "removed": 0}


class Scene(Story):
    """A changelog with a merger, which is asked for each step. Nothing is due by itself before `due`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.state: State = open_state(root / "state")
        book = SchemaBook(self.state, "shop")
        self.schema = book.register(self.schema)
        self.begin()
        held: Any = SimpleNamespace(check=lambda: None, fence=0)
        self.merger = Merger(
            "shop", self.state, book, self.store, temp_dir=self.temp, cadence=Cadence(0, 1.0, 0),
            freshness=Freshness("shop"), upkeep=Limits(3600, 128 << 20, 3600), own_origins=(), landed=self._landed,
            wish=_never, read_anew=_never, stop_table=_never, is_stopped=lambda table: False, lease=held,
        )  # fmt: skip
        self.through = self.changelog.version()

    def _landed(self) -> LandedCut:
        return LandedCut(Boundary(0, self.lsn, self.lsn + 1), {TABLE: self.through})

    def insert(self, *ids: int) -> None:
        """One landing for each."""
        for number in ids:
            self.through = self.land([{"_op": "c", "id": str(number), "note": "x"}])

    def due(self) -> None:
        self.merger._upkeeps[TABLE]._compact_at = 0.0

    def cut(self) -> int:
        """Version of `current` in the cut that was saved last; asserts that it is of the newest position."""
        found = self.state.cut("shop")
        assert found is not None
        assert found.lsn == self.lsn
        return found.versions[TABLE]


def _never(*_: object) -> None:
    raise AssertionError("not here")


@pytest.fixture
def scene(tmp_path: Path) -> Any:
    made = Scene(tmp_path)
    yield made
    made.state.close()


def fails_once(monkeypatch: pytest.MonkeyPatch, where: type, name: str) -> list[int]:
    """Let a method fail at its next call; what is returned counts its calls."""
    real: Callable[..., Any] = getattr(where, name)
    calls: list[int] = []

    def once(self: Any, *args: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise StoreUnavailable("a blink")
        return real(self, *args, **how)

    monkeypatch.setattr(where, name, once)
    return calls


def test_a_failed_join_leaves_the_cut_at_what_is_merged(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.insert(1)
    scene.merger.step()
    scene.insert(2)
    scene.due()
    failed = fails_once(monkeypatch, Compactor, "join")
    scene.merger.step()
    assert failed
    assert scene.cut() == scene.current.version()
    assert [r["id"] for r in scene.rows()] == [1, 2]


def test_an_object_that_cannot_be_read_is_no_reason_not_to_merge(scene: Scene, tmp_path: Path) -> None:
    scene.insert(*range(FEW))
    scene.merger.step()
    scene.due()
    (tmp_path / "lake" / scene.changelog.path / scene.objects()[-1]).unlink()
    scene.insert(100)
    scene.merger.step()
    assert 100 in {r["id"] for r in scene.rows()}


def test_current_follows_a_join_later_if_it_could_not_at_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.insert(*range(FEW))
    scene.merger.step()
    scene.due()
    failed = fails_once(monkeypatch, CurrentTable, "merge")
    scene.merger.step()
    assert failed
    assert DeltaLog(scene.store, scene.changelog.path).version() > scene.current.merged()
    scene.due()
    scene.merger.step()
    assert DeltaLog(scene.store, scene.changelog.path).version() == scene.current.merged()
    scene.upkeep.vacuum()
    assert len(scene.changes(scene.current.merged())) == FEW + 2
    assert scene.cut() == scene.current.version()


def test_orders_are_answered_with_what_was_done_or_why_not(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.insert(1, 2, 3)
    refused = scene.merger.order_upkeep(TABLE, "compact")
    failed = fails_once(monkeypatch, Compactor, "join")
    scene.merger.step()
    assert failed
    assert isinstance(refused.error, StoreUnavailable)
    compact, vacuum = (scene.merger.order_upkeep(TABLE, kind) for kind in ("compact", "vacuum"))
    for _ in range(3):
        scene.merger.step()
    assert (compact.done, vacuum.done) == (DONE | {"joined": 4}, DONE)
    assert len(scene.objects()) == 1


@pytest.mark.parametrize("limit", [2, 300, 1500, 3000, 5000])
def test_a_full_disk_fails_a_join_and_nothing_else(scene: Scene, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    scene.insert(*range(FEW))
    scene.merger.step()
    scene.due()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    real = compaction._write

    def on_a_small_disk(*args: Any) -> int:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            return real(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(compaction, "_write", on_a_small_disk)
    before = scene.objects()
    scene.merger.step()
    assert scene.objects() == before
    monkeypatch.setattr(compaction, "_write", real)
    scene.due()
    scene.merger.step()
    assert len(scene.objects()) == 1


def test_a_cut_that_could_not_be_saved_is_saved_later(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.insert(*range(FEW))
    scene.merger.step()
    scene.due()
    failed = fails_once(monkeypatch, State, "save_cut")
    with pytest.raises(StoreUnavailable):
        scene.merger.step()
    assert failed
    scene.merger.step()
    assert scene.cut() == scene.current.version()


def test_another_table_of_the_name_is_no_reason_to_end(scene: Scene) -> None:
    scene.insert(1, 2)
    scene.merger.step()
    other = scene.merger._book.register(replace(scene.schema, oid=99, version=0))
    scene.changelog.note_shape(other, 5)
    scene.due()
    scene.merger.step()
    assert scene.cut() == scene.current.version()


def test_an_order_waits_for_the_end_of_a_run(scene: Scene) -> None:
    scene.insert(1, 2, 3)
    run = scene.state.create_run("shop", TABLE, "resync")
    order = scene.merger.order_upkeep(TABLE, "compact")
    for _ in range(3):
        scene.merger.step()
    assert order.done is None
    scene.state.update_run(run.id, state="cancelled")
    for _ in range(3):
        scene.merger.ask()
        scene.merger.step()
    assert order.done == DONE | {"joined": 4}


def test_what_lands_while_objects_are_joined_is_not_joined(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may begin meanwhile, and its end is merged by what its begin says."""
    scene.insert(*range(FEW))
    scene.merger.step()
    real = Compactor._replace

    def landing_meanwhile(self: Compactor, *args: Any) -> Any:
        if len(scene.objects()) == FEW + 1:
            scene.insert(100)
        return real(self, *args)

    monkeypatch.setattr(Compactor, "_replace", landing_meanwhile)
    assert scene.upkeep.compact(everything=True) == FEW + 1
    assert scene.upkeep.compact(everything=True) == 0, "it is not merged yet"
    scene.merger.step()
    assert 100 in {r["id"] for r in scene.rows()}
    assert scene.upkeep.compact(everything=True) == 2
