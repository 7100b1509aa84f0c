"""Reverse ETL over HTTP against a service that answers badly, late, twice or not at all.

The oracle is the service's own account: its rows are what was wanted, each effect is there once for each time that it
was planned upon another acknowledged version, what is acknowledged is there, and what is refused is what it refuses for
good. Random programs and kills are drawn from the run's seed.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cdc import models
from cdc.config_serving import RequestConfig
from cdc.errors import StoreUnavailable, TargetRejected, TargetUnavailable
from cdc.lake import ledger as ledger_module
from cdc.lake.ledger import LakeLedger
from cdc.plan import make_plan
from cdc.ports import ObjectStore
from cdc.sink import ACKS, ADOPT, DELETE, IN_DOUBT, INSERT, UPDATE, Assignment, Batch
from connectors.http import delivery
from connectors.http.target import HttpTarget
from connectors.local.store import LocalStore
from tests.support import http_push
from tests.support.buckets import new_bucket, s3_endpoint
from tests.support.http_push import Planned, assignment, batches, digest_of, key_of, planned, push
from tests.support.http_target import AFTER, BEFORE, ITEMS, HttpTargetServer, Reply, Request
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server() -> Iterator[HttpTargetServer]:
    with HttpTargetServer() as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "lake")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "WAIT_S", 0.01)


@pytest.fixture
def sink_of(store: LocalStore) -> Iterator[Callable[..., HttpTarget]]:
    made: list[HttpTarget] = []

    def make(url: str, **settings: Any) -> HttpTarget:
        made.append(http_push.target(url, partial(LakeLedger, store), **settings))
        return made[-1]

    yield make
    for sink in made:
        sink.close()


def known(store: ObjectStore) -> dict[str, tuple[str, int]]:
    rows = LakeLedger(store, http_push.SYNC).read().to_pylist()
    return {json.loads(row["key"])[0]: (row["digest"], row["version"]) for row in rows}


def held(store: ObjectStore) -> dict[str, str]:
    """Key and digest of what the target has, by the ledger."""
    return {key: digest for key, (digest, _) in known(store).items() if digest}


# ---- the plain way ----


@pytest.mark.parametrize("way", sorted(http_push.REQUESTS))
def test_the_target_becomes_what_is_wanted_and_three_contents_are_three_effects(
    way: str, server: HttpTargetServer, store: LocalStore, sink_of: Callable[..., HttpTarget]
) -> None:
    sink = sink_of(server.url)
    wanted = {f"k{i}": "a" for i in range(20)}
    for value in ("a", "b", "a"):
        _, results = push(sink, assignment(way), {**wanted, "turned": value})
        assert [r for r in results if r.error or r.rejected or r.unsent] == []
        assert server.rows["turned"] == value
    assert [value for key, value in server.effects if key == "turned"] == ["a", "b", "a"]
    assert known(store)["turned"] == (digest_of("a"), 3)
    push(sink, assignment(way), wanted)
    assert server.rows == wanted
    assert known(store)["turned"] == ("", 4)
    push(sink, assignment(way), {**wanted, "turned": "a"})
    assert server.rows["turned"] == "a"
    assert server.duplicates == 0


@pytest.mark.parametrize("way", sorted(http_push.REQUESTS))
def test_what_is_refused_for_good_is_told_with_its_reason_and_the_rest_goes_through(
    way: str, server: HttpTargetServer, store: LocalStore, sink_of: Callable[..., HttpTarget]
) -> None:
    wanted = {f"k{i:02d}": "bad" if i in (3, 4, 17) else "good" for i in range(30)}
    _, results = push(sink_of(server.url), assignment(way), wanted)
    (result,) = results
    assert sorted(r.key for r in result.rejected) == [key_of(k) for k in ("k03", "k04", "k17")]
    assert result.written == 27
    assert result.error is None
    expected = {"single": "status 422", "told": "status 422: the value is bad", "batch": "status 207: the value is bad",
                "whole": "status 400"}[way]  # fmt: skip
    assert {r.reason for r in result.rejected} == {expected}
    assert server.rows == {k: v for k, v in wanted.items() if v == "good"}
    assert set(held(store)) == set(server.rows)
    assert server.duplicates == 0


def test_adopting_sends_nothing_and_moves_the_acknowledgements(
    server: HttpTargetServer, store: LocalStore, sink_of: Callable[..., HttpTarget]
) -> None:
    acks = pa.table({"key": [key_of("a")], "digest": ["x"], "version": [4]}, schema=ACKS)
    batch = Batch(assignment=assignment("single"), action=ADOPT, rows=pa.table({"k": ["a"], "v": ["b"]}), acks=acks)
    (result,) = sink_of(server.url).push([batch])
    assert (result.written, server.count) == (1, 0)
    assert known(store) == {"a": ("x", 5)}
    sink = sink_of(server.url)
    assert (sink.forget(assignment("single")), sink.forget(assignment("single"))) == (1, 0)
    assert known(store) == {"a": ("", 5)}
    assert sink.acknowledged(assignment("single")).shape == ""


def test_a_row_that_is_gone_is_deleted_already_and_one_to_update_is_absent(
    server: HttpTargetServer, store: LocalStore, sink_of: Callable[..., HttpTarget]
) -> None:
    sink = sink_of(server.url)
    push(sink, assignment("single"), {"a": "1"})
    server.rows.clear()
    _, (result,) = push(sink, assignment("single"), {})
    assert (result.written, known(store)) == (1, {"a": ("", 2)})
    to = Assignment(sync="crm", table="", key=("k",), mode="update", columns=("k", "v"),
                    request=RequestConfig(method="DELETE", path="/rows/{k}"))  # fmt: skip
    (result,) = sink.push(batches(to, [("b", UPDATE, "1", 0)]))
    assert (result.absent, result.rejected, result.written) == ([key_of("b")], [], 0)


def test_rows_without_a_request_of_their_own_are_refused_one_by_one(
    server: HttpTargetServer, sink_of: Callable[..., HttpTarget]
) -> None:
    to = Assignment(sync="crm", table="", key=("k",), mode="upsert", columns=("k", "v"),
                    request=RequestConfig(method="POST", path="/rows/{v}", headers={"X-Key": "{k}"}))  # fmt: skip
    plan: list[Planned] = [("a", INSERT, None, 0), ("b", INSERT, "", 0), ("c", INSERT, "..", 0),
                           ("d\r\nX-Evil: 1", INSERT, "x", 0)]  # fmt: skip
    (result,) = sink_of(server.url).push(batches(to, plan))
    assert len(result.rejected) == 4
    assert server.count == 0
    assert not any("X-Evil" in r.reason for r in result.rejected)


def test_a_request_that_is_too_large_is_halved_and_a_row_that_is_too_large_refused(
    server: HttpTargetServer, sink_of: Callable[..., HttpTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "BODY_BYTES_MAX", 600)
    wanted = {"a": "x" * 1000, **{f"k{i}": "y" * 100 for i in range(7)}}
    _, (result,) = push(sink_of(server.url), assignment("whole"), wanted)
    assert [r.key for r in result.rejected] == [key_of("a")]
    assert set(server.rows) == set(wanted) - {"a"}
    assert all(len(r.body) <= 600 for r in server.requests)


def test_requests_are_in_flight_together_but_no_more_than_said(sink_of: Callable[..., HttpTarget]) -> None:
    together = threading.Barrier(3)

    def answer(request: Request) -> Reply:
        together.wait(10)
        return Reply(200)

    to = Assignment(sync="crm", table="", key=("k",), mode="upsert", columns=("k", "v"),
                    request=RequestConfig(path="/x", body="{v}"))  # fmt: skip
    with HttpTargetServer(answers=answer) as server:
        plan: list[Planned] = [(f"k{i}", INSERT, "v", 0) for i in range(12)]
        (result,) = sink_of(server.url, in_flight=3, request_timeout_s=20.0).push(batches(to, plan))
        assert (result.written, server.most_at_once) == (12, 3)


def test_a_limit_per_second_is_kept(server: HttpTargetServer, sink_of: Callable[..., HttpTarget]) -> None:
    begin = time.monotonic()
    push(sink_of(server.url, requests_per_s=20.0), assignment("single"), {f"k{i}": "a" for i in range(11)})
    assert time.monotonic() - begin >= 10 / 20
    assert server.count == 11


# ---- what does not go through ----


def test_a_target_that_is_down_leaves_rows_unsent_and_the_next_run_sends_them_under_the_same_keys(
    server: HttpTargetServer, store: LocalStore, sink_of: Callable[..., HttpTarget]
) -> None:
    wanted = {f"k{i}": "a" for i in range(6)}
    server.chaos(1, 1.0, ["502"])  # they take effect, and nobody says so
    _, (result,) = push(sink_of(server.url, retry_for_s=0.2), assignment("single"), wanted)
    assert isinstance(result.error, TargetUnavailable)
    assert "status 502" in str(result.error)
    assert len(result.unsent) == 6
    assert set(held(store).values()) == {IN_DOUBT}
    server.chaos(1, 0, [])
    _, results = push(sink_of(server.url), assignment("single"), wanted)
    assert [sum(r.written for r in results), *(r.error for r in results if r.error)] == [6]
    assert sorted(server.effects) == sorted(wanted.items())
    assert server.duplicates > 0


def test_a_pause_that_is_asked_for_is_made_and_one_that_is_too_long_ends_the_run(
    server: HttpTargetServer, sink_of: Callable[..., HttpTarget]
) -> None:
    server.next_faults = ["429:1"]
    _, (result,) = push(sink_of(server.url, retry_for_s=5.0, in_flight=1), assignment("single"), {"a": "1", "b": "2"})
    assert (result.written, server.count) == (2, 3)
    server.next_faults = ["503:3600"]
    wanted = {"a": "1", "b": "2", "c": "1", "d": "2"}
    _, (result,) = push(sink_of(server.url, retry_for_s=5.0, in_flight=1), assignment("single"), wanted)
    assert isinstance(result.error, TargetUnavailable)
    assert server.count == 4, "an hour is longer than it is tried, so it was not tried at all"
    assert result.unsent == [key_of("c"), key_of("d")]
    assert result.written == 0


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_what_only_an_operator_mends_stops_the_sync_and_names_the_status(
    status: int, store: LocalStore, sink_of: Callable[..., HttpTarget]
) -> None:
    to = Assignment(sync="crm", table="", key=("k",), mode="upsert", columns=("k", "v"),
                    request=RequestConfig(path="/elsewhere", body="{v}"))  # fmt: skip
    with HttpTargetServer(answers=lambda request: Reply(status, {"why": "hidden"})) as server:
        plan: list[Planned] = [(f"k{i}", INSERT, "v", 0) for i in range(50)]
        results = sink_of(server.url, in_flight=2).push(batches(to, plan, rows_max=20))
    assert [len(r.unsent) for r in results] == [20, 20, 10]
    assert all(isinstance(r.error, TargetRejected) for r in results)
    assert f"status {status}" in str(results[0].error)
    assert "hidden" not in str(results[0].error)
    assert server.count <= 4, "what is in flight, and nothing new"


@pytest.mark.parametrize("fault", ITEMS)
def test_outcomes_that_are_missing_or_say_nothing_are_no_success(
    fault: str, server: HttpTargetServer, store: LocalStore, sink_of: Callable[..., HttpTarget]
) -> None:
    server.next_faults = [fault]
    wanted = {f"k{i}": "a" for i in range(7)}
    _, (result,) = push(sink_of(server.url), assignment("batch"), wanted)
    assert isinstance(result.error, TargetRejected)
    assert "items" in str(result.error)
    assert len(result.unsent) == 7
    assert set(held(store).values()) == {IN_DOUBT}
    _, (result,) = push(sink_of(server.url), assignment("batch"), wanted)
    assert result.written == 7
    assert sorted(server.effects) == sorted(wanted.items())


def test_what_was_in_flight_when_it_stopped_is_acknowledged(
    store: LocalStore, sink_of: Callable[..., HttpTarget]
) -> None:
    gate = threading.Event()

    def answer(request: Request) -> Reply:
        if request.json == "slow":
            gate.wait(10)
            return Reply(200, {})
        gate.set()
        return Reply(401, {})

    to = Assignment(sync="crm", table="", key=("k",), mode="upsert", columns=("k", "v"),
                    request=RequestConfig(path="/x", body="{v}"))  # fmt: skip
    with HttpTargetServer(answers=answer) as server:
        plan: list[Planned] = [("a", INSERT, "slow", 0), ("b", INSERT, "stops", 0)]
        (result,) = sink_of(server.url, in_flight=2, request_timeout_s=20.0).push(batches(to, plan))
    assert (result.written, result.unsent) == (1, [key_of("b")])
    assert known(store) == {"a": (digest_of("slow"), 1)}


def test_rows_of_a_request_that_was_taken_in_part_stay_in_doubt_until_they_are_sent_alone(
    store: LocalStore, sink_of: Callable[..., HttpTarget]
) -> None:
    answers = [Reply(207, {"ok": False}), Reply(200, {"ok": True}), Reply(200, {"ok": False}), Reply(401)]
    to = Assignment(sync="crm", table="", key=("k",), mode="upsert", columns=("k", "v"),
                    request=RequestConfig(path="/x", body="{items}", item="{k}", rows_per_request=4, ok="ok"),
                    )  # fmt: skip
    with HttpTargetServer(answers=lambda request: answers.pop(0)) as server:
        plan: list[Planned] = [(f"k{i}", INSERT, "v", 0) for i in range(4)]
        (result,) = sink_of(server.url, in_flight=1).push(batches(to, plan))
        sent = [r.json for r in server.requests]
    assert sent == [["k0", "k1", "k2", "k3"], ["k0", "k1"], ["k2", "k3"], ["k2"]]
    assert (result.written, result.unsent) == (2, [key_of("k2"), key_of("k3")])
    assert held(store) == {"k0": digest_of("v"), "k1": digest_of("v"), "k2": IN_DOUBT, "k3": IN_DOUBT}


def test_what_was_sent_unheard_is_mended_when_the_result_turns_back(
    server: HttpTargetServer, store: LocalStore, sink_of: Callable[..., HttpTarget]
) -> None:
    """B was taken unheard, and the result is A again, which was acknowledged: it must be sent all the same."""
    sink, to = sink_of(server.url, retry_for_s=0.05, in_flight=1), assignment("single")
    push(sink, to, {"a": "A", "gone": "G"})
    server.chaos(1, 1.0, ["cut"])
    push(sink, to, {"a": "B", "gone": "G"})
    push(sink, to, {"a": "B", "gone": "G", "new": "N"})
    assert server.rows["a"] == "B"
    server.chaos(1, 0, [])
    push(sink, to, {"a": "A", "gone": "G"})
    assert server.rows == {"a": "A", "gone": "G"}
    push(sink, to, {"a": "B", "gone": "G"})
    assert server.rows == {"a": "B", "gone": "G"}
    assert [v for k, v in server.effects if k == "a"] == ["A", "B", "A", "B"]


def test_in_mode_insert_what_was_not_heard_of_is_new(
    server: HttpTargetServer, sink_of: Callable[..., HttpTarget]
) -> None:
    sink, to = sink_of(server.url, retry_for_s=0.05), assignment("single", mode="insert")
    server.chaos(1, 1.0, ["cut"])
    push(sink, to, {"a": "A"})
    server.chaos(1, 0, [])
    plan, (result,) = push(sink, to, {"a": "A"})
    assert [(p[0], p[1]) for p in plan] == [("a", INSERT)]
    assert (result.written, server.effects) == (1, [("a", "A")])


@pytest.mark.parametrize("way", ["single", "batch"])
@pytest.mark.parametrize(("fault", "there"), [("cut", "A"), ("early", "B")])
def test_in_mode_insert_a_key_in_doubt_is_one_insert_whatever_it_holds_by_now(
    fault: str, there: str, way: str, server: HttpTargetServer, store: LocalStore, sink_of: Callable[..., HttpTarget]
) -> None:
    sink, to = sink_of(server.url, retry_for_s=0.05), assignment(way, mode="insert")
    server.chaos(1, 1.0, [fault])
    push(sink, to, {"a": "A"})
    push(sink, to, {"a": "B"})
    server.chaos(1, 0, [])
    _, (result,) = push(sink, to, {"a": "B"})
    assert (result.written, result.error) == (1, None)
    assert server.effects == [("a", there)]
    # The ledger says the older content: a sync of another mode would send the newer one, if it was not taken.
    assert held(store) == {"a": digest_of("A")}


class Failing(LocalStore):
    """A store whose writes fail while `fails`."""

    fails = False

    def put(self, key: str, data: Any, *, if_absent: bool = False, if_match: str | None = None) -> str:
        if self.fails:
            raise StoreUnavailable("the lake is away")
        return super().put(key, data, if_absent=if_absent, if_match=if_match)


def test_rows_whose_acknowledgement_fails_are_not_told_as_written_and_have_no_second_effect(
    server: HttpTargetServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "LEDGER_TRIES_S", 0.1)
    store = Failing(tmp_path)
    sink = http_push.target(server.url, partial(LakeLedger, store))
    store.fails = True
    _, (result,) = push(sink, assignment("single"), {"a": "1", "b": "2"})
    assert isinstance(result.error, StoreUnavailable)
    assert (result.written, sorted(result.unsent)) == (0, [key_of("a"), key_of("b")])
    store.fails = False
    _, (result,) = push(sink, assignment("single"), {"a": "1", "b": "2"})
    sink.close()
    assert result.written == 2
    assert sorted(server.effects) == [("a", "1"), ("b", "2")]


# ---- types ----


def test_a_row_is_deleted_at_the_address_that_it_was_written_to(
    store: LocalStore, sink_of: Callable[..., HttpTarget]
) -> None:
    """A key's columns have their types in a delete as in a write, so they have the same form in a path."""
    path = "/rows/{dev}/{at}"
    to = Assignment(
        sync="crm", table="", key=("dev", "at"), mode="mirror", columns=("dev", "at", "v"),
        request=RequestConfig(method="PUT", path=path, body={"v": "{v}"}),
        delete_request=RequestConfig(method="DELETE", path=path),
    )  # fmt: skip
    at = pa.array([dt.datetime(2024, 1, 1, 10, tzinfo=dt.UTC), dt.datetime(2024, 1, 1, 10, 0, 0, 5, tzinfo=dt.UTC)],
                  pa.timestamp("us", "UTC"))  # fmt: skip
    rows = pa.table({"dev": ["a/b", "ü"], "at": at, "v": [1, 2]})
    acks = pa.table([['["a/b","x"]', '["ü","y"]'], ["d", "d"], [0, 0]], schema=ACKS)
    with HttpTargetServer(answers=lambda request: Reply(200, {})) as service:
        sink = sink_of(f"{service.url}/api")
        sink.push([Batch(assignment=to, action=INSERT, rows=rows, acks=acks)])
        gone = pa.table([acks.column("key"), ["", ""], [1, 1]], schema=ACKS)
        (result,) = sink.push([Batch(assignment=to, action=DELETE, rows=rows.select(["dev", "at"]), acks=gone)])
        assert (result.written, LakeLedger(store, "crm").read().column("digest").to_pylist()) == (2, ["", ""])
        sent = {m: sorted(r.path for r in service.requests if r.method == m) for m in ("PUT", "DELETE")}
    assert sent["DELETE"] == sent["PUT"]
    assert "/api/rows/a%2Fb/2024-01-01T10%3A00%3A00.000000Z" in sent["PUT"]


