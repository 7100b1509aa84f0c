"""Confirming: what is durable where it must be, a keepalive's position only when nothing is pending, never back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdc.batch import Boundary, Portion
from cdc.capture import ConfirmGate, LogEnd, SourceStream
from cdc.log import EventLog
from cdc.schema import SchemaBook
from cdc.stage import Stage
from cdc.state import State
from cdc.table import TableSchema
from connectors.postgres.pgoutput import Decoder, Relation
from tests.support.decoding import resolve
from tests.support.wire import INT4, Wire, WireColumn, WireTable

ORDERS = WireTable(16384, "public", "orders", (WireColumn("id", INT4, key=True),))


class Wired:
    """A source that hands over one frame at a time, and remembers what it was told to forget."""

    def __init__(self, frames: list[bytes]) -> None:
        self._frames = frames
        self._next = 0
        self.confirmed: list[int] = []

    def open(self, after: Boundary | None, schemas: Any, epoch: int) -> None:
        assert after is not None

        def registered(relation: Relation) -> TableSchema | None:
            schema = resolve(relation)
            return schemas.register(schema) if schema is not None else None

        self._decoder = Decoder(registered, epoch=epoch, after_lsn=after.lsn, after_end_lsn=after.end_lsn)

    def read(self, timeout_s: float) -> Portion | None:
        if self._next >= len(self._frames):
            return None
        self._next += 1
        return self._decoder.feed(self._frames[self._next - 1 : self._next])

    def confirm(self, end_lsn: int) -> None:
        self.confirmed.append(end_lsn)

    def identity(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    opened = EventLog(tmp_path / "log", State(tmp_path / "state.db"), bytes_max=1 << 30)
    opened.set_position("shop", Boundary(1, 0x999, 0x1000))
    yield opened
    opened.close()


def stage(log: EventLog, source: Wired, state: State, *, confirm_after: str) -> tuple[Stage[Any, Any], ConfirmGate]:
    gate = ConfirmGate(
        epoch=1, confirm_after=confirm_after, save_anchor=lambda lsn, mode: None, anchored_lsn=0,
        anchored_mode=confirm_after, logged_lsn=0x1000, every_s=0.0,
    )  # fmt: skip
    stream = SourceStream("shop", source, SchemaBook(state, "shop"), gate, 1)
    return Stage("capture", stream, LogEnd("shop", log)), gate


def test_keepalives_ahead_of_a_transaction_that_is_not_whole_confirm_nothing_of_it(
    log: EventLog, tmp_path: Path
) -> None:
    wire = Wire()
    wire.keepalive(wal_end=0x1500)
    wire.begin(xid=700, commit_lsn=0x3000)
    wire.relation(ORDERS)
    wire.insert(ORDERS, (b"1",))
    wire.keepalive(wal_end=0x2FF0, reply=True)
    wire.keepalive(wal_end=0x9000)
    wire.insert(ORDERS, (b"2",))
    before_commit = len(wire.frames)
    wire.commit(end_lsn=0x3030)
    source = Wired(wire.frames)
    capture, _ = stage(log, source, State(tmp_path / "other.db"), confirm_after="log")
    for _ in range(before_commit):
        capture.step(0.0)
        assert max(source.confirmed, default=0) <= 0x1500, "the transaction is not in the log yet"
    capture.step(0.0)
    assert source.confirmed[-1] == 0x3030
    assert source.confirmed == sorted(source.confirmed), "never backwards"


def test_a_keepalives_position_waits_for_what_was_logged_before_it_to_land(log: EventLog, tmp_path: Path) -> None:
    wire = Wire()
    wire.begin(xid=700, commit_lsn=0x3000)
    wire.relation(ORDERS)
    wire.insert(ORDERS, (b"1",))
    wire.commit(end_lsn=0x3030)
    wire.keepalive(wal_end=0x9000)
    source = Wired(wire.frames)
    capture, gate = stage(log, source, State(tmp_path / "other.db"), confirm_after="landed")
    for _ in range(len(wire.frames) + 1):
        capture.step(0.0)
    assert log.position("shop") == Boundary(1, 0x3000, 0x9000)
    assert max(source.confirmed, default=0) == 0, "it is in the log, and nowhere else"
    gate.landed(Boundary(2, 0x9000, 0x9000))
    capture.step(0.0)
    assert max(source.confirmed, default=0) == 0, "a position of another history says nothing"
    gate.landed(Boundary(1, 0x3000, 0x9000))
    capture.step(0.0)
    gate.landed(Boundary(1, 0x3000, 0x3030))
    capture.step(0.0)
    assert source.confirmed == [0x9000], "once, and never back"
