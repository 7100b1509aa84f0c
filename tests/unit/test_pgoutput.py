"""The decoder's promises one by one, on streams small enough to read."""

from __future__ import annotations

import datetime as dt
import struct
from dataclasses import replace

import numpy as np
import pytest

from cdc.batch import Boundary
from cdc.errors import ProtocolError, SchemaConflict
from cdc.table import Column, TableId, TableSchema
from connectors.postgres.pgoutput import Decoder, Relation, RelationColumn
from tests.support.decoding import Row, batches_of, decode, resolve, rows_of
from tests.support.wire import INT4, NUMERIC, NUMERIC_10_2, POSTGRES_EPOCH_US, TEXT, Cell, Wire, WireColumn, WireTable

ORDERS = WireTable(
    16384,
    "public",
    "orders",
    (WireColumn("id", INT4, key=True), WireColumn("note", TEXT), WireColumn("amount", NUMERIC, NUMERIC_10_2)),
)
FULL = WireTable(16385, "public", "full", ORDERS.columns, identity="f")
HIDDEN = WireTable(16386, "public", "hidden", ORDERS.columns)
TIME = 1_700_000_000_123_456
PLANS = pytest.mark.parametrize("plan", ["columns", "rows"])


def begun(*, xid: int = 700, commit_lsn: int = 0x2000000, time_us: int = TIME) -> Wire:
    """A stream inside its first transaction, all tables announced."""
    wire = Wire()
    wire.begin(xid=xid, commit_lsn=commit_lsn, time_us=time_us)
    for table in (ORDERS, FULL, HIDDEN):
        wire.relation(table)
    return wire


def rows(wire: Wire, plan: str = "auto") -> list[Row]:
    return rows_of(batches_of(decode(wire.frames, row_plan=plan)))


def order(number: int, note: bytes | Cell = b"x", amount: bytes | Cell = b"1.50") -> tuple[bytes | Cell, ...]:
    return (str(number).encode(), note, amount)


@PLANS
def test_an_insert_carries_its_values_and_its_transaction(plan: str) -> None:
    wire = begun()
    wire.insert(ORDERS, order(7, "naïve".encode()))
    wire.commit()

    portion = decode(wire.frames, row_plan=plan)[0]

    (batch,) = portion.batches
    assert batch.optional == ("_committed_at",)
    assert batch.data.schema.names == ["_op", "_epoch", "_lsn", "_seq", "_xid", "_committed_at", "id", "note", "amount"]
    assert [column.to_pylist()[0] for column in batch.data.columns[:5]] == ["c", 3, 0x2000000, 0, 700]
    (row,) = rows_of([batch])
    assert row.image == {"id": 7, "note": "naïve", "amount": pytest.approx(1.5)}
    assert row.committed == dt.datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=dt.UTC)


@PLANS
def test_a_toast_value_that_was_not_sent_is_unknown_and_named(plan: str) -> None:
    wire = begun()
    wire.update(ORDERS, order(1, Cell.UNCHANGED))
    wire.update(ORDERS, order(2))
    wire.update(ORDERS, order(3, Cell.UNCHANGED, Cell.UNCHANGED))

    assert [row.unchanged for row in rows(wire, plan)] == [["note"], None, ["note", "amount"]]
    assert [row.image["note"] for row in rows(wire, plan)] == [None, "x", None]


@PLANS
def test_under_identity_full_the_old_tuple_holds_what_the_new_one_calls_unchanged(plan: str) -> None:
    wire = begun()
    wire.update(FULL, order(1, Cell.UNCHANGED, b"2.00"), old=order(1, b"long", b"1.00"))

    (row,) = rows(wire, plan)

    assert row.unchanged is None
    assert row.image["note"] == "long"
    assert row.before is not None
    assert (row.before["note"], str(row.before["amount"])) == ("long", "1.00")


@PLANS
def test_a_key_tuple_says_only_the_key_and_an_unchanged_key_value_is_taken_from_it(plan: str) -> None:
    wire = begun()
    wire.update(ORDERS, order(2, Cell.UNCHANGED), key=(b"1", Cell.NULL, Cell.NULL))
    wire.update(ORDERS, (Cell.UNCHANGED, b"y", b"1.00"), key=(b"5", Cell.NULL, Cell.NULL))

    moved, kept = rows(wire, plan)

    assert moved.before == {"id": 1, "note": None, "amount": None}
    assert moved.unchanged == ["note"]
    assert kept.image["id"] == 5
    assert kept.unchanged is None


