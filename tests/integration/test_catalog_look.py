"""What the server's catalog shows of changes that publish nothing: the proofs behind cdc.watch, on every version."""

from __future__ import annotations

import psycopg
import pytest

from cdc.config import SourceConfig
from cdc.fingerprint import Catalog, Fingerprint
from cdc.table import TableId
from cdc.watch import compare
from connectors.postgres.snapshot import PostgresSnapshotReader
from tests.support.daemon import execute

pytestmark = pytest.mark.matrix


class Eye:
    """Looks at one database, and says what changed since the look before."""

    def __init__(self, dsn: str, **config: object) -> None:
        self.dsn = dsn
        self.reader = PostgresSnapshotReader(SourceConfig(name="s", dsn=dsn, publication=("p",), **config))  # type: ignore[arg-type]
        self.before: dict[TableId, Fingerprint] = {}

    def look(self) -> Catalog:
        return self.reader.tables()

    def after(self, *statements: str) -> dict[str, list[str]]:
        """Kinds of findings per table, after these statements."""
        execute(self.dsn, *statements)
        now = {t.schema.table: t for t in self.look().tables}
        found = {
            table.name: [f.kind for f in compare(self.before[table], now[table])]
            for table in self.before.keys() & now.keys()
        }
        self.before = now
        return {table: kinds for table, kinds in found.items() if kinds}


@pytest.fixture
def eye(database: str) -> Eye:
    execute(
        database,
        "create table toasted (id int primary key, note text)",
        "insert into toasted select g, 'x' from generate_series(1, 10) g",
        "create table small (id int primary key, n int)",
        "insert into small values (1, 1)",
    )
    return Eye(database)


def test_a_new_file_alone_is_told_from_a_rewrite(eye: Eye) -> None:
    eye.after("create publication p for table toasted, small")
    for table in ("toasted", "small"):
        assert eye.after(f"vacuum full {table}") == {}
        assert eye.after(f"cluster {table} using {table}_pkey") == {}
        assert eye.after(f"truncate {table}") == {}
        assert eye.after(f"alter table {table} alter id type int using id + 1") == {table: ["rewrite"]}
        assert eye.after(f"alter table {table} alter id set statistics 5") == {}
        assert eye.after(f"alter table {table} add c int default 5", f"alter table {table} alter c drop default") == {
            table: ["columns"]
        }
        assert eye.after(f"alter table {table} add d int default 5", f"vacuum full {table}") == {table: ["rewrite"]}
        assert eye.after(f"alter table {table} add e float default random()") == {table: ["rewrite"]}
        assert eye.after(f"alter table {table} drop e") == {table: ["columns"]}
    with pytest.raises(psycopg.errors.Error, match="unlogged"):
        execute(eye.dsn, "alter table small set unlogged")


def test_a_table_published_with_all_others_may_have_been_unlogged(eye: Eye) -> None:
    eye.after("create publication p for all tables")
    assert eye.after("alter table small set unlogged", "alter table small set logged") == {"small": ["rewrite"]}
    assert eye.after("alter table toasted set unlogged", "alter table toasted set logged") == {"toasted": ["rewrite"]}
    assert eye.after("vacuum full toasted", "truncate toasted") == {}
    assert eye.after("truncate small") == {"small": ["rewrite"]}, "not provable without a toast table"
    execute(eye.dsn, "alter table small set unlogged")
    assert [t.schema.table.name for t in eye.look().tables] == ["toasted"]


def test_a_column_with_a_default_has_the_value_of_the_old_rows(eye: Eye) -> None:
    execute(eye.dsn, "create publication p for table small", "alter table small add c text default 'old'")
    execute(eye.dsn, "alter table small alter c set default 'new'")
    assert eye.look().tables[0].schema.column("c").missing == "old"


def test_marks_tell_what_was_changed_and_changed_back(eye: Eye) -> None:
    eye.after("create publication p for table toasted, small")
    assert eye.after("alter publication p drop table small", "alter publication p add table small") == {
        "small": ["publication"]
    }
    both = {"small": ["publication"], "toasted": ["publication"]}
    whole = "insert, update, delete, truncate"
    assert (
        eye.after("alter publication p set (publish = 'insert')", f"alter publication p set (publish = '{whole}')")
        == both
    )
    assert eye.after("drop publication p", "create publication p for table toasted, small") == both
    assert eye.after("alter publication p set table small, toasted", "comment on publication p is 'x'") == {}
    catalogs = ("pg_publication", "pg_publication_rel", "pg_attribute", "pg_inherits", "pg_type")
    assert eye.after(*(f"vacuum (freeze) {c}" for c in catalogs), *(f"vacuum full {c}" for c in catalogs)) == {}
    with psycopg.connect(eye.dsn) as connection:
        version = connection.info.server_version
    if version >= 150000:
        filtered = "alter publication p set table toasted, small where (id > 0)"
        assert eye.after(filtered) == {"small": ["publication"]}
        assert eye.after(filtered) == {}
        assert eye.after("drop publication p", "create publication p for tables in schema public") == both
        moved = ("create schema s", "alter table small set schema s", "alter table s.small set schema public")
        assert eye.after(*moved) == {"small": ["publication"]}
        assert eye.after("grant select on small to public", "analyze small") == {}


