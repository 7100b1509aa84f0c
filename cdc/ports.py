"""The protocols that connectors implement, and the values that cross them.

The text of each method is the contract that the contract suites quote. A connector imports this layer of cdc, its
client library, and nothing else. Kinds are found through the entry points `cdc.sources`, `cdc.sinks`, `cdc.stores`.
Implementations raise the errors of cdc.errors only; blocking calls are bounded by the time-out that they are given
or by the connector's own connect and statement time-outs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from cdc.batch import Boundary, Portion
from cdc.fingerprint import Catalog
from cdc.rowhash import Ints, RowHash, Sums
from cdc.table import TableId, TableSchema


class Schemas(Protocol):
    """The memory of a source's schemas, which the core lends to the connector."""

    def register(self, schema: TableSchema) -> TableSchema:
        """Give a schema its durable version number; equal schemas of a table get the same number."""

    def versions(self, table: TableId) -> list[TableSchema]:
        """The versions known of a table, newest first."""

    def held(self, table: TableId) -> TableSchema | None:
        """The version that the stream showed up to where it has landed; None if it has shown none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceIdentity:
    """Facts that tell one server's history from another's."""

    system_id: str
    timeline: int
    database: str
    server_version: int
    head_lsn: int = 0
    """The server's newest position, where the identity was read without a replication connection."""
    branches: tuple[tuple[int, int], ...] = ()
    """The timelines that `timeline` descends from, oldest first, each with the LSN at which it was left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One result of a preflight check. severity: ok | info | warning | error. `fix` is the statement or setting."""

    name: str
    severity: str
    message: str
    fix: str = ""
    object: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceStatus:
    """What the server says of itself and of our slot, at one moment. LSNs are integers, 0 = unknown."""

    head_lsn: int
    slot_exists: bool
    slot_active: bool = False
    slot_active_pid: int = 0
    confirmed_lsn: int = 0
    restart_lsn: int = 0
    retained_bytes: int = 0
    wal_status: str = ""
    safe_wal_bytes: int | None = None
    slot_fault: str = ""
    """Why nobody can read the slot any more, as a sentence; empty if it can be read."""
    slot_fault_hint: str = ""
    """What keeps that from happening again."""
    slot_failover: bool = False
    """Whether the slot is kept on standbys too, so that it outlives a promotion."""
    oldest_xmin: int = 0
    """Every snapshot taken from now on sees all transactions below it (64 bit)."""
    wal_keep_bytes: int | None = None
    """The server's own limit of what a slot may retain; None: it has none."""
    wal_dir_bytes: int | None = None
    """WAL on the server's disk; None: our role may not ask."""
    active_clients: int = 0
    """Client sessions, ours left out, that run a statement now, as far as our role may see."""
    oldest_writer: str = ""
    """Who has had a writing transaction open for longest; empty if nobody has one."""
    rows_estimated: Mapping[str, int] = field(default_factory=dict)
    """Rows of tables (`schema.table`) as the server estimates them; those that it has no word of are not there."""


class Source(Protocol):
    """A stream of changes with a resume point that the server keeps for us."""

    def open(self, after: Boundary | None, schemas: Schemas, epoch: int) -> None:
        """Start streaming. Transactions with a commit LSN at or below `after.lsn` are not yielded again.

        `after` None: from where the server's slot stands. Raises SlotLost if the slot is missing or cannot serve.
        """

    def read(self, timeout_s: float) -> Portion | None:
        """The next portion, in stream order; None if nothing arrived within `timeout_s`. Keepalives are answered
        meanwhile and between calls, whatever the caller does. A quiet stream yields portions with only a boundary."""

    def confirm(self, end_lsn: int) -> None:
        """Tell the server that it may forget everything that ends at or before `end_lsn`. Never goes backwards;
        returns at once, and is sent with the next status update. Thread-safe."""

    def identity(self) -> SourceIdentity:
        """Facts of the server, from a connection of its own."""

    def close(self) -> None:
        """End the stream and its threads; idempotent, bounded to a few seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visibility:
    """What a snapshot sees: 64-bit transaction ids, as `pg_current_snapshot()` prints them."""

    xmin: int
    xmax: int
    in_progress: frozenset[int]

    def sees(self, xids: np.ndarray) -> np.ndarray:
        """Mask of the 32-bit transaction ids whose effects the snapshot sees, if they committed (bool, same length).

        The ids are widened by the epoch of `xmax`: each is taken as the 64-bit id nearest to `xmax`.
        """
        low = np.int64(self.xmax & 0xFFFFFFFF)
        delta = (xids.astype(np.int64) - low + (1 << 31)) % (1 << 32) - (1 << 31)
        wide = np.int64(self.xmax) + delta
        seen = wide < self.xmax
        if self.in_progress:
            seen &= ~np.isin(wide, np.fromiter(self.in_progress, np.int64))
        return np.asarray(seen, dtype=np.bool_)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a table is read: ranges of places, each behind (`keys`) or from (`blocks`) its first up to its second. None
    is the table's begin or end. `why` ends a sentence."""

    strategy: str
    why: str
    ranges: list[tuple[tuple[str, ...] | None, tuple[str, ...] | None]]


