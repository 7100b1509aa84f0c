"""The event log against a list: whatever is appended, dropped, trimmed, refused or cut off, it holds that list."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cdc.batch import Boundary
from cdc.errors import InvariantBroken, LogFull
from cdc.log import EventLog
from cdc.state import State, open_state
from tests.support.logs import (
    ORDERS,
    PEOPLE,
    SCHEMAS,
    Row,
    batch,
    chunk_rows,
    named_and_found,
    open_log,
    portion,
    rows_of,
    transaction,
)

BYTES_MAX = 200_000
SOURCES = st.sampled_from(["a", "b"])
TABLES = st.sampled_from([ORDERS, PEOPLE])
SIZES = st.sampled_from([1, 300])


@dataclass
class Model:
    """What one source's log must hold: (offset, rows, is it of the open transaction)."""

    position: Boundary | None = None
    records: list[tuple[int, list[Row], bool]] = field(default_factory=list)
    open_lsn: int = 0
    open_rows: int = 0
    end: int = 0
    read: int = 0
    passed: int = 0
    must_discard: bool = False

    @property
    def lsn(self) -> int:
        return self.position.lsn if self.position else 0

    @property
    def first_open(self) -> int | None:
        return next((offset for offset, _, is_open in self.records if is_open), None)

    def complete(self, lsn: int) -> None:
        self.position = Boundary(1, lsn, lsn + 1)
        self.records = [(offset, rows, False) for offset, rows, _ in self.records]
        self.open_lsn = self.open_rows = 0


