"""A lake with orders, a daemon's state, and a Postgres that scores are pushed into: what tests of syncs share."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa

from cdc.config_serving import ModelConfig, SyncConfig, TargetConfig
from cdc.due import ChangedByOthers
from cdc.lake.ledger import LakeLedger
from cdc.planning import assignment_of
from cdc.state import State
from cdc.sync import SyncJob
from cdc.sync_run import Order, SyncRun
from cdc.table import TableId
from connectors.postgres.target import PostgresTarget
from tests.support.lakes import SmallLake, table_id

MODEL = ModelConfig(
    name="value", sql="select customer_id, sum(amount) as value from shop.orders group by 1", key=("customer_id",)
)
SYNC = SyncConfig(
    name="value", target="crm", table="public.scores", key=("customer_id",), model="value", debounce_s=0, batch_rows=2
)
ORDERS = table_id("orders")
ASSIGNMENT = assignment_of(SYNC, TargetConfig(name="crm", type="postgres"), ["customer_id", "value"])
TARGETS = {"crm": TargetConfig(name="crm", type="postgres", dsn="")}
SCORES = "CREATE TABLE public.scores (customer_id int PRIMARY KEY, value float8 CHECK (value < 1000))"


class Job:
    """A job of one sync."""

    def __init__(self, job: SyncJob) -> None:
        self.job = job

    def step(self, changed: ChangedByOthers, **options: Any) -> SyncRun | None:
        runs = self.job.step(changed, **options)
        assert len(runs) <= 1
        return runs[0] if runs else None

    def order(self, changed: ChangedByOthers, kind: str = "apply", **options: Any) -> SyncRun:
        return self.job.obey(Order(sync="value", kind=kind, **options), changed)


class Shop:
    """A lake with orders, the daemon's state, and a target with scores."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self.folder, self.dsn = folder, dsn
        self.lake = SmallLake(folder / "lake")
        self.state = State(folder / "state.db")
        self.target = self.target_at(dsn)
        self.lsn = 100
        self.changed: dict[tuple[str, TableId], int] = {}
        self.alerts: list[dict[str, Any]] = []

    def orders(self, *orders: tuple[int | None, float], by_others: bool = True) -> None:
        """The orders as they are from now on, merged and cut."""
        customers, amounts = [o[0] for o in orders], [o[1] for o in orders]
        rows = pa.table({"customer_id": pa.array(customers, pa.int64()), "amount": pa.array(amounts, pa.float64())})
        version = self.lake.write_current("shop", "orders", rows)
        self.lsn += 10
        self.state.update_table("shop", ORDERS, state="streaming")
        self.state.save_cut("shop", self.lsn, {ORDERS: version})
        if by_others:
            self.changed["shop", ORDERS] = self.lsn

    def target_at(self, dsn: str) -> PostgresTarget:
        config = TargetConfig(name="crm", type="postgres", dsn=dsn, origin="cdc_crm")
        return PostgresTarget(config, partial(LakeLedger, self.lake.store))

    def job(self, *syncs: SyncConfig, model: ModelConfig = MODEL, **options: Any) -> Job:
        options = {"alert": self.alerts.append, **options}
        return Job(
            SyncJob(
                syncs or [SYNC], {model.name: model}, TARGETS, self.target, self.state, self.lake.store,
                self.folder / "work", **options,
            )
        )  # fmt: skip

    def close(self) -> None:
        self.target.close()
        self.state.close()


def scores(db: psycopg.Connection) -> dict[int, float]:
    return dict(db.execute("SELECT customer_id, value FROM public.scores").fetchall())


def ran(job: Job, shop: Shop) -> SyncRun:
    """The run that was due."""
    run = job.step(shop.changed)
    assert run is not None
    return run


def told(shop: Shop) -> list[str]:
    """Conditions that were told, in order."""
    return [a["condition"] for a in shop.alerts]


def rows(numbers: range, value: float = 1.0) -> list[tuple[int, float]]:
    """Orders of these customers, all of one amount."""
    return [(i, value) for i in numbers]
