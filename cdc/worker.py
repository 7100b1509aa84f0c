"""A supervised thread: repeats one bounded step, and does with errors what their verdict says.

RETRY backs off and repeats; OPERATOR waits longer and repeats, so that what an operator mends goes on by itself;
FATAL and anything unknown ends the worker and tells the process. An error is logged here and nowhere else, once
until it changes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import tenacity

from cdc import metrics
from cdc.errors import CdcError, Standby, StreamRestarted, Verdict

log = logging.getLogger(__name__)

RETRY_MAX_S = 15.0
STANDBY_S = 2.0
"""How often a part that waits for its turn looks whether it has come: how soon a daemon that died is succeeded."""
OPERATOR_S = 10.0
"""How often a part that waits for an operator looks whether it can go on."""


class Worker:
    """One part of the daemon in a thread of its own."""

    def __init__(
        self,
        name: str,
        step: Callable[[], bool],
        *,
        stop: threading.Event,
        idle_s: float = 0.05,
        on_error: Callable[[CdcError | None], None] = lambda error: None,
        on_fatal: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """`step` returns whether there may be more to do at once. `on_error` hears of each error and, with None, of the
        recovery; `on_fatal` of what ended the worker."""
        self.name = name
        self.error: BaseException | None = None
        self._step = step
        self._stop = stop
        self._idle_s = idle_s
        self._on_error = on_error
        self._on_fatal = on_fatal
        self._wake = threading.Event()
        self._wait = tenacity.wait_random_exponential(multiplier=0.2, max=RETRY_MAX_S)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """End the idle pause."""
        self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended within the time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._is_repeatable),
            wait=self._pause,
            sleep=tenacity.sleep_using_event(self._stop),
            stop=tenacity.stop_when_event_set(self._stop),
            reraise=True,
        )
        while not self._stop.is_set():
            try:
                worked = retrying(self._attempt)
            except BaseException as e:  # noqa: BLE001 - the thread's last line: everything ends here, and is told
                if self._stop.is_set() and self._is_repeatable(e):
                    return
                self._end(e)
                return
            if not worked:
                self._wake.wait(self._idle_s)
                self._wake.clear()

    def _attempt(self) -> bool:
        worked = self._step()
        if self.error is not None:
            self.error = None
            log.info("recovered", extra={"part": self.name})
            self._on_error(None)
        return worked

    def _is_repeatable(self, error: BaseException) -> bool:
        if not isinstance(error, CdcError) or error.verdict is Verdict.FATAL:
            return False
        if not isinstance(error, StreamRestarted):
            self._report(error)
        return True

    def _pause(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, StreamRestarted):
            return 0.0
        if isinstance(error, Standby):
            return STANDBY_S
        if isinstance(error, CdcError) and error.verdict is Verdict.OPERATOR:
            return OPERATOR_S
        return float(self._wait(state))

    def _report(self, error: CdcError) -> None:
        if isinstance(error, Standby):
            if not isinstance(self.error, Standby):
                log.info("waits for its turn", extra={"part": self.name, "because": error.args[0]})
            self.error = error
            self._on_error(error)
            return
        if self.error is None or str(self.error) != str(error):
            level = logging.WARNING if error.verdict is Verdict.RETRY else logging.ERROR
            log.log(level, error.args[0], extra={"part": self.name, "error": type(error).__name__, "hint": error.hint})
        self.error = error
        metrics.ERRORS.labels(self.name, type(error).__name__).inc()
        metrics.RESTARTS.labels(self.name).inc()
        self._on_error(error)

    def _end(self, error: BaseException) -> None:
        self.error = error
        hint = error.hint if isinstance(error, CdcError) else "this is a fault of cdc: please report it"
        # Only our own errors are known to hold no values; of others the type and the place must do.
        text = error.args[0] if isinstance(error, CdcError) else f"unexpected {type(error).__name__}"
        log.critical(text, extra={"part": self.name, "error": type(error).__name__, "hint": hint, "at": _place(error)})
        metrics.ERRORS.labels(self.name, type(error).__name__).inc()
        self._on_fatal(error)


def _place(error: BaseException) -> str:
    """Where an error was raised: files and lines, innermost last; no values."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return " < ".join(reversed(places[-6:]))