@PLANS
def test_null_in_an_old_tuple_is_never_taken_for_a_value_that_is_stored_out_of_line(plan: str) -> None:
    """Under a root with FULL a partition with a key of its own sends just that, marked as a whole row."""
    wire = begun()
    wire.update(FULL, order(2, Cell.UNCHANGED), old=(b"1", Cell.NULL, Cell.NULL))

    (row,) = rows(wire, plan)

    assert (row.unchanged, row.image["note"]) == (["note"], None)


@PLANS
def test_a_delete_shows_what_is_known_of_the_old_row_and_nothing_before(plan: str) -> None:
    wire = begun()
    wire.delete(ORDERS, key=(b"1", Cell.NULL, Cell.NULL))
    wire.delete(FULL, old=order(2))

    by_key, whole = rows(wire, plan)

    assert (by_key.op, by_key.image, by_key.before) == ("d", {"id": 1, "note": None, "amount": None}, None)
    assert (whole.op, whole.image["note"], whole.before) == ("d", "x", None)


@PLANS
def test_a_value_that_its_type_cannot_hold_keeps_its_text(plan: str) -> None:
    wire = begun()
    wire.update(FULL, order(1, b"x", b"NaN"), old=order(1, b"x", b"NaN"))
    wire.update(FULL, order(1), old=order(1, b"x", b"NaN"))
    wire.insert(FULL, order(2))

    both, before, none = rows(wire, plan)

    assert (both.image["amount"], both.raw) == (None, {"amount": "NaN", "before.amount": "NaN"})
    assert before.raw == {"before.amount": "NaN"}
    assert none.raw is None


@PLANS
def test_bytes_that_are_no_text_stop_nothing_and_are_kept_as_raw(plan: str) -> None:
    wire = begun()
    wire.insert(ORDERS, order(1, b"caf\xe9", b"\xff"))
    wire.insert(ORDERS, order(2, "café".encode()))

    odd, fine = rows(wire, plan)

    assert odd.image == {"id": 1, "note": None, "amount": None}
    assert odd.raw == {"note": r"\x636166e9", "amount": r"\xff"}
    assert (fine.image["note"], fine.raw) == ("café", None)


def test_ordinals_count_every_change_of_the_transaction_also_of_tables_that_are_not_selected() -> None:
    wire = begun()
    wire.insert(ORDERS, order(1))
    wire.insert(HIDDEN, order(2))
    wire.message("note", b"does not count")
    wire.insert(FULL, order(3))
    wire.truncate([HIDDEN])
    wire.insert(ORDERS, order(4))

    assert {row.image["id"]: row.seq for row in rows(wire)} == {1: 0, 3: 2, 4: 4}


def test_a_portion_says_that_ddl_stands_in_it_only_by_word_of_our_own_triggers() -> None:
    wire = begun()
    wire.message("cdc", b"barrier")
    wire.message("app", b'{"ddl": "ALTER TABLE"}')
    quiet = len(wire.frames)
    wire.message("cdc", b'{"ddl": "ALTER TABLE", "event": "ddl_command_end", "objects": []}')
    told = len(wire.frames)
    wire.insert(ORDERS, order(1))
    wire.commit()

    assert [portion.ddl for portion in decode(wire.frames, [quiet, told])] == [False, True, False]


def test_ordinals_go_on_when_a_transaction_is_read_in_pieces() -> None:
    wire = begun()
    for number in range(10):
        wire.insert(ORDERS, order(number))
    wire.commit()

    portions = decode(wire.frames, range(1, len(wire.frames)))

    assert [row.seq for row in rows_of(batches_of(portions))] == list(range(10))
    assert [portion.boundary for portion in portions if portion.boundary] == [Boundary(3, 0x2000000, 0x2000030)]


def test_one_truncate_of_many_tables_is_one_row_in_each_and_parts_what_comes_before_from_what_comes_after() -> None:
    wire = begun()
    wire.insert(ORDERS, order(1))
    wire.truncate([ORDERS, HIDDEN, FULL])
    wire.insert(ORDERS, order(2))

    batches = batches_of(decode(wire.frames))

    assert [(str(b.table), b.system("_op").to_pylist(), b.system("_seq").to_pylist()) for b in batches] == [
        ("public.orders", ["c"], [0]),
        ("public.orders", ["t"], [1]),
        ("public.full", ["t"], [1]),
        ("public.orders", ["c"], [2]),
    ]
    assert rows_of(batches)[1].image == {"id": None, "note": None, "amount": None}