def one_range(parts_max: int) -> Plan:
    """The plan of a table that is read in one go."""
    return Plan(strategy="keys", why="nobody looked", ranges=[(None, None)])


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSnapshot:
    """An open snapshot of one table: what it sees, and the table's facts under its lock."""

    visibility: Visibility
    schema: TableSchema
    relfilenode: int
    lsn: int
    taken_at_us: int
    plan: Callable[[int], Plan] = one_range
    """While it is open: how the table is best read, in at most so many ranges. Blocks; errors as `read`."""
    by_runs: bool = False
    """The lake's changes of this table were found by periodic runs and have no transaction ids. Those of runs before
    `taken_at_us`, by the source's clock, are in the snapshot; others may not be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsRead:
    """Rows of a snapshot: typed columns in the order of `schema.columns`; `raw` as in the batch's `_raw`, or None.

    `last_key` is the text of the last row's key values as Postgres prints them (None if no rows), or where else to go
    on; `done` says that nothing stands behind it. `bytes` is what the server sent.
    """

    columns: list[pa.Array]
    raw: pa.Array | None
    rows: int
    last_key: tuple[str, ...] | None
    done: bool
    bytes: int = 0


class SnapshotReader(Protocol):
    """Reads existing rows in snapshots of its own. One open snapshot at a time; not thread-safe."""

    def tables(self, only: TableId | None = None) -> Catalog:
        """One look at the catalog: the selected, published tables as it has them now (schemas of version 0), with what
        decides which rows they show; with `only`, at most that table. Not while a snapshot is open."""

    def writers(self) -> dict[str, str]:
        """Transactions that have written and not ended: id → who it is (pid, application), for rule 0."""

    def begin(self, schema: TableSchema) -> TableSnapshot:
        """Lock the table in ACCESS SHARE mode, take a snapshot, and read the table's facts under it. Raises
        SourceUnavailable if the lock is not to be had within `lock_timeout`, SourceRefused if the table is gone."""

    def read(
        self,
        *,
        after: tuple[str, ...] | None = None,
        keys: Sequence[tuple[str, ...]] | None = None,
        rows_max: int = 0,
        where: str = "",
        through: tuple[str, ...] | None = None,
        blocks: int = 0,
        received: Callable[[], None] = lambda: None,
    ) -> RowsRead:
        """Rows of the open snapshot in key order: those after the key `after`, at most `rows_max` (0: no bound), or
        exactly those with one of `keys` (texts). A table without a key is read in the order it has. `where` is a
        condition in the source's own SQL that rows must meet too: FilterRefused if the source does not run it.
        `through`: no row behind it. With `blocks` both places are of a plan by blocks, and so many are read at most.
        `received` is called once the server has sent everything and only computing is left."""

    def end(self) -> None:
        """Close the open snapshot, if any; the connection stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SumsRead:
    """Checksums of a piece of a table. `last` says where the next piece begins; `done`: there is none."""

    sums: Sums
    last: tuple[str, ...]
    done: bool


