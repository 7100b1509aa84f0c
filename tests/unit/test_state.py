"""The state database by examples: what survives, what is refused, and how processes and threads share it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdc import runs
from cdc.errors import ConfigError, FormatTooNew, InvariantBroken, LogCorrupt
from cdc.state import FORMAT, STATE_FILE, SourceState, State, TableState, open_state
from cdc.table import TableId

ORDERS = TableId("public", "orders")


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    opened = open_state(tmp_path)
    yield opened
    opened.close()


def test_everything_that_was_changed_is_there_after_reopening(tmp_path: Path) -> None:
    state = open_state(tmp_path)
    state.set("fact", {"a": [1, None, "ü"]})
    state.save_source("shop", phase="streaming", identity={"system_id": "7"}, confirmed_lsn=1 << 62)
    state.update_table("shop", ORDERS, state="streaming", rows=3, oid=(1 << 32) - 1)
    run = state.create_run("shop", ORDERS, "first", where_sql="id > 3")
    state.update_run(run.id, state="running", chunk_no=2, last_key=["7", "x"], details={"keys": [["1"]]})
    state.pause("table", "shop/public.orders")
    state.save_checkpoint("land", "shop", {"offset": 5, "more": "x"})
    state.save_cut("shop", 77, {ORDERS: 4, TableId("public", "a"): 1}, at_us=9)
    state.close()
    state = open_state(tmp_path)
    assert state.get("fact") == {"a": [1, None, "ü"]}
    source = state.source("shop")
    assert source is not None
    assert (source.phase, source.identity, source.confirmed_lsn, source.positioned) == (
        "streaming",
        {"system_id": "7"},
        1 << 62,
        False,
    )
    assert state.table("shop", ORDERS).rows == 3
    assert state.table("shop", ORDERS).oid == (1 << 32) - 1
    found = state.run(run.id)
    assert found is not None
    assert (found.chunk_no, found.last_key, found.details, found.where_sql) == (
        2,
        ["7", "x"],
        {"keys": [["1"]]},
        "id > 3",
    )
    assert state.is_paused("table", "shop/public.orders")
    assert state.checkpoint("land", "shop") == {"offset": 5, "more": "x"}
    cut = state.cut("shop")
    assert cut is not None
    assert (cut.lsn, cut.at_us, cut.versions) == (77, 9, {ORDERS: 4, TableId("public", "a"): 1})


def test_what_was_never_saved_has_a_plain_answer(state: State) -> None:
    assert state.get("nothing") is None
    assert state.source("nobody") is None
    assert state.table("nobody", ORDERS) == TableState(source="nobody", table=ORDERS)
    assert state.checkpoint("land", "nobody") is None
    assert state.cut("nobody") is None
    assert state.run("none") is None
    assert not state.is_paused("sync", "none")
    with pytest.raises(KeyError):
        state.request(1)


def test_a_transaction_is_all_or_nothing(state: State) -> None:

    def change_and_fail() -> None:
        with state.transaction() as tx:
            state.set("a", 1, tx)
            state.update_table("shop", ORDERS, tx=tx, state="streaming")
            assert state.get("a") == 1, "its own changes are seen inside"
            raise KeyError

    with pytest.raises(KeyError):
        change_and_fail()
    assert state.get("a") is None
    assert state.tables("shop") == []
    with state.transaction() as tx:
        state.set("a", 2, tx)
        state.save_source("shop", tx=tx)
    assert state.get("a") == 2
    assert state.sources() == [SourceState(name="shop")]


def test_a_transaction_inside_another_is_an_error_and_undoes_the_outer_one(state: State) -> None:

    def nest() -> None:
        with state.transaction() as tx:
            state.set("a", 1, tx)
            state.set("b", 1)

    with pytest.raises(InvariantBroken, match="inside another"):
        nest()
    assert state.get("a") is None
    state.set("a", 3)
    with state.transaction() as tx:
        old = tx
    with pytest.raises(InvariantBroken, match="not the running transaction"):
        state.set("a", 4, old)


def test_threads_never_see_half_a_transaction(state: State) -> None:
    state.set("left", 0)
    state.set("right", 0)
    done = threading.Event()
    torn: list[tuple[object, object]] = []

    def look() -> None:
        while not done.is_set():
            rows = dict(state.query("select key, value from facts"))
            if rows["left"] != rows["right"]:
                torn.append((rows["left"], rows["right"]))

    reader = threading.Thread(target=look)
    reader.start()

    def write(first: int) -> None:
        for n in range(first, first + 50):
            with state.transaction() as tx:
                state.set("left", n, tx)
                state.set("right", n, tx)

    writers = [threading.Thread(target=write, args=(k * 100,)) for k in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    reader.join()
    assert torn == []
    assert state.get("left") == state.get("right")


def test_another_process_orders_something_while_we_have_the_database_open(tmp_path: Path, state: State) -> None:
    code = (
        "import sys, pathlib; from cdc.state import open_state; "
        "s = open_state(pathlib.Path(sys.argv[1]), create=False); print(s.post_request('resync', {'table': 'ü'}))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True, cwd=Path.cwd()
    ).stdout
    (request,) = state.open_requests()
    assert (request.id, request.verb, request.args, request.answered) == (
        int(printed),
        "resync",
        {"table": "ü"},
        False,
    )
    looking = open_state(tmp_path, readonly=True)
    state.answer_request(request.id, result={"run": "r"})
    state.answer_request(request.id, error="too late")
    assert state.open_requests() == []
    answered = looking.request(request.id)
    assert (answered.result, answered.error, answered.answered) == ({"run": "r"}, None, True)


def test_old_answers_and_old_history_are_forgotten(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "REQUESTS_KEPT", 5)
    monkeypatch.setattr(runs, "HISTORY_KEPT", 5)
    waiting = state.post_request("wait")
    numbers = [state.post_request("wait", {"n": n}) for n in range(10)]
    for number in numbers:
        state.answer_request(number, result={})
    with pytest.raises(KeyError):
        state.request(numbers[0])
    assert state.request(numbers[-1]).answered
    assert [r.id for r in state.open_requests()] == [waiting], "an open request is never forgotten"
    for n in range(10):
        state.finish_history(state.start_history("sync", "scores", f"cause {n}"), "done", counts={"n": n})
    state.start_history("model", "scores", "other kind")
    assert [e.counts["n"] for e in state.history("sync", "scores", limit=100)] == [9, 8, 7, 6, 5]
    assert [(e.outcome, e.ended_at) for e in state.history("model")] == [("running", 0)]


def test_a_checkpoint_goes_back_only_by_reset(state: State) -> None:
    state.save_checkpoint("land", "shop", {"offset": 5})
    state.save_checkpoint("land", "shop", {"offset": 5})
    with pytest.raises(InvariantBroken, match="would go back to 4"):
        state.save_checkpoint("land", "shop", {"offset": 4})
    assert state.checkpoints("shop") == {"land": {"offset": 5}}
    state.reset_checkpoint("land", "shop", {"offset": 1})
    assert state.checkpoint("land", "shop") == {"offset": 1}
    state.reset_checkpoint("land", "shop", None)
    assert state.checkpoints("shop") == {}


def test_counters_and_states_that_cannot_be_are_refused(state: State) -> None:
    state.update_table("shop", ORDERS, snapshot_seq=10)
    run = state.create_run("shop", ORDERS, "first", id="r1")
    state.update_run(run.id, chunk_no=3)
    for change in (
        lambda: state.update_table("shop", ORDERS, snapshot_seq=9),
        lambda: state.update_table("shop", ORDERS, state="happy"),
        lambda: state.update_run("r1", chunk_no=2),
        lambda: state.update_run("r1", state="happy"),
        lambda: state.update_run("r2", rows=1),
        lambda: state.create_run("shop", ORDERS, "first", id="r1"),
        lambda: state.pause("cat", "x"),
    ):
        with pytest.raises(InvariantBroken):
            change()
    for wrong in (
        lambda: state.update_table("shop", ORDERS, colour=1),
        lambda: state.update_run("r1", kind="other"),
        lambda: state.save_source("shop", lsn=5),
    ):
        with pytest.raises(TypeError, match="unknown fields"):
            wrong()
    assert state.table("shop", ORDERS).snapshot_seq == 10
    assert [r.chunk_no for r in state.runs("shop", ORDERS, states=["pending"])] == [3]


def test_times_follow_what_they_are_times_of(state: State) -> None:
    run = state.create_run("shop", ORDERS, "first")
    assert (run.state, run.started_at, run.ended_at) == ("pending", 0, 0)
    started = state.update_run(run.id, state="running")
    ended = state.update_run(run.id, state="done")
    assert 0 < run.created_at <= started.started_at == ended.started_at <= ended.ended_at
    state.save_source("shop", phase="snapshot")
    before = state.source("shop")
    state.save_source("shop", phase="snapshot", error="x")
    assert before is not None
    assert state.source("shop") == SourceState(name="shop", phase="snapshot", phase_since=before.phase_since, error="x")
    first = state.update_table("shop", ORDERS, state="streaming").state_since
    assert state.update_table("shop", ORDERS, state="streaming", rows=1).state_since == first


def test_runs_come_in_the_order_of_their_creation_and_by_table(state: State) -> None:
    made = [state.create_run("shop", TableId("public", f"t{n % 2}"), "first") for n in range(6)]
    assert [r.id for r in state.runs()] == [r.id for r in made]
    assert [r.id for r in state.runs("shop", TableId("public", "t1"))] == [r.id for r in made[1::2]]
    state.update_run(made[2].id, state="failed", reason="why")
    assert [r.reason for r in state.runs(states=["failed", "done"])] == ["why"]
    assert state.runs("elsewhere") == []


def test_a_newer_format_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    open_state(tmp_path).close()
    with sqlite3.connect(tmp_path / STATE_FILE) as connection:
        connection.execute(f"pragma user_version={FORMAT + 1}")
    for readonly in (False, True):
        with pytest.raises(FormatTooNew, match=f"format {FORMAT + 1}"):
            open_state(tmp_path, readonly=readonly)
    with sqlite3.connect(tmp_path / STATE_FILE) as connection:
        assert connection.execute("pragma user_version").fetchone() == (FORMAT + 1,)


def test_a_file_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / STATE_FILE) as connection:
        connection.execute("pragma user_version=1")
        connection.execute("create table theirs (a)")
    with pytest.raises(ConfigError, match="another program"):
        open_state(tmp_path)
    (tmp_path / STATE_FILE).write_bytes(b"not a database at all, but long enough to look at" * 100)
    with pytest.raises(LogCorrupt, match="damaged"):
        open_state(tmp_path)


def test_a_reader_of_a_missing_database_is_told_so_and_creates_nothing(tmp_path: Path) -> None:
    for options in ({"readonly": True}, {"create": False}):
        with pytest.raises(ConfigError, match="no state database"):
            open_state(tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def test_a_reader_cannot_change_anything(tmp_path: Path, state: State) -> None:
    state.set("a", 1)
    looking = open_state(tmp_path, readonly=True)
    with pytest.raises(ConfigError, match="cannot be opened as needed"):
        looking.set("a", 2)
    assert looking.get("a") == 1


def test_the_file_is_for_its_owner_only_and_durable_as_promised(state: State) -> None:
    assert state.path.stat().st_mode & 0o077 == 0
    assert state.query("pragma journal_mode") == [("wal",)]
    assert state.query("pragma synchronous") == [(2,)]


def test_processes_that_create_the_database_at_once_all_get_it(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from cdc.state import open_state; "
        "s = open_state(pathlib.Path(sys.argv[1])); s.post_request('wait')"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path.cwd()) for _ in range(4)]
    assert [process.wait(60) for process in started] == [0] * 4
    assert len(open_state(tmp_path).open_requests()) == 4
