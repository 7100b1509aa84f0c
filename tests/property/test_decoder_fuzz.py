"""Broken pgoutput streams: a portion that keeps its promises, or a ProtocolError; nothing else, and within bounds.

A flipped bit inside of a value is another valid value, so what comes out is checked for the promises of every batch,
not against what the stream said.
"""

from __future__ import annotations

import random
import tracemalloc

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc.errors import ProtocolError
from tests.support.decoding import decode
from tests.support.wire import random_stream

damage = st.sampled_from(["flip", "cut", "longer", "drop", "repeat", "swap", "length", "insert", "splice"])


def broken(seed: int, kinds: list[str]) -> list[bytes]:
    """A random stream with this damage done to random frames."""
    rng = random.Random(seed)
    frames = random_stream(rng, transactions=rng.randint(1, 4)).frames
    for kind in kinds:
        at = rng.randrange(len(frames))
        frame = bytearray(frames[at])
        place = rng.randrange(len(frame)) if frame else 0
        match kind:
            case "flip" if frame:
                frame[place] ^= 1 << rng.randrange(8)
            case "cut":
                del frame[place:]
            case "longer":
                frame += bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
            case "drop" if len(frames) > 1:
                del frames[at]
                continue
            case "repeat":
                frames.insert(at, frames[at])
                continue
            case "swap":
                other = rng.randrange(len(frames))
                frames[at], frames[other] = frames[other], frames[at]
                continue
            case "length":
                frame[place : place + 4] = rng.choice(
                    (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\1")
                )
            case "insert":
                frame[place:place] = bytes([rng.randrange(256)])
            case "splice":
                frame[place:] = frames[rng.randrange(len(frames))][place:]
        frames[at] = bytes(frame)
    return frames


def outcome(frames: list[bytes], plan: str) -> list[list[tuple]] | str:
    """Batches as lists of buffers' contents, or "refused"."""
    try:
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


@settings(max_examples=40)
@given(st.integers(0, 1 << 32), st.lists(damage, min_size=1, max_size=4))
def test_a_broken_stream_never_makes_the_decoder_ask_for_much_memory(seed: int, kinds: list[str]) -> None:
    frames = broken(seed, kinds)
    size = sum(map(len, frames))
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()

    tracemalloc.start()
    outcome(frames, "auto")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 4_000_000 + 60 * size
    assert pool.bytes_allocated() - before < 1_000_000


@given(st.lists(st.binary(max_size=60), max_size=20))
def test_noise_is_refused(frames: list[bytes]) -> None:
    outcome(frames, "auto")
