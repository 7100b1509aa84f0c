"""The command line without a server: usage, exit codes, JSON, and what it reads from a real state database and lake."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cdc import control
from cdc.batch import Boundary
from cdc.cli import GROUPS, VERBS, main, parser
from cdc.config import Config
from cdc.config_file import load
from cdc.console import Console, bytes_text, lsn_text, parse_lsn, seconds_text
from cdc.control import Control
from cdc.errors import SourceRefused
from cdc.follow import followers_fact
from cdc.log import EventLog
from cdc.ports import SourceStatus
from cdc.state import SourceState, State, open_state
from cdc.status import ladder, progress_fact
from cdc.sync_run import SyncRun
from cdc.table import TableId
from cdc.verbs.call import UsageError, resolve_tables
from tests.support.lakes import SmallLake
from tests.support.waiting import wait_until

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"
ORDERS = TableId("public", "orders")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A configuration whose source and target are reachable by nobody."""
    file = tmp_path / "cdc.toml"
    file.write_text(
        f"""
        state_dir = "state"
        [source.shop]
        dsn = "host={tmp_path}/nowhere dbname=shop user=cdc"
        connect_timeout_s = 2
        [lake]
        url = "lake"
        [model.value]
        sql = "select 1 as id"
        key = ["id"]
        [target.crm]
        type = "postgres"
        dsn = "host={tmp_path}/nowhere dbname=crm user=cdc"
        [sync.value]
        model = "value"
        target = "crm"
        table = "public.value"
        key = ["id"]
        """
    )
    return load(file)


@pytest.fixture
def state(config: Config) -> Iterator[State]:
    """What a daemon that ran has left behind: two tables, a position, a run of the sync."""
    opened = open_state(config.state_dir)
    log = EventLog(config.log_dir, opened, bytes_max=config.log_bytes_max)
    log.set_position("shop", Boundary(1, 0x1_0000_1000, 0x1_0000_1100))
    log.close()
    opened.save_source("shop", phase="streaming", received_lsn=0x1_0000_1100, confirmed_lsn=0x1_0000_0100)
    opened.update_table("shop", ORDERS, state="streaming", rows=42, current_lsn=0x1_0000_1000)
    opened.update_table("shop", TableId("odd", 'a."b'), state="stopped", reason="no key", hint="add a primary key")
    opened.create_run("shop", ORDERS, "resync", state="running")
    entry = opened.start_history("sync", "value", "apply")
    opened.finish_history(entry, "done", counts={"written": 3})
    yield opened
    opened.close()


def run(capsys: pytest.CaptureFixture[str], config: Config, *words: str) -> tuple[int, Any, str]:
    """Exit code, the JSON document on standard output, and standard error."""
    capsys.readouterr()
    code = main(["--config", str(config.path), *words, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


class Serving:
    """A thread that serves requests as the daemon's main loop does."""

    def __init__(self, state: State, handlers: dict[str, control.Handler]) -> None:
        self._path = state.path
        self._handlers = handlers
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop)

    def __enter__(self) -> None:
        ready = threading.Event()
        self._ready = ready
        self._thread.start()
        assert ready.wait(5)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)

    def _loop(self) -> None:
        state = State(self._path, create=False)
        served = Control(state)
        served.serve(self._handlers)
        while not self._stop.is_set():
            control.beat(state, time.time())
            self._ready.set()
            served.poll_once()
            self._stop.wait(0.02)
        state.set(control.DAEMON_FACT, None)
        state.close()


def verbs() -> list[list[str]]:
    return [[name] for name in VERBS] + [[group, name] for group, (_, members) in GROUPS.items() for name in members]


@pytest.mark.parametrize("words", verbs(), ids=" ".join)
def test_help_of_every_verb_shows_an_example_that_parses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    example = re.search(r"example: cdc (.*)$", text)
    assert example, text
    assert example[1].startswith(" ".join(words))
    assert "--json" in text
    assert "--config" in text


@pytest.mark.parametrize("words", verbs(), ids=" ".join)
def test_every_verb_is_documented(words: list[str]) -> None:
    table = DOCS.read_text().split("| verb | does |")[1].split("\n\n")[0]
    first = [re.split(r"(?<!\\)\|", row)[1] for row in table.splitlines()[2:]]
    names = [re.findall(r"[a-z-]+", row) for row in first]
    assert any(words[0] in row and words[-1] in row for row in names)


