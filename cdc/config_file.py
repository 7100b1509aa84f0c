"""The configuration file: found, read, and checked whole, so that one run names everything that is wrong.

Unknown keys are errors that name the nearest known key. What a key means and its default stand in cdc.config. No
connection is made and no secret is read here.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from cdc.config import (
    MAIN_LAKE,
    AlertsConfig,
    ChangelogConfig,
    Config,
    CurrentConfig,
    FilesConfig,
    IcebergConfig,
    LakeConfig,
    NamedLakeConfig,
    SourceConfig,
    TableConfig,
    VerifyConfig,
    has_inline_password,
)
from cdc.config_serving import (
    MODES,
    GuardConfig,
    ModelConfig,
    RequestConfig,
    SyncConfig,
    TargetConfig,
    sync_problems,
    target_problems,
)
from cdc.config_text import check_age, kind_of, nearest, strings
from cdc.errors import ConfigError
from cdc.table import PartitionBy
from cdc.units import size_bytes, wal_threshold

T = TypeVar("T")

SEARCH_PATH = (Path("cdc.toml"), Path("/etc/cdc/cdc.toml"))

# Keys and values that the contract names and that a later version reads: refused, because ignoring one would be a lie.
_LATER_KEYS: dict[str, frozenset[str]] = {}
_LATER_VALUES: dict[tuple[str, str], frozenset[str]] = {
    ("source", "type"): frozenset({"kafka"}),
    ("target", "type"): frozenset({"kafka"}),
}
_CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("source", "mode"): ("stream", "snapshot"),
    ("source", "strategy"): ("diff", "cursor"),
    ("source", "confirm_after"): ("landed", "log"),
    ("source", "on_schema_change"): ("evolve", "freeze", "stop"),
    ("table", "on_schema_change"): ("evolve", "freeze", "stop"),
    ("source", "on_slot_lost"): ("stop", "resync"),
    ("source", "streaming"): ("on", "off"),
    ("sync", "mode"): MODES,
    ("request", "method"): ("GET", "POST", "PUT", "PATCH", "DELETE"),
    ("files", "format"): ("jsonl", "parquet"),
    ("", "log_format"): ("auto", "text", "json"),
    ("", "log_level"): ("debug", "info", "warning", "error"),
}
# Smallest value of a number; what is not named here must be greater than zero.
_LEAST: dict[tuple[str, str], float] = {
    ("source", "chunk_rows"): 1,
    ("source", "chunk_bytes"): 1 << 16,
    ("source", "snapshot_rows_per_s"): 0,
    ("source", "snapshot_bytes_per_s"): 0,
    ("source", "snapshot_pause_active"): 0,
    ("source", "buffer_bytes"): 1 << 20,
    ("source", "spool_bytes_max"): 1 << 20,
    ("source", "poll_sleep_s"): 0,
    ("source", "cursor_lag_s"): 0,
    ("source", "heartbeat_every_s"): 0,
    ("verify", "every_s"): 0,
    ("lake", "land_bytes"): 1 << 16,
    ("lake.current", "max_staleness_s"): 0,
    ("lake", "lease_ttl_s"): 5,
    ("lake", "vacuum_after_s"): 0,
    ("sync", "batch_rows"): 1,
    ("sync", "debounce_s"): 0,
    ("sync", "max_lag_s"): 0,
    ("sync", "rows_per_s"): 0,
    ("target", "requests_per_s"): 0,
    ("guard", "max_delete_rows"): 0,
    ("guard", "max_delete_share"): 0,
    ("guard", "max_change_share"): 0,
    ("guard", "max_reject_share"): 0,
    ("", "log_bytes_max"): 8 << 20,
    ("", "log_segment_bytes"): 1 << 20,
}
_PERIODIC = ("every", "cron", "strategy", "cursor", "cursor_lag_s", "full_every", "run_timeout_s")
_STREAMING = (
    "slot", "publication", "partial_operations", "messages", "confirm_after", "on_slot_lost", "failover", "streaming",
    "heartbeat_every_s", "wal_warn_at", "wal_confirm_at", "wal_pause_at", "wal_drop_at",
)  # fmt: skip
"""Keys that say something of a slot or a stream."""
_UNREADABLE = frozenset({"GLACIER", "DEEP_ARCHIVE"})
"""Classes of S3 whose objects have to be brought back before anybody reads them."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,39}")
_LAKE_SECTIONS = frozenset({"options", "current", "changelog", "files", "iceberg", MAIN_LAKE})
"""Words behind `lake.` that are no lake's name."""
_NO_NAME = "means something else, and cannot be the name of a lake"
_SLOT = re.compile(r"[a-z0-9_]{1,63}")
_SECRET = re.compile("secret|password|token|credential")
_SECTIONS = ("source", "lake", "model", "target", "sync", "alerts", "verify")


