"""The statements of one batch: its stage, what is written from it by mode and action, what is acknowledged, compared.

Rows are staged as texts, so that every refusal comes from a statement that can be tried with fewer rows. Values are
cast to the *base* type of a column without its modifier and then assigned: so a text that is too long is refused, never
cut, and domains and modifiers do their checks. Operators and functions are named with their schema: the search path is
the role's, and whoever may create there could put his own before them. Where rows are compared before they are written
(update, drift), they go through a second stage of the target's own types, by assignment again.

Equal means equal as images, not by the types' own equality: json has none, and citext or a non-deterministic collation
would call a changed text equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from psycopg import sql

from cdc.sink import DELETE, Assignment
from connectors.postgres.target_state import STATE_TABLE
from connectors.postgres.target_table import TargetColumn, TargetTable

Rows = Sequence[int]
"""Ordinals of staged rows, ascending."""

_INTEGERS = ("int2", "int4", "int8")
_ORDINAL = "cdc ordinal"
"""Beside columns with the target's names."""
_TEXT_ROOM = 16
"""Characters below which a text column gets no intermediate value: fewer random ones might collide."""


def ident(*names: str) -> sql.Identifier:
    return sql.Identifier(*names)


def chosen(alias: str, rows: Rows) -> sql.Composable:
    """The condition that a staged row is one of these."""
    n = ident(alias, "n")
    if rows and rows[-1] - rows[0] + 1 == len(rows):
        return sql.SQL("{} OPERATOR(pg_catalog.>=) {} AND {} OPERATOR(pg_catalog.<=) {}").format(
            n, sql.Literal(rows[0]), n, sql.Literal(rows[-1])
        )
    return sql.SQL("{} OPERATOR(pg_catalog.=) ANY({}::pg_catalog.int4[])").format(
        n, sql.Literal("{" + ",".join(map(str, rows)) + "}")
    )


