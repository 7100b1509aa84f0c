"""Adoption: an operator says that another server is the continuation of the one that the lake was filled from.

For `pg_upgrade`, which from 17 on carries logical slots over: the new server has another system identifier, and
positions that lie behind all of the old one's. What can be checked is: database, slot, that the slot stands neither
before what we hold nor beyond the server's head. That nothing was written to either server between the slot's place on
the old one and its place on the new one cannot be checked: pg_upgrade refuses to run unless the slots have been read
to the end, and the operator vouches for it. It only writes the anchor; the next start goes on by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cdc.config import SourceConfig
from cdc.console import lsn_text
from cdc.errors import SlotLost, SourceRefused
from cdc.lake.anchor import Anchor, AnchorState
from cdc.lake.changelog import ChangelogTable
from cdc.lake.layout import tables_in
from cdc.origin import anew
from cdc.ports import ObjectStore, SourceIdentity, SourceStatus
from cdc.table import TableId


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """What adopting a server comes to. `read_anew`: tables that are others here, and are snapshotted again; `missing`:
    tables that the lake holds and the server does not publish. `is_known`: it is the lake's server already."""

    is_known: bool
    held_lsn: int
    at_lsn: int
    read_anew: tuple[TableId, ...] = ()
    missing: tuple[TableId, ...] = ()


def examine(
    config: SourceConfig,
    identity: SourceIdentity,
    status: SourceStatus,
    oids: Mapping[TableId, int],
    anchor: Anchor,
    store: ObjectStore,
    *,
    logged_lsn: int | None,
) -> Adoption:
    """What adopting this server would come to; changes nothing. `oids`: of the tables that it publishes. `logged_lsn`:
    how far the local log reaches, None if there is none. SourceRefused or SlotLost if this server cannot be the
    continuation, with the situation."""
    known = anchor.load()
    if known is None or not known.slot:
        raise SourceRefused(
            f"source {config.name}: the lake belongs to no server", hint="start the daemon: it begins with this one"
        )
    if (identity.system_id, identity.database) == (known.system_id, known.database):
        return Adoption(is_known=True, held_lsn=known.may_confirm_lsn, at_lsn=status.confirmed_lsn)
    if identity.database != known.database and identity.system_id != known.system_id:
        raise SourceRefused(
            f"source {config.name}: the lake holds database {known.database!r}, the dsn leads to database"
            f" {identity.database!r} of another server",
            hint="correct the dsn: pg_upgrade keeps the names of databases",
        )
    held = _held(config, known, logged_lsn)
    _check_slot(config, known, status, held)
    in_lake = [t for t in tables_in(store, config.name) if ChangelogTable(store, config.name, t).exists()]
    return Adoption(
        is_known=False,
        held_lsn=held,
        at_lsn=status.confirmed_lsn,
        missing=tuple(t for t in in_lake if t not in oids),
        read_anew=tuple(
            t
            for t in in_lake
            if t in oids and not ChangelogTable(store, config.name, t).tokens().complete(known.epoch, oids[t])
        ),
    )


def adopt(identity: SourceIdentity, anchor: Anchor, adoption: Adoption) -> AnchorState:
    """Write what `examine` found into the lake's anchor. Durable on return; a second time changes nothing."""

    def adopted(known: AnchorState) -> AnchorState:
        # Where the log may hold what has not landed, a lost log must still be known as a loss.
        landed = max(known.may_confirm_lsn, adoption.at_lsn) if known.mode == "landed" else known.may_confirm_lsn
        return replace(
            known,
            system_id=identity.system_id,
            timeline=identity.timeline,
            database=identity.database,
            may_confirm_lsn=landed,
            adopted_from_lsn=adoption.held_lsn,
            adopted_at_lsn=adoption.at_lsn,
        )

    return anchor.change(adopted)


def _held(config: SourceConfig, known: AnchorState, logged_lsn: int | None) -> int:
    """Up to where log or lake hold the old server, for sure."""
    if logged_lsn is not None:
        return logged_lsn
    if known.mode == "log":
        raise SourceRefused(
            f"source {config.name}: with confirm_after = 'log' the event log tells how far we are, and state_dir has"
            " none",
            hint=f"bring back state_dir; if it is lost: {anew(config.name)}",
        )
    return known.may_confirm_lsn


def _check_slot(config: SourceConfig, known: AnchorState, status: SourceStatus, held: int) -> None:
    name, slot = config.name, config.slot
    if not status.slot_exists:
        raise SlotLost(
            f"source {name}: this server has no replication slot {slot!r}",
            hint=f"pg_upgrade carries slots over from Postgres 17 on; without one: {anew(name)}",
        )
    if status.slot_fault:
        raise SlotLost(
            f"source {name}: slot {slot!r} of this server cannot be read: {status.slot_fault}", hint=anew(name)
        )
    least = max(held, known.may_confirm_lsn)
    if not least <= status.confirmed_lsn <= status.head_lsn:
        raise SlotLost(
            f"source {name}: slot {slot!r} of this server stands at {lsn_text(status.confirmed_lsn)}, and not between"
            f" {lsn_text(least)}, up to where we hold the server before it, and this server's head"
            f" {lsn_text(status.head_lsn)}: it is no continuation",
            hint=f"the server that pg_upgrade made goes on behind the old one; any other one: {anew(name)}",
        )
