"""The model test of snapshots: random transactions against snapshots that run, are killed and lose their disk.

Each program comes from the run's seed and its own number; the report's header says how to repeat the run, and the
number stands in the test's name. At the end every table equals its `current`, cell by cell.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectors.postgres.embedded import EmbeddedPostgres
from tests.support.oracle import differences
from tests.support.postgres import create_database, drop_database, private_server
from tests.support.programs import Program
from tests.support.stepped import Stepped

QUICK = 4
PROGRAMS = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """One whose commits wait for a standby that is not there, if their session asks for it."""
    directory = tmp_path_factory.mktemp("model")
    with private_server(directory, synchronous_standby_names="nobody", synchronous_commit="local") as server:
        yield server


def play(server: EmbeddedPostgres, directory: Path, number: int) -> None:
    """Program `number` of this run's seed, from its first transaction to the comparison at its end."""
    name = f"model_{number}"
    rng = random.Random(f"{os.environ['CDC_TEST_SEED']}/{number}")
    dsn = create_database(server, name)
    with pytest.MonkeyPatch.context() as patch:
        readers = rng.choice([1, 2, 4])
        stepped = Stepped(directory, dsn, patch, chunk_rows=rng.choice([3, 5, 9, 20]), readers=readers)
        program = Program(stepped, rng, readers=readers)
        try:
            with stepped:
                program.play(rng.choice([60, 150, 300]))
                program.finish()
                assert_equal(program)
                if rng.random() < 0.4 and program.injure():
                    program.play(60)
                    program.finish()
                    assert_equal(program)
        except BaseException:
            sys.stderr.write("\n".join([*program.journal, ""]))
            raise
        finally:
            program.close()
    drop_database(server, name)


def assert_equal(program: Program) -> None:
    found = [
        line
        for shape in program.shapes
        for line in differences(
            program.stepped.dsn, program.stepped.lake, shape.name, where=program.filters[shape.name]
        )
    ]
    assert not found, "\n".join(found[:20])


@pytest.mark.parametrize("number", range(QUICK))
def test_a_table_equals_its_source_after_a_random_program(
    number: int, server: EmbeddedPostgres, tmp_path: Path
) -> None:
    play(server, tmp_path, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(QUICK, PROGRAMS))
def test_a_table_equals_its_source_after_any_random_program(
    number: int, server: EmbeddedPostgres, tmp_path: Path
) -> None:
    play(server, tmp_path, number)
