"""Every type that a column of a stock Postgres can have, with the values that are worth a test.

A case says by which Arrow type the lake holds the column, which values the column takes, and which of them it cannot
hold; the values are minimum, maximum, zero, empty and the special ones. The test that uses the table compares it with
the server's catalog, so that no type can be forgotten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

UTC: Final = "timestamp[us, tz=UTC]"
ODD_SCALES: Final = 150000
"""Server version from which a numeric's scale may be negative or exceed its precision."""
OCTAL_CHAR: Final = 150000
"""… and from which a "char" beyond ASCII is printed as octal digits, not as a byte that is no character."""
INFINITE_INTERVAL: Final = 170000


@dataclass(frozen=True, slots=True)
class Case:
    """A column as it is declared, and its values: literals, or subqueries in parentheses."""

    declared: str
    arrow: str = "string"
    values: tuple[str, ...] = ()
    raw: tuple[str, ...] = ()
    since: int = 0
    until: int = 1 << 31
    extension: str = ""
    array: str | None = None
    """Arrow type of the array of the type; None: a list of `arrow`. "": an array of it is not tried."""


SETUP: Final = r"""
create type mood as enum ('sad', 'very happy', 'NULL', 'a,b', '{q"\}', '');
create type pair as (a int, b text, c numeric(10,2)[]);
create type empty_pair as ();
create table row_type (a int, b text);
create domain price as numeric(10,2);
create domain deep_price as price check (value < 1000000);
create domain numbers as int[];
create domain feeling as mood;
create domain day as date;
create domain area as box;
create type floats as range (subtype = float8, multirange_type_name = many_floats);
create type colon;
create function colon_in(cstring) returns colon language internal immutable strict as 'textin';
create function colon_out(colon) returns cstring language internal immutable strict as 'textout';
create type colon (input = colon_in, output = colon_out, like = text, delimiter = ':');
create statistics known (ndistinct, dependencies, mcv) on a, b from row_type;
"""

_INFINITE = ("infinity", "-infinity")
_QUOTES = ("", " ", "NULL", "null", "\\N", "\\.", 'a"b\\c', "a,b", "{x}", "\t\r\n", "žluťoučký 🐎", "e" * 300)

