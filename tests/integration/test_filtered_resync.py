"""Resyncs of some rows (rule 14): what the filter or the keys name is written anew, and nothing else is touched.

What was spoilt is really spoilt: rows of `current` are changed, added and removed in its files, as another writer of
the lake would do it, with the orders of before, with orders of the future, and without any.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from tests.integration.test_snapshot_races import chunk_is_read, clock, stream_held
from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until
from tests.support.witness import Witness, assert_exactly_once, changelog

BIG = "repeat(md5({}::text), 100)"


@pytest.fixture
def daemon(tmp_path: Path, database: str) -> Iterator[Daemon]:
    execute(
        database,
        "create table t (id int primary key, n int, word text, big text)",
        "alter table t alter big set storage external",
        f"insert into t select g, g, 'word ' || g, {BIG.format('g')} from generate_series(1, 300) g",
        "create table heap (n int)",
        "create table pair (a numeric, b text, n int, primary key (a, b))",
        "insert into pair select g / 10.0, 'b' || g % 7, g from generate_series(1, 100) g",
    )
    with Daemon(tmp_path, database, source={"chunk_rows": 50}) as made:
        yield made.start().settled()


def current(daemon: Daemon, table: str = "t") -> DeltaTable:
    return DeltaTable(str(daemon.lake / "shop" / f"public.{table}" / "current"))


ORDERS = (
    {},
    {"_lsn": "9223372036854775800", "_seq": "9223372036854775800"},
    {"_epoch": "99"},
    {"_seq": "9223372036854775800"},
    {"_epoch": "null", "_lsn": "null", "_seq": "null"},
)
"""What spoilt rows claim of themselves: the orders of before, of the future, and none."""


def spoil(daemon: Daemon) -> None:
    """Wrong values in 1 … 50, none of 60 … 69, and extra rows 1001 … 1050; the orders of each tenth are others."""
    table = current(daemon)
    extra = table.to_pyarrow_table()
    extra = extra.filter(pa.compute.less_equal(extra["id"], 50))
    at = extra.schema.get_field_index("id")
    extra = extra.set_column(at, extra.schema.field(at), pa.compute.add(extra["id"], pa.scalar(1000, pa.int32())))
    table.update(updates={"n": "-1", "word": "'spoilt'", "big": "'spoilt'"}, predicate="id <= 50")
    table.delete("id between 60 and 69")
    write_deltalake(table, extra, mode="append")
    for i, claims in enumerate(ORDERS):
        if claims:
            tenth = f"(id > {10 * i} and id <= {10 * i + 10}) or (id > {1000 + 10 * i} and id <= {1010 + 10 * i})"
            current(daemon).update(updates=claims, predicate=tenth)


def order(daemon: Daemon, table: str = "t", **what: Any) -> dict[str, Any]:
    """Post the request that verify's repair posts, and wait for the run's end."""
    from cdc import control
    from cdc.state import open_state

    state = open_state(daemon.state_dir)
    try:
        answer = control.order(state, "resync", {"source": "shop", "table": f"public.{table}", **what}, timeout_s=60)
        assert answer is not None
        ended = ("done", "failed", "cancelled")
        run = wait_until(
            lambda: (found := state.run(answer["run"])) and found.state in ended and found,
            60, lambda: f"the run to end: {state.run(answer['run'])}\n{daemon.log_tail()}",
        )  # fmt: skip
    finally:
        state.close()
    return {**answer, "state": run.state, "reason": run.reason, "rows": run.rows, **run.details}


def test_spoilt_rows_are_healed_whatever_order_they_claim(daemon: Daemon) -> None:
    witness = Witness(daemon.dsn, f"witness_{daemon.slot}")
    spoil(daemon)
    assert daemon.ask("verify", "t").code == 3
    keys = [[str(i)] for i in [*range(1, 51), *range(60, 70), *range(1001, 1051)]]
    done = order(daemon, keys=keys)
    assert (done["kind"], done["state"], done["rows"]) == ("filtered", "done", 60)
    daemon.settled().verified()
    rows = changelog(daemon.lake, "public.t", columns=("_op", "_run", "_raw", "_epoch", "_lsn", "_seq")).to_pylist()
    of_run = [r["_op"] for r in rows if r["_run"] == done["run"]]
    assert {op: of_run.count(op) for op in of_run} == {"s": 2, "r": 60, "d": 50}
    assert assert_exactly_once(witness, daemon.lake, ["public.t"]) == 0, "the run's deletes are none of the stream"


def test_a_filter_heals_what_it_names_on_either_side(daemon: Daemon) -> None:
    """Missing rows and those with wrong values are found at the source, extra ones in the lake."""
    spoil(daemon)
    done = order(daemon, where="id <= 50 or id > 1010 -- and so on")
    assert (done["state"], done["rows"]) == ("done", 50)
    daemon.settled()
    report = daemon.ask("verify", "t").document["tables"][0]
    assert sorted(report["missing"]) == [str(i) for i in range(60, 70)], "the filter does not name them"
    assert sorted(map(int, report["extra"])) == list(range(1001, 1011))
    # What a filter finds in the lake alone is asked for at the source: where it is there, it stays.
    current(daemon).update(updates={"n": "-1"}, predicate="id = 200")
    done = order(daemon, where="n <= 0")
    assert (done["state"], done["rows"]) == ("done", 1)
    assert daemon.ask("resync", "t", "--where", "id between 60 and 1010", "--wait").code == 0
    daemon.settled().verified()


def test_keys_of_several_columns_and_types_are_found_and_missed(daemon: Daemon) -> None:
    table = current(daemon, "pair")
    table.update(updates={"n": "-1"}, predicate="n < 20")
    current(daemon, "pair").update(updates={"b": "'ghost'"}, predicate="n > 90")
    with psycopg.connect(daemon.dsn) as connection:
        rows = connection.execute("select a::text, b from pair").fetchall()
    keys = [list(row) for row in rows] + [[a, "ghost"] for a, _ in rows] + [["NaN", "x"]]
    assert order(daemon, "pair", keys=keys)["state"] == "done"
    daemon.settled().verified()


def test_what_changes_while_the_keys_are_looked_up_is_left_alone(daemon: Daemon) -> None:
    """Rules 6 and 8 hold for looked-up keys and for those that are not there."""
    database = daemon.dsn
    with stream_held(daemon):
        execute(database, "update t set n = 1000 where id = 1", "delete from t where id = 2")
        since = clock(database)
        from cdc import control
        from cdc.state import open_state

        state = open_state(daemon.state_dir)
        keys = [[str(i)] for i in (1, 2, 3, 4, 5, 6, 500, 501)]
        answer = control.order(state, "resync", {"source": "shop", "table": "public.t", "keys": keys}, timeout_s=60)
        state.close()
        assert answer is not None
        chunk_is_read(daemon, since)
        execute(
            database,
            f"insert into t values (500, 5, 'late', {BIG.format(500)})",
            "update t set n = 7 where id = 3",
            "delete from t where id = 4",
            "update t set id = 501 where id = 5",
            "update t set id = 600 where id = 6",
        )
    daemon.settled().verified()


def test_a_filter_that_does_not_run_fails_alone_and_tells_no_value(daemon: Daemon) -> None:
    for where, said in (
        ("nope > 1", 'column "nope" does not exist'),
        ("id >", "syntax error"),
        ("word::int > 1", "fails on values"),
        ("1 / (id - 7) > 0", "fails on values"),
        ("id > 1; drop table t", "syntax error"),
    ):
        done = order(daemon, where=where)
        assert done["state"] == "failed", where
        assert said in done["reason"], where
        assert "word 1" not in done["reason"]
        assert daemon.tables()["public.t"]["state"] == "streaming"
    assert daemon.source()["error"] == ""
    # What only DuckDB cannot evaluate is said, and the rest is done.
    done = order(daemon, where="word ~ '^word 1.$' and num_nonnulls(n) = 1")
    assert (done["state"], done["rows"]) == ("done", 10)
    assert "were not looked through" in done["note"]
    daemon.settled().verified()


def test_orders_that_cannot_be_met_are_refused_with_what_to_do(daemon: Daemon) -> None:
    answer = daemon.ask("resync", "heap", "--where", "n > 1")
    assert answer.code == 1
    assert "no key" in answer.notes + str(answer.document)
    assert "cdc resync public.heap" in answer.notes + str(answer.document)
    from cdc import control
    from cdc.state import open_state

    state = open_state(daemon.state_dir)
    try:
        with pytest.raises(control.RequestFailed, match="has 2 columns"):
            control.order(state, "resync", {"source": "shop", "table": "public.pair", "keys": [["1"]]}, timeout_s=60)
    finally:
        state.close()


def test_a_filtered_run_survives_a_kill_and_joins_only_its_like(daemon: Daemon) -> None:
    spoil(daemon)
    daemon.kill()
    from cdc import control
    from cdc.state import open_state

    state = open_state(daemon.state_dir)
    for _ in range(2):
        assert control.order(state, "resync", {"source": "shop", "table": "public.t", "where": "true"}) is None
    assert control.order(state, "resync", {"source": "shop", "table": "public.t", "keys": [["1"]]}) is None
    for _ in range(3):
        daemon.start(failpoints="backfill.after_chunk=kill:2").ended()
    daemon.start().settled().verified()
    runs = [r for r in state.runs("shop") if r.kind == "filtered"]
    state.close()
    assert [(r.state, r.where_sql) for r in runs] == [("done", "true"), ("done", "")]
    rows = changelog(daemon.lake, "public.t", columns=("_op", "_run", "_raw", "_epoch", "_lsn", "_seq")).to_pylist()
    assert sum(r["_op"] == "r" and r["_run"] == runs[0].id for r in rows) == 300, "no chunk was read twice"
