"""A changelog once more as plain files: JSON lines (zstd) or Parquet in Hive folders, without a table format.

`<table>/files/<partition>/<first>-<last>-<part>.jsonl.zst` (of Parquet: `<part>-<shape>.parquet`): the versions of the
changelog that it covers, both included, and which part of them it is. `_checkpoint.json` beside the folders says how
far the files go.

Guarantees:
- Each row is in exactly one object, and whoever lists the objects, or is told of each, meets each row once. An object's
  name, rows and bytes are a function of its cut and of the changelog; the cut is saved before its first object is
  written, under the condition that nobody else has moved the checkpoint. So what a death interrupts is written again
  under the same names with the same bytes (by the same release; another one's encoder may pack the same rows
  otherwise), on any machine, and nothing is ever left over.
- A former writer that wakes up can do no more than write the same bytes again: its next checkpoint fails.
- Memory is bounded by a row group, the disk by one object.

It does not decide when (cdc.follow), and never reads, joins or deletes what it has written: objects belong to whoever
takes them. Who wants them written anew moves the folder away, checkpoint and all.
"""

from __future__ import annotations

import json
import logging
import mmap
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, Protocol

import pyarrow as pa

from cdc.errors import CdcError, FormatTooNew, SchemaConflict, StoreUnavailable
from cdc.failpoints import failpoint
from cdc.lake.commits import HistoryGone
from cdc.lake.document import Document
from cdc.lake.jsonl import json_lines
from cdc.lake.layout import files_path
from cdc.lake.rewriting import SameRows
from cdc.lake.spans import Followed, FollowerLost, Span, SpanObject, Spans
from cdc.ports import ObjectStore
from cdc.table import TableId

log = logging.getLogger(__name__)

