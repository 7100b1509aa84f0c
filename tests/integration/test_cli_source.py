"""The commands that talk to a source: check finds what is missing, setup mends it, teardown leaves nothing behind."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc.cli import main

pytestmark = pytest.mark.matrix


@pytest.fixture
def file(tmp_path: Path, database: str) -> Path:
    """A configuration for a database with two tables, one of them without a key."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create table orders (id int primary key, amount numeric(10,2), note text)")
        connection.execute("create table bare (x int)")
    path = tmp_path / "cdc.toml"
    path.write_text(
        f"""
        state_dir = "state"
        [source.shop]
        dsn = "{database}"
        slot = "cdc_cli_test"
        publication = "cdc_cli_test"
        tables = ["public.*"]
        [lake]
        url = "lake"
        """
    )
    return path


def run(capsys: pytest.CaptureFixture[str], file: Path, *words: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = main(["--config", str(file), "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def made(database: str) -> tuple[list[str], list[str]]:
    """Publications and slots of the test that exist."""
    with psycopg.connect(database) as connection:
        publications = connection.execute("select pubname from pg_publication").fetchall()
        slots = connection.execute(
            "select slot_name from pg_replication_slots where slot_name = 'cdc_cli_test'"
        ).fetchall()
    return [row[0] for row in publications], [row[0] for row in slots]


def test_setup_makes_what_check_missed_and_teardown_takes_it_back(
    file: Path, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, planned = run(capsys, file, "setup", "--dry-run")
    assert made(database) == ([], [])
    assert "publication" in planned["sources"]["shop"][0].lower(), "the publication comes before the slot"
    assert run(capsys, file, "status")[1]["sources"][0]["slot"]["exists"] is False

    code, done = run(capsys, file, "setup", "shop")
    assert (code, done["sources"]) == (0, planned["sources"])
    assert made(database) == (["cdc_cli_test"], ["cdc_cli_test"])
    assert run(capsys, file, "setup")[1]["sources"] == {"shop": []}, "a second time there is nothing to do"

    _, status = run(capsys, file, "status")
    slot, ladder = status["sources"][0]["slot"], status["sources"][0]["ladder"]
    assert (slot["exists"], slot["active"]) == (True, False)
    assert ladder[0]["lsn"] is not None
    assert ladder[2]["lsn"] is None, "nothing is logged: no daemon has run"

    _, checked = run(capsys, file, "check")
    assert "error" not in {
        f["severity"] for f in checked["findings"] if f["name"] in ("connection", "slot", "wal_level")
    }
    told = [f for f in checked["findings"] if "bare" in f["object"] + f["message"]]
    assert told, "a table without a key is told"

    assert run(capsys, file, "teardown")[0] == 0
    assert made(database) == ([], [])


def test_tables_come_from_the_catalog_while_the_daemon_has_noted_none(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, file, "setup")[0] == 0
    code, document = run(capsys, file, "tables")
    tables = {t["table"]: t for t in document["tables"]}
    assert code == 0
    assert tables["public.orders"]["key"] == ["id"]
    assert tables["public.bare"]["key"] == []
    held = {c["name"]: (c["type"], c["held"]) for c in tables["public.orders"]["columns"]}
    assert held["amount"] == ("numeric(10,2)", "exact: decimal128(10, 2); text in _raw: NaN")
    assert run(capsys, file, "teardown")[0] == 0


def test_a_person_at_a_terminal_types_the_name_of_what_a_teardown_drops(
    file: Path, database: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert run(capsys, file, "setup")[0] == 0
    for typed in ("yes\n", "\n"):
        monkeypatch.setattr("sys.stdin", Terminal(typed))
        assert main(["--config", str(file), "teardown"]) == 1
        assert made(database) == (["cdc_cli_test"], ["cdc_cli_test"])
    monkeypatch.setattr("sys.stdin", Terminal("shop\n"))
    assert main(["--config", str(file), "teardown"]) == 0
    assert made(database) == ([], [])
    assert main(["--config", str(file), "teardown", "--yes"]) == 0
