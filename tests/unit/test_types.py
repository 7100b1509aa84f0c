"""The type contract without a server: what each type holds, what goes to `_raw`, and that nothing is changed."""

from __future__ import annotations

import datetime as dt
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdc import types
from cdc.errors import ConfigError
from cdc.table import Column, TableId, TableSchema
from cdc.types import arrow_fields, arrow_type, build_raw, cast, describe, overridden, pg_text

UTC = dt.UTC
MASKED = object()
"""Expected instead of a value: the cell is null and its text is for `_raw`."""


def column(oid: int, *, typmod: int = -1, element: int = 0, name: str = "", called: str = "c") -> Column:
    return Column(name=called, attnum=1, type_oid=oid, typmod=typmod, element_oid=element, type_name=name)


def numeric(precision: int, scale: int, oid: int = 1700) -> Column:
    """numeric(p,s), with the scale's sign in eleven bits as the catalog has it."""
    return column(oid, typmod=(precision << 16 | scale & 0x7FF) + 4)


def held(column: Column, texts: list[Any], kind: pa.DataType | None = None) -> list[Any]:
    """What the column holds for these texts, masked values shown as MASKED; checks the array that they come in."""
    raw = [t.encode() if isinstance(t, str) else t for t in texts]
    typed, mask = cast(column, pa.array(raw, pa.binary()).cast(kind or pa.binary()))
    typed.validate(full=True)
    assert typed.type == arrow_type(column)
    assert len(typed) == len(texts)
    assert mask is None or (mask.dtype == np.bool_ and len(mask) == len(texts) and mask.any())
    values = typed.to_pylist()
    masks = [False] * len(texts) if mask is None else mask.tolist()
    assert all(value is None for value, masked in zip(values, masks, strict=True) if masked)
    return [MASKED if masked else value for value, masked in zip(values, masks, strict=True)]


INT2, INT4, INT8, FLOAT4, FLOAT8 = column(21), column(23), column(20), column(700), column(701)
BOOL, BYTEA, DATE, TIMESTAMP, TIMESTAMPTZ = column(16), column(17), column(1082), column(1114), column(1184)
TEXT, INTS, TEXTS = column(25), column(1007, element=23), column(1009, element=25)
HSTORE, VECTOR = column(70001, name="public.hstore"), column(70002, name="public.vector(3)")
EVERY = [
    INT2, INT4, INT8, FLOAT4, FLOAT8, BOOL, BYTEA, DATE, TIMESTAMP, TIMESTAMPTZ, TEXT, INTS, TEXTS, HSTORE, VECTOR,
    numeric(10, 2), numeric(38, 10), numeric(38, 38), numeric(3, -2), numeric(2, 5), column(1700),
    numeric(10, 2, oid=1231), column(1022, element=701), column(1000, element=16), column(1001, element=17),
    column(1182, element=1082), column(1115, element=1114), column(1185, element=1184), column(1020, element=603),
]  # fmt: skip


