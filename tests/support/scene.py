"""What tests of crashes have in common: a workload's tables, their witness, and a daemon that dies at named points.

The lake is a directory or a bucket, and one table in it is partitioned by a time of its rows. `check` is the oracle:
`verify` finds every table equal, each changelog holds each change exactly once, and readers that know only Delta open
what is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltalake import DeltaTable

from cdc.lake.changelog import ChangelogTable
from cdc.ports import ObjectStore
from cdc.table import TableId
from connectors.local.store import LocalStore
from connectors.s3.store import S3Store
from tests.support.buckets import copy_of, new_bucket, s3_endpoint
from tests.support.daemon import SOURCE, Daemon, execute
from tests.support.waiting import wait_until
from tests.support.witness import Witness, assert_exactly_once
from tests.support.workload import SCHEMA, TABLES


class Scene:
    """The daemon has small chunks and small segments, and looks after its lake all the time."""

    def __init__(
        self,
        directory: Path,
        dsn: str,
        *,
        bucket: bool = False,
        endpoint: str = "",
        by_way_of: str = "",
        source: Mapping[str, Any] | None = None,
        lake: Mapping[str, Any] | None = None,
    ) -> None:
        """`endpoint`: the bucket's server, if it is another one than moto; `by_way_of`: its URL as the daemon has it,
        if that is another one (a proxy's)."""
        execute(dsn, *SCHEMA.split(";\n"))
        self.dsn = dsn
        keys: dict[str, Any] = {"compact_every_s": 0.3}
        self.store: ObjectStore
        if bucket:
            endpoint = endpoint or s3_endpoint()
            url = f"s3://{new_bucket(endpoint)}/some/lake"
            keys |= {"url": url, "endpoint_url": by_way_of or endpoint}
            self.store = S3Store.from_url(url, {"endpoint_url": endpoint})
        else:
            (directory / "lake").mkdir(parents=True)
            self.store = LocalStore(directory / "lake")
        self.daemon = Daemon(
            directory,
            dsn,
            source={"chunk_rows": 150, "confirm_every_s": 0.3, **(source or {})},
            top={"log_segment_bytes": "1MB"},
            lake={**keys, **(lake or {})},
            more='[source.shop.table."public.events"]\npartition_by = "at:day"',
        )
        assert self.daemon.ask("setup").code == 0
        self.witness = Witness(dsn, f"witness_{self.daemon.slot}")
        self._copies = 0

    def kill_at(self, point: str, nth: int = 1, *, disk_lost: bool = False) -> None:
        """Run until the daemon has killed itself there; a snapshot is in progress."""
        if self.daemon.state_dir.exists():
            self.daemon.ask("resync", "stock")
        self.daemon.start(failpoints=f"{point}=kill:{nth}")
        if point == "log.before_unlink":
            # A segment goes when everything in it has landed and the next one has begun.
            execute(
                self.dsn, "insert into events (text) select repeat(md5(g::text), 10) from generate_series(1, 9000) g"
            )
        self.daemon.died_at(point, disk_lost=disk_lost)

    def check(self) -> int:
        """Nothing lost, nothing doubled, every table equal; the number of changes. The daemon runs."""
        self.daemon.settled().verified()
        self._no_orphans()
        changes = assert_exactly_once(self.witness, self._lake(), TABLES)
        counted = self.daemon.ask("query", "select count(*) from shop.items").document["rows"]
        location, options = self.store.location(f"{SOURCE}/public.items/current")
        assert [[DeltaTable(location, storage_options=options or None).to_pyarrow_table().num_rows]] == counted
        return changes

    def _no_orphans(self) -> None:
        """What a daemon that died has uploaded and not committed goes with the first upkeep of the next one."""
        left: list[str] = []

        def gone() -> bool:
            left.clear()
            for table in TABLES:
                schema, name = table.split(".")
                left.extend(ChangelogTable(self.store, SOURCE, TableId(schema, name)).orphans(term=1 << 60))
            return not left

        wait_until(gone, 60, lambda: f"orphans to go: {left}\n{self.daemon.log_tail()}")

    def _lake(self) -> Path:
        """A directory with the lake's files."""
        if isinstance(self.store, S3Store):
            self._copies += 1
            return copy_of(self.store, self.daemon.directory / f"copy-{self._copies}")
        return self.daemon.lake
