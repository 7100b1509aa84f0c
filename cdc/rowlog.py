"""What became of each row of a run: one Parquet object per run in the lake, `_syncs/<sync>/runs/<run>.parquet`.

Columns: `key`, `action`, `columns` (that differed), `outcome` (written, rejected, absent, unsent), `reason`. Its
metadata says whence the rows come: plan, model, and per input table the lake's version and position. Rows are noted
after the target has answered and before the next batch is sent, in a local file that outlives the process; so the log
of a run that was killed lacks at most its last batch, and is uploaded at the next start. It is for people and queries:
nothing is decided by it. Keys and reasons, never other values. Objects older than the sync's `history_retain` go.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdc.errors import CdcError
from cdc.lake.layout import runs_path
from cdc.ports import ObjectStore
from cdc.sink import Batch, PushResult

_log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("key", pa.string()), ("action", pa.string()), ("columns", pa.list_(pa.string())), ("outcome", pa.string()),
        ("reason", pa.string()),
    ]
)  # fmt: skip
WRITTEN, REJECTED, ABSENT, UNSENT = "written", "rejected", "absent", "unsent"
ABOUT = b"cdc.run"
"""Key of the object's metadata: JSON about the run."""
_PARTIAL = ".arrows"
_ROWS_AT_ONCE = 64 * 1024


def new_run_id(now: float) -> str:
    """A name for a run that begins now: sorts by time, and is good for object keys."""
    seconds, fraction = divmod(now, 1)
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds)) + f"{int(fraction * 1e6):06d}Z"


class RowLog:
    """The rows of one run, while it runs; `folder` is local."""

    def __init__(self, folder: Path, run: str, about: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        schema = SCHEMA.with_metadata({ABOUT: json.dumps({"run": run, **about}).encode()})
        self._schema = schema
        self._file = (folder / f"{run}{_PARTIAL}").open("wb")
        self._writer = pa.ipc.new_stream(self._file, schema)

    def note(self, batch: Batch, result: PushResult) -> None:
        """What became of a batch."""
        keys = batch.acks.column("key").combine_chunks()
        reasons = {r.key: r.reason for r in result.rejected}
        outcomes = dict.fromkeys(reasons, REJECTED) | dict.fromkeys(result.absent, ABSENT)
        outcomes |= dict.fromkeys(result.unsent, UNSENT)
        columns = batch.differs if batch.differs is not None else pa.nulls(len(keys), pa.list_(pa.string()))
        if outcomes:
            texts = keys.to_pylist()
            outcome = pa.array([outcomes.get(k, WRITTEN) for k in texts], pa.string())
            reason = pa.array([reasons.get(k) for k in texts], pa.string())
        else:
            outcome, reason = pa.repeat(WRITTEN, len(keys)), pa.nulls(len(keys), pa.string())
        label = pa.repeat(batch.label or batch.action, len(keys))
        self._writer.write_batch(
            pa.record_batch([keys, label, columns, outcome, reason], schema=self._schema.remove_metadata())
        )
        self._file.flush()

    def close(self) -> None:
        """Nothing more comes. The file stays until `upload`."""
        self._writer.close()
        self._file.close()


def upload(store: ObjectStore, sync: str, folder: Path) -> None:
    """Put the row logs that lie in `folder` into the lake, whole ones and those of killed runs, and delete them here.
    Blocks. What the store does not take now stays for the next time; nothing is raised for it."""
    for file in sorted(folder.glob(f"*{_PARTIAL}")):
        run = file.name.removesuffix(_PARTIAL)
        made = folder / f"{run}.parquet"
        try:
            if _to_parquet(file, made):
                store.put(_key(sync, run), made.read_bytes())
            file.unlink()
        except (CdcError, OSError, pa.ArrowInvalid) as error:
            _log.warning("a row log stays local", extra={"sync": sync, "run": run, "error": type(error).__name__})
        finally:
            made.unlink(missing_ok=True)


def read(store: ObjectStore, sync: str, run: str) -> tuple[dict[str, Any], pa.Table] | None:
    """About the run, and its rows (SCHEMA); None if there is no log of it (any more). Blocks; StoreUnavailable."""
    found = store.get(_key(sync, run))
    if found is None:
        return None
    table = pq.read_table(pa.BufferReader(found[0]))
    about: dict[str, Any] = json.loads(table.schema.metadata[ABOUT])
    return about, table


def rejected_keys(store: ObjectStore, sync: str, run: str) -> pa.ChunkedArray:
    """Keys that the target rejected in that run; empty if there is no log of it."""
    found = read(store, sync, run)
    if found is None:
        return pa.chunked_array([], pa.string())
    _, table = found
    return table.filter(pc.equal(table.column("outcome"), REJECTED)).column("key")


def tidy(store: ObjectStore, sync: str, oldest: float) -> None:
    """Delete the logs of runs that began before `oldest` (Unix seconds). Blocks; StoreUnavailable."""
    before = _key(sync, new_run_id(oldest))
    store.delete([entry.key for entry in store.list(f"{runs_path(sync)}/") if entry.key < before])


def _key(sync: str, run: str) -> str:
    return f"{runs_path(sync)}/{run}.parquet"


def _to_parquet(file: Path, made: Path) -> bool:
    """Whether there was anything to keep; what a kill cut off is left out."""
    rows = 0
    with file.open("rb") as source:
        try:
            reader = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            return False
        with pq.ParquetWriter(made, reader.schema, compression="zstd") as writer:
            for batch in _whole(reader):
                rows += batch.num_rows
                writer.write_batch(batch, row_group_size=_ROWS_AT_ONCE)
    return rows > 0


def _whole(reader: pa.RecordBatchReader) -> Iterable[pa.RecordBatch]:
    while True:
        try:
            yield reader.read_next_batch()
        except (StopIteration, pa.ArrowInvalid, OSError):
            return
