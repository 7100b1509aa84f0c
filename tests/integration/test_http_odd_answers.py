"""Answers that no sane server gives: whatever comes, the rows have an outcome, and nothing else ends."""

from __future__ import annotations

import gzip
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from cdc.config_serving import RequestConfig, TargetConfig
from cdc.errors import CdcError, TargetUnavailable
from cdc.sink import INSERT
from connectors.http import client, delivery
from connectors.http.client import Client, Unanswered
from connectors.http.judging import Again, Judge, Refused
from connectors.http.target import HttpTarget
from tests.support.http_push import assignment, batches
from tests.support.raw_answers import RawServer
from tests.support.targets import MemoryLedgers

JUDGES = [
    Judge("crm", request, action=INSERT, mode="upsert", addresses_rows=False)
    for request in (
        RequestConfig(),
        RequestConfig(ok="ok", reason="error"),
        RequestConfig(ok="sort_by(@, &a)[0] || ceil(to_number(a)) == `1`", reason="@"),
        RequestConfig(ok="ok", items="items", reason="to_string(@)", rows_per_request=2, item="x"),
    )
]
DEEP = b"[" * 900 + b"]" * 900


@pytest.fixture
def server() -> Iterator[RawServer]:
    with RawServer() as running:
        yield running


def config(server: RawServer) -> TargetConfig:
    return TargetConfig(name="crm", type="http", url=server.url, allow_private=True, request_timeout_s=5.0,
                        retry_for_s=0.2)  # fmt: skip


