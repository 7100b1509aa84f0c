"""What a store in a bucket does when requests fail, are refused for a while, or happen although no answer comes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ConnectionClosedError, ReadTimeoutError
from botocore.response import StreamingBody
from urllib3.exceptions import ProtocolError, SSLError

from cdc.errors import StoreConflict, StoreUnavailable
from cdc.lake.probe import broken_promises
from connectors.s3 import store as s3
from connectors.s3.store import S3Store
from tests.support.buckets import new_bucket, s3_endpoint

Fault = Callable[[Any, Callable[[], Any]], Any]
"""Gets a request and a way to send it; what it returns is the answer."""


class Bucket:
    """A store, and faults for its next requests, one after the other; then all is well again."""

    def __init__(self) -> None:
        self.store = S3Store(new_bucket(), "lake", {"endpoint_url": s3_endpoint()})
        self.faults: list[Fault | None] = []
        self.sent: list[str] = []
        for client in (self.store._client, self.store._quick):
            client.meta.events.register("before-send.s3", self._before_send)
        self._session = self.store._client._endpoint.http_session

    def _before_send(self, request: Any, **_: Any) -> Any:
        self.sent.append(request.method)
        fault = self.faults.pop(0) if self.faults else None
        return None if fault is None else fault(request, lambda: self._session.send(request))


def says(status: int, code: str) -> Fault:
    """The server refuses."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()

    class Raw:
        def stream(self, **_: Any) -> Any:
            yield body

    return lambda request, send: AWSResponse(request.url, status, {"Content-Type": "application/xml"}, Raw())


def is_lost(request: Any, send: Callable[[], Any]) -> Any:
    """The request happens, and its answer never comes."""
    send()
    raise ReadTimeoutError(endpoint_url=request.url)


def is_reset(request: Any, send: Callable[[], Any]) -> Any:
    raise ConnectionClosedError(endpoint_url=request.url)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setattr(s3, "WAIT_S", 0.001)
    return Bucket()


@pytest.mark.parametrize(
    "fault",
    [
        says(503, "SlowDown"),
        says(500, "InternalError"),
        says(429, "TooManyRequests"),
        says(409, "OperationAborted"),
        is_reset,
    ],
    ids=["slow down", "internal", "too many", "aborted", "reset"],
)
def test_what_passes_is_repeated_and_what_stays_is_told(bucket: Bucket, fault: Fault) -> None:
    bucket.faults = [fault] * 3
    etag = bucket.store.put("a", b"one", if_absent=True)
    bucket.faults = [fault] * 3
    assert bucket.store.get("a") == (b"one", etag)
    bucket.faults = [fault] * 3
    assert [o.key for o in bucket.store.list("")] == ["a"]
    bucket.faults = [fault] * 100
    with pytest.raises(StoreUnavailable, match="a in the bucket"):
        bucket.store.put("a", b"two")
    assert 90 < len(bucket.faults) < 100, "a bounded number of times"
    bucket.faults = []
    assert bucket.store.get("a") == (b"one", etag)


@pytest.mark.parametrize("size", [10, s3.PART_BYTES + 1], ids=["small", "big"])
def test_a_conditional_write_whose_answer_was_lost_is_known_as_ours(bucket: Bucket, size: int) -> None:
    data = os.urandom(size)
    bucket.faults = [is_lost]
    etag = bucket.store.put("a", data, if_absent=True)
    assert bucket.store.get("a") == (data, etag)
    more = os.urandom(size)
    bucket.faults = [is_lost]
    newer = bucket.store.put("a", more, if_match=etag)
    assert bucket.store.get("a") == (more, newer)
    assert "POST" not in bucket.sent, "the end of an upload in parts is no place for a condition"


def test_an_upload_in_parts_whose_end_has_no_answer_is_known_as_ours(bucket: Bucket) -> None:
    data = os.urandom(s3.PART_BYTES + 1)
    bucket.faults = [None, None, None, is_lost]
    etag = bucket.store.put("a", data)
    assert bucket.faults == []
    assert bucket.store.get("a") == (data, etag)


