"""A message that names an origin marks its transaction as one of ours, however it comes, and lands nowhere."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cdc.batch import Portion
from cdc.errors import ProtocolError
from connectors.postgres import spool
from connectors.postgres.logical_messages import MESSAGES, MessageTable, messages_schema
from tests.support.decoding import batches_of, decode, decode_streamed, rows_of
from tests.support.streaming import abort, commit, start, stop, with_xid
from tests.support.wire import INT4, Wire, WireColumn, WireTable

TABLE = WireTable(16384, "public", "t", (WireColumn("id", INT4, key=True),))
OTHER = WireTable(16385, "public", "other", (WireColumn("id", INT4, key=True),))
MARK = "cdc.origin"


def begun(wire: Wire | None = None) -> Wire:
    wire = wire or Wire()
    wire.begin(xid=700 + len(wire.commits), commit_lsn=wire.lsn + 1000)
    return wire


def told() -> Wire:
    """Two tables in a marked transaction, a truncate among them, between two that nobody marked."""
    wire = begun()
    wire.relation(TABLE)
    wire.relation(OTHER)
    wire.insert(TABLE, (b"1",))
    wire.commit()
    begun(wire)
    wire.message(MARK, b"cdc_crm")
    wire.insert(TABLE, (b"2",))
    wire.insert(OTHER, (b"3",))
    wire.truncate([TABLE, OTHER])
    wire.insert(TABLE, (b"4",))
    wire.commit()
    begun(wire)
    wire.insert(OTHER, (b"5",))
    wire.commit()
    return wire


def origins(portions: Sequence[Portion]) -> dict[tuple[str, int, int], str | None]:
    """The origin of each change, by table, transaction and ordinal."""
    return {(row.table, row.xid, row.seq): row.origin for row in rows_of(batches_of(portions))}


WHOLE = {
    ("public.t", 700, 0): None,
    ("public.t", 701, 0): "cdc_crm",
    ("public.other", 701, 1): "cdc_crm",
    ("public.t", 701, 2): "cdc_crm",
    ("public.other", 701, 2): "cdc_crm",
    ("public.t", 701, 3): "cdc_crm",
    ("public.other", 702, 0): None,
}


@pytest.mark.parametrize("plan", ["columns", "rows"])
def test_a_marked_transaction_is_marked_as_a_whole_and_no_other_is(plan: str) -> None:
    assert origins(decode(told().frames, row_plan=plan)) == WHOLE


def test_a_marked_transaction_may_come_in_pieces() -> None:
    wire = told()
    for cut in range(1, len(wire.frames)):
        assert origins(decode(wire.frames, [cut])) == WHOLE, f"cut at {cut}"
    assert origins(decode(wire.frames, range(1, len(wire.frames)))) == WHOLE


def test_a_transaction_that_nobody_marked_has_no_column_for_it() -> None:
    wire = told()
    batches = batches_of(decode(wire.frames, [6, 13]))
    assert [("_origin" in batch.optional) for batch in batches if batch.system("_xid")[0].as_py() != 701] == [False] * 2


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    ("before", "origin"),
    [
        (lambda wire: wire.message("app", b"first"), "cdc_crm"),
        (lambda wire: wire.message("cdc", b"barrier"), "cdc_crm"),
        (lambda wire: wire.message("app", b"alone"), "cdc_crm"),
        (lambda wire: wire.origin("pg_16400"), "cdc_crm"),
        (lambda wire: wire.message(MARK, b"cdc_mail"), "cdc_mail"),
        (lambda wire: wire.message(MARK, b"\xff"), "cdc_crm"),
    ],
)
def test_what_stands_before_the_mark(before: Callable[[Wire], None], origin: str, cut: bool) -> None:
    """Messages of others do not matter; of two marks the first counts; ours says more than a replication origin."""
    wire = begun()
    wire.relation(TABLE)
    before(wire)
    wire.message(MARK, b"cdc_crm")
    wire.insert(TABLE, (b"1",))
    wire.commit()

    assert set(origins(decode(wire.frames, range(len(wire.frames) if cut else 0))).values()) == {origin}


@pytest.mark.parametrize("name", [None, "pg_16400"])
def test_changes_before_the_mark_keep_what_they_have_wherever_the_stream_is_cut(name: str | None) -> None:
    wire = begun()
    if name is not None:
        wire.origin(name)
    wire.relation(TABLE)
    wire.insert(TABLE, (b"1",))
    wire.insert(TABLE, (b"2",))
    wire.message(MARK, b"cdc_crm")
    wire.insert(TABLE, (b"3",))
    wire.commit()
    begun(wire)
    wire.insert(TABLE, (b"4",))
    wire.commit()

    for cut in range(1, len(wire.frames)):
        found = [row.origin for row in rows_of(batches_of(decode(wire.frames, [cut])))]
        assert found == [name, name, "cdc_crm", None], f"cut at {cut}"


@pytest.mark.parametrize(
    ("prefix", "content"),
    [
        (MARK, b""),
        (MARK, b"\xff"),
        (MARK, b"x" * 513),
        (MARK, "ö".encode("latin-1")),
        ("cdc.origins", b"cdc_crm"),
        ("CDC.origin", b"cdc_crm"),
        ("cdc", b"cdc_crm"),
        ("cdc.origin ", b"cdc_crm"),
    ],
)
def test_what_is_no_mark_marks_nothing_and_stops_nothing(prefix: str, content: bytes) -> None:
    wire = begun()
    wire.relation(TABLE)
    wire.message(prefix, content)
    wire.insert(TABLE, (b"1",))
    wire.commit()

    assert set(origins(decode(wire.frames)).values()) == {None}


@pytest.mark.parametrize("content", [b"x" * 512, "ö".encode() * 256])
def test_the_longest_name_that_an_origin_may_have(content: bytes) -> None:
    wire = begun()
    wire.relation(TABLE)
    wire.message(MARK, content)
    wire.insert(TABLE, (b"1",))

    assert set(origins(decode(wire.frames)).values()) == {content.decode()}


def test_a_message_outside_of_transactions_marks_none() -> None:
    wire = Wire()
    wire.message(MARK, b"cdc_crm", transactional=False)
    begun(wire)
    wire.relation(TABLE)
    wire.message(MARK, b"cdc_crm", transactional=False)
    wire.insert(TABLE, (b"1",))
    wire.commit()
    wire.message(MARK, b"cdc_crm", transactional=False)
    begun(wire)
    wire.insert(TABLE, (b"2",))

    assert set(origins(decode(wire.frames)).values()) == {None}


def test_a_message_that_is_cut_short_stops_the_stream_as_any() -> None:
    wire = begun()
    wire._data(b"M" + struct.pack(">BQ", 1, 5) + MARK.encode() + b"\0" + struct.pack(">I", 9) + b"short")

    with pytest.raises(ProtocolError, match="cut short"):
        decode(wire.frames)


def test_marks_never_land_and_take_no_ordinal_but_messages_beside_them_are_marked() -> None:
    wire = begun()
    wire.relation(TABLE)
    wire.message("app.first", b"")
    wire.message(MARK, b"cdc_crm")
    wire.message("app.second", b"")
    wire.insert(TABLE, (b"1",))
    wire.message("app.third", b"")
    wire.commit()
    table = MessageTable(replace(messages_schema(), version=1), ["*", "cdc.*", MARK])

    for cuts in ([], range(1, len(wire.frames))):
        batches = batches_of(decode(wire.frames, cuts, messages=table))
        said = [
            row
            for batch in batches
            if batch.table == MESSAGES
            for row in zip(*(batch.system(n).to_pylist() for n in ("_seq", "_origin")), strict=True)
        ]
        assert said == [(0, None), (1, "cdc_crm"), (3, "cdc_crm")]
        rows = rows_of(batch for batch in batches if batch.table != MESSAGES)
        assert [(row.seq, row.origin) for row in rows] == [(2, "cdc_crm")]


# --- streamed before the commit ---------------------------------------------------------------------------------


def block(wire: Wire, begin: int, end: int, xid: int, *, first: bool = False) -> list[bytes]:
    return [start(7, first=first), *(with_xid(frame, xid) for frame in wire.frames[begin:end]), stop()]


@pytest.mark.parametrize("portion_bytes", [1, 1 << 20])
@pytest.mark.parametrize("memory_bytes", [0, 1 << 20])
def test_a_streamed_transaction_is_marked_through_all_its_blocks_portions_and_savepoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_bytes: int, portion_bytes: int
) -> None:
    monkeypatch.setattr(spool, "PORTION_BYTES", portion_bytes)
    wire = Wire()
    wire.message(MARK, b"cdc_crm")
    wire.relation(TABLE)
    for number in range(6):
        wire.insert(TABLE, (str(number).encode(),))
    plain = begun()
    plain.insert(TABLE, (b"9",))
    plain.commit()
    stream = [
        *block(wire, 0, 4, 7, first=True),
        *block(wire, 4, 5, 71),
        *block(wire, 5, 6, 72),
        abort(7, 72),
        *block(wire, 6, 8, 7),
        commit(7, 600, 650),
        *plain.frames,
    ]

    portions = decode_streamed(stream, range(len(stream)), folder=tmp_path / "spool", memory_bytes=memory_bytes)

    found = [(row.image["id"], row.seq, row.origin) for row in rows_of(batches_of(portions))]
    assert found == [(n, seq, "cdc_crm") for seq, n in enumerate((0, 1, 2, 4, 5))] + [(9, 0, None)]


def test_a_mark_goes_with_its_transaction_when_that_is_rolled_back(tmp_path: Path) -> None:
    wire = Wire()
    wire.message(MARK, b"cdc_crm")
    wire.relation(TABLE)
    wire.insert(TABLE, (b"1",))
    stream = [
        *block(wire, 0, 3, 7, first=True),
        abort(7, 7),
        *block(wire, 1, 3, 7, first=True),
        commit(7, 600, 650),
    ]

    portions = decode_streamed(stream, range(len(stream)), folder=tmp_path / "spool")

    assert [row.origin for row in rows_of(batches_of(portions))] == [None]
