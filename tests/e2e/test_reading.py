"""The snippets of docs/reading.md, run as they stand there on a lake that a daemon is writing to."""

from __future__ import annotations

from pathlib import Path

from tests.support.buckets import CREDENTIALS, new_bucket, s3_endpoint
from tests.support.daemon import Daemon, execute
from tests.support.snippets import SNIPPETS, run_snippet

TABLE = (
    "create table orders (id int primary key, amount numeric(10,2), tags text[], created_at timestamptz)",
    "insert into orders select g, g / 4.0, array['a', null], now() from generate_series(1, 100) g",
)
BY_TIME = '[source.shop.table."public.orders"]\npartition_by = "created_at:day"'


def test_the_snippets_of_the_documentation_read_a_directory(tmp_path: Path, database: str) -> None:
    execute(database, *TABLE)
    with Daemon(tmp_path, database, more=BY_TIME) as daemon:
        daemon.start().settled()
        execute(
            database,
            "update orders set amount = 'NaN' where id = 7",
            "delete from orders where id = 8",
            "insert into orders values (101, 1, null, '2026-11-28 10:00+00'), (102, 1, null, '2026-11-28 08:00+00')",
        )
        daemon.settled()
        plain, by_duckdb, _, by_time = SNIPPETS
        names = run_snippet(plain, LAKE=str(daemon.lake))
        rows = {row["id"]: row for row in names["orders"].to_pylist()}
        assert sorted(rows) == [n for n in range(1, 103) if n != 8]
        assert (rows[7]["amount"], dict(rows[7]["_raw"])) == (None, {"amount": "NaN"})
        assert rows[9]["tags"] == ["a", None]
        assert names["updates"].num_rows == 1
        counted = by_duckdb.replace("duckdb.sql(", "counted = duckdb.sql(")
        assert run_snippet(counted, LAKE=str(daemon.lake))["counted"] == [(101,)]
        asking = by_time.replace("duckdb.sql(", "asked = duckdb.sql(")
        asked = run_snippet(asking, LAKE=str(daemon.lake))["asked"]
        assert asked.select("_date, id").filter("id > 100").fetchall() == [("2026-11-28", 101)]


def test_the_snippets_of_the_documentation_read_a_bucket(tmp_path: Path, database: str) -> None:
    execute(database, *TABLE)
    endpoint, url = s3_endpoint(), f"s3://{new_bucket()}/lake"
    with Daemon(tmp_path, database, lake={"url": url, "endpoint_url": endpoint}) as daemon:
        daemon.start().settled()
        key, secret = CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
        assert run_snippet(SNIPPETS[2], LAKE=url, ENDPOINT=endpoint, KEY=key, SECRET=secret)["orders"].num_rows == 100
