"""What the target of a sync has acknowledged, kept in the lake for targets that keep nothing themselves.

Objects `_syncs/<sync>/acks/<number>.acks`, each a Parquet table of entries (cdc.sink.ACKS and what kind they are),
written once under the next number and never replaced. An object stands for all numbers from its `first` up to its own,
so the chain that is valid begins at the newest object and goes down to number 1. Of a key's acknowledgements the last
one counts; its last entry of any kind says its version, and whether something was sent since of which nobody knows.
Once the chain has many links, the newest of them are joined into one link under a new number, with every older link
that is no larger than all behind it: links are few, and a row is rewritten a logarithmic number of times. What no link
names any more is a leftover, and goes at the next write.

Guarantees: what `record` or `forget` have returned from is durable; each is one object, so it is there whole or
not at all. A writer that another one has overtaken is told so (LedgerConflict) and changes nothing: it takes the next
number only if that is free, and afterwards looks whether a greater one exists, as it would if the number were free
because its object had been joined and removed. A write whose answer was lost is recognised when it is made again.

The objects' names do not end in `.parquet`: an object store's class for data files is not meant for what is read at
every run. It does not know what a key or a digest means, nor who may write.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdc.errors import (
    CdcError,
    FormatTooNew,
    LedgerConflict,
    StoreConflict,
    StoreRefused,
    StoreUnavailable,
    Verdict,
)
from cdc.failpoints import failpoint
from cdc.lake.layout import acks_path
from cdc.ports import ObjectStore
from cdc.sink import ACKS, IN_DOUBT

log = logging.getLogger(__name__)

FORMAT: Final = 1
LINKS_MAX: Final = 48
"""With more links the newest are joined. Links of older joins are at least each twice as large as the next one, so
there are about as many as the number of rows has binary digits."""
ENTRIES: Final = ACKS.append(pa.field("kind", pa.int8()))
ACKNOWLEDGED, SETTLED, ATTEMPTED = 0, 1, 2
"""Kinds of entries: the target took this; an attempt had no effect; this is about to be sent (no digest: a delete)."""
_NOTHING: Final = ACKS.empty_table()
_SUFFIX: Final = ".acks"
_READS: Final = 5
"""How often the chain is looked for anew if another process removes what it has joined while this one reads."""
_FORMAT, _FIRST, _TOKEN = b"cdc.format", b"cdc.first", b"cdc.token"


@dataclass(frozen=True, slots=True)
class _Link:
    """One object of the chain: it stands for the numbers from `first` to `number`."""

    first: int
    number: int
    rows: int


class LakeLedger:
    """The cdc.sink.Ledger of one sync in an object store; `functools.partial(LakeLedger, store)` is its Ledgers. All
    methods block; StoreUnavailable if the store fails, StoreRefused if it has lost what it kept. Not thread-safe."""

    def __init__(self, store: ObjectStore, sync: str) -> None:
        self._store = store
        self._sync = sync
        self._prefix = acks_path(sync) + "/"
        self._chain: list[_Link] | None = None
        """Oldest first; None: not looked for yet."""
        self._attempts: dict[str, tuple[str, int]] = {}
        self._unanswered: dict[bytes, _Link] = {}
        """By the digest of their bytes, writes under the next number of whose end we never heard."""

    def read(self) -> pa.Table:
        """ACKS: one row per key, in no order, those with an empty digest among them, and IN_DOUBT for keys with an
        attempt. What others have written since is taken in."""
        for _ in range(_READS):
            found = self._read_chain()
            if found is not None:
                self._chain = [link for link, _ in found]
                entries = _condensed([table for _, table in found])
                tried = entries.filter(pc.equal(entries.column("kind"), ATTEMPTED)).to_pylist()
                self._attempts = {row["key"]: (row["digest"], row["version"]) for row in tried}
                return _known(entries)
        raise StoreRefused(
            f"the acknowledgements of sync {self._sync} are incomplete: objects below {self._prefix} are missing",
            hint=f"restore them, or remove all below {self._prefix}; then everything is sent again",
        )

    def attempts(self) -> Mapping[str, tuple[str, int]]:
        """Digest (empty: a delete) and version of each key's attempt, as of the last `read` or `record` here."""
        if self._chain is None:
            self.read()
        return self._attempts

    def record(self, *, acks: pa.Table = _NOTHING, settled: pa.Table = _NOTHING, attempts: pa.Table = _NOTHING) -> None:
        """Acknowledge, settle and announce in one durable step; see cdc.sink.Ledger. LedgerConflict if somebody else
        has written since this ledger last read or wrote. After StoreUnavailable it may have happened; the same again
        is right then."""
        parts = [_of_kind(acks, ACKNOWLEDGED), _of_kind(settled, SETTLED), _of_kind(attempts, ATTEMPTED)]
        if not any(part.num_rows for part in parts):
            return
        if self._chain is None:
            self.read()
        self._append(pa.concat_tables(parts))
        for key in pa.chunked_array(
            [*acks.column("key").chunks, *settled.column("key").chunks], pa.string()
        ).to_pylist():
            self._attempts.pop(key, None)
        self._attempts |= {row["key"]: (row["digest"], row["version"]) for row in attempts.to_pylist()}
        failpoint("ledger.after_put")
        try:
            self._tidy()
        except CdcError as e:
            if e.verdict is not Verdict.RETRY:
                raise
            log.warning("acknowledgements were not joined: %s", e.args[0], extra={"sync": self._sync})

    def forget(self) -> None:
        """Empty every digest, attempts' too; versions do not go back. Durable on return, and nothing changes if it
        raises LedgerConflict."""
        known = self.read()
        if known.num_rows:
            # An attempt has its version; what is sent next is another one.
            doubted = pc.equal(known.column("digest"), IN_DOUBT).cast(pa.int64())
            empty = pa.repeat(pa.scalar(""), known.num_rows)
            known = known.set_column(1, ACKS.field(1), empty)
            known = known.set_column(2, ACKS.field(2), pc.add(known.column("version"), doubted))
            self._append(_of_kind(known, ACKNOWLEDGED), first=1)
            self._attempts = {}
            self._sweep()

    # ------------------------------------------------------------------ writing

    def _append(self, table: pa.Table, first: int = 0) -> None:
        """Write the next link, which replaces those from number `first` on (0: none)."""
        while True:
            assert self._chain is not None
            number = (self._chain[-1].number if self._chain else 0) + 1
            link = _Link(first or number, number, table.num_rows)
            data = _encoded(table, link)
            try:
                self._store.put(self._key(number), data, if_absent=True)
            except StoreUnavailable:
                self._unanswered[hashlib.sha256(data).digest()] = link
                raise
            except StoreConflict as e:
                found = self._store.get(self._key(number))
                ours = found and self._unanswered.get(hashlib.sha256(found[0]).digest())
                if not ours:
                    raise self._conflict() from e
                self._follow(ours)
                continue
            self._follow(link)
            return

    def _follow(self, link: _Link) -> None:
        """`link` is in the store: the chain ends with it."""
        assert self._chain is not None
        self._chain = [*(known for known in self._chain if known.number < link.first), link]
        self._unanswered.clear()

    def _tidy(self) -> None:
        """Look whether we have been overtaken, join links if they are many, and remove leftovers."""
        assert self._chain is not None
        self._sweep()
        if len(self._chain) <= LINKS_MAX:
            return
        joined = _suffix(self._chain)
        tables = [self._link_table(link) for link in joined]
        failpoint("ledger.before_join")
        self._append(_condensed(tables), first=joined[0].first)
        failpoint("ledger.after_join")
        self._sweep()

    def _sweep(self) -> None:
        """Remove what no link names. LedgerConflict if the store has a greater number than we know."""
        assert self._chain is not None
        there = self._numbers()
        if there and there[-1] > self._chain[-1].number:
            raise self._conflict()
        alive = {link.number for link in self._chain}
        left = [self._key(number) for number in there if number not in alive]
        if left:
            self._store.delete(left)

    def _conflict(self) -> LedgerConflict:
        self._chain = None
        return LedgerConflict(
            f"another process acknowledges rows of sync {self._sync} at the same time",
            hint="run a sync from one daemon only; the next run begins with what both have acknowledged",
        )

    # ------------------------------------------------------------------ reading

    def _read_chain(self) -> list[tuple[_Link, pa.Table]] | None:
        """The chain, oldest first; None if an object of it has just been removed, or never was there."""
        numbers = self._numbers()
        number, chain = numbers[-1] if numbers else 0, []
        while number:
            found = self._store.get(self._key(number))
            if found is None:
                return None
            chain.append(self._decoded(number, found[0]))
            number = chain[-1][0].first - 1
        return chain[::-1]

    def _link_table(self, link: _Link) -> pa.Table:
        found = self._store.get(self._key(link.number))
        if found is None:
            raise self._conflict()
        return self._decoded(link.number, found[0])[1]

    def _decoded(self, number: int, data: bytes) -> tuple[_Link, pa.Table]:
        try:
            with pq.ParquetFile(pa.BufferReader(data)) as file:
                about: dict[bytes, bytes] = file.schema_arrow.metadata or {}
                if int(about[_FORMAT]) > FORMAT:
                    raise FormatTooNew(
                        f"{self._key(number)} has format {int(about[_FORMAT])}, this release knows {FORMAT}",
                        hint="upgrade cdc",
                    )
                table = file.read(columns=ENTRIES.names).cast(ENTRIES)
                return _Link(int(about[_FIRST]), number, table.num_rows), table
        except (pa.ArrowException, KeyError, ValueError, OSError) as e:
            raise StoreRefused(
                f"{self._key(number)} is no table of acknowledgements",
                hint=f"restore it, or remove all below {self._prefix}; then everything is sent again",
            ) from e

    def _numbers(self) -> list[int]:
        """Numbers of all objects, ascending."""
        names = [stored.key.removeprefix(self._prefix) for stored in self._store.list(self._prefix)]
        texts = [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]
        return sorted(int(text) for text in texts if text.isdecimal())

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number:020d}{_SUFFIX}"


