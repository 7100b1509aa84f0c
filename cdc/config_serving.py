"""Configuration of the way back: models, targets, syncs, their guards and requests, and what must hold between them.

Dataclasses of the sections of the TOML file, as in cdc.config; how they are read is in cdc.config_file. `sync_problems`
and `target_problems` say in words what is wrong with a section; they make no connection and read no secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdc.schedule import Schedule
from cdc.units import duration_s

DELETING_MODE = "mirror"
MODES = ("insert", "update", "upsert", "mirror", "append")
_SECRET_REFERENCE = re.compile(r"(env:[A-Za-z_][A-Za-z0-9_]*|file:.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """`[model.NAME]`: SQL over current tables, its result keyed."""

    name: str
    sql: str
    key: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetConfig:
    """`[target.NAME]`: a production system that results are pushed to."""

    name: str
    type: str
    dsn: str = field(default="", repr=False)
    password_file: Path | None = None
    password_env: str | None = None
    connect_timeout_s: float = 10.0
    statement_timeout_s: float = 60.0
    origin: str = ""
    """Replication origin of our writes; default `cdc_<target name>`."""
    url: str = field(default="", repr=False)
    """Of type http: what the paths of requests are appended to. May hold no secret and no user."""
    headers: dict[str, str] = field(default_factory=dict)
    secret_headers: dict[str, str] = field(default_factory=dict)
    """Whole values by reference, `env:NAME` or `file:/path`; read anew for each connection."""
    ca_file: Path | None = None
    """Certificates that the server's is checked against; None: the system's."""
    allow_private: bool = False
    """Whether addresses that are not public (loopback, private, link-local) may be connected to."""
    follow_redirects: bool = False
    request_timeout_s: float = 30.0
    """Of one request, to the last byte of its answer."""
    retry_for_s: float = 60.0
    """How long one request is tried again before its rows wait for the next run."""
    requests_per_s: float = 0.0
    """0: no limit."""
    in_flight: int = 4
    """Requests at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestConfig:
    """`[sync.NAME.request]`, `[sync.NAME.delete_request]`: how rows become requests (connectors.http.template)."""

    method: str = "POST"
    path: str = ""
    """Appended to the target's url; `{column}` stands for a value, escaped, `{env:NAME}` and `{file:/path}` for a
    secret, as it is."""
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    """JSON as TOML. A text that is only `{column}` becomes the value with its type, `{column}` within a text its text;
    with `rows_per_request` above 1, `{items}` becomes the list of the rows' `item`s."""
    item: Any = None
    """What one row becomes in the body of a request for several."""
    rows_per_request: int = 1
    items: str = ""
    """JMESPath, over the answer to a request for several rows: the list of their outcomes, in the rows' order."""
    ok: str = ""
    """JMESPath, over the answer or one of `items`: true where the row was accepted. Empty: the status decides."""
    reason: str = ""
    """JMESPath, over the same: why a row was refused, for the row log."""
    idempotency_header: str = "Idempotency-Key"
    """Empty: none is sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """`[sync.NAME.guard]`: what a plan may do without somebody's approval. Shares are of the acknowledged rows."""

    max_delete_rows: int = 1_000
    max_delete_share: float = 0.1
    max_change_share: float = 0.5
    max_reject_share: float = 0.2
    """Of the last run's rows."""
    allow_empty: bool = False
    """Whether an empty result may delete."""
    allow_drift: bool = False
    """Whether it may run after the target's columns have changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncConfig:
    """`[sync.NAME]`: pushes a model's (or a query's) result into a target."""

    name: str
    target: str
    key: tuple[str, ...]
    """By the target's names."""
    table: str = ""
    """Of a database: the table. Required there."""
    model: str = ""
    sql: str = ""
    mode: str = "upsert"
    columns: dict[str, str] = field(default_factory=dict)
    """Column of the target -> column of the result. Empty: every column of the result under its own name."""
    keep: tuple[str, ...] = ()
    """Columns of the target that a NULL of the result does not overwrite."""
    fill: tuple[str, ...] = ()
    """Columns of the target that are written only where they are NULL."""
    group: str = ""
    """Syncs of one group and target are written in one transaction."""
    every_s: float | None = None
    cron: str = ""
    """Neither: when the model's inputs have been changed by others."""
    debounce_s: float = 2.0
    max_lag_s: float = 0.0
    """It waits while an input lacks changes that are older. 0: no bound."""
    batch_rows: int = 5_000
    rows_per_s: int = 0
    """0: no limit."""
    history_retain: str = "30d"
    """How long the rows of a run can be looked up."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    request: RequestConfig | None = None
    delete_request: RequestConfig | None = None

    @property
    def deletes(self) -> bool:
        """Whether keys that leave the result are deleted at the target."""
        return self.mode == DELETING_MODE

    @property
    def place(self) -> str:
        """What rows go into, for people: the table, or the request."""
        return self.table or (f"{self.request.method} {self.request.path}" if self.request else "")


def target_problems(target: TargetConfig) -> list[str]:
    """What is wrong with `[target.NAME]` by itself, each as `key: words`; empty if nothing is."""
    if target.type != "http":
        return []
    found = []
    match = re.match(r"(https?)://([^/?#]*)", target.url)
    if match is None or not match[2]:
        found.append("url: write a URL that begins with https:// or http://")
    elif "@" in match[2]:
        found.append("url: holds a user; a secret is referred to in secret_headers")
    for name, reference in target.secret_headers.items():
        if not _SECRET_REFERENCE.fullmatch(reference):
            found.append(f'secret_headers.{name}: write "env:NAME" or "file:/path", never the secret itself')
        if name.lower() in {n.lower() for n in target.headers}:
            found.append(f"secret_headers.{name}: stands in headers too")
    return found


def sync_problems(sync: SyncConfig, targets: Mapping[str, TargetConfig]) -> list[str]:
    """What is wrong with `[sync.NAME]` among the targets, each as `key: words`; empty if nothing is."""
    found = []
    if bool(sync.model) == bool(sync.sql.strip()):
        found.append("set exactly one of model and sql")
    if sync.every_s is not None and sync.cron:
        found.append("cron: every_s is set too; one of them is enough")
    for key, text, check in (
        ("cron", sync.cron, lambda text: Schedule(cron=text)),
        ("history_retain", sync.history_retain, duration_s),
    ):
        try:
            if text:
                check(text)
        except ValueError as error:
            found.append(f"{key}: {error}")
    target = targets.get(sync.target)
    kind = target.type if target is not None else ""
    if kind == "http":
        found += _http_problems(sync)
    elif kind and not sync.table:
        found.append("table: is required")
    elif kind and (sync.request or sync.delete_request):
        found.append("request: goes with a target of type http only")
    pushed = [*(sync.columns or ()), *sync.key]
    for key, names in (("keep", sync.keep), ("fill", sync.fill)):
        strangers = [n for n in names if (sync.columns and n not in pushed) or n in sync.key]
        if strangers:
            found.append(f"{key}: {strangers[0]} is no pushed column beside the key")
    if sync.columns:
        missing = [k for k in sync.key if k not in sync.columns]
        if missing:
            found.append(f"columns: lacks {missing[0]}, which the key names")
    return found


def _http_problems(sync: SyncConfig) -> list[str]:
    found = []
    if sync.request is None:
        found.append("request: is required with a target of type http")
    if sync.deletes and sync.delete_request is None:
        found.append('delete_request: is required with mode = "mirror"')
    if not sync.deletes and sync.delete_request is not None:
        found.append('delete_request: goes with mode = "mirror" only')
    for key, names in (("table", sync.table), ("keep", sync.keep), ("fill", sync.fill), ("group", sync.group)):
        if names:
            found.append(f"{key}: goes with a database only")
    for key, request in (("request", sync.request), ("delete_request", sync.delete_request)):
        if request is not None and request.rows_per_request > 1 and request.item is None:
            found.append(f"{key}.item: is required with rows_per_request")
        if request is not None and request.items and request.rows_per_request == 1:
            found.append(f"{key}.items: goes with rows_per_request only")
    return found
