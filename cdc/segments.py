"""Segment files of the event log: append-only bytes on disk, nothing else.

A segment is named after the first offset that it may hold. Bytes count only if the index (in the state database)
names them, so a write has three outcomes: `accept` (the index names it now), `withdraw` (it will never be named: cut
off again) or `leave` (unknown whether it is: kept, and never written over). What a crash leaves behind is cleared by
`recover`. A failed write or fsync ends the segment, because nobody can tell what the kernel kept of it. One process
writes.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cdc.database import sync_directory
from cdc.errors import CdcError, FormatTooNew, LogCorrupt, LogFull, StoreUnavailable
from cdc.failpoints import failpoint

log = logging.getLogger(__name__)

MAGIC = b"cdc-log\x01"
"""First bytes of every segment; the last one is the format version."""
HEADER_BYTES = 16
"""Magic, then the segment's number (little endian)."""
_BUFFERS_PER_CALL = 512
"""Below IOV_MAX of every system."""


@dataclass(frozen=True, slots=True)
class Written:
    """Where the buffers of one write are: synced, and not yet named by the index."""

    segment: int
    starts: list[int]
    end: int


class SegmentFiles:
    """The files of one log directory. Not thread-safe but for `read`; `recover` comes first in a writing process."""

    def __init__(self, directory: Path, *, segment_bytes: int) -> None:
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._sizes: dict[int, int] = {}
        self._active: int | None = None
        self._fd = -1
        self._pending: tuple[int, int] | None = None

    @property
    def bytes(self) -> int:
        """Bytes on disk of all segments that exist."""
        return sum(self._sizes.values())

    @property
    def sizes(self) -> Mapping[int, int]:
        """Segment number → bytes on disk."""
        return self._sizes

    def path(self, segment: int) -> Path:
        return self._directory / f"{segment:020d}.seg"

    def recover(self, named: Mapping[int, int]) -> int:
        """Make the directory hold exactly what the index names (segment → end of its named bytes); the number of
        bytes that were dropped. LogCorrupt if named bytes are missing, FormatTooNew for a newer segment; then nothing
        is dropped."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        sync_directory(self._directory.parent)
        found = {int(p.stem): p for p in self._directory.glob("*.seg") if p.stem.isdecimal() and len(p.stem) == 20}
        for segment, end in sorted(named.items()):
            self._check(segment, end)
        dropped = 0
        for segment, path in sorted(found.items()):
            size, keep = path.stat().st_size, named.get(segment)
            if keep is None:
                path.unlink()
                dropped += size
            elif size > keep:
                _cut(path, keep)
                dropped += size - keep
        sync_directory(self._directory)
        self._sizes = dict(named)
        if dropped:
            log.info("dropped bytes of the event log that its index does not name", extra={"bytes": dropped})
        return dropped

    def load(self, named: Mapping[int, int]) -> None:
        """Know the segments without touching a file, for a process that only reads."""
        self._sizes = dict(named)

    def _check(self, segment: int, end: int) -> None:
        path = self.path(segment)
        try:
            with path.open("rb") as file:
                header = file.read(HEADER_BYTES)
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            raise LogCorrupt(f"segment {path.name} of the event log is gone", hint=_LOST) from None
        if header[:7] == MAGIC[:7] and header[7:8] > MAGIC[7:]:
            raise FormatTooNew(f"segment {path.name} has format {header[7]}", hint="run the newer version of cdc")
        if header != _header(segment) or size < end:
            raise LogCorrupt(f"segment {path.name} has {size} bytes, its index names {end}", hint=_LOST)

    def write(self, first_offset: int, buffers: Sequence[Any]) -> Written:
        """Append buffers, sync them (and the directory, for a new segment). Raises LogFull if the disk is full,
        StoreUnavailable for another failure; then nothing of the write stays. `first_offset` names a new segment."""
        assert self._pending is None
        try:
            if self._active is not None and self._sizes[self._active] >= self._segment_bytes:
                self.roll()
            created = self._active is None
            if created:
                self._create(first_offset)
            segment = self._active
            assert segment is not None
            begin = self._sizes[segment]
            self._pending = (segment, begin)
            data = [memoryview(buffer).cast("B") for buffer in buffers]
            starts, end = [], begin
            for view in data:
                starts.append(end)
                end += view.nbytes
            # The size is known before the write: bytes that may be there count as there.
            self._sizes[segment] = end
            _write_all(self._fd, data, begin)
            failpoint("log.after_write")
            os.fsync(self._fd)
            if created:
                sync_directory(self._directory)
            failpoint("log.after_fsync")
        except OSError as error:
            self._give_up()
            raise self._failed(error) from error
        except BaseException:
            self._give_up()
            raise
        return Written(segment, starts, end)

    def _failed(self, error: OSError) -> CdcError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return LogFull(
                f"no space left for the event log in {self._directory} ({error.strerror})",
                hint="free space on the disk of state_dir; capture goes on by itself",
            )
        return StoreUnavailable(f"the event log in {self._directory} cannot be written ({error.strerror})")

    def _create(self, segment: int) -> None:
        path = self.path(segment)
        if segment in self._sizes:
            raise LogCorrupt(f"segment {path.name} of the event log exists already")
        # Truncating: a file of that name which nobody knows is the rest of a write that failed.
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._active = segment
        self._sizes[segment] = 0
        self._pending = (segment, 0)
        _write_all(self._fd, [memoryview(_header(segment))], 0)
        self._sizes[segment] = HEADER_BYTES

    def accept(self) -> None:
        """The last write is named by the index."""
        self._pending = None

    def withdraw(self) -> None:
        """The last write will not be named by the index: cut it off."""
        self._give_up()

    def leave(self) -> None:
        """Nobody knows whether the index names the last write: keep the bytes, and go on behind them."""
        self._pending = None

    def _give_up(self) -> None:
        """Undo a write as well as the disk allows, and end its segment: what fsync failed on cannot be trusted."""
        pending, self._pending = self._pending, None
        if pending is None:
            self.roll()
            return
        segment, begin = pending
        try:
            if begin <= HEADER_BYTES:
                self.path(segment).unlink(missing_ok=True)
                del self._sizes[segment]
            else:
                os.ftruncate(self._fd, begin)
                self._sizes[segment] = begin
        except OSError:
            log.warning("could not cut a failed write off the event log", extra={"segment": segment})
        self.roll()

    def roll(self) -> None:
        """The next write begins a new segment."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._active = -1, None

    def drop(self, segment: int) -> int:
        """Unlink a segment that the index names no more; its bytes. Never fails: recovery would finish it."""
        if segment == self._active:
            self.roll()
        try:
            self.path(segment).unlink(missing_ok=True)
        except OSError as error:
            log.warning("could not remove a segment", extra={"segment": segment, "reason": error.strerror})
            return 0
        return self._sizes.pop(segment, 0)

    def read(self, segment: int, start: int, length: int) -> pa.Buffer | None:
        """Bytes of a segment in an Arrow buffer, None if the file does not have them. Thread-safe.

        StoreUnavailable if the disk fails."""
        try:
            fd = os.open(self.path(segment), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreUnavailable(f"segment {segment} of the event log cannot be opened ({error.strerror})") from error
        try:
            buffer = pa.allocate_buffer(length)
            view = memoryview(buffer).cast("B")
            done = 0
            while done < length:
                count = os.preadv(fd, [view[done:]], start + done)
                if count == 0:
                    return None
                done += count
            return buffer
        except OSError as error:
            raise StoreUnavailable(f"segment {segment} of the event log cannot be read ({error.strerror})") from error
        finally:
            os.close(fd)

    def close(self) -> None:
        self.roll()


_LOST = (
    "the state directory was changed from outside, or its disk lost data. With confirm_after = 'landed': stop the "
    "daemon, move state_dir away and start again, nothing is lost; with 'log': do the same and resync every table"
)


def _header(segment: int) -> bytes:
    return MAGIC + segment.to_bytes(8, "little")


def _cut(path: Path, size: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, views: Sequence[memoryview], position: int) -> None:
    """pwritev until everything is written: the kernel may take less than it was given."""
    rest = [view for view in views if view.nbytes]
    while rest:
        count = os.pwritev(fd, rest[:_BUFFERS_PER_CALL], position)
        if count == 0:
            raise OSError(errno.ENOSPC, "the disk takes no more bytes")
        position += count
        taken = 0
        while taken < len(rest) and count >= rest[taken].nbytes:
            count -= rest[taken].nbytes
            taken += 1
        del rest[:taken]
        if count:
            rest[0] = rest[0][count:]
