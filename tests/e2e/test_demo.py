"""`cdc demo` as a user runs it: it proves what it promises, and leaves nothing running, however it ends."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.buckets import CREDENTIALS, new_bucket, s3_endpoint
from tests.support.snippets import SNIPPETS, run_snippet
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
TABLES = {"customers", "products", "manuals", "orders", "order_items", "customer_scores"}
PR_SET_CHILD_SUBREAPER = 36
LENGTH_S = 200

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc"),
    pytest.mark.timeout(240),
]


@pytest.fixture
def orphans_come_to_us() -> Iterator[None]:
    """Whatever the demo leaves behind becomes our child, so that it cannot hide."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def descendants() -> set[int]:
    """Live processes below this one (a zombie is not alive)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(entry.parent.name))
    found: set[int] = set()
    pending = [os.getpid()]
    while pending:
        below = children.get(pending.pop(), [])
        found.update(below)
        pending += below
    return found


def describe(pids: set[int]) -> dict[int, str]:
    """Their command lines; some may have ended meanwhile."""
    told = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            told[pid] = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").replace("\0", " ")
    return told


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts demos in a folder; what a failed test leaves running is killed after it."""
    demos: list[subprocess.Popen[str]] = []

    def begin(directory: Path, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cdc", "--json", "demo", "--directory", str(directory), *options]
        demos.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return demos[-1]

    yield begin
    for demo in demos:
        demo.kill()
        demo.communicate()


@pytest.mark.slow
def test_the_demo_s_lake_may_stand_in_a_bucket_and_is_read_as_the_documentation_says(
    tmp_path: Path, start: Start
) -> None:
    endpoint, url = s3_endpoint(), f"s3://{new_bucket()}/demo"
    place = ("--lake", url, "--endpoint-url", endpoint)
    demo = start(tmp_path / "demo", "--duration", "4", *place)
    out, told = demo.communicate(timeout=LENGTH_S)
    assert demo.returncode == 0, told
    shown = json.loads(out)
    assert (shown["equal"], shown["lake"]) == (True, url)
    key, secret = CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
    read = run_snippet(SNIPPETS[3], LAKE=url, ENDPOINT=endpoint, KEY=key, SECRET=secret)["orders"]
    assert [[read.num_rows]] == query(shown["config"], "select count(*) from shop.orders")

    again = start(tmp_path / "again", *place)
    _, told = again.communicate(timeout=LENGTH_S)
    assert again.returncode == 2
    assert f"{url} is not empty" in told


def query(config: str, sql: str) -> list[list[Any]]:
    command = [sys.executable, "-m", "cdc", "--config", config, "--json", "query", sql]
    rows: list[list[Any]] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["rows"]
    return rows


def test_the_demo_ends_equal_and_its_lake_can_be_looked_into_afterwards(
    tmp_path: Path, orphans_come_to_us: None, start: Start
) -> None:
    before = descendants()
    demo = start(tmp_path / "demo", "--duration", "4")
    out, told = demo.communicate(timeout=LENGTH_S)
    left = describe(descendants() - before)
    assert (demo.returncode, left) == (0, {}), told

    shown = json.loads(out)
    assert shown["equal"] is True
    assert shown["scores"]["equal"] is True
    assert {table["table"]: table["equal"] for table in shown["tables"]} == {f"public.{name}": True for name in TABLES}
    assert {"orders", "orders deleted", "manuals revised", "keys changed", "rolled back"} <= set(shown["kinds"])

    # It was killed in the middle: two daemons wrote the log, and only one said good-bye.
    log = (tmp_path / "demo" / "daemon.log").read_text()
    assert len(set(re.findall(r"started pid=(\d+)", log))) == 2
    assert len(re.findall(r"cdc\.daemon +stopped", log)) == 1

    # The lake needs no server: it has what happened on the way.
    config = shown["config"]
    assert query(config, "select count(*) from shop.customer_scores") == [[shown["scores"]["rows"]]]
    [[old, new, unset]] = query(
        config,
        "select count(*) filter (channel = 'web'), count(*) filter (channel <> 'web'),"
        " count(*) filter (channel is null) from shop.orders",
    )
    assert (old > 30_000, new > 0, unset) == (True, True, 0), "the column's default holds for rows that it never met"
    runs = query(config, "select count(distinct _run) from shop.orders_changelog where _op = 'r'")
    assert runs == [[2]], "a first snapshot and a resync"
    moved = query(
        config,
        "select count(*) from shop.manuals_changelog where _before.sku <> sku and list_contains(_unchanged, 'body')",
    )
    assert moved > [[0]], "a key moved while its big text was not sent"
    origins = query(config, "select distinct _origin from shop.customer_scores_changelog where _op = 'c'")
    assert origins == [["cdc_shop"]], "our own writes are captured, and marked"

    for words in shown["commands"]:
        program, *rest = words
        run = subprocess.run([sys.executable, "-m", program, *rest], capture_output=True, text=True, check=False)
        assert (run.returncode, len(run.stdout.splitlines()) > 3) == (0, True), run.stderr


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="Ctrl-C"),
        pytest.param(signal.SIGKILL, -9, id="kill -9", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_demo_leaves_no_process(
    tmp_path: Path, orphans_come_to_us: None, start: Start, number: signal.Signals, code: int
) -> None:
    before = descendants()
    demo = start(tmp_path / "demo")
    assert demo.stderr is not None
    for line in demo.stderr:
        if "daemon started" in line:
            break
    running = describe(descendants() - before).values()
    assert sum(command.endswith(" run") for command in running) == 1, "the daemon"
    assert sum(command.startswith("postgres:") for command in running) > 3, "the server"

    demo.send_signal(number)
    _, told = demo.communicate(timeout=120)
    assert demo.returncode == code, told
    if number == signal.SIGKILL:  # nobody could clean up: the kernel tells the children
        wait_until(lambda: not descendants() - before, 60, lambda: describe(descendants() - before))
    assert describe(descendants() - before) == {}


@pytest.mark.slow
def test_the_demo_replaces_its_own_folder_and_nobody_elses(tmp_path: Path, start: Start) -> None:
    foreign = tmp_path / "precious"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    demo = start(foreign)
    out, told = demo.communicate(timeout=120)
    assert (demo.returncode, json.loads(out)["error"]["kind"]) == (2, "ConfigError"), told
    assert "--directory" in told
    assert (foreign / "thesis.tex").read_text() == "years of work"

    own = tmp_path / "own"
    for attempt in range(2):
        demo = start(own)
        assert demo.stderr is not None
        first = demo.stderr.readline()
        assert ("replaced" in first) == (attempt == 1), first
        rival = start(own)
        assert (rival.communicate(timeout=120)[1].count("another demo is running"), rival.returncode) == (1, 2)
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=120)
        assert demo.returncode == 130
        (own / "left_by_the_demo_before").touch()
    assert sorted(own.glob("left*")) == [own / "left_by_the_demo_before"], "the first one's was replaced"