def _suffix(chain: list[_Link]) -> list[_Link]:
    """The links to join: the last two at least, and from the oldest on that is no larger than all behind it."""
    behind = sum(link.rows for link in chain)
    for at, link in enumerate(chain[:-2]):
        behind -= link.rows
        if link.rows <= behind:
            return chain[at:]
    return chain[-2:]


def _of_kind(acks: pa.Table, kind: int) -> pa.Table:
    kinds = pa.repeat(pa.scalar(kind, pa.int8()), acks.num_rows)
    return acks.select(ACKS.names).cast(ACKS).append_column(ENTRIES.field("kind"), kinds)


def _condensed(tables: list[pa.Table]) -> pa.Table:
    """What counts of entries that follow one another: each key's last acknowledgement, then its last entry, if that is
    another one."""
    whole = pa.concat_tables([ENTRIES.empty_table(), *tables]).combine_chunks()
    if whole.num_rows == 0:
        return whole
    encoded = pc.dictionary_encode(whole.column("key")).combine_chunks()
    codes, at = encoded.indices.to_numpy(zero_copy_only=False), np.arange(whole.num_rows)
    acknowledged = whole.column("kind").to_numpy() == ACKNOWLEDGED
    last = np.full((2, len(encoded.dictionary)), -1, np.int64)
    # Of several values for one place the last one stays (NumPy's user guide, on assigning to indexed arrays).
    last[0, codes[acknowledged]] = at[acknowledged]
    last[1, codes] = at
    kept = np.zeros(whole.num_rows, np.bool_)
    kept[last[last >= 0]] = True
    return whole if kept.all() else whole.filter(pa.array(kept))


