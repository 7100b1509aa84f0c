"""What a follower of a changelog reads: the versions after those that it holds, a span at a time.

A follower (cdc.follow) writes the rows of a changelog in another form, and keeps for itself up to which version. It is
fed by the changelog alone, so what it writes is a function of that: the same span has the same objects and rows in the
same order, whenever it is read and whatever has become of the process and its disk.

Guarantees:
- Each row once, whatever compaction has joined meanwhile: a span reads the objects that its commits added, which stay
  until a vacuum; joined ones bring no row.
- Where these are gone, or the commits are (a follower that was switched on late, or was away for longer than the vacuum
  waits), the span is *whole*: all objects of its last version, less the rows that the follower's tokens say it holds.
- Bounded: SPAN_VERSIONS and SPAN_BYTES, whichever is reached first; a whole span by the table only.

It does not write anything, nor keep what was read. One thread, but for `is_clear`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa

from cdc.batch import SNAPSHOT_SEQ
from cdc.errors import CdcError, StoreUnavailable
from cdc.lake.changelog import ChangelogTable, ChangelogTokens
from cdc.lake.commits import TRIMMED, Commit, HistoryGone
from cdc.lake.layout import system_name
from cdc.lake.rewriting import batches_of
from cdc.ports import ObjectStore
from cdc.table import TableId

log = logging.getLogger(__name__)

SPAN_VERSIONS: Final = 1000
SPAN_BYTES: Final = 1 << 30


class FollowerLost(CdcError):
    """What a follower was at is gone from the changelog: it can only begin anew."""


@dataclass(frozen=True, slots=True)
class Followed:
    """What a follower holds: every row up to a version, and the changelog's tokens there."""

    version: int = -1
    tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Span:
    """Versions of a changelog, both included. `through`: the tokens at the last; `after`: those before the first, by
    which rows are left out of a `whole` span."""

    first: int
    last: int
    whole: bool
    after: Mapping[str, int]
    through: Mapping[str, int]


class SpanObject(NamedTuple):
    """An object of the changelog: its path below the changelog, and its size."""

    path: str
    size: int

    @property
    def folder(self) -> str:
        """The partition's folder."""
        return self.path.rpartition("/")[0]


