"""The recipes of docs/targets.md, read as they stand there, against fakes that answer in each service's own form."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cdc.config import Config
from cdc.config_file import parse
from cdc.errors import TargetRejected
from cdc.lake.ledger import LakeLedger
from cdc.sink import ACKS, DELETE, INSERT, Assignment, Batch, PushResult
from connectors.http.target import HttpTarget
from connectors.local.store import LocalStore
from tests.support.http_target import HttpTargetServer, Reply, Request

PAGE = (Path(__file__).parents[2] / "docs" / "targets.md").read_text()
RECIPES: list[str] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
AROUND = {
    "state_dir": "/var/lib/cdc",
    "source": {"shop": {"type": "postgres", "dsn": "postgresql://cdc@localhost/shop"}},
    "lake": {"url": "file:///srv/lake"},
    "model": {"customer_value": {"sql": "select 1 as customer_id, 2 as value", "key": ["customer_id"]}},
}
COLUMNS = ("customer_id", "name", "value")
"""Of the recipes that delete."""
SECRETS = ("BILLING_AUTHORIZATION", "HUBSPOT_AUTHORIZATION", "SALESFORCE_AUTHORIZATION", "SLACK_AUTHORIZATION")


def recipe(sync: str) -> Config:
    (text,) = (text for text in RECIPES if f"[sync.{sync}]" in text)
    return parse({**AROUND, **tomllib.loads(text)})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PushResult]:
    """Push rows as the recipe says, to this service instead of the real one."""
    for name in SECRETS:
        monkeypatch.setenv(name, "Bearer token")
    monkeypatch.setenv("SLACK_HOOK", "T0/B0/x")
    (tmp_path / "hook").write_text("token\n")

    def run(name: str, server: HttpTargetServer, rows: dict[str, list[Any]], action: str = INSERT) -> PushResult:
        config = recipe(name)
        sync = config.syncs[name]
        target = config.targets[sync.target]
        secrets = {k: v.replace("/run/credentials/cdc", str(tmp_path)) for k, v in target.secret_headers.items()}
        path = "/" + target.url.split("/", 3)[3] if target.url.count("/") > 2 else ""
        target = replace(target, url=server.url + path, allow_private=True, secret_headers=secrets,
                         requests_per_s=0.0, retry_for_s=0.3, request_timeout_s=5.0)  # fmt: skip
        to = Assignment(
            sync=name, table="", key=sync.key, mode=sync.mode, columns=COLUMNS if action == DELETE else tuple(rows),
            request=sync.request, delete_request=sync.delete_request,
        )  # fmt: skip
        keys = [f'["{k}"]' for k in rows[sync.key[0]]]
        digests = ["" if action == DELETE else "d"] * len(keys)
        acks = pa.table({"key": keys, "digest": digests, "version": [0] * len(keys)}, schema=ACKS)
        sink = HttpTarget(target, partial(LakeLedger, LocalStore(tmp_path / "lake")))
        try:
            assert [f for f in sink.check(to) if f.severity == "error"] == []
            (result,) = sink.push([Batch(assignment=to, action=action, rows=pa.table(rows), acks=acks)])
            return result
        finally:
            sink.close()

    return run


def test_every_recipe_is_a_configuration() -> None:
    assert len(RECIPES) == 6
    for text in RECIPES:
        config = parse({**AROUND, **tomllib.loads(text)})
        assert len(config.targets) == len(config.syncs) == 1


def test_the_first_target(run: Callable[..., PushResult]) -> None:
    with HttpTargetServer(answers=lambda request: Reply(204 if "/7/" in request.path else 404, {})) as server:
        result = run("scores", server, {"customer_id": [7, 8], "value": [1.5, 2.5]})
        sent = {r.path: r.json for r in server.requests}
    assert sent["/api/customers/7/score"] == {"value": 1.5, "note": "customer 7"}
    assert (result.written, [r.reason for r in result.rejected]) == (1, ["status 404"])


def test_a_webhook(run: Callable[..., PushResult]) -> None:
    def hook(request: Request) -> Reply:
        assert request.headers["x-token"] == "token"
        assert request.headers["idempotency-key"]
        if request.json["id"] == 2:
            return Reply(200, {"accepted": False, "error": "no such segment"})
        return Reply(200, {"accepted": True})

    with HttpTargetServer(answers=hook) as server:
        rows = {"customer_id": [1, 2], "name": ["a", "b"], "value": [1, 2]}
        result = run("webhook", server, rows)
        assert [r.reason for r in result.rejected] == ["status 200: no such segment"]
        assert run("webhook", server, {"customer_id": ["1"]}, DELETE).written == 1
        assert server.requests[-1].json == {"event": "delete", "id": "1"}


class HubSpot:
    """Batch upsert of contacts: takes the good ones; what it says of bad ones is in no order, or one error for all."""

    def __init__(self, refuses_whole: bool) -> None:
        self.contacts: dict[str, Any] = {}
        self._refuses_whole = refuses_whole

    def __call__(self, request: Request) -> Reply:
        if request.path != "/crm/v3/objects/contacts/batch/upsert":
            return Reply(404, {"status": "error", "message": "not found"})
        if request.headers.get("authorization") != "Bearer token":
            return Reply(401, {"status": "error", "category": "INVALID_AUTHENTICATION"})
        inputs = request.json["inputs"]
        assert 0 < len(inputs) <= 100
        assert all(isinstance(v, str | None) for i in inputs for v in i["properties"].values())
        bad = [i for i in inputs if "@" not in i["properties"]["email"]]
        if bad and self._refuses_whole:
            return Reply(
                400, {"status": "error", "message": "Property values were not valid", "category": "VALIDATION_ERROR"}
            )
        for each in inputs:
            if each not in bad:
                self.contacts[each["id"]] = each["properties"]
        results = [{"id": "9", "properties": i["properties"], "new": True} for i in inputs[::-1] if i not in bad]
        answer = {"status": "COMPLETE", "results": results, "startedAt": "", "completedAt": ""}
        if not bad:
            return Reply(200, answer)
        errors = [{"status": "error", "category": "VALIDATION_ERROR", "message": "Email address is invalid",
                   "context": {"objectWriteTraceId": [i["objectWriteTraceId"] for i in bad]}}]  # fmt: skip
        return Reply(207, {**answer, "numErrors": len(bad), "errors": errors})


@pytest.mark.parametrize("refuses_whole", [True, False])
def test_hubspot(refuses_whole: bool, run: Callable[..., PushResult], monkeypatch: pytest.MonkeyPatch) -> None:
    hubspot = HubSpot(refuses_whole)
    emails = ["nobody" if i in (5, 130) else f"{i}@example.com" for i in range(150)]
    rows = {"customer_id": [str(i) for i in range(150)], "email": emails, "value": ["1.5"] * 150}
    with HttpTargetServer(answers=hubspot) as server:
        result = run("hubspot_contacts", server, rows)
        assert sorted(r.key for r in result.rejected) == ['["130"]', '["5"]']
        reason = "Property values were not valid" if refuses_whole else "Email address is invalid"
        assert {r.reason.partition(": ")[2] for r in result.rejected} == {reason}
        assert result.written == 148
        assert len(hubspot.contacts) == 148
        assert hubspot.contacts["7"] == {"customer_id": "7", "email": "7@example.com", "lifetime_value": "1.5"}
        monkeypatch.setenv("HUBSPOT_AUTHORIZATION", "Bearer expired")
        assert isinstance(run("hubspot_contacts", server, rows).error, TargetRejected)


class Salesforce:
    """sObject Collections, upsert by external id, and deletes by external id."""

    def __init__(self) -> None:
        self.accounts: dict[str, Any] = {}
        self.cuts = False

    def __call__(self, request: Request) -> Reply:
        data = "/services/data/v62.0"
        if request.path.startswith(f"{data}/sobjects/Account/Customer_Id__c/"):
            known = self.accounts.pop(request.path.rpartition("/")[2], None)
            missing = [{"errorCode": "NOT_FOUND", "message": "The requested resource does not exist"}]
            return Reply(204 if known else 404, None if known else missing)
        assert (request.method, request.path) == ("PATCH", f"{data}/composite/sobjects/Account/Customer_Id__c")
        assert request.json["allOrNone"] is False
        outcomes = []
        for record in request.json["records"]:
            assert record["attributes"] == {"type": "Account"}
            if not record["Name"]:
                error = {"statusCode": "REQUIRED_FIELD_MISSING", "message": "Required fields are missing: [Name]",
                         "fields": ["Name"]}  # fmt: skip
                outcomes.append({"success": False, "errors": [error]})
                continue
            created = record["Customer_Id__c"] not in self.accounts
            self.accounts[record["Customer_Id__c"]] = record["Name"]
            outcomes.append({"id": "001", "success": True, "errors": [], "created": created})
        return Reply(200, outcomes[:-1] if self.cuts else outcomes)


def test_salesforce(run: Callable[..., PushResult]) -> None:
    salesforce = Salesforce()
    names = [None if i == 250 else f"name {i}" for i in range(300)]
    rows = {"customer_id": [str(i) for i in range(300)], "name": names, "value": [1.5] * 300}
    with HttpTargetServer(answers=salesforce) as server:
        result = run("salesforce_accounts", server, rows)
        assert [(r.key, r.reason) for r in result.rejected] == [('["250"]', "status 200: REQUIRED_FIELD_MISSING")]
        assert (result.written, len(salesforce.accounts), server.count) == (299, 299, 2)
        result = run("salesforce_accounts", server, {"customer_id": ["1", "2", "999"]}, DELETE)
        assert (result.written, len(salesforce.accounts)) == (3, 297)
        salesforce.cuts = True
        result = run("salesforce_accounts", server, rows)
        assert isinstance(result.error, TargetRejected)
        assert result.written == 0


def test_slack(run: Callable[..., PushResult]) -> None:
    posted: list[str] = []

    def slack(request: Request) -> Reply:
        assert "idempotency-key" not in request.headers
        if request.path == "/services/T0/B0/x":
            posted.append(request.json["text"])
            return Reply(200, b"ok") if len(posted) < 3 else Reply(400, b"no_text")
        assert request.path == "/api/chat.postMessage"
        if request.json["text"].startswith("Order 2:"):
            return Reply(200, {"ok": False, "error": "msg_too_long"})
        posted.append(request.json["text"])
        return Reply(200, {"ok": True, "channel": request.json["channel"], "ts": "1.2"})

    rows = {"order_id": [1, 2], "amount": [12000, 13000]}
    with HttpTargetServer(answers=slack) as server:
        server.next_faults = ["429:0"]
        result = run("slack_messages", server, rows)
        assert (result.written, [r.reason for r in result.rejected]) == (1, ["status 200: msg_too_long"])
        assert posted == ["Order 1: 12000"]
        result = run("slack_hook_messages", server, rows)
        assert (result.written, [r.reason for r in result.rejected]) == (1, ["status 400"])
        assert posted[1:] == ["Order 1: 12000", "Order 2: 13000"]