EVERY: Final[tuple[Case, ...]] = (
    Case("boolean", "bool", ("true", "false")),
    Case("smallint", "int16", ("-32768", "0", "32767")),
    Case("integer", "int32", ("-2147483648", "0", "2147483647")),
    Case("bigint", "int64", ("-9223372036854775808", "0", "9007199254740993", "9223372036854775807")),
    Case(
        "real",
        "float",
        ("-3.4028235e38", "1e-45", "1.1754942e-38", "0", "-0", "0.1", "16777216", "1e-5", "1234567", "NaN", *_INFINITE),
    ),
    Case(
        "double precision",
        "double",
        (
            *("-1.7976931348623157e308", "5e-324", "2.2250738585072009e-308", "0", "-0", "0.1", "1e15", "1e-5"),
            *("9007199254740993", "NaN", *_INFINITE),
        ),
    ),
    Case("numeric(10,2)", "decimal128(10, 2)", ("-99999999.99", "0", "0.01", "99999999.99", "1.005"), ("NaN",)),
    Case("numeric(38)", "decimal128(38, 0)", ("-" + "9" * 38, "0", "9" * 38), ("NaN",)),
    Case("numeric(38,38)", "decimal128(38, 38)", ("-0." + "9" * 38, "0", "1e-38"), ("NaN",)),
    Case("numeric(38,10)", "decimal128(38, 10)", ("-" + "9" * 28 + "." + "9" * 10, "0", "1e-10"), ("NaN",)),
    Case("numeric(1,0)", "decimal128(1, 0)", ("-9", "0", "9"), ("NaN",)),
    Case("numeric(39,2)", "string", ("-" + "9" * 37 + ".99", "0", "NaN"), array="list<item: string>"),
    Case("numeric(1000,500)", "string", ("9" * 500 + "." + "9" * 500, "1e-500", "NaN")),
    Case("numeric", "string", ("0", "-0.00", "1.500", "1e100", "1e-100", "9" * 60 + ".000", "NaN", *_INFINITE)),
    Case("numeric(3,-2)", "decimal128(5, 0)", ("-99900", "0", "149"), ("NaN",), since=ODD_SCALES),
    Case("numeric(37,-1)", "decimal128(38, 0)", ("-" + "9" * 37 + "0", "0"), ("NaN",), since=ODD_SCALES),
    Case("numeric(38,-1)", "string", ("-" + "9" * 38 + "0", "0", "NaN"), since=ODD_SCALES),
    Case("numeric(2,5)", "decimal128(5, 5)", ("-0.00099", "0", "0.00001"), ("NaN",), since=ODD_SCALES),
    Case("numeric(2,39)", "string", ("99e-39", "0", "NaN"), since=ODD_SCALES),
    Case(
        "date",
        "date32[day]",
        ("0001-01-01", "1582-10-10", "1900-02-28", "1969-12-31", "1970-01-01", "2000-02-29", "9999-12-31"),
        (*_INFINITE, "4714-11-24 BC", "0044-03-15 BC", "0001-12-31 BC", "10000-01-01", "5874897-12-31"),
    ),
    Case(
        "timestamp",
        "timestamp[us]",
        (
            *("0001-01-01 00:00:00", "1969-12-31 23:59:59.999999", "1970-01-01 00:00:00.000001", "2016-12-31 23:59:60"),
            *("2024-02-29 10:20:30.5", "2024-02-29 24:00:00", "9999-12-31 23:59:59.999999"),
        ),
        (
            *(*_INFINITE, "4714-11-24 00:00:00 BC", "0001-12-31 23:59:59.999999 BC", "10000-01-01 00:00:00"),
            "294276-12-31 23:59:59.999999",
        ),
    ),
    Case("timestamp(0)", "timestamp[us]", ("2024-02-29 10:20:30.5", "1969-12-31 23:59:59.4"), _INFINITE),
    Case(
        "timestamptz",
        UTC,
        (
            *("0001-01-01 00:00:00+00", "1969-12-31 23:59:59.999999+00", "2024-06-01 10:20:30.123+05:30"),
            *("2024-03-31 02:30:00 Europe/Prague", "9999-12-31 23:59:59.999999+00"),
        ),
        (
            *(*_INFINITE, "4714-11-24 00:00:00+00 BC", "0001-01-01 00:00:00+14", "9999-12-31 23:59:59-12"),
            "294276-12-31 23:59:59.999999+00",
        ),
    ),
    Case("timestamptz(3)", UTC, ("2024-02-29 10:20:30.123456+00",), _INFINITE),
    Case("time", values=("00:00:00", "24:00:00", "23:59:59.999999", "23:59:60", "01:02:03.5")),
    Case("timetz", values=("00:00:00+15:59", "24:00:00-15:59", "01:02:03.5+05:30", "01:02:03-00:00:01")),
    Case(
        "interval",
        values=(
            *("0", "1 year 2 mons -3 days 04:05:06.789", "-1 year +2 mons -3 days -04:05:06.000001", "-00:00:00.5"),
            *("178000000 years", "-178000000 years", "2147483647 days", "1 mon -1 day"),
        ),
    ),
    Case("interval year to month", values=("1 year 2 mons", "-1 mon")),
    Case("interval", values=_INFINITE, since=INFINITE_INTERVAL),
    Case("bytea", "binary", ("", "\\x00", "\\xdeadBEEF", "\\x5c7822", "\\x" + bytes(range(256)).hex())),
    Case("text", values=_QUOTES),
    Case("varchar", values=_QUOTES),
    Case("varchar(10)", values=("", "abc", "  x  ", "řřřřřřřřřř")),
    Case("char(5)", values=("", "ab", "  x")),
    Case("char", values=("", "x")),
    Case('"char"', values=("", "x", ",", '"', "\\")),
    Case('"char"', values=("é",), since=OCTAL_CHAR),
    Case('"char"', raw=("é",), until=OCTAL_CHAR),
    Case("name", values=("", "abc", "x" * 63, 'a"b')),
    Case("uuid", values=("00000000-0000-0000-0000-000000000000", "FFFFFFFF-ffff-ffff-ffff-ffffffffffff")),
    Case(
        "json",
        values=(
            *('{"a" : 1, "a": 2}', "null", '"\\u0000"', "12345678901234567890123456789.123456789012345678901", "1E400"),
            *(" [ ] ", '"{\\"a\\":\\n}"'),
        ),
    ),
    Case(
        "jsonb", values=('{"b": 1, "a" : {}}', "null", '"\\u00e9"', "123456789012345678901234567890.10", "1e40", '""')
    ),
    Case("jsonpath", values=("$", '$."a b"[*] ? (@ > 1)', "strict $.x")),
    Case("xml", values=("<a b='1'>&lt;ž</a>", "", "plain", '<?xml version="1.0"?><a/>')),
    Case("inet", values=("::1/64", "10.0.0.1", "0.0.0.0/0", "255.255.255.255", "::ffff:1.2.3.4")),
    Case("cidr", values=("::/0", "10.0.0.0/8", "192.168.1.1/32")),
    Case("macaddr", values=("00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff")),
    Case("macaddr8", values=("00:00:00:00:00:00:00:00", "08:00:2b:01:02:03:04:05")),
    Case("money", values=("-92233720368547758.08", "0", "92233720368547758.07", "-0.01")),
    Case("bit", values=("0", "1")),
    Case("bit(5)", values=("00000", "10101")),
    Case("bit varying", values=("", "1", "0" * 70)),
    Case("bit varying(3)", values=("", "101")),
    Case("int4range", values=("empty", "[1,5)", "(,)", "[-2147483648,]")),
    Case("int8range", values=("empty", "(,9223372036854775807)")),
    Case("numrange", values=("empty", "[1.10,2.000]", "(NaN,)", "[0,Infinity)")),
    Case("daterange", values=("empty", "[2024-01-01,infinity)", '(-infinity,"0044-03-15 BC")')),
    Case("tsrange", values=("empty", "[2024-01-01 00:00:00.5,infinity)")),
    Case("tstzrange", values=("empty", "(,2024-01-01 00:00:00+05)")),
    Case("int4multirange", values=("{}", "{[1,5),[7,9)}")),
    Case("int8multirange", values=("{}", "{(,)}")),
    Case("nummultirange", values=("{}", "{[1.0,2.00),(3,NaN)}")),
    Case("datemultirange", values=("{}", "{[2024-01-01,2024-01-02)}")),
    Case("tsmultirange", values=("{}", "{[2024-01-01,infinity]}")),
    Case("tstzmultirange", values=("{}", "{[2024-01-01 00:00:00+00,]}")),
    Case("floats", values=("empty", "[-0.1,Infinity)")),
    Case("many_floats", values=("{}", "{[-0.1,Infinity)}")),
    Case("point", values=("(0,0)", "(-0,1e-300)", "(NaN,Infinity)")),
    Case("line", values=("{1,-1,0}", "{0,1,NaN}")),
    Case("lseg", values=("[(0,0),(1,1)]",)),
    Case("box", values=("(1,1),(0,0)", "(Infinity,1),(-0,0)"), array="list<item: string>"),
    Case("path", values=("((0,0),(1,1))", "[(0,0),(1,1),(2,0)]")),
    Case("polygon", values=("((0,0),(1,1),(2,0))",)),
    Case("circle", values=("<(0,0),5>", "<(1,2),Infinity>")),
    Case("tsvector", values=("", "'a':1 'b':2A", "'it''s':3 'b c':16383")),
    Case("tsquery", values=("", "'a' & !'b' <2> 'c':*A")),
    Case("gtsvector"),
    Case("oid", values=("0", "4294967295")),
    Case("xid", values=("0", "4294967295")),
    Case("xid8", values=("0", "18446744073709551615")),
    Case("cid", values=("0", "4294967295")),
    Case("tid", values=("(0,0)", "(4294967295,65535)")),
    Case("oidvector", values=("", "1 4294967295"), array="list<item: string>"),
    Case("int2vector", values=("", "1 -2 3"), array="list<item: string>"),
    Case("pg_lsn", values=("0/0", "FFFFFFFF/FFFFFFFF")),
    Case("pg_snapshot", values=("10:20:10,14,15", "1:1:")),
    Case("txid_snapshot", values=("10:20:10,14,15", "1:1:")),
    Case("refcursor", values=("", "c 1")),
    Case("aclitem", values=("=r/postgres", "postgres=arwdDxt/postgres")),
    Case("regclass", values=("-", "pg_class", "public.row_type", "99999")),
    Case("regtype", values=("-", "integer[]", "public.mood", "numeric")),
    Case("regproc", values=("-", "now", "public.colon_in")),
    Case("regprocedure", values=("-", "now()", "public.colon_in(cstring)")),
    Case("regoper", values=("0", "||/")),
    Case("regoperator", values=("0", "+(integer,integer)")),
    Case("regconfig", values=("-", "english")),
    Case("regdictionary", values=("-", "simple")),
    Case("regnamespace", values=("-", "public", "pg_catalog")),
    Case("regrole", values=("-", "postgres")),
    Case("regcollation", values=("-", '"C"')),
    Case("regdatabase", values=("-", "postgres"), since=190000),
    Case("pg_node_tree", values=("(select adbin from pg_attrdef limit 1)",), array=""),
    Case("pg_ndistinct", values=("(select stxdndistinct from pg_statistic_ext_data)",), array=""),
    Case("pg_dependencies", values=("(select stxddependencies from pg_statistic_ext_data)",), array=""),
    Case("pg_mcv_list", values=("(select stxdmcv from pg_statistic_ext_data)",), array=""),
    Case("pg_brin_bloom_summary", array=""),
    Case("pg_brin_minmax_multi_summary", array=""),
    Case("mood", values=("sad", "very happy", "NULL", "a,b", '{q"\\}', "")),
    Case("pair", values=("(,,)", '(1,"x y","{1.50,NaN}")', '(-2147483648,"",{})')),
    Case("empty_pair", values=("()",)),
    Case("row_type", values=("(,)", '(1,"a,""b")')),
    Case("price", "decimal128(10, 2)", ("-99999999.99", "0", "1.005"), ("NaN",), array="list<item: string>"),
    Case("deep_price", "decimal128(10, 2)", ("-99999999.99", "0", "999999.99"), array="list<item: string>"),
    Case("numbers", "list<item: int32>", ("{}", "{1,NULL,-3}"), ("{{1,2},{3,4}}",), array="list<item: string>"),
    Case("feeling", values=("sad", "")),
    Case("day", "date32[day]", ("2024-02-29",), _INFINITE),
    Case("area", values=("(1,1),(0,0)",)),
    Case("colon", values=("", "a:b", "a,b"), array="string"),
    Case("information_schema.cardinal_number", "int32", ("0", "2147483647")),
    Case("information_schema.character_data", values=("", "x")),
    Case("information_schema.sql_identifier", values=("", "x")),
    Case("information_schema.time_stamp", UTC, ("2024-01-02 03:04:05.67+00",), ("infinity",)),
    Case("information_schema.yes_or_no", values=("YES", "NO")),
    Case(
        "hstore",
        "map<string, string>",
        ("", '"a"=>NULL, "b"=>"", "c,"=>"=>", "q\\""=>"v\\\\"', '"NULL"=>"NULL"'),
        extension="hstore",
        array="list<item: string>",
    ),
    Case("ghstore", extension="hstore"),
    Case("citext", values=("", "Ab", 'a"b'), extension="citext"),
    Case("ltree", values=("", "Top.Science.Astronomy"), extension="ltree"),
    Case("lquery", values=("*.a|b{1,2}.!c",), extension="ltree"),
    Case("ltxtquery", values=("Europe & !Asia*@",), extension="ltree"),
    Case("ltree_gist", extension="ltree"),
    Case("cube", values=("(0)", "(1, 2),(-3, NaN)"), extension="cube"),
    Case("earth", values=("(select ll_to_earth(50, 14))",), extension="earthdistance"),
    Case("seg", values=("1.50", "~5 .. 7", ".. 6.0"), extension="seg"),
    Case("ean13", values=("9780393040029",), extension="isn"),
    Case("isbn13", values=("978-0-393-04002-9",), extension="isn"),
    Case("ismn13", values=("979-0-060-11561-5",), extension="isn"),
    Case("issn13", values=("977-1436-452-00-8",), extension="isn"),
    Case("isbn", values=("0-393-04002-X",), extension="isn"),
    Case("ismn", values=("M-060-11561-5",), extension="isn"),
    Case("issn", values=("1436-4522",), extension="isn"),
    Case("upc", values=("220356483481",), extension="isn"),
    Case("query_int", values=("1&(2|!3)",), extension="intarray"),
    Case("intbig_gkey", extension="intarray"),
    Case("lo", values=("0", "4294967295"), extension="lo"),
    Case("gtrgm", extension="pg_trgm"),
    Case("tablefunc_crosstab_2", values=('(a,"b c",)',), extension="tablefunc"),
    Case("tablefunc_crosstab_3", extension="tablefunc"),
    Case("tablefunc_crosstab_4", extension="tablefunc"),
    Case("dblink_pkey_results", extension="dblink"),
    *(Case(f"gbtreekey{size}", extension="btree_gist") for size in ("4", "8", "16", "32", "_var")),
    Case("gbtreekey2", extension="btree_gist", since=150000),
    Case("vector", "list<item: float>", ("[1,0.25,-4e-07]", "[0]"), extension="vector", array="list<item: string>"),
    Case("vector(3)", "list<item: float>", ("[1,-2,3e38]",), extension="vector", array="list<item: string>"),
    Case("halfvec", "list<item: float>", ("[65504,-6e-08,0.1]",), extension="vector", array="list<item: string>"),
    Case("sparsevec", values=("{1:1.5,3:-2}/5",), extension="vector"),
)


def same(held: Any, expected: Any) -> bool:
    """Equal in type and value; of floats, also in the sign of a zero, and NaN to NaN."""
    if isinstance(held, list | tuple):
        return isinstance(expected, list | tuple) and len(held) == len(expected) and all(map(same, held, expected))
    if isinstance(held, float) and isinstance(expected, float):
        if math.isnan(held):
            return math.isnan(expected)
        return held == expected and math.copysign(1, held) == math.copysign(1, expected)
    if isinstance(held, bool) or isinstance(expected, bool) or held is None or expected is None:
        return held is expected
    return type(held) is type(expected) and bool(held == expected)
