"""What an operator lives through with a sync: a plan that is held, approved, broken rows, verbs that are not the same.

The lake is written by the tests; the target is a real Postgres (see test_sync_postgres for when a sync runs).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psycopg
import pytest

from cdc import rowlog
from cdc.condition import condition_fact, held_fact
from cdc.config_serving import GuardConfig, ModelConfig, SyncConfig
from cdc.errors import ConfigError
from cdc.sync_run import Order
from tests.support.syncs import MODEL, SCORES, SYNC, Shop, ran, rows, scores, told

MIRROR = replace(SYNC, mode="mirror", batch_rows=1000)


@pytest.fixture
def db(db: psycopg.Connection) -> psycopg.Connection:
    db.execute(SCORES)
    return db


# ---------------------------------------------------------------------- guards


def test_an_empty_result_is_held_told_once_and_gone_when_the_source_is_back(shop: Shop, db: psycopg.Connection) -> None:
    shop.orders(*rows(range(50)))
    job = shop.job(MIRROR)
    assert ran(job, shop).outcome == "done"
    for _ in range(3):
        shop.orders()
        run = ran(job, shop)
        assert (run.outcome, [t.limit for t in run.trips]) == ("held", ["allow_empty", "max_delete_share"])
    assert len(scores(db)) == 50, "nothing reached the target"
    assert told(shop) == ["held"], "three runs, one alert"
    assert f"cdc sync approve value {shop.state.get(held_fact('value'))['plan']}" in shop.alerts[0]["hint"]
    restarted = shop.job(MIRROR)
    shop.orders()
    assert ran(restarted, shop).outcome == "held"
    assert told(shop) == ["held"], "a restart tells nothing anew"
    shop.orders(*rows(range(49)), (50, 2.0))
    run = ran(restarted, shop)
    assert (run.outcome, run.counts["deleted"], run.counts["inserts"]) == ("done", 1, 1)
    assert told(shop) == ["held", "fine"]
    assert shop.state.get(held_fact("value")) is None


def test_a_dropped_partition_is_held_and_only_the_approved_plan_goes_through(
    shop: Shop, db: psycopg.Connection
) -> None:
    shop.orders(*rows(range(100)))
    job = shop.job(MIRROR)
    ran(job, shop)
    shop.orders(*rows(range(60)))
    held = ran(job, shop)
    assert (held.outcome, held.counts["deletes"]) == ("held", 40)
    assert job.order(shop.changed, "approve", plan="0123456789abcdef").outcome == "unconfirmed"
    assert len(scores(db)) == 100
    # What comes meanwhile is not approved with it.
    shop.orders(*rows(range(30), 7.0))
    assert ran(job, shop).outcome == "held"
    approved = job.order(shop.changed, "approve", plan=held.plan)
    assert (approved.outcome, approved.counts["deleted"], approved.counts["written"]) == ("done", 40, 0)
    assert scores(db) == dict.fromkeys(range(60), 1.0), "exactly that plan"
    again = job.order(shop.changed)
    assert (again.outcome, again.counts["deletes"]) == ("held", 30)
    assert job.order(shop.changed, "approve", plan=again.plan).outcome == "done"
    assert scores(db) == dict.fromkeys(range(30), 7.0)


def test_a_type_change_that_makes_every_row_differ_is_held(shop: Shop, db: psycopg.Connection) -> None:
    shop.orders(*rows(range(200)))
    job = shop.job(SYNC)
    ran(job, shop)
    shop.orders(*rows(range(200), 1.5))
    run = ran(job, shop)
    assert (run.outcome, [t.limit for t in run.trips]) == ("held", ["max_change_share"])
    assert set(scores(db).values()) == {1.0}
    assert job.order(shop.changed, "approve", plan=run.plan).outcome == "done"
    assert set(scores(db).values()) == {1.5}
    assert told(shop) == ["held", "fine"]


def test_an_approved_plan_is_continued_after_a_kill_without_sending_what_went_through(
    shop: Shop, db: psycopg.Connection
) -> None:
    shop.orders(*rows(range(300)))
    job = shop.job(replace(SYNC, batch_rows=50))
    ran(job, shop)
    shop.orders(*rows(range(300), 2.0))
    held = ran(job, shop)
    asked = iter([False, False, True])
    stopped = job.job.obey(
        Order(sync="value", kind="approve", plan=held.plan), shop.changed, should_stop=lambda: next(asked)
    )
    assert (stopped.outcome, stopped.counts["written"]) == ("stopped", 100)
    again = shop.job(replace(SYNC, batch_rows=50))
    run = ran(again, shop)
    assert (run.cause, run.outcome, run.counts["written"]) == ("approved", "done", 200)
    assert set(scores(db).values()) == {2.0}
    assert shop.state.get(held_fact("value")) is None


def test_a_plan_that_takes_the_place_of_a_held_one_is_told_and_shown_under_its_own_id(
    shop: Shop, db: psycopg.Connection
) -> None:
    shop.orders(*rows(range(100)))
    job = shop.job(MIRROR)
    ran(job, shop)
    shop.orders(*rows(range(60)))
    first = ran(job, shop)
    shop.orders(*rows(range(50)))
    second = job.order(shop.changed)
    assert (second.outcome, second.plan != first.plan, told(shop)) == ("held", True, ["held", "held"])
    assert f"approve value {second.plan}`" in shop.state.get(condition_fact("value"))["hint"]


def test_a_retry_beside_a_held_plan_says_nothing_of_how_the_sync_stands(shop: Shop, db: psycopg.Connection) -> None:
    shop.orders(*rows(range(50)), (None, 1.0))
    job = shop.job(MIRROR)
    assert ran(job, shop).outcome == "partial"
    shop.orders(*rows(range(20)), (None, 1.0))
    assert ran(job, shop).outcome == "held"
    assert job.order(shop.changed, "retry").outcome == "partial"
    assert told(shop) == ["partial", "held"]


def test_a_target_whose_columns_changed_is_asked_about_before_anything_is_written(
    shop: Shop, db: psycopg.Connection
) -> None:
    shop.orders((1, 1.0))
    job = shop.job(SYNC)
    ran(job, shop)
    db.execute("ALTER TABLE public.scores ALTER value TYPE numeric(6, 2)")
    shop.orders((1, 2.0))
    run = ran(job, shop)
    assert (run.outcome, [t.limit for t in run.trips]) == ("held", ["allow_drift"])
    assert scores(db) == {1: 1.0}
    assert job.order(shop.changed, "approve", plan=run.plan).outcome == "done"
    shop.orders((1, 3.0))
    assert ran(job, shop).outcome == "done", "what was approved is the shape from now on"


# ---------------------------------------------------------------------- rejects and verbs


def test_rejects_are_named_row_by_row_tried_again_and_hold_the_next_run_if_they_are_many(
    shop: Shop, db: psycopg.Connection
) -> None:
    shop.orders(*rows(range(40)), *rows(range(40, 60), 5000.0))
    job = shop.job(replace(SYNC, batch_rows=1000))
    run = ran(job, shop)
    assert (run.outcome, run.counts["written"], run.counts["rejected"]) == ("partial", 40, 20)
    assert told(shop) == ["partial"]
    found = rowlog.read(shop.lake.store, "value", run.run)
    assert found is not None
    about, log = found
    assert (about["plan"], about["inputs"]["shop"]["lsn"]) == (run.plan, shop.lsn)
    outcomes = {r["key"]: (r["action"], r["outcome"], r["reason"]) for r in log.to_pylist()}
    assert len(outcomes) == 60
    assert outcomes['["3"]'] == ("insert", "written", None)
    action, outcome, reason = outcomes['["44"]']
    assert (action, outcome) == ("insert", "rejected")
    assert "scores_value_check" in reason
    assert "5000" not in reason
    shop.orders(*rows(range(41)), *rows(range(41, 60), 5000.0))
    held = ran(job, shop)
    assert (held.outcome, [t.limit for t in held.trips]) == ("held", ["max_reject_share"])
    db.execute("ALTER TABLE public.scores DROP CONSTRAINT scores_value_check")
    retried = job.order(shop.changed, "retry")
    assert (retried.outcome, retried.counts["written"]) == ("done", 20), "only what was rejected"
    assert len(scores(db)) == 60
    assert told(shop) == ["partial", "held", "fine"]


def test_a_retry_or_reconcile_of_some_rows_does_not_pass_for_a_run(shop: Shop, db: psycopg.Connection) -> None:
    shop.orders((1, 1.0), (2, 5000.0))
    job = shop.job(SYNC)
    assert ran(job, shop).outcome == "partial"
    shop.orders((1, 7.0), (2, 5000.0))
    assert job.order(shop.changed, "reconcile", policy="source").outcome == "partial"
    assert job.order(shop.changed, "retry").outcome == "partial"
    db.execute("ALTER TABLE public.scores DROP CONSTRAINT scores_value_check")
    assert job.order(shop.changed, "retry").outcome == "done"
    assert ran(job, shop).cause == "data", "the change of the other row is still due"
    assert scores(db) == {1: 7.0, 2: 5000.0}


def test_the_verbs_are_not_the_same_thing(shop: Shop, db: psycopg.Connection) -> None:
    shop.orders((1, 1.0), (2, 2.0), (3, 3.0))
    job = shop.job(MIRROR)
    ran(job, shop)
    db.execute("UPDATE public.scores SET value = 50 WHERE customer_id = 1")
    db.execute("DELETE FROM public.scores WHERE customer_id = 2")
    assert job.order(shop.changed).counts["written"] == 0, "a run looks at what was acknowledged, not at the target"

    looked = job.order(shop.changed, "reconcile")
    assert (looked.outcome, looked.drift["missing"], looked.drift["different"]) == ("reported", 1, 1)
    assert looked.drift["samples"] == {"missing": ['["2"]'], "different": ['["1"]']}
    assert looked.drift["columns"] == {"value": 1}
    assert scores(db) == {1: 50.0, 3: 3.0}, "report writes nothing"

    let = job.order(shop.changed, "reconcile", policy="target")
    assert (let.outcome, let.counts["written"]) == ("done", 0)
    assert scores(db) == {1: 50.0, 3: 3.0}
    mended = job.order(shop.changed, "reconcile", policy="source")
    assert (mended.outcome, mended.counts["written"]) == ("done", 2)
    assert scores(db) == {1: 1.0, 2: 2.0, 3: 3.0}
    assert job.order(shop.changed, "reconcile").drift["missing"] == 0

    db.execute("UPDATE public.scores SET value = 9")
    shop.orders((1, 1.0), (2, 2.0))
    asked = job.order(shop.changed, "resync")
    assert (asked.outcome, asked.counts["deletes"], asked.counts["resends"]) == ("unconfirmed", 1, 2)
    assert scores(db) == {1: 9.0, 2: 9.0, 3: 9.0}
    done = job.order(shop.changed, "resync", yes=True)
    assert (done.outcome, done.counts["resends"], done.counts["deleted"]) == ("done", 2, 1)
    assert scores(db) == {1: 1.0, 2: 2.0}
    assert job.order(shop.changed).counts["unchanged"] == 2

    assert job.job.forget("value") == 2
    assert scores(db) == {1: 1.0, 2: 2.0}, "forgetting sends nothing"
    shop.orders((2, 2.0))
    run = ran(job, shop)
    assert (run.counts["inserts"], run.counts["deletes"]) == (1, 0), "what is forgotten is not deleted either"


def test_what_only_inserts_cannot_be_sent_again(shop: Shop, db: psycopg.Connection) -> None:
    shop.orders((1, 1.0))
    job = shop.job(replace(SYNC, mode="insert"))
    ran(job, shop)
    with pytest.raises(ConfigError, match="only inserts"):
        job.order(shop.changed, "resync")
    shop.orders((1, 2.0), (2, 2.0))
    run = ran(job, shop)
    assert (run.counts["ignored"], run.counts["written"]) == (1, 1)
    assert scores(db) == {1: 1.0, 2: 2.0}


def test_a_target_restored_from_its_backup_is_noticed_and_gets_what_it_lacks(
    shop: Shop, db: psycopg.Connection
) -> None:
    shop.orders((1, 1.0), (2, 2.0))
    job = shop.job(SYNC)
    ran(job, shop)
    db.execute("CREATE TABLE public.backup AS SELECT * FROM public.scores")
    db.execute("CREATE TABLE cdc.backup AS SELECT * FROM cdc.cdc_sync_state")
    shop.orders((1, 9.0), (2, 2.0), (3, 3.0))
    ran(job, shop)
    db.execute("TRUNCATE public.scores, cdc.cdc_sync_state")
    db.execute("INSERT INTO public.scores SELECT * FROM public.backup")
    db.execute("INSERT INTO cdc.cdc_sync_state SELECT * FROM cdc.backup")
    run = job.order(shop.changed)
    assert (run.outcome, run.counts["inserts"], run.counts["updates"]) == ("done", 1, 1)
    assert scores(db) == {1: 9.0, 2: 2.0, 3: 3.0}
    assert told(shop) == ["target went back"]
    assert "was it restored" in shop.alerts[0]["text"]
    assert job.order(shop.changed).counts["written"] == 0
    assert told(shop) == ["target went back"]


def test_failures_are_told_when_they_stay_and_when_they_are_over(shop: Shop, db: psycopg.Connection) -> None:
    shop.orders((1, 1.0))
    job = shop.job(SYNC)
    reachable, away = shop.target, shop.target_at("postgresql://127.0.0.1:1/x")

    def use(target: Any) -> None:
        job.job._sink = job.job._members[0].planner._sink = target

    use(away)
    for expected in ([], [], ["failing"], ["failing"]):
        assert job.order(shop.changed).outcome == "failed"
        assert told(shop) == expected
    use(reachable)
    assert job.order(shop.changed).outcome == "done"
    assert told(shop) == ["failing", "fine"]
    db.execute("DROP TABLE public.scores")
    shop.orders((1, 2.0))
    assert ran(job, shop).outcome == "failed"
    assert told(shop) == ["failing", "fine", "blocked"]


# ---------------------------------------------------------------------- groups


def test_the_syncs_of_a_group_are_written_in_one_transaction_in_the_order_of_their_references(
    shop: Shop, db: psycopg.Connection
) -> None:
    db.execute(
        "CREATE TABLE public.parents (id int PRIMARY KEY);"
        "CREATE TABLE public.children (id int PRIMARY KEY, parent int NOT NULL REFERENCES public.parents);"
        "CREATE TABLE public.transactions (id xid8);"
        "CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "INSERT INTO public.transactions VALUES (pg_current_xact_id()); RETURN NULL; END $$;"
        "CREATE TRIGGER note AFTER INSERT ON public.parents EXECUTE FUNCTION public.note();"
        "CREATE TRIGGER note AFTER INSERT ON public.children EXECUTE FUNCTION public.note()"
    )
    children = SyncConfig(
        name="children", target="crm", table="public.children", key=("id",), mode="mirror", group="family",
        sql="select customer_id as id, amount::int as parent from shop.orders", debounce_s=0,
        guard=GuardConfig(max_delete_share=1.0, allow_empty=True),
    )  # fmt: skip
    parents = replace(
        children, name="parents", table="public.parents", sql="select distinct amount::int as id from shop.orders"
    )
    job = shop.job(children, parents, model=ModelConfig(name="none", sql=MODEL.sql, key=MODEL.key)).job

    def state() -> tuple[list[Any], list[Any]]:
        return (
            db.execute("SELECT id, parent FROM public.children ORDER BY 1").fetchall(),
            db.execute("SELECT id FROM public.parents ORDER BY 1").fetchall(),
        )

    shop.orders((1, 10.0), (2, 10.0), (3, 11.0))
    runs = job.step(shop.changed)
    assert [(r.sync, r.outcome) for r in runs] == [("children", "done"), ("parents", "done")]
    assert state() == ([(1, 10), (2, 10), (3, 11)], [(10,), (11,)])
    shop.orders((2, 12.0), (3, 12.0))
    assert [r.outcome for r in job.step(shop.changed)] == ["done", "done"]
    assert state() == ([(2, 12), (3, 12)], [(12,)])
    (transactions,) = db.execute("SELECT count(DISTINCT id::text) FROM public.transactions").fetchone() or (0,)
    assert transactions == 2, "one for each of the two runs"
    shop.orders()
    job.step(shop.changed)
    assert state() == ([], [])


def test_a_group_is_held_together(shop: Shop, db: psycopg.Connection) -> None:
    db.execute("CREATE TABLE public.others (customer_id int PRIMARY KEY, value float8)")
    one = replace(MIRROR, group="both")
    other = replace(one, name="other", table="public.others", mode="upsert")
    job = shop.job(one, other)
    shop.orders(*rows(range(50)))
    assert [r.outcome for r in job.job.step(shop.changed)] == ["done", "done"]
    shop.orders(*rows(range(10), 2.0))
    held = {r.sync: r for r in job.job.step(shop.changed)}
    assert {r.outcome for r in held.values()} == {"held"}
    assert set(scores(db).values()) == {1.0}
    assert job.order(shop.changed, "approve", plan=held["value"].plan).outcome == "done"
    assert scores(db) == dict.fromkeys(range(10), 2.0)
    assert db.execute("SELECT count(*) FROM public.others WHERE value = 2").fetchone() == (10,)
