"""A lake in a bucket grows old: what is old rests in another class of storage, then goes, and `current` stays equal.

Time passes by setting back, in the log of a changelog, when its objects were added; the daemon is down then.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from connectors.s3.store import S3Store
from tests.support.buckets import new_bucket, s3_endpoint
from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until

DAY_MS = 86_400_000
RULES = """
[lake.changelog]
retain = "90d"
cold_after = "30d"
cold_storage_class = "GLACIER_IR"

[source.shop.table."public.kept"]
retain = "forever"
"""


class OldLake:
    """A daemon, its bucket, and the time that passes there."""

    def __init__(self, directory: Path, dsn: str) -> None:
        url, endpoint = f"s3://{new_bucket()}/lake", s3_endpoint()
        self.store = S3Store.from_url(url, {"endpoint_url": endpoint})
        lake = {"url": url, "endpoint_url": endpoint, "compact_every_s": 3600, "vacuum_after_s": 0}
        self.daemon = Daemon(directory, dsn, lake=lake, more=RULES)
        self.daemon.ask("setup")

    def days_pass(self, days: int, table: str) -> None:
        self.daemon.kill()
        for found in list(self.store.list(f"shop/{table}/changelog/_delta_log/")):
            if not found.key.endswith(".json"):
                continue
            got = self.store.get(found.key)
            assert got is not None
            text = re.sub(
                r'"modificationTime":(\d+)', lambda m: f'"modificationTime":{int(m[1]) - days * DAY_MS}',
                got[0].decode(),
            )  # fmt: skip
            self.store.put(found.key, text.encode())

    def changelog(self, table: str) -> dict[str, Any]:
        """What `lake ls` says of it."""
        (entry,) = self.daemon.ask("lake", "ls", table).document["tables"]
        found: dict[str, Any] = entry["changelog"]
        return found

    def vacuumed(self, table: str) -> dict[str, int]:
        (answer,) = self.daemon.ask("lake", "vacuum", table).document["tables"]
        assert not answer["error"], answer
        return {what: answer[what] for what in ("expired", "cooled")}


@pytest.mark.slow
def test_old_objects_rest_then_go_and_what_needs_them_is_read_anew(
    tmp_path: Path, database: str, rng: random.Random
) -> None:
    execute(
        database,
        "create table t (id int primary key, note text)",
        "create table kept (id int primary key, note text)",
        "alter table t alter note set storage external",
    )
    lake = OldLake(tmp_path, database)
    with lake.daemon as daemon:
        daemon.start().settled()
        for number in range(3):
            note = rng.randbytes(200_000).hex()
            execute(database, f"insert into t values ({number}, '{note}')", f"insert into kept values ({number}, 'x')")
            daemon.ask("wait")
        assert lake.changelog("t")["expires"]["files"] == lake.changelog("t")["files"]
        assert lake.changelog("kept")["expires"] is None

        lake.days_pass(40, "public.t")
        daemon.start().settled()
        assert lake.vacuumed("t") == {"expired": 0, "cooled": 3}
        assert lake.vacuumed("t") == {"expired": 0, "cooled": 0}
        assert lake.changelog("t")["cold_files"] == 3
        counted = "select count(*) from shop.t_changelog where _op = 'c'"
        assert daemon.ask("query", counted).document["rows"] == [[3]]
        daemon.verified()

        lake.days_pass(60, "public.t")
        lake.days_pass(100, "public.kept")
        daemon.start().settled()
        files = lake.changelog("t")["files"]
        assert lake.vacuumed("t") == {"expired": files, "cooled": 0}
        assert lake.vacuumed("kept") == {"expired": 0, "cooled": 0}
        assert daemon.ask("query", counted).document["rows"] == [[0]]
        assert [o.key for o in lake.store.list("shop/public.t/changelog/_date=")] == []
        # The value that this update leaves alone stands in `current` only.
        execute(database, "update t set id = 10 where id = 0", "delete from t where id = 1")
        daemon.settled().verified()

        daemon.kill()
        lake.store.delete([o.key for o in lake.store.list("shop/public.t/current/")])
        daemon.start()
        wait_until(
            lambda: (
                any("no longer holds" in (t["snapshot"] or {}).get("why", "") for t in daemon.tables().values())
                or "no longer holds" in daemon.log_tail(200)
            ),
            60,
            daemon.log_tail,
        )
        daemon.settled()
        wait_until(lambda: daemon.ask("query", "select count(*) from shop.t").document.get("rows") == [[2]], 60, "rows")
        daemon.settled().verified()
        assert daemon.ask("query", "select count(*) from shop.kept_changelog where _op = 'c'").document["rows"] == [[3]]
