"""Where the history of a periodically compared source stands, decided before its first run: epoch and position.

Less can break off here than with a stream, because each run compares with what the lake holds, and not with what was
read last: whatever happened at the source meanwhile is found. Two things are refused or begin a new epoch all the same.
Another server or database than the lake was filled from is refused: a dsn that leads elsewhere by mistake would replace
every row. And where the server's position went back (restored from a backup), or `cdc teardown` gave the history up,
the epoch is raised, so that positions stay in order; tables need not be read anew for that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from cdc.batch import Boundary
from cdc.config import SourceConfig
from cdc.console import lsn_text
from cdc.errors import SourceRefused
from cdc.lake.anchor import Anchor, AnchorState, places_kept
from cdc.lake.changelog import ChangelogTable
from cdc.lake.layout import tables_in
from cdc.log import EventLog
from cdc.origin import epoch_before
from cdc.ports import ObjectStore, SourceIdentity
from cdc.schema import SchemaBook
from cdc.state import State

log = logging.getLogger(__name__)

NO_SLOT = "(none)"
"""Where the anchor names the slot of a stream."""
MODE = "snapshot"
SLACK_BYTES = 1 << 24
"""A run that found changes while the server stood still has a position a little ahead of the server's."""


@dataclass(frozen=True, slots=True)
class Settled:
    """The anchor as it is to be kept from here on. `doubtful_lsn`: a run at this position may have landed in part only
    (0: none), because the disk that held the rest is gone."""

    anchor: AnchorState
    doubtful_lsn: int


def settle_periodic(
    config: SourceConfig,
    identity: SourceIdentity,
    anchor: Anchor,
    event_log: EventLog,
    *,
    landed_lsn: Callable[[int], int],
    landed_epoch: Callable[[], int] = lambda: -1,
    still: Callable[[], None] = lambda: None,
) -> Settled:
    """The log has a position when this returns, and no part of a run that did not end. Durable on return.

    `landed_lsn` gives the highest position that the lake holds of an epoch; it is asked only when the log cannot tell.
    `landed_epoch` gives the highest epoch that the lake holds anything of; it is asked only without an anchor.
    `still` is called before a new epoch begins: once it has returned, no other part works on the source. SourceRefused
    if this is not the source that the lake was filled from."""
    known = anchor.load()
    if known is not None and known.slot:
        _check_place(config, identity, known)
        if identity.head_lsn + SLACK_BYTES >= known.may_confirm_lsn:
            state = anchor.change(lambda s: replace(s, timeline=identity.timeline))
            return _place_log(config, state, event_log, landed_lsn)
        why = (
            f"the server stands at {lsn_text(identity.head_lsn)}, behind {lsn_text(known.may_confirm_lsn)} where it was"
            " read last: it was restored from a backup"
        )
        log.warning("a new epoch begins", extra={"source": config.name, "why": why})
        known = replace(known, why=why)
    still()
    before = known.epoch if known is not None else epoch_before(landed_epoch(), event_log.position(config.name))
    state = AnchorState(
        epoch=before + 1,
        system_id=identity.system_id,
        timeline=identity.timeline,
        database=identity.database,
        slot=NO_SLOT,
        mode=MODE,
        may_confirm_lsn=identity.head_lsn,
        needs_resync=known.needs_resync if known is not None else (),
        places=places_kept(known),
        why=known.why if known is not None else "the first start",
    )
    anchor.save(state)
    return _place_log(config, state, event_log, landed_lsn)


def adopt_tables(source: str, state: State, book: SchemaBook, store: ObjectStore, epoch: int) -> None:
    """Where the local disk is new, note the tables that the lake has of the source: all that has landed of them must be
    merged before anything is compared with it. Nothing happens where tables are known."""
    if state.tables(source):
        return
    for table in tables_in(store, source):
        changelog = ChangelogTable(store, source, table)
        noted = changelog.shape()
        if noted is None or table.is_own:
            continue
        schema = book.register(replace(noted[0], version=0))
        tokens = changelog.tokens()
        whole = any(tokens.complete(e, schema.oid) for e in range(1, epoch + 1))
        state.update_table(
            source, table, oid=schema.oid, state="streaming" if whole else "new", snapshot_seq=tokens.snapshot_seq + 1
        )


def _check_place(config: SourceConfig, identity: SourceIdentity, known: AnchorState) -> None:
    name = config.name
    if known.mode != MODE:
        raise SourceRefused(
            f"source {name}: the lake was filled by a stream, the configuration says mode = {MODE!r}",
            hint=f'set mode = "stream"; or `cdc teardown {name}` with it first, which drops the slot, and start again',
        )
    if (identity.system_id, identity.database) != (known.system_id, known.database):
        raise SourceRefused(
            f"source {name}: the lake holds database {known.database!r} of server {known.system_id}, but the dsn leads"
            f" to database {identity.database!r} of server {identity.system_id}",
            hint=f"correct the dsn; if this one took the other's place, `cdc teardown {name}` and start again: the next"
            " run finds what differs",
        )


def _place_log(
    config: SourceConfig, state: AnchorState, event_log: EventLog, landed_lsn: Callable[[int], int]
) -> Settled:
    """Give the log a position where it has none of this epoch: behind everything that has landed in it."""
    position = event_log.position(config.name)
    if position is not None and position.epoch > state.epoch:
        raise SourceRefused(
            f"source {config.name}: state_dir is of epoch {position.epoch}, the lake only of epoch {state.epoch}",
            hint="check [lake] url; if the lake was set back, move state_dir away and start again",
        )
    if position is not None and position.epoch == state.epoch:
        event_log.discard_open(config.name)
        return Settled(state, 0)
    landed = landed_lsn(state.epoch)
    lsn = max(landed, state.may_confirm_lsn)
    event_log.set_position(config.name, Boundary(state.epoch, lsn, lsn))
    return Settled(state, landed if landed > state.may_confirm_lsn else 0)
