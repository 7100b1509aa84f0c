"""Syncs from a real lake into a real Postgres: when they run, what a run leaves behind, and that loops come to rest.

The lake is written by the tests (tests.support.lakes). Where a sync writes into the database that feeds it, `Mirror`
stands for capture and merge: it follows a real slot, learns from the stream who changed what, and brings `current` up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psycopg
import pyarrow as pa
import pytest

from cdc.config import Config, LakeConfig, SourceConfig
from cdc.config_serving import TargetConfig
from cdc.due import last_fact
from cdc.errors import ModelFailed
from cdc.freshness import freshness_fact
from cdc.planning import plan_now
from tests.support.lakes import table_id
from tests.support.syncs import ASSIGNMENT, MODEL, ORDERS, SCORES, SYNC, Shop, scores
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]


def outcomes(shop: Shop) -> list[tuple[str, str]]:
    """(cause, outcome) of all runs, oldest first."""
    return [(e.cause, e.outcome) for e in reversed(shop.state.history("sync", "value"))]


# ---------------------------------------------------------------------- when


def test_a_sync_runs_first_and_then_only_when_others_changed_its_inputs(shop: Shop, db: psycopg.Connection) -> None:
    db.execute(SCORES)
    shop.orders((1, 5.0), (1, 6.0), (2, 7.0))
    job = shop.job()
    run = job.step(shop.changed)
    assert run is not None
    assert (run.cause, run.outcome, run.counts["written"]) == ("first run", "done", 2)
    assert scores(db) == {1: 11.0, 2: 7.0}
    assert job.step(shop.changed) is None
    shop.orders((1, 99.0), by_others=False)
    assert job.step(shop.changed) is None, "our own writes are no reason"
    shop.orders((1, 12.0), (2, 7.0), (3, 1.0))
    assert not job.job.is_settled(shop.changed)
    run = job.step(shop.changed)
    assert run is not None
    assert (run.counts["inserts"], run.counts["updates"], run.counts["unchanged"]) == (1, 1, 1)
    assert scores(db) == {1: 12.0, 2: 7.0, 3: 1.0}
    assert job.job.is_settled(shop.changed)
    assert outcomes(shop) == [("first run", "done"), ("data", "done")]


def test_changes_in_quick_succession_make_one_run_and_a_busy_input_does_not_put_it_off(
    shop: Shop, db: psycopg.Connection
) -> None:
    db.execute(SCORES)
    shop.orders((1, 1.0))
    now = 0.0
    job = shop.job(replace(SYNC, debounce_s=2.0), clock=lambda: now)
    assert job.step(shop.changed) is not None
    ran = []
    for tick in range(1, 9):
        now = tick * 0.5
        shop.orders((1, float(tick + 1)))
        ran.append(job.step(shop.changed) is not None)
    assert ran == [False, False, False, False, True, False, False, False]
    assert scores(db) == {1: 6.0}


def test_a_schedule_runs_whether_or_not_something_changed_and_writes_only_changes(
    shop: Shop, db: psycopg.Connection
) -> None:
    db.execute(SCORES)
    shop.orders((1, 1.0))
    job = shop.job(replace(SYNC, every_s=3600.0))
    assert job.step(shop.changed) is not None
    shop.orders((1, 2.0))
    assert job.step(shop.changed) is None, "not before its hour"
    fast = shop.job(replace(SYNC, every_s=0.0))
    run = fast.step(shop.changed)
    assert run is not None
    assert (run.cause, run.counts["updates"]) == ("schedule", 1)
    run = fast.step(shop.changed)
    assert run is not None
    assert run.counts["written"] == 0


def test_a_cron_expression_says_when(shop: Shop, db: psycopg.Connection) -> None:
    db.execute(SCORES)
    shop.orders((1, 1.0))
    job = shop.job(replace(SYNC, cron="0 0 1 1 *"))
    assert job.step(shop.changed) is not None
    shop.orders((1, 2.0))
    assert job.step(shop.changed) is None, "not before the new year"
    last = shop.state.get(last_fact("value"))
    shop.state.set(last_fact("value"), {**last, "started_at": last["started_at"] - 366 * 86_400})
    run = job.step(shop.changed)
    assert run is not None
    assert (run.cause, run.counts["updates"]) == ("schedule", 1)


def test_a_lake_that_lags_is_not_pushed_from(shop: Shop, db: psycopg.Connection) -> None:
    db.execute(SCORES)
    shop.orders((1, 1.0))
    job = shop.job(replace(SYNC, max_lag_s=60.0))
    lacking = {str(ORDERS): {"landed": time.time() - 100, "merged": time.time() - 100}}
    shop.state.set(freshness_fact("shop"), lacking)
    assert job.step(shop.changed) is None
    (why,) = job.job.waiting_for()
    assert "shop.public.orders is 100 s behind, more than max_lag_s = 60" in why
    shop.state.set(freshness_fact("shop"), {})
    shop.state.save_source("shop", phase="retry", error="the server is away")
    assert job.step(shop.changed) is not None, "not away for long yet"


def test_a_sync_waits_for_complete_inputs_and_says_for_which(shop: Shop, db: psycopg.Connection) -> None:
    db.execute(SCORES)
    job = shop.job()
    assert job.step({}) is None
    assert "shop.orders" in job.job.waiting_for()[0]
    shop.orders((1, 1.0))
    shop.state.update_table("shop", ORDERS, state="snapshotting")
    assert job.step(shop.changed) is None
    assert job.job.waiting_for() == ["shop.public.orders is snapshotting"]
    with pytest.raises(ModelFailed, match="snapshotting"):
        job.order(shop.changed)
    shop.state.update_table("shop", ORDERS, state="streaming")
    shop.state.save_cut("shop", 1, {})
    assert job.job.waiting_for() == ["shop.public.orders is not merged yet"]
    shop.orders((1, 1.0))
    assert job.step(shop.changed) is not None


def test_a_paused_sync_or_target_stands_still_but_obeys_an_operator(shop: Shop, db: psycopg.Connection) -> None:
    db.execute(SCORES)
    shop.orders((1, 1.0))
    job = shop.job()
    for kind, name in (("sync", "value"), ("sink", "crm")):
        shop.state.pause(kind, name)
        assert job.step(shop.changed) is None
        shop.state.resume(kind, name)
    shop.state.pause("sync", "value")
    run = job.order(shop.changed)
    assert (run.cause, run.outcome) == ("ordered", "done")


def test_after_a_restart_it_runs_once_if_the_cut_has_moved_and_writes_nothing_new(
    shop: Shop, db: psycopg.Connection
) -> None:
    db.execute(SCORES)
    shop.orders((1, 1.0))
    assert shop.job().step(shop.changed) is not None
    assert shop.job().step({}) is None, "the same cut: nothing can be new"
    shop.orders((1, 1.0), by_others=False)
    restarted = shop.job()
    run = restarted.step({})
    assert run is not None
    assert (run.cause, run.counts["written"]) == ("restart", 0)
    assert restarted.step({}) is None
    shop.orders((1, 3.0))
    assert restarted.step(shop.changed) is not None
    redefined = shop.job(model=replace(MODEL, sql="select 1 as customer_id, 4.0 as value from shop.orders"))
    run = redefined.step({})
    assert run is not None
    assert run.cause == "new definition"
    assert scores(db) == {1: 4.0}


# ---------------------------------------------------------------------- what a run leaves behind


def test_bad_rows_are_held_or_rejected_by_name_and_the_rest_arrives(shop: Shop, db: psycopg.Connection) -> None:
    db.execute(SCORES)
    shop.orders((1, 1.0), (2, 5000.0), (None, 3.0), (4, 4.0))
    job = shop.job()
    run = job.step(shop.changed)
    assert run is not None
    assert run.outcome == "partial"
    assert (run.counts["written"], run.counts["rejected"], run.counts["held"]) == (2, 1, 1)
    assert '["2"]' in run.error
    assert "scores_value_check" in run.error
    assert "[null] (null key)" in run.error
    assert "5000" not in run.error
    entry = shop.state.history("sync", "value")[0]
    assert (entry.outcome, entry.counts["rejected"], entry.error) == ("partial", 1, run.error)
    db.execute("ALTER TABLE public.scores DROP CONSTRAINT scores_value_check")
    run = job.order(shop.changed)
    assert (run.counts["inserts"], run.counts["written"], run.counts["unchanged"]) == (1, 1, 2), "only the rejected one"
    assert scores(db) == {1: 1.0, 2: 5000.0, 4: 4.0}


def test_an_error_of_the_operators_blocks_the_sync_until_it_is_forced(shop: Shop, db: psycopg.Connection) -> None:
    shop.orders((1, 1.0))
    job = shop.job()
    run = job.step(shop.changed)
    assert run is not None
    assert run.outcome == "failed"
    assert "no table public.scores" in run.error
    assert "no table public.scores" in job.job.blocked
    shop.orders((1, 2.0))
    assert job.step(shop.changed) is None
    db.execute(SCORES)
    run = job.order(shop.changed)
    assert (run.outcome, job.job.blocked) == ("done", "")
    shop.orders((1, 3.0))
    assert job.step(shop.changed) is not None


def test_a_target_that_is_away_is_tried_again_after_a_growing_pause(shop: Shop, db: psycopg.Connection) -> None:
    db.execute(SCORES)
    shop.orders((1, 1.0))
    shop.target.close()
    reachable, shop.target = (
        shop.target,
        shop.target_at("postgresql://127.0.0.1:1/x"),
    )
    now = 0.0
    job = shop.job(clock=lambda: now)
    tried = []
    for tick in range(12):
        now = float(tick)
        run = job.step(shop.changed)
        tried.append(run is not None)
        assert run is None or run.outcome == "failed"
    assert [tick for tick, did in enumerate(tried) if did] == [0, 1, 3, 7]
    assert job.job.blocked == ""
    job.job._sink = job.job._members[0].planner._sink = reachable
    now = 20.0
    run = job.step(shop.changed)
    assert run is not None
    assert run.outcome == "done"
    reachable.close()


def test_stopping_between_batches_keeps_what_is_acknowledged_and_the_next_run_does_the_rest(
    shop: Shop, db: psycopg.Connection
) -> None:
    db.execute(SCORES)
    shop.orders(*((i, float(i)) for i in range(9)))
    job = shop.job()
    asked = iter([False, False, True])
    run = job.step(shop.changed, should_stop=lambda: next(asked))
    assert run is not None
    assert (run.outcome, run.counts["written"]) == ("stopped", 4)
    run = job.step(shop.changed)
    assert run is not None
    assert (run.outcome, run.counts["unchanged"], run.counts["written"]) == ("done", 4, 5)
    assert scores(db) == {i: float(i) for i in range(9)}


def test_planning_writes_nothing_anywhere(shop: Shop, db: psycopg.Connection, tmp_path: Path) -> None:
    db.execute(SCORES)
    shop.orders((1, 1.0), (2, 2.0), (None, 3.0))
    config = Config(
        path=None,
        state_dir=tmp_path,
        sources={"shop": SourceConfig(name="shop")},
        lake=LakeConfig(url=f"file://{shop.lake.root}"),
        models={"value": MODEL},
        targets={"crm": TargetConfig(name="crm", type="postgres", dsn=shop.dsn, origin="cdc_crm")},
        syncs={"value": SYNC},
    )
    tables = {"shop": [ORDERS]}
    plan = plan_now(config, shop.lake.store, tables, "value")
    assert (plan["inserts"], plan["held"], plan["samples"]["insert"]) == (2, 1, [{"key": '["1"]'}, {"key": '["2"]'}])
    assert db.execute("SELECT to_regnamespace('cdc')").fetchone() == (None,)
    assert scores(db) == {}
    json.dumps(plan)
    run = shop.job().step(shop.changed)
    assert run is not None
    assert run.plan == plan["plan"], "the run applies what was shown"
    assert plan_now(config, shop.lake.store, tables, "value")["unchanged"] == 2


# ---------------------------------------------------------------------- killed and cut


CHILD = """
import pathlib, sys
from tests.support.syncs import Shop
shop = Shop(pathlib.Path(sys.argv[1]), sys.argv[2])
shop.job().step({})
"""


@pytest.mark.parametrize("point", ["sync.before_commit", "sync.after_commit"])
def test_a_run_killed_at_any_batch_is_continued_by_the_next_without_a_doubled_effect(
    shop: Shop, db: psycopg.Connection, point: str
) -> None:
    db.execute(SCORES)
    db.execute(
        "CREATE TABLE public.writes (customer_id int, value float8);"
        "CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "INSERT INTO public.writes VALUES (new.customer_id, new.value); RETURN NULL; END $$;"
        "CREATE TRIGGER note AFTER INSERT OR UPDATE ON public.scores FOR EACH ROW EXECUTE FUNCTION public.note()"
    )
    shop.orders(*((i, float(i)) for i in range(9)))
    for nth in (1, 2, 2):
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(shop.folder), shop.dsn],
            env={**os.environ, "CDC_FAILPOINTS": f"{point}=kill:{nth}", "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            timeout=60,
            check=False,
        )
        assert child.returncode == -9
        wait_until(
            lambda: db.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cdc crm'"
            ).fetchone() == (0,)
        )  # fmt: skip
        written = {
            int(json.loads(key)[0]) for key in shop.target.acknowledged(ASSIGNMENT).rows.column("key").to_pylist()
        }
        assert written == set(scores(db))
        shop.target.close()
    last = shop.job().step({})
    assert last is not None
    assert last.outcome == "done"
    assert scores(db) == {i: float(i) for i in range(9)}
    effects = db.execute("SELECT customer_id, value FROM public.writes ORDER BY 1").fetchall()
    assert effects == [(i, float(i)) for i in range(9)], "each row was written exactly once"
    assert {outcome for _, outcome in outcomes(shop)} == {"interrupted", "done"}


def test_a_connection_cut_in_the_middle_of_a_run_is_retried_and_ends_right(shop: Shop, db: psycopg.Connection) -> None:
    db.execute(SCORES)
    shop.orders(*((i, float(i)) for i in range(9)))
    job = shop.job()
    runs = []
    with psycopg.connect(shop.dsn) as blocker:
        blocker.execute("INSERT INTO public.scores VALUES (5, 0)")
        thread = threading.Thread(target=lambda: runs.append(job.step(shop.changed)))
        thread.start()
        (pid,) = wait_until(
            lambda: db.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'cdc crm' AND wait_event_type = 'Lock'"
            ).fetchone()
        )
        db.execute("SELECT pg_terminate_backend(%s)", (pid,))
        thread.join(60)
        blocker.rollback()
    assert [run.outcome for run in runs] == ["failed"]
    assert job.job.blocked == ""
    assert sorted(scores(db)) == [0, 1, 2, 3], "the batches before the cut"
    again = wait_until(lambda: job.step(shop.changed), 60, "the retry")
    assert (again.outcome, again.counts["unchanged"], again.counts["written"]) == ("done", 4, 5)
    assert scores(db) == {i: float(i) for i in range(9)}


# ---------------------------------------------------------------------- loops


class Mirror:
    """Capture and merge of one table in miniature: who changed it is read from a real slot's stream."""

    def __init__(self, shop: Shop, db: psycopg.Connection, table: str) -> None:
        self._shop, self._db, self._table = shop, db, table
        self._slot = f"loop_{os.getpid()}"
        db.execute(f"CREATE PUBLICATION loop FOR TABLE {table}")
        db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (self._slot,))
        self.transactions: list[str] = []

    def catch_up(self) -> None:
        """Read what was committed, bring `current` to it, record the cut, and note what others changed."""
        rows = self._db.execute(
            "SELECT lsn, data FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL, 'proto_version', '1', "
            "'publication_names', 'loop')",
            (self._slot,),
        ).fetchall()
        origins: list[str] = []
        for _, data in rows:
            if data[:1] == b"B":
                origins.append("")
            elif data[:1] == b"O":
                origins[-1] = bytes(data[9:]).rstrip(b"\0").decode()
        self.transactions += origins
        if not origins:
            return
        found = self._db.execute(f"SELECT customer_id, value FROM {self._table} ORDER BY 1").fetchall()
        columns = {
            "customer_id": pa.array([row[0] for row in found], pa.int32()),
            "value": pa.array([row[1] for row in found], pa.float64()),
        }
        version = self._shop.lake.write_current("shop", "scores", pa.table(columns))
        self._shop.lsn += 10
        scores_table = table_id("scores")
        self._shop.state.update_table("shop", scores_table, state="streaming")
        self._shop.state.save_cut("shop", self._shop.lsn, {scores_table: version})
        if any(not origin or origin != "cdc_crm" for origin in origins):
            self._shop.changed["shop", scores_table] = self._shop.lsn


