"""Work that an operator has ordered and that may wait for a store: beside the main thread, which feeds the watchdog.

One piece after the other, in the order of the orders: a table that was paused and resumed is not resumed first. What is
under way when the process ends is dropped; each piece is safe to die in.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from cdc.control import Answer, Pending


class Aside:
    """A queue and its thread, which begins with the first piece."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, work: Callable[[], Answer]) -> Pending:
        """Have it done; what is returned gives its answer, or raises its error, when it is. Returns at once. For one
        thread."""
        ended: list[Answer | BaseException] = []

        def run() -> None:
            try:
                ended.append(work())
            except BaseException as e:  # noqa: BLE001 - whoever asks is told
                ended.append(e)

        def done() -> Answer | None:
            if not ended:
                return None
            if isinstance(ended[0], BaseException):
                raise ended[0]
            return ended[0]

        self._work.put(run)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="aside", daemon=True)
            self._thread.start()
        return done

    def _run(self) -> None:
        while True:
            self._work.get()()


__all__ = ["Aside"]