def interpreter_for(user: str, environment: dict[str, str]) -> str | None:
    """A Python of our version that another user may run with what we have installed."""
    probe = (
        "import sys, pyarrow, psycopg, duckdb, deltalake; from importlib.metadata import entry_points;"
        f"ok = sys.version_info[:2] == {sys.version_info[:2]} and entry_points(group='cdc.demos', name='postgres');"
        "list(ok)[0].load(); import cdc.demo"
    )
    for candidate in (sys.executable, f"/usr/bin/python3.{sys.version_info[1]}", "/usr/bin/python3"):
        try:
            run = subprocess.run(
                [candidate, "-c", probe], env=environment, cwd="/", user=user, capture_output=True, check=False
            )
        except OSError:
            continue
        if run.returncode == 0:
            return candidate
    return None


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests ran as a normal user already")
def test_the_demo_works_for_a_normal_user_too(orphans_come_to_us: None) -> None:
    user = pwd.getpwnam("nobody")
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{ROOT}:{sysconfig.get_path('purelib')}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/nonexistent",
    }
    python = interpreter_for("nobody", environment)
    if python is None:
        pytest.skip("nobody can run this Python, or read the project")
    home = Path(tempfile.mkdtemp(prefix="cdc-demo-nobody-"))
    try:
        os.chown(home, user.pw_uid, user.pw_gid)
        before = descendants()
        demo = subprocess.Popen(
            [python, "-m", "cdc", "--json", "demo", "--duration", "1"],
            user="nobody",
            group=user.pw_gid,
            extra_groups=[],
            env=environment,
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        out, told = demo.communicate(timeout=LENGTH_S)
        assert (demo.returncode, describe(descendants() - before)) == (0, {}), told
        assert json.loads(out)["directory"] == str(home / "cdc-demo")
        assert {path.owner() for path in home.rglob("*")} == {"nobody"}
    finally:
        shutil.rmtree(home)