def test_a_relation_said_again_splits_nothing_and_other_bytes_split_where_they_stand() -> None:
    wider = WireTable(ORDERS.oid, "public", "orders", (*ORDERS.columns, WireColumn("extra", TEXT)))
    asked: list[Relation] = []

    def resolving(relation: Relation) -> TableSchema | None:
        asked.append(relation)
        return resolve(relation)

    wire = Wire()
    wire.begin(xid=1, commit_lsn=0x2000000)
    wire.relation(ORDERS)
    wire.insert(ORDERS, order(1))
    wire.relation(ORDERS)
    wire.insert(ORDERS, order(2))
    wire.relation(wider)
    wire.insert(wider, (*order(3), b"new"))

    batches = Decoder(resolving, epoch=3).feed(wire.frames).batches

    assert [[row.image["id"] for row in rows_of([batch])] for batch in batches] == [[1, 2], [3]]
    assert rows_of(batches)[2].image["extra"] == "new"
    assert [len(relation.columns) for relation in asked] == [3, 4]
    assert asked[0].columns[0] == RelationColumn(name="id", type_oid=INT4, typmod=-1, is_key=True)


def test_tables_that_swap_names_and_swap_back_within_a_read_come_in_order_under_each_name() -> None:
    first, second = replace(ORDERS, oid=1, name="one"), replace(ORDERS, oid=2, name="one")
    away = replace(second, name="two")
    wire = Wire()
    for n in range(3):
        wire.begin(xid=700 + n, commit_lsn=0x2000000 + 100 * n, time_us=TIME)
        for table, announced in ((first, first), (second, second), (first, first)):
            wire.relation(announced)
            wire.insert(table, order(n))
        wire.relation(away)
        wire.commit()

    batches = [b for b in batches_of(decode(wire.frames)) if b.schema.table.name == "one"]

    positions = [list(zip(b.system("_lsn").to_pylist(), b.system("_seq").to_pylist(), strict=True)) for b in batches]
    assert [p for part in positions for p in part] == [(0x2000000 + 100 * n, k) for n in range(3) for k in range(3)]
    assert [b.schema.oid for b in batches] == [1, 2, 1, 2, 1, 2, 1]


def test_a_relation_holds_over_reads_and_transactions() -> None:
    wire = begun()
    wire.commit()
    first = len(wire.frames)
    wire.begin(xid=701, commit_lsn=0x3000000)
    wire.insert(ORDERS, order(1))
    wire.commit()

    _, portion = decode(wire.frames, [first])

    assert [row.xid for row in rows_of(portion.batches)] == [701]


def test_rows_of_the_open_transaction_stand_in_batches_of_their_own() -> None:
    wire = begun()
    wire.insert(ORDERS, order(1))
    wire.commit()
    wire.begin(xid=701, commit_lsn=0x3000000)
    wire.insert(ORDERS, order(2))

    (portion,) = decode(wire.frames)

    assert [batch.system("_lsn").to_pylist() for batch in portion.batches] == [[0x2000000], [0x3000000]]
    assert portion.boundary == Boundary(3, 0x2000000, 0x2000030)
    assert portion.xids.tolist() == [700]


def test_the_origin_marks_its_transaction_only_also_over_reads() -> None:
    wire = Wire()
    for xid, origin in ((1, "cdc_crm"), (2, None), (3, "other")):
        wire.begin(xid=xid, commit_lsn=0x2000000 + xid * 0x10000)
        if origin:
            wire.origin(origin)
        if xid == 1:
            wire.relation(ORDERS)
        wire.insert(ORDERS, order(1))
        wire.insert(ORDERS, order(2))
        wire.commit()

    for cuts in ([], range(1, len(wire.frames))):
        assert [row.origin for row in rows_of(batches_of(decode(wire.frames, cuts)))] == [
            *("cdc_crm", "cdc_crm"),
            *(None, None),
            *("other", "other"),
        ]


