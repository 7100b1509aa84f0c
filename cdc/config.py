"""Configuration: what the sections of the TOML file hold, as frozen dataclasses.

Every key has a default or is required, and stands with its unit in its name. Secrets come by reference
(`password_file`, `password_env`), never in logs or `repr`. How the file is found, read and checked is in
cdc.config_file.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from cdc.config_serving import ModelConfig, SyncConfig, TargetConfig
from cdc.errors import ConfigError
from cdc.table import PartitionBy
from cdc.units import duration_s

MAIN_LAKE: Final = "main"
"""What `lake` says of a table that stands in `[lake]` itself."""
FOREVER = "forever"


def age_s(text: str) -> float:
    """Seconds of a duration of the configuration; infinite for FOREVER. ValueError if it is neither."""
    return math.inf if text == FOREVER else duration_s(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableConfig:
    """`[source.NAME.table."SCHEMA.TABLE"]`: what differs for one table."""

    name: str
    on_schema_change: str = ""
    """Empty: as the source has it."""
    retain: str = ""
    """Empty: as `[lake.changelog]` has it; forever: whatever that says."""
    columns: dict[str, str] = field(default_factory=dict)
    """Types other than the contract's, by column: `string` or `decimal(p,s)` (cdc.types)."""
    partition_by: str = ""
    """`COLUMN:day`, `:hour` or `:month`: the changelog's partitions are of that time. Empty: of the commit date."""
    lake: str = ""
    """Name of the lake (`[lake.NAME]`) that the table stands in, or `main`; empty: as `lakes` of the source say."""

    @property
    def retain_s(self) -> float | None:
        """How long its changelog keeps an object, in seconds; None: it says nothing of it."""
        return age_s(self.retain) if self.retain else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """`[source.NAME]`: a database that changes are captured from."""

    name: str
    type: str = "postgres"
    dsn: str = field(default="", repr=False)
    password_file: Path | None = None
    password_env: str | None = None
    tables: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    mode: str = "stream"
    """stream: logical replication; snapshot: periodic runs that compare, with no right but SELECT."""
    every: str = ""
    """Of mode snapshot: a run is due this long after the last one began, as a duration."""
    cron: str = ""
    """Or when it is due, as a cron expression in UTC."""
    strategy: str = "diff"
    """diff: a run reads every table whole; cursor: only rows past the highest `cursor` that was read."""
    cursor: str = ""
    cursor_lag_s: float = 300.0
    """How far behind the highest value a run begins: for clocks that differ."""
    full_every: str = "1d"
    """How often strategy cursor reads a table whole all the same, which alone finds deletes."""
    run_timeout_s: float = 21_600.0
    """Bound of the snapshot that one run holds open."""
    slot: str = ""
    publication: tuple[str, ...] = ()
    partial_operations: tuple[str, ...] = ()
    """Globs of tables whose publication may leave out operations."""
    messages: tuple[str, ...] = ()
    """Globs of the prefixes of logical messages that are kept."""
    confirm_after: str = "landed"
    confirm_every_s: float = 1.0
    on_slot_lost: str = "stop"
    failover: bool = False
    """Make the slot one that standbys keep too (Postgres 17 and later)."""
    watch_every_s: float = 10.0
    """How often the catalog is looked at for what the stream does not show."""
    chunk_rows: int = 400_000
    chunk_bytes: int = 32 << 20
    """Bounds of a snapshot's chunk, as text, whichever of the two is reached first; one row is the least."""
    readers: int = 2
    """Connections that read snapshots at the same time."""
    snapshot_rows_per_s: int = 0
    snapshot_bytes_per_s: int = 0
    """What all readers together may read; 0: no limit."""
    snapshot_pause_active: int = 0
    """Nothing is read while more clients than this are active at the source; 0: whatever they do."""
    lock_timeout_s: float = 10.0
    statement_timeout_s: float = 300.0
    connect_timeout_s: float = 10.0
    receive_timeout_s: float = 60.0
    """Silence of the server after which the stream is taken for dead; at half of it, it is asked for a sign."""
    buffer_bytes: int = 32 << 20
    """Bound of frames received and not yet decoded; of it, half at most for those of streamed transactions."""
    streaming: str = "off"
    """Whether the server sends a big transaction while it runs; what has not committed is held on local disk."""
    spool_bytes_max: int = 20 << 30
    """Bound of the files that hold streamed transactions; beyond it the server keeps them."""
    poll_sleep_s: float = 0.00015
    heartbeat_every_s: float = 10.0
    """0: none. Written only while WAL grows and nothing of it reaches us."""
    wal_warn_at: tuple[str, ...] = ("50%", "10GB")
    wal_confirm_at: tuple[str, ...] = ("70%",)
    wal_pause_at: tuple[str, ...] = ("80%",)
    wal_drop_at: tuple[str, ...] = ()
    on_schema_change: str = "evolve"
    """evolve: the lake takes the new shape; freeze: its columns stay; stop: the table stops."""
    lakes: dict[str, str] = field(default_factory=dict)
    """Glob of `schema.table` → lake of such tables; the first that matches. What none matches stands in `[lake]`."""
    table: dict[str, TableConfig] = field(default_factory=dict)
    """By `schema.table`."""

    @property
    def is_periodic(self) -> bool:
        """Whether its tables are compared now and then, and no stream is read."""
        return self.mode == "snapshot"

    def declared(self, table: str, column: str) -> str:
        """The type that the configuration wants for a column, empty if it says none."""
        own = self.table.get(table)
        return own.columns.get(column, "") if own is not None else ""

    def lake_of(self, table: str) -> str:
        """Name of the lake that a table (`schema.table`) stands in; empty: `[lake]` itself."""
        own = self.table.get(table)
        named = own.lake if own is not None else ""
        if not named:
            named = next((lake for glob, lake in self.lakes.items() if fnmatchcase(table, glob)), "")
        return "" if named == MAIN_LAKE else named

    def contract(self, table: str) -> str:
        """What a change of this table's schema meets: evolve, freeze or stop."""
        own = self.table.get(table)
        return (own.on_schema_change if own is not None else "") or self.on_schema_change

    def partition_by(self, table: str) -> PartitionBy | None:
        """The time by which this table's changelog is partitioned; None: by the date of the commit."""
        own = self.table.get(table)
        return PartitionBy.of(own.partition_by) if own is not None and own.partition_by else None


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertsConfig:
    """`[alerts]`: who is told besides the log."""

    webhook: str = field(default="", repr=False)
    """URL that each alert is posted to as JSON; empty: none. It may hold a secret."""
    webhook_timeout_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyConfig:
    """`[verify]`: tables compared with their sources in the background."""

    every_s: float = 0.0
    """0: never. How often each table is compared."""
    sample_percent: float = 100.0
    """Percent of a table's keys that one comparison looks at, others each time."""
    time_share: float = 0.25
    """Share of the time that it works; it rests between pieces of about a second."""
    table_timeout_s: float = 3600.0
    """After which a table is given up. Its snapshot is open no longer than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedLakeConfig:
    """`[lake.NAME]`: another store, for tables that name it. It says where and how; when is said by `[lake]`."""

    name: str
    url: str
    region: str = ""
    endpoint_url: str = ""
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangelogConfig:
    """`[lake.changelog]`: how long changelogs keep what they hold, and where."""

    retain: str = "forever"
    """Objects whose newest row was committed longer ago than this leave the changelog; `current` keeps its rows."""
    cold_after: str = ""
    """Empty: never. Objects whose newest row was committed longer ago are put into `cold_storage_class`."""
    cold_storage_class: str = ""
    """In the store's words; one whose objects can be read at once."""

    @property
    def retain_s(self) -> float:
        """In seconds; infinite: forever."""
        return age_s(self.retain)

    @property
    def cold_after_s(self) -> float:
        """In seconds; infinite: never."""
        return age_s(self.cold_after or FOREVER)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesConfig:
    """`[lake.files]`: changelogs as plain files beside the Delta tables."""

    tables: tuple[str, ...]
    """Globs of `source.schema.table`."""
    format: str = "jsonl"
    every_s: float = 60.0
    object_bytes_target: int = 128 << 20
    """Of the changelog's Parquet objects whose rows make one object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IcebergConfig:
    """`[lake.iceberg]`: changelogs registered in an Iceberg catalog."""

    tables: tuple[str, ...]
    """Globs of `source.schema.table`."""
    catalog: dict[str, str]
    """Properties of pyiceberg's catalog, without secrets."""
    namespace: str = ""
    """Empty: the source's name."""
    every_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrentConfig:
    """`[lake.current]`: when a table's `current` is rewritten."""

    max_staleness_s: float = 0.0
    """How old a change may get that `current` lacks, where few rows have changed; 0: as `merge_share` allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LakeConfig:
    """`[lake]`: where tables land."""

    url: str
    region: str = ""
    endpoint_url: str = ""
    """For s3://: where boto3's chain does not say it, or another server than AWS."""
    land_every_s: float = 10.0
    land_bytes: int = 128 << 20
    merge_every_s: float = 10.0
    merge_share: float = 0.2
    vacuum_after_s: float = 3600.0
    compact_every_s: float = 60.0
    object_bytes_target: int = 128 << 20
    """Where compaction lets the objects of changelogs stop growing."""
    lease_ttl_s: float = 30.0
    current: CurrentConfig = field(default_factory=CurrentConfig)
    changelog: ChangelogConfig = field(default_factory=ChangelogConfig)
    files: FilesConfig | None = None
    iceberg: IcebergConfig | None = None
    options: dict[str, str] = field(default_factory=dict)
    named: dict[str, NamedLakeConfig] = field(default_factory=dict)
    """`[lake.NAME]`, by name; not a key of the file."""

    @property
    def all(self) -> dict[str, LakeConfig | NamedLakeConfig]:
        """Every lake by its section's name, this one first."""
        return {"lake": self, **{f"lake.{name}": lake for name, lake in self.named.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole file."""

    path: Path | None
    state_dir: Path
    sources: dict[str, SourceConfig]
    lake: LakeConfig
    models: dict[str, ModelConfig] = field(default_factory=dict)
    targets: dict[str, TargetConfig] = field(default_factory=dict)
    syncs: dict[str, SyncConfig] = field(default_factory=dict)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    log_bytes_max: int = 10 << 30
    log_segment_bytes: int = 64 << 20
    metrics_listen: str = "127.0.0.1:9187"
    """Address of metrics and health; empty: none; port 0: any free port, written to the state database."""
    shutdown_timeout_s: float = 30.0
    log_format: str = "auto"
    log_level: str = "info"
    extra: dict[str, Any] = field(default_factory=dict, repr=False)
    """For code that builds a configuration by itself (tests, demo); not a key of the file."""

    @property
    def state_path(self) -> Path:
        """The state database (cdc.state)."""
        return self.state_dir / "state.db"

    @property
    def log_dir(self) -> Path:
        """The folder of the event log's segments (cdc.log)."""
        return self.state_dir / "log"


def password_of(config: SourceConfig | TargetConfig) -> str | None:
    """The secret that the section refers to, None if it refers to none; read now, so a rotated one is taken at the next
    connection. Never log it. ConfigError if it cannot be read; the message names the file or the variable only."""
    if config.password_env:
        value = os.environ.get(config.password_env)
        if value is None:
            raise ConfigError(
                f"{config.name}: environment variable {config.password_env} is not set", hint="it holds the password"
            )
        return value
    if config.password_file:
        try:
            return config.password_file.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ConfigError(f"{config.name}: cannot read password_file {config.password_file}: {reason}") from None
    return None


def has_inline_password(dsn: str) -> bool:
    """Whether a connection string of Postgres carries a password of its own."""
    if re.match(r"postgres(ql)?://", dsn):
        authority = dsn.split("://", 1)[1].split("/", 1)[0]
        user = authority.rpartition("@")[0]
        return ":" in user or bool(re.search(r"[?&]password=", dsn))
    return bool(re.search(r"(^|\s)password\s*=", dsn))
