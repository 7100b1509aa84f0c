"""Types where the way matters: declared columns, special values as keys, bytes that are no text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc.batch import Batch
from cdc.config import SourceConfig
from cdc.errors import SourceRefused
from cdc.table import TableId, TableSchema
from connectors.postgres.admin import PostgresAdmin
from connectors.postgres.embedded import EmbeddedPostgres
from connectors.postgres.snapshot import PostgresSnapshotReader
from connectors.postgres.source import PostgresSource
from tests.support.daemon import Daemon, execute
from tests.support.postgres import drop_database
from tests.support.waiting import wait_until
from tests.support.witness import changelog

KEYS = {
    "date": ("-infinity", "0044-03-15 BC", "2024-01-01", "10000-01-01", "infinity"),
    "timestamptz": ("-infinity", "0044-03-15 01:02:03+00 BC", "2024-01-01 00:00:00+00", "infinity"),
    "numeric(10,2)": ("-1.50", "0", "NaN"),
    "float8": ("-Infinity", "-0", "5e-324", "Infinity", "NaN"),
    "bytea": ("", "\\x00", "\\xff"),
}
"""Values of a key, many of them such as the lake's column cannot hold."""

DECLARED = """
[source.shop.table."public.declared"]
columns.amount = { type = "decimal(12,3)" }
columns.amounts = { type = "decimal(12,3)" }
columns.numbers = { type = "string" }
columns.absent = { type = "string" }
"""


def test_special_values_are_keys_and_declared_types_hold_what_fits(database: str, tmp_path: Path) -> None:
    keyed = {f"k{number}": (kind, values) for number, (kind, values) in enumerate(KEYS.items())}
    execute(
        database,
        *(f"create table {name} (id {kind} primary key, n int)" for name, (kind, _) in keyed.items()),
        *(f"insert into {name} values ('{v}', 1)" for name, (_, values) in keyed.items() for v in values),
        "create table declared (id int primary key, amount numeric, amounts numeric[], numbers int[])",
    )
    rows = [
        "(1, 1.5, '{1.5,NULL}', '{1,2}')",
        "(2, 123456789.999, '{}', '{{1},{2}}')",
        "(3, 1.0001, '{1,1.0001}', null)",
        "(4, 1234567890, '{NaN}', '[0:0]={1}')",
        "(5, 'Infinity', null, '{}')",
    ]
    execute(database, *(f"insert into declared values {row}" for row in rows))
    with Daemon(tmp_path, database, source={"chunk_rows": 2}, more=DECLARED) as daemon:
        checked = {f["message"]: f["severity"] for f in daemon.ask("check").document["findings"]}
        daemon.start().settled()
        execute(
            database,
            *(f"update {name} set n = 2" for name in keyed),
            "update declared set id = id + 10",
            *(f"insert into declared values {row}" for row in rows),
        )
        daemon.settled().verified()
        for name, (_, values) in keyed.items():
            assert daemon.ask("query", f"select n, count(*) from shop.{name} group by 1").document["rows"] == [
                [2, len(values)]
            ]
        told = {t["table"]: t["columns"] for t in daemon.ask("tables").document["tables"]}["public.declared"]
    assert checked["table public.declared has no column 'absent', but a type is declared for it"] == "warning"
    assert {c["name"]: c["held"].partition(";")[0] for c in told} == {
        "id": "exact: int32",
        "amount": "exact: decimal128(12, 3) (as configured)",
        "amounts": "exact: list<item: decimal128(12, 3)> (as configured)",
        "numbers": "text as Postgres prints it (as configured)",
    }
    landed = changelog(daemon.lake, "public.declared")
    names = ["id", "amount", "amounts", "numbers", "_raw"]
    by_op = {op: [_told(r, names) for r in landed.to_pylist() if r["_op"] == op] for op in ("r", "u", "c")}
    assert by_op["r"] == by_op["c"] == [(i + 1, *row) for i, row in enumerate(LANDED)]
    assert by_op["u"] == [(i + 11, *row) for i, row in enumerate(LANDED)]


LANDED: list[tuple[Any, ...]] = [
    ("1.500", ["1.500", None], "{1,2}", {}),
    ("123456789.999", [], "{{1},{2}}", {}),
    (None, None, None, {"amount": "1.0001", "amounts": "{1,1.0001}"}),
    (None, None, "[0:0]={1}", {"amount": "1234567890", "amounts": "{NaN}"}),
    (None, None, "{}", {"amount": "Infinity"}),
]


def _told(row: dict[str, Any], names: list[str]) -> tuple[Any, ...]:
    id, amount, amounts, numbers, raw = (row[name] for name in names)
    texts = None if amounts is None else [None if a is None else str(a) for a in amounts]
    return id, None if amount is None else str(amount), texts, numbers, dict(raw or ())


def test_a_type_that_a_column_cannot_be_declared_is_refused_with_what_mends_it(database: str, tmp_path: Path) -> None:
    execute(database, "create table wrong (id int primary key, note text)")
    section = '[source.shop.table."public.wrong"]\ncolumns.note = { type = "decimal(5,2)" }'
    daemon = Daemon(tmp_path, database, more=section)
    findings = [f for f in daemon.ask("check").document["findings"] if f["name"] == "declared column"]
    assert [(f["severity"], f["fix"]) for f in findings] == [("error", 'declare it "string", or nothing')]
    assert 'column note is text, not numeric: it cannot be "decimal(5,2)"' in findings[0]["message"]