def test_every_option_of_a_verb_stands_in_the_documentation() -> None:
    table = DOCS.read_text().split("| verb | does |")[1].split("\n\n")[0]
    common = {"--help", "--config", "--json"}
    for action in parser()._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        for name, verb in action.choices.items():
            options = {option for a in verb._actions for option in a.option_strings if option.startswith("--")}
            for option in options - common:
                assert option in table, f"{name} {option}"


@pytest.mark.parametrize(
    "words",
    [
        ["dance"],
        [],
        ["resync"],
        ["wait", "--lsn", "zero"],
        ["wait", "--timeout", "-1"],
        ["query"],
        ["status", "extra"],
        ["lake", "land"],
        ["lake", "land", "later"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_and_shows_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "example: cdc" in captured.err


def test_a_wrong_configuration_exits_2_with_the_error_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cdc.toml"
    file.write_text("stat_dir = 1\n")
    assert main(["--json", "status", "--config", str(file)]) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["exit_code"] == 2
    assert document["error"]["kind"] == "ConfigError"
    assert "did you mean state_dir?" in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["resync", "cancel", "orders", "--where", "id > 1"], "takes a condition"),
        (["resync", "orders", "--all"], "name tables, or --all"),
        (["resync", "ordres"], "did you mean orders?"),
        (["pause", "shoop"], "did you mean shop?"),
        (["sync", "plan", "valu"], "did you mean value?"),
        (["log", "ls", "--source", "sho"], "did you mean shop?"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_what_does_not_exist_exits_2_and_names_the_nearest(
    config: Config, state: State, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    code, document, _ = run(capsys, config, *words)
    assert code == 2
    assert part in document["error"]["message"] + document["error"]["hint"]
    assert state.open_requests() == []


def test_version_needs_no_configuration_and_is_quick(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cdc", "version", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert json.loads(done.stdout)["python"]
    assert time.monotonic() - began < 10
    for heavy in ("pyarrow", "psycopg", "duckdb", "deltalake", "rich"):
        assert not re.search(rf"\| +{heavy}$", done.stderr, re.MULTILINE), f"{heavy} is imported"


def test_status_without_any_state_says_that_nothing_ran(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = run(capsys, config, "status")
    assert code == 0
    assert document["daemon"]["running"] is False
    assert document["sources"][0]["phase"] == "new"
    assert document["sources"][0]["slot"]["exists"] is None
    assert not config.state_dir.exists()
    assert main(["--config", str(config.path), "pause"]) == 1


def test_status_with_the_daemon_down_and_the_server_away_shows_what_the_state_knows(
    config: Config, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    state.set(progress_fact("shop"), {"landed_lsn": 0x1_0000_1100})
    follower = {"table": "public.orders", "form": "files", "version": 7, "error": "it is lost", "hint": "move it away"}
    state.set(followers_fact("shop"), [{**follower, "clear_at": 0}])
    code, document, _ = run(capsys, config, "status")
    source = document["sources"][0]
    steps = {step["step"]: step for step in source["ladder"]}
    orders = next(t for t in source["tables"] if t["table"] == "public.orders")
    assert code == 0
    assert list(steps) == ["head", "received", "logged", "landed", "confirmed"]
    assert steps["landed"] == {"step": "landed", "lsn": "1/1100", "lag_bytes": 0, "lag_seconds": 0.0}
    assert steps["confirmed"]["lag_bytes"] == 0x1000
    assert source["slot"]["error"]
    assert (orders["rows"], orders["snapshot"]["kind"]) == (42, "resync")
    assert source["followers"] == [{**follower, "lag_seconds": None}]
    assert document["syncs"][0]["last_run"]["counts"] == {"written": 3}
    assert main(["--config", str(config.path), "status"]) == 0
    shown = capsys.readouterr().out
    assert "mend it: add a primary key" in shown
    assert "it is lost; mend it: move it away" in shown


def test_check_reports_everything_that_is_wrong_and_exits_3(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = run(capsys, config, "check")
    found = {(f["object"].partition(":")[0], f["name"]): f["severity"] for f in document["findings"]}
    assert code == 3
    assert document["ok"] is False
    assert found[("source.shop", "connection")] == "error"
    assert found[("lake", "store")] == "ok"
    assert found[("config", "one disk")] == "warning"
    assert "error" in {severity for (part, _), severity in found.items() if part == "target.crm"}
    assert list((config.state_dir.parent / "lake").rglob("check-*")) == [], "the probe object is gone"


def test_tables_are_named_in_three_ways_and_never_guessed() -> None:
    known = [("shop", ORDERS), ("shop", TableId("crm", "orders")), ("erp", TableId("crm", "people"))]
    assert resolve_tables(known, ["orders", "shop.crm.orders", "crm.people", "public.orders"]) == [*known]
    with pytest.raises(UsageError, match="no table people"):
        resolve_tables(known, ["people"])
    with pytest.raises(UsageError, match="names several tables") as caught:
        resolve_tables([("shop", ORDERS), ("erp", ORDERS)], ["orders"])
    assert caught.value.hint == "write shop.public.orders or erp.public.orders"


def test_an_order_stands_while_the_daemon_is_down(
    config: Config, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document, _ = run(capsys, config, "resync", "orders", 'shop.odd.a."b')
    assert code == 0
    assert [entry["served"] for entry in document["resyncs"]] == [False, False]
    assert [(r.verb, r.args) for r in state.open_requests()] == [
        ("resync", {"source": "shop", "table": "public.orders"}),
        ("resync", {"source": "shop", "table": 'odd.a."b'}),
    ]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ([], ("source", "shop")),
        (["public.orders"], ("table", "shop/public.orders")),
        (["crm"], ("sink", "crm")),
        (["sync:value"], ("sync", "value")),
    ],
)
def test_pause_finds_what_kind_of_thing_a_name_is(
    config: Config, state: State, capsys: pytest.CaptureFixture[str], name: list[str], target: tuple[str, str]
) -> None:
    heard: list[dict[str, Any]] = []

    def pause(args: dict[str, Any]) -> control.Answer:
        heard.append(args)
        return {}

    with Serving(state, {"pause": pause}):
        code, document, _ = run(capsys, config, "pause", *name)
    assert code == 0
    assert heard == [{"kind": target[0], "name": target[1]}]
    shown = target[1].replace("/", ".")
    assert document["targets"] == [{"kind": target[0], "name": shown, "served": True}]


def test_a_name_of_two_things_is_not_guessed(config: Config, state: State, capsys: pytest.CaptureFixture[str]) -> None:
    state.update_table("shop", TableId("public", "crm"), state="streaming")
    code, document, _ = run(capsys, config, "pause", "crm")
    assert code == 2
    assert document["error"]["hint"] == "write sink:crm or table:shop.public.crm"
    assert run(capsys, config, "pause", "table:shop.public.crm")[0] == 0


def test_wait_exits_4_when_the_time_is_over_and_1_without_a_daemon(
    config: Config, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["wait", "--table", "orders", "--lsn", "1/2000", "--timeout", "0.3"]
    code, document, _ = run(capsys, config, *words)
    assert (code, document["error"]["kind"]) == (1, "NotRunning")
    with Serving(state, {"wait": lambda args: lambda: None}):
        code, document, _ = run(capsys, config, *words)
    assert (code, document["error"]["kind"]) == (4, "TimedOut")
    heard: list[dict[str, Any]] = []

    def reached(args: dict[str, Any]) -> control.Answer:
        heard.append(args)
        return {"merged": 1}

    with Serving(state, {"wait": reached}):
        code, document, _ = run(capsys, config, *words)
    assert (code, document) == (0, {"reached": {"shop": {"merged": 1, "lsn": "1/2000"}}, "stopped": []})
    assert heard == [{"source": "shop", "lsn": 0x1_0000_2000, "tables": ["public.orders"]}]


def test_landing_on_order_exits_by_what_became_of_it(
    config: Config, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(args: dict[str, Any]) -> control.Answer:
        raise SourceRefused("the slot is gone", hint="see status")

    words = ["lake", "land", "now", "--timeout", "0.3"]
    code, document, _ = run(capsys, config, *words)
    assert (code, document["error"]["kind"]) == (1, "NotRunning")
    answers: list[tuple[int, str | None, control.Handler]] = [
        (0, "1/2000", lambda args: {"landed_lsn": 0x1_0000_2000}),
        (4, None, lambda args: lambda: None),
        (1, None, refuse),
    ]
    for wanted, lsn, handler in answers:
        with Serving(state, {"land": handler}):
            code, document, _ = run(capsys, config, *words)
        (told,) = document["sources"]
        assert (code, told["source"], told["landed_lsn"], not told["error"]) == (wanted, "shop", lsn, wanted == 0)


def test_wait_does_not_claim_what_a_stopped_table_lacks(
    config: Config, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    with Serving(state, {"wait": lambda args: {"merged": 1}}):
        code, document, _ = run(capsys, config, "wait", "--lsn", "1/2000", "--timeout", "5")
    assert code == 3
    assert document["stopped"] == [{"source": "shop", "table": 'odd.a."b', "reason": "no key"}]


def test_sync_apply_exits_by_what_became_of_the_rows(
    config: Config, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(args: dict[str, Any]) -> control.Answer:
        raise SourceRefused("the target has no such table", hint="create it")

    def answer(outcome: str, cause: str = "ordered", **counts: int) -> control.Handler:
        run = SyncRun(sync="value", cause=cause, outcome=outcome, counts=counts)
        return lambda args: run.to_json()

    answers: list[tuple[int, str, control.Handler]] = [
        (0, "apply", answer("done", written=2, held=0, rejected=0)),
        (3, "apply", answer("partial", written=2, held=1, rejected=0)),
        (3, "retry", answer("partial", written=2, held=0, rejected=1)),
        (3, "apply", answer("held", deletes=20_000)),
        (2, "resync", answer("unconfirmed", "resync", deletes=1)),
        (3, "approve", answer("unconfirmed", "approve")),
        (0, "reconcile", answer("reported", "reconcile")),
        (1, "apply", answer("failed")),
        (1, "apply", refuse),
    ]
    for code, verb, handler in answers:
        more = ["0123456789abcdef"] if verb == "approve" else []
        with Serving(state, {"sync_order": handler}):
            assert run(capsys, config, "sync", verb, "value", *more, "--timeout", "5")[0] == code, verb
    with Serving(state, {"sync_forget": lambda args: {"forgotten": 7}}):
        assert run(capsys, config, "sync", "reset-state", "value")[:2] == (0, {"sync": "value", "forgotten": 7})


def test_resync_wait_follows_the_run_to_its_end(
    config: Config, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until the wait at its end, which needs the source: the run itself is followed, and its failure told."""
    run_id = state.create_run("shop", ORDERS, "resync", state="running").id

    def fail(args: dict[str, Any]) -> control.Answer:
        state.update_run(run_id, state="failed", reason="relation is gone")
        return {"run": run_id}

    with Serving(state, {"resync": fail}):
        code, document, err = run(capsys, config, "resync", "orders", "--wait", "--timeout", "20")
    assert code == 1
    assert "relation is gone" in err
    assert document["resyncs"][0]["run"] == run_id


def test_sync_history_and_an_empty_log_and_lake(
    config: Config, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document, _ = run(capsys, config, "sync", "history", "value")
    assert (code, document["runs"][0]["outcome"]) == (0, "done")
    assert run(capsys, config, "log", "ls")[:2] == (0, {"records": []})
    assert run(capsys, config, "log", "tail", "--timeout", "0.1")[:2] == (0, {"records": []})
    assert run(capsys, config, "lake", "ls")[:2] == (0, {"lake": config.lake.url, "tables": []})


def one_row(config: Config) -> None:
    """A lake with one table of one row."""
    lake = SmallLake(config.path.parent / "lake")
    lake.append_changelog("shop", "orders", pa.table({"_op": ["c"], "id": [1]}))
    lake.write_current("shop", "orders", pa.table({"id": [1]}))


@pytest.mark.parametrize("fault", ["broken", "newer", "closed"])
def test_the_lake_is_read_without_a_state_that_cannot_be(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    one_row(config)
    with closing(open_state(config.state_dir)) as opened:
        if fault == "newer":
            opened._connection.execute("pragma user_version=99")
    if fault == "broken":
        config.state_path.write_bytes(b"no database" * 1000)
    if fault == "closed":
        stat = Path.stat

        def refused(path: Path, **options: Any) -> os.stat_result:
            if path == config.state_path:
                raise PermissionError(errno.EACCES, "Permission denied")
            return stat(path, **options)

        monkeypatch.setattr(Path, "stat", refused)
    code, document, told = run(capsys, config, "query", "select id from shop.orders")
    assert (code, document.get("rows")) == (0, [[1]]), document
    assert "without the daemon's state" in told
    code, document, told = run(capsys, config, "lake", "sql", "orders")
    assert (code, "without the daemon's state" in told) == (0, True)


def test_merged_tables_are_read_at_the_recorded_cut(
    config: Config, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    one_row(config)
    state.save_cut("shop", 7, {ORDERS: 1})
    SmallLake(config.path.parent / "lake").write_current("shop", "orders", pa.table({"id": [2]}))
    sql = "select max(id), count(*) from shop.orders"
    assert run(capsys, config, "query", "--merged", sql)[1]["rows"] == [[1, 1]]


def test_a_verb_that_is_ended_cleans_up(config: Config, tmp_path: Path) -> None:
    """Copies of rows in a temporary folder go when a terminal is closed, too."""
    one_row(config)
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(Path(__file__).parents[2])}
    (tmp_path / "tmp").mkdir()
    sql = "select count(*) from shop.orders, range(100000000000) a"
    words = [sys.executable, "-m", "cdc", "--config", str(config.path), "query", sql]
    with subprocess.Popen(words, env=environment, cwd=tmp_path, stderr=subprocess.PIPE) as child:
        try:
            wait_until(lambda: list((tmp_path / "tmp").glob("cdc-query-*")))
            child.send_signal(signal.SIGHUP)
            assert child.wait(20) == 128 + signal.SIGHUP
        finally:
            child.kill()
    assert list((tmp_path / "tmp").glob("cdc-query-*")) == []


def test_the_ladder_invents_nothing() -> None:
    assert [(s.lsn, s.lag_bytes, s.lag_seconds) for s in ladder(None, None, {}, 0.0)] == [(0, None, None)] * 5
    server = SourceStatus(head_lsn=1000, slot_exists=True, confirmed_lsn=400)
    logged = SourceState(
        name="s", positioned=True, lsn=700, end_lsn=800, head_lsn=900, received_lsn=900, committed_at=50_000_000
    )
    steps = {s.step: (s.lsn, s.lag_bytes, s.lag_seconds) for s in ladder(logged, server, {"landed_lsn": 500}, 60.0)}
    assert steps == {
        "head": (1000, 0, 0.0),
        "received": (900, 100, 10.0),
        "logged": (800, 200, 10.0),
        "landed": (500, 500, None),
        "confirmed": (400, 600, None),
    }
    caught_up = SourceState(name="s", positioned=True, lsn=700, end_lsn=1000, head_lsn=1000, committed_at=1)
    rest = [s.lag_seconds for s in ladder(caught_up, server, {"landed_lsn": 1000}, 60.0)]
    assert rest == [0.0, 0.0, 0.0, 0.0, None]


def test_a_quiet_source_does_not_look_late() -> None:
    """WAL of other databases moves the head; the newest commit of ours is an hour old, and nothing is lacking."""
    quiet = SourceState(
        name="s", positioned=True, lsn=700, end_lsn=900, head_lsn=900, received_lsn=900, committed_at=1_000_000
    )
    server = SourceStatus(head_lsn=950, slot_exists=True, confirmed_lsn=800)
    noted = {
        "landed_lsn": 900,
        "caught_up_at": {"received": 3598.0, "logged": 3598.0, "landed": 3598.0, "confirmed": 3597.0},
    }
    assert [s.lag_seconds for s in ladder(quiet, server, noted, 3600.0)] == [0.0, 2.0, 2.0, 2.0, 3.0]
    at_head = SourceStatus(head_lsn=900, slot_exists=True, confirmed_lsn=800)
    assert [s.lag_seconds for s in ladder(quiet, at_head, noted, 3600.0)] == [0.0] * 5, (
        "confirmed is past our last commit"
    )


@pytest.mark.parametrize(("lsn", "text"), [(0x16_B374_D848, "16/B374D848"), (1, "0/1"), (0, ""), (None, "")])
def test_positions_are_written_as_postgres_does(lsn: int | None, text: str) -> None:
    assert lsn_text(lsn) == text
    if text:
        assert parse_lsn(text) == lsn


def test_units_are_written_for_people() -> None:
    assert [bytes_text(n) for n in (0, 1023, 1536, 5 << 30, None)] == ["0 B", "1023 B", "1.5 kB", "5.0 GB", "-"]
    assert [seconds_text(s) for s in (0.25, 119, 300, 7260, None)] == ["0.2 s", "119.0 s", "5 min", "2 h 01 min", "-"]


def test_a_table_of_text_is_aligned_and_numbers_stand_right(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table(("name", "rows"), [("orders", 5), ("x", 12345)])
    assert capsys.readouterr().out == "name     rows\norders      5\nx       12345\n"
