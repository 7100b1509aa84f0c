"""The merge of a table without a key: `current` is a multiset of rows.

What is in it is what the last complete run read, and the changes since by transactions that its snapshot did not see.
The begin row of a run says what the snapshot sees; in the order of the table the run's rows stand at the begin row,
whenever they arrive. While a run is under way changes go on top of the old state, which is swapped at the run's end.

A delete removes one row that equals its old tuple in every column, an update removes one and adds one. Which of several
equal rows goes makes no difference, and neither does the order of changes between two truncates, so a merge comes down
to a net number per content: what it adds and removes itself cancels out, and only what is left over is looked for in
`current`. A row that is to go and is nowhere is a divergence, and stops the table.

Memory is bounded: contents are sorted into parts by their hash and compared whole, part by part. A merge that only adds
rows writes one more file; one that removes rows reads all of `current` and rewrites the files that held them.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdc.batch import RAW_TYPE
from cdc.errors import Diverged, InvariantBroken, SchemaConflict
from cdc.keys import BEFORE, hash_of, row_texts
from cdc.lake.assemble import Missing
from cdc.lake.bucket import BucketWriter, OldFile, current_schema, orders_of, slice_rows
from cdc.lake.delta import AddedFile, LiveFile
from cdc.lake.events import FileShape, Layout, columns_of, ops_of, raw_in_layout
from cdc.lake.keyed import Rewritten
from cdc.lake.reduce import ABSENT, UNCHANGED, Order
from cdc.lake.rekey import without_identity
from cdc.lake.scan import Control
from cdc.lake.spill import Spill
from cdc.ports import Visibility

FILE_BYTES = 128 << 20
PART_BYTES = 32 << 20
"""Bytes of changes (as encoded in Parquet) that one part should hold at most."""
PARTS_MAX = 1 << 12

_KEPT_SYSTEM = ("_epoch", "_lsn", "_seq", "_committed_at", "_origin")
_CONTENTS = pa.schema([("content", pa.string())])
_WANTED = pa.schema([("content", pa.string()), ("rows", pa.int64())])
_FOUND = pa.schema([("content", pa.string()), ("file", pa.int64()), ("row", pa.int64())])


@dataclass(frozen=True, slots=True)
class Swap:
    """The last complete run: its begin row, and what its snapshot sees."""

    run: str
    at: Order
    version: int
    visibility: Visibility

    def to_text(self) -> str:
        """As the table's configuration keeps it: the begin row's object may be joined with others, or go."""
        seen = self.visibility
        return json.dumps([self.run, self.at, self.version, seen.xmin, seen.xmax, sorted(seen.in_progress)])

    @staticmethod
    def from_text(text: str) -> Swap:
        run, at, version, xmin, xmax, running = json.loads(text)
        return Swap(run, Order(*at), version, Visibility(xmin=xmin, xmax=xmax, in_progress=frozenset(running)))


def swap_of(begin: Control) -> Swap:
    """From the begin row of a run; InvariantBroken if it does not say what the snapshot sees."""
    facts = begin.facts
    if "xmin" not in facts or "xmax" not in facts:
        raise InvariantBroken(f"begin row of keyless run {begin.run} does not say what its snapshot sees")
    running = frozenset(int(x) for x in facts.get("xip", "").split(",") if x)
    seen = Visibility(xmin=int(facts["xmin"]), xmax=int(facts["xmax"]), in_progress=running)
    return Swap(begin.run, begin.order, begin.version, seen)


class KeylessMerge:
    """One merge of a table without a key. `swap`: the last complete run, `fresh`: it ended in this merge (then the
    paths given to `run` begin with its begin row's); `settled`: the stream is past everything that the run's
    snapshot saw; `known_fresh` remembers, between merges, files that the newest layout does not make stale."""

    def __init__(
        self,
        layout: Layout,
        swap: Swap | None,
        *,
        fresh: bool,
        settled: bool,
        scratch: Path,
        live: Iterable[LiveFile],
        open_current: Callable[[str], pq.ParquetFile],
        open_changelog: Callable[[str], pq.ParquetFile],
        store_file: Callable[[Path, str], None],
        known_fresh: set[str],
    ) -> None:
        self._layout = layout
        self._missing = Missing(layout)
        self._swap = swap
        self._fresh = fresh
        self._settled = settled
        self._newer_found = False
        self._live = list(live)
        self._open_current = open_current
        self._open = open_changelog
        self._known_fresh = known_fresh
        self._scratch = scratch
        self._done = Rewritten()
        self._out = _Output(layout, scratch, store_file, self._done)
        self._truncated: Order | None = None
        self._removing = False
        self._changes: _Changes | None = None

    def run(self, paths: Iterable[str]) -> Rewritten:
        """Do it all but the commit. Blocking; Diverged if a row that was deleted or updated is not there,
        IdentityMissing if a change does not say which row it means."""
        paths = list(paths)
        self._survey(paths)
        base = self._live
        if self._fresh or self._truncated is not None:
            self._done.removes = [f.path for f in base]
            self._done.deleted = sum(f.rows for f in base)
            base = []
        try:
            if self._removing:
                self._changes = _Changes(self._layout, self._scratch, self._parts(paths))
            for path in paths:
                file = self._open(path)
                shape = FileShape(file.schema_arrow, self._layout)
                for data in file.iter_batches(slice_rows(file.metadata), use_threads=False):
                    self._take(data, shape)
            self._rewrite(base, self._remove(base) if self._changes is not None else {})
            self._out.finish()
        finally:
            self._out.abandon()
            if self._changes is not None:
                self._changes.close()
        return self._done

    # ---- which changes count ----

    def _survey(self, paths: list[str]) -> None:
        """Find the newest truncate that counts (one that the run's snapshot saw is part of what it read), and whether
        rows may have to be removed."""
        for path in paths:
            file = self._open(path)
            shape = FileShape(file.schema_arrow, self._layout)
            names = [shape.system[name] for name in ("_op", "_epoch", "_lsn", "_seq", "_xid")]
            for data in file.iter_batches(1 << 16, columns=names):
                ops = ops_of(data, shape)
                self._removing = self._removing or bool(np.isin(ops, np.frombuffer(b"ud", np.uint8)).any())
                rows = (ops == ord("t")) & ~self._seen(data, shape, final=False)
                orders = orders_of(data, shape)
                for i in np.flatnonzero(rows).tolist():
                    order = Order(int(orders.epoch[i]), int(orders.lsn[i]), int(orders.seq[i]))
                    counts = not self._fresh or self._swap is None or order > self._swap.at
                    if counts and (self._truncated is None or order > self._truncated):
                        self._truncated = order

    def _take(self, data: pa.RecordBatch, shape: FileShape) -> None:
        ops, orders = ops_of(data, shape), orders_of(data, shape)
        counts = np.isin(ops, np.frombuffer(b"cud", np.uint8))
        if self._swap is not None:
            counts &= ~orders.older_than(self._swap.at) & ~self._seen(data, shape, final=True)
        if self._truncated is not None:
            counts &= ~orders.older_than(self._truncated)
        added = counts & (ops != ord("d"))
        if self._fresh and self._swap is not None and (self._truncated is None or self._truncated < self._swap.at):
            run = data.column(shape.system["_run"])
            of_run = pc.fill_null(pc.equal(run, self._swap.run), False).to_numpy(zero_copy_only=False)
            added |= (ops == ord("r")) & of_run
        for op, prefix in (("d", ""), ("u", BEFORE)):
            gone = counts & (ops == ord(op))
            if gone.any():
                self._take_removed(data.filter(pa.array(gone)), shape, prefix)
        if added.any():
            self._take_added(data if added.all() else data.filter(pa.array(added)), shape)

    def _take_added(self, data: pa.RecordBatch, shape: FileShape) -> None:
        if "_unchanged" in shape.system and data.column(shape.system["_unchanged"]).null_count < data.num_rows:
            raise without_identity(self._layout.schema.table)
        columns, raw = self._in_layout(data, shape, "")
        system = [data.column(shape.system[n]) for n in _KEPT_SYSTEM]
        rows = [*columns, *system, raw]
        if self._changes is None:
            self._out.add(rows)
        else:
            self._changes.add(row_texts(columns, raw, self._layout.names), rows)

    def _take_removed(self, data: pa.RecordBatch, shape: FileShape, prefix: str) -> None:
        assert self._changes is not None
        if prefix and ("_before" not in shape.system or data.column(shape.system["_before"]).null_count):
            raise without_identity(self._layout.schema.table)
        columns, raw = self._in_layout(data, shape, prefix)
        self._changes.remove(row_texts(columns, raw, self._layout.names, rows=data.num_rows))

    def _in_layout(self, data: pa.RecordBatch, shape: FileShape, prefix: str) -> tuple[list[pa.Array], pa.Array]:
        """Columns and `_raw` of the rows, or of their old tuples, as the newest layout has them."""
        columns, states = columns_of(data, shape, old=bool(prefix))
        unsure = np.flatnonzero(states == UNCHANGED)
        if len(unsure):
            table = self._layout.schema.table
            raise SchemaConflict(
                f"table {table}: older values of column {self._layout.names[int(unsure[0])]} do not fit its new type",
                hint=f"cdc resync {table}",
            )
        raw = raw_in_layout(data.column(shape.system["_raw"]), shape.renames, prefix=prefix)
        raw = raw if raw.type == RAW_TYPE else raw.cast(RAW_TYPE)
        return self._missing.fill(columns, raw, np.flatnonzero(states == ABSENT).tolist())

    def _seen(self, data: pa.RecordBatch, shape: FileShape, *, final: bool) -> np.ndarray:
        """Mask of the rows that the last complete run's snapshot has read already. Transaction ids are only comparable
        nearby; but once the stream shows a transaction that began after the snapshot, nothing seen comes any more."""
        none = np.zeros(data.num_rows, np.bool_)
        if self._swap is None or self._settled:
            return none
        xids = data.column(shape.system["_xid"]).to_numpy(zero_copy_only=False)
        streamed = ~np.isin(ops_of(data, shape), np.frombuffer(b"rs", np.uint8))
        after = streamed & ~orders_of(data, shape).older_than(self._swap.at)
        if final:
            whole = Visibility(
                xmin=self._swap.visibility.xmax, xmax=self._swap.visibility.xmax, in_progress=frozenset()
            )
            newer = after & ~whole.sees(xids)
            self._newer_found = self._newer_found or bool(newer.any())
        return np.asarray(after & self._swap.visibility.sees(xids))

    @property
    def settles(self) -> bool:
        """Whether the rows of this merge went past everything that the run's snapshot saw."""
        return self._settled or self._newer_found

    # ---- what they come to ----

    def _parts(self, paths: list[str]) -> int:
        """Number of parts that bound what is in memory at once: a power of two."""
        size = 0
        for path in paths:
            metadata = self._open(path).metadata
            size += sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        n = 1
        while n < PARTS_MAX and size > n * PART_BYTES:
            n *= 2
        return n

    def _remove(self, base: list[LiveFile]) -> dict[int, np.ndarray]:
        """Settle the changes among themselves, write the rows that they add, and find those that go from `base`: rows
        per number of a file."""
        assert self._changes is not None
        wanted = self._changes.settle(self._out)
        if wanted:
            for number, live in enumerate(base):
                old = OldFile(self._open_current(live.path), self._layout, None)
                for first, data, columns, raw in old.slices(self._missing):
                    texts = row_texts(columns, raw, self._layout.names, rows=data.num_rows)
                    self._changes.found(texts, number, first)
        gone, lost = self._changes.matched()
        if lost:
            table = self._layout.schema.table
            raise Diverged(
                f"table {table}: rows that the source deleted or updated are not in its current table: {lost}",
                hint=f"cdc resync {table}",
            )
        return gone

    def _rewrite(self, base: list[LiveFile], gone: dict[int, np.ndarray]) -> None:
        """Write the files anew that lose rows, or that would be read wrongly under the newest layout."""
        for number, live in enumerate(base):
            rows = gone.get(number)
            if rows is None and live.path in self._known_fresh:
                continue
            old = OldFile(self._open_current(live.path), self._layout, None)
            if rows is None and not old.stale(self._missing):
                self._known_fresh.add(live.path)
                continue
            self._done.removes.append(live.path)
            for first, data, columns, raw in old.slices(self._missing):
                kept = [*columns, *(data.column(old.shape.system[n]) for n in _KEPT_SYSTEM), raw]
                if rows is not None:
                    keep = np.ones(data.num_rows, np.bool_)
                    low, high = np.searchsorted(rows, [first, first + data.num_rows])
                    keep[rows[low:high] - first] = False
                    kept = [c.filter(pa.array(keep)) for c in kept]
                self._out.add(kept, new=False)
            self._done.deleted += 0 if rows is None else len(rows)


class _Output:
    """Files of `current`, of bounded size, one after the other."""

    def __init__(self, layout: Layout, scratch: Path, store_file: Callable[[Path, str], None], done: Rewritten) -> None:
        self._schema = current_schema(layout)
        self._scratch = scratch
        self._store_file = store_file
        self._done = done
        self._writer: BucketWriter | None = None

    def add(self, rows: list[pa.Array], *, new: bool = True) -> None:
        """Columns of the layout and system columns; `new`: they were not in `current` before."""
        count = len(rows[-1])
        if not count:
            return
        if self._writer is None:
            self._writer = BucketWriter(self._scratch / f"rows-{len(self._done.adds)}.parquet", self._schema)
        self._done.upserted += count if new else 0
        self._writer.add(rows[: len(rows) - len(_KEPT_SYSTEM) - 1], rows[len(rows) - len(_KEPT_SYSTEM) - 1 :])
        if self._writer.path.exists() and self._writer.path.stat().st_size > FILE_BYTES:
            self.finish()

    def finish(self) -> None:
        if self._writer is None:
            return
        size = self._writer.close()
        if size:
            path = f"rows-{uuid.uuid4().hex}.parquet"
            self._store_file(self._writer.path, path)
            self._done.adds.append(AddedFile(path=path, size=size, rows=self._writer.rows))
        self.abandon()

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None


class _Changes:
    """Rows added and removed, sorted into parts by the hash of their content."""

    def __init__(self, layout: Layout, scratch: Path, parts: int) -> None:
        self._parts = parts
        numbered = [pa.field(str(i), f.type) for i, f in enumerate(current_schema(layout))]
        self._added = Spill(scratch / "added", pa.schema([_CONTENTS.field(0), *numbered]))
        self._removed = Spill(scratch / "removed", _CONTENTS)
        self._wanted = Spill(scratch / "wanted", _WANTED)
        self._found = Spill(scratch / "found", _FOUND)
        self._hashes = np.empty(0, np.uint64)
        self._most = 0

    def add(self, contents: pa.Array, rows: list[pa.Array]) -> None:
        self._spill(self._added, contents, rows)

    def remove(self, contents: pa.Array) -> None:
        self._spill(self._removed, contents, [])

    def settle(self, out: _Output) -> bool:
        """What is both added and removed cancels out. The other added rows are written; whether some removed ones are
        left, to be looked for."""
        hashes: list[np.ndarray] = []
        for part in range(self._parts):
            removed = _one(self._removed.read(part).column(0))
            added = self._added.read(part)
            together = pa.chunked_array([_one(added.column(0)), removed]).combine_chunks().dictionary_encode()
            codes = together.indices.to_numpy(zero_copy_only=False).astype(np.int64)
            to_add, to_remove = codes[: added.num_rows], codes[added.num_rows :]
            gone = np.bincount(to_remove, minlength=len(together.dictionary))
            cancelled = np.minimum(np.bincount(to_add, minlength=len(gone)), gone)
            left = added.filter(pa.array(_rank(to_add) >= cancelled[to_add]))
            for batch in left.to_batches():
                out.add(batch.columns[1:])
            rest = gone - cancelled
            at = np.flatnonzero(rest)
            if len(at):
                texts = together.dictionary.take(pa.array(at))
                wanted = pa.RecordBatch.from_arrays([texts, pa.array(rest[at])], schema=_WANTED)
                self._wanted.add(wanted, np.full(len(at), part))
                hashes.append(hash_of(texts))
                self._most = max(self._most, int(rest.max()))
        self._hashes = np.unique(np.concatenate(hashes)) if hashes else self._hashes
        return bool(len(self._hashes))

    def found(self, contents: pa.Array, file: int, first: int) -> None:
        """Rows of `current`, from `first` on of a file: those that may be meant are noted."""
        hashes = hash_of(contents)
        place = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        at = np.flatnonzero(self._hashes[place] == hashes)
        if not len(at):
            return
        picked = contents.take(pa.array(at))
        if len(at) > self._most:
            # Of many equal rows no more than are to go need to be noted.
            few = _rank(picked.dictionary_encode().indices.to_numpy(zero_copy_only=False)) < self._most
            at, picked = at[few], picked.filter(pa.array(few))
        self._spill(self._found, picked, [pa.array(np.full(len(at), file)), pa.array(at + first)])

    def matched(self) -> tuple[dict[int, np.ndarray], int]:
        """Rows that go, ascending per number of a file; and how many are to go that are nowhere."""
        files: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        lost = 0
        for part in range(self._parts):
            wanted, found = self._wanted.read(part), self._found.read(part)
            if not wanted.num_rows:
                continue
            place = pc.index_in(_one(found.column("content")), value_set=_one(wanted.column("content")))
            meant = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
            which = place.take(pa.array(meant)).to_numpy(zero_copy_only=False).astype(np.int64)
            counts = wanted.column("rows").to_numpy()
            taken = meant[_rank(which) < counts[which]]
            lost += int(counts.sum()) - len(taken)
            files.append(found.column("file").to_numpy()[taken])
            rows.append(found.column("row").to_numpy()[taken])
        if not files:
            return {}, lost
        file, row = np.concatenate(files), np.concatenate(rows)
        return {int(f): np.sort(row[file == f]) for f in np.unique(file)}, lost

    def close(self) -> None:
        for spill in (self._added, self._removed, self._wanted, self._found):
            spill.close()

    def _spill(self, spill: Spill, contents: pa.Array, rest: list[pa.Array]) -> None:
        part = (hash_of(contents) % np.uint64(self._parts)).astype(np.int64)
        spill.add(pa.RecordBatch.from_arrays([contents, *rest], schema=spill.schema), part)


def _rank(codes: np.ndarray) -> np.ndarray:
    """How many equal ones stand before each."""
    by = np.argsort(codes, kind="stable")
    ordered = codes[by]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(codes) else by
    sizes = np.diff(np.append(starts, len(codes)))
    rank = np.empty(len(codes), np.int64)
    rank[by] = np.arange(len(codes)) - np.repeat(starts, sizes)
    return rank


def _one(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return column.combine_chunks() if column.num_chunks else pa.array([], column.type)
