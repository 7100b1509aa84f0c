"""The schema book: numbers of schema versions, durable and never given twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cdc.errors import InvariantBroken
from cdc.schema import SchemaBook
from cdc.state import open_state
from cdc.table import Column
from tests.support.logs import ORDERS, PEOPLE, SOURCE

PLAIN = replace(ORDERS, version=0)
WIDER = replace(PLAIN, columns=(*PLAIN.columns, Column(name="more", attnum=3, type_oid=25, missing="x'ü")))


def test_equal_content_gets_the_same_number_and_new_content_the_next(tmp_path: Path) -> None:
    state = open_state(tmp_path)
    book = SchemaBook(state, SOURCE)
    assert book.latest(ORDERS.table) is None
    assert book.register(PLAIN) == replace(PLAIN, version=1)
    assert book.register(replace(PLAIN, version=17)).version == 1
    assert book.register(WIDER) == replace(WIDER, version=2)
    assert book.register(PLAIN).version == 1
    for changed in (replace(PLAIN, identity="f"), replace(PLAIN, key=()), replace(PLAIN, oid=99)):
        assert book.register(changed).version == book.register(changed).version > 2
    assert book.latest(ORDERS.table) == replace(PLAIN, oid=99, version=5)


def test_numbers_are_durable_before_register_returns(tmp_path: Path) -> None:
    book = SchemaBook(open_state(tmp_path), SOURCE)
    book.register(PLAIN)
    looking = SchemaBook(open_state(tmp_path, readonly=True), SOURCE)
    assert looking.get(ORDERS.table, 1) == ORDERS
    book.register(WIDER)
    assert looking.latest(ORDERS.table) == replace(WIDER, version=2)
    assert looking.get(ORDERS.table, 2) == replace(WIDER, version=2)
    again = SchemaBook(open_state(tmp_path), SOURCE)
    assert again.register(WIDER).version == 2
    assert again.tables() == [ORDERS.table]


def test_two_books_of_one_source_never_give_one_number_to_two_schemas(tmp_path: Path) -> None:
    state = open_state(tmp_path)
    one, other = SchemaBook(state, SOURCE), SchemaBook(state, SOURCE)
    assert one.register(PLAIN).version == 1
    assert other.latest(ORDERS.table) == ORDERS
    assert one.register(WIDER).version == 2
    assert other.register(replace(PLAIN, identity="f")).version == 3
    assert other.register(WIDER).version == 2
    assert one.get(ORDERS.table, 3).identity == "f"


def test_tables_and_sources_count_for_themselves(tmp_path: Path) -> None:
    state = open_state(tmp_path)
    assert SchemaBook(state, "a").register(PLAIN).version == 1
    assert SchemaBook(state, "a").register(PEOPLE).version == 1
    assert SchemaBook(state, "b").latest(ORDERS.table) is None


def test_a_number_that_was_never_given_is_an_error(tmp_path: Path) -> None:
    book = SchemaBook(open_state(tmp_path), SOURCE)
    book.register(PLAIN)
    with pytest.raises(InvariantBroken, match="no version 2"):
        book.get(ORDERS.table, 2)
