"""The daemon as an operator meets it: starting, stopping, pausing, asking, and losing its disk. Real processes."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import psycopg
import pytest
from deltalake import DeltaTable

from tests.support.daemon import SOURCE, Daemon, execute
from tests.support.waiting import wait_until
from tests.support.witness import Witness, assert_exactly_once, changelog
from tests.support.workload import SCHEMA, TABLES, Workload

ORDERS = [
    "create table orders (id int primary key, amount numeric(10,2), note text)",
    "insert into orders select g, g * 1.5, 'note ' || g from generate_series(1, 500) g",
    "create table customers (id int primary key, name text)",
    "insert into customers select g, 'customer ' || g from generate_series(1, 20) g",
]


@pytest.fixture
def daemon(tmp_path: Path, database: str) -> Daemon:
    execute(database, *ORDERS)
    return Daemon(tmp_path, database)


# ---- starting and stopping ---------------------------------------------------------------------------------------


def test_run_once_lands_what_was_committed_before_and_ends(daemon: Daemon) -> None:
    with daemon:
        assert daemon.start(once=True).ended(60) == 0
        assert daemon.ask("query", "select count(*) from shop.orders").document["rows"] == [[500]]
        execute(daemon.dsn, "update orders set amount = 0 where id = 1", "delete from orders where id = 2")
        assert daemon.start(once=True).ended(60) == 0
        rows = daemon.ask("query", "select count(*), sum(amount) filter (id = 1) from shop.orders").document["rows"]
        assert rows == [[499, "0.00"]]
        slot = daemon.source()["slot"]
        assert (slot["exists"], slot["active"]) == (True, False)
        assert daemon.ask("verify").code == 1, "verify needs a running daemon, and says so"


def test_sigterm_ends_it_in_bounded_time_with_everything_durable(daemon: Daemon, rng: random.Random) -> None:
    daemon.configure("lake", land_every_s=3600, merge_every_s=3600)
    with daemon:
        assert daemon.ask("setup").code == 0
        witness = Witness(daemon.dsn, f"witness_{daemon.slot}")
        daemon.start().settled()
        with psycopg.connect(daemon.dsn, autocommit=True) as connection:
            for n in range(300):
                connection.execute("update orders set note = %s where id = %s", [f"n{n}", rng.randrange(1, 500)])
        began = time.monotonic()
        assert daemon.stop(timeout_s=40) == 0
        assert time.monotonic() - began < 35, "shutdown_timeout_s is 10"
        assert daemon.source()["phase"] == "stopped"
        # What was logged lands after the next start; what was not comes again.
        daemon.configure("lake", land_every_s=0.2, merge_every_s=0.2)
        daemon.start().settled().verified()
        assert assert_exactly_once(witness, daemon.lake, ["public.orders"]) == 300


def test_a_second_sigterm_ends_it_at_once(daemon: Daemon) -> None:
    with daemon:
        daemon.start().streaming()
        daemon.signal(signal.SIGTERM)
        daemon.signal(signal.SIGINT)
        began = time.monotonic()
        assert daemon.ended(10) in (0, 130, 143, -signal.SIGTERM)
        assert time.monotonic() - began < 5
        daemon.start().settled().verified()


def test_a_second_daemon_on_the_same_state_is_refused(daemon: Daemon) -> None:
    with daemon:
        daemon.start().streaming()
        second = daemon.cdc("run")
        assert second.code == 2
        assert "another daemon runs on state_dir" in second.document["error"]["message"]
        assert daemon.alive


def test_a_second_daemon_waits_quietly_and_takes_over_when_the_first_one_is_killed(
    daemon: Daemon, tmp_path: Path
) -> None:
    other = Daemon(tmp_path / "other", daemon.dsn, lake={"url": str(daemon.lake), "lease_ttl_s": 5})
    daemon.configure("lake", lease_ttl_s=5)
    with daemon, other:
        daemon.start().settled()
        other.start().in_phase("standby")
        assert "another daemon writes to this lake" in other.source()["error"], "who it is stands there"
        # The lease that it waits for is renewed again and again; the log hears of it once.
        said = {other.source()["error"]}
        wait_until(lambda: said.add(other.source()["error"]) or len(said) > 2)
        lines = other.log_path.read_text().splitlines()
        assert len([line for line in lines if "waits for its turn" in line]) == 1
        assert [line for line in lines if "WARN" in line or "ERROR" in line] == []
        wait_until(lambda: other.http("/health")[0] == 200, message="waiting is what it is there for")
        execute(daemon.dsn, "update orders set amount = 7 where id <= 10")
        daemon.settled().verified()

        # With the first one gone, the second takes over where the lake stands, on its empty disk.
        execute(daemon.dsn, "insert into orders select 1000 + n, 1 from generate_series(1, 50) n")
        daemon.kill()
        other.streaming()
        execute(daemon.dsn, "delete from orders where id <= 5")
        other.settled().verified()
        ops = (
            changelog(daemon.lake, "public.orders", columns=("_op", "_epoch", "_lsn", "_seq")).column("_op").to_pylist()
        )
        assert (ops.count("u"), ops.count("d"), ops.count("c")) == (10, 5, 50)


@pytest.mark.slow
def test_the_loss_of_the_state_directory_loses_and_doubles_nothing(
    tmp_path: Path, database: str, rng: random.Random
) -> None:
    execute(database, *SCHEMA.split(";\n"))
    with Daemon(tmp_path, database, source={"chunk_rows": 300, "confirm_every_s": 0.2}) as daemon:
        assert daemon.ask("setup").code == 0
        witness = Witness(database, f"witness_{daemon.slot}")
        with Workload(database, rng.randrange(1 << 30), pause_s=0.01) as workload:
            # Killed in the middle of the first snapshots …
            daemon.start().streaming()
            wait_until(lambda: any(t["snapshot"] for t in daemon.tables().values()), 60, "a snapshot in progress")
            daemon.kill()
            shutil.rmtree(daemon.state_dir)
            # … and stopped in the stream.
            daemon.start().settled()
            at = workload.committed
            wait_until(lambda: workload.committed > at + 50, 60, "some transactions")
            assert daemon.stop() == 0
            shutil.rmtree(daemon.state_dir)
            daemon.start().streaming()
        daemon.settled().verified()
        assert assert_exactly_once(witness, daemon.lake, TABLES) > 100


# ---- orders ------------------------------------------------------------------------------------------------------


def test_pause_and_resume_a_source_and_a_table(daemon: Daemon) -> None:
    with daemon:
        daemon.start().settled()
        assert daemon.ask("pause", f"source:{SOURCE}").document["targets"] == [
            {"kind": "source", "name": SOURCE, "served": True}
        ]
        daemon.in_phase("paused")
        execute(daemon.dsn, "insert into orders values (1000, 1, 'while paused')")
        assert daemon.ask("wait", "--timeout", "1").code == 4, "nothing arrives while it is paused"
        daemon.kill()
        daemon.start().in_phase("paused")
        assert daemon.ask("resume", f"source:{SOURCE}").code == 0
        daemon.settled().verified()

        assert daemon.ask("pause", "orders").code == 0
        assert daemon.tables()["public.orders"]["paused"] is True
        execute(daemon.dsn, "update orders set amount = 1", "update customers set name = 'new' where id = 1")
        assert daemon.ask("wait", "--timeout", "20").code == 0, "a paused table holds nothing back"
        daemon.verified("customers")
        assert daemon.ask("query", "select count(*) from shop.orders where amount = 1").document["rows"] == [[1]]
        assert daemon.ask("resume", "orders").code == 0
        daemon.settled().verified()


@pytest.mark.slow
def test_a_resync_under_load_is_followed_to_its_end(tmp_path: Path, database: str, rng: random.Random) -> None:
    execute(database, *SCHEMA.split(";\n"))
    with Daemon(tmp_path, database, source={"chunk_rows": 300}) as daemon:
        daemon.start().settled()
        with Workload(database, rng.randrange(1 << 30), pause_s=0.02):
            done = daemon.cdc("resync", "stock", "items", "--wait", "--timeout", "60", timeout_s=120)
            assert done.code == 0, done
            assert [(r["table"], r["served"]) for r in done.document["resyncs"]] == [
                ("public.stock", True),
                ("public.items", True),
            ]
            assert all(t["snapshot"] is None for t in daemon.tables().values())
            daemon.ask("resync", "stock")
            cancelled = daemon.ask("resync", "cancel", "stock")
            assert cancelled.code == 0
            # Verify stands on its own while the source is written to: nothing that differs, at most what always moves.
            report = daemon.ask("verify", "items", "lines", "--timeout", "5").document
            assert [t["counts"] for t in report["tables"] if any(t["counts"].values())] == []
        daemon.settled().verified()


# ---- asking ------------------------------------------------------------------------------------------------------


def test_commands_answer_in_json_with_the_daemon_up_and_down(daemon: Daemon) -> None:
    with daemon:
        assert daemon.ask("status").document["daemon"]["running"] is False
        daemon.start().settled()
        execute(daemon.dsn, "update orders set note = 'changed' where id = 7")
        waited = daemon.cdc("wait", "--timeout", "30")
        assert waited.code == 0
        reached = waited.document["reached"][SOURCE]
        assert waited.document["stopped"] == []

        status = daemon.cdc("status").document
        assert (status["daemon"]["running"], status["daemon"]["pid"]) == (True, daemon.pid)
        (source,) = status["sources"]
        assert (source["name"], source["phase"], source["error"], source["epoch"]) == (SOURCE, "streaming", "", 1)
        assert [step["step"] for step in source["ladder"]] == ["head", "received", "logged", "landed", "confirmed"]
        ladder = {step["step"]: _lsn(step["lsn"]) for step in source["ladder"]}
        assert ladder["landed"] >= _lsn(reached["lsn"])
        assert ladder["head"] >= ladder["landed"] >= ladder["confirmed"]
        tables = {t["table"]: t for t in source["tables"]}
        assert {t: (v["state"], v["snapshot"]) for t, v in tables.items()} == {
            "public.customers": ("streaming", None), "public.orders": ("streaming", None),
        }  # fmt: skip

        verified = daemon.cdc("verify", "orders", "--timeout", "30")
        assert (verified.code, verified.document["equal"], verified.document["tables"][0]["rows"]) == (0, True, 500)
        found = daemon.cdc("query", "select id, note from shop.orders where note = 'changed'")
        assert found.document == {"columns": ["id", "note"], "rows": [[7, "changed"]], "notes": []}
        logged = daemon.cdc("log", "ls", "--table", "orders")
        assert logged.code == 0
        lake = {t["table"]: t for t in daemon.cdc("lake", "ls").document["tables"]}
        assert lake["public.orders"]["current"]["rows"] == 500
        described = {t["table"]: t for t in daemon.cdc("tables").document["tables"]}
        assert described["public.orders"]["key"] == ["id"]

        assert daemon.stop() == 0
        down = daemon.cdc("status").document
        assert (down["daemon"]["running"], down["sources"][0]["phase"]) == (False, "stopped")
        assert daemon.cdc("query", "select count(*) from shop.orders").document["rows"] == [[500]]
        refused = daemon.cdc("wait")
        assert (refused.code, refused.document["error"]["kind"]) == (1, "NotRunning")


def test_verify_names_the_keys_that_differ_and_repairs_them(daemon: Daemon) -> None:
    with daemon:
        daemon.start().settled()
        table = DeltaTable(str(daemon.lake / SOURCE / "public.orders" / "current"))
        table.delete("id = 5")
        table.update(predicate="id = 6", updates={"amount": "cast(9.99 as decimal(10,2))"})
        answer = daemon.cdc("verify", "orders", "--timeout", "30")
        (report,) = answer.document["tables"]
        assert (answer.code, answer.document["equal"]) == (3, False)
        assert (report["missing"], report["different"], report["columns"]) == (["5"], ["6"], {"amount": 1})
        assert (report["rows"], report["values"]) == (500, [])
        assert "9.99" not in json.dumps(answer.document), "values only on request"
        mended = daemon.cdc("verify", "orders", "--repair", "--timeout", "60", timeout_s=120)
        assert (mended.code, mended.document["repaired"]) == (0, ["shop.public.orders"])
        daemon.verified()


def test_metrics_and_health_tell_how_it_is(daemon: Daemon) -> None:
    with daemon:
        daemon.start().settled()
        execute(daemon.dsn, "update orders set amount = amount + 1 where id <= 30")
        daemon.settled()
        code, body = daemon.http("/health")
        assert (code, json.loads(body)["ok"]) == (200, True)
        values = _metrics(daemon.http("/metrics")[1])
        assert values['cdc_source_up{source="shop"}'] == 1
        assert values['cdc_changes_total{source="shop",table="public.orders"}'] == 30
        assert values['cdc_snapshot_rows_total{source="shop",table="public.orders"}'] >= 500
        assert values['cdc_landed_rows_total{source="shop",table="public.orders"}'] >= 530
        # Gauges that tell of a state are set once a second.
        streaming = 'cdc_tables{source="shop",state="streaming"}'
        wait_until(lambda: _metrics(daemon.http("/metrics")[1]).get(streaming) == 2, 60)
        assert daemon.http("/nothing")[0] == 404
        daemon.ask("pause")
        daemon.in_phase("paused")
        wait_until(lambda: _metrics(daemon.http("/metrics")[1])['cdc_source_up{source="shop"}'] == 0, 60)


def test_no_value_and_no_secret_reaches_the_log(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    password = {"CDC_TEST_PASSWORD": "Xyzzy-password"}
    monkeypatch.setenv(*next(iter(password.items())))  # for the commands that run in this process
    execute(database, "create table t (id int primary key, secret text)", "insert into t values (1, 'Xyzzy-row-value')")
    with Daemon(tmp_path, database, top={"log_level": "debug"}, source={"password_env": "CDC_TEST_PASSWORD"}) as daemon:
        daemon.start(environment=password).settled()
        execute(database, "update t set secret = 'Xyzzy-other' where id = 1", "delete from t where id = 1")
        daemon.settled().verified()
        assert daemon.stop() == 0
    assert "Xyzzy" not in daemon.log_path.read_text()


def _lsn(text: str) -> int:
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) | int(low, 16)


def _metrics(text: str) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}
