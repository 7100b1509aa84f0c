"""The last transaction before a kill moves keys: each row then stands once, under its new key, with all it had."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until
from tests.support.witness import changelog

POINTS = [
    "capture.before_append",
    "log.before_index",
    "capture.after_append",
    "land.before_commit",
    "land.after_commit",
    "confirm.after_anchor",
    "merge.before_commit",
    "merge.after_commit",
]


@pytest.mark.slow
def test_a_key_change_in_the_last_transaction_before_a_kill_is_applied_once(tmp_path: Path, database: str) -> None:
    execute(
        database,
        "create table orders (id int primary key, n int, big text)",
        "alter table orders alter big set storage external",
        "insert into orders select g, g, repeat(md5(g::text), 200) from generate_series(1, 40) g",
    )
    with Daemon(tmp_path, database, source={"confirm_every_s": 0.2}) as daemon:
        daemon.start().settled()
        for moved, point in enumerate(POINTS, 1):
            assert daemon.stop() == 0
            # Keys move in a circle in one transaction, and one row leaves for a key that nobody had.
            execute(
                database,
                f"update orders set id = -id where id in ({moved}, {moved + 10}); "
                f"update orders set id = case id when -{moved} then {moved + 10} else {moved} end where id < 0; "
                f"update orders set id = {1000 + moved} where id = {moved + 20}",
            )
            daemon.start(failpoints=f"{point}=kill:1")
            wait_until(lambda: not daemon.alive, message=lambda point=point: f"to die at {point}\n{daemon.log_tail()}")
            assert daemon.ended() == -signal.SIGKILL
            daemon.start().settled().verified()
        rows = changelog(daemon.lake, "public.orders", columns=("_op", "_epoch", "_lsn", "_seq"))
        assert rows.column("_op").to_pylist().count("u") == 5 * len(POINTS), "each of them once"
        count = daemon.ask("query", "select count(*), count(distinct n), min(length(big)) from shop.orders")
        assert count.document["rows"] == [[40, 40, 6400]]
