"""A target table as the catalog has it, and whether it can take what a sync assigns to it.

All is checked against the catalog before the first row: columns, privileges, keys, and types that can never go into one
another (connectors.postgres.target_types). It does not read or write rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg
import pyarrow as pa

from cdc.errors import TargetRejected
from cdc.ports import Finding
from cdc.sink import Assignment
from connectors.postgres.target_types import mismatch

_NAME = re.compile(r'(?:(?P<schema>"(?:[^"]|"")+"|[^".]+)\.)?(?P<name>"(?:[^"]|"")+"|[^".]+)')

_ROUNDING = ("numeric", "timestamp", "timestamptz", "time", "timetz", "interval")
"""Types whose modifier rounds."""

_TABLE = """
SELECT c.oid, c.relkind, pg_catalog.format('%%I.%%I', n.nspname, c.relname),
       pg_catalog.has_table_privilege(c.oid, 'DELETE'),
       EXISTS (SELECT FROM pg_catalog.pg_trigger g JOIN pg_catalog.pg_constraint k ON k.oid = g.tgconstraint
               WHERE g.tgrelid = c.oid AND g.tgdeferrable AND k.contype = 't'),
       NOT pg_catalog.row_security_active(c.oid) OR EXISTS (
           SELECT FROM pg_catalog.pg_policy y WHERE y.polrelid = c.oid AND y.polcmd IN ('d', '*') AND y.polpermissive
               AND EXISTS (SELECT FROM pg_catalog.unnest(y.polroles) r
                           WHERE CASE WHEN r = 0 THEN true ELSE pg_catalog.pg_has_role(r, 'USAGE') END))
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s AND c.relname = %s"""

_COLUMNS = """
SELECT a.attname, a.attnum, a.attidentity, a.attgenerated, tn.nspname, t.typname, t.typcategory,
       pg_catalog.format_type(a.atttypid, a.atttypmod), a.atttypmod, a.attnotnull, a.atthasdef,
       pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'SELECT'),
       pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'INSERT'),
       pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'UPDATE'),
       coalesce((SELECT l.collisdeterministic FROM pg_catalog.pg_collation l WHERE l.oid = a.attcollation), true),
       CASE WHEN t.typtype = 'b' AND t.typcategory <> 'A' THEN tn.nspname ELSE 'pg_catalog' END,
       pg_catalog.format_type(base.oid, base.typmod), base.typmod
FROM pg_catalog.pg_attribute a
CROSS JOIN LATERAL (
    WITH RECURSIVE d AS (
        SELECT t.oid, t.typtype, t.typbasetype, t.typtypmod, a.atttypmod AS typmod
        FROM pg_catalog.pg_type t WHERE t.oid = a.atttypid
        UNION ALL
        SELECT t.oid, t.typtype, t.typbasetype, t.typtypmod, d.typtypmod
        FROM d JOIN pg_catalog.pg_type t ON t.oid = d.typbasetype
        WHERE d.typtype = 'd'
    )
    SELECT d.oid, d.typmod FROM d WHERE d.typtype <> 'd'
) base
JOIN pg_catalog.pg_type t ON t.oid = base.oid JOIN pg_catalog.pg_namespace tn ON tn.oid = t.typnamespace
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum"""

# indnullsnotdistinct came with version 15. Columns of expressions are known by what the index depends on.
_INDEXES = """
SELECT c.relname, (i.indkey::pg_catalog.int2[])[0:i.indnkeyatts - 1],
       ARRAY(SELECT d.refobjsubid FROM pg_catalog.pg_depend d
             WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = i.indexrelid
               AND d.refclassid = d.classid AND d.refobjid = i.indrelid AND d.refobjsubid > 0),
       i.indisunique, i.indimmediate, i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL,
       coalesce((pg_catalog.to_jsonb(i) ->> 'indnullsnotdistinct')::bool, false)
FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
WHERE i.indrelid = %s AND (i.indisunique OR i.indisexclusion)"""

_PARENTS = """
SELECT DISTINCT c.conrelid, c.confrelid FROM pg_catalog.pg_constraint c
WHERE c.contype = 'f' AND c.conrelid = ANY(%(oids)s) AND c.confrelid = ANY(%(oids)s) AND c.conrelid <> c.confrelid"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetColumn:
    """A column: schema and name of its base type, and what may be done with it."""

    name: str
    attnum: int
    identity: str
    generated: str
    base_type: tuple[str, str]
    category: str
    """Of the base type, as in pg_type.typcategory."""
    declared: str
    """The type with its modifiers, as DDL has it."""
    typmod: int
    not_null: bool
    has_default: bool
    may_select: bool
    may_insert: bool
    may_update: bool
    deterministic: bool
    """Whether equal texts are the same bytes."""
    equality: str
    """Schema of the operator `=` by which two of its values are one key."""
    exact: str
    """The base type as a cast has it that rounds as the column does (numeric, times); empty for types without such:
    a cast to those would cut what the column refuses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UniqueIndex:
    """What no two rows may share: a unique or exclusion index."""

    name: str
    columns: frozenset[int]
    """Its plain key columns."""
    uses: frozenset[int]
    """All columns that it hangs on, those of expressions among them."""
    unique: bool
    immediate: bool
    """False: of a constraint that can be deferred."""
    plain: bool
    """Valid, of whole columns, over all rows."""
    null_collides: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTable:
    """The table at one moment."""

    oid: int
    schema: str
    relation: str
    relkind: str
    identified: str
    """Schema and name, quoted where SQL needs it."""
    user: str
    may_delete: bool
    checks_later: bool
    """It has constraint triggers that can be deferred."""
    lets_delete: bool
    """Row security has a policy under which the role may delete, or is off for it."""
    columns: dict[str, TargetColumn]
    indexes: tuple[UniqueIndex, ...]

    @property
    def name(self) -> str:
        return f"{self.schema}.{self.relation}"

    @property
    def quoted(self) -> str:
        return f"{quoted(self.schema)}.{quoted(self.relation)}"

    def require(self, assignment: Assignment, rows: pa.Schema | None = None) -> None:
        """TargetRejected unless this can be written, and rows of this shape can."""
        for problem in self.problems(assignment):
            if problem.severity == "error":
                raise TargetRejected(problem.message, hint=problem.fix)
        for field in rows or ():
            column = self.columns[field.name]
            instead = mismatch(field.type, column.base_type[1], column.category)
            if instead is not None:
                raise TargetRejected(
                    f"column {field.name} of the result is {field.type}, which {self.name} cannot take as "
                    f"{column.declared}",
                    hint=instead.replace("{column}", field.name),
                )

    def problems(self, assignment: Assignment) -> list[Finding]:
        """What stands in the way (error), or will (warning), each with the statement that mends it."""
        found: list[Finding] = []

        def finding(name: str, message: str, fix: str, severity: str = "error") -> None:
            found.append(Finding(name=name, severity=severity, message=message, fix=fix, object=self.name))

        if self.relkind not in ("r", "p"):
            finding("table", f"{self.name} is no table", "push into a table; nothing else has keys and constraints")
            return found
        names = list(dict.fromkeys([*assignment.columns, *assignment.key]))
        missing = [c for c in names if c not in self.columns]
        if missing:
            finding(
                "columns",
                f"{self.name} has no column {', '.join(missing)}",
                "add it to the table, or leave it out of the sync",
            )
        for name in names:
            column = self.columns.get(name)
            only_matched = assignment.mode == "update" and name in assignment.key
            if column is not None and (column.generated or column.identity == "a") and not only_matched:
                finding("columns", f"{self.name}.{name} is generated always", "leave it out of the sync")
        self._privileges(assignment, finding)
        if not missing:
            self._key(assignment, finding)
        if assignment.mode != "update":
            self._required(names, finding)
        return found

    def _privileges(self, assignment: Assignment, finding: Callable[..., None]) -> None:
        mode, lacking = assignment.mode, []
        used = [self.columns[c] for c in {*assignment.columns, *assignment.key} if c in self.columns]
        others = [c for c in used if c.name not in assignment.key]
        if mode not in ("insert", "append") and not all(c.may_select for c in used):
            lacking.append("SELECT")
        if mode != "update" and not all(c.may_insert for c in used):
            lacking.append("INSERT")
        if mode not in ("insert", "append") and not all(c.may_update for c in others):
            lacking.append("UPDATE")
        if mode == "mirror" and not self.may_delete:
            lacking.append("DELETE")
        if lacking:
            rights = ", ".join(lacking)
            finding(
                "privileges",
                f"the role may not {rights} on {self.name}",
                f"GRANT {rights} ON {self.quoted} TO {quoted(self.user)}",
            )
        if mode == "mirror" and not self.lets_delete:
            finding(
                "row security",
                f"{self.name} has row security, and no policy lets the role DELETE: rows that leave the result will be "
                "rejected",
                f"CREATE POLICY cdc_delete ON {self.quoted} FOR DELETE TO {quoted(self.user)} USING (true)",
                "warning",
            )

    def _key(self, assignment: Assignment, finding: Callable[..., None]) -> None:
        if assignment.mode in ("update", "append"):
            return
        key = frozenset(self.columns[k].attnum for k in assignment.key)
        arbiters = [i for i in self.indexes if i.unique and i.plain and i.columns == key]
        if assignment.mode != "insert":
            arbiters = [i for i in arbiters if i.immediate]
        if not arbiters:
            finding(
                "key",
                f"{self.name} has no unique index on ({', '.join(assignment.key)}) that is neither partial nor "
                "deferrable",
                f"CREATE UNIQUE INDEX ON {self.quoted} ({', '.join(map(quoted, assignment.key))})",
            )

    def _required(self, names: list[str], finding: Callable[..., None]) -> None:
        """A warning only, since a trigger may fill it in."""
        lacking = [c.name for c in self.columns.values() if c.name not in names and needs_value(c)]
        if lacking:
            finding(
                "required columns",
                f"{self.name}.{', '.join(lacking)} may not be NULL, has no default, and is not pushed: unless a "
                "trigger fills it in, every row will be rejected",
                f"ALTER TABLE {self.quoted} ALTER COLUMN {quoted(lacking[0])} DROP NOT NULL",
                "warning",
            )

    def shape(self, assignment: Assignment, *more: object) -> str:
        """A fingerprint of what a push of this would meet: the pushed columns, and those that would be lacking."""
        names = {*assignment.columns, *assignment.key}
        met = [c for c in self.columns.values() if c.name in names or needs_value(c)]
        facts = [
            [c.name, c.declared, c.not_null, c.generated, c.identity, c.name in names]
            for c in sorted(met, key=lambda c: c.name)
        ]
        absent = sorted(names - set(self.columns))
        return hashlib.sha256(json.dumps([facts, absent, *more]).encode()).hexdigest()[:16]


def needs_value(column: TargetColumn) -> bool:
    """Whether an INSERT has to name it."""
    return column.not_null and not (column.has_default or column.identity or column.generated)


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
            category=c[6],
            declared=c[7],
            typmod=c[8],
            not_null=c[9],
            has_default=c[10],
            may_select=c[11],
            may_insert=c[12],
            may_update=c[13],
            deterministic=c[14],
            equality=c[15],
            exact=c[16] if c[17] >= 0 and c[4] == "pg_catalog" and c[5].lstrip("_") in _ROUNDING else "",
        )
        for c in connection.execute(_COLUMNS, (row[0],)).fetchall()
    ]
    indexes = tuple(
        UniqueIndex(
            name=i[0],
            columns=frozenset(i[1]) - {0},
            uses=(frozenset(i[1]) | frozenset(i[2])) - {0},
            unique=i[3],
            immediate=i[4],
            plain=i[5] and 0 not in i[1],
            null_collides=i[6],
        )
        for i in connection.execute(_INDEXES, (row[0],)).fetchall()
    )
    return TargetTable(
        oid=row[0],
        schema=schema,
        relation=relation,
        relkind=row[1],
        user=connection.info.user,
        identified=row[2],
        may_delete=row[3],
        checks_later=row[4],
        lets_delete=row[5],
        columns={c.name: c for c in columns},
        indexes=indexes,
    )


def parents_first(connection: psycopg.Connection[Any], assignments: list[Assignment]) -> list[Assignment]:
    """The assignments in an order that foreign keys allow; where they form a circle, the given order."""
    oids: dict[str, int] = {}
    for assignment in assignments:
        row = connection.execute(_TABLE, split_name(assignment.table)).fetchone()
        if row is not None:
            oids[assignment.table] = row[0]
    found = connection.execute(_PARENTS, {"oids": list(oids.values())}).fetchall()
    left, ordered = list(assignments), []
    while left:
        waiting = {oids[a.table] for a in left if a.table in oids}
        above = {oid: _ancestors(oid, [pair for pair in found if pair[1] in waiting]) for oid in waiting}
        # What waits for nothing, or only for what waits for it in turn.
        chosen = next(
            a for a in left if all(oids[a.table] in above[oid] for oid in above.get(oids.get(a.table, 0), ()))
        )
        left.remove(chosen)
        ordered.append(chosen)
    return ordered


def _ancestors(oid: int, pairs: list[tuple[int, int]]) -> set[int]:
    """All that it refers to, by (child, parent) pairs, at any distance."""
    found: set[int] = set()
    ahead = {oid}
    while ahead:
        ahead = {parent for child, parent in pairs if child in ahead} - found
        found |= ahead
    return found


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