@pytest.mark.parametrize(
    ("column", "text", "value"),
    [
        (INT2, "-32768", -32768),
        (INT2, "32768", MASKED),
        (INT4, "2147483647", 2147483647),
        (INT4, "2147483648", MASKED),
        (INT8, "-9223372036854775808", -9223372036854775808),
        (INT8, "9223372036854775808", MASKED),
        (INT4, "0xFFFFFFFF", MASKED),
        (INT4, "", MASKED),
        (INT4, " 1", MASKED),
        (INT4, "1.0", MASKED),
        (FLOAT8, "-0", -0.0),
        (FLOAT8, "1.7976931348623157e+308", 1.7976931348623157e308),
        (FLOAT8, "5e-324", 5e-324),
        (FLOAT8, "Infinity", math.inf),
        (FLOAT8, "-Infinity", -math.inf),
        (FLOAT8, "1e309", MASKED),
        (FLOAT8, "1e-400", MASKED),
        (FLOAT8, "0e0", 0.0),
        (FLOAT8, "inf", MASKED),
        (FLOAT8, "1.00000000000000000000000001", MASKED),
        (FLOAT4, "3.4028235e+38", 3.4028234663852886e38),
        (FLOAT4, "1e-45", 1.401298464324817e-45),
        (FLOAT4, "1e39", MASKED),
        (numeric(10, 2), "-0.50", Decimal("-0.50")),
        (numeric(10, 2), "99999999.99", Decimal("99999999.99")),
        (numeric(10, 2), "100000000.00", MASKED),
        (numeric(10, 2), "1.005", MASKED),
        (numeric(10, 2), "1.500", Decimal("1.50")),
        (numeric(10, 2), "NaN", MASKED),
        (numeric(10, 2), "-Infinity", MASKED),
        (numeric(38, 0), "9" * 38, Decimal("9" * 38)),
        (numeric(38, 0), "170141183460469231731687303715884105728", MASKED),
        (numeric(38, 0), "340282366920938463463374607431768211457", MASKED),
        (numeric(38, 10), "9766103931607544294559605663000", MASKED),
        (numeric(38, 10), "3.40282367020938463463374607431768211456", MASKED),  # 2^128 + 10^29, to 38 places
        (numeric(38, 10), "9" * 28 + "." + "9" * 10, Decimal("9" * 28 + "." + "9" * 10)),
        (numeric(38, 38), "-0." + "9" * 38, Decimal("-0." + "9" * 38)),
        (numeric(38, 38), "1." + "0" * 37, MASKED),
        (numeric(3, -2), "-99900", Decimal("-99900")),
        (numeric(2, 5), "0.00099", Decimal("0.00099")),
        (column(1700), "12345678901234567890123456789012345678901234567890.1", "1234567890" * 5 + ".1"),
        (column(1700), "NaN", "NaN"),
        (numeric(39, 2), "1.10", "1.10"),
        (DATE, "0001-01-01", dt.date(1, 1, 1)),
        (DATE, "9999-12-31", dt.date(9999, 12, 31)),
        (DATE, "10000-01-01", MASKED),
        (DATE, "0044-03-15 BC", MASKED),
        (DATE, "0000-01-01", MASKED),
        (DATE, "infinity", MASKED),
        (DATE, "2023-02-29", MASKED),
        (TIMESTAMP, "0001-01-01 00:00:00", dt.datetime(1, 1, 1)),  # noqa: DTZ001
        (TIMESTAMP, "9999-12-31 23:59:59.999999", dt.datetime(9999, 12, 31, 23, 59, 59, 999999)),  # noqa: DTZ001
        (TIMESTAMP, "2024-02-29 01:02:03.1", dt.datetime(2024, 2, 29, 1, 2, 3, 100000)),  # noqa: DTZ001
        (TIMESTAMP, "10000-01-01 00:00:00", MASKED),
        (TIMESTAMP, "10000-01-01 00:00:00.5", MASKED),
        (TIMESTAMP, "0044-03-15 00:00:00 BC", MASKED),
        (TIMESTAMP, "0000-03-15 00:00:00", MASKED),
        (TIMESTAMP, "-infinity", MASKED),
        (TIMESTAMP, "2024-01-02", MASKED),
        (TIMESTAMP, "2024-01-02 03:04", MASKED),
        (TIMESTAMPTZ, "2024-01-02 03:04:05.123+00", dt.datetime(2024, 1, 2, 3, 4, 5, 123000, UTC)),
        (TIMESTAMPTZ, "2024-01-02 03:04:05+05:30", MASKED),
        (TIMESTAMPTZ, "0044-03-15 00:00:00+00 BC", MASKED),
        (TIMESTAMPTZ, "infinity", MASKED),
        (BOOL, "t", True),
        (BOOL, "f", False),
        (BOOL, "true", MASKED),
        (BYTEA, "\\x", b""),
        (BYTEA, "\\x00fF", b"\x00\xff"),
        (BYTEA, "\\x0", MASKED),
        (BYTEA, "\\xzz", MASKED),
        (BYTEA, "abc\\000", MASKED),
        (TEXT, "", ""),
        (TEXT, "žluťoučký", "žluťoučký"),
        (TEXT, b"\xff", MASKED),
        (column(2950, name="uuid"), "6f1ed002-ab5e-4b5f-8b3a-000000000000", "6f1ed002-ab5e-4b5f-8b3a-000000000000"),
        (column(70003, name="mood"), "happy", "happy"),
        (INTS, "{}", []),
        (INTS, "{1,NULL,-3}", [1, None, -3]),
        (INTS, "{{1,2},{3,4}}", MASKED),
        (INTS, "[0:1]={1,2}", MASKED),
        (INTS, "{1,2147483648}", MASKED),
        (INTS, "{1,,2}", MASKED),
        (INTS, "{1", MASKED),
        (TEXTS, '{a,"b c",NULL,"NULL","","x,y","{z}"}', ["a", "b c", None, "NULL", "", "x,y", "{z}"]),
        (TEXTS, r'{"a\"b","\\","\\\""}', ['a"b', "\\", '\\"']),
        (TEXTS, '{a"b}', MASKED),
        (TEXTS, '{"a"b}', MASKED),
        (TEXTS, '{a"b"}', MASKED),
        (TEXTS, r"{a\b}", MASKED),
        (TEXTS, '{"a}', MASKED),
        (column(70004, element=70003, name="mood[]"), "{happy,sad}", ["happy", "sad"]),
        (column(1185, element=1184), '{"2024-01-02 03:04:05+00"}', [dt.datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)]),
        (column(1185, element=1184), "{infinity}", MASKED),
        (column(1001, element=17), r'{"\\x00ff","\\x"}', [b"\x00\xff", b""]),
        (column(1020, element=603), "{(1,1),(0,0);(2,2),(1,1)}", ["(1,1),(0,0)", "(2,2),(1,1)"]),
        (column(600, element=701, name="point"), "(1,2)", "(1,2)"),
        (HSTORE, "", []),
        (HSTORE, r'"a"=>"1", "b,=>"=>NULL, "\"\\"=>""', [("a", "1"), ("b,=>", None), ('"\\', "")]),
        (HSTORE, "a=>1", MASKED),
        (HSTORE, '"a"=>"1",', MASKED),
        (HSTORE, '"a"=>"1",x"b"=>"2"', MASKED),
        (HSTORE, '"a"=>"1""b"=>"2"', MASKED),
        (VECTOR, "[1,0.25,-4e-07]", [1.0, 0.25, float(np.float32(-4e-07))]),
        (VECTOR, "{1}", MASKED),
    ],
)
def test_a_value_is_exact_or_masked(column: Column, text: str, value: Any) -> None:
    # Neighbours and a null show that one value's fate is its own.
    usual = pg_text(pa.array([None if value is MASKED else value], arrow_type(column)), column)[0].as_py()
    got = held(column, [text, None, usual, text])
    assert [got[0], got[1], got[3]] == [value, None, value]
    assert got[2] == (None if value is MASKED else value)
    if isinstance(value, float):
        assert math.copysign(1, got[0]) == math.copysign(1, value)


