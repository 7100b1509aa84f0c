"""Where landing may cut the log: never inside of a big transaction whose Commit has not come, whatever else comes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdc import land
from cdc.batch import Boundary
from cdc.land import LandPoint, LogReader
from cdc.log import EventLog
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
