"""Rows sorted into parts that do not fit into memory together: held until a bound is reached, then in one local file.

The file is scratch: it has no format version, nobody else reads it, and a crash leaves it to be removed with its
directory. One file for all parts, whatever their number, so that open files stay bounded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

MEMORY_BYTES = 8 << 20


class Spill:
    """Record batches of one schema, by part number."""

    def __init__(self, path: Path, schema: pa.Schema, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._path = path
        self.schema = schema
        self._memory_bytes = memory_bytes
        self._held: dict[int, list[pa.RecordBatch]] = {}
        self._held_bytes = 0
        self._index: dict[int, list[tuple[int, int]]] = {}
        self._file: int | None = None
        self._end = 0

    def add(self, batch: pa.RecordBatch, parts: np.ndarray) -> None:
        """Hand over rows; `parts` holds the part of each. Rows of a part keep their order."""
        if not batch.num_rows:
            return
        first = int(parts[0])
        if (parts == first).all():
            self._hold(first, batch)
        else:
            by = np.argsort(parts, kind="stable")
            batch = batch.take(pa.array(by))
            ordered = parts[by]
            starts = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1, [len(ordered)]])
            for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
                self._hold(int(ordered[start]), batch.slice(start, end - start))
        self._held_bytes += batch.nbytes
        if self._held_bytes > self._memory_bytes:
            self._flush()

    def parts(self) -> list[int]:
        """Parts that hold rows, ascending."""
        return sorted(self._held.keys() | self._index.keys())

    def read(self, part: int) -> pa.Table:
        """All rows of a part, in memory, and forget them. Empty if it has none."""
        return pa.Table.from_batches(list(self.batches(part)), self.schema)

    def batches(self, part: int) -> Iterator[pa.RecordBatch]:
        """The rows of a part, one batch in memory at a time; they are forgotten."""
        for offset, length in self._index.pop(part, []):
            assert self._file is not None
            data = os.pread(self._file, length, offset)
            yield pa.ipc.read_record_batch(pa.py_buffer(data), self.schema)
        yield from self._held.pop(part, [])

    def close(self) -> None:
        """Drop everything, the file too; idempotent."""
        self._held.clear()
        self._index.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self._path.unlink(missing_ok=True)

    def _hold(self, part: int, batch: pa.RecordBatch) -> None:
        self._held.setdefault(part, []).append(batch)

    def _flush(self) -> None:
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        for part, batches in self._held.items():
            merged = pa.Table.from_batches(batches, self.schema)
            for batch in merged.combine_chunks().to_batches():
                data = batch.serialize()
                written = 0
                view = memoryview(data)
                while written < len(view):
                    written += os.pwrite(self._file, view[written:], self._end + written)
                self._index.setdefault(part, []).append((self._end, len(view)))
                self._end += len(view)
        self._held.clear()
        self._held_bytes = 0
