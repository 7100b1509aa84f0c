"""The SQLite file behind everything that must change together: connection, transactions, tables, format version.

Guarantees: WAL mode with `synchronous=FULL`, so a transaction that returned is durable; one connection per process
behind one lock, so threads never see half a transaction; a file of a newer format is refused, an older one is
brought up in one transaction. Errors of SQLite leave as errors of cdc.errors. Other processes may read at any time
and write short transactions. It deliberately knows nothing of what the tables mean (cdc.state, cdc.log do).
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cdc.errors import CdcError, ConfigError, FormatTooNew, InvariantBroken, LogCorrupt, StoreUnavailable

BUSY_TIMEOUT_S = 10.0
APPLICATION_ID = 0x63646331
"""Marks the file as ours ("cdc1") in SQLite's header."""

_FORMATS = (
    """
    create table facts (key text primary key, value text not null) without rowid;
    create table sources (
        name text primary key,
        positioned integer not null default 0, epoch integer not null default 0,
        lsn integer not null default 0, end_lsn integer not null default 0,
        head_lsn integer not null default 0, received_lsn integer not null default 0,
        confirmed_lsn integer not null default 0, committed_at integer not null default 0,
        log_end integer not null default 0, log_open integer not null default 0,
        identity text, phase text not null default '', phase_since integer not null default 0,
        error text not null default '', hint text not null default ''
    ) without rowid;
    create table tables (
        source text not null, schema text not null, name text not null,
        oid integer not null default 0, state text not null default 'new',
        reason text not null default '', hint text not null default '',
        rows integer not null default 0, last_change_us integer not null default 0,
        snapshot_seq integer not null default 0, landed_lsn integer not null default 0,
        current_lsn integer not null default 0, state_since integer not null default 0,
        primary key (source, schema, name)
    ) without rowid;
    create table runs (
        number integer primary key autoincrement, id text not null unique,
        source text not null, schema text not null, name text not null,
        kind text not null, state text not null, chunk_no integer not null default -1, last_key text,
        first_lsn integer not null default 0, rows integer not null default 0,
        created_at integer not null, started_at integer not null default 0, ended_at integer not null default 0,
        where_sql text not null default '', reason text not null default '', details text not null default '{}'
    );
    create index runs_table on runs (source, schema, name);
    create table requests (
        id integer primary key autoincrement, verb text not null, args text not null, posted_at integer not null,
        answered_at integer not null default 0, result text, error text
    );
    create index requests_open on requests (id) where answered_at = 0;
    create table pauses (kind text, name text, since integer not null, primary key (kind, name)) without rowid;
    create table checkpoints (
        stage text, source text, value text not null, saved_at integer not null, primary key (stage, source)
    ) without rowid;
    create table history (
        id integer primary key autoincrement, kind text not null, name text not null, cause text not null,
        started_at integer not null, ended_at integer not null default 0, outcome text not null default 'running',
        counts text not null default '{}', error text not null default ''
    );
    create index history_name on history (kind, name);
    create table cuts (
        source text primary key, lsn integer not null, at_us integer not null, versions text not null
    ) without rowid;
    create table schemas (
        source text, schema text, name text, version integer, content text not null,
        primary key (source, schema, name, version)
    ) without rowid;
    create table records (
        offset integer primary key autoincrement, source text not null, schema text not null, name text not null,
        version integer not null, rows integer not null, segment integer not null, start integer not null,
        bytes integer not null, crc32 integer not null, epoch integer not null, first_lsn integer not null,
        last_lsn integer not null, kind text not null, run text, chunk integer, has_truncate integer not null,
        optional text not null
    );
    create index records_table on records (source, schema, name, offset);
    create index records_source on records (source, offset);
    create table segments (segment integer primary key, bytes integer not null, last_offset integer not null);
    create table xids (
        id integer primary key autoincrement, source text not null, first_lsn integer not null, xids blob not null
    );
    create index xids_source on xids (source, id);
    """,
)
FORMAT = len(_FORMATS)

_CACHE_HINT = (
    "the state directory is a cache if confirm_after is 'landed' everywhere: stop the daemon, move it away and start "
    "again; otherwise restore it, or resync the tables after starting on an empty one"
)


def now_us() -> int:
    """Wall clock in microseconds since 1970, the unit of every time in the database."""
    return time.time_ns() // 1000


def to_json(value: Any) -> str:
    """JSON text as it stands in the database."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def check_fields(fields: dict[str, Any], known: frozenset[str]) -> None:
    """TypeError, as Python's own for a wrong keyword, unless all names are known."""
    unknown = sorted(set(fields) - known)
    if unknown:
        raise TypeError(f"unknown fields: {', '.join(unknown)}")


