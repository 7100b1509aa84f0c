"""Random programs of big transactions: several sessions at once, savepoints in savepoints, everything rolled back
somewhere.

Sessions take turns statement by statement and never wait for each other: each has keys of its own in the shared
tables, and a table of its own for what locks a whole table (truncates, altering).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg

SESSIONS = 3
SHARED = ("keyed", "whole")
TABLES = (*SHARED, *(f"own_{n}" for n in range(SESSIONS)))
ROWS_MAX = 300
KEY_SHIFT = 9_000_000
"""Keys are made below it, so keys that are moved by multiples of it never meet."""
_LONG = "(select string_agg(md5(g::text || random()), '') from generate_series(1, 90) g)"

SCHEMA = """
create table keyed (id bigint primary key, n int, note text, long text);
create table whole (id bigint, n int, note text, long text);
alter table whole replica identity full;
alter table keyed alter long set storage external;
alter table whole alter long set storage external;
create table own_0 (id bigint primary key, n int, note text);
create table own_1 (id bigint primary key, n int, note text);
create table own_2 (id bigint primary key, n int, note text);
"""


@dataclass
class _Session:
    number: int
    connection: psycopg.Connection[Any]
    depth: int = 0
    columns: list[int] = field(default_factory=lambda: [0])
    """Extra columns of its own table, one entry for each level of savepoints."""


def run(dsn: str, rng: random.Random, *, transactions: int, statements: int, first: int = 1) -> None:
    """So many transactions of about so many statements each; some are rolled back, some prepared first. Programs on
    the same tables number their statements from different `first` ones, and so have keys of their own."""
    ids = itertools.count(first)
    names = itertools.count(1)
    sessions = []
    for number in range(SESSIONS):
        connection = psycopg.connect(dsn, autocommit=True)
        connection.execute("set lock_timeout = '20s'")
        sessions.append(_Session(number, connection))
    left = transactions
    open_: list[_Session] = []
    try:
        while left or open_:
            idle = [s for s in sessions if s not in open_]
            if left and idle and (not open_ or rng.random() < 0.3):
                left -= 1
                session = rng.choice(idle)
                session.connection.execute("begin")
                session.depth, session.columns = 0, [session.columns[0]]
                open_.append(session)
                continue
            session = rng.choice(open_)
            if rng.random() < 1 / statements:
                _end(session, rng, names)
                open_.remove(session)
            else:
                _statement(session, rng, ids)
    finally:
        for session in sessions:
            session.connection.close()


def _end(session: _Session, rng: random.Random, names: itertools.count[int]) -> None:
    name = f"{session.connection.info.dbname}_{next(names)}"
    match rng.choice(("commit", "commit", "rollback", "prepare")):
        case "commit":
            session.connection.execute("commit")
            session.columns = session.columns[-1:]
        case "rollback":
            session.connection.execute("rollback")
        case "prepare":
            session.connection.execute(f"prepare transaction '{name}'".encode())
            if rng.random() < 0.5:
                session.connection.execute(f"commit prepared '{name}'".encode())
                session.columns = session.columns[-1:]
            else:
                session.connection.execute(f"rollback prepared '{name}'".encode())


def _statement(session: _Session, rng: random.Random, ids: itertools.count[int]) -> None:
    rng.choice(_KINDS)(session, rng, ids)


def _do(session: _Session, statement: str) -> None:
    session.connection.execute(statement.encode())


def _insert(session: _Session, rng: random.Random, ids: itertools.count[int]) -> None:
    count = rng.choice((1, 20, ROWS_MAX))
    low = next(ids) * 1000
    table = rng.choice((*SHARED, f"own_{session.number}"))
    long = f", {_LONG}" if table in SHARED and count <= 20 else ", null" if table in SHARED else ""
    columns = "(id, n, note, long)" if table in SHARED else "(id, n, note)"
    _do(
        session,
        f"insert into {table} {columns} select g * {SESSIONS} + {session.number}, g % 7, 'note ' || g{long}"
        f" from generate_series({low}, {low + count - 1}) g",
    )


def _update(session: _Session, rng: random.Random, ids: itertools.count[int]) -> None:
    table = rng.choice((*SHARED, f"own_{session.number}"))
    change = rng.choice(("n = n + 1", "note = note || '!'", f"id = id + {KEY_SHIFT * rng.randint(1, 9)}"))
    if table in SHARED and rng.random() < 0.1:
        change = f"long = {_LONG}"
    _do(session, f"update {table} set {change} where {_mine(session)} and n = {rng.randrange(7)}")


def _delete(session: _Session, rng: random.Random, ids: itertools.count[int]) -> None:
    table = rng.choice((*SHARED, f"own_{session.number}"))
    _do(session, f"delete from {table} where {_mine(session)} and n = {rng.randrange(9)}")


def _mine(session: _Session) -> str:
    return f"id % {SESSIONS} = {session.number}"


def _truncate(session: _Session, rng: random.Random, ids: itertools.count[int]) -> None:
    if session.depth:
        return  # Servers fail at streaming some tables whose rewriting is rolled back with a subtransaction.
    _do(session, f"truncate own_{session.number}")


def _alter(session: _Session, rng: random.Random, ids: itertools.count[int]) -> None:
    if session.depth:
        return
    _do(session, f"alter table own_{session.number} add column extra_{next(ids)} int default {rng.randrange(9)}")


def _message(session: _Session, rng: random.Random, ids: itertools.count[int]) -> None:
    transactional = "true" if rng.random() < 0.7 else "false"
    _do(session, f"select pg_logical_emit_message({transactional}, 'test', 'content')")


def _savepoint(session: _Session, rng: random.Random, ids: itertools.count[int]) -> None:
    session.depth += 1
    _do(session, f"savepoint s{session.depth}")


def _back(session: _Session, rng: random.Random, ids: itertools.count[int]) -> None:
    if session.depth:
        to = rng.randint(1, session.depth)
        _do(session, f"rollback to savepoint s{to}")
        session.depth = to


def _release(session: _Session, rng: random.Random, ids: itertools.count[int]) -> None:
    if session.depth:
        to = rng.randint(1, session.depth)
        _do(session, f"release savepoint s{to}")
        session.depth = to - 1


_Kind = Callable[[_Session, random.Random, "itertools.count[int]"], None]
_KINDS: list[_Kind] = [
    *([_insert] * 8),
    *([_update] * 4),
    *([_delete] * 1),
    *([_savepoint] * 5),
    *([_back] * 3),
    *([_release] * 2),
    _truncate,
    _alter,
    _message,
]
