"""Typed Arrow values back to the text that Postgres prints for them.

For keys that are sent back to the server, and for comparing a lake with its source. The text equals the server's own,
byte for byte, under the design's session settings. All is vectorised but maps, which take a Python loop. The other
direction is cdc.casts.
"""

from __future__ import annotations

import binascii
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_QUOTED = r'[ \t\n\r\v\f{}"\\]|^$|^(?i:null)$'


def print_values(array: pa.Array, marks: bytes = b"{,}") -> pa.Array:
    """Typed array → string array. `marks`: opening byte, separator and closing byte of lists."""
    kind = array.type
    if kind == pa.string():
        return array
    if pa.types.is_boolean(kind):
        return pc.if_else(array, "t", "f")
    if pa.types.is_binary(kind):
        return _print_bytea(array)
    if pa.types.is_floating(kind):
        return _print_floats(array)
    if pa.types.is_decimal(kind):
        return _print_decimals(array)
    if pa.types.is_timestamp(kind):
        text = array.cast(pa.timestamp("us")).cast(pa.string())
        text = pc.utf8_rtrim(pc.utf8_rtrim(text, "0"), ".")
        return pc.binary_join_element_wise(text, "+00", "") if kind.tz else text
    if pa.types.is_map(kind):
        return _print_maps(array)
    if pa.types.is_list(kind):
        return _print_lists(array, marks)
    return array.cast(pa.string())


def _print_bytea(array: pa.Array) -> pa.Array:
    filled = array.fill_null(b"")
    sizes = pc.binary_length(filled).to_numpy(zero_copy_only=False).astype(np.int64)
    joined = binascii.hexlify(b"".join(filled.to_pylist())) if len(array) else b""
    text = np.empty(int((2 * sizes + 2).sum()), np.uint8)
    ends = np.cumsum(2 * sizes + 2)
    starts = ends - (2 * sizes + 2)
    digit = np.ones(len(text), np.bool_)
    digit[starts] = digit[starts + 1] = False
    text[starts], text[starts + 1] = ord("\\"), ord("x")
    text[digit] = np.frombuffer(joined, np.uint8)
    offsets = pa.py_buffer(np.concatenate([[0], ends]).astype(np.int32))
    made = pa.Array.from_buffers(pa.string(), len(array), [None, offsets, pa.py_buffer(text)])
    return pc.if_else(array.is_valid(), made, pa.scalar(None, pa.string())) if array.null_count else made


def _replace(text: pa.Array, chosen: np.ndarray[Any, Any], values: list[str]) -> pa.Array:
    return pc.replace_with_mask(text, pa.array(chosen), pa.array(values, pa.string()))


def _print_floats(array: pa.Array) -> pa.Array:
    """pyarrow's digits are the shortest, as Postgres' are, up to what the type holds without gaps. Postgres writes an
    exponent for what is below 1e-4 or has more digits before the point than the type keeps of any number."""
    text = array.cast(pa.string())
    single = array.type == pa.float32()
    values = array.fill_null(0).to_numpy(zero_copy_only=False)
    size = np.abs(values)
    digits = 6 if single else 15
    odd = ~((size >= 1e-4) & (size < 10**digits)) & (size != 0)
    odd |= pc.match_substring(text, "e").fill_null(False).to_numpy(zero_copy_only=False)
    if not odd.any():
        return text
    return _replace(text, odd, [_print_float(v, digits) for v in values[odd]])


def _print_float(value: Any, fixed_digits: int) -> str:
    if np.isnan(value):
        return "NaN"
    if np.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    shortest = _shortest(value).normalize()
    sign, digits, exponent = shortest.as_tuple()
    power = len(digits) + int(exponent) - 1
    if -4 <= power < fixed_digits:
        return f"{shortest:f}"
    text = "".join(map(str, digits))
    point = "." if len(text) > 1 else ""
    return f"{'-' if sign else ''}{text[0]}{point}{text[1:]}e{'-' if power < 0 else '+'}{abs(power):02d}"


def _shortest(value: Any) -> Decimal:
    """The shortest decimal that is nearer to the value than to any other of its type. One that lies right between two,
    which others read as the even one, is not good enough for Postgres; it exists only where whole numbers have gaps."""
    shortest = Decimal(str(value))
    bits = np.finfo(value.dtype).nmant + 1
    fraction, exponent = np.frexp(abs(value))
    if exponent <= bits:
        return shortest
    exact, outward = abs(int(value)), 1 << int(exponent) - bits
    inward = outward if fraction > 0.5 else outward // 2
    digits = len(shortest.normalize().as_tuple().digits)
    while 2 * (abs(int(shortest)) - exact) in (outward, -inward):
        shortest = Decimal(f"{value:.{digits}e}")
        digits += 1
    return shortest


def _print_decimals(array: pa.Array) -> pa.Array:
    """pyarrow writes very small numbers and their zeros with an exponent; Postgres never does."""
    text = array.cast(pa.string())
    if array.type.scale <= 6:
        return text
    odd = pc.match_substring(text, "E").fill_null(False)
    if not pc.any(odd).as_py():
        return text
    zero = pc.starts_with(text, "0E").fill_null(False)
    text = pc.if_else(zero, "0." + "0" * array.type.scale, text)
    odd = pc.and_not(odd, zero).to_numpy(zero_copy_only=False)
    return _replace(text, odd, [f"{v:f}" for v in array.filter(pa.array(odd)).to_pylist()])


def _escape(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _print_lists(array: pa.Array, marks: bytes) -> pa.Array:
    opening, separator, closing = (chr(mark) for mark in marks)
    elements = print_values(array.flatten(), marks)
    odd = pc.match_substring_regex(elements, _QUOTED)
    odd = pc.fill_null(pc.or_(odd, pc.match_substring(elements, separator)), False)
    if pc.any(odd).as_py():
        escaped = pc.replace_substring(pc.replace_substring(elements, "\\", "\\\\"), '"', '\\"')
        elements = pc.if_else(odd, pc.binary_join_element_wise('"', escaped, '"', ""), elements)
    sizes = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
    joined = pc.binary_join(pa.ListArray.from_arrays(offsets, elements.fill_null("NULL")), separator)
    text = pc.binary_join_element_wise(opening, joined, closing, "")
    return pc.if_else(array.is_valid(), text, pa.scalar(None, pa.string())) if array.null_count else text


def _print_maps(array: pa.Array) -> pa.Array:
    return pa.array(
        [
            None
            if pairs is None
            else ", ".join(f"{_escape(k)}=>{'NULL' if v is None else _escape(v)}" for k, v in pairs)
            for pairs in array.to_pylist()
        ],
        pa.string(),
    )
