"""The webhook: told in the background, repeated, never waited for, never with its URL in the log."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cdc import alerts
from cdc.alerts import Alerts
from cdc.config import AlertsConfig
from tests.support.waiting import wait_until


class Hook(ThreadingHTTPServer):
    """A webhook that refuses its first `refusals` requests."""

    daemon_threads = True

    def __init__(self) -> None:
        self.refusals = 0
        self.got: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?token=secret"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        hook = self.server
        assert isinstance(hook, Hook)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hook.refusals -= 1
        refused = hook.refusals >= 0
        if not refused:
            hook.got.append(json.loads(body))  # before the answer, upon which the next one comes
        self.send_response(500 if refused else 204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[Hook]:
    server = Hook()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_alerts_arrive_in_order_though_the_webhook_fails_at_first(hook: Hook) -> None:
    hook.refusals = 2
    told = Alerts(AlertsConfig(webhook=hook.url), threading.Event())
    for n in range(3):
        told.tell({"n": n})
    wait_until(lambda: len(hook.got) == 3)
    told.close()
    assert hook.got == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_what_cannot_be_delivered_is_dropped_without_the_url_in_the_log(
    hook: Hook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(alerts, "TRIES", 2)
    hook.refusals = 2
    told = Alerts(AlertsConfig(webhook=hook.url), threading.Event())
    with caplog.at_level(logging.DEBUG):
        told.tell({"n": 0})
        told.tell({"n": 1})
        wait_until(lambda: hook.got)
    told.close()
    assert hook.got == [{"n": 1}]
    assert "not delivered" in caplog.text
    assert "secret" not in caplog.text


def test_telling_never_waits_for_a_webhook_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "WAITING_MAX", 2)
    stop, hangs = threading.Event(), threading.Event()
    told = Alerts(AlertsConfig(webhook="http://127.0.0.1:1/", webhook_timeout_s=0.1), stop)
    monkeypatch.setattr(told, "_post", lambda alert: hangs.wait(30))
    for n in range(10):
        told.tell({"n": n})  # returns at once, or this test would not end
    hangs.set()
    stop.set()
    told.close()


def test_without_a_webhook_nothing_happens() -> None:
    told = Alerts(AlertsConfig(), threading.Event())
    told.tell({"n": 0})
    told.close()
