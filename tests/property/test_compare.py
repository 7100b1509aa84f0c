"""The difference of two sets of rows against an oracle in plain Python: random rows of every kind of column."""

from __future__ import annotations

import math
from collections import Counter
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.batch import RAW_TYPE
from cdc.compare import Found, NotUnique, Rows, as_multisets, by_key, differs
from cdc.keys import row_texts

KINDS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "int": (pa.int64(), st.integers(-2, 2)),
    "float": (pa.float64(), st.sampled_from([0.0, -0.0, 1.5, math.inf, math.nan])),
    "text": (pa.string(), st.sampled_from(["", "a", "ab", "1:a"])),
    "bytes": (pa.binary(), st.sampled_from([b"", b"\0", b"\xff"])),
    "bool": (pa.bool_(), st.booleans()),
    "decimal": (pa.decimal128(10, 2), st.sampled_from([Decimal("1.00"), Decimal("1.01")])),
    "ints": (pa.list_(pa.int32()), st.lists(st.one_of(st.none(), st.integers(0, 1)), max_size=3)),
    "floats": (pa.list_(pa.float32()), st.lists(st.sampled_from([math.nan, 0.0, -0.0]), max_size=2)),
    "map": (
        pa.map_(pa.string(), pa.string()),
        st.lists(st.tuples(st.sampled_from("ab"), st.one_of(st.none(), st.sampled_from("xy"))), max_size=2),
    ),
}
NAMES = list(KINDS)
CELLS = st.tuples(*(st.one_of(st.none(), strategy) for _, strategy in KINDS.values()))
TEXTS = st.one_of(st.none(), st.dictionaries(st.sampled_from(NAMES[:2]), st.sampled_from(["x", "y"]), min_size=1))
ROW = st.tuples(CELLS, TEXTS)
TABLE = st.dictionaries(st.sampled_from("abcdefgh"), ROW)


def seen(value: Any) -> Any:
    """A value as it is told apart: NaN is NaN, and -0.0 is not 0.0."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else (value, math.copysign(1, value))
    if isinstance(value, list):
        return tuple(seen(v) for v in value)
    return value


def same(one: Any, other: Any) -> bool:
    return seen_row(one) == seen_row(other)


def seen_row(row: Any) -> Any:
    cells, texts = row
    return tuple(seen(c) for c in cells), tuple(sorted((texts or {}).items()))


def arrays(rows: list[Any], padding: int) -> tuple[list[pa.Array], pa.Array]:
    """Columns and texts of rows; behind `padding` other rows, so that offsets are not zero."""
    filler = ((1, 1.5, "pad", b"pad", True, Decimal("1.00"), [1, 1], [0.0], [("a", "x")]), {"int": "x"})
    padded = [filler] * padding + rows
    columns = [
        pa.array([row[0][i] for row in padded], kind).slice(padding) for i, (kind, _) in enumerate(KINDS.values())
    ]
    raw = pa.array([list(row[1].items()) if row[1] else None for row in padded], RAW_TYPE).slice(padding)
    return columns, raw


def side(table: dict[str, Any], padding: int) -> Rows:
    columns, raw = arrays(list(table.values()), padding)
    return Rows(pa.array(list(table), pa.string()), columns, raw)


@given(old=TABLE, new=TABLE, kept=st.sets(st.sampled_from("abcdefgh")), padding=st.integers(0, 3))
def test_rows_with_a_key(old: dict[str, Any], new: dict[str, Any], kept: set[str], padding: int) -> None:
    new = {**new, **{k: old[k] for k in kept if k in old}}
    found = by_key(side(old, padding), side(new, 0), NAMES)
    old_keys, new_keys = list(old), list(new)
    assert [new_keys[i] for i in found.inserted] == [k for k in new if k not in old]
    assert [old_keys[i] for i in found.deleted] == [k for k in old if k not in new]
    changed = [k for k in new if k in old and not same(old[k], new[k])]
    assert [new_keys[i] for i in found.updated_new] == changed
    assert [old_keys[i] for i in found.updated_old] == changed


@given(old=st.lists(ROW, max_size=8), new=st.lists(ROW, max_size=8), kept=st.integers(0, 8), padding=st.integers(0, 3))
def test_rows_without_a_key(old: list[Any], new: list[Any], kept: int, padding: int) -> None:
    new = new + old[:kept]
    texts = []
    for rows, pad in ((old, padding), (new, 0)):
        columns, raw = arrays(rows, pad)
        texts.append(row_texts(columns, raw, NAMES, rows=len(rows)))
    found = as_multisets(*texts)
    before, after = (Counter(text.to_pylist()) for text in texts)
    assert Counter(texts[1].take(pa.array(found.inserted)).to_pylist()) == after - before
    assert Counter(texts[0].take(pa.array(found.deleted)).to_pylist()) == before - after


def test_a_key_that_is_not_unique_is_refused() -> None:
    twice = Rows(pa.array(["a", "a"]), [], None)
    once = Rows(pa.array(["a"]), [], None)
    for old, new in ((twice, once), (once, twice), (once, Rows(pa.array([None], pa.string()), [], None))):
        with pytest.raises(NotUnique):
            by_key(old, new, [])


def test_nothing_against_nothing_is_nothing() -> None:
    empty = Rows(pa.array([], pa.string()), [pa.array([], pa.int64())], None)
    found = by_key(empty, empty, ["n"])
    assert isinstance(found, Found)
    assert found.rows == 0
    assert as_multisets(empty.keys, empty.keys).rows == 0


def test_nans_of_other_bits_are_one_value() -> None:
    odd = np.array([0x7FF8000000000000, 0x7FF8000000000001, 0xFFF8000000000000], np.uint64).view(np.float64)
    assert not differs(pa.array(odd, from_pandas=False), pa.array([math.nan] * 3)).any()
