"""A table's changelog in the lake: every change once, in objects that become visible together with their position.

Guarantees:
- What a commit shows and the tokens that say so are one atomic Delta commit, checked in the version committed upon.
- A row that has landed is left out when it comes again: a change by the token of its stream (`stream/<epoch>` = commit
  LSN), a row of a snapshot run by the counter in its `_seq`, which never starts again (`snapshot_seq`).
- A writer holds a row group in memory, the rest in objects; objects without a commit are invisible, and `reclaim`
  removes those that a crash left.

Other tokens: `run/<id>` = highest chunk, `complete/<epoch>/<oid>` = 1 once the end row of a run over the whole table
is in, `lease` = fence number of the holder's lease, `trimmed` (cdc.lake.retention). It does not decide when to commit
or where a stream may be cut (cdc.land), and never reads a row back. Not thread-safe; one process writes a changelog at
a time (cdc.lake.lease).
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdc.batch import SNAPSHOT_SEQ, SYSTEM, Batch, Boundary, system_type
from cdc.errors import InvariantBroken, LeaseLost, SchemaConflict, StoreConflict, StoreUnavailable
from cdc.failpoints import failpoint
from cdc.lake.commits import LEASE
from cdc.lake.delta import AddedFile, DeltaLog
from cdc.lake.layout import DATE, PARTITION_KEY, changelog_path, system_name, system_prefix, tables_in
from cdc.lake.naming import LANDED, ObjectName
from cdc.lake.objects import OBJECT_BYTES, OpenObject, lake_fields
from cdc.lake.partitions import NO_PARTITION, SORTED_BYTES, EventRows, Lateness, event_index
from cdc.lake.widening import in_lake
from cdc.ports import ObjectStore
from cdc.table import PartitionBy, TableId, TableSchema
from cdc.types import arrow_fields

log = logging.getLogger(__name__)

FULL_RUNS: Final = frozenset(("first", "resync"))
"""Kinds of snapshot runs that read the whole table: only their end makes it complete."""

PREFIX_KEY: Final = "cdc.system_prefix"
SHAPE_KEY: Final = "cdc.shape"
_SNAPSHOT_SEQ: Final = "snapshot_seq"
_OPEN_OBJECTS_MAX: Final = 32
_SORTED_MAX: Final = 4
"""Schema versions of which rows are gathered at the same time: each has up to a row group in memory."""
_SMALLER_AT_LEAST: Final = 4
"""Times that objects are smaller than their rows as Arrow; measured: 3.7 (ten mixed columns) to 20 (pgbench)."""
_DAY_US: Final = 86_400_000_000
UNKNOWN_S: Final = 24 * 3600.0
"""Age from which an object is nobody's any more whose name does not say whose it was."""


class ChangelogTokens:
    """What has landed, as the tokens of one version of the table say."""

    def __init__(self, values: Mapping[str, int]) -> None:
        self._values = dict(values)

    def stream(self, epoch: int) -> int:
        """Commit LSN up to which the stream of that epoch has landed; -1 if nothing has."""
        return self._values.get(f"stream/{epoch}", -1)

    def run(self, run: str) -> int:
        """Highest chunk of a run that has landed; -1 if none has."""
        return self._values.get(f"run/{run}", -1)

    def complete(self, epoch: int, oid: int) -> bool:
        """Whether a snapshot of the whole table with that OID has landed to its end in that epoch."""
        return self._values.get(f"complete/{epoch}/{oid}", 0) == 1

    @property
    def snapshot_seq(self) -> int:
        """Highest counter in the `_seq` of a snapshot's row; -1 if there is none."""
        return self._values.get(_SNAPSHOT_SEQ, -1)

    @property
    def epoch(self) -> int:
        """Highest epoch of which the stream has landed anything; -1 if none."""
        return max((int(k.partition("/")[2]) for k in self._values if k.startswith("stream/")), default=-1)

    def get(self, app_id: str) -> int | None:
        return self._values.get(app_id)

    def with_values(self, values: Mapping[str, int]) -> ChangelogTokens:
        return ChangelogTokens({**self._values, **values})


class Landed(NamedTuple):
    """What a commit brought: rows and bytes of its objects, and the changelog's version that shows them."""

    rows: int
    bytes: int
    version: int


