"""What `cdc inspect` finds out about a source before anybody relies on it: the numbers, and what follows from them.

Values only, without a row's value among them. The connector measures (`cdc.ports.SourceInspector`); here is what can
be concluded without a server: the plan of the first snapshots, and which findings endanger capture. A number that could
not be measured is None, and `not_measured` says why and what would mend it. It decides nothing for the daemon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cdc.console import seconds_text
from cdc.ports import Finding
from cdc.table import TableId

AGE_BOUNDS_S = (0.0, 60.0, 3_600.0, 86_400.0, 7 * 86_400.0, 30 * 86_400.0, 365 * 86_400.0)
AGE_LABELS = ("in the future", "under 1 min", "under 1 h", "under 1 day", "under 7 days", "under 30 days",
              "under 1 year", "1 year and more")  # fmt: skip
"""One label more than bounds: the first stands for ages below 0."""

ENDANGERING = ("warning", "error")
"""Severities of findings that endanger capture."""
HOUR_S = 3_600.0
WRITER_LONG_S = 300.0
"""A transaction that has written and is open for this long holds up slot, snapshots and WAL noticeably."""
OTHER_SLOT_BYTES = 10 << 30
"""What a slot that nobody reads may retain before it is worth a word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for, and the bounds of asking."""

    interval_s: float = 10.0
    """How long changes are counted."""
    age_column: str = ""
    """The column that says when a row's event was; empty: found by itself, table by table."""
    late_after_s: float = 86_400.0
    """A changed row whose time is older than this counts as late."""
    budget_s: float = 120.0
    """For reading rows, of all tables together; what does not fit is not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotMeasured:
    """Something that is not known: why, and the statement or option that mends it (empty: nothing does)."""

    what: str
    why: str
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Rows inserted, updated and deleted, and the seconds in which they were; `seconds` None: since nobody knows."""

    inserts: int
    updates: int
    deletes: int
    seconds: float | None

    @property
    def all(self) -> int:
        return self.inserts + self.updates + self.deletes

    @property
    def per_second(self) -> float | None:
        return self.all / self.seconds if self.seconds else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ages:
    """How old rows were when they changed, by `column`; counts of rows by the bounds of AGE_BOUNDS_S.

    Where only a share of the table was read, rows of that share count for those that were not read, so counts are
    estimates. `rows_seen` is how many were really looked at. `late_share` is None if no changed row has the column.
    """

    column: str
    found_by: str
    rows: float
    rows_seen: int
    without: float
    """Changed rows in which the column is null or infinite."""
    late: float
    oldest_s: float | None
    counts: tuple[float, ...]
    read_share: float
    """Of the table's blocks, those that were read."""
    changed_at: str
    """How the time of the change is known: `commit timestamp` or `interval`."""

    @property
    def late_share(self) -> float | None:
        dated = self.rows - self.without
        return self.late / dated if dated else None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyCandidate:
    """Columns that might be the key of a table that has none, and what was counted. No values, counts only.

    `extra_rows` are rows whose values another row has already: 0 in all rows means unique. If `exact` is false they are
    those within the sample, and `pairs_at_most` bounds the duplicates of the whole table (95 %, if the two rows of a
    pair lie in blocks that have nothing to do with each other); None: no bound can be given.
    """

    columns: tuple[str, ...]
    found_by: str
    exact: bool
    rows_read: int
    rows_null: int
    extra_rows: int
    groups: int
    largest_group: int
    pairs_at_most: int | None
    index: str = ""
    """A unique index over columns that are never null: it guarantees what need not be counted then."""

    @property
    def is_unique(self) -> bool:
        """Whether an index guarantees it, or every row of the table was compared and told from all others."""
        return bool(self.index) or (self.exact and self.rows_read > 0 and self.extra_rows == 0 and self.rows_null == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRead:
    """One chunk, read as a snapshot reads it and thrown away. `bytes` is CSV on the wire."""

    rows: int
    bytes: int
    seconds: float
    whole: bool
    """Whether that was the whole table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a table takes on the server's disk, partitions added up."""

    heap_bytes: int
    """Its own file, without TOAST."""
    table_bytes: int
    """With TOAST and maps."""
    index_bytes: int

    @property
    def all_bytes(self) -> int:
        return self.table_bytes + self.index_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """How much of the table's own file live rows fill, counted in a share of its blocks."""

    live_bytes: int
    unused_bytes: int
    """Dead rows and free space, beyond what the fillfactor keeps free on purpose."""
    read_share: float

    @property
    def unused_share(self) -> float:
        whole = self.live_bytes + self.unused_bytes
        return self.unused_bytes / whole if whole else 0.0


@dataclass(slots=True, kw_only=True)
class TableFacts:
    """One table, a partitioned one with all its partitions."""

    table: TableId
    oid: int
    kind: str
    """`table` or `partitioned`."""
    published: bool
    key: tuple[str, ...]
    identity: str
    rows_estimated: int | None = None
    size: Size | None = None
    dead_rows: int | None = None
    vacuumed_at: str | None = None
    analyzed_at: str | None = None
    changes: Changes | None = None
    changes_before: Changes | None = None
    """Since the server's counters were last reset."""
    space: Space | None = None
    ages: Ages | None = None
    candidates: list[KeyCandidate] = field(default_factory=list)
    strategy: str = ""
    """How a snapshot reads it: `keys` (chunks in key order) or `blocks`; empty: not known."""
    sample: SampleRead | None = None
    not_measured: list[NotMeasured] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wal:
    """WAL that the whole server wrote, whatever database it was for."""

    bytes: int
    seconds: float
    bytes_before: int | None = None
    seconds_before: float | None = None
    """Since the server's counters were last reset."""

    @property
    def bytes_per_hour(self) -> float:
        return self.bytes / self.seconds * HOUR_S if self.seconds else 0.0

    @property
    def bytes_per_hour_before(self) -> float | None:
        if self.bytes_before is None or not self.seconds_before:
            return None
        return self.bytes_before / self.seconds_before * HOUR_S


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotFacts:
    name: str
    kind: str
    ours: bool
    active: bool
    wal_status: str | None
    retained_bytes: int
    safe_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What the server keeps for those that fall behind, and how much room it has for one more."""

    settings: dict[str, str]
    """As `current_setting` prints them; a setting that this release does not have is left out."""
    slots: tuple[SlotFacts, ...]
    slots_left: int
    senders_left: int
    keep_bytes: int | None
    """What a slot may retain; None: no limit."""
    wal_dir_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTransaction:
    """A transaction of another session, or a prepared one. What it runs is not asked."""

    who: str
    state: str
    seconds: float | None
    """How long it has been open; None: our role may not know."""
    writes: bool
    holds_rows: bool
    """Whether vacuum must keep dead rows for its snapshot's sake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePlan:
    table: TableId
    strategy: str
    """`keys`: chunks in key order; `blocks`: ranges of blocks, of a table without a key all in one snapshot."""
    chunk_rows: int
    chunks: int
    bytes: int
    """As CSV on the wire."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the first snapshots would be. Times are those of reading at the source, from the chunk that was read."""

    readers: int
    tables: tuple[TablePlan, ...]
    unplanned: tuple[TableId, ...]
    """Tables whose chunk could not be read: neither in `bytes` nor in `seconds`."""
    seconds: float

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.tables)


