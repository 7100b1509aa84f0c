"""Syncs that write into tables which their own models read come to rest, and wake when others write: real daemons.

The models are a worst case: every run of them changes every row, so a sync that its own writes, or those of the other
sync, woke would run for ever. Nothing here waits for time to pass: a `turn` commits something that no sync reads, waits
until the cut holds all that is committed, and then until the syncs have looked at that cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cdc.state import State
from tests.support.daemon import Daemon, execute
from tests.support.waiting import wait_until
from tests.support.witness import changelog

pytestmark = pytest.mark.versions

SCHEMA = """
create table scores (customer_id int primary key, value int not null unique);
create table badges (id int primary key, value int references scores (value) on update cascade);
create table scores_log (id int generated always as identity primary key, customer_id int, value int);
create table tiers (customer_id int primary key, tier int not null);
create table apart (id int generated always as identity primary key);
create function note() returns trigger language plpgsql as
  'begin insert into scores_log (customer_id, value) values (new.customer_id, new.value); return null; end';
create constraint trigger note after update on scores deferrable initially deferred
  for each row execute function note();
insert into scores values (1, 0), (2, 1000000);
insert into badges values (1, 0), (2, 1000000);
insert into tiers values (1, 1)
"""
TABLES = ("scores", "badges", "scores_log", "tiers")
SYNCS = ("scores", "tiers")
SECTIONS = '''
[model.scores]
sql = """
select customer_id, s.value + coalesce(t.tier, 0) + 1 as value
from shop.scores s left join shop.tiers t using (customer_id)"""
key = ["customer_id"]

[model.tiers]
sql = """
select customer_id, s.value % 7 + coalesce(t.tier, 0) + 1 as tier
from shop.scores s left join shop.tiers t using (customer_id)"""
key = ["customer_id"]

[model.look]
sql = "select 1 as one"
key = ["one"]

[sync.scores]
model = "scores"
target = "first"
table = "public.scores"
key = ["customer_id"]
debounce_s = 0
batch_rows = 1

[sync.tiers]
model = "tiers"
target = "second"
table = "public.tiers"
key = ["customer_id"]
debounce_s = 0
batch_rows = 1
'''


CALM = """
[model.scores]
sql = "select customer_id, greatest(value, 5) as value from shop.scores"
key = ["customer_id"]

[model.tiers]
sql = "select customer_id, greatest(tier, 5) as tier from shop.tiers"
key = ["customer_id"]

[model.look]"""
"""The models that write nothing once they have been heard."""


class Loop:
    """A database that two syncs read and write, and the daemon. `origins`: what the writes of each sync bear."""

    def __init__(self, folder: Path, dsn: str, *, role: str = "", two: bool = False, calm: bool = False) -> None:
        """`role`: who writes, without the right to set origins; else the superuser. `two`: each sync has a target of
        its own, else both write through one. `calm`: with models that come to rest by themselves."""
        self.dsn = dsn
        execute(dsn, SCHEMA)
        if role:
            self._grant(role)
        writer = make_conninfo(dsn, user=role) if role else dsn
        name = conninfo_to_dict(dsn)["dbname"]
        self.origins = {"scores": f"{name}_first", "tiers": f"{name}_{'second' if two else 'first'}"}
        sections = SECTIONS if two else SECTIONS.replace('target = "second"', 'target = "first"')
        if calm:
            sections = CALM + sections.partition("[model.look]")[2]
        self.daemon = Daemon(folder, dsn, source={"exclude": ["cdc.*"]}, more=sections)
        for target in ("first", "second") if two else ("first",):
            self.daemon.configure(f"target.{target}", type="postgres", dsn=writer, origin=f"{name}_{target}")
        self._foreign: set[int] = set()

    def _grant(self, role: str) -> None:
        execute(
            self.dsn,
            f"create role {role} login",
            f"create schema cdc authorization {role}",
            f"grant select, insert, update on scores, tiers to {role}",
            f"grant insert on scores_log to {role}",
        )

    def others(self, *statements: str) -> None:
        """What somebody else writes, in one transaction."""
        with psycopg.connect(self.dsn) as connection:
            for statement in statements:
                connection.execute(statement.encode())
            row = connection.execute("select txid_current()").fetchone()
            assert row is not None
            self._foreign.add(row[0] & 0xFFFFFFFF)

    def runs(self, sync: str) -> list[tuple[str, str]]:
        """Cause and outcome of all its runs, oldest first."""
        state = State(self.daemon.state_dir / "state.db", create=False, readonly=True)
        try:
            return [(e.cause, e.outcome) for e in reversed(state.history("sync", sync, limit=1000))]
        finally:
            state.close()

    def outcome(self, sync: str) -> str:
        """Of its newest run."""
        return (self.runs(sync) or [("", "")])[-1][1]

    def counts(self) -> list[int]:
        return [len(self.runs(sync)) for sync in SYNCS]

    def turn(self) -> None:
        """Return when each sync has looked at a cut that holds everything that was committed before this call."""
        execute(self.dsn, "insert into apart default values")
        assert self.daemon.ask("wait", "--timeout", "60").code == 0, self.daemon.log_tail()
        for _ in range(2):
            # One thread serves orders and then looks at each sync: the second order is taken up after such a look.
            answer = self.daemon.ask("model", "run", "look")
            assert answer.code == 0, answer

    def rest(self, *, within: int = 4) -> list[int]:
        """Come to rest; how many runs each sync has made in all. A turn in which nothing ran is rest: what was written
        before it, by whomever, stood in its cut."""
        for _ in range(within):
            before = self.counts()
            self.turn()
            for sync in SYNCS:
                # A target that a dead daemon's session still holds is tried again.
                wait_until(lambda s=sync: self.outcome(s) not in ("", "failed", "running"), 60, f"sync {sync}")
            if self.counts() == before:
                return before
        raise AssertionError(f"no rest: {[self.runs(sync) for sync in SYNCS]}")

    def stays(self, turns: int = 3) -> None:
        """Assert that it rests from now on, the source with it."""
        before, held = self.counts(), self.rows()
        for _ in range(turns):
            self.turn()
        assert (self.counts(), self.rows()) == (before, held), [self.runs(sync) for sync in SYNCS]

    def rows(self) -> list[list[tuple[int, ...]]]:
        """All rows of the source."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return [connection.execute(f"select * from {t} order by 1".encode()).fetchall() for t in TABLES]

    def check(self) -> None:
        """The lake equals the source, and whoever wrote a change, it bears the right mark, cascades and triggers too.
        The daemon runs."""
        self.daemon.settled().verified()
        for table in TABLES:
            origin = self.origins["tiers" if table == "tiers" else "scores"]
            rows = changelog(self.daemon.lake, f"public.{table}").to_pylist()
            found = [(r["_xid"], r.get("_origin")) for r in rows if r["_op"] in "cud"]
            assert [o for _, o in found] == [None if xid in self._foreign else origin for xid, _ in found], table
            assert origin in {o for _, o in found}, f"{table}: nothing of ours was captured"


