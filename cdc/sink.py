"""What a target of reverse ETL is asked to do, and what it answers: batches of a plan, outcomes, acknowledgements.

A sink writes rows and moves the acknowledgements of those rows that the target has taken, and of no others: a row is
acknowledged after (or together with) its effect, never before. It does not decide what is written (cdc.plan), whether
it may be (cdc.guarding), or when (cdc.sync).

Acknowledgements are a table of `key` (string: the JSON array of the key's texts), `digest` (string, opaque) and
`version` (int64: it grows with every acknowledgement of the key). A digest that is empty says that the target no longer
has the row; such a key is kept where the version matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import pyarrow as pa

from cdc.config_serving import RequestConfig
from cdc.errors import CdcError
from cdc.ports import Finding

INSERT, UPDATE, DELETE, ADOPT = "insert", "update", "delete", "adopt"
"""What becomes of the rows of a batch. adopt: nothing is sent, only the acknowledgements move."""
ACKS = pa.schema([("key", pa.string()), ("digest", pa.string()), ("version", pa.int64())])
IN_DOUBT = "?"
"""Digest of a key to which something was sent, and nobody knows whether the target took it. It equals no content: the
row is sent again, or deleted if it is gone from the result."""
MISSING, DIFFERENT = "missing", "different"
"""How a row of the target drifts from the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a sync writes where, by the target's names."""

    sync: str
    table: str
    key: tuple[str, ...]
    mode: str
    """insert: plain INSERT, an existing row refuses; update: only rows that exist; append: plain INSERT, no unique key
    is asked for; upsert, mirror: insert or update by the key."""
    place: str = ""
    """Which target, in words that change when another one is meant: its name, and where it has such its URL."""
    columns: tuple[str, ...]
    """Every pushed column, the key's among them; no other column of the target is touched."""
    keep: frozenset[str] = frozenset()
    """Columns that a NULL does not overwrite."""
    fill: frozenset[str] = frozenset()
    """Columns that are written only where the target has NULL."""
    request: RequestConfig | None = None
    delete_request: RequestConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one action. `rows` has the pushed columns; with DELETE only the key's. `acks` (ACKS) stands row
    by row beside it: the digest that is acknowledged if the target takes the row (empty with DELETE), and the version
    that the key has *now*. `run` names the run that sends it, for the target's own record."""

    assignment: Assignment
    action: str
    rows: pa.Table
    acks: pa.Table
    run: str = ""
    label: str = ""
    """What the plan calls the action, if not so; for the row log."""
    differs: pa.Array | None = None
    """Per row the columns that differ from what was acknowledged (list of strings); for the row log."""
    untried: bool = False
    """Nothing of the sync has ever been acknowledged: if every row is refused, the sync is wrong and not the rows."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that the target refused for good. `reason` holds no values of the row."""

    key: str
    reason: str
    conflicts: bool = False
    """Refused for what another row holds (a unique or foreign key): it may go through once that one is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushResult:
    """What became of one batch: the rows that are in none of the lists were taken and are acknowledged."""

    rows: int
    rejected: list[Rejected] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    """Keys of mode update that the target does not have; not acknowledged."""
    unsent: list[str] = field(default_factory=list)
    """Keys that were not tried, or whose effect is not known; not acknowledged, and safe to send again."""
    error: CdcError | None = None
    """Why some are unsent; the run ends with it."""

    @property
    def written(self) -> int:
        """Rows that the target has taken."""
        return self.rows - len(self.rejected) - len(self.absent) - len(self.unsent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged:
    """What the target (or the ledger for it) knows before a run."""

    rows: pa.Table
    """ACKS."""
    shape: str = ""
    """A fingerprint of the columns that are written to, as the target has them now; empty: it cannot say."""
    last_run: str | None = None
    """The newest run among the acknowledgements that the target itself keeps (empty: there is none yet); None: it keeps
    none itself, so nothing can be said of it."""


@dataclass(frozen=True, slots=True)
class Drift:
    """A row of the result that the target holds otherwise. `columns` differ (DIFFERENT only)."""

    key: str
    kind: str
    columns: tuple[str, ...] = ()


class Ledger(Protocol):
    """Acknowledgements of one sync, for targets that keep none themselves, and what is known of attempts.

    An attempt is what may have reached the target: it is on record before it is sent, because whoever sends may die
    before hearing an answer. If it was forgotten, a target that took B unheard would be left with it once the result
    is back at the A that was acknowledged.
    """

    def read(self) -> pa.Table:
        """ACKS, one row per key, those with an empty digest among them. Keys with an attempt have IN_DOUBT, and its
        version. Blocks; StoreUnavailable."""

    def attempts(self) -> Mapping[str, tuple[str, int]]:
        """Digest (empty: a delete) and version of each key's attempt, as of the last `read` or `record` here."""

    def record(self, *, acks: pa.Table = ..., settled: pa.Table = ..., attempts: pa.Table = ...) -> None:
        """In one durable step, in this order: `acks` (ACKS, `version` the new one) replace what is known of their keys;
        of the keys of `settled` (digests mean nothing) it is known that the attempt had no effect, what was
        acknowledged before stands, with this version; `attempts` (ACKS) are about to be sent."""

    def forget(self) -> None:
        """Empty every digest, attempts' too; versions do not go back. Durable on return."""


class Ledgers(Protocol):
    """Where ledgers come from."""

    def __call__(self, sync: str) -> Ledger:
        """The ledger of the sync of that name; nothing is read yet."""


class Sink(Protocol):
    """A target that rows are pushed into. Used by one thread."""

    def check(self, assignment: Assignment) -> list[Finding]:
        """Whether the target can take this, each finding with what mends it; no side effects. `columns` may be empty:
        they are not known yet."""

    def acknowledged(self, assignment: Assignment) -> Acknowledged:
        """What has been acknowledged for the sync. Blocks; TargetUnavailable, TargetRejected."""

    def push(self, batches: Iterable[Batch]) -> list[PushResult]:
        """Write the batches in this order, in one transaction if the target has such, and acknowledge what was taken;
        durable on return. A result per batch. Running it twice has no second effect where the target allows that
        (by key, or by an idempotency key). TargetRejected if the target can take none of the rows (table, columns,
        privileges, login), TargetUnavailable if the same may go through later; after either, nothing is acknowledged
        that is in no result but what the target itself has recorded.
        """

    def forget(self, assignment: Assignment) -> int:
        """Forget all acknowledgements of the sync and send nothing; how many there were. Durable on return."""

    def close(self) -> None:
        """Close connections; idempotent."""


@runtime_checkable
class Comparing(Protocol):
    """A sink whose target can be read back."""

    def drift(self, assignment: Assignment, batches: Iterable[Batch]) -> Iterator[Sequence[Drift]]:
        """How the target differs from these rows (the whole result, in batches; `action` and `digest` say nothing):
        per batch, rows that it lacks or holds otherwise in a pushed column. Reads only."""


@runtime_checkable
class Ordering(Protocol):
    """A sink whose target wants some tables written before others."""

    def order(self, assignments: Sequence[Assignment]) -> list[Assignment]:
        """The assignments so that what is referred to comes first (deletes want the reverse); where they refer to each
        other in a circle, in the order given. Blocks; TargetUnavailable, TargetRejected."""
