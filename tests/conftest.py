"""What every test gets: clean environment, markers by directory, printed seeds and versions, Postgres fixtures."""

from __future__ import annotations

import os
import platform
import random
from pathlib import Path

import hypothesis
import pytest

from tests.support.postgres import database, server

__all__ = ["database", "server"]

_MARKERS = {"contracts": "contract"}
_KEPT = {"CDC_POSTGRES_BIN", "CDC_TEST_SEED", "CDC_HYPOTHESIS_PROFILE"}
_TESTS = Path(__file__).parent

# No deadline per example: the machine is small and shared. A failing example prints how to run it again.
for name, examples in (("default", 60), ("quick", 10), ("thorough", 2_000)):
    hypothesis.settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its seed
def pytest_configure(config: pytest.Config) -> None:
    # What an operator has in the environment must not reach the daemons that tests start.
    for name in [name for name in os.environ if name.startswith("CDC_") and name not in _KEPT]:
        del os.environ[name]
    for name in [name for name in os.environ if name.startswith("PG")]:  # libpq would take these as defaults
        del os.environ[name]
    hypothesis.settings.load_profile(os.environ.get("CDC_HYPOTHESIS_PROFILE", "default"))
    seed = os.environ.get("CDC_TEST_SEED") or str(random.SystemRandom().randrange(1 << 32))
    os.environ["CDC_TEST_SEED"] = seed
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = seed


def pytest_report_header(config: pytest.Config) -> list[str]:
    from connectors.postgres.embedded import find_binaries

    return [
        f"python {platform.python_version()}, postgres binaries {find_binaries()}",
        f"repeat the same run with CDC_TEST_SEED={os.environ['CDC_TEST_SEED']}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_TESTS):
            directory = item.path.relative_to(_TESTS).parts[0]
            if directory != item.path.name:
                item.add_marker(_MARKERS.get(directory, directory))


@pytest.fixture
def rng() -> random.Random:
    """Random numbers of the run's seed, which the report's header prints."""
    return random.Random(int(os.environ["CDC_TEST_SEED"]))
