"""Hashes rows at the server, for `verify`: checksums per bucket, and the rows of the buckets that differ.

The hash is that of cdc.rowhash, as one expression of stock Postgres 14 and newer. A table is gone through in ranges of
blocks, each one statement that aims at about a second: no statement is long, whatever the table's size and
`statement_timeout`, and whoever calls can stop, or pause, in between. All of them see the one open snapshot. Writes
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
from psycopg import sql

from cdc.config import SourceConfig
from cdc.errors import GaveWay
from cdc.ports import RowsRead, SumsRead
from cdc.rowhash import SAMPLE_PARTS, SEPARATOR, Ints, RowHash, Sums, hash_lines, is_measured, is_trimmed
from cdc.table import Column, TableId
from connectors.postgres.connection import translated
from connectors.postgres.snapshot import NOTHING, PostgresSnapshotReader, parse_csv

STEP_S = 1.0
"""What one statement should take."""
BLOCKS, BLOCKS_MAX = 1024, 1 << 18
"""Blocks of the first statement, and of one statement at most."""
ARGUMENTS = 90
"""A function of Postgres takes 100 at most."""
GROUPS_MEMORY = "32MB"
"""`work_mem` of the session: the sums of 16,384 buckets take 4 MB, and a server may be set to less."""

_PROBE = "what the server makes of this"
_TEXTS = frozenset({25, 1042, 1043})


class PostgresChecksumReader(PostgresSnapshotReader):
    """Implements `ChecksumReader`."""

    application_name = "cdc verify"

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        self._blocks, self._most = BLOCKS, BLOCKS_MAX

    def hashes(self) -> bool | None:
        opened = self._open
        assert opened is not None, "begin first"
        if any(leaf.kind != "r" for leaf in opened.leaves):
            return None
        with translated(self._where):
            row = (
                self._ready()
                .execute(
                    "select current_setting('server_encoding'), hashtextextended(%s collate \"C\", 7),"
                    " (select count(*) from pg_class c join pg_am a on a.oid = c.relam"
                    "  where c.oid = any(%s) and a.amname <> 'heap')",
                    [_PROBE, [oid for oid, _ in self._files()]],
                )
                .fetchone()
            )
            assert row is not None
            # Of each statement's second, compiling it would take a part.
            self._ready().execute(
                sql.SQL("set local jit = off; set local work_mem = {}").format(sql.Literal(GROUPS_MEMORY))
            )
        self._most = BLOCKS_MAX
        ours = int(hash_lines(pa.array([_PROBE]), 7).astype(np.int64)[0])
        if row[1] != ours or row[2]:
            # Another byte order, or rows that do not lie in blocks.
            return None
        return row[0] not in ("UTF8", "SQL_ASCII")

    def sums(self, how: RowHash, *, after: tuple[str, ...] = ()) -> SumsRead:
        place, first = (int(after[0]), int(after[1])) if after else (0, 0)
        files = self._files()
        if place >= len(files):
            return SumsRead(sums=Sums.zero(how.buckets), last=after, done=True)
        began = time.monotonic()
        end = first + self._blocks
        sums = self._sums(how, [_blocks(first, end)], files[place][1])
        self._pace(time.monotonic() - began)
        place, end = (place + 1, 0) if end >= self._size(files[place][0]) else (place, end)
        return SumsRead(sums=sums, last=(str(place), str(end)), done=place >= len(files))

    def sums_of(self, how: RowHash, keys: Sequence[tuple[str, ...]]) -> Sums:
        assert self._open is not None, "begin first"
        return self._sums(how, [self._among(self._open.schema, keys)], None)

    def rows_in(self, how: RowHash, wanted: Ints | None, *, after: tuple[str, ...] = ()) -> RowsRead:
        place, first = (int(after[0]), int(after[1])) if after else (0, 0)
        files = self._files()
        conditions = self._conditions(how)
        if wanted is not None:
            listed = sql.SQL(", ").join(sql.Literal(int(b)) for b in wanted)
            conditions.append(
                sql.SQL("({} & {}) in ({})").format(self._hash(how), sql.Literal(how.buckets - 1), listed)
            )
        if place >= len(files):
            empty, _ = self._copy([sql.Composed([sql.SQL("false")])], NOTHING, NOTHING)
            return empty
        while True:
            began, count = time.monotonic(), self._blocks
            end = first + count
            rows, _ = self._copy(
                [*conditions, _blocks(first, end)], NOTHING, NOTHING, only=files[place][1], whole=count == 1
            )
            if rows.done:
                break
            # What has too many bytes is read again by half; a block is the least.
            self._blocks = self._most = max(1, count // 2)
        self._pace(time.monotonic() - began)
        place, end = (place + 1, 0) if end >= self._size(files[place][0]) else (place, end)
        return replace(rows, last_key=(str(place), str(end)), done=place >= len(files))

    def _files(self) -> list[tuple[int, TableId]]:
        """What holds the rows: the table, or its partitions, whose places the snapshot's lock keeps."""
        opened = self._open
        assert opened is not None, "begin first"
        if opened.kind == "p":
            return [(leaf.oid, leaf.table) for leaf in opened.leaves]
        return [(opened.schema.oid, opened.schema.table)]

    def _size(self, oid: int) -> int:
        """Blocks of a table; it may have grown, by rows that the snapshot does not see. GaveWay if somebody waits for a
        lock that ours is in the way of: others queue behind him."""
        assert self._open is not None
        query = (
            "select coalesce(pg_relation_size(%s::oid) / current_setting('block_size')::int8, 0),"
            " exists (select from pg_locks where relation = any(%s) and not granted)"
        )
        with translated(self._where):
            locked = [self._open.schema.oid, *(file for file, _ in self._files())]
            row = self._ready().execute(query, [oid, locked]).fetchone()
        assert row is not None
        if row[1]:
            table = self._open.schema.table
            self.end()
            raise GaveWay(f"{self._where} table {table}: somebody waits for a lock on it")
        return int(row[0])

    def _pace(self, took_s: float) -> None:
        """Let the next statement take about STEP_S."""
        factor = min(2.0, max(0.25, STEP_S / max(took_s, 0.01)))
        self._blocks = int(min(self._most, max(1, self._blocks * factor)))

    def _sums(self, how: RowHash, conditions: list[sql.Composed], only: TableId | None) -> Sums:
        assert self._open is not None
        conditions = [*self._conditions(how), *conditions]
        where = sql.SQL("where {}").format(sql.SQL(" and ").join(conditions)) if conditions else NOTHING
        relation = sql.SQL("only {}").format(sql.Identifier(*only)) if only else self._relation(self._open)
        # `offset 0` keeps the planner from computing the hash once for the bucket and once for the sum.
        query = sql.SQL(
            "copy (select h & {}, count(*), sum(h) from (select {} as h from {} {} offset 0) t group by 1)"
            " to stdout (format csv)"
        ).format(sql.Literal(how.buckets - 1), self._hash(how), relation, where)
        data, _ = self._receive(query, 0)
        sums = Sums.zero(how.buckets)
        if data.size:
            places, rows, hashes = parse_csv(data, ["bucket", "rows", "hashes"])
            at = places.cast("int64").to_numpy()
            sums.rows[at] = rows.cast("int64").to_numpy()
            # Per bucket, not per row; numeric, because a sum of bigint is.
            sums.hashes[at] = np.array([int(h) & 0xFFFFFFFFFFFFFFFF for h in hashes.to_pylist()], np.uint64)
        return sums

    def _conditions(self, how: RowHash) -> list[sql.Composed]:
        found: list[sql.Composed] = []
        if self._filter:
            found.append(sql.SQL("({})").format(sql.SQL(self._filter)))
        if how.sample < SAMPLE_PARTS:
            hashed = _hashed(_line(how.keys, how.in_hex), how, how.seed)
            parts, sample = sql.Literal(SAMPLE_PARTS - 1), sql.Literal(how.sample)
            found.append(sql.SQL("({} & {}) < {}").format(hashed, parts, sample))
        return found

    def _hash(self, how: RowHash) -> sql.Composed:
        return _hashed(_line(how.columns, how.in_hex), how, 0)


