"""Changelogs as plain files, written by a real daemon that is killed, and that loses its disk.

The oracle is Postgres' own test_decoding: what the files hold is each change once. They are read as a user reads them,
by a glob in DuckDB.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import duckdb
import pytest

from tests.support.daemon import Daemon, execute
from tests.support.witness import Changes, Witness, changelog
from tests.support.workload import SCHEMA, TABLES, Workload

POINTS = ("files.before_cut", "files.after_cut", "files.between_objects", "files.before_checkpoint",
          "files.after_checkpoint")  # fmt: skip
FILES = """
[lake.files]
tables = ["shop.public.*"]
every_s = 0.3
format = "{form}"
object_bytes_target = "64kB"
"""


class Scene:
    """The workload's tables, their witness, and a daemon that follows all of them."""

    def __init__(self, directory: Path, dsn: str, form: str) -> None:
        execute(dsn, *SCHEMA.split(";\n"))
        self.form = form
        lake = {"compact_every_s": 0.3}
        self.daemon = Daemon(directory, dsn, source={"chunk_rows": 150}, lake=lake, more=FILES.format(form=form))
        assert self.daemon.ask("setup").code == 0
        self.witness = Witness(dsn, f"witness_{self.daemon.slot}")

    def kill_at(self, point: str, nth: int, *, disk_lost: bool) -> None:
        self.daemon.start(failpoints=f"{point}=kill:{nth}")
        self.daemon.died_at(point, disk_lost=disk_lost)

    def check(self) -> None:
        """After everything has landed and was followed: each change stands once in the files, and nothing else."""
        told = self.witness.changes()
        wanted = Counter({change: n for change, n in told.items() if change[0] in TABLES})
        found: Changes = Counter()
        for table in TABLES:
            rows = in_files(self.daemon.lake / "shop" / table / "files", self.form)
            positions = Counter(row[:3] for row in rows)
            assert max(positions.values()) == 1, table
            assert set(positions) == in_changelog(self.daemon.lake, table)
            found += Counter((table, op, xid) for *_, op, xid, run in rows if op in "cudt" and run is None)
        assert found == wanted
        assert wanted.total() > 50


def in_files(folder: Path, form: str) -> list[tuple[int, int, int, str, int, str | None]]:
    """Position, operation, transaction and run of every row."""
    columns = "_epoch, _lsn, _seq, _op, _xid, _run"
    if form == "parquet":
        read = f"read_parquet('{folder}/*/*.parquet', hive_partitioning = true, union_by_name = true)"
    else:
        kinds = "{_epoch: 'BIGINT', _lsn: 'BIGINT', _seq: 'BIGINT', _op: 'VARCHAR', _xid: 'BIGINT', _run: 'VARCHAR'}"
        read = f"read_json('{folder}/*/*.jsonl.zst', columns = {kinds}, hive_partitioning = true)"
    return duckdb.sql(f"select {columns} from {read}").fetchall()


def in_changelog(lake: Path, table: str) -> set[tuple[int, int, int]]:
    rows = changelog(lake, table, columns=("_epoch", "_lsn", "_seq"))
    return set(zip(*(rows.column(c).to_pylist() for c in ("_epoch", "_lsn", "_seq")), strict=True))


@pytest.mark.slow
def test_files_hold_each_change_once_whatever_dies(tmp_path: Path, database: str, rng: random.Random) -> None:
    scene = Scene(tmp_path, database, rng.choice(["jsonl", "parquet"]))
    with scene.daemon as daemon, Workload(database, rng.randrange(1 << 30)) as workload:
        scene.kill_at(rng.choice(POINTS), rng.randrange(1, 4), disk_lost=True)
        workload.stop()
        assert daemon.start(once=True).ended(120) == 0, daemon.log_tail()
        shown = daemon.ask("status").document["sources"][0]["followers"]
        assert {f["table"] for f in shown} >= set(TABLES)
        scene.check()


@pytest.mark.slow
@pytest.mark.parametrize("disk_lost", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_files_hold_each_change_once_after_kills_at_one_point(
    point: str, disk_lost: bool, tmp_path: Path, database: str, rng: random.Random
) -> None:
    scene = Scene(tmp_path, database, rng.choice(["jsonl", "parquet"]))
    with scene.daemon as daemon, Workload(database, rng.randrange(1 << 30)) as workload:
        for nth in (1, 2, 5):
            scene.kill_at(point, nth, disk_lost=disk_lost)
        workload.stop()
        assert daemon.start(once=True).ended(120) == 0, daemon.log_tail()
        scene.check()
