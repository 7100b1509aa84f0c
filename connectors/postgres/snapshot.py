"""Reads existing rows: one table at a time, in a snapshot of its own, as typed columns.

The rules of snapshots hold here by construction: ACCESS SHARE lock first and only then the snapshot; repeatable
read, read only; `row_security = off`; the publication's row filter and column list apply; keys are compared in
Postgres only; COPY as CSV parsed into strings, then the same cast as the stream. Writes nothing. Which chunks are
read, and what of them is kept, is decided in cdc.backfill.
"""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.csv as pa_csv
from psycopg import sql

from cdc.casts import utf8_or_bytes
from cdc.config import SourceConfig, password_of
from cdc.errors import CdcError, FilterRefused, NotPublished, SourceRefused, SourceUnavailable
from cdc.fingerprint import Catalog
from cdc.ports import Plan, RowsRead, TableSnapshot, Visibility
from cdc.table import TableId, TableSchema
from cdc.types import build_raw, cast
from connectors.postgres import catalog, publication
from connectors.postgres.connection import connect, describe, server_message, take_any_bytes, translate, translated
from connectors.postgres.look import Looker
from connectors.postgres.plan import plan
from connectors.postgres.replication import parse_lsn

WRITERS = """
select l.transactionid::text || coalesce('/' || l.pid::text, ''),
       coalesce('pid ' || l.pid::text || ' (' || coalesce(nullif(a.application_name, ''), a.usename, '?') || ', ' ||
                coalesce(a.state, '?') || ')', 'prepared transaction ' || coalesce(p.gid, '?'))
from pg_locks l
left join pg_stat_activity a on a.pid = l.pid
left join pg_prepared_xacts p on p.transaction = l.transactionid
where l.locktype = 'transactionid' and l.mode = 'ExclusiveLock' and l.granted
  and coalesce(a.datname, p.database, current_database()) = current_database()
"""

NOTHING = sql.Composed([])
ROWS_JOINED = 200
SILENCE_S = 10.0
"""Time beyond the server's own bound of a statement after which it is taken for gone."""
BLOCKS_PER_CHUNK = 4096
"""A keyless table is read in ranges of blocks of one snapshot: 32 MB at the usual block size, big values apart."""


class _Full(Exception):
    """A chunk has as many bytes as one may have."""


