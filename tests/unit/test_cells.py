"""Cells compared under a memory limit, whatever the shape of the rows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from cdc.batch import RAW_TYPE
from cdc.cells import KEY, RAW, TEXTS, Cells

COLUMNS = 1_600
"""As many as a table of Postgres can have."""
NAMES = [f"n{i}" for i in range(COLUMNS)]


def wide(ids: list[int], wrong: dict[tuple[int, int], str], *, keyed: bool) -> pa.Table:
    """Rows of 1,600 texts; `wrong`: cells (id, column) that are otherwise."""
    columns = {f"c{i}": [wrong.get((n, i), f"row {n} column {i}") for n in ids] for i in range(COLUMNS)}
    keys = {KEY: [str(n) for n in ids], TEXTS: [{"k": str(n)} for n in ids]} if keyed else {}
    return pa.table({**keys, RAW: pa.nulls(len(ids), RAW_TYPE), **columns})


def test_rows_of_as_many_columns_as_postgres_allows_are_compared(tmp_path: Path) -> None:
    cells = Cells(tmp_path, NAMES)
    cells.write("theirs", [wide(list(range(40)), {}, keyed=True)])
    wrong = {(3, 0): "x", (3, 1_599): "x", (4, 1_599): "y"}
    cells.write("ours", [wide([*range(1, 40), 99, 5], wrong, keyed=True)])
    found = cells.compare([], shown_max=10, texts_max=10)
    assert found.keys == {"missing": ["0"], "extra": ["5", "99"], "different": ["3", "4"]}
    assert found.counts == {"missing": 1, "extra": 2, "different": 2}
    assert found.columns == {"n0": 1, "n1599": 2}


def test_rows_of_as_many_columns_without_a_key_are_compared(tmp_path: Path) -> None:
    cells = Cells(tmp_path, NAMES)
    cells.write("theirs", [wide([1, 2, 2, 3], {}, keyed=False)])
    cells.write("ours", [wide([1, 2, 3, 4], {}, keyed=False)])
    assert cells.compare_multisets().counts == {"missing": 1, "extra": 1, "different": 0}
