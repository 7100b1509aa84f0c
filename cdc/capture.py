"""Capture: source → event log, and the one place that lets a source forget.

`ConfirmGate` decides how far the slot may be confirmed: under `confirm_after = "landed"` to where everything logged has
landed, under `"log"` to what is logged. Before the slot passes a position, that position stands in the lake's
anchor object, so that a daemon on an empty disk knows whether something was lost. Nobody but capture confirms.

It does not decode (the source does), does not land, and keeps no state but what log and lake hold.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from cdc import metrics
from cdc.batch import Boundary, Portion
from cdc.failpoints import failpoint
from cdc.log import EventLog
from cdc.ports import Source
from cdc.schema import SchemaBook


class AnchorWriter(Protocol):
    """Writes how far the slot may have been confirmed, and in which mode; durable on return."""

    def __call__(self, may_confirm_lsn: int, mode: str) -> None: ...


class ConfirmGate:
    """Thread-safe: capture reports what is logged, landing what has landed; capture alone acts on `allowed`.

    Under `confirm_after = "landed"` the WAL guard may bridge a lake that is behind: meanwhile what is logged is
    confirmed. The anchor says mode `log` before the first such confirm, and `landed` again only when everything that
    was confirmed has landed.
    """

    def __init__(
        self,
        *,
        epoch: int,
        confirm_after: str,
        save_anchor: AnchorWriter,
        anchored_lsn: int,
        every_s: float,
        anchored_mode: str = "",
        logged_lsn: int = 0,
    ) -> None:
        """`anchored_*` is what the anchor says; `logged_lsn`, up to which the log may have been confirmed, counts if it
        says `log` and we are to be `landed`."""
        self._epoch = epoch
        self._after_log = confirm_after == "log"
        self._save_anchor = save_anchor
        self._anchored = anchored_lsn
        self._every_s = every_s
        self._next_at = 0.0
        self._lock = threading.RLock()
        self._allowed = 0
        self._bridging = False
        self._owed = logged_lsn if anchored_mode == "log" and not self._after_log else 0
        """End LSN up to which everything must land before the anchor may say `landed` again; 0: it does."""

    def logged(self, boundary: Boundary) -> None:
        """Everything up to `boundary` is durable in the log."""
        # A position of another epoch is one of another history: the slot must never hear of it.
        if boundary.epoch != self._epoch or not (self._after_log or self._bridging):
            return
        with self._lock:
            if self._bridging:
                self._owed = max(self._owed, boundary.end_lsn)
            if self._after_log or self._bridging:
                self._allowed = max(self._allowed, boundary.end_lsn)

    def landed(self, boundary: Boundary) -> None:
        """Everything up to `boundary` is durable in the lake. Writes the anchor when it is due, before it allows."""
        if self._after_log or boundary.epoch != self._epoch:
            return
        if self._owed:
            self._repay(boundary)
        if boundary.end_lsn <= self._allowed or time.monotonic() < self._next_at:
            return
        with self._lock:
            if boundary.end_lsn > self._anchored:
                failpoint("confirm.before_anchor")
                self._save_anchor(boundary.end_lsn, "log" if self._owed else "landed")
                self._anchored = boundary.end_lsn
                failpoint("confirm.after_anchor")
            self._next_at = time.monotonic() + self._every_s
            self._allowed = max(self._allowed, boundary.end_lsn)

    def bridge(self, on: bool, logged: Boundary | None) -> None:
        """Begin (or end) to confirm what is logged though it has not landed. `logged` is durable in the log."""
        if self._after_log:
            return
        with self._lock:
            if on and not self._owed:
                self._save_anchor(self._anchored, "log")
                self._owed = max(1, self._anchored)
            self._bridging = on
        if on and logged is not None:
            self.logged(logged)

    def settled(self, anchored_mode: str) -> None:
        """The anchor was written anew, by cdc.origin, and says this: while something is owed, it must say `log`."""
        with self._lock:
            if self._owed and anchored_mode != "log":
                self._save_anchor(self._anchored, "log")

    @property
    def allowed(self) -> int:
        """The position that the source may be told, 0 for none yet."""
        return self._allowed

    def _repay(self, boundary: Boundary) -> None:
        """What was confirmed before it landed has landed: the anchor says so, if nobody goes on confirming so."""
        with self._lock:
            if self._bridging or boundary.end_lsn < self._owed:
                return
            self._save_anchor(max(boundary.end_lsn, self._anchored), "landed")
            self._anchored, self._owed = max(boundary.end_lsn, self._anchored), 0


class SourceStream:
    """The upstream end of capture."""

    def __init__(self, name: str, source: Source, book: SchemaBook, gate: ConfirmGate, epoch: int) -> None:
        self._name = name
        self._source = source
        self._book = book
        self._gate = gate
        self._epoch = epoch
        self._told = 0

    def open(self, after: Boundary | None) -> None:
        self._told = 0
        self._source.open(after, self._book, self._epoch)

    def read(self, timeout_s: float) -> Portion | None:
        self._confirm()
        return self._source.read(timeout_s)

    def confirm(self, durable: Boundary | None) -> None:
        if durable is not None:
            self._gate.logged(durable)
        self._confirm()

    def close(self) -> None:
        self._source.close()

    def _confirm(self) -> None:
        allowed = self._gate.allowed
        if allowed > self._told:
            failpoint("capture.before_confirm")
            self._source.confirm(allowed)
            self._told = allowed


class LogEnd:
    """The downstream end of capture: appends portions to the event log."""

    def __init__(self, name: str, log: EventLog) -> None:
        self._name = name
        self._log = log
        self.received_lsn = 0
        """The server's newest position that we have seen."""
        self.ddl_seen = 0
        """How many portions said that the catalog was changed."""

    def resume(self) -> Boundary | None:
        self._log.discard_open(self._name)
        return self._log.position(self._name)

    def write(self, item: Portion) -> Boundary | None:
        began = time.perf_counter()
        failpoint("capture.before_append")
        self._log.append(self._name, item)
        failpoint("capture.after_append")
        took = time.perf_counter() - began
        metrics.STAGE_SECONDS.labels("log").inc(took)
        metrics.LOG_APPEND_SECONDS.labels(self._name).observe(took)
        self.received_lsn = max(self.received_lsn, item.head_lsn)
        self.ddl_seen += item.ddl
        self._count(item)
        return item.boundary

    def tick(self) -> Boundary | None:
        return None

    def _count(self, item: Portion) -> None:
        metrics.RECEIVED_BYTES.labels(self._name).inc(item.received_bytes)
        metrics.RECEIVED_MESSAGES.labels(self._name).inc(item.messages)
        metrics.TRANSACTIONS.labels(self._name).inc(len(item.xids))
        for batch in item.batches:
            label = metrics.table_label(self._name, batch.table)
            metrics.CHANGES.labels(self._name, label).inc(batch.data.num_rows)
            metrics.LOG_APPENDED_BYTES.labels(self._name).inc(batch.data.nbytes)
            metrics.count_kept_as_text(self._name, batch.table, batch.kept_as_text())
