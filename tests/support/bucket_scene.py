"""A daemon whose lake is a bucket, the workload's tables at its source, and a witness of what was committed there."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltalake import DeltaTable

from connectors.s3.store import S3Store
from tests.support.buckets import copy_of, new_bucket
from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until
from tests.support.witness import Witness, assert_exactly_once
from tests.support.workload import SCHEMA, TABLES


class BucketScene:
    """Built without starting the daemon. `store` is the bucket as the test sees it, `daemon` as it is told."""

    def __init__(
        self,
        directory: Path,
        dsn: str,
        endpoint: str,
        *,
        by_way_of: str = "",
        source: Mapping[str, Any] | None = None,
        lake: Mapping[str, Any] | None = None,
    ) -> None:
        """`by_way_of`: the URL that the daemon has of the endpoint, if it is another one (a proxy's)."""
        execute(dsn, *SCHEMA.split(";\n"))
        url = f"s3://{new_bucket(endpoint)}/some/lake"
        self.store = S3Store.from_url(url, {"endpoint_url": endpoint})
        self.daemon = Daemon(
            directory,
            dsn,
            source={"chunk_rows": 1000, "confirm_every_s": 0.3, **(source or {})},
            lake={"url": url, "endpoint_url": by_way_of or endpoint, **(lake or {})},
        )
        assert self.daemon.ask("setup").code == 0
        self.witness = Witness(dsn, f"witness_{self.daemon.slot}")

    def kill_at(self, point: str, *, disk_lost: bool) -> None:
        """Start the daemon, and let it die at a failpoint."""
        self.daemon.start(failpoints=f"{point}=kill")
        wait_until(lambda: not self.daemon.alive, 60, lambda: f"to die at {point}\n{self.daemon.log_tail()}")
        assert self.daemon.ended() == -signal.SIGKILL, f"{point}\n{self.daemon.log_tail()}"
        if disk_lost:
            shutil.rmtree(self.daemon.state_dir)

    def check(self, directory: Path) -> None:
        """Wait until everything has landed, then hold the lake against source and witness. `directory` is for a copy
        of it."""
        self.daemon.settled().verified()
        assert assert_exactly_once(self.witness, copy_of(self.store, directory), TABLES) > 50
        counted = self.daemon.ask("query", "select count(*) from shop.items").document["rows"]
        location, options = self.store.location("shop/public.items/current")
        assert [[DeltaTable(location, storage_options=options).to_pyarrow_table().num_rows]] == counted