def _listed(parts: Iterable[sql.Composable], by: str = ", ") -> sql.Composed:
    return sql.SQL(by).join(list(parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Statements:
    """What is sent to the server for one batch; aliases: s staged texts, t staged values, o the target's row."""

    table: TargetTable
    assignment: Assignment
    action: str
    columns: tuple[str, ...]
    """Staged, as c0, c1, …; with DELETE the key's only."""
    number: int
    """Of the batch within its transaction."""
    run: str

    # ------------------------------------------------------------------ stages

    @property
    def stage(self) -> sql.Identifier:
        return ident("pg_temp", f"cdc_stage_{self.number}")

    @property
    def _keys(self) -> sql.Identifier:
        return ident("pg_temp", f"cdc_keys_{self.number}")

    @property
    def typed(self) -> sql.Identifier:
        return ident("pg_temp", f"cdc_typed_{self.number}")

    def create_stage(self) -> sql.Composed:
        texts = _listed([sql.SQL("{} pg_catalog.text").format(ident(f"c{i}")) for i in range(len(self.columns))], ", ")
        return sql.SQL(
            "CREATE TEMP TABLE {} (n pg_catalog.int4, {} k pg_catalog.text, d pg_catalog.text) ON COMMIT DROP"
        ).format(ident(f"cdc_stage_{self.number}"), sql.SQL("{},").format(texts) if self.columns else sql.SQL(""))

    def index_stage(self) -> sql.Composed:
        """For when rows are looked for one by one."""
        return sql.SQL("CREATE INDEX IF NOT EXISTS {} ON {} (n)").format(
            ident(f"cdc_stage_{self.number}_n"), self.stage
        )

    def copy(self) -> sql.Composed:
        return sql.SQL("COPY {} FROM STDIN (FORMAT csv)").format(self.stage)

    def create_typed(self) -> sql.Composed:
        """Without the columns' constraints, which writing checks; domains keep theirs."""
        return sql.SQL(
            "CREATE TEMP TABLE {} ON COMMIT DROP AS SELECT NULL::pg_catalog.int4 AS n, NULL::pg_catalog.text AS k, {} "
            "FROM {} o WITH NO DATA"
        ).format(
            ident(f"cdc_typed_{self.number}"),
            _listed(sql.SQL("o.{} AS {}").format(ident(name), ident(f"c{i}")) for i, name in enumerate(self.columns)),
            self._target,
        )

    def create_keys(self) -> sql.Composed:
        """For the staged keys as values of the target, with the columns' collations."""
        return sql.SQL(
            "CREATE TEMP TABLE {} ON COMMIT DROP AS SELECT NULL::pg_catalog.int4 AS {}, {} FROM {} o WITH NO DATA"
        ).format(
            ident(f"cdc_keys_{self.number}"),
            ident(_ORDINAL),
            _listed(sql.SQL("o.{0} AS {0}").format(ident(k)) for k in self.assignment.key),
            self._target,
        )

    def type_keys(self, rows: Rows) -> sql.Composed:
        return sql.SQL("INSERT INTO {} SELECT s.n, {} FROM {} s WHERE {}").format(
            self._keys, _listed(self._cast(k) for k in self.assignment.key), self.stage, chosen("s", rows)
        )

    def twins(self) -> sql.Composed:
        """Ordinals of those typed keys that are not alone with their value."""
        return sql.SQL(
            "SELECT f.n FROM (SELECT {} AS n, pg_catalog.count(*) OVER (PARTITION BY {}) AS c FROM {} t) f "
            "WHERE f.c OPERATOR(pg_catalog.>) 1::pg_catalog.int8"
        ).format(ident("t", _ORDINAL), self._key("t"), self._keys)

    def drop_staged(self, rows: Rows) -> sql.Composed:
        return sql.SQL("DELETE FROM {} s WHERE {}").format(self.stage, chosen("s", rows))

    def shared(self) -> sql.Composed:
        """Ordinals of typed keys that another acknowledged key, which is not staged here, is equal to."""
        ours = sql.SQL("{} AND a.key OPERATOR(pg_catalog.<>) ''").format(self._ours())
        texts = [
            # In a CASE, so that nothing else is read as such a key, in whatever order the server goes about it.
            sql.SQL("(CASE WHEN {} THEN a.key::pg_catalog.json OPERATOR(pg_catalog.->>) {} END)::{}").format(
                ours,
                sql.Literal(i),
                sql.SQL(self.table.columns[k].exact) if self.table.columns[k].exact else self._type(k),
            )
            for i, k in enumerate(self.assignment.key)
        ]
        return sql.SQL(
            "SELECT DISTINCT {} FROM {} t JOIN {} a ON {} WHERE {} "
            "AND NOT EXISTS (SELECT FROM {} s WHERE s.k OPERATOR(pg_catalog.=) a.key)"
        ).format(
            ident("t", _ORDINAL),
            self._keys,
            sql.SQL(STATE_TABLE),
            _listed(
                (self._equal(k, ident("t", k), text) for k, text in zip(self.assignment.key, texts, strict=True)),
                " AND ",
            ),
            ours,
            self.stage,
        )

    def type_rows(self, rows: Rows) -> sql.Composed:
        return sql.SQL("INSERT INTO {} SELECT s.n, s.k, {} FROM {} s WHERE {}").format(
            self.typed, _listed(self._cast(c) for c in self.columns), self.stage, chosen("s", rows)
        )

    def leave_out(self, rows: Rows) -> list[sql.Composed]:
        """Take rows out of both stages."""
        return [
            sql.SQL("DELETE FROM {} s WHERE {}").format(stage, chosen("s", rows)) for stage in (self.stage, self.typed)
        ]

    def leave_out_taken(self) -> sql.Composed:
        """Take those rows out of the stage that the target has taken with this very content."""
        return sql.SQL(
            "DELETE FROM {} s USING {} a WHERE {} AND a.key OPERATOR(pg_catalog.=) s.k "
            "AND a.digest OPERATOR(pg_catalog.=) s.d AND a.relation OPERATOR(pg_catalog.=) {}::pg_catalog.oid"
        ).format(self.stage, sql.SQL(STATE_TABLE), self._ours(), sql.Literal(self.table.oid))

    # ------------------------------------------------------------------ writing

    def insert(self, rows: Rows) -> sql.Composed:
        """Modes insert and append: plain. Modes upsert and mirror: by the key, equal rows stay untouched."""
        mode, key = self.assignment.mode, self.assignment.key
        # NOT NULL is checked before the conflict: what is kept has to stand in the row that is proposed.
        kept = [c for c in self.columns if c in self.assignment.keep and self.table.columns[c].not_null]
        kept = kept if mode in ("upsert", "mirror") else []
        values = _listed(
            sql.SQL("coalesce({}, p.{})").format(self._cast(c), ident(c)) if c in kept else self._cast(c)
            for c in self.columns
        )
        present = sql.SQL("LEFT JOIN {} p ON {}").format(self._rows, self._matched("p")) if kept else sql.SQL("")
        statement = sql.SQL("INSERT INTO {} AS o ({}) SELECT {} FROM {} s {} WHERE {}").format(
            self._target, _listed(map(ident, self.columns)), values, self.stage, present, chosen("s", rows)
        )
        if mode in ("insert", "append"):
            return statement
        others = [c for c in self.columns if c not in key]
        if others:
            action = sql.SQL("UPDATE SET {} WHERE {}").format(
                _listed(sql.SQL("{} = {}").format(ident(c), self._proposed(c, "excluded", c)) for c in others),
                self._differs([(c, self._proposed(c, "excluded", c)) for c in others]),
            )
        else:
            action = sql.SQL("NOTHING").format()
        return sql.SQL("{} ON CONFLICT ({}) DO {}").format(statement, _listed(map(ident, key)), action)

    def lock_matches(self, rows: Rows) -> sql.Composed:
        """Ordinals of staged values, once per row of the target that they match; those rows are locked."""
        return sql.SQL("SELECT t.n FROM {} t JOIN {} o ON {} WHERE {} FOR NO KEY UPDATE OF o").format(
            self.typed, self._rows, self._same_key(), chosen("t", rows)
        )

    def update(self, rows: Rows) -> sql.Composed | None:
        """Mode update, from the staged values; None if there is nothing but the key."""
        others = self._others()
        if not others:
            return None
        return sql.SQL("UPDATE {} AS o SET {} FROM {} t WHERE {} AND {} AND {}").format(
            self._rows,
            _listed(sql.SQL("{} = {}").format(ident(c), self._proposed(c, "t", f"c{i}")) for i, c in others),
            self.typed,
            self._same_key(),
            chosen("t", rows),
            self._differs([(c, self._proposed(c, "t", f"c{i}")) for i, c in others]),
        )

    def still_there(self, rows: Rows) -> sql.Composed:
        """Ordinals of staged keys that a row of the target has."""
        return sql.SQL("SELECT DISTINCT s.n FROM {} s JOIN {} o ON {} WHERE {}").format(
            self.stage, self._rows, self._matched("o"), chosen("s", rows)
        )

    def delete(self, rows: Rows) -> sql.Composed:
        return sql.SQL("DELETE FROM {} AS o USING {} s WHERE {} AND {}").format(
            self._rows, self.stage, self._matched("o"), chosen("s", rows)
        )

    def acknowledge(self, rows: Rows) -> sql.Composed:
        """The staged ones of these rows are remembered; with DELETE forgotten."""
        if self.action == DELETE:
            return sql.SQL("DELETE FROM {} a USING {} s WHERE {} AND a.key OPERATOR(pg_catalog.=) s.k AND {}").format(
                sql.SQL(STATE_TABLE), self.stage, self._ours(), chosen("s", rows)
            )
        return sql.SQL(
            "INSERT INTO {} AS o (sync, relation_name, key, digest, relation, acked_at, run) "
            "SELECT {}, {}, s.k, s.d, {}, pg_catalog.clock_timestamp(), {} FROM {} s WHERE {} "
            "ON CONFLICT (sync, relation_name, key) DO UPDATE SET digest = excluded.digest, "
            "relation = excluded.relation, "
            "acked_at = excluded.acked_at, run = excluded.run"
        ).format(
            sql.SQL(STATE_TABLE),
            sql.Literal(self.assignment.sync),
            sql.Literal(self.table.identified),
            sql.Literal(self.table.oid),
            sql.Literal(self.run),
            self.stage,
            chosen("s", rows),
        )

    # ------------------------------------------------------------------ making room

    def vacate(self, rows: Rows, *, all_indexes: bool) -> sql.Composed | None:
        """Rows that are about to change what no two rows may share give it up first: NULL, or a value that nobody has.

        None if this batch has none such. Indexes of constraints that can be deferred only with `all_indexes`.
        """
        if self.action == DELETE or self.assignment.mode in ("insert", "append"):
            return None
        intermediate: dict[str, sql.Composed] = {}
        because: dict[str, list[sql.Composed]] = {}
        for index in self.table.indexes:
            used = [self.table.columns[c] for _, c in self._others() if self.table.columns[c].attnum in index.uses]
            if not used or (not index.immediate and not all_indexes):
                continue
            nullable = [c for c in used if not c.not_null and not index.null_collides]
            before: list[sql.Composed] = []
            for column in dict.fromkeys((*nullable, *used)):
                value = sql.SQL("NULL").format() if column in nullable else self._nobodys(column)
                # What `fill` finds it must keep.
                if value is not None and column.name not in self.assignment.fill:
                    moves = self._moves(column.name)
                    intermediate.setdefault(column.name, value)
                    # Of the columns that change, the first one is enough.
                    because.setdefault(column.name, []).append(
                        _listed([moves, *(sql.SQL("NOT ({})").format(b) for b in before)], " AND ")
                    )
                    before.append(moves)
        if not intermediate:
            return None
        when = {c: _listed((sql.SQL("({})").format(b) for b in because[c]), " OR ") for c in intermediate}
        return sql.SQL("UPDATE {} AS o SET {} FROM {} s WHERE {} AND {} AND ({})").format(
            self._rows,
            _listed(
                sql.SQL("{} = CASE WHEN {} THEN {} ELSE {} END").format(ident(c), when[c], value, ident("o", c))
                for c, value in intermediate.items()
            ),
            self.stage,
            self._matched("o"),
            chosen("s", rows),
            _listed(when.values(), " OR "),
        )

    def hit_several(self, rows: Rows) -> sql.Composed:
        """Ordinals of staged texts whose key several rows of the target have."""
        return sql.SQL(
            "SELECT s.n FROM {} s JOIN {} o ON {} WHERE {} GROUP BY s.n HAVING pg_catalog.count(*) "
            "OPERATOR(pg_catalog.>) 1"
        ).format(self.stage, self._rows, self._matched("o"), chosen("s", rows))

    def _moves(self, column: str) -> sql.Composed:
        """Whether the row's value of the column changes (what does not is left alone: others may refer to it); not
        where `keep` leaves it as it is, nor where it is NULL, which is in nobody's way (or, where NULLs collide, is one
        row's at most)."""
        moves = sql.SQL("{} AND {} IS NOT NULL").format(self._text_differs([column]), ident("o", column))
        if column not in self.assignment.keep:
            return moves
        return sql.SQL("{} AND s.{} IS NOT NULL").format(moves, ident(self._place(column)))

    def present(self, rows: Rows) -> sql.Composed:
        """Ordinal and key, as the target writes it, of the staged rows that it has."""
        return sql.SQL("SELECT s.n, ROW({})::pg_catalog.text FROM {} s JOIN {} o ON {} WHERE {}").format(
            self._key("o"), self.stage, self._rows, self._matched("o"), chosen("s", rows)
        )

    def holders(self, rows: Rows) -> list[tuple[str, sql.Composed]]:
        """By unique index: ordinals of staged rows, and the keys of other rows that have now what they want."""
        if self.action == DELETE:
            return []
        pushed = {self.table.columns[c].attnum: c for c in self.columns if c not in self.assignment.fill}
        key = {self.table.columns[k].attnum for k in self.assignment.key}
        found = []
        for index in self.table.indexes:
            if not (index.unique and index.plain) or index.columns <= key or not index.columns <= pushed.keys():
                continue
            same = [self._equal(pushed[i], ident("o", pushed[i]), self._exact(pushed[i])) for i in index.columns]
            statement = sql.SQL(
                "SELECT s.n, ROW({})::pg_catalog.text FROM {} s JOIN {} o ON {} WHERE {} AND NOT ({})"
            ).format(
                self._key("o"),
                self.stage,
                self._rows,
                _listed(same, " AND "),
                chosen("s", rows),
                self._matched("o"),
            )
            found.append((index.name, statement))
        return found

    def _nobodys(self, column: TargetColumn) -> sql.Composed | None:
        """An expression for a value that no other row has; None for types without one."""
        if column.base_type[0] != "pg_catalog":
            return None
        kind = column.base_type[1]
        if kind in _INTEGERS:
            # Below everything that is there, each row another.
            return sql.SQL(
                "((SELECT least(pg_catalog.min(x.{}), 0) FROM {} x) "
                "OPERATOR(pg_catalog.-) 1 OPERATOR(pg_catalog.-) s.n)"
            ).format(ident(column.name), self._target)
        if kind == "uuid":
            return sql.SQL("pg_catalog.gen_random_uuid()").format()
        room = column.typmod - 4 if column.typmod > 4 else 32
        if kind in ("text", "varchar", "bpchar") and room >= _TEXT_ROOM:
            return sql.SQL(
                "pg_catalog.left(pg_catalog.replace(pg_catalog.gen_random_uuid()::pg_catalog.text, '-', ''), {})"
            ).format(sql.Literal(room))
        return None

    def _text_differs(self, columns: Sequence[str]) -> sql.Composed:
        return sql.SQL("pg_catalog.record_image_ne(ROW({}), ROW({}))").format(
            _listed(sql.SQL("o.{}::{}").format(ident(c), self._type(c)) for c in columns),
            _listed(self._cast(c) for c in columns),
        )

    # ------------------------------------------------------------------ comparing

    def drift(self) -> sql.Composed:
        """Key, whether the target lacks the row, and for each column but the key's whether it differs; only rows
        that do. Where several rows of the target match, the one that differs least counts."""
        others = self._others()
        flags = _listed(
            [self._differs([(c, self._proposed(c, "t", f"c{i}"))]) for i, c in others] or [sql.SQL("false")]
        )
        key = ident(self.assignment.key[0])
        return sql.SQL(
            "SELECT f.k, f.lacks, f.differs FROM ("
            "SELECT DISTINCT ON (t.n) t.n, t.k, o.{} IS NULL AS lacks, ARRAY[{}] AS differs "
            "FROM {} t LEFT JOIN {} o ON {} "
            "ORDER BY t.n, pg_catalog.cardinality(pg_catalog.array_positions(ARRAY[{}], true))) f "
            "WHERE f.lacks OR true OPERATOR(pg_catalog.=) ANY(f.differs) ORDER BY f.n"
        ).format(key, flags, self.typed, self._rows, self._same_key(), flags)

    def compared(self) -> list[str]:
        """The columns that `drift` has flags for."""
        return [c for _, c in self._others()]

    # ------------------------------------------------------------------ pieces

    @property
    def _target(self) -> sql.Identifier:
        return ident(self.table.schema, self.table.relation)

    @property
    def _rows(self) -> sql.Composed:
        """The rows that are the table's own: a table that inherits from it has keys, and rows, of its own."""
        return sql.SQL("{}" if self.table.relkind == "p" else "ONLY {}").format(self._target)

    def _others(self) -> list[tuple[int, str]]:
        return [(i, c) for i, c in enumerate(self.columns) if c not in self.assignment.key]

    def _place(self, column: str) -> str:
        return f"c{self.columns.index(column)}"

    def _type(self, column: str) -> sql.Identifier:
        return ident(*self.table.columns[column].base_type)

    def _cast(self, column: str) -> sql.Composed:
        return sql.SQL("s.{}::{}").format(ident(self._place(column)), self._type(column))

    def _key(self, alias: str) -> sql.Composed:
        return _listed(ident(alias, k) for k in self.assignment.key)

    def _matched(self, alias: str) -> sql.Composed:
        """That a row of the target has the key of the staged texts."""
        return _listed((self._equal(k, ident(alias, k), self._exact(k)) for k in self.assignment.key), " AND ")

    def _same_key(self) -> sql.Composed:
        return _listed(
            (self._equal(k, ident("o", k), ident("t", self._place(k))) for k in self.assignment.key), " AND "
        )

    def _equal(self, column: str, one: sql.Composable, other: sql.Composable) -> sql.Composed:
        equality = ident(self.table.columns[column].equality)
        return sql.SQL("{} OPERATOR({}.=) {}").format(one, equality, other)

    def _exact(self, column: str) -> sql.Composed:
        """The staged text as the column would hold it, rounded where it rounds."""
        exact = self.table.columns[column].exact
        if not exact:
            return self._cast(column)
        return sql.SQL("s.{}::{}").format(ident(self._place(column)), sql.SQL(exact))

    def _ours(self) -> sql.Composed:
        """That an acknowledgement `a` is one of this sync, for the table of this name."""
        return sql.SQL("a.sync OPERATOR(pg_catalog.=) {} AND a.relation_name OPERATOR(pg_catalog.=) {}").format(
            sql.Literal(self.assignment.sync), sql.Literal(self.table.identified)
        )

    def _proposed(self, column: str, alias: str, name: str) -> sql.Composed:
        """What the column becomes: keep and fill look at what is there."""
        new, old = ident(alias, name), ident("o", column)
        if column in self.assignment.fill:
            return sql.SQL("coalesce({}, {})").format(old, new)
        if column in self.assignment.keep:
            return sql.SQL("coalesce({}, {})").format(new, old)
        return sql.SQL("{}").format(new)

    def _differs(self, proposals: Sequence[tuple[str, sql.Composed]]) -> sql.Composed:
        return sql.SQL("pg_catalog.record_image_ne(ROW({}), ROW({}))").format(
            _listed(ident("o", c) for c, _ in proposals), _listed(value for _, value in proposals)
        )
