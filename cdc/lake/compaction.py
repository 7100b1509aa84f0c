"""Small objects of a changelog joined into bigger ones, so that reading does not cost a request per landing.

Guarantees:
- A join changes no row: what it replaces and what it adds is one Delta commit that says so (`dataChange` false), and
  is checked in the version committed upon. Readers of older versions keep their objects until a vacuum.
- It takes only what merges are done with: nothing that `current` has not merged, nor what a later merge reads again.
- Each byte is written again a few times at most: objects are joined with others of their size (each tier is eight times
  the one before), and once a partition's day is past, and nothing has come for it for an hour, with whatever is left of
  it, as long as that is no eighth of what it would be joined to: rows may come late for ever.
- Objects of one partition only are joined, so that what its name says stays true.
- Memory is bounded by a row group, the disk by two objects.

It does not decide when (cdc.merge), and deletes nothing: replaced objects go with the vacuum. One thread per table.
"""

from __future__ import annotations

import datetime as dt
import mmap
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from cdc.errors import InvariantBroken, StoreConflict, StoreUnavailable
from cdc.failpoints import failpoint
from cdc.lake.commits import LEASE
from cdc.lake.delta import AddedFile, DeltaLog, LiveFile
from cdc.lake.naming import JOINED, ObjectName
from cdc.lake.rewriting import SameRows, batches_of
from cdc.ports import ObjectStore

FEW: Final = 8
"""So many objects of one size are worth a join."""
_TIER_BITS: Final = 3
"""A tier is this power of two."""
_QUIET_MS: Final = 3_600_000


@dataclass(frozen=True, slots=True)
class Joined:
    """What one join did."""

    objects: int
    bytes_after: int


