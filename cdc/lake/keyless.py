"""The merge of a table without a key: rows are only ever inserted.

`current` is what the last complete run read, and the rows inserted since by transactions that its snapshot did not see.
The begin row of a run says what the snapshot sees; in the order of the table the run's rows stand at the begin row,
whenever they arrive. While a run is under way inserts go on top of the old state, which is swapped at the run's end.
Updates and deletes cannot be applied: which of several equal rows they mean is not known.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdc.batch import RAW_TYPE
from cdc.errors import IdentityMissing, InvariantBroken
from cdc.lake.assemble import Missing
from cdc.lake.bucket import BucketWriter, current_schema, orders_of, slice_rows
from cdc.lake.delta import AddedFile, LiveFile
from cdc.lake.events import FileShape, Layout, columns_of, ops_of, raw_in_layout
from cdc.lake.keyed import Rewritten
from cdc.lake.reduce import ABSENT, Order
from cdc.lake.scan import Control, Scan
from cdc.ports import Visibility

FILE_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Swap:
    """The last complete run: its begin row, and what its snapshot sees."""

    run: str
    at: Order
    version: int
    visibility: Visibility


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
    snapshot saw."""

    def __init__(
        self,
        layout: Layout,
        scan: Scan,
        swap: Swap | None,
        *,
        fresh: bool,
        settled: bool,
        scratch: Path,
        live: Iterable[LiveFile],
        open_changelog: Callable[[str], pq.ParquetFile],
        store_file: Callable[[Path, str], None],
    ) -> None:
        self._layout = layout
        self._missing = Missing(layout)
        self._swap = swap
        self._fresh = fresh
        self._settled = settled
        self._newer_found = False
        self._scratch = scratch
        self._live = list(live)
        self._open = open_changelog
        self._store_file = store_file
        self._done = Rewritten()
        self._writer: BucketWriter | None = None
        self._scan = scan
        self._files = 0

    def run(self, paths: Iterable[str]) -> Rewritten:
        """Do it all but the commit. Blocking; IdentityMissing if there are updates or deletes."""
        if self._scan.rows["u"] or self._scan.rows["d"]:
            raise IdentityMissing(
                f"table {self._layout.schema.table} has no key, so its updates and deletes cannot be applied",
                hint=f"add a primary key, or ALTER TABLE {self._layout.schema.table} REPLICA IDENTITY USING INDEX …",
            )
        paths = list(paths)
        truncated = self._last_truncate(paths)
        if self._fresh or truncated is not None:
            self._done.removes = [f.path for f in self._live]
            self._done.deleted = sum(f.rows for f in self._live)
        try:
            for path in paths:
                file = self._open(path)
                shape = FileShape(file.schema_arrow, self._layout)
                for data in file.iter_batches(slice_rows(file.metadata)):
                    self._take(data, shape, truncated)
            self._finish_file()
        finally:
            if self._writer is not None:
                self._writer.abandon()
        return self._done

    def _last_truncate(self, paths: list[str]) -> Order | None:
        """The newest truncate that counts: one that the run's snapshot saw is part of what it read."""
        newest: Order | None = None
        for path in paths:
            file = self._open(path)
            shape = FileShape(file.schema_arrow, self._layout)
            names = [shape.system[name] for name in ("_op", "_epoch", "_lsn", "_seq", "_xid")]
            for data in file.iter_batches(1 << 16, columns=names):
                rows = (ops_of(data, shape) == ord("t")) & ~self._seen(data, shape, final=False)
                orders = orders_of(data, shape)
                for i in np.flatnonzero(rows).tolist():
                    order = Order(int(orders.epoch[i]), int(orders.lsn[i]), int(orders.seq[i]))
                    if (not self._fresh or self._swap is None or order > self._swap.at) and (
                        newest is None or order > newest
                    ):
                        newest = order
        return newest

    def _take(self, data: pa.RecordBatch, shape: FileShape, truncated: Order | None) -> None:
        ops, orders = ops_of(data, shape), orders_of(data, shape)
        keep = ops == ord("c")
        if self._swap is not None:
            keep &= ~orders.older_than(self._swap.at) & ~self._seen(data, shape, final=True)
        if truncated is not None:
            keep &= ~orders.older_than(truncated)
        if self._fresh and self._swap is not None and (truncated is None or truncated < self._swap.at):
            run = data.column(shape.system["_run"])
            keep |= (ops == ord("r")) & pc.fill_null(pc.equal(run, self._swap.run), False).to_numpy(
                zero_copy_only=False
            )
        if not keep.any():
            return
        if not keep.all():
            data = data.filter(pa.array(keep))
        columns, states = columns_of(data, shape)
        system = [data.column(shape.system[n]) for n in ("_epoch", "_lsn", "_seq", "_committed_at", "_origin")]
        raw = raw_in_layout(data.column(shape.system["_raw"]), shape.renames)
        columns, raw = self._missing.fill(columns, raw, np.flatnonzero(states == ABSENT).tolist())
        self._done.upserted += data.num_rows
        if self._writer is None:
            path = self._scratch / f"rows-{self._files}.parquet"
            self._writer = BucketWriter(path, current_schema(self._layout))
        self._writer.add(columns, [*system, raw if raw.type == RAW_TYPE else raw.cast(RAW_TYPE)])
        if self._writer.path.exists() and self._writer.path.stat().st_size > FILE_BYTES:
            self._finish_file()

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

    def _finish_file(self) -> None:
        if self._writer is None:
            return
        size = self._writer.close()
        if size:
            path = f"rows-{uuid.uuid4().hex}.parquet"
            self._store_file(self._writer.path, path)
            self._done.adds.append(AddedFile(path=path, size=size, rows=self._writer.rows))
        self._writer.abandon()
        self._writer = None
        self._files += 1
