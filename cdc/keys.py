"""Keys: one canonical string per row, and the hash bucket that it lives in.

The same key gives the same string whether its row came from the stream, from a snapshot or from a `current` file,
because all three hold the same typed cells and the same `_raw` texts. Two keys are equal here if Postgres would print
them the same, byte for byte; equality under a collation or of `1.0` and `1.00` is not looked at, and need not be: the
server sends the old key whenever the stored bytes change.

The strings are for comparing, not for sending to a server: cdc.types.pg_text gives the server's own text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdc.batch import Batch

BEFORE = "before."
"""Prefix of a column's name in `_raw` for the value of the old tuple."""

_SLICE = 1 << 17
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key_texts(batch: Batch, columns: Sequence[str], *, before: bool = False) -> pa.Array:
    """One string per row for the key `columns` of `batch`; null where a key column is null.

    `before`: the key of the old tuple instead, null where the row has none (then the key did not change). Pure; reads
    no more than the columns named.
    """
    raw = batch.system("_raw") if batch.has("_raw") else None
    if not before:
        return key_of([batch.column(name) for name in columns], raw, columns)
    if not batch.has("_before"):
        return pa.nulls(batch.data.num_rows, pa.string())
    old = batch.system("_before")
    arrays = [pc.struct_field(old, name_index(batch, name)) for name in columns]
    return key_of(arrays, raw, columns, prefix=BEFORE)


def name_index(batch: Batch, name: str) -> int:
    """Position of a source column in the row image; KeyError if there is none."""
    for index, column in enumerate(batch.schema.columns):
        if column.name == name:
            return index
    raise KeyError(name)


def key_of(arrays: Sequence[pa.Array], raw: pa.Array | None, names: Sequence[str], *, prefix: str = "") -> pa.Array:
    """One string per row for loose key columns (`names` are their names in `raw`, `prefix` stands before them there).

    One column: the text of its value. Several: every text with its length in front, so that ('a', 'bc') and ('ab',
    'c') differ. A cell that is null and has a text in `raw` counts with that text; null if a cell has neither.
    """
    if not arrays:
        raise ValueError("a key has at least one column")
    use_raw = raw is not None and raw.null_count < len(raw)
    texts = [
        _with_raw(array, raw if use_raw else None, prefix + name) for array, name in zip(arrays, names, strict=True)
    ]
    if len(texts) == 1:
        return texts[0]
    parts: list[pa.Array] = []
    for text in texts:
        parts += [pc.cast(pc.binary_length(text), pa.string()), text]
    return pc.binary_join_element_wise(*parts, ":")


def row_texts(arrays: Sequence[pa.Array], raw: pa.Array | None, names: Sequence[str], *, rows: int = 0) -> pa.Array:
    """One string per row that says all of its cells, NULL and texts in `raw` told apart from values: two rows have
    equal strings if and only if they are equal. `rows`: how many there are, where there are no columns."""
    if not arrays:
        return pa.repeat("", len(raw) if raw is not None else rows)
    use_raw = raw is not None and raw.null_count < len(raw)
    cells: list[pa.Array] = []
    for array, name in zip(arrays, names, strict=True):
        cell = _measured(text_of(array), "")
        if use_raw and cell.null_count:
            cell = pc.coalesce(cell, _measured(pc.map_lookup(raw, pa.scalar(name), "first"), "r"))
        cells.append(pc.fill_null(cell, "-"))
    return pc.binary_join_element_wise(*cells, "") if len(cells) > 1 else cells[0]


def _measured(text: pa.Array, mark: str) -> pa.Array:
    """Each text behind its length; null stays null."""
    return pc.binary_join_element_wise(mark, pc.cast(pc.binary_length(text), pa.string()), ":", text, "")


def bucket_of(keys: pa.Array, n: int) -> np.ndarray:
    """Bucket (int64, 0 ≤ b < n) of each key. Stable for ever: files in the lake are laid out by it. With n a power of
    two, bucket b of n splits into b and b + n of 2n. Null keys go to bucket 0."""
    return (hash_of(keys) % np.uint64(n)).astype(np.int64)


def hash_of(keys: pa.Array) -> np.ndarray:
    """64-bit hash (uint64) of each string's bytes; the same in every process, version and machine."""
    if isinstance(keys, pa.ChunkedArray):
        keys = keys.combine_chunks()
    out = np.zeros(len(keys), np.uint64)
    for start in range(0, len(keys), _SLICE):
        part = keys.slice(start, _SLICE)
        out[start : start + len(part)] = _hash_slice(part)
    return out


def _with_raw(array: pa.Array, raw: pa.Array | None, name: str) -> pa.Array:
    text = text_of(array)
    if raw is None or text.null_count == 0:
        return text
    return pc.coalesce(text, pc.map_lookup(raw, pa.scalar(name), "first"))


def text_of(array: pa.Array) -> pa.Array:
    """Canonical text of each value of one typed column (string array, nulls stay null)."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
        kind = array.type
    if pa.types.is_string(kind):
        return array
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _hex(array)
    if pa.types.is_nested(kind):
        texts = (None if value is None else json.dumps(value, default=str) for value in array.to_pylist())
        return pa.array(texts, pa.string())
    return pc.cast(array, pa.string())


def _hex(array: pa.Array) -> pa.Array:
    array = pc.cast(array, pa.binary())
    offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
    data = array.buffers()[2]
    body = data.slice(int(offsets[0]), int(offsets[-1] - offsets[0])).to_pybytes() if data is not None else b""
    valid = None if array.null_count == 0 else pc.is_valid(array).buffers()[1]
    twice = pa.py_buffer(((offsets - offsets[0]) * 2).astype(np.int32))
    return pa.Array.from_buffers(pa.string(), len(array), [valid, twice, pa.py_buffer(body.hex().encode())])


def _hash_slice(keys: pa.Array) -> np.ndarray:
    """Eight bytes of all strings at a time: word j of every string that is longer than 8j bytes."""
    keys = pc.cast(keys, pa.string()) if not pa.types.is_string(keys.type) else keys
    if keys.null_count:
        keys = pc.fill_null(keys, "")
    offsets = np.frombuffer(keys.buffers()[1], np.int32)[keys.offset : keys.offset + len(keys) + 1].astype(np.int64)
    lengths = np.diff(offsets)
    data = keys.buffers()[2]
    size = int(offsets[-1] - offsets[0])
    padded = np.zeros(size + 8, np.uint8)
    if size and data is not None:
        padded[:size] = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]]
    words = np.ndarray((size + 1,), "<u8", padded, 0, (1,))
    starts = offsets[:-1] - offsets[0]
    hashes = _mix(lengths.astype(np.uint64) * _MULTIPLIER)
    rows = np.flatnonzero(lengths > 0)
    done = 0
    while len(rows):
        left = lengths[rows] - done
        word = words[starts[rows] + done].astype(np.uint64)
        short = left < 8
        if short.any():
            mask = (np.uint64(1) << (left[short].astype(np.uint64) * np.uint64(8))) - np.uint64(1)
            word[short] &= mask
        hashes[rows] = _mix((hashes[rows] ^ word) * _MULTIPLIER)
        done += 8
        rows = rows[left > 8]
    return hashes


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return np.asarray(value ^ (value >> np.uint64(31)), np.uint64)
