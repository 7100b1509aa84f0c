"""Columns of Relation messages against histories that the messages do not tell: the right attnum, or a doubt."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cdc.table import Column
from connectors.postgres.resolution import resolve

NAMES, TYPES = "abcd", (23, 20, 25)
OPERATIONS = st.tuples(
    st.sampled_from(["add", "drop", "rename", "swap", "again", "type", "nothing"]),
    st.integers(0, 7),
    st.sampled_from(NAMES),
    st.sampled_from(TYPES),
)


def steps(operations: list[tuple[str, int, str, int]]) -> list[list[Column]]:
    """Every shape that a table has had, column by column with its true attnum."""
    columns = [Column(name="id", attnum=1, type_oid=20)]
    newest, shapes = 1, [columns]
    for what, at, name, kind in operations:
        columns = list(columns)
        others = columns[1:]
        taken = {c.name for c in columns}
        place = 1 + at % len(others) if others else 0
        if what == "add" and name not in taken:
            newest += 1
            columns.append(Column(name=name, attnum=newest, type_oid=kind))
        elif what == "drop" and others:
            del columns[place]
        elif what == "again" and others:
            newest += 1
            columns.append(replace(columns.pop(place), attnum=newest))
        elif what == "rename" and others and name not in taken:
            columns[place] = replace(columns[place], name=name)
        elif what == "swap" and len(others) > 1:
            one, two = columns[1], columns[2]
            columns[1:3] = [replace(one, name=two.name), replace(two, name=one.name)]
        elif what == "type" and others:
            columns[place] = replace(columns[place], type_oid=kind)
        shapes.append(columns)
    return shapes


def dropped_of(shapes: list[list[Column]], at: int) -> set[int]:
    seen = {c.attnum for shape in shapes[: at + 1] for c in shape}
    return seen - {c.attnum for c in shapes[at]}


@settings(max_examples=600)
@given(
    st.lists(OPERATIONS, max_size=12),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=6),
    st.booleans(),
)
def test_a_column_is_never_taken_for_another_without_a_doubt(
    operations: list[tuple[str, int, str, int]], looks: list[tuple[int, int]], known_before: bool
) -> None:
    shapes = steps(operations)
    base = shapes[0] if known_before else None
    known: list[list[Column]] = []
    message = -1
    for at, lead in sorted(looks):
        message = max(message, at % len(shapes)) if message >= 0 else at % len(shapes)
        catalog = min(len(shapes) - 1, message + lead)
        true = shapes[message]
        sent = [replace(c, attnum=0) for c in true]
        found = resolve(sent, shapes[catalog], dropped_of(shapes, catalog), base, known)
        assert [c.name for c in found.columns] == [c.name for c in true]
        assert [c.type_oid for c in found.columns] == [c.type_oid for c in true]
        assert len({c.attnum for c in found.columns}) == len(true)
        if not found.doubtful:
            assert [c.attnum for c in found.columns] == [c.attnum for c in true]
            base = list(found.columns)
        known = [list(found.columns), *known]


@given(st.lists(OPERATIONS, max_size=12), st.integers(0, 12))
def test_nothing_is_doubtful_while_the_stream_keeps_up(operations: list[tuple[str, int, str, int]], first: int) -> None:
    shapes = steps(operations)
    base = shapes[0]
    for at, true in enumerate(shapes):
        found = resolve([replace(c, attnum=0) for c in true], true, dropped_of(shapes, at), base, [])
        # What was made and dropped behind the newest column might be meant, for all that the stream has shown.
        behind = {n for n in dropped_of(shapes, at) if n > max(c.attnum for c in base)}
        gone = {c.attnum for c in base} - {c.attnum for c in true}
        if not behind and not (gone and len(true) >= len(base)):
            assert not found.doubtful
        assert [c.attnum for c in found.columns] == [c.attnum for c in true]
        base = true


def test_two_columns_that_lived_one_after_the_other_are_told_apart_where_it_can_be_known() -> None:
    id_, a2, a3 = (Column(name=n, attnum=i, type_oid=23) for n, i in (("id", 1), ("a", 2), ("a", 3)))
    sent = [replace(id_, attnum=0), replace(a2, attnum=0)]
    assert resolve(sent, [id_, a2], [], [id_, a2]).doubtful is False
    both = resolve(sent, [id_, a3], [2], [id_, a2])
    assert (both.columns, both.doubtful) == ((id_, a3), True), "the message does not tell"
    seen = resolve(sent, [id_, a3], [2], [id_, a3])
    assert (seen.columns, seen.doubtful) == ((id_, a3), False), "the stream has shown the second already"


def test_a_rename_and_a_new_type_that_the_catalog_has_already_are_found_by_place() -> None:
    id_, a = Column(name="id", attnum=1, type_oid=23), Column(name="a", attnum=2, type_oid=23)
    sent = [replace(id_, attnum=0), Column(name="then", attnum=0, type_oid=25)]
    found = resolve(sent, [id_, a], [], [id_, a])
    assert [(c.name, c.attnum, c.type_oid) for c in found.columns] == [("id", 1, 23), ("then", 2, 25)]
    assert not found.doubtful


def test_what_nothing_knows_has_a_number_of_its_own() -> None:
    sent = [Column(name=n, attnum=0, type_oid=23) for n in ("x", "y")]
    found = resolve(sent, [], [], None, whole=False)
    assert found.doubtful
    assert all(c.attnum < 0 for c in found.columns)
    assert len({c.attnum for c in found.columns}) == 2


def test_very_wide_tables_are_resolved_in_time() -> None:
    columns = [Column(name=f"c{i}", attnum=i, type_oid=23) for i in range(1, 1601)]
    sent = [replace(c, attnum=0) for c in columns]
    assert resolve(sent, columns, [], columns).columns == tuple(columns)
    thinned = [c for c in columns if c.attnum % 2]
    found = resolve([replace(c, attnum=0) for c in thinned], thinned, range(2, 1601, 2), thinned)
    assert found.columns == tuple(thinned)
