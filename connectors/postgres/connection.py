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
    merged = {**CANONICAL, **(settings or {})}
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


def describe(dsn: str) -> str:
    """Host, port and database of a DSN, for messages."""
    given = conninfo_to_dict(dsn)
    host = given.get("host") or given.get("hostaddr") or "local socket"
    return f"{host}:{given.get('port') or 5432}/{given.get('dbname') or given.get('user') or ''}"


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
        case pg.ObjectInUse():
            return SourceUnavailable(text, hint="another process reads this slot; we wait until it is free")
    if error.sqlstate is None or error.sqlstate[:2] in ("08", "53", "57", "40", "55"):
        if error.sqlstate == "55000" and "slot" in str(error):
            return SlotLost(text, hint="`cdc teardown` then `cdc setup`: the next start snapshots every table anew")
        authentication = "authentication failed" in str(error) or "no pg_hba.conf entry" in str(error)
        if authentication:
            return SourceRefused(text, hint="check user, password reference and pg_hba.conf")
        return SourceUnavailable(text)
    return SourceRefused(text)
