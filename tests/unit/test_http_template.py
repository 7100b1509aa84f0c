"""Templates: what a row becomes in a request, what no row may become, and what is wrong before the first row."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from cdc.config_serving import RequestConfig
from connectors.http.template import KEY, RequestTemplate, RowRefused, row_key, secret_path
from connectors.http.values import Unsayable, rows_of, to_json, to_text


def body_of(template: Any, row: dict[str, Any]) -> str:
    made = RequestTemplate(RequestConfig(body=template), row)
    assert made.problems == []
    body = made.build([made.item(row, "k")]).body
    assert body is not None
    return body.decode()


def test_a_text_that_is_only_a_name_keeps_the_type_and_one_within_a_text_is_text() -> None:
    row = {"n": 7, "d": Decimal("12.340"), "t": 'say "hi"', "f": 1.5, "none": None, "yes": True, "l": [1, None]}
    assert body_of({"n": "{n}", "d": "{d}", "t": "{t}", "none": "{none}", "l": "{l}"}, row) == (
        '{"n":7,"d":12.340,"t":"say \\"hi\\"","none":null,"l":[1,null]}'
    )
    assert body_of(["{n} of {d}", "{t}!", "<{none}>", "{yes}{f}", "{l}."], row) == (
        '["7 of 12.340","say \\"hi\\"!","<>","true1.5","[1,null]."]'
    )


def test_what_is_no_template_stays_and_braces_are_doubled() -> None:
    literal = {"a": 1, "b": [True, 2.5, dt.date(2026, 1, 2)], "{n}": "{{n}}", "c": "{{{n}}}", "d": "a}}b"}
    assert json.loads(body_of(literal, {"n": 7})) == {
        "a": 1, "b": [True, 2.5, "2026-01-02"], "{n}": "{n}", "c": "{7}", "d": "a}b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("request_config", "expected"),
    [
        (RequestConfig(path="/x/{nme}"), "path: there is no {nme}; known: cdc.idempotency_key, name"),
        (RequestConfig(body={"a": ["{nme}"]}), "body.a[0]: there is no {nme}"),
        (RequestConfig(headers={"X-A": "{nme}"}), "headers.X-A: there is no {nme}"),
        (RequestConfig(body="{name"), "body: a lone {"),
        (RequestConfig(body="name}"), "body: a lone }"),
        (RequestConfig(body="{env:SECRET}"), "body: there is no {env:SECRET}"),
        (RequestConfig(headers={"X A": "b"}), "headers.X A: is no header"),
        (RequestConfig(headers={"Host": "b"}), "headers.Host: is no header that can be set"),
        (RequestConfig(headers={"X-A": "b\r\nX-B: c"}), "headers.X-A: holds a control character"),
        (RequestConfig(headers={"idempotency-key": "b"}), "headers: one stands there twice"),
        (RequestConfig(path="x/{name}"), "path: begins with /"),
        (RequestConfig(path="/a b"), "path: holds a blank"),
        (RequestConfig(path="/a/../{name}"), "path: holds a step"),
        (RequestConfig(rows_per_request=2, item="{name}", body={}), "body: lacks {items}"),
        (RequestConfig(rows_per_request=2, item="{name}", body={"i": "{items}", "n": "{name}"}), "it stands in item"),
        (RequestConfig(rows_per_request=2, item="{name}", body="{items}", path="/{name}"), "it stands in item"),
    ],
)
def test_mistakes_are_found_before_the_first_row(request_config: RequestConfig, expected: str) -> None:
    problems = RequestTemplate(request_config, ["name"]).problems
    assert [p for p in problems if expected in p], problems


def test_a_value_in_a_path_is_escaped_and_reaches_no_other_address() -> None:
    made = RequestTemplate(RequestConfig(path="/c/{k}/x?e={k}"), ["k"])
    assert made.addresses_rows

    def path(value: Any) -> str:
        return made.build([made.item({"k": value}, "key")]).path

    assert path("a/b?c#d é%") == "/c/a%2Fb%3Fc%23d%20%C3%A9%25/x?e=a%2Fb%3Fc%23d%20%C3%A9%25"
    assert path(7) == "/c/7/x?e=7"
    for value in (None, "", ".", ".."):
        with pytest.raises(RowRefused) as told:
            path(value)
        assert "path" in str(told.value)


def test_a_secret_stands_in_a_path_as_it_is() -> None:
    made = RequestTemplate(RequestConfig(path="/services/{env:HOOK}"), ["k"])
    assert made.problems == []
    assert not made.addresses_rows
    made.secrets["env:HOOK"] = "T0/B0/x"
    assert made.build([made.item({"k": 1}, "key")]).path == "/services/T0/B0/x"
    assert [secret_path(t) for t in ("T0/B0/x", "a b", "a/../b", "a?b", "")] == [True, False, False, False, False]


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nb", "\x00", "é"])
def test_a_value_cannot_make_a_header_of_its_own(value: str) -> None:
    made = RequestTemplate(RequestConfig(headers={"X-A": "<{k}>"}), ["k"])
    assert made.build([made.item({"k": 7}, "key")]).headers["X-A"] == "<7>"
    with pytest.raises(RowRefused) as told:
        made.build([made.item({"k": value}, "key")])
    assert value not in str(told.value)


def test_rows_stand_together_in_one_request_with_keys_of_their_own() -> None:
    config = RequestConfig(rows_per_request=3, item={"k": "{k}", "id": f"{{{KEY}}}"}, body={"rows": "{items}", "n": 1})
    made = RequestTemplate(config, ["k"])
    items = [made.item({"k": i}, f"key{i}") for i in range(3)]
    built = made.build(items)
    assert built.body is not None
    assert json.loads(built.body) == {"rows": [{"k": i, "id": f"key{i}"} for i in range(3)], "n": 1}
    header = built.headers["Idempotency-Key"]
    assert header == made.build(items).headers["Idempotency-Key"]
    assert len({header, *(made.build(some).headers["Idempotency-Key"] for some in (items[:2], items[::-1]))}) == 3


def test_an_idempotency_key_is_of_the_effect_alone() -> None:
    key = row_key("s", "k", "d", 1, deletes=False)
    others = [("t", "k", "d", 1, False), ("s", "l", "d", 1, False), ("s", "k", "e", 1, False),
              ("s", "k", "d", 2, False), ("s", "k", "d", 1, True)]  # fmt: skip
    keys = {row_key(s, k, d, v, deletes=deletes) for s, k, d, v, deletes in others}
    assert key not in keys
    assert len(keys) == len(others)
    assert key == row_key("s", "k", "d", 1, deletes=False)


def test_values_of_every_type_have_one_form() -> None:
    utc = dt.UTC
    columns = {
        "big": pa.array([2**63], pa.uint64()),
        "wide": pa.array([Decimal(10**37)], pa.decimal128(38, 0)),
        "small": pa.array([Decimal("-0.0000001")], pa.decimal128(10, 7)),
        "instant": pa.array([dt.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=utc)], pa.timestamp("us", "UTC")),
        "elsewhere": pa.array([dt.datetime(2026, 1, 2, 3, tzinfo=utc)], pa.timestamp("us", "Europe/Berlin")),
        "local": pa.array([dt.datetime(2026, 1, 2, 3, 4, 5)], pa.timestamp("us")),  # noqa: DTZ001
        "day": pa.array([dt.date(2026, 1, 2)]),
        "clock": pa.array([dt.time(3, 4, 5)], pa.time64("us")),
        "bytes": pa.array([b"\x00\xff"]),
        "nan": pa.array([float("nan")]),
        "inf": pa.array([float("-inf")]),
        "struct": pa.array([{"a": Decimal("1.50"), "b": [dt.date(2026, 1, 2), None]}],
                           pa.struct([("a", pa.decimal128(4, 2)), ("b", pa.list_(pa.date32()))])),
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int32())),
        "json": pa.array(['{"a": 1.10}'], pa.json_()),
        "uuid": pa.array([b"\x00" * 16], pa.uuid()),
        "null": pa.nulls(1),
    }  # fmt: skip
    (row,) = rows_of(pa.table(columns))
    assert to_json(row).decode() == (
        '{"big":9223372036854775808,"wide":10000000000000000000000000000000000000,"small":-0.0000001,'
        '"instant":"2026-01-02T03:04:05.000006Z","elsewhere":"2026-01-02T03:00:00.000000Z",'
        '"local":"2026-01-02T03:04:05.000000","day":"2026-01-02","clock":"03:04:05.000000","bytes":"AP8=","nan":"NaN",'
        '"inf":"-Infinity","struct":{"a":1.50,"b":["2026-01-02",null]},"map":{"k":1},"json":{"a": 1.10},'
        '"uuid":"00000000-0000-0000-0000-000000000000","null":null}'
    )
    assert to_text(row["wide"]) == "1" + "0" * 37
    assert to_text(row["json"]) == '{"a": 1.10}'


def test_a_time_that_iso_8601_cannot_say_refuses_its_row_where_it_is_used() -> None:
    numbers = [(1 << 63) - 1, -(1 << 63) + 1, 253_402_300_800_000_000, 0]
    rows = rows_of(pa.table({"t": pa.array(numbers, pa.int64()).cast(pa.timestamp("us", "UTC")), "k": [1, 2, 3, 4]}))
    assert [r["t"] for r in rows[:2]] == ["infinity", "-infinity"]
    assert rows[3]["t"] == "1970-01-01T00:00:00.000000Z"
    assert isinstance(rows[2]["t"], Unsayable)
    without = RequestTemplate(RequestConfig(body="{k}"), ["t", "k"])
    assert without.build([without.item(rows[2], "key")]).body == b"3"
    for config in (RequestConfig(body="{t}"), RequestConfig(body="at {t}"), RequestConfig(path="/{t}")):
        made = RequestTemplate(config, ["t", "k"])
        with pytest.raises(RowRefused, match="t has no form in JSON"):
            made.build([made.item(rows[2], "key")])
