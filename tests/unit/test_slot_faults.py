"""Why a slot can serve no more, by what each version of the server says of it, and by the errors that it raises.

Rows and errors as Postgres 14 to 18 give them (tests/integration/test_failover.py has the causes that can be had from a
real server); a cause that is not known yet is a fault all the same, and nothing that passes is taken for a lost slot.
"""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from cdc.errors import SlotLost, SourceRefused, SourceUnavailable, Verdict
from connectors.postgres.connection import translate
from connectors.postgres.slot import fault_of
from connectors.postgres.source import parse_history

OF_14 = {
    "slot_name": "cdc_shop", "plugin": "pgoutput", "slot_type": "logical", "temporary": False, "active": False,
    "restart_lsn": "0/1500000", "confirmed_flush_lsn": "0/1500100", "wal_status": "reserved", "safe_wal_size": None,
    "two_phase": False,
}  # fmt: skip
OF_16 = {**OF_14, "conflicting": False}
OF_17 = {**OF_16, "inactive_since": None, "invalidation_reason": None, "failover": False, "synced": False}
OF_18 = {**OF_17, "two_phase_at": None}
LOST = {"wal_status": "lost", "restart_lsn": None}
CONFLICT = {"wal_status": "lost", "conflicting": True}


@pytest.mark.parametrize("row", [OF_14, OF_16, OF_17, OF_18], ids=["14", "16", "17", "18"])
def test_a_slot_that_serves_has_no_fault_whatever_state_its_wal_is_in(row: dict[str, Any]) -> None:
    for status in ("reserved", "extended", "unreserved"):
        assert fault_of({**row, "wal_status": status}) == ("", "")
    assert fault_of({}) == ("", ""), "there is none"


@pytest.mark.parametrize(
    ("row", "reason", "mends"),
    [
        pytest.param({**OF_14, **LOST}, "wal_removed", "max_slot_wal_keep_size", id="14 and 15 wal_removed"),
        pytest.param({**OF_16, **CONFLICT, **LOST}, "wal_removed", "max_slot_wal_keep_size", id="16 wal_removed"),
        pytest.param({**OF_16, **CONFLICT}, "conflict", "hot_standby_feedback", id="16 conflict"),
        *(
            pytest.param({**row, **facts, "invalidation_reason": reason}, reason, mends, id=f"{version} {reason}")
            for version, row in ((17, OF_17), (18, OF_18))
            for facts, reason, mends in (
                (LOST, "wal_removed", "max_slot_wal_keep_size"),
                (CONFLICT, "rows_removed", "hot_standby_feedback"),
                (CONFLICT, "wal_level_insufficient", "wal_level"),
            )
        ),
        pytest.param(
            {**OF_18, "wal_status": "lost", "invalidation_reason": "idle_timeout"}, "idle_timeout",
            "idle_replication_slot_timeout", id="18 idle_timeout",
        ),
        pytest.param({**OF_18, "invalidation_reason": "something_new"}, "something_new", "", id="not known yet"),
    ],
)  # fmt: skip
def test_every_cause_of_invalidation_is_named_with_what_keeps_it_from_happening_again(
    row: dict[str, Any], reason: str, mends: str
) -> None:
    fault, hint = fault_of(row)
    assert f"(invalidated: {reason})" in fault
    assert mends in hint


def test_a_temporary_slot_is_none_to_rely_on() -> None:
    assert "temporary" in fault_of({**OF_17, "temporary": True, "synced": True})[0]


def error(sqlstate: str, message: str) -> psycopg.Error:
    return psycopg.errors.lookup(sqlstate)(f"ERROR:  {message}")


@pytest.mark.parametrize(
    ("sqlstate", "message"),
    [
        pytest.param("55000", 'cannot read from logical replication slot "cdc_shop"', id="14, 15"),
        pytest.param("55000", 'can no longer get changes from replication slot "cdc_shop"', id="16, 17"),
        pytest.param("55000", 'can no longer access replication slot "cdc_shop"', id="18"),
        pytest.param("58P01", "requested WAL segment 000000010000000000000003 has already been removed", id="WAL gone"),
    ],
)
def test_errors_of_a_lost_slot_are_for_an_operator_and_not_repeated_as_a_passing_fault(
    sqlstate: str, message: str
) -> None:
    told = translate(error(sqlstate, message), "db:5432/shop")
    assert isinstance(told, SlotLost)
    assert told.verdict is Verdict.OPERATOR
    assert message in str(told)


@pytest.mark.parametrize(
    ("sqlstate", "message", "kind"),
    [
        ("55006", 'replication slot "cdc_shop" is active for PID 4711', SourceUnavailable),
        ("57P01", "terminating connection due to administrator command", SourceUnavailable),
        ("57P03", "the database system is starting up", SourceUnavailable),
        ("55000", 'logical decoding requires "wal_level" >= "logical"', SourceRefused),
        ("42501", "permission denied to use replication slots", SourceRefused),
    ],
)
def test_what_passes_or_lies_elsewhere_is_not_taken_for_a_lost_slot(
    sqlstate: str, message: str, kind: type[Exception]
) -> None:
    assert isinstance(translate(error(sqlstate, message), "db:5432/shop"), kind)


def test_a_timeline_history_tells_where_each_timeline_was_left() -> None:
    text = "1\t0/3000148\tno recovery target specified\n\n# a comment\n2\t1/5000000\tbefore 2024-01-01 00:00:00\n"
    assert parse_history(text) == ((1, 0x3000148), (2, 0x1_0500_0000))
    assert parse_history("") == ()
