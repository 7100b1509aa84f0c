"""A supervised part does with an error what its verdict says."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cdc.errors import CdcError, InvariantBroken, SourceUnavailable
from cdc.worker import Worker
from tests.support.waiting import wait_until


class Part:
    """A part whose step does what it is told, and what its supervisor reported."""

    def __init__(self, step: Callable[[int], bool]) -> None:
        self.stop = threading.Event()
        self.errors: list[str | None] = []
        self.fatal: list[BaseException] = []
        self.steps = 0
        self._do = step
        self.worker = Worker(
            "part",
            self._step,
            stop=self.stop,
            idle_s=0.001,
            on_error=lambda e: self.errors.append(None if e is None else e.args[0]),
            on_fatal=self.fatal.append,
        )

    def _step(self) -> bool:
        self.steps += 1
        return self._do(self.steps)

    def end(self) -> None:
        self.stop.set()
        assert self.worker.join(5)


def raising(error: CdcError | Exception, times: int) -> Callable[[int], bool]:
    def step(number: int) -> bool:
        if number <= times:
            raise error
        return False

    return step


def test_what_a_repetition_may_mend_is_repeated_until_it_works() -> None:
    part = Part(raising(SourceUnavailable("away"), 2))
    part.worker.start()
    wait_until(lambda: part.steps > 5, 60, "the part goes on")
    part.end()
    assert part.errors == ["away", "away", None]
    assert part.fatal == []


def test_a_broken_invariant_ends_the_part_and_tells_the_process() -> None:
    part = Part(raising(InvariantBroken("never"), 1))
    part.worker.start()
    assert part.worker.join(5)
    assert [str(e) for e in part.fatal] == ["never"]
    assert part.steps == 1


def test_an_unknown_exception_is_never_repeated_blindly() -> None:
    part = Part(raising(ValueError("a row value"), 1))
    part.worker.start()
    assert part.worker.join(5)
    assert part.steps == 1
    assert isinstance(part.fatal[0], ValueError)


def test_an_unknown_exception_is_logged_without_its_text(caplog: object) -> None:
    import logging

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("cdc.worker").addHandler(handler)
    part = Part(raising(ValueError("a row value"), 1))
    part.worker.start()
    assert part.worker.join(5)
    logging.getLogger("cdc.worker").removeHandler(handler)
    assert records
    assert all("a row value" not in record.getMessage() for record in records)


def test_a_stop_ends_a_part_that_waits_to_repeat() -> None:
    part = Part(raising(SourceUnavailable("away"), 10_000))
    part.worker.start()
    wait_until(lambda: len(part.errors) > 2, 60, "it fails a few times")
    part.end()
    assert part.fatal == []
