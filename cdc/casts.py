"""Bulk casts from the text that Postgres prints to Arrow arrays.

Every cast takes a binary or string array (nulls stay null; offsets and slices are fine) and returns the typed array
with either None or a mask of the values that the type cannot hold. Guarantees: no exception for any text, no value
changed: a masked cell is null and its text is the caller's to keep. The usual text takes a handful of pyarrow and numpy
calls, whatever the number of values; only when pyarrow refuses an array is it looked at again (by pattern, then by
halves) to find what it refuses. The text is that of a session with the settings of the design (ISO dates, UTC, hex
bytea). Which cast a column takes is not decided here but in cdc.types.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
Result = tuple[pa.Array, Bools | None]
Cast = Callable[[pa.Array], Result]

# What a pattern refuses is masked when pyarrow has refused an array. So that it does not depend on its neighbours what
# a value becomes, each pattern takes everything that the usual way takes.
_INTEGER = r"^-?[0-9]+$"
_FLOAT = r"^([-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|-?Infinity|NaN)$"
_DECIMAL = r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)$"
_DATE = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"
_TIMESTAMP = r"^[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?$"
_TIMESTAMPTZ = _TIMESTAMP[:-1] + r"\+00$"
_NOT_FINITE = r"^(-?Infinity|NaN)$"
_ZERO = r"^[-+]?[0.]+([eE].*)?$"

_YEAR_ONE_DAYS = -719162
_YEAR_ONE_US = _YEAR_ONE_DAYS * 86_400_000_000
_DECIMAL_DIGITS = 38


class _Text:
    """The buffers of a binary or string array as numpy arrays: offsets of its own window, all data, validity."""

    __slots__ = ("data", "offsets", "valid")

    def __init__(self, array: pa.Array) -> None:
        _, offsets, data = array.buffers()
        count = len(array)
        if offsets is None or offsets.size == 0:
            self.offsets = np.zeros(1, np.int32)
        else:
            self.offsets = np.frombuffer(offsets, np.int32, count + 1, array.offset * 4)
        self.data = np.empty(0, np.uint8) if data is None or data.size == 0 else np.frombuffer(data, np.uint8)
        self.valid: Bools | None = None
        if array.null_count:
            self.valid = np.asarray(array.is_valid().to_numpy(zero_copy_only=False))

    def window(self) -> npt.NDArray[np.uint8]:
        return self.data[self.offsets[0] : self.offsets[-1]]

    def lengths(self) -> npt.NDArray[np.int32]:
        return np.diff(self.offsets)

    def at(self, positions: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """The bytes there; any byte for positions outside the data (callers check lengths themselves)."""
        if not len(self.data):
            return np.zeros(len(positions), np.uint8)
        return self.data.take(positions, mode="clip")

    def among_valid(self, mask: Bools) -> Bools:
        return mask if self.valid is None else mask & self.valid


def normalise(array: pa.Array) -> pa.Array:
    """The array with 32-bit offsets, as binary or string."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if array.type == pa.large_string():
        return array.cast(pa.string())
    if array.type == pa.large_binary():
        return array.cast(pa.binary())
    if pa.types.is_null(array.type):
        return array.cast(pa.binary())
    return array


def utf8_or_bytes(array: pa.Array) -> pa.Array:
    """A string array whose bytes nobody has checked; as a binary one if some value is not UTF-8.

    That text is UTF-8 is the server's word. Plain ASCII proves it at the price of one pass over the bytes."""
    data = array.buffers()[2]
    if data is not None and data.size and np.frombuffer(data, np.uint8).max() >= 0x80:
        try:
            array.validate(full=True)
        except pa.ArrowInvalid:
            return array.view(pa.binary())
    return array


def without(array: pa.Array, mask: Bools | None) -> pa.Array:
    """The array with the masked values null; its other buffers are shared."""
    if mask is None or not mask.any():
        return array
    if array.null_count:
        mask = mask | np.asarray(array.is_null().to_numpy(zero_copy_only=False))
    if array.offset or pa.types.is_nested(array.type):
        return pc.if_else(pa.array(mask), pa.scalar(None, array.type), array)
    bitmap = pa.py_buffer(np.packbits(~mask, bitorder="little"))
    return pa.Array.from_buffers(array.type, len(array), [bitmap, *array.buffers()[1:]])


def _either(a: Bools | None, b: Bools | None) -> Bools | None:
    if a is None or b is None:
        return b if a is None else a
    return a | b