class Spans:
    """The upstream of a follower of one changelog (cdc.stage.Upstream)."""

    def __init__(self, store: ObjectStore, source: str, table: TableId, *, states: bool = False) -> None:
        """`states`: for who follows the objects and not the rows. Each span is the whole of the newest version then,
        and `objects` are all that it has, joined ones too."""
        self._store = store
        self._states = states
        self.changelog = ChangelogTable(store, source, table)
        self._at = Followed()
        self._known: tuple[Span, list[SpanObject]] | None = None
        self._held = -1
        self._clear_at = 0.0

    def open(self, after: Followed) -> None:
        """Go to just behind `after`."""
        self._at = after

    def read(self, timeout_s: float) -> Span | None:
        """The next span that has objects, None if nothing is unread; looks once, and does not wait."""
        looked_at = time.time()
        newest = self.changelog.refresh()
        if self._states and self._at.version != newest:
            tokens = self.changelog.delta.tokens()
            newest = self.changelog.version()
            self._at = Followed(newest, tokens)
            return Span(newest, newest, True, {}, tokens)
        if newest < self._at.version:
            raise FollowerLost(f"{self.changelog.path} has been made anew", hint="restart the daemon")
        while self._at.version < newest:
            span = self._next(newest)
            self._at = Followed(span.last, span.through)
            if span.whole or self.objects(span):
                return span
        self._held, self._clear_at = self._at.version, looked_at
        return None

    def confirm(self, durable: Followed) -> None:
        """What is up to there need not be kept for the follower."""
        self._held = durable.version

    def close(self) -> None:
        """Nothing is open between two reads."""

    def is_clear(self, newest: int, since: float) -> bool:
        """Whether nothing that was removed from the changelog before `since` (Unix time) is still to be read: the
        follower has had everything since then, or holds what is up to version `newest`. Any thread."""
        return self._held >= newest or self._clear_at >= since

    @property
    def version(self) -> int:
        """Up to which version the follower holds everything."""
        return self._held

    @property
    def clear_at(self) -> float:
        """When there was last nothing left to read (Unix time); 0: not since the process began."""
        return self._clear_at

    def objects(self, span: Span) -> list[SpanObject]:
        """The objects of a span in the order of its rows: by partition, then by version, or by position. HistoryGone
        if the commits have been cleaned away."""
        if self._known is not None and self._known[0] == span:
            return self._known[1]
        if span.whole:
            return sorted(SpanObject(f.path, f.size) for f in self.changelog.delta.files(span.last))
        commits = map(self.changelog.delta.commit_at, range(span.first, span.last + 1))
        return _in_order(found for commit in commits for found in _objects_of(commit))

    def are_there(self, objects: Sequence[SpanObject]) -> bool:
        """Whether none of them has been removed from the store; asks it for those that are not live any more."""
        live = {f.path for f in self.changelog.delta.files()}
        keys = [f"{self.changelog.path}/{o.path}" for o in objects if o.path not in live]
        return all(any(stored.key == key for stored in self._store.list(key)) for key in keys)

    def batches(self, span: Span, path: str) -> Iterator[pa.RecordBatch]:
        """The span's rows in one of its objects, in order."""
        prefix = self.changelog.stored_prefix()
        tokens = ChangelogTokens(span.after)
        try:
            with self.changelog.delta.open_file(path) as file:
                for batch in batches_of(file):
                    rows = _unread(batch, tokens, prefix) if span.whole and span.after else batch
                    if rows.num_rows:
                        yield rows
        except pa.ArrowException as e:
            raise StoreUnavailable(f"{self.changelog.path}/{path} cannot be read: {type(e).__name__}") from e

    def _next(self, newest: int) -> Span:
        first, tokens, size = self._at.version + 1, dict(self._at.tokens), 0
        last, found = first - 1, list[SpanObject]()
        try:
            while last < newest and last - first + 1 < SPAN_VERSIONS and size < SPAN_BYTES:
                commit = self.changelog.delta.commit_at(last + 1)
                tokens |= {name: value for name, value in commit.tokens.items() if _counts(name)}
                found += _objects_of(commit)
                size += sum(commit.added_bytes)
                last += 1
            span = Span(first, last, False, self._at.tokens, tokens)
            if self.are_there(found):
                self._known = span, _in_order(found)
                return span
        except HistoryGone:
            pass
        # All tokens of the version that is read, and no other.
        tokens = {name: value for name, value in self.changelog.delta.tokens().items() if _counts(name)}
        newest = self.changelog.version()
        if (self.changelog.delta.token(TRIMMED) or -1) >= first > 0:
            log.error(
                "retention has taken objects of the changelog that a follower had not read: their rows are lost to it",
                extra={
                    "delta_table": self.changelog.path, "after_version": first - 1,
                    "hint": "retain longer; what the changelog has left is written",
                },
            )  # fmt: skip
        elif first:
            log.warning(
                "a follower comes too late for the objects of before, and reads the whole changelog for what it lacks",
                extra={"delta_table": self.changelog.path, "after_version": first - 1},
            )
        return Span(first, newest, True, self._at.tokens, tokens)


def _objects_of(commit: Commit) -> list[SpanObject]:
    return [SpanObject(*pair) for pair in zip(commit.added, commit.added_bytes, strict=True)]


def _in_order(objects: Iterable[SpanObject]) -> list[SpanObject]:
    """By partition; as they came within one."""
    return sorted(objects, key=lambda o: o.folder)


def _counts(token: str) -> bool:
    """Whether a token says which rows a version has."""
    return token == "snapshot_seq" or token.startswith("stream/")


def _unread(batch: pa.RecordBatch, tokens: ChangelogTokens, prefix: str) -> pa.RecordBatch:
    """The rows that are not covered by the tokens, by the rule of landing: a change by its stream's, a row of a run by
    the counter in its `_seq`."""

    def column(name: str) -> pa.Array:
        return batch.column(batch.schema.get_field_index(system_name(name, prefix)))

    epochs, which = np.unique(column("_epoch").to_numpy(), return_inverse=True)
    landed = np.array([tokens.stream(int(epoch)) for epoch in epochs], np.int64)[which]
    of_run = column("_run").is_valid().to_numpy(zero_copy_only=False)
    past_run = column("_seq").to_numpy() > SNAPSHOT_SEQ + tokens.snapshot_seq
    unread = np.where(of_run, past_run, column("_lsn").to_numpy() > landed)
    return batch if unread.all() else batch.filter(pa.array(unread))