def translated(error: sqlite3.Error, path: Path) -> CdcError:
    """The error of ours that stands for one of SQLite's; its text never holds values."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreUnavailable(f"the state database {path} is locked by another process")
    if code == sqlite3.SQLITE_FULL:
        return StoreUnavailable(f"no space left for the state database {path}", hint="free space on its disk")
    if code == sqlite3.SQLITE_IOERR:
        return StoreUnavailable(f"input/output error in the state database {path} ({error})")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return LogCorrupt(f"the state database {path} is damaged ({error})", hint=_CACHE_HINT)
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        return ConfigError(
            f"the state database {path} cannot be opened as needed ({error})",
            hint="run as the daemon's user, and look at owner and mode of state_dir",
        )
    return InvariantBroken(f"the state database {path} refused a statement ({type(error).__name__}: {error})")


class Database:
    """One connection to the state file; thread-safe.

    `create=False` or `readonly=True` on a missing file raises ConfigError; a newer format raises FormatTooNew.
    """

    def __init__(self, path: Path, *, create: bool = True, readonly: bool = False) -> None:
        self.path = path
        self.readonly = readonly
        self._lock = threading.RLock()
        self._owner: int | None = None
        fresh = not path.exists()
        if fresh and (readonly or not create):
            raise ConfigError(
                f"there is no state database at {path}", hint="start the daemon once (`cdc run`), or correct state_dir"
            )
        try:
            if fresh:
                self._create_file()
            uri = f"{path.absolute().as_uri()}?mode={'ro' if readonly else 'rw'}"
            self._connection = sqlite3.connect(
                uri, uri=True, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT_S
            )
        except sqlite3.Error as error:
            raise translated(error, path) from error
        except OSError as error:
            raise ConfigError(f"cannot create the state database {path}: {error.strerror}") from error
        try:
            self._prepare()
        except sqlite3.Error as error:
            self._connection.close()
            raise translated(error, path) from error
        except CdcError:
            self._connection.close()
            raise

    def _create_file(self) -> None:
        """An empty file that only its owner can read: it will hold key values of running snapshots."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        sync_directory(self.path.parent)

    def _prepare(self) -> None:
        execute = self._connection.execute
        found = execute("pragma user_version").fetchone()[0]
        if found > FORMAT:
            raise FormatTooNew(
                f"the state database {self.path} has format {found}, this version knows up to {FORMAT}",
                hint="run the newer version of cdc that wrote it",
            )
        application = execute("pragma application_id").fetchone()[0]
        if application not in (0, APPLICATION_ID) or (application == 0 and found != 0):
            raise ConfigError(f"{self.path} is a database of another program", hint="correct state_dir")
        if self.readonly:
            if found == 0:
                raise ConfigError(f"the state database {self.path} is empty", hint="start the daemon once (`cdc run`)")
            return
        if execute("pragma journal_mode").fetchone()[0] != "wal":
            self._switch_to_wal()
        execute("pragma synchronous=full")
        execute("pragma foreign_keys=on")
        execute("pragma journal_size_limit=67108864")
        if found < FORMAT:
            self._upgrade()

    def _switch_to_wal(self) -> None:
        """The switch needs the file for itself, and SQLite does not wait for it: try until the time-out."""
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        pause = threading.Event()
        while True:
            try:
                self._connection.execute("pragma journal_mode=wal")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                pause.wait(0.02)

    def _upgrade(self) -> None:
        execute = self._connection.execute
        execute("begin immediate")
        # Another process may have been quicker between our look and our lock.
        found = execute("pragma user_version").fetchone()[0]
        for number in range(found, FORMAT):
            for statement in _FORMATS[number].split(";"):
                if statement.strip():
                    execute(statement)
        execute(f"pragma application_id={APPLICATION_ID}")
        execute(f"pragma user_version={max(found, FORMAT)}")
        execute("commit")

    @property
    def in_transaction(self) -> bool:
        """Whether the calling thread is inside `transaction()`."""
        return self._owner == threading.get_ident()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction; durable when the block has ended, undone if it raises. Blocks other threads' use of the
        database meanwhile, so keep it short. InvariantBroken if the thread is inside one already: pass it as `tx`."""
        if self.in_transaction:
            raise InvariantBroken("a state transaction was begun inside another; pass the outer one as tx")
        with self._lock:
            try:
                self._connection.execute("begin immediate")
            except sqlite3.Error as error:
                raise translated(error, self.path) from error
            self._owner = threading.get_ident()
            try:
                yield self._connection
                self._connection.execute("commit")
            except sqlite3.Error as error:
                self._rollback()
                raise translated(error, self.path) from error
            except BaseException:
                self._rollback()
                raise
            finally:
                self._owner = None

    def _rollback(self) -> None:
        # Some errors (full disk) have rolled back by themselves.
        if self._connection.in_transaction:
            self._connection.execute("rollback")

    @contextmanager
    def changing(self, tx: sqlite3.Connection | None) -> Iterator[sqlite3.Connection]:
        """The running transaction `tx`, or one of its own if None."""
        if tx is None:
            with self.transaction() as connection:
                yield connection
        elif tx is not self._connection or not self.in_transaction:
            raise InvariantBroken("tx is not the running transaction of this state database and thread")
        else:
            yield tx

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a SELECT. Inside the thread's own transaction it sees that transaction's changes."""
        with self._lock:
            try:
                return self._connection.execute(sql, parameters).fetchall()
            except sqlite3.Error as error:
                raise translated(error, self.path) from error

    def close(self) -> None:
        """Close the connection; idempotent. Waits for a running transaction of another thread."""
        with self._lock:
            self._connection.close()


def sync_directory(path: Path) -> None:
    """Make created and removed names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
