"""What publications show of tables, as `check`, the stream's schemas and snapshots see it.

No daemon: the connector's own parts are asked. What then streams and lands is told in test_publish_story.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from cdc.config import SourceConfig
from cdc.errors import SourceRefused
from cdc.ports import Finding
from cdc.table import TableId
from connectors.postgres.admin import PostgresAdmin
from connectors.postgres.snapshot import PostgresSnapshotReader
from connectors.postgres.source import PostgresSource
from tests.support.daemon import execute

pytestmark = pytest.mark.matrix


class Asked:
    """The connector's parts on one database; `publication` names those that are configured."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._readers: list[PostgresSnapshotReader] = []
        with psycopg.connect(dsn) as connection:
            self.version = connection.info.server_version

    def config(self, *publications: str, **keys: Any) -> SourceConfig:
        return SourceConfig(name="shop", dsn=self.dsn, slot="cdc_asked", publication=publications or ("p",), **keys)

    def findings(self, *publications: str, **keys: Any) -> list[Finding]:
        found = PostgresAdmin(self.config(*publications, **keys)).check()
        return [f for f in found if f.severity in ("error", "warning") and f.name != "slot"]

    def reader(self, *publications: str, **keys: Any) -> PostgresSnapshotReader:
        self._readers.append(PostgresSnapshotReader(self.config(*publications, **keys)))
        return self._readers[-1]

    def schemas(self, *publications: str, **keys: Any) -> dict[str, Any]:
        return {str(f.schema.table): f.schema for f in self.reader(*publications, **keys).tables().tables}

    def rows(self, table: str, *publications: str) -> list[dict[str, Any]]:
        """Every row that a snapshot reads, chunk by chunk."""
        reader = self.reader(*publications)
        schema = next(f.schema for f in reader.tables().tables if str(f.schema.table) == table)
        reader.begin(schema)
        found: list[dict[str, Any]] = []
        after = None
        while True:
            read = reader.read(after=after, rows_max=2)
            cells = [c.to_pylist() for c in read.columns]
            names = [c.name for c in schema.columns]
            found += [dict(zip(names, row, strict=True)) for row in zip(*cells, strict=True)]
            if read.done:
                reader.end()
                return found
            after = read.last_key

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


@pytest.fixture
def asked(database: str) -> Iterator[Asked]:
    found = Asked(database)
    yield found
    found.close()


def test_a_publication_that_leaves_out_an_operation_is_refused_unless_the_table_is_declared(asked: Asked) -> None:
    execute(
        asked.dsn,
        "create table whole (id int primary key)",
        "create table events (id int primary key)",
        "create publication p for table whole",
        "create publication \"some\" for table events with (publish = 'insert, update')",
    )
    (told,) = asked.findings("p", "some")
    assert (told.severity, told.object) == ("error", "public.events")
    assert "delete, truncate" in told.message
    assert told.fix.startswith("alter publication \"some\" set (publish = 'insert, update, delete, truncate')")
    for refusing in (
        lambda: asked.schemas("p", "some"),
        lambda: PostgresSource(asked.config("p", "some")).open(None, None, 1),  # type: ignore[arg-type]
    ):
        with pytest.raises(SourceRefused, match="does not publish delete, truncate") as refused:
            refusing()
        assert 'alter publication "some"' in refused.value.hint
    declared = asked.schemas("p", "some", partial_operations=("public.ev*",))
    assert set(declared) == {"public.whole", "public.events"}
    assert asked.findings("p", "some", partial_operations=("public.ev*",)) == []
    execute(asked.dsn, told.fix.partition(";")[0])
    assert asked.findings("p", "some") == []


def test_publications_of_one_table_that_add_up_to_all_operations_are_whole(asked: Asked) -> None:
    execute(
        asked.dsn,
        "create table t (id int primary key)",
        "create publication a for table t with (publish = 'insert, truncate')",
        "create publication b for table t with (publish = 'update, delete')",
    )
    assert asked.findings("a", "b") == []
    assert [f.name for f in asked.findings("a")] == ["published operations"]


