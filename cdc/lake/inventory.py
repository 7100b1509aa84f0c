"""What one Delta table of the lake has in the store, and what will become of it: for `cdc lake ls`.

Reads the table's log and lists its objects; opens none of them, and needs nothing of the daemon.
"""

from __future__ import annotations

import math
from typing import Any

from cdc.lake.cooling import COLD_BYTES_MAX, COLD_BYTES_MIN
from cdc.lake.delta import DeltaLog, LiveFile
from cdc.lake.layout import date_column
from cdc.lake.retention import commit_date, newest_s
from cdc.ports import ObjectStore

_DAY_S = 86_400.0


def inventory(store: ObjectStore, path: str, *, small_bytes: int, cold_class: str = "") -> dict[str, Any] | None:
    """Version, files, rows and sizes of the table at `path`; None if there is none. Small files are those below
    `small_bytes`, dead bytes those of objects that the newest version does not show, cold files those that lie in
    `cold_class`."""
    table = DeltaLog(store, path)
    if not table.exists():
        return None
    files, version = table.files(), table.version()
    live = {f"{path}/{f.path}": f for f in files}
    dead_bytes, cold = 0, []
    for found in store.list(f"{path}/"):
        if found.key.startswith(f"{path}/_delta_log/"):
            continue
        if found.key not in live:
            dead_bytes += found.size
        elif cold_class and found.storage_class == cold_class:
            cold.append(found.size)
    small = sum(f.size < small_bytes for f in files)
    return {
        "path": path,
        "version": version,
        "files": len(files),
        "rows": sum(f.rows for f in files),
        "bytes": sum(f.size for f in files),
        "small_files": small,
        "small_ratio": round(small / len(files), 3) if files else 0.0,
        "dead_bytes": dead_bytes,
        "cold_files": len(cold),
        "cold_bytes": sum(cold),
        "log_entries": version - table.checkpointed(),
        **_ages(table, files),
    }


def lifecycle(
    store: ObjectStore, path: str, *, retain_s: float, cold_after_s: float, cold_class: str = ""
) -> dict[str, Any]:
    """What retention takes next out of the changelog at `path`, and what is put away next: `at` (Unix time, the past if
    it is due), `files` and `bytes` of what goes within a day of that; None: nothing ever does."""
    table = DeltaLog(store, path)
    files, date = table.files(), commit_date(table)
    warm: list[LiveFile] = []
    if math.isfinite(cold_after_s):
        listed = store.list(f"{path}/")
        cold = {o.key.removeprefix(f"{path}/") for o in listed if o.storage_class == cold_class}
        warm = [f for f in files if f.path not in cold and COLD_BYTES_MIN <= f.size <= COLD_BYTES_MAX]
    return {"expires": _next(files, date, retain_s), "cools": _next(warm, date, cold_after_s)}


def _next(files: list[LiveFile], date: str | None, after_s: float) -> dict[str, Any] | None:
    if not files or math.isinf(after_s):
        return None
    due = {f.path: newest_s(f, date) + after_s for f in files}
    first = min(due.values())
    going = [f for f in files if due[f.path] < first + _DAY_S]
    return {"at": first, "files": len(going), "bytes": sum(f.size for f in going)}


def _ages(table: DeltaLog, files: list[LiveFile]) -> dict[str, str | None]:
    """The first and last of the partitions (`_date`) of a table that has some."""
    column = date_column(table.partition_columns()) or ""
    dates = [str(f.partition[column]) for f in files if f.partition.get(column) is not None]
    return {"oldest_date": min(dates, default=None), "newest_date": max(dates, default=None)}


__all__ = ["inventory", "lifecycle"]
