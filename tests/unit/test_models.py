"""Models over a real lake on disk: what they see, what they may not see, and what their frozen results are."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdc import models
from cdc.errors import CdcError, ModelFailed, StoreUnavailable
from cdc.lake.routing import RoutingStore
from cdc.table import TableId
from tests.support.lakes import SmallLake, table_id
from tests.support.views import Told

ORDERS = pa.table({"id": pa.array([1, 2, 3], pa.int64()), "customer_id": [7, 7, 8], "amount": [1.5, 2.5, 4.0]})


@pytest.fixture
def lake(tmp_path: Path) -> SmallLake:
    return SmallLake(tmp_path / "lake")


def tables(*names: str, source: str = "shop") -> dict[str, list[TableId]]:
    return {source: [table_id(name) for name in names]}


def rows(lake: SmallLake, sources: dict[str, list[TableId]], sql: str, **options: object) -> list[tuple[object, ...]]:
    found = models.query(lake.store, sources, sql, **options)  # type: ignore[arg-type]
    return list(zip(*(column.to_pylist() for column in found.columns), strict=True))


def run(lake: SmallLake, sql: str, path: Path, key: tuple[str, ...] = ("customer_id",), **options: object):
    return models.run_model(lake.store, options.pop("sources", tables("orders")), sql, key, path, **options)


# ---------------------------------------------------------------------- what SQL names


@pytest.mark.parametrize(
    ("sql", "inputs"),
    [
        ("select * from shop.a o join shop.b using (id)", {("shop", "public", "a"), ("shop", "public", "b")}),
        ('select 1 from shop."sales.orders"', {("shop", "sales", "orders")}),
        ("with x as (select 1 as a) select * from x, shop.a", {("shop", "public", "a")}),
        ("with recursive r as (select 1 a union all select a + 1 from r where a < 3) select * from r", set()),
        ("select (select max(x) from b.c) where exists (from d.e)", {("b", "public", "c"), ("d", "public", "e")}),
        ("select no_such_function(nothing) from shop.a -- with a comment;", {("shop", "public", "a")}),
        ('select * from shop."we""ird;--"', {("shop", "public", 'we"ird;--')}),
        ("select * from (pivot shop.p on x in (1, 2) using sum(y))", {("shop", "public", "p")}),
    ],
)  # fmt: skip
def test_input_tables_are_found_without_running_anything(sql: str, inputs: set[tuple[str, str, str]]) -> None:
    assert models.input_tables(sql) == {(source, TableId(schema, name)) for source, schema, name in inputs}


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("selec 1", "cannot be parsed"),
        ("select 1; select 2", "2 statements"),
        ("", "0 statements"),
        ("insert into shop.a values (1)", "no SELECT"),
        ("copy (select 1) to 'x'", "no SELECT"),
        ("attach 'x'", "no SELECT"),
        ("select * from orders", "names no source"),
    ],
)
def test_what_is_not_one_select_over_the_lake_is_refused(sql: str, says: str) -> None:
    with pytest.raises(ModelFailed, match=says):
        models.input_tables(sql)


def test_inputs_are_spelled_as_at_the_source_and_a_changelog_counts_as_its_table() -> None:
    sources = {"shop": [TableId("public", "Orders"), TableId("sales", "x")]}
    sql = 'select 1 from SHOP.orders, shop.orders_changelog, shop."sales.X"'
    assert models.input_tables(sql, sources) == {("shop", TableId("public", "Orders")), ("shop", TableId("sales", "x"))}
    with pytest.raises(ModelFailed, match=r"no table shop\.gone") as raised:
        models.input_tables("from shop.gone", sources)
    assert 'shop."sales.x"' in raised.value.hint
    twins = {"shop": [TableId("public", "Orders"), TableId("public", "orders")]}
    with pytest.raises(ModelFailed, match="may mean"):
        models.input_tables("from shop.orders", twins)


# ---------------------------------------------------------------------- what they see


def test_a_query_sees_the_rows_of_current_tables(lake: SmallLake) -> None:
    lake.write_current("shop", "orders", ORDERS, parts=2)
    lake.write_current("shop", 'sales.o%d\'s "x"', pa.table({"id": [9]}))
    sources = tables("orders", 'sales.o%d\'s "x"')
    sql = "select customer_id, sum(amount) s from shop.orders group by 1 order by 1"
    assert rows(lake, sources, sql) == [(7, 4.0), (8, 4.0)]
    assert rows(lake, sources, 'select id from shop."sales.o%d\'s ""x"""') == [(9,)]
    assert rows(lake, sources, "select id from shop.orders order by id", rows_max=2) == [(1,), (2,)]
    names = [row[0] for row in rows(lake, sources, "describe shop.orders")]
    assert names == ["id", "customer_id", "amount", "_epoch", "_lsn", "_seq", "_committed_at", "_origin", "_raw"]


