"""The merge of a table with a key: changelog files in, rewritten buckets out.

Two passes over the new files: one that only finds what concerns the whole (cdc.lake.scan), one that sorts the rows into
buckets. Keys that rows without all their values moved between are reduced together first, and join their buckets as
complete rows; then each bucket is reduced and rewritten by itself. The files written are not visible until somebody
commits them. A row whose values nobody knows is reported, and then nothing is to be committed (`Rewritten.unresolved`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdc.errors import SchemaConflict
from cdc.keys import hash_of, key_of
from cdc.lake.assemble import Assembly, Missing, TargetRows
from cdc.lake.bucket import (
    BucketName,
    BucketWriter,
    Found,
    OldFile,
    Part,
    current_schema,
    find,
    key_fingerprint,
    layout_fingerprint,
    parse_name,
    slice_rows,
)
from cdc.lake.delta import AddedFile, LiveFile
from cdc.lake.events import FIRST_COLUMN, FileShape, Layout, Patterns, clear_events, events_of
from cdc.lake.reduce import SET, Barrier, Events, Order, Orders, Reduced, Targets, final_threshold, reduce
from cdc.lake.scan import Scan
from cdc.lake.spill import Spill
from cdc.types import pg_text

BUCKET_ROWS = 250_000
BUCKET_BYTES = 96 << 20
"""Bytes of changes (as encoded in Parquet) that one bucket should hold at most."""
BUCKETS_MAX = 1 << 14
UNRESOLVED_MAX = 10_000
"""Keys reported at once; the others are reported when these are resolved."""

OpenParquet = Callable[[str], pq.ParquetFile]


@dataclass(slots=True)
class Rewritten:
    """What a merge wants to commit: files to add and to remove."""

    adds: list[AddedFile] = field(default_factory=list)
    removes: list[str] = field(default_factory=list)
    upserted: int = 0
    deleted: int = 0
    unresolved: list[tuple[str, ...]] = field(default_factory=list)


class KeyedMerge:
    """One merge. `store_file` uploads a local file under a path of the table; `known_fresh` remembers, between merges,
    files that the newest layout does not make stale; `newest` is the highest order that has been merged."""

    def __init__(
        self,
        layout: Layout,
        patterns: Patterns,
        scan: Scan,
        barriers: Sequence[Barrier],
        *,
        scratch: Path,
        live: Sequence[LiveFile],
        open_current: OpenParquet,
        open_changelog: OpenParquet,
        store_file: Callable[[Path, str], None],
        known_fresh: set[str],
        newest: Order | None = None,
        bucket_rows: int = BUCKET_ROWS,
    ) -> None:
        self._layout = layout
        self._newest = newest
        self._patterns = patterns
        self._scan = scan
        self._missing = Missing(layout)
        self._truncated = max(scan.truncates, default=None)
        self._barriers = [b for b in barriers if self._truncated is None or b.at >= self._truncated]
        self._threshold = final_threshold(self._barriers)
        self._stray = scan.repairs
        """Whether rows are looked for that stand in a bucket which is not theirs: another writer may have put them
        there, where no change of their keys finds them."""
        self._scratch = scratch
        self._live = live
        self._open_current = open_current
        self._open_changelog = open_changelog
        self._store_file = store_file
        self._known_fresh = known_fresh
        self._key_print, self._layout_print = key_fingerprint(layout), layout_fingerprint(layout)
        named = {f.path: parse_name(f.path) for f in live}
        self._names = {path: name for path, name in named.items() if name is not None and name.key == self._key_print}
        self._rebuilt = len(self._names) < len(live)
        self._n_old = max((name.of for name in self._names.values()), default=1)
        self._n = self._choose(bucket_rows)
        self._spill = Spill(scratch / "events", layout.event_schema)
        self._done = Rewritten()

    def run(self, changelog_paths: Iterable[str]) -> Rewritten:
        """Do it all but the commit. Blocking; what it wrote is durable in the store, and invisible."""
        try:
            if self._rebuilt:
                self._take_old_rows()
            for path in changelog_paths:
                self._take_changes(self._open_changelog(path))
                _trim_memory()
            self._resolve_linked()
            for bucket in range(self._n):
                self._bucket(bucket)
                _trim_memory()
            return self._done
        finally:
            self._spill.close()

    # ---- sorting rows into buckets ----

    def _choose(self, bucket_rows: int) -> int:
        """Number of buckets: a power of two that holds the rows there will be; it never shrinks."""
        rows = self._scan.rows
        existing = sum(f.rows for f in self._live)
        expected = max(existing, rows["r"]) + rows["c"] - rows["d"]
        expected_bytes = expected * self._scan.bytes // max(1, self._scan.changes)
        # A new table starts with room to grow.
        limit = bucket_rows if existing and not self._rebuilt else max(1, bucket_rows // 2)
        n = 1 if self._rebuilt else self._n_old
        while n < BUCKETS_MAX and (expected > n * limit or expected_bytes > n * BUCKET_BYTES):
            n *= 2
        return n

    def _take_changes(self, file: pq.ParquetFile) -> None:
        shape = FileShape(file.schema_arrow, self._layout)
        for data in file.iter_batches(slice_rows(file.metadata), use_threads=False):
            for events in events_of(data, shape, self._patterns):
                self._route(events)

    def _take_old_rows(self) -> None:
        """Rows of files that were laid out by another key: as events, each with the order it has."""
        layout = self._layout
        names = [layout.names[i] for i in layout.key_index]
        for live in self._live:
            old = OldFile(self._open_current(live.path), layout, None, self._newest)
            for _, data, columns, raw in old.slices(self._missing, lenient=True):
                n = data.num_rows
                orders = old.orders(data)
                system = [pa.array(part) for part in (orders.epoch, orders.lsn, orders.seq)]
                arrays = [
                    key_of([columns[i] for i in layout.key_index], raw, names),
                    pa.array(np.full(n, SET, np.uint8)),
                    *system,
                    pa.array(np.full(n, self._patterns.number(old.states), np.int32)),
                    pa.nulls(n, pa.string()),
                    data.column(old.shape.system["_committed_at"]),
                    data.column(old.shape.system["_origin"]),
                    raw,
                    *columns,
                ]
                self._route(pa.RecordBatch.from_arrays(arrays, schema=layout.event_schema))
            self._done.removes.append(live.path)

    def _route(self, events: pa.RecordBatch) -> None:
        keys = events.column("key")
        keep = np.ones(events.num_rows, np.bool_)
        if self._truncated is not None:
            keep = ~_orders(events).older_than(self._truncated)
        if keys.null_count:
            lost = keys.is_null().to_numpy(zero_copy_only=False)
            if self._threshold is not None:
                lost &= ~_orders(events).older_than(self._threshold)
            if lost.any():
                raise SchemaConflict(
                    f"table {self._layout.schema.table}: there are changes without the present key",
                    hint=f"cdc resync {self._layout.schema.table}",
                )
            keep &= keys.is_valid().to_numpy(zero_copy_only=False)
        if not keep.all():
            events = events.filter(pa.array(keep))
        hashes = hash_of(events.column("key"))
        part = (hashes % np.uint64(self._n)).astype(np.int64)
        if len(self._scan.linked):
            part[np.isin(hashes, self._scan.linked)] = self._n
        self._spill.add(events, part)

    # ---- keys that belong together ----

    def _resolve_linked(self) -> None:
        """Reduce the linked keys; what they come to joins their buckets as complete rows."""
        events = self._spill.read(self._n)
        if not events.num_rows:
            return
        moved = pc.drop_null(events.column("moved_from"))
        wanted = pc.unique(pa.chunked_array([*events.column("key").chunks, *moved.chunks], pa.string()))
        buckets = set(np.unique(hash_of(wanted) % np.uint64(self._n)).tolist())
        old = [
            OldFile(self._open_current(path), self._layout, None, self._newest)
            for path, name in self._names.items()
            if not self._rebuilt and any(b % name.of == name.bucket for b in buckets)
        ]
        found = find(old, wanted, None)
        reduced = self._reduce(events, found)
        if len(reduced.unresolved):
            self._report(events, reduced)
            return
        assembly = Assembly(self._layout, self._missing, events, reduced)
        del events
        linked = _Linked(assembly.target_of(), found)
        for number, file in enumerate(old):
            if not linked.has(number):
                continue
            for first, data, columns, raw in file.slices(self._missing, lenient=True):
                positions, target = linked.of_slice(number, first, data.num_rows, columns, raw)
                file.require(target is not None)
                self._pass_on(assembly, positions, target)
        self._pass_on(assembly, linked.free, None)
        if len(reduced.cleared_keys):
            orders = reduced.cleared_orders
            columns = [pa.array(orders.epoch), pa.array(orders.lsn), pa.array(orders.seq)]
            self._hand_over(clear_events(self._layout, reduced.cleared_keys, columns))

    def _pass_on(self, assembly: Assembly, positions: np.ndarray, target: TargetRows | None) -> None:
        for part in _cut(positions, assembly.row_bytes):
            columns, raw, final = assembly.rows(part, target)
            index, system = pa.array(final), assembly.system
            arrays = [
                system["key"].take(index),
                pa.array(np.full(len(part), SET, np.uint8)),
                *(system[name].take(index) for name in ("epoch", "lsn", "seq")),
                pa.array(np.zeros(len(part), np.int32)),
                pa.nulls(len(part), pa.string()),
                *(system[name].take(index) for name in ("committed_at", "origin")),
                raw,
                *columns,
            ]
            self._hand_over(pa.RecordBatch.from_arrays(arrays, schema=self._layout.event_schema))

    def _hand_over(self, events: pa.RecordBatch) -> None:
        part = (hash_of(events.column("key")) % np.uint64(self._n)).astype(np.int64)
        self._spill.add(events, part)

    # ---- one bucket ----

    def _bucket(self, bucket: int) -> None:
        events = self._spill.read(bucket)
        old, must = self._old_files(bucket, bool(events.num_rows))
        if not events.num_rows and not must and self._threshold is None:
            return
        wanted = pc.unique(events.column("key"))
        if events.num_rows or self._threshold is not None:
            found = find(old, wanted, self._threshold)
        else:
            found = find([], wanted, None)
        reduced = self._reduce(events, found)
        if len(reduced.unresolved):
            self._report(events, reduced)
        if self._done.unresolved:
            return
        if not (must or found.doomed or len(reduced.upserts) or reduced.dropped.any()):
            return
        self._done.upserted += len(reduced.upserts)
        self._done.deleted += reduced.deleted
        assembly = Assembly(self._layout, self._missing, events, reduced)
        del events
        self._write(bucket, assembly, reduced, found, old)

    def _old_files(self, bucket: int, touched: bool) -> tuple[list[OldFile], bool]:
        """The bucket's present files, and whether they must be rewritten whatever the changes. Files that need not be
        looked at are not opened."""
        if self._rebuilt:
            return [], False
        old: list[OldFile] = []
        must = False
        for path, name in self._names.items():
            if bucket % name.of != name.bucket:
                continue
            doubled = name.of != self._n
            fresh = name.layout == self._layout_print or path in self._known_fresh
            if not (touched or doubled or not fresh or self._stray or self._threshold is not None):
                continue
            part = Part(bucket, self._n) if doubled or self._stray else None
            file = OldFile(self._open_current(path), self._layout, part, self._newest)
            must = must or (self._stray and not doubled and file.has_strays())
            if not fresh:
                fresh = not file.stale(self._missing)
                if fresh:
                    self._known_fresh.add(path)
            must = must or doubled or not fresh
            old.append(file)
        return old, must

    def _reduce(self, events: pa.Table, found: Found) -> Reduced:
        moved = events.column("moved_from")
        orders = [events.column(name).to_numpy() for name in ("epoch", "lsn", "seq")]
        return reduce(
            Events(
                keys=_one(events.column("key")),
                kind=events.column("kind").to_numpy(),
                orders=Orders(*orders),
                pattern=events.column("pattern").to_numpy(),
                moved_from=_one(moved) if moved.null_count < len(moved) else None,
            ),
            Targets(found.keys, found.orders),
            self._patterns.matrix,
            self._barriers,
        )

    def _report(self, events: pa.Table, reduced: Reduced) -> None:
        """Keys of rows that cannot be written, as texts of the key columns."""
        room = UNRESOLVED_MAX - len(self._done.unresolved)
        index = pa.array(reduced.upserts[reduced.unresolved][: max(0, room)])
        rows = events.take(index)
        texts: list[list[str | None]] = []
        for i in self._layout.key_index:
            column = self._layout.schema.columns[i]
            text = pg_text(_one(rows.column(FIRST_COLUMN + i)), column)
            raw = pc.map_lookup(_one(rows.column("raw")), pa.scalar(column.name), "first")
            fallback = _one(rows.column("key")) if len(self._layout.key_index) == 1 else text
            texts.append(pc.coalesce(text, raw, fallback).to_pylist())
        self._done.unresolved += [tuple(t or "" for t in row) for row in zip(*texts, strict=True)]

    def _write(self, bucket: int, assembly: Assembly, reduced: Reduced, found: Found, old: list[OldFile]) -> None:
        linked = _Linked(assembly.target_of(), found)
        writer = BucketWriter(self._scratch / f"bucket-{bucket}.parquet", current_schema(self._layout))
        try:
            for number, file in enumerate(old):
                for first, data, columns, raw in file.slices(self._missing, lenient=True):
                    keep = self._survivors(file, number, first, data, columns, raw, reduced, found)
                    positions, target = linked.of_slice(number, first, data.num_rows, columns, raw)
                    file.require(target is not None or bool(keep.any()))
                    self._add(writer, assembly, positions, target)
                    kept = [
                        data.column(file.shape.system[n])
                        for n in ("_epoch", "_lsn", "_seq", "_committed_at", "_origin")
                    ]
                    rest = [*kept, raw]
                    if not keep.all():
                        mask = pa.array(keep)
                        columns, rest = [c.filter(mask) for c in columns], [c.filter(mask) for c in rest]
                    writer.add(columns, rest)
            self._add(writer, assembly, linked.free, None)
            size = writer.close()
            if size:
                path = BucketName(bucket, self._n, self._key_print, self._layout_print).path()
                self._store_file(writer.path, path)
                self._done.adds.append(AddedFile(path=path, size=size, rows=writer.rows))
        finally:
            writer.abandon()
        for path, name in self._names.items():
            if bucket % name.of == name.bucket and path not in self._done.removes:
                self._done.removes.append(path)

    def _survivors(
        self,
        file: OldFile,
        number: int,
        first: int,
        data: pa.RecordBatch,
        columns: list[pa.Array],
        raw: pa.Array,
        reduced: Reduced,
        found: Found,
    ) -> np.ndarray:
        """Mask of the rows of a slice that stay as they are."""
        keep = np.ones(data.num_rows, np.bool_)
        begin, end = _range(found, number, first, data.num_rows)
        keep[found.row[begin:end][reduced.dropped[begin:end]] - first] = False
        if file.part is not None:
            keep &= file.mine(columns, raw)
        if self._threshold is not None:
            doomed = keep & file.orders(data).older_than(self._threshold)
            self._done.deleted += int(np.count_nonzero(doomed))
            keep &= ~doomed
        return keep

    def _add(self, writer: BucketWriter, assembly: Assembly, positions: np.ndarray, target: TargetRows | None) -> None:
        for part in _cut(positions, assembly.row_bytes):
            columns, raw, final = assembly.rows(part, target)
            index = pa.array(final)
            system = [assembly.system[name].take(index) for name in ("epoch", "lsn", "seq", "committed_at", "origin")]
            writer.add(columns, [*system, raw])


class _Linked:
    """Which rows to write need a row of which slice of the old files; `free` need none."""

    def __init__(self, target_of: np.ndarray, found: Found) -> None:
        self.free = np.flatnonzero(target_of < 0)
        needs = np.flatnonzero(target_of >= 0)
        by = np.argsort(target_of[needs], kind="stable")
        self._positions = needs[by]
        self._targets = target_of[needs][by]
        self._found = found

    def has(self, number: int) -> bool:
        """Whether any row of a file is needed."""
        return bool((self._found.file[self._targets] == number).any())

    def of_slice(
        self, number: int, first: int, rows: int, columns: list[pa.Array], raw: pa.Array
    ) -> tuple[np.ndarray, TargetRows | None]:
        """Positions that need a row of this slice, and those rows."""
        begin, end = _range(self._found, number, first, rows)
        at, to = np.searchsorted(self._targets, [begin, end])
        if at == to:
            return np.empty(0, np.int64), None
        return self._positions[at:to], TargetRows(columns, raw, begin, self._found.row[begin:end] - first)


def _range(found: Found, number: int, first: int, rows: int) -> tuple[int, int]:
    """Found rows that lie in `rows` rows from `first` on of a file."""
    begin, end = np.searchsorted(found.file, [number, number + 1])
    low, high = np.searchsorted(found.row[begin:end], [first, first + rows])
    return int(begin + low), int(begin + high)


def _cut(positions: np.ndarray, row_bytes: int) -> list[np.ndarray]:
    """Positions in slices of a few megabytes of rows."""
    if not len(positions):
        return []
    step = int(min(1 << 15, max(64, (8 << 20) // row_bytes)))
    return [positions[i : i + step] for i in range(0, len(positions), step)]


def _trim_memory() -> None:
    """Give back what Arrow's allocator keeps: a merge is rare, and the process small otherwise."""
    pa.default_memory_pool().release_unused()


def _one(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return column.combine_chunks() if column.num_chunks else pa.array([], column.type)


def _orders(events: pa.RecordBatch) -> Orders:
    return Orders(*(events.column(name).to_numpy(zero_copy_only=False) for name in ("epoch", "lsn", "seq")))