def test_types_behind_columns_are_followed_to_their_labels_and_attributes(eye: Eye) -> None:
    eye.after(
        "create type mood as enum ('sad', 'fine')",
        "create domain feeling as mood",
        "create type pair as (a int, m feeling)",
        "create type moods as range (subtype = mood)",
        "create table enums (id int primary key, m mood)",
        "create table arrays (id int primary key, m mood[])",
        "create table domains (id int primary key, m feeling)",
        "create table pairs (id int primary key, m pair[])",
        "create table ranges (id int primary key, m moods)",
        "create publication p for table enums, arrays, domains, pairs, ranges, small",
    )
    everyone = {t: ["values"] for t in ("enums", "arrays", "domains", "pairs", "ranges")}
    assert eye.after("alter type mood add value 'great'") == {}
    assert eye.after("alter type mood rename value 'sad' to 'blue'") == everyone
    assert eye.after("alter type pair add attribute c text") == {"pairs": ["values"]}
    assert eye.after("alter type pair drop attribute a") == {"pairs": ["values"]}
    assert eye.after("alter type pair rename attribute c to d") == {}
    assert eye.after("alter type mood rename to temper") == {t: ["columns"] for t in ("enums", "arrays")}


ROOT = (
    "create table root (id int primary key, v text) partition by range (id)",
    "create table a partition of root for values from (0) to (10)",
    "create table b partition of root for values from (10) to (20)",
    "insert into root select g, 'x' from generate_series(0, 19) g",
)


def test_partitions_that_come_and_go(eye: Eye) -> None:
    eye.after(*ROOT, "create publication p for table root with (publish_via_partition_root = true)")
    attach = "alter table root attach partition {} for values from ({}) to ({})".format
    assert (
        eye.after("create table c partition of root for values from (20) to (30)", "insert into root values (20)") == {}
    )
    assert eye.after(f"create table d (like root including all); {attach('d', 30, 40)}") == {}, "it is empty"
    assert eye.after("insert into root values (30, 'x')") == {}
    came = {"root": ["partitions"]}
    assert (
        eye.after("create table e (like root including all)", "insert into e values (40)", attach("e", 40, 50)) == came
    )
    together = f"create table f (id int not null, v text); insert into f values (50); {attach('f', 50, 60)}"
    assert eye.after(f"begin; {together}; commit") == came, "in one transaction"
    assert eye.after("alter table root detach partition b") == came
    assert eye.after(attach("b", 10, 20)) == came
    assert eye.after("alter table root detach partition b", attach("b", 10, 20)) == came, "and back at once"
    assert eye.after("truncate a") == {"root": ["rewrite"]}
    assert eye.after("alter table a set unlogged", "alter table a set logged") == {"root": ["rewrite"]}
    assert eye.after("drop table a") == came
    sub = "create table g partition of root for values from (60) to (80) partition by range (id)"
    assert eye.after(sub, "create table g1 partition of g for values from (60) to (70)") == {}
    loose = "create table h (like root including all) partition by range (id)"
    inner = "create table h1 partition of h for values from (80) to (90)"
    assert eye.after(loose, inner, "insert into h values (80)", attach("h", 80, 100)) == came
    assert eye.after("create table i partition of root for values from (100) to (110)", "insert into i values (100)",
                     "truncate i") == came, "what was streamed before is gone"  # fmt: skip


def test_a_leaf_that_is_published_as_itself_leaves_with_its_place_in_the_tree(eye: Eye) -> None:
    eye.after(*ROOT, "create publication p for table root")
    back = "alter table root attach partition b for values from (10) to (20)"
    assert eye.after("alter table root detach partition b", back) == {"b": ["publication"]}
    assert eye.after("truncate a", "vacuum full a") == {}


def test_what_is_wanted_and_not_published_is_listed_with_the_statement(eye: Eye) -> None:
    execute(eye.dsn, 'create table "odd ""name" (id int primary key)', "create publication p for table small, toasted")
    seen = eye.look()
    assert [(u.table.name, u.fix) for u in seen.unpublished] == [
        ('odd "name', 'alter publication "p" add table "public"."odd ""name"')
    ]
    assert seen.own is False
    execute(eye.dsn, "comment on publication p is 'made by cdc'", seen.unpublished[0].fix)
    again = eye.look()
    assert (again.own, again.unpublished) == (True, [])
    assert again.lsn > seen.lsn
    only = eye.reader.tables(TableId("public", "small"))
    assert [t.schema.table.name for t in only.tables] == ["small"]


def test_a_role_without_any_privilege_sees_the_same(eye: Eye) -> None:
    eye.after(*ROOT, "create publication p for table root, small with (publish_via_partition_root = true)")
    execute(eye.dsn, "drop role if exists onlooker", "create role onlooker login")
    try:
        dsn = eye.dsn.replace("postgres@", "onlooker@")
        assert dsn != eye.dsn
        assert Eye(dsn).look().tables == eye.look().tables
    finally:
        execute(eye.dsn, "drop role onlooker")
