"""Which columns a Relation message means: it has names and types, no attnums, and the catalog may be newer. Pure.

What holds for sure: a message has its columns in the order of their attnums; an attnum is never used again; a column
of a message is in the catalog still, under whatever name and type, or its attnum is marked as dropped there; what
was dropped before the version that the stream showed last is in no later message; what that version and the catalog
both have is in every message between them; and what the message lacks of the catalog's columns was made after it.
Often only one assignment is left. Where more are, because two columns lived one after the other, messages
alone do not tell which is meant: the catalog's newest columns are taken, and it is said (`doubtful`), so that the table
is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from cdc.table import Column

STATES_MAX = 200_000
"""Beyond it (very many columns were dropped) assignments are not counted, and a message is doubtful."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """The columns of a message, and whether some of them may be others."""

    columns: tuple[Column, ...]
    doubtful: bool


def resolve(
    sent: Sequence[Column],
    live: Sequence[Column],
    dropped: Collection[int],
    base: Sequence[Column] | None,
    known: Sequence[Sequence[Column]] = (),
    *,
    whole: bool = True,
) -> Resolved:
    """Columns of a message (`sent`: as it has them, attnum 0).

    `live`: the catalog's columns, `dropped`: attnums that are gone, `base`: the version that the stream showed last
    (None: not known), `known`: all versions, newest first. `whole`: no column list or generated column leaves any out.
    A column that has another name or type by now is as the message has it; one that nothing knows has a number below 0.
    """
    shapes = [_shape(c) for c in sent]
    places = _Places(sent, live, dropped, base or ())
    if whole and places.states <= STATES_MAX:
        certain = places.only(places.any_type)
        if certain is not None:
            return Resolved(_placed(sent, certain, live), doubtful=False)
    listed = live if whole else [c for c in live if c.name in {s.name for s in sent}]
    for version in (listed, *known):
        if [_shape(c) for c in version] == shapes:
            # With a list of columns, what was shown before under these names is taken for the same.
            same = base is not None and {c.attnum for c in version} == {c.attnum for c in base}
            return Resolved(tuple(version), doubtful=whole or not same)
    likely = places.only(places.has_type) if whole and places.states <= STATES_MAX else None
    if likely is not None:
        return Resolved(_placed(sent, likely, live), doubtful=True)
    return Resolved(_nearest(sent, [live, *known]), doubtful=True)


class _Places:
    """The assignments of a message's columns to attnums."""

    def __init__(
        self, sent: Sequence[Column], live: Sequence[Column], dropped: Collection[int], base: Sequence[Column]
    ) -> None:
        self._sent = sent
        self._live = {c.attnum: c for c in live}
        self._base = {c.attnum: c for c in base}
        newest = max(self._base, default=0)
        gone = {n for n in dropped if n in self._base or n > newest}
        self._slots = sorted(gone | self._live.keys())
        self.states = len(self._slots) * (len(gone) + 2)

    def has_type(self, place: int, slot: int) -> bool:
        """Whether the column of a place may be that of a slot if no type was changed."""
        now, was = self._live.get(slot), self._base.get(slot)
        kinds = {(c.type_oid, c.typmod) for c in (now, was) if c is not None}
        return not kinds or (self._sent[place].type_oid, self._sent[place].typmod) in kinds

    def any_type(self, place: int, slot: int) -> bool:
        """The same if types may have been changed."""
        return True

    def only(self, plausible: Callable[[int, int], bool]) -> list[int] | None:
        """The one assignment; None if there is none, or more than one."""
        slots, k = self._slots, len(self._sent)
        # ways[i][j]: in how many ways the slots from i on can take the columns from j on.
        ways: list[dict[int, int]] = [{} for _ in range(len(slots) + 1)]
        ways[len(slots)] = {k: 1}
        for i in range(len(slots) - 1, -1, -1):
            slot, behind = slots[i], ways[i + 1]
            for j in range(max(0, k - (len(slots) - i)), min(i, k) + 1):
                n = behind.get(j + 1, 0) if j < k and plausible(j, slot) else 0
                if self._may_lack(slot, j == k):
                    n += behind.get(j, 0)
                if n:
                    ways[i][j] = min(n, 2)
        if ways[0].get(0, 0) != 1:
            return None
        found: list[int] = []
        for i, slot in enumerate(slots):
            j = len(found)
            if j < k and plausible(j, slot) and ways[i + 1].get(j + 1):
                found.append(slot)
        return found

    def _may_lack(self, slot: int, ended: bool) -> bool:
        """Whether a message may be without a slot; `ended`: all its columns stand before it."""
        if slot not in self._live:
            return True
        return ended and slot not in self._base


def _placed(sent: Sequence[Column], slots: Sequence[int], live: Sequence[Column]) -> tuple[Column, ...]:
    """Columns with their attnums; facts of the catalog where the type is as there."""
    now = {c.attnum: c for c in live}
    found: list[Column] = []
    for column, slot in zip(sent, slots, strict=True):
        there = now.get(slot)
        if there is not None and _shape(there)[1:] == _shape(column)[1:]:
            found.append(replace(there, name=column.name))
        else:
            found.append(replace(column, attnum=slot))
    return tuple(found)


def _nearest(sent: Sequence[Column], candidates: Sequence[Sequence[Column]]) -> tuple[Column, ...]:
    """Columns one by one, from the last: the newest that has the name and type and keeps the order."""
    found: list[Column] = []
    below = 1 << 16
    for column in reversed(sent):
        same = [c for columns in candidates for c in columns if _shape(c) == _shape(column) and 0 < c.attnum < below]
        best = max(same, key=lambda c: c.attnum, default=_unknown(column))
        below = best.attnum if best.attnum > 0 else below
        found.append(best)
    return tuple(reversed(found))


def _unknown(column: Column) -> Column:
    """A column that neither the catalog nor a version knows; the number is its name's, so it stays the same."""
    digest = 0
    for byte in f"{column.name}/{column.type_oid}/{column.typmod}".encode():
        digest = (digest * 31 + byte) % (1 << 30)
    return replace(column, attnum=-1 - digest)


def _shape(column: Column) -> tuple[str, int, int]:
    return column.name, column.type_oid, column.typmod
