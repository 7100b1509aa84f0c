"""What `cdc status` shows, as one JSON document, from the state database and, live, from each source.

Works with the daemon up or down, and with a source that does not answer: what is not known is null, never invented.
Reads only. The keys are a contract with operators' scripts (docs/operations.md).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from cdc import control, registry
from cdc.condition import FINE, condition_fact, held_fact, waits_fact
from cdc.config import Config, SourceConfig
from cdc.config_serving import SyncConfig
from cdc.console import lsn_text, time_text
from cdc.discovery import finding_fact, unpublished_fact
from cdc.errors import CdcError
from cdc.follow import followers_fact
from cdc.freshness import freshness_fact, lag_seconds
from cdc.guard import guard_fact
from cdc.ports import SourceStatus
from cdc.schedule import Schedule
from cdc.state import HistoryEntry, Run, SourceState, State, TableState

STEPS = ("head", "received", "logged", "landed", "confirmed")
RUNS_OPEN = ("pending", "running")
RUNS_SHOWN = 10

Live = Mapping[str, SourceStatus | CdcError]
"""What each source's server says now, or why it does not."""


def progress_fact(source: str) -> str:
    """Key of the fact in which the daemon notes its progress, each second.

    {landed_lsn, landed_committed_at: µs, caught_up_at: {step: Unix s when it last held all that the server had sent}};
    what is missing is not known.
    """
    return f"progress:{source}"


def history_fact(source: str) -> str:
    """Key of the fact that tells which epoch the source is in, and why it began: {epoch, why}."""
    return f"history:{source}"


def runs_fact(source: str) -> str:
    """Key of the fact that tells of a periodic source's runs: when the last one that ended well began (`began_at`), and
    since when one is under way (`since`, 0: none is); Unix seconds."""
    return f"runs:{source}"


def runs_now_fact(source: str) -> str:
    """Key of the fact in which the daemon notes, each second, when the next run is due, which table is being read, and
    what a run that is due waits for: {next_at, table, waiting}."""
    return f"runs_now:{source}"


@dataclass(frozen=True, slots=True)
class Step:
    """One rung of the ladder: how far a step is, and how much the server is ahead of it (None: not known)."""

    step: str
    lsn: int
    lag_bytes: int | None
    lag_seconds: float | None


def ask_sources(config: Config) -> dict[str, SourceStatus | CdcError]:
    """Ask every source's server at the same time; bounded by its connector's time-outs."""

    def ask(name: str) -> SourceStatus | CdcError:
        section = config.sources[name]
        try:
            return registry.source_kind(section.type).admin(section).status()
        except CdcError as error:
            return error

    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(config.sources, pool.map(ask, config.sources), strict=True))


def gather(config: Config, state: State | None, live: Live) -> dict[str, Any]:
    """The whole status document. `state` None: no daemon has ever run here."""
    now = time.time()
    return {
        "at": time_text(now),
        "daemon": _daemon(state, now),
        "state_dir": str(config.state_dir),
        "lake": config.lake.url,
        "log": {"bytes": _log_bytes(config), "bytes_max": config.log_bytes_max},
        "sources": [_source(config, name, state, live.get(name), now) for name in config.sources],
        "syncs": [_sync(sync, state) for sync in config.syncs.values()],
        "models": [{"name": name, "last_run": _last(state, "model", name)} for name in config.models],
    }


def ladder(
    source: SourceState | None, server: SourceStatus | None, progress: Mapping[str, Any], now: float
) -> list[Step]:
    """Head, received, logged, landed, confirmed: each with its distance from the server's head.

    `lag_seconds` is the age of what a step lacks, at most: since the newest commit that it holds, or since it last
    held everything, whichever is later. It is 0 when the step holds all that was logged and the log all that the
    server has, and None when neither is known.
    """
    known = source or SourceState(name="")
    logged = max(known.end_lsn, known.lsn)
    received = max(known.received_lsn, known.head_lsn if known.positioned else 0, logged)
    head = max(server.head_lsn if server else 0, received)
    landed = int(progress.get("landed_lsn") or 0)
    confirmed = max(server.confirmed_lsn if server else 0, known.confirmed_lsn)
    landed_at_us = int(progress.get("landed_committed_at") or 0)
    caught_up_at = progress.get("caught_up_at") or {}

    def step(name: str, lsn: int) -> Step:
        if not lsn or not head:
            return Step(name, lsn, None, None)
        # Behind the last commit that was logged there is nothing that a step could lack of the log.
        holds_log = known.positioned and lsn > known.lsn
        if lsn >= head or (holds_log and logged >= head):
            return Step(name, lsn, head - lsn, 0.0)
        committed_at_us = known.committed_at if holds_log else landed_at_us if lsn >= landed else 0
        since = max(committed_at_us / 1e6, float(caught_up_at.get(name) or 0))
        return Step(name, lsn, head - lsn, max(0.0, now - since) if since else None)

    positions = {"head": head, "received": received, "logged": logged, "landed": landed, "confirmed": confirmed}
    return [step(name, positions[name]) for name in STEPS]


