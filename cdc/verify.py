"""Verify: source and `current`, compared at one position, cell by cell where it matters.

A snapshot S of the table is taken under the same rules as any other; then the lake is awaited up to a position read
after S. What transactions that S does not see have changed by then (by transaction id, not by position) is taken out
of both sides and compared in small rounds of its own; what remains after the last round is reported as not compared,
never as equal. What is compared first are checksums (cdc.rowhash): each side hashes its rows where they are, and only
rows of buckets that differ are fetched and compared cell by cell (cdc.cells). So equal tables are read once on each
side, and only checksums move. Where rows cannot be hashed alike, all cells are compared.

S is open from the first checksum to the last cell of a round; statements at the source are short, and between them
whoever asked may pause or stop (`pace`). Changes nothing, and shows keys only: values never leave temporary files
unless asked.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdc.cells import KEY, RAW, TEXTS, Cells, Found, pieces, positional, raw_texts
from cdc.config import Config
from cdc.errors import CdcError, GaveWay, SourceRefused
from cdc.keys import key_of
from cdc.lake.layout import system_prefix
from cdc.lake.rows import LakeRows, Rows, Unclear
from cdc.ports import ChecksumReader, ObjectStore, RowsRead, TableSnapshot, Visibility
from cdc.rowhash import SAMPLE_PARTS, Hashes, Ints, RowHash, Sums, bucket_of, buckets_for, hash_lines, lines, unhashed
from cdc.schema import SchemaBook
from cdc.state import State
from cdc.table import TableId, TableSchema
from cdc.types import pg_text

T = TypeVar("T")

ROUNDS = 6
ROUND_KEYS = 20_000
"""Keys that one later round compares; they are named one by one in its query."""
SUM_KEYS = 2_000
"""Keys whose hashes one statement takes out of the source's sums."""
HOT_KEYS = 200_000
"""Keys that may change while the lake is awaited; with more, the round is begun again."""
SHOWN = 1000
"""Keys listed per kind of difference; all are counted."""
REPAIRED = 100_000
"""Keys that a report names for a repair by keys; of more, the whole table is read anew."""
MOST = 0.5
"""If more than this share of the buckets differ, all rows are fetched."""

Await = Callable[[TableId, int], int]
"""Blocks until `current` of a table holds everything up to a position; the position that it holds then."""
Pace = Callable[[float], None]
"""Told how many seconds the last piece of work took, between any two; may pause, and raises CdcError to end it all."""


