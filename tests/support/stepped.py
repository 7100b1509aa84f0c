"""A source's whole pipeline in the test's own process, moved step by step by the test instead of by its threads.

Whoever holds a `Stepped` decides which part works next, so an interleaving can be chosen, or drawn from a seed.
Between the lines of a step the product passes its failpoints and the reader's calls; there `between` is called, which
may let writers write, let another part step, or end everything as SIGKILL would (`Killed`). What waits for time waits
on a clock that moves with the steps. Nothing in the product knows of any of this.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest
from deltalake import DeltaTable
from psycopg.conninfo import conninfo_to_dict

from cdc import backfill, failpoints, pipeline
from cdc.config import Config, LakeConfig, SourceConfig
from cdc.errors import CdcError, SourceRefused, Verdict
from cdc.lake import lease
from cdc.log import EventLog
from cdc.pipeline import Pipeline
from cdc.ports import RowsRead, TableSnapshot
from cdc.registry import lake_store
from cdc.state import State, open_state
from cdc.table import TableId, TableSchema
from connectors.local import store as _store  # noqa: F401  (what is patched must have been loaded before)
from connectors.postgres import connection as connections
from connectors.postgres import plan
from connectors.postgres import source as _source  # noqa: F401
from connectors.postgres.snapshot import PostgresSnapshotReader

SOURCE = "shop"
PARTS = ("capture", "land", "merge", "backfill", "guard")
STEP_S = 0.05
"""What a step costs on the clock that the product reads."""
ROUNDS_MAX = 800
"""Turns of all parts within which everything comes to rest, if it does at all."""


class Killed(BaseException):
    """The process dies here: not an Exception, so nothing in between can take it for an error and go on."""


class NotSettled(AssertionError):
    """The parts went on and on, or wait for something that never comes."""


class Clock:
    """The module `time` with a monotonic clock that moves by steps, and a little whenever it is read."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        self.now += 0.0005
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def replaced(patch: pytest.MonkeyPatch, original: object, substitute: object) -> None:
    """Put `substitute` wherever a module of the product names `original`, however it was imported."""
    places = [
        (module, name)
        for module in _modules("cdc", "connectors")
        for name, value in list(vars(module).items())
        if value is original and not name.startswith("__")
    ]
    assert places, f"no module names {original!r} any more"
    for module, name in places:
        patch.setattr(module, name, substitute)


def _modules(*packages: str) -> list[ModuleType]:
    return [m for name, m in list(sys.modules.items()) if name.partition(".")[0] in packages]