def test_a_cut_is_read_at_its_versions_whatever_came_later(lake: SmallLake) -> None:
    first = lake.write_current("shop", "orders", ORDERS)
    lake.write_current("shop", "orders", ORDERS.slice(0, 1))
    cut = {"shop": {table_id("orders"): first}}
    assert rows(lake, tables("orders"), "select count(*) from shop.orders", cut=cut) == [(3,)]
    assert rows(lake, tables("orders"), "select count(*) from shop.orders") == [(1,)]


def test_a_changelog_is_read_as_far_as_its_current_table_has_merged_it(lake: SmallLake) -> None:
    change = pa.table({"_op": ["c"], "id": pa.array([1], pa.int64())})
    lake.append_changelog("shop", "orders", change)
    merged = lake.write_current("shop", "orders", ORDERS)
    later = pa.table({"_op": ["u"], "id": pa.array([2], pa.int64()), "added": ["new"]})
    delta_schema_grows = pa.schema([*later.schema])
    from cdc.lake.delta import DeltaLog
    from cdc.lake.layout import changelog_path

    DeltaLog(lake.store, changelog_path("shop", table_id("orders"))).evolve(delta_schema_grows)
    lake.append_changelog("shop", "orders", later, date="2026-01-03")
    cut = {"shop": {table_id("orders"): merged}}
    assert rows(lake, tables("orders"), "select _op, id from shop.orders_changelog", cut=cut) == [("c", 1)]
    assert rows(lake, tables("orders"), "select _op, id from shop.orders_changelog") == [("c", 1)]
    sql = "select _op, id, added, _date from shop.orders_changelog order by id"
    newest = rows(lake, tables("orders"), sql, fresh=Told(None))
    assert newest == [("c", 1, None, "2026-01-02"), ("u", 2, "new", "2026-01-03")]


def test_an_empty_table_keeps_its_columns_and_types(lake: SmallLake) -> None:
    schema = pa.schema(
        [
            ("i", pa.int16()), ("n", pa.decimal128(38, 10)), ("t", pa.timestamp("us")),
            ("z", pa.timestamp("us", "UTC")), ("l", pa.list_(pa.string())), ("b", pa.binary()),
            ("d", pa.date32()), ("f", pa.float32()), ("o", pa.bool_()),
        ]
    )  # fmt: skip
    lake.write_current("shop", "empty", schema.empty_table())
    found = models.query(lake.store, tables("empty"), "select i, n, t, z, l, b, d, f, o from shop.empty")
    assert found.num_rows == 0
    assert [f.type for f in found.schema] == [
        pa.int16(), pa.decimal128(38, 10), pa.timestamp("us"), pa.timestamp("us", "UTC"),
        found.schema.field("l").type, pa.binary(), pa.date32(), pa.float32(), pa.bool_(),
    ]  # fmt: skip
    assert found.schema.field("l").type.value_type == pa.string()


def test_a_column_that_no_object_holds_yet_is_null(lake: SmallLake) -> None:
    from cdc.lake.delta import DeltaLog
    from cdc.lake.layout import current_path

    lake.write_current("shop", "orders", ORDERS)
    DeltaLog(lake.store, current_path("shop", table_id("orders"))).evolve([pa.field("late", pa.int32())])
    assert rows(lake, tables("orders"), "select sum(late), count(*) from shop.orders") == [(None, 3)]


def test_connect_lake_shows_everything_at_once(lake: SmallLake) -> None:
    lake.write_current("shop", "orders", ORDERS)
    lake.write_current("crm", "people", pa.table({"id": [7]}))
    sources = {**tables("orders"), **tables("people", source="crm")}
    with models.connect_lake(lake.store, sources, changelogs=False) as connection:
        sql = "select count(*) from shop.orders o join crm.people p on p.id = o.customer_id"
        assert connection.execute(sql).fetchall() == [(2,)]


