"""How this process takes memory from the system. It decides nothing about how much anybody may use."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import pyarrow as pa

M_ARENA_MAX = -8
"""glibc's parameter of mallopt (malloc.h)."""


def keep_memory_low() -> None:
    """Few arenas, and Arrow in the same ones: with one per thread, each keeps its own peak. Peak memory of a small
    daemon fell from 305 to 208 MB (docs/benchmarks.md); where the C library is not glibc, nothing happens."""
    pa.set_memory_pool(pa.system_memory_pool())
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def give_back_memory() -> None:
    """Return what has been freed to the system, in some milliseconds: for work in steps whose great buffers would
    otherwise stay in the arenas, in pieces. (A fixed mmap threshold does the same for every buffer of every stream, and
    costs them 5 %: each is mapped, and faulted in, anew.)"""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
