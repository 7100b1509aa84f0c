"""The snippets of docs/reading.md, run as they stand there on a lake that a daemon is writing to."""

from __future__ import annotations

from pathlib import Path

from tests.support.buckets import CREDENTIALS, new_bucket, s3_endpoint
from tests.support.daemon import Daemon, execute
from tests.support.snippets import SNIPPETS, run_snippet

TABLE = (
    "create table orders (id int primary key, amount numeric(10,2), tags text[], at timestamptz)",
    "insert into orders select g, g / 4.0, array['a', null], now() from generate_series(1, 100) g",
)


def test_the_snippets_of_the_documentation_read_a_directory(tmp_path: Path, database: str) -> None:
    execute(database, *TABLE)
    with Daemon(tmp_path, database) as daemon:
        daemon.start().settled()
        execute(database, "update orders set amount = 'NaN' where id = 7", "delete from orders where id = 8")
        daemon.settled()
        plain, by_duckdb, _ = SNIPPETS
        names = run_snippet(plain, LAKE=str(daemon.lake))
        rows = {row["id"]: row for row in names["orders"].to_pylist()}
        assert sorted(rows) == [n for n in range(1, 101) if n != 8]
        assert (rows[7]["amount"], dict(rows[7]["_raw"])) == (None, {"amount": "NaN"})
        assert rows[9]["tags"] == ["a", None]
        assert names["updates"].num_rows == 1
        counted = by_duckdb.replace("duckdb.sql(", "counted = duckdb.sql(")
        assert run_snippet(counted, LAKE=str(daemon.lake))["counted"] == [(99,)]


def test_the_snippets_of_the_documentation_read_a_bucket(tmp_path: Path, database: str) -> None:
    execute(database, *TABLE)
    endpoint, url = s3_endpoint(), f"s3://{new_bucket()}/lake"
    with Daemon(tmp_path, database, lake={"url": url, "endpoint_url": endpoint}) as daemon:
        daemon.start().settled()
        key, secret = CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
        assert run_snippet(SNIPPETS[2], LAKE=url, ENDPOINT=endpoint, KEY=key, SECRET=secret)["orders"].num_rows == 100
