"""Connections to Postgres: session settings that make text canonical, secrets by reference, errors translated.

Every connection of the product is opened here. It does not pool and does not retry: callers own their connections
and their supervisor repeats. Messages name host, database and object, never a password or a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import errors as pg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cdc.errors import CdcError, SlotLost, SourceRefused, SourceUnavailable

MANY_HOSTS = "the dsn names several hosts: each connection may reach another server"
MANY_HOSTS_FIX = "add target_session_attrs=primary to the dsn, or name one host"
POOLER = "a connection pooler answers for the server: replication, session locks and snapshots need sessions of our own"
POOLER_FIX = "point the source's dsn at the server itself"

CANONICAL = {
    "datestyle": "ISO",
    "timezone": "UTC",
    "intervalstyle": "iso_8601",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "xmlbinary": "base64",
    "search_path": "pg_catalog",
}
"""Settings under which every type has one text form; the stream, snapshots and verify all read under them."""

NOTICE_THE_END = {"tcp_keepalives_idle": "30", "tcp_keepalives_interval": "10", "tcp_keepalives_count": "3"}
"""The server's side too notices within a minute that our machine is gone (by default after hours), and lets go of the
lock that a successor waits for."""


def connect(
    dsn: str,
    *,
    password: str | None,
    application_name: str,
    connect_timeout_s: float,
    settings: dict[str, str] | None = None,
    replication: bool = False,
) -> psycopg.Connection[Any]:
    """Open an autocommit connection under the canonical settings and `settings`. Blocks up to `connect_timeout_s`."""
    given = conninfo_to_dict(dsn)
    if many_hosts(dsn):
        raise SourceRefused(f"{describe(dsn)}: {MANY_HOSTS}", hint=MANY_HOSTS_FIX)
    merged = {**CANONICAL, **NOTICE_THE_END, **(settings or {})}
    options = " ".join(f"-c {name}={value}" for name, value in merged.items())
    arguments: dict[str, Any] = {
        **given,
        "application_name": application_name,
        "connect_timeout": max(2, round(connect_timeout_s)),
        "client_encoding": "UTF8",
        "options": f"{given.get('options', '')} {options}".strip(),
        # A peer that is gone without a word: keepalives notice it while we wait, this one while we send.
        "tcp_user_timeout": 60_000,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
    }
    if password is not None:
        arguments["password"] = password
    if replication:
        arguments["replication"] = "database"
    with translated(describe(dsn)):
        connection = psycopg.connect(make_conninfo(**arguments), autocommit=True)
        # Prepared statements would survive schema changes that we are here to notice.
        connection.prepare_threshold = None
        return connection


def take_any_bytes(connection: psycopg.Connection[Any], *, local: bool = False) -> bool:
    """Whether the database says nothing of its encoding (SQL_ASCII); if so, from now on (`local`: in this transaction)
    it sends what it holds. To a client that wants UTF-8 it would refuse to send what is none, and the stream would
    stand still. Statements that read texts as `str` are not for such a connection."""
    if connection.info.parameter_status("server_encoding") != "SQL_ASCII":
        return False
    connection.execute(f"set {'local' if local else 'session'} client_encoding to 'SQL_ASCII'")
    return True


def describe(dsn: str) -> str:
    """Host, port and database of a DSN, for messages."""
    given = conninfo_to_dict(dsn)
    host = given.get("host") or given.get("hostaddr") or "local socket"
    return f"{host}:{given.get('port') or 5432}/{given.get('dbname') or given.get('user') or ''}"


def many_hosts(dsn: str) -> bool:
    """Whether the DSN names several hosts without saying that only the primary will do."""
    given = conninfo_to_dict(dsn)
    hosts = str(given.get("host") or given.get("hostaddr") or "")
    return "," in hosts and given.get("target_session_attrs") not in ("primary", "read-write")


def server_message(error: psycopg.Error) -> str:
    """The primary message of the server without DETAIL and CONTEXT, which may quote row values."""
    return (error.diag.message_primary or str(error).splitlines()[0]) if str(error) else type(error).__name__


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn psycopg's exceptions into ours, naming `where`."""
    try:
        yield
    except CdcError:
        raise
    except psycopg.Error as e:
        raise translate(e, where) from e


