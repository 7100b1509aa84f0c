"""The fresh view of a table: one SELECT over the objects of `current` and of the unmerged tail of the changelog.

It shows what `current` would show if the tail were merged now, cell by cell: the last change per key by order, not by
arrival; old keys, deleted rows, and what truncates and whole runs end, gone; unchanged TOAST values from the newest row
before that has them; columns as the newest schema has them. What a SELECT cannot tell exactly is refused (`Inexact`),
or fails when it is read (UNKNOWN): never a wrong row. It reads the objects that one version of each table names, so it
stands for one instant for as long as a vacuum leaves them.

`current` is passed once, row by row, beside a hash of the tail's keys; the tail is read twice, its keys and positions
first. Only rows that lack values look `current` up by key. Rows that another writer put into `current` are shown
until a merge mends them. Decides nothing about versions, and runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from cdc.batch import RAW_TYPE, TIMESTAMP_TYPE
from cdc.keys import BEFORE
from cdc.lake.assemble import Missing
from cdc.lake.bucket import current_schema
from cdc.lake.current import Outlook
from cdc.lake.events import FileShape
from cdc.lake.layout import CURRENT_SYSTEM, system_name, system_prefix
from cdc.lake.reduce import ABSENT, KNOWN, UNCHANGED, Order, barriers_in_order
from cdc.lake.tail import Group, Inexact, Tail, states_of
from cdc.sqltext import constant, literal, objects, parquet, quoted, sql_type

UNKNOWN = "cdc: a value of the unmerged changes is not known yet"
"""What the view fails with where a row takes a value from one that is nowhere."""

Where = Callable[[str], str]
"""Path of an object in its table → where DuckDB finds it."""


def fresh_sql(outlook: Outlook, tail: Tail, where_current: Where, where_changelog: Where) -> str:
    """The SELECT, with the columns that `current` will have. Pure; Inexact if it cannot be written."""
    kind: type[_Fresh | _Added] = _Fresh if outlook.layout.key_index else _Added
    view = kind(outlook, tail, where_current, where_changelog)
    # Commits may bring no rows, but another shape.
    return view.sql() if tail.groups else view.merged()


class _View:
    """What both kinds of tables have: the columns of `current`, and of the tail, in the newest layout."""

    def __init__(self, outlook: Outlook, tail: Tail, where_current: Where, where_changelog: Where) -> None:
        self._outlook = outlook
        self._layout = outlook.layout
        self._tail = tail
        self._where_current = where_current
        self._where_changelog = where_changelog
        self._missing = Missing(outlook.layout)
        prefix = system_prefix(self._layout.names)
        self._system = {name: system_name(name, prefix) for name in (*CURRENT_SYSTEM, "_op")}
        self._names = self._layout.names
        self._output = current_schema(self._layout).names
        self._mark = "@"
        while any(name.startswith(self._mark) for name in self._names):
            self._mark += "@"

    def _own(self, name: str) -> str:
        """A column of ours beside the table's."""
        return quoted(self._mark + name)

    def _columns(self, alias: str) -> str:
        return ", ".join(f"{alias}.{quoted(name)}" for name in self._output)

    def merged(self) -> str:
        """`current` as it is, in the newest layout."""
        shown = self._outlook.shown
        assert shown is not None
        shape = FileShape(shown, self._layout)
        states = states_of(shape)
        cells = []
        for i, name in enumerate(self._names):
            if states[i] == UNCHANGED:
                raise Inexact(f"column {name} has another type, which does not hold its older values")
            value = constant(self._missing.values[i][0]) if states[i] == ABSENT else self._cell(shape, i, "")
            cells.append(f"{value} AS {quoted(name)}")
        gone = [n for n in shape.known_as.values() if shape.renames.get(n) != n and n not in shape.system.values()]
        raw = quoted(shape.system["_raw"])
        if gone:
            raw = _raw_of(_renamed(raw, shape.renames))
        texts = [(self._names[i], self._missing.texts[i]) for i in np.flatnonzero(states == ABSENT).tolist()]
        given = [f"{{'key': {literal(n)}, 'value': {literal(t)}}}" for n, t in texts if t is not None]
        if given:
            raw = _raw_of(f"list_concat(map_entries({raw}), [{', '.join(given)}])")
        for name in CURRENT_SYSTEM:
            value = raw if name == "_raw" else quoted(shape.system[name])
            cells.append(f"{value} AS {quoted(self._system[name])}")
        body = objects(shown, [self._where_current(path) for path in self._outlook.live])
        return f"SELECT {', '.join(cells)} FROM ({body})"

    def _cell(self, shape: FileShape, column: int, before: str) -> str:
        """A column of the layout from a file that has it (`before`: from that struct)."""
        name = shape.source[column]
        assert name is not None
        value = f"{before}{quoted(name)}"
        wanted = self._layout.fields[column].type
        if sql_type(shape.schema.field(name).type) == sql_type(wanted):
            return value
        return f"CAST({value} AS {sql_type(wanted)})"

    def _rows(self, group: Group, more: Sequence[str]) -> str:
        """The changes of the objects of one shape, with columns of ours behind the table's."""
        shape = group.shape
        cells = []
        for i, (name, field) in enumerate(zip(self._names, self._layout.fields, strict=True)):
            value = self._cell(shape, i, "") if group.states[i] == KNOWN else f"NULL::{sql_type(field.type)}"
            cells.append(f"{value} AS {quoted(name)}")
        kinds: dict[str, pa.DataType] = {"_committed_at": TIMESTAMP_TYPE, "_origin": pa.string()}
        for name in CURRENT_SYSTEM:
            if name == "_raw":
                value = f"NULL::{sql_type(RAW_TYPE)}"
                if group.raw:
                    value = _raw_of(_renamed(quoted(shape.system["_raw"]), shape.renames))
            elif name in shape.system:
                value = quoted(shape.system[name])
            else:
                value = f"NULL::{sql_type(kinds[name])}"
            cells.append(f"{value} AS {quoted(self._system[name])}")
        files = parquet([self._where_changelog(path) for path in group.paths])
        rows = f"SELECT {', '.join([*cells, *more])} FROM {files} WHERE {quoted(shape.system['_op'])} IN "
        rows += "('c', 'u', 'd', 'r')"
        truncated = max(self._outlook.scan.truncates, default=None)
        if truncated is not None:
            places = [quoted(shape.system[name]) for name in ("_epoch", "_lsn", "_seq")]
            rows += f" AND NOT {_older(places, truncated)}"
        return rows

    def _op(self, group: Group) -> str:
        return f"{quoted(group.shape.system['_op'])} AS {self._own('op')}"


