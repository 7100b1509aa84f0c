"""The type contract against a real server: its own text is cast, and must give what psycopg reads by the binary way."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import pq, sql

from cdc.table import Column
from cdc.types import arrow_type, build_raw, cast, pg_text
from connectors.postgres.embedded import EmbeddedPostgres
from tests.support.postgres import create_database, drop_database

pytestmark = pytest.mark.matrix

SETTINGS = {
    "datestyle": "ISO",
    "timezone": "UTC",
    "intervalstyle": "iso_8601",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "xmlbinary": "base64",
    "search_path": "pg_catalog",
}

# Type, and its values as SQL writes them: smallest, largest, zero, empty, special.
HELD = {
    "boolean": ["true", "false"],
    "smallint": ["-32768", "0", "32767"],
    "integer": ["-2147483648", "0", "2147483647"],
    "bigint": ["-9223372036854775808", "0", "9223372036854775807"],
    "real": ["-3.4028235e38", "1e-45", "0", "-0", "0.1", "16777216", "1e-5", "123456", "1234567", "NaN", "Infinity"],
    "double precision": ["-1.7976931348623157e308", "5e-324", "-0", "0.1", "1e15", "1e14", "1e-5", "NaN", "-Infinity"],
    "numeric(10,2)": ["-99999999.99", "0", "0.01", "99999999.99", "1.005"],
    "numeric(38,0)": ["-99999999999999999999999999999999999999", "0", "99999999999999999999999999999999999999"],
    "numeric(38,38)": ["-0.99999999999999999999999999999999999999", "0", "0.00000000000000000000000000000000000001"],
    "numeric(38,10)": ["-9999999999999999999999999999.9999999999", "0", "0.0000000001"],
    "date": ["0001-01-01", "1970-01-01", "2000-02-29", "9999-12-31"],
    "timestamp": ["0001-01-01 00:00:00", "1969-12-31 23:59:59.999999", "2024-02-29 10:20:30.5", "9999-12-31 23:59:59"],
    "timestamptz": ["0001-01-01 00:00:00+00", "2024-06-01 10:20:30.123+05:30", "9999-12-31 23:59:59.999999+00"],
    "timestamp(3)": ["2024-02-29 10:20:30.123456", "2024-02-29 10:20:30"],
    "bytea": ["", "\\x00", "\\xdeadBEEF", "\\x5c7822"],
    "text": ["", " ", "NULL", "\\N", "žluťoučký 🐎", 'a"b\\c\td'],
    "varchar(10)": ["", "abc"],
    "char(5)": ["", "ab"],
    "uuid": ["00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"],
    "integer[]": ["{}", "{1,NULL,-2147483648}", "{7}"],
    "bigint[]": ["{9223372036854775807}"],
    "boolean[]": ["{t,f,NULL}"],
    "double precision[]": ["{NaN,Infinity,-0,5e-324}"],
    "numeric(10,2)[]": ["{1.5,NULL,-99999999.99}", "{}"],
    "date[]": ["{2024-01-02,0001-01-01}"],
    "timestamptz[]": ['{"2024-01-02 03:04:05.6+00",NULL}'],
    "bytea[]": ['{"\\\\xdead","\\\\x",NULL}'],
    "text[]": ["{}", '{"",NULL,"NULL","null",nul,"a,b","{c}","d\\"e","f\\\\g"," h ",ž}', '{"\t"}'],
}

# Type, and values that its column in the lake cannot hold.
RAW = {
    "numeric(10,2)": ["NaN"],
    "date": ["infinity", "-infinity", "0044-03-15 BC", "10000-01-01", "5874897-12-31", "4713-01-01 BC"],
    "timestamp": ["infinity", "-infinity", "0044-03-15 01:02:03 BC", "10000-01-01", "294276-12-31 23:59:59.999999"],
    "timestamptz": [
        "infinity",
        "-infinity",
        "0044-03-15 01:02:03+00 BC",
        "10000-01-01 00:00:00.5+00",
        "0001-01-01 +14",
    ],
    "integer[]": ["{{1,2},{3,4}}", "[0:1]={1,2}", "[5:5]={1}"],
    "numeric(10,2)[]": ["{1.5,NaN}"],
    "date[]": ["{2024-01-02,infinity}", '{"0044-03-15 BC"}'],
    "timestamp[]": ["{infinity}", '{"2024-01-02 03:04:05","0044-03-15 00:00:00 BC"}'],
    "text[]": ['{{"a"},{"b"}}', '[2:3]={a,"b c"}'],
}

# Type, and values that are text exactly as the server prints them.
PRINTED = {
    "numeric": ["NaN", "Infinity", "-Infinity", "1.500", "0", "1e100", "1e-50"],
    "numeric(60,5)": ["1.5", "NaN"],
    "json": ['{"a" : 1}', "null"],
    "jsonb": ['{"a" : 1}', "null"],
    "interval": ["1 year 2 mons -3 days 04:05:06.789", "0"],
    "time": ["24:00:00", "01:02:03.5"],
    "timetz": ["01:02:03+05:30"],
    "money": ["-1234.56"],
    "inet": ["::1/64", "10.0.0.1"],
    "macaddr": ["08:00:2b:01:02:03"],
    "bit(3)": ["101"],
    "int4range": ["[1,5)", "empty"],
    "int4multirange": ["{[1,5),[7,9)}"],
    "point": ["(1,2)"],
    "box": ["(1,1),(0,0)"],
    "tsvector": ["'a':1 'b':2A"],
    "name": ["abc"],
    "oid": ["4294967295"],
    "int2vector": ["1 2 3"],
    "pg_lsn": ["16/B374D848"],
    '"char"': ["x", ""],
}

ARRAYS_OF_TEXT = {
    "json[]": ['{"{\\"a\\": 1}",NULL}'],
    "interval[]": ["{P1Y}"],
    "box[]": ["{(1,1),(0,0);(3,3),(2,2)}"],
    "numeric[]": ["{NaN,1.50,Infinity}"],
    "point[]": ['{"(1,2)"}'],
}


@pytest.fixture(scope="module")
def connection(server: EmbeddedPostgres) -> Iterator[psycopg.Connection]:
    """One session for all tests here: they leave nothing but temporary tables, and types under names of their own."""
    options = " ".join(f"-c {name}={value}" for name, value in SETTINGS.items())
    with psycopg.connect(
        create_database(server, "types"), autocommit=True, prepare_threshold=None, options=options
    ) as connection:
        yield connection
    drop_database(server, "types")


def column_of(connection: psycopg.Connection, declared: str) -> Column:
    """The column as the catalog describes it, for a column declared like this."""
    connection.execute(f"create temp table t_column (c {declared})")
    row = connection.execute(
        "select a.atttypid::int8, a.atttypmod, format_type(a.atttypid, a.atttypmod),"
        " t.typelem::int8, t.typcategory = 'A' from pg_attribute a join pg_type t on t.oid = a.atttypid"
        " where attrelid = 'pg_temp.t_column'::regclass and attnum = 1"
    ).fetchone()
    connection.execute("drop table pg_temp.t_column")
    assert row is not None
    oid, typmod, name, element, is_array = row
    return Column(
        name="c", attnum=1, type_oid=oid, typmod=typmod, type_name=name, element_oid=element if is_array else 0
    )


def stored(connection: psycopg.Connection, declared: str, literals: Sequence[str | None]) -> sql.Composed:
    """A query that yields the literals, stored in a column declared like this, in order."""
    connection.execute("drop table if exists pg_temp.t_values")
    connection.execute(f"create temp table t_values (n serial, c {declared})")
    for literal in literals:
        connection.execute(sql.SQL("insert into pg_temp.t_values (c) values ({})").format(sql.Literal(literal)))
    return sql.SQL("select c from pg_temp.t_values order by n").format()


def printed(connection: psycopg.Connection, query: sql.Composable | str, *parameters: Any) -> list[bytes | None]:
    """The text that the server sends for the first column."""
    with connection.cursor() as cursor:
        cursor.execute(query, parameters or None)
        result = cursor.pgresult
        assert result is not None
        assert result.fformat(0) == pq.Format.TEXT
        return [result.get_value(row, 0) for row in range(result.ntuples)]


def by_binary(connection: psycopg.Connection, query: sql.Composable | str) -> list[Any]:
    """What psycopg makes of the values as they are sent in binary: not a digit of text in between."""
    with connection.cursor(binary=True) as cursor:
        return [row[0] for row in cursor.execute(query).fetchall()]


def same(held: Any, expected: Any) -> bool:
    if isinstance(held, list):
        return len(held) == len(expected) and all(map(same, held, expected))
    if isinstance(held, float):
        expected = float(expected)
        return (math.isnan(held) and math.isnan(expected)) or (
            held == expected and math.copysign(1, held) == math.copysign(1, expected)
        )
    if type(held) is not type(expected):
        return held is not None and str(held) == str(expected)
    return bool(held == expected)


@pytest.mark.parametrize("declared", HELD)
def test_what_a_column_holds_is_what_the_server_sends_in_binary(connection: psycopg.Connection, declared: str) -> None:
    query = stored(connection, declared, [*HELD[declared], None])
    column = column_of(connection, declared)
    texts = printed(connection, query)
    typed, mask = cast(column, pa.array(texts, pa.binary()))
    assert mask is None
    expected = by_binary(connection, query)
    assert [(h, e) for h, e in zip(typed.to_pylist(), expected, strict=True) if not same(h, e)] == []
    assert pg_text(typed, column).to_pylist() == [None if t is None else t.decode() for t in texts]


@pytest.mark.parametrize("declared", RAW)
def test_what_a_column_cannot_hold_is_kept_as_the_server_prints_it(
    connection: psycopg.Connection, declared: str
) -> None:
    mixed = [value for pair in zip(RAW[declared], [HELD.get(declared, ["{}"])[0]] * 99, strict=False) for value in pair]
    column = column_of(connection, declared)
    texts = printed(connection, stored(connection, declared, [*mixed, None]))
    typed, mask = cast(column, pa.array(texts, pa.binary()))
    assert mask is not None
    assert mask.tolist() == [True, False] * len(RAW[declared]) + [False]
    assert [value is None for value in typed.to_pylist()] == [True, False] * len(RAW[declared]) + [True]
    raw = build_raw(["c"], [pa.array(texts, pa.binary())], [mask])
    assert raw is not None
    kept = [None if row is None else dict(row)["c"].encode() for row in raw.to_pylist()]
    assert kept == [text if masked else None for text, masked in zip(texts, mask, strict=True)]


@pytest.mark.parametrize("declared", PRINTED)
def test_other_types_are_text_as_the_server_prints_it(connection: psycopg.Connection, declared: str) -> None:
    column = column_of(connection, declared)
    texts = printed(connection, stored(connection, declared, [*PRINTED[declared], None]))
    typed, mask = cast(column, pa.array(texts, pa.binary()))
    assert mask is None
    assert typed.type == pa.string()
    assert [None if t is None else t.encode() for t in typed.to_pylist()] == texts


@pytest.mark.parametrize("declared", ARRAYS_OF_TEXT)
def test_arrays_of_other_types_are_lists_of_their_elements_text(connection: psycopg.Connection, declared: str) -> None:
    query = stored(connection, declared, [*ARRAYS_OF_TEXT[declared], "{}", None])
    column = column_of(connection, declared)
    typed, mask = cast(column, pa.array(printed(connection, query), pa.binary()))
    assert mask is None
    assert typed.type == pa.list_(pa.string())
    elements = printed(connection, "select e from pg_temp.t_values, unnest(c) with ordinality u(e, k) order by n, k")
    assert [None if e is None else e.encode() for e in typed.flatten().to_pylist()] == elements


def test_types_of_ones_own_are_text(connection: psycopg.Connection) -> None:
    connection.execute("create type public.mood as enum ('sad', 'very happy')")
    connection.execute("create type public.pair as (a int, b text)")
    for declared, literal, text in (
        ("public.mood", "very happy", "very happy"),
        ("public.mood[]", '{sad,"very happy"}', ["sad", "very happy"]),
        ("public.pair", '(1,"x y")', '(1,"x y")'),
        ("public.pair[]", '{"(1,x)"}', ["(1,x)"]),
    ):
        query = stored(connection, declared, [literal])
        typed, mask = cast(column_of(connection, declared), pa.array(printed(connection, query), pa.binary()))
        assert (typed.to_pylist(), mask) == ([text], None)


def test_hstore_is_a_map(connection: psycopg.Connection) -> None:
    if not connection.execute("select 1 from pg_available_extensions where name = 'hstore'").fetchall():
        pytest.skip("this Postgres comes without hstore")
    connection.execute("create extension hstore schema public")
    pairs = {"": "", "a": None, "NULL": "NULL", 'q"': 'v"\\', "c,": "=>", " ": "ž", "\\": "x, y"}
    items = [item for pair in pairs.items() for item in pair]
    texts = printed(connection, "select public.hstore(%s::text[]) union all select public.hstore('{}'::text[])", items)
    column = column_of(connection, "public.hstore")
    typed, mask = cast(column, pa.array(texts, pa.binary()))
    assert mask is None
    assert [dict(row) for row in typed.to_pylist()] == [pairs, {}]
    assert pg_text(typed, column).to_pylist() == [t.decode() for t in texts if t is not None]


_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
_NASTY = st.text(st.sampled_from(list('nulNUL {}",;\\\t\n\v\x1c\xa0[]=:ž')), max_size=8)
_INSTANTS = st.datetimes(timezones=st.just(dt.UTC))
# Around powers of two and ten, where the shortest form of a float is a matter of rules.
_ROUND = st.builds(lambda m, k: float(m * 2**k), st.integers(-(2**53), 2**53), st.integers(0, 70)) | st.builds(
    lambda m, k: float(m * 10**k), st.integers(-(10**4), 10**4), st.integers(0, 25)
)
RANDOM: dict[str, st.SearchStrategy[Any]] = {
    "bigint": st.integers(-(2**63), 2**63 - 1),
    "double precision": st.floats() | _ROUND,
    "real": st.floats(width=32) | _ROUND,
    "numeric(38,10)": st.decimals(min_value=-(10**27), max_value=10**27, places=10),
    "date": st.dates(),
    "timestamp": st.datetimes(),
    "timestamptz": _INSTANTS,
    "bytea": st.binary(max_size=20),
    "text": _TEXT,
    "text[]": st.lists(st.none() | _TEXT | _NASTY, max_size=5),
    "double precision[]": st.lists(st.none() | st.floats(), max_size=4),
    "timestamptz[]": st.lists(st.none() | _INSTANTS, max_size=4),
    "bytea[]": st.lists(st.none() | st.binary(max_size=4), max_size=4),
}


@pytest.mark.parametrize("declared", RANDOM)
@given(data=st.data())
def test_random_values_come_back_from_the_servers_text(
    connection: psycopg.Connection, declared: str, data: st.DataObject
) -> None:
    values = data.draw(st.lists(st.none() | RANDOM[declared], min_size=1, max_size=30))
    if declared == "real":
        values = [None if v is None else float(np.float32(v)) for v in values]
    one_query = sql.SQL(" union all ").join(
        [sql.SQL("select {} as n, %b::{} as c").format(sql.Literal(n), sql.SQL(declared)) for n in range(len(values))]
    )
    ordered = sql.SQL("select c from ({}) v order by n").format(one_query)
    texts = printed(connection, ordered, *values)
    column = column_of(connection, declared)
    typed, mask = cast(column, pa.array(texts, pa.binary()))
    assert mask is None
    assert typed.type == arrow_type(column)
    assert [(h, v) for h, v in zip(typed.to_pylist(), values, strict=True) if not same(h, v)] == []
    assert pg_text(typed, column).to_pylist() == [None if t is None else t.decode() for t in texts]


@given(
    values=st.lists(
        st.tuples(st.integers(0, 10**45), st.integers(-20, 60)).map(lambda p: Decimal(p[0]).scaleb(-p[1])), min_size=1
    )
)
def test_a_numeric_declared_decimal_holds_exactly_what_fits(
    connection: psycopg.Connection, values: list[Decimal]
) -> None:
    column = Column(name="c", attnum=1, type_oid=1700, typmod=(38 << 16 | 10) + 4, type_name="numeric")
    texts = printed(connection, "select unnest(%b::numeric[])", values)
    typed, mask = cast(column, pa.array(texts, pa.binary()))
    masked = [False] * len(values) if mask is None else mask.tolist()
    for value, held, is_masked in zip(values, typed.to_pylist(), masked, strict=True):
        fits = value < 10**28 and Fraction(value) * 10**10 % 1 == 0
        if not is_masked:
            assert fits
            assert held == value
        else:
            assert not fits or max(len(value.as_tuple().digits), -int(value.as_tuple().exponent)) > 38
