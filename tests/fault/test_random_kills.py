"""kill -9 at random moments under pgbench: nothing is lost, nothing is doubled.

No failpoint chooses the moment here, so what nobody thought of is struck too. The oracle is `verify`, and the count of
changes per table, operation and transaction by test_decoding on a second slot.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from connectors.postgres.embedded import EmbeddedPostgres
from tests.support.daemon import Daemon
from tests.support.witness import Witness, assert_exactly_once

TABLES = ["public.pgbench_accounts", "public.pgbench_branches", "public.pgbench_tellers", "public.pgbench_history"]
ROUNDS, CHECK_EVERY = 50, 10


@contextmanager
def pgbench(server: EmbeddedPostgres, dsn: str, seed: int) -> Iterator[None]:
    """pgbench's own transaction, some hundred times a second, until the block ends."""
    # Rate and sessions leave a share of two cores to the daemon: it is to be killed at work, not waiting for a core.
    command = [server.binary("pgbench"), "-n", "-c", "3", "-j", "1", "-R", "400", "-T", "3600",
               f"--random-seed={seed}", dsn]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
        assert process.poll() is None, "pgbench ended by itself"
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_at_random_moments_lose_and_double_nothing(
    tmp_path: Path, server: EmbeddedPostgres, database: str, rng: random.Random
) -> None:
    subprocess.run([server.binary("pgbench"), "-i", "-s", "1", "-q", database], check=True, capture_output=True)
    with Daemon(tmp_path, database, source={"chunk_rows": 8000, "confirm_every_s": 0.3}) as daemon:
        assert daemon.ask("setup").code == 0
        witness = Witness(database, f"witness_{daemon.slot}")
        counted = 0
        for _ in range(ROUNDS // CHECK_EVERY):
            with pgbench(server, database, rng.randrange(1 << 30)):
                for _ in range(CHECK_EVERY):
                    run_for(daemon, rng.uniform(0.4, 2.5))
                daemon.start().streaming()
            daemon.settled().verified()
            now = assert_exactly_once(witness, daemon.lake, TABLES)
            assert now > counted, "pgbench wrote nothing"
            counted = now
            daemon.kill()


def run_for(daemon: Daemon, seconds: float) -> None:
    """Start it, and kill it after a time; it must not end before."""
    process = daemon.start().process
    assert process is not None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(seconds)
    daemon.kill()