class ChangelogTable:
    """The changelog of one table. Created in the lake by the first rows that are written to it."""

    def __init__(
        self, store: ObjectStore, source: str, table: TableId, *, partition_by: PartitionBy | None = None
    ) -> None:
        """`partition_by`: for who writes: the time that rows are partitioned by, from now on; None: their commit's."""
        self._store = store
        self._source = source
        self.table = table
        self.partition_by = partition_by
        self.path = changelog_path(source, table)
        self.delta = DeltaLog(store, self.path)
        self._tokens: ChangelogTokens | None = None
        self._prepared: dict[TableSchema, TableSchema] = {}
        self._prefix = ""
        self._writers: weakref.WeakSet[ChangelogWriter] = weakref.WeakSet()

    def exists(self) -> bool:
        return self.delta.exists()

    def version(self) -> int:
        """The newest version that has been read; -1 if there is no table. `refresh` reads on."""
        return self.delta.version()

    def refresh(self) -> int:
        """Read what others have committed; the newest version, -1 if there is no table."""
        self._tokens = None
        return self.delta.refresh() if self.delta.exists() else -1

    def tokens(self) -> ChangelogTokens:
        """What has landed, as of the version that has been read; cached."""
        if self._tokens is None:
            self._tokens = ChangelogTokens(self.delta.tokens() if self.delta.exists() else {})
        return self._tokens

    def writer(self, temp_dir: Path, *, fence: int = 0) -> ChangelogWriter:
        """A writer of rows that are to become visible together; big objects grow in unnamed files in `temp_dir`.
        `fence`: the lease's number, 0 without one."""
        writer = ChangelogWriter(self, self._store, temp_dir, fence)
        self._writers.add(writer)
        return writer

    def prefix(self, schema: TableSchema) -> str:
        """What the table's system columns begin with; decided once, when the table is created."""
        if not self._prefix:
            if self.delta.exists():
                self._prefix = self.stored_prefix()
            else:
                self._prefix = system_prefix(c.name for c in schema.columns)
        return self._prefix

    def stored_prefix(self) -> str:
        """As `prefix`, of a table that is there."""
        return self.delta.configuration().get(PREFIX_KEY, "_")

    def prepare(self, schema: TableSchema) -> str:
        """Make sure that the table exists and has the columns of a schema version; returns its prefix. A column whose
        type cannot stand where it stood takes another name (`named`).

        SchemaConflict if it cannot hold them: nothing of that version can land then.
        """
        prefix = self.prefix(schema)
        if schema in self._prepared:
            return prefix
        names = {c.name.lower() for c in schema.columns}
        taken = sorted(n for n in (system_name(s, prefix) for s in (*SYSTEM, DATE)) if n in names)
        if taken:
            raise SchemaConflict(
                f"{self.path}: column {taken[0]} collides with a system column of a table that exists already",
                hint="rename the column at the source; or stop the daemon, move the table's folder away, start, and run"
                " `cdc resync` for it",
            )
        present = {f.name: f.type for f in self.delta.schema()} if self.delta.exists() else {}
        named = in_lake(schema, present)
        self.delta.open_or_create(
            lake_schema(schema, named, prefix),
            partition_by=[system_name(DATE, prefix)],
            configuration={
                PREFIX_KEY: prefix,
                "cdc.source": self._source,
                "cdc.table": str(self.table),
                SHAPE_KEY: _shape_text(schema, 0),
                **({PARTITION_KEY: self._partition_text(0)} if self.partition_by is not None else {}),
            },
        )
        self._prefix = self.stored_prefix()
        if self._prefix != prefix:
            raise StoreConflict(f"{self.path} was created by another writer meanwhile")
        self._note_partitions(schema)
        self._prepared[schema] = named
        return prefix

    def _note_partitions(self, schema: TableSchema) -> None:
        """Have the table say what `_date` means, and since when; and the log, that a shape has no such time."""
        wanted = str(self.partition_by or "")
        noted = json.loads(self.delta.configuration().get(PARTITION_KEY, "{}")).get("by", "")
        if wanted != noted:
            since = self.delta.version() + 1
            self.delta.commit(configuration={PARTITION_KEY: self._partition_text(since)})
            facts = {"delta_table": self.path, "partition_by": wanted or "commit date", "since_version": since}
            log.warning("partitioned otherwise from here on; what has landed stays where it is", extra=facts)
        if self.partition_by is not None and self.event_index(schema) is None:
            facts = {"source": self._source, "table": str(self.table), "partition_by": wanted}
            hint = "mend partition_by and restart; `cdc check` says what is wrong with it"
            log.error("no such time to partition by: rows land in the partition null", extra={**facts, "hint": hint})

    def _partition_text(self, since: int) -> str:
        return json.dumps({"by": str(self.partition_by or ""), "since": since})

    def event_index(self, schema: TableSchema) -> int | None:
        """Which column of a prepared version decides where its rows belong; None if none does."""
        return None if self.partition_by is None else event_index(self.partition_by, schema, self.delta.schema())

    def has_columns(self, schema: TableSchema) -> bool:
        """Whether the table has every column of a schema version, by number, name and type."""
        if not self.delta.exists():
            return False
        there = {(f.name, (f.metadata or {}).get(b"pg.attnum")): f.type for f in self.delta.schema()}
        return all(there.get((f.name, (f.metadata or {}).get(b"pg.attnum"))) == f.type for f in arrow_fields(schema))

    def named(self, schema: TableSchema) -> TableSchema:
        """A prepared version with the names that the lake has for its columns."""
        return self._prepared[schema]

    def shape(self) -> tuple[TableSchema, int] | None:
        """The table's newest schema that was announced, and the number of its announcement: what a daemon on an empty
        disk compares with."""
        text = self.delta.configuration().get(SHAPE_KEY) if self.delta.exists() else None
        if text is None:
            return None
        noted = json.loads(text)
        return TableSchema.from_json(noted["schema"]), noted["number"]

    def note_shape(self, schema: TableSchema, number: int) -> None:
        """Remember the table's newest schema; durable on return."""
        if self.delta.exists():
            self.delta.commit(configuration={SHAPE_KEY: _shape_text(schema, number)})

    def committed(self, tokens: ChangelogTokens) -> None:
        """Note the tokens of a commit that happened, so that they need not be read again."""
        self._tokens = tokens

    def forget(self) -> None:
        """Read the tokens anew before the next use."""
        self._tokens = None

    def orphans(self, *, term: int = 0, kind: str = "") -> list[str]:
        """Keys of objects that no version shows and that nobody means to commit any more: what a crash, or a commit
        that failed, leaves.

        These are what was written in a term of the lease before `term`; of this very term what is of that `kind`, and
        that no writer of this object holds: for the only thread that writes this kind. Objects whose names say no term
        were left by another release: they count when they are older than any transaction should stay open.
        """
        if self.refresh() < 0:
            return []
        below = f"{self.path}/"
        bound_us = (time.time() - UNKNOWN_S) * 1e6

        def is_dead(key: str, modified_at_us: int) -> bool:
            name = ObjectName.of(key)
            if name is None or not name.term:
                return modified_at_us < bound_us
            return name.term < term or (name.term == term and name.kind == kind)

        found = [
            o.key.removeprefix(below)
            # Not the log, which may have a thousand entries for each object.
            for o in self._store.list(f"{below}{system_name(DATE, self.stored_prefix())}=")
            if o.key.endswith(".parquet") and is_dead(o.key, o.modified_at_us)
        ]
        known = self._known() if found else set()
        return [f"{below}{path}" for path in found if path not in known]

    def reclaim(self, *, term: int = 0, kind: str = "") -> int:
        """Delete orphans; returns how many. Blocking.

        Where there are any, a commit that sets nothing but the lease's token goes first: behind it nothing that was
        meant for the versions before can be committed any more, neither by a former holder of the lease that wakes up
        late nor by a request of ours whose answer was lost. What has been committed all the same is no orphan then.
        """
        found = self.orphans(term=term, kind=kind)
        if found and term:
            self.delta.commit(tokens={LEASE: term})
            self.refresh()
        known = self._known() if found else set()
        keys = [key for key in found if key.removeprefix(f"{self.path}/") not in known]
        self._store.delete(keys)
        if keys:
            log.info("objects without a commit removed", extra={"delta_table": self.path, "objects": len(keys)})
        return len(keys)

    def _known(self) -> set[str]:
        """Paths of objects that a version shows or did show, or that a writer of this object means to commit."""
        held = {f.path for w in self._writers for f in w.uploaded}
        return held | {f.path for f in self.delta.files()} | self.delta.removed_paths()