# ---------------------------------------------------------------------- what they may not see


@pytest.mark.parametrize(
    "sql",
    [
        "select * from read_csv('/etc/passwd')",
        "select content from read_text('/etc/hostname')",
        "select * from '/etc/passwd.csv'",
        "select * from glob('/*')",
        "select * from read_parquet('{root}/shop/public.secret/current/*.parquet')",
        "select * from read_json('{root}/shop/public.orders/current/_delta_log/00000000000000000000.json')",
        "select * from query('copy (select 1) to ''/tmp/x''')",
        "select * from sqlite_scan('/tmp/x', 'y')",
        "select * from read_parquet('https://example.com/x.parquet')",
        "select * from shop.secret",
        "select * from lake, shop.orders",
        "select * from shop.orders, python_variable.x",
    ],
)
def test_a_model_reaches_nothing_but_the_tables_that_it_was_given(lake: SmallLake, tmp_path: Path, sql: str) -> None:
    lake.write_current("shop", "orders", ORDERS)
    lake.write_current("shop", "secret", pa.table({"id": [1]}))
    with pytest.raises(CdcError) as raised:
        run(lake, sql.replace("{root}", str(lake.root)), tmp_path / "out" / "r.parquet", key=())
    assert isinstance(raised.value, ModelFailed)
    assert not (tmp_path / "out" / "r.parquet").exists()
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_connection_to_the_lake_cannot_be_opened_up_again(lake: SmallLake, tmp_path: Path) -> None:
    import duckdb

    lake.write_current("shop", "orders", ORDERS)
    callers_variable = pa.table({"secret": [1]})
    with models.connect_lake(lake.store, tables("orders"), changelogs=False) as connection:
        for statement in (
            "select * from callers_variable",
            "set enable_external_access = true",
            "set allowed_directories = ['/']",
            "set memory_limit = '100GB'",
            "install httpfs",
            "load httpfs",
            f"attach '{tmp_path}/x.db'",
            f"copy (select 1) to '{tmp_path}/x.csv'",
            f"export database '{tmp_path}/x'",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(statement)
    assert not (tmp_path / "x.db").exists()
    assert callers_variable.num_rows == 1


def test_a_daemon_without_models_never_loads_duckdb() -> None:
    code = "import sys, cdc.models, cdc.plan, cdc.sync, cdc.relations; sys.exit('duckdb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ)).returncode == 0


# ---------------------------------------------------------------------- frozen results


def test_a_result_is_frozen_with_its_faults_counted(lake: SmallLake, tmp_path: Path) -> None:
    lake.write_current("shop", "orders", ORDERS)
    lake.write_current("shop", "extra", pa.table({"a": pa.array([None, 7, 9, None], pa.int64()), "b": [1, 2, 3, 4]}))
    path = tmp_path / "deep" / "result.parquet"
    sql = "select customer_id, sum(amount) v from shop.orders group by 1 union all select a, b from shop.extra; -- done"
    result = run(lake, sql, path, sources=tables("orders", "extra"))
    assert (result.rows, result.null_keys, result.duplicate_keys, result.held) == (6, 2, 2, 4)
    assert result.inputs == {("shop", table_id("orders")), ("shop", table_id("extra"))}
    assert sorted(pq.read_table(path).column("v").to_pylist()) == [1, 2, 3, 4, 4, 4]
    again = run(lake, "select 1 as customer_id where false", path)
    assert again.rows == 0
    assert pq.read_table(path).num_rows == 0


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("select 1 as other from shop.orders", "no column customer_id"),
        ("select 1 as customer_id, 2 as x, 3 as X", "several columns"),
        ("select 1 as customer_id, interval 1 day as i", "interval"),
        ("select no_such(1) as customer_id", "no_such"),
        ("select 'secret'::int as customer_id from shop.orders", "fails on the lake's values"),
        ("select nope as customer_id from shop.orders", "nope"),
    ],
)
def test_a_model_that_does_not_work_says_why_without_values(
    lake: SmallLake, tmp_path: Path, sql: str, says: str
) -> None:
    lake.write_current("shop", "orders", ORDERS)
    with pytest.raises(ModelFailed, match=says) as raised:
        run(lake, sql, tmp_path / "r.parquet")
    assert "secret" not in str(raised.value)


