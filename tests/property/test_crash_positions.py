"""Whoever dies between any two messages of a transaction resumes at its begin: nothing is lost, nothing comes twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdc.batch import Boundary
from cdc.capture import ConfirmGate
from cdc.table import TableSchema
from connectors.postgres.pgoutput import Decoder, Relation
from tests.support.logs import ORDERS, Row, content, open_log
from tests.support.wire import Wire, WireColumn, WireTable

TABLE = WireTable(ORDERS.oid, "public", "orders", (WireColumn("id", 20, key=True), WireColumn("note")))


def resolve(relation: Relation) -> TableSchema:
    return ORDERS


def stream(many: int) -> tuple[Wire, list[int]]:
    """A small transaction, one of many rows with a logical message among them, and a small one; and where in the frames
    each of them begins."""
    wire, begins, lsn = Wire(), [], 0x2000000
    wire.relation(TABLE)
    for xid, rows in ((700, 2), (701, many), (702, 2)):
        begins.append(len(wire.frames))
        wire.begin(xid=xid, commit_lsn=lsn)
        for n in range(rows):
            wire.insert(TABLE, (b"%d" % (xid * 10_000 + n), b"row"))
            if n == many // 2:
                wire.message("app", b"in the middle")
        wire.commit()
        lsn += 0x100000
        wire.keepalive(wal_end=wire.commits[-1][2])
    return wire, begins


@pytest.mark.parametrize("rows", [80, pytest.param(1_000, marks=pytest.mark.slow)])
def test_a_kill_at_every_message_boundary_of_a_transaction_loses_and_doubles_nothing(tmp_path: Path, rows: int) -> None:
    wire, begins = stream(rows)
    everything = [Row(c.lsn, c.seq, int(c.new[0]), "row") for c in wire.changes]  # type: ignore[index, arg-type]
    ends = [end for _, _, end in wire.commits]
    state, log = open_log(tmp_path)
    for cut in range(len(wire.frames) + 1):
        source = f"cut{cut}"
        gate = ConfirmGate(epoch=1, confirm_after="log", save_anchor=never, anchored_lsn=0, every_s=0)
        log.set_position(source, Boundary(1, 0, 0))

        def run(first: int, last: int, source: str = source, gate: ConfirmGate = gate) -> None:
            log.discard_open(source)
            at = log.position(source)
            assert at is not None
            decoder = Decoder(resolve, epoch=1, after_lsn=at.lsn, after_end_lsn=at.end_lsn)
            portion = decoder.feed([wire.frames[0], *wire.frames[max(1, first) : last]])
            log.append(source, portion)
            if portion.boundary is not None:
                gate.logged(portion.boundary)

        run(0, cut)
        assert gate.allowed in (0, *ends), "the middle of a transaction is never confirmed"
        # The server sends again every transaction that ends behind what was confirmed, from its begin.
        again = next((b for b, end in zip(begins, ends, strict=True) if end > gate.allowed), len(wire.frames))
        run(again, len(wire.frames))
        assert content(log, source) == everything, f"died after {cut} frames"
    log.close()
    state.close()


def never(may_confirm_lsn: int, mode: str) -> None:
    raise AssertionError("nothing is anchored here")
