"""Broken pgoutput streams: a portion that keeps its promises, or a ProtocolError; nothing else, and within bounds.

A flipped bit inside of a value is another valid value, so what comes out is checked for the promises of every batch,
not against what the stream said.
"""

from __future__ import annotations

import random
import tempfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc.errors import ProtocolError
from tests.support.damage import KINDS, damaged
from tests.support.decoding import decode, decode_streamed
from tests.support.streaming import streamed
from tests.support.wire import random_stream

damage = st.sampled_from(KINDS)


def broken(seed: int, kinds: list[str], *, streaming: bool = False) -> list[bytes]:
    """A random stream with this damage done to random frames."""
    rng = random.Random(seed)
    frames = random_stream(rng, transactions=rng.randint(1, 4)).frames
    if streaming:
        frames = streamed(frames, rng) or frames
    return damaged(frames, kinds, rng)


def outcome(frames: list[bytes], plan: str, *, spooled: bool = False, memory_bytes: int = 0) -> list[list[tuple]] | str:
    """Batches as lists of buffers' contents, or "refused"."""
    try:
        if spooled:
            with tempfile.TemporaryDirectory() as folder:
                cuts = range(0, len(frames), 7)
                held = {"folder": Path(folder) / "spool", "memory_bytes": memory_bytes}
                portions = decode_streamed(frames, cuts, **held, row_plan=plan)
        else:
            portions = decode(frames, row_plan=plan)
    except ProtocolError as error:
        text = str(error)
        assert text.isprintable()
        assert len(text) < 200
        return "refused"
    for portion in portions:
        for batch in portion.batches:
            batch.data.validate(full=True)
    return [[(batch.schema, batch.data) for batch in portion.batches] for portion in portions]


@settings(max_examples=400)
@given(st.integers(0, 1 << 32), st.lists(damage, min_size=1, max_size=4))
def test_a_broken_stream_is_refused_or_decoded_into_valid_batches_by_both_plans_alike(
    seed: int, kinds: list[str]
) -> None:
    frames = broken(seed, kinds)

    by_columns, by_rows = outcome(frames, "columns"), outcome(frames, "rows")

    if "refused" in (by_columns, by_rows):
        assert by_columns == by_rows
        return
    for left, right in zip(by_columns[0], by_rows[0], strict=True):
        assert left[0] == right[0]
        # NaN is not equal to itself; the same bits are.
        assert left[1].equals(right[1]) or left[1].serialize() == right[1].serialize()


@settings(max_examples=120)
@given(st.integers(0, 1 << 32), st.lists(damage, min_size=1, max_size=4), st.sampled_from([0, 1 << 20]))
def test_a_broken_stream_of_open_transactions_is_refused_or_decoded_into_valid_batches(
    seed: int, kinds: list[str], memory_bytes: int
) -> None:
    frames = broken(seed, kinds, streaming=True)

    by_columns = outcome(frames, "columns", spooled=True, memory_bytes=memory_bytes)
    by_rows = outcome(frames, "rows", spooled=True, memory_bytes=memory_bytes)

    assert (by_columns == "refused") == (by_rows == "refused")


@settings(max_examples=40)
@given(st.integers(0, 1 << 32), st.lists(damage, min_size=1, max_size=4), st.booleans())
def test_a_broken_stream_never_makes_the_decoder_ask_for_much_memory(
    seed: int, kinds: list[str], streaming: bool
) -> None:
    frames = broken(seed, kinds, streaming=streaming)
    size = sum(map(len, frames))
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()

    tracemalloc.start()
    outcome(frames, "auto", spooled=streaming)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 4_000_000 + 60 * size
    assert pool.bytes_allocated() - before < 1_000_000


@given(st.lists(st.binary(max_size=60), max_size=20), st.booleans())
def test_noise_is_refused(frames: list[bytes], streaming: bool) -> None:
    outcome(frames, "auto", spooled=streaming)