def test_a_json_of_the_query_is_a_text_and_a_struct_is_json(
    tmp_path: Path, store: LocalStore, sink_of: Callable[..., HttpTarget]
) -> None:
    sql = """
        SELECT 1 AS id, to_json({'a': [1, NULL]}) AS j, {'a': [1, NULL]} AS s, [1.50, 2] AS l, MAP {'k': true} AS m,
               from_json('{"a": [1, null]}'::JSON, '{"a": ["INTEGER"]}') AS f"""
    models.run_model(store, {}, sql, ["id"], tmp_path / "result.parquet")
    columns = ("id", "j", "s", "l", "m", "f")
    request = RequestConfig(path="/x", body={name: f"{{{name}}}" for name in columns})
    to = Assignment(sync="crm", table="", key=("id",), mode="upsert", columns=columns, request=request)
    with HttpTargetServer(answers=lambda request: Reply(200, {})) as service:
        sink = sink_of(service.url)
        plan = make_plan(tmp_path / "result.parquet", sink.acknowledged(to).rows, to, tmp_path / "plan")
        (result,) = sink.push(plan.batches(100))
        assert result.written == 1
        (sent,) = service.requests
    whole = {"a": [1, None]}
    assert sent.json == {"id": 1, "j": '{"a":[1,null]}', "s": whole, "l": [1.5, 2.0], "m": {"k": True}, "f": whole}


