"""Changelogs in an Iceberg catalog, kept by a real daemon that is killed, and that loses its disk.

What pyiceberg reads there is compared with Postgres' own test_decoding, in a directory and in a bucket.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from pyiceberg.catalog import load_catalog

from tests.support.buckets import new_bucket, s3_endpoint
from tests.support.daemon import Daemon, execute
from tests.support.witness import Changes, Witness
from tests.support.workload import SCHEMA, TABLES, Workload

POINTS = ("iceberg.before_commit", "iceberg.after_commit")
ICEBERG = """
[lake.iceberg]
tables = ["shop.public.*"]
every_s = 0.3
[lake.iceberg.catalog]
"""


class Scene:
    """The workload's tables, their witness, and a daemon that registers all of them."""

    def __init__(self, directory: Path, dsn: str, store: str) -> None:
        execute(dsn, *SCHEMA.split(";\n"))
        self.properties = {"type": "sql", "uri": f"sqlite:///{directory}/catalog.db"}
        lake: dict[str, object] = {"compact_every_s": 0.3}
        if store == "bucket":
            url = f"s3://{new_bucket()}/lake"
            lake |= {"url": url, "endpoint_url": s3_endpoint()}
            self.properties |= {"warehouse": f"{url}/iceberg", "s3.endpoint": s3_endpoint(), "s3.region": "us-east-1"}
        else:
            self.properties["warehouse"] = f"file://{directory}/warehouse"
        more = ICEBERG + "".join(f'"{key}" = "{value}"\n' for key, value in self.properties.items())
        self.daemon = Daemon(directory, dsn, source={"chunk_rows": 150}, lake=lake, more=more)
        assert self.daemon.ask("setup").code == 0
        self.witness = Witness(dsn, f"witness_{self.daemon.slot}")

    def kill_at(self, point: str, nth: int, *, disk_lost: bool) -> None:
        self.daemon.start(failpoints=f"{point}=kill:{nth}")
        self.daemon.died_at(point, disk_lost=disk_lost)

    def check(self) -> None:
        """After everything has landed and was followed: each change stands once in the Iceberg tables."""
        told = self.witness.changes()
        wanted = Counter({change: n for change, n in told.items() if change[0] in TABLES})
        found: Changes = Counter()
        catalog = load_catalog("cdc", **self.properties)
        columns = ("_epoch", "_lsn", "_seq", "_op", "_xid", "_run")
        for table in TABLES:
            data = catalog.load_table(("shop", table.replace(".", "_"))).scan(selected_fields=columns).to_arrow()
            rows = list(zip(*(data.column(c).to_pylist() for c in columns), strict=True))
            assert max(Counter(row[:3] for row in rows).values()) == 1, table
            found += Counter((table, op, xid) for *_, op, xid, run in rows if op in "cudt" and run is None)
        assert found == wanted
        assert wanted.total() > 50


@pytest.mark.slow
@pytest.mark.parametrize("store", ["directory", "bucket"])
@pytest.mark.parametrize("point", POINTS)
def test_iceberg_tables_hold_each_change_once_whatever_dies(
    point: str, store: str, tmp_path: Path, database: str, rng: random.Random
) -> None:
    scene = Scene(tmp_path, database, store)
    with scene.daemon as daemon, Workload(database, rng.randrange(1 << 30), pause_s=0.05) as workload:
        for nth, disk_lost in ((1, False), (rng.randrange(2, 6), True)):
            scene.kill_at(point, nth, disk_lost=disk_lost)
        workload.stop()
        assert daemon.start(once=True).ended(120) == 0, daemon.log_tail()
        shown = daemon.ask("status").document["sources"][0]["followers"]
        assert {f["table"]: f["error"] for f in shown if f["table"] in TABLES} == dict.fromkeys(TABLES, "")
        scene.check()