def test_an_unknown_commit_time_is_null() -> None:
    wire = begun(time_us=POSTGRES_EPOCH_US)
    wire.insert(ORDERS, order(1))
    wire.commit()

    (portion,) = decode(wire.frames)

    assert not portion.batches[0].has("_committed_at")
    assert portion.committed_at_us == 0


def test_keepalives_move_the_boundary_on_a_quiet_stream_and_not_inside_of_a_transaction() -> None:
    decoder = Decoder(resolve, epoch=3, after_lsn=500)
    quiet, busy = Wire(), begun()
    quiet.keepalive(wal_end=900)
    quiet.keepalive(wal_end=800)
    busy.keepalive(wal_end=0x1900000)
    open_end = len(busy.frames)
    busy.commit(end_lsn=0x2000040)
    busy.keepalive(wal_end=0x2500000)

    at_rest = decoder.feed(quiet.frames)
    inside = decoder.feed(busy.frames[:open_end])
    after = decoder.feed(busy.frames[open_end:])

    assert (at_rest.boundary, at_rest.head_lsn, at_rest.messages) == (Boundary(3, 500, 900), 900, 0)
    assert (inside.boundary, inside.head_lsn) == (None, 0x1900000)
    assert (after.boundary, after.head_lsn) == (Boundary(3, 0x2000000, 0x2500000), 0x2500000)
    assert decoder.feed([]).boundary is None


def test_transactions_at_or_below_the_resume_point_leave_no_trace() -> None:
    wire = begun()
    wire.insert(ORDERS, order(1))
    wire.truncate([ORDERS])
    wire.commit()
    again = len(wire.frames)
    wire.begin(xid=701, commit_lsn=0x3000000)
    wire.insert(ORDERS, order(2))
    wire.commit()

    old, new = decode(wire.frames, [again], after_lsn=0x2000000)

    assert (old.batches, old.boundary, old.xids.tolist()) == ([], None, [])
    assert [row.image["id"] for row in rows_of(new.batches)] == [2]
    assert new.boundary == Boundary(3, 0x3000000, 0x3000030)


def test_a_table_without_columns_has_rows() -> None:
    empty = WireTable(5, "public", "empty", ())
    wire = Wire()
    wire.begin(xid=1, commit_lsn=0x2000000)
    wire.relation(empty)
    for _ in range(100):
        wire.insert(empty, ())

    (batch,) = batches_of(decode(wire.frames))

    assert batch.data.num_rows == 100


def test_an_empty_namespace_is_pg_catalog_and_types_are_remembered() -> None:
    wire = Wire()
    wire.type(90001, "", "mood")
    asked: list[Relation] = []
    wire.relation(WireTable(7, "", "things", ()))
    decoder = Decoder(lambda relation: asked.append(relation), epoch=1)

    decoder.feed(wire.frames)

    assert asked[0].schema == "pg_catalog"
    assert decoder.types == {90001: ("pg_catalog", "mood")}


def test_a_value_of_megabytes_comes_through() -> None:
    wire = begun()
    for number in range(20):
        wire.insert(ORDERS, order(number, bytes([97 + number]) * (1 << 20)))

    notes = [row.image["note"] for row in rows(wire)]

    assert notes == [chr(97 + number) * (1 << 20) for number in range(20)]


def test_joined_frames_and_single_ones_are_read_alike() -> None:
    wire = begun()
    wire.insert(ORDERS, order(1))
    wire.commit()

    portion = Decoder(resolve, epoch=3).feed_blob(
        b"".join(wire.frames), np.fromiter(map(len, wire.frames), np.int64, len(wire.frames))
    )

    assert rows_of(portion.batches) == rows(wire)


# --- refusals ---------------------------------------------------------------------------------------------------


def refused(frames: list[bytes], plan: str = "auto") -> str:
    """The error's text, which must tell no value."""
    with pytest.raises(ProtocolError) as caught:
        decode(frames, row_plan=plan)
    assert "secret" not in str(caught.value)
    return str(caught.value)