def _daemon(state: State | None, now: float) -> dict[str, Any]:
    facts = control.daemon(state) if state else None
    if facts is None:
        return {"running": False, "pid": None, "host": None, "started_at": None, "heartbeat_age_seconds": None}
    return {
        "running": facts.is_alive,
        "pid": facts.pid,
        "host": facts.host,
        "started_at": time_text(facts.started_at),
        "heartbeat_age_seconds": round(max(0.0, now - facts.heartbeat_at), 3),
    }


def _source(
    config: Config, name: str, state: State | None, live: SourceStatus | CdcError | None, now: float
) -> dict[str, Any]:
    section = config.sources[name]
    known = state.source(name) if state else None
    server = live if isinstance(live, SourceStatus) else None
    progress = _progress(state, name)
    if server is not None and section.confirm_after == "landed" and progress.get("landed_lsn"):
        # Only what has landed is confirmed; the server's answer may be newer than the daemon's note.
        progress = {**progress, "landed_lsn": max(int(progress["landed_lsn"]), server.confirmed_lsn)}
    # Of a daemon that is down nobody knows what has come since.
    lacking = state.get(freshness_fact(name)) if state and _daemon(state, now)["running"] else None
    return {
        "name": name,
        "type": section.type,
        "phase": (known.phase if known else "") or "new",
        "phase_since": time_text(known.phase_since / 1e6) if known else None,
        "error": known.error if known else "",
        "hint": known.hint if known else "",
        "paused": bool(state and state.is_paused("source", name)),
        "epoch": known.epoch if known and known.positioned else None,
        "epoch_why": (state.get(history_fact(name)) or {}).get("why") if state else None,
        "slot": None if section.is_periodic else _slot(section.slot, live),
        "runs": _runs(section, state) if section.is_periodic else None,
        "guard": _guard(state, name),
        "ladder": [
            {**asdict(step), "lsn": lsn_text(step.lsn) or None, "lag_seconds": _rounded(step.lag_seconds)}
            for step in ladder(known, server, progress, now)
        ],
        "tables": [_table(state, table, server, lacking, now) for table in state.tables(name)] if state else [],
        "followers": [_follower(fact, now) for fact in (state.get(followers_fact(name)) or [] if state else [])],
        "unpublished": [
            {"table": table, "fix": fix} for table, fix in (state.get(unpublished_fact(name)) or [] if state else [])
        ],
    }


def _progress(state: State | None, source: str) -> dict[str, Any]:
    """What the daemon noted; before it has noted anything, the last position that all tables were merged up to."""
    if state is None:
        return {}
    cut = state.cut(source)
    return state.get(progress_fact(source)) or ({"landed_lsn": cut.lsn} if cut else {})


def _slot(name: str, live: SourceStatus | CdcError | None) -> dict[str, Any]:
    if not isinstance(live, SourceStatus):
        return {"name": name, "exists": None, "error": str(live.args[0]) if live else "not asked"}
    return {
        "name": name,
        "exists": live.slot_exists,
        "active": live.slot_active,
        "active_pid": live.slot_active_pid or None,
        "confirmed_lsn": lsn_text(live.confirmed_lsn) or None,
        "restart_lsn": lsn_text(live.restart_lsn) or None,
        "retained_bytes": live.retained_bytes,
        "wal_status": live.wal_status or None,
        "safe_wal_bytes": live.safe_wal_bytes,
        "fault": live.slot_fault or None,
        "failover": live.slot_failover,
        "wal_keep_bytes": live.wal_keep_bytes,
        "wal_dir_bytes": live.wal_dir_bytes,
        "oldest_writer": live.oldest_writer or None,
    }


def _runs(section: SourceConfig, state: State | None) -> dict[str, Any]:
    """Runs of a periodic source, newest first, and when the next one is due."""
    fact = (state.get(runs_fact(section.name)) if state else None) or {}
    now = (state.get(runs_now_fact(section.name)) if state else None) or {}
    return {
        "strategy": section.strategy,
        "schedule": Schedule(every=section.every, cron=section.cron).text,
        "running_since": time_text(fact["since"]) if fact.get("since") else None,
        "table": now.get("table") or None,
        "waiting": now.get("waiting") or None,
        "last_began_at": time_text(fact["began_at"]) if fact.get("began_at") else None,
        "next_at": time_text(now["next_at"]) if now.get("next_at") else None,
        "history": [history_entry(e) for e in state.history("run", section.name, limit=RUNS_SHOWN)] if state else [],
    }


def _guard(state: State | None, name: str) -> dict[str, Any]:
    """What the daemon's WAL guard has come to."""
    fact = (state.get(guard_fact(name)) if state else None) or {}
    since = fact.get("since")
    return {
        "stage": fact.get("stage"),
        "since": time_text(since) if fact.get("stage") and since else None,
        "note": fact.get("note") or "",
    }