def test_nan_is_a_value_of_a_float() -> None:
    assert all(math.isnan(value) for kind in (FLOAT4, FLOAT8) for value in held(kind, ["NaN"]))


@pytest.mark.parametrize("column", EVERY, ids=lambda c: f"{c.type_oid}-{c.typmod}")
@pytest.mark.parametrize("kind", [pa.binary(), pa.string(), pa.large_binary(), pa.large_string()], ids=str)
def test_no_rows_and_only_nulls_keep_length_and_type(column: Column, kind: pa.DataType) -> None:
    assert held(column, [], kind) == []
    assert held(column, [None, None], kind) == [None, None]
    assert cast(column, pa.nulls(3))[0].null_count == 3


@pytest.mark.parametrize(
    ("column", "texts", "values"),
    [
        (INT4, ["1", "x", None, "4"], [1, MASKED, None, 4]),
        (numeric(10, 2), ["1.00", "NaN", None, "1.234"], [Decimal("1.00"), MASKED, None, MASKED]),
        (TIMESTAMP, ["2024-01-02 00:00:00", "infinity", None], [dt.datetime(2024, 1, 2), MASKED, None]),  # noqa: DTZ001
        (BYTEA, ["\\x01", "\\xq1", None, "\\x"], [b"\x01", MASKED, None, b""]),
        (INTS, ["{1,2}", "{a}", None, "{}"], [[1, 2], MASKED, None, []]),
        (TEXTS, ['{"a b"}', '{"', None, "{}", '{"{"}'], [["a b"], MASKED, None, [], ["{"]]),
        (HSTORE, ['"a"=>"b"', ",", None, '"a'], [[("a", "b")], MASKED, None, MASKED]),
    ],
)
def test_a_slice_is_cast_like_an_array_of_its_own(column: Column, texts: list[Any], values: list[Any]) -> None:
    for kind in (pa.binary(), pa.string(), pa.large_binary()):
        whole = pa.array(["junk", *texts, "more junk", None], pa.string()).cast(kind)
        typed, mask = cast(column, whole.slice(1, len(texts)))
        typed.validate(full=True)
        assert mask is not None
        assert [MASKED if m else v for v, m in zip(typed.to_pylist(), mask, strict=True)] == values