@dataclass(slots=True)
class TableReport:
    """What was found in one table. Key lists are cut at SHOWN; counts are not. `values` only on request.

    `by` says what was compared: `checksums` (and the cells of what differs), or `cells` of all rows, because of `why`.
    `fetched` counts the rows that the source had to send. `sample` is the share of keys that was looked at, in percent,
    `left_out` names columns that are not compared: a frozen table's lake does not have them. `repair` are keys of what
    differs as the source knows them; None: they are too many, or there is no key.
    """

    source: str
    table: TableId
    rows: int = 0
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"missing": 0, "extra": 0, "different": 0})
    columns: dict[str, int] = field(default_factory=dict)
    not_compared: int = 0
    left_out: list[str] = field(default_factory=list)
    sample: float = 100.0
    by: str = "checksums"
    why: str = ""
    buckets: int = 0
    buckets_different: int = 0
    fetched: int = 0
    seconds: float = 0.0
    error: str = ""
    hint: str = ""
    values: list[dict[str, Any]] = field(default_factory=list)
    repair: list[tuple[str, ...]] | None = field(default_factory=list)

    @property
    def differs(self) -> bool:
        return any(self.counts.values())

    @property
    def equal(self) -> bool:
        return not self.error and not self.differs and not self.not_compared

    def add(self, found: Found) -> None:
        """Take in what one round found."""
        for kind, count in found.counts.items():
            self.counts[kind] += count
            shown: list[str] = getattr(self, kind)
            shown += found.keys[kind][: SHOWN - len(shown)]
        for name, count in found.columns.items():
            self.columns[name] = self.columns.get(name, 0) + count
        self.values += found.values
        total = sum(self.counts.values())
        if self.repair is not None:
            self.repair = [*self.repair, *found.texts] if len(self.repair) + len(found.texts) == total else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How a table is to be compared. `sample`: percent of its keys, others at each `seed`. `held`: the shape that a
    frozen table has in the lake, None if it follows its source. `by_cells`: without checksums."""

    sample: float = 100.0
    seed: int = 0
    show_values: bool = False
    by_cells: bool = False
    held: TableSchema | None = None
    chunk_rows: int = 50_000
    pace: Pace = lambda took_s: None


def held_shape(config: Config, state: State, source: str, table: TableId) -> TableSchema | None:
    """The shape that the lake keeps of a table whose contract is to freeze; None if it follows its source."""
    if config.sources[source].contract(str(table)) != "freeze":
        return None
    return SchemaBook(state, source).held(table)


def verify_table(
    source: str,
    table: TableId,
    reader: ChecksumReader,
    store: ObjectStore,
    await_lake: Await,
    *,
    temp_dir: Path,
    asked: Asked = Asked(),
) -> TableReport:
    """Compare one table. Blocks for as long as reading and waiting take; errors end in the report, not in a raise."""
    report = TableReport(source, table, sample=asked.sample)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="verify-", dir=temp_dir) as folder:
        try:
            schema = next((t.schema for t in reader.tables(table).tables), None)
            if schema is None:
                raise SourceRefused(f"table {table} is not published by source {source}", hint="cdc setup")
            Comparison(report, reader, store, await_lake, Path(folder), schema, asked).run()
        except CdcError as e:
            report.error, report.hint = str(e.args[0]), e.hint
        finally:
            reader.end()
    report.seconds = round(time.monotonic() - began, 3)
    return report


class Comparison:
    """One table's rounds."""

    def __init__(
        self,
        report: TableReport,
        reader: ChecksumReader,
        store: ObjectStore,
        await_lake: Await,
        folder: Path,
        schema: TableSchema,
        asked: Asked,
    ) -> None:
        self._report = report
        self._reader = reader
        self._store = store
        self._await = await_lake
        self._folder = folder
        self._read_schema = schema
        self._schema = schema
        self._asked = asked
        self._lake: LakeRows
        self._halt = threading.Event()

    def run(self) -> None:
        """Compare everything, then what was left out, in rounds, until nothing is left or the rounds are over."""
        left = self._whole()
        for _ in range(ROUNDS - 1):
            hot: dict[str, tuple[str, ...]] = {}
            names = list(left)
            for start in range(0, len(names), ROUND_KEYS):
                piece = {name: left[name] for name in names[start : start + ROUND_KEYS]}
                try:
                    hot |= self._round(piece)
                except Unclear:
                    hot |= piece
            left = hot
            if not left:
                break
        self._report.not_compared = len(left)

    # ---- the first round ----

    def _whole(self) -> dict[str, tuple[str, ...]]:
        """Compare all rows; the keys (canonical → texts) that were left out."""
        unclear = ""
        for _ in range(ROUNDS):
            try:
                return self._by_checksums()
            except (Unclear, GaveWay) as e:
                unclear = e.args[0]
            finally:
                self._reader.end()
        raise CdcError(
            f"{unclear} in each of {ROUNDS} rounds: nothing could be compared",
            hint="verify it again when it is at rest",
        )

    def _by_checksums(self) -> dict[str, tuple[str, ...]]:
        self._lake_of(self._read_schema).pin()
        snapshot = self._begin()
        rows = self._lake.pin()
        how = self._how(rows)
        if how is None:
            return self._by_cells(snapshot, rows)
        with ThreadPoolExecutor(1, thread_name_prefix="verify-source") as pool:
            future = pool.submit(self._source_sums, how)
            try:
                unseen = self._pin(snapshot)
                ours = self._lake_sums(how, snapshot.visibility, unseen)
            except BaseException:
                self._halt.set()
                raise
            finally:
                # Whatever happens, nobody else may use the reader before its thread has ended.
                theirs = future.exception() or future.result()
                self._halt.clear()
        if isinstance(theirs, BaseException):
            raise theirs
        self._report.rows = int(theirs.rows.sum())
        self._report.buckets = how.buckets
        for keys in pieces(list(unseen.values()), SUM_KEYS):
            theirs.join(self._paced(self._reader.sums_of, how, keys), -1)
        wanted = theirs.differing(ours)
        self._report.buckets_different = len(wanted)
        if len(wanted):
            self._compare(how, wanted, snapshot.visibility, unseen)
        return unseen

    def _how(self, rows: int) -> RowHash | None:
        """How rows are hashed at both sides; None if they cannot be, and the report says why."""
        schema, asked = self._schema, self._asked
        odd = unhashed(schema)
        in_hex = self._reader.hashes() if schema.columns and not odd and not asked.by_cells else None
        if in_hex is None:
            self._report.by = "cells"
            self._report.why = (
                "as asked" if asked.by_cells
                else f"columns whose text is not the server's: {', '.join(odd)}" if odd
                else "the server does not hash rows as we do"
            )  # fmt: skip
            self._report.sample = 100.0
            return None
        sample = max(1, round(SAMPLE_PARTS * asked.sample / 100))
        return RowHash(
            columns=schema.columns, key=schema.key, buckets=buckets_for(int(rows * asked.sample / 100)),
            in_hex=in_hex, sample=sample, seed=asked.seed or 1,
        )  # fmt: skip

    def _source_sums(self, how: RowHash) -> Sums:
        sums, done = Sums.zero(how.buckets), False
        after: tuple[str, ...] = ()
        while not done and not self._halt.is_set():
            read = self._paced(self._reader.sums, how, after=after)
            sums.join(read.sums)
            after, done = read.last, read.done
        return sums

    def _lake_sums(self, how: RowHash, visibility: Visibility, unseen: Mapping[str, Any]) -> Sums:
        sums = Sums.zero(how.buckets)
        for rows, hashes in self._lake_rows(how, unseen):
            del rows
            sums.add(hashes)
        if not how.key:
            for changes, sign in _UNDONE:
                for rows in self._lake.unseen_rows(visibility, changes):
                    sums.add(self._hashes(how, self._sampled(how, rows)), sign)
        return sums

    def _sampled(self, how: RowHash, rows: Rows) -> Rows:
        if how.sample >= SAMPLE_PARTS:
            return rows
        picked = hash_lines(self._lines(how, rows, [c.name for c in how.keys]), how.seed)
        return _filtered(rows, (picked & np.uint64(SAMPLE_PARTS - 1)) < how.sample)

    def _lake_rows(self, how: RowHash, unseen: Mapping[str, Any]) -> Iterator[tuple[Rows, Hashes]]:
        """Rows of the sample that no unseen transaction has changed, and their hashes."""
        left_out = pa.array(list(unseen), pa.string())
        began = time.monotonic()
        for rows in self._lake.current():
            if len(left_out):
                unseen_here = pc.is_in(self._canonical(rows), value_set=left_out)
                rows = _filtered(rows, ~unseen_here.to_numpy(zero_copy_only=False))
            rows = self._sampled(how, rows)
            yield rows, self._hashes(how, rows)
            self._asked.pace(time.monotonic() - began)
            began = time.monotonic()

    def _hashes(self, how: RowHash, rows: Rows) -> Hashes:
        return hash_lines(self._lines(how, rows, [c.name for c in how.columns]))

    def _lines(self, how: RowHash, rows: Rows, names: list[str]) -> pa.Array:
        places = [self._names.index(name) for name in names]
        return lines(
            [self._schema.columns[i] for i in places], [rows.columns[i] for i in places], rows.raw,
            [self._lake.names[i] for i in places], in_hex=how.in_hex, prefix=rows.prefix,
        )  # fmt: skip

    # ---- cells ----

    def _compare(self, how: RowHash, wanted: Ints, visibility: Visibility, unseen: Mapping[str, Any]) -> None:
        """Fetch the rows of the buckets that differ, and compare their cells."""
        mask = np.zeros(how.buckets, np.bool_)
        mask[wanted] = True
        fetched = wanted if len(wanted) <= MOST * how.buckets else None
        if fetched is None:
            mask[:] = True
        share = len(wanted) / how.buckets if fetched is not None else 1.0
        cells = self._cells(int(self._report.rows * share))
        self._report.fetched += cells.write("theirs", self._fetch(how, fetched))

        def ours() -> Iterator[pa.Table]:
            for rows, hashes in self._lake_rows(how, unseen):
                yield self._lake_table(_filtered(rows, mask[bucket_of(hashes, how.buckets)]))

        def undone(changes: Mapping[str, bool]) -> Iterator[pa.Table]:
            for rows in self._lake.unseen_rows(visibility, changes):
                rows = self._sampled(how, rows)
                yield self._lake_table(_filtered(rows, mask[bucket_of(self._hashes(how, rows), how.buckets)]))

        cells.write("ours", ours())
        if how.key:
            self._report.add(cells.compare(unseen, shown_max=SHOWN, texts_max=REPAIRED))
            return
        for (changes, _), side in zip(_UNDONE, ("later", "gone"), strict=True):
            cells.write(side, undone(changes))
        self._report.add(cells.compare_multisets())
        self._report.repair = None

    def _fetch(self, how: RowHash, wanted: Ints | None) -> Iterator[pa.Table]:
        after: tuple[str, ...] = ()
        while True:
            rows = self._paced(self._reader.rows_in, how, wanted, after=after)
            if rows.rows:
                yield self._source_table(rows)
            if rows.done:
                return
            after = rows.last_key or ()

    def _by_cells(self, snapshot: TableSnapshot, rows: int) -> dict[str, tuple[str, ...]]:
        """Compare all rows of an open snapshot, which ends when they are read."""
        cells = self._cells(rows)
        self._report.rows = cells.write("theirs", self._read(None))
        self._report.fetched += self._report.rows
        self._reader.end()
        unseen = self._pin(snapshot)
        cells.write("ours", (self._lake_table(rows) for rows in self._lake.current()))
        if self._schema.key:
            self._report.add(cells.compare(unseen, shown_max=SHOWN, texts_max=REPAIRED))
            return unseen
        for (changes, _), side in zip(_UNDONE, ("later", "gone"), strict=True):
            cells.write(side, (self._lake_table(r) for r in self._lake.unseen_rows(snapshot.visibility, changes)))
        self._report.add(cells.compare_multisets())
        self._report.repair = None
        return {}

    def _round(self, keys: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """Compare the rows of `keys` (canonical → texts) in a snapshot of their own; those that could not be."""
        snapshot = self._begin()
        cells = self._cells(len(keys))
        self._report.fetched += cells.write("theirs", self._read(list(keys.values())))
        self._reader.end()
        unseen = self._pin(snapshot)
        wanted = pa.array(list(keys), pa.string())
        cells.write("ours", (self._lake_table(rows) for rows in self._lake.current(wanted)))
        self._report.add(cells.compare(unseen, shown_max=SHOWN, texts_max=REPAIRED))
        return {name: texts for name, texts in unseen.items() if name in keys}

    def _read(self, keys: list[tuple[str, ...]] | None) -> Iterator[pa.Table]:
        after: tuple[str, ...] | None = None
        rows_max = 0 if keys else self._asked.chunk_rows
        while True:
            rows = self._paced(self._reader.read, after=after, keys=keys, rows_max=rows_max)
            if rows.rows:
                yield self._source_table(rows)
            if rows.done:
                return
            after = rows.last_key

    def _paced(self, work: Callable[..., T], *args: Any, **more: Any) -> T:
        """One piece of work at the source, told to whoever paces it."""
        began = time.monotonic()
        done = work(*args, **more)
        self._asked.pace(time.monotonic() - began)
        return done

    # ---- both sides ----

    def _begin(self) -> TableSnapshot:
        snapshot = self._reader.begin(self._read_schema)
        self._read_schema = snapshot.schema
        lake = self._lake_of(snapshot.schema)
        lake.runs_from_us = snapshot.taken_at_us if snapshot.by_runs else None
        return snapshot

    def _lake_of(self, schema: TableSchema) -> LakeRows:
        """What is compared of a table of this shape: where its lake is frozen, the columns that the lake has."""
        held = self._asked.held
        names: dict[str, str] = {}
        prefix = None
        if held is not None:
            kept = {c.attnum: c.name for c in held.columns}
            names = {c.name: kept[c.attnum] for c in schema.columns if c.attnum in kept}
            self._report.left_out = [c.name for c in schema.columns if c.attnum not in kept]
            if not set(schema.key) <= set(names):
                raise CdcError(
                    f"table {schema.table} is frozen, and the lake lacks a column of its key",
                    hint=f"`cdc resync {schema.table}` accepts the new shape",
                )
            schema = replace(schema, columns=tuple(c for c in schema.columns if c.name in names))
            prefix = system_prefix(c.name for c in held.columns)
        self._schema = schema
        self._names = [c.name for c in schema.columns]
        self._lake = LakeRows(
            self._store, self._report.source, self._report.table, schema, held=names, prefix=prefix
        )  # fmt: skip
        return self._lake

    def _pin(self, snapshot: TableSnapshot) -> dict[str, tuple[str, ...]]:
        """Wait for the lake to hold what the snapshot sees, and pin it; the keys that it shows newer."""
        self._await(self._report.table, snapshot.lsn)
        self._lake.pin()
        return self._lake.unseen_keys(snapshot.visibility, HOT_KEYS) if self._schema.key else {}

    def _cells(self, rows: int) -> Cells:
        return Cells(self._folder, self._names, rows=rows, show_values=self._asked.show_values)

    def _source_table(self, rows: RowsRead) -> pa.Table:
        if len(self._names) == len(rows.columns):
            columns = rows.columns
        else:
            columns = [
                array for c, array in zip(self._read_schema.columns, rows.columns, strict=True) if c.name in self._names
            ]
        return self._table(Rows(columns, rows.raw, rows.rows), self._names)

    def _lake_table(self, rows: Rows) -> pa.Table:
        return self._table(rows, self._lake.names)

    def _table(self, rows: Rows, held: list[str]) -> pa.Table:
        raw = raw_texts(rows.raw, rows.rows, self._names, held, rows.prefix)
        arrays = {RAW: raw, **positional(rows.columns)}
        if self._schema.key:
            places = [self._names.index(k) for k in self._schema.key]
            arrays = {
                KEY: key_of([rows.columns[i] for i in places], rows.raw, [held[i] for i in places]),
                TEXTS: self._texts(rows, held, places),
                **arrays,
            }
        return pa.table(arrays)

    def _texts(self, rows: Rows, held: list[str], places: list[int]) -> pa.Array:
        """The key's texts, as the source knows them."""
        texts = []
        for i in places:
            text = pg_text(rows.columns[i], self._schema.columns[i])
            if text.null_count and rows.raw is not None:
                text = pc.coalesce(text, pc.map_lookup(rows.raw, pa.scalar(held[i]), "first"))
            texts.append(text)
        return pa.StructArray.from_arrays(texts, [str(i) for i in places])

    def _canonical(self, rows: Rows) -> pa.Array:
        places = [self._names.index(k) for k in self._schema.key]
        return key_of([rows.columns[i] for i in places], rows.raw, self._lake.key)


# What the lake has got since a snapshot, to be taken off, and what it has lost, to be put back: operation → old tuple.
_UNDONE: tuple[tuple[Mapping[str, bool], int], ...] = (({"c": False, "u": False}, -1), ({"d": False, "u": True}, 1))


def _filtered(rows: Rows, mask: np.ndarray[Any, np.dtype[np.bool_]]) -> Rows:
    if mask.all():
        return rows
    chosen = pa.array(mask)
    raw = rows.raw.filter(chosen) if rows.raw is not None else None
    return Rows([c.filter(chosen) for c in rows.columns], raw, int(mask.sum()), rows.prefix)