def _table(
    state: State, table: TableState, server: SourceStatus | None, lacking: dict[str, Any] | None, now: float
) -> dict[str, Any]:
    runs = state.runs(table.source, table.table, states=RUNS_OPEN)
    return {
        "table": str(table.table),
        "state": table.state,
        "reason": table.reason,
        "hint": table.hint,
        "paused": state.is_paused("table", f"{table.source}/{table.table}"),
        "rows": table.rows,
        "last_change_at": time_text(table.last_change_us / 1e6),
        "landed_lsn": lsn_text(table.landed_lsn) or None,
        "current_lsn": lsn_text(table.current_lsn) or None,
        "lag_seconds": lag_seconds(lacking, table.table, now),
        "snapshot": snapshot_progress(runs[-1], estimate_of(runs[-1], table, server), now) if runs else None,
        "verified": _last(state, "verify", f"{table.source}.{table.table}"),
        "finding": _finding(state.get(finding_fact(table.source, table.table))),
    }


def _follower(fact: dict[str, Any], now: float) -> dict[str, Any]:
    """Another form of a changelog, and when it last lacked nothing."""
    since = fact["clear_at"]
    return {
        "table": fact["table"],
        "form": fact["form"],
        "version": fact["version"],
        "lag_seconds": _rounded(now - since) if since else None,
        "error": fact["error"],
        "hint": fact["hint"],
    }


def _finding(fact: dict[str, Any] | None) -> dict[str, Any] | None:
    """What was last found in the catalog about a table, and how it was answered."""
    if fact is None:
        return None
    return {**{k: fact[k] for k in ("kind", "message", "answer")}, "at": time_text(fact["at_us"] / 1e6)}


def estimate_of(run: Run, table: TableState, server: SourceStatus | None) -> int | None:
    """How many rows the run will read: by its own word, the server's, or what the last run read. None for a part of a
    table."""
    if run.kind not in ("first", "resync"):
        return len(run.details["keys"]) if run.details.get("keys") and not run.where_sql else None
    own = run.details.get("rows_estimated") or (server.rows_estimated.get(str(table.table)) if server else None)
    return max(int(own or table.rows), run.rows) or None


def snapshot_progress(run: Run, estimated: int | None, now: float) -> dict[str, Any]:
    """A run that has not ended. Rates are means since it began; what is not known is null."""
    took = now - run.started_at / 1e6 if run.started_at else 0.0
    rate = run.rows / took if took > 0 and run.rows else None
    left = (estimated - run.rows) / rate if rate and estimated is not None else None
    return {
        "run": run.id,
        "kind": run.kind,
        "state": run.state,
        "chunks": run.chunk_no + 1,
        "rows": run.rows,
        "strategy": run.details.get("strategy"),
        "chosen": run.details.get("chosen", ""),
        "ranges": len(run.details["ranges"]) if "ranges" in run.details else None,
        "ranges_done": sum(r[2] for r in run.details.get("ranges") or ()),
        "rows_estimated": estimated,
        "rows_per_second": _rounded(rate),
        "remaining_seconds": _rounded(left),
        "bytes": run.details.get("bytes"),
        "where": run.where_sql,
        "started_at": time_text(run.started_at / 1e6),
        "reason": run.reason,
        "why": run.details.get("why", ""),
    }


def _sync(sync: SyncConfig, state: State | None) -> dict[str, Any]:
    fact = (state.get(condition_fact(sync.name)) if state else None) or {}
    held = state.get(held_fact(sync.name)) if state else None
    return {
        "name": sync.name,
        "target": sync.target,
        "table": sync.place,
        "mode": sync.mode,
        "paused": bool(state and (state.is_paused("sync", sync.name) or state.is_paused("sink", sync.target))),
        "condition": fact.get("condition", FINE),
        "waits_for": (state.get(waits_fact(sync.name)) if state else None) or [],
        "since": time_text(fact["since"]) if fact else None,
        "why": fact.get("text", ""),
        "hint": fact.get("hint", ""),
        "held": None if held is None else {
            "plan": held["plan"], "since": time_text(held["since"]), "counts": held["counts"],
            "held_by": held["held_by"],
        },
        "last_run": _last(state, "sync", sync.name),
    }  # fmt: skip


def _last(state: State | None, kind: str, name: str) -> dict[str, Any] | None:
    entries = state.history(kind, name, limit=1) if state else []
    return history_entry(entries[0]) if entries else None


def history_entry(entry: HistoryEntry) -> dict[str, Any]:
    """One run of a sync or model as JSON."""
    return {
        "id": entry.id,
        "cause": entry.cause,
        "started_at": time_text(entry.started_at / 1e6),
        "ended_at": time_text(entry.ended_at / 1e6),
        "outcome": entry.outcome,
        "counts": entry.counts,
        "error": entry.error,
    }


def _log_bytes(config: Config) -> int:
    """Size of the event log's segments on disk; one that is unlinked meanwhile counts nothing."""
    total = 0
    for segment in config.log_dir.glob("*.seg"):
        try:
            total += segment.stat().st_size
        except FileNotFoundError:
            continue
    return total


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
