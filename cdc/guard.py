"""The WAL guard: what a slot may cost its server, and what is done about it, in stages; and the heartbeat.

A slot that is not confirmed keeps WAL until the server's disk is full, or until the server gives the slot up and every
table must be read anew. `decide` is the whole policy, a pure function of what is known: warn; confirm what is logged
though it has not landed (only where the lake is what holds WAL back; the anchor says so before, so a disk that is lost
meanwhile is known as a loss); pause snapshots; and, only where an operator wants it, let the slot go and begin a new
history. Each stage has a threshold of its own and is left well below it.

The heartbeat is a transactional message that is written when the server's WAL grows and nothing of it reaches us. It
carries the stream's position past what concerns us not, and it must come back: a stream that does not bring it is
told. It writes no table. Nothing is confirmed here (cdc.capture does that).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from cdc import metrics
from cdc.config import SourceConfig
from cdc.console import bytes_text, seconds_text
from cdc.errors import LeaseExpired, SourceRefused, StoreUnavailable
from cdc.ports import SourceAdmin, SourceStatus
from cdc.state import State
from cdc.units import wal_threshold

log = logging.getLogger(__name__)

STAGES: Final = ("warn", "confirm", "pause", "drop")
"""From mild to drastic. Several hold at a time; the last one that holds is shown."""
LEAVE_SHARE: Final = 0.75
"""A stage is left when less than this share of its threshold is retained: no flutter at the edge."""
LOOK_S: Final = 10.0
"""How often the server is asked, at most."""
BEAT_BYTES: Final = 1 << 20
"""So much WAL must have passed us by before a heartbeat is worth its write: an idle server is left alone."""
BACK_S: Final = 60.0
"""A heartbeat that has not come back by then is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WalFacts:
    """What the guard decides by. `limit_bytes` None: the server has no limit."""

    retained_bytes: int
    """WAL that the server keeps for the slot."""
    unlanded_bytes: int
    """WAL behind what the lake holds: what would be retained if only that were confirmed."""
    limit_bytes: int | None = None


Rules = dict[str, tuple[str, ...]]
"""Thresholds by stage, as configured: sizes ("10GB") and shares of the server's limit ("50%")."""


def rules_of(config: SourceConfig) -> Rules:
    """The stages that the configuration wants. Where the source is confirmed after the log anyway, one has no use."""
    rules = {
        "warn": config.wal_warn_at,
        "confirm": config.wal_confirm_at,
        "pause": config.wal_pause_at,
        "drop": config.wal_drop_at,
    }
    return {s: at for s, at in rules.items() if at and not (s == "confirm" and config.confirm_after == "log")}


def threshold(at: tuple[str, ...], limit_bytes: int | None) -> int | None:
    """The lowest of a stage's thresholds in bytes; None if it has only shares and the server has no limit."""
    known = [wal_threshold(text) for text in at]
    sizes = [size for share, size in known if not share]
    sizes += [int(share * limit_bytes) for share, _ in known if share and limit_bytes is not None]
    return min(sizes, default=None)


def decide(rules: Rules, facts: WalFacts, held: frozenset[str]) -> frozenset[str]:
    """The stages that hold now; `held` did before."""
    now = set()
    for stage, at in rules.items():
        edge = threshold(at, facts.limit_bytes)
        if edge is None:
            continue
        reached = facts.retained_bytes
        if stage == "confirm":
            # Once it holds, less is retained than before: what it is for is what has not landed.
            if stage in held:
                reached = max(reached, facts.unlanded_bytes)
            elif facts.unlanded_bytes * 2 < facts.retained_bytes:
                continue
        if reached >= (edge * LEAVE_SHARE if stage in held else edge):
            now.add(stage)
    return frozenset(now)


def facts_of(status: SourceStatus, landed_lsn: int) -> WalFacts:
    """What a server's answer means for the guard. The limit is what it says is left, where it says so."""
    limit = status.wal_keep_bytes
    if limit is not None and status.safe_wal_bytes is not None:
        limit = max(limit, status.retained_bytes + status.safe_wal_bytes)
    return WalFacts(
        retained_bytes=status.retained_bytes,
        unlanded_bytes=max(0, status.head_lsn - landed_lsn) if landed_lsn else 0,
        limit_bytes=limit,
    )


def guard_fact(source: str) -> str:
    """Key of the fact in which the daemon notes the guard's stage: {stage, since (Unix s), note}."""
    return f"guard:{source}"


