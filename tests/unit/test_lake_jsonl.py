"""Lines of JSON say exactly what the columns hold; the oracle is Python's json module and the rows as objects."""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
import random
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from cdc.batch import RAW_TYPE
from cdc.lake.jsonl import json_lines
from cdc.lake.widening import SOURCE_NAME

ROW = {b"pg.attnum": b"1"}
TEXTS = ["", "plain", 'quo"te', "back\\slash", "tab\tnew\nline\r\x00\x1f\x7f", "żółć 🐘 \u2028", '\\"', "{}[],:"]


OLD = {"id": pa.int64(), "t": pa.string()}


def lines(columns: dict[str, pa.Array], prefix: str = "_") -> list[dict[str, Any]]:
    fields = [pa.field(n, a.type, metadata=None if n.startswith("_") else ROW) for n, a in columns.items()]
    batch = pa.RecordBatch.from_arrays(list(columns.values()), schema=pa.schema(fields))
    return parsed(batch, prefix)


def parsed(batch: pa.RecordBatch, prefix: str = "_") -> list[dict[str, Any]]:
    text = bytes(json_lines(batch, prefix)).decode()
    assert text.count("\n") == batch.num_rows
    return [json.loads(line) for line in text.split("\n") if line]


def expected(value: Any) -> Any:
    """What stands for a value."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, dt.datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%S.%f").rjust(26, "0") + ("Z" if value.tzinfo else "")
    if isinstance(value, dt.date):
        return value.isoformat()
    if isinstance(value, list) and value and all(isinstance(v, tuple) for v in value):
        return {k: expected(v) for k, v in value}
    if isinstance(value, list):
        return [expected(v) for v in value]
    if isinstance(value, dict):
        return {k: expected(v) for k, v in value.items()}
    return value


def arrays(rng: random.Random, n: int) -> dict[str, pa.Array]:
    def some(values: list[Any], kind: pa.DataType) -> pa.Array:
        return pa.array([rng.choice([*values, None]) for _ in range(n)], kind)

    floats = [0.1, 1.0, -0.0, 1e300, 5e-324, 1e20, -1e-7, math.nan, math.inf, -math.inf, rng.random(), 2.0**53 + 2]
    blobs = [rng.randbytes(size) for size in (0, 1, 2, 3, 4, 5, 100)]
    instants = [
        dt.datetime(1, 1, 1, tzinfo=dt.UTC),
        dt.datetime(9999, 12, 31, 23, 59, 59, 999999, dt.UTC),
        dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC),
    ]
    return {
        "_op": some(["c"], pa.string()).fill_null("u"),
        "bool": some([True, False], pa.bool_()),
        "int2": some([-(2**15), 2**15 - 1], pa.int16()),
        "int8": some([-(2**63), 2**63 - 1, 2**53 + 1, 0], pa.int64()),
        "float4": some([0.5, math.nan, 0.25], pa.float32()),
        "float8": some(floats, pa.float64()),
        "numeric": some([Decimal("12.50"), Decimal("-99999999.99"), Decimal("0.00")], pa.decimal128(10, 2)),
        "tiny": some([Decimal("0.0000000001"), Decimal("12345.6789012345")], pa.decimal128(38, 10)),
        "date": some([dt.date(1, 1, 1), dt.date(2026, 2, 28)], pa.date32()),
        "ts": some([i.replace(tzinfo=None) for i in instants], pa.timestamp("us")),
        "tstz": some(instants, pa.timestamp("us", "UTC")),
        "text": some(TEXTS, pa.string()),
        "quo\"te\n": some(TEXTS, pa.string()),
        "bytea": some(blobs, pa.binary()),
        "texts": some([[], TEXTS, [None], ["a", None]], pa.list_(pa.string())),
        "amounts": some([[Decimal("1.0")], []], pa.list_(pa.decimal128(5, 1))),
        "blobs": some([blobs, []], pa.list_(pa.binary())),
        "hstore": some([[("a", "1"), ('b"', None)], []], RAW_TYPE),
        "_before": some([{"id": 1, "t": 'x"'}, {"id": None, "t": None}], pa.struct(OLD)),
    }  # fmt: skip


def test_every_value_is_exact(rng: random.Random) -> None:
    columns = arrays(rng, 200)
    for offset, length in ((0, 200), (7, 31), (199, 1), (3, 0)):
        cut = {name: array.slice(offset, length) for name, array in columns.items()}
        found = lines(cut)
        assert len(found) == length
        for i, row in enumerate(found):
            for name, array in cut.items():
                value = array[i].as_py()
                if name == "_before" and value is None:
                    assert name not in row
                elif name == "hstore":
                    assert row[name] == (None if value is None else dict(value))
                else:
                    assert row[name] == expected(value), name
                    assert type(row[name]) is type(expected(value)) or isinstance(value, float), name


def test_floats_come_back_bit_by_bit(rng: random.Random) -> None:
    wide = [rng.uniform(-1, 1) * 10.0 ** rng.randint(-300, 300) for _ in range(500)] + [-0.0]
    found = [float(row["f"]) for row in lines({"f": pa.array(wide, pa.float64())})]
    assert [f.hex() for f in found] == [f.hex() for f in wide]


def test_what_is_not_known_is_left_out_and_what_is_null_is_null() -> None:
    batch = pa.RecordBatch.from_arrays(
        [
            pa.array(["u", "u", "c"]),
            pa.array([["a", "was"], None, None], pa.list_(pa.string())),
            pa.array([None, None, [("a", "NaN")]], RAW_TYPE),
            pa.array([None, "x", None]),
            pa.array([None, None, None], pa.int64()),
            pa.array([1, 2, 3]),
        ],
        schema=pa.schema(
            [
                pa.field("__op", pa.string()),
                pa.field("__unchanged", pa.list_(pa.string())),
                pa.field("__raw", RAW_TYPE),
                pa.field("a", pa.string(), metadata=ROW),
                pa.field("b@int", pa.int64(), metadata={**ROW, SOURCE_NAME: b"was"}),
                pa.field("_op", pa.int64(), metadata=ROW),
            ]
        ),
    )
    assert parsed(batch, "__") == [
        {"__op": "u", "__unchanged": ["a", "was"], "_op": 1},
        {"__op": "u", "a": "x", "b@int": None, "_op": 2},
        {"__op": "c", "__raw": {"a": "NaN"}, "a": None, "b@int": None, "_op": 3},
    ]


def test_a_type_without_a_json_form_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="duration"):
        lines({"a": pa.array([1], pa.duration("s"))})
