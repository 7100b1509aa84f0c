"""Row hashes that Postgres and we compute alike: how two copies of a table are compared without moving it.

The *line* of a row is the text of its cells as Postgres prints them, and behind them the lengths of those that may hold
anything; two rows have equal lines if and only if they are equal. Its hash is `hashtextextended` of stock Postgres,
done here for many lines at once. Hashes are added up modulo 2⁶⁴ per bucket (the hash's low bits), so that rows can be
taken out of a sum, and equal rows count as often as they are there. Equal sums of equal counts mean equal rows; what
differs may still be equal (a text that we print otherwise than the server), so cells have the last word.

Pure. It compares nothing, and it is no protection against someone who wants two rows to look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdc.pgtext import print_values
from cdc.table import Column, TableSchema
from cdc.types import NUMERIC, pg_text

SEPARATOR = "\x1f"
SAMPLE_PARTS = 1 << 16
"""A sample is so many of these parts of all keys."""
KEYS_SEED = 0x5EED
"""Of the hash that tells which keys a sample has: another than that of the rows, so that buckets stay even."""

Ints = np.ndarray[Any, np.dtype[np.int64]]
Hashes = np.ndarray[Any, np.dtype[np.uint64]]

# Types whose texts are never empty and never hold the separator: bool, bytea, integers, oid, json, floats, money,
# macaddr, inet, cidr, dates and times, interval, numeric, uuid, pg_lsn, jsonb. Their arrays too.
_STRICT = frozenset(
    {16, 17, 20, 21, 23, 26, 114, 700, 701, 790, 829, 774, 869, 650, 1082, 1083, 1114, 1184, 1186, 1266, NUMERIC, 2950}
    | {3220, 3802}
)
_SLICE = 1 << 13
_START = (0x9E3779B9 + 3923095) & 0xFFFFFFFF
_TAIL = np.array([0, 0xFF, 0xFFFF, 0xFFFFFF, 0xFFFFFFFF], np.uint32)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowHash:
    """How the rows of a table are hashed, for both sides. `in_hex`: the server's text is not UTF-8, so that lines are
    hashed as Postgres prints their UTF-8 as a bytea. `sample`: so many of SAMPLE_PARTS of the keys are looked at,
    which ones says `seed`."""

    columns: tuple[Column, ...]
    key: tuple[str, ...]
    buckets: int
    in_hex: bool = False
    sample: int = SAMPLE_PARTS
    seed: int = KEYS_SEED

    def __post_init__(self) -> None:
        if self.buckets < 1 or self.buckets & (self.buckets - 1):
            raise ValueError("the number of buckets is a power of two")

    @property
    def keys(self) -> tuple[Column, ...]:
        """The columns of the key; without one, all of them."""
        by_name = {c.name: c for c in self.columns}
        return tuple(by_name[k] for k in self.key) or self.columns


def unhashed(schema: TableSchema) -> list[str]:
    """Columns whose text we cannot print as the server does: arrays that are declared decimals (theirs have the scale
    that was declared, the server's elements have their own)."""
    return [c.name for c in schema.columns if c.declared.startswith("decimal") and c.element_oid]


def is_measured(column: Column) -> bool:
    """Whether the line says how long the column's text is, because it may be empty or hold the separator."""
    return (column.element_oid or column.type_oid) not in _STRICT


def is_trimmed(column: Column) -> bool:
    """Whether zeros at the end of a fraction are left out: the declared scale is not the value's own."""
    return column.declared.startswith("decimal") and not column.element_oid


def lines(
    columns: Sequence[Column], arrays: Sequence[pa.Array], raw: pa.Array | None, names: Sequence[str], *,
    in_hex: bool = False, prefix: str = "",
) -> pa.Array:  # fmt: skip
    """One string per row for typed `arrays` of `columns` (at least one); a null cell counts with its text in `raw`,
    where the columns are called `names`, with `prefix` before them. A text in `raw` that stands beside a value makes a
    line that no row of a server has."""
    use_raw = raw is not None and raw.null_count < len(raw)
    texts: list[pa.Array] = []
    used = np.zeros(len(arrays[0]), np.int64)
    for column, array, name in zip(columns, arrays, names, strict=True):
        text = pg_text(array, column)
        if use_raw and text.null_count:
            kept = pc.map_lookup(raw, pa.scalar(prefix + name), "first")
            used += pc.and_(text.is_null(), kept.is_valid()).to_numpy(zero_copy_only=False)
            text = pc.coalesce(text, kept)
        texts.append(_trimmed(text) if is_trimmed(column) else text)
    lengths = [pc.binary_length(t).cast(pa.string()) for c, t in zip(columns, texts, strict=True) if is_measured(c)]
    made = pc.binary_join_element_wise(
        *texts, *lengths, SEPARATOR, null_handling="replace", null_replacement=""
    )  # fmt: skip
    if use_raw:
        odd = _known(raw, [prefix + n for n in names]) != used
        if odd.any():
            made = pc.if_else(pa.array(odd), pc.binary_join_element_wise(made, "both", SEPARATOR * 3), made)
    return print_values(made.cast(pa.binary())) if in_hex else made


def _trimmed(text: pa.Array) -> pa.Array:
    short = pc.ascii_rtrim(pc.ascii_rtrim(text, "0"), ".")
    return pc.if_else(pc.match_substring(text, "."), short, text)


def _known(raw: pa.Array, names: Sequence[str]) -> Ints:
    """How many of the entries of each row's `raw` belong to the named columns."""
    offsets = np.asarray(raw.offsets)
    known = pc.is_in(raw.keys, pa.array(list(names), pa.string())).to_numpy(zero_copy_only=False)
    # `keys` are those of the whole buffer: counted from where the first row of this slice begins.
    ends = np.concatenate([[0], np.cumsum(known)])
    counts = ends[offsets[1:]] - ends[offsets[:-1]]
    return np.asarray(np.where(np.asarray(raw.is_valid()), counts, 0), np.int64)


@dataclass(slots=True)
class Sums:
    """Per bucket: how many rows (int64) and the sum of their hashes modulo 2⁶⁴ (uint64)."""

    rows: Ints
    hashes: Hashes

    @classmethod
    def zero(cls, buckets: int) -> Sums:
        return cls(np.zeros(buckets, np.int64), np.zeros(buckets, np.uint64))

    def add(self, hashes: Hashes, sign: int = 1) -> None:
        """Count rows by their hashes; with sign -1, take them out."""
        places = bucket_of(hashes, len(self.rows))
        np.add.at(self.rows, places, sign)
        np.add.at(self.hashes, places, hashes if sign > 0 else np.uint64(0) - hashes)

    def join(self, other: Sums, sign: int = 1) -> None:
        """Add what another has counted; with sign -1, take it out."""
        self.rows += sign * other.rows
        self.hashes += other.hashes if sign > 0 else np.uint64(0) - other.hashes

    def differing(self, other: Sums) -> Ints:
        """The buckets in which the two hold other rows."""
        return np.flatnonzero((self.rows != other.rows) | (self.hashes != other.hashes))


def bucket_of(hashes: Hashes, buckets: int) -> Ints:
    """The bucket of each hash."""
    return (hashes & np.uint64(buckets - 1)).astype(np.int64)


def buckets_for(rows: int) -> int:
    """A number of buckets with some fifty rows each, so that one wrong row has few others read again."""
    return 1 << max(6, min(14, (max(rows, 1) // 50).bit_length()))


def hash_lines(texts: pa.Array, seed: int = 0) -> Hashes:
    """`hashtextextended(text, seed)` of each string's bytes (uint64), as Postgres on a little-endian machine has it."""
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    out = np.empty(len(texts), np.uint64)
    for start in range(0, len(texts), _SLICE):
        part = texts.slice(start, _SLICE)
        out[start : start + len(part)] = _hash_slice(part, seed)
    return out


def _hash_slice(texts: pa.Array, seed: int) -> Hashes:
    """Twelve bytes of all strings at a time, the longest first, so that those that go on are always the front."""
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    sizes = np.diff(offsets)
    total = int(offsets[-1] - offsets[0])
    padded = np.zeros(total + 16, np.uint8)
    if total:
        padded[:total] = np.frombuffer(texts.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    words = np.ndarray((total + 12,), "<u4", padded, 0, (1,))
    order = np.argsort(-sizes, kind="stable")
    starts, sizes = (offsets[:-1] - offsets[0])[order], sizes[order]
    a = np.uint32(_START) + sizes.astype(np.uint32)
    b, c = a.copy(), a.copy()
    if seed:
        a += np.uint32(seed >> 32 & 0xFFFFFFFF)
        b += np.uint32(seed & 0xFFFFFFFF)
        _mix(a, b, c)
    done = 0
    while count := int(np.searchsorted(-sizes, -(done + 12), side="right")):
        at = starts[:count] + done
        a[:count] += words[at]
        b[:count] += words[at + 4]
        c[:count] += words[at + 8]
        _mix(a[:count], b[:count], c[:count])
        done += 12
    left = sizes % 12
    at = starts + (sizes - left)
    a += words[at] & _TAIL[np.minimum(left, 4)]
    b += words[at + 4] & _TAIL[np.clip(left - 4, 0, 4)]
    c += (words[at + 8] & _TAIL[np.clip(left - 8, 0, 4)]) << np.uint32(8)
    _end(a, b, c)
    out = np.empty(len(texts), np.uint64)
    out[order] = (b.astype(np.uint64) << np.uint64(32)) | c
    return out


Words = np.ndarray[Any, np.dtype[np.uint32]]


def _turned(word: Words, bits: int) -> Words:
    return (word << np.uint32(bits)) | (word >> np.uint32(32 - bits))


def _mix(a: Words, b: Words, c: Words) -> None:
    """Bob Jenkins' lookup3, between two blocks; in place."""
    for x, y, z, bits in ((a, c, b, 4), (b, a, c, 6), (c, b, a, 8), (a, c, b, 16), (b, a, c, 19), (c, b, a, 4)):
        x -= y
        x ^= _turned(y, bits)
        y += z


def _end(a: Words, b: Words, c: Words) -> None:
    """The same, behind the last block."""
    for x, y, bits in ((c, b, 14), (a, c, 11), (b, a, 25), (c, b, 16), (a, c, 4), (b, a, 14), (c, b, 24)):
        x ^= y
        x -= _turned(y, bits)
