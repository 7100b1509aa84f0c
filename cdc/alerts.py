"""Tells a webhook what happened: JSON over HTTP, in a thread of its own, never holding anything up.

Each alert is tried a bounded number of times with growing pauses; what the webhook still refuses, or what comes while
`WAITING_MAX` alerts wait already, is dropped with a line in the log: an alert is also there, and in the lake. They
hold names and positions, never values of rows; the URL may hold a secret and is never logged. No alert is promised
across a restart.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import urllib.error
import urllib.request
from typing import Any

import tenacity

from cdc import metrics
from cdc.config import AlertsConfig

log = logging.getLogger(__name__)

WAITING_MAX = 1000
TRIES = 6


class Alerts:
    """The way to the configured webhook; without one every call is a no-op. `tell` is thread-safe and never blocks."""

    def __init__(self, config: AlertsConfig, stop: threading.Event) -> None:
        self._config = config
        self._stop = stop
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING_MAX)
        self._thread: threading.Thread | None = None
        if config.webhook:
            self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)
            self._thread.start()

    def tell(self, alert: dict[str, Any]) -> None:
        """Post the alert soon."""
        if self._thread is None:
            return
        try:
            self._waiting.put_nowait(alert)
        except queue.Full:
            self._drop("too many alerts wait")

    def close(self) -> None:
        """End the thread; what waits is posted once, without repetition, as far as one time-out allows."""
        if self._thread is not None:
            try:
                self._waiting.put_nowait(None)
            except queue.Full:
                self._drop("too many alerts wait")
            self._thread.join(self._config.webhook_timeout_s)

    def _run(self) -> None:
        while (alert := self._waiting.get()) is not None:
            retrying = tenacity.Retrying(
                stop=tenacity.stop_any(tenacity.stop_after_attempt(TRIES), tenacity.stop_when_event_set(self._stop)),
                wait=tenacity.wait_random_exponential(multiplier=0.2, max=30),
                sleep=self._pause,
                reraise=True,
            )
            try:
                retrying(self._post, alert)
                metrics.ALERTS.labels("sent").inc()
            except (OSError, ValueError) as e:
                # The text of such errors may quote the URL.
                self._drop(f"{type(e).__name__} {getattr(e, 'code', '')}".strip())

    def _pause(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _post(self, alert: dict[str, Any]) -> None:
        request = urllib.request.Request(
            self._config.webhook,
            json.dumps(alert).encode(),
            {"Content-Type": "application/json", "User-Agent": "cdc"},
            method="POST",
        )
        with urllib.request.urlopen(request, timeout=self._config.webhook_timeout_s):
            pass

    def _drop(self, why: str) -> None:
        metrics.ALERTS.labels("dropped").inc()
        log.warning("an alert was not delivered", extra={"why": why, "hint": "see [alerts] webhook"})
