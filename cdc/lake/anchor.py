"""The anchor: one small object per source that says which history the lake belongs to, and how far it may be confirmed.

A daemon on an empty disk learns from it which server, timeline, slot and epoch the lake holds, in which mode it was
kept, and up to which position the slot may have been confirmed. It is written before the slot is confirmed beyond that
position, so a slot that stands beyond it was moved by someone else: something was lost, and the start says so.

Written by conditional PUT: two writers cannot both believe that theirs stands. It never goes back within an epoch.
It does not decide anything; cdc.origin and cdc.capture do.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

from cdc.errors import FormatTooNew, InvariantBroken
from cdc.lake.document import Document
from cdc.lake.layout import anchor_key
from cdc.ports import ObjectStore
from cdc.table import TableId

FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorState:
    """What the anchor says. `mode` is `landed`, `log` or `snapshot`; `may_confirm_lsn` is an end LSN."""

    epoch: int
    system_id: str
    timeline: int
    database: str
    slot: str
    """Empty: it was given up, and the next start begins a new epoch with a slot made anew."""
    mode: str
    may_confirm_lsn: int
    needs_resync: tuple[str, ...] = ()
    """Tables whose changes were let go (`schema.name`): what the lake holds of them is not whole until a resync."""
    places: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Where tables' rows landed last: the lake's place (cdc.places), and the table's OID (0: unknown in this history).
    Of tables that have stood in `[lake]` ever since, nothing is noted before another lake is configured."""
    why: str = ""
    """Why this epoch began, or why the slot was given up."""
    adopted_from_lsn: int = 0
    """End LSN up to which the lake (or the log) held the server before this one, where an operator adopted another."""
    adopted_at_lsn: int = 0
    """Where the adopted server goes on: between the two there is nothing."""
    format: int = FORMAT


class Anchor:
    """The anchor of one source. Every call reads or writes the store; thread-safe."""

    def __init__(self, store: ObjectStore, source: str) -> None:
        self._key = anchor_key(source)
        self._document = Document(store, self._key)
        self._state: AnchorState | None = None
        self._marked_at: dict[str, int] = {}
        self._lock = threading.RLock()

    @property
    def state(self) -> AnchorState | None:
        """What was last read or written; None before, or if there is no anchor."""
        return self._state

    def load(self) -> AnchorState | None:
        """Read the anchor; None if the lake has none. FormatTooNew if a newer release wrote it."""
        with self._lock:
            found = self._document.read()
            self._state = None if found is None else _parse(found, self._key)
            return self._state

    def save(self, state: AnchorState) -> None:
        """Replace what was last read or written here; durable on return.

        StoreConflict if another writer was faster (`load` shows it), StoreUnavailable if it may or may not have
        happened; InvariantBroken if the epoch, or the position within the epoch, would go back.
        """
        with self._lock:
            old = self._state
            if old is not None and (state.epoch, state.may_confirm_lsn) < (old.epoch, old.may_confirm_lsn):
                raise InvariantBroken(
                    f"{self._key} would go back from epoch {old.epoch}, position {old.may_confirm_lsn:X} "
                    f"to epoch {state.epoch}, position {state.may_confirm_lsn:X}"
                )
            self._document.write(json.dumps(asdict(state), indent=1).encode())
            self._state = state

    def change(self, to: Callable[[AnchorState], AnchorState]) -> AnchorState:
        """Save what `to` makes of what was last read or written here, if it is something else; what stands then. No
        other thread's change comes in between. Errors as `save`; InvariantBroken if there is no anchor."""
        with self._lock:
            if self._state is None:
                raise InvariantBroken(f"{self._key} does not exist yet")
            state = to(self._state)
            if state != self._state:
                self.save(state)
            return state

    def mark(self, tables: Iterable[TableId], needs: bool) -> None:
        """Note that tables need a resync, or no longer do; durable on return. Before there is an anchor nothing needs
        to be said: no snapshot is complete."""
        names = {str(t) for t in tables}

        def marked(known: AnchorState) -> AnchorState:
            marks = set(known.needs_resync) | names if needs else set(known.needs_resync) - names
            return replace(known, needs_resync=tuple(sorted(marks)))

        if self._state is None or not names:
            return
        if needs:
            self._marked_at.update(dict.fromkeys(names, time.time_ns() // 1000))
        self.change(marked)

    def marks(self) -> dict[str, int]:
        """Tables that need a resync, and since when (Unix µs; 0: since before this process)."""
        known = self._state
        return {t: self._marked_at.get(t, 0) for t in known.needs_resync} if known is not None else {}


def places_kept(known: AnchorState | None) -> dict[str, tuple[str, int]]:
    """The places of tables when a new history begins, whose server may have given other tables these OIDs."""
    return {table: (place, 0) for table, (place, _) in known.places.items()} if known is not None else {}


def _parse(data: bytes, key: str) -> AnchorState:
    values: dict[str, Any] = json.loads(data)
    if int(values.get("format", 0)) > FORMAT:
        raise FormatTooNew(f"{key} has format {values['format']}, this release knows {FORMAT}", hint="upgrade cdc")
    known = {f.name: values[f.name] for f in fields(AnchorState) if f.name in values}
    places = {table: (place, oid) for table, (place, oid) in known.get("places", {}).items()}
    return AnchorState(**{**known, "needs_resync": tuple(known.get("needs_resync", ())), "places": places})
