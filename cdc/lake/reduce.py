"""Reduction of many changes to one final action per key, as array arithmetic: the pure core of a merge.

Events of one key are replayed *in order*, as if one by one, whatever order they arrived in. The row that the target
holds for a key is an event like the others, with the order that it was written at, so an older change can never undo a
newer row. A row that lacks values (unchanged TOAST, columns newer than its schema version) takes them from its parent:
the state that its key, or the key that it moved from, had just before it; parents are followed by pointer doubling,
so key changes, chains and swaps of keys need no loop over rows.

Does not read or write anything, and knows nothing of columns but their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

CLEAR, SET = 0, 1
KNOWN, UNCHANGED, ABSENT = 0, 1, 2
"""State of a cell in an event: carried; not carried because unchanged; its schema version had no such column."""

MISSING = -1
"""Source of a cell of a new row whose schema version had no such column: the column's missing value."""
UNRESOLVED = -2
"""Source of a cell that was not carried and that nothing before it knows."""


class Order(NamedTuple):
    """Place of one change in its table's history."""

    epoch: int
    lsn: int
    seq: int


class Barrier(NamedTuple):
    """At `at`, every row older than `threshold` goes away: a truncate (threshold = at), or the end of a run that read
    the whole table (threshold = its begin row: whatever it did not meet is an orphan)."""

    at: Order
    threshold: Order


@dataclass(frozen=True, slots=True)
class Orders:
    """Orders of many events, as columns."""

    epoch: np.ndarray
    lsn: np.ndarray
    seq: np.ndarray

    def __len__(self) -> int:
        return len(self.epoch)

    def take(self, index: np.ndarray) -> Orders:
        return Orders(self.epoch[index], self.lsn[index], self.seq[index])

    def older_than(self, other: Order | Orders) -> np.ndarray:
        """Mask of the events that stand before `other` (one order, or one per event)."""
        less_seq = (self.lsn < other.lsn) | ((self.lsn == other.lsn) & (self.seq < other.seq))
        return np.asarray((self.epoch < other.epoch) | ((self.epoch == other.epoch) & less_seq))

    @staticmethod
    def concat(parts: Sequence[Orders]) -> Orders:
        return Orders(
            np.concatenate([p.epoch for p in parts]),
            np.concatenate([p.lsn for p in parts]),
            np.concatenate([p.seq for p in parts]),
        )


@dataclass(frozen=True, slots=True)
class Events:
    """Changes of some keys, in any order. `moved_from` holds the old key of a SET that changed its key (else null):
    such an event also clears the old key. `pattern` indexes the rows of the knowledge matrix given to `reduce`."""

    keys: pa.Array
    kind: np.ndarray
    orders: Orders
    pattern: np.ndarray
    moved_from: pa.Array | None = None


@dataclass(frozen=True, slots=True)
class Targets:
    """Rows that the target holds for the events' keys (each key at most once); they know every column."""

    keys: pa.Array
    orders: Orders


@dataclass(frozen=True, slots=True)
class Reduced:
    """The final actions.

    `upserts`: event index of each row to write, ascending. `sources`: for the columns where it differs from
    `upserts`, per row to write the index of the event that gives the cell; indexes from `len(events)` on are
    target rows; or MISSING, UNRESOLVED. `dropped`: mask of the target rows that go (deleted or replaced).
    `unresolved`: positions in `upserts`. `cleared`: entries (key, order) that end without a row, for passing on.
    """

    upserts: np.ndarray
    sources: dict[int, np.ndarray]
    dropped: np.ndarray
    deleted: int
    unresolved: np.ndarray
    cleared_keys: pa.Array
    cleared_orders: Orders


def barriers_in_order(barriers: Sequence[Barrier]) -> list[Barrier]:
    """Sorted, each with the highest threshold so far; what no longer matters is left out."""
    out: list[Barrier] = []
    for barrier in sorted(barriers):
        if out and barrier.threshold <= out[-1].threshold:
            continue
        out.append(barrier)
    return out


def final_threshold(barriers: Sequence[Barrier]) -> Order | None:
    """Rows older than this do not survive the barriers."""
    return max((b.threshold for b in barriers), default=None)


def reduce(events: Events, targets: Targets, patterns: np.ndarray, barriers: Sequence[Barrier] = ()) -> Reduced:
    """Replay `events` over `targets`. `patterns` is a matrix (pattern × column) of KNOWN, UNCHANGED, ABSENT; pattern 0
    must know every column. `targets` must hold every existing row of the events' keys, old keys included. Pure."""
    n, m = len(events.kind), len(targets.keys)
    orders = Orders.concat([events.orders, targets.orders])
    entries = _Entries.build(events, targets, orders)
    before = entries.before()
    limits = _Limits(barriers)
    parent = _parents(entries, before, n, m, orders, limits)

    last = entries.last_of_key()
    final_node, final_sub = entries.node[last], entries.sub[last]
    alive = final_sub == _SUB_SET
    if limits.final is not None:
        alive &= ~orders.take(final_node).older_than(limits.final)
    ended = ~alive & (final_sub != _SUB_TARGET)
    upserts = np.sort(final_node[alive])

    dropped = np.ones(m, np.bool_)
    dropped[final_node[final_sub == _SUB_TARGET] - n] = False
    written = np.zeros(entries.codes_n, np.bool_)
    written[entries.code[last[alive]]] = True
    deleted = int(np.count_nonzero(dropped & ~written[entries.target_codes]))

    sources, unresolved = _sources(events, patterns, parent, upserts, m)
    gone = last[ended]
    return Reduced(
        upserts=upserts,
        sources=sources,
        dropped=dropped,
        deleted=deleted,
        unresolved=unresolved,
        cleared_keys=entries.dictionary.take(pa.array(entries.code[gone])),
        cleared_orders=orders.take(entries.node[gone]),
    )


