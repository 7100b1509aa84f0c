"""Result rows as the text that Postgres reads: Arrow columns → one CSV buffer for COPY, in bulk.

Every value keeps its exact text; the server casts it to the column's type and refuses what does not fit. NULL is an
unquoted empty field, so an empty string stays an empty string. Lists become Postgres arrays. It does not guess how a
struct or a map should look: the query says so (`to_json(…)`).
"""

from __future__ import annotations

import binascii
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from cdc.sink import Batch

_YEAR_1 = -719_162
"""Days from 1970 back to the first of year 1."""
_CYCLE_DAYS = 146_097
"""Of 400 years, after which the calendar repeats."""
_CSV = csv.WriteOptions(include_header=False, quoting_style="all_valid")


class Unwritable(ValueError):
    """Values of this Arrow type have no text form here."""


def copy_csv(columns: list[pa.ChunkedArray]) -> pa.Buffer:
    """The columns as CSV for `COPY … (FORMAT csv)`. Unwritable for a type that has no one text form."""
    texts = pa.table({f"c{i}": text_of(column) for i, column in enumerate(columns)})
    out = pa.BufferOutputStream()
    csv.write_csv(texts, out, _CSV)
    return out.getvalue()


def stage_csv(batch: Batch, columns: Sequence[str], rows: range) -> pa.Buffer:
    """These rows of the batch for its stage: ordinal, the columns, key and digest."""
    parts = [*(batch.rows.column(c) for c in columns), batch.acks.column("key"), batch.acks.column("digest")]
    ordinals = pa.chunked_array([pa.array(np.arange(rows.start, rows.stop, dtype=np.int32))])
    return copy_csv([ordinals, *(part.slice(rows.start, len(rows)) for part in parts)])


def text_of(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as strings that Postgres' input functions read; nulls stay null."""
    return pa.chunked_array([_text(chunk) for chunk in column.chunks], pa.string())


def _text(array: pa.Array) -> pa.Array:
    kind = array.type
    if isinstance(kind, pa.ExtensionType):
        return _text(array.storage)
    if pa.types.is_dictionary(kind):
        return _text(array.dictionary_decode())
    if pa.types.is_string(kind):
        return array
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _array_literals(array)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return _hex(array.cast(pa.binary()))
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return _times(array)
    if pa.types.is_floating(kind):
        return _floats(array.cast(pa.float64()) if kind == pa.float16() else array)
    if any(test(kind) for test in (pa.types.is_struct, pa.types.is_map, pa.types.is_union, pa.types.is_interval)):
        raise Unwritable(f"{kind}")
    return array.cast(pa.string())


def _array_literals(array: pa.Array) -> pa.Array:
    """`{…}` as Postgres reads arrays; elements quoted, inner lists as they are."""
    lists = array.cast(pa.list_(array.type.value_type))
    elements = _text(lists.flatten())
    if not pa.types.is_nested(lists.type.value_type):
        escaped = pc.replace_substring(pc.replace_substring(elements, "\\", "\\\\"), '"', '\\"')
        elements = pc.binary_join_element_wise('"', escaped, '"', "")
    elements = pc.fill_null(elements, "NULL")
    # flatten() leaves out what stands behind null lists, so the lists are built anew from their own lengths.
    lengths = pc.fill_null(pc.list_value_length(lists), 0)
    offsets = np.zeros(len(lists) + 1, np.int32)
    np.cumsum(lengths.to_numpy(zero_copy_only=False), out=offsets[1:])
    joined = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), elements), ",")
    text = pc.binary_join_element_wise("{", joined, "}", "")
    return pc.if_else(lists.is_valid(), text, pa.scalar(None, pa.string()))


def _hex(array: pa.Array) -> pa.Array:
    """`\\x…` as Postgres reads bytea: one conversion of the whole data buffer."""
    if len(array) == array.null_count:
        return pa.nulls(len(array), pa.string())
    offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
    data = array.buffers()[2]
    digits = binascii.hexlify(memoryview(data)[offsets[0] : offsets[-1]]) if data is not None else b""
    doubled = ((offsets.astype(np.int64) - offsets[0]) * 2).astype(np.int32)
    body = pa.StringArray.from_buffers(len(array), pa.py_buffer(doubled), pa.py_buffer(digits))
    text = pc.binary_join_element_wise("\\x", body, "")
    return pc.if_else(array.is_valid(), text, pa.scalar(None, pa.string()))


def _floats(array: pa.Array) -> pa.Array:
    """Whole numbers in plain digits: an integer column reads no exponent."""
    texts = array.cast(pa.string())
    small = pc.less(pc.abs(array), 2.0**53)
    whole = pc.and_(small, pc.and_(pc.equal(array, pc.trunc(array)), pc.not_equal(array, 0)))
    if not pc.any(whole).as_py():
        return texts
    digits = pc.if_else(whole, array, pa.scalar(0, array.type)).cast(pa.int64()).cast(pa.string())
    return pc.if_else(pc.fill_null(whole, False), digits, texts)


def _times(array: pa.Array) -> pa.Array:
    """Dates and timestamps; without a zone's name, and with the offset said aloud where there is one, so that the
    session's zone cannot change them. Infinite ones are the ends of the range, as SQL engines have them in Arrow; years
    before 1 are written as Postgres does, without a year 0."""
    kind = array.type
    if pa.types.is_date64(kind):
        return _times(array.cast(pa.date32()))
    is_date = pa.types.is_date(kind)
    zone = "" if is_date or kind.tz is None else "+00"
    plain = kind if is_date else pa.timestamp(kind.unit)
    bits = pa.int32() if is_date else pa.int64()
    ticks = array.view(bits)
    end = 2 ** (bits.bit_width - 1) - 1
    day = 1 if is_date else {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit] * 86_400
    last, first = pc.greater_equal(ticks, end), pc.less_equal(ticks, -end)
    ancient = pc.and_(pc.less(ticks, _YEAR_1 * day), pc.invert(first)) if _YEAR_1 * day > -end else pc.less(ticks, -end)
    odd = pc.or_(pc.or_(last, first), ancient)
    text = pc.if_else(odd, pa.scalar(0, bits), ticks).view(plain).cast(pa.string())
    if zone:
        text = pc.binary_join_element_wise(text, zone, "")
    if not pc.any(odd).as_py():
        return text
    text = pc.if_else(last, "infinity", pc.if_else(first, "-infinity", text))
    indices = np.flatnonzero(pc.fill_null(ancient, False).to_numpy(zero_copy_only=False))
    if not len(indices):
        return text
    before = pa.array([_before_christ(ticks[int(i)].as_py(), day, plain, zone) for i in indices], pa.string())
    mask = pc.fill_null(ancient, False)
    return pc.replace_with_mask(text, mask, before)


def _before_christ(ticks: int, day: int, kind: pa.DataType, zone: str) -> str:
    """The time some 400 years later, when the calendar is the same, with the year put right."""
    cycles = (_YEAR_1 * day - ticks) // (_CYCLE_DAYS * day) + 1
    bits = pa.int32() if pa.types.is_date(kind) else pa.int64()
    later = str(pa.array([ticks + cycles * _CYCLE_DAYS * day], bits).view(kind).cast(pa.string())[0].as_py())
    year = int(later[:4]) - 400 * cycles
    return f"{1 - year:04d}{later[4:]}{zone} BC"