def _known(entries: pa.Table) -> pa.Table:
    """ACKS of condensed entries."""
    others = entries.filter(pc.not_equal(entries.column("kind"), ACKNOWLEDGED)).combine_chunks()
    acks = entries.filter(pc.equal(entries.column("kind"), ACKNOWLEDGED)).combine_chunks().select(ACKS.names)
    if not others.num_rows:
        return acks
    shared = pc.is_in(acks.column("key"), value_set=others.column("key"))
    # Their keys' acknowledgements, if any: version and doubt are of the other entry.
    known = acks.filter(shared)
    before = pc.fill_null(
        known.column("digest").take(pc.index_in(others.column("key"), value_set=known.column("key"))), ""
    )
    doubted = pc.equal(others.column("kind"), ATTEMPTED)
    digests = pc.if_else(doubted, IN_DOUBT, before)
    changed = pa.table([others.column("key"), digests, others.column("version")], schema=ACKS)
    # An attempt at a key that the target never had, settled: there is nothing to know, but for a version.
    changed = changed.filter(
        pc.or_(pc.not_equal(changed.column("digest"), ""), pc.greater(changed.column("version"), 0))
    )
    return pa.concat_tables([acks.filter(pc.invert(shared)), changed])


def _encoded(table: pa.Table, link: _Link) -> Any:
    about = {_FORMAT: str(FORMAT), _FIRST: str(link.first), _TOKEN: uuid.uuid4().hex}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata(about), sink,
        compression="zstd", compression_level=1, use_dictionary=False, write_statistics=False,
    )  # fmt: skip
    return sink.getvalue()


__all__ = ["LINKS_MAX", "LakeLedger"]
