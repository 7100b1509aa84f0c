"""What may come together: a held plan and everything else, kills and lost state between two statements, odd names.

Each of these once lost, doubled or falsified something, or told a story that was not so.
"""

from __future__ import annotations

import resource
import shutil
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from cdc.condition import condition_fact, held_fact
from cdc.config_serving import GuardConfig, SyncConfig
from cdc.due import last_fact
from cdc.errors import TargetUnavailable
from cdc.planning import Planner
from cdc.state import State
from cdc.sync_run import Order, SyncRun
from tests.support.syncs import SCORES, SYNC, Job, Shop, ran, rows, scores, told

MIRROR = replace(SYNC, mode="mirror", batch_rows=1000)


@pytest.fixture
def db(db: psycopg.Connection) -> psycopg.Connection:
    db.execute(SCORES)
    return db


def by_sql(sql: str, **options: Any) -> SyncConfig:
    fields = {"name": "value", "target": "crm", "table": "public.t", "key": ("id",), "sql": sql, "debounce_s": 0}
    return SyncConfig(**{**fields, **options})


def held(shop: Shop, job: Job) -> SyncRun:
    """Fifty rows are there, and a plan that changes 30 and deletes 20 of them waits."""
    shop.orders(*rows(range(50)))
    ran(job, shop)
    shop.orders(*rows(range(30), 2.0))
    run = ran(job, shop)
    assert run.outcome == "held"
    return run


# ---------------------------------------------------------------------- names and keys


def test_columns_may_be_called_as_those_of_a_plan_are(shop: Shop, db: psycopg.Connection) -> None:
    db.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY, version int, key text, action text, digest text, known text)"
    )
    sql = (
        "select customer_id as id, amount::int as version, 'k' || customer_id as key, 'a' as action, 'd' as digest, "
        "'n' as known from shop.orders"
    )
    shop.orders((1, 5.0), (2, 6.0))
    ran(shop.job(by_sql(sql)), shop)
    assert db.execute("SELECT * FROM public.t ORDER BY 1").fetchall() == [
        (1, 5, "k1", "a", "d", "n"),
        (2, 6, "k2", "a", "d", "n"),
    ]


def test_acknowledgements_of_another_key_delete_nothing(shop: Shop, db: psycopg.Connection) -> None:
    db.execute("CREATE TABLE public.t (id int UNIQUE, account int UNIQUE, value float8)")
    shop.orders((1, 5.0), (2, 6.0))
    sql = "select customer_id as id, customer_id + 100 as account, amount as value from shop.orders"
    ran(shop.job(by_sql(sql, mode="mirror")), shop)
    db.execute("INSERT INTO public.t VALUES (500, 1, 0), (501, 2, 0)")
    run = ran(shop.job(by_sql(sql, key=("account",), mode="mirror")), shop)
    assert (run.cause, run.counts["deletes"], run.counts["inserts"]) == ("new definition", 0, 2)
    assert db.execute("SELECT count(*) FROM public.t WHERE id >= 500").fetchone() == (2,)


