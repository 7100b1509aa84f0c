"""A store that fails, falls silent, answers late or not at all: what was promised holds, and nobody is needed.

A proxy stands between us and the store, so that deltalake's own client meets the same faults.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pytest

from cdc.errors import InvariantBroken, LeaseLost, StoreConflict, StoreUnavailable
from cdc.lake.anchor import Anchor, AnchorState
from cdc.lake.delta import DeltaLog
from cdc.lake.lease import Lease
from connectors.s3 import store as s3
from connectors.s3.store import S3Store
from tests.support.buckets import new_bucket, s3_endpoint
from tests.support.store_proxy import StoreProxy
from tests.support.waiting import wait_until

SCHEMA = pa.schema([pa.field("n", pa.int64())])
COMMIT = r"_delta_log/\d{20}\.json$"


@pytest.fixture
def proxy() -> Iterator[StoreProxy]:
    with StoreProxy(s3_endpoint()) as proxy:
        yield proxy


def through(proxy: StoreProxy, bucket: str = "") -> S3Store:
    return S3Store(bucket or new_bucket(), "lake", {"endpoint_url": proxy.endpoint})


def test_a_commit_that_happened_without_an_answer_is_known_as_ours_and_made_once(proxy: StoreProxy) -> None:
    delta = DeltaLog(through(proxy), "t")
    made = proxy.fault("lost", "PUT", COMMIT)
    delta.open_or_create(SCHEMA)
    by_deltalake = proxy.fault("lost", "PUT", COMMIT)
    assert delta.commit(tokens={"n": 1}) == 1
    by_us = proxy.fault("lost", "PUT", COMMIT)
    assert delta.commit(tokens={"n": 2}, schema=pa.schema([*SCHEMA, pa.field("m", pa.int64())])) == 2
    assert [f.hits for f in (made, by_deltalake, by_us)] == [1, 1, 1]
    assert (delta.refresh(), delta.tokens()) == (2, {"n": 2})
    assert delta.commit(tokens={"n": 3}) == 3


def test_a_commit_that_failed_before_it_happened_is_made_once_when_it_is_repeated(proxy: StoreProxy) -> None:
    delta = DeltaLog(through(proxy), "t")
    delta.open_or_create(SCHEMA)
    for n, kind in enumerate(("says", "reset"), 1):
        fault = proxy.fault(kind, "PUT", COMMIT)
        assert delta.commit(tokens={"n": n}) == n
        assert fault.hits == 1


def test_a_commit_that_arrives_when_it_was_given_up_replaces_nothing(proxy: StoreProxy) -> None:
    """Its client has gone away and the next one came; then what was on its way comes to the server after all."""
    bucket = new_bucket()
    slow, quick = DeltaLog(through(proxy, bucket), "t"), DeltaLog(through(proxy, bucket), "t")
    slow.open_or_create(SCHEMA)
    assert quick.refresh() == 0
    held = proxy.fault("held", "PUT", COMMIT)
    late: list[int | Exception] = []

    def commit() -> None:
        try:
            late.append(slow.commit(tokens={"n": 1}, expect={"n": None}))
        except (StoreConflict, StoreUnavailable, InvariantBroken) as e:
            late.append(e)

    writer = threading.Thread(target=commit)
    writer.start()
    wait_until(lambda: held.hits == 1, message="the first commit to be on its way")
    assert quick.commit(tokens={"n": 2}, expect={"n": None}) == 1
    proxy.heal()
    writer.join(60)
    assert isinstance(late[0], StoreConflict)
    assert (quick.refresh(), quick.tokens()) == (1, {"n": 2})


def test_lease_and_anchor_whose_answers_were_lost_are_ours_and_those_of_others_are_not(proxy: StoreProxy) -> None:
    store = through(proxy)
    lease, anchor = Lease(store, "shop", "first"), Anchor(store, "shop")
    state = AnchorState(
        epoch=1, system_id="7", timeline=1, database="d", slot="s", mode="landed", may_confirm_lsn=0x1000
    )
    faults = [proxy.fault("lost", "PUT", "/_cdc/") for _ in range(4)]
    lease.acquire()
    anchor.save(state)
    lease.renew()
    anchor.save(replace(state, may_confirm_lsn=0x2000))
    assert [f.hits for f in faults] == [1] * 4
    lease.check()
    assert Anchor(store, "shop").load() == anchor.state

    held = proxy.fault("held", "PUT", "/_cdc/lease")
    told: list[Exception] = []

    def renew() -> None:
        try:
            lease.renew()
        except LeaseLost as e:
            told.append(e)

    late = threading.Thread(target=renew)
    late.start()
    wait_until(lambda: held.hits == 1, message="a renewal to be on its way")
    other = through(proxy, store._bucket)
    found = other.get("shop/_cdc/lease.json")
    assert found is not None
    other.put("shop/_cdc/lease.json", found[0].replace(lease._id.encode(), b"x" * 32), if_match=found[1])
    proxy.heal()
    late.join(60)
    assert len(told) == 1
    assert not lease.held()


@pytest.mark.parametrize(
    "size", [1000, pytest.param(s3.PART_BYTES * 2 + 1, marks=pytest.mark.slow)], ids=["one request", "parts"]
)
def test_an_upload_that_breaks_off_again_and_again_is_whole_in_the_end(proxy: StoreProxy, size: int) -> None:
    store, data = through(proxy), os.urandom(size)
    faults = [proxy.fault(kind, method, "/data") for kind in ("reset", "lost", "says") for method in ("PUT",)]
    etag = store.put("data", data)
    assert [f.hits for f in faults] == [1, 1, 1]
    assert store.get("data") == (data, etag)
    left = store._client.list_multipart_uploads(Bucket=store._bucket)
    assert left.get("Uploads", []) == []


def test_a_clock_that_is_wrong_is_told_as_such_and_mended_by_setting_it(proxy: StoreProxy) -> None:
    store = through(proxy)
    delta = DeltaLog(store, "t")
    delta.open_or_create(SCHEMA)
    skewed = proxy.fault("says", times=1000, status=403, code="RequestTimeTooSkewed")
    with pytest.raises(StoreUnavailable) as told:
        store.put("data", b"x")
    assert told.value.hint == "set this machine's clock"
    with pytest.raises(StoreUnavailable, match="RequestTimeTooSkewed"):
        delta.commit(tokens={"n": 1})
    assert skewed.hits > 1
    proxy.heal()
    assert delta.commit(tokens={"n": 1}) == 1