def test_a_sync_that_writes_into_the_table_that_its_model_reads_comes_to_rest(
    shop: Shop, db: psycopg.Connection
) -> None:
    """The model is a worst case: every run of it changes every row, so it would run for ever if it woke itself."""
    db.execute(SCORES)
    mirror = Mirror(shop, db, "public.scores")
    db.execute("INSERT INTO public.scores VALUES (1, 0), (2, 10)")
    grow = replace(MODEL, sql="select customer_id, value + 1 as value from shop.scores")
    job = shop.job(model=grow)

    def turn() -> bool:
        mirror.catch_up()
        return job.step(shop.changed) is not None

    assert [turn() for _ in range(6)] == [True, False, False, False, False, False]
    assert mirror.transactions == ["", "cdc_crm"], "our write was captured like any other, and marked"
    assert scores(db) == {1: 1.0, 2: 11.0}
    db.execute("UPDATE public.scores SET value = 20 WHERE customer_id = 2")
    assert [turn() for _ in range(4)] == [True, False, False, False], "another writer's change of the row wakes it"
    assert scores(db) == {1: 2.0, 2: 21.0}
    db.execute("INSERT INTO public.scores VALUES (3, 0)")
    assert [turn() for _ in range(4)] == [True, False, False, False]
    assert mirror.transactions == ["", "cdc_crm", "", "cdc_crm", "", "cdc_crm", "cdc_crm"], "three rows are two batches"
    mirror.catch_up()
    after_restart = shop.job(model=grow)
    ran = []
    for _ in range(4):
        mirror.catch_up()
        ran.append(after_restart.step({}) is not None)
    assert ran == [True, False, False, False], "once, since what happened before the start is not known"