def translate(error: psycopg.Error, where: str) -> CdcError:
    """Our error for one of psycopg's, by SQLSTATE."""
    text = f"{where}: {server_message(error)}"
    match error:
        case pg.InsufficientPrivilege():
            return SourceRefused(text, hint="grant what `cdc check` lists for this role")
        case pg.InvalidPassword() | pg.InvalidAuthorizationSpecification():
            return SourceRefused(text, hint="check user, password reference and pg_hba.conf")
        case pg.InvalidCatalogName():
            return SourceRefused(text, hint="check the database name in the DSN")
        case pg.UndefinedTable() | pg.UndefinedColumn() | pg.UndefinedFunction():
            return SourceRefused(text)
        case pg.LockNotAvailable():
            return SourceUnavailable(text, hint="another session holds a conflicting lock; we try again")
        case pg.UntranslatableCharacter() | pg.CharacterNotInRepertoire():
            return SourceRefused(
                f"{where}: a value has bytes that are no character of the database's encoding, so it cannot be sent",
                hint="find the values for which `convert_to(column, 'UTF8')` fails and mend them; if the stream stands"
                " still, then `cdc teardown` and `cdc setup`: the next start snapshots every table anew",
            )
        case pg.ObjectInUse():
            return SourceUnavailable(text, hint="another process reads this slot; we wait until it is free")
        case pg.ReadOnlySqlTransaction():
            return SourceRefused(text, hint="the server is a standby or read only: point the DSN at the primary")
        case pg.TooManyConnections() | pg.ConfigurationLimitExceeded():
            return SourceUnavailable(text, hint="raise max_wal_senders, max_replication_slots or max_connections")
    if error.sqlstate == "58P01" and "WAL segment" in str(error):
        return SlotLost(text)
    if error.sqlstate is None or error.sqlstate[:2] in ("08", "53", "57", "40", "55"):
        if error.sqlstate == "55000" and "wal_level" in str(error):
            return SourceRefused(text, hint="alter system set wal_level = 'logical'; then restart the server")
        if error.sqlstate == "55000" and "slot" in str(error):
            # Which of the many reasons it is, and what mends it, the slot's row in the catalog tells: cdc.origin asks.
            return SlotLost(text)
        return _not_connected(str(error), text) if error.sqlstate is None else SourceUnavailable(text)
    return SourceRefused(text)


CONNECT_FAULTS: tuple[tuple[str, str], ...] = (
    ("authentication failed", "check user, password reference and pg_hba.conf"),
    ("pg_hba.conf", "check user, password reference and pg_hba.conf"),
    ("no password supplied", "set password_file or password_env"),
    ("server does not support SSL", "set ssl = on at the server, or lower sslmode in the DSN"),
    ("root certificate file", "name the CA's file as sslrootcert in the DSN, or sslrootcert=system"),
    ("certificate verify failed", "name the CA that signed the server's certificate as sslrootcert in the DSN"),
    ("does not match host name", "the server's certificate is for another name: use that one as host in the DSN"),
    ("permission denied to start WAL sender", "grant what `cdc check` lists for this role"),
    ("must be superuser or replication role", "grant what `cdc check` lists for this role"),
    ("is not permitted to log in", "alter role … login"),
    ("does not exist", "check user and database in the DSN"),
)
"""What libpq says, without an SQLSTATE, when a connection cannot come about until somebody changes something."""


def _not_connected(said: str, text: str) -> CdcError:
    for words, hint in CONNECT_FAULTS:
        if words in said:
            return SourceRefused(text, hint=hint)
    return SourceUnavailable(text)
