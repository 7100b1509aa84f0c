"""Injuries done to a lake behind the product's back: rows of `current` changed in its files, which keep their names.

What wrote them is no Delta commit, so nothing but a comparison with the source can find them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

Row = dict[str, Any]


def files(lake: Path, table: str) -> list[Path]:
    """The live files of `current`."""
    folder = lake / "shop" / f"public.{table}" / "current"
    return sorted(folder / path for path in DeltaTable(str(folder)).get_add_actions().column("path").to_pylist())


def rewrite(path: Path, change: Callable[[list[Row]], list[Row] | None]) -> None:
    """Change the rows of one file (in place, or what is returned)."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    changed = change(rows)
    pq.write_table(pa.Table.from_pylist(rows if changed is None else changed, table.schema), path)


@contextmanager
def injured(lake: Path, table: str, change: Callable[[list[Row]], list[Row] | None]) -> Iterator[None]:
    """A table of one file with changed rows, for as long as the block runs."""
    (path,) = files(lake, table)
    before = path.read_bytes()
    rewrite(path, change)
    try:
        yield
    finally:
        path.write_bytes(before)


def random_injuries(lake: Path, table: str, count: int, rng: random.Random) -> dict[str, set[int]]:
    """Missing rows, extra ones and wrong cells, spread over the files of a table with an integer key `id`; the ids by
    kind. Extra rows have negative ids."""
    done: dict[str, set[int]] = {"missing": set(), "extra": set(), "different": set()}
    places = files(lake, table)
    for number, path in enumerate(places):
        share = count // len(places) + (number < count % len(places))

        def injure(rows: list[Row], share: int = share) -> list[Row]:
            gone = set()
            columns = [name for name in rows[0] if name != "id" and not name.startswith("_")]
            for place in rng.sample(range(len(rows)), share):
                row, kind = rows[place], rng.choice(sorted(done))
                if kind == "missing":
                    gone.add(place)
                elif kind == "extra":
                    rows.append({**row, "id": -row["id"]})
                else:
                    name = rng.choice(columns)
                    other = next(r[name] for r in rng.sample(rows, len(rows)) if r[name] != row[name])
                    rows[place] = {**row, name: other}
                done[kind].add(-row["id"] if kind == "extra" else row["id"])
            return [row for place, row in enumerate(rows) if place not in gone]

        rewrite(path, injure)
    return done