# ---- random programs ----


class Account:
    """What was planned so far, and what must hold of the service's own account."""

    def __init__(self, server: HttpTargetServer) -> None:
        self.server = server
        self.turns: dict[str, list[Any]] = {}
        """By key, the contents that were to be there one after another (None: nothing)."""

    def plan(self, plan: list[Planned]) -> None:
        for key, _, value, _ in plan:
            turns = self.turns.setdefault(key, [])
            if turns[-1:] != [value]:
                turns.append(value)

    def check(self) -> None:
        """Each time that a key was to turn into something has one effect at most, however often it was tried."""
        most = Counter((key, value) for key, turns in self.turns.items() for value in turns)
        doubled = {e: n for e, n in Counter(self.server.effects).items() if n > most[e]}
        assert doubled == {}

    def check_end(self, store: ObjectStore, wanted: dict[str, str]) -> None:
        """Everything good is there, nothing else is but old values of what is bad now, and the ledger says the same."""
        self.check()
        good = {k: v for k, v in wanted.items() if not v.startswith("bad")}
        there = {k: v for k, v in self.server.rows.items() if k in good or k not in wanted}
        assert there == good
        told = {k: digest for k, digest in held(store).items() if k in good}
        assert told == {k: digest_of(v) for k, v in good.items()}
        for k, digest in held(store).items() - told.items():
            # Bad now: the ledger has what was there before, or does not know, if something ended unheard then.
            assert k in wanted
            assert digest in (IN_DOUBT, digest_of(self.server.rows.get(k)))


