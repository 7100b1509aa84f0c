"""Random streams sent as protocol 1 and as protocol 2: both say the same, however they are cut."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.postgres import spool
from tests.support.decoding import batches_of, decode, decode_streamed, in_table_order, rows_of
from tests.support.streaming import streamed
from tests.support.wire import Wire, random_stream

streams = st.builds(
    lambda seed, transactions: random_stream(random.Random(seed), transactions=transactions),
    st.integers(0, 1 << 32),
    st.integers(0, 8),
)


@settings(max_examples=25)
@given(streams, st.integers(0, 1 << 32), st.sampled_from([0, 3_000, 1 << 30]), st.data())
def test_a_streamed_transaction_says_exactly_what_it_says_when_it_is_not(
    wire: Wire, seed: int, memory_bytes: int, data: st.DataObject
) -> None:
    frames = streamed(wire.frames, random.Random(seed))
    cuts = data.draw(st.lists(st.integers(0, len(frames)), max_size=20))
    plain = decode(wire.frames)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "PORTION_BYTES", data.draw(st.sampled_from([1, 500, 1 << 20])))
        portions = decode_streamed(frames, cuts, folder=Path(folder) / "spool", memory_bytes=memory_bytes)
        assert not any(Path(folder).iterdir())

    end = wire.commits[-1][1] if wire.commits else 0
    committed = [row for row in rows_of(batches_of(plain)) if row.lsn <= end]
    assert in_table_order(rows_of(batches_of(portions))) == in_table_order(committed)
    for attribute in ("xids", "xid_lsns"):
        ours, theirs = ([x for p in ps for x in getattr(p, attribute).tolist()] for ps in (portions, plain))
        assert ours == theirs
    reached = [p.boundary for p in portions if p.boundary is not None]
    assert reached == sorted(reached)
    if wire.commits:
        assert reached[-1].lsn == end