class ChecksumReader(SnapshotReader, Protocol):
    """A reader that can also hash rows where they are, for `verify`. All of the open snapshot; each call is one
    statement of about a second, so whoever calls can stop in between. GaveWay, the snapshot ended, if meanwhile
    somebody began to wait for a lock on the table."""

    def hashes(self) -> bool | None:
        """How lines are hashed at this server: as they are (False) or in hexadecimal (True); None: rows of this table
        cannot be hashed as cdc.rowhash does it."""

    def sums(self, how: RowHash, *, after: tuple[str, ...] = ()) -> SumsRead:
        """Checksums of the rows of the next piece, from the beginning or behind `after` (a `last`)."""

    def sums_of(self, how: RowHash, keys: Sequence[tuple[str, ...]]) -> Sums:
        """Checksums of the rows with these keys (texts, a few thousand at most)."""

    def rows_in(self, how: RowHash, wanted: Ints | None, *, after: tuple[str, ...] = ()) -> RowsRead:
        """The rows of the next piece that are in these buckets (None: all, of the sample), typed; `last_key` is where
        to go on."""

    def close(self) -> None:
        """Close the connection; idempotent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTable:
    """A table of a run: its schema (version 0) under the run's lock, what identifies its files, and its size there.
    `refused`: why it cannot be read, and what mends that; then it is not locked."""

    schema: TableSchema
    storage: int = 0
    bytes: int = 0
    refused: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSnapshot:
    """An open snapshot of all tables of a source.

    `lsn` and `taken_at_us`: the server's position and clock, read after the snapshot was taken; `clock_us`: its clock
    before that; `alive`: ids of the transactions that were open before that, so all that the snapshot does not see were
    alive or began later.
    """

    lsn: int
    taken_at_us: int
    clock_us: int
    alive: frozenset[str]
    tables: list[RunTable]


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """Only rows whose `column` is null, or at least `least` as the source prints it."""

    column: str
    least: str


class RunReader(Protocol):
    """Reads all tables of a source in one snapshot, with no right but SELECT. One run at a time; not thread-safe."""

    def identity(self) -> SourceIdentity:
        """Facts of the server and its newest position there, as far as a role without rights may know them. Not while
        a snapshot is open."""

    def begin(self) -> RunSnapshot:
        """Lock the selected tables in ACCESS SHARE mode, then take the snapshot. SourceUnavailable if a lock is not to
        be had within `lock_timeout`, or the tables change meanwhile."""

    def read(self, schema: TableSchema, past: Past | None = None) -> Generator[RowsRead]:
        """All rows of a table of the snapshot, or those `past` a value, in pieces of bounded size, in no order. An
        error, or closing it early, leaves the snapshot open for other tables."""

    def end(self) -> None:
        """Close the open snapshot, if any; the connection stays."""

    def close(self) -> None:
        """Close the connection; idempotent."""


class SourceAdmin(Protocol):
    """What an operator's command does at a source, each on a connection of its own."""

    def check(self) -> list[Finding]:
        """Everything that would stop or endanger capture, without side effects."""

    def setup(
        self, *, dry_run: bool, anew: bool = False, only: int | None = None, ddl_events: bool = False
    ) -> list[str]:
        """Create publication, then slot, where missing; the SQL in the order in which it ran (or would run). `anew`: a
        slot of ours that exists is dropped first. `only`: nothing but to add the table of this OID to a publication of
        ours. `ddl_events`: have the source write DDL into the stream too. SourceRefused if the name is another one's
        slot."""

    def teardown(self, *, dry_run: bool) -> list[str]:
        """Drop slot and our publication, if they exist; the SQL."""

    def status(self) -> SourceStatus:
        """Server and slot, now."""

    def barrier(self) -> int:
        """Write and flush a transactional logical message; everything committed before now has a lower commit LSN
        than the returned one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    key: str
    size: int
    modified_at_us: int
    etag: str
    storage_class: str = ""
    """Where the store keeps it, in the store's own words; empty: it has no classes, or does not say."""


class ObjectStore(Protocol):
    """Objects under keys with '/' separators, below one root URL. Every write is atomic and durable on return."""

    def put(self, key: str, data: Any, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write bytes (anything with the buffer protocol), return the etag. `if_absent`/`if_match` make it
        conditional: StoreConflict if the object exists / has another etag."""

    def get(self, key: str, *, into: Path | None = None) -> tuple[bytes, str] | None:
        """The object's bytes and etag, None if there is none. With `into`, the bytes go to that file, in bounded memory
        (it is replaced, and not synced), and b"" stands for them."""

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Objects whose key starts with `prefix`, in key order."""

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; those that do not exist are no error."""

    def location(self, key: str) -> tuple[str, dict[str, str]]:
        """URL of a key and the storage options, for libraries that read and write by themselves (deltalake, DuckDB).
        A local directory's URL is an absolute path."""


@runtime_checkable
class TieredStore(ObjectStore, Protocol):
    """An object store that has classes of storage."""

    def move(self, key: str, storage_class: str) -> bool:
        """Rewrite an object in place into another class; idempotent, durable on return. False if there is no such
        object. StoreUnavailable if the store does not know the class, or cannot move an object of that size."""


__all__ = [
    "Boundary",
    "ChecksumReader",
    "Finding",
    "ObjectStore",
    "Past",
    "Plan",
    "Portion",
    "RowsRead",
    "RunReader",
    "RunSnapshot",
    "RunTable",
    "Schemas",
    "SnapshotReader",
    "Source",
    "SourceAdmin",
    "SourceIdentity",
    "SourceStatus",
    "StoredObject",
    "SumsRead",
    "TableSnapshot",
    "TieredStore",
    "Visibility",
]