WAYS = {"origin": False, "message": False, "two targets": True}


@pytest.fixture
def loop(request: pytest.FixtureRequest, tmp_path: Path, database: str) -> Iterator[Loop]:
    way = request.param
    role = f"writer_{conninfo_to_dict(database)['dbname']}" if way == "message" else ""
    made = Loop(tmp_path / "daemon", database, role=role, two=WAYS[way])
    with made.daemon:
        yield made
    if role:
        _drop(database, role)


def _drop(dsn: str, role: str) -> None:
    name = sql.Identifier(role)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [role])
        wait_until(
            lambda: connection.execute("select 1 from pg_stat_activity where usename = %s", [role]).fetchone() is None
        )
        connection.execute(sql.SQL("drop owned by {} cascade").format(name))
        connection.execute(sql.SQL("drop role {}").format(name))


def ran(loop: Loop, before: Sequence[int]) -> list[list[tuple[str, str]]]:
    """The runs of each sync since there were so many."""
    return [loop.runs(sync)[n:] for sync, n in zip(SYNCS, before, strict=True)]


@pytest.mark.parametrize("loop", WAYS, indirect=True)
def test_two_syncs_that_feed_each_other_come_to_rest_and_wake_when_others_write(loop: Loop) -> None:
    loop.daemon.start().settled()
    resting = loop.rest()
    for sync in SYNCS:
        # A second run, where the first one began between a cut and word of what is in it, is the most there may be.
        assert loop.runs(sync) in ([("first run", "done")], [("first run", "done"), ("data", "done")])
    for statements in (
        ["update scores set value = 500 where customer_id = 1", "update tiers set tier = 3"],
        ["insert into scores values (3, 7000000)", "insert into badges values (3, 7000000)"],
    ):
        loop.others(*statements)
        before, resting = resting, loop.rest()
        assert ran(loop, before) == [[("data", "done")]] * 2, statements
    loop.others("insert into badges values (4, null)")
    loop.stays()
    loop.check()


@pytest.mark.parametrize("loop", ["origin", pytest.param("message", marks=pytest.mark.slow)], indirect=True)
def test_a_daemon_that_dies_behind_its_own_commit_comes_to_rest_after_the_next_start(loop: Loop) -> None:
    loop.daemon.start(failpoints="sync.after_commit=kill:3")
    loop.daemon.died_at("sync.after_commit")
    loop.daemon.start().settled()
    before = loop.rest()
    loop.daemon.stop()
    loop.daemon.start().settled()
    resting = loop.rest()
    for after in ran(loop, before):
        # What others did while it was away is not known: one run, if the tables have moved since the last one.
        assert after in ([], [("restart", "done")])
    loop.others("update scores set value = 500 where customer_id = 1")
    loop.rest()
    assert ran(loop, resting) == [[("data", "done")]] * 2
    loop.check()


def test_what_others_wrote_starts_a_run_also_if_the_daemon_dies_between_its_merge_and_the_cut(
    tmp_path: Path, database: str
) -> None:
    loop = Loop(tmp_path / "daemon", database, calm=True)
    with loop.daemon:
        loop.daemon.start().settled()
        loop.rest()
        loop.daemon.stop()
        loop.daemon.start(failpoints="merge.after_commit=kill:1").streaming()
        loop.others("insert into tiers values (3, 1)")
        loop.daemon.died_at("merge.after_commit")
        loop.daemon.start().settled()
        loop.rest()
        assert loop.rows()[3] == [(1, 5), (3, 5)]