def test_bytes_under_a_null_are_not_read() -> None:
    # The zero-copy arrays of the decoder may leave anything between the values that count.
    offsets = pa.py_buffer(np.array([0, 1, 7, 8], np.int32))
    bitmap = pa.py_buffer(bytes([0b101]))
    for kind, data, values in (
        (INT4, b"1zzzzzz3", [1, None, 3]),
        (BOOL, b"tzzzzzzf", [True, None, False]),
        (numeric(3, 1), b"1NaNNaN3", [Decimal("1.0"), None, Decimal("3.0")]),
        (FLOAT8, b"1-1e-403", [1.0, None, 3.0]),
    ):
        text = pa.Array.from_buffers(pa.binary(), 3, [bitmap, offsets, pa.py_buffer(data)])
        typed, mask = cast(kind, text)
        assert typed.to_pylist() == values
        assert mask is None


_ALPHABET = st.sampled_from(list('0123456789-+.,:{}[]"\\ =>()eExnNuUlLaAtTfFyY;\u017e'))
_TEXTS = st.lists(st.none() | st.text(_ALPHABET, max_size=14) | st.sampled_from(["NaN", "infinity", "{}", "\\x00"]))


@given(st.sampled_from(EVERY), _TEXTS)
@example(HSTORE, ['"a\\', '"b"=>"c"'])
@example(HSTORE, ['""', "", '""=>""'])
@example(TEXTS, ['{"a}', '{"{"}', '{"b}'])
@example(BYTEA, ["\\x", "\\xg0", "\\x", "\\x00"])
def test_any_text_is_cast_alone_as_among_others(column: Column, texts: list[str | None]) -> None:
    """What is found in bulk, on the usual way or on the way round refused values, is what each value gets alone."""
    together = held(column, texts)
    alone = [held(column, [text])[0] for text in texts]
    assert repr(together) == repr(alone)


@given(st.sampled_from(EVERY), st.lists(st.binary(max_size=12), max_size=5))
def test_no_bytes_raise(column: Column, texts: list[bytes]) -> None:
    held(column, texts)


def _array_elements(text: str) -> list[str | None] | None:
    """A reader of one array value, character by character; None if it is not a plain one-dimensional array."""
    if len(text) < 2 or text[0] != "{" or text[-1] != "}":
        return None
    elements: list[str | None] = []
    at, end = 1, len(text) - 1
    while at < end or elements:
        if text[at] == '"':
            at += 1
            value = ""
            while at < end and text[at] != '"':
                at += text[at] == "\\"
                if at >= end:
                    return None
                value += text[at]
                at += 1
            at += 1
            if at > end:
                return None
            elements.append(value)
        else:
            start = at
            while at < end and text[at] != ",":
                if text[at] in '{}"\\':
                    return None
                at += 1
            if at == start:
                return None
            word = text[start:at]
            elements.append(None if word.lower() == "null" else word)
        if at == end:
            break
        if text[at] != ",":
            return None
        at += 1
    return elements


