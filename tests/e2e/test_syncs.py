"""A first sync as docs/reverse-etl.md tells it, with a real daemon and its commands: planned, held, approved, broken,
retried, reconciled; with the alerts that a webhook gets, and a daemon that is killed while a plan waits."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until

SECTIONS = """
[alerts]
webhook = "{webhook}"

[model.customer_value]
sql = "select customer_id, sum(amount) as value from shop.orders group by 1"
key = ["customer_id"]

[target.crm]
type = "postgres"
dsn = "{dsn}"

[sync.customer_value]
model = "customer_value"
target = "crm"
table = "public.customer_scores"
key = ["customer_id"]
mode = "mirror"
debounce_s = 0
"""


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    told: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/alerts", told
    server.shutdown()
    server.server_close()
    thread.join()


def scores(dsn: str) -> dict[int, int]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        found = connection.execute("SELECT customer_id, value FROM public.customer_scores").fetchall()
    return {customer: int(value) for customer, value in found}


def sync_of(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = daemon.ask("status").document["syncs"][0]
    return found


def test_a_first_sync_is_planned_held_approved_broken_and_retried(
    tmp_path: Path, database: str, webhook: tuple[str, list[dict[str, Any]]]
) -> None:
    url, told = webhook
    execute(
        database,
        "CREATE TABLE public.orders (id int PRIMARY KEY, customer_id int NOT NULL, amount int NOT NULL)",
        "INSERT INTO public.orders SELECT i, i % 100, 10 FROM generate_series(1, 200) i",
        "CREATE TABLE public.customer_scores (customer_id bigint PRIMARY KEY, value numeric CHECK (value < 1000))",
    )
    more = SECTIONS.format(webhook=url, dsn=database)
    with Daemon(tmp_path, database, source={"tables": ["public.orders"]}, more=more) as daemon:
        checked = daemon.cdc("check").document
        assert [f for f in checked["findings"] if f["severity"] == "error"] == []
        daemon.start().streaming()
        wait_until(lambda: len(scores(database)) == 100, 60, "the first run")
        assert set(scores(database).values()) == {20}

        # An accident: most orders go. Nothing of it reaches the target.
        execute(database, "DELETE FROM public.orders WHERE customer_id >= 30")
        held = wait_until(lambda: sync_of(daemon)["held"], 60, "the plan is held")
        assert (held["counts"]["deletes"], [h["limit"] for h in held["held_by"]]) == (70, ["max_delete_share"])
        assert sync_of(daemon)["condition"] == "held"
        assert len(scores(database)) == 100
        plan = daemon.cdc("sync", "plan", "customer_value")
        assert (plan.code, plan.document["plan"], plan.document["deletes"]) == (3, held["plan"], 70)
        assert daemon.ask("sync", "apply", "customer_value").code == 3

        # Killed while it waits: the plan is still there, and the same.
        daemon.kill()
        daemon.start().streaming()
        assert sync_of(daemon)["held"]["plan"] == plan.document["plan"]
        assert daemon.ask("sync", "approve", "customer_value", "0123456789abcdef").code == 3
        approved = daemon.ask("sync", "approve", "customer_value", plan.document["plan"])
        assert (approved.code, approved.document["outcome"], approved.document["counts"]["deleted"]) == (0, "done", 70)
        assert sorted(scores(database)) == list(range(30))
        wait_until(lambda: [a["condition"] for a in told] == ["held", "fine"], 30, "held and well again, once each")
        assert "approve customer_value" in told[0]["hint"]

        # Rows that the target refuses.
        execute(database, "UPDATE public.orders SET amount = 600 WHERE customer_id IN (3, 4)")
        run = wait_until(lambda: (r := sync_of(daemon)["last_run"])["outcome"] == "partial" and r, 60, "rejects")
        rows = daemon.ask("sync", "history", "customer_value", run["counts"]["run"]).document
        assert {r["key"]: r["outcome"] for r in rows["rows"]} == {'["3"]': "rejected", '["4"]': "rejected"}
        assert "customer_scores_value_check" in rows["rows"][0]["reason"]
        assert rows["rows"][0]["columns"] == ["value"]
        assert rows["inputs"]["shop"]["versions"].keys() == {"public.orders"}
        execute(database, "ALTER TABLE public.customer_scores DROP CONSTRAINT customer_scores_value_check")
        retried = daemon.ask("sync", "retry", "customer_value")
        assert (retried.code, retried.document["counts"]["written"]) == (0, 2)
        assert scores(database)[3] == 1200

        # A human's edit, found and mended.
        execute(database, "UPDATE public.customer_scores SET value = 1 WHERE customer_id = 5")
        drift = daemon.ask("sync", "reconcile", "customer_value")
        assert (drift.code, drift.document["drift"]["samples"]["different"]) == (3, ['["5"]'])
        daemon.ask("sync", "reconcile", "customer_value", "--policy", "source")
        assert scores(database)[5] == 20
        assert daemon.ask("sync", "reconcile", "customer_value").code == 0

        history = daemon.ask("sync", "history", "customer_value").document["runs"]
        outcomes = [(r["cause"], r["outcome"]) for r in reversed(history)]
        assert outcomes[0] == ("first run", "done")
        assert ("approve", "unconfirmed") in outcomes
        assert ("approved", "done") in outcomes
        conditions = [a["condition"] for a in told]
        assert conditions == ["held", "fine", "partial", "fine"]
        daemon.stop()
    text = (tmp_path / "daemon.log").read_text()
    assert "1200" not in text.replace("customer_value", ""), "no values in the log"
