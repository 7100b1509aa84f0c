"""The ledger of acknowledgements in a bucket whose answers get lost, come late, or are errors."""

from __future__ import annotations

import random

import pytest

from cdc.errors import LedgerConflict, StoreUnavailable
from cdc.lake import ledger as module
from cdc.lake.ledger import LakeLedger
from connectors.s3 import store as s3
from connectors.s3.store import S3Store
from tests.support.buckets import new_bucket, s3_endpoint
from tests.support.ledgers import acks, content
from tests.support.store_proxy import StoreProxy


def test_nothing_is_lost_or_doubled_over_a_bad_line(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINKS_MAX", 4)
    monkeypatch.setattr(s3, "WAIT_S", 0.001)
    bucket = new_bucket()
    with StoreProxy(s3_endpoint(), rng.randrange(1 << 30)) as proxy:
        ledger = LakeLedger(S3Store(bucket, "lake", {"endpoint_url": proxy.endpoint}), "s")
        for kind in ("lost", "says", "reset"):
            proxy.fault(kind, path="/_syncs/", times=1 << 30, share=0.1)
        for i in range(25):
            while True:
                try:
                    ledger.record(acks=acks((f"k{i}", "x", 1), ("each", f"v{i}", i + 1)))
                    break
                except StoreUnavailable:
                    continue
        proxy.heal()
        direct = S3Store(bucket, "lake", {"endpoint_url": s3_endpoint()})
        assert content(LakeLedger(direct, "s")) == {**{f"k{i}": ("x", 1) for i in range(25)}, "each": ("v24", 25)}
        LakeLedger(direct, "s").record(acks=acks(("theirs", "x", 1)))
        with pytest.raises(LedgerConflict):
            ledger.record(acks=acks(("ours", "x", 1)))
        assert len(list(direct.list(""))) <= 14