class LogMachine(RuleBasedStateMachine):
    @initialize(segment_bytes=st.sampled_from([1, 3_000, 1 << 20]))
    def begin(self, segment_bytes: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cdc-log-"))
        self.segment_bytes = segment_bytes
        self.state, self.log = self.open()
        self.models = {"a": Model(), "b": Model()}
        self.newest = 0

    def open(self) -> tuple[State, EventLog]:
        return open_log(self.directory, bytes_max=BYTES_MAX, segment_bytes=self.segment_bytes)

    def teardown(self) -> None:
        if hasattr(self, "log"):
            self.log.close()
            self.state.close()
            shutil.rmtree(self.directory)

    def added(self, model: Model, rows: list[Row], is_open: bool) -> None:
        self.newest += 1
        model.records.append((self.newest, rows, is_open))
        model.end = self.newest

    @rule(
        source=SOURCES,
        tables=st.lists(TABLES, max_size=4),
        opens=st.booleans(),
        size=SIZES,
        xids=st.lists(st.integers(1, 1000), max_size=3),
    )
    def transactions(self, source: str, tables: list, opens: bool, size: int, xids: list[int]) -> None:
        """Whole transactions, the first of which ends the open one; perhaps the beginning of another."""
        model = self.models[source]
        if model.must_discard:
            return
        lsn = max(model.lsn, model.open_lsn - 10)
        made = []
        for number, table in enumerate(tables):
            lsn += 10
            first = model.open_rows if number == 0 else 0
            made.append(transaction(lsn, schema=table, size=size, first_seq=first))
        if model.open_lsn and not tables:
            lsn = model.open_lsn
        if opens:
            made.append(transaction(lsn + 10, size=size))
        try:
            self.log.append(source, portion(*made, lsn=lsn, xids=xids))
        except LogFull:
            assert self.log.size_bytes() + sum(b.data.nbytes for b in made) > BYTES_MAX // 2
            return
        model.complete(lsn)
        for item in made:
            is_open = rows_of(item)[0].lsn > lsn
            self.added(model, rows_of(item), is_open)
            if is_open:
                model.open_lsn, model.open_rows = lsn + 10, 2

    @rule(source=SOURCES, table=TABLES, size=SIZES)
    def part_of_the_open_transaction(self, source: str, table: object, size: int) -> None:
        model = self.models[source]
        if model.must_discard:
            return
        lsn = model.open_lsn or model.lsn + 10
        item = transaction(lsn, schema=table, size=size, first_seq=model.open_rows)
        try:
            self.log.append(source, portion(item))
        except LogFull:
            return
        model.open_lsn, model.open_rows = lsn, model.open_rows + 2
        self.added(model, rows_of(item), True)

    @rule(source=SOURCES, table=TABLES, count=st.integers(0, 3), fails=st.booleans())
    def chunk(self, source: str, table: object, count: int, fails: bool) -> None:
        """A chunk and its progress, or neither."""
        model = self.models[source]
        if model.position is None:
            return
        rows = chunk_rows(model.lsn, model.read, count)
        size = self.log.size_bytes()

        def within(tx: object) -> None:
            self.state.set(f"read/{source}", model.read + count, tx)
            if fails:
                raise KeyError

        try:
            end = self.log.append_chunk(source, [batch(table, rows, op="r", run="r")], run="r", chunk=1, within=within)
        except LogFull:
            return
        except KeyError:
            assert self.log.size_bytes() == size
            return
        model.read += count
        if count:
            self.added(model, rows, False)
            assert end == self.newest

    @rule(source=SOURCES)
    def the_stream_begins_anew(self, source: str) -> None:
        model = self.models[source]
        generation = self.log.generation(source)
        dropped = [r for r in model.records if r[2]]
        assert self.log.discard_open(source) == len(dropped)
        assert (self.log.generation(source) != generation) == bool(dropped)
        model.records = [r for r in model.records if not r[2]]
        if dropped:
            model.end = model.records[-1][0] if model.records else 0
        model.open_lsn, model.open_rows, model.must_discard = 0, 0, False

    @rule(source=SOURCES, back=st.integers(1, 30))
    def what_goes_back_is_refused(self, source: str, back: int) -> None:
        model = self.models[source]
        if model.position is None:
            return
        try:
            self.log.append(source, portion(transaction(max(model.lsn - back, 0)), lsn=model.lsn + 10))
        except InvariantBroken:
            return
        raise AssertionError("rows behind the position were taken")

    @rule(source=SOURCES, share=st.floats(0, 1))
    def trim(self, source: str, share: float) -> None:
        """Only what was passed may go; where everything was passed, everything does."""
        model = self.models[source]
        limit = min(int(self.newest * share), (model.first_open or self.newest + 1) - 1)
        model.passed = max(model.passed, limit)
        before = self.log.size_bytes()
        freed = self.log.trim({source: model.passed})
        assert self.log.size_bytes() == before - freed
        for name, each in self.models.items():
            kept = {r.offset for r in self.log.records(name, 0)}
            gone = [r for r in each.records if r[0] not in kept]
            assert all(offset <= each.passed and not is_open for offset, _, is_open in gone)
            each.records = [r for r in each.records if r[0] in kept]
        if freed and all(not r or r[-1][0] <= m.passed for m in self.models.values() for r in [m.records]):
            assert self.log.size_bytes() == 0

    @rule(garbage=st.binary(max_size=300), new_segment=st.booleans())
    def crash(self, garbage: bytes, new_segment: bool) -> None:
        """Killed after bytes were written and before the index named them; the next start clears what is left."""
        self.log.close()
        self.state.close()
        files = sorted((self.directory / "log").iterdir())
        if files and not new_segment:
            with files[-1].open("ab") as file:
                file.write(garbage)
        else:
            (self.directory / "log" / f"{self.newest + 1:020d}.seg").write_bytes(garbage)
        self.state, self.log = self.open()
        named, found = named_and_found(self.directory, self.state)
        assert named == found
        assert self.log.size_bytes() == sum(found.values())
        for model in self.models.values():
            model.must_discard = model.first_open is not None
            model.passed = 0

    @precondition(lambda self: hasattr(self, "log"))
    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        self.compare(self.log)

    @rule()
    def another_process_sees_the_same(self) -> None:
        state = open_state(self.directory, readonly=True)
        try:
            self.compare(EventLog(self.directory / "log", state, bytes_max=BYTES_MAX))
        finally:
            state.close()

    def compare(self, log: EventLog) -> None:
        for source, model in self.models.items():
            assert log.position(source) == model.position
            records = log.records(source, 0)
            found = [(r.offset, rows_of(log.read(r, SCHEMAS[r.table]))) for r in records]
            assert found == [(offset, rows) for offset, rows, _ in model.records]
            assert log.end_offset(source) == model.end, "also when that record was trimmed since"
            assert (self.state.get(f"read/{source}") or 0) == model.read
            reached = model.position.lsn if model.position else -1
            is_open = [r.kind == "change" and r.last_lsn > reached for r in records]
            assert is_open == [r[2] for r in model.records]
        assert log.size_bytes() <= BYTES_MAX


LogMachine.TestCase.settings = settings(
    max_examples=400, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
test_the_log_holds_what_a_list_would = LogMachine.TestCase