def test_a_model_over_its_memory_or_its_time_fails_and_the_process_lives(lake: SmallLake, tmp_path: Path) -> None:
    lake.write_current("shop", "orders", ORDERS)
    endless = "select count(*) as customer_id from range(100000000000) a"
    with pytest.raises(ModelFailed, match="longer than"):
        run(lake, endless, tmp_path / "r.parquet", timeout_s=0.3)
    greedy = "select list(i) as customer_id from range(50000000) t(i)"
    with pytest.raises(ModelFailed, match="memory"):
        run(lake, greedy, tmp_path / "r.parquet", memory_limit="64MB")


def test_objects_that_were_vacuumed_away_are_for_the_next_run(lake: SmallLake, tmp_path: Path) -> None:
    lake.write_current("shop", "orders", ORDERS)
    for file in (lake.root / "shop" / "public.orders" / "current").glob("*.parquet"):
        file.unlink()
    with pytest.raises(StoreUnavailable):
        run(lake, "select customer_id from shop.orders", tmp_path / "r.parquet")


def test_a_query_begins_again_where_objects_of_another_lake_go_away(
    lake: SmallLake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = SmallLake(tmp_path / "far")
    store = RoutingStore(lake.store, {"far": far.store}, lambda source, table: "far")
    far.write_current("shop", "orders", ORDERS)
    run_query, asked = models._run_query, []

    def overtaken(*args: object) -> pa.Table:
        asked.append(args)
        if len(asked) == 1:
            old = list((far.root / "shop" / "public.orders" / "current").glob("*.parquet"))
            far.write_current("shop", "orders", ORDERS.slice(0, 1))
            for file in old:
                file.unlink()
        return run_query(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(models, "_run_query", overtaken)
    assert models.query(store, tables("orders"), "select id from shop.orders").to_pylist() == [{"id": 1}]
    assert len(asked) == 2


def test_a_disk_that_is_full_is_no_vacuum(lake: SmallLake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake.write_current("shop", "orders", ORDERS)
    run_query, asked = models._run_query, []
    monkeypatch.setattr(models, "_run_query", lambda *args: asked.append(args) or run_query(*args))
    (tmp_path / f"duckdb-{os.getpid()}").write_text("no folder can be made here")
    sql = "select count(*) from (select distinct i, i::varchar from shop.orders, range(2000000) t(i))"
    with pytest.raises(ModelFailed, match="temporary files") as raised:
        rows(lake, tables("orders"), sql, temp_dir=tmp_path, memory_limit="48MB")
    assert "make room" in raised.value.hint
    assert len(asked) == 1


def test_a_cut_that_is_gone_is_said(lake: SmallLake) -> None:
    first = lake.write_current("shop", "orders", ORDERS)
    for file in (lake.root / "shop" / "public.orders" / "current").glob("*.parquet"):
        file.unlink()
    lake.write_current("shop", "orders", ORDERS.slice(0, 1))
    notes: list[str] = []
    cut = {"shop": {table_id("orders"): first}}
    assert rows(lake, tables("orders"), "select id from shop.orders", cut=cut, note=notes.append) == [(1,)]
    assert "the recorded cut is not there any more" in notes[0]


def test_times_are_read_in_utc(lake: SmallLake) -> None:
    at = datetime.datetime(2024, 7, 1, 23, 30, tzinfo=datetime.UTC)
    lake.write_current("shop", "times", pa.table({"t": pa.array([at], pa.timestamp("us", "UTC"))}))
    assert rows(lake, tables("times"), "select t::varchar, t::date from shop.times") == [
        ("2024-07-01 23:30:00+00", datetime.date(2024, 7, 1))
    ]


def test_a_source_may_have_almost_any_name(lake: SmallLake) -> None:
    for source in ("main", "Shop-1", "select", "shop"):
        lake.write_current(source, "orders", ORDERS)
        assert rows(lake, tables("orders", source=source), f'select count(*) from "{source}".orders') == [(3,)]
    for source in ("memory", "temp", "system", "pg_catalog", "information_schema"):
        lake.write_current(source, "orders", ORDERS)
        with pytest.raises(ModelFailed, match="keeps that name"):
            rows(lake, tables("orders", source=source), f'select count(*) from "{source}".orders')