def test_column_lists_and_filters_of_several_publications_go_together_or_are_refused(asked: Asked) -> None:
    if asked.version < 150000:
        pytest.skip("column lists and row filters begin with Postgres 15")
    execute(
        asked.dsn,
        "create table t (id int primary key, n int, secret text)",
        "insert into t select g, g, 'hidden' from generate_series(1, 9) g",
        "create publication a for table t (id, n) where (id < 3)",
        "create publication b for table t (n, id) where (id > 7)",
        "create publication c for table t",
        "create publication d for table t (id, n) where (id < 3) with (publish = 'insert')",
        "create publication e for table t (n) ",
    )
    assert asked.findings("a", "b") == []
    assert [c.name for c in asked.schemas("a", "b")["public.t"].columns] == ["id", "n"]
    assert asked.rows("public.t", "a", "b") == [{"id": i, "n": i} for i in (1, 2, 8, 9)]
    (told,) = asked.findings("a", "c")
    assert "different columns of table public.t" in told.message
    with pytest.raises(SourceRefused, match="different columns"):
        asked.schemas("a", "c")
    (told,) = asked.findings("d", "b")
    assert "different row filters" in told.message, "an insert that b hides could never be updated"
    assert {f.name for f in asked.findings("e")} == {"key"}
    assert asked.schemas("e")["public.t"].key == (), "half a key would take different rows for one"


def test_a_partition_is_named_as_the_stream_names_it_whatever_the_publications_say_of_it(asked: Asked) -> None:
    execute(
        asked.dsn,
        "create table r (id int primary key) partition by range (id)",
        "create table l1 partition of r for values from (0) to (10)",
        "create table mid partition of r for values from (10) to (20) partition by range (id)",
        "create table l2 partition of mid for values from (10) to (15)",
        "create table rest partition of r default",
        "insert into r values (1), (11), (100)",
        "create publication by_root for table r with (publish_via_partition_root = true)",
        "create publication by_leaf for table r",
        "create publication one for table l1",
        "create publication middle for table mid with (publish_via_partition_root = true)",
    )
    assert set(asked.schemas("by_root")) == {"public.r"}
    assert set(asked.schemas("by_leaf")) == {"public.l1", "public.l2", "public.rest"}
    assert set(asked.schemas("by_root", "one")) == {"public.r"}, "its changes come as the root's"
    assert set(asked.schemas("by_root", "by_leaf")) == {"public.r"}
    assert set(asked.schemas("middle", "one")) == {"public.mid", "public.l1"}
    assert asked.rows("public.r", "by_root") == [{"id": 1}, {"id": 11}, {"id": 100}]
    assert asked.rows("public.l2", "by_leaf") == [{"id": 11}]
    assert asked.findings("by_root") == asked.findings("by_leaf") == []
    assert [f.object for f in asked.findings("middle", "one")] == ["public.r"], "its other partitions are missing"


def test_a_partitioned_table_without_a_key_is_read_partition_by_partition(asked: Asked) -> None:
    execute(
        asked.dsn,
        "create table r (g text, id int, gone int, n int) partition by list (g)",
        "create table a (n int, x int, id int, gone int, g text)",
        "alter table a drop x",
        "alter table r attach partition a for values in ('a')",
        "create table b partition of r for values in ('b')",
        "alter table r drop gone",
        "create table rest partition of r default",
        "insert into r select g, i, i * 10 from unnest('{a,b,c}'::text[]) g, generate_series(1, 2) i",
        "create publication p for table r with (publish_via_partition_root = true)",
    )
    rows = asked.rows("public.r")
    assert sorted((r["g"], r["id"], r["n"]) for r in rows) == [(g, i, i * 10) for g in "abc" for i in (1, 2)]


def test_a_parent_of_inheritance_and_its_children_are_each_read_once(asked: Asked) -> None:
    execute(
        asked.dsn,
        "create table parent (id int primary key)",
        "create table child (extra text, primary key (id)) inherits (parent)",
        "insert into parent values (1)",
        "insert into child values (2, 'two')",
        "create publication p for table parent",
    )
    assert asked.rows("public.parent") == [{"id": 1}]
    assert asked.rows("public.child") == [{"id": 2, "extra": "two"}]