_SUB_CLEAR, _SUB_SET, _SUB_TARGET = 0, 1, 2
"""What an entry does to its key, and which comes first where orders are equal."""


@dataclass(frozen=True, slots=True)
class _Entries:
    """What happens to each key, sorted by (key, order): events, the clearing halves of moves, and target rows."""

    code: np.ndarray
    node: np.ndarray
    sub: np.ndarray
    from_move: np.ndarray
    codes_n: int
    target_codes: np.ndarray
    dictionary: pa.Array

    @staticmethod
    def build(events: Events, targets: Targets, orders: Orders) -> _Entries:
        n, m = len(events.kind), len(targets.keys)
        moved = np.empty(0, np.int64)
        parts = [events.keys, targets.keys]
        if events.moved_from is not None and events.moved_from.null_count < n:
            moved = np.flatnonzero(events.moved_from.is_valid().to_numpy(zero_copy_only=False))
            parts.append(events.moved_from.take(pa.array(moved)))
        encoded = pa.chunked_array(parts).combine_chunks()
        encoded = encoded.dictionary_encode()
        code = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        node = np.concatenate([np.arange(n + m), moved])
        sub = np.concatenate(
            [
                np.where(events.kind == SET, _SUB_SET, _SUB_CLEAR).astype(np.int8),
                np.full(m, _SUB_TARGET, np.int8),
                np.full(len(moved), _SUB_CLEAR, np.int8),
            ]
        )
        from_move = np.zeros(len(node), np.bool_)
        from_move[n + m :] = True
        by = np.lexsort((sub, orders.seq[node], orders.lsn[node], orders.epoch[node], code))
        return _Entries(
            code[by], node[by], sub[by], from_move[by], len(encoded.dictionary), code[n : n + m], encoded.dictionary
        )

    def before(self) -> np.ndarray:
        """Entry just before each entry of the same key, -1 if there is none."""
        index = np.arange(len(self.code)) - 1
        if len(index):
            index[np.flatnonzero(np.diff(self.code)) + 1] = -1
        return index

    def last_of_key(self) -> np.ndarray:
        """The last entry of each key."""
        if not len(self.code):
            return np.empty(0, np.int64)
        return np.append(np.flatnonzero(np.diff(self.code)), len(self.code) - 1)


class _Limits:
    """The barriers, ready to be asked for many events at once."""

    def __init__(self, barriers: Sequence[Barrier]) -> None:
        self._barriers = barriers_in_order(barriers)
        self.final = final_threshold(self._barriers)

    def cut(self, older: Orders, newer: Orders) -> np.ndarray:
        """Mask: a barrier that stands before `newer` has removed the row written at `older`."""
        out = np.zeros(len(older), np.bool_)
        for barrier in self._barriers:
            passed = ~newer.older_than(barrier.at)
            out |= passed & older.older_than(barrier.threshold)
        return out


def _parents(entries: _Entries, before: np.ndarray, n: int, m: int, orders: Orders, limits: _Limits) -> np.ndarray:
    """Node whose row each SET event changes; -1 if it makes a new row (or for anything else)."""
    parent = np.full(n + m, -1, np.int64)
    own = (entries.sub == _SUB_SET) & (before >= 0)
    moves = entries.from_move
    parent[entries.node[own]] = before[own]
    parent[entries.node[moves]] = before[moves]
    has = np.flatnonzero(parent >= 0)
    entry = parent[has]
    node = entries.node[entry]
    node[entries.sub[entry] == _SUB_CLEAR] = -1
    parent[has] = node
    has = np.flatnonzero(parent >= 0)
    if len(has):
        parent[has[limits.cut(orders.take(parent[has]), orders.take(has))]] = -1
    return parent


def _sources(
    events: Events, patterns: np.ndarray, parent: np.ndarray, upserts: np.ndarray, targets_n: int
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Where each cell of the rows to write comes from, for the columns that some event does not carry."""
    sources: dict[int, np.ndarray] = {}
    unresolved = np.zeros(len(upserts), np.bool_)
    by_states: dict[bytes, np.ndarray] = {}
    for column in range(patterns.shape[1]):
        states = patterns[:, column]
        if not states.any():
            continue
        name = states.tobytes()
        if name not in by_states:
            by_states[name] = _follow(states, events.pattern, parent, upserts, targets_n)
            unresolved |= by_states[name] == UNRESOLVED
        sources[column] = by_states[name]
    return sources, np.flatnonzero(unresolved)


def _follow(
    states: np.ndarray, pattern: np.ndarray, parent: np.ndarray, upserts: np.ndarray, targets_n: int
) -> np.ndarray:
    state = np.concatenate([states[pattern], np.full(targets_n, KNOWN, states.dtype)])
    jump = np.where((state == KNOWN) | (parent < 0), np.arange(len(parent)), parent)
    while True:
        further = jump[jump]
        if np.array_equal(further, jump):
            break
        jump = further
    out = jump[upserts]
    found = state[out]
    out[found == ABSENT] = MISSING
    out[found == UNCHANGED] = UNRESOLVED
    return np.asarray(out)