def highest_landed(store: ObjectStore, source: str, epoch: int) -> int:
    """The highest commit LSN of an epoch that any changelog of the source says it holds; -1 if none holds any. Lists
    the whole source in the store, as the two below: not for every day."""
    return max((tokens.stream(epoch) for tokens in _tokens_of_all(store, source)), default=-1)


def highest_epoch(store: ObjectStore, source: str) -> int:
    """The highest epoch of which any changelog of the source holds anything; -1 if none does."""
    return max((tokens.epoch for tokens in _tokens_of_all(store, source)), default=-1)


def highest_fence(store: ObjectStore, source: str) -> int:
    """The highest fence of a lease under which any changelog of the source was committed to; 0 if none was."""
    return max((tokens.get(LEASE) or 0 for tokens in _tokens_of_all(store, source)), default=0)


def _tokens_of_all(store: ObjectStore, source: str) -> Iterator[ChangelogTokens]:
    return (ChangelogTable(store, source, table).tokens() for table in tables_in(store, source))


class ChangelogWriter:
    """Rows on their way to one commit. `add` any number of times, then `commit` at a cut, or `abandon`."""

    def __init__(self, changelog: ChangelogTable, store: ObjectStore, temp_dir: Path, fence: int) -> None:
        self._changelog = changelog
        self._store = store
        self._temp_dir = temp_dir
        self._fence = fence
        self._base = changelog.tokens()
        self._receipt = dt.datetime.now(dt.UTC).date()
        self._open: dict[tuple[TableSchema, int, str | None], OpenObject] = {}
        self._sorted: dict[tuple[TableSchema, int], EventRows] = {}
        self._progress = _Progress()
        self._attempted = False
        self.uploaded: list[AddedFile] = []
        """Objects that are in the store and that no version shows yet."""
        self.lateness = Lateness()
        """Of what was added, where a time of the rows decides where they belong; else nothing."""

    @property
    def object_bytes(self) -> int:
        """Size of the objects that a commit would bring now, without what is still in memory. Of rows that wait to be
        sorted it is a guess, rather too much than too little."""
        waiting = sum(rows.bytes for rows in self._sorted.values()) // _SMALLER_AT_LEAST
        return waiting + sum(item.written_bytes for item in self._open.values()) + sum(f.size for f in self.uploaded)

    @property
    def held_bytes(self) -> int:
        """Rows in memory, as Arrow."""
        return sum(o.held_bytes for o in self._open.values()) + sum(r.held_bytes for r in self._sorted.values())

    def add(self, batch: Batch, *, chunk: int | None = None, receipt: dt.date | None = None) -> int:
        """Take the rows that have not landed yet; how many they are. `chunk`: number in the run, for rows of a run.

        Rows without a commit time are filed under `receipt` (default: the day of the writer's creation, UTC). Blocks
        for encoding, and for uploads when an object is full. SchemaConflict if the lake table cannot hold the schema.
        """
        if self._attempted:
            raise InvariantBroken(f"{self._changelog.path}: rows for a writer that has committed")
        kept = self._unlanded(batch, chunk)
        if kept.data.num_rows == 0:
            return 0
        self._changelog.prepare(kept.schema)
        self._progress.note(kept, chunk)
        if self._changelog.partition_by is None:
            for day, part in _by_day(kept, receipt or self._receipt):
                self._write(str(np.datetime64(day, "D")), part)
        else:
            self._sort(kept, self._changelog.partition_by)
        return int(kept.data.num_rows)

    def commit(self, boundary: Boundary, *, metadata: Mapping[str, Any] | None = None) -> Landed:
        """Make everything that was added visible, with `boundary` as the stream's token; durable on return.

        The caller vouches that all changes of this table up to `boundary` have landed or were added. Nothing added:
        nothing is committed. LeaseLost if a later holder of the lease has written here. StoreConflict: another writer
        landed meanwhile; StoreUnavailable: it may or may not have happened. After either, abandon this writer and add
        the rows again: the tokens tell what is missing.
        """
        stream = f"stream/{boundary.epoch}"
        tokens = self._progress.tokens(self._base, boundary.epoch)
        tokens[stream] = max(boundary.lsn, self._base.stream(boundary.epoch))
        self._progress.check(boundary, str(self._changelog.table))
        if self._fence:
            tokens[LEASE] = self._fence
            if (self._base.get(LEASE) or 0) > self._fence:
                raise LeaseLost(f"{self._changelog.path}: a later holder of the lease has written here")
        failpoint("land.before_upload")
        for gathered in list(self._sorted):
            self._place(gathered)
        for key in list(self._open):
            self._finish(key)
        if not self.uploaded:
            return Landed(0, 0, self._changelog.version())
        failpoint("land.before_commit")
        self._attempted = True
        self._changelog.forget()
        version = self._changelog.delta.commit(
            adds=self.uploaded,
            tokens=tokens,
            expect={app_id: self._base.get(app_id) for app_id in tokens if app_id != LEASE},
            metadata=metadata,
        )
        self._changelog.committed(self._base.with_values(tokens))
        failpoint("land.after_commit")
        landed = Landed(sum(f.rows for f in self.uploaded), sum(f.size for f in self.uploaded), version)
        self.uploaded = []
        return landed

    def abandon(self) -> None:
        """Forget what was added, and delete its objects; idempotent. After a commit that raised, the objects stay: it
        may have happened after all, and if not, `reclaim` finds them."""
        for rows in self._sorted.values():
            rows.close()
        self._sorted.clear()
        for item in self._open.values():
            item.abandon()
        self._open.clear()
        uploaded, self.uploaded = self.uploaded, []
        if uploaded and not self._attempted:
            try:
                self._store.delete([f"{self._changelog.path}/{f.path}" for f in uploaded])
            except StoreUnavailable:
                log.warning("objects of an abandoned landing stay", extra={"delta_table": self._changelog.path})

    def _sort(self, batch: Batch, by: PartitionBy) -> None:
        """Gather rows by the time that they carry; they become objects when all are there, or too many."""
        key = (batch.schema, batch.system("_epoch")[0].as_py())
        if key not in self._sorted:
            if len(self._sorted) >= _SORTED_MAX:
                self._place(next(iter(self._sorted)))
            index = self._changelog.event_index(batch.schema)
            self._sorted[key] = EventRows(batch.schema, index, by.unit, self._temp_dir, self.lateness)
        rows = self._sorted[key]
        rows.add(batch)
        if rows.bytes >= SORTED_BYTES:
            self._place(key)

    def _place(self, key: tuple[TableSchema, int]) -> None:
        """Objects of what was gathered of a schema version, one partition after the other."""
        rows = self._sorted.pop(key)
        try:
            for partition, batches in rows.drain():
                for batch in batches:
                    self._write(partition, batch)
                if (*key, partition) in self._open:
                    self._finish((*key, partition))
        finally:
            rows.close()

    def _write(self, partition: str | None, part: Batch) -> None:
        """Rows of one partition into its open object."""
        key = (part.schema, part.system("_epoch")[0].as_py(), partition)
        if key not in self._open:
            if len(self._open) >= _OPEN_OBJECTS_MAX:
                self._finish(next(iter(self._open)))
            named, prefix = self._changelog.named(part.schema), self._changelog.prefix(part.schema)
            self._open[key] = OpenObject(part.schema, named, prefix, self._temp_dir)
        target = self._open[key]
        target.add(part)
        if target.written_bytes >= OBJECT_BYTES:
            self._finish(key)

    def _finish(self, key: tuple[TableSchema, int, str | None]) -> None:
        """Upload a finished object under a name that tells what it covers."""
        schema, epoch, partition = key
        item = self._open.pop(key)
        column = system_name(DATE, self._changelog.prefix(schema))
        name = ObjectName(epoch, item.first_lsn, item.last_lsn, LANDED, self._fence)
        path = f"{column}={partition or NO_PARTITION}/{name.fresh()}"

        def upload(data: Any) -> None:
            self._store.put(f"{self._changelog.path}/{path}", data)

        extent = item.finish(upload)
        self.uploaded.append(
            AddedFile(
                path=path,
                size=extent.size,
                rows=extent.rows,
                partition={column: partition},
            )
        )

    def _unlanded(self, batch: Batch, chunk: int | None) -> Batch:
        """The rows that the base tokens do not cover. Rows are in order, so they are a slice."""
        n = batch.data.num_rows
        if n == 0:
            return batch
        of_run = batch.has("_run") and batch.system("_run").null_count < n
        epoch = batch.system("_epoch")[0].as_py()
        if batch.system("_epoch")[n - 1].as_py() != epoch or (of_run and batch.system("_run").null_count):
            raise InvariantBroken(f"{self._changelog.path}: a batch of two epochs, or of a run and of the stream")
        order = batch.system("_seq" if of_run else "_lsn").to_numpy()
        landed = SNAPSHOT_SEQ + self._base.snapshot_seq if of_run else self._base.stream(epoch)
        first = int(np.searchsorted(order, landed, side="right"))
        if first == 0:
            return batch
        if (order[:first] > landed).any() or (order[first:] <= landed).any():
            raise InvariantBroken(f"{self._changelog.path}: a batch whose rows are not in order")
        run = batch.system("_run")[0].as_py()
        if of_run and chunk is not None and chunk > self._base.run(run):
            # Its counter says that it has landed, its run says that it has not: leaving it out could lose it.
            raise InvariantBroken(
                f"{self._changelog.path}: rows of chunk {chunk} of run {run} have a counter used before"
            )
        return Batch(batch.schema, batch.data.slice(first))