def test_a_stored_generated_column_is_there_where_it_is_published_and_declared_absent_elsewhere(asked: Asked) -> None:
    execute(
        asked.dsn,
        "create table t (id int primary key, doubled int generated always as (id * 2) stored, n int)",
        "insert into t (id, n) values (1, 1)",
        "create publication p for table t",
    )
    schema = asked.schemas()["public.t"]
    assert ([c.name for c in schema.columns], schema.absent) == (["id", "n"], ("doubled",))
    assert asked.rows("public.t") == [{"id": 1, "n": 1}]
    found = {f.name: f for f in PostgresAdmin(asked.config()).check()}
    assert "doubled" in found["generated columns"].message
    if asked.version < 180000:
        return
    execute(asked.dsn, "alter table t add seen int generated always as (id * 3) virtual")
    for publishing in ("alter publication p set (publish_generated_columns = stored)", None):
        if publishing is None:
            execute(asked.dsn, "alter publication p set (publish_generated_columns = none)")
            publishing = "alter publication p set table t (id, doubled, n)"
        execute(asked.dsn, publishing)
        schema = asked.schemas()["public.t"]
        assert ([c.name for c in schema.columns], schema.absent) == (["id", "doubled", "n"], ("seen",))
        assert asked.rows("public.t") == [{"id": 1, "doubled": 2, "n": 1}]


def test_a_key_is_what_old_tuples_carry_and_nothing_that_looks_like_one(asked: Asked) -> None:
    execute(
        asked.dsn,
        "create table other (id int primary key)",
        "create table fk (id int primary key, other int not null unique references other)",
        "create table included (b int, a int, note text, primary key (a, b) include (note))",
        "create table by_index (id int primary key, code text not null unique)",
        "alter table by_index replica identity using index by_index_code_key",
        "create table deferred (id int primary key deferrable initially deferred)",
        "create table deferred_full (id int primary key deferrable)",
        "alter table deferred_full replica identity full",
        "create table only_unique (id int not null unique)",
        "create table nothing (id int primary key)",
        "alter table nothing replica identity nothing",
        "create table torn (a int, g int generated always as (a % 2) stored, primary key (a, g))",
        "create publication p for all tables",
    )
    keys = {name.removeprefix("public."): s.key for name, s in asked.schemas().items()}
    assert keys == {
        "other": ("id",), "fk": ("id",), "included": ("a", "b"), "by_index": ("code",), "deferred": (),
        "deferred_full": (), "only_unique": (), "nothing": ("id",), "torn": (),
    }  # fmt: skip


def test_a_partition_whose_identity_lacks_the_roots_key_is_named_and_the_table_has_no_key(asked: Asked) -> None:
    execute(
        asked.dsn,
        "create table r (id int primary key, code int not null) partition by range (id)",
        "create table a partition of r for values from (0) to (10)",
        "create table b partition of r for values from (10) to (20)",
        "create unique index b_code on b (code)",
        "create publication p for table r with (publish_via_partition_root = true)",
    )
    assert asked.schemas()["public.r"].key == ("id",)
    execute(asked.dsn, "alter table r replica identity full")
    schema = asked.schemas()["public.r"]
    assert (schema.identity, schema.key) == ("d", ("id",)), "partitions do not inherit it"
    execute(asked.dsn, "alter table a replica identity full", "alter table b replica identity full")
    assert asked.schemas()["public.r"].identity == "f"
    execute(asked.dsn, "alter table r replica identity default", "alter table b replica identity using index b_code")
    assert asked.schemas()["public.r"].key == ()
    told = asked.findings()
    assert "public.b" in told[0].message
    execute(asked.dsn, told[0].fix)
    assert asked.findings() == []


def test_views_sequences_and_tables_without_wal_are_left_alone(asked: Asked) -> None:
    execute(
        asked.dsn,
        "create table t (id serial primary key)",
        "create unlogged table unlogged (id int primary key)",
        "create view v as select * from t",
        "create materialized view m as select * from t",
        "create foreign data wrapper w",
        "create server s foreign data wrapper w",
        "create foreign table f (id int) server s",
        "create publication p for all tables",
    )
    assert set(asked.schemas()) == {"public.t"}
    assert asked.findings() == []
    assert TableId("public", "t") == asked.schemas()["public.t"].table


def test_all_tables_of_a_schema_may_be_published_at_once(asked: Asked) -> None:
    if asked.version < 150000:
        pytest.skip("publications of schemas begin with Postgres 15")
    execute(
        asked.dsn,
        "create schema one",
        "create table one.a (id int primary key)",
        "create publication p for tables in schema one",
        "create table one.b (id int primary key)",
        "create table c (id int primary key)",
    )
    assert set(asked.schemas()) == {"one.a", "one.b"}
