"""Row hashes: lines tell rows apart, sums add up, and the hash is the one that Postgres computes (its values noted)."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.batch import RAW_TYPE
from cdc.rowhash import RowHash, Sums, bucket_of, buckets_for, hash_lines, lines, unhashed
from cdc.table import Column, TableId, TableSchema
from cdc.types import overridden

TEXT, INT, NUMERIC = 25, 23, 1700

# select hashtextextended(x collate "C", seed) of Postgres 15 and 18.
KNOWN = [
    ("", 0, -6939563903564495251),
    ("a", 0, 3591986179850072241),
    ("abcdefghijk", 0, 3112909444737856467),
    ("abcdefghijkl", 0, -7556637188122330412),
    ("abcdefghijklm", 0, 8871624171452417744),
    ("žluťoučký kůň příšerně úpěl ďábelské ódy", 0, -830684227078372937),
    (
        "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        0,
        -6927006773748011226,
    ),
    ("1\x1f2\x1f", 0, 2058267919294966013),
    ("", 7, 2755504096093790112),
    ("abcdefghijklm", 7, 1223120994160335261),
    ("abc", 24301, -1769273093901874133),
    ("abc", 7696581394437, -3562960488680423369),
]

cells = st.one_of(st.none(), st.text(alphabet="a\x1f0é:", max_size=4))


def column(name: str, oid: int = TEXT, **more: object) -> Column:
    return Column(name=name, attnum=1, type_oid=oid, **more)  # type: ignore[arg-type]


def test_the_hash_is_that_of_postgres() -> None:
    for text, seed, value in KNOWN:
        assert hash_lines(pa.array([text]), seed).astype(np.int64).tolist() == [value], (text, seed)
    texts = [text for text, seed, _ in KNOWN if seed == 0]
    values = [value for _, seed, value in KNOWN if seed == 0]
    many = pa.array(["", *texts] * 5000).slice(1)
    assert hash_lines(many).astype(np.int64).tolist()[: len(values)] == values, "in slices, long and short together"


@given(st.lists(st.tuples(cells, cells, st.one_of(st.none(), st.integers(-5, 120))), min_size=2, max_size=8))
def test_two_rows_have_equal_lines_only_if_they_are_equal(
    rows: list[tuple[str | None, str | None, int | None]],
) -> None:
    """Also where cells hold the separator, digits, or nothing."""
    columns = [column("a"), column("n", INT), column("b")]
    arrays = [
        pa.array([r[0] for r in rows], pa.string()),
        pa.array([r[2] for r in rows], pa.int32()),
        pa.array([r[1] for r in rows], pa.string()),
    ]
    made = lines(columns, arrays, None, ["a", "n", "b"]).to_pylist()
    for one, line in zip(rows, made, strict=True):
        for other, another in zip(rows, made, strict=True):
            assert (one == other) == (line == another), (one, other)


def test_a_text_in_raw_counts_where_its_cell_is_null_and_makes_an_odd_row_elsewhere() -> None:
    columns = [column("a", NUMERIC, typmod=(10 << 16 | 2) + 4), column("b", INT)]
    amounts = pa.array([None, None, "1.00", "1.00"], pa.string()).cast(pa.decimal128(10, 2))
    arrays = [amounts, pa.array([1, 1, 1, 1], pa.int32())]
    raw = pa.array([[("a", "NaN")], [("gone", "x")], [("a", "1.00")], None], RAW_TYPE)
    nan, null, both, plain = lines(columns, arrays, raw, ["a", "b"]).to_pylist()
    assert (nan, null, plain) == ("NaN\x1f1", "\x1f1", "1.00\x1f1")
    assert both not in (nan, null, plain)
    sliced = lines(columns, [a.slice(2) for a in arrays], raw.slice(2), ["a", "b"]).to_pylist()
    assert sliced == [both, plain]
    # The old tuple's texts stand under names of their own.
    old = pa.array([[("before.a", "NaN"), ("a", "NaN")]], RAW_TYPE)
    first = [a.slice(0, 1) for a in arrays]
    assert lines(columns, first, old, ["a", "b"], prefix="before.").to_pylist() == [nan]


def test_zeros_that_a_declared_scale_adds_do_not_count() -> None:
    declared = overridden(column("a", NUMERIC), "decimal(38,10)")
    amounts = pa.array(["1.5", "100", "0", None], pa.string()).cast(pa.decimal128(38, 10))
    raw = pa.array([None, None, None, [("a", "NaN")]], RAW_TYPE)
    assert lines([declared], [amounts], raw, ["a"]).to_pylist() == ["1.5", "100", "0", "NaN"]
    listed = overridden(column("l", 1231, element_oid=NUMERIC), "decimal(38,10)")
    schema = TableSchema(table=TableId("public", "t"), oid=1, columns=(declared, listed))
    assert unhashed(schema) == ["l"]


def test_sums_add_up_whatever_the_order_and_rows_can_be_taken_out() -> None:
    rng = random.Random(7)
    hashes = np.array([rng.getrandbits(64) for _ in range(500)], np.uint64)
    whole, parts = Sums.zero(64), Sums.zero(64)
    whole.add(hashes)
    shuffled = hashes[rng.sample(range(500), 500)]
    first = Sums.zero(64)
    first.add(shuffled[:200])
    parts.add(shuffled[200:])
    parts.join(first)
    assert list(whole.differing(parts)) == []
    parts.add(hashes[:3], -1)
    assert sorted(set(bucket_of(hashes[:3], 64).tolist())) == parts.differing(whole).tolist()
    whole.add(hashes[:3], -1)
    assert list(whole.differing(parts)) == []
    # The same row twice in place of two others: as many rows, another sum.
    doubled, plain = Sums.zero(1), Sums.zero(1)
    doubled.add(hashes[[0, 0, 2]])
    plain.add(hashes[[0, 1, 2]])
    assert list(doubled.differing(plain)) == [0]


def test_the_number_of_buckets_is_a_power_of_two() -> None:
    assert (buckets_for(0), buckets_for(10_000), buckets_for(1 << 40)) == (64, 256, 16384)
    with pytest.raises(ValueError, match="power of two"):
        RowHash(columns=(), key=(), buckets=3)
