"""A target table as the catalog has it, and the one statement that writes a staged batch into it.

Types are checked against the catalog before the first row. Values are cast to the *base* type of a column without its
modifier and then assigned: so a text that is too long is refused, never cut, and domains and modifiers do their checks.
It does not read or write rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
import pyarrow as pa
from psycopg import sql

from cdc.errors import TargetRejected
from cdc.ports import Finding

_NAME = re.compile(r'(?:(?P<schema>"(?:[^"]|"")+"|[^".]+)\.)?(?P<name>"(?:[^"]|"")+"|[^".]+)')

_TABLE = """
SELECT c.oid, c.relkind FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s AND c.relname = %s"""

_COLUMNS = """
SELECT a.attname, a.attnum, a.attidentity, a.attgenerated, tn.nspname, t.typname, t.typcategory = 'A',
       pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'SELECT'),
       pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'INSERT'),
       pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'UPDATE')
FROM pg_catalog.pg_attribute a
CROSS JOIN LATERAL (
    WITH RECURSIVE d AS (
        SELECT t.oid, t.typtype, t.typbasetype FROM pg_catalog.pg_type t WHERE t.oid = a.atttypid
        UNION ALL
        SELECT t.oid, t.typtype, t.typbasetype FROM d JOIN pg_catalog.pg_type t ON t.oid = d.typbasetype
        WHERE d.typtype = 'd'
    )
    SELECT d.oid FROM d WHERE d.typtype <> 'd'
) base
JOIN pg_catalog.pg_type t ON t.oid = base.oid JOIN pg_catalog.pg_namespace tn ON tn.oid = t.typnamespace
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum"""

_UNIQUE = """
SELECT (i.indkey::pg_catalog.int2[])[0:i.indnkeyatts - 1]
FROM pg_catalog.pg_index i
WHERE i.indrelid = %s AND i.indisunique AND i.indimmediate AND i.indisvalid AND i.indpred IS NULL
  AND i.indexprs IS NULL"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetColumn:
    """A column: schema and name of its base type, and what may be done with it."""

    name: str
    attnum: int
    identity: str
    generated: str
    base_type: tuple[str, str]
    is_array: bool
    may_select: bool
    may_insert: bool
    may_update: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTable:
    """The table at one moment; `unique` are the column sets that ON CONFLICT can go by."""

    oid: int
    schema: str
    relation: str
    relkind: str
    user: str
    columns: dict[str, TargetColumn]
    unique: frozenset[frozenset[int]]

    @property
    def name(self) -> str:
        return f"{self.schema}.{self.relation}"

    @property
    def quoted(self) -> str:
        return f"{quoted(self.schema)}.{quoted(self.relation)}"

    def require(self, rows: pa.Schema, key: Sequence[str]) -> None:
        """TargetRejected unless rows of this shape can be written by this key."""
        for problem in self.problems(rows.names, key):
            if problem.severity == "error":
                raise TargetRejected(problem.message, hint=problem.fix)
        for field in rows:
            nested = pa.types.is_list(field.type) or pa.types.is_large_list(field.type)
            if nested and not self.columns[field.name].is_array:
                raise TargetRejected(
                    f"column {field.name} of the result is a list, but no array in {self.name}",
                    hint=f"write to_json({field.name}) in the query if the column holds json",
                )

    def problems(self, columns: Sequence[str], key: Sequence[str]) -> list[Finding]:
        """What stands in the way, each with the statement that mends it."""
        found: list[Finding] = []

        def error(name: str, message: str, fix: str) -> None:
            found.append(Finding(name=name, severity="error", message=message, fix=fix, object=self.name))

        if self.relkind not in ("r", "p"):
            error("table", f"{self.name} is no table", "push into a table; ON CONFLICT works on nothing else")
            return found
        missing = [c for c in dict.fromkeys([*columns, *key]) if c not in self.columns]
        if missing:
            error(
                "columns",
                f"{self.name} has no column {', '.join(missing)}",
                "add it to the table, or leave it out of the query",
            )
        used = [self.columns[c] for c in dict.fromkeys([*columns, *key]) if c in self.columns]
        for column in used:
            if column.generated or column.identity == "a":
                error("columns", f"{self.name}.{column.name} is generated always", "leave it out of the query")
        self._privileges(used, key, error)
        if not missing and frozenset(self.columns[k].attnum for k in key) not in self.unique:
            error(
                "key",
                f"{self.name} has no unique index on ({', '.join(key)}) that is neither partial nor deferrable",
                f"CREATE UNIQUE INDEX ON {self.quoted} ({', '.join(map(quoted, key))})",
            )
        return found

    def _privileges(self, used: Sequence[TargetColumn], key: Sequence[str], error: Any) -> None:
        lacking = []
        if not all(c.may_select for c in used):
            lacking.append("SELECT")
        if not all(c.may_insert for c in used):
            lacking.append("INSERT")
        if not all(c.may_update for c in used if c.name not in key):
            lacking.append("UPDATE")
        if lacking:
            rights = ", ".join(lacking)
            error(
                "privileges",
                f"the role may not {rights} on {self.name}",
                f"GRANT {rights} ON {self.quoted} TO {quoted(self.user)}",
            )

    def insert_statement(self, columns: Sequence[str], key: Sequence[str]) -> sql.Composed:
        """Writes what stands in `pg_temp.cdc_stage` (texts c0, c1, …); rows that are equal already stay untouched."""
        names = sql.SQL(", ").join(map(sql.Identifier, columns))
        values = sql.SQL(", ").join(
            sql.SQL("s.{}::{}").format(sql.Identifier(f"c{i}"), sql.Identifier(*self.columns[column].base_type))
            for i, column in enumerate(columns)
        )
        others = [c for c in columns if c not in key]
        if others:
            # Compared by image, not by the types' own equality: json has none, and citext or a non-deterministic
            # collation would call a changed text equal.
            action = sql.SQL("UPDATE SET {} WHERE pg_catalog.record_image_ne(ROW({}), ROW({}))").format(
                sql.SQL(", ").join(sql.SQL("{0} = excluded.{0}").format(sql.Identifier(c)) for c in others),
                sql.SQL(", ").join(sql.Identifier("o", c) for c in others),
                sql.SQL(", ").join(sql.Identifier("excluded", c) for c in others),
            )
        else:
            action = sql.SQL("NOTHING").format()
        return sql.SQL("INSERT INTO {} AS o ({}) SELECT {} FROM pg_temp.cdc_stage s ON CONFLICT ({}) DO {}").format(
            sql.Identifier(self.schema, self.relation),
            names,
            values,
            sql.SQL(", ").join(map(sql.Identifier, key)),
            action,
        )