@dataclass(slots=True, kw_only=True)
class Inspection:
    """Everything that was found; written by the connector, read by whoever shows it."""

    source: str
    at: str
    server: str
    version: str
    database: str
    interval_s: float
    late_after_s: float
    round_trip_s: float
    wal: Wal | None
    retention: Retention
    transactions: list[OpenTransaction]
    tables: list[TableFacts]
    counted_since: str | None
    """When the database's counters were last reset; None: nobody knows."""
    plan: Plan | None = None
    findings: list[Finding] = field(default_factory=list)
    not_measured: list[NotMeasured] = field(default_factory=list)

    @property
    def is_endangered(self) -> bool:
        """Whether a finding says that capture cannot begin, or may lose its slot or its table."""
        return any(f.severity in ENDANGERING for f in self.findings)

    @property
    def outage_s(self) -> float | None:
        """How long a daemon may be down at the measured rate of WAL before its slot is lost; None: for ever, or there
        was no WAL."""
        keep = self.retention.keep_bytes
        rates = [r for r in (self.wal.bytes_per_hour, self.wal.bytes_per_hour_before) if r] if self.wal else []
        return keep / max(rates) * HOUR_S if keep is not None and rates else None


class SourceInspector(Protocol):
    """Measures a source; what an entry point of `cdc.sources` makes by `inspector`."""

    def inspect(self, request: Request, say: Callable[[str], None]) -> Inspection:
        """Measure for about `interval_s` and at most `budget_s` beside it, by reading only and without waiting for
        locks of others for long; `plan` and `findings` are filled in. Needs neither publication nor slot. What is not
        to be had is in `not_measured`; `say` is told what is being done. Errors only if the server is not reached."""


