"""What an answer says about the rows: only a clear yes is one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import orjson
import pytest

from cdc.config_serving import RequestConfig
from cdc.errors import TargetRejected
from cdc.sink import DELETE, INSERT, UPDATE
from connectors.http.addresses import is_allowed
from connectors.http.client import Answer
from connectors.http.judging import REASON_MAX, Again, Judge, Outcome, Refused

ITEMS = RequestConfig(rows_per_request=5, item="{k}", items="results", ok="ok", reason="why")


def judged(request: RequestConfig, status: int, content: Any = None, rows: int = 1, **about: Any) -> Any:
    headers = about.pop("headers", {})
    judge = Judge("crm", request, **{"action": INSERT, "mode": "upsert", "addresses_rows": False, **about})
    assert judge.problems == []
    body = content if isinstance(content, bytes) else orjson.dumps(content)
    return judge(Answer(status, headers, body), rows)


def kinds(judgement: Any) -> list[str]:
    return [outcome.kind for outcome in judgement.outcomes]


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_without_ok_the_status_decides(status: int) -> None:
    assert kinds(judged(RequestConfig(), status, b"", rows=1)) == ["taken"]


def test_outcomes_that_differ_are_not_taken_for_one() -> None:
    told = judged(RequestConfig(rows_per_request=3, item="x"), 207, {}, rows=3)
    assert kinds(told) == ["unknown"] * 3
    assert isinstance(told.error, TargetRejected)


@pytest.mark.parametrize(("status", "had_effect"), [(408, True), (425, False), (429, False), (500, True), (503, True)])
def test_what_may_pass_is_tried_again(status: int, had_effect: bool) -> None:
    with pytest.raises(Again) as told:
        judged(RequestConfig(), status)
    assert told.value.had_effect is had_effect


@pytest.mark.parametrize("status", [401, 403, 404, 405, 407, 410, 415, 501, 505, 304, 600])
def test_what_only_an_operator_mends_is_told_with_a_hint(status: int) -> None:
    with pytest.raises(TargetRejected) as told:
        judged(RequestConfig(reason="x"), status, {"x": "hidden"})
    assert told.value.hint
    assert "hidden" not in str(told.value)


@pytest.mark.parametrize("status", [400, 402, 409, 412, 413, 414, 422, 451])
def test_the_rest_is_about_rows(status: int) -> None:
    with pytest.raises(Refused, match=f"^status {status}: too long$"):
        judged(RequestConfig(reason="errors[0].text"), status, {"errors": [{"text": "too\r\nlong"}]})
    with pytest.raises(Refused, match=f"^status {status}$"):
        judged(RequestConfig(reason="errors[0].text"), status, b"<html>")


def test_a_reason_is_bounded() -> None:
    with pytest.raises(Refused) as told:
        judged(RequestConfig(reason="why"), 422, {"why": "x" * 5000})
    assert len(str(told.value)) <= REASON_MAX + 20


@pytest.mark.parametrize(
    ("action", "mode", "kind"),
    [(DELETE, "mirror", "taken"), (UPDATE, "update", "absent"), (UPDATE, "upsert", "rejected")],
)
@pytest.mark.parametrize("status", [404, 410])
def test_a_row_that_is_not_at_its_own_address(action: str, mode: str, kind: str, status: int) -> None:
    assert kinds(judged(RequestConfig(), status, action=action, mode=mode, addresses_rows=True)) == [kind]


@pytest.mark.parametrize(
    ("content", "kind"), [({"ok": True}, "taken"), ({"ok": "true"}, "unknown"), ({"ok": 1}, "unknown"), ({}, "unknown"),
                          ([], "unknown"), ("ok", "unknown"), (None, "unknown")]
)  # fmt: skip
def test_ok_is_true_or_false_and_nothing_else(content: Any, kind: str) -> None:
    told = judged(RequestConfig(ok="ok"), 200, content)
    assert kinds(told) == [kind]
    assert (told.error is None) == (kind == "taken")


def test_ok_that_is_false_refuses_and_what_is_no_json_is_tried_again() -> None:
    with pytest.raises(Refused, match=r"^status 200: no_text$"):
        judged(RequestConfig(ok="ok", reason="error"), 200, {"ok": False, "error": "no_text"})
    for body in (b"", b'{"ok": tru', b"<html>"):
        with pytest.raises(Again) as told:
            judged(RequestConfig(ok="ok"), 200, body)
        assert told.value.had_effect


def test_items_tell_of_each_row_in_order() -> None:
    told = judged(ITEMS, 200, {"results": [{"ok": True}, {"ok": False, "why": "b"}, {"ok": True}]}, rows=3)
    assert told.outcomes == [Outcome("taken"), Outcome("rejected", "status 200: b"), Outcome("taken")]
    assert told.error is None


@pytest.mark.parametrize(
    "results",
    [None, [], [{"ok": True}], [{"ok": True}] * 3, {"ok": True}, "ok", [{"ok": True}, {}], [{"ok": True}, None]],
)
def test_items_that_do_not_fit_are_no_success(results: Any) -> None:
    told = judged(ITEMS, 200, {"results": results}, rows=2)
    assert "unknown" in kinds(told)
    assert "rejected" not in kinds(told)
    assert isinstance(told.error, TargetRejected)


def test_expressions_that_are_none_are_found_before_the_first_row() -> None:
    judge = Judge("crm", RequestConfig(ok="a ==", reason="[", rows_per_request=2, item="x", items="r"),
                  action=INSERT, mode="upsert", addresses_rows=False)  # fmt: skip
    assert [p.split(":")[0] for p in judge.problems] == ["ok", "reason", "items"]
    # A function that does not take what is there says nothing.
    assert kinds(judged(RequestConfig(ok="contains(a, 'b')"), 200, {"a": 1})) == ["unknown"]


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0, 0),
        ("nonsense", 0, 0),
        ("-5", 0, 0),
        ("99999999999999999999", 1e8, 1e9),
        (600, 550, 601),
        (-86_400, 0, 0),
    ],
)
def test_retry_after_is_understood_as_seconds_and_as_a_date(text: str | int, least: float, most: float) -> None:
    if isinstance(text, int):
        text = format_datetime(datetime.now(UTC) + timedelta(seconds=text), usegmt=True)
    with pytest.raises(Again) as told:
        judged(RequestConfig(), 429, headers={"Retry-After": text})
    assert least <= told.value.after_s <= most


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%lo", "fd00::1", "ff02::1", "::ffff:127.0.0.1",
     "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::", "2002:a00:1::1", "2001:db8::1", "fec0::1", "192.0.0.8",
     "192.0.0.200", "192.88.99.1", "198.18.0.1", "3fff::1", "5f00::1", "::127.0.0.1", "::ffff:0:7f00:1",
     "2001:0:7f00:1::", "100::1", "::ffff:192.0.0.200"],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert not is_allowed(address, allow_private=False)


def test_public_addresses_are_allowed_and_private_ones_where_that_is_meant() -> None:
    for address in ("93.184.215.14", "192.0.1.1", "2606:2800:21f:cb07::1", "::ffff:93.184.215.14"):
        assert is_allowed(address, allow_private=False)
    for address in ("127.0.0.1", "10.1.2.3", "::1", "fd00::1", "fec0::1", "::ffff:10.0.0.1"):
        assert is_allowed(address, allow_private=True)
    for address in ("224.0.0.1", "0.0.0.0", "ff02::1", "::"):
        assert not is_allowed(address, allow_private=True)
