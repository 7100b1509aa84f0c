"""The ledger of acknowledgements: what it returns from is there, whoever dies or writes beside it, in few objects."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cdc.errors import FormatTooNew, LedgerConflict, StoreRefused, StoreUnavailable, Verdict
from cdc.lake import ledger as module
from cdc.lake.layout import acks_path, table_of_path
from cdc.lake.ledger import LakeLedger
from cdc.lake.routing import RoutingStore
from cdc.ports import StoredObject
from cdc.sink import ACKS, IN_DOUBT
from connectors.local.store import LocalStore
from tests.support.ledgers import Entry, acks, content


class Died(BaseException):
    """Stands for SIGKILL between two steps of the store."""


class Store(LocalStore):
    """Fails as told: `mute`: a write happens and is not answered; `dies_at`: the process dies before that write, or,
    with a half more, after it."""

    mute = False
    dies_at = -1.0
    steps = 0

    def put(self, key: str, data: Any, *, if_absent: bool = False, if_match: str | None = None) -> str:
        etag = self._step(lambda: super(Store, self).put(key, data, if_absent=if_absent, if_match=if_match))
        if self.mute:
            raise StoreUnavailable("no answer")
        return etag

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._step(lambda key=key: super(Store, self).delete([key]))  # type: ignore[misc]

    def _step(self, work: Callable[[], Any]) -> Any:
        self.steps += 1
        if self.dies_at == self.steps:
            raise Died
        done = work()
        if self.dies_at == self.steps + 0.5:
            raise Died
        return done


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture(autouse=True)
def _few_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINKS_MAX", 4)


def objects(store: Store) -> list[str]:
    return [stored.key for stored in store.list("")]


def test_the_last_acknowledgement_of_a_key_counts(store: Store) -> None:
    ledger = LakeLedger(store, "s")
    assert content(ledger) == {}
    ledger.record(acks=acks(("a", "x", 1), ("b", "x", 1)))
    ledger.record(acks=acks(("b", "y", 2), ("c", "z", 1), ("c", "w", 2)))
    ledger.record(acks=acks(("a", "", 2)))
    for reader in (ledger, LakeLedger(store, "s")):
        assert content(reader) == {"a": ("", 2), "b": ("y", 2), "c": ("w", 2)}
    assert content(LakeLedger(store, "other")) == {}
    ledger.record()
    assert len(objects(store)) == 3


def test_an_attempt_is_in_doubt_until_it_is_acknowledged_or_settled(store: Store) -> None:
    ledger = LakeLedger(store, "s")
    ledger.record(acks=acks(("a", "x", 1), ("b", "x", 1)))
    ledger.record(attempts=acks(("a", "y", 1), ("b", "", 1), ("new", "x", 0), ("never", "x", 0)))
    assert content(LakeLedger(store, "s")) == {
        "a": (IN_DOUBT, 1), "b": (IN_DOUBT, 1), "new": (IN_DOUBT, 0), "never": (IN_DOUBT, 0),
    }  # fmt: skip
    assert dict(LakeLedger(store, "s").attempts()) == dict(ledger.attempts()) == {
        "a": ("y", 1), "b": ("", 1), "new": ("x", 0), "never": ("x", 0),
    }  # fmt: skip
    ledger.record(acks=acks(("a", "y", 2)), settled=acks(("b", "", 2), ("new", "", 1), ("never", "", 0)))
    assert content(LakeLedger(store, "s")) == {"a": ("y", 2), "b": ("x", 2), "new": ("", 1)}
    assert dict(LakeLedger(store, "s").attempts()) == dict(ledger.attempts()) == {}


def test_forgetting_empties_digests_and_keeps_versions_ahead_of_attempts(store: Store) -> None:
    ledger = LakeLedger(store, "s")
    ledger.forget()
    assert objects(store) == []
    ledger.record(acks=acks(("a", "x", 3), ("b", "", 2)), attempts=acks(("c", "x", 5)))
    ledger.forget()
    ledger.forget()
    assert content(LakeLedger(store, "s")) == content(ledger) == {"a": ("", 3), "b": ("", 2), "c": ("", 6)}
    assert dict(ledger.attempts()) == {}
    assert len(objects(store)) == 1


def test_objects_stay_few_and_big_links_are_not_rewritten_for_small_ones(store: Store) -> None:
    ledger = LakeLedger(store, "s")
    ledger.record(acks=acks(*((f"k{i}", "x", 1) for i in range(1000))))
    first = objects(store)
    for i in range(100):
        ledger.record(acks=acks((f"n{i}", "y", 1)))
        assert len(objects(store)) <= 5 + 8
    assert objects(store)[0] == first[0]
    assert content(LakeLedger(store, "s")) == {
        **{f"k{i}": ("x", 1) for i in range(1000)}, **{f"n{i}": ("y", 1) for i in range(100)},
    }  # fmt: skip


# ---- other writers, lost answers ----


def test_a_second_writer_is_told_and_changes_nothing(store: Store) -> None:
    one, other = LakeLedger(store, "s"), LakeLedger(store, "s")
    one.record(acks=acks(("a", "x", 1)))
    other.read()
    one.record(acks=acks(("a", "y", 2)))
    with pytest.raises(LedgerConflict) as told:
        other.record(acks=acks(("a", "theirs", 2)))
    assert told.value.verdict is Verdict.OPERATOR
    assert "one daemon" in told.value.hint
    assert content(one) == {"a": ("y", 2)}
    other.read()
    other.record(acks=acks(("a", "z", 3)))
    with pytest.raises(LedgerConflict):
        one.record(acks=acks(("b", "x", 1)))
    assert content(one) == {"a": ("z", 3)}


def test_a_writer_whose_next_number_was_joined_and_removed_meanwhile_is_told_too(store: Store) -> None:
    late, busy = LakeLedger(store, "s"), LakeLedger(store, "s")
    late.record(acks=acks(("a", "x", 1)))
    for i in range(20):
        busy.record(acks=acks(("a", f"y{i}", i + 2)))
    last = content(busy)
    next_of_late = f"{acks_path('s')}/{2:020d}.acks"
    assert next_of_late not in objects(store), "the number is free again"
    with pytest.raises(LedgerConflict):
        late.record(acks=acks(("a", "late", 2)))
    assert content(LakeLedger(store, "s")) == last
    busy.record(acks=acks(("b", "x", 1)))
    assert next_of_late not in objects(store), "what it left is swept"
    assert content(LakeLedger(store, "s")) == {**last, "b": ("x", 1)}


def test_forgetting_beside_another_writer_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = LakeLedger(store, "s"), LakeLedger(store, "s")
    one.record(acks=acks(("a", "x", 1)))
    read = other.read

    def read_then_overtaken() -> pa.Table:
        found = read()
        one.record(acks=acks(("a", "y", 2)))
        return found

    monkeypatch.setattr(other, "read", read_then_overtaken)
    with pytest.raises(LedgerConflict):
        other.forget()
    assert content(one) == {"a": ("y", 2)}


@pytest.mark.parametrize("again", [("a", "y", 2), ("a", "z", 2)])
def test_a_write_whose_answer_was_lost_is_our_own_when_it_is_made_again(store: Store, again: Entry) -> None:
    ledger = LakeLedger(store, "s")
    ledger.record(acks=acks(("a", "x", 1)))
    store.mute = True
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            ledger.record(acks=acks(("a", "y", 2)))
    store.mute = False
    ledger.record(acks=acks(again))
    ledger.record(acks=acks(("b", "x", 1)))
    assert content(LakeLedger(store, "s")) == {"a": again[1:], "b": ("x", 1)}


def test_a_join_whose_answer_was_lost_harms_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = LakeLedger(store, "s")
    for i in range(4):
        ledger.record(acks=acks((f"k{i}", "x", 1)))
    puts = 0
    put = store.put

    def second_is_mute(*args: Any, **kwargs: Any) -> str:
        nonlocal puts
        puts += 1
        etag = put(*args, **kwargs)
        if puts == 2:
            raise StoreUnavailable("no answer")
        return etag

    monkeypatch.setattr(store, "put", second_is_mute)
    ledger.record(acks=acks(("k4", "x", 1)))
    assert puts == 2
    ledger.record(acks=acks(("k5", "x", 1)))
    assert content(LakeLedger(store, "s")) == {f"k{i}": ("x", 1) for i in range(6)}


def test_a_reader_finds_its_way_while_objects_are_joined_under_it(store: Store) -> None:
    writer = LakeLedger(store, "s")
    for i in range(4):
        writer.record(acks=acks((f"k{i}", "x", 1)))

    class Overtaken(Store):
        lists = 0

        def list(self, prefix: str) -> Iterator[StoredObject]:
            found = list(super().list(prefix))
            self.lists += 1
            if self.lists == 1:
                writer.record(acks=acks(("k4", "x", 1)))  # joins, and removes all that were listed
            return iter(found)

    reader = Overtaken(store._root)
    assert set(content(LakeLedger(reader, "s"))) == {f"k{i}" for i in range(5)}
    assert reader.lists == 2


# ---- what is broken ----


def test_a_lost_object_and_a_strange_one_are_told(store: Store) -> None:
    ledger = LakeLedger(store, "s")
    for i in range(3):
        ledger.record(acks=acks((f"k{i}", "x", 1)))
    keys = objects(store)
    kept = store.get(keys[1])
    assert kept is not None
    store.delete([keys[1]])
    with pytest.raises(StoreRefused, match="incomplete"):
        LakeLedger(store, "s").read()
    store.put(keys[1], b"PAR1 or not")
    with pytest.raises(StoreRefused, match="no table of acknowledgements"):
        LakeLedger(store, "s").read()
    store.put(keys[1], kept[0])
    assert len(content(LakeLedger(store, "s"))) == 3


def test_a_newer_format_is_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(module, "FORMAT", 2)
        LakeLedger(store, "s").record(acks=acks(("a", "x", 1)))
    with pytest.raises(FormatTooNew):
        LakeLedger(store, "s").read()


def test_its_objects_are_nothing_of_a_table_and_stand_in_the_main_lake(store: Store, tmp_path: Path) -> None:
    other = LocalStore(tmp_path / "other")
    routed = RoutingStore(store, {"other": other}, lambda source, table: "other")
    LakeLedger(routed, "nightly-crm").record(acks=acks(("a", "x", 1)))
    (key,) = objects(store)
    assert table_of_path(key) is None
    assert not key.endswith(".parquet")
    assert list(other.list("")) == []


# ---- dying at each step; random programs against a model ----


def steps(store: Store) -> None:
    """Joins, sweeps and forgets once."""
    ledger = LakeLedger(store, "s")
    for i in range(7):
        ledger.record(acks=acks((f"k{i}", "x", 1), ("each", f"v{i}", i + 1)), attempts=acks(("next", f"v{i}", i)))
    ledger.forget()


def test_dying_before_or_after_any_step_of_the_store_loses_and_doubles_nothing(tmp_path: Path) -> None:
    whole = Store(tmp_path / "whole")
    steps(whole)
    assert whole.steps > 15
    for half in range(2, 2 * whole.steps + 2):
        store = Store(tmp_path / f"at{half}")
        store.dies_at = half / 2
        with pytest.raises(Died):
            steps(store)
        store.dies_at = -1
        rows = content(LakeLedger(store, "s"))
        version = rows.get("each", ("", 0))[1]
        is_forgotten = bool(rows) and not any(digest for digest, _ in rows.values())
        expected = {f"k{i}": ("" if is_forgotten else "x", 1) for i in range(version)}
        if version:
            expected["each"] = ("" if is_forgotten else f"v{version - 1}", version)
            expected["next"] = ("", version) if is_forgotten else (IN_DOUBT, version - 1)
        assert rows == expected
        assert version == 7 or not is_forgotten
        after = LakeLedger(store, "s")
        after.record(acks=acks(("after", "x", 1)))
        assert content(LakeLedger(store, "s")) == {**rows, "after": ("x", 1)}
        assert len(objects(store)) <= 6, "leftovers are gone"


class Model:
    """What the ledger must say, in plain Python."""

    def __init__(self) -> None:
        self.acked: dict[str, tuple[str, int]] = {}
        self.settled: dict[str, int] = {}
        self.tried: dict[str, tuple[str, int]] = {}

    def record(self, taken: list[Entry], settled: list[Entry], attempts: list[Entry]) -> None:
        for key, digest, version in taken:
            self.acked[key] = (digest, version)
            self.settled.pop(key, None)
            self.tried.pop(key, None)
        for key, _, version in settled:
            self.settled[key] = version
            self.tried.pop(key, None)
        for key, digest, version in attempts:
            self.tried[key] = (digest, version)
            self.settled.pop(key, None)

    def forget(self) -> None:
        known = self.content()
        self.acked = {k: ("", v + (digest == IN_DOUBT)) for k, (digest, v) in known.items()}
        self.settled, self.tried = {}, {}

    def content(self) -> dict[str, tuple[str, int]]:
        known = dict(self.acked)
        for key, version in self.settled.items():
            known[key] = (self.acked.get(key, ("", 0))[0], version)
            if known[key] == ("", 0):
                del known[key]
        return known | {key: (IN_DOUBT, version) for key, (_, version) in self.tried.items()}


@pytest.mark.parametrize("number", range(4))
def test_random_programs_say_what_a_plain_model_says(number: int, tmp_path: Path, rng: random.Random) -> None:
    rng = random.Random(rng.randrange(1 << 30) + number)
    store, model = Store(tmp_path), Model()
    ledger = LakeLedger(store, "s")

    def entries() -> list[Entry]:
        keys = rng.sample(range(30), rng.choice([0, 0, 1, 3, 12]))
        return [(f"k{k}", rng.choice(["x", "y", ""]), rng.randrange(9)) for k in keys]

    for _ in range(40):
        if rng.random() < 0.1:
            ledger.forget()
            model.forget()
        elif rng.random() < 0.1:
            ledger = LakeLedger(store, "s")
        else:
            taken, settled, attempts = entries(), entries(), entries()
            store.mute = rng.random() < 0.2
            try:
                ledger.record(acks=acks(*taken), settled=acks(*settled), attempts=acks(*attempts))
            except StoreUnavailable:
                store.mute = False
                if rng.random() < 0.5:  # it happened, and a new process finds it
                    ledger = LakeLedger(store, "s")
                else:
                    ledger.record(acks=acks(*taken), settled=acks(*settled), attempts=acks(*attempts))
            store.mute = False
            model.record(taken, settled, attempts)
        assert content(LakeLedger(store, "s")) == model.content()
        assert dict(ledger.attempts()) == model.tried
        assert len(objects(store)) <= 12


@pytest.mark.slow
def test_a_million_keys_are_read_in_about_a_second(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINKS_MAX", 48)
    ledger, size = LakeLedger(store, "s"), 20_000
    for start in range(0, 1_000_000, size):
        keys = [f'["customer {k}"]' for k in range(start, start + size)]
        rows = pa.table({"key": keys, "digest": [f"{hash(k):032x}" for k in keys], "version": [1] * size}, schema=ACKS)
        ledger.record(attempts=rows)
        ledger.record(acks=rows)
    begin = time.process_time()
    assert LakeLedger(store, "s").read().num_rows == 1_000_000
    assert time.process_time() - begin < 3