def read_table(connection: psycopg.Connection[Any], table: str) -> TargetTable:
    """The table of that name (`schema.table`, schema public if left out) now; TargetRejected if there is none."""
    schema, relation = split_name(table)
    row = connection.execute(_TABLE, (schema, relation)).fetchone()
    if row is None:
        raise TargetRejected(
            f"there is no table {schema}.{relation} in the target", hint="create it, or correct `table` of the sync"
        )
    columns = [
        TargetColumn(
            name=c[0],
            attnum=c[1],
            identity=c[2],
            generated=c[3],
            base_type=(c[4], c[5]),
            is_array=c[6],
            may_select=c[7],
            may_insert=c[8],
            may_update=c[9],
        )
        for c in connection.execute(_COLUMNS, (row[0],)).fetchall()
    ]
    unique = connection.execute(_UNIQUE, (row[0],)).fetchall()
    return TargetTable(
        oid=row[0],
        schema=schema,
        relation=relation,
        relkind=row[1],
        user=connection.info.user,
        columns={c.name: c for c in columns},
        unique=frozenset(frozenset(u[0]) for u in unique),
    )


def split_name(table: str) -> tuple[str, str]:
    """Schema and name of `schema.table` (double quotes where a name holds a dot); TargetRejected if it is neither."""
    match = _NAME.fullmatch(table.strip())
    if match is None:
        raise TargetRejected(f"{table} is no name of a table", hint='write "schema.table"')
    return _unquoted(match["schema"] or "public"), _unquoted(match["name"])


def quoted(name: str) -> str:
    """The name as a quoted SQL identifier, for hints."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def _unquoted(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name
