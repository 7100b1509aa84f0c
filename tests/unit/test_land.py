"""When landing is due, and where it may cut the log: never inside of a big transaction whose Commit has not come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cdc import land
from cdc.batch import Boundary
from cdc.evolution import Evolution
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


def test_whoever_asks_is_served_and_the_rows_that_come_later_wait_for_their_time(tmp_path: Path) -> None:
    state, log = open_log(tmp_path, bytes_max=1_000_000)
    book, store = SchemaBook(state, SOURCE), LocalStore(tmp_path / "lake")
    orders = book.register(ORDERS)

    def never(*_: object) -> Any:
        raise AssertionError("not here")

    shapes = Evolution(SOURCE, state, book, store, contract=lambda table: "evolve", read_anew=never, alert=never)
    held: Any = SimpleNamespace(check=lambda: None, fence=0)
    lander = Lander(
        SOURCE, log, state, book, store, epoch=1, temp_dir=tmp_path, land_every_s=3600, land_bytes=1 << 30,
        lease=held, stop_table=never, is_stopped=lambda table: False, evolution=shapes,
    )  # fmt: skip
    gate: Any = Gate()
    land: Stage[Any, Any] = Stage("land", LogReader(SOURCE, log, state, gate, lander.due_in_s), lander)

    def landed() -> int:
        for _ in range(3):
            land.step(0)
        return lander.landed.lsn if lander.landed is not None else -1

    log.set_position(SOURCE, Boundary(1, 0, 0))
    log.append(SOURCE, portion(batch(orders, [Row(100, 0, 1, "one")]), lsn=100))
    assert landed() < 100, "it is not due"
    lander.ask()
    assert landed() == 100
    lander.ask()
    log.append(SOURCE, portion(batch(orders, [Row(200, 0, 2, "two")]), lsn=200))
    assert landed() == 100, "nobody waits for what came after the question"
    lander.ask()
    assert landed() == 200
    log.append(SOURCE, portion(batch(orders, [Row(300, 0, 3, "open")])))
    lander.ask()
    log.append(SOURCE, portion(batch(orders, [Row(300, 1, 4, "last")]), lsn=300))
    assert landed() == 200, "what was open is not what was asked for"
    state.close()
