"""The stream of one Postgres database: slot, publication and relations put together into portions of batches.

Guarantees: portions come in stream order, each change exactly once per open; a second daemon on the same slot waits
(advisory lock on the source, held by a connection of its own). Confirming only records a number here: who may call
it is decided in cdc.capture. It does not create slot or publication (admin.py does) and reads no rows (snapshot.py
does).
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg

from cdc import metrics
from cdc.batch import Boundary, Portion
from cdc.config import SourceConfig, password_of
from cdc.errors import (
    CdcError,
    SlotLost,
    SourceRefused,
    SourceUnavailable,
    SpoolFailed,
    Standby,
    StreamRestarted,
    Undecodable,
)
from cdc.inspection import SourceInspector
from cdc.ports import ChecksumReader, RunReader, Schemas, SnapshotReader, Source, SourceAdmin, SourceIdentity
from cdc.table import Column, TableId, TableSchema
from connectors.postgres import catalog, publication
from connectors.postgres.admin import PostgresAdmin
from connectors.postgres.checksums import PostgresChecksumReader
from connectors.postgres.connection import POOLER, POOLER_FIX, connect, describe, take_any_bytes, translated
from connectors.postgres.inspection import PostgresInspector
from connectors.postgres.logical_messages import MessageTable, messages_schema
from connectors.postgres.periodic import PostgresRunReader
from connectors.postgres.periodic_admin import PeriodicAdmin
from connectors.postgres.pgoutput import Decoder, Relation, RelationColumn
from connectors.postgres.replication import Receiver, format_lsn, parse_lsn, start_statement
from connectors.postgres.resolution import Resolved, resolve
from connectors.postgres.snapshot import PostgresSnapshotReader
from connectors.postgres.spool import Part, Spool

log = logging.getLogger(__name__)

STREAMING_SINCE = 140000
"""First server that can stream transactions before they commit."""


class PostgresSource:
    """One slot's stream. Not thread-safe but for `confirm`."""

    def __init__(self, config: SourceConfig, *, temp_dir: Path | None = None, application_name: str = "cdc") -> None:
        """Without a `temp_dir` it has the server keep big transactions until their commit."""
        self._config = config
        self._temp_dir = temp_dir
        self._application_name = application_name
        self._where = describe(config.dsn)
        self._receiver: Receiver | None = None
        self._catalog: psycopg.Connection[Any] | None = None
        self._decoder: Decoder | None = None
        self._spool: Spool | None = None
        self._parts: Iterator[Part] = iter(())
        self._more = False
        self._ahead: Future[Portion | None] | None = None
        self._whole = False
        """Streaming has been given up: until the end of the process the server sends transactions whole."""
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._schemas: Schemas | None = None
        self._published: dict[int, catalog.Published] = {}
        self._shown: dict[int, tuple[Column, ...]] = {}
        """Columns of each relation as the stream showed them last without a doubt."""
        self._server: tuple[str, int] | None = None

    def open(self, after: Boundary | None, schemas: Schemas, epoch: int) -> None:
        self.close()
        self._schemas = schemas
        self._shown.clear()
        self._catalog = self._connect(replication=False)
        self._take_turn(self._catalog)
        with translated(self._where):
            self._published = catalog.published(self._catalog, self._config)
        publication.require_whole(self._where, self._published.values(), self._config)
        spool = self._new_spool(self._catalog.info.server_version)
        connection = self._connect(replication=True)
        try:
            self._check_server(connection)
            with translated(self._where):
                take_any_bytes(connection)
            self._receiver = Receiver(
                connection,
                start=start_statement(
                    self._config.slot,
                    after.end_lsn if after is not None else 0,
                    self._config.publication,
                    streaming=spool is not None,
                ),
                where=f"{self._where} slot {self._config.slot}",
                buffer_bytes=self._config.buffer_bytes,
                poll_sleep_s=self._config.poll_sleep_s,
                silence_s=self._config.receive_timeout_s,
            )
        except SourceRefused as e:
            connection.close()
            if not isinstance(e.__cause__, psycopg.errors.UndefinedObject):
                raise
            raise SlotLost(f"{self._where}: replication slot {self._config.slot!r} does not exist") from e
        except BaseException:
            connection.close()
            raise
        if after is not None:
            self._check_start(after)
        lsn, end_lsn = (after.lsn, after.end_lsn) if after is not None else (0, 0)
        messages = None
        if self._config.messages:
            messages = MessageTable(schemas.register(messages_schema()), self._config.messages)
        self._decoder = Decoder(self._resolve, epoch=epoch, after_lsn=lsn, after_end_lsn=end_lsn, messages=messages)
        # Whatever was held of open transactions is void: the server sends them again from their beginning.
        self._spool = spool

    def read(self, timeout_s: float) -> Portion | None:
        assert self._receiver is not None, "open first"
        assert self._decoder is not None, "open first"
        portion = self._taken()
        if portion is not None:
            return portion
        try:
            blob = self._receiver.take(timeout_s)
        except SourceRefused as e:
            raise self._ended(e) from e.__cause__
        if blob is None:
            return None
        if self._spool is None:
            self._parts = iter((Part(blob.data, blob.lengths),))
            return self._decoded()
        self._parts = self._spool.take(blob.data, blob.lengths, in_transaction=self._decoder.in_transaction)
        portion = self._taken() or Portion()
        # What is held is counted when it comes, not when it is decoded.
        portion.received_bytes, portion.messages = len(blob.data), self._spool.messages
        portion.head_lsn = max(portion.head_lsn, self._spool.head_lsn)
        self._receiver.lend(self._spool.held_bytes)
        metrics.SPOOL_BYTES.labels(self._config.name).set(self._spool.written_bytes)
        return portion

    def _new_spool(self, server_version: int) -> Spool | None:
        """What holds streamed transactions; None: they are not to be streamed.

        Servers do not always say the origin of a transaction that they stream before it commits (they take it from the
        first thing in it, which may be no row). So nothing is streamed where origins exist; where one comes to be
        meanwhile, `_check_origin` notices it. Nor do they say which subtransaction wrote a logical message: one that
        was rolled back could not be told, so nothing is streamed where messages are kept.
        """
        if self._temp_dir is None or self._config.streaming == "off" or self._config.messages or self._whole:
            return None
        if server_version < STREAMING_SINCE or self._origins_exist():
            return None
        return Spool(
            self._temp_dir, memory_bytes=self._config.buffer_bytes // 2, bytes_max=self._config.spool_bytes_max
        )

    def _origins_exist(self) -> bool:
        assert self._catalog is not None
        with translated(self._where):
            row = self._catalog.execute("select exists (select from pg_catalog.pg_replication_origin)").fetchone()
        return bool(row and row[0])

    def _check_origin(self) -> None:
        """A streamed transaction is about to be decoded, and the server did not say its origin."""
        if self._origins_exist():
            self._whole = True
            raise StreamRestarted(
                f"{self._where}: a replication origin was created; big transactions come whole from now on"
            )

    def _ended(self, error: SourceRefused) -> CdcError:
        """What becomes of an error of the server that ended the stream."""
        if isinstance(error.__cause__, psycopg.errors.UndefinedObject):
            return Undecodable(
                f"{error.args[0]}: what was written while it did not exist cannot be decoded",
                hint="`cdc teardown`, then start again: a new epoch begins and every table is snapshotted anew;"
                ' on_slot_lost = "resync" does so by itself',
            )
        if self._spool is not None and isinstance(error.__cause__, psycopg.errors.InternalError_):
            # Servers fail at some transactions only if they stream them: where a table is rewritten in a subtransaction
            # that is rolled back, with "could not map filenumber".
            self._whole = True
            log.warning("the server failed to stream a transaction before its commit", extra={"error": error.args[0]})
            return StreamRestarted(f"{self._where}: big transactions come whole from now on")
        return error

    def _taken(self) -> Portion | None:
        """The next portion of what has been taken from the receiver, None if all of it is decoded. Of a streamed
        transaction the one behind it is decoded meanwhile: while it arrived, nothing of it could be logged."""
        ahead, self._ahead = self._ahead, None
        portion = ahead.result() if ahead is not None else self._decoded()
        if self._more:
            self._ahead = self._decoding.submit(self._decoded)
        elif portion is not None and self._receiver is not None and self._spool is not None:
            self._receiver.lend(self._spool.held_bytes)
        return portion

    def _decoded(self) -> Portion | None:
        assert self._decoder is not None, "open first"
        try:
            part = next(self._parts, None)
        except SpoolFailed as error:
            # Tried again, it would fail again: the server sends the same from its beginning.
            self._whole = True
            log.warning("streamed transactions cannot be held", extra={"error": error.args[0], "hint": error.hint})
            raise StreamRestarted(f"{self._where}: big transactions come whole from now on") from error
        self._more = part is not None and part.more
        if part is None:
            return None
        if part.anonymous:
            self._check_origin()
        began = time.perf_counter()
        if part.aborted is None:
            portion = self._decoder.feed_blob(part.data, part.lengths)
        else:
            portion = self._decoder.feed_spooled(part.data, part.lengths, part.aborted)
        metrics.STAGE_SECONDS.labels("decode").inc(time.perf_counter() - began)
        return portion

    def confirm(self, end_lsn: int) -> None:
        if self._receiver is not None:
            self._receiver.confirm(end_lsn)

    def identity(self) -> SourceIdentity:
        connection = self._connect(replication=True)
        with translated(self._where), connection:
            system_id, timeline, database = _identify(connection)
            standby = connection.execute("select pg_is_in_recovery()").fetchone()
            if standby == (True,):
                raise SourceRefused(
                    f"{self._where}: the server is a standby: snapshots there leave out running transactions",
                    hint="point the source's dsn at the primary",
                )
            self._server = system_id, timeline
            return SourceIdentity(
                system_id=system_id,
                timeline=timeline,
                database=database,
                server_version=connection.info.server_version,
                branches=_branches(connection, timeline),
            )

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
        if self._ahead is not None:
            self._ahead.exception()
            self._ahead = None
        self._parts, self._more = iter(()), False
        if self._spool is not None:
            self._spool.close()
            self._spool = None
            metrics.SPOOL_BYTES.labels(self._config.name).set(0)
        if self._catalog is not None:
            self._catalog.close()
            self._catalog = None

    def _connect(self, *, replication: bool) -> psycopg.Connection[Any]:
        config = self._config
        return connect(
            config.dsn,
            password=password_of(config),
            application_name=self._application_name,
            connect_timeout_s=config.connect_timeout_s,
            # A walsender runs no statement that could time out, and must not be cut for being idle.
            settings={} if replication else {"statement_timeout": f"{config.statement_timeout_s:g}s"},
            replication=replication,
        )

    def _check_server(self, connection: psycopg.Connection[Any]) -> None:
        """The connection may lead elsewhere than the one on which the history was looked at: a name that moved, or one
        of several hosts."""
        with translated(self._where):
            server = _identify(connection)[:2]
        if self._server is not None and server != self._server:
            raise SourceUnavailable(
                f"{self._where}: the server is another one than a moment ago (timeline {server[1]} of {server[0]})",
                hint="its history is looked at again",
            )

    def _check_start(self, after: Boundary) -> None:
        """The server silently raises a start position that lies below what the slot has confirmed. We hold the slot by
        now and have confirmed nothing yet, so what it says is what it begins at."""
        assert self._catalog is not None
        with translated(self._where):
            row = self._catalog.execute(
                "select confirmed_flush_lsn::text from pg_replication_slots where slot_name = %s", [self._config.slot]
            ).fetchone()
        confirmed = parse_lsn(row[0]) if row is not None else 0
        if confirmed > after.end_lsn:
            self.close()
            raise SlotLost(
                f"{self._where}: slot {self._config.slot!r} stands at {format_lsn(confirmed)}, behind it lies"
                f" {format_lsn(after.end_lsn)}, where we are; what is in between would be left out"
            )

    def _take_turn(self, connection: psycopg.Connection[Any]) -> None:
        """Only one daemon reads a slot: the lock lives as long as this connection."""
        key = zlib.crc32(f"cdc:{self._config.slot}".encode())
        with translated(self._where):
            row = connection.execute("select pg_try_advisory_lock(%s), pg_backend_pid()", [key]).fetchone()
        assert row is not None
        if row[1] != connection.info.backend_pid:
            raise SourceRefused(f"{self._where}: {POOLER}", hint=POOLER_FIX)
        if not row[0]:
            raise Standby(
                f"{self._where}: another daemon reads slot {self._config.slot!r}",
                hint="it is waited for; find it by `select * from pg_locks where locktype = 'advisory'`",
            )

    def _resolve(self, relation: Relation) -> TableSchema | None:
        """The schema of a Relation message: its columns as the message has them, their facts from the catalog.

        The catalog may be newer than the message. What it no longer has is taken from the version known before.
        """
        assert self._catalog is not None
        assert self._schemas is not None
        table = TableId(relation.schema, relation.name)
        with translated(self._where):
            if relation.oid not in self._published:
                self._published = catalog.published(self._catalog, self._config)
            described = catalog.describe(self._catalog, [relation.oid]).get(relation.oid)
        if relation.oid not in self._published and not catalog.selected(self._config, table):
            return None
        names = {c.name for c in relation.columns}
        now = described.sent(names) if described is not None else None
        resolved = self._columns(relation, described, now)
        columns = resolved.columns
        identity = relation.identity
        if identity == "f" and described is not None and described.kind == "p":
            # The message has the root's identity, the old tuples that of the partitions.
            identity = described.schema.identity
        sent_key = tuple(c.name for c in relation.columns if c.is_key)
        key = now.key if now is not None else ()
        if described is not None and described.is_torn(names):
            key = ()
        elif relation.identity in "fn" and described is not None:
            # The catalog may have another identity by now.
            key = described.primary if set(described.primary) <= {c.name for c in columns} else ()
        elif set(key) != set(sent_key):
            key = sent_key
        schema = TableSchema(
            table=table,
            oid=relation.oid,
            columns=columns,
            doubtful=resolved.doubtful,
            key=key,
            identity=identity,
            absent=now.absent if now is not None else (),
        )
        if not resolved.doubtful:
            self._shown[relation.oid] = columns
        return self._schemas.register(catalog.declared(schema, self._config))

    def _columns(self, relation: Relation, described: catalog.Described | None, now: TableSchema | None) -> Resolved:
        """The columns of a Relation message, recognised in a catalog that may be newer."""
        assert self._catalog is not None
        assert self._schemas is not None
        with translated(self._where):
            facts = catalog.type_facts(self._catalog, [c.type_oid for c in relation.columns])
        sent = [self._as_sent(column, facts) for column in relation.columns]
        table = TableId(relation.schema, relation.name)
        versions = [s.columns for s in self._schemas.versions(table) if s.oid == relation.oid]
        base = self._shown.get(relation.oid)
        if base is None and (held := self._schemas.held(table)) is not None and held.oid == relation.oid:
            base = held.columns
        if described is None or now is None:
            return resolve(sent, (), (), base, versions, whole=False)
        with translated(self._where):
            listed = catalog.has_column_list(self._catalog, relation.oid, self._config)
        whole = not listed and not described.generated
        live = described.schema.columns if whole else now.columns
        return resolve(sent, live, described.dropped, base, versions, whole=whole)

    def _as_sent(self, sent: RelationColumn, facts: dict[int, tuple[int, int, int, str]]) -> Column:
        base, domain_typmod, element, type_name = facts.get(sent.type_oid, (sent.type_oid, -1, 0, ""))
        typmod = sent.typmod if sent.typmod >= 0 else domain_typmod
        return Column(name=sent.name, attnum=0, type_oid=base, typmod=typmod, type_name=type_name, element_oid=element)


