"""What SQL for DuckDB is written of: names, literals, types, and the objects of a table as one SELECT. Pure."""

from __future__ import annotations

import datetime as dt
import decimal
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from cdc.errors import ModelFailed

_SCALARS: tuple[tuple[Any, str], ...] = (
    (pa.types.is_boolean, "BOOLEAN"),
    (pa.types.is_int8, "TINYINT"),
    (pa.types.is_int16, "SMALLINT"),
    (pa.types.is_int32, "INTEGER"),
    (pa.types.is_int64, "BIGINT"),
    (pa.types.is_float32, "FLOAT"),
    (pa.types.is_float64, "DOUBLE"),
    (pa.types.is_date, "DATE"),
    (pa.types.is_time, "TIME"),
    (pa.types.is_string, "VARCHAR"),
    (pa.types.is_large_string, "VARCHAR"),
    (pa.types.is_string_view, "VARCHAR"),
    (pa.types.is_binary, "BLOB"),
    (pa.types.is_large_binary, "BLOB"),
    (pa.types.is_binary_view, "BLOB"),
)


def sql_type(kind: pa.DataType) -> str:
    """DuckDB's name of an Arrow type of the type contract."""
    for test, name in _SCALARS:
        if test(kind):
            return name
    if pa.types.is_decimal(kind):
        return f"DECIMAL({kind.precision}, {kind.scale})"
    if pa.types.is_timestamp(kind):
        return "TIMESTAMPTZ" if kind.tz is not None else "TIMESTAMP"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"{sql_type(kind.value_type)}[]"
    if pa.types.is_map(kind):
        return f"MAP({sql_type(kind.key_type)}, {sql_type(kind.item_type)})"
    if pa.types.is_struct(kind):
        return f"STRUCT({', '.join(f'{quoted(f.name)} {sql_type(f.type)}' for f in kind)})"
    raise ModelFailed(f"DuckDB has no type for {kind}")


def quoted(name: str) -> str:
    """The name as a quoted SQL identifier."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def literal(text: str) -> str:
    """The text as a SQL string literal."""
    escaped = text.replace("'", "''")
    return f"'{escaped}'"


def constant(value: pa.Scalar) -> str:
    """One value as SQL of its type."""
    return f"{_text(value.as_py())}::{sql_type(value.type)}"


def _text(value: Any) -> str:
    match value:
        case None:
            return "NULL"
        case bool() | int():
            return str(value)
        case float() | decimal.Decimal() | str():
            return literal(str(value))
        case dt.date() | dt.datetime():
            return literal(value.isoformat(" ") if isinstance(value, dt.datetime) else value.isoformat())
        case bytes():
            return f"unhex({literal(value.hex())})"
        case [(_, _), *_]:
            return f"MAP {{{', '.join(f'{_text(k)}: {_text(v)}' for k, v in value)}}}"
        case list():
            return f"[{', '.join(map(_text, value))}]"
    raise ModelFailed(f"there is no SQL for a value of type {type(value).__name__}")


def objects(fields: pa.Schema, paths: Sequence[str], partitions: Sequence[str] = ()) -> str:
    """A SELECT of the rows of Parquet objects of one table version, which has these fields: a column that an object
    lacks is NULL, and `partitions` stand in the objects' paths."""
    names = ", ".join(quoted(f.name) for f in fields)
    typed = ", ".join(f"NULL::{sql_type(f.type)} AS {quoted(f.name)}" for f in fields)
    body = f"SELECT {names} FROM (SELECT {typed} WHERE false"
    if paths:
        kinds = {p: sql_type(fields.field(p).type) for p in partitions}
        body += f" UNION ALL BY NAME SELECT * FROM {parquet(paths, kinds, union=True)}"
    return f"{body})"


def parquet(paths: Sequence[str], partitions: Mapping[str, str] | None = None, *, union: bool = False) -> str:
    """Parquet objects as an item of FROM. `partitions`: type by the name of a column that stands in the paths; `union`:
    the objects do not all have the same columns."""
    options = "union_by_name = true, " if union else ""
    options += f"hive_partitioning = {'true' if partitions else 'false'}"
    if partitions:
        options += f", hive_types = {{{', '.join(f'{quoted(name)}: {kind}' for name, kind in partitions.items())}}}"
    return f"read_parquet([{', '.join(map(literal, paths))}], {options})"