class Heartbeat:
    """When one is due, and whether the last one came back. Positions are the caller's."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next_at = 0.0
        self._seen: tuple[int, int] = (0, 0)
        self._pending: tuple[int, float] | None = None
        self.late = False

    def is_due(self, head_lsn: int, logged_lsn: int, now: float) -> bool:
        """Whether WAL has passed us by since the last look: the server's head moved on, the log's position did not."""
        head_before, logged_before = self._seen
        self._seen = (head_lsn, logged_lsn)
        if not self._every_s or self._pending is not None or now < self._next_at:
            return False
        stuck = logged_lsn == logged_before and head_lsn > head_before
        return stuck and head_lsn - logged_lsn >= BEAT_BYTES

    def sent(self, lsn: int, now: float) -> None:
        self._pending = (lsn, now)
        self._next_at = now + self._every_s

    def refused(self, now: float) -> None:
        self._next_at = now + self._every_s

    def look(self, logged_lsn: int, now: float) -> str:
        """`returned` once when the log has passed the last one, `late` once when it has not in time, else empty."""
        if self._pending is None:
            return ""
        lsn, at = self._pending
        if logged_lsn > lsn:
            self._pending, self.late = None, False
            return "returned"
        if now - at > BACK_S and not self.late:
            self.late = True
            return "late"
        return ""


class Guard:
    """One source's guard. `step` belongs to one thread; the properties may be read from any."""

    def __init__(
        self,
        source: SourceConfig,
        admin: SourceAdmin,
        state: State,
        *,
        reached: Callable[[], dict[str, int]],
        bridge: Callable[[bool], None],
        let_go: Callable[[str], None],
        streaming: Callable[[], bool],
    ) -> None:
        """`reached` gives end LSNs of log and lake; `bridge` makes capture confirm what is logged, or stop to;
        `let_go` gives the slot up and begins a new history, for the reason it is told."""
        self._source = source
        self._admin = admin
        self._state = state
        self._reached = reached
        self._bridge = bridge
        self._let_go = let_go
        self._streaming = streaming
        self._rules = rules_of(source)
        self._heartbeat = Heartbeat(source.heartbeat_every_s)
        self._look_s = min(LOOK_S, source.heartbeat_every_s or LOOK_S)
        self._look_at = 0.0
        self._told_refused = False
        self.stages: frozenset[str] = frozenset()
        state.set(guard_fact(source.name), self._note(""))

    @property
    def pauses_snapshots(self) -> bool:
        return "pause" in self.stages

    def step(self) -> bool:
        """Ask the server if it is time, and do what its answer calls for. False: there is nothing to do at once."""
        now = time.monotonic()
        if now < self._look_at:
            return False
        self._look_at = now + self._look_s
        status = self._admin.status()
        name = self._source.name
        metrics.SLOT_RETAINED_BYTES.labels(name).set(status.retained_bytes)
        if status.safe_wal_bytes is not None:
            metrics.SLOT_SAFE_WAL_BYTES.labels(name).set(status.safe_wal_bytes)
        reached = self._reached()
        self._beat(status, reached["logged"], now)
        if status.slot_exists:
            self._act(status, facts_of(status, reached["landed"]))
        return False

    def _act(self, status: SourceStatus, facts: WalFacts) -> None:
        before, now = self.stages, decide(self._rules, facts, self.stages)
        if ("confirm" in now) != ("confirm" in before):
            try:
                self._bridge("confirm" in now)
            except (StoreUnavailable, LeaseExpired):
                # A lake that is away cannot be told what it must say first; it is tried again at the next look.
                now = (now - {"confirm"}) | (before & {"confirm"})
        self.stages = now
        stage = _last(self.stages)
        metrics.GUARD_STAGE.labels(self._source.name).set(STAGES.index(stage) + 1 if stage else 0)
        if self.stages == before:
            return
        text = describe(stage, status, facts)
        self._state.set(guard_fact(self._source.name), self._note(text if stage else ""))
        log.log(
            logging.WARNING if stage else logging.INFO,
            text,
            extra={"source": self._source.name, "stage": stage or "none", "retained_bytes": facts.retained_bytes},
        )
        if "drop" in self.stages - before:
            self._let_go(f"WAL guard (wal_drop_at): {text}")

    def _note(self, text: str) -> dict[str, Any]:
        return {"stage": _last(self.stages) or None, "since": time.time(), "note": text}

    def _beat(self, status: SourceStatus, logged_lsn: int, now: float) -> None:
        name = self._source.name
        came = self._heartbeat.look(logged_lsn, now)
        if came:
            metrics.HEARTBEATS.labels(name, came).inc()
        if came == "late":
            log.warning(
                "a heartbeat has not come back: the stream does not move, and WAL is kept meanwhile",
                extra={
                    "source": name,
                    "since": seconds_text(BACK_S),
                    "hint": "is the server decoding one big transaction? select * from pg_stat_replication",
                    **({"oldest_transaction": status.oldest_writer} if status.oldest_writer else {}),
                },
            )
        if not self._streaming() or not self._heartbeat.is_due(status.head_lsn, logged_lsn, now):
            return
        try:
            self._heartbeat.sent(self._admin.barrier(), now)
        except SourceRefused as error:
            self._heartbeat.refused(now)
            metrics.HEARTBEATS.labels(name, "refused").inc()
            if not self._told_refused:
                self._told_refused = True
                log.warning(error.args[0], extra={"source": name, "part": "heartbeat", "hint": error.hint})
            return
        metrics.HEARTBEATS.labels(name, "sent").inc()


def describe(stage: str, status: SourceStatus, facts: WalFacts) -> str:
    """What is wrong, what is done about it, and who holds the WAL, in one line."""
    limit = f" of {bytes_text(facts.limit_bytes)} that it would keep" if facts.limit_bytes is not None else ""
    kept = f"the server keeps {bytes_text(facts.retained_bytes)} of WAL for us{limit}"
    if not stage:
        return f"{kept}: back to normal"
    done = {
        "warn": "",
        "confirm": "; what is logged is confirmed though it has not landed: losing state_dir now costs a resync",
        "pause": "; snapshots are paused",
        "drop": "; the slot is dropped and made anew, and every table is snapshotted again",
    }[stage]
    if facts.unlanded_bytes * 2 >= facts.retained_bytes:
        return f"{kept}{done}; the lake is behind: cdc status"
    if status.oldest_writer:
        return f"{kept}{done}; a transaction that is still open holds it: {status.oldest_writer}"
    return f"{kept}{done}"


def _last(stages: frozenset[str]) -> str:
    return next((s for s in reversed(STAGES) if s in stages), "")