class PostgresSnapshotReader:
    """Implements `SnapshotReader`; keeps one connection, reopened when it broke."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self._where = describe(config.dsn)
        self._connection: psycopg.Connection[Any] | None = None
        self._open: catalog.Described | None = None
        self._filter: str | None = None
        self._received: Callable[[], None] = lambda: None
        self._operators: dict[str, catalog.Operators] = {}
        self._looker = Looker(config)

    def tables(self, only: TableId | None = None) -> Catalog:
        with translated(self._where):
            found, seen = self._looker.look(self._ready(), only)
        publication.require_whole(self._where, found, self._config)
        return seen

    def writers(self) -> dict[str, str]:
        with translated(self._where):
            return {str(i): str(who) for i, who in self._ready().execute(WRITERS).fetchall()}

    def begin(self, schema: TableSchema) -> TableSnapshot:
        self.end()
        where = f"{self._where} table {schema.table}"
        with translated(where):
            connection = self._ready()
            found = catalog.published(connection, self._config).get(schema.oid)
            described = catalog.describe(connection, [schema.oid]).get(schema.oid)
            if found is None or described is None:
                raise NotPublished(
                    f"{where} is not published any more, or another table has its name now",
                    hint=f"`alter publication {self._config.publication[0]} add table {schema.table}`",
                )
            connection.execute("begin isolation level repeatable read read only")
            connection.execute(sql.SQL("lock table {} in access share mode").format(self._relation(described)))
            row = connection.execute(
                "select pg_current_snapshot()::text, pg_is_in_recovery(),"
                " case when not pg_is_in_recovery() then pg_current_wal_insert_lsn()::text end"
            ).fetchone()
            assert row is not None
            if row[1]:
                raise SourceRefused(
                    f"{where}: a standby's snapshots leave out running transactions",
                    hint="point the source at the primary",
                )
            under_lock = catalog.describe(connection, [schema.oid]).get(schema.oid)
            if under_lock is None:
                raise NotPublished(f"{where} was dropped")
            if under_lock.schema.table != described.schema.table:
                # What is locked, and would be read, is whatever has the old name by now.
                raise SourceUnavailable(f"{where} was renamed while its snapshot began")
            self._operators = catalog.operators(connection, under_lock.schema)
        readable = catalog.declared(under_lock.sent(found.columns), self._config)
        self._open = replace(under_lock, schema=readable)
        self._filter = found.row_filter
        xmin, xmax, running = row[0].split(":")
        return TableSnapshot(
            visibility=Visibility(
                xmin=int(xmin),
                xmax=int(xmax),
                in_progress=frozenset(int(x) for x in running.split(",") if x),
            ),
            schema=readable,
            relfilenode=under_lock.relfilenode,
            lsn=parse_lsn(row[2]),
            taken_at_us=time.time_ns() // 1000,
            plan=self._plan,
        )

    def read(
        self,
        *,
        after: tuple[str, ...] | None = None,
        keys: Sequence[tuple[str, ...]] | None = None,
        rows_max: int = 0,
        where: str = "",
        through: tuple[str, ...] | None = None,
        blocks: int = 0,
        received: Callable[[], None] = lambda: None,
    ) -> RowsRead:
        assert self._open is not None, "begin first"
        self._received = received
        schema = self._open.schema
        conditions: list[sql.Composed] = []
        if self._filter:
            conditions.append(sql.SQL("({})").format(sql.SQL(self._filter)))
        if where:
            with self._refused():
                self._try_filter(where)
            # On lines of its own: it may end in a comment.
            conditions.append(sql.Composed([sql.SQL("("), sql.SQL(where), sql.SQL("\n)")]))
            with self._refused():
                return self._read_keyed(schema, conditions, after, keys, rows_max)
        if blocks:
            assert after is not None
            assert through is not None
            return self._read_range(conditions, int(after[0]), int(through[0]), blocks)
        if through is not None:
            conditions.append(self._up_to(schema, through))
        return self._read_keyed(schema, conditions, after, keys, rows_max)

    def _plan(self, parts_max: int) -> Plan:
        assert self._open is not None, "begin first"
        with translated(self._where):
            return plan(self._ready(), self._open, parts_max)

    def _read_keyed(
        self,
        schema: TableSchema,
        conditions: list[sql.Composed],
        after: tuple[str, ...] | None,
        keys: Sequence[tuple[str, ...]] | None,
        rows_max: int,
    ) -> RowsRead:
        order, limit = NOTHING, NOTHING
        if keys is not None:
            conditions.append(self._among(schema, keys))
        elif schema.key:
            if after is not None:
                conditions.append(self._behind(schema, after))
            order = sql.SQL("order by {}").format(_names(schema.key))
            limit = sql.SQL("limit {}").format(sql.Literal(rows_max)) if rows_max else limit
        else:
            return self._read_blocks(conditions, after or ("0", "0"))
        # Rows that were asked for by key are few, and whoever asked would not know which are left.
        table, texts = self._copy(conditions, order, limit, whole=keys is not None)
        last = self._last_key(schema, texts) if table.rows else None
        done = table.done and (keys is not None or not rows_max or table.rows < rows_max)
        return replace(table, last_key=last, done=done)

    def _try_filter(self, where: str) -> None:
        """Have the server parse and bind the filter as one expression of one statement, which is all it may be."""
        assert self._open is not None
        query = sql.SQL("select from {} where ({}\n) and %s limit 0").format(
            self._relation(self._open), sql.SQL(where.replace("%", "%%"))
        )
        self._ready().execute(query, [False])

    @contextmanager
    def _refused(self) -> Iterator[None]:
        """What a filter's statement fails at is the filter's fault: the table has been locked and described."""
        try:
            yield
        except psycopg.Error as e:
            raise self._filter_error(e) from e
        except CdcError as e:
            if not isinstance(e.__cause__, psycopg.Error):
                raise
            raise self._filter_error(e.__cause__) from e

    def _filter_error(self, error: psycopg.Error) -> CdcError:
        assert self._open is not None
        where, state = f"{self._where} table {self._open.schema.table}", error.sqlstate or ""
        if state == "57014":
            return FilterRefused(
                f"{where}: the filter's rows were not found within statement_timeout_s",
                hint="raise statement_timeout_s, or make an index for the filter",
            )
        if not state or state[:2] in ("08", "53", "57", "40", "55"):
            return translate(error, where)
        # Messages about the statement name what is in it; those about data quote values.
        said = server_message(error) if state[:2] == "42" else f"it fails on values ({type(error).__name__})"
        return FilterRefused(
            f"{where}: the filter does not run: {said} [{state}]",
            hint="a filter is one condition in Postgres' SQL over the table's columns; names outside pg_catalog need"
            " their schema",
        )

    def _last_key(self, schema: TableSchema, texts: list[pa.Array]) -> tuple[str, ...]:
        last = {k: texts[_index(schema, k)][-1].as_py() for k in schema.key}
        odd = [k for k, text in last.items() if not isinstance(text, str)]
        if odd:
            raise SourceRefused(
                f"{self._where} table {schema.table}: key column {odd[0]!r} holds text that is not UTF-8, so the table"
                " cannot be read in order",
                hint=f'mend the value, or leave the table out: `exclude = ["{schema.table}"]`',
            )
        return tuple(last.values())

    def end(self) -> None:
        self._open = None
        connection = self._connection
        if connection is not None and connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
            try:
                connection.execute("rollback")
            except psycopg.Error:
                connection.close()
                self._connection = None

    def close(self) -> None:
        """Close the connection; idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ready(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            config = self._config
            self._connection = connect(
                config.dsn,
                password=password_of(config),
                application_name="cdc snapshot",
                connect_timeout_s=config.connect_timeout_s,
                settings={
                    "lock_timeout": f"{config.lock_timeout_s:g}s",
                    "statement_timeout": f"{config.statement_timeout_s:g}s",
                    "row_security": "off",
                },
            )
        return self._connection

    def _relation(self, described: catalog.Described) -> sql.Composed:
        """The table itself; a partitioned root stands for its partitions."""
        pattern = "{}" if described.kind == "p" else "only {}"
        return sql.SQL(pattern).format(sql.Identifier(*described.schema.table))

    def _behind(self, schema: TableSchema, after: tuple[str, ...]) -> sql.Composed:
        """The rows behind a key, in the order in which ORDER BY has them."""
        if not self._operators:
            return sql.SQL("({}) > ({})").format(_names(schema.key), _values(schema, after))
        # A row comparison takes one operator for all columns: spelled out, with a first condition for the index.
        either = [
            sql.SQL("({})").format(
                sql.SQL(" and ").join(
                    [*(self._compare(schema, after, k, "equal") for k in range(i)), self._compare(schema, after, i)]
                )
            )
            for i in range(len(schema.key))
        ]
        first = self._compare(schema, after, 0, "at_least")
        return sql.SQL("({} and ({}))").format(first, sql.SQL(" or ").join(either))

    def _up_to(self, schema: TableSchema, last: tuple[str, ...]) -> sql.Composed:
        """The rows that are not behind a key."""
        if not self._operators:
            return sql.SQL("({}) <= ({})").format(_names(schema.key), _values(schema, last))
        return sql.SQL("(not {} and not {})").format(self._compare(schema, last, 0), self._behind(schema, last))

    def _equal(self, schema: TableSchema, key: tuple[str, ...]) -> sql.Composed:
        return sql.SQL(" and ").join(self._compare(schema, key, i, "equal") for i in range(len(key)))

    def _compare(self, schema: TableSchema, key: tuple[str, ...], i: int, what: str = "greater") -> sql.Composed:
        """One column of the key against its value, by the operator of its type."""
        own = self._operators.get(schema.key[i])
        namespace, name = getattr(own, what) if own else ("pg_catalog", {"equal": "=", "at_least": ">="}.get(what, ">"))
        return sql.SQL("{} operator({}.{}) {}").format(
            sql.Identifier(schema.key[i]),
            sql.Identifier(namespace),
            sql.SQL(name),
            _values(replace(schema, key=schema.key[i : i + 1]), key[i : i + 1]),
        )

    def _among(self, schema: TableSchema, keys: Sequence[tuple[str, ...]]) -> sql.Composed:
        if not keys:
            return sql.SQL("{}").format(sql.Literal(False))
        if self._operators:
            # By the type's own operator for the sake of the index, and as text, because it may call others equal too.
            one = sql.SQL("({} and ({}) = ({}))")
            each = (one.format(self._equal(schema, key), _names(schema.key), _values(schema, key)) for key in keys)
            return sql.SQL("({})").format(sql.SQL(" or ").join(each))
        rows = sql.SQL(", ").join(sql.SQL("({})").format(_values(schema, key)) for key in keys)
        return sql.SQL("({}) in ({})").format(_names(schema.key), rows)

    def _read_blocks(self, conditions: list[sql.Composed], after: tuple[str, ...]) -> RowsRead:
        """Rows of the next range of blocks; `last_key` says where to go on: which partition (0 if there are none), and
        which block of it. The snapshot's lock holds partitions where they are. A range that has too many bytes is read
        again by half; a block is the least."""
        opened = self._open
        assert opened is not None
        files = [(leaf.oid, leaf.table) for leaf in opened.leaves if leaf.kind == "r"]
        if opened.kind != "p":
            files = [(opened.schema.oid, opened.schema.table)]
        place, first = int(after[0]), int(after[1])
        if place >= len(files):
            table, _ = self._copy([sql.Composed([sql.SQL("false")])], NOTHING, NOTHING)
            return table
        oid, name = files[place]
        with translated(self._where):
            row = (
                self._ready()
                .execute("select coalesce(pg_relation_size(%s::oid) / current_setting('block_size')::int8, 0)", [oid])
                .fetchone()
            )
        blocks = int(row[0]) if row else 0
        count = BLOCKS_PER_CHUNK
        while True:
            end = first + count
            ranged = sql.SQL("ctid >= {} and ctid < {}").format(sql.Literal(f"({first},0)"), sql.Literal(f"({end},0)"))
            table, _ = self._copy([*conditions, ranged], NOTHING, NOTHING, only=name, whole=count == 1)
            if table.done:
                break
            count //= 2
        place, end = (place + 1, 0) if end >= blocks else (place, end)
        done = place >= len(files)
        return replace(table, last_key=(str(place), str(end)), done=done)

    def _read_range(self, conditions: list[sql.Composed], first: int, last: int, blocks: int) -> RowsRead:
        """Rows of the blocks from `first` on, before `last`; fewer than `blocks` if they have too many bytes."""
        end = min(first + blocks, last)
        while True:
            ranged = sql.SQL("ctid >= {} and ctid < {}").format(sql.Literal(f"({first},0)"), sql.Literal(f"({end},0)"))
            table, _ = self._copy([*conditions, ranged], NOTHING, NOTHING, whole=end - first <= 1)
            if table.done:
                return replace(table, last_key=(str(end),), done=end >= last)
            end = first + (end - first) // 2

    def _copy(
        self,
        conditions: list[sql.Composed],
        order: sql.Composed,
        limit: sql.Composed,
        *,
        only: TableId | None = None,
        whole: bool = False,
    ) -> tuple[RowsRead, list[pa.Array]]:
        """Typed rows of one COPY (of one partition, if `only` names it), and the text columns that they were cast
        from. Unless all are wanted (`whole`), it ends behind `chunk_bytes`; then it is not `done`."""
        assert self._open is not None
        schema = self._open.schema
        where = sql.SQL("where {}").format(sql.SQL(" and ").join(conditions)) if conditions else NOTHING
        names = _names([c.name for c in schema.columns])
        relation = self._relation(self._open)
        if only is not None:
            relation = sql.SQL("only {}").format(sql.Identifier(*only))
        if not schema.columns:
            query = sql.SQL("select count(*) from {} {}").format(relation, where)
            with translated(self._where):
                row = self._ready().execute(query).fetchone()
            return RowsRead(columns=[], raw=None, rows=int(row[0]) if row else 0, last_key=None, done=True), []
        query = sql.SQL("copy (select {} from {} {} {} {}) to stdout (format csv)").format(
            names, relation, where, order, limit
        )
        data, done = self._receive(query, 0 if whole else self._config.chunk_bytes)
        if done:
            self._received()
        texts = parse_csv(data, [c.name for c in schema.columns])
        columns: list[pa.Array] = []
        masks: list[np.ndarray | None] = []
        for column, text in zip(schema.columns, texts, strict=True):
            typed, mask = cast(column, text)
            columns.append(typed)
            masks.append(mask)
        raw = build_raw([c.name for c in schema.columns], texts, masks)
        read = RowsRead(columns=columns, raw=raw, rows=len(texts[0]), last_key=None, done=done, bytes=data.size)
        return read, texts

    def _receive(self, query: sql.Composed, bytes_max: int) -> tuple[pa.Buffer, bool]:
        """What a COPY sends, and whether it is all; what is beyond `bytes_max` (0: no bound) is cancelled, row by row
        as the server sends them. The savepoint keeps the snapshot over that."""
        assert self._open is not None
        connection = self._ready()
        with translated(f"{self._where} table {self._open.schema.table}"), connection.cursor() as cursor:
            connection.execute("savepoint chunk")
            any_bytes = take_any_bytes(connection, local=True)
            blobs: list[bytes] = []
            try:
                with cursor.copy(query):
                    self._drain(connection, blobs, bytes_max)
            except _Full:
                connection.execute("rollback to savepoint chunk")
                return pa.py_buffer(b"".join(blobs)), False
            if any_bytes:
                connection.execute("set local client_encoding to 'UTF8'")
            connection.execute("release savepoint chunk")
        return pa.py_buffer(b"".join(blobs)), True

    def _drain(self, connection: psycopg.Connection[Any], blobs: list[bytes], bytes_max: int) -> None:
        """Take what libpq has, message by message (a message is a row), and join them while they are in the cache: kept
        one by one they cost three times as much. _Full behind `bytes_max`."""
        pgconn = connection.pgconn
        get, poll = pgconn.get_copy_data, select.poll()
        poll.register(pgconn.socket, select.POLLIN)
        # The server ends a statement by itself; a server that is gone does not.
        silence_ms = int((self._config.statement_timeout_s + SILENCE_S) * 1000)
        rows: list[memoryview] = []
        take, size, n = rows.append, 0, 1
        limit = bytes_max or sys.maxsize
        while n >= 0:
            for _ in range(ROWS_JOINED):
                n, row = get(1)
                if n <= 0:
                    break
                take(row)
                size += n
                if size > limit:
                    break
            if rows:
                blobs.append(b"".join(rows))
                rows.clear()
            if size > limit:
                raise _Full
            if n == 0:
                if not poll.poll(silence_ms):
                    raise SourceUnavailable(f"{self._where} is silent in the middle of a chunk")
                pgconn.consume_input()
        if n == -2:
            raise psycopg.OperationalError(pgconn.get_error_message())
        while (result := pgconn.get_result()) is not None:
            if result.status == psycopg.pq.ExecStatus.FATAL_ERROR:
                raise psycopg.errors.error_from_result(result, encoding=connection.info.encoding)


def parse_csv(data: pa.Buffer, names: list[str]) -> list[pa.Array]:
    """String columns of COPY's CSV: unquoted empty is NULL, quoted empty the empty string. Binary what is not UTF-8."""
    if data.size == 0:
        return [pa.array([], pa.string()) for _ in names]
    # Positions as names: a table may have columns that differ only in ways CSV readers do not keep apart.
    positions = [str(i) for i in range(len(names))]
    table = pa_csv.read_csv(
        pa.BufferReader(data),
        # One block holds the longest row whatever it is; an empty line is a NULL in a one-column table.
        read_options=pa_csv.ReadOptions(column_names=positions, block_size=data.size + 1, use_threads=False),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(positions, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            check_utf8=False,
        ),
    )
    return [utf8_or_bytes(_one(column)) for column in table.columns]


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _index(schema: TableSchema, name: str) -> int:
    return next(i for i, c in enumerate(schema.columns) if c.name == name)


def _names(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))


def _values(schema: TableSchema, key: tuple[str, ...]) -> sql.Composed:
    """Key texts as literals of their columns' types; types' names come from format_type, which quotes them."""
    return sql.SQL(", ").join(
        sql.SQL("{}::{}").format(sql.Literal(text), sql.SQL(schema.column(name).type_name))
        for name, text in zip(schema.key, key, strict=True)
    )
