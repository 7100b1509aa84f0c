"""Several readers on several tables and on ranges of one: what they say together is what one reader would say.

Rows move under them: an update takes a row from a block that nobody has read into one that somebody has, a change of
key from a range into another. Nothing here depends on who is faster; the oracle is `verify`.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from cdc.runs import Run
from cdc.state import open_state
from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until
from tests.support.witness import changelog

ROWS = 130_000
TABLES = ("public.plain", "public.aside", "public.pair")


def populate(dsn: str) -> None:
    """Tables of several ranges each; in the first half of `plain` every second row's place is free, so updates of the
    second half move rows there."""
    pad = "repeat('x', 90)"
    execute(
        dsn,
        "create table plain (id int primary key, n int, pad text)",
        f"insert into plain select g, 0, {pad} from generate_series(1, {ROWS}) g",
        f"delete from plain where id < {ROWS // 2} and id % 2 = 0",
        "vacuum plain",
        "create table aside (id int primary key, n int, pad text, big text)",
        "alter table aside alter big set storage external",
        f"insert into aside select g, 0, {pad}, case when g % 50 = 0 then repeat(md5(g::text), 80) end"
        f" from generate_series(1, {ROWS}) g",
        "create table pair (a numeric, b text, n int, pad text, big text, primary key (a, b))",
        "alter table pair alter big set storage external",
        f"insert into pair select (g * 7919) % 1000, 'b' || g, 0, {pad}, case when g % 90 = 0 then"
        f" repeat(md5(g::text), 80) end from generate_series(1, {ROWS}) g",
    )


class Mover:
    """Writes as fast as it can while the block runs: rows change their place, their key, and come and go."""

    def __init__(self, dsn: str, seed: int) -> None:
        self._dsn = dsn
        self._rng = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.error: BaseException | None = None

    def __enter__(self) -> Mover:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert self.error is None, self.error

    def _run(self) -> None:
        rng = self._rng
        fresh = ROWS * 2
        try:
            with psycopg.connect(self._dsn, autocommit=True) as connection:
                while not self._stop.is_set():
                    fresh += 1
                    i, j = rng.randrange(1, ROWS), rng.randrange(ROWS // 2, ROWS)
                    for statement in (
                        f"update plain set n = n + 1 where id between {j} and {j + 20}",
                        f"update plain set id = {fresh} where id = {i}",
                        f"delete from plain where id = {rng.randrange(1, ROWS)}",
                        f"update aside set n = n + 1 where id between {i} and {i + 60}",
                        f"update aside set id = {fresh} where id = {i // 50 * 50}",
                        f"update pair set n = n + 1 where a = {i % 1000} and big is not null",
                        f"update pair set a = {rng.randrange(1000)} where b = 'b{i // 90 * 90}'",
                        f"insert into pair values ({rng.randrange(1000)}, 'new{fresh}', 1)",
                    ):
                        connection.execute(statement.encode())
        except BaseException as e:  # noqa: BLE001 - told to the test
            self.error = e


def whole_runs(daemon: Daemon) -> list[Run]:
    state = open_state(daemon.state_dir, readonly=True)
    try:
        return [run for run in state.runs("shop") if run.kind in ("first", "resync")]
    finally:
        state.close()


@pytest.mark.slow
def test_ranges_read_side_by_side_under_load_come_to_what_the_source_has(
    tmp_path: Path, database: str, rng: random.Random
) -> None:
    populate(database)
    with Daemon(tmp_path, database, source={"readers": 3, "chunk_rows": 6000}) as daemon:
        assert daemon.ask("setup").code == 0
        with Mover(database, rng.randrange(1 << 30)):
            for _ in range(2):
                # Chunks of several ranges have ended out of order when it dies.
                daemon.start(failpoints="backfill.after_chunk=kill:6").ended()
            daemon.start().settled()
            assert daemon.ask("resync", "plain", "aside", "pair").code == 0
            wait_until(
                lambda: sum(r.state == "running" for r in whole_runs(daemon)) >= 2, 60, "several to be read at once"
            )
            daemon.settled()
        daemon.settled().verified()
        runs = whole_runs(daemon)
        assert Counter((str(r.table), r.details["strategy"]) for r in runs) == {
            ("public.plain", "blocks"): 2, ("public.aside", "keys"): 2, ("public.pair", "keys"): 2
        }  # fmt: skip
        assert all(len(r.details["ranges"]) >= 2 for r in runs)
        for table in TABLES:
            rows = changelog(daemon.lake, table, columns=("_op", "_run", "_raw", "_epoch", "_lsn", "_seq")).to_pylist()
            read = Counter(r["_run"] for r in rows if r["_op"] == "r")
            # A row that moved is met twice or not at all; of ranges that were read again there would be thousands.
            assert all(read[r.id] < ROWS * 1.03 for r in runs), f"{table}: {read}"


def test_snapshots_rest_while_the_source_is_busy_and_keep_to_their_rate(tmp_path: Path, database: str) -> None:
    execute(
        database,
        "create table t (id int primary key, n int)",
        "insert into t select g, g from generate_series(1, 3000) g",
    )
    limits = {"snapshot_pause_active": 1, "snapshot_rows_per_s": 1000}

    def reason() -> str:
        table = daemon.tables().get("public.t")
        return str(table["snapshot"]["reason"]) if table and table["snapshot"] else ""

    with Daemon(tmp_path, database, source=limits) as daemon:
        busy = [psycopg.connect(database, autocommit=True) for _ in range(2)]
        threads = [threading.Thread(target=_sleep, args=(c,), daemon=True) for c in busy]
        for thread in threads:
            thread.start()
        daemon.start().streaming()
        wait_until(lambda: "clients are active (more than 1)" in reason(), 60, lambda: f"a pause: {reason()}")
        for connection in busy:
            connection.cancel()
        for thread in threads:
            thread.join(60)
        wait_until(lambda: "rate limit" in reason(), 60, "the rate to be kept")
        daemon.settled().verified()
        (run,) = whole_runs(daemon)
        # The last of three chunks is not waited for.
        assert run.ended_at - run.started_at >= 1.9e6, "3000 rows at 1000 rows a second"
        for connection in busy:
            connection.close()


def _sleep(connection: psycopg.Connection) -> None:
    with suppress(psycopg.errors.QueryCanceled):
        connection.execute("select pg_sleep(120)")