def find(path: Path | str | None = None) -> Path:
    """The file to read: `path`, else $CDC_CONFIG, else ./cdc.toml, else /etc/cdc/cdc.toml. ConfigError if none."""
    named = path or os.environ.get("CDC_CONFIG")
    if named:
        if not Path(named).is_file():
            raise ConfigError(f"configuration file {named} does not exist", hint="name one with --config")
        return Path(named).absolute()
    for candidate in SEARCH_PATH:
        if candidate.is_file():
            return candidate.absolute()
    tried = ", ".join(str(p) for p in SEARCH_PATH)
    raise ConfigError(f"no configuration file: tried $CDC_CONFIG, {tried}", hint="name one with --config")


def load(path: Path | str | None = None) -> Config:
    """Read and check the whole file (see `find` for which). Raises ConfigError that lists everything that is wrong.

    No connection is made and no secret is read. Relative paths are taken from the file's folder.
    """
    file = find(path)
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error
    return parse(document, path=file)


def parse(document: Mapping[str, Any], *, path: Path | None = None) -> Config:
    """The configuration that a parsed TOML document means; ConfigError that lists everything that is wrong."""
    reader = _Reader(path.parent if path else Path.cwd())
    config = reader.config(document, path)
    if reader.problems or config is None:
        where = f"{path}: " if path else ""
        if len(reader.problems) == 1:
            raise ConfigError(where + reader.problems[0])
        raise ConfigError(f"{where}{len(reader.problems)} problems\n  " + "\n  ".join(reader.problems))
    return config


