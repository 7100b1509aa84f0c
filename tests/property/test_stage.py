"""The loop of every hop, attacked: whatever fails and wherever it dies, the downstream ends with every item once,
in order, and
the upstream was never told to forget what the downstream did not hold."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc.errors import SourceUnavailable
from cdc.stage import Stage

ITEMS = 12


@dataclass
class Faults:
    """Fails at the n-th call that asks, for each n in `at`."""

    at: frozenset[int]
    calls: int = 0

    def maybe(self) -> None:
        self.calls += 1
        if self.calls in self.at:
            raise SourceUnavailable("injected")


@dataclass
class Upstream:
    """Numbers 1…ITEMS; refuses to go back behind what was confirmed, as a slot does."""

    faults: Faults
    next: int = 1
    confirmed: int = 0
    opened: int = 0

    def open(self, after: int) -> None:
        self.faults.maybe()
        assert after >= self.confirmed, "what was confirmed is gone"
        self.opened += 1
        self.next = after + 1

    def read(self, timeout_s: float) -> int | None:
        self.faults.maybe()
        if self.next > ITEMS:
            return None
        self.next += 1
        return self.next - 1

    def confirm(self, durable: int) -> None:
        self.faults.maybe()
        self.confirmed = max(self.confirmed, durable)

    def close(self) -> None: ...


@dataclass
class Downstream:
    """Makes durable what it has buffered once there are `batch` items, or when there is nothing to read."""

    faults: Faults
    batch: int
    buffer: list[int] = field(default_factory=list)
    durable: list[int] = field(default_factory=list)

    def resume(self) -> int:
        self.faults.maybe()
        self.buffer.clear()
        return self.durable[-1] if self.durable else 0

    def write(self, item: int) -> int | None:
        self.faults.maybe()
        self.buffer.append(item)
        return self._save() if len(self.buffer) >= self.batch else None

    def tick(self) -> int | None:
        self.faults.maybe()
        return self._save() if self.buffer else None

    def _save(self) -> int:
        self.durable += self.buffer
        self.buffer.clear()
        # Durable, and then the answer is lost.
        self.faults.maybe()
        return self.durable[-1]


@settings(max_examples=300)
@given(
    faults=st.frozensets(st.integers(1, 80), max_size=12), batch=st.integers(1, 5), deaths=st.sets(st.integers(1, 40))
)
def test_every_item_arrives_once_in_order_whatever_fails(faults: frozenset[int], batch: int, deaths: set[int]) -> None:
    shared = Faults(faults)
    upstream, downstream = Upstream(shared), Downstream(shared, batch)
    stage: Stage[int, int] = Stage("hop", upstream, downstream)
    for turn in range(200):
        if turn in deaths:
            # A kill: the new process knows only what is durable.
            upstream = Upstream(shared, confirmed=upstream.confirmed)
            downstream = Downstream(shared, batch, durable=downstream.durable)
            stage = Stage("hop", upstream, downstream)
        try:
            stage.step(0.0)
        except SourceUnavailable:
            continue
        assert upstream.confirmed <= (downstream.durable[-1] if downstream.durable else 0)
    assert downstream.durable == list(range(1, ITEMS + 1))
    assert upstream.confirmed == ITEMS


def test_an_error_closes_both_ends_and_the_next_step_opens_at_what_is_durable() -> None:
    shared = Faults(frozenset({6}))
    upstream, downstream = Upstream(shared), Downstream(shared, batch=2)
    stage: Stage[int, int] = Stage("hop", upstream, downstream)
    stage.step(0.0)
    with pytest.raises(SourceUnavailable):
        stage.step(0.0)
    assert (upstream.opened, downstream.durable) == (1, [])
    stage.step(0.0)
    assert (upstream.opened, downstream.buffer) == (2, [1])


def test_nothing_is_confirmed_before_it_is_durable() -> None:
    shared = Faults(frozenset())
    upstream, downstream = Upstream(shared), Downstream(shared, batch=3)
    stage: Stage[int, int] = Stage("hop", upstream, downstream)
    assert [stage.step(0.0).durable for _ in range(3)] == [False, False, True]
    assert upstream.confirmed == 3