@dataclass(slots=True)
class _Progress:
    """What the rows of a writer amount to, as tokens."""

    last: dict[int, int] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    complete: set[tuple[int, int]] = field(default_factory=set)
    counter: int = -1

    def note(self, batch: Batch, chunk: int | None) -> None:
        end = batch.data.num_rows - 1
        epoch = batch.system("_epoch")[end].as_py()
        self.last[epoch] = max(self.last.get(epoch, -1), batch.system("_lsn")[end].as_py())
        if not batch.has("_run") or batch.system("_run")[end].as_py() is None:
            return
        run = batch.system("_run")[end].as_py()
        self.runs[run] = max(self.runs.get(run, -1), -1 if chunk is None else chunk)
        self.counter = max(self.counter, batch.system("_seq")[end].as_py() - SNAPSHOT_SEQ)
        controls = pc.indices_nonzero(pc.equal(batch.system("_op"), "s"))
        for facts in batch.system("_raw").take(controls).to_pylist():
            known = dict(facts or ())
            if known.get("event") == "end" and known.get("kind") in FULL_RUNS:
                self.complete.add((epoch, int(known["oid"])))

    def tokens(self, base: ChangelogTokens, epoch: int) -> dict[str, int]:
        """All but the token of the stream of `epoch`, which reaches further than the rows. Rows of an epoch before it
        are the last that the log had of it: without a token of theirs they would be taken again after a crash."""
        found = {f"stream/{e}": max(lsn, base.stream(e)) for e, lsn in self.last.items() if e != epoch}
        found |= {f"run/{run}": max(chunk, base.run(run)) for run, chunk in self.runs.items() if chunk >= 0}
        found |= {f"complete/{epoch}/{oid}": 1 for epoch, oid in self.complete}
        if self.counter >= 0:
            found[_SNAPSHOT_SEQ] = self.counter
        return found

    def check(self, boundary: Boundary, table: str) -> None:
        """Rows beyond the boundary would be left out as landed when their transaction is complete."""
        for epoch, lsn in self.last.items():
            if (epoch, lsn) > (boundary.epoch, boundary.lsn):
                raise InvariantBroken(f"table {table}: rows at {lsn:X} would land before {boundary.lsn:X} is reached")


