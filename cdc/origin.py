"""Where a source's history stands, decided before its stream is opened: epoch, position, and whether anything was lost.

Compares three witnesses: the server (system identifier, timeline, slot), the lake's anchor object, and the local
log. Three things can come of it: the history goes on, in the same epoch; it broke off, which stops the source with
the situation and its remedy or, by `on_slot_lost`, begins a new history; or the server is not the one that the lake
was filled from, which always stops the source. None is passed over.

A new history is: noted in the anchor, the slot dropped and made anew, the next epoch saved, the log placed. The note
comes first, so whoever dies at any of these steps does the rest at the next start. In the new epoch no snapshot counts
as done. Deciding that a *table* must be read anew is not done here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from cdc.batch import Boundary
from cdc.config import SourceConfig
from cdc.console import lsn_text
from cdc.errors import SlotLost, SourceRefused
from cdc.failpoints import failpoint
from cdc.lake.anchor import Anchor, AnchorState, places_kept
from cdc.log import EventLog
from cdc.ports import SourceAdmin, SourceIdentity, SourceStatus

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Server:
    """The source's side: what it is configured to be, and what its server says."""

    config: SourceConfig
    identity: SourceIdentity
    status: SourceStatus


def settle(
    config: SourceConfig,
    identity: SourceIdentity,
    admin: SourceAdmin,
    anchor: Anchor,
    event_log: EventLog,
    *,
    landed_lsn: Callable[[int], int] = lambda epoch: -1,
    landed_epoch: Callable[[], int] = lambda: -1,
    still: Callable[[], None] = lambda: None,
) -> AnchorState:
    """The anchor as it is to be kept from here on; the log has a position when this returns. Durable on return.

    `landed_lsn` gives the highest commit LSN that the lake holds of an epoch; it is asked only when the log cannot
    tell. `landed_epoch` gives the highest epoch that the lake holds anything of; it is asked only without an anchor.
    `still` is called before a new history begins: once it has returned, no other part works on the source.
    Raises SourceRefused or SlotLost with the situation and its remedy, SourceUnavailable where waiting mends it.
    """
    known = anchor.load()
    status = admin.status()
    if known is None or not known.slot:
        still()
        before = known.epoch if known is not None else epoch_before(landed_epoch(), event_log.position(config.name))
        return _begin(config, identity, admin, anchor, event_log, known, before)
    server = _Server(config, identity, status)
    _check_place(server, known)
    lost = _loss(server, known, event_log, landed_lsn)
    if lost is not None:
        if config.on_slot_lost != "resync":
            raise lost
        still()
        return begin_anew(config, identity, admin, anchor, event_log, why=str(lost.args[0]))
    state = anchor.change(lambda s: replace(s, timeline=identity.timeline, mode=_mode(config, status, s)))
    _place_log(config, status, state, event_log)
    return state


def begin_anew(
    config: SourceConfig, identity: SourceIdentity, admin: SourceAdmin, anchor: Anchor, event_log: EventLog, *, why: str
) -> AnchorState:
    """Begin a new history: the slot is dropped and made anew, and in the new epoch every table is snapshotted again.

    Nobody may stream from the slot, and no other part may work on the source. Whoever dies in here, or gets an error
    (SourceUnavailable: the slot is not to be had now), finds it noted: the next `settle` does the rest. `why` stands
    in the anchor and in `status`; never row values. Returns and raises as `settle`.
    """
    log.warning("a new history begins: every table is snapshotted anew", extra={"source": config.name, "why": why})
    give_up(anchor, why)
    failpoint("origin.after_note")
    known = anchor.state
    return _begin(config, identity, admin, anchor, event_log, known, known.epoch if known is not None else 0)


def give_up(anchor: Anchor, why: str = "cdc teardown") -> None:
    """Note in the lake that the slot is to go: the next start makes it anew and begins a new epoch. Before the slot is
    dropped, so that a slot that is missing without this note is known as lost. Durable on return."""
    if anchor.load() is not None:
        anchor.change(lambda s: replace(s, slot="", why=why) if s.slot else s)


def epoch_before(landed: int, logged: Boundary | None) -> int:
    """The epoch that a history begins behind which no anchor tells of: none of what a lake holds by then counts, for
    nobody knows which server it came from, or what happened since; nor what a log holds, whose lake was another one.
    `landed`: the lake's highest epoch, -1 if it holds nothing."""
    return max(landed, logged.epoch if logged is not None else 0, 0)


