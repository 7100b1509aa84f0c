"""Random programs of DDL and DML, with restarts and kills in between; at the end `verify` is the oracle.

Each program works on a few tables: columns come, go, are renamed, swap their names, come back under the same name and
change their types; keys and identities change; rows are written all the while. The seed stands in the report's header.
"""

from __future__ import annotations

import random
from pathlib import Path

import psycopg
import pytest

from tests.support.daemon import Daemon, execute

TYPES = (
    "int",
    "bigint",
    "text",
    "numeric(12,2)",
    "numeric(16,4)",
    "smallint",
    "date",
    "timestamptz",
    "text[]",
    "boolean",
)
TABLES = ("one", "two", "three")


class Program:
    """Statements for some tables; keeps no model of them but asks the catalog."""

    def __init__(self, dsn: str, rng: random.Random) -> None:
        self.dsn = dsn
        self.rng = rng
        self.count = 0

    def play(self, steps: int) -> None:
        for _ in range(steps):
            table = self.rng.choice(TABLES)
            with psycopg.connect(self.dsn) as connection:
                for _ in range(self.rng.choice([1, 1, 2, 3])):
                    self._attempt(connection, self._ddl(connection, table))
                    for _ in range(self.rng.randrange(4)):
                        self._attempt(connection, self._dml(connection, table))

    def _attempt(self, connection: psycopg.Connection, statement: str) -> None:
        """What the server refuses, or what is taken back by chance, never was."""
        connection.execute("savepoint s")
        try:
            connection.execute(statement.encode())
        except psycopg.Error:
            connection.execute("rollback to s")
            return
        if self.rng.random() < 0.1:
            connection.execute("rollback to s")

    def _columns(self, connection: psycopg.Connection, table: str) -> list[str]:
        rows = connection.execute(
            "select attname from pg_attribute where attrelid = %s::regclass and attnum > 1 and not attisdropped"
            " and attname <> 'id' order by attnum", [table],
        ).fetchall()  # fmt: skip
        return [name for (name,) in rows]

    def _key(self, connection: psycopg.Connection, table: str) -> str:
        row = connection.execute(
            "select conname from pg_constraint where conrelid = %s::regclass and contype = 'p'", [table]
        ).fetchone()
        return str(row[0]) if row else "none"

    def _ddl(self, connection: psycopg.Connection, table: str) -> str:
        self.count += 1
        n, rng, columns = self.count, self.rng, self._columns(connection, table)
        kind, key = rng.choice(TYPES), self._key(connection, table)
        add = f"alter table {table} add c{n % 5} {kind}" + rng.choice(["", "", " default null"])
        if not columns:
            return add
        one, two = rng.choice(columns), rng.choice(columns)
        new = f"{rng.choice(['int', 'bigint', 'smallint'])} using length({one}::text)"
        return rng.choice(
            [
                add,
                add,
                f"alter table {table} add d{n} int default {n}",
                f"alter table {table} add v{n} float8 default random()",
                f"alter table {table} drop {one}",
                f"alter table {table} rename {one} to r{n % 5}",
                f"alter table {table} rename {one} to x; alter table {table} rename {two} to {one};"
                f" alter table {table} rename x to {two}",
                f"alter table {table} drop {one}; alter table {table} add {one} {kind}",
                f"alter table {table} alter {one} type {new}",
                f"alter table {table} alter {one} type text",
                f"alter table {table} alter {one} set not null",
                f"alter table {table} alter {one} drop not null",
                f"alter table {table} alter id type {rng.choice(['bigint', 'int', 'text'])} using id::text::int",
                f"alter table {table} drop constraint {key}, add constraint {key} primary key (id, {one})",
                f"alter table {table} drop constraint {key}, add constraint {key} primary key (id)",
                f"alter table {table} replica identity {rng.choice(['full', 'default'])}",
                f"alter table {table} rename to between; alter table {TABLES[n % 3]} rename to {table};"
                f" alter table between rename to {TABLES[n % 3]}",
            ]
        )

    def _dml(self, connection: psycopg.Connection, table: str) -> str:
        self.count += 1
        rng, columns = self.rng, self._columns(connection, table)
        some = f"id::text like '%{rng.randrange(10)}'"
        statements = [f"insert into {table} (id) values ({self.count + 1000})", f"delete from {table} where {some}"]
        if columns:
            column = rng.choice(columns)
            statements += [
                f"update {table} set {column} = '{rng.randrange(100)}' where {some}",
                f"update {table} set {column} = null where {some}",
                f"insert into {table} (id, {column}) values ({self.count + 1000}, '{rng.randrange(100)}')",
            ]
        return rng.choice(statements)


def run(daemon: Daemon, rng: random.Random, rounds: int, steps: int) -> None:
    for table in TABLES:
        execute(
            daemon.dsn,
            f"create table {table} (id int primary key, a int, b text)",
            f"insert into {table} select g, g, repeat('b', g) from generate_series(1, 50) g",
        )
    program = Program(daemon.dsn, rng)
    with daemon:
        daemon.start().settled()
        for _ in range(rounds):
            program.play(steps)
            if rng.random() < 0.5:
                (daemon.kill if rng.random() < 0.5 else daemon.stop)()
                program.play(steps // 2)
                daemon.start()
            daemon.settled()
            daemon.verified()


@pytest.mark.matrix
def test_a_random_program_of_schema_changes_is_followed(tmp_path: Path, database: str, rng: random.Random) -> None:
    run(Daemon(tmp_path, database, source={"watch_every_s": 0.5}), rng, rounds=2, steps=6)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(8))
def test_long_random_programs_of_schema_changes_are_followed(
    tmp_path: Path, database: str, rng: random.Random, number: int
) -> None:
    rng = random.Random(rng.random() + number)
    run(Daemon(tmp_path, database, source={"watch_every_s": 0.5, "chunk_rows": 20}), rng, rounds=6, steps=15)
