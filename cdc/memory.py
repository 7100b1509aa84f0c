"""How this process takes memory from the system. It decides nothing about how much anybody may use."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import pyarrow as pa

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
"""glibc's mallopt parameters (malloc.h)."""
GREAT_BYTES = 4 << 20
"""From here on a buffer is a mapping of its own. With 1 MB a bulk insert costs some 5 % more CPU, with no bound a big
transaction leaves some 60 MB in the arenas."""


def keep_memory_low() -> None:
    """Few arenas, and Arrow in the same ones: with one per thread, each keeps its own peak. Peak memory of a small
    daemon fell from 305 to 208 MB (docs/benchmarks.md); where the C library is not glibc, nothing happens."""
    pa.set_memory_pool(pa.system_memory_pool())
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_ARENA_MAX, 2)
        # Great buffers go back to the system when they are freed. Left alone, the threshold grows with what is freed,
        # up to 32 MB, and the buffers of a big transaction stay in the arenas, in pieces.
        libc.mallopt(M_MMAP_THRESHOLD, GREAT_BYTES)