def lake_schema(schema: TableSchema, named: TableSchema, prefix: str) -> pa.Schema:
    """The changelog's columns for one schema version, the partition column included."""
    fields = lake_fields(schema, named)
    names = [n for n in SYSTEM if fields or n != "_before"]
    system = [pa.field(system_name(n, prefix), system_type(n, named)) for n in names]
    return pa.schema([*system, pa.field(system_name(DATE, prefix), pa.string()), *fields])


def _shape_text(schema: TableSchema, number: int) -> str:
    return json.dumps({"schema": schema.to_json(), "number": number})


def _by_day(batch: Batch, receipt: dt.date) -> list[tuple[int, Batch]]:
    """The batch's rows by commit date, as days since 1970; nearly always one."""
    receipt_day = (receipt - dt.date(1970, 1, 1)).days
    n = batch.data.num_rows
    if not batch.has("_committed_at"):
        return [(receipt_day, batch)]
    times = batch.system("_committed_at")
    if times.null_count == n:
        return [(receipt_day, batch)]
    micros = times.view(pa.int64()).fill_null(receipt_day * _DAY_US).to_numpy()
    first, last = int(micros.min()) // _DAY_US, int(micros.max()) // _DAY_US
    if first == last:
        return [(first, batch)]
    days = micros // _DAY_US
    return [
        (int(day), Batch(batch.schema, batch.data.filter(pa.array(days == day)))) for day in np.unique(days).tolist()
    ]
