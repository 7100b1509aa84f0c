"""The WAL guard's policy as a table, the promise that the anchor makes while it bridges, and the heartbeat."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cdc.batch import Boundary
from cdc.capture import ConfirmGate
from cdc.config import SourceConfig
from cdc.errors import LeaseExpired, SourceRefused, StoreUnavailable
from cdc.guard import BACK_S, Guard, Heartbeat, WalFacts, decide, facts_of, guard_fact, rules_of
from cdc.ports import Finding, SourceStatus
from cdc.state import State

GB = 1 << 30
RULES = {"warn": ("50%", "10GB"), "confirm": ("70%",), "pause": ("80%",)}


def stages(retained_gb: float, *held: str, limit_gb: float | None = 10, unlanded_gb: float | None = None) -> set[str]:
    unlanded = retained_gb if unlanded_gb is None else unlanded_gb
    facts = WalFacts(
        retained_bytes=int(retained_gb * GB),
        unlanded_bytes=int(unlanded * GB),
        limit_bytes=None if limit_gb is None else int(limit_gb * GB),
    )
    return set(decide(RULES, facts, frozenset(held)))


def test_stages_come_one_after_the_other_as_wal_gathers() -> None:
    assert stages(4.9) == set()
    assert stages(5) == {"warn"}
    assert stages(7) == {"warn", "confirm"}
    assert stages(8) == {"warn", "confirm", "pause"}


def test_a_stage_is_left_well_below_where_it_was_entered() -> None:
    assert stages(4, "warn") == {"warn"}
    assert stages(3.7, "warn") == set()
    assert stages(6.1, "warn", "confirm", "pause") == {"warn", "confirm", "pause"}
    assert stages(5.9, "warn", "confirm", "pause") == {"warn", "confirm"}


def test_without_a_limit_of_the_server_only_sizes_count() -> None:
    assert stages(9, limit_gb=None) == set()
    assert stages(11, limit_gb=None) == {"warn"}


def test_confirming_after_the_log_is_for_a_lake_that_is_behind_and_lasts_until_it_is_not() -> None:
    assert stages(7.5, unlanded_gb=0.1) == {"warn"}, "an open transaction holds it: confirming would give nothing"
    assert stages(0.1, "confirm", unlanded_gb=7.5) == {"confirm"}, "what it has freed is no reason to end it"
    assert stages(0.1, "confirm", unlanded_gb=0.1) == set()


def test_the_limit_is_what_the_server_says_is_left() -> None:
    status = SourceStatus(
        head_lsn=9 * GB, slot_exists=True, retained_bytes=4 * GB, wal_keep_bytes=5 * GB, safe_wal_bytes=2 * GB
    )
    assert facts_of(status, 8 * GB) == WalFacts(retained_bytes=4 * GB, unlanded_bytes=GB, limit_bytes=6 * GB)
    assert facts_of(replace(status, wal_keep_bytes=None, safe_wal_bytes=None), 0).limit_bytes is None


def test_stages_that_are_turned_off_or_have_no_use_are_not_there() -> None:
    config = SourceConfig(name="shop")
    assert set(rules_of(config)) == {"warn", "confirm", "pause"}
    assert set(rules_of(replace(config, confirm_after="log"))) == {"warn", "pause"}
    assert set(rules_of(replace(config, wal_warn_at=(), wal_pause_at=()))) == {"confirm"}


# ---- the promise of the anchor -----------------------------------------------------------------------------------


class Anchored:
    """The anchor, as the gate writes it, and what may be confirmed at that moment."""

    def __init__(self) -> None:
        self.notes: list[tuple[int, str, int]] = []
        self.gate: ConfirmGate | None = None
        self.fails = False

    def __call__(self, may_confirm_lsn: int, mode: str) -> None:
        if self.fails:
            raise StoreUnavailable("away")
        self.notes.append((may_confirm_lsn, mode, self.gate.allowed if self.gate else 0))

    def open(self, mode: str = "landed", logged_lsn: int = 0) -> ConfirmGate:
        self.gate = ConfirmGate(
            epoch=1, confirm_after="landed", save_anchor=self, anchored_lsn=100, every_s=0, anchored_mode=mode,
            logged_lsn=logged_lsn,
        )  # fmt: skip
        return self.gate


def at(end_lsn: int) -> Boundary:
    return Boundary(1, end_lsn - 1, end_lsn)


def test_the_anchor_says_log_before_the_first_position_is_confirmed_that_has_not_landed() -> None:
    anchored = Anchored()
    gate = anchored.open()
    gate.logged(at(500))
    assert gate.allowed == 0
    gate.bridge(True, at(500))
    assert anchored.notes == [(100, "log", 0)], "it stood there while nothing was allowed yet"
    assert gate.allowed == 500
    gate.logged(at(600))
    assert (gate.allowed, len(anchored.notes)) == (600, 1)


def test_nothing_is_confirmed_if_the_anchor_cannot_say_so() -> None:
    anchored = Anchored()
    gate = anchored.open()
    anchored.fails = True
    with pytest.raises(StoreUnavailable):
        gate.bridge(True, at(500))
    gate.logged(at(600))
    assert gate.allowed == 0


def test_the_anchor_says_landed_again_only_when_everything_that_was_confirmed_has_landed() -> None:
    anchored = Anchored()
    gate = anchored.open()
    gate.bridge(True, at(500))
    gate.landed(at(500))
    assert {mode for _, mode, _ in anchored.notes} == {"log"}, "it still goes on"
    gate.logged(at(800))
    gate.bridge(False, at(800))
    gate.logged(at(900))
    assert gate.allowed == 800, "from here on only what has landed"
    gate.landed(at(700))
    assert anchored.notes[-1][1] == "log"
    gate.landed(at(850))
    assert anchored.notes[-1][:2] == (850, "landed")
    assert gate.allowed == 850


def test_a_restart_while_it_bridged_keeps_the_promise_until_the_log_has_landed() -> None:
    anchored = Anchored()
    gate = anchored.open(mode="log", logged_lsn=800)
    gate.landed(at(700))
    assert anchored.notes == [(700, "log", 0)]
    gate.landed(at(800))
    assert anchored.notes[1][:2] == (800, "landed")


def test_the_promise_is_renewed_when_the_history_was_looked_at_again_while_it_bridges() -> None:
    anchored = Anchored()
    gate = anchored.open()
    gate.settled("landed")
    assert anchored.notes == []
    gate.bridge(True, at(500))
    gate.settled("log")
    gate.settled("landed")
    assert [mode for _, mode, _ in anchored.notes] == ["log", "log"]


# ---- the heartbeat -----------------------------------------------------------------------------------------------


def test_a_heartbeat_is_due_only_while_much_wal_passes_and_nothing_reaches_us() -> None:
    beat = Heartbeat(10)
    assert not beat.is_due(5 << 20, 1 << 20, 0), "the first look knows nothing of before"
    assert not beat.is_due(5 << 20, 1 << 20, 10), "the server is idle"
    assert not beat.is_due(9 << 20, 2 << 20, 20), "the stream moves"
    assert not beat.is_due((9 << 20) + 100, 9 << 20, 30)
    assert not beat.is_due((9 << 20) + 200, 9 << 20, 40), "too little to write for"
    assert beat.is_due(20 << 20, 9 << 20, 50)
    assert not any(Heartbeat(0).is_due(n << 30, 0, n) for n in range(3)), "0: none"


def test_a_heartbeat_is_verified_by_its_return_and_a_late_one_is_told_once() -> None:
    beat = Heartbeat(10)
    beat.sent(500, now=0)
    assert not beat.is_due(9 << 30, 100, 20), "one at a time"
    assert [beat.look(400, 1), beat.look(500, BACK_S), beat.look(500, BACK_S + 1), beat.look(500, BACK_S + 9)] == [
        "", "", "late", "",
    ]  # fmt: skip
    assert (beat.look(501, BACK_S + 10), beat.late) == ("returned", False)


# ---- acting ------------------------------------------------------------------------------------------------------


class Server:
    """A source's admin: what it says is set by the test."""

    def __init__(self) -> None:
        self.now = SourceStatus(head_lsn=1 * GB, slot_exists=True, confirmed_lsn=1 * GB, wal_keep_bytes=10 * GB)
        self.messages = 0
        self.may_emit = True

    def status(self) -> SourceStatus:
        return self.now

    def barrier(self) -> int:
        if not self.may_emit:
            raise SourceRefused("permission denied for function pg_logical_emit_message", hint="grant execute …")
        self.messages += 1
        return self.now.head_lsn

    def check(self) -> list[Finding]:
        return []

    def setup(self, *, dry_run: bool) -> list[str]:
        return []

    def teardown(self, *, dry_run: bool) -> list[str]:
        return []


