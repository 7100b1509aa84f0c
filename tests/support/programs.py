"""Random programs for the model test of snapshots: writers of several open transactions, and who comes next.

Everything is drawn from one seed, so a program can be played again; only the server's own timing is its own. A
statement that the server refuses never was: it stands behind a savepoint. Nobody waits for a lock for long, because
whoever holds it goes on only when we let him.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

from tests.support.stepped import Killed, Stepped
from tests.support.waiting import wait_until

WORDS = ("", "a", "Ä", "B", "b", "ß", "e\u0301", "line\nbreak", 'quo"te,', "\\N", "NULL", "null", " x ", "z" * 300)
SAFE = ("reader.before_begin", "reader.begun", "reader.before_read", "reader.read", "backfill.after_snapshot")
"""Where another part may step in the middle of a backfill's step: no lock is held."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of table: its columns, its key, what is sent of it."""

    name: str
    columns: str
    key: tuple[str, ...]
    identity: str = "default"
    filters: tuple[str, ...] = ("",)
    """Row filters that the publication may have for it."""
    big: float = 0.75
    """How many of its values are stored out of line."""


ID = "id int primary key, n int, text text, big text"
SHAPES = (
    Shape("plain", ID, ("id",)),
    Shape("whole", ID, ("id",), identity="full"),
    Shape("pair", 'a text collate "C", b int, n int, text text, big text, primary key (a, b)', ("a", "b")),
    Shape("local", "a text, b int, n int, text text, big text, primary key (b, a)", ("b", "a")),
    Shape("slim", ID, ("id",), big=0.0),
    Shape("later", ID, ("id",), big=0.02),
    Shape("bare", "id int, n int, text text, big text", (), identity="full"),
    Shape("chosen", ID, ("id",), filters=("(id % 3 <> 0)", "(id % 2 = 0)", "(id > 20)")),
)


class Writer:
    """One session, with at most one transaction open. `act` is one small thing: a statement, a commit, …"""

    def __init__(self, dsn: str, number: int) -> None:
        self.connection = psycopg.connect(dsn, autocommit=True, application_name=f"writer {number}")
        self.connection.prepare_threshold = None
        self.connection.execute("set lock_timeout = '3ms'")
        self.savepoints = 0
        self.hanging = False

    @property
    def is_open(self) -> bool:
        return self.connection.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR)

    def begin(self) -> None:
        self.connection.execute("begin")
        self.savepoints = 0

    def attempt(self, statement: str) -> bool:
        """Run a statement; False if it was refused, and then it never was."""
        inside = self.is_open
        if inside:
            self.connection.execute("savepoint attempt")
        try:
            self.connection.execute(statement.encode())
        except psycopg.Error:
            if inside:
                self.connection.execute("rollback to savepoint attempt")
            return False
        finally:
            if inside:
                self.connection.execute("release savepoint attempt")
        return True

    def end(self, commit: bool) -> None:
        self.connection.execute("commit" if commit else "rollback")

    def commit_unseen(self) -> None:
        """Commit, and wait for a standby that is not there: in the WAL, and invisible until `show`."""
        self.connection.execute("set local synchronous_commit = on")
        self.connection.pgconn.send_query(b"commit")
        self.connection.pgconn.flush()
        self.hanging = True

    def show(self, admin: psycopg.Connection[Any]) -> None:
        """Let the hanging commit become visible."""
        connection = self.connection.pgconn

        def ended() -> bool:
            admin.execute("select pg_cancel_backend(%s)", [self.connection.info.backend_pid])
            connection.consume_input()
            return not connection.is_busy()

        wait_until(ended, 30, "the commit to become visible")
        while connection.get_result() is not None:
            pass
        self.hanging = False
        assert self.connection.info.transaction_status == TransactionStatus.IDLE

    def close(self) -> None:
        with suppress(psycopg.Error):
            self.connection.close()