@given(st.lists(st.lists(st.text(st.sampled_from(list('nul{}",\\ a\u017e')), max_size=5)).map(lambda t: t), max_size=6))
def test_arrays_are_read_as_a_reader_by_character_reads_them(values: list[list[str]]) -> None:
    texts = ["{" + ",".join(parts) + "}" for parts in values]
    expected = [_array_elements(text) for text in texts]
    assert held(TEXTS, texts) == [MASKED if value is None else value for value in expected]


_CELLS: list[tuple[Column, st.SearchStrategy[Any]]] = [
    (INT8, st.integers(-(2**63), 2**63 - 1)),
    (FLOAT8, st.floats(allow_nan=False)),
    (FLOAT4, st.floats(width=32, allow_nan=False)),
    (BOOL, st.booleans()),
    (BYTEA, st.binary(max_size=20)),
    (DATE, st.dates()),
    (TIMESTAMP, st.datetimes()),
    (TIMESTAMPTZ, st.datetimes(timezones=st.just(UTC))),
    (numeric(38, 10), st.decimals(places=10, min_value=-(10**27), max_value=10**27)),
    (numeric(38, 38), st.decimals(places=38, min_value=-1, max_value=1).filter(lambda d: abs(d) < 1)),
    (TEXT, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))),
    (INTS, st.lists(st.none() | st.integers(-9, 9), max_size=4)),
    (TEXTS, st.lists(st.none() | st.text(st.sampled_from(list('nulNUL {}",\\a')), max_size=6), max_size=4)),
    (column(1185, element=1184), st.lists(st.datetimes(timezones=st.just(UTC)), max_size=3)),
    (HSTORE, st.dictionaries(st.text(max_size=3), st.none() | st.text(max_size=3)).map(lambda d: list(d.items()))),
]


@pytest.mark.parametrize(("column", "values"), _CELLS, ids=[str(c.type_oid) for c, _ in _CELLS])
@given(data=st.data())
def test_text_of_typed_values_gives_the_same_values_again(
    column: Column, values: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    typed = pa.array(data.draw(st.lists(st.none() | values, max_size=20)), arrow_type(column))
    again, mask = cast(column, pg_text(typed, column))
    assert mask is None
    assert again.equals(typed)


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (
            FLOAT8,
            ["0", "-0", "0.0001", "1e-05", "100000000000000", "1e+15", "1.5e+300", "NaN", "-Infinity", "123456.5"],
        ),
        (FLOAT4, ["1e+06", "123456", "1.2345679e+08", "0.0001", "1e-05", "3.4028235e+38", "NaN"]),
        (numeric(38, 10), ["0.0000000001", "0.0000000000", "-12345678901234567890.1234567890"]),
        (numeric(3, -2), ["12300", "0"]),
        (TIMESTAMPTZ, ["2024-01-02 03:04:00+00", "2024-01-02 03:04:05.12+00", "0001-01-01 00:00:00.000001+00"]),
        (TIMESTAMP, ["2024-01-02 03:04:00", "2024-01-02 03:00:00.1"]),
        (BYTEA, ["\\x", "\\x00ff"]),
        (BOOL, ["t", "f"]),
        (TEXTS, ['{a,"b c",NULL,"NULL","",nul,"null","a\\"b"}', "{}"]),
        (column(1020, element=603), ["{(1,1),(0,0);(2,2),(1,1)}"]),
        (HSTORE, ['"a"=>"1", "b"=>NULL', ""]),
        (VECTOR, ["[1,0.25,4e-07]"]),
    ],
)
def test_typed_values_are_printed_as_the_server_does(column: Column, texts: list[str]) -> None:
    typed, mask = cast(column, pa.array(["junk", None, *texts]).slice(1))
    assert mask is None
    assert pg_text(typed, column).to_pylist() == [None, *texts]