def knows_bare_etags_only(request: Any, send: Callable[[], Any]) -> Any:
    """As Ceph's gateway up to version 16 at least: it compares with the etag as it stands in its own index."""
    etag = request.headers.get("If-Match")
    if etag is not None and etag.startswith(b'"'):
        return says(412, "PreconditionFailed")(request, send)
    if etag is not None:
        request.headers["If-Match"] = b'"' + etag + b'"'
    return send()


def test_a_server_that_knows_etags_without_their_quotation_marks_decides_just_the_same(bucket: Bucket) -> None:
    first = bucket.store.put("a", b"1")
    bucket.faults = [knows_bare_etags_only] * 100
    second = bucket.store.put("a", b"2", if_match=first)
    with pytest.raises(StoreConflict):
        bucket.store.put("a", b"3", if_match=first)
    third = bucket.store.put("a", b"4", if_match=second)
    assert bucket.store.get("a") == (b"4", third)
    assert broken_promises(bucket.store) == []


def test_somebody_else_s_write_is_not_taken_for_ours(bucket: Bucket) -> None:
    bucket.store.put("a", b"theirs")
    bucket.faults = [is_reset]
    with pytest.raises(StoreConflict):
        bucket.store.put("a", b"ours", if_absent=True)
    bucket.faults = [says(503, "SlowDown")]
    with pytest.raises(StoreConflict):
        bucket.store.put("a", b"ours", if_match='"00000000000000000000000000000000"')
    found = bucket.store.get("a")
    assert found is not None
    assert found[0] == b"theirs"


def test_equal_bytes_of_another_writer_are_not_ours_either(bucket: Bucket) -> None:
    """Its etag would be the same: two daemons may want to write the same lease."""
    bucket.store.put("a", b"the same")
    bucket.faults = [is_reset]
    with pytest.raises(StoreConflict):
        bucket.store.put("a", b"the same", if_absent=True)


def test_a_body_that_breaks_off_is_read_again_and_a_full_disk_is_told(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(100_000)
    etag = bucket.store.put("a", data)
    real, broken = StreamingBody.read, [SSLError("bad record"), ProtocolError("broken")]

    def breaks_off(body: StreamingBody, amount: int | None = None) -> bytes:
        if broken:
            raise broken.pop()
        return bytes(real(body, amount))

    monkeypatch.setattr(StreamingBody, "read", breaks_off)
    assert bucket.store.get("a") == (data, etag)
    assert broken == []
    with pytest.raises(StoreUnavailable, match="cannot be written: No space left"):
        bucket.store.get("a", into=Path("/dev/full"))


def test_an_upload_in_parts_that_fails_leaves_nothing(bucket: Bucket) -> None:
    bucket.faults = [None, None, *[says(503, "SlowDown")] * 5]
    with pytest.raises(StoreUnavailable):
        bucket.store.put("a", bytes(s3.PART_BYTES + 1))
    assert bucket.store.get("a") is None
    left = bucket.store._client.list_multipart_uploads(Bucket=bucket.store._bucket)
    assert left.get("Uploads", []) == []


@pytest.mark.parametrize(
    ("status", "code", "hint"),
    [
        (403, "AccessDenied", "s3:PutObject"),
        (403, "InvalidAccessKeyId", "not known there"),
        (403, "SignatureDoesNotMatch", "secret key"),
        (400, "ExpiredToken", "renew"),
        (404, "NoSuchBucket", "create the bucket"),
        (501, "NotImplemented", "conditional writes"),
    ],
)
def test_what_no_repetition_mends_is_told_at_once_with_what_does(
    bucket: Bucket, status: int, code: str, hint: str
) -> None:
    bucket.faults = [says(status, code)]
    before = len(bucket.sent)
    with pytest.raises(StoreUnavailable, match=code) as told:
        bucket.store.put("a", b"x", if_absent=True)
    assert hint in told.value.hint
    assert len(bucket.sent) == before + 1
