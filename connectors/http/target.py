"""HTTP as a target of reverse ETL: rows become requests, answers become acknowledgements in a ledger.

Guarantees (docs/targets.md): each row has an idempotency key that only its effect determines (sync, key, action,
content, and how often the key was acknowledged before), so a repetition of what may have happened has the same key, and
A → B → A has three; a row is acknowledged after the target has taken it, never before; only what an answer clearly says
is believed. Secrets are read by reference for each push and are in no message.

`push` tells through PushResult.error why it stopped, and raises only if nothing can be sent at all (templates, secrets,
url). A target over HTTP cannot be read back, so it compares nothing (cdc.sink.Comparing) and has no shape. It does not
order, limit rows, or hold back what should not be written: cdc.sync and the guard do.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pyarrow.compute as pc

from cdc.config_serving import RequestConfig, TargetConfig
from cdc.errors import CdcError, TargetRejected, Verdict
from cdc.ports import Finding
from cdc.sink import ACKS, ADOPT, DELETE, IN_DOUBT, INSERT, Acknowledged, Assignment, Batch, Ledger, Ledgers, PushResult
from connectors.http.client import Client
from connectors.http.delivery import GROUP_ROWS, Delivery, Form, Route, record
from connectors.http.judging import Judge
from connectors.http.pace import Pace
from connectors.http.secrets import read_secret
from connectors.http.template import HEADER_NAME, KEY, OURS, SECRET, RequestTemplate, secret_path


class HttpTarget:
    """The cdc.sink.Sink of `type = "http"`; connects at first use. Used by one thread."""

    def __init__(self, config: TargetConfig, ledgers: Ledgers) -> None:
        self._config = config
        self._where = f"target {config.name}"
        self._ledgers = ledgers
        self._known: dict[str, Ledger] = {}
        self._client: Client | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._pace = Pace(config.requests_per_s)

    # ------------------------------------------------------------------ Sink

    def check(self, assignment: Assignment) -> list[Finding]:
        """Templates, expressions, secrets, and whether the target's address may be and is reached. Sends no request."""
        at = f"target.{self._config.name}: sync.{assignment.sync}"
        found = [
            Finding(name="http request", severity="error", message=problem, object=at, fix="see docs/targets.md")
            for problem in self._problems(assignment)
        ]
        found += [
            Finding(name="http request", severity="warning", message=message, object=at, fix=fix)
            for message, fix in self._doubts(assignment)
        ]
        for name, test in (("http secrets", lambda: self._read_secrets(assignment)), ("http address", self._reach)):
            try:
                test()
            except CdcError as e:
                severity = "warning" if e.verdict is Verdict.RETRY else "error"
                found.append(Finding(name=name, severity=severity, message=str(e.args[0]), fix=e.hint, object=at))
        return found

    def acknowledged(self, assignment: Assignment) -> Acknowledged:
        """What the ledger has. Blocks for one read of it; errors of the lake's store."""
        rows = self._ledger(assignment.sync).read()
        if assignment.mode == "insert":
            # What changed is not sent in this mode, and what was acknowledged is never sent again: a key in doubt is
            # one that was tried once, and is new until it is known.
            known = pc.replace_with_mask(
                rows.column("digest").combine_chunks(), pc.equal(rows.column("digest"), IN_DOUBT).combine_chunks(), ""
            )
            rows = rows.set_column(1, ACKS.field(1), known)
        return Acknowledged(rows=rows)

    def push(self, batches: Iterable[Batch]) -> list[PushResult]:
        """Push the batches one after another, the rows of one side by side; what is acknowledged is durable on return.
        After a batch with an error the others are not sent. TargetRejected before the first row of a batch if none of
        its rows can be sent; batches before it keep what they have."""
        results: list[PushResult] = []
        error: CdcError | None = None
        for batch in batches:
            if error is not None:
                keys = batch.acks.column("key").to_pylist()
                results.append(PushResult(rows=len(keys), unsent=keys, error=error))
                continue
            result = self._adopt(batch) if batch.action == ADOPT else self._deliver(batch)
            results.append(result)
            error = result.error
        return results

    def forget(self, assignment: Assignment) -> int:
        """Forget what the ledger has of the sync, and send nothing; how many rows there were. Durable on return."""
        ledger = self._ledger(assignment.sync)
        digests = ledger.read().column("digest")
        ledger.forget()
        return int(pc.sum(pc.not_equal(digests, "")).as_py() or 0)

    def close(self) -> None:
        """Close connections and end threads; idempotent."""
        client, self._client = self._client, None
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()
        if client is not None:
            client.close()

    # ------------------------------------------------------------------ pushing

    def _adopt(self, batch: Batch) -> PushResult:
        """Acknowledge without sending."""
        rows, ledger = batch.acks.num_rows, self._ledger(batch.assignment.sync)
        for start in range(0, rows, GROUP_ROWS):
            try:
                acks = batch.acks.slice(start, GROUP_ROWS)
                record(ledger, acks=acks.set_column(2, ACKS.field(2), pc.add(acks.column("version"), 1)))
            except CdcError as e:
                unsent = batch.acks.column("key").slice(start).to_pylist()
                return PushResult(rows=rows, unsent=unsent, error=e)
        return PushResult(rows=rows)

    def _deliver(self, batch: Batch) -> PushResult:
        if batch.rows.num_rows == 0:
            return PushResult(rows=0)
        form = self._form(batch.assignment, batch.action)
        if self._client is None:
            self._client = Client(self._config)
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self._config.in_flight, thread_name_prefix=f"http-{self._config.name}")
        route = Route(
            target=self._config.name,
            client=self._client,
            pace=self._pace,
            executor=self._executor,
            in_flight=self._config.in_flight,
            retry_for_s=self._config.retry_for_s,
        )
        return Delivery(batch, form, route, self._ledger(batch.assignment.sync)).run()

    def _form(self, assignment: Assignment, action: str) -> Form:
        """How this batch's rows are sent, with secrets read now. TargetRejected if they cannot be."""
        request = assignment.delete_request if action == DELETE else assignment.request
        name = "delete_request" if action == DELETE else "request"
        if request is None:
            raise TargetRejected(f"{self._where}: sync {assignment.sync} has no {name}", hint="write one")
        template, judge = self._compiled(assignment, request, action)
        problems = [*template.problems, *judge.problems, *self._header_problems(request)]
        if problems:
            raise TargetRejected(
                f"{self._where}: sync.{assignment.sync}.{name}.{problems[0]}", hint="see docs/targets.md"
            )
        for reference in template.secrets:
            template.secrets[reference] = self._path_secret(reference)
        headers = {**self._config.headers, **self._secret_headers()}
        own = {each.lower() for each in request.headers}
        return Form(
            template=template,
            judge=judge,
            headers={n: value for n, value in headers.items() if n.lower() not in own},
            rows_per_request=request.rows_per_request,
        )

    def _compiled(self, assignment: Assignment, request: RequestConfig, action: str) -> tuple[RequestTemplate, Judge]:
        columns = assignment.key if action == DELETE else assignment.columns
        template = RequestTemplate(request, columns or None)
        judge = Judge(
            self._config.name, request,
            action=action, mode=assignment.mode, addresses_rows=template.addresses_rows,
        )  # fmt: skip
        return template, judge

    def _ledger(self, sync: str) -> Ledger:
        if sync not in self._known:
            self._known[sync] = self._ledgers(sync)
        return self._known[sync]

    # ------------------------------------------------------------------ secrets

    def _secret_headers(self) -> dict[str, str]:
        return {n: read_secret(self._config.name, reference) for n, reference in self._config.secret_headers.items()}

    def _path_secret(self, reference: str) -> str:
        value = read_secret(self._config.name, reference)
        if not secret_path(value):
            raise TargetRejected(
                f"{self._where}: {reference} holds characters that cannot stand in a path",
                hint="letters, digits and . _ ~ - / can",
            )
        return value

    def _read_secrets(self, assignment: Assignment) -> None:
        self._secret_headers()
        for request, action in _requests(assignment):
            for reference in self._compiled(assignment, request, action)[0].secrets:
                self._path_secret(reference)

    # ------------------------------------------------------------------ checking

    def _problems(self, assignment: Assignment) -> list[str]:
        if assignment.request is None:
            return ["request: is required"]
        found = []
        for request, action in _requests(assignment):
            template, judge = self._compiled(assignment, request, action)
            name = "delete_request" if action == DELETE else "request"
            every = [*template.problems, *judge.problems, *self._header_problems(request)]
            found += [f"{name}.{problem}" for problem in every]
        return found

    def _header_problems(self, request: RequestConfig) -> list[str]:
        """What is wrong with the target's headers, alone and beside the request's."""
        found = []
        for name in [*self._config.headers, *self._config.secret_headers]:
            if not HEADER_NAME.fullmatch(name) or name.lower() in OURS:
                found.append(f"headers.{name}: is no header that can be set")
        own = {name.lower() for name in [*request.headers, request.idempotency_header]}
        for name in self._config.secret_headers:
            if name.lower() in own:
                found.append(f"headers.{name}: stands in secret_headers of the target too")
        for name, text in self._config.headers.items():
            if not all(" " <= c <= "~" or c == "\t" for c in text):
                found.append(f"headers.{name}: holds a control character or one beyond ASCII")
        return found

    def _doubts(self, assignment: Assignment) -> list[tuple[str, str]]:
        """(what may hurt, what mends it)."""
        found = []
        if self._config.url.startswith("http:") and (
            self._config.secret_headers or any(SECRET.search(r.path) for r, _ in _requests(assignment))
        ):
            found.append(("secrets go over the network in plain text", "write https:// in the url"))
        request = assignment.request
        if request is not None and assignment.mode in ("append", "insert"):
            used = repr((request.path, request.headers, request.body, request.item))
            if not request.idempotency_header and KEY not in used:
                found.append(
                    (
                        "requests carry no idempotency key: a row whose answer is lost is written twice",
                        f"set idempotency_header, or use {{{KEY}}}",
                    )
                )
        return found

    def _reach(self) -> None:
        client = Client(self._config)
        try:
            client.reach()
        finally:
            client.close()


def _requests(assignment: Assignment) -> list[tuple[RequestConfig, str]]:
    both = ((assignment.request, INSERT), (assignment.delete_request, DELETE))
    return [(request, action) for request, action in both if request is not None]


__all__ = ["HttpTarget"]