def test_raw_holds_each_masked_value_under_its_columns_name() -> None:
    texts = [pa.array([b"1", b"x", None, b"y"]), pa.array(["a", "b", "c", "d"]), pa.array([b"\xff", b"", b"k", b"z"])]
    masks = [np.array([False, True, False, True]), None, np.array([True, False, False, True])]
    raw = build_raw(["n", "t", "u"], texts, masks)
    assert raw is not None
    assert raw.type == pa.map_(pa.string(), pa.string())
    raw.validate(full=True)
    assert raw.to_pylist() == [[("u", "\\xff")], [("n", "x")], None, [("n", "y"), ("u", "z")]]
    assert build_raw(["n", "t"], texts[:2], [None, np.zeros(4, np.bool_)]) is None


def test_fields_keep_the_postgres_type() -> None:
    columns = (
        Column(name="id", attnum=1, type_oid=20, type_name="bigint", not_null=True),
        Column(name="doc", attnum=4, type_oid=3802, type_name="jsonb"),
        Column(name="price", attnum=5, type_oid=1700, typmod=(10 << 16 | 2) + 4, type_name="numeric(10,2)"),
    )
    fields = arrow_fields(TableSchema(table=TableId("public", "t"), oid=1, columns=columns))
    assert [(f.name, f.type, f.nullable) for f in fields] == [
        ("id", pa.int64(), True),
        ("doc", pa.string(), True),
        ("price", pa.decimal128(10, 2), True),
    ]
    assert fields[1].metadata == {b"pg.type": b"jsonb", b"pg.typmod": b"-1", b"pg.oid": b"3802", b"pg.attnum": b"4"}


@pytest.mark.parametrize(
    ("precision", "scale", "expected"),
    [
        (10, 2, pa.decimal128(10, 2)),
        (38, 38, pa.decimal128(38, 38)),
        (39, 0, pa.string()),
        (3, -2, pa.decimal128(5, 0)),
        (38, -1, pa.string()),
        (2, 5, pa.decimal128(5, 5)),
        (2, 39, pa.string()),
        (1000, -1000, pa.string()),
    ],
)
def test_numeric_takes_a_decimal_that_delta_can_hold(precision: int, scale: int, expected: pa.DataType) -> None:
    assert arrow_type(numeric(precision, scale)) == expected


def test_an_override_declares_text_or_a_decimal_and_nothing_else() -> None:
    assert arrow_type(overridden(column(1700), "decimal(38,10)")) == pa.decimal128(38, 10)
    assert arrow_type(overridden(column(1231, element=1700), "decimal(5, 1)")) == pa.list_(pa.decimal128(5, 1))
    assert arrow_type(overridden(INTS, "string")) == pa.string()
    assert overridden(overridden(INTS, "string"), "") == INTS
    assert held(overridden(column(1700), "decimal(6,2)"), ["1.5", "NaN", "1.555", "12345"]) == [
        Decimal("1.50"),
        MASKED,
        MASKED,
        MASKED,
    ]
    for kind, override in ((INT4, "decimal(5,2)"), (column(1700), "decimal(39,0)"), (TEXT, "double")):
        with pytest.raises(ConfigError):
            overridden(kind, override)


def test_people_are_told_which_columns_are_text_and_which_values() -> None:
    assert describe(INT4) == "exact: int32"
    assert describe(numeric(10, 2)) == "exact: decimal128(10, 2); text in _raw: NaN"
    assert describe(column(114, name="json")) == "text as Postgres prints it"
    assert "without a precision" in describe(column(1700))


def test_the_document_of_the_contract_is_the_table_in_the_code() -> None:
    document = Path(__file__).parents[2] / "docs" / "types.md"
    assert document.read_text() == types.render_contract()