class _Fresh(_View):
    """A table with a key."""

    def __init__(self, outlook: Outlook, tail: Tail, where_current: Where, where_changelog: Where) -> None:
        super().__init__(outlook, tail, where_current, where_changelog)
        truncated = max(outlook.scan.truncates, default=None)
        alive = [b for b in outlook.barriers if truncated is None or b.at >= truncated]
        self._barriers = barriers_in_order(alive)
        self._threshold = outlook.threshold
        self._keys = len(self._layout.key_index)
        for i in self._layout.key_index:
            if pa.types.is_nested(self._layout.fields[i].type):
                raise Inexact(f"column {self._names[i]} of the key is of a type that has no canonical text in SQL")
        self._parts = self._incomplete()
        """Columns that some change lacks, those together that the same changes lack."""

    def sql(self) -> str:
        steps = [] if self._outlook.shown is None else [("merged", "NOT MATERIALIZED", self.merged())]
        steps.append(("tail", "NOT MATERIALIZED", self._tail_rows()))
        steps += self._last_by_chain() if self._parts else [("last", "MATERIALIZED", self._last())]
        arms = [self._changed_rows()]
        if self._outlook.shown is not None:
            arms.insert(0, self._unchanged_rows())
            if self._parts and self._looked_up():
                steps.append(("base", "MATERIALIZED", self._base()))
        with_ = ",\n".join(f"{name} AS {how} ({body})" for name, how, body in steps)
        return f"WITH {with_}\n" + "\nUNION ALL\n".join(arms)

    # ---- keys ----

    def _key(self, column: int, value: str, raw: str, name: str) -> str:
        """A key's column so that it is equal where the canonical texts are (cdc.keys)."""
        kind = self._layout.fields[column].type
        if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_binary(kind):
            return value
        text = value if pa.types.is_string(kind) else f"CAST({value} AS VARCHAR)"
        return f"coalesce({text}, {_text(raw, name)})" if raw else text

    def _keys_of(self, alias: str) -> list[str]:
        """Of rows in the newest layout."""
        raw = f"{alias}.{quoted(self._system['_raw'])}"
        return [self._key(i, f"{alias}.{quoted(self._names[i])}", raw, self._names[i]) for i in self._layout.key_index]

    def _k(self, alias: str) -> list[str]:
        return [f"{alias}.{self._own(f'key{i}')}" for i in range(self._keys)]

    # ---- the tail ----

    def _tail_rows(self) -> str:
        return "\nUNION ALL ".join(self._rows(group, self._of_ours(group)) for group in self._tail.groups)

    def _of_ours(self, group: Group) -> list[str]:
        """Columns of ours: what happened, the key, the old key, and per part whether the row has it, or had no such
        column."""
        shape = group.shape
        raw = quoted(shape.system["_raw"]) if group.raw else ""
        before = quoted(shape.system["_before"]) + "." if "_before" in shape.system else ""
        cells = {}
        for number, i in enumerate(self._layout.key_index):
            name = shape.known_as[str(shape.source[i])]
            cells[f"key{number}"] = self._key(i, self._cell(shape, i, ""), raw, name)
            if self._tail.moved:
                old = self._cell(shape, i, before) if before else f"NULL::{sql_type(self._layout.fields[i].type)}"
                cells[f"old{number}"] = self._key(i, old, raw, BEFORE + name)
        for number, columns in enumerate(self._parts):
            state, held = group.states[columns[0]], shape.source[columns[0]]
            known = "true" if state == KNOWN else "false"
            if state == KNOWN and group.unchanged:
                listed = f"{quoted(shape.system['_unchanged'])}, {literal(shape.known_as[str(held)])}"
                known = f"NOT coalesce(list_contains({listed}), false)"
            cells[f"known{number}"] = known
            cells[f"absent{number}"] = "true" if state == ABSENT else "false"
        return [self._op(group), *(f"{cell} AS {self._own(name)}" for name, cell in cells.items())]

    def _entries(self, more: Sequence[str] = ()) -> str:
        """What happens to each key: `live`, or its end. `more`: columns of ours beside it, false for old keys."""
        place = ", ".join(f"{name} := t.{quoted(self._system[f'_{name}'])}" for name in ("epoch", "lsn", "seq"))
        place = f"struct_pack({place}) AS place"
        keys = ", ".join(f"{k} AS key{i}" for i, k in enumerate(self._k("t")))
        op = f"t.{self._own('op')}"
        rest = "".join(f", t.{self._own(name)} AS {name}" for name in more)
        entries = f"SELECT {keys}, {place}, {op} <> 'd' AS live{rest} FROM tail t"
        if self._tail.moved:
            olds = [f"t.{self._own(f'old{i}')}" for i in range(self._keys)]
            whole = " AND ".join(f"{old} IS NOT NULL" for old in olds)
            other = " OR ".join(f"{o} <> {k}" for o, k in zip(olds, self._k("t"), strict=True))
            keys = ", ".join(f"{old} AS key{i}" for i, old in enumerate(olds))
            ends = "".join(f", false AS {name}" for name in more)
            entries += f" UNION ALL SELECT {keys}, {place}, false AS live{ends} FROM tail t"
            entries += f" WHERE {op} = 'u' AND {whole} AND ({other})"
        return entries

    def _last(self) -> str:
        keys = ", ".join(f"key{i}" for i in range(self._keys))
        return (
            f"SELECT {keys}, max(struct_pack(place := place, live := live)) AS final FROM ({self._entries()})"
            f" GROUP BY {keys}"
        )

    # ---- rows that lack values ----

    def _incomplete(self) -> list[list[int]]:
        together: dict[bytes, list[int]] = {}
        for i in range(len(self._names)):
            states = self._tail.patterns[:, i]
            if states.any():
                together.setdefault(states.tobytes(), []).append(i)
        return list(together.values())

    def _absent(self) -> list[int]:
        """Numbers of the parts that some change was too old to have."""
        return [n for n, columns in enumerate(self._parts) if (self._tail.patterns[:, columns[0]] == ABSENT).any()]

    def _looked_up(self) -> list[int]:
        """Numbers of the parts whose values may stand in `current`, or must be proven to stand there."""
        shown = self._outlook.shown
        if shown is None:
            return []
        there = FileShape(shown, self._layout).source
        return [
            number
            for number, columns in enumerate(self._parts)
            if (self._tail.patterns[:, columns[0]] == UNCHANGED).any() or any(there[i] is not None for i in columns)
        ]

    def _last_by_chain(self) -> list[tuple[str, str, str]]:
        """Per key its last entry, and per part the place of the newest row that has its values, of those rows that
        follow upon each other: a deleted row, or one that a barrier took, gives nothing to the next."""
        keys = ", ".join(f"key{i}" for i in range(self._keys))
        flags = [f"known{n}" for n in range(len(self._parts))] + [f"absent{n}" for n in self._absent()]
        cut = self._cut("lag(place) OVER w", "place")
        ordered = (
            f"SELECT *, coalesce(NOT lag(live) OVER w{f' OR {cut}' if cut else ''}, false) AS starts"
            f" FROM ({self._entries(flags)}) WINDOW w AS (PARTITION BY {keys} ORDER BY place)"
        )
        chains = (
            f"SELECT *, count(*) FILTER (starts) OVER (PARTITION BY {keys} ORDER BY place) AS chain FROM ({ordered})"
        )
        given = "".join(
            f", max(struct_pack(chain := chain, place := place)) FILTER (live AND known{n}) AS given{n}"
            for n in range(len(self._parts))
        )
        root = ""
        if self._barriers or self._absent():
            absent = "".join(f", absent{n} := absent{n}" for n in self._absent())
            first = f"struct_pack(place := place{absent})"
            root = f", coalesce(max({first}) FILTER (starts), min({first})) AS root"
        last = (
            f"SELECT {keys}, max(struct_pack(place := place, live := live)) AS final, max(chain) AS chain{root}{given}"
            f" FROM chains GROUP BY {keys}"
        )
        return [("chains", "NOT MATERIALIZED", chains), ("last", "MATERIALIZED", last)]

    def _base(self) -> str:
        """Rows of `current` that give values to changed ones."""
        keys = self._keys_of("m")
        needed = " OR ".join(f"l.given{n} IS NULL" for n in self._looked_up())
        condition = f"l.final.live AND l.chain = 0 AND ({needed})"
        cut = self._cut(self._place("m"), "l.root.place")
        if cut:
            condition += f" AND NOT ({cut})"
        named = ", ".join(f"{key} AS {self._own(f'key{i}')}" for i, key in enumerate(keys))
        columns = [i for n in self._looked_up() for i in self._parts[n]]
        cells = "".join(f", m.{quoted(self._names[i])}" for i in columns)
        matched = " AND ".join(f"l.key{i} = {key}" for i, key in enumerate(keys))
        return (
            f"SELECT {named}{cells}, m.{quoted(self._system['_raw'])}, true AS {self._own('there')} FROM merged m"
            f" WHERE EXISTS (SELECT 1 FROM last l WHERE {matched} AND {condition})"
        )

    def _completed(self, column: int, part: int) -> tuple[str, str]:
        """A cell that some changes lack, and its text in `_raw`."""
        name, raw = self._names[column], quoted(self._system["_raw"])
        cell, text = "CASE", "CASE"
        given = [(f"p{part}", "op"), ("b", "there")][: 2 if part in self._looked_up() else 1]
        for alias, mark in given:
            cell += f" WHEN {alias}.{self._own(mark)} IS NOT NULL THEN {alias}.{quoted(name)}"
            text += f" WHEN {alias}.{self._own(mark)} IS NOT NULL THEN {_text(f'{alias}.{raw}', name)}"
        default, kind = self._missing.texts[column], sql_type(self._layout.fields[column].type)
        if part in self._absent():
            cell += f" WHEN l.root.absent{part} THEN {constant(self._missing.values[column][0])}"
            text += f" WHEN l.root.absent{part} THEN {'NULL' if default is None else literal(default)}"
        return f"{cell} ELSE CAST(error({literal(UNKNOWN)}) AS {kind}) END", f"{text} END"

    # ---- what is shown ----

    def _unchanged_rows(self) -> str:
        """Rows of `current` whose keys no change of the tail names."""
        matched = " AND ".join(f"l.key{i} = {key}" for i, key in enumerate(self._keys_of("m")))
        rows = f"SELECT {self._columns('m')} FROM merged m WHERE NOT EXISTS (SELECT 1 FROM last l WHERE {matched})"
        if self._threshold is not None:
            places = [f"m.{quoted(self._system[n])}" for n in ("_epoch", "_lsn", "_seq")]
            rows += f" AND NOT {_older(places, self._threshold)}"
            if self._outlook.newest is not None:
                # What says that it is newer was not written by us, and counts as the oldest of all.
                newest = self._outlook.newest
                rows += f" AND {_older(places, newest._replace(seq=newest.seq + 1))}"
        return rows

    def _changed_rows(self) -> str:
        """The last rows of the tail's keys."""
        cells = {name: f"t.{quoted(name)}" for name in self._output}
        joins = self._joined("t", "l.final.place")
        texts: list[str] = []
        for part, columns in enumerate(self._parts):
            joined = self._joined(f"p{part}", f"l.given{part}.place")
            joins += f" LEFT JOIN tail p{part} ON {joined.partition(' ON ')[2]} AND l.given{part}.chain = l.chain"
            for i in columns:
                cell, text = self._completed(i, part)
                cells[self._names[i]] = f"{cell}"
                texts.append(f"{{'key': {literal(self._names[i])}, 'value': CASE WHEN {cell} IS NULL THEN {text} END}}")
        if self._parts:
            if self._looked_up():
                matched = " AND ".join(f"{k} = l.key{i}" for i, k in enumerate(self._k("b")))
                joins += f" LEFT JOIN base b ON {matched}"
            raw = quoted(self._system["_raw"])
            own = ", ".join(literal(self._names[i]) for columns in self._parts for i in columns)
            kept = f"coalesce([e FOR e IN map_entries(t.{raw}) IF e.key NOT IN ({own})], [])"
            found = f"[e FOR e IN [{', '.join(texts)}] IF e.value IS NOT NULL]"
            cells[self._system["_raw"]] = _raw_of(f"list_concat({kept}, {found})")
        listed = ", ".join(f"{cell} AS {quoted(name)}" for name, cell in cells.items())
        rows = f"SELECT {listed} FROM last l {joins} WHERE l.final.live"
        if self._threshold is not None:
            places = [f"l.final.place.{name}" for name in ("epoch", "lsn", "seq")]
            rows += f" AND NOT {_older(places, self._threshold)}"
        return rows

    def _joined(self, alias: str, place: str) -> str:
        """The row of the tail that stands at a place."""
        same = [f"{alias}.{quoted(self._system[f'_{n}'])} = {place}.{n}" for n in ("epoch", "lsn", "seq")]
        same += [f"{key} = l.key{i}" for i, key in enumerate(self._k(alias))]
        return f"JOIN tail {alias} ON {' AND '.join(same)}"

    def _place(self, alias: str) -> str:
        columns = (f"{n} := {alias}.{quoted(self._system[f'_{n}'])}" for n in ("epoch", "lsn", "seq"))
        return f"struct_pack({', '.join(columns)})"

    def _cut(self, older: str, newer: str) -> str:
        """Whether a barrier that stands before `newer` has removed the row written at `older`; empty if none can."""
        return " OR ".join(f"({newer} >= {_struct(b.at)} AND {older} < {_struct(b.threshold)})" for b in self._barriers)