def change(rng: random.Random, wanted: dict[str, str]) -> None:
    for _ in range(rng.randrange(1, 25)):
        key = f"k{rng.randrange(30)}"
        if rng.random() < 0.25:
            wanted.pop(key, None)
        else:
            wanted[key] = rng.choice(["a", "b", "c", "d", "bad"])


def check_results(server: HttpTargetServer, plan: list[Planned], results: list[Any]) -> None:
    """What is told as written is there; what is told as rejected is what the service refuses."""
    by_key = {key_of(p[0]): p for p in plan}
    left = {k for r in results for k in (*r.unsent, *r.absent, *(x.key for x in r.rejected))}
    for key, (name, _, value, _) in by_key.items():
        if key not in left:
            assert server.rows.get(name) == value
    rejected = {x.key for r in results for x in r.rejected}
    assert rejected <= {key for key, p in by_key.items() if str(p[2]).startswith("bad")}


def random_program(seed: int, store: ObjectStore, rounds: int) -> None:
    rng = random.Random(seed)
    way = rng.choice(sorted(http_push.REQUESTS))
    wanted: dict[str, str] = {}
    quick = [*BEFORE, "429:0", "cut", "half", "garbage", "502", *ITEMS]
    with HttpTargetServer(drip_s=1.0) as server:
        account = Account(server)
        for _ in range(rounds):
            change(rng, wanted)
            kinds = [*AFTER, *BEFORE] if rng.random() < 0.15 else quick
            server.chaos(rng.randrange(1 << 30), rng.choice([0.1, 0.3, 0.6]), kinds)
            sink = http_push.target(
                server.url, partial(LakeLedger, store), in_flight=rng.randrange(1, 5), retry_for_s=0.3
            )
            plan, results = push(sink, assignment(way), wanted)
            sink.close()
            account.plan(plan)
            account.check()
            check_results(server, plan, results)
        server.chaos(0, 0, [])
        sink = http_push.target(server.url, partial(LakeLedger, store))
        plan, results = push(sink, assignment(way), wanted)
        sink.close()
        account.plan(plan)
        assert [r.error for r in results if r.error] == []
        account.check_end(store, wanted)


