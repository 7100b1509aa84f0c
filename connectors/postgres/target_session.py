"""The session with a target: opened at first use, settings per transaction, writes marked, errors translated.

A broken connection is closed and forgotten; the next use opens another. It does not repeat anything.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cdc.config import password_of
from cdc.config_serving import TargetConfig
from cdc.errors import CdcError, TargetUnavailable
from connectors.postgres.connection import describe
from connectors.postgres.target_errors import reason, translated
from connectors.postgres.target_origin import Marks

_log = logging.getLogger(__name__)


class Session:
    """One connection to the target, and what holds for all its transactions. Used by one thread."""

    def __init__(self, config: TargetConfig) -> None:
        self._config = config
        self.origin = config.origin or f"cdc_{config.name}"
        self.where = f"target {config.name}"
        self.marks: Marks | None = None
        """How writes are marked, from the first of them on."""
        self._connection: psycopg.Connection[Any] | None = None

    @contextmanager
    def transaction(self, *, write: bool = False) -> Iterator[psycopg.Connection[Any]]:
        """One transaction, READ COMMITTED; committed at the end of the block, and durable then. With `write` it is
        marked as ours. TargetUnavailable, TargetRejected; `__cause__` is the server's error."""
        connection = self._connected()
        try:
            marks = self._marked(connection) if write else None
            with connection.transaction():
                _settle(connection, self._config.statement_timeout_s)
                if marks is not None:
                    marks.begin(connection)
                yield connection
                if marks is not None:
                    marks.end(connection)
        except psycopg.Error as error:
            if connection.broken or connection.closed:
                self.close()
                # The error may be an earlier one, about a row, whose savepoint could not be rolled back any more.
                raise TargetUnavailable(f"{self._place()}: the connection was lost ({reason(error)})") from error
            raise self._translated(error) from error

    def close(self) -> None:
        """Close the connection; the origin is free for another session. Idempotent."""
        connection, self._connection, self.marks = self._connection, None, None
        if connection is not None:
            connection.close()

    def _connected(self) -> psycopg.Connection[Any]:
        """The connection, opened anew if it has gone since it was last used (a restart of the server, a firewall)."""
        if self._connection is not None:
            try:
                self._connection.execute("SELECT 1")
                return self._connection
            except psycopg.Error:
                self.close()
        arguments: dict[str, Any] = {
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": round((self._config.statement_timeout_s + 10) * 1000),
            **conninfo_to_dict(self._config.dsn),
            "application_name": f"cdc {self._config.name}",
            "connect_timeout": max(2, round(self._config.connect_timeout_s)),
            "client_encoding": "UTF8",
        }
        password = password_of(self._config)
        if password is not None:
            arguments["password"] = password
        try:
            connection = psycopg.connect(make_conninfo(**arguments), autocommit=True)
        except psycopg.Error as error:
            raise self._translated(error) from error
        # Behind a pooler a prepared statement may be looked for in another session than it was made in.
        connection.prepare_threshold = None
        # Whatever the role's default: statements after a wait for a lock must see what the other has done.
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        self._connection = connection
        return connection

    def _marked(self, connection: psycopg.Connection[Any]) -> Marks:
        """How this session marks its writes, settled once; without an origin that is said once, too."""
        if self.marks is None:
            self.marks = Marks(connection, self.origin)
            if self.marks.because:
                instead = "each is marked with a logical message" if self.marks.by_message else "they are not marked"
                _log.warning(
                    "writes are not marked with a replication origin, %s: %s",
                    instead,
                    self.marks.because,
                    extra={"target": self._config.name, "origin": self.origin},
                )
        return self.marks

    def _translated(self, error: psycopg.Error) -> CdcError:
        return translated(error, self._place(), self.origin, f"target.{self._config.name}")

    def _place(self) -> str:
        return f"{self.where} ({describe(self._config.dsn)})"


def _settle(connection: psycopg.Connection[Any], statement_timeout_s: float) -> None:
    """Settings of this transaction only, so that a pooler between us and the server sees none of them stay.

    The search path stays the role's: triggers of the target's owner run under it.
    """
    timeout_ms = round(statement_timeout_s * 1000)
    settings = {
        "datestyle": "ISO",
        "timezone": "UTC",
        "lc_monetary": "C",
        "statement_timeout": str(timeout_ms),
        "lock_timeout": str(max(1, timeout_ms // 2)),
        "idle_in_transaction_session_timeout": str(timeout_ms),
    }
    calls = sql.SQL(", ").join(
        sql.SQL("pg_catalog.set_config({}, {}, true)").format(sql.Literal(k), sql.Literal(v))
        for k, v in settings.items()
    )
    connection.execute(sql.SQL("SELECT {}").format(calls))
