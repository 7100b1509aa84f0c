"""A source that is compared periodically: the daemon, its commands, and every kind of change between two runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.daemon import Daemon, execute

NEVER = "300d"
"""Schedules of tests: runs come when they are asked for."""


def periodic(folder: Path, dsn: str, source: Mapping[str, Any] | None = None, **more: Any) -> Daemon:
    keys = {"mode": "snapshot", "every": NEVER, "tables": ["public.*"], "slot": None, "publication": None}
    return Daemon(folder, dsn, source={**keys, **(source or {})}, **more)


def test_first(tmp_path: Path, database: str) -> None:
    execute(
        database,
        "create table orders (id int primary key, note text, total numeric)",
        "insert into orders select g, 'note ' || g, g from generate_series(1, 100) g",
        "create table events (what text, at timestamptz)",
        "insert into events values ('a', 'infinity'), ('a', 'infinity'), ('b', null)",
    )
    with periodic(tmp_path, database) as daemon:
        daemon.start().settled().verified()
        execute(
            database,
            "insert into orders values (101, 'new', 'NaN')",
            "update orders set note = 'changed' where id = 1",
            "update orders set id = 1000 where id = 2",
            "delete from orders where id = 3",
            "delete from events where ctid = '(0,1)'",
            "insert into events values ('b', null)",
        )
        daemon.settled().verified()
        assert daemon.stop() == 0
