"""Metrics, health, logging and the service manager's notices: what leaves the daemon besides data."""

from __future__ import annotations

import io
import json
import logging
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from cdc import logs, metrics
from cdc.errors import ConfigError
from cdc.metrics import MetricsServer
from cdc.notify import Notifier

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture
def health() -> dict[str, object]:
    return {"ok": True, "phase": "streaming"}


@pytest.fixture
def server(health: dict[str, object]) -> Iterator[MetricsServer]:
    running = MetricsServer("127.0.0.1:0", lambda: health)
    running.start()
    yield running
    running.stop()


def get(server: MetricsServer, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{server.address}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_counter_shows_up_in_the_text_that_prometheus_reads(server: MetricsServer) -> None:
    metrics.RECEIVED_BYTES.labels("test_shop").inc(42)
    code, text = get(server, "/metrics")
    samples = {
        s.name: s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.labels.get("source") == "test_shop"
    }
    assert code == 200
    assert samples["cdc_received_bytes_total"] == 42


def test_health_answers_200_and_503(server: MetricsServer, health: dict[str, object]) -> None:
    code, text = get(server, "/health")
    assert (code, json.loads(text)) == (200, {"ok": True, "phase": "streaming"})
    health["ok"] = False
    assert get(server, "/health")[0] == 503
    assert get(server, "/nothing")[0] == 404


def test_silent_connections_do_not_take_all_threads_for_long(server: MetricsServer) -> None:
    host, port = metrics.split_address(server.address)
    silent = [socket.create_connection((host, port), timeout=5) for _ in range(MetricsServer.THREADS_MAX)]
    extra = socket.create_connection((host, port), timeout=5)
    try:
        assert extra.recv(1) == b"", "a connection beyond the bound is closed at once"
        for connection in silent:
            connection.close()
        deadline = threading.Event()
        for _ in range(100):
            try:
                assert get(server, "/health")[0] == 200
                return
            except OSError:
                deadline.wait(0.05)
        pytest.fail("no answer although the silent connections are gone")
    finally:
        extra.close()


def test_stopping_frees_the_port_and_ends_the_thread(health: dict[str, object]) -> None:
    first = MetricsServer("127.0.0.1:0", lambda: health)
    address = first.start()
    first.stop()
    first.stop()
    second = MetricsServer(address, lambda: health)
    assert second.start() == address
    second.stop()
    assert "metrics" not in {thread.name for thread in threading.enumerate()}


def test_a_health_that_cannot_be_told_is_503() -> None:
    broken = MetricsServer("127.0.0.1:0", lambda: {}["nothing"])
    broken.start()
    code, text = get(broken, "/health")
    broken.stop()
    assert (code, json.loads(text)) == (503, {"ok": False, "error": "KeyError"})


def test_no_address_means_no_server() -> None:
    none = MetricsServer("", lambda: {"ok": True})
    assert none.start() == ""
    none.stop()


def test_a_taken_port_is_an_error_of_the_configuration(server: MetricsServer) -> None:
    with pytest.raises(ConfigError, match="cannot listen on metrics_listen"):
        MetricsServer(server.address, lambda: {"ok": True})


Shown = Counter | Gauge | Histogram | Info | metrics.CountedHistogram


def constants() -> list[Shown]:
    return [v for k, v in vars(metrics).items() if k.isupper() and isinstance(v, Shown)]


def shown_name(metric: Shown) -> str:
    told = family(metric)
    return told.name + {"counter": "_total", "info": "_info"}.get(told.type, "")


def family(metric: Shown) -> Metric:
    return next(iter(metric.collect()))


def test_every_metric_is_ours_by_name_and_times_and_sizes_carry_their_unit() -> None:
    assert len(constants()) > 25
    for metric in constants():
        name = family(metric).name
        assert re.fullmatch(r"cdc_[a-z_]+", name)
        if isinstance(metric, Histogram | metrics.CountedHistogram):
            assert name.endswith("_seconds"), name


def test_a_histogram_of_counts_adds_up_as_one_of_values() -> None:
    bounds, values = (1.0, 10.0), [0.5, 1.0, 3.0, 400.0, 0.0]
    wanted = Histogram("x_seconds", "X", ["table"], buckets=bounds, registry=CollectorRegistry())
    counted = metrics.CountedHistogram("y_seconds", "X", "table", bounds=bounds)
    try:
        for value in values:
            wanted.labels("t").observe(value)
        counted.add(("t",), [1, 1, 1], 403.5)
        counted.add(("t",), [2, 0, 0], 1.0)

        def samples(metric: Shown) -> dict[tuple[str, str | None], float]:
            found = family(metric).samples
            return {(s.name[1:], s.labels.get("le")): s.value for s in found if not s.name.endswith("_created")}

        assert samples(counted) == samples(wanted)
    finally:
        metrics.REGISTRY.unregister(counted)


def test_every_metric_is_documented_and_nothing_else_is() -> None:
    documented = set(re.findall(r"^\| `(cdc_\w+)`", DOCS.read_text(), re.MULTILINE))
    assert documented == {shown_name(metric) for metric in constants()}


def test_series_of_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_tables", set())
    monkeypatch.setattr(metrics, "TABLES_MAX", 2)
    assert [metrics.table_label("s", f"public.t{i}") for i in range(4)] == [
        "public.t0",
        "public.t1",
        metrics.OTHER,
        metrics.OTHER,
    ]
    assert metrics.table_label("s", "public.t1") == "public.t1"


def test_series_of_columns_that_keep_text_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_columns", set())
    monkeypatch.setattr(metrics, "COLUMNS_MAX", 2)

    def kept(column: str) -> float:
        return metrics.VALUES_KEPT_AS_TEXT.labels("bounded", "public.t", column)._value.get()

    for _ in range(2):
        metrics.count_kept_as_text("bounded", "public.t", {"a": 3, "b": 1, "c": 5, "d": 7})
    assert [kept(column) for column in ("a", "b", metrics.OTHER)] == [6, 2, 24]


def emit(form: str, message: str, *args: object, **extra: object) -> str:
    out = io.StringIO()
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.configure("debug", form, out)
        logging.getLogger("cdc.test").warning(message, *args, extra=extra)
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        logging.captureWarnings(False)
    return out.getvalue()


def test_json_logs_are_one_object_per_line_with_the_extra_keys() -> None:
    line = emit("auto", "landed %s", "x\ny", rows=3, table="public.orders")
    entry = json.loads(line)
    assert line.count("\n") == 1
    assert (entry["message"], entry["rows"], entry["table"], entry["level"]) == (
        "landed x\ny",
        3,
        "public.orders",
        "warning",
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["ts"])


def test_text_logs_show_the_extra_keys() -> None:
    assert 'landed rows=3 why="a b"' in emit("text", "landed", rows=3, why="a b")


@pytest.mark.parametrize("form", ["json", "text"])
def test_passwords_of_connection_strings_never_reach_a_log(form: str) -> None:
    line = emit(
        form, "failed: %s", "postgresql://u:hunter2@h/d", dsn="host=h password='hunt er2' user=x", b="password=hunter2"
    )
    assert "hunter2" not in line
    assert "er2" not in line
    assert "user=x" in line


def test_the_service_manager_hears_ready_status_watchdog_and_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(5)
        notifier = Notifier(str(tmp_path / "notify"))
        notifier.ready("streaming")
        notifier.watchdog()
        notifier.watchdog()
        notifier.status("2 sources\nup")
        notifier.stopping()
        heard = [manager.recv(4096).decode() for _ in range(4)]
    notifier.close()
    assert heard == ["READY=1\nSTATUS=streaming", "WATCHDOG=1", "STATUS=2 sources up", "STOPPING=1"]
    assert notifier.watchdog_s == 30


def test_without_a_service_manager_every_notice_is_a_no_op(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    quiet = Notifier()
    quiet.ready()
    quiet.close()
    gone = Notifier(str(tmp_path / "gone"))
    gone.ready()
    gone.close()
    gone.ready()