class Book:
    """A schema book that forgets."""

    def register(self, schema: TableSchema) -> TableSchema:
        return replace(schema, version=1)

    def versions(self, table: TableId) -> list[TableSchema]:
        return []

    def held(self, table: TableId) -> TableSchema | None:
        return None


@pytest.fixture
def bytes_only(server: EmbeddedPostgres) -> Iterator[SourceConfig]:
    """A database that says nothing of its encoding, with a table whose texts are in two."""
    name = "types_ascii"
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"create database {name} encoding 'SQL_ASCII' template template0 lc_collate 'C' lc_ctype 'C'")
    config = SourceConfig(name="ascii", dsn=server.dsn(name), slot=name, publication=(name,))
    with psycopg.connect(config.dsn, autocommit=True, client_encoding="SQL_ASCII") as connection:
        connection.execute("create table public.mixed (id int primary key, note text, notes text[], n int)")
        connection.execute("create table public.odd_key (id text primary key)")
    PostgresAdmin(config).setup(dry_run=False)
    yield config
    drop_database(server, name)


@pytest.mark.matrix
def test_text_that_is_not_utf8_is_kept_as_hex_by_snapshot_and_stream(bytes_only: SourceConfig) -> None:
    texts = [b"caf\xe9", "café".encode(), b"plain", b"\\xe9"]
    with psycopg.connect(bytes_only.dsn, autocommit=True, client_encoding="SQL_ASCII") as connection:
        for number, text in enumerate(texts):
            connection.execute(
                b"insert into public.mixed values (%d, E'%s', array[E'%s'], 1)"
                % (number, text.replace(b"\\", b"\\\\"), text.replace(b"\\", b"\\\\"))
            )
        connection.execute(b"insert into public.odd_key values (E'\\xe9')")
    reader = PostgresSnapshotReader(bytes_only)
    source = PostgresSource(bytes_only)
    try:
        schemas = {str(found.schema.table): found.schema for found in reader.tables().tables}
        reader.begin(schemas["public.mixed"])
        rows = reader.read()
        reader.begin(schemas["public.odd_key"])
        with pytest.raises(SourceRefused, match="key column 'id' holds text that is not UTF-8"):
            reader.read()
        source.open(None, Book(), 1)
        batches: list[Batch] = []

        def streamed() -> bool:
            portion = source.read(1.0)
            batches.extend(portion.batches if portion is not None else ())
            return sum(batch.data.num_rows for batch in batches) == len(texts) + 1

        wait_until(streamed, message="the rows to be streamed")
    finally:
        reader.end()
        reader.close()
        source.close()
    kept = {"note": "\\x636166e9", "notes": "\\x" + b"{caf\xe9}".hex()}
    cells = [[0, None, None, 1], [1, "café", ["café"], 1], [2, "plain", ["plain"], 1], [3, "\\xe9", ["\\xe9"], 1]]
    assert rows.raw is not None
    assert [dict(raw or ()) for raw in rows.raw.to_pylist()] == [kept, {}, {}, {}]
    assert [list(row) for row in zip(*(c.to_pylist() for c in rows.columns), strict=True)] == cells
    mixed = [batch for batch in batches if batch.table.name == "mixed"]
    assert [_raw(batch, i) for batch in mixed for i in range(batch.data.num_rows)] == [kept, {}, {}, {}]
    assert [
        [batch.column(name)[i].as_py() for name in ("id", "note", "notes", "n")]
        for batch in mixed
        for i in range(batch.data.num_rows)
    ] == cells
    assert [_raw(batch, 0) for batch in batches if batch.table.name == "odd_key"] == [{"id": "\\xe9"}]


def test_a_byte_that_an_encoding_does_not_define_is_told_with_what_finds_it(server: EmbeddedPostgres) -> None:
    name = "types_latin"
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"create database {name} encoding 'WIN1252' template template0 lc_collate 'C' lc_ctype 'C'")
    config = SourceConfig(name="latin", dsn=server.dsn(name), slot=name, publication=(name,))
    reader = PostgresSnapshotReader(config)
    try:
        with psycopg.connect(config.dsn, autocommit=True, client_encoding="UTF8") as connection:
            connection.execute("create table public.notes (id int primary key, note text)")
            connection.execute("insert into public.notes values (1, 'café €')")
            connection.execute("create publication types_latin for table public.notes")
            schema = reader.tables().tables[0].schema
            reader.begin(schema)
            assert reader.read().columns[1].to_pylist() == ["café €"]
            connection.execute("set client_encoding to 'SQL_ASCII'")
            connection.execute(b"insert into public.notes values (2, E'\\x81')")
        reader.begin(schema)
        with pytest.raises(SourceRefused, match="bytes that are no character") as refused:
            reader.read()
        assert "convert_to(column, 'UTF8')" in refused.value.hint
    finally:
        reader.end()
        reader.close()
        drop_database(server, name)


def _raw(batch: Batch, row: int) -> dict[str, str]:
    return dict(batch.system("_raw")[row].as_py() or ())
