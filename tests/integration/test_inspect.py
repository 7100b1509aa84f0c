"""`cdc inspect` on databases whose numbers are known: what it measures is what was put there."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cdc.cli import main
from cdc.config import SourceConfig
from cdc.inspection import Request
from cdc.verbs.inspect import document
from cdc.verbs.inspect_page import page
from connectors.postgres.source import PostgresKind
from tests.support.daemon import execute
from tests.support.postgres import private_server
from tests.support.waiting import wait_until

pytestmark = pytest.mark.matrix

SECRET = "value-that-nobody-may-see"
ODD = """we"ird <script>alert('x')</script> & co"""


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def measured(
    dsn: str, *, during: Callable[[], None] = lambda: None, interval_s: float = 0.2, **request: Any
) -> dict[str, Any]:
    """The document of an inspection; `during` runs in a thread once counting has begun, and ends within it."""
    begun = threading.Event()

    def write() -> None:
        assert begun.wait(60)
        during()

    writer = threading.Thread(target=write)
    writer.start()
    config = SourceConfig(
        name="shop", dsn=dsn, slot="cdc_inspect", publication=("cdc_inspect",), chunk_rows=4000, lock_timeout_s=0.3
    )
    try:
        found = PostgresKind.inspector(config).inspect(Request(interval_s=interval_s, **request), lambda _: begun.set())
    finally:
        begun.set()
        writer.join(60)
    assert SECRET not in page(found)
    result = json.loads(json.dumps(document(found)))
    assert SECRET not in json.dumps(result)
    assert isinstance(result, dict)
    return result


def table(found: dict[str, Any], name: str) -> dict[str, Any]:
    [one] = [t for t in found["tables"] if t["table"] == f"public.{name}"]
    assert isinstance(one, dict)
    return one


