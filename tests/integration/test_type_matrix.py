"""The whole type contract on a real server: every type that a column can have, through snapshot and stream.

One wide table has a column for every case of tests/support/typecases.py, and one for the array of its type; row k has
each column's k-th value. The rows come once by snapshot, once as inserts, then as updates that do not touch the values,
then as deletes. Every cell of the lake must be the same each time, byte for byte, and what the server says: by its text
for what is held as text, by its binary form for the rest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from psycopg import pq
from psycopg.adapt import Transformer

from connectors.postgres.catalog import describe
from connectors.postgres.connection import CANONICAL
from tests.support.daemon import Daemon
from tests.support.typecases import EVERY, SETUP, Case, same
from tests.support.witness import changelog

pytestmark = pytest.mark.matrix

_LISTS = {
    "list<item: date32[day]>": "date[]",
    "list<item: timestamp[us, tz=UTC]>": "timestamptz[]",
    "list<item: int32>": "int[]",
    "list<item: float>": "real[]",
}

STREAMED = 1000
"""The ids of the rows that are inserted while the stream runs are those of the snapshot's rows and this."""

# Types that a column can have, but for arrays of others and row types of tables.
CATALOG = """
select t.oid::int8, format_type(t.oid, null) from pg_type t left join pg_class c on c.oid = t.typrelid
where t.typtype <> 'p' and (t.typrelid = 0 or c.relkind = 'c')
  and not exists (select from pg_type e where e.typarray = t.oid)
"""

OF_DOMAINS = """
select attname from pg_attribute join pg_type t on t.oid = atttypid left join pg_type e on e.oid = t.typelem
where attrelid = 'public.every'::regclass and 'd' in (t.typtype, e.typtype)
"""


@dataclass(frozen=True, slots=True)
class Tried:
    """A column of the wide table: its values as expressions, first those that it holds, then those kept as text."""

    name: str
    declared: str
    arrow: str
    held: tuple[str, ...]
    raw: tuple[str, ...]

    @property
    def values(self) -> tuple[str, ...]:
        return self.held + self.raw


def tried(cases: Sequence[Case]) -> list[Tried]:
    """Two columns of every case: of its type, and of the array of it."""
    columns = []
    for number, case in enumerate(cases):
        held, raw = ([_expression(v, case.declared) for v in values] for values in (case.values, case.raw))
        columns.append(Tried(f"c{number}", case.declared, case.arrow, tuple(held), tuple(raw)))
        if case.array != "":
            columns.append(_array(f"a{number}", case, held, raw))
    return columns


def _expression(value: str, declared: str) -> str:
    return value if value.startswith("(select ") else f"{_quoted(value)}::{declared}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _array(name: str, case: Case, held: list[str], raw: list[str]) -> Tried:
    kind = f"{case.declared}[]"
    good, bad = [f"'{{}}'::{kind}", f"array[null]::{kind}"], []
    if held:
        good += [f"array[{held[0]}]::{kind}", f"array[{', '.join(held)}, null]::{kind}"]
        bad += [f"array_fill({held[0]}, array[1, 2])::{kind}", f"array_fill({held[0]}, array[1], array[0])::{kind}"]
        # An element that its type cannot hold takes the whole array with it; where elements are text, there is none.
        spoiled = good if re.search("string", case.array or case.arrow) else bad
        spoiled += [f"array[{held[0]}, {value}]::{kind}" for value in raw]
    if case.array == "string":
        good, bad = good + bad, []
    return Tried(name, kind, case.array or f"list<item: {case.arrow}>", tuple(good), tuple(bad))


def connect(dsn: str) -> psycopg.Connection[Any]:
    options = " ".join(f"-c {name}={value}" for name, value in CANONICAL.items())
    return psycopg.connect(dsn, autocommit=True, prepare_threshold=None, options=options)


def create(connection: psycopg.Connection[Any]) -> tuple[list[Tried], int]:
    """The wide table with its first rows; its columns, and the number of rows."""
    version = connection.info.server_version
    has_xml = connection.execute("select 1 from pg_config where name = 'CONFIGURE' and setting ~ 'libxml'").fetchall()
    connection.execute("set search_path = public")
    available = {name for (name,) in connection.execute("select name from pg_available_extensions").fetchall()}
    cases = [c for c in EVERY if c.since <= version < c.until and (not c.extension or c.extension in available)]
    for extension in sorted({c.extension for c in cases if c.extension}):
        connection.execute(f"create extension if not exists {extension} cascade".encode())
    connection.execute(SETUP.encode())
    connection.execute("insert into row_type select i, i::text from generate_series(1, 50) i; analyze row_type")
    connection.execute("create table with_default (a int default 1 + 1)")
    if not has_xml:  # the type is there, but no value of it can be made
        cases = [Case("xml") if c.declared == "xml" else c for c in cases]
    columns = tried(cases)
    declared = ", ".join(f"{c.name} {c.declared}" for c in columns)
    connection.execute(f"create table every (id int primary key, touched int, {declared})".encode())
    connection.execute("alter table every replica identity full")
    rows = max(len(c.values) for c in columns) + 1  # the last one is NULL throughout
    for row in range(rows):
        given = [c for c in columns if row < len(c.values)]
        names = ", ".join(["id", *(c.name for c in given)])
        values = ", ".join([str(row), *(c.values[row] for c in given)])
        connection.execute(f"insert into every ({names}) values ({values})".encode())
    connection.execute("reset search_path")
    return columns, rows