def _identify(connection: psycopg.Connection[Any]) -> tuple[str, int, str]:
    """System identifier, timeline and database of the server behind a replication connection."""
    row = connection.execute("IDENTIFY_SYSTEM").fetchone()
    assert row is not None
    return row[0], int(row[1]), row[3]


def _branches(connection: psycopg.Connection[Any], timeline: int) -> tuple[tuple[int, int], ...]:
    """The timelines that `timeline` descends from, oldest first, with the LSN at which each was left; empty if the
    server no longer has the history (nobody can tell then)."""
    if timeline == 1:
        return ()
    try:
        # The server declares the content as bytea in some versions, and sends it as it is: take the bytes.
        row = connection.execute(f"TIMELINE_HISTORY {timeline}".encode(), binary=False).fetchone()
    except psycopg.errors.UndefinedFile:
        return ()
    assert row is not None
    text = row[1].decode(errors="replace") if isinstance(row[1], bytes) else str(row[1])
    return parse_history(text)


def parse_history(text: str) -> tuple[tuple[int, int], ...]:
    """What a timeline history file says: parent timelines, oldest first, and where each was left."""
    lines = (line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    return tuple((int(fields[0]), parse_lsn(fields[1])) for fields in lines if len(fields) >= 2)


class PostgresKind:
    """Entry point `cdc.sources: postgres`: makes the parts of one configured source."""

    @staticmethod
    def source(config: SourceConfig, *, application_name: str = "cdc", temp_dir: Path | None = None) -> Source:
        return PostgresSource(config, application_name=application_name, temp_dir=temp_dir)

    @staticmethod
    def reader(config: SourceConfig) -> SnapshotReader:
        return PostgresSnapshotReader(config)

    @staticmethod
    def comparer(config: SourceConfig) -> ChecksumReader:
        return PostgresChecksumReader(config)

    @staticmethod
    def admin(config: SourceConfig) -> SourceAdmin:
        return PeriodicAdmin(config) if config.is_periodic else PostgresAdmin(config)

    @staticmethod
    def inspector(config: SourceConfig) -> SourceInspector:
        return PostgresInspector(config)

    @staticmethod
    def runs(config: SourceConfig) -> RunReader:
        return PostgresRunReader(config)
