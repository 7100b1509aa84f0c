"""A store that answers conditional writes with success and overwrites: whoever looks is told, and no daemon writes.

The store is `rclone serve s3`, a real program that people do put before disks and clouds.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from connectors.s3.store import S3Store
from tests.support.buckets import CREDENTIALS
from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until

pytestmark = pytest.mark.stores
REASON = "put if absent: a conditional PUT overwrote an object that exists"


@pytest.fixture
def rclone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a running server with a bucket named `lake`."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    program = shutil.which("rclone", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("no rclone beside this Python: make test-stores installs it")
    (tmp_path / "served" / "lake").mkdir(parents=True)
    keys = f"{CREDENTIALS['AWS_ACCESS_KEY_ID']},{CREDENTIALS['AWS_SECRET_ACCESS_KEY']}"
    told = tmp_path / "rclone.log"
    with told.open("wb") as out:
        server = subprocess.Popen(
            [program, "serve", "s3", "--addr", "127.0.0.1:0", "--auth-key", keys, "--config", "/dev/null",
             "--vfs-cache-mode", "writes", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "served")],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        line = wait_until(
            lambda: next((li for li in told.read_text().splitlines() if "http://127.0.0.1:" in li), ""),
            30,
            lambda: told.read_text(),
        )
        endpoint = "http://127.0.0.1:" + line.partition("http://127.0.0.1:")[2].split("/")[0].strip(']" ')
        wait_until(lambda: _answers(endpoint), 30, lambda: told.read_text())
        yield endpoint
    finally:
        server.kill()
        server.wait()


def _answers(endpoint: str) -> bool:
    try:
        boto3.client("s3", endpoint_url=endpoint).list_objects_v2(Bucket="lake")
    except (BotoCoreError, ClientError):
        return False
    return True


def test_a_store_that_overwrites_is_refused_with_the_reason(tmp_path: Path, database: str, rclone: str) -> None:
    execute(database, "create table orders (id int primary key)", "insert into orders values (1)")
    place = {"url": "s3://lake/here", "endpoint_url": rclone}
    with Daemon(tmp_path, database, lake=place) as daemon:
        assert daemon.ask("setup").code == 0
        checked = daemon.cdc("check")
        assert checked.code == 3
        (found,) = [f for f in checked.document["findings"] if f["object"] == "lake"]
        assert (found["severity"], f"{found['name']}: {found['message']}") == ("error", REASON)
        assert "conditional writes" in found["fix"]

        daemon.start().in_phase("operator")
        assert REASON in daemon.source()["error"]
        assert daemon.stop() == 0
        daemon.start(once=True)
        assert daemon.ended() == 1
        assert REASON in daemon.log_tail()
    left = [o.key for o in S3Store("lake", "here", {"endpoint_url": rclone}).list("") if "/_cdc/" not in o.key]
    assert left == []