class Program:
    """One random program against one `Stepped`. `journal` is what was done, for whoever has to find a fault."""

    def __init__(self, stepped: Stepped, rng: random.Random, *, writers: int = 3, readers: int = 1) -> None:
        """`readers`: as `stepped` is configured."""
        self.stepped = stepped
        self.readers = readers
        self.rng = rng
        self.journal: list[str] = []
        self.admin = psycopg.connect(stepped.dsn, autocommit=True, application_name="program")
        self.admin.execute("set lock_timeout = '3ms'")
        self.shapes = rng.sample(SHAPES, rng.choice([1, 2, 2]))
        self.rows = rng.choice([12, 40, 90])
        self.filters = {s.name: rng.choice(s.filters) for s in self.shapes}
        self.unpublished: set[str] = set()
        self.kills = rng.choice([0, 1, 2, 4])
        self.keeps_its_disk = False
        self.count = 0
        for shape in self.shapes:
            self._create(shape)
        tables = ", ".join(self._member(s.name) for s in self.shapes)
        self.admin.execute(f"create publication {stepped.slot} for table {tables}".encode())
        self.writers = [Writer(stepped.dsn, number) for number in range(writers)]
        stepped.between = self._between

    def _member(self, name: str) -> str:
        return f"{name} where {self.filters[name]}" if self.filters[name] else name

    def _create(self, shape: Shape) -> None:
        for statement in (
            f"create table {shape.name} ({shape.columns}) with (fillfactor = {self.rng.choice([10, 100])})",
            f"alter table {shape.name} alter big set storage external",
            f"alter table {shape.name} replica identity {shape.identity}",
        ):
            self.admin.execute(statement.encode())
        for _ in range(self.rows):
            with suppress(psycopg.errors.UniqueViolation):
                self.admin.execute(self._insert(shape).encode())

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
        self.admin.close()

    # ---- the schedule ----

    def play(self, steps: int) -> None:
        """Let writers and parts take turns."""
        # Making the slot waits for whoever has written: not while nobody lets him go on.
        self.stepped.until(lambda: self.stepped.pipeline.prepared, "the stream to begin", parts=("capture",))
        weights: dict[Callable[[], None], float] = {
            self._write: 45,
            lambda: self._step("capture"): 14,
            lambda: self._step("land"): 10,
            lambda: self._step("merge"): 8,
            lambda: self._step("backfill"): 22,
            lambda: self._step("guard"): 0.5,
            self._order: 2,
            self._publish: 1,
            self._kill: 1,
            self._from_outside: 0.7,
        }
        for act in self.rng.choices(list(weights), list(weights.values()), k=steps):
            act()

    def finish(self) -> None:
        """Everybody ends what he has begun, and everything comes to rest."""
        self.stepped.between = lambda place: None
        for writer in self.writers:
            self._end(writer)
        for name in sorted(self.unpublished):
            self._add(name)
        self.stepped.settled()

    def injure(self) -> bool:
        """Make rows wrong that one filter names (here or there), and order that just these are read anew; what follows
        must not lose the order. False if no table can be treated so."""
        shapes = [s for s in self.shapes if s.key]
        if not shapes:
            return False
        shape = self.rng.choice(shapes)
        number = "b" if "b" in shape.key else "id"
        low = self.rng.randrange(70)
        where = f"n between {low} and {low + 30}"
        for updates, predicate in (
            ({number: f"{number} + 5000"}, f"{where} and {number} % 5 = 0"),
            ({"n": "n + 1000"}, f"{where} and {number} % 5 = 1"),
            ({"n": f"{low + 1}"}, f"{number} % 5 = 2"),
        ):
            self.stepped.spoil(shape.name, updates, predicate)
        self.keeps_its_disk = True
        self.stepped.prepared()
        self._note(f"{shape.name} is injured where {where}")
        self.stepped.resync_rows(shape.name, where)
        self.stepped.between = self._between
        return True

    def _note(self, what: str) -> None:
        self.journal.append(what)

    def _step(self, part: str) -> None:
        place = self.rng.randrange(self.stepped.lanes(part))
        self._note(f"{part} {place}")
        self.stepped.step(part, place)

    def _between(self, place: str) -> None:
        """In the middle of a step. Seldom at places that are passed often, often while a chunk is read."""
        rng = self.rng
        safe = place in SAFE
        if rng.random() < (0.5 if safe else 0.05):
            self._note(f"  at {place}")
            for _ in range(rng.choice([1, 2, 4])):
                self._write()
        if safe and rng.random() < 0.3:
            part = rng.choice(["capture", "capture", "land", "merge", "backfill"])
            lane = rng.randrange(self.stepped.lanes(part))
            # Another reader may read meanwhile, if there is one: one of them always waits for its turn.
            if part != "backfill" or (self.readers > 1 and self.stepped.at_work != (part, lane)):
                self._note(f"  at {place}: {part} {lane}")
                self.stepped.step(part, lane)
        if self.kills and rng.random() < 0.01:
            self.kills -= 1
            self._note(f"  killed at {place}")
            raise Killed(place)

    def _kill(self) -> None:
        if self.kills:
            self.kills -= 1
            lost = not self.keeps_its_disk and self.rng.random() < 0.4
            self._note("killed, and the disk is lost" if lost else "killed")
            self.stepped.kill(disk_lost=lost)

    def _order(self) -> None:
        shape = self.rng.choice(self.shapes)
        if shape.name in self.unpublished:
            return
        if not shape.key or self.rng.random() < 0.5:
            self._note(f"resync {shape.name}")
            self.stepped.resync(shape.name)
            return
        low = self.rng.randrange(100)
        where = f"n between {low} and {low + 40}"
        values = self._key(shape, self.rng.choice)
        keys = [tuple(plain(values[column]) for column in shape.key)]
        self._note(f"resync {shape.name} where {where}, and {keys}")
        self.stepped.resync_rows(shape.name, where, keys)

    def _publish(self) -> None:
        """A table leaves the publication, or comes back; a filter changes."""
        shape = self.rng.choice(self.shapes)
        name = shape.name
        if name in self.unpublished:
            self._add(name)
        elif len(shape.filters) > 1 and self.rng.random() < 0.5:
            others = [s.name for s in self.shapes if s.name not in self.unpublished]
            before, self.filters[name] = self.filters[name], self.rng.choice(shape.filters)
            members = ", ".join(self._member(o) for o in others)
            if not self._as_admin(f"alter publication {self.stepped.slot} set table {members}"):
                self.filters[name] = before
        elif len(self.shapes) > len(self.unpublished) + 1 and self._as_admin(
            f"alter publication {self.stepped.slot} drop table {name}"
        ):
            self.unpublished.add(name)

    def _add(self, name: str) -> None:
        if self._as_admin(f"alter publication {self.stepped.slot} add table {self._member(name)}"):
            self.unpublished.discard(name)

    def _from_outside(self) -> None:
        """What only stands alone: a rewrite that moves every row and publishes nothing."""
        self._as_admin(f"vacuum full {self.rng.choice(self.shapes).name}")

    def _as_admin(self, statement: str) -> bool:
        try:
            self.admin.execute(statement.encode())
        except psycopg.Error as error:
            self._note(f"refused: {statement}: {error}")
            return False
        self._note(statement)
        return True

    # ---- writers ----

    def _write(self) -> None:
        rng = self.rng
        number = rng.randrange(len(self.writers))
        writer = self.writers[number]
        if writer.hanging:
            if rng.random() < 0.15:
                self._note(f"writer {number}: becomes visible")
                writer.show(self.admin)
            return
        if not writer.is_open:
            if rng.random() < 0.3:
                self._statement(number, writer)
                return
            writer.begin()
            self._note(f"writer {number}: begin")
        chance = rng.random()
        if chance < 0.70:
            self._statement(number, writer)
        elif chance < 0.75:
            writer.savepoints += 1
            writer.connection.execute(f"savepoint s{writer.savepoints}".encode())
            self._note(f"writer {number}: savepoint s{writer.savepoints}")
        elif chance < 0.79 and writer.savepoints:
            to = rng.randrange(1, writer.savepoints + 1)
            writer.savepoints = to
            writer.connection.execute(f"rollback to savepoint s{to}".encode())
            self._note(f"writer {number}: rollback to savepoint s{to}")
        elif chance < 0.82:
            self._note(f"writer {number}: rollback")
            writer.end(False)
        elif chance < 0.88:
            self._note(f"writer {number}: commit, unseen")
            writer.commit_unseen()
        else:
            self._note(f"writer {number}: commit")
            writer.end(True)

    def _end(self, writer: Writer) -> None:
        if writer.hanging:
            writer.show(self.admin)
        if writer.is_open:
            writer.end(self.rng.random() < 0.7)

    def _statement(self, number: int, writer: Writer) -> None:
        shape = self.rng.choice(self.shapes)
        statement = self._ddl(shape) if self.rng.random() < 0.02 else self._dml(shape)
        done = writer.attempt(statement)
        self._note(f"writer {number}: {'' if done else 'refused: '}{statement}")

    def _insert(self, shape: Shape) -> str:
        key = self._key(shape, self.rng.choice)
        values = ", ".join((*key.values(), str(self.rng.randrange(100)), self._text(), self._big(shape)))
        return f"insert into {shape.name} ({', '.join(key)}, n, text, big) values ({values})"

    def _key(self, shape: Shape, choice: Callable[[range], int]) -> dict[str, str]:
        if "id" in shape.columns.split():
            return {"id": str(choice(range(1, 2 * self.rows)))}
        return {"a": quoted(self.rng.choice(WORDS[:6])), "b": str(choice(range(1, self.rows // 3)))}

    def _text(self) -> str:
        return self.rng.choice(["null", quoted(self.rng.choice(WORDS))])

    def _big(self, shape: Shape) -> str:
        if self.rng.random() < shape.big:
            return f"repeat(md5('{self.rng.random()}'), 90)"
        return self.rng.choice(["null", "''", "'short'"])

    def _dml(self, shape: Shape) -> str:
        rng, name = self.rng, shape.name
        key = self._key(shape, rng.choice)
        one = " and ".join(f"{column} = {value}" for column, value in key.items())
        number = next(reversed(key))
        low = rng.randrange(2 * self.rows)
        some = f"{number} between {low} and {low + rng.choice([0, 2, 5, 20])}"
        where = rng.choice([one, one, some])
        moved = ", ".join(f"{column} = {value}" for column, value in self._key(shape, rng.choice).items())
        return rng.choices(
            [
                self._insert(shape),
                f"update {name} set n = {rng.randrange(100)} where {where}",
                f"update {name} set n = n + 1 where {some}",
                f"update {name} set {moved} where {one}",
                f"update {name} set {number} = {number} + {rng.choice([1, 7, 2 * self.rows])} where {where}",
                f"update {name} set big = {self._big(shape)} where {where}",
                f"update {name} set text = {self._text()} where {where}",
                f"update {name} set c{rng.randrange(3)} = {rng.randrange(100)} where {where}",
                f"delete from {name} where {where}",
                f"delete from {name}",
            ],
            [20, 12, 4, 14, 12, 6, 6, 5, 12, 0.3],
        )[0]

    def _ddl(self, shape: Shape) -> str:
        self.count += 1
        rng, table, column = self.rng, f"alter table {shape.name}", f"c{self.rng.randrange(3)}"
        return rng.choice(
            [
                f"truncate {shape.name}",
                f"truncate {shape.name}",
                f"{table} add {column} int",
                f"{table} add {column} int default {self.count}",
                f"{table} drop {column}",
                f"{table} rename {column} to c{rng.randrange(3)}",
                f"{table} alter n type bigint",
                f"{table} alter text type text using text || 'x'",
                f"{table} alter big set storage {rng.choice(['main', 'external'])}",
            ]
        )


def quoted(text: str) -> str:
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def plain(literal: str) -> str:
    """The text of a key's literal, as `_key` makes them."""
    return literal.removeprefix("E'").removesuffix("'")
