"""Random programs against a hostile Postgres target, killed at random moments; `make test-slow` runs 200 of them.

After every death: what is acknowledged is what the target holds. At the end: the rejects are those of an oracle that
knows the constraints, all else is written, no effect came twice by the log of a trigger, and what others wrote into
columns that are not pushed is as they left it.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from cdc.errors import TargetUnavailable
from connectors.postgres.target import PostgresTarget
from tests.support.target_programs import (
    DDL,
    EVENTS,
    PARENTS,
    SYNCS,
    acknowledged,
    contents,
    digest_of,
    expected_rejects,
    make_program,
    planned,
    rejected_of,
)
from tests.support.targets import key_text, no_ledgers, target_config
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("CDC_TEST_SEED", "0"))
DEFAULT, SLOW = 3, 200


@pytest.mark.parametrize(
    "number",
    [pytest.param(i, marks=[] if i < DEFAULT else [pytest.mark.slow]) for i in range(SLOW)],
)
def test_a_program_with_kills_leaves_the_target_as_planned(database: str, number: int) -> None:
    seed = SEED + number
    sys.stdout.write(f"the same program again: CDC_TEST_SEED={seed}, number 0\n")
    program, rng = make_program(seed), random.Random(seed)
    role = f"pusher_{os.getpid()}"
    with psycopg.connect(database, autocommit=True) as db:
        db.execute(DDL)  # type: ignore[arg-type]
        dsn = database
        if program.with_row_security:
            db.execute(
                f"DROP ROLE IF EXISTS {role}; CREATE ROLE {role} LOGIN; CREATE SCHEMA cdc AUTHORIZATION {role};"  # type: ignore[arg-type]
                f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}"
            )
            dsn = make_conninfo(database, user=role)
        target = PostgresTarget(target_config(dsn), no_ledgers)
        try:
            step = 0
            for _ in range(rng.randint(1, 3)):
                step = killed(dsn, seed, step, rng)
                wait_until(lambda: sessions(db) == 0)
                assert_acknowledged_is_held(db, target)
                target.close()
                db.execute("UPDATE public.parents SET own = 'human ' || id WHERE own = 'own' AND id % 2 = 0")
            finished(db, target, seed)
        finally:
            target.close()
            wait_until(lambda: sessions(db) == 0)
            if program.with_row_security:
                db.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")  # type: ignore[arg-type]


def killed(dsn: str, seed: int, step: int, rng: random.Random) -> int:
    """Let a child push from this step on until it dies; the last step that it began."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    point = rng.choice(("sync.before_commit", "sync.after_commit", ""))
    if point:
        environment["CDC_FAILPOINTS"] = f"{point}=kill:{rng.randint(1, 6)}"
    command = [sys.executable, "-m", "tests.support.target_programs", dsn, str(seed), str(step)]
    with tempfile.TemporaryFile("w+") as out, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out) as child:
        if not point:
            wait_until(lambda: os.fstat(out.fileno()).st_size > 0 or child.poll() is not None)
            try:
                child.wait(rng.random() * 0.3)
            except subprocess.TimeoutExpired:
                child.kill()
        assert child.wait(120) in (0, -9)
        out.seek(0)
        return max((int(line) for line in out.read().split()), default=step)


def sessions(db: psycopg.Connection) -> int:
    row = db.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cdc crm' AND datname = current_database()"
    ).fetchone()
    assert row is not None
    return int(row[0])


def assert_acknowledged_is_held(db: psycopg.Connection, target: PostgresTarget) -> None:
    held = contents(db)
    for assignment in SYNCS:
        acked = acknowledged(target, assignment)
        if assignment is EVENTS:
            rows = db.execute("SELECT id, note FROM public.events").fetchall()
            assert len(rows) == len(set(rows)), "an event was appended twice"
            assert set(acked.values()) <= {digest_of({"id": i, "note": note}) for i, note in rows}
        else:
            assert acked == {key_text(i): digest_of(row) for i, row in held[assignment.sync].items()}


def finished(db: psycopg.Connection, target: PostgresTarget, seed: int) -> None:
    """The last step in one call, without a kill, against the oracle; then once more, which changes nothing."""
    program = make_program(seed)
    wanted = program.steps[-1]
    own = db.execute("SELECT id, own FROM public.parents ORDER BY id").fetchall()
    for repeated in (False, True):
        before = contents(db)
        count = db.execute("SELECT count(*) FROM public.seen").fetchone()
        batches = planned(target, wanted, program.batch_rows[-1], "last")
        results = wait_until(lambda: pushed(target, batches), 60, "the dead session's origin to become free")  # noqa: B023
        expected = expected_rejects(before, batches, with_row_security=program.with_row_security)
        assert rejected_of(batches, results[0]) == expected
        assert_acknowledged_is_held(db, target)
        left = {
            (b.assignment.sync, key)
            for b in planned(target, wanted, 50, "look")
            for key in b.acks.column("key").to_pylist()
        }
        assert left == expected, "what was not refused is acknowledged"
        if repeated:
            assert db.execute("SELECT count(*) FROM public.seen").fetchone() == count
    twice = db.execute(
        "SELECT count(*) FROM (SELECT op, content, lag(op) OVER w AS op_before, lag(content) OVER w AS before "
        "FROM public.seen WINDOW w AS (PARTITION BY relation, id ORDER BY n)) s "
        "WHERE (op = 'DELETE' AND op_before = 'DELETE') OR (op <> 'DELETE' AND content = before)"
    ).fetchone()
    assert twice == (0,), "an effect came twice"
    now = dict(db.execute("SELECT id, own FROM public.parents").fetchall())
    assert all(now.get(i, text) == text for i, text in own), "columns of others are as they left them"
    assert target.acknowledged(PARENTS).last_run in ("last", *(f"run-{i}" for i in range(20)), "")


def pushed(target: PostgresTarget, batches: list) -> tuple[list] | None:
    try:
        return (target.push(batches),)
    except TargetUnavailable:
        return None