def anew(source: str) -> str:
    """What an operator does to begin a new history."""
    return (
        f"`cdc teardown {source}`, then start again: a new epoch begins and every table is snapshotted anew"
        f' (with on_slot_lost = "resync" in [source.{source}] the daemon does so by itself)'
    )


def _begin(
    config: SourceConfig,
    identity: SourceIdentity,
    admin: SourceAdmin,
    anchor: Anchor,
    event_log: EventLog,
    known: AnchorState | None,
    before: int,
) -> AnchorState:
    """The first epoch, or the next one. What a slot of the epoch before still holds has nothing to do with the new
    one, so it is made anew; at the very first start, one that `cdc setup` made is used as it is."""
    for statement in admin.setup(dry_run=False, anew=known is not None):
        log.info("set up", extra={"source": config.name, "sql": statement})
    failpoint("origin.after_setup")
    status = admin.status()
    if status.slot_fault:
        raise SlotLost(_cannot_serve(config, status), hint=f"`cdc teardown {config.name}`, then start again")
    state = AnchorState(
        epoch=before + 1,
        system_id=identity.system_id,
        timeline=identity.timeline,
        database=identity.database,
        slot=config.slot,
        mode=config.confirm_after,
        may_confirm_lsn=status.confirmed_lsn,
        places=places_kept(known),
        why=known.why if known is not None else "the first start",
    )
    anchor.save(state)
    failpoint("origin.after_anchor")
    _place_log(config, status, state, event_log)
    return state


def _mode(config: SourceConfig, status: SourceStatus, known: AnchorState) -> str:
    """The mode that the anchor may claim. Under "log" it does not follow the slot, so after a change to "landed" it
    says "log" until what has landed has caught up with the slot."""
    behind = known.mode == "log" and status.confirmed_lsn > known.may_confirm_lsn
    return known.mode if behind else config.confirm_after


def _check_place(server: _Server, known: AnchorState) -> None:
    """Whether this is the server, the database and the slot that the lake was filled from."""
    config, identity = server.config, server.identity
    name = config.name
    if (identity.system_id, identity.database) != (known.system_id, known.database):
        raise SourceRefused(
            f"source {name}: the lake holds database {known.database!r} of server {known.system_id},"
            f" but the dsn leads to database {identity.database!r} of server {identity.system_id}"
            f" (the lake holds it up to {lsn_text(known.may_confirm_lsn)}, slot {config.slot!r} of this server stands"
            f" at {lsn_text(server.status.confirmed_lsn) or 'nothing: it does not exist'})",
            hint=f"correct the dsn; if this server came out of pg_upgrade: `cdc adopt {name}`; if it takes the place"
            f" of the old one in another way, drop the slot there and {anew(name)}",
        )
    if config.slot != known.slot:
        raise SourceRefused(
            f"source {name}: the lake was filled from slot {known.slot!r}, the configuration names {config.slot!r}",
            hint=f"set `slot` back; to go on with another slot: {anew(name)}",
        )


def _loss(
    server: _Server, known: AnchorState, event_log: EventLog, landed_lsn: Callable[[int], int]
) -> SlotLost | None:
    """Why what the lake holds and what the server will send do not join, None if they do."""
    config, identity, status = server.config, server.identity, server.status
    name, slot, hint = config.name, config.slot, anew(config.name)
    logged = _logged(config, known, event_log)
    promoted = identity.timeline != known.timeline
    held = max(known.may_confirm_lsn, logged or 0)
    if promoted or logged is None:
        held = max(held, landed_lsn(known.epoch) + 1)
    if promoted:
        left_at = dict(identity.branches).get(known.timeline)
        if left_at is None:
            return SlotLost(
                f"source {name}: the server is on timeline {identity.timeline}, which does not descend from timeline"
                f" {known.timeline} that the lake holds up to {lsn_text(held)}: it was restored from a backup",
                hint=hint,
            )
        if left_at < held:
            return SlotLost(
                f"source {name}: the server's timeline {identity.timeline} branched off timeline {known.timeline} at"
                f" {lsn_text(left_at)}, below the position {lsn_text(held)} that we hold: it was restored to a point"
                " in time, or a standby without the last changes was promoted",
                hint=hint,
            )
    if status.head_lsn < held:
        return SlotLost(
            f"source {name}: the server stands at {lsn_text(status.head_lsn)}, behind the position {lsn_text(held)}"
            " that we hold; it was restored from a backup, or a standby without the last changes was promoted",
            hint=hint,
        )
    if not status.slot_exists:
        gone = f"source {name}: replication slot {slot!r} is gone; what was committed since"
        gone += f" {lsn_text(held)} is lost to it (the server stands at {lsn_text(status.head_lsn)})"
        if promoted:
            gone += f"; timeline {known.timeline} of the server became {identity.timeline}, and the standby that was"
            gone += " promoted had no synchronized copy of the slot"
            hint += "; docs/operations.md tells how a slot outlives a promotion (failover = true)"
        return SlotLost(gone, hint=hint)
    if status.slot_fault:
        return SlotLost(_cannot_serve(config, status), hint="; ".join(filter(None, (hint, status.slot_fault_hint))))
    return _moved(server, known, logged)


