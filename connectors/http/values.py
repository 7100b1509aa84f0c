"""Values of Arrow columns as JSON has them, and as texts.

Exact: whole numbers, decimals with all their digits (a JSON number), texts, booleans, JSON. Dates and times are texts
in ISO 8601; an instant ends in `Z` and is UTC, a time without a zone has none. Bytes are texts in base64, NaN and the
infinities texts. Structs and maps are objects, lists are lists. What has no such form (a time beyond the year 9999)
refuses its row when a template uses it (Unsayable).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.compute as pc

_FIRST_DAY, _LAST_DAY = -719_162, 2_932_896
"""1 January of the year 1 and 31 December 9999, in days since 1970: what Python's dates can say."""
_INT64: Final = {(1 << 63) - 1: "infinity", -(1 << 63) + 1: "-infinity"}
"""How DuckDB keeps the infinite times."""
_INT32: Final = {(1 << 31) - 1: "infinity", -(1 << 31) + 1: "-infinity"}
_UNITS: Final = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


class JsonText(str):
    """JSON as it stands in a column of that type."""

    __slots__ = ()


class Unsayable:
    """Stands where a value has no form in JSON. `why` holds no value."""

    __slots__ = ("why",)

    def __init__(self, why: str) -> None:
        self.why = why


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """The rows as dicts of what `to_json` can write."""
    columns = [_values(column.combine_chunks()) for column in table.columns]
    names = table.column_names
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def to_json(value: Any) -> bytes:
    """As JSON, compact."""
    return orjson.dumps(value, default=_other, option=orjson.OPT_PASSTHROUGH_SUBCLASS)


def to_text(value: Any) -> str:
    """As it stands within a text: NULL is empty, structures are JSON."""
    if isinstance(value, str):
        return str(value)
    if value is None:
        return ""
    return to_json(value).decode()


def _other(value: Any) -> orjson.Fragment:
    if isinstance(value, Decimal):
        return orjson.Fragment(format(value, "f"))
    if isinstance(value, JsonText):
        return orjson.Fragment(str(value))
    raise TypeError(type(value).__name__)


def _values(array: Any) -> list[Any]:
    """One column, or the children of one, value by value; None for NULL."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == "arrow.uuid":
            return [None if v is None else str(v) for v in array.to_pylist()]
        inner = _values(array.storage)
        return [JsonText(v) if isinstance(v, str) else v for v in inner] if "json" in kind.extension_name else inner
    for matches, convert in _BY_KIND:
        if matches(kind):
            return convert(array)
    return [None if known is None else Unsayable(f"type {kind}") for known in array.is_valid().to_pylist() or []]


def _plain(array: Any) -> list[Any]:
    return array.to_pylist()


def _floats(array: Any) -> list[Any]:
    return [v if v is None or math.isfinite(v) else _infinite(v) for v in array.to_pylist()]


def _infinite(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _binary(array: Any) -> list[Any]:
    return [None if v is None else base64.b64encode(v).decode() for v in array.to_pylist()]


def _timestamps(array: Any) -> list[Any]:
    day = 86_400 * _UNITS[array.type.unit]
    texts = array.cast(pa.timestamp(array.type.unit)).cast(pa.string())
    zone = "Z" if array.type.tz else ""
    return _times(array.cast(pa.int64()), texts, _FIRST_DAY * day, (_LAST_DAY + 1) * day, _INT64, zone)


def _dates(array: Any) -> list[Any]:
    days = array.cast(pa.date32())
    return _times(days.cast(pa.int32()), days.cast(pa.string()), _FIRST_DAY, _LAST_DAY + 1, _INT32, "")


def _times(numbers: Any, texts: Any, least: int, end: int, infinite: dict[int, str], zone: str) -> list[Any]:
    whole = pc.all(pc.and_(pc.greater_equal(numbers, least), pc.less(numbers, end))).as_py()
    found = [None if t is None else t.replace(" ", "T") + zone for t in texts.to_pylist()]
    if whole or whole is None:
        return found
    return [
        t if n is None or least <= n < end else infinite.get(n) or Unsayable("a time beyond the years 1 to 9999")
        for n, t in zip(numbers.to_pylist(), found, strict=True)
    ]


def _clocks(array: Any) -> list[Any]:
    return array.cast(pa.string()).to_pylist()


def _structs(array: Any) -> list[Any]:
    names = [field.name for field in array.type]
    children = [_values(array.field(i)) for i in range(len(names))]
    rows = list(zip(*children, strict=True)) if children else [()] * len(array)
    known = array.is_valid().to_pylist()
    return [dict(zip(names, row, strict=True)) if k else None for row, k in zip(rows, known, strict=True)]


def _lists(array: Any) -> list[Any]:
    return [_values(item.values) if item.is_valid else None for item in array]


def _maps(array: Any) -> list[Any]:
    found: list[Any] = []
    for item in array:
        pairs = _values(item.values) if item.is_valid else None
        found.append(None if pairs is None else {to_text(p["key"]): p["value"] for p in map(_pair, pairs)})
    return found


def _pair(pair: dict[str, Any]) -> dict[str, Any]:
    key, value = pair.values()
    return {"key": key, "value": value}


_types = pa.types
_BY_KIND: Final[list[tuple[Callable[[Any], bool], Callable[[Any], list[Any]]]]] = [
    (_types.is_boolean, _plain),
    (_types.is_integer, _plain),
    (_types.is_decimal, _plain),
    (_types.is_floating, _floats),
    (lambda k: _types.is_string(k) or _types.is_large_string(k) or _types.is_string_view(k), _plain),
    (lambda k: _types.is_binary(k) or _types.is_large_binary(k) or _types.is_binary_view(k), _binary),
    (_types.is_fixed_size_binary, _binary),
    (_types.is_timestamp, _timestamps),
    (_types.is_date, _dates),
    (_types.is_time, _clocks),
    (_types.is_null, _plain),
    (_types.is_struct, _structs),
    (_types.is_map, _maps),
    (lambda k: _types.is_list(k) or _types.is_large_list(k) or _types.is_fixed_size_list(k), _lists),
    (_types.is_dictionary, lambda a: _values(a.dictionary_decode())),
]

__all__ = ["JsonText", "Unsayable", "rows_of", "to_json", "to_text"]
