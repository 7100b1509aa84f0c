"""Keys are the same text wherever a row comes from, and fall into the same bucket for ever."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.batch import RAW_TYPE
from cdc.keys import bucket_of, hash_of, key_of, key_texts, text_of
from cdc.table import Column, TableId, TableSchema
from tests.support.changelogs import batch_of

_SCHEMA = TableSchema(
    table=TableId("public", "t"),
    oid=1,
    columns=(
        Column(name="a", attnum=1, type_oid=25, type_name="text"),
        Column(name="n", attnum=2, type_oid=1700, typmod=(4 << 16 | 1) + 4, type_name="numeric(4,1)"),
    ),
    key=("a", "n"),
)


def test_parts_of_a_key_never_run_together() -> None:
    keys = key_of([pa.array(["a", "ab", "a:1"]), pa.array(["bc", "c", ":"])], None, ["x", "y"]).to_pylist()
    assert len(set(keys)) == 3


@given(st.lists(st.tuples(st.text(max_size=6), st.text(max_size=6)), min_size=2, max_size=20, unique=True))
def test_different_keys_of_two_columns_have_different_texts(pairs: list[tuple[str, str]]) -> None:
    keys = key_of([pa.array([a for a, _ in pairs]), pa.array([b for _, b in pairs])], None, ["x", "y"])
    assert len(set(keys.to_pylist())) == len(pairs)


def test_a_key_without_one_of_its_columns_is_null() -> None:
    assert key_of([pa.array(["a", None]), pa.array([1, 2])], None, ["x", "y"]).to_pylist() == ["1:a:1:1", None]


def test_a_value_that_its_type_cannot_hold_counts_with_its_text() -> None:
    batch = batch_of(_SCHEMA, [{"_op": "c", "a": "x", "n": "NaN"}, {"_op": "c", "a": "x", "n": "1.5"}])
    assert key_texts(batch, ["n"]).to_pylist() == ["NaN", "1.5"]


def test_the_old_key_is_null_where_it_did_not_change_and_knows_raw_texts_too() -> None:
    rows = [
        {"_op": "u", "a": "x", "n": "1.5"},
        {"_op": "u", "a": "x", "n": "1.5", "_before": {"a": "y", "n": "NaN"}},
        {"_op": "u", "a": "x", "n": "1.5", "_before": {"a": "y", "n": "2.0"}},
    ]
    batch = batch_of(_SCHEMA, rows)
    assert key_texts(batch, ["n"], before=True).to_pylist() == [None, "NaN", "2.0"]
    assert key_texts(batch, ["a", "n"], before=True).to_pylist() == [None, "1:y:3:NaN", "1:y:3:2.0"]


@pytest.mark.parametrize(
    "array",
    [
        pa.array([1, None, -5], pa.int16()),
        pa.array([Decimal("1.50"), None], pa.decimal128(10, 2)),
        pa.array([dt.datetime(2020, 1, 1, 1, 2, 3, 4, tzinfo=dt.UTC), None], pa.timestamp("us", tz="UTC")),
        pa.array([dt.date(1999, 1, 1)]),
        pa.array([b"\x00\xff", None, b""]),
        pa.array([True, False, None]),
        pa.array([1.5, float("nan"), -0.0]),
        pa.array([["a", None], [], None], pa.list_(pa.string())),
    ],
)
def test_keys_survive_parquet(array: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"k": array}), tmp_path / "f.parquet")
    again = pq.read_table(tmp_path / "f.parquet").column("k").combine_chunks()
    assert text_of(again).to_pylist() == text_of(array).to_pylist()
    assert text_of(array).null_count == array.null_count


def test_slices_and_their_whole_have_the_same_keys() -> None:
    array = pa.array([b"a", None, b"bc", b"def"])
    assert text_of(array.slice(1, 2)).to_pylist() == text_of(array).to_pylist()[1:3]
    keys = pa.array(["a", None, "bcdefghi", "x" * 100, ""])
    assert hash_of(keys.slice(2)).tolist() == hash_of(keys).tolist()[2:]


def test_hashes_are_those_of_the_files_in_the_lake() -> None:
    """Files are laid out by these numbers: a change of them loses rows."""
    keys = pa.array(["", "a", "abcdefgh", "abcdefghi", "é" * 20])
    expected = [0x0, 0x51E7211898164C9A, 0xC48BB0ED92A97E03, 0x4D27DCC7595B91C2, 0x7BCCBC2F8E333605]
    assert hash_of(keys).tolist() == expected


def test_doubling_the_buckets_splits_each_in_two() -> None:
    keys = pa.array([str(i) for i in range(10_000)])
    four, eight = bucket_of(keys, 4), bucket_of(keys, 8)
    assert (eight % 4 == four).all()
    assert np.bincount(eight, minlength=8).min() > 1100


def test_raw_is_only_asked_for_the_named_column() -> None:
    raw = pa.array([[("other", "z")], [("n", "NaN")]], RAW_TYPE)
    assert key_of([pa.array([None, None], pa.float64())], raw, ["n"]).to_pylist() == [None, "NaN"]
