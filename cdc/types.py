"""The type contract: which Arrow type holds a Postgres type, and the way there and back.

One table (`RULES`) is behind the Arrow types, the casts of stream and snapshot, `cdc tables` and docs/types.md. A value
is exact in its column or, masked by `cast`, its text belongs in `_raw`; a type that the table does not know is text
exactly as Postgres prints it. The text is that of a session with the design's settings (ISO dates, UTC, hex bytea).
What does the work on bytes is in cdc.casts. Does not know batches, sources or lakes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa

from cdc import casts
from cdc.casts import Bools, Cast
from cdc.errors import ConfigError
from cdc.pgtext import print_values
from cdc.table import Column, TableSchema

BOOL, BYTEA, INT8, INT2, INT4, TEXT = 16, 17, 20, 21, 23, 25
FLOAT4, FLOAT8, DATE, TIMESTAMP, TIMESTAMPTZ, NUMERIC, BOX = 700, 701, 1082, 1114, 1184, 1700, 603
DECIMAL_DIGITS = 38

_SCALARS: dict[int, pa.DataType] = {
    BOOL: pa.bool_(),
    INT2: pa.int16(),
    INT4: pa.int32(),
    INT8: pa.int64(),
    FLOAT4: pa.float32(),
    FLOAT8: pa.float64(),
    BYTEA: pa.binary(),
    DATE: pa.date32(),
    TIMESTAMP: pa.timestamp("us"),
    TIMESTAMPTZ: pa.timestamp("us", tz="UTC"),
}

# Text types that have an element type in the catalog without being arrays: name, point, lseg, box, line, int2vector,
# oidvector.
_NO_ARRAYS = frozenset({19, 600, 601, BOX, 628, 22, 30})

# Array types of the catalog with the type of their elements, for columns whose element type the caller left out.
_ARRAYS: dict[int, int] = {
    1000: BOOL, 1001: BYTEA, 1016: INT8, 1005: INT2, 1007: INT4, 1009: TEXT, 1015: 1043, 1014: 1042, 1021: FLOAT4,
    1022: FLOAT8, 1182: DATE, 1115: TIMESTAMP, 1185: TIMESTAMPTZ, 1231: NUMERIC, 2951: 2950, 199: 114, 3807: 3802,
    1183: 1083, 1270: 1266, 1187: 1186, 1041: 869, 651: 650, 1003: 19, 1002: 18, 1028: 26, 143: 142, 791: 790,
    1561: 1560, 1563: 1562, 1020: BOX, 1040: 829, 3643: 3614, 3905: 3904, 3907: 3906, 3909: 3908, 3911: 3910,
    3913: 3912, 3927: 3926,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the contract, as people read it."""

    postgres: str
    arrow: str
    raw: str = ""


_NOT_A_DECIMAL = "NaN"
_NOT_A_DATE = "infinity, BC, years past 9999"
_NOT_A_LIST = "more dimensions, a lower bound other than 1, an element that its type cannot hold"

RULES = (
    Rule("boolean", "bool"),
    Rule("smallint, integer, bigint", "int16, int32, int64"),
    Rule("real, double precision", "float, double (NaN and infinities are values)"),
    Rule(
        "numeric(p,s), p ≤ 38",
        "decimal128(p,s); with s < 0 decimal128(p-s,0), with s > p decimal128(s,s), as long as that is ≤ 38 digits",
        _NOT_A_DECIMAL,
    ),
    Rule("numeric without precision, or that does not fit in 38 digits", "string"),
    Rule("date", "date32", _NOT_A_DATE),
    Rule("timestamp", "timestamp[us]", _NOT_A_DATE),
    Rule("timestamptz", "timestamp[us, UTC]", f"{_NOT_A_DATE} (in UTC)"),
    Rule("bytea", "binary"),
    Rule(
        "one-dimensional array of any type here",
        "list of that type's; list<string> if the element's type is text",
        f"{_NOT_A_LIST}: the whole array",
    ),
    Rule("hstore, known by its name", "map<string, string>"),
    Rule("vector and halfvec of pgvector, known by their names", "list<float>"),
    Rule("domain", "as its base type", "as its base type"),
    Rule(
        "text, varchar, char, name, uuid, json, jsonb, xml, enums, inet, cidr, macaddr, interval, time, timetz, money, "
        "bit, varbit, ranges, multiranges, composite types, geometric types, tsvector, tsquery, oid, pg_lsn, "
        "int2vector, arrays whose elements stand between other separators than commas, anything unknown",
        "string, exactly as Postgres prints it",
        "bytes that are not UTF-8 (possible only in a SQL_ASCII database)",
    ),
)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a column is held: its Arrow type, the cast that fills it, the marks around a list's elements, and which of
    the type's values are kept as text instead."""

    type: pa.DataType
    cast: Cast
    marks: bytes = b""
    raw: str = ""