class _Added(_View):
    """A table without a key, to which rows were only added."""

    def sql(self) -> str:
        outlook = self._outlook
        assert outlook.settled
        assert outlook.swap is not None
        if self._tail.patterns.any():
            raise Inexact("the table has no key, and rows of it have come without all their values")
        rows = "\nUNION ALL ".join(self._rows(group, [self._op(group)]) for group in self._tail.groups)
        places = [f"t.{quoted(self._system[n])}" for n in ("_epoch", "_lsn", "_seq")]
        return (
            f"WITH merged AS NOT MATERIALIZED ({self.merged()}),\ntail AS NOT MATERIALIZED ({rows})\n"
            f"SELECT {self._columns('m')} FROM merged m\nUNION ALL\nSELECT {self._columns('t')} FROM tail t"
            f" WHERE t.{self._own('op')} = 'c' AND NOT {_older(places, outlook.swap.at)}"
        )


def _older(places: Sequence[str], order: Order) -> str:
    """Whether the row at a place (its three columns) stands before an order."""
    epoch, lsn, seq = places
    return (
        f"({epoch} < {order.epoch} OR ({epoch} = {order.epoch} AND"
        f" ({lsn} < {order.lsn} OR ({lsn} = {order.lsn} AND {seq} < {order.seq}))))"
    )


def _struct(order: Order) -> str:
    parts = ", ".join(f"{name} := {value}::BIGINT" for name, value in order._asdict().items())
    return f"struct_pack({parts})"


def _text(raw: str, name: str) -> str:
    """What `_raw` has of a column."""
    return f"map_extract({raw}, {literal(name)})[1]"


def _renamed(raw: str, renames: dict[str, str]) -> str:
    """The entries of `_raw` under the names of the layout, without those of columns that are gone and of old rows."""
    known = ", ".join(map(literal, renames))
    name = "e.key"
    changed = {old: new for old, new in renames.items() if old != new}
    if changed:
        cases = " ".join(f"WHEN {literal(old)} THEN {literal(new)}" for old, new in changed.items())
        name = f"CASE e.key {cases} ELSE e.key END"
    return f"[{{'key': {name}, 'value': e.value}} FOR e IN map_entries({raw}) IF e.key IN ({known})]"


def _raw_of(entries: str) -> str:
    """A `_raw` of these entries; NULL if there are none."""
    return f"CASE WHEN len({entries}) > 0 THEN map_from_entries({entries}) END"


__all__ = ["UNKNOWN", "Inexact", "fresh_sql"]
