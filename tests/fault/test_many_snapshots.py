"""Ten tables are snapshotted while pgbench writes, and the daemon is killed ten times: each goes on where it was."""

from __future__ import annotations

import random
import subprocess
from collections import Counter
from pathlib import Path
from subprocess import DEVNULL

import pytest

from cdc.state import open_state
from tests.support.daemon import Daemon, execute
from tests.support.postgres import private_server
from tests.support.waiting import wait_until
from tests.support.witness import Witness, assert_exactly_once, changelog

TABLES = [f"public.t{i}" for i in range(6)] + [f"public.pgbench_{n}" for n in ("accounts", "branches", "tellers")]
ROWS = 60_000


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_tables_ten_kills_and_none_is_read_twice_from_the_start(tmp_path: Path, rng: random.Random) -> None:
    with private_server(tmp_path / "postgres") as server:
        dsn = server.dsn()
        subprocess.run([server.binary("pgbench"), "-i", "-s", "2", "-q", dsn], check=True, capture_output=True)
        execute(
            dsn,
            "alter table pgbench_history replica identity full",
            *(
                f"create table t{i} (id int primary key, n int, pad text);"
                f" insert into t{i} select g, 0, repeat('x', 300) from generate_series(1, {ROWS}) g"
                for i in range(6)
            ),
        )
        script = tmp_path / "moves.sql"
        script.write_text(
            "\\set t random(0, 5)\n\\set i random(1, 60000)\n\\set j random(1, 1000000000)\n"
            + "\n".join(
                f"update t{i} set n = n + 1 where id = :i;\n"
                f"update t{i} set id = :j + 60000 where id = :i + {i} and not exists"
                f" (select from t{i} where id = :j + 60000);"
                for i in range(6)
            )
            + "\n"
        )
        options = {"readers": 3, "chunk_rows": 3000}
        with Daemon(tmp_path / "daemon", dsn, source=options) as daemon:
            assert daemon.ask("setup").code == 0
            witness = Witness(dsn, f"witness_{daemon.slot}")
            command = [server.binary("pgbench"), "-n", "-c", "2", "-R", "30", "-T", "900"]
            loads = [
                subprocess.Popen(
                    [*command, *more, dsn], stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL
                )
                for more in ([], ["-f", str(script)])
            ]  # fmt: skip
            try:
                points = ("backfill.after_snapshot", "backfill.after_chunk", "log.after_fsync", "log.after_index")
                for _ in range(10):
                    point = rng.choice(points)
                    daemon.start(failpoints=f"{point}=kill:{rng.randrange(2, 8)}")
                    wait_until(lambda: not daemon.alive, 180, lambda: f"to die\n{daemon.log_tail()}")
                daemon.start().settled(300)
                assert all(load.poll() is None for load in loads), "pgbench has ended"
            finally:
                for load in loads:
                    load.terminate()
                    load.wait(30)
            daemon.settled(300).verified(timeout_s=300)
            assert assert_exactly_once(witness, daemon.lake, TABLES) > 100
            state = open_state(daemon.state_dir, readonly=True)
            runs = Counter(str(r.table) for r in state.runs("shop") if r.kind == "first")
            state.close()
            assert {t: runs[t] for t in TABLES} == dict.fromkeys(TABLES, 1)
            for table in TABLES[:6]:
                rows = changelog(daemon.lake, table, columns=("_op", "_run", "_epoch", "_lsn", "_seq")).to_pylist()
                assert sum(r["_op"] == "r" for r in rows) < ROWS * 1.05, table