_TEXT_PLAN = _Plan(pa.string(), casts.cast_text)


@lru_cache(maxsize=65536)
def _plan(column: Column) -> _Plan:
    if column.declared:
        plan = _plan(_as_declared(column))
        return replace(plan, raw=plan.raw and f"{plan.raw}, more digits than it has")
    element_oid = column.element_oid or _ARRAYS.get(column.type_oid, 0)
    if element_oid and column.type_oid not in _NO_ARRAYS:
        element = _scalar_plan(element_oid, column.typmod)
        marks = b"{;}" if element_oid == BOX else b"{,}"
        cast_elements = partial(casts.cast_list, element=element.cast, marks=marks)
        return _Plan(pa.list_(element.type), cast_elements, marks, _NOT_A_LIST)
    if column.type_oid >= 16384:  # types of extensions have no fixed OID
        match re.sub(r"\(.*", "", column.type_name).rpartition(".")[2].strip('"'):
            case "hstore":
                return _Plan(pa.map_(pa.string(), pa.string()), casts.cast_hstore)
            case "vector" | "halfvec":
                floats = partial(casts.cast_float, target=pa.float32())
                return _Plan(pa.list_(pa.float32()), partial(casts.cast_list, element=floats, marks=b"[,]"), b"[,]")
    return _scalar_plan(column.type_oid, column.typmod)


def _scalar_plan(oid: int, typmod: int) -> _Plan:
    target = _decimal_type(typmod) if oid == NUMERIC else _SCALARS.get(oid)
    match oid:
        case _ if target is None:
            return _TEXT_PLAN
        case 16:
            return _Plan(target, casts.cast_boolean)
        case 20 | 21 | 23:
            return _Plan(target, partial(casts.cast_integer, target=target))
        case 700 | 701:
            return _Plan(target, partial(casts.cast_float, target=target))
        case 1700:
            return _Plan(target, partial(casts.cast_decimal, target=target), raw=_NOT_A_DECIMAL)
        case 17:
            return _Plan(target, casts.cast_bytea)
        case 1082:
            return _Plan(target, casts.cast_date, raw=_NOT_A_DATE)
    return _Plan(target, partial(casts.cast_timestamp, target=target), raw=_NOT_A_DATE)


def _decimal_type(typmod: int) -> pa.DataType | None:
    """The decimal that holds numeric of this typmod, None if there is none.

    Parquet and Delta want 0 ≤ scale ≤ precision: a negative scale becomes more digits, a scale beyond the precision
    as many digits as it has."""
    if typmod < 4:
        return None
    precision = ((typmod - 4) >> 16) & 0xFFFF
    scale = (((typmod - 4) & 0x7FF) ^ 0x400) - 0x400
    if scale < 0:
        precision, scale = precision - scale, 0
    precision = max(precision, scale)
    return pa.decimal128(precision, scale) if precision <= DECIMAL_DIGITS else None


def overridden(column: Column, declared: str) -> Column:
    """The column as the configuration declares it: `string` (any type as Postgres prints it) or, for numeric and
    arrays of it, `decimal(p,s)`; empty: as the contract has it. ConfigError for anything else."""
    column = replace(column, declared=declared)
    if declared:
        _as_declared(column)
    return column


def declared_types(section: Any) -> dict[str, str]:
    """The declared type of each column, from `columns` of a table's section. ConfigError if something is wrong."""
    if not isinstance(section, Mapping):
        raise ConfigError("a table of columns is expected", hint='columns.NAME = { type = "…" }')
    for name, options in section.items():
        if options == "drop" or (isinstance(options, Mapping) and {"hash", "key_file"} & set(options)):
            raise ConfigError(f'"{name}": hiding columns is not supported yet', hint="use a publication's column list")
        if not isinstance(options, Mapping) or list(options) != ["type"] or not isinstance(options["type"], str):
            raise ConfigError(
                f'"{name}": its type is expected', hint='{ type = "string" } or { type = "decimal(p,s)" }'
            )
        _declared_digits(options["type"])
    return {name: options["type"] for name, options in section.items()}