def test_every_type_comes_exact_and_the_same_by_snapshot_and_stream(database: str, tmp_path: Path) -> None:
    with connect(database) as connection:
        columns, rows = create(connection)
        assert _forgotten(connection) == []
        names = ", ".join(c.name for c in columns)
        with Daemon(tmp_path, database, source={"tables": ["public.every"]}) as daemon:
            daemon.start().settled()
            copied = f"insert into public.every (id, {names}) select id + {STREAMED}, {names} from public.every"
            connection.execute(copied.encode())
            connection.execute("update public.every set touched = 1")
            daemon.settled().verified()
            held = {c["name"]: c["held"] for c in daemon.ask("tables").document["tables"][0]["columns"]}
            connection.execute(f"delete from public.every where id >= {STREAMED}".encode())
            daemon.settled().verified()
            kept = _counted(daemon.http("/metrics")[1])
        changes = changelog(daemon.lake, "public.every")
        cells = _same_in_every_change(changes, columns, rows)
        wrong = [text for c in columns for text in _wrong(connection, c, cells)]
        assert wrong == []
        # Each value came by snapshot, insert, two updates with the old row beside the new one, and a delete.
        assert kept == {c.name: 7 * len(c.raw) for c in columns if c.raw}
        assert [c.name for c in columns if _told(held[c.name]) != (c.arrow if c.arrow != "string" else "text")] == []


def _forgotten(connection: psycopg.Connection[Any]) -> list[str]:
    """Types of the server that no column of the table has."""
    used = connection.execute(
        "select atttypid::int8 from pg_attribute where attrelid = 'public.every'::regclass and attnum > 0"
    ).fetchall()
    return [name for oid, name in connection.execute(CATALOG).fetchall() if (oid,) not in used]


def _told(held: str) -> str:
    """The Arrow type that `cdc tables` names, or "text"."""
    found = re.match(r"exact: ([^;]+)", held)
    return found[1] if found else held.split()[0]


def _counted(exposition: str) -> dict[str, int]:
    found = re.findall(r'^cdc_values_kept_as_text_total\{column="(\w+)".*\} ([0-9.]+)$', exposition, re.MULTILINE)
    return {column: int(float(count)) for column, count in found}


def _same_in_every_change(changes: pa.Table, columns: list[Tried], rows: int) -> pa.Table:
    """The cells of the snapshot's rows, after every other change has been found to hold the same ones."""
    ids = changes["id"].to_pylist()
    places: dict[str, list[int]] = {}
    for place, (op, id) in enumerate(zip(changes["_op"].to_pylist(), ids, strict=True)):
        places.setdefault(op if id is not None and id < STREAMED else f"{op} streamed", []).append(place)
    places.pop("s streamed")
    assert Counter({k: len(v) for k, v in places.items()}) == Counter(
        dict.fromkeys(("r", "c streamed", "u", "u streamed", "d streamed"), rows)
    )
    ordered = {k: sorted(v, key=lambda place: ids[place]) for k, v in places.items()}
    before = pa.table({c.name: _old(changes["_before"], c.name) for c in columns})
    names = [c.name for c in columns]
    cells = changes.select(names)
    expected = _bytes(cells.take(ordered["r"]))
    for at in ordered.values():
        for image in (cells, before) if changes["_op"][at[0]].as_py() == "u" else (cells,):
            got = _bytes(image.take(at))
            assert [c.declared for c, a, b in zip(columns, expected, got, strict=True) if a != b] == []
    raw = _raw_by_change(changes, ordered, set(names))
    assert all(texts == raw["r"] for texts in raw.values())
    return changes.select([*names, "_raw"]).take(ordered["r"])


