"""Random pgoutput streams: what comes out is what the stream said, however it is cut, walked or resumed."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.batch import Boundary
from connectors.postgres import pgoutput
from tests.support.decoding import batches_of, decode, expected, in_table_order, rows_of
from tests.support.wire import Wire, random_stream

streams = st.builds(
    lambda seed, transactions: random_stream(random.Random(seed), transactions=transactions),
    st.integers(0, 1 << 32),
    st.integers(0, 8),
)
plans = st.sampled_from(["auto", "columns", "rows"])


def said(wire: Wire, *, after_lsn: int = 0) -> list:
    """What the decoder must say of this stream."""
    rows = [expected(change) for change in wire.changes if change.lsn > after_lsn]
    return in_table_order(row for row in rows if row is not None)


@given(streams, plans)
def test_every_change_comes_out_once_in_order_with_its_values(wire: Wire, plan: str) -> None:
    assert in_table_order(rows_of(batches_of(decode(wire.frames, row_plan=plan)))) == said(wire)


@given(streams)
def test_both_row_plans_make_the_same_batches(wire: Wire) -> None:
    by_columns, by_rows = decode(wire.frames, row_plan="columns"), decode(wire.frames, row_plan="rows")

    for left, right in zip(batches_of(by_columns), batches_of(by_rows), strict=True):
        assert left.schema == right.schema
        assert left.data.schema.equals(right.data.schema, check_metadata=True)
        assert left.data.equals(right.data)


@given(streams, st.data())
def test_cutting_the_stream_anywhere_changes_no_row(wire: Wire, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(wire.frames)), max_size=12))

    portions = decode(wire.frames, cuts)

    assert in_table_order(rows_of(batches_of(portions))) == said(wire)
    assert sum(portion.messages for portion in portions) == sum(frame[:1] == b"w" for frame in wire.frames)
    assert sum(portion.received_bytes for portion in portions) == sum(map(len, wire.frames))


@given(streams, st.data())
def test_a_long_read_decoded_in_parts_says_the_same(wire: Wire, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pgoutput, "PART_BYTES", data.draw(st.integers(1, 5_000)))
        portions = decode(wire.frames)
    whole = decode(wire.frames)

    assert in_table_order(rows_of(batches_of(portions))) == said(wire)
    for attribute in ("boundary", "head_lsn", "received_bytes", "messages", "committed_at_us"):
        assert [getattr(p, attribute) for p in portions] == [getattr(p, attribute) for p in whole]
    assert np.array_equal(portions[0].xid_lsns, whole[0].xid_lsns)


@given(streams, st.data())
def test_no_batch_mixes_the_open_transaction_with_complete_ones(wire: Wire, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(wire.frames)), max_size=12))
    reached = 0

    for portion in decode(wire.frames, cuts):
        if portion.boundary is not None:
            assert portion.boundary.lsn >= reached
            reached = portion.boundary.lsn
        for batch in portion.batches:
            beyond = np.asarray(batch.system("_lsn")) > reached
            assert beyond.all() or not beyond.any()


@given(streams, st.data())
def test_the_boundary_and_the_transactions_are_those_of_the_commits_read(wire: Wire, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(wire.frames)), max_size=12))

    portions = decode(wire.frames, cuts)

    xids = np.concatenate([portion.xids for portion in portions])
    lsns = np.concatenate([portion.xid_lsns for portion in portions])
    assert xids.dtype == np.uint32
    assert lsns.dtype == np.int64
    assert list(zip(xids.tolist(), lsns.tolist(), strict=True)) == [(xid, lsn) for xid, lsn, _ in wire.commits]
    boundaries = [portion.boundary for portion in portions if portion.boundary is not None]
    if wire.commits:
        _, lsn, end_lsn = wire.commits[-1]
        assert boundaries[-1].lsn == lsn
        assert boundaries[-1].end_lsn >= end_lsn
    else:
        assert all(boundary.lsn == 0 for boundary in boundaries)
    assert boundaries == sorted(boundaries)


@given(streams, st.data())
def test_resuming_after_any_commit_yields_the_rest_and_nothing_twice(wire: Wire, data: st.DataObject) -> None:
    known = data.draw(st.sampled_from([(0, 0, 0), *wire.commits]))
    cuts = data.draw(st.lists(st.integers(0, len(wire.frames)), max_size=5))

    portions = decode(wire.frames, cuts, after_lsn=known[1], after_end_lsn=known[2])

    assert in_table_order(rows_of(batches_of(portions))) == said(wire, after_lsn=known[1])
    lsns = np.concatenate([portion.xid_lsns for portion in portions]).tolist()
    assert lsns == [lsn for _, lsn, _ in wire.commits if lsn > known[1]]
    for portion in portions:
        assert portion.boundary is None or portion.boundary >= Boundary(3, known[1], known[2])
