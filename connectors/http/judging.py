"""What an answer says about the rows of its request.

The status comes first. 2xx: taken, unless `ok` says otherwise of the answer or of its `items`. 408, 425, 429 and 5xx:
the same later. 401, 403, 405 and the like, a redirect, and 404 or 410 at an address that is the same for all rows: the
whole sync is wrong. 404 or 410 at a row's own address: the target has no such row. Every other 4xx is about the rows.

Only a clear yes is one: an answer without the outcomes that the configuration promises, or with another number of them,
or `ok` that is neither true nor false, says nothing about the rows; they were not taken, and not refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import jmespath
import orjson
from jmespath.exceptions import JMESPathError

from cdc.config_serving import RequestConfig
from cdc.errors import TargetRejected
from cdc.sink import DELETE
from connectors.http.client import Answer
from connectors.http.values import to_text

TAKEN, REJECTED, ABSENT, UNKNOWN = "taken", "rejected", "absent", "unknown"
REASON_MAX: Final = 200
_LATER: Final = frozenset({408, 425, 429})
_UNHEEDED: Final = frozenset({425, 429})
"""Of these it is clear that nothing was done."""
_OPERATORS: Final = frozenset({401, 403, 405, 406, 407, 411, 415, 426, 501, 505})
_GONE: Final = frozenset({404, 410})
_HINTS: Final = {
    401: "correct the secret that secret_headers refers to",
    403: "give the account of secret_headers the right to do this",
    404: "correct url and path",
    405: "correct method and path",
    415: "set the Content-Type that it wants in headers",
}


class Again(Exception):
    """The same request may go through later."""

    def __init__(self, what: str, after_s: float = 0.0, *, had_effect: bool = False) -> None:
        super().__init__(what)
        self.after_s = after_s
        """What the target asks to wait."""
        self.had_effect = had_effect
        """Whether the request may have had its effect."""


class Refused(Exception):
    """The request was refused for a row in it. The text is the reason."""

    def __init__(self, reason: str, *, in_part: bool = False) -> None:
        super().__init__(reason)
        self.in_part = in_part
        """Whether other rows of it may have been taken."""


@dataclass(frozen=True, slots=True)
class Outcome:
    kind: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The outcomes of a request's rows, in their order. `error`: why some are unknown."""

    outcomes: list[Outcome]
    error: TargetRejected | None = None


class Judge:
    """Judges answers to requests of one configuration. Thread-safe."""

    def __init__(self, target: str, request: RequestConfig, *, action: str, mode: str, addresses_rows: bool) -> None:
        self._where = f"target {target}"
        self._several = request.rows_per_request > 1
        self._gone = TAKEN if action == DELETE else ABSENT if mode == "update" else REJECTED
        self._addresses_rows = addresses_rows and not self._several
        self.problems: list[str] = []
        """What is wrong with the expressions, each as `key: words`."""
        self._ok, self._items, self._reason = (self._compiled(n, request) for n in ("ok", "items", "reason"))
        if self._items and not self._ok:
            self.problems.append("items: needs ok, which says of each of them whether it was accepted")

    def __call__(self, answer: Answer, rows: int) -> Judgement:
        """What became of the `rows` of the request. Again, Refused, or TargetRejected if only an operator can mend
        it."""
        status = answer.status
        if 200 <= status < 300:
            return self._success(answer, rows)
        if status in _LATER or (500 <= status < 600 and status not in _OPERATORS):
            raise Again(f"status {status}", _retry_after_s(answer), had_effect=status not in _UNHEEDED)
        if status in _GONE and self._addresses_rows:
            return Judgement([Outcome(self._gone, self._told(status, _json(answer)))] * rows)
        if status in _OPERATORS or status in _GONE or not 400 <= status < 500:
            raise TargetRejected(
                f"{self._where}: answers with status {status}",
                hint=_HINTS.get(status, "compare the request of the sync with what the target expects"),
            )
        raise Refused(self._told(status, _json(answer)))

    def _success(self, answer: Answer, rows: int) -> Judgement:
        if not self._ok:
            if answer.status == 207:
                return self._unclear(rows, "answers with status 207, outcomes that differ", "set items and ok, or ok")
            return Judgement([Outcome(TAKEN)] * rows)
        content = _json(answer)
        if content is _NO_JSON:
            raise Again("an answer that is not JSON", had_effect=True)
        if not (self._items and self._several):
            said = self._evaluated(self._ok, content)
            if said is True:
                return Judgement([Outcome(TAKEN)] * rows)
            if said is False:
                raise Refused(self._told(answer.status, content), in_part=rows > 1)
            return self._unclear(rows, "ok is neither true nor false of an answer", "compare ok with what it answers")
        items = self._evaluated(self._items, content)
        if not isinstance(items, list) or len(items) != rows:
            many = f"{len(items)} outcomes" if isinstance(items, list) else "no list"
            return self._unclear(rows, f"items gives {many} for {rows} rows", "compare items with what it answers")
        outcomes = [self._outcome(answer.status, item) for item in items]
        if any(outcome.kind == UNKNOWN for outcome in outcomes):
            return Judgement(outcomes, self._mistake("ok is neither true nor false of one of items",
                                                     "compare ok with what it answers"))  # fmt: skip
        return Judgement(outcomes)

    def _outcome(self, status: int, item: Any) -> Outcome:
        said = self._evaluated(self._ok, item)
        if said is True:
            return Outcome(TAKEN)
        return Outcome(REJECTED, self._told(status, item)) if said is False else Outcome(UNKNOWN)

    def _unclear(self, rows: int, what: str, hint: str) -> Judgement:
        return Judgement([Outcome(UNKNOWN)] * rows, self._mistake(what, hint))

    def _mistake(self, what: str, hint: str) -> TargetRejected:
        return TargetRejected(f"{self._where}: {what}; the rows count as not sent", hint=hint)

    def _told(self, status: int, content: Any) -> str:
        """For the row log: the status, and what `reason` finds, if anything."""
        found = self._evaluated(self._reason, content) if self._reason and content is not _NO_JSON else None
        try:
            said = "" if found is None else to_text(found)
        except (TypeError, ValueError, RecursionError):
            said = ""  # a number of a thousand digits, a list in a list in a list …
        text = re.sub(r"[\x00-\x1f\x7f\s]+", " ", said).strip()
        return f"status {status}: {text[:REASON_MAX]}" if text else f"status {status}"

    def _evaluated(self, expression: Callable[[Any], Any] | None, content: Any) -> Any:
        try:
            return None if expression is None else expression(content)
        except Exception:  # noqa: BLE001 - a server's content over which a function fails, in whatever way, says nothing
            return None

    def _compiled(self, name: str, request: RequestConfig) -> Callable[[Any], Any] | None:
        text = getattr(request, name)
        if not text:
            return None
        try:
            return jmespath.compile(text).search
        except JMESPathError as e:
            self.problems.append(f"{name}: is no JMESPath expression: {' '.join(str(e).split())[:200]}")
            return None


_NO_JSON: Final = object()


def _json(answer: Answer) -> Any:
    try:
        return orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        return _NO_JSON


def _retry_after_s(answer: Answer) -> float:
    """What Retry-After asks for, as seconds or as a date; 0 if nothing that we understand."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        when = parsedate_to_datetime(text)
        when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
        return max(0.0, (when - datetime.now(UTC)).total_seconds())
    except Exception:  # noqa: BLE001 - email.utils names no errors; a zone of 10^14 hours is an OverflowError
        return 0.0


__all__ = ["ABSENT", "REJECTED", "TAKEN", "UNKNOWN", "Again", "Judge", "Judgement", "Outcome", "Refused"]