class _Reader:
    """Turns tables of the document into dataclasses; collects problems, so that one run names them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []

    def config(self, document: Mapping[str, Any], path: Path | None) -> Config | None:
        top = {k: v for k, v in document.items() if k not in _SECTIONS}
        lake = self._lake(document.get("lake"))
        sources = self._named("source", SourceConfig, document)
        models = self._named("model", ModelConfig, document)
        targets = self._named("target", TargetConfig, document)
        syncs = self._named("sync", SyncConfig, document)
        alerts = self._alerts(document.get("alerts", {}))
        verify = self._verify(document.get("verify", {}))
        given = self._values(
            Config, "", "", top, hidden=(
                "path", "sources", "lake", "models", "targets", "syncs", "alerts", "verify", "extra",
            )
        )  # fmt: skip
        if "source" not in document:
            self.problems.append("no source: write a [source.NAME] section")
        for name, source in sources.items():
            self._check_periodic(source, document["source"][name])
        sources = {name: self._finish_source(source) for name, source in sources.items()}
        targets = {name: self._finish_target(target) for name, target in targets.items()}
        self._check_slots(sources)
        for model in models.values():
            self._check_model(model)
        for sync in syncs.values():
            self._check_sync(sync, document, targets)
        if given is None or lake is None or alerts is None or verify is None:
            return None
        for source in sources.values():
            self._check_lakes(source, lake)
        config = Config(
            path=path, sources=sources, lake=lake, models=models, targets=targets, syncs=syncs, alerts=alerts,
            verify=verify, **given,
        )  # fmt: skip
        self._check_top(config)
        return config

    def _named(self, section: str, cls: Callable[..., T], document: Mapping[str, Any]) -> dict[str, T]:
        tables = document.get(section, {})
        if not isinstance(tables, Mapping):
            self.problems.append(f"{section}: write [{section}.NAME]")
            return {}
        found: dict[str, T] = {}
        for name, table in tables.items():
            where = f"{section}.{name}"
            if not isinstance(table, Mapping):
                self.problems.append(f"{where}: is a key where a section is expected; write [{section}.NAME]")
                continue
            if not _NAME.fullmatch(name):
                self.problems.append(f"{where}: a name is a letter, then letters, digits, _ or -, at most 40")
            values = self._values(cls, section, where, table, hidden=("name",))
            if values is not None:
                found[name] = cls(name=name, **values)
        return found

    def _values(
        self, cls: Any, section: str, where: str, table: Mapping[str, Any], *, hidden: tuple[str, ...]
    ) -> dict[str, Any] | None:
        """Checked values of one table by the fields of `cls`; None if a required key is missing or a value is wrong."""
        known = {f.name: f for f in fields(cls) if f.name not in hidden}
        hints = get_type_hints(cls)
        values: dict[str, Any] = {}
        before = len(self.problems)
        for key, value in table.items():
            at = f"{where}.{key}" if where else key
            if key in _LATER_KEYS.get(section, ()):
                self.problems.append(f"{at}: not supported yet")
            elif key not in known:
                self.problems.append(f"{at}: unknown key{nearest(key, [*known, *(() if where else _SECTIONS)])}")
            else:
                try:
                    values[key] = self._value(section, key, hints[key], value, at)
                except ValueError as error:
                    self.problems.append(f"{at}: {error}")
        for key, f in known.items():
            if f.default is MISSING and f.default_factory is MISSING and key not in table:
                self.problems.append(f"{where}.{key}: is required" if where else f"{key}: is required")
        return values if len(self.problems) == before else None

    def _value(self, section: str, key: str, kind: Any, value: Any, at: str) -> Any:
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"true or false is expected, not {kind_of(value)}")
            return value
        if kind is int:
            return self._int(section, key, value)
        if kind is float or kind == float | None:
            return self._seconds_or_share(section, key, value)
        if kind == dict[str, TableConfig]:
            return self._tables(at, value)
        if kind is ChangelogConfig:
            return self._changelog(at, value)
        if kind == FilesConfig | None:
            return self._follower(FilesConfig, "files", at, value)
        if kind == IcebergConfig | None:
            return self._follower(IcebergConfig, "iceberg", at, value)
        if kind == tuple[str, ...]:
            return strings(value, single=key == "publication" or key.endswith("_at"))
        if section == "table" and key == "columns":
            from cdc.types import declared_types  # loads Arrow, which hardly any configuration needs

            try:
                return declared_types(value)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        if section == "table" and key == "partition_by" and isinstance(value, str):
            return str(PartitionBy.of(value))
        if kind is CurrentConfig:
            return self._current(value)
        if kind is GuardConfig:
            return self._section(GuardConfig, "guard", at, value) or GuardConfig()
        if kind == RequestConfig | None:
            return self._section(RequestConfig, "request", at, value)
        if kind is Any:
            return value
        if kind == dict[str, str]:
            if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
                raise ValueError("a table of texts is expected")
            return dict(value)
        if not isinstance(value, str):
            raise ValueError(f"a text is expected, not {kind_of(value)}")
        if "\0" in value:
            raise ValueError("a zero byte is not allowed")
        if kind is Path or kind == Path | None:
            if not value:
                raise ValueError("a path is expected, not an empty text")
            return self.folder / Path(value).expanduser()
        if value and key in ("retain", "cold_after"):
            check_age(value, forever=key == "retain")
        if value in _LATER_VALUES.get((section, key), ()):
            raise ValueError(f'"{value}" is not supported yet')
        choices = _CHOICES.get((section, key))
        if choices and value not in choices:
            raise ValueError(f'"{value}" is none of {", ".join(choices)}{nearest(value, choices)}')
        return value

    def _int(self, section: str, key: str, value: Any) -> int:
        sized = "bytes" in key
        if isinstance(value, bool) or not isinstance(value, (int, str) if sized else int):
            raise ValueError(f"a {'size' if sized else 'whole number'} is expected, not {kind_of(value)}")
        number = size_bytes(value)
        least = _LEAST.get((section, key), 1)
        if number < least:
            raise ValueError(f"must be at least {int(least)}{' bytes' if sized else ''}")
        return number

    def _seconds_or_share(self, section: str, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            unit = "seconds as a number" if key.endswith("_s") else "a number"
            raise ValueError(f"{unit} expected, not {kind_of(value)}")
        least = _LEAST.get((section, key))
        if value < least if least is not None else value <= 0:
            raise ValueError(f"must be at least {least:g}" if least is not None else "must be greater than 0")
        if key.endswith("_share") and value > 1:
            raise ValueError("is a share, at most 1")
        return float(value)

    def _tables(self, where: str, value: Any) -> dict[str, TableConfig]:
        """Sections of single tables of a source."""
        if not isinstance(value, Mapping):
            raise ValueError('write [source.NAME.table."schema.table"]')
        found: dict[str, TableConfig] = {}
        for name, table in value.items():
            at = f'{where}."{name}"'
            if "." not in name:
                raise ValueError(f'"{name}" names no schema; write "public.{name}"')
            if not isinstance(table, Mapping):
                raise ValueError(f'"{name}" is a key where a section is expected')
            values = self._values(TableConfig, "table", at, table, hidden=("name",))
            if values is not None:
                found[name] = TableConfig(name=name, **values)
        return found

    def _changelog(self, at: str, value: Any) -> ChangelogConfig:
        if not isinstance(value, Mapping):
            raise ValueError("write a [lake.changelog] section")
        values = self._values(ChangelogConfig, "changelog", at, value, hidden=())
        if values is None:
            return ChangelogConfig()
        kept = ChangelogConfig(**values)
        if bool(kept.cold_after) != bool(kept.cold_storage_class):
            raise ValueError("set both cold_after and cold_storage_class, or none")
        if kept.cold_storage_class in _UNREADABLE:
            raise ValueError(
                f"objects of class {kept.cold_storage_class} cannot be read at once; GLACIER_IR and STANDARD_IA can"
            )
        if kept.cold_after and kept.cold_after_s >= kept.retain_s:
            raise ValueError("cold_after is not before retain: nothing would ever be put away")
        return kept

    def _follower(self, cls: Callable[..., T], section: str, where: str, value: Any) -> T | None:
        """A section of `[lake]` that says which changelogs are kept in another form too."""
        if not isinstance(value, Mapping):
            raise ValueError(f"write a [{where}] section")
        values = self._values(cls, section, where, value, hidden=())
        if values is None:
            return None
        for pattern in values["tables"]:
            if pattern.count(".") < 2:
                self.problems.append(f'{where}.tables: write "source.schema.table", not "{pattern}"')
        for key, text in values.get("catalog", {}).items():
            if _SECRET.search(key) or re.search(r"://[^/@]*:[^/@]+@", text):
                self.problems.append(
                    f"{where}.catalog.{key}: a secret stands in the environment: see docs/operations.md"
                )
        return cls(**values)

    def _section(self, cls: Callable[..., T], section: str, where: str, value: Any) -> T | None:
        """A section within another; None if it is wrong."""
        if not isinstance(value, Mapping):
            raise ValueError(f"write a [{where}] section")
        values = self._values(cls, section, where, value, hidden=())
        return None if values is None else cls(**values)

    def _alerts(self, table: Any) -> AlertsConfig | None:
        if not isinstance(table, Mapping):
            self.problems.append("alerts: write an [alerts] section")
            return None
        values = self._values(AlertsConfig, "alerts", "alerts", table, hidden=())
        if values is None:
            return None
        alerts = AlertsConfig(**values)
        if alerts.webhook and not re.match(r"https?://[^/]", alerts.webhook):
            self.problems.append("alerts.webhook: write a URL that begins with https:// or http://")
        return alerts

    def _verify(self, table: Any) -> VerifyConfig | None:
        if not isinstance(table, Mapping):
            self.problems.append("verify: write a [verify] section")
            return None
        values = self._values(VerifyConfig, "verify", "verify", table, hidden=())
        if values is None:
            return None
        if not 0 < values.get("sample_percent", 100) <= 100:
            self.problems.append("verify.sample_percent: is a percentage above 0, up to 100")
        return VerifyConfig(**values)

    def _current(self, table: Any) -> CurrentConfig:
        if not isinstance(table, Mapping):
            raise ValueError("write a [lake.current] section")
        return CurrentConfig(**self._values(CurrentConfig, "lake.current", "lake.current", table, hidden=()) or {})

    def _lake(self, table: Any) -> LakeConfig | None:
        if not isinstance(table, Mapping):
            self.problems.append('no lake: write a [lake] section with url = "file:///…"')
            return None
        known = {f.name for f in fields(LakeConfig)} - {"named"}
        others = {k: v for k, v in table.items() if k not in known and isinstance(v, Mapping)}
        for name in sorted(known & table.keys()):
            if isinstance(table[name], Mapping) and "url" in table[name]:
                self.problems.append(f"lake.{name}: {_NO_NAME}")
        made = {name: self._named_lake(name, v, known) for name, v in others.items()}
        values = self._values(
            LakeConfig, "lake", "lake", {k: v for k, v in table.items() if k not in others}, hidden=("named",)
        )
        if values is None:
            return None
        lake = LakeConfig(**values, named={name: other for name, other in made.items() if other is not None})
        if lake.vacuum_after_s > 7 * 86400:
            self.problems.append("lake.vacuum_after_s: a week at most; for longer Delta does not know what was removed")
        if lake.current.max_staleness_s > lake.vacuum_after_s / 2:
            self.problems.append(
                "lake.current.max_staleness_s: at most half of vacuum_after_s: syncs read what is replaced meanwhile"
            )
        for at, each in lake.all.items():
            if lake.changelog.cold_after and each.url.startswith("file:"):
                self.problems.append(f"lake.changelog.cold_after: [{at}] is a local directory, without storage classes")
        return replace(lake, url=self._store_url("lake", lake))

    def _named_lake(self, name: str, table: Mapping[str, Any], sections: Iterable[str]) -> NamedLakeConfig | None:
        """`[lake.NAME]`; None if it is wrong."""
        at = f"lake.{name}"
        if name in _LAKE_SECTIONS:
            self.problems.append(f"{at}: {_NO_NAME}")
            return None
        if "url" not in table:
            near = nearest(name, [*sections, *_LAKE_SECTIONS])
            self.problems.append(f"{at}: no section of [lake], and without a url no lake of its own{near}")
            return None
        if not _NAME.fullmatch(name):
            self.problems.append(f"{at}: a name is a letter, then letters, digits, _ or -, at most 40")
        values = self._values(NamedLakeConfig, "lake", at, table, hidden=("name",))
        if values is None:
            return None
        lake = NamedLakeConfig(name=name, **values)
        return replace(lake, url=self._store_url(at, lake))

    def _store_url(self, at: str, lake: LakeConfig | NamedLakeConfig) -> str:
        """The store's URL; a directory's with its absolute path."""
        scheme, separator, rest = lake.url.partition("://")
        local = not separator or scheme == "file"
        if not lake.url or (separator and not rest):
            self.problems.append(f"{at}.url: names no place")
        elif separator and scheme == "file" and not rest.startswith("/"):
            self.problems.append(f'{at}.url: a file URL has an absolute path after "file://"')
        elif local and (lake.options or lake.region or lake.endpoint_url):
            self.problems.append(f"{at}: a local directory has no region, endpoint_url or options")
        return lake.url if separator else (self.folder / Path(lake.url).expanduser()).as_uri()

    def _check_lakes(self, source: SourceConfig, lake: LakeConfig) -> None:
        """Whether the lakes that tables name exist."""
        at, known = f"source.{source.name}", [MAIN_LAKE, *lake.named]
        named = [(f'{at}.lakes."{glob}"', name) for glob, name in source.lakes.items()]
        named += [(f'{at}.table."{t.name}".lake', t.lake) for t in source.table.values() if t.lake]
        for where, name in named:
            if name not in known:
                self.problems.append(f"{where}: there is no [lake.{name}]{nearest(name, known)}")
        for glob in source.lakes:
            if "." not in glob:
                self.problems.append(f'{at}.lakes: "{glob}" names no schema; write "{glob}.*" or "public.{glob}"')

    def _finish_source(self, source: SourceConfig) -> SourceConfig:
        """Fill the defaults that depend on the name, and check what depends on several keys."""
        at = f"source.{source.name}"
        self._check_connection(at, source)
        default = "cdc_" + source.name.lower().replace("-", "_")
        source = replace(source, slot=source.slot or default, publication=source.publication or (default,))
        if not _SLOT.fullmatch(source.slot):
            self.problems.append(f"{at}.slot: only a-z, 0-9 and _ are allowed, at most 63 (a rule of Postgres)")
        if not all(source.publication):
            self.problems.append(f"{at}.publication: an empty name")
        for stage in ("wal_warn_at", "wal_confirm_at", "wal_pause_at", "wal_drop_at"):
            for text in getattr(source, stage):
                try:
                    wal_threshold(text)
                except ValueError as error:
                    self.problems.append(f"{at}.{stage}: {error}")
        for key, patterns in (
            ("tables", source.tables),
            ("exclude", source.exclude),
            ("partial_operations", source.partial_operations),
        ):
            for pattern in patterns:
                if "." not in pattern:
                    self.problems.append(f'{at}.{key}: "{pattern}" names no schema; write "public.{pattern}"')
        return source

    def _check_periodic(self, source: SourceConfig, given: Mapping[str, Any]) -> None:
        """What goes with mode = "snapshot", and with it only."""
        at = f"source.{source.name}"
        if not source.is_periodic:
            stray = [key for key in _PERIODIC if key in given]
            if stray:
                self.problems.append(f'{at}.{stray[0]}: goes with mode = "snapshot" only')
            return
        stray = [key for key in _STREAMING if key in given]
        if stray:
            self.problems.append(f'{at}.{stray[0]}: goes with mode = "stream" only; there is no slot here')
        if bool(source.every) == bool(source.cron):
            self.problems.append(f'{at}: set exactly one of every ("15m") and cron ("0 * * * *")')
        if (source.strategy == "cursor") != bool(source.cursor):
            self.problems.append(f'{at}.cursor: names the column of strategy = "cursor"; set both or none')
        from cdc.schedule import Schedule

        for key, text in (("every", source.every), ("full_every", source.full_every), ("cron", source.cron)):
            try:
                if text or key == "full_every":
                    Schedule(every="" if key == "cron" else text, cron=text if key == "cron" else "")
            except ValueError as error:
                self.problems.append(f"{at}.{key}: {error}")

    def _finish_target(self, target: TargetConfig) -> TargetConfig:
        at = f"target.{target.name}"
        self._check_connection(at, target)
        self.problems += [f"{at}.{problem}" for problem in target_problems(target)]
        return replace(target, origin=target.origin or f"cdc_{target.name}")

    def _check_connection(self, at: str, config: SourceConfig | TargetConfig) -> None:
        if config.type == "postgres" and not config.dsn:
            self.problems.append(f"{at}.dsn: is required")
        secrets = [k for k in ("password_file", "password_env") if getattr(config, k)]
        if len(secrets) > 1:
            self.problems.append(f"{at}.password_env: password_file is set too; one of them is enough")
        elif secrets and has_inline_password(config.dsn):
            self.problems.append(f"{at}.{secrets[0]}: the dsn holds a password too; leave it out there")

    def _check_slots(self, sources: dict[str, SourceConfig]) -> None:
        taken: dict[tuple[str, str], str] = {}
        for source in sources.values():
            if source.is_periodic:
                continue
            other = taken.setdefault((source.dsn, source.slot), source.name)
            if other != source.name:
                self.problems.append(
                    f"source.{source.name}.slot: source {other} reads the same slot; a slot has one reader"
                )
        folded = {name.lower() for name in sources}
        if len(folded) != len(sources):
            self.problems.append(
                "source: two names differ only in upper and lower case; queries could not tell them apart"
            )

    def _check_model(self, model: ModelConfig) -> None:
        if not model.sql.strip():
            self.problems.append(f"model.{model.name}.sql: is empty")
        self._check_key(f"model.{model.name}.key", model.key)

    def _check_key(self, at: str, key: tuple[str, ...]) -> None:
        if not key or not all(key):
            self.problems.append(f"{at}: name at least one column")
        elif len(set(key)) != len(key):
            self.problems.append(f"{at}: a column stands there twice")

    def _check_sync(self, sync: SyncConfig, document: Mapping[str, Any], targets: Mapping[str, TargetConfig]) -> None:
        at = f"sync.{sync.name}"
        self._check_key(f"{at}.key", sync.key)
        self.problems += [f"{at}.{p}" if ": " in p else f"{at}: {p}" for p in sync_problems(sync, targets)]
        for kind, name in (("model", sync.model), ("target", sync.target)):
            known = list(document.get(kind, {}))
            if (name or kind == "target") and name not in known:
                self.problems.append(f"{at}.{kind}: there is no [{kind}.{name}]{nearest(name, known)}")

    def _check_top(self, config: Config) -> None:
        if config.metrics_listen:
            host, _, port = config.metrics_listen.rpartition(":")
            if not host or not port.isdecimal() or int(port) > 65535:
                self.problems.append('metrics_listen: write "host:port", or "" for none')
        if config.log_bytes_max < 2 * config.log_segment_bytes:
            self.problems.append("log_bytes_max: must hold at least two segments (log_segment_bytes)")
