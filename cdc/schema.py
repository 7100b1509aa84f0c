"""The schema book: every version of every table's schema that a source has shown, numbered and durable.

Guarantees: equal content of a table gets the same number, new content the highest number plus one, and a number is
durable before anyone can write a record that names it. It does not judge whether a change of schema can be held.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import replace

from cdc.errors import InvariantBroken
from cdc.state import State
from cdc.table import TableId, TableSchema


def _content(schema: TableSchema) -> str:
    """Canonical text of everything but the number."""
    return json.dumps(replace(schema, version=0).to_json(), sort_keys=True, separators=(",", ":"))


def same_shape(one: TableSchema, other: TableSchema) -> bool:
    """Whether they differ in nothing but their numbers."""
    return _content(one) == _content(other)


def shape_fact(source: str, table: TableId) -> str:
    """Name of the fact that holds a table's shape as far as it has landed (cdc.evolution.Shape, as a list)."""
    return f"landed_shape:{source}/{table}"


def inherited(schema: TableSchema, before: Iterable[TableSchema]) -> TableSchema:
    """The schema with the missing values that only versions before it know: a rewrite puts them into the rows and
    forgets them, but the lake's older rows still need them."""
    known = {
        (c.attnum, c.type_oid): c.missing
        for version in before
        if version.oid == schema.oid
        for c in version.columns
        if c.missing is not None
    }
    if not known:
        return schema
    columns = tuple(
        c if c.missing is not None else replace(c, missing=known.get((c.attnum, c.type_oid))) for c in schema.columns
    )
    return schema if columns == schema.columns else replace(schema, columns=columns)


class SchemaBook:
    """Schemas of one source; thread-safe, cached. On a read-only state nothing that registers or notes works."""

    def __init__(self, state: State, source: str) -> None:
        self._state = state
        self._source = source
        self._lock = threading.Lock()
        self._versions: dict[TableId, dict[int, TableSchema]] = {}
        self._turned: dict[TableId, list[int] | None] = {}
        self.grown = 0
        """How many versions were new to this book: whoever keeps a number sees that one was added."""

    def register(self, schema: TableSchema) -> TableSchema:
        """The schema with its version number; durable before it returns. Must not be called inside a transaction."""
        with self._lock:
            schema = inherited(schema, self._known(schema.table).values())
            plain = replace(schema, version=0)
            known = [v for v in self._known(schema.table).values() if replace(v, version=0) == plain]
            if known:
                numbered = known[0]
            else:
                numbered = self._insert(schema)
                self.grown += 1
                self._versions[schema.table] = self._load(schema.table)
            if schema.doubtful:
                self._note_doubt(schema.table, numbered.version)
            return numbered

    def note_newest(self, schema: TableSchema) -> TableSchema:
        """Register what the catalog shows now: of all versions known so far it is the newest, also when the table had
        that shape before."""
        numbered = self.register(schema)
        with self._lock:
            highest = max(self._known(schema.table))
            wanted = None if numbered.version == highest else [numbered.version, highest]
            fact = f"newest:{self._source}/{schema.table}"
            if self._newest(schema.table) != wanted:
                self._state.set(fact, wanted)
                self._turned[schema.table] = wanted
        return numbered

    def get(self, table: TableId, version: int) -> TableSchema:
        """A version by number; InvariantBroken if the book has none such."""
        with self._lock:
            found = self._known(table).get(version)
            if found is None:
                self._versions[table] = self._load(table)
                found = self._versions[table].get(version)
        if found is None:
            raise InvariantBroken(f"there is no version {version} of the schema of {table} in source {self._source}")
        return found

    def latest(self, table: TableId) -> TableSchema | None:
        """The version that is newest by the catalog's last word, else the one with the highest number; None if the
        table was never registered."""
        with self._lock:
            if self._state.readonly:
                self._versions.pop(table, None)
                self._turned.pop(table, None)
            known = self._known(table)
            highest = max(known, default=0)
            turned = self._newest(table)
            return known.get(turned[0] if turned is not None and turned[1] == highest else highest)

    def held(self, table: TableId) -> TableSchema | None:
        """The version that the lake has taken up to where it has landed; None if none was noted."""
        number = self._state.get(self._held_key(table))
        return None if number is None else self.get(table, int(number))

    def announced(self, table: TableId) -> int | None:
        """How many changes of the table's shape had been announced in the lake where it has landed; None if that was
        not noted."""
        saved = self._state.get(shape_fact(self._source, table))
        return None if saved is None else int((*saved, 0)[4])

    def is_doubtful(self, table: TableId, version: int) -> bool:
        """Whether some columns of a version may be others of the same name."""
        return version in (self._state.get(self._doubt_key(table)) or [])

    def hold(self, table: TableId, version: int, tx: sqlite3.Connection) -> None:
        """Note the version that the lake has taken."""
        self._state.set(self._held_key(table), version, tx=tx)

    def _note_doubt(self, table: TableId, version: int) -> None:
        if not self.is_doubtful(table, version):
            self._state.set(self._doubt_key(table), [*(self._state.get(self._doubt_key(table)) or []), version])

    def _doubt_key(self, table: TableId) -> str:
        return f"doubtful:{self._source}/{table}"

    def _held_key(self, table: TableId) -> str:
        return f"held:{self._source}/{table}"

    def versions(self, table: TableId) -> list[TableSchema]:
        """Every version of a table, the newest first."""
        with self._lock:
            known = self._known(table)
            return [known[number] for number in sorted(known, reverse=True)]

    def tables(self) -> list[TableId]:
        """Every table with at least one version, by name."""
        rows = self._state.query(
            "select distinct schema, name from schemas where source = ? order by schema, name", (self._source,)
        )
        return [TableId(*row) for row in rows]

    def _newest(self, table: TableId) -> list[int] | None:
        """A version below the highest that is the newest all the same, and the highest when that was found."""
        if table not in self._turned:
            self._turned[table] = self._state.get(f"newest:{self._source}/{table}")
        return self._turned[table]

    def _insert(self, schema: TableSchema) -> TableSchema:
        text = _content(schema)
        with self._state.transaction() as tx:
            # Read again under the write lock: another book of this source may have been quicker.
            stored = tx.execute(
                "select version, content from schemas where source = ? and schema = ? and name = ?",
                (self._source, *schema.table),
            ).fetchall()
            for version, content in stored:
                if content == text:
                    return replace(schema, version=version)
            number = max((version for version, _ in stored), default=0) + 1
            tx.execute("insert into schemas values (?, ?, ?, ?, ?)", (self._source, *schema.table, number, text))
        return replace(schema, version=number)

    def _known(self, table: TableId) -> dict[int, TableSchema]:
        if table not in self._versions:
            self._versions[table] = self._load(table)
        return self._versions[table]

    def _load(self, table: TableId) -> dict[int, TableSchema]:
        rows = self._state.query(
            "select version, content from schemas where source = ? and schema = ? and name = ?",
            (self._source, *table),
        )
        return {number: replace(TableSchema.from_json(json.loads(text)), version=number) for number, text in rows}
