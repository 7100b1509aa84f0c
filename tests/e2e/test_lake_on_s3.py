"""The lake in a bucket: what a daemon writes there is what its source has, whatever dies and whatever is lost."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from deltalake import DeltaTable

from connectors.s3.store import S3Store
from tests.support.buckets import new_bucket, s3_endpoint
from tests.support.daemon import Daemon, execute
from tests.support.workload import SCHEMA, Workload


def test_a_lake_in_a_bucket_survives_kills_and_a_lost_disk(tmp_path: Path, database: str, rng: random.Random) -> None:
    execute(database, *SCHEMA.split(";\n"))
    endpoint, url = s3_endpoint(), f"s3://{new_bucket()}/some/lake"
    with Daemon(tmp_path, database, lake={"url": url, "endpoint_url": endpoint}) as daemon:
        with Workload(database, rng.randrange(1 << 30), pause_s=0.02) as workload:
            daemon.start().settled()
            daemon.kill()
            daemon.start().settled()
            daemon.kill()
            shutil.rmtree(daemon.state_dir)
            daemon.start().settled()
            workload.stop()
        daemon.settled().verified()

        counted = daemon.ask("query", "select count(*) from shop.items").document["rows"]
        location, options = S3Store.from_url(url, {"endpoint_url": endpoint}).location("shop/public.items/current")
        assert [[DeltaTable(location, storage_options=options).to_pyarrow_table().num_rows]] == counted