class Watched:
    def __init__(self, path: Path, **config: object) -> None:
        self.server, self.bridged, self.let_go = Server(), [False], list[str]()
        self.away: Exception | None = None
        self.reached = {"logged": GB, "landed": GB}
        self.state = State(path / "state.db")
        source = replace(SourceConfig(name="shop"), **config)  # type: ignore[arg-type]
        self.guard = Guard(
            source, self.server, self.state,
            reached=lambda: self.reached, bridge=self._bridge, let_go=self.let_go.append, streaming=lambda: True,
        )  # fmt: skip

    def _bridge(self, on: bool) -> None:
        if self.away is not None:
            raise self.away
        self.bridged.append(on)

    def look(self, head_gb: float = 1, retained_gb: float = 0) -> str | None:
        self.server.now = replace(self.server.now, head_lsn=int(head_gb * GB), retained_bytes=int(retained_gb * GB))
        self.guard._look_at = 0.0
        self.guard.step()
        fact = self.state.get(guard_fact("shop"))
        assert fact is not None
        return fact["stage"]


def test_the_guard_acts_and_tells_once_per_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="cdc.guard")
    watched = Watched(tmp_path)
    assert watched.look(1) is None
    assert watched.look(7, 6) == "warn"
    assert watched.look(7.2, 6.2) == "warn"
    assert len(caplog.records) == 1
    assert "6.0 GB of WAL for us of 10.0 GB" in caplog.text
    assert watched.look(8.5, 7.5) == "confirm"
    assert (watched.bridged[-1], watched.guard.pauses_snapshots) == (True, False)
    assert watched.look(9.5, 8.5) == "pause"
    assert watched.guard.pauses_snapshots
    watched.reached["landed"] = watched.reached["logged"] = int(9.5 * GB)
    assert watched.look(9.5, 0.1) is None
    assert (watched.bridged, watched.guard.pauses_snapshots) == ([False, True, False], False)
    assert [r.levelname for r in caplog.records] == ["WARNING", "WARNING", "WARNING", "INFO"]