def _declared_digits(declared: str) -> tuple[int, int] | None:
    """Precision and scale of a `decimal(p,s)`, None for `string`. ConfigError for any other text."""
    if declared == "string":
        return None
    found = re.fullmatch(r"decimal\((\d{1,3}),\s*(\d{1,3})\)", declared)
    if found is None:
        raise ConfigError(f'"{declared}" is no type that a column can be declared', hint='"string" or "decimal(p,s)"')
    precision, scale = int(found[1]), int(found[2])
    if not 1 <= precision <= DECIMAL_DIGITS or scale > precision:
        raise ConfigError(f'"{declared}" cannot be held', hint="0 <= s <= p and 1 <= p <= 38")
    return precision, scale


def _as_declared(column: Column) -> Column:
    """The column that is held as the declaration says."""
    digits = _declared_digits(column.declared)
    if digits is None:
        return replace(column, type_oid=TEXT, typmod=-1, element_oid=0, declared="")
    if NUMERIC not in (column.type_oid, column.element_oid or _ARRAYS.get(column.type_oid, 0)):
        raise ConfigError(
            f'column {column.name} is {column.type_name}, not numeric: it cannot be "{column.declared}"',
            hint='declare it "string", or nothing',
        )
    return replace(column, typmod=(digits[0] << 16 | digits[1]) + 4, declared="")


def arrow_type(column: Column) -> pa.DataType:
    """The Arrow type that holds the column's values."""
    return _plan(column).type


def is_time(kind: pa.DataType) -> bool:
    """Whether values of a type say when: date, timestamp, timestamptz."""
    return bool(pa.types.is_date(kind) or pa.types.is_timestamp(kind))


def arrow_fields(schema: TableSchema) -> list[pa.Field]:
    """One nullable field per column, in order, with what is known of the Postgres type in its metadata."""
    return list(_fields(schema.columns))


@lru_cache(maxsize=4096)
def _fields(columns: tuple[Column, ...]) -> tuple[pa.Field, ...]:
    return tuple(pa.field(c.name, _plan(c).type, nullable=True, metadata=_metadata(c)) for c in columns)


def _metadata(column: Column) -> dict[str, str]:
    return {
        "pg.type": column.type_name,
        "pg.typmod": str(column.typmod),
        "pg.oid": str(column.type_oid),
        "pg.attnum": str(column.attnum),
    }


def cast(column: Column, text: pa.Array) -> tuple[pa.Array, Bools | None]:
    """Text of a column as Postgres prints it (binary or string, null for NULL) → typed array of the same length, and
    None or a mask of the values that the type cannot hold: their cells are null, their text belongs in `_raw`.

    Never raises for any text; never changes a value. Blocking (CPU), vectorised, thread-safe.
    """
    plan = _plan(column)
    text = casts.normalise(text)
    if not len(text):
        return pa.array([], plan.type), None
    typed, mask = plan.cast(text)
    return typed, mask if mask is not None and mask.any() else None


def build_raw(names: Sequence[str], texts: Sequence[pa.Array], masks: Sequence[Bools | None]) -> pa.Array | None:
    """The `_raw` column: per row the names and texts of its masked values, null where it has none; None if no row has.

    All texts and masks have one length. What is not UTF-8 stands as `\\x` and the hexadecimal of its bytes."""
    marked = [(k, np.flatnonzero(mask)) for k, mask in enumerate(masks) if mask is not None and mask.any()]
    if not marked:
        return None
    rows = np.concatenate([found for _, found in marked])
    which = np.concatenate([np.full(len(found), k) for k, found in marked])
    order = np.argsort(rows, kind="stable")
    values = pa.concat_arrays([_readable(casts.normalise(texts[k]).take(pa.array(found))) for k, found in marked])
    count = len(texts[marked[0][0]])
    sizes = np.bincount(rows, minlength=count)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    keys = pa.array(list(names), pa.string()).take(pa.array(which[order]))
    items = values.take(pa.array(order))
    return pa.MapArray.from_arrays(pa.array(offsets), keys, items, mask=pa.array(sizes == 0))


