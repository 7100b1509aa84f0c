"""Which transactions the log holds: the index behind rule 1 of snapshots (a snapshot must see all of them).

Packed 32-bit ids in groups, appended in the log's own transaction, kept in memory as well. It reaches back as far as it
was not pruned; should it outgrow its bound, the oldest ids are forgotten and remembered as *unknown*, so the answer can
become "wait", never a wrong "go on". Ids are widened by the snapshot that asks, so fewer than 2^31 transactions may
pass between two prunes: prune with the server's oldest xmin every few minutes.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cdc.errors import CdcError
from cdc.ports import Visibility
from cdc.state import State

log = logging.getLogger(__name__)

IDS_MAX = 1 << 24
"""Ids of one source that are kept: 64 MB."""
_PIECE = 1 << 18
"""Ids widened at once: a few MB of temporary memory."""
_GROUPS_MAX = 256
"""So many groups are packed into few when pruned."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Transactions whose commits stand at or behind `first_lsn`."""

    first_lsn: int
    ids: np.ndarray


class XidIndex:
    """Logged transaction ids per source; thread-safe. Writing methods are called under the log's lock."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._groups: dict[str, list[_Group]] = {}
        self._counts: dict[str, int] = {}

    def add(self, tx: sqlite3.Connection, source: str, xids: np.ndarray, lsns: np.ndarray) -> None:
        """Store ids and their commit LSNs with the transaction `tx`; call `added` once it is durable."""
        self._load(source)
        _insert(tx, source, [_group(xids, lsns)])

    def added(self, source: str, xids: np.ndarray, lsns: np.ndarray) -> None:
        """The ids of `add` are durable."""
        with self._lock:
            self._groups[source].append(_group(xids, lsns))
            self._counts[source] += len(xids)
            too_many = self._counts[source] > IDS_MAX
        if too_many:
            try:
                self._forget_oldest(source)
            except CdcError as error:
                # The append is durable already; the bound can wait for the next one.
                log.warning("could not shorten the index of transaction ids", extra={"reason": str(error)})

    def hidden(self, source: str, visibility: Visibility, through_lsn: int | None) -> bool:
        """Whether a transaction logged up to `through_lsn` (None: any) is, or may be, one that the snapshot does not
        see. Exact for ids that were never packed; packed ones may count although they stand behind `through_lsn`."""
        self._load(source)
        floor = self._state.get(_floor_fact(source))
        if floor is not None and not bool(_older(np.array([floor], np.uint32), visibility.xmin)[0]):
            return True
        with self._lock:
            groups = [g for g in self._groups[source] if through_lsn is None or g.first_lsn <= through_lsn]
        return any(not bool(visibility.sees(ids).all()) for ids in _pieces([g.ids for g in groups]))

    def prune(self, source: str, oldest_xmin: int) -> int:
        """Forget ids below the oldest xmin that a snapshot still open or to come can have; how many."""
        self._load(source)
        with self._lock:
            groups = list(self._groups[source])
        kept = [_Group(g.first_lsn, g.ids[~_older(g.ids, oldest_xmin)]) for g in groups]
        kept = [g for g in kept if len(g.ids)]
        gone = sum(len(g.ids) for g in groups) - sum(len(g.ids) for g in kept)
        floor = self._state.get(_floor_fact(source))
        floor_passed = floor is not None and bool(_older(np.array([floor], np.uint32), oldest_xmin)[0])
        if gone or floor_passed or len(groups) > _GROUPS_MAX:
            self._replace(source, _packed(kept), None if floor_passed else floor)
        return gone

    def clear(self, tx: sqlite3.Connection, source: str) -> None:
        """Forget a source's ids with the transaction `tx` (another server's history); call `cleared` once durable."""
        tx.execute("delete from xids where source = ?", (source,))
        self._state.set(_floor_fact(source), None, tx)

    def cleared(self, source: str) -> None:
        """The change of `clear` is durable."""
        with self._lock:
            self._groups[source] = []
            self._counts[source] = 0

    def count(self, source: str) -> int:
        """Ids that are kept."""
        self._load(source)
        return self._counts[source]

    def _forget_oldest(self, source: str) -> None:
        """Halve the index; the newest forgotten id is the floor below which nothing is known."""
        with self._lock:
            groups = list(self._groups[source])
        kept: list[_Group] = []
        size = 0
        while groups and size + len(groups[-1].ids) <= IDS_MAX // 2:
            kept.append(groups.pop())
            size += len(kept[-1].ids)
        gone = np.concatenate([g.ids for g in groups])
        # Newest in circular order: the id that is least behind the last one.
        ahead = (gone.astype(np.int64) - int(gone[-1]) + (1 << 31)) % (1 << 32) - (1 << 31)
        self._replace(source, kept[::-1], int(gone[int(np.argmax(ahead))]))

    def _replace(self, source: str, groups: list[_Group], floor: int | None) -> None:
        with self._state.transaction() as tx:
            tx.execute("delete from xids where source = ?", (source,))
            _insert(tx, source, groups)
            self._state.set(_floor_fact(source), floor, tx)
        with self._lock:
            self._groups[source] = groups
            self._counts[source] = sum(len(g.ids) for g in groups)

    def _load(self, source: str) -> None:
        """Read a source's ids once; a process that only reads does so every time."""
        with self._lock:
            if source in self._groups and not self._state.readonly:
                return
        rows = self._state.query("select first_lsn, xids from xids where source = ? order by id", (source,))
        loaded = [_Group(first_lsn, np.frombuffer(packed, dtype="<u4")) for first_lsn, packed in rows]
        with self._lock:
            if source not in self._groups or self._state.readonly:
                self._groups[source] = loaded
                self._counts[source] = sum(len(g.ids) for g in loaded)


def _group(xids: np.ndarray, lsns: np.ndarray) -> _Group:
    return _Group(int(lsns.min()), np.array(xids, dtype="<u4"))


def _packed(groups: Sequence[_Group]) -> list[_Group]:
    """The same ids in few groups: the older half is joined, so that the newest keep their own position."""
    if len(groups) <= _GROUPS_MAX:
        return list(groups)
    old, new = groups[: -_GROUPS_MAX // 2], groups[-_GROUPS_MAX // 2 :]
    return [_Group(min(g.first_lsn for g in old), np.concatenate([g.ids for g in old])), *new]


def _insert(tx: sqlite3.Connection, source: str, groups: Sequence[_Group]) -> None:
    tx.executemany(
        "insert into xids (source, first_lsn, xids) values (?, ?, ?)",
        [(source, g.first_lsn, g.ids.tobytes()) for g in groups],
    )


def _pieces(parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Many small arrays as a few of bounded size."""
    waiting: list[np.ndarray] = []
    size = 0
    for part in parts:
        waiting.append(part)
        size += len(part)
        if size >= _PIECE:
            yield from np.array_split(np.concatenate(waiting), -(-size // _PIECE))
            waiting, size = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _older(xids: np.ndarray, xid: int) -> np.ndarray:
    """Mask of the ids that are below a 64-bit id."""
    return Visibility(xmin=xid, xmax=xid, in_progress=frozenset()).sees(xids)


def _floor_fact(source: str) -> str:
    return f"xid_floor/{source}"
