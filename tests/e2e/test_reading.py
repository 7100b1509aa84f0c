"""The snippets of docs/reading.md, run as they stand there on a lake that a daemon is writing to."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

import duckdb

from tests.support.buckets import CREDENTIALS, new_bucket, s3_endpoint
from tests.support.daemon import ROOT, Daemon, execute
from tests.support.snippets import SNIPPETS, run_snippet
from tests.support.waiting import wait_until

PAGE = (ROOT / "docs" / "reading.md").read_text()
(IN_SQL,) = (sql for sql in re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL) if "(run by the tests)" in sql)
TABLE = (
    "create table orders (id int primary key, amount numeric(10,2), tags text[], created_at timestamptz)",
    "insert into orders select g, g / 4.0, array['a', null], now() from generate_series(1, 100) g",
)
BY_TIME = '[source.shop.table."public.orders"]\npartition_by = "created_at:day"'


def test_the_snippets_of_the_documentation_read_a_directory(tmp_path: Path, database: str) -> None:
    execute(database, *TABLE)
    files = '[lake.files]\ntables = ["shop.public.*"]\nevery_s = 0.2\n'
    with Daemon(tmp_path, database, more=files + BY_TIME) as daemon:
        daemon.start().settled()
        execute(
            database,
            "update orders set amount = 'NaN' where id = 7",
            "delete from orders where id = 8",
            "insert into orders values (101, 1, null, '2026-11-28 10:00+00'), (102, 1, null, '2026-11-28 08:00+00')",
        )
        daemon.settled()
        plain, by_duckdb, by_polars, _, by_time = SNIPPETS
        names = run_snippet(plain, LAKE=str(daemon.lake))
        rows = {row["id"]: row for row in names["orders"].to_pylist()}
        assert sorted(rows) == [n for n in range(1, 103) if n != 8]
        assert (rows[7]["amount"], dict(rows[7]["_raw"])) == (None, {"amount": "NaN"})
        assert rows[9]["tags"] == ["a", None]
        assert names["updates"].num_rows == 1
        counted = by_duckdb.replace("duckdb.sql(", "counted = duckdb.sql(")
        assert run_snippet(counted, LAKE=str(daemon.lake))["counted"] == [(101,)]
        scanned = run_snippet(by_polars, LAKE=str(daemon.lake))["dear"]
        assert sorted(scanned["id"]) == list(range(91, 101))
        assert dict(zip(scanned.columns, map(str, scanned.dtypes), strict=True)) == {
            "id": "Int32", "amount": "Decimal(precision=10, scale=2)", "tags": "List(String)",
            "created_at": "Datetime(time_unit='us', time_zone='UTC')",
        }  # fmt: skip
        asking = by_time.replace("duckdb.sql(", "asked = duckdb.sql(")
        asked = run_snippet(asking, LAKE=str(daemon.lake))["asked"]
        assert asked.select("_date, id").filter("id > 100").fetchall() == [("2026-11-28", 101)]

        lines = IN_SQL.replace("LAKE", str(daemon.lake)).strip().rstrip(";")
        there = (daemon.lake / "shop" / "public.orders" / "files").glob
        wait_until(lambda: any(there("*/*.zst")) and len(duckdb.sql(lines).fetchall()) >= 104, message="the files")
        found = duckdb.sql(f"select _op, id, amount, tags from ({lines}) where id in (7, 8, 9)").fetchall()
        assert ("r", 9, Decimal("2.25"), ["a", None]) in found
        assert {(op, key, amount) for op, key, amount, _ in found} >= {("d", 8, None), ("u", 7, None)}


def test_the_snippets_of_the_documentation_read_a_bucket(tmp_path: Path, database: str) -> None:
    execute(database, *TABLE)
    endpoint, url = s3_endpoint(), f"s3://{new_bucket()}/lake"
    with Daemon(tmp_path, database, lake={"url": url, "endpoint_url": endpoint}) as daemon:
        daemon.start().settled()
        key, secret = CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
        assert run_snippet(SNIPPETS[3], LAKE=url, ENDPOINT=endpoint, KEY=key, SECRET=secret)["orders"].num_rows == 100
