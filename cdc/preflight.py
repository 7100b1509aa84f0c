"""Everything that `cdc check` looks at: configuration, sources, lake, targets, before a daemon depends on them.

Nothing is changed: the one write is a probe in each lake (cdc.lake.probe), removed again. A part that cannot be reached
is a finding, not an exception, so that one run names everything. Bounded by the connectors' own time-outs.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cdc import registry
from cdc.config import Config, SourceConfig, has_inline_password
from cdc.config_serving import TargetConfig
from cdc.errors import CdcError
from cdc.lake.ledger import LakeLedger
from cdc.lake.probe import WHAT_TO_DO, broken_promises
from cdc.lake.routing import open_lake
from cdc.places import left_behind
from cdc.planning import assignment_of, result_columns
from cdc.ports import Finding, ObjectStore

SEVERITIES = ("error", "warning", "info", "ok")


def check(config: Config) -> list[Finding]:
    """All findings, by part in the order of the configuration; blocks while it talks to sources, lake and targets."""
    findings = [*check_config(config)]
    for source in config.sources.values():
        findings += _guarded(f"source.{source.name}", "source", lambda s=source: _check_source(s))  # type: ignore[misc]
    findings += _check_lakes(config)
    findings += _guarded("model", "models", lambda: _check_models(config))
    for target in config.targets.values():
        findings += _guarded(
            f"target.{target.name}",
            "target",
            lambda t=target: _check_target(config, t),  # type: ignore[misc]
        )
    return findings


def check_config(config: Config) -> list[Finding]:
    """What the configuration itself, and the places that it names on this machine, say."""
    findings = [*_check_state_dir(config), *_check_secrets(config)]
    if config.metrics_listen:
        host = config.metrics_listen.rpartition(":")[0].strip("[]")
        if host not in ("127.0.0.1", "::1", "localhost"):
            findings.append(
                Finding(
                    name="metrics_listen",
                    severity="warning",
                    message=f"metrics and health are open to the network on {config.metrics_listen}",
                    fix='metrics_listen = "127.0.0.1:9187"',
                    object="config",
                )
            )
    for source in config.sources.values():
        if source.confirm_after == "log":
            findings.append(
                Finding(
                    name="confirm_after",
                    severity="info",
                    message="the source may forget what only the event log holds: losing state_dir costs a resync",
                    fix='confirm_after = "landed"',
                    object=f"source.{source.name}",
                )
            )
    return findings or [Finding(name="config", severity="ok", message="configuration is valid", object="config")]


def check_store(store: ObjectStore, url: str, at: str = "lake") -> list[Finding]:
    """Whether the store is reachable and keeps its promises, by a probe that is removed again.

    Raises the store's errors if it cannot be reached.
    """
    findings = [
        Finding(name=promise, severity="error", message=what, fix=WHAT_TO_DO, object=at)
        for promise, what in broken_promises(store)
    ]
    message = f"{url} is writable and honours conditional writes"
    return findings or [Finding(name="store", severity="ok", message=message, object=at)]


def worst(findings: Iterable[Finding]) -> str:
    """The gravest severity among the findings (`ok` if there are none)."""
    return min((f.severity for f in findings), key=SEVERITIES.index, default="ok")


def same_disk(one: Path, other: Path) -> bool:
    """Whether two paths (or their nearest existing parents) lie on one file system."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _check_state_dir(config: Config) -> list[Finding]:
    findings: list[Finding] = []
    place = _existing(config.state_dir)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        findings.append(
            Finding(
                name="state_dir",
                severity="error",
                message=f"{config.state_dir} cannot be written by this user",
                fix=f"install -d -o cdc -g cdc {config.state_dir}",
                object="config",
            )
        )
    used = sum(f.stat().st_size for f in config.log_dir.glob("*")) if config.log_dir.is_dir() else 0
    free = shutil.disk_usage(place).free + used
    if free < config.log_bytes_max:
        findings.append(
            Finding(
                name="log_bytes_max",
                severity="warning",
                message=f"the event log may grow to {config.log_bytes_max >> 20} MB, its disk has {free >> 20} MB",
                fix=f'log_bytes_max = "{max(64, (free >> 20) * 8 // 10)}MB", or a larger disk',
                object="config",
            )
        )
    stores = [urlsplit(lake.url) for lake in config.lake.all.values()]
    if any(s.scheme == "file" and same_disk(config.state_dir, Path(unquote(s.path))) for s in stores):
        findings.append(
            Finding(
                name="one disk",
                severity="warning",
                message="state_dir and lake lie on one disk: losing it loses both, and a full one stops both",
                fix="put the lake on another disk, or on object storage",
                object="config",
            )
        )
    return findings


