"""Logical messages become rows of their own table: where they stand, which are kept, and what comes again."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from cdc.batch import Boundary, Portion
from cdc.errors import ProtocolError
from connectors.postgres.logical_messages import MESSAGES, MessageTable, messages_schema
from connectors.postgres.pgoutput import Decoder
from tests.support.decoding import resolve
from tests.support.wire import INT4, Wire, WireColumn, WireTable

ORDERS = WireTable(16384, "public", "orders", (WireColumn("id", INT4, key=True),))


def decode(
    wire: Wire, prefixes: Sequence[str] = ("*",), *, after_lsn: int = 0, cuts: Sequence[int] = ()
) -> list[Portion]:
    table = MessageTable(replace(messages_schema(), version=1), prefixes)
    decoder = Decoder(resolve, epoch=3, after_lsn=after_lsn, messages=table)
    edges = [0, *cuts, len(wire.frames)]
    return [decoder.feed(wire.frames[a:b]) for a, b in pairwise(edges)]


def rows(portions: Sequence[Portion], *columns: str) -> list[tuple[Any, ...]]:
    """Rows of messages in order."""
    batches = [b for p in portions for b in p.batches if b.table == MESSAGES]
    for batch in batches:
        batch.data.validate(full=True)
    cells = [[b.system(c) if c.startswith("_") else b.column(c) for c in columns] for b in batches]
    return [row for found in cells for row in zip(*(c.to_pylist() for c in found), strict=True)]


def ordinals(portions: Sequence[Portion]) -> list[int]:
    """`_seq` of the rows of the table beside."""
    return [seq for p in portions for b in p.batches if b.table != MESSAGES for seq in b.system("_seq").to_pylist()]


def told() -> Wire:
    """Two transactions with messages between their rows, and one message between them."""
    wire = Wire()
    wire.begin(xid=700, commit_lsn=0x2000000)
    wire.origin("elsewhere")
    wire.relation(ORDERS)
    wire.insert(ORDERS, (b"1",))
    wire.message("app.one", b"first\0\xff")
    wire.insert(ORDERS, (b"2",))
    wire.message("cdc", b"barrier")
    wire.message("other", b"second")
    wire.insert(ORDERS, (b"3",))
    wire.commit()
    wire.lsn = 0x3000000
    wire.message("app.two", b"alone", transactional=False)
    wire.begin(xid=701, commit_lsn=0x4000000, time_us=0x7FFFFFFFFFFFF)
    wire.message("app.three", b"")
    wire.commit()
    return wire


def test_messages_stand_in_order_with_the_changes_of_their_transaction() -> None:
    wire = told()
    portions = decode(wire)
    assert rows(portions, "_op", "_lsn", "_seq", "_xid", "prefix", "content", "transactional", "_origin") == [
        ("c", 0x2000000, 1, 700, "app.one", b"first\0\xff", True, "elsewhere"),
        ("c", 0x2000000, 3, 700, "other", b"second", True, "elsewhere"),
        ("c", 0x3000000, 0, 0, "app.two", b"alone", False, None),
        ("c", 0x4000000, 0, 701, "app.three", b"", True, None),
    ]
    assert ordinals(portions) == [0, 2, 4], "cdc's own message is none"
    times = [t for (t,) in rows(portions, "_committed_at")]
    assert (times[2], None in times[:2]) == (None, False), "nobody knows when a message alone was committed"


@pytest.mark.parametrize(
    ("prefixes", "kept"), [(["app.*"], ["app.one", "app.two", "app.three"]), (["other"], ["other"]), (["cdc"], [])]
)
def test_only_messages_with_a_wanted_prefix_are_kept(prefixes: list[str], kept: list[str]) -> None:
    assert [p for (p,) in rows(decode(told(), prefixes), "prefix")] == kept


def test_without_the_setting_messages_change_nothing() -> None:
    wire = told()
    portion = Decoder(resolve, epoch=3).feed(wire.frames)
    assert [b.table.name for b in portion.batches] == ["orders"]
    assert ordinals([portion]) == [0, 1, 2]


def test_cuts_anywhere_give_the_same_rows() -> None:
    wire = told()
    columns = ("_lsn", "_seq", "_xid", "prefix", "content", "_origin", "_committed_at")
    whole = decode(wire)
    for cut in range(1, len(wire.frames)):
        parts = decode(wire, cuts=[cut])
        assert rows(parts, *columns) == rows(whole, *columns), f"cut at {cut}"
        assert ordinals(parts) == ordinals(whole)
        for portion in parts:
            reached = portion.boundary.lsn if portion.boundary else 0
            for batch in portion.batches:
                lsns = set(batch.system("_lsn").to_pylist())
                assert max(lsns) <= reached or min(lsns) > reached, "complete rows and open ones are kept apart"


def test_a_message_alone_moves_the_position_and_is_known_when_it_is_sent_again() -> None:
    wire = told()
    alone = next(i for i, f in enumerate(wire.frames) if b"app.two" in f)
    first, *_ = decode(wire, cuts=[alone + 1])
    assert first.boundary == Boundary(3, 0x3000000, 0x3000000)
    again = decode(wire, after_lsn=0x3000000)
    assert [p for (p,) in rows(again, "prefix")] == ["app.three"]
    assert [p for (p,) in rows(decode(wire, after_lsn=0x2000000), "prefix")] == ["app.two", "app.three"]
    assert rows(decode(wire, after_lsn=0x4000000), "prefix") == []


def test_a_malformed_message_stops_the_stream() -> None:
    wire = Wire()
    wire._data(b"M" + struct.pack(">BQ", 0, 5) + b"p\0" + struct.pack(">I", 9) + b"short")
    with pytest.raises(ProtocolError, match="cut short"):
        decode(wire)
    wire = Wire()
    wire.begin(xid=1, commit_lsn=0x2000000)
    wire.message("p", b"", transactional=False)
    with pytest.raises(ProtocolError, match="stands inside of one"):
        decode(wire)