def whole(body: bytes = b"{}", *headers: bytes, status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join([status, *headers, b"Content-Length: %d" % len(body), b"", body])


def outcome(sender: Client) -> str:
    """What became of a request, by the words that are known for it; any other error is a failure of the test."""
    try:
        answer = sender.send("POST", "/x", {}, b"{}")
    except (Unanswered, CdcError) as e:
        return type(e).__name__
    for judge in JUDGES:
        assert judge.problems == []
        try:
            judge(answer, 2)
        except (Again, Refused, CdcError):
            continue
    return "judged"


STATUSES = [b"HTTP/1.1 200 OK", b"HTTP/1.1 429 Later", b"HTTP/1.1 503 x", b"HTTP/1.1 400 x", b"HTTP/1.1 999 x",
            b"HTTP/1.1 99 x", b"HTTP/1.1 -1 x", b"HTTP/1.1 200", b"HTTP/9.9 200 OK", b"HTTP/1.0 204 x", b"ICY 200 OK",
            b"HTTP/1.1 \xb2 x", b"HTTP/1.1 " + b"9" * 5000, b"", b"HTTP/1.1 200 " + b"x" * 70_000, b"HTTP/1.1 304 x",
            b"HTTP/1.1 307 x", b"HTTP/1.1 101 x", b"HTTP/1.1 103 x"]  # fmt: skip
HEADERS = [b"Content-Encoding: gzip", b"Content-Encoding: deflate", b"Content-Encoding: " + b"gzip, " * 40 + b"gzip",
           b"Content-Encoding: \xff", b"Content-Encoding: br, zstd", b"Transfer-Encoding: chunked",
           b"Transfer-Encoding: gzip, chunked", b"Content-Length: -5", b"Content-Length: " + b"9" * 5000,
           b"Content-Length: 3, 4", b"Content-Length: \xb2", b"Content-Type: text/html; charset=\xff\xfe",
           b"Location: //[::1", b"Location: http://x:99999999/\xff", b"Location: /a\tb\x7f c?\xff",
           b"Retry-After: Mon, 01 Jan 2024 00:00:00 +99999999999999", b"Retry-After: " + b"9" * 5000,
           b"Retry-After: Mon, 99 Jan 99999999999999999999 99:99:99 -9999", b"Retry-After: ,,,,", b"Retry-After: (((((",
           b": empty", b"no colon", b" folded", b"X\x00: y", b"X: " + b"y" * 70_000, b"X: y\r\n" * 200 + b"X: y",
           b"Connection: close", b"Connection: \xff", b"Content-Type: multipart/mixed"]  # fmt: skip
BODIES = [b"", b"{}", b'{"ok": tru', b'{"ok":true}', b'{"ok":false,"error":"' + b"9" * 5000 + b'"}', DEEP,
          b'{"ok":false,"error":' + DEEP + b"}", b'[{"a":1},{"a":"x"}]', b'{"a":"1e999"}',
          b'{"items":[{"ok":false,"x":' + DEEP + b'},{"ok":1}]}', gzip.compress(b'{"ok":true}'),
          gzip.compress(b'{"ok":true}')[:-4], b"\x1f\x8bnonsense", b"5\r\nab", b"-5\r\nabcde\r\n0\r\n\r\n",
          b"zz\r\nabc\r\n", b"ffffffffffffffffffff\r\nabc", b"2;x=y\r\n{}\r\n0\r\nX: y\r\n\r\n", b"\xff" * 100, b"NaN",
          b'"\\ud800"']  # fmt: skip


def test_any_bytes_of_a_server_have_an_outcome(server: RawServer, rng: random.Random) -> None:
    sender, found = Client(config(server)), Counter[str]()
    plain = [whole(b"{}", header, status=status) for status in STATUSES for header in HEADERS]
    plain.append(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabcde\r\n0\r\n\r\n")
    for answer in plain:
        server.answer = answer
        found[outcome(sender)] += 1
    for _ in range(600):
        parts = [
            rng.choice(STATUSES[:4] if rng.random() < 0.7 else STATUSES),
            *rng.choices(HEADERS, k=rng.randrange(3)),
        ]
        body = rng.choice(BODIES)
        if rng.random() < 0.5:
            parts.append(b"Content-Length: %d" % len(body))
        mutable = bytearray(b"\r\n".join([*parts, b"", body]))
        for _ in range(rng.choice([0, 0, 1, 5])):
            mutable[rng.randrange(len(mutable))] = rng.randrange(256)
        server.answer = bytes(mutable)
        found[outcome(sender)] += 1
    sender.close()
    assert min(found["judged"], found["Unanswered"]) > 100


@pytest.mark.parametrize(
    ("expression", "body"),
    [("sort_by(@, &a) == `[]`", b'[{"a":1},{"a":"x"}]'), ("ceil(to_number(a)) == `1`", b'{"a":"1e999"}')],
)  # fmt: skip
def test_a_function_that_fails_over_an_answer_says_nothing(expression: str, body: bytes) -> None:
    judge = Judge("crm", RequestConfig(ok=expression, reason="@"), action=INSERT, mode="upsert", addresses_rows=False)
    assert [o.kind for o in judge(client.Answer(200, {}, body), 1).outcomes] == ["unknown"]
    with pytest.raises(Refused, match=r"^status 400$"):
        judge(client.Answer(400, {}, DEEP), 1)


@pytest.mark.parametrize("value", ["Mon, 01 Jan 2024 00:00:00 +99999999999999", "9" * 5000, "(((((", "Mon, 1 Jan"])
def test_an_absurd_wish_to_wait_leaves_the_rows_for_the_next_run(
    value: str, server: RawServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "WAIT_S", 0.01)
    server.answer = whole(b"{}", b"Retry-After: " + value.encode(), status=b"HTTP/1.1 503 x")
    sink = HttpTarget(config(server), MemoryLedgers())
    (result,) = sink.push(batches(assignment("single"), [("a", INSERT, "A", 0)]))
    sink.close()
    assert isinstance(result.error, TargetUnavailable)
    assert (result.written, result.unsent) == (0, ['["a"]'])


HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"


@pytest.mark.parametrize(
    "before", [HINTS, HINTS * 3, b"HTTP/1.1 100 Continue\r\n\r\n" + HINTS, b"HTTP/1.1 102\r\n\r\n"]
)
def test_what_comes_before_the_final_answer_is_none(before: bytes, server: RawServer) -> None:
    server.keeps = True
    sender = Client(config(server))
    for body in (b'{"n":1}', b'{"n":2}'):
        server.answer = before + whole(body, status=b"HTTP/1.1 201 x")
        answer = sender.send("POST", "/x", {}, b"{}")
        assert (answer.status, answer.body) == (201, body)
        assert "Link" not in answer.headers
    sender.close()


def test_hints_without_a_final_answer_end_in_time(server: RawServer) -> None:
    server.keeps, server.answer = True, HINTS
    sender = Client(replace(config(server), request_timeout_s=0.3))
    with pytest.raises(Unanswered, match="in time") as told:
        sender.send("POST", "/x", {}, b"{}")
    assert told.value.sent
    sender.close()