FORMAT: Final = 1
FORMS: Final = ("jsonl", "parquet")
PROGRESS_S: Final = 30.0
"""How often a long cut notes how far it is."""
_CHECKPOINT: Final = "_checkpoint.json"
_BUFFER: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What is being written: a span, and how it is made into objects. `parts_done`: its first parts that are whole."""

    first: int
    last: int
    whole: bool
    through: dict[str, int]
    form: str
    object_bytes: int
    parts_done: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """How far the files go: all rows up to `version` of the changelog with the id `changelog`."""

    changelog: str
    version: int = -1
    tokens: dict[str, int] = field(default_factory=dict)
    cut: Cut | None = None
    format: int = FORMAT


class Part(NamedTuple):
    """One object that is to be written, and those of the changelog that have its rows."""

    number: int
    folder: str
    objects: list[SpanObject]


class PlainFiles:
    """The downstream of a follower (cdc.stage.Downstream): the files of one changelog."""

    def __init__(
        self, store: ObjectStore, source: str, table: TableId, spans: Spans, *, temp_dir: Path, form: str,
        object_bytes: int, go_on: Callable[[], None] = lambda: None, wrote: Callable[[int], None] = lambda rows: None,
    ) -> None:  # fmt: skip
        """`object_bytes`: of the changelog's objects that go into one. `go_on` raises if nothing may be written any
        more; `wrote` hears of the rows of each object."""
        self._store = store
        self.path = files_path(source, table)
        self._spans = spans
        self._temp_dir = temp_dir
        self._form = form
        self._object_bytes = object_bytes
        self._go_on = go_on
        self._wrote = wrote
        self._document = Document(store, f"{self.path}/{_CHECKPOINT}")
        self._checkpoint: Checkpoint | None = None

    def resume(self) -> Followed:
        """Read the checkpoint, and finish the cut that was begun. FollowerLost if the changelog does not have any more
        what that takes."""
        found = self._document.read()
        self._spans.changelog.refresh()
        changelog = self._spans.changelog.delta.id()
        if found is None:
            self._checkpoint = Checkpoint(changelog=changelog)
            return Followed()
        self._checkpoint = _parse(found, self.path)
        if self._checkpoint.changelog != changelog:
            raise self._lost("the changelog has been made anew")
        if self._checkpoint.cut is not None:
            self._finish()
        return Followed(self._checkpoint.version, self._checkpoint.tokens)

    def write(self, span: Span) -> Followed:
        """Write the objects of a span; durable on return."""
        assert self._checkpoint is not None
        cut = Cut(
            first=span.first, last=span.last, whole=span.whole, through=dict(span.through),
            form=self._form, object_bytes=self._object_bytes,
        )  # fmt: skip
        failpoint("files.before_cut")
        self._save(replace(self._checkpoint, cut=cut))
        failpoint("files.after_cut")
        return self._finish()

    def tick(self) -> Followed | None:
        """Nothing is held back."""
        return None

    # ---- inside ----

    def _finish(self) -> Followed:
        """Write what is left of the cut, and say that it is done."""
        checkpoint = self._checkpoint
        assert checkpoint is not None
        cut = checkpoint.cut
        assert cut is not None
        span = Span(cut.first, cut.last, cut.whole, checkpoint.tokens, cut.through)
        try:
            objects = self._spans.objects(span)
        except HistoryGone as e:
            raise self._lost("commits of the changelog are gone") from e
        parts = list(_parts(objects, cut.object_bytes))[cut.parts_done :]
        if not self._spans.are_there([o for part in parts for o in part.objects]):
            raise self._lost("objects of the changelog are gone")
        noted_at = time.monotonic()
        for part in parts:
            self._go_on()
            self._write_part(span, cut, part)
            failpoint("files.between_objects")
            if time.monotonic() - noted_at > PROGRESS_S:
                noted_at = time.monotonic()
                self._save(replace(checkpoint, cut=replace(cut, parts_done=part.number + 1)))
        failpoint("files.before_checkpoint")
        self._save(replace(checkpoint, version=cut.last, tokens=cut.through, cut=None))
        failpoint("files.after_checkpoint")
        return Followed(cut.last, cut.through)

    def _write_part(self, span: Span, cut: Cut, part: Part) -> None:
        """The rows of one part as one object; as several where the schema changes and the form cannot hold both."""
        folder = f"{self.path}/{part.folder}" if part.folder else self.path
        stem = f"{folder}/{cut.first:010d}-{cut.last:010d}-{part.number:05d}"
        made = rows = 0
        try:
            self._temp_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="files-", dir=self._temp_dir) as scratch:
                local = Path(scratch) / "object"
                open_file: _RowFile | None = None
                for stored in part.objects:
                    for batch in self._spans.batches(span, stored.path):
                        if open_file is not None and not open_file.takes(batch.schema):
                            rows += self._upload(open_file, local, stem, made)
                            made, open_file = made + 1, None
                        if open_file is None:
                            prefix = self._spans.changelog.stored_prefix()
                            open_file = (_Lines if cut.form == "jsonl" else _Rows)(local, batch.schema, prefix)
                        open_file.add(batch)
                if open_file is not None:
                    rows += self._upload(open_file, local, stem, made)
        except NotImplementedError as e:
            raise SchemaConflict(f"{self.path}: {e.args[0]} is not known", hint='use format = "parquet"') from e
        except pa.ArrowException as e:
            raise CdcError(f"{self.path}: rows cannot be written as {cut.form}: {type(e).__name__}") from e
        except OSError as e:
            raise StoreUnavailable(
                f"{self._temp_dir}, where files are made, cannot be written: {e.strerror}", hint="make room there"
            ) from e
        self._wrote(rows)

    def _upload(self, file: _RowFile, local: Path, stem: str, number: int) -> int:
        rows = file.finish()
        key = f"{stem}{f'-{number:03d}' if file.splits else ''}.{file.suffix}"
        with local.open("rb") as data, mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            self._store.put(key, mapped)
        return rows

    def _save(self, checkpoint: Checkpoint) -> None:
        self._go_on()
        self._document.write(json.dumps(asdict(checkpoint), indent=1).encode())
        self._checkpoint = checkpoint

    def _lost(self, why: str) -> FollowerLost:
        return FollowerLost(
            f"{self.path} cannot be gone on with: {why}",
            hint=f"move {self.path} away, checkpoint and all: everything is written anew then",
        )


class _RowFile(Protocol):
    """A local file that rows are written to. `splits`: a part may take several, which are numbered."""

    suffix: str
    splits: bool

    def takes(self, schema: pa.Schema) -> bool:
        """Whether rows of that schema may follow."""

    def add(self, batch: pa.RecordBatch) -> None:
        """Append rows."""

    def finish(self) -> int:
        """Close the file; how many rows it has."""


class _Lines:
    """JSON lines, compressed."""

    suffix = "jsonl.zst"
    splits = False

    def __init__(self, path: Path, schema: pa.Schema, prefix: str) -> None:
        self._prefix = prefix
        self._file: IO[bytes] = path.open("wb", buffering=_BUFFER)
        self._stream = pa.CompressedOutputStream(pa.PythonFile(self._file, "w"), "zstd")
        self._rows = 0

    def takes(self, schema: pa.Schema) -> bool:
        return True

    def add(self, batch: pa.RecordBatch) -> None:
        self._stream.write(json_lines(batch, self._prefix))
        self._rows += batch.num_rows

    def finish(self) -> int:
        self._stream.close()
        self._file.close()
        return self._rows


class _Rows:
    """Parquet, as the changelog's objects are."""

    suffix = "parquet"
    splits = True

    def __init__(self, path: Path, schema: pa.Schema, prefix: str) -> None:
        self._schema = schema
        self._rows = SameRows(path, schema, prefix)

    def takes(self, schema: pa.Schema) -> bool:
        return bool(schema.equals(self._schema, check_metadata=True))

    def add(self, batch: pa.RecordBatch) -> None:
        self._rows.add(batch)

    def finish(self) -> int:
        return self._rows.finish()


def _parts(objects: Sequence[SpanObject], object_bytes: int) -> Iterator[Part]:
    """The objects of a span by folder, as many together as have so many bytes; one at least."""
    number, some, size = 0, list[SpanObject](), 0
    for stored in objects:
        if some and (stored.folder != some[0].folder or size + stored.size > object_bytes):
            yield Part(number, some[0].folder, some)
            number, some, size = number + 1, [], 0
        some.append(stored)
        size += stored.size
    if some:
        yield Part(number, some[0].folder, some)


def _parse(data: bytes, path: str) -> Checkpoint:
    try:
        values: dict[str, Any] = json.loads(data)
        written_in = int(values.get("format", 0))
        if written_in > FORMAT:
            raise FormatTooNew(f"{path} has format {written_in}, this release knows {FORMAT}", hint="upgrade cdc")
        cut = values.pop("cut")
        return Checkpoint(**values, cut=None if cut is None else Cut(**cut))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise FollowerLost(
            f"{path} is not as it was written", hint="bring it back, or move its folder away to have all written anew"
        ) from e


__all__ = ["FORMS", "Checkpoint", "Cut", "PlainFiles"]