def _readable(array: pa.Array) -> pa.Array:
    try:
        return array.cast(pa.string())
    except ValueError:
        return pa.array([_hex_unless_utf8(value) for value in array.to_pylist()], pa.string())


def _hex_unless_utf8(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return "\\x" + (value or b"").hex()


def describe(column: Column) -> str:
    """How the column is held, in one line for people."""
    plan = _plan(column)
    configured = " (as configured)" if column.declared else ""
    if plan.type != pa.string():
        return f"exact: {plan.type}{configured}" + (f"; text in _raw: {plan.raw}" if plan.raw else "")
    if column.type_oid == NUMERIC and not configured:
        return "text as Postgres prints it (numeric without a precision of at most 38)"
    return f"text as Postgres prints it{configured}"


def pg_text(array: pa.Array, column: Column) -> pa.Array:
    """Typed values → their text (string) as Postgres prints and reads it; null stays null.

    The inverse of `cast`, except that numeric under a `decimal(p,s)` override always has s digits behind the point.
    Vectorised but for lists and maps."""
    return print_values(array, _plan(column).marks or b"{,}")


def render_contract() -> str:
    """The text of docs/types.md."""
    lines = ["| Postgres | in the lake (Arrow) | what is kept as text in `_raw` |", "|---|---|---|"]
    lines += [f"| {rule.postgres} | {rule.arrow} | {rule.raw or 'nothing: every value is exact'} |" for rule in RULES]
    return _PROLOGUE + "\n".join(lines) + "\n" + _EPILOGUE


_PROLOGUE = """# How Postgres types are held

<!-- Made from the table in cdc/types.py: python -c "from cdc import types; print(types.render_contract(), end='')" -->

A value is exact in its column, or the column is NULL and the value's text stands in the row's `_raw`, a map from column
name to text. Nothing is rounded, cut, shifted to another time zone or replaced in silence. Stream and snapshots go
through the same casts.

"""
_EPILOGUE = """
- *Text* is what the server prints under `datestyle=ISO`, `timezone=UTC`, `intervalstyle=iso_8601`,
  `extra_float_digits=3`, `bytea_output=hex`, `lc_monetary=C`, `xmlbinary=base64`, `search_path=pg_catalog`.
- A column may be declared otherwise in the configuration, under its table:
  `columns.amount = { type = "decimal(38,10)" }` for `numeric` and arrays of it, `{ type = "string" }` for any type.
  What does not fit a declared decimal (more digits on either side of the point) is in `_raw`, never rounded. For a
  table that has landed it is a change of the column's type.
- `numeric(p,s)` holds every value that the server can store in such a column but `NaN`. The scale as printed is the
  column's, so nothing is lost; a `numeric` without precision is text because its values have a scale each of their own.
- A `timestamptz` is an instant: it is shown in UTC, and was never stored with the zone that it was written in.
- An array that the list cannot hold is kept whole: one element that its type cannot hold (`NaN` in a `numeric(10,2)[]`)
  puts the text of the whole array into `_raw`.
- `hstore`, `vector` and `halfvec` come from extensions, whose types have no fixed number; they are known by their
  names, in whatever schema, and a type of your own of such a name ends up in `_raw`. Domains over them and `sparsevec`
  are text, arrays of them lists of text.
- An array whose elements stand between other separators than commas (`geometry[]` of PostGIS) is text as a whole;
  `box[]` is a list.
- `regclass`, the other `reg…` types and `aclitem` print names of other objects: a row that was captured
  before such an object was renamed keeps the old name.
- The elements of an array whose element type is a domain take the domain's base type; a precision that the domain
  declares (`numeric(10,2)`) is not known for them, so they are text.
- Every column of the lake may be NULL, and the fields carry `pg.type` (as `format_type` prints it), `pg.typmod`,
  `pg.oid` and `pg.attnum` in their metadata, so a reader can tell `json` from `text`.
- What is not UTF-8 stands in `_raw` as `\\x` and the hexadecimal of its bytes, as Postgres prints a `bytea`. Only a
  `SQL_ASCII` database has such text (and, before Postgres 15, a `"char"` beyond ASCII). In a key it stops the table.
"""
