"""What is different between two sets of rows: pure, on columns.

Rows with a key are met by it and compared cell by cell; rows without one are compared as multisets. Equal is what a
reader of the lake cannot tell apart: the same typed value, or the same text in `_raw` where the type cannot hold it.
NaN equals NaN, and -0.0 is another value than 0.0. Both sides are in memory: whoever has more rows than fit cuts both
into the same parts first (`cdc.keys.hash_of`). It reads nothing and makes no changes of what it finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True, slots=True)
class Rows:
    """One side: a key per row (null: none), its columns, and `_raw` as in a batch, or None."""

    keys: pa.Array
    columns: Sequence[pa.Array]
    raw: pa.Array | None


@dataclass(frozen=True, slots=True)
class Found:
    """Indexes of rows. `inserted` and `updated_new` are of the new side, `deleted` and `updated_old` of the old one;
    the two of an update stand at the same place."""

    inserted: np.ndarray
    deleted: np.ndarray
    updated_old: np.ndarray
    updated_new: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.inserted) + len(self.deleted) + len(self.updated_new)


class NotUnique(ValueError):
    """Two rows of one side have one key, so that nobody can say which of them is meant."""


def by_key(old: Rows, new: Rows, names: Sequence[str], old_names: Sequence[str] | None = None) -> Found:
    """Inserts, deletes and updates between two sides whose columns have the same types. They are called `names` in
    `_raw`, and on the old side `old_names` if that is given. NotUnique if a key is not. In order: inserts and updates
    as the new side has them, deletes as the old one."""
    n_old = len(old.keys)
    together = pa.chunked_array([old.keys, new.keys], pa.string()).combine_chunks().dictionary_encode()
    if together.null_count:
        raise NotUnique("a key is null")
    codes = together.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    place = np.full(len(together.dictionary), -1, np.int64)
    place[codes[:n_old]] = np.arange(n_old)
    met = np.zeros(len(place), np.bool_)
    met[codes[n_old:]] = True
    if (place >= 0).sum() != n_old or met.sum() != len(codes) - n_old:
        raise NotUnique("a key is not unique")
    before = place[codes[n_old:]]
    at_new = np.flatnonzero(before >= 0)
    at_old = before[at_new]
    changed = _differ_rows(old, new, at_old, at_new, list(zip(old_names or names, names, strict=True)))
    return Found(
        inserted=np.flatnonzero(before < 0),
        deleted=np.flatnonzero(~met[codes[:n_old]]),
        updated_old=at_old[changed],
        updated_new=at_new[changed],
    )


def as_multisets(old: pa.Array, new: pa.Array) -> Found:
    """Inserts and deletes between rows that are known by their whole content (`cdc.keys.row_texts`) only."""
    together = pa.chunked_array([old, new], pa.string()).combine_chunks().dictionary_encode()
    codes = together.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    mine, theirs = codes[: len(old)], codes[len(old) :]
    n = len(together.dictionary)
    both = np.minimum(np.bincount(mine, minlength=n), np.bincount(theirs, minlength=n))
    none = np.empty(0, np.int64)
    return Found(
        inserted=np.flatnonzero(_rank(theirs) >= both[theirs]),
        deleted=np.flatnonzero(_rank(mine) >= both[mine]),
        updated_old=none,
        updated_new=none,
    )


def _differ_rows(
    old: Rows, new: Rows, at_old: np.ndarray, at_new: np.ndarray, names: Sequence[tuple[str, str]]
) -> np.ndarray:
    """Mask of the pairs of rows that differ in a column or in a text."""
    changed = np.zeros(len(at_new), np.bool_)
    if not len(at_new):
        return changed
    index_old, index_new = pa.array(at_old), pa.array(at_new)
    for one, other in zip(old.columns, new.columns, strict=True):
        changed |= differs(one.take(index_old), other.take(index_new))
    texts_old = None if _is_empty(old.raw) else old.raw.take(index_old)  # type: ignore[union-attr]
    texts_new = None if _is_empty(new.raw) else new.raw.take(index_new)  # type: ignore[union-attr]
    if texts_old is None and texts_new is None:
        return changed
    for one, other in names:
        changed |= differs(_texts(texts_old, one, len(changed)), _texts(texts_new, other, len(changed)))
    return changed


def differs(old: pa.Array, new: pa.Array) -> np.ndarray:
    """Mask of the places where two arrays of one type differ; null equals null only."""
    kind = old.type
    if pa.types.is_map(kind):
        nulls = _null_mask(old) != _null_mask(new)
        return nulls | _differ_lists(old, new, [(old.keys, new.keys), (old.items, new.items)])
    if pa.types.is_list(kind):
        nulls = _null_mask(old) != _null_mask(new)
        return nulls | _differ_lists(old, new, [(old.values, new.values)])
    if pa.types.is_floating(kind):
        old, new = _bits(old), _bits(new)
    unequal = pc.fill_null(pc.not_equal(old, new), False).to_numpy(zero_copy_only=False)
    if not old.null_count and not new.null_count:
        return np.asarray(unequal)
    return np.asarray(unequal | (_null_mask(old) != _null_mask(new)))


def _differ_lists(old: pa.Array, new: pa.Array, children: list[tuple[pa.Array, pa.Array]]) -> np.ndarray:
    """Lists of other lengths differ; of the others the elements are compared, all at once."""
    old_start, old_length = _extents(old)
    new_start, new_length = _extents(new)
    result = old_length != new_length
    same = np.flatnonzero(~result & (old_length > 0))
    if not len(same):
        return np.asarray(result)
    lengths = old_length[same]
    ends = np.cumsum(lengths)
    within = np.arange(int(ends[-1])) - np.repeat(ends - lengths, lengths)
    at_old = pa.array(np.repeat(old_start[same], lengths) + within)
    at_new = pa.array(np.repeat(new_start[same], lengths) + within)
    wrong = np.zeros(int(ends[-1]), np.bool_)
    for one, other in children:
        wrong |= differs(one.take(at_old), other.take(at_new))
    result[same] = np.logical_or.reduceat(wrong, ends - lengths)
    return np.asarray(result)


def _extents(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """First element and number of elements of each list; none where it is null."""
    offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
    offsets = offsets.astype(np.int64)
    length = np.diff(offsets)
    if array.null_count:
        length = np.where(_null_mask(array), 0, length)
    return offsets[:-1], length


def _bits(array: pa.Array) -> pa.Array:
    """Floats as the integers that hold them, every NaN as the same one."""
    kind = pa.int64() if array.type.bit_width == 64 else pa.int32()
    odd = pc.is_nan(array)
    if pc.any(odd).as_py():
        array = pc.if_else(odd, pa.scalar(float("nan"), array.type), array)
    return array.view(kind)


def _texts(raw: pa.Array | None, name: str, rows: int) -> pa.Array:
    return pa.nulls(rows, pa.string()) if raw is None else pc.map_lookup(raw, pa.scalar(name), "first")


def _is_empty(raw: pa.Array | None) -> bool:
    return raw is None or raw.null_count == len(raw)


def _null_mask(array: pa.Array) -> np.ndarray:
    return np.asarray(array.is_null().to_numpy(zero_copy_only=False))


def _rank(codes: np.ndarray) -> np.ndarray:
    """How many equal ones stand before each."""
    by = np.argsort(codes, kind="stable")
    ordered = codes[by]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(codes) else by
    sizes = np.diff(np.append(starts, len(codes)))
    rank = np.empty(len(codes), np.int64)
    rank[by] = np.arange(len(codes)) - np.repeat(starts, sizes)
    return rank
