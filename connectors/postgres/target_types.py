"""Which types of a result can never go into which columns: found before the first row.

Everything that some value could pass is left to the server, row by row: texts go anywhere, numbers into any number,
text, boolean, enum or json. Refused is what cannot be read at all (a boolean as a timestamp), and what would be read as
something else without a word: the time of a timestamp that a date drops, bytes that become their hexadecimal text,
texts that `name` and "char" would cut.
Types of extensions are not judged.
"""

from __future__ import annotations

import pyarrow as pa

_JSON = ("json", "jsonb")
_KNOWN = (*_JSON, "uuid", "bytea", "xml", "tsvector", "tsquery", "pg_lsn", "macaddr", "macaddr8")
"""Types of category U that come with the server: of others we do not know what they read."""

_CAST = "write {column}::varchar or another cast in the query"


def mismatch(kind: pa.DataType, name: str, category: str) -> str | None:
    """None if values of `kind` may go into a column of the base type `name` (of that typcategory); else what to write
    in the query instead, with `{column}` for the column's name."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if isinstance(kind, pa.ExtensionType):
        kind = kind.storage_type
    t = pa.types
    if name.lstrip("_") in ("name", "char"):
        return "make the column text or varchar: this type would cut {column} without a word"
    if _has_no_text(kind) and not _is_list(kind):
        return "choose a form in the query, for example to_json({column}) or a cast to varchar"
    if t.is_null(kind) or _is_text(kind):
        return None
    if _is_list(kind):
        if _has_no_text(kind.value_type):
            return "write to_json({column}) in the query"
        return None if category == "A" or _foreign(name, category) else "write to_json({column}) in the query"
    if category in ("S", "X") or _foreign(name, category):
        return "write hex({column}) or decode({column}) in the query" if _is_bytes(kind) else None
    allowed: tuple[str, ...]
    if t.is_boolean(kind):
        allowed = ("bool", *_JSON)
    elif t.is_integer(kind) or t.is_floating(kind) or t.is_decimal(kind):
        if category in ("N", "E"):
            return None
        allowed = ("bool", *_JSON)
    elif t.is_date(kind):
        allowed = ("date", "timestamp", "timestamptz")
    elif t.is_timestamp(kind):
        allowed = ("timestamp", "timestamptz")
        if name == "date":
            return "write {column}::date in the query"
    elif t.is_time(kind):
        allowed = ("time", "timetz", "interval")
    elif _is_bytes(kind):
        allowed = ("bytea",)
    else:
        return None
    return None if name in allowed else _CAST


def _has_no_text(kind: pa.DataType) -> bool:
    if _is_list(kind):
        return _has_no_text(kind.value_type)
    t = pa.types
    return any(test(kind) for test in (t.is_struct, t.is_map, t.is_union, t.is_interval))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    t = pa.types
    return t.is_binary(kind) or t.is_large_binary(kind) or t.is_fixed_size_binary(kind) or t.is_binary_view(kind)


def _foreign(name: str, category: str) -> bool:
    return category == "U" and name not in _KNOWN


def names_one_value(kind: pa.DataType, name: str, deterministic: bool, rounds: bool) -> bool:
    """Whether two different values of `kind` are two different values of a column of the base type `name` for sure:
    texts of a number or a uuid may be written in several ways, and modifiers round."""
    if rounds:
        return False
    if name in ("text", "varchar"):
        return deterministic
    t = pa.types
    if t.is_integer(kind):
        return name in ("int2", "int4", "int8", "numeric")
    if t.is_decimal(kind):
        return name == "numeric"
    if _is_bytes(kind):
        return name == "bytea"
    if t.is_timestamp(kind):
        return name in ("timestamp", "timestamptz") and kind.unit != "ns"
    return (t.is_date(kind) and name == "date") or (t.is_boolean(kind) and name == "bool")
