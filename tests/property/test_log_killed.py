"""A process that appends is killed with SIGKILL; the next one finds everything that was acknowledged, and nothing torn.

This file is also the child's program: it appends transactions whose rows follow from their LSN, and says on standard
output which of them the log has acknowledged. Every third is appended in two parts, every fifth is followed by a chunk.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.logs import (
    ORDERS,
    SOURCE,
    Row,
    batch,
    chunk_rows,
    content,
    named_and_found,
    open_log,
    portion,
    rows_of,
    transaction,
)

ROOT = Path(__file__).resolve().parents[2]
POINTS = ("log.after_write", "log.after_fsync", "log.before_index", "log.after_index")


def run(directory: Path) -> None:
    """The child: append until killed."""
    state, log = open_log(directory, segment_bytes=20_000)
    log.discard_open(SOURCE)
    position = log.position(SOURCE)
    lsn = position.lsn if position else 0
    said = sys.stdout
    while True:
        read = state.get("read") or 0
        # A chunk comes after every fifth transaction, unless a killed process got as far as that.
        if lsn % 5 == 0 and read < lsn // 5:
            rows = batch(ORDERS, chunk_rows(lsn, read, 1), op="r")
            log.append_chunk(
                SOURCE, [rows], run="r", chunk=read, within=lambda tx, n=read + 1: state.set("read", n, tx)
            )
            said.write(f"read {read + 1}\n")
        lsn += 1
        if lsn % 3 == 0:
            log.append(SOURCE, portion(transaction(lsn, size=500)))
            log.append(SOURCE, portion(transaction(lsn, size=500, first_seq=2), lsn=lsn))
        else:
            log.append(SOURCE, portion(transaction(lsn, size=500), lsn=lsn))
        said.write(f"logged {lsn}\n")
        said.flush()
        if lsn % 40 == 0:
            log.trim({SOURCE: log.end_offset(SOURCE) // 2})


def expected(lsn: int, read: int) -> list[Row]:
    rows: list[Row] = []
    for each in range(1, lsn + 1):
        rows += rows_of(transaction(each, size=500))
        if each % 3 == 0:
            rows += rows_of(transaction(each, size=500, first_seq=2))
        if each % 5 == 0 and each // 5 <= read:
            rows += chunk_rows(each, each // 5 - 1, 1)
    return rows


def killed(directory: Path, *, point: str | None = None, nth: int = 1, after_lines: int = 0) -> tuple[int, int]:
    """Run the child until it dies; what it had acknowledged: the last LSN and the number of chunks."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if point is not None:
        environment["CDC_FAILPOINTS"] = f"{point}=kill:{nth}"
    command = [sys.executable, __file__, str(directory)]
    acknowledged = {"logged": 0, "read": 0}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for count, line in enumerate(child.stdout):
            if not line.endswith("\n"):
                break
            what, number = line.split()
            acknowledged[what] = int(number)
            if point is None and count == after_lines:
                child.kill()
    assert child.returncode == -signal.SIGKILL
    return acknowledged["logged"], acknowledged["read"]


def check(directory: Path, logged: int, read: int) -> tuple[int, int]:
    """What the next process finds: at least what was acknowledged, at most one append more, and nothing in between."""
    state, log = open_log(directory, segment_bytes=20_000)
    try:
        named, found = named_and_found(directory, state)
        assert named == found
        log.discard_open(SOURCE)
        position = log.position(SOURCE)
        lsn, chunks = position.lsn if position else 0, state.get("read") or 0
        assert lsn in (logged, logged + 1)
        assert chunks in (read, read + 1)
        everything = content(log)
        wanted = expected(lsn, chunks)
        assert everything == wanted[len(wanted) - len(everything) :]
        if log.records(SOURCE, 0) and log.records(SOURCE, 0)[0].offset == 1:
            assert everything == wanted
        return lsn, chunks
    finally:
        log.close()
        state.close()


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_step_of_an_append_loses_nothing_acknowledged_and_shows_nothing_torn(
    tmp_path: Path, point: str
) -> None:
    lsn = read = 0
    for nth in (1, 4, 7):
        before = lsn
        logged, chunks = killed(tmp_path, point=point, nth=nth)
        lsn, read = check(tmp_path, max(logged, lsn), max(chunks, read))
        # The first append is one of a new segment; an append that was in the index counts, one that was not does not.
        if nth == 1:
            assert lsn - before == (1 if point == "log.after_index" and (before + 1) % 3 else 0)


def test_a_kill_between_unnaming_and_unlinking_a_segment_loses_nothing(tmp_path: Path) -> None:
    logged, read = killed(tmp_path, point="log.before_unlink", nth=2)
    assert logged >= 40
    check(tmp_path, logged, read)


def test_kills_at_random_moments_lose_nothing_acknowledged(tmp_path: Path) -> None:
    lsn = read = 0
    for _ in range(5):
        logged, chunks = killed(tmp_path, after_lines=random.randint(0, 60))
        # Here the child may have gone on while its last lines were on their way.
        state, log = open_log(tmp_path, segment_bytes=20_000)
        position = log.position(SOURCE)
        assert position is not None
        assert position.lsn >= max(logged, lsn)
        log.close()
        state.close()
        lsn, read = check(tmp_path, position.lsn, max(chunks, read, position.lsn // 5 - 1))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