def _check_lakes(config: Config) -> list[Finding]:
    """Each store by itself, and then what tables have left where they do not stand any more."""
    findings: list[Finding] = []
    for at, lake in config.lake.all.items():
        findings += _guarded(at, "lake", lambda lake=lake, at=at: check_store(registry.lake_store(lake), lake.url, at))  # type: ignore[misc]
    if config.lake.named and worst(findings) == "ok":
        store = open_lake(config)
        for source in config.sources.values():
            findings += _guarded("lake", "left behind", lambda s=source: left_behind(s, config.lake, store))  # type: ignore[misc]
    return findings


def _check_secrets(config: Config) -> list[Finding]:
    findings: list[Finding] = []
    parts: list[tuple[str, SourceConfig | TargetConfig]] = [(f"source.{s.name}", s) for s in config.sources.values()]
    parts += [(f"target.{t.name}", t) for t in config.targets.values()]
    for at, part in parts:
        if has_inline_password(part.dsn):
            findings.append(
                Finding(
                    name="password in dsn",
                    severity="warning",
                    message="the connection string carries its password",
                    fix='password_file = "/run/credentials/…" (or password_env), and none in the dsn',
                    object=at,
                )
            )
        file = part.password_file
        if file is None:
            continue
        if not file.is_file() or not os.access(file, os.R_OK):
            findings.append(
                Finding(
                    name="password_file", severity="error", message=f"{file} cannot be read by this user", object=at
                )
            )
        elif file.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
            findings.append(
                Finding(
                    name="password_file",
                    severity="warning",
                    message=f"{file} is open to every user",
                    fix=f"chmod 0400 {file}",
                    object=at,
                )
            )
    return findings


def _check_source(source: SourceConfig) -> list[Finding]:
    findings = registry.source_kind(source.type).admin(source).check()
    at = f"source.{source.name}"
    return [
        Finding(
            name=f.name,
            severity=f.severity,
            message=f.message,
            fix=f.fix,
            object=f"{at}: {f.object}" if f.object else at,
        )
        for f in findings
    ]


def _check_models(config: Config) -> list[Finding]:
    """Whether every model's and sync's SQL parses and names tables of sources that exist."""
    from cdc import models

    findings: list[Finding] = []
    statements = [(f"model.{m.name}", m.sql) for m in config.models.values()]
    statements += [(f"sync.{s.name}", s.sql) for s in config.syncs.values() if s.sql]
    for at, sql in statements:
        try:
            inputs = models.input_tables(sql)
        except CdcError as error:
            findings.append(_failure(at, "sql", error))
            continue
        unknown = sorted({source for source, _ in inputs if source not in config.sources})
        if unknown:
            message = f"reads from {', '.join(unknown)}, which is no source of this configuration"
            findings.append(Finding(name="sql", severity="error", message=message, object=at))
        else:
            findings.append(Finding(name="sql", severity="ok", message=f"reads {len(inputs)} tables", object=at))
    return findings


def _check_target(config: Config, target: TargetConfig) -> list[Finding]:
    at = f"target.{target.name}"
    syncs = [s for s in config.syncs.values() if s.target == target.name]
    if not syncs:
        return [Finding(name="unused", severity="info", message="no sync pushes to this target", object=at)]
    findings: list[Finding] = []
    store = open_lake(config)
    sink = registry.sink_kind(target.type)(target, partial(LakeLedger, store))
    try:
        for sync in syncs:
            found = sink.check(assignment_of(sync, target, result_columns(config, sync, store)))
            findings += found or [
                Finding(name="target", severity="ok", message=f"{sync.place} can take sync {sync.name}", object=at)
            ]
    finally:
        sink.close()
    return findings


def _guarded(at: str, name: str, part: Callable[[], list[Finding]]) -> list[Finding]:
    """The part's findings; its error becomes one."""
    try:
        return part()
    except CdcError as error:
        return [_failure(at, name, error)]


def _failure(at: str, name: str, error: CdcError) -> Finding:
    return Finding(name=name, severity="error", message=str(error.args[0]), fix=error.hint, object=at)


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
