"""Pushes a wanted state into the service of tests.support.http_target, as a sync does: plan, push, nothing kept here.

As a program (`python -m tests.support.http_push`, its task as JSON in the environment variable HTTP_PUSH) it pushes
once and ends, so that a test can kill it; exit code 0: everything that was planned was tried.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from cdc.config_serving import RequestConfig, TargetConfig
from cdc.lake import ledger as ledger_module
from cdc.lake.ledger import LakeLedger
from cdc.ports import ObjectStore
from cdc.sink import ACKS, DELETE, INSERT, UPDATE, Assignment, Batch, Ledgers, PushResult
from connectors.http import delivery
from connectors.http.target import HttpTarget
from connectors.local.store import LocalStore
from connectors.s3.store import S3Store

SYNC = "crm"
_ITEM = {"key": "{k}", "value": "{v}", "id": "{cdc.idempotency_key}"}
REQUESTS: Mapping[str, RequestConfig] = {
    "single": RequestConfig(path="/rows", body={"key": "{k}", "value": "{v}"}),
    "told": RequestConfig(path="/rows", body={"key": "{k}", "value": "{v}"}, ok="ok", reason="error"),
    "batch": RequestConfig(path="/batch", body={"inputs": "{items}"}, item=_ITEM, rows_per_request=7,
                           items="outcomes", ok="ok", reason="error"),
    "whole": RequestConfig(path="/whole", body={"inputs": "{items}"}, item=_ITEM, rows_per_request=8),
}  # fmt: skip
"""Ways to push the same rows."""

Planned = tuple[str, str, Any, int]
"""Key, action, value (None: removed), and the key's version before."""


def assignment(way: str, *, mode: str = "mirror") -> Assignment:
    return Assignment(
        sync=SYNC, table="", key=("k",), mode=mode, columns=("k", "v"), request=REQUESTS[way],
        delete_request=RequestConfig(method="DELETE", path="/rows/{k}"),
    )  # fmt: skip


def target(url: str, ledgers: Ledgers, **settings: Any) -> HttpTarget:
    given = {"request_timeout_s": 0.4, "connect_timeout_s": 2.0, "retry_for_s": 1.0, "allow_private": True, **settings}
    return HttpTarget(TargetConfig(name="crm", type="http", url=url, **given), ledgers)


def digest_of(value: Any) -> str:
    return hashlib.md5(json.dumps(value).encode()).hexdigest()


def key_of(name: str) -> str:
    return json.dumps([name])


def planned(acks: pa.Table, wanted: Mapping[str, Any]) -> list[Planned]:
    """The difference between what is acknowledged and what is wanted, deletes first."""
    known = {json.loads(a["key"])[0]: (a["digest"], a["version"]) for a in acks.to_pylist()}
    plan: list[Planned] = [(k, DELETE, None, v) for k, (d, v) in known.items() if d and k not in wanted]
    for k, value in sorted(wanted.items()):
        digest, version = known.get(k, ("", 0))
        if digest != digest_of(value):
            plan.append((k, UPDATE if digest else INSERT, value, version))
    return plan


def batches(to: Assignment, plan: list[Planned], rows_max: int = 40) -> list[Batch]:
    made = []
    for action in (DELETE, UPDATE, INSERT):
        some = [p for p in plan if p[1] == action]
        for start in range(0, len(some), rows_max):
            made.append(_batch(to, action, some[start : start + rows_max]))
    return made


def _batch(to: Assignment, action: str, plan: list[Planned]) -> Batch:
    columns = {"k": pa.array([p[0] for p in plan], pa.string())}
    if action != DELETE:
        columns["v"] = pa.array([p[2] for p in plan], pa.string())
    acks = {
        "key": [key_of(p[0]) for p in plan],
        "digest": ["" if action == DELETE else digest_of(p[2]) for p in plan],
        "version": [p[3] for p in plan],
    }
    return Batch(assignment=to, action=action, rows=pa.table(columns), acks=pa.table(acks, schema=ACKS))


def push(sink: HttpTarget, to: Assignment, wanted: Mapping[str, Any]) -> tuple[list[Planned], list[PushResult]]:
    """One run: what was planned, and what became of it."""
    plan = planned(sink.acknowledged(to).rows, wanted)
    return plan, sink.push(batches(to, plan))


def open_store(lake: str) -> ObjectStore:
    """A directory, or `ENDPOINT BUCKET`."""
    endpoint, _, bucket = lake.partition(" ")
    return S3Store(bucket, "lake", {"endpoint_url": endpoint}) if bucket else LocalStore(Path(lake))


def main() -> int:
    task = json.loads(os.environ["HTTP_PUSH"])
    delivery.WAIT_S = 0.01
    delivery.GROUP_ROWS = task["group_rows"]  # type: ignore[misc]
    ledger_module.LINKS_MAX = task["links_max"]  # type: ignore[misc]
    sink = target(task["url"], partial(LakeLedger, open_store(task["lake"])), in_flight=task["in_flight"])
    _, results = push(sink, assignment(task["way"]), task["wanted"])
    sink.close()
    return 1 if any(result.error is not None for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