def seeds(count: int) -> list[Any]:
    return [pytest.param(n, marks=[pytest.mark.slow] if n >= 4 else []) for n in range(count)]


@pytest.mark.parametrize("number", seeds(110))
def test_random_programs_end_in_what_was_wanted_with_no_effect_doubled(
    number: int, store: LocalStore, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "LINKS_MAX", 4)
    random_program(rng.randrange(1 << 30) + number, store, rounds=4 if number < 10 else 8)


def test_a_random_program_over_a_lake_in_a_bucket(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "LINKS_MAX", 4)
    store = http_push.open_store(f"{s3_endpoint()} {new_bucket()}")
    random_program(rng.randrange(1 << 30), store, rounds=3)


# ---- kills ----


def start(server: HttpTargetServer, lake: str, way: str, wanted: dict[str, str], failpoints: str = "") -> Any:
    task = {"url": server.url, "lake": lake, "way": way, "wanted": wanted, "in_flight": 3, "group_rows": 5,
            "links_max": 3}  # fmt: skip
    environment = {**os.environ, "HTTP_PUSH": json.dumps(task), "CDC_FAILPOINTS": failpoints}
    return subprocess.Popen([sys.executable, "-m", "tests.support.http_push"], cwd=ROOT, env=environment)


def killed_program(
    seed: int, lake: str, kill: Callable[[HttpTargetServer, dict[str, str], random.Random], int]
) -> None:
    """Rounds that end by a kill, and one that may end."""
    rng = random.Random(seed)
    store, wanted = http_push.open_store(lake), {f"k{i}": "a" for i in range(40)}
    way = rng.choice(sorted(http_push.REQUESTS))
    with HttpTargetServer() as server:
        account = Account(server)
        server.chaos(seed, 0.1, ["cut", "500", "502"])
        for _ in range(2):
            change(rng, wanted)
            account.plan(planned(LakeLedger(store, http_push.SYNC).read(), wanted))
            assert kill(server, {"lake": lake, "way": way, "wanted": json.dumps(wanted)}, rng) in (-signal.SIGKILL, 0)
            account.check()
        server.chaos(0, 0, [])
        account.plan(planned(LakeLedger(store, http_push.SYNC).read(), wanted))
        assert start(server, lake, way, wanted).wait(60) == 0
        account.check_end(store, wanted)


