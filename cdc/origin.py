"""Where a source's history stands, decided once per start: epoch, position, and whether anything was lost.

Compares three witnesses: the server (system identifier, timeline, slot), the lake's anchor object, and the local
log. Every disagreement ends in an error that names the situation and what mends it; none is passed over. Creates
publication and slot at the very first start, and after `cdc teardown` followed by a start, which begins a new
epoch.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from cdc.batch import Boundary
from cdc.config import SourceConfig
from cdc.errors import SlotLost, SourceRefused
from cdc.lake.anchor import Anchor, AnchorState
from cdc.log import EventLog
from cdc.ports import SourceAdmin, SourceIdentity, SourceStatus

log = logging.getLogger(__name__)

ANEW = "`cdc teardown`, then start again: a new epoch begins and every table is snapshotted anew"


def settle(
    config: SourceConfig, identity: SourceIdentity, admin: SourceAdmin, anchor: Anchor, event_log: EventLog
) -> AnchorState:
    """The anchor as it is to be kept from here on; the log has a position when this returns. Durable on return.

    Raises SourceRefused or SlotLost with the situation and its remedy.
    """
    known = anchor.load()
    status = admin.status()
    if known is None or not known.slot:
        state = _begin(config, identity, admin, status, known)
        status = admin.status()
    else:
        _check_history(config, identity, known)
        _check_slot(config, status, known)
        state = replace(known, timeline=identity.timeline, mode=config.confirm_after)
    if known is None or state != known:
        anchor.save(state)
    _place_log(config, status, state, event_log)
    return state


def give_up(anchor: Anchor) -> None:
    """Note in the lake that the slot is to go: the next start begins a new epoch. Before the slot is dropped, so that a
    slot that is missing without this note is known as lost. Durable on return."""
    known = anchor.load()
    if known is not None and known.slot:
        anchor.save(replace(known, slot=""))


def _begin(
    config: SourceConfig, identity: SourceIdentity, admin: SourceAdmin, status: SourceStatus, known: AnchorState | None
) -> AnchorState:
    for statement in admin.setup(dry_run=False):
        log.info("set up", extra={"source": config.name, "sql": statement})
    confirmed = admin.status().confirmed_lsn if not status.slot_exists else status.confirmed_lsn
    return AnchorState(
        epoch=known.epoch + 1 if known is not None else 1,
        system_id=identity.system_id,
        timeline=identity.timeline,
        database=identity.database,
        slot=config.slot,
        mode=config.confirm_after,
        may_confirm_lsn=confirmed,
    )


def _check_history(config: SourceConfig, identity: SourceIdentity, known: AnchorState) -> None:
    if (identity.system_id, identity.database) != (known.system_id, known.database):
        raise SourceRefused(
            f"source {config.name}: the lake holds database {known.database!r} of server {known.system_id},"
            f" but the dsn leads to database {identity.database!r} of server {identity.system_id}",
            hint=f"correct the dsn; if this server is to take its place: {ANEW}",
        )
    if config.slot != known.slot:
        raise SourceRefused(
            f"source {config.name}: the lake was filled from slot {known.slot!r},"
            f" the configuration names {config.slot!r}",
            hint=f"set `slot` back; to go on with another slot: {ANEW}",
        )


def _check_slot(config: SourceConfig, status: SourceStatus, known: AnchorState) -> None:
    name, slot = config.name, config.slot
    if not status.slot_exists:
        raise SlotLost(
            f"source {name}: replication slot {slot!r} is gone; what was committed since is lost to it", hint=ANEW
        )
    if status.wal_status == "lost":
        raise SlotLost(
            f"source {name}: the server has removed WAL that slot {slot!r} needs (wal_status lost)",
            hint=f"{ANEW}; raise max_slot_wal_keep_size so that it does not happen again",
        )
    if status.head_lsn < known.may_confirm_lsn:
        raise SlotLost(
            f"source {name}: the server is behind what the lake holds; it was restored from a backup,"
            " or a standby without the last changes was promoted",
            hint=ANEW,
        )
    if known.mode == "landed" and status.confirmed_lsn > known.may_confirm_lsn:
        raise SlotLost(
            f"source {name}: slot {slot!r} was moved ahead by someone else; the changes in between are lost to it",
            hint=ANEW,
        )


def _place_log(config: SourceConfig, status: SourceStatus, state: AnchorState, event_log: EventLog) -> None:
    """Give the log a position where it has none of this epoch; refuse one that the slot has left behind."""
    position = event_log.position(config.name)
    confirmed = status.confirmed_lsn
    if position is None or position.epoch < state.epoch:
        if position is None and state.mode == "log" and confirmed > 0 and state.may_confirm_lsn < confirmed:
            raise SlotLost(
                f"source {config.name}: the event log is gone, and with confirm_after = 'log' the server has forgotten"
                " what was in it",
                hint=f"bring back state_dir; if it is lost: {ANEW}",
            )
        # The server sends every commit record from `confirmed` on, so nothing at or above it may count as logged.
        event_log.set_position(config.name, Boundary(state.epoch, confirmed - 1, confirmed))
    elif position.end_lsn < confirmed:
        raise SourceRefused(
            f"source {config.name}: state_dir is older than what the server has been told to forget",
            hint="with confirm_after = 'landed', move state_dir away and start again: the lake has everything"
            if state.mode == "landed"
            else f"bring back the newest state_dir; if it is lost: {ANEW}",
        )