def test_a_key_with_a_time_zone_is_reconciled_wherever_the_daemon_runs(
    shop: Shop, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    db.execute("CREATE TABLE public.t (id timestamptz PRIMARY KEY, value float8)")
    shop.orders((1, 1.0), (2, 2.0))
    job = shop.job(by_sql("select to_timestamp(customer_id) as id, amount as value from shop.orders"))
    ran(job, shop)
    db.execute("UPDATE public.t SET value = 9")
    assert job.order(shop.changed, "reconcile", policy="source").counts["written"] == 2


# ---------------------------------------------------------------------- held plans


def test_a_retry_or_reconcile_that_sends_nothing_leaves_the_held_plan(shop: Shop, db: psycopg.Connection) -> None:
    job = shop.job(MIRROR)
    plan = held(shop, job).plan
    assert job.order(shop.changed, "retry").outcome == "done"
    assert job.order(shop.changed, "reconcile").outcome == "reported"
    assert told(shop) == ["held"], "nothing is well again"
    assert shop.state.get(held_fact("value"))["plan"] == plan
    assert job.order(shop.changed, "approve", plan=plan).outcome == "done"
    assert scores(db) == dict.fromkeys(range(30), 2.0)


def test_a_reconcile_that_writes_drops_the_held_plan_and_a_run_holds_the_next(
    shop: Shop, db: psycopg.Connection
) -> None:
    job = shop.job(MIRROR)
    plan = held(shop, job).plan
    assert job.order(shop.changed, "reconcile", policy="source").counts["written"] == 30
    assert job.order(shop.changed, "approve", plan=plan).outcome == "unconfirmed"
    run = ran(job, shop)
    assert (run.cause, run.outcome, run.counts["updates"], run.counts["deletes"]) == ("unfinished", "held", 0, 20)
    assert len(scores(db)) == 50


def test_a_daemon_that_dies_while_it_holds_a_plan_holds_it_after_the_next_start(
    shop: Shop, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    shop.orders(*rows(range(50)))
    ran(shop.job(MIRROR), shop)
    shop.orders(*rows(range(30), 2.0))
    for fact in (held_fact("value"), condition_fact("value"), last_fact("value")):

        def dies(self: State, key: str, value: Any, fact: str = fact, real: Any = State.set) -> None:
            if key == fact and value is not None:
                raise Killed
            real(self, key, value)

        with monkeypatch.context() as patched:
            job = shop.job(MIRROR)
            patched.setattr(State, "set", dies)
            with pytest.raises(Killed):
                job.step(shop.changed)
    assert ran(shop.job(MIRROR), shop).outcome == "held"
    assert told(shop) == ["held"]
    assert shop.state.get(held_fact("value"))["plan"]
    assert len(scores(db)) == 50


def test_a_plan_of_another_definition_is_not_sent(shop: Shop, db: psycopg.Connection) -> None:
    plan = held(shop, shop.job(MIRROR)).plan
    shop.state.set(held_fact("value"), {**shop.state.get(held_fact("value")), "approved": True})
    careful = replace(MIRROR, mode="upsert")
    job = shop.job(careful)
    run = ran(job, shop)
    assert (run.cause, run.outcome, run.counts["deletes"], run.counts["written"]) == ("new definition", "done", 0, 30)
    assert job.order(shop.changed, "approve", plan=plan).outcome == "unconfirmed"
    assert len(scores(db)) == 50


def test_a_held_plan_whose_files_are_gone_or_torn_is_made_anew(shop: Shop, db: psycopg.Connection) -> None:
    job = shop.job(MIRROR)
    plan = held(shop, job).plan
    (shop.folder / "work" / "value" / "held" / "writes.parquet").write_bytes(b"")
    assert job.order(shop.changed, "approve", plan=plan).outcome == "failed"
    again = shop.job(MIRROR)
    run = ran(again, shop)
    assert (run.cause, run.outcome, run.plan) == ("unfinished", "held", plan)
    shutil.rmtree(shop.folder / "work")
    lost = shop.job(MIRROR)
    assert ran(lost, shop).outcome == "held"
    assert lost.order(shop.changed, "approve", plan=plan).outcome == "done"
    assert len(scores(db)) == 30


def test_an_old_plan_is_not_sent_over_a_newer_one_that_was_cut_short(shop: Shop, db: psycopg.Connection) -> None:
    db.execute("CREATE TABLE public.t (id int, value float8)")
    sync = by_sql("select customer_id as id, amount as value from shop.orders", mode="append", batch_rows=1)
    shop.orders((1, 1.0), (2, 1.0))
    job = shop.job(sync)
    ran(job, shop)
    db.execute("ALTER TABLE public.t ALTER value TYPE numeric")
    shop.orders((1, 2.0), (2, 2.0))
    old = ran(job, shop)
    assert old.outcome == "held"
    db.execute("ALTER TABLE public.t ALTER value TYPE float8")
    shop.orders((1, 3.0), (2, 3.0))
    asked = iter([False, True, True])
    run = job.step(shop.changed, should_stop=lambda: next(asked))
    assert run is not None
    assert (run.outcome, run.counts["written"]) == ("stopped", 1)
    assert job.order(shop.changed, "approve", plan=old.plan).outcome == "unconfirmed"
    ran(job, shop)
    assert db.execute("SELECT * FROM public.t ORDER BY 1, 2").fetchall() == [(1, 1.0), (1, 3.0), (2, 1.0), (2, 3.0)]


def test_blocked_and_then_held_by_order_is_not_blocked_any_more(shop: Shop, db: psycopg.Connection) -> None:
    shop.orders(*rows(range(50)))
    job = shop.job(MIRROR)
    ran(job, shop)
    db.execute("ALTER TABLE public.scores RENAME TO hidden")
    shop.orders(*rows(range(51)))
    assert ran(job, shop).outcome == "failed"
    db.execute("ALTER TABLE public.hidden RENAME TO scores")
    shop.orders(*rows(range(20)))
    assert job.order(shop.changed).outcome == "held"
    shop.orders(*rows(range(52)))
    assert ran(job, shop).outcome == "done"


# ---------------------------------------------------------------------- cuts, resyncs, groups


def test_what_is_cut_while_a_run_reads_is_left_for_the_next_of_all_members_alike(
    shop: Shop, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.execute("CREATE TABLE public.others (customer_id int PRIMARY KEY, value float8)")
    one = replace(MIRROR, group="both")
    job = shop.job(one, replace(one, name="other", table="public.others")).job
    shop.orders((1, 1.0))
    real, frozen = Planner.freeze, []

    def freeze(self: Planner, *args: Any) -> Any:
        made = real(self, *args)
        if not frozen:
            frozen.append(1)
            shop.orders((1, 2.0))
        return made

    def both() -> tuple[dict[int, float], dict[int, float]]:
        return scores(db), dict(db.execute("SELECT customer_id, value FROM public.others").fetchall())

    monkeypatch.setattr(Planner, "freeze", freeze)
    job.step(shop.changed)
    assert both() == ({1: 1.0}, {1: 1.0}), "one cut for both, whatever came meanwhile"
    job.step(shop.changed)
    assert both() == ({1: 2.0}, {1: 2.0}), "and what came is still due"


def test_a_member_of_a_group_that_is_held_alone_is_approved_alone(shop: Shop, db: psycopg.Connection) -> None:
    db.execute("CREATE TABLE public.others (customer_id int PRIMARY KEY, value float8)")
    one = replace(MIRROR, group="both")
    strict = replace(one, name="other", table="public.others", guard=GuardConfig(max_delete_rows=0))
    job = shop.job(one, strict).job
    shop.orders(*rows(range(200)))
    job.step(shop.changed)
    shop.orders(*rows(range(195)))
    runs = {r.sync: r for r in job.step(shop.changed)}
    assert {r.outcome for r in runs.values()} == {"held"}
    done = job.obey(Order(sync="other", kind="approve", plan=runs["other"].plan), shop.changed)
    assert (done.outcome, len(scores(db))) == ("done", 195)


def test_a_resync_that_is_cut_off_goes_on_by_itself(shop: Shop, db: psycopg.Connection) -> None:
    shop.orders(*rows(range(5)))
    job = shop.job(replace(SYNC, batch_rows=2))
    ran(job, shop)
    good = shop.target

    class Flaky:
        pushed = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(good, name)

        def push(self, batches: Any) -> Any:
            Flaky.pushed += 1
            if Flaky.pushed > 1:
                raise TargetUnavailable("gone")
            return good.push(batches)

    db.execute("UPDATE public.scores SET value = 9")
    job.job._sink = Flaky()  # type: ignore[assignment]
    assert job.order(shop.changed, "resync").outcome == "failed"
    run = ran(shop.job(replace(SYNC, batch_rows=2)), shop)
    assert (run.cause, run.counts["resends"]) == ("unfinished", 3)
    assert set(scores(db).values()) == {1.0}


def test_a_resync_sends_everything_also_after_the_state_was_lost(shop: Shop, db: psycopg.Connection) -> None:
    shop.orders((1, 1.0), (2, 2.0))
    job = shop.job(SYNC)
    ran(job, shop)
    assert job.order(shop.changed, "resync").counts["resends"] == 2
    shop.state.close()
    (shop.folder / "state.db").unlink()
    shop.state = State(shop.folder / "state.db")
    shop.orders((1, 1.0), (2, 2.0))
    job = shop.job(SYNC)
    ran(job, shop)
    db.execute("UPDATE public.scores SET value = 99")
    assert job.order(shop.changed, "resync").counts["resends"] == 2
    assert scores(db) == {1: 1.0, 2: 2.0}


def test_a_retry_deletes_what_the_target_would_not_let_go(shop: Shop, db: psycopg.Connection) -> None:
    db.execute("CREATE TABLE public.child (c int REFERENCES public.scores)")
    shop.orders(*rows(range(5)))
    job = shop.job(MIRROR)
    ran(job, shop)
    db.execute("INSERT INTO public.child VALUES (1)")
    shop.orders(*rows(range(2, 5)), (0, 1.0))
    assert ran(job, shop).counts["rejected"] == 1
    db.execute("DELETE FROM public.child")
    assert job.order(shop.changed, "retry").counts["deleted"] == 1
    assert sorted(scores(db)) == [0, 2, 3, 4]


def test_forgetting_is_no_restore(shop: Shop, db: psycopg.Connection) -> None:
    shop.orders((1, 1.0), (2, 2.0))
    job = shop.job(SYNC)
    ran(job, shop)
    job.job.forget("value")
    shop.orders((1, 1.0), (2, 2.0), (3, 1.0))
    ran(job, shop)
    assert told(shop) == []


def test_a_disk_that_is_full_fails_the_run_and_not_the_daemon(shop: Shop, db: psycopg.Connection) -> None:
    shop.orders(*((i, i * 0.37 % 999) for i in range(100_000)))
    job = shop.job(replace(SYNC, batch_rows=50_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        run = ran(job, shop)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.outcome == "failed"
    assert "make room on the disk of state_dir" in run.error
    assert job.job.blocked == ""
    job.job._retry_at = 0.0
    assert ran(job, shop).outcome == "done"
