"""What the live view shows, gathered twice a second: status, metrics, rows on both sides, and rates from differences.

It only looks, in a thread of its own, and nothing that it cannot get stops the demo: a fact that is not known stays
as it was, or is empty.
"""

from __future__ import annotations

import logging
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdc import status
from cdc.config import Config
from cdc.config_file import load as load_config
from cdc.demo.shop import Shop, Traffic
from cdc.errors import CdcError
from cdc.lake.delta import DeltaLog
from cdc.lake.layout import current_path
from cdc.lake.routing import open_lake
from cdc.state import State
from cdc.table import TableId

_log = logging.getLogger(__name__)

EVERY_S = 0.5
METRICS_TIMEOUT_S = 0.5
RATES = {
    "captured": "cdc_changes_total",
    "landed": "cdc_landed_rows_total",
    "merged": "cdc_merged_rows_total",
}
"""Rates shown, and the counters that they are differences of."""


@dataclass(frozen=True)
class Facts:
    """One look."""

    document: Mapping[str, Any] = field(default_factory=dict)
    """As `cdc status --json`."""
    shop_rows: Mapping[str, int] = field(default_factory=dict)
    lake_rows: Mapping[str, int] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    """Per second: transactions of the traffic, and RATES."""
    transactions: int = 0

    @property
    def source(self) -> Mapping[str, Any]:
        """The one source's part of the status; empty if it is not known yet."""
        sources = self.document.get("sources") or [{}]
        return sources[0]

    @property
    def serving_pid(self) -> int:
        """Process id of the daemon that runs; 0 if none does."""
        daemon = self.document.get("daemon") or {}
        return int(daemon["pid"]) if daemon.get("running") else 0

    @property
    def tables(self) -> list[dict[str, Any]]:
        """Its tables."""
        return list(self.source.get("tables") or [])


class Watch(threading.Thread):
    """`facts` is the newest look; `traffic` may be set at any time."""

    def __init__(self, config: Path, shop: Shop) -> None:
        super().__init__(name="demo-watch", daemon=True)
        self._config: Config = load_config(config)
        self._store = open_lake(self._config)
        self._shop = shop
        self._ending = threading.Event()
        self._state: State | None = None
        self._lakes: dict[str, DeltaLog] = {}
        self._counters: dict[str, float] = {}
        self._looked_at = 0.0
        self.traffic: Traffic | None = None
        self.facts = Facts()

    def end(self) -> None:
        """Let it end; bounded, idempotent."""
        self._ending.set()
        if self.is_alive():
            self.join(5.0)

    def run(self) -> None:
        while not self._ending.is_set():
            try:
                self.facts = self._look()
            except (CdcError, OSError) as error:
                _log.debug("no new facts", extra={"reason": str(error)})
            self._ending.wait(EVERY_S)
        if self._state is not None:
            self._state.close()

    def _look(self) -> Facts:
        if self._state is None and self._config.state_path.is_file():
            self._state = State(self._config.state_path, create=False, readonly=True)
        traffic = self.traffic
        transactions = traffic.done().transactions if traffic is not None else 0
        return Facts(
            document=status.gather(self._config, self._state, status.ask_sources(self._config)),
            shop_rows=self._shop.row_counts(),
            lake_rows=self._lake_rows(),
            rates=self._rates({"transactions": transactions, **self._metrics()}),
            transactions=transactions,
        )

    def _rates(self, counters: dict[str, float]) -> dict[str, float]:
        """Differences to the last look, smoothed. A counter that went back belongs to a new process."""
        now = time.monotonic()
        elapsed, self._looked_at = now - self._looked_at, now
        before, self._counters = self._counters, counters
        rates = {}
        for name, value in counters.items():
            if name in before and value >= before[name] and elapsed > 0:
                rate = (value - before[name]) / elapsed
                rates[name] = 0.5 * rate + 0.5 * self.facts.rates.get(name, rate)
        return rates

    def _metrics(self) -> dict[str, float]:
        """Sums of the daemon's counters; empty while it is down."""
        address = self._state.get("metrics_address") if self._state is not None else None
        if not address:
            return {}
        try:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=METRICS_TIMEOUT_S) as reply:
                lines = reply.read().decode().splitlines()
        except OSError:
            return {}
        sums = dict.fromkeys(RATES, 0.0)
        for line in lines:
            name, _, value = line.rpartition(" ")
            for rate, counter in RATES.items():
                if name.startswith(counter + "{"):
                    sums[rate] += float(value)
        return sums

    def _lake_rows(self) -> dict[str, int]:
        rows = {}
        for name in self._shop.tables:
            schema, _, table = name.partition(".")
            log = self._lakes.setdefault(name, DeltaLog(self._store, current_path("shop", TableId(schema, table))))
            if log.exists():
                log.refresh()
                rows[name] = sum(file.rows for file in log.files())
        return rows