def plan_snapshots(
    tables: Sequence[TableFacts], *, chunk_rows: int, chunk_bytes: int, readers: int, round_trip_s: float
) -> Plan:
    """The chunks of every table's first snapshot and the time to read them, estimated from one chunk of each.

    The one place that guesses how cdc.backfill will cut a table; it knows the bounds of a chunk, and not that one is
    smaller where it takes longer than a second. Readers share the tables, largest first; that they also share one big
    table is left out.
    """
    planned, unplanned = [], []
    for facts in tables:
        sample = facts.sample
        if sample is None:
            unplanned.append(facts.table)
            continue
        rows = sample.rows if sample.whole else max(facts.rows_estimated or 0, sample.rows)
        row_bytes = sample.bytes / sample.rows if sample.rows else 0.0
        if facts.key:
            per_chunk = max(1, min(chunk_rows, int(chunk_bytes / row_bytes) if row_bytes else chunk_rows))
            chunks = max(1, math.ceil(rows / per_chunk))
        else:
            chunks = max(1, math.ceil((facts.size.heap_bytes if facts.size else 0) / CHUNK_HEAP_BYTES))
            per_chunk = math.ceil(rows / chunks)
        reading_s = sample.seconds * (rows / sample.rows if sample.rows else 1.0)
        planned.append(
            TablePlan(
                table=facts.table,
                strategy=facts.strategy or ("keys" if facts.key else "blocks"),
                chunk_rows=per_chunk,
                chunks=chunks,
                bytes=round(rows * row_bytes),
                seconds=reading_s + chunks * ROUND_TRIPS_PER_CHUNK * round_trip_s,
            )
        )
    busy_until = [0.0] * max(1, readers)
    for table in sorted(planned, key=lambda t: -t.seconds):
        first_free = busy_until.index(min(busy_until))
        busy_until[first_free] += table.seconds
    return Plan(readers=readers, tables=tuple(planned), unplanned=tuple(unplanned), seconds=max(busy_until))


ROUND_TRIPS_PER_CHUNK = 8
"""Begin, lock, snapshot, facts under the lock, read, end."""
CHUNK_HEAP_BYTES = 32 << 20
"""A table without a key is read in ranges of as many bytes of its file."""


def judge(inspection: Inspection, *, streams: bool = True) -> list[Finding]:
    """What the measured numbers mean for capture, beside what the server's settings say by themselves. A source that is
    only read now and then (`streams` false) has no slot that could be lost."""
    return [
        *(_of_retention(inspection) if streams else ()),
        *(_of_transactions(inspection.transactions) if streams else ()),
        *(finding for facts in inspection.tables for finding in _of_table(facts)),
    ]


def _of_retention(inspection: Inspection) -> list[Finding]:
    found = []
    outage_s = inspection.outage_s
    if outage_s is not None and outage_s < HOUR_S:
        keep = inspection.retention.keep_bytes or 0
        found.append(
            Finding(
                name="retention",
                severity="warning",
                message=f"at the measured rate the server writes max_slot_wal_keep_size ({keep >> 20} MB) of WAL in"
                f" {seconds_text(outage_s)}: a daemon down for longer loses its slot, and reads every table anew",
                fix="alter system set max_slot_wal_keep_size = '100GB'; select pg_reload_conf();",
                object=inspection.server,
            )
        )
    for slot in inspection.retention.slots:
        if not slot.ours and not slot.active and slot.retained_bytes >= OTHER_SLOT_BYTES and slot.wal_status != "lost":
            found.append(
                Finding(
                    name="other slot",
                    severity="warning",
                    message=f"slot {slot.name!r} is read by nobody and keeps {slot.retained_bytes >> 20} MB of WAL;"
                    " when the disk is full the server stops",
                    fix=f"select pg_drop_replication_slot('{slot.name}'); -- if nobody will come back for it",
                    object=slot.name,
                )
            )
    return found


def _of_transactions(transactions: Sequence[OpenTransaction]) -> list[Finding]:
    return [
        Finding(
            name="open transaction",
            severity="warning",
            message=f"{t.who} has written and not ended for {seconds_text(t.seconds)}: as long as it is open no slot"
            " can be made, no snapshot begins, and WAL from its begin on is kept",
            fix="have it commit; or select pg_terminate_backend(…), rollback prepared '…'",
            object=t.who,
        )
        for t in transactions
        if t.writes and t.seconds is not None and t.seconds >= WRITER_LONG_S
    ]


def _of_table(facts: TableFacts) -> list[Finding]:
    unique = next((c for c in facts.candidates if c.is_unique), None)
    if unique is None:
        return []
    columns = ", ".join(_quoted(c) for c in unique.columns)
    table = f"{_quoted(facts.table.schema)}.{_quoted(facts.table.name)}"
    if unique.index:
        return [
            Finding(
                name="would-be key",
                severity="info",
                message=f"table {facts.table} has no key that its changes carry; unique index {unique.index} could be",
                fix=f"alter table {table} replica identity using index {_quoted(unique.index)};",
                object=str(facts.table),
            )
        ]
    return [
        Finding(
            name="would-be key",
            severity="info",
            message=f"table {facts.table} has no key, but ({columns}) tells every row of now from all others",
            fix=f"alter table {table} add primary key ({columns});",
            object=str(facts.table),
        )
    ]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
