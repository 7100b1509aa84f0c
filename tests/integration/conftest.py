"""What tests of syncs and their targets stand on: a session of their own, a Postgres target, a lake with orders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from connectors.postgres.target import PostgresTarget
from tests.support.syncs import Shop
from tests.support.targets import no_ledgers, target_config


@pytest.fixture
def db(database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def target(database: str) -> Iterator[PostgresTarget]:
    sink = PostgresTarget(target_config(database), no_ledgers)
    yield sink
    sink.close()


@pytest.fixture
def shop(tmp_path: Path, database: str) -> Iterator[Shop]:
    made = Shop(tmp_path, database)
    yield made
    made.close()
