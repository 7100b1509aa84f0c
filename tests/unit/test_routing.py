"""Which store a key goes to, and what is seen of stores that hold objects of other lakes' tables."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from cdc.config import Config, LakeConfig, NamedLakeConfig, SourceConfig, TableConfig
from cdc.errors import ConfigError, StoreUnavailable
from cdc.lake.layout import anchor_key, changelog_path, current_path, table_path, tables_in
from cdc.lake.routing import RoutingStore, open_lake, stores_of
from cdc.places import place_of
from cdc.table import TableId
from connectors.local.store import LocalStore

PERSON, ORDERS = TableId("hr", "person"), TableId("public", "orders")


def lake(directory: Path, **named: str) -> LakeConfig:
    others = {name: NamedLakeConfig(name=name, url=(directory / folder).as_uri()) for name, folder in named.items()}
    return LakeConfig(url=(directory / "main").as_uri(), named=others)


def config(directory: Path, source: SourceConfig, **named: str) -> Config:
    return Config(path=None, state_dir=directory, sources={source.name: source}, lake=lake(directory, **named))


def routed(directory: Path) -> RoutingStore:
    found = open_lake(config(directory, SourceConfig(name="Shop.2", lakes={"hr.*": "eu"}), eu="eu", us="us"))
    assert isinstance(found, RoutingStore)
    return found


def test_a_table_goes_to_its_lake_with_everything_below_it_and_nothing_else_does(tmp_path: Path) -> None:
    store = routed(tmp_path)
    own = [f"{changelog_path('Shop.2', PERSON)}/x", f"{current_path('Shop.2', PERSON)}/_delta_log/0.json"]
    main = [
        anchor_key("Shop.2"), f"{changelog_path('Shop.2', ORDERS)}/x", "_cdc/probe-1", "Shop@2E2/_schema_changes/x",
        f"{table_path('other', PERSON)}/x", "hr.person/hr.person", "Shop@2E2/hr@ZZ.person/x", "top",
    ]  # fmt: skip
    for key in own + main:
        store.put(key, b"")
    assert [o.key for o in store.stores["eu"].list("")] == sorted(own)
    assert [o.key for o in store.stores[""].list("")] == sorted(main)
    assert list(store.stores["us"].list("")) == []
    assert store.location(own[0])[0].startswith(str(tmp_path / "eu"))
    assert store.location(main[0])[0].startswith(str(tmp_path / "main"))


def test_what_a_table_left_in_another_lake_is_not_seen_and_not_deleted(tmp_path: Path) -> None:
    store = routed(tmp_path)
    key, left = f"{changelog_path('Shop.2', PERSON)}/new", f"{changelog_path('Shop.2', PERSON)}/left"
    store.stores[""].put(left, b"")
    store.put(key, b"")
    for prefix in ("", "Shop@2E2/", "Shop@2E2/hr.per", f"{changelog_path('Shop.2', PERSON)}/"):
        assert [o.key for o in store.list(prefix)] == [key], prefix
    assert store.get(left) is None
    store.delete([left, key])
    assert store.stores[""].get(left) is not None
    assert list(store.list("")) == []
    assert tables_in(store, "Shop.2") == []


def test_lists_of_all_stores_are_merged_in_order_and_read_as_far_as_they_are_used(tmp_path: Path) -> None:
    store = routed(tmp_path)
    tables = [TableId(schema, f"t{n}") for schema, n in itertools.product(("a", "hr", "z"), range(30))]
    for table in tables:
        store.put(f"{table_path('Shop.2', table)}/x", b"")
    keys = [o.key for o in store.list("Shop@2E2/")]
    assert keys == sorted(f"{table_path('Shop.2', t)}/x" for t in tables)
    assert tables_in(store, "Shop.2") == sorted(tables)


def test_a_store_that_fails_is_told_and_no_other_takes_its_place(tmp_path: Path) -> None:
    store = routed(tmp_path)
    (tmp_path / "eu").rmdir()
    (tmp_path / "eu").write_text("no directory")
    with pytest.raises(StoreUnavailable):
        store.put(f"{changelog_path('Shop.2', PERSON)}/x", b"")
    store.put(f"{changelog_path('Shop.2', ORDERS)}/x", b"")
    assert [o.key for o in store.stores[""].list("")] == [f"{changelog_path('Shop.2', ORDERS)}/x"]


def test_without_lakes_of_other_names_there_is_one_store_and_nothing_in_between(tmp_path: Path) -> None:
    plain = open_lake(config(tmp_path, SourceConfig(name="shop")))
    assert isinstance(plain, LocalStore)
    assert list(stores_of(plain, lake(tmp_path))) == [""]


def test_the_tables_own_word_counts_before_globs_and_the_first_glob_before_others() -> None:
    source = SourceConfig(
        name="shop",
        lakes={"hr.*_public": "us", "hr.*": "eu", "*.*": "main"},
        table={
            t: TableConfig(name=t, lake=name) for t, name in (("hr.flags", "main"), ("a.b", "us"), ("hr.plain", ""))
        },
    )
    found = {t: source.lake_of(t) for t in ("hr.person", "hr.x_public", "hr.flags", "hr.plain", "a.b", "a.c")}
    assert found == {"hr.person": "eu", "hr.x_public": "us", "hr.flags": "", "hr.plain": "eu", "a.b": "us", "a.c": ""}


def test_a_lake_that_differs_in_its_options_only_is_the_same_place() -> None:
    main = LakeConfig(
        url="s3://bucket/lake",
        named={
            "ia": NamedLakeConfig(name="ia", url="s3://bucket/lake/", options={"storage_class": "STANDARD_IA"}),
            "eu": NamedLakeConfig(name="eu", url="s3://bucket/lake", endpoint_url="https://s3.example.org"),
        },
    )
    assert place_of(main, "") == place_of(main, "ia") == ""
    assert place_of(main, "eu") == "s3://bucket/lake at https://s3.example.org"


def test_a_lake_of_a_kind_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    wrong = LakeConfig(url=tmp_path.as_uri(), named={"eu": NamedLakeConfig(name="eu", url="nowhere://x")})
    with pytest.raises(ConfigError, match="nowhere"):
        open_lake(Config(path=None, state_dir=tmp_path, sources={}, lake=wrong))
