"""The plainest comparison of a table with its `current`: all rows of both as text, sorted, side by side.

It shares nothing with `verify`: the source is asked by SELECT, the lake read with deltalake, so a fault of the one does
not hide in the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
from deltalake import DeltaTable
from psycopg import sql

Rows = list[tuple[str, ...]]
NULL = "\0NULL"


def differences(dsn: str, lake: Path, table: str, *, where: str = "", source: str = "shop") -> list[str]:
    """What is in one and not in the other, row by row; empty if they are equal. `where`: what is published of it."""
    columns = columns_of(dsn, table)
    theirs, ours = in_source(dsn, table, columns, where), in_lake(lake, table, columns, source=source)
    if theirs == ours:
        return []
    told = [f"{table}: {len(theirs)} rows in the source, {len(ours)} in the lake"]
    for name, these, those in (("source", theirs, list(ours)), ("lake", ours, list(theirs))):
        for row in these:
            if row in those:
                those.remove(row)
            else:
                told.append(f"only in the {name}: {dict(zip(columns, (v[:40] for v in row), strict=True))}")
    return told


def columns_of(dsn: str, table: str) -> list[str]:
    with psycopg.connect(dsn) as connection:
        found = connection.execute(
            "select attname from pg_attribute where attrelid = %s::regclass and attnum > 0 and not attisdropped"
            " order by attnum", [table],
        ).fetchall()  # fmt: skip
    return [str(name) for (name,) in found]


def in_source(dsn: str, table: str, columns: list[str], where: str = "") -> Rows:
    query = sql.SQL("select {} from {} {}").format(
        sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(c)) for c in columns),
        sql.Identifier(table),
        sql.SQL(f"where {where}" if where else ""),
    )
    with psycopg.connect(dsn) as connection:
        return sorted(tuple(NULL if v is None else v for v in row) for row in connection.execute(query).fetchall())


def in_lake(lake: Path, table: str, columns: list[str], *, source: str = "shop") -> Rows:
    """Only columns whose text needs no thought: numbers, booleans, text."""
    current = DeltaTable(str(lake / source / f"public.{table}" / "current")).to_pyarrow_table()
    missing = [c for c in columns if c not in current.column_names]
    assert not missing, f"{table}: the lake has no column {missing}"
    values = [current.column(c).to_pylist() for c in columns]
    return sorted(tuple(_text(v) for v in row) for row in zip(*values, strict=True))


def _text(value: Any) -> str:
    return NULL if value is None else value if isinstance(value, str) else str(value)