def _logged(config: SourceConfig, known: AnchorState, event_log: EventLog) -> int | None:
    """How far the local log reaches in the lake's epoch; None if it knows nothing of that."""
    position = event_log.position(config.name)
    if position is None or position.epoch < known.epoch:
        return None
    if position.epoch > known.epoch:
        raise SourceRefused(
            f"source {config.name}: state_dir is of epoch {position.epoch}, the lake only of epoch {known.epoch}",
            hint=f"check [lake] url; if the lake was set back, move state_dir away and {anew(config.name)}",
        )
    return position.end_lsn


def _moved(server: _Server, known: AnchorState, logged: int | None) -> SlotLost | None:
    """A slot that stands beyond what we ever let it forget. A slot that is made anew stands beyond it, too."""
    confirmed, name, slot = server.status.confirmed_lsn, server.config.name, server.config.slot
    if known.mode == "landed" and confirmed > known.may_confirm_lsn:
        return SlotLost(
            f"source {name}: slot {slot!r} was moved ahead by someone else, or dropped and made anew: it stands at"
            f" {lsn_text(confirmed)}, and we let it go to {lsn_text(known.may_confirm_lsn)} at most; the changes in"
            " between are lost to it",
            hint=anew(name),
        )
    if known.mode == "log" and logged is not None and logged < confirmed and not _is_adopted(known, logged, confirmed):
        return SlotLost(
            f"source {name}: slot {slot!r} stands at {lsn_text(confirmed)}, but the log ends at {lsn_text(logged)}:"
            " it was moved ahead by someone else, or dropped and made anew, or state_dir is an older copy",
            hint=f"bring back the newest state_dir; if this is it: {anew(name)}",
        )
    return None


def _cannot_serve(config: SourceConfig, status: SourceStatus) -> str:
    return (
        f"source {config.name}: replication slot {config.slot!r} cannot be read any more: {status.slot_fault}"
        f" (it stands at {lsn_text(status.confirmed_lsn)}, the server at {lsn_text(status.head_lsn)})"
    )


def _is_adopted(state: AnchorState, logged: int, confirmed: int) -> bool:
    """Whether the log ends where an operator said that the server of now goes on."""
    return state.adopted_from_lsn <= logged < state.adopted_at_lsn <= confirmed


def _place_log(config: SourceConfig, status: SourceStatus, state: AnchorState, event_log: EventLog) -> None:
    """Give the log a position where it has none of this epoch; refuse one that the slot has left behind."""
    logged = _logged(config, state, event_log)
    confirmed = status.confirmed_lsn
    if logged is None:
        if state.mode == "log" and state.may_confirm_lsn < confirmed:
            raise SlotLost(
                f"source {config.name}: the event log is gone, and the server has been told to forget what was in it,"
                f" up to {lsn_text(confirmed)} (confirm_after = 'log', or the WAL guard bridged a late lake)",
                hint=f"bring back state_dir; if it is lost: {anew(config.name)}",
            )
        # The server sends every commit record from `confirmed` on, so nothing at or above it may count as logged.
        event_log.set_position(config.name, Boundary(state.epoch, confirmed - 1, confirmed))
    elif _is_adopted(state, logged, confirmed):
        # Everything that the server before this one numbered is committed here, whatever its numbers were.
        at = state.adopted_at_lsn
        event_log.set_position(config.name, Boundary(state.epoch, at - 1, at), other_server=True)
    elif logged < confirmed:
        raise SourceRefused(
            f"source {config.name}: state_dir is older than what the server has been told to forget: the log ends at"
            f" {lsn_text(logged)}, the slot stands at {lsn_text(confirmed)}",
            hint="move state_dir away and start again: the lake has everything",
        )
