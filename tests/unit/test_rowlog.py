"""What became of each row of a run: kept beside the process, then in the lake, and for so long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cdc import rowlog
from cdc.ports import ObjectStore
from cdc.sink import ACKS, Assignment, Batch, PushResult, Rejected
from connectors.local.store import LocalStore

ASSIGNMENT = Assignment(sync="s", table="t", key=("id",), mode="upsert", columns=("id",))


def batch(*keys: str, action: str = "insert", label: str = "", differs: Any = None) -> Batch:
    acks = pa.table({"key": list(keys), "digest": ["d"] * len(keys), "version": [0] * len(keys)}, schema=ACKS)
    return Batch(
        assignment=ASSIGNMENT, action=action, rows=pa.table({"id": list(keys)}), acks=acks, label=label, differs=differs
    )


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    (tmp_path / "lake").mkdir()
    return LocalStore(tmp_path / "lake")


def test_every_row_has_its_outcome_and_the_run_says_whence_it_came(tmp_path: Path, store: ObjectStore) -> None:
    run = rowlog.new_run_id(1_800_000_000.25)
    assert run == "20270115T080000250000Z"
    log = rowlog.RowLog(tmp_path / "rows", run, {"plan": "p", "inputs": {"shop": {"lsn": 7}}})
    differs = pa.array([["v"], [], ["v", "w"], []], pa.list_(pa.string()))
    sent = batch("a", "b", "c", "d", action="update", label="resend", differs=differs)
    log.note(
        sent,
        PushResult(rows=4, rejected=[Rejected("b", "CheckViolation")], absent=["c"], unsent=["d"]),
    )
    log.note(batch("e"), PushResult(rows=1))
    log.close()
    rowlog.upload(store, "s", tmp_path / "rows")
    assert list((tmp_path / "rows").iterdir()) == []
    found = rowlog.read(store, "s", run)
    assert found is not None
    about, table = found
    assert about == {"run": run, "plan": "p", "inputs": {"shop": {"lsn": 7}}}
    assert [tuple(r.values()) for r in table.to_pylist()] == [
        ("a", "resend", ["v"], "written", None),
        ("b", "resend", [], "rejected", "CheckViolation"),
        ("c", "resend", ["v", "w"], "absent", None),
        ("d", "resend", [], "unsent", None),
        ("e", "insert", None, "written", None),
    ]
    assert rowlog.rejected_keys(store, "s", run).to_pylist() == ["b"]
    assert rowlog.read(store, "s", "another") is None
    assert rowlog.rejected_keys(store, "s", "another").to_pylist() == []


def test_what_a_killed_run_had_noted_reaches_the_lake_with_the_next_start(tmp_path: Path, store: ObjectStore) -> None:
    code = (
        "import sys, os, signal, pathlib\n"
        "from tests.unit.test_rowlog import *\n"
        "log = rowlog.RowLog(pathlib.Path(sys.argv[1]), 'run1', {'plan': 'p'})\n"
        "log.note(batch('a', 'b'), PushResult(rows=2))\n"
        "log._file.write(b'half a batch'); log._file.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    died = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "rows")], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL
    (tmp_path / "rows" / "run2.arrows").write_bytes(b"")
    rowlog.upload(store, "s", tmp_path / "rows")
    found = rowlog.read(store, "s", "run1")
    assert found is not None
    assert found[1].column("key").to_pylist() == ["a", "b"]
    assert rowlog.read(store, "s", "run2") is None, "a run that sent nothing has no rows"
    assert list((tmp_path / "rows").iterdir()) == []


def test_a_store_that_is_away_costs_nothing_but_time(tmp_path: Path, store: ObjectStore) -> None:
    log = rowlog.RowLog(tmp_path / "rows", "run1", {})
    log.note(batch("a"), PushResult(rows=1))
    log.close()
    (tmp_path / "lake").rmdir()
    (tmp_path / "lake").write_text("no directory")
    rowlog.upload(store, "s", tmp_path / "rows")
    assert [f.name for f in (tmp_path / "rows").iterdir()] == ["run1.arrows"]
    (tmp_path / "lake").unlink()
    (tmp_path / "lake").mkdir()
    rowlog.upload(store, "s", tmp_path / "rows")
    assert rowlog.read(store, "s", "run1") is not None


def test_logs_that_are_too_old_leave_the_lake(tmp_path: Path, store: ObjectStore) -> None:
    days = [rowlog.new_run_id(1_800_000_000 + day * 86_400) for day in range(5)]
    for run in days:
        log = rowlog.RowLog(tmp_path / "rows", run, {})
        log.note(batch("a"), PushResult(rows=1))
        log.close()
    rowlog.upload(store, "s", tmp_path / "rows")
    rowlog.tidy(store, "s", 1_800_000_000 + 2.5 * 86_400)
    assert [rowlog.read(store, "s", run) is not None for run in days] == [False, False, False, True, True]
