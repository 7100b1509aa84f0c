"""Damage done to recorded or made streams: what a broken wire, disk or server could make of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

KINDS = ("flip", "cut", "longer", "drop", "repeat", "swap", "length", "insert", "splice")
_LENGTHS = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\1")


def damaged(frames: Sequence[bytes], kinds: Iterable[str], rng: random.Random) -> list[bytes]:
    """The frames with this damage done to random ones."""
    out = list(frames)
    for kind in kinds:
        at = rng.randrange(len(out))
        match kind:
            case "drop" if len(out) > 1:
                del out[at]
            case "repeat":
                out.insert(at, out[at])
            case "swap":
                other = rng.randrange(len(out))
                out[at], out[other] = out[other], out[at]
            case _:
                out[at] = _changed(out[at], kind, rng, out)
    return out


def _changed(whole: bytes, kind: str, rng: random.Random, frames: Sequence[bytes]) -> bytes:
    frame = bytearray(whole)
    place = rng.randrange(len(frame)) if frame else 0
    match kind:
        case "flip" if frame:
            frame[place] ^= 1 << rng.randrange(8)
        case "cut":
            del frame[place:]
        case "longer":
            frame += bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        case "length":
            frame[place : place + 4] = rng.choice(_LENGTHS)
        case "insert":
            frame[place:place] = bytes([rng.randrange(256)])
        case "splice":
            frame[place:] = frames[rng.randrange(len(frames))][place:]
    return bytes(frame)
