"""A small live workload with everything that is hard about capture, in threads of the test's process.

Transactions of one to six statements: inserts, updates that leave a big value alone, updates of it, key changes,
deletes, truncates, savepoints rolled back, whole rollbacks; over tables with one key column, two, REPLICA IDENTITY
FULL, none, and FULL without a key (equal rows). Two sessions run at once, so that transactions interleave in the WAL.
Reproducible per session by its seed but for the server's own timing.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Self

import psycopg

TABLES = [
    "public.items",
    "public.lines",
    "public.wide_old",
    "public.events",
    "public.bare",
    "public.stock",
    "public.heap",
]
STOCK = 3000

SCHEMA = f"""
create table items (id int primary key, n int not null, note text, big text);
alter table items alter big set storage external;
create table lines (item int, line int, qty numeric(10,2), primary key (item, line));
create table wide_old (id int primary key, n int, big text);
alter table wide_old alter big set storage external;
alter table wide_old replica identity full;
create table events (
  id bigint generated always as identity primary key,
  at timestamptz default clock_timestamp() - random() * interval '3 days', text text);
create table bare (a int, b text);
create table heap (a int, b text, big text);
alter table heap alter big set storage external;
alter table heap replica identity full;
insert into heap
  select g %% 5, 'same', case g %% 3 when 0 then repeat(md5('h'), 100) end from generate_series(1, 300) g;
create table stock (sku text primary key, n int, big text);
alter table stock alter big set storage external;
insert into stock select 'sku-' || g, g, repeat(md5(g::text), 80) from generate_series(1, {STOCK}) g;
insert into items select g, g, 'note ' || g, repeat(md5(g::text), 100) from generate_series(1, 200) g;
insert into wide_old select g, g, repeat(md5(g::text), 100) from generate_series(1, 100) g;
insert into lines select g / 4, g %% 4, g from generate_series(1, 200) g;
""".replace("%%", "%")

Statement = Callable[[random.Random], str]

STATEMENTS: list[tuple[int, Statement]] = [
    (8, lambda r: f"insert into items values ({r.randrange(400)}, 0, 'new', repeat(md5('{r.random()}'), 100)) "
                  "on conflict (id) do update set n = items.n + 1"),
    (8, lambda r: f"update items set n = n + 1 where id = {r.randrange(400)}"),
    (3, lambda r: f"update items set big = repeat(md5('{r.random()}'), 100) where id = {r.randrange(400)}"),
    (3, lambda r: f"update items set big = null, note = null where id = {r.randrange(400)}"),
    (5, lambda r: f"update items set id = {r.randrange(400)} where id = {r.randrange(400)}"),
    (4, lambda r: f"delete from items where id between {(x := r.randrange(400))} and {x + 2}"),
    (5, lambda r: f"insert into lines values ({r.randrange(60)}, {r.randrange(6)}, {r.randrange(999)}.25) "
                  "on conflict do nothing"),
    (4, lambda r: f"update lines set item = {r.randrange(60)}, qty = qty + 1 where item = {r.randrange(60)} "
                  f"and line = {r.randrange(6)}"),
    (3, lambda r: f"delete from lines where item = {r.randrange(60)}"),
    (5, lambda r: f"update wide_old set n = n + 1 where id = {r.randrange(150)}"),
    (3, lambda r: f"update wide_old set id = {r.randrange(150)} where id = {r.randrange(150)}"),
    (2, lambda r: f"insert into wide_old values ({r.randrange(150)}, 1, repeat(md5('{r.random()}'), 100)) "
                  "on conflict do nothing"),
    (2, lambda r: f"delete from wide_old where id = {r.randrange(150)}"),
    (8, lambda r: f"insert into events (text) select 'e' || g from generate_series(1, {r.randrange(1, 30)}) g"),
    (1, lambda r: "truncate events"),
    (1, lambda r: "truncate lines, events"),
    (4, lambda r: f"insert into bare select g, 'same' from generate_series(1, {r.randrange(1, 5)}) g"),
    (4, lambda r: f"insert into heap select g %% 3, 'same', case when g %% 2 = 0 then repeat(md5('h'), 100) end "
                  f"from generate_series(1, {r.randrange(1, 8)}) g".replace("%%", "%")),
    (5, lambda r: f"update heap set a = {r.randrange(5)} where ctid = "
                  f"(select ctid from heap where a = {r.randrange(5)} limit 1)"),
    (3, lambda r: f"update heap set big = case when big is null then repeat(md5('h'), 100) end where ctid = "
                  f"(select ctid from heap where a = {r.randrange(5)} limit 1)"),
    (5, lambda r: f"delete from heap where ctid = (select ctid from heap where a = {r.randrange(5)} limit 1)"),
    (8, lambda r: f"update stock set n = n + 1 where sku = 'sku-{r.randrange(1, STOCK)}'"),
    (3, lambda r: f"update stock set sku = 'sku-{r.randrange(1, 2 * STOCK)}' "
                  f"where sku = 'sku-{r.randrange(1, STOCK)}'"),
    (3, lambda r: f"delete from stock where sku = 'sku-{r.randrange(1, STOCK)}'"),
    (3, lambda r: f"insert into stock values ('sku-{r.randrange(1, 2 * STOCK)}', 0, repeat(md5('{r.random()}'), 80)) "
                  "on conflict do nothing"),
]  # fmt: skip

# Where two sessions meet: the statement fails, the transaction is rolled back, and the next one comes.
_EXPECTED = (
    psycopg.errors.UniqueViolation,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
    psycopg.errors.LockNotAvailable,
)


class Workload:
    """As a context manager it runs until the block ends; an unexpected error of a session fails the block."""

    def __init__(self, dsn: str, seed: int, *, sessions: int = 2, pause_s: float = 0.004) -> None:
        self._dsn = dsn
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._session, args=(random.Random(seed + n),), name=f"workload {n}", daemon=True)
            for n in range(sessions)
        ]
        self.committed = 0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the sessions; raises what one of them did not expect. Idempotent."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        if self._errors:
            raise self._errors[0]

    def _session(self, rng: random.Random) -> None:
        try:
            with psycopg.connect(self._dsn) as connection:
                connection.execute("set lock_timeout = '2s'")
                connection.commit()
                while not self._stop.wait(self._pause_s):
                    self._transaction(connection, rng)
        except BaseException as e:  # noqa: BLE001 - raised in the test when the block ends
            self._errors.append(e)

    def _transaction(self, connection: psycopg.Connection, rng: random.Random) -> None:
        weights = [weight for weight, _ in STATEMENTS]
        try:
            for _ in range(rng.randrange(1, 7)):
                statement = rng.choices(STATEMENTS, weights)[0][1](rng)
                if rng.random() < 0.15:
                    connection.execute("savepoint s")
                    connection.execute(statement.encode())
                    connection.execute("rollback to savepoint s")
                else:
                    connection.execute(statement.encode())
            if rng.random() < 0.1:
                connection.rollback()
            else:
                connection.commit()
                self.committed += 1
        except _EXPECTED:
            connection.rollback()