@PLANS
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda frame: frame[:-1], "longer than its frame"),
        (lambda frame: frame + b"x", "do not end with its frame"),
        (lambda frame: frame.replace(b"N\0\x03t", b"N\0\x03b"), "unknown kind of value"),
        (lambda frame: frame.replace(b"N\0\x03", b"N\0\x02"), "number of columns"),
        (lambda frame: frame.replace(b"N\0\x03", b"K\0\x03"), "unexpected kind of tuple"),
        (lambda frame: frame.replace(b"\0\0\0\x06secret", b"\xff\xff\xff\xffsecret"), "longer than its frame"),
        (lambda frame: frame.replace(b"\0\0@\0N", b"\0\0\x7f\0N"), "no Relation message"),
        (lambda frame: frame[:30], "cut short"),
    ],
)
def test_a_row_message_that_is_not_as_it_should_be_stops_the_stream(plan: str, change, why: str) -> None:
    wire = begun()
    wire.insert(ORDERS, order(1, b"secret"))
    broken = change(wire.frames[-1])
    assert broken != wire.frames[-1]

    text = refused([*wire.frames[:-1], broken], plan)

    assert why in text
    assert "'I' at 0/10" in text


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"", "cut short"),
        (b"w" + bytes(24), "cut short"),
        (b"x" + bytes(30), "neither WAL data nor a keepalive"),
        (b"k" + bytes(18), "wrong length"),
        (b"k" + bytes(17) + b"", None),
        (b"w" + bytes(24) + b"Z", "'Z' at 0/0: unknown kind of message"),
        (b"w" + bytes(24) + b"\0" + bytes(9), "'0x00' at 0/0: unknown kind of message"),
        (b"w" + bytes(24) + b"S" + bytes(5), "unknown kind of message"),
        (b"w" + bytes(24) + b"B" + bytes(19), "wrong length"),
        (b"w" + bytes(24) + b"C" + bytes(25), "do not alternate"),
        (b"w" + bytes(24) + b"R" + bytes(3), "cut short"),
        (b"w" + bytes(24) + b"R" + bytes(4) + b"public", "does not end"),
        (b"w" + bytes(24) + b"R" + bytes(4) + b"\xff\0t\0d\0\0", "not UTF-8"),
        (b"w" + bytes(24) + b"R" + bytes(4) + b"s\0t\0z\0\0", "identity"),
        (b"w" + bytes(24) + b"Y" + bytes(4) + b"s\0t\0more", "longer than its fields"),
        (b"w" + bytes(24) + b"M" + bytes(9) + b"p\0" + struct.pack(">I", 1 << 31), "cut short"),
        (b"w" + bytes(24) + b"O" + bytes(8) + b"name\0", "outside of a transaction"),
        (b"w" + bytes(24) + b"I" + bytes(4) + b"N\0\0", "outside of a transaction"),
    ],
)
def test_a_frame_that_is_not_understood_stops_the_stream(frame: bytes, why: str | None) -> None:
    if why is None:
        decode([frame])
    else:
        assert why in refused([frame])


def test_a_truncate_must_have_the_length_that_its_count_promises_and_known_tables() -> None:
    wire = begun()
    frame = b"w" + bytes(24) + b"T" + struct.pack(">IBI", 1 << 30, 0, ORDERS.oid)
    assert "number of relations" in refused([*wire.frames, frame])
    unknown = b"w" + bytes(24) + b"T" + struct.pack(">IBI", 1, 0, 99)
    assert "no Relation message" in refused([*wire.frames, unknown])


def test_begin_and_commit_must_belong_together_and_go_up() -> None:
    good, other = begun(), Wire()
    good.commit()
    other.begin(xid=1, commit_lsn=0x2000001)
    other.commit()
    assert "that of Begin" in refused([*good.frames[:-1], other.frames[1]])
    assert "not above the one before" in refused(good.frames + good.frames)
    assert "do not alternate" in refused(good.frames[:1] * 2)
    assert "do not alternate" in refused([*good.frames, good.frames[-1]])


def test_after_an_error_the_decoder_gives_nothing_any_more() -> None:
    wire = begun()
    decoder = Decoder(resolve, epoch=1)
    with pytest.raises(ProtocolError):
        decoder.feed([*wire.frames, b"x" * 40])

    with pytest.raises(ProtocolError, match="stopped at an earlier error"):
        decoder.feed(wire.frames)


def test_a_schema_with_a_column_that_the_stream_does_not_carry_is_refused() -> None:
    wire = begun()
    schema = TableSchema(table=TableId("public", "t"), oid=1, columns=(Column(name="other", attnum=1, type_oid=23),))

    with pytest.raises(SchemaConflict, match="'other'"):
        Decoder(lambda relation: schema, epoch=1).feed(wire.frames)