def findings(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [f for f in found["findings"] if f["name"] == name]


def counted(dsn: str, name: str) -> int:
    with psycopg.connect(dsn) as connection:
        row = connection.execute("select pg_stat_get_tuples_inserted(%s::regclass)", [name]).fetchone()
    assert row is not None
    return int(row[0])


@pytest.fixture
def shop(database: str) -> Iterator[str]:
    """Tables with known rows, half of one deleted, two without a key, and a transaction that nobody ends."""
    execute(
        database,
        "create table orders (id int primary key, created_at timestamptz not null default now(), note text)",
        "create table bloated (id int primary key, note text)",
        "create table pairs (a int, b int, note text)",
        "create table nearly (a int, b int, note text)",
        "create table indexed (code text not null, n int)",
        "create unique index indexed_code on indexed (code)",
        "create table open_one (id int primary key)",
        f"insert into orders select g, now() - g * interval '1 hour', '{SECRET}' from generate_series(1, 2000) g",
        f"insert into bloated select g, '{SECRET}' || repeat('x', 200) from generate_series(1, 20000) g",
        f"insert into pairs select g / 10, g % 10, '{SECRET}' from generate_series(1, 3000) g",
        "insert into nearly select * from pairs",
        f"insert into nearly select 1, 1, '{SECRET}' from generate_series(1, 5)",
        "insert into nearly values (null, 1, null)",
        f"insert into indexed values ('{SECRET}', 1)",
        "delete from bloated where id % 2 = 0",
        "vacuum analyze",
    )
    # Counters come a little later than the changes.
    wait_until(lambda: counted(database, "orders") == 2000, message="the counters of what was put there")
    with psycopg.connect(database, application_name="forgotten") as forgotten:
        forgotten.execute("insert into open_one values (1)")
        yield database
        forgotten.rollback()


def test_what_is_measured_is_what_is_there(shop: str) -> None:
    written: list[int] = []

    def write() -> None:
        with psycopg.connect(shop, autocommit=True) as connection:
            position = "select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::int8"
            written.append(connection.execute(position).fetchone()[0])
            connection.execute("insert into orders select g, now(), 'new' from generate_series(2001, 2300) g")
            connection.execute("update orders set note = 'late' where id between 101 and 200")
            connection.execute("update orders set created_at = 'infinity' where id = 1")
            connection.execute("delete from orders where id between 51 and 100")
            written.append(connection.execute(position).fetchone()[0])

    found = measured(shop, during=write, interval_s=1.0, late_after_s=86_400.0)

    orders = table(found, "orders")
    assert (orders["key"], orders["identity"], orders["published"]) == (["id"], "default", False)
    changes = orders["changes"]
    assert (changes["inserts"], changes["updates"], changes["deletes"]) == (300, 101, 50)
    assert changes["per_second"] == pytest.approx(451 / changes["seconds"])
    ages = orders["ages"]
    assert (ages["column"], ages["changed_at"]) == ("created_at", "interval")
    assert (ages["rows"], ages["rows_seen"], ages["without"], ages["late"]) == (401, 401, 1, 100)
    assert ages["late_share"] == 0.25
    assert ages["oldest_seconds"] == pytest.approx(200 * 3600, abs=60)
    assert ages["counts"]["under 1 min"] == 300
    assert ages["counts"]["under 7 days"] + ages["counts"]["under 30 days"] == 100
    assert found["wal"]["bytes"] >= written[1] - written[0] > 0

    bloated = table(found, "bloated")
    assert bloated["rows_estimated"] == 10_000
    assert bloated["space"]["unused_share"] == pytest.approx(0.5, abs=0.05)
    with psycopg.connect(shop) as connection:
        size = connection.execute("select pg_relation_size('bloated'), pg_indexes_size('bloated')").fetchone()
        with connection.cursor().copy("copy (select * from bloated order by id limit 4000) to stdout csv") as copy:
            chunk = [len(data) for data in copy]
    assert (bloated["size"]["heap_bytes"], bloated["size"]["index_bytes"]) == size
    assert (bloated["sample"]["rows"], bloated["sample"]["bytes"]) == (4000, sum(chunk))
    [planned] = [t for t in found["plan"]["tables"] if t["table"] == "public.bloated"]
    assert (planned["strategy"], planned["chunks"], planned["chunk_rows"]) == ("keys", 3, 4000)
    assert planned["bytes"] == pytest.approx(sum(chunk) * 2.5, abs=2)
    assert planned["seconds"] >= bloated["sample"]["seconds"] * 2.5
    alone = [t["seconds"] for t in found["plan"]["tables"]]
    assert max(alone) <= found["plan"]["seconds"] <= sum(alone), "two readers share the tables"

    [forgotten] = [t for t in found["transactions"] if "forgotten" in t["who"]]
    assert forgotten["writes"]
    assert forgotten["seconds"] > 1.0
    with psycopg.connect(shop) as connection:
        assert connection.execute("select count(*) from pg_publication").fetchone() == (0,)
        assert connection.execute("select count(*) from pg_replication_slots").fetchone() == (0,)


def test_would_be_keys_are_counted_exactly(shop: str) -> None:
    found = measured(shop)

    [pair] = table(found, "pairs")["candidates"]
    assert (pair["columns"], pair["unique"], pair["exact"], pair["rows_read"]) == (["a", "b"], True, True, 3000)
    counted = {tuple(c["columns"]): c for c in table(found, "nearly")["candidates"]}
    nearly = counted["a", "b"]
    assert (nearly["unique"], nearly["rows_read"], nearly["rows_null"]) == (False, 3006, 1)
    assert (nearly["extra_rows"], nearly["groups"], nearly["largest_group"]) == (5, 1, 6)
    [indexed] = table(found, "indexed")["candidates"]
    assert (indexed["columns"], indexed["index"], indexed["unique"]) == (["code"], "indexed_code", True)

    advice = {f["object"]: f["fix"] for f in findings(found, "would-be key")}
    assert set(advice) == {"public.pairs", "public.indexed"}
    warned = {f["object"] for f in findings(found, "replica identity")}
    assert warned == {"public.pairs", "public.nearly", "public.indexed"}
    assert found["endangered"]
    execute(shop, *advice.values(), "alter table nearly replica identity full")
    after = measured(shop)
    assert [f for f in findings(after, "replica identity") if f["severity"] != "info"] == []
    assert table(after, "pairs")["key"] == ["a", "b"]
    assert table(after, "indexed")["key"] == ["code"]


def test_of_a_big_table_a_share_is_read_and_the_bound_is_said(database: str) -> None:
    rows = 17_000  # one in each block
    execute(
        database,
        "create table big (a int, at timestamp not null, filling text) with (fillfactor = 40)",
        "alter table big alter filling set storage plain",
        f"insert into big select g, now() - interval '2 days', repeat('x', 3000) from generate_series(1, {rows}) g",
    )

    def write() -> None:
        execute(
            database,
            "insert into big select g, now(), repeat('x', 3000) from generate_series(20001, 20100) g",
            "update big set filling = repeat('y', 3000) where a % 10 = 0 and a <= 15000",  # stays in its block
        )

    found = table(measured(database, during=write, interval_s=1.0), "big")
    assert found["space"]["read_share"] < 0.3
    assert found["space"]["unused_share"] < 0.2, "what is left of a block beside its row"
    assert found["rows_estimated"] == pytest.approx(rows, rel=0.1)
    assert found["ages"]["column"] == "at"
    assert found["ages"]["read_share"] < 0.4
    assert found["ages"]["counts"]["under 1 min"] == 100, "new rows stand at the table's end, which is read whole"
    assert found["ages"]["late"] == pytest.approx(1500, rel=0.15), (
        "old ones that were read stand for those that were not"
    )
    assert found["ages"]["rows_seen"] < 100 + 1500 / 2
    assert found["ages"]["rows"] == found["ages"]["late"] + 100
    [candidate] = found["candidates"]
    assert (candidate["columns"], candidate["exact"], candidate["unique"]) == (["a"], False, False)
    assert candidate["extra_rows"] == 0
    assert candidate["rows_read"] < rows / 2
    assert candidate["pairs_at_most"] >= 3 * (rows / candidate["rows_read"]) ** 2 * 0.8
    assert found["sample"]["rows"] == 4000


def test_a_partitioned_table_is_one_unless_its_partitions_are_published_by_their_own_names(database: str) -> None:
    execute(
        database,
        "create table parts (id int primary key, note text) partition by range (id)",
        "create table low partition of parts for values from (0) to (100)",
        "create table high partition of parts for values from (100) to (200)",
        "insert into parts select g, 'note' from generate_series(0, 149) g",
    )
    [whole] = measured(database)["tables"]
    assert (whole["table"], whole["kind"], whole["key"]) == ("public.parts", "partitioned", ["id"])
    assert (whole["rows_estimated"], whole["sample"]["rows"]) == (150, 150)
    assert whole["size"]["heap_bytes"] == 2 * 8192

    execute(database, "create publication cdc_inspect for table parts")
    apart = {t["table"]: (t["kind"], t["rows_estimated"], t["published"]) for t in measured(database)["tables"]}
    assert apart == {"public.low": ("table", 100, True), "public.high": ("table", 50, True)}
    execute(database, "alter publication cdc_inspect set (publish_via_partition_root)")
    [again] = measured(database)["tables"]
    assert (again["table"], again["published"]) == ("public.parts", True)


def test_the_budget_is_for_reading_and_what_does_not_fit_is_said(database: str) -> None:
    execute(database, "create table orders (id int primary key, created_at date default current_date)",
            "create table bare (a int)", "insert into bare values (1)")  # fmt: skip

    def write() -> None:
        execute(database, "insert into orders select g from generate_series(1, 10) g")

    waited = measured(database, during=write, interval_s=1.0, budget_s=0.9)
    assert table(waited, "orders")["ages"]["rows"] == 10, "the interval is not part of it"

    found = measured(database, budget_s=1e-6)
    for facts in found["tables"]:
        assert [n["fix"] for n in facts["not_measured"]] == ["a larger --budget"]
        unknown = ("size", "rows_estimated", "space", "sample", "ages")
        assert [facts[what] for what in unknown] == [None] * len(unknown)
        assert facts["changes"] is not None
    assert found["plan"]["unplanned"] == ["public.bare", "public.orders"]
    assert [f["object"] for f in findings(found, "replica identity")] == ["public.bare"]


def test_where_commits_are_dated_the_last_day_is_looked_at(tmp_path: Path) -> None:
    with private_server(tmp_path, track_commit_timestamp="on") as server:
        dsn = server.dsn("postgres")
        execute(
            dsn,
            "create table orders (id int primary key, created_at date, updated_at timestamptz)",
            "insert into orders select g, current_date - 40, now() from generate_series(1, 30) g",
            "insert into orders select g, current_date - 400, now() from generate_series(31, 40) g",
            "insert into orders values (41, null, now()), (42, current_date + 10, now())",
        )
        ages = table(measured(dsn, late_after_s=50 * 86_400.0), "orders")["ages"]
        assert (ages["column"], ages["changed_at"]) == ("created_at", "commit timestamp")
        assert (ages["rows"], ages["without"], ages["late"]) == (42, 1, 10)
        counts = {label: n for label, n in ages["counts"].items() if n}
        assert counts == {"under 1 year": 30, "1 year and more": 10, "in the future": 1}
        named = table(measured(dsn, age_column="updated_at"), "orders")["ages"]
        assert (named["column"], named["late"], named["without"]) == ("updated_at", 0, 0)


def test_a_role_that_may_little_is_told_what_is_missing_and_the_grants_mend_it(shop: str) -> None:
    role = f"inspector_{conninfo_to_dict(shop)['dbname']}"
    execute(shop, f"create role {role} login", "revoke select on orders from public")
    try:
        execute(shop, f"grant select on bloated to {role}", "create table locked (id int primary key)",
                f"grant select on locked to {role}")  # fmt: skip
        mine = make_conninfo(shop, user=role)
        with psycopg.connect(shop) as locking:
            locking.execute("lock table locked in access exclusive mode")
            found = measured(mine)
        assert table(found, "bloated")["sample"]["rows"] == 4000
        orders = table(found, "orders")
        assert orders["sample"] is None
        [refused] = [n for n in orders["not_measured"] if n["what"] == "everything that reads rows"]
        assert "may not read public.orders" in refused["why"]
        assert "shuts readers out" in str(table(found, "locked")["not_measured"])
        assert "public.orders" in found["plan"]["unplanned"]
        lacking = {n["what"]: n for n in found["not_measured"]}
        assert found["retention"]["wal_dir_bytes"] is None
        assert [t["seconds"] for t in found["transactions"] if "forgotten" in t["who"]] == [None]
        grant = lacking["size of pg_wal"]
        assert grant["why"] == "not measured: needs pg_monitor"

        execute(shop, grant["fix"], refused["fix"])
        mended = measured(mine)
        assert table(mended, "orders")["sample"]["rows"] == 2000
        assert mended["retention"]["wal_dir_bytes"] > 0
        assert [t["seconds"] is not None for t in mended["transactions"] if "forgotten" in t["who"]] == [True]
    finally:
        execute(shop, f"drop owned by {role} cascade", f"drop role {role}")


class Page(HTMLParser):
    """Texts of a page, its elements, and everything that could load something."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "style")
                       or k.startswith("on")]  # fmt: skip

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_holds_every_name_as_text_and_loads_nothing(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [ODD, 'a"b', "<!-- c", "&amp;", "</title></style>", "\x1b[31mred\u202e", "naïve 表", "x" * 63]
    execute(database, *(f"create table {quoted(n)} (id int primary key, {quoted(n)} text)" for n in names),
            f"insert into {quoted(ODD)} values (1, '{SECRET}')")  # fmt: skip
    config = tmp_path / "cdc.toml"
    config.write_text(f'state_dir = "s"\n[source.shop]\ndsn = "{database}"\n[lake]\nurl = "lake"\n')
    target = tmp_path / "page.html"
    words = ["--config", str(config), "inspect", "shop", "--interval", "0.1", "--html", str(target)]

    assert main(words) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text, "a name must not colour the terminal"
    html = target.read_text(encoding="utf-8")
    parsed = Page()
    parsed.feed(html)
    parsed.close()
    assert parsed.open == []
    for name in names:
        assert f"public.{name}" in parsed.texts
    assert parsed.loads == []
    assert "script" not in parsed.tags
    assert "svg" in parsed.tags
    assert "url(" not in html
    assert "://" not in html
    assert "@import" not in html
    assert SECRET not in html + text

    execute(database, "create table bare (x int)")
    assert main([*words, "--json"]) == 3, "updates of a table without an identity will be refused"
    shown = json.loads(capsys.readouterr().out)
    assert shown["endangered"] is True
    assert {t["table"] for t in shown["tables"]} == {f"public.{n}" for n in (*names, "bare")}
    assert main([*words[:-1], str(tmp_path / "no" / "such.html")]) == 1