def kill_at_random(server: HttpTargetServer, task: dict[str, str], rng: random.Random) -> int:
    at = server.count + rng.randrange(1, 30)
    process = start(server, task["lake"], task["way"], json.loads(task["wanted"]))
    wait_until(lambda: server.count >= at or process.poll() is not None, 60, "some requests")
    process.kill()
    return int(process.wait(60))


@pytest.mark.parametrize("number", [pytest.param(n, marks=[pytest.mark.slow] if n else []) for n in range(12)])
def test_killed_at_random_moments_nothing_is_lost_or_doubled(number: int, tmp_path: Path, rng: random.Random) -> None:
    killed_program(rng.randrange(1 << 30) + number, str(tmp_path / "lake"), kill_at_random)


@pytest.mark.slow
def test_killed_with_a_lake_in_a_bucket_nothing_is_lost_or_doubled(rng: random.Random) -> None:
    killed_program(rng.randrange(1 << 30), f"{s3_endpoint()} {new_bucket()}", kill_at_random)


@pytest.mark.parametrize(
    "point",
    [
        "http.before_ack",
        *(
            pytest.param(p, marks=pytest.mark.slow)
            for p in ("http.after_ack", "ledger.after_put", "ledger.before_join", "ledger.after_join")
        ),
    ],
)
def test_killed_at_a_point_nothing_is_lost_or_doubled(point: str, tmp_path: Path, rng: random.Random) -> None:
    def kill(server: HttpTargetServer, task: dict[str, str], rng: random.Random) -> int:
        nth = rng.randrange(1, 3)
        process = start(server, task["lake"], task["way"], json.loads(task["wanted"]), f"{point}=kill:{nth}")
        return int(process.wait(60))

    killed_program(rng.randrange(1 << 30), str(tmp_path / "lake"), kill)