def _old(before: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    return pa.chunked_array([chunk.flatten()[chunk.type.get_field_index(name)] for chunk in before.chunks])


def _bytes(cells: pa.Table) -> list[bytes]:
    """Every column as bytes: equal if and only if each cell is, down to the sign of a zero."""
    batch = cells.combine_chunks().to_batches()[0]
    return [pa.RecordBatch.from_arrays([a], ["c"]).serialize().to_pybytes() for a in batch.columns]


def _raw_by_change(
    changes: pa.Table, ordered: dict[str, list[int]], names: set[str]
) -> dict[str, list[dict[str, str]]]:
    """What is kept as text, by kind of change and row; that of old rows under a name of its own."""
    raw = changes["_raw"].to_pylist()
    found = {kind: [{k: v for k, v in raw[i] or () if k in names} for i in at] for kind, at in ordered.items()}
    for kind in ("u", "u streamed"):
        old = [{k.removeprefix("before."): v for k, v in raw[i] or () if k not in names} for i in ordered[kind]]
        found[f"before {kind}"] = old
    return found


def _wrong(connection: psycopg.Connection[Any], column: Tried, cells: pa.Table) -> list[str]:
    """What is not as the server says in one column, in words."""
    array = cells[column.name].combine_chunks()
    declared = "map<string, string>" if pa.types.is_map(array.type) else str(array.type).replace("element", "item")
    if declared != column.arrow:
        return [f"{column.declared} is held by {declared}, not {column.arrow}"]
    kept = [dict(raw or ()).get(column.name) for raw in cells["_raw"].to_pylist()]
    texts = _texts(connection, f"select {column.name} from public.every order by id")
    wrong = []
    masked = range(len(column.held), len(column.values))
    for row, text in enumerate(texts):
        if (kept[row] is not None) != (row in masked):
            wrong.append(f"{column.declared} row {row}: {'not ' if row in masked else ''}kept as text: {text!r}")
        elif row in masked and (kept[row] != _as_kept(text) or array[row].as_py() is not None):
            wrong.append(f"{column.declared}: {text!r} is kept as {kept[row]!r}, {array[row]}")
    expected = _expected(connection, column, texts)
    for row in range(len(texts)):
        if row not in masked and not same(array[row].as_py(), expected[row]):
            wrong.append(f"{column.declared}: {expected[row]!r} ({texts[row]!r}) is held as {array[row]!r}")
    return wrong


def _as_kept(text: bytes | None) -> str | None:
    """Text is kept as it is; what is no text, as the hexadecimal of its bytes."""
    try:
        return None if text is None else text.decode()
    except UnicodeDecodeError:
        assert text is not None
        return "\\x" + text.hex()


def _expected(connection: psycopg.Connection[Any], column: Tried, texts: list[bytes | None]) -> list[Any]:
    """The values of the rows that the column holds, as the server tells them without our reading its text forms."""
    if column.arrow == "string":
        return [None if t is None or (row >= len(column.held) and row < len(column.values)) else t.decode()
                for row, t in enumerate(texts)]  # fmt: skip
    if column.arrow == "list<item: string>":
        return [
            None
            if t is None
            else [
                None if e is None else e.decode()
                for e in _texts(
                    connection,
                    f"select {column.name}[k] from public.every, generate_subscripts({column.name}, 1) k"
                    f" where id = {row} order by k",
                )
            ]
            if row not in range(len(column.held), len(column.values))
            else None
            for row, t in enumerate(texts)
        ]
    expression = column.name
    if column.arrow == "map<string, string>":
        expression = f"public.hstore_to_matrix({expression})"
    elif column.arrow in _LISTS:  # of a domain, or a vector: the client knows no binary form of these
        expression = f"{expression}::{_LISTS[column.arrow]}"
    held = f"case when id not between {len(column.held)} and {len(column.values) - 1} then {expression} end"
    values = _binary(connection, f"select {held} from public.every order by id")
    if column.arrow == "map<string, string>":
        return [None if v is None else [tuple(pair) for pair in v] for v in values]
    return values


def _texts(connection: psycopg.Connection[Any], query: str) -> list[bytes | None]:
    with connection.cursor() as cursor:
        result = cursor.execute(query.encode()).pgresult
        assert result is not None
        assert result.fformat(0) == pq.Format.TEXT
        return [result.get_value(row, 0) for row in range(result.ntuples)]


def _binary(connection: psycopg.Connection[Any], query: str) -> list[Any]:
    with connection.cursor(binary=True) as cursor:
        result = cursor.execute(query.encode()).pgresult
        assert result is not None
        loader = Transformer.from_context(connection).get_loader(result.ftype(0), pq.Format.BINARY)
        cells = [result.get_value(row, 0) for row in range(result.ntuples)]
        return [None if cell is None else loader.load(cell) for cell in cells]


def test_the_missing_value_of_a_new_column_is_what_the_old_rows_show(database: str) -> None:
    with connect(database) as connection:
        columns = create(connection)[0]
        domains = {name for (name,) in connection.execute(OF_DOMAINS).fetchall()}  # a new one makes every row anew
        without_default = re.compile("select|regrole|é")
        columns = [
            c for c in columns if c.values and not without_default.search(c.values[-1]) and c.name not in domains
        ]
        connection.execute("create table public.old (id int primary key); insert into public.old values (1)")
        connection.execute("set search_path = public")
        added = ", ".join(f"add {c.name} {c.declared} default {c.values[-1]}" for c in columns)
        connection.execute(f"alter table old {added}".encode())
        connection.execute("reset search_path")
        oid = connection.execute("select 'public.old'::regclass::oid::int8").fetchall()[0][0]
        found = {c.name: c.missing for c in describe(connection, [oid])[oid].schema.columns}
        shown = {c.name: _texts(connection, f"select {c.name} from public.old")[0] for c in columns}
    assert [(c.declared, shown[c.name]) for c in columns if found[c.name] != _as_kept(shown[c.name])] == []