class Compactor:
    """Joins objects of one changelog. `temp_dir` is for scratch files, which may be lost."""

    def __init__(
        self, store: ObjectStore, delta: DeltaLog, prefix: str, *, temp_dir: Path, target_bytes: int, term: int = 0
    ) -> None:
        """`prefix`: what the changelog's system columns begin with. `target_bytes`: where objects stop growing. `term`:
        fence of the lease, 0 without one."""
        self._store = store
        self._delta = delta
        self._prefix = prefix
        self._temp_dir = temp_dir
        self._target_bytes = target_bytes
        self._term = term
        self._shapes: dict[str, pa.Schema] = {}

    def join(
        self, version: int, held: Collection[str], *, all_sizes: bool = False, now_s: float | None = None
    ) -> Joined | None:
        """One join of objects of a version; None if nothing is worth it. Blocking; durable on return.

        `held`: paths that merges still need. `all_sizes`: also what is not worth it by itself. `now_s`: Unix time.
        StoreConflict if somebody else replaced one of the objects meanwhile: nothing happened then.
        """
        try:
            return self._join(version, held, all_sizes, time.time() if now_s is None else now_s)
        except OSError as e:
            raise StoreUnavailable(
                f"{self._temp_dir}, where objects are joined, cannot be written: {e.strerror}", hint="make room there"
            ) from e

    def _join(self, version: int, held: Collection[str], all_sizes: bool, now_s: float) -> Joined | None:
        live = self._delta.files(version)
        paths = {f.path for f in live}
        self._shapes = {path: shape for path, shape in self._shapes.items() if path in paths}
        self._temp_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="join-", dir=self._temp_dir) as scratch:
            for group, worth in self._groups(live, held, all_sizes, now_s):
                for alike in self._alike(group):
                    some = _up_to(alike if all_sizes else _balanced(alike), self._target_bytes)
                    if len(some) >= worth:
                        return self._replace(some, Path(scratch))
        return None

    def _groups(
        self, live: Sequence[LiveFile], held: Collection[str], all_sizes: bool, now_s: float
    ) -> list[tuple[list[LiveFile], int]]:
        """Small objects that may be joined, and how many of them are worth it: by partition, epoch and tier; of a
        partition that is past and quiet whatever is small."""
        today = str(dt.datetime.fromtimestamp(now_s, dt.UTC).date())
        partitions: dict[tuple[tuple[str, ...], int], list[LiveFile]] = {}
        for file in live:
            name = ObjectName.of(file.path)
            if name is not None and file.path not in held and file.size <= self._target_bytes // 2:
                # Null, for rows without a time, is past as soon as it is quiet.
                dates = tuple(value or "" for _, value in sorted(file.partition.items()))
                partitions.setdefault((dates, name.epoch), []).append(file)
        groups: list[tuple[list[LiveFile], int]] = []
        for (dates, _), files in sorted(partitions.items(), key=lambda item: item[0]):
            # Of one partition and epoch, so by position: names are written with all their digits.
            files.sort(key=lambda f: f.path)
            # An hour is past when its day is; a month when no day of it is today.
            past = all(date < today[: len(date) or None] for date in dates)
            quiet = max(f.added_ms for f in files) < now_s * 1000 - _QUIET_MS
            if all_sizes or (past and quiet):
                groups.append((files, 2))
                continue
            tiers: dict[int, list[LiveFile]] = {}
            for file in files:
                tiers.setdefault(file.size.bit_length() // _TIER_BITS, []).append(file)
            groups += [(tiers[tier], FEW) for tier in sorted(tiers)]
        return [(files, worth) for files, worth in groups if len(files) >= worth]

    def _alike(self, files: Sequence[LiveFile]) -> list[list[LiveFile]]:
        """The files by schema, metadata included: what their rows are known by stands there."""
        found: list[tuple[pa.Schema, list[LiveFile]]] = []
        for file in files:
            if file.path not in self._shapes:
                with self._delta.open_file(file.path) as opened:
                    self._shapes[file.path] = opened.schema_arrow
            shape = self._shapes[file.path]
            same = next((of for known, of in found if known.equals(shape, check_metadata=True)), None)
            if same is None:
                found.append((shape, [file]))
            else:
                same.append(file)
        return [of for _, of in found]

    def _replace(self, files: Sequence[LiveFile], scratch: Path) -> Joined:
        names = [name for f in files if (name := ObjectName.of(f.path)) is not None]
        first, last = min(n.first_lsn for n in names), max(n.last_lsn for n in names)
        folder = files[0].path.rpartition("/")[0]
        path = f"{folder}/{ObjectName(names[0].epoch, first, last, JOINED, self._term).fresh()}"
        local = scratch / "joined"
        rows = _write(local, (self._delta.open_file(f.path) for f in files), self._prefix)
        if rows != sum(f.rows for f in files):
            raise InvariantBroken(f"{self._delta.prefix}: a join has {rows} rows, its objects have another number")
        size = local.stat().st_size
        key = f"{self._delta.prefix}/{path}"
        with local.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            self._store.put(key, mapped)
        added = AddedFile(
            path=path, size=size, rows=rows, partition=files[0].partition, added_ms=max(f.added_ms for f in files)
        )
        failpoint("compact.before_commit")
        try:
            self._delta.commit(
                adds=[added],
                removes=[f.path for f in files],
                # So that a join of a former holder of the lease fails, whose object may have been reclaimed.
                tokens={LEASE: self._term} if self._term else {},
                data_change=False,
            )
        except StoreConflict:
            with suppress(StoreUnavailable):
                self._store.delete([key])
            raise
        failpoint("compact.after_commit")
        return Joined(len(files), size)


def _up_to(files: Sequence[LiveFile], target_bytes: int) -> list[LiveFile]:
    """The first files that make one object together; what would make it too big is passed over."""
    some: list[LiveFile] = []
    size = 0
    for file in files:
        if size + file.size <= target_bytes:
            some.append(file)
            size += file.size
    return some


def _balanced(files: Sequence[LiveFile]) -> list[LiveFile]:
    """Without those that are more than FEW times as big as all smaller ones together: few late rows are no reason to
    write a whole object again."""
    some: list[LiveFile] = []
    size = 0
    for file in sorted(files, key=lambda f: f.size):
        if file.size > FEW * size:
            if len(some) > 1:
                break
            some, size = [], 0
        some.append(file)
        size += file.size
    chosen = {f.path for f in some}
    return [f for f in files if f.path in chosen]


def _write(path: Path, files: Iterator[pq.ParquetFile], prefix: str) -> int:
    """The rows of files of one schema as one file, one after the other; how many they are."""
    writer: SameRows | None = None
    try:
        for file in files:
            with file:
                if writer is None:
                    writer = SameRows(path, file.schema_arrow, prefix)
                for batch in batches_of(file):
                    writer.add(batch)
        return 0 if writer is None else writer.finish()
    except (OSError, pa.ArrowException) as e:
        if writer is not None:
            writer.abandon()
        raise StoreUnavailable(f"a join of objects failed: {type(e).__name__}", hint="make room on the disk") from e


__all__ = ["FEW", "Compactor", "Joined"]