def _some(mask: Bools) -> Bools | None:
    return mask if mask.any() else None


def _mismatch(array: pa.Array, pattern: str) -> Bools:
    """Mask of the values that are not null and do not match."""
    matches = pc.match_substring_regex(array.view(pa.binary()), pattern)
    return ~np.asarray(matches.fill_null(True).to_numpy(zero_copy_only=False))


def _parse(array: pa.Array, target: pa.DataType, pattern: str, mask: Bools | None = None) -> Result:
    """pyarrow's own cast; what it refuses is found by the pattern of the plain form, and if that is not it, by halves.

    Values in `mask` are left out beforehand and stay in the returned mask."""
    array = without(array, mask)
    try:
        return array.cast(target), mask
    except ValueError:
        strange = _mismatch(array, pattern)
    mask = _either(mask, strange)
    array = without(array, strange)
    try:
        return array.cast(target), _some(mask) if mask is not None else None
    except ValueError:
        typed, refused = _parse_by_halves(array, target)
        return typed, _either(mask, refused)


def _parse_by_halves(array: pa.Array, target: pa.DataType) -> tuple[pa.Array, Bools]:
    count = len(array)
    try:
        return array.cast(target), np.zeros(count, np.bool_)
    except ValueError:
        if count == 1:
            return pa.nulls(1, target), np.ones(1, np.bool_)
    left, left_mask = _parse_by_halves(array.slice(0, count // 2), target)
    right, right_mask = _parse_by_halves(array.slice(count // 2), target)
    return pa.concat_arrays([left, right]), np.concatenate([left_mask, right_mask])


def _values(array: pa.Array, dtype: Any) -> npt.NDArray[Any]:
    """The value buffer of a fixed-width array as it lies there, also under nulls."""
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * np.dtype(dtype).itemsize)


def cast_text(array: pa.Array) -> Result:
    """string. Bytes that are not UTF-8 (a SQL_ASCII database) are masked."""
    if array.type == pa.string():
        return array, None
    try:
        return array.cast(pa.string()), None
    except ValueError:
        bad = np.fromiter((not _is_utf8(value) for value in array.to_pylist()), np.bool_, len(array))
        return without(array, bad).cast(pa.string()), bad


def _is_utf8(value: bytes | None) -> bool:
    try:
        return value is None or value.decode() is not None
    except UnicodeDecodeError:
        return False


def cast_integer(array: pa.Array, target: pa.DataType) -> Result:
    """int16, int32, int64."""
    text = _Text(array)
    window = text.window()
    mask = None
    if len(window) and window.max() > 0x39:  # pyarrow reads 0x… as hexadecimal, and wraps
        mask = _some(_mismatch(array, _INTEGER))
    return _parse(array, target, _INTEGER, mask)


def cast_float(array: pa.Array, target: pa.DataType) -> Result:
    """float or double; NaN and both infinities are values. What would overflow, underflow or has more digits than the
    server ever prints for the type is masked."""
    single = target == pa.float32()
    text = _Text(array)
    lengths = text.lengths()
    mask = _some(text.among_valid(lengths > (15 if single else 24)))
    typed, mask = _parse(array, target, _FLOAT, mask)
    if not len(typed):
        return typed, mask
    values = _values(typed, np.float32 if single else np.float64)
    lost = ~np.isfinite(values)
    if lost.any():  # overflow, or a spelling that is not the server's
        rows = np.flatnonzero(lost)
        lost[rows] = _mismatch(array.take(pa.array(rows)), _NOT_FINITE)
    suspects = np.flatnonzero((values == 0) & (lengths > 2))
    if len(suspects):
        lost[suspects] |= _mismatch(array.take(pa.array(suspects)), _ZERO)
    lost = text.among_valid(lost)
    return without(typed, lost), _either(mask, _some(lost))


def cast_decimal(array: pa.Array, target: pa.Decimal128Type) -> Result:
    """decimal128. NaN, infinities and values with more digits than the type has, before or after the point, are masked;
    nothing is rounded."""
    text = _Text(array)
    letters = np.flatnonzero(text.window() > ord("9"))
    mask = None
    if len(letters):  # NaN, infinities
        rows = np.searchsorted(text.offsets, letters + text.offsets[0], "right") - 1
        mask = np.zeros(len(array), np.bool_)
        mask[rows] = True
        mask = _some(text.among_valid(mask))
    # pyarrow multiplies up to the scale in 128 bits, and wraps without an error.
    long = text.among_valid(text.lengths() > _DECIMAL_DIGITS - target.scale)
    if long.any():
        mask = _either(mask, _some(_too_many_digits(array, text, long, target)))
    plain = without(array, mask)
    try:
        return plain.cast(target), mask
    except ValueError:
        unfit = _decimal_unfit(plain, target)
        return _parse(plain, target, _DECIMAL, _either(mask, unfit))


def _too_many_digits(array: pa.Array, text: _Text, long: Bools, target: pa.Decimal128Type) -> Bools:
    """Mask of the values, among `long`, with more digits before the point than the type has, or more than 38 in all."""
    rows = np.flatnonzero(long)
    starts = text.offsets[:-1][rows]
    negative = text.at(starts) == ord("-")
    point = pc.find_substring(array.take(pa.array(rows)), ".").to_numpy(zero_copy_only=False)
    length = text.lengths()[rows] - negative
    whole = np.where(point < 0, length, point - negative)
    whole[(whole == 1) & (text.at(starts + negative) == ord("0"))] = 0
    digits = whole + np.where(point < 0, 0, text.lengths()[rows] - point - 1)
    mask = np.zeros(len(array), np.bool_)
    mask[rows] = (whole > target.precision - target.scale) | (digits > _DECIMAL_DIGITS)
    return mask


def _decimal_unfit(array: pa.Array, target: pa.Decimal128Type) -> Bools:
    """Mask of the plain values with too many digits on one side of the point; zeros behind the last digit are none."""
    values = pc.replace_substring_regex(array.view(pa.binary()), r"(\.[0-9]*[1-9])0+$|\.0*$", r"\1")
    values = pc.replace_substring_regex(values, r"^[-+]?0*", "")
    point = pc.find_substring(values, ".").fill_null(-1).to_numpy(zero_copy_only=False)
    length = pc.binary_length(values).fill_null(0).to_numpy(zero_copy_only=False)
    whole = np.where(point < 0, length, point)
    return np.asarray((whole > target.precision - target.scale) | (length - whole - (point >= 0) > target.scale))


def cast_date(array: pa.Array) -> Result:
    """date32. infinity, BC and years past 9999 are masked."""
    text = _Text(array)
    mask = _some(text.among_valid(text.lengths() != 10))
    typed, mask = _parse(array.view(pa.string()), pa.date32(), _DATE, mask)
    return _after_year_zero(typed, mask, np.int32, _YEAR_ONE_DAYS)


def cast_timestamp(array: pa.Array, target: pa.TimestampType) -> Result:
    """timestamp[us], with or without UTC. infinity, BC, years past 9999 and, with UTC, other offsets are masked."""
    zone = 3 if target.tz else 0
    text = _Text(array)
    lengths = text.lengths()
    strange = (lengths < 19 + zone) | (lengths > 26 + zone) | (lengths == 20 + zone)
    if zone:
        ends = text.offsets[1:]
        strange |= (text.at(ends - 3) != ord("+")) | (text.at(ends - 2) != ord("0")) | (text.at(ends - 1) != ord("0"))
    else:
        strange |= text.at(text.offsets[1:] - 1) > ord("9")
    strange |= (text.at(text.offsets[:-1] + 4) != ord("-")) | (text.at(text.offsets[:-1] + 10) != ord(" "))
    mask = _some(text.among_valid(strange))
    typed, mask = _parse(array.view(pa.string()), target, _TIMESTAMPTZ if zone else _TIMESTAMP, mask)
    return _after_year_zero(typed, mask, np.int64, _YEAR_ONE_US)


def _after_year_zero(typed: pa.Array, mask: Bools | None, dtype: Any, first: int) -> Result:
    """pyarrow takes a year 0000, which Postgres calls 1 BC and hardly any reader can show."""
    if not len(typed):
        return typed, mask
    early = _values(typed, dtype) < first
    if not early.any():
        return typed, mask
    if typed.null_count:
        early &= typed.is_valid().to_numpy(zero_copy_only=False)
    return without(typed, early), _either(mask, _some(early))


def cast_boolean(array: pa.Array) -> Result:
    """bool, from t and f."""
    text = _Text(array)
    first = text.at(text.offsets[:-1])
    true = first == ord("t")
    bad = text.among_valid((text.lengths() != 1) | ~(true | (first == ord("f"))))
    null = bad if text.valid is None else bad | ~text.valid
    return pa.array(true, pa.bool_(), mask=null), _some(bad)


_IS_HEX = np.zeros(256, np.bool_)
_IS_HEX[np.frombuffer(b"0123456789abcdefABCDEF", np.uint8)] = True


def cast_bytea(array: pa.Array) -> Result:
    """binary, from the hex form; other forms are masked."""
    text = _Text(array)
    starts, lengths = text.offsets[:-1], text.lengths()
    bad = (lengths < 2) | (lengths & 1 == 1) | (text.at(starts) != ord("\\")) | (text.at(starts + 1) != ord("x"))
    bad = text.among_valid(bad)
    keep = ~bad if text.valid is None else text.valid & ~bad
    while True:
        packed = array if keep.all() else array.filter(pa.array(keep))
        digits, counts = _hex_digits(_Text(packed))
        try:
            data = binascii.unhexlify(digits.data)
            break
        except ValueError:
            owners = np.repeat(np.arange(len(counts)), counts)
            rows = np.flatnonzero(keep)[np.unique(owners[~_IS_HEX[digits]])]
            keep[rows] = False
            bad[rows] = True
    sizes = np.zeros(len(array) + 1, np.int32)
    sizes[1:][keep] = counts // 2
    offsets = pa.py_buffer(np.cumsum(sizes, dtype=np.int32))
    bitmap = None if keep.all() else pa.py_buffer(np.packbits(keep, bitorder="little"))
    return pa.Array.from_buffers(pa.binary(), len(array), [bitmap, offsets, pa.py_buffer(data)]), _some(bad)


def _hex_digits(text: _Text) -> tuple[npt.NDArray[np.uint8], Indices]:
    """All hex digits of values that begin with a backslash and an x, joined, and how many each value has."""
    window = text.window()
    digit = np.ones(len(window), np.bool_)
    starts = text.offsets[:-1] - text.offsets[0]
    digit[starts] = False
    digit[starts + 1] = False
    return window[digit], text.lengths().astype(np.int64) - 2


@dataclass(slots=True)
class _Scan:
    """The byte window of good values, with the positions that its quotes, escapes and separators have."""

    data: npt.NDArray[np.uint8]
    bounds: Indices
    quotes: Indices
    escaping: Bools | None
    separators: Indices
    bad: Bools

    def rows_of(self, positions: npt.NDArray[Any]) -> Indices:
        return np.asarray(np.searchsorted(self.bounds, positions, "right") - 1)

    def pieces(self, margin: int, empty: Bools) -> tuple[Indices, Indices, Indices]:
        """Starts and ends between separators, `margin` bytes off both ends of each value; and how many per value."""
        per_row = np.diff(np.searchsorted(self.separators, self.bounds)) + 1
        per_row[empty] = 0
        lasts = np.cumsum(per_row)
        full = per_row > 0
        inner = np.ones(int(lasts[-1]) if len(lasts) else 0, np.bool_)
        inner[(lasts - per_row)[full]] = False
        starts = np.empty(len(inner), np.int64)
        starts[~inner] = self.bounds[:-1][full] + margin
        starts[inner] = self.separators + 1
        inner[:] = True
        inner[lasts[full] - 1] = False
        ends = np.empty(len(inner), np.int64)
        ends[~inner] = self.bounds[1:][full] - margin
        ends[inner] = self.separators
        return starts, ends, per_row

    def texts(self, starts: Indices, ends: Indices) -> pa.Array:
        """Binary array of these pieces, which stand in order and do not overlap, with their escapes resolved."""
        data = self.data
        if self.escaping is not None:
            keep = ~self.escaping
            moved = np.zeros(len(data) + 1, np.int64)
            np.cumsum(keep, out=moved[1:])
            data, starts, ends = data[keep], moved[starts], moved[ends]
        count = len(starts)
        if not count:
            return pa.array([], pa.binary())
        offsets = np.empty(2 * count, np.int32)
        offsets[0::2], offsets[1::2] = starts, ends
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(data))]
        return pa.Array.from_buffers(pa.binary(), 2 * count - 1, buffers).take(pa.array(np.arange(0, 2 * count, 2)))


def _scan(array: pa.Array, separator: int, margin: int) -> _Scan:
    """Finds quotes, escapes and unquoted separators in all values at once. Marks as bad the values that have an odd
    number of quotes or, outside of quotes, a backslash or (in lists, apart from both ends) a brace."""
    text = _Text(array)
    data = text.window()
    bounds = (text.offsets - text.offsets[0]).astype(np.int64)
    scan = _Scan(data, bounds, np.empty(0, np.int64), None, np.empty(0, np.int64), np.zeros(len(array), np.bool_))
    slashes = np.flatnonzero(data == ord("\\"))
    quote = data == ord('"')
    if len(slashes):
        runs = np.concatenate([[True], np.diff(slashes) != 1])
        first = np.maximum.accumulate(np.where(runs, slashes, 0))
        escaping = slashes[(slashes - first) & 1 == 0]
        scan.escaping = np.zeros(len(data), np.bool_)
        scan.escaping[escaping] = True
        escaped = escaping[escaping + 1 < len(data)] + 1
        quote[escaped] = False
    special = data == separator
    inside: Bools | None = None
    if quote.any():
        scan.quotes = np.flatnonzero(quote)
        scan.bad = np.diff(np.searchsorted(scan.quotes, bounds)) & 1 == 1
        if scan.bad.any():  # a stray quote turns inside out all that follows it
            return scan
        inside = (np.cumsum(quote, dtype=np.uint8) & 1).astype(np.bool_)
        special &= ~inside
    scan.separators = np.flatnonzero(special)
    structure = (data == ord("{")) | (data == ord("}")) if margin else np.zeros(len(data), np.bool_)
    if len(slashes):
        structure[slashes] = True
    if inside is not None:
        structure &= ~inside
    if margin:
        structure[bounds[:-1]] = False
        structure[bounds[1:] - 1] = False
    if structure.any():
        scan.bad[scan.rows_of(np.flatnonzero(structure))] = True
    return scan


def cast_list(array: pa.Array, element: Cast, *, marks: bytes = b"{,}") -> Result:
    """list, from the text of one-dimensional arrays; `marks` are the opening byte, the separator and the closing byte.

    Arrays of more dimensions or with bounds of their own, and those with an element that its type cannot hold, are
    masked as a whole."""
    text = _Text(array)
    starts, ends, lengths = text.offsets[:-1], text.offsets[1:], text.lengths()
    bad = text.among_valid((lengths < 2) | (text.at(starts) != marks[0]) | (text.at(ends - 1) != marks[2]))
    good = ~bad if text.valid is None else text.valid & ~bad
    (elements,), per_row = _settle(array, good, bad, lambda values: _elements(values, marks[1]))
    typed, refused = element(elements)
    (typed,), per_row = _without_spoiled((typed,), refused, per_row, good, bad)
    offsets, null = _list_layout(good, bad, per_row)
    return pa.ListArray.from_arrays(offsets, typed, mask=null), _some(bad)


def cast_hstore(array: pa.Array) -> Result:
    """map<string, string>, from the text of hstore."""
    text = _Text(array)
    lengths, last = text.lengths(), text.at(text.offsets[1:] - 1)
    strange = (text.at(text.offsets[:-1]) != ord('"')) | ((last != ord('"')) & (last != ord("L")))
    bad = text.among_valid((lengths > 0) & strange)
    good = ~bad if text.valid is None else text.valid & ~bad
    (keys, values), per_row = _settle(array, good, bad, _pairs)
    (keys, odd_keys), (values, odd_values) = cast_text(keys), cast_text(values)
    (keys, values), per_row = _without_spoiled((keys, values), _either(odd_keys, odd_values), per_row, good, bad)
    offsets, null = _list_layout(good, bad, per_row)
    return pa.MapArray.from_arrays(offsets, keys, values, mask=null), _some(bad)


Pieces = tuple[pa.Array, ...]


def _settle(
    array: pa.Array, good: Bools, bad: Bools, split: Callable[[pa.Array], tuple[Pieces, Indices, Bools]]
) -> tuple[Pieces, Indices]:
    """Splits the good values; those that turn out malformed move from `good` to `bad` (both changed in place), until
    the rest can be split: a stray quote in one value would otherwise shift what is quoted in all that follow."""
    while True:
        values = array if good.all() else array.filter(pa.array(good))
        pieces, per_row, malformed = split(values)
        if not malformed.any():
            return pieces, per_row
        rows = np.flatnonzero(good)[malformed]
        good[rows] = False
        bad[rows] = True


def _without_spoiled(
    pieces: Pieces, refused: Bools | None, per_row: Indices, good: Bools, bad: Bools
) -> tuple[Pieces, Indices]:
    """Drops all pieces of the values of which one piece was refused, and marks these values in `bad`."""
    if refused is None:
        return pieces, per_row
    rows = np.repeat(np.arange(len(per_row)), per_row)
    spoiled = np.zeros(len(per_row), np.bool_)
    spoiled[rows[refused]] = True
    bad[np.flatnonzero(good)[spoiled]] = True
    keep = pa.array(~spoiled[rows])
    return tuple(piece.filter(keep) for piece in pieces), np.where(spoiled, 0, per_row)


def _list_layout(good: Bools, bad: Bools, per_row: Indices) -> tuple[pa.Array, pa.Array | None]:
    """Offsets over all values, of which the good ones have `per_row` entries, and the mask of those that are null."""
    sizes = np.zeros(len(good) + 1, np.int32)
    sizes[1:][good] = per_row
    null = ~good | bad
    return pa.array(np.cumsum(sizes, dtype=np.int32)), pa.array(null) if null.any() else None


def _elements(array: pa.Array, separator: int) -> tuple[Pieces, Indices, Bools]:
    scan = _scan(array, separator, 1)
    if scan.bad.any():
        return (), scan.bounds, scan.bad
    data = scan.data
    starts, ends, per_row = scan.pieces(1, np.diff(scan.bounds) == 2)
    wrong = starts == ends
    null = np.zeros(len(starts), np.bool_)
    words = np.flatnonzero(ends - starts == 4)
    for position, letter in enumerate(b"null"):
        words = words[data[starts[words] + position] | 0x20 == letter]
    null[words] = True
    if len(scan.quotes):
        quoted = data[np.minimum(starts, len(data) - 1)] == ord('"')
        expected = np.stack([starts[quoted], ends[quoted] - 1], 1).ravel()
        if not np.array_equal(scan.quotes, expected):
            count = np.searchsorted(scan.quotes, ends) - np.searchsorted(scan.quotes, starts)
            wrong |= (count != 2 * quoted) | (quoted & (data[ends - 1] != ord('"')))
        starts, ends = starts + quoted, ends - quoted
    if wrong.any():
        return (), per_row, _rows_with(wrong, per_row)
    return (without(scan.texts(starts, ends), _some(null)),), per_row, scan.bad


def _rows_with(wrong: Bools, per_row: Indices) -> Bools:
    """Mask of the values that own one of these pieces."""
    mask = np.zeros(len(per_row), np.bool_)
    mask[np.repeat(np.arange(len(per_row)), per_row)[wrong]] = True
    return mask


def _pairs(array: pa.Array) -> tuple[Pieces, Indices, Bools]:
    """Keys and values of hstore texts: `"key"=>"value", "other"=>NULL`."""
    scan = _scan(array, ord(","), 0)
    if scan.bad.any():
        return (), scan.bounds, scan.bad
    data, quotes = scan.data, scan.quotes
    starts, ends, per_row = scan.pieces(0, np.diff(scan.bounds) == 0)
    if not len(starts):
        return (pa.array([], pa.binary()), pa.array([], pa.binary())), per_row, scan.bad
    rest = np.ones(len(starts), np.bool_)
    rest[(np.cumsum(per_row) - per_row)[per_row > 0]] = False
    valued = data[ends - 1] == ord('"')
    count = np.searchsorted(quotes, ends) - np.searchsorted(quotes, starts)
    wrong = (ends - starts < 6 + rest) | (count != 2 + 2 * valued)
    if wrong.any():  # what follows reads a pair at the places where its quotes are
        return (), per_row, _rows_with(wrong, per_row)
    wrong = rest & (data[starts] != ord(" "))
    starts = starts + rest
    at = np.searchsorted(quotes, starts)
    key_end = quotes[at + 1]
    tail = data[np.minimum(key_end[:, None] + np.arange(1, 7), len(data) - 1)]
    arrow = (tail[:, 0] == ord("=")) & (tail[:, 1] == ord(">"))
    to_value = (quotes[np.minimum(at + 2, len(quotes) - 1)] == key_end + 3) & (tail[:, 2] == ord('"'))
    to_null = (ends - key_end == 7) & (tail == np.frombuffer(b"=>NULL", np.uint8)).all(axis=1)
    wrong |= (quotes[at] != starts) | ~arrow | ~np.where(valued, to_value, to_null)
    if wrong.any():
        return (), per_row, _rows_with(wrong, per_row)
    keys = scan.texts(starts + 1, key_end)
    values = scan.texts(np.where(valued, key_end + 4, ends), np.where(valued, ends - 1, ends))
    return (keys, without(values, _some(~valued))), per_row, scan.bad