@pytest.mark.parametrize("away", [StoreUnavailable("away"), LeaseExpired("ran out")])
def test_a_lake_that_is_away_is_not_bridged_and_the_other_stages_hold_all_the_same(
    tmp_path: Path, away: Exception
) -> None:
    watched = Watched(tmp_path)
    watched.away = away
    assert watched.look(8.5, 7.5) == "warn"
    assert watched.look(9.5, 8.5) == "pause"
    assert watched.bridged == [False]
    watched.away = None
    watched.look(9.5, 8.5)
    assert watched.bridged == [False, True]


def test_the_slot_is_let_go_only_where_an_operator_wants_it_and_once(tmp_path: Path) -> None:
    calm, strict = Watched(tmp_path / "a"), Watched(tmp_path / "b", wal_drop_at=("9GB",))
    for watched in (calm, strict):
        watched.look(9.9, 9.8)
        watched.look(9.95, 9.9)
    assert calm.let_go == []
    assert len(strict.let_go) == 1
    assert strict.let_go[0].startswith("WAL guard (wal_drop_at): the server keeps 9.8 GB")


def test_a_role_that_may_not_write_messages_is_told_once_and_the_guard_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(tmp_path, heartbeat_every_s=1e-9)
    watched.server.may_emit = False
    for head in range(1, 6):
        watched.look(head)
    assert [r.message for r in caplog.records if "pg_logical_emit_message" in r.message] != []
    assert len([r for r in caplog.records if "pg_logical_emit_message" in r.message]) == 1
    watched.server.may_emit = True
    watched.look(6)
    assert watched.server.messages == 1
