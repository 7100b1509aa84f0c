"""Metrics, as constants, and the small HTTP server that shows them (`/metrics`) and our health (`/health`).

Units stand last in names. Labels are names of sources, tables, syncs, stages: never values of rows. The number of
series is bounded (`TABLES_MAX`): tables beyond it are counted under `(other)`. The server has a bounded number of
threads, answers or drops within seconds, and stops cleanly. It is for a local port: no TLS, no authentication.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import accumulate
from typing import Any, ClassVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from cdc.errors import ConfigError

_log = logging.getLogger(__name__)

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

TABLES_MAX = 2000
"""Tables with series of their own; see `table_label`."""
COLUMNS_MAX = 2000
"""Columns with series of their own; only those count that keep values as text."""
OTHER = "(other)"

LATENESS_SECONDS = (1.0, 10.0, 60.0, 600.0, 3600.0, 6 * 3600.0, 86400.0, 7 * 86400.0, 30 * 86400.0, 365 * 86400.0)
_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(name, text, labels, registry=REGISTRY)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(name, text, labels, registry=REGISTRY)


def _histogram(name: str, text: str, *labels: str) -> Histogram:
    return Histogram(name, text, labels, registry=REGISTRY, buckets=_SECONDS)


class CountedHistogram(Collector):
    """A histogram that takes what others have counted: the library's own wants a call per value. Thread-safe."""

    def __init__(self, name: str, text: str, *labels: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = [*(str(b) for b in bounds), "+Inf"]
        self._lock = threading.Lock()
        self._series: dict[tuple[str, ...], tuple[list[int], float]] = {}
        REGISTRY.register(self)

    def add(self, labels: tuple[str, ...], counts: Sequence[int], total: float) -> None:
        """Add `counts` of values by bucket, those beyond the last bound last; `total` is their sum."""
        with self._lock:
            before, sum_before = self._series.get(labels, ([0] * len(self._bounds), 0.0))
            self._series[labels] = ([a + b for a, b in zip(before, counts, strict=True)], sum_before + total)

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        with self._lock:
            series = dict(self._series)
        for labels, (counts, total) in series.items():
            family.add_metric(labels, list(zip(self._bounds, accumulate(counts), strict=True)), total)
        yield family


BUILD = Info("cdc_build", "Version of the daemon.", registry=REGISTRY)
START_TIME_SECONDS = _gauge("cdc_start_time_seconds", "When the daemon started (Unix time).")
UP = _gauge("cdc_source_up", "1 while the source streams, 0 while it does not.", "source")

# Capture
RECEIVED_BYTES = _counter("cdc_received_bytes", "Bytes of the stream received.", "source")
RECEIVED_MESSAGES = _counter("cdc_received_messages", "Messages of the stream received.", "source")
TRANSACTIONS = _counter("cdc_transactions", "Complete transactions received.", "source")
SPOOL_BYTES = _gauge("cdc_spool_bytes", "Bytes of files that hold streamed transactions before they commit.", "source")
CHANGES = _counter("cdc_changes", "Changes received and logged.", "source", "table")
ALERTS = _counter("cdc_alerts", "Alerts to the webhook: sent, or dropped for good.", "outcome")
SCHEMA_CHANGES = _counter("cdc_schema_changes", "Changes of tables' shapes, by kind.", "source", "table", "kind")
COLUMNS_LEFT_OUT = _gauge(
    "cdc_columns_left_out", "Columns that a frozen table has at the source and not in the lake.", "source", "table"
)
VALUES_KEPT_AS_TEXT = _counter(
    "cdc_values_kept_as_text",
    "Values kept as text in _raw: their column's type cannot hold them.",
    "source",
    "table",
    "column",
)

CATALOG_FINDINGS = _counter(
    "cdc_catalog_findings",
    "Changes of the catalog that the stream does not show, and that were answered.",
    "source",
    "kind",
)

# The ladder of positions: head, received, logged, landed, confirmed
LAG_BYTES = _gauge(
    "cdc_lag_bytes", "WAL between the server's head and a step (logged, landed, merged).", "source", "step"
)
TABLE_LAG_SECONDS = _gauge(
    "cdc_table_lag_seconds",
    "Age of the oldest change that a table's changelog (landed) or its current (merged) lacks; 0: none.",
    "source",
    "table",
    "step",
)
LAG_SECONDS = _gauge(
    "cdc_lag_seconds", "Time since a step last held everything that had been received.", "source", "step"
)
SLOT_RETAINED_BYTES = _gauge("cdc_slot_retained_bytes", "WAL that the server keeps for our slot.", "source")
SLOT_SAFE_WAL_BYTES = _gauge(
    "cdc_slot_safe_wal_bytes", "WAL that may still be written before the slot is lost.", "source"
)
GUARD_STAGE = _gauge("cdc_guard_stage", "Stage of the WAL guard: 0 none, 1 warn, 2 confirm, 3 pause, 4 drop.", "source")
HEARTBEATS = _counter("cdc_heartbeats", "Heartbeats by outcome (sent, returned, late, refused).", "source", "outcome")

# Event log
LOG_BYTES = _gauge("cdc_log_bytes", "Size of the event log on disk.")
LOG_LIMIT_BYTES = _gauge("cdc_log_limit_bytes", "Size at which capture waits (log_bytes_max).")
LOG_APPENDED_BYTES = _counter("cdc_log_appended_bytes", "Bytes appended to the event log.", "source")
LOG_APPEND_SECONDS = _histogram("cdc_log_append_seconds", "Time of one append, fsync and index included.", "source")

# Snapshots
SNAPSHOT_ROWS = _counter("cdc_snapshot_rows", "Rows read by snapshots and logged.", "source", "table")
SNAPSHOT_CHUNK_SECONDS = _histogram(
    "cdc_snapshot_chunk_seconds", "Time of one chunk, from its snapshot to its append.", "source"
)

RUNS = _counter("cdc_runs", "Runs of a periodic source by outcome (done, failed).", "source", "outcome")
RUN_SECONDS = _histogram(
    "cdc_run_seconds", "Time of one run of a periodic source, from its snapshot to the log.", "source"
)

# Lake
LANDED_ROWS = _counter("cdc_landed_rows", "Rows committed to changelogs.", "source", "table")
LANDED_BYTES = _counter("cdc_landed_bytes", "Bytes of Parquet committed to changelogs.", "source")
LATE_ROWS = _counter(
    "cdc_late_rows",
    "Changes landed in a partition whose period had ended when they were committed.",
    "source",
    "table",
)
LATENESS = CountedHistogram(
    "cdc_lateness_seconds", "Commit time less event time of changes landed.", "source", "table", bounds=LATENESS_SECONDS
)
UNDATED_ROWS = _counter(
    "cdc_undated_rows", "Rows landed without the time that their table is partitioned by.", "source", "table"
)
LAND_SECONDS = _histogram("cdc_land_seconds", "Time of one landing of a table.", "source")
UNMERGED_ROWS = _gauge(
    "cdc_unmerged_rows", "Rows that landed since the start and are not in current yet.", "source", "table"
)
MERGED_ROWS = _counter("cdc_merged_rows", "Rows written to or deleted from current tables.", "source", "table")
COMPACTED_OBJECTS = _counter("cdc_compacted_objects", "Small objects of changelogs that were joined into bigger ones.")
EXPIRED_OBJECTS = _counter("cdc_expired_objects", "Objects of changelogs that retention has let go.")
COOLED_OBJECTS = _counter("cdc_cooled_objects", "Objects of changelogs that were put into a colder class of storage.")
VACUUMED_OBJECTS = _counter("cdc_vacuumed_objects", "Objects removed because no version shows them any more.")
FOLLOWED_ROWS = _counter(
    "cdc_followed_rows",
    "Rows of changelogs written in another form (files), or registered (iceberg).",
    "source",
    "form",
    "table",
)
FOLLOWER_LAG_SECONDS = _gauge(
    "cdc_follower_lag_seconds",
    "Time since a follower last found nothing to read in its changelog.",
    "source",
    "form",
    "table",
)
MERGE_SECONDS = _histogram("cdc_merge_seconds", "Time of one merge of a table.", "source")
TABLES = _gauge("cdc_tables", "Tables by state (new, snapshotting, streaming, stopped, removed).", "source", "state")

# Verify in the background
VERIFY_RUNS = _counter(
    "cdc_verify_runs", "Comparisons of tables (equal, different, not fully compared, failed).", "source", "outcome"
)
VERIFY_TIME_SECONDS = _gauge(
    "cdc_verify_time_seconds", "When a table was last compared (Unix time).", "source", "table"
)
VERIFY_SECONDS = _gauge("cdc_verify_seconds", "Time that the last comparison took, pauses included.", "source", "table")
VERIFY_ROWS = _gauge("cdc_verify_rows", "Rows that the last comparison looked at.", "source", "table")
VERIFY_DIFFERENT_ROWS = _gauge(
    "cdc_verify_different_rows", "Rows that differed in the last comparison, by kind.", "source", "table", "kind"
)
VERIFY_NOT_COMPARED = _gauge(
    "cdc_verify_not_compared", "Keys that changed too often to be compared.", "source", "table"
)

# Models and syncs
MODEL_RUNS = _counter("cdc_model_runs", "Runs of models by outcome.", "model", "outcome")
MODEL_SECONDS = _histogram("cdc_model_seconds", "Time of one run of a model.", "model")
SYNC_RUNS = _counter("cdc_sync_runs", "Runs of syncs by outcome.", "sync", "outcome")
SYNC_ROWS = _counter(
    "cdc_sync_rows",
    "Rows of syncs by outcome (written, deleted, rejected, absent, held, unchanged).",
    "sync",
    "outcome",
)
SYNC_HELD = _gauge("cdc_sync_held", "1 while a plan of the sync waits for approval.", "sync")
SYNC_SECONDS = _histogram("cdc_sync_seconds", "Time of one run of a sync.", "sync")

# The process
STAGE_SECONDS = _counter(
    "cdc_stage_seconds", "Time spent working (receive, decode, log, land, merge, upkeep, sync).", "stage"
)
ERRORS = _counter("cdc_errors", "Errors by the part that met them and their class.", "part", "error")
RESTARTS = _counter("cdc_restarts", "Restarts of a part after an error.", "part")

_tables: set[tuple[str, str]] = set()
_columns: set[tuple[str, str, str]] = set()
_tables_lock = threading.Lock()


def table_label(source: str, table: object) -> str:
    """The label of a table: its name, or `(other)` for tables beyond TABLES_MAX. Thread-safe."""
    name = str(table)
    pair = (source, name)
    if pair in _tables:
        return name
    with _tables_lock:
        if len(_tables) >= TABLES_MAX:
            return OTHER
        _tables.add(pair)
    return name


def count_kept_as_text(source: str, table: object, columns: Mapping[str, int]) -> None:
    """Add values that are kept as text, by column; columns beyond COLUMNS_MAX are counted under `(other)`.
    Thread-safe."""
    for name, count in columns.items():
        label = table_label(source, table)
        series = (source, label, name)
        with _tables_lock:
            if label == OTHER or (series not in _columns and len(_columns) >= COLUMNS_MAX):
                series = (source, label, OTHER)
            else:
                _columns.add(series)
        VALUES_KEPT_AS_TEXT.labels(*series).inc(count)


Health = Callable[[], Mapping[str, Any]]
"""Answers at once, from memory; `ok` (bool) decides between 200 and 503, the rest is shown."""


def split_address(listen: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


class MetricsServer:
    """Serves `/metrics` and `/health` from daemon threads, at most `THREADS_MAX` at a time."""

    THREADS_MAX: ClassVar[int] = 8

    def __init__(self, listen: str, health: Health) -> None:
        """Bind `host:port` (port 0: any; "": serve nothing). ConfigError if the address is not to be had."""
        self._server: _Server | None = None
        if not listen:
            return
        host, port = split_address(listen)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server_class = type("_Family", (_Server,), {"address_family": family})
        try:
            self._server = server_class((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"cannot listen on metrics_listen {listen}: {reason}", hint="choose another address, or port 0"
            ) from error
        self._server.health = health
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="metrics", daemon=True)

    @property
    def address(self) -> str:
        """`host:port` that is really bound; empty if none is."""
        if self._server is None:
            return ""
        host, port = self._server.server_address[:2]
        name = host if isinstance(host, str) else host.decode()
        return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"

    def start(self) -> str:
        """Begin serving; returns `address`."""
        if self._server is not None:
            self._thread.start()
            _log.info("metrics and health", extra={"listen": self.address})
        return self.address

    def stop(self) -> None:
        """Stop serving and free the port; bounded, idempotent."""
        if self._server is None:
            return
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(timeout=5)
        self._server.server_close()


class _Server(HTTPServer):
    """One thread per connection, bounded; a connection beyond the bound is closed at once."""

    allow_reuse_address = True
    request_queue_size = 16
    health: Health

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._slots = threading.BoundedSemaphore(MetricsServer.THREADS_MAX)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Without the look-up of our own name that HTTPServer does: it can hang."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "cdc", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        threading.Thread(
            target=self._answer, args=(request, client_address), name="metrics-answer", daemon=True
        ).start()

    def _answer(self, request: Any, client_address: Any) -> None:
        try:
            request.settimeout(5)
            self.finish_request(request, client_address)
        except OSError as error:
            _log.debug("metrics connection ended early", extra={"reason": str(error)})
        finally:
            self.shutdown_request(request)
            self._slots.release()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 5

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._reply(200, CONTENT_TYPE_LATEST, generate_latest(REGISTRY))
        elif path == "/health":
            health = self._health()
            self._reply(200 if health.get("ok") else 503, "application/json", json.dumps(health, default=str).encode())
        else:
            self._reply(404, "text/plain; charset=utf-8", b"/metrics and /health are here\n")

    do_HEAD = do_GET

    def _health(self) -> Mapping[str, Any]:
        try:
            return self.server.health()
        except Exception as error:  # noqa: BLE001 - who cannot say how it is, is not well; and the asker needs an answer
            return {"ok": False, "error": type(error).__name__}

    def _reply(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "cdc"

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug("http %s", format % args)
