"""A periodically compared source for tests: its daemon, and random work at its tables between two runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psycopg

from tests.support.daemon import Daemon

NEVER = "300d"
"""Schedules of tests: runs come when they are asked for."""

SCHEMA = """
create table orders (id int primary key, note text, total numeric(10,2), tags text[], score float8,
                     updated_at timestamptz default now());
create table pairs (a text, b int, at timestamp, updated_at timestamptz, primary key (a, b));
create table events (what text, data jsonb, n numeric);
create table swaps (id int primary key, v int not null unique, updated_at timestamptz default now());
insert into swaps select g, 100 - g from generate_series(1, 20) g;
create index on orders (updated_at);
create index on pairs (updated_at);
"""


def periodic(folder: Path, dsn: str, source: Mapping[str, Any] | None = None, **more: Any) -> Daemon:
    keys = {"mode": "snapshot", "every": NEVER, "tables": ["public.*"], "slot": None, "publication": None}
    return Daemon(folder, dsn, source={**keys, **(source or {})}, **more)


class Workload:
    """Random transactions; some stay open over a run and commit later."""

    def __init__(self, dsn: str, rng: random.Random, *, shapes: bool = True) -> None:
        self._dsn = dsn
        self._rng = rng
        self._shapes = shapes
        self._open: list[psycopg.Connection[Any]] = []
        self._made = 0
        self._late = 1_000_000

    def __enter__(self) -> Workload:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute(SCHEMA.encode())
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._open:
            connection.close()

    def work(self, transactions: int) -> None:
        """Some transactions, each of a few statements; one of them may be left open."""
        for _ in range(transactions):
            with psycopg.connect(self._dsn) as connection:
                for _ in range(self._rng.randrange(1, 6)):
                    connection.execute(self._statement().encode())
                if self._rng.random() < 0.1:
                    connection.rollback()
        if self._shapes and self._rng.random() < 0.4:
            self._reshape()

    def begin_late(self) -> None:
        """A transaction that has taken its time and written, and commits at `commit_late`."""
        connection = psycopg.connect(self._dsn)
        connection.execute("select 1 from orders limit 1")
        if self._rng.random() < 0.5:
            self._insert_late(connection)
        self._open.append(connection)

    def commit_late(self) -> None:
        """What is open writes once more, and commits."""
        for connection in self._open:
            self._insert_late(connection)
            connection.commit()
            connection.close()
        self._open.clear()

    def _insert_late(self, connection: psycopg.Connection[Any]) -> None:
        """Rows that nobody else touches, with the time at which the transaction began."""
        self._late += 3
        rows = f"select g, 'late', 1, null, 1 from generate_series({self._late}, {self._late + 2}) g"
        connection.execute(f"insert into orders {rows}".encode())

    @property
    def is_late(self) -> bool:
        return bool(self._open)

    def _statement(self) -> str:
        n = self._rng.randrange
        stamp = self._rng.choice(["now()", "now()", "clock_timestamp()", "now()", "null"])
        key = self._rng.choice(["x", "é", "", "1:a", 'q"uote'])
        total = self._rng.choice(["1.5", "'NaN'", "0", "null", str(n(1000))])
        at = self._rng.choice(["now()", "'infinity'", "null"])
        choices: list[Callable[[], str]] = [
            lambda: (
                f"insert into orders select g, 'n' || g, {total}, array['a', null, 'b,\"c'], 'NaN', {stamp}"
                f" from generate_series({n(300)}, {n(300)}) g on conflict do nothing"
            ),
            lambda: f"update orders set note = note || 'x', updated_at = {stamp} where id % 7 = {n(7)}",
            lambda: (
                f"update orders set score = {self._rng.choice(['0.0', '-0.0', 'null', '1e300'])},"
                f" updated_at = {stamp} where id % 11 = {n(11)}"
            ),
            lambda: (
                f"update orders set id = id + 1000, updated_at = {stamp} where id = {n(300)}"
                " and not exists (select from orders o where o.id = orders.id + 1000)"
            ),
            lambda: f"delete from orders where id % 13 = {n(13)}",
            lambda: (
                f"insert into pairs values ('{key}', {n(20)}, {at}, {stamp})"
                " on conflict (a, b) do update set at = excluded.at, updated_at = excluded.updated_at"
            ),
            lambda: f"update pairs set at = '-infinity', updated_at = {stamp} where b = {n(20)}",
            lambda: f"delete from pairs where b = {n(20)}",
            lambda: f"insert into events select '{key}', '{{\"k\": {n(3)}}}', {total} from generate_series(1, {n(5)})",
            lambda: f"delete from events where ctid in (select ctid from events limit {n(4)})",
            lambda: f"update events set n = {total} where data->>'k' = '{n(3)}'",
            lambda: f"update swaps set id = id + 100, updated_at = {stamp} where id = {n(30)}",
            lambda: f"delete from swaps where v = {n(100)}",
            lambda: "select 1",
        ]
        return self._rng.choice(choices)()

    def _reshape(self) -> None:
        """The table changes its shape, or another one comes or goes."""
        self._made += 1
        n = self._made
        statement = self._rng.choice(
            [
                f"alter table orders add column extra{n} int default {n}",
                f"alter table orders add column plain{n} text",
                f"alter table pairs add column extra{n} timestamptz default now()",
                f"alter table events add column extra{n} text default 'e'",
                f"create table made{n} (id int primary key, updated_at timestamptz default now());"
                f" insert into made{n} select generate_series(1, 5)",
                f"create table loose{n} (v int); insert into loose{n} values (1), (1), (null)",
                f"drop table if exists made{n - 1}, loose{n - 1}",
                "alter table orders alter column total type numeric(12,3)",
                "alter table orders alter column note type varchar using left(note, 50)",
                f"alter table pairs rename column at to at{n}; alter table pairs rename column at{n} to at",
                "alter table swaps drop constraint if exists swaps_pkey",
                "alter table swaps drop constraint if exists swaps_pkey; alter table swaps add primary key (v)",
                "alter table swaps drop constraint if exists swaps_pkey; alter table swaps add primary key (id)",
                "truncate events",
                "truncate pairs",
                f"alter table orders add column gone{n} int; alter table orders drop column gone{n}",
                "alter table events alter column n type text using n::text;"
                " alter table events alter column n type numeric using n::numeric",
                f"alter table orders add column twice{n} int generated always as (id * 2) stored",
            ]
        )
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute("set lock_timeout = '300ms'")
            try:
                connection.execute(statement.encode())
            except psycopg.errors.LockNotAvailable:
                return
