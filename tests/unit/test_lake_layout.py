"""Names in the lake: one-to-one, readable by every Delta reader, and free of collisions."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import given
from hypothesis import strategies as st

from cdc.lake.delta import DeltaLog
from cdc.lake.layout import (
    anchor_key,
    changelog_path,
    current_path,
    decode_name,
    encode_name,
    lease_key,
    system_name,
    system_prefix,
    table_of_path,
    table_path,
)
from cdc.table import TableId
from connectors.local.store import LocalStore

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)


def test_plain_names_stand_as_they_are() -> None:
    assert table_path("shop", TableId("public", "order_items-2")) == "shop/public.order_items-2"
    assert changelog_path("shop", TableId("public", "a")) == "shop/public.a/changelog"
    assert current_path("shop", TableId("public", "a")) == "shop/public.a/current"
    assert lease_key("shop") == "shop/_cdc/lease.json"
    assert anchor_key("shop") == "shop/_cdc/source.json"


def test_other_bytes_are_escaped_and_dots_in_names_never_separate() -> None:
    assert encode_name("a.b c/é@") == "a@2Eb@20c@2F@C3@A9@40"
    assert table_path("s", TableId("a.b", "c")) != table_path("s", TableId("a", "b.c"))


@given(NAMES, NAMES, NAMES)
def test_every_name_comes_back_from_its_path(source: str, schema: str, name: str) -> None:
    table = TableId(schema, name)
    path = changelog_path(source, table)
    assert path.count("/") == 2
    assert table_of_path(path) == table
    assert decode_name(path.split("/")[0]) == source


@pytest.mark.parametrize("name", ["ü" * 31, "表" * 21, "." * 63, "x" * 63, "ü" * 20, "ü" * 21])
def test_the_longest_names_of_postgres_fit_into_a_directory_name(name: str) -> None:
    path = table_path("shop", TableId(name, name))
    assert max(len(part) for part in path.split("/")) <= 255
    assert table_of_path(path + "/current") == TableId(name, name)


def test_paths_that_are_no_tables_are_none() -> None:
    assert table_of_path("shop/_cdc/lease.json") is None
    assert table_of_path("shop") is None
    assert table_of_path("shop/public.a@zz/current") is None
    with pytest.raises(ValueError):
        decode_name("a%20b")


def test_tables_with_hard_names_are_opened_by_a_plain_delta_reader(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for name in ("we ird", "100%25", "naïve/..\\x", "a.b", "quote\"'", "日本", "@20"):
        path = current_path("s p", TableId("public", name))
        DeltaLog(store, path).open_or_create(pa.schema([pa.field("a", pa.int32())]))
        assert DeltaTable(tmp_path / path).version() == 0


def test_a_collision_moves_all_system_columns_whatever_the_case() -> None:
    assert system_prefix(["id", "lsn", "_x"]) == "_"
    assert system_prefix(["id", "_LSN"]) == "__"
    assert system_prefix(["_date", "__op"]) == "___"
    assert system_name("_lsn", system_prefix(["_op"])) == "__lsn"