def test_without_the_right_to_mark_its_writes_a_sync_comes_to_rest_by_the_difference(
    shop: Shop, db: psycopg.Connection
) -> None:
    from psycopg.conninfo import make_conninfo

    db.execute(SCORES)
    db.execute("DROP ROLE IF EXISTS unmarked; CREATE ROLE unmarked LOGIN; CREATE SCHEMA cdc AUTHORIZATION unmarked")
    db.execute("GRANT SELECT, INSERT, UPDATE ON public.scores TO unmarked")
    mirror = Mirror(shop, db, "public.scores")
    db.execute("INSERT INTO public.scores VALUES (1, 3)")
    shop.target = shop.target_at(make_conninfo(shop.dsn, user="unmarked"))
    clamp = replace(MODEL, sql="select customer_id, greatest(value, 5) as value from shop.scores")
    job = shop.job(model=clamp)
    runs = []
    for _ in range(5):
        mirror.catch_up()
        run = job.step(shop.changed)
        runs.append(run.counts["written"] if run else None)
    assert runs == [1, 0, None, None, None], "its own write wakes it once, and then there is nothing to do"
    assert mirror.transactions == ["", ""]
    assert scores(db) == {1: 5.0}
    shop.target.close()
    wait_until(
        lambda: db.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = 'unmarked'").fetchone() == (0,)
    )
    db.execute("DROP OWNED BY unmarked CASCADE; DROP ROLE unmarked")
