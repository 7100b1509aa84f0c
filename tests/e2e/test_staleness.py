"""`current` may be stale where the operator says so: it is told, it ends in time, and nobody who waits has to."""

from __future__ import annotations

from pathlib import Path

import pytest
from deltalake import DeltaTable

from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until


def value(daemon: Daemon, table: str) -> int:
    """What readers of `current` see in the row that the story changes."""
    rows = DeltaTable(str(daemon.lake / "shop" / f"public.{table}" / "current")).to_pyarrow_table(
        filters=[("id", "=", 1)]
    )
    return int(rows.column("n")[0].as_py())


@pytest.mark.slow
def test_a_big_table_waits_for_more_changes_or_its_time_and_for_nobody_who_asks(tmp_path: Path, database: str) -> None:
    execute(
        database,
        *(f"create table {table} (id int primary key, n int)" for table in ("big", "small")),
        "insert into big select g, 0 from generate_series(1, 2000) g",
        "insert into small select g, 0 from generate_series(1, 3) g",
    )
    with Daemon(tmp_path, database, lake={"current.max_staleness_s": 1800}) as daemon:
        daemon.start().settled()
        execute(database, "update big set n = 1 where id = 1", "update small set n = 1 where id = 1")

        def put_off() -> bool:
            lags = {name: t["lag_seconds"] for name, t in daemon.tables().items()}
            return lags["public.small"]["merged"] == 0 == lags["public.big"]["landed"] < lags["public.big"]["merged"]

        wait_until(lambda: value(daemon, "small") == 1 and put_off(), message=daemon.log_tail)
        assert value(daemon, "big") == 0
        assert 'cdc_unmerged_rows{source="shop",table="public.big"} 1.0' in daemon.http("/metrics")[1]
        daemon.ask("wait")
        assert value(daemon, "big") == 1

        execute(database, "update big set n = 2 where id = 1")
        wait_until(put_off, message=daemon.log_tail)
        daemon.kill()
        assert daemon.tables()["public.big"]["lag_seconds"] == {"landed": None, "merged": None}
        daemon.start()
        wait_until(lambda: value(daemon, "big") == 2, message="what is landed and not known is merged")

        daemon.stop()
        daemon.configure("lake", **{"current.max_staleness_s": 1})
        daemon.start().settled()
        execute(database, "update big set n = 3 where id = 1")
        wait_until(lambda: value(daemon, "big") == 3, message=daemon.log_tail)
        daemon.verified()