def _blocks(first: int, end: int) -> sql.Composed:
    return sql.SQL("ctid >= {} and ctid < {}").format(sql.Literal(f"({first},0)"), sql.Literal(f"({end},0)"))


def _hashed(line: sql.Composed, how: RowHash, seed: int) -> sql.Composed:
    if how.in_hex:
        line = sql.SQL("convert_to({}, 'UTF8')::text").format(line)
    return sql.SQL('hashtextextended({} collate "C", {})').format(line, sql.Literal(seed))


def _line(columns: Sequence[Column], in_hex: bool) -> sql.Composed:
    """The line of cdc.rowhash. `concat` prints values by their types' output functions, as COPY does, and skips
    NULL; a cast to text would print some of them otherwise (boolean, char(n), inet)."""
    parts: list[sql.Composable] = []
    for column in columns:
        name = sql.Identifier(column.name)
        parts.append(sql.SQL("trim_scale({})").format(name) if is_trimmed(column) else name)
    parts += [_length(column, in_hex) for column in columns if is_measured(column)]
    separator = sql.Literal(SEPARATOR)
    pieces: list[sql.Composable] = []
    for i in range(0, len(parts), ARGUMENTS // 2):
        piece = [x for part in parts[i : i + ARGUMENTS // 2] for x in (part, separator)]
        if i + ARGUMENTS // 2 >= len(parts):
            piece.pop()
        pieces.append(sql.SQL("concat({})").format(sql.SQL(", ").join(piece)))
    while len(pieces) > 1:
        groups = [pieces[i : i + ARGUMENTS] for i in range(0, len(pieces), ARGUMENTS)]
        pieces = [sql.SQL("concat({})").format(sql.SQL(", ").join(group)) for group in groups]
    return sql.SQL("{}").format(pieces[0])


def _length(column: Column, in_hex: bool) -> sql.Composed:
    """How many bytes of UTF-8 the text has; NULL for NULL."""
    name = sql.Identifier(column.name)
    if column.type_oid in _TEXTS and not in_hex:
        return sql.SQL("octet_length({})").format(name)
    text = sql.SQL("convert_to(concat({}), 'UTF8')" if in_hex else "concat({})").format(name)
    # `is not null` would be false for a composite value that has one.
    return sql.SQL("case when num_nonnulls({}) = 1 then octet_length({}) end").format(name, text)