class Stepped:
    """One source on one lake, over all its lives. As a context manager it leaves nothing open."""

    def __init__(self, directory: Path, dsn: str, patch: pytest.MonkeyPatch, **source: Any) -> None:
        """`source` are keys of the source's configuration. Slot and publication are named after the database."""
        self.dsn = dsn
        self.slot = f"cdc_{conninfo_to_dict(dsn)['dbname']}"
        self.lake = directory / "lake"
        self.directory = directory
        self.clock = Clock()
        self.lives = 0
        self.killed_at: list[str] = []
        self.errors: dict[str, CdcError] = {}
        """The last one of each part."""
        self.at_work: tuple[str, int] | None = None
        """The part, and which of its threads, whose step is under way."""
        self.between: Callable[[str], None] = lambda place: None
        self._source = {
            "tables": ("public.*",),
            "chunk_rows": 10,
            "lock_timeout_s": 0.05,
            "statement_timeout_s": 2.0,
            "watch_every_s": 2.0,
            "confirm_every_s": 0.0,
            **source,
        }
        self.rounds_max = ROUNDS_MAX
        self._sockets: list[psycopg.Connection[Any]] = []
        self._inside = False
        self._disks = 0
        self.state: State | None = None
        self._patch(patch)

    # ---- one life after another ----

    def start(self) -> None:
        """A new process on the state directory that the last one left."""
        assert self.state is None, "it runs already"
        self.lives += 1
        directory = self.directory / f"state-{self._disks}"
        directory.mkdir(parents=True, exist_ok=True)
        source = SourceConfig(name=SOURCE, dsn=self.dsn, slot=self.slot, publication=(self.slot,), **self._source)
        lake = LakeConfig(
            url=str(self.lake), land_every_s=0.2, merge_every_s=0.2, merge_share=1.0, lease_ttl_s=1e6
        )  # fmt: skip
        config = Config(path=None, state_dir=directory, sources={SOURCE: source}, lake=lake)
        self.stop = threading.Event()
        self.state = open_state(directory)
        self.state._connection.execute("pragma synchronous = off")
        self.log = EventLog(config.log_dir, self.state, bytes_max=1 << 30)
        self.pipeline = Pipeline(
            config, source, self.state, self.log, lake_store(lake),
            owner="model", own_origins=(), stop=self.stop, on_fatal=_fatal,
        )  # fmt: skip
        self._steps: dict[str, list[Callable[[], bool]]] = {}
        for worker in self.pipeline.workers:
            self._steps.setdefault(worker.name.partition(":")[0], []).append(worker._step)
        assert set(self._steps) >= set(PARTS), f"the pipeline's parts are other ones now: {sorted(self._steps)}"

    def kill(self, *, disk_lost: bool = False) -> None:
        """What SIGKILL leaves behind: files as they are, sockets closed by the kernel. Idempotent."""
        if self.state is not None:
            self.stop.set()
            # Not the connections' own farewell: what is open is rolled back by the server, as when a peer is gone.
            for socket in self._sockets:
                with suppress(psycopg.Error):
                    socket.close()
            with suppress(CdcError):
                self.log.close()
            self.state.close()
            self.state = None
        self._sockets.clear()
        if disk_lost:
            shutil.rmtree(self.directory / f"state-{self._disks}", ignore_errors=True)
            self._disks += 1

    def __enter__(self) -> Stepped:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    # ---- steps ----

    def step(self, part: str, place: int = 0) -> bool:
        """One step of a part, in a life that begins now if there is none. Errors that the product would repeat are
        left to the next step; a kill ends the life."""
        if self.state is None:
            self.start()
        self.clock.now += STEP_S
        place %= len(self._steps[part])
        outer, self.at_work = self.at_work, (part, place)
        try:
            return self._steps[part][place]()
        except CdcError as error:
            if error.verdict is Verdict.FATAL:
                raise
            self.errors[part] = error
            return False
        except Killed as end:
            self.killed_at.append(str(end))
            self.kill()
            return False
        finally:
            self.at_work = outer

    def lanes(self, part: str) -> int:
        """How many threads a part has."""
        return len(self._steps[part]) if self.state is not None else 1

    def turn(self, parts: tuple[str, ...] = PARTS) -> None:
        """One step of each."""
        for part in parts:
            for place in range(self.lanes(part)):
                self.step(part, place)

    def until(self, condition: Callable[[], object], what: str, *, parts: tuple[str, ...] = PARTS) -> None:
        """Let some parts step in turn until a condition holds."""
        for _ in range(self.rounds_max):
            if self.state is not None and condition():
                return
            self.turn(parts)
        raise NotSettled(f"not within {self.rounds_max} rounds: {what}; {self.told()}")

    def prepared(self) -> None:
        """Until the stream has begun and the tables are known."""
        self.until(lambda: self.pipeline.prepared and self.pipeline.discovered, "the stream to begin")

    def captured(self) -> None:
        """Until everything committed now is in the log; no other part moves."""
        self.until(lambda: self.pipeline.prepared, "the stream to begin", parts=("capture",))
        barrier = self.pipeline.admin.barrier()
        self.until(lambda: self.pipeline.reached()["logged"] >= barrier, "the log", parts=("capture",))

    def settled(self) -> None:
        """Until every order is carried out and `current` holds everything that is committed now."""
        self.prepared()
        for _ in range(20):
            # A look at the catalog, so that what nobody has told of yet is noticed.
            self.clock.now += 100.0
            self.step("backfill")
            self.until(self._quiet, "the snapshots to end")
            barrier = self.pipeline.admin.barrier()
            self.until(lambda: self.pipeline.has_reached(barrier), "the lake to hold everything")  # noqa: B023
            if self._quiet():
                return
        raise NotSettled(f"new snapshots again and again; {self.told()}")

    def _quiet(self) -> bool:
        assert self.state is not None
        if not (self.pipeline.prepared and self.pipeline.discovered and self.pipeline.backfill.idle):
            return False
        if self.pipeline.marks():
            return False
        return all(t.state in ("streaming", "removed") for t in self.state.tables(SOURCE) if not t.table.is_own)

    def resync(self, table: str) -> None:
        """Order a snapshot, if the pipeline is there to take the order."""
        if self.state is not None and self.pipeline.prepared:
            self.pipeline.resync(TableId("public", table))

    def resync_rows(self, table: str, where: str, keys: Sequence[tuple[str, ...]] = ()) -> None:
        """Order that some rows are read anew, if the pipeline is there to take the order."""
        if self.state is not None and self.pipeline.prepared:
            with suppress(SourceRefused):
                self.pipeline.resync_rows(TableId("public", table), where, keys)

    def spoil(self, table: str, updates: dict[str, str], predicate: str) -> None:
        """Make rows of `current` wrong, as a lost change would, while no process runs."""
        self.kill()
        DeltaTable(str(self.lake / SOURCE / f"public.{table}" / "current")).update(updates=updates, predicate=predicate)

    def told(self) -> str:
        """How things stand, for messages."""
        if self.state is None:
            return "no process"
        tables = {str(t.table): (t.state, t.reason) for t in self.state.tables(SOURCE)}
        runs = [(str(r.table), r.kind, r.state, r.chunk_no, r.reason) for r in self.state.runs(SOURCE)][-6:]
        marks = self.pipeline.marks() if self.pipeline.prepared else {}
        return f"tables {tables}, runs {runs}, marks {marks}, reached {self.pipeline.reached()}, errors {self.errors}"

    # ---- inside of steps ----

    def pass_by(self, place: str) -> None:
        """The product is at a place."""
        # What is called in between passes places of its own; and the turn of another thread is not ours.
        if self.state is None or self._inside or threading.current_thread() is not threading.main_thread():
            return
        self._inside = True
        try:
            self.between(place)
        finally:
            self._inside = False

    def _patch(self, patch: pytest.MonkeyPatch) -> None:
        replaced(patch, failpoints.failpoint, self.pass_by)
        for module in _modules("cdc"):
            if vars(module).get("time") is time:
                patch.setattr(module, "time", self.clock)
        # Tables are small here, and are to have several ranges all the same.
        patch.setattr(plan, "RANGE_BLOCKS", 2)
        patch.setattr(backfill, "FIRST_BLOCKS", 1)
        patch.setattr(pipeline, "READ_S", 0.01)
        patch.setattr(pipeline, "LAND_S", 0.0)
        # A process is killed here, never the machine: what was written is there.
        patch.setattr(os, "fsync", lambda fd: None)
        # Of a process that was killed the start time is not found any more: each life has its own.
        patch.setattr(lease, "_started", lambda pid: str(self.lives))
        connect, begin, read = connections.connect, PostgresSnapshotReader.begin, PostgresSnapshotReader.read

        def connected(*args: Any, **words: Any) -> psycopg.Connection[Any]:
            self._sockets.append(connect(*args, **words))
            return self._sockets[-1]

        def begun(reader: PostgresSnapshotReader, schema: TableSchema) -> TableSnapshot:
            self.pass_by("reader.before_begin")
            snapshot = begin(reader, schema)
            self.pass_by("reader.begun")
            return snapshot

        def has_read(reader: PostgresSnapshotReader, **what: Any) -> RowsRead:
            self.pass_by("reader.before_read")
            rows = read(reader, **what)
            self.pass_by("reader.read")
            return rows

        replaced(patch, connect, connected)
        patch.setattr(PostgresSnapshotReader, "begin", begun)
        patch.setattr(PostgresSnapshotReader, "read", has_read)


def _fatal(error: BaseException) -> None:
    raise error
