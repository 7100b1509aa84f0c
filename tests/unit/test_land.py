"""When landing is due, and where it may cut the log: never inside of a big transaction whose Commit has not come."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cdc import land
from cdc.batch import Boundary
from cdc.evolution import Evolution
from cdc.lake import objects
from cdc.land import Lander, LandPoint, LogReader
from cdc.log import EventLog
from cdc.schema import SchemaBook
from cdc.stage import Stage
from connectors.local.store import LocalStore
from tests.support.logs import ORDERS, PEOPLE, SOURCE, Row, batch, chunk_rows, open_log, portion


class Gate:
    def landed(self, boundary: Boundary) -> None:
        pass


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[EventLog, LogReader]]:
    monkeypatch.setattr(land, "OPEN_BYTES", 1)
    state, log = open_log(tmp_path, bytes_max=1_000_000)
    log.set_position(SOURCE, Boundary(1, 10, 11))
    made: Any = Gate()
    reader = LogReader(SOURCE, log, state, made, lambda: 0.01)
    reader.open(LandPoint(0, None))
    yield log, reader
    state.close()


def cut(reader: LogReader) -> Boundary | None:
    group = reader.read(0.01)
    return group.cut if group is not None else None


def test_a_position_before_an_open_transaction_is_no_cut_for_its_rows(parts: tuple[EventLog, LogReader]) -> None:
    """The server's position moved on while it decoded the transaction, and nobody has asked before its rows came."""
    log, reader = parts
    assert cut(reader) == Boundary(1, 10, 11)
    log.append(SOURCE, portion(lsn=10, end_lsn=90))
    log.append(SOURCE, portion(batch(ORDERS, [Row(100, 0, 1, "open")])))
    first = reader.read(0.01)
    assert first is not None
    assert (len(first.records), first.cut) == (1, None)
    assert reader.read(0.01) is None, "its rows wait for their Commit"
    log.append(SOURCE, portion(lsn=100))
    assert cut(reader) == Boundary(1, 100, 101)


def test_a_chunk_between_the_parts_of_an_open_transaction_is_no_cut_either(
    parts: tuple[EventLog, LogReader],
) -> None:
    log, reader = parts
    log.append(SOURCE, portion(batch(ORDERS, [Row(100, 0, 1, "open")])))
    assert cut(reader) is None
    log.append_chunk(SOURCE, [batch(PEOPLE, chunk_rows(10, 0, 3), op="r", run="run")], run="run", chunk=1)
    group = reader.read(0.01)
    assert group is not None
    assert (len(group.records), group.cut) == (1, None)
    log.append(SOURCE, portion(batch(ORDERS, [Row(100, 1, 2, "last")]), lsn=100))
    assert cut(reader) == Boundary(1, 100, 101)


class Landing:
    """A log and the landing of it, step by step; nothing is due by time."""

    def __init__(self, directory: Path, *, log_bytes: int = 1_000_000, land_bytes: int = 1 << 30) -> None:
        self.state, self.log = open_log(directory, bytes_max=log_bytes)
        book, self.store = SchemaBook(self.state, SOURCE), LocalStore(directory / "lake")
        self.orders = book.register(ORDERS)

        def never(*_: object) -> Any:
            raise AssertionError("not here")

        shapes = Evolution(
            SOURCE, self.state, book, self.store, contract=lambda table: "evolve", read_anew=never, alert=never
        )
        held: Any = SimpleNamespace(check=lambda: None, fence=0)
        self.lander = Lander(
            SOURCE, self.log, self.state, book, self.store, epoch=1, temp_dir=directory, land_every_s=3600,
            land_bytes=land_bytes, lease=held, stop_table=never, is_stopped=lambda table: False, evolution=shapes,
        )  # fmt: skip
        gate: Any = Gate()
        self._stage: Stage[Any, Any] = Stage(
            "land", LogReader(SOURCE, self.log, self.state, gate, self.lander.due_in_s), self.lander
        )
        self.log.set_position(SOURCE, Boundary(1, 0, 0))

    def landed(self) -> int:
        """The position up to which everything has landed, after what is logged was looked at."""
        for _ in range(3):
            self._stage.step(0)
        return self.lander.landed.lsn if self.lander.landed is not None else -1


def test_whoever_asks_is_served_and_the_rows_that_come_later_wait_for_their_time(tmp_path: Path) -> None:
    landing = Landing(tmp_path)
    log, lander, orders, landed = landing.log, landing.lander, landing.orders, landing.landed
    log.append(SOURCE, portion(batch(orders, [Row(100, 0, 1, "one")]), lsn=100))
    assert landed() < 100, "it is not due"
    done = lander.ask()
    assert not done()
    assert landed() == 100
    assert done()
    assert lander.ask()(), "there is nothing to land"
    lander.ask()
    log.append(SOURCE, portion(batch(orders, [Row(200, 0, 2, "two")]), lsn=200))
    assert landed() == 100, "nobody waits for what came after the question"
    lander.ask()
    assert landed() == 200
    log.append(SOURCE, portion(batch(orders, [Row(300, 0, 3, "open")])))
    lander.ask()
    log.append(SOURCE, portion(batch(orders, [Row(300, 1, 4, "last")]), lsn=300))
    assert landed() == 200, "what was open is not what was asked for"
    landing.state.close()


def test_a_landing_is_due_by_the_size_of_its_objects_and_not_by_that_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    monkeypatch.setattr(objects, "GROUP_BYTES", 20_000)
    land_bytes, lsn = 50_000, 0
    landing = Landing(tmp_path, log_bytes=100_000_000, land_bytes=land_bytes)

    def append(note: Callable[[], str]) -> int:
        nonlocal lsn
        lsn += 10
        rows = [Row(lsn, seq, lsn * 1_000 + seq, note()) for seq in range(200)]
        landing.log.append(SOURCE, portion(batch(landing.orders, rows), lsn=lsn))
        return landing.landed()

    while landing.log.size_bytes() < 8 * land_bytes:
        assert append(lambda: "the same again and again") < lsn, "they make small objects"
    while append(lambda: rng.randbytes(30).hex()) < lsn:
        assert lsn < 10_000
    (file,) = landing.lander.changelog(landing.orders.table).delta.files()
    assert land_bytes <= file.size < 2 * land_bytes

    monkeypatch.setattr(objects, "GROUP_BYTES", 1 << 24)
    assert append(lambda: "x") < lsn
    with monkeypatch.context() as patched:
        patched.setattr(land, "HELD_BYTES", 1_000)
        assert append(lambda: "x") == lsn, "or when many tables together hold too much in memory"
    assert append(lambda: "x") < lsn
    monkeypatch.setattr(land, "LOG_SHARE", 10_000)
    assert append(lambda: "x") == lsn, "or when capture needs the log's room"
    landing.state.close()
