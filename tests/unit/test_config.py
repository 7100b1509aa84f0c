"""The configuration file: what is taken, what is refused and how it is told."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from cdc.config import (
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
    password_of,
)
from cdc.config_file import load, parse
from cdc.config_serving import GuardConfig, ModelConfig, RequestConfig, SyncConfig, TargetConfig
from cdc.errors import ConfigError
from cdc.lake.routing import open_lake
from cdc.table import TableId
from cdc.units import duration_s, size_bytes, wal_threshold
from cdc.upkeep import Limits

EXAMPLE = Path(__file__).parents[2] / "config.example.toml"

SECTIONS: dict[str, Any] = {
    "": Config,
    "source": SourceConfig,
    "table": TableConfig,
    "alerts": AlertsConfig,
    "verify": VerifyConfig,
    "lake": LakeConfig,
    "lake.eu": NamedLakeConfig,
    "changelog": ChangelogConfig,
    "files": FilesConfig,
    "iceberg": IcebergConfig,
    "lake.current": CurrentConfig,
    "model": ModelConfig,
    "target": TargetConfig,
    "sync": SyncConfig,
    "guard": GuardConfig,
    "request": RequestConfig,
}
NO_KEYS = {"name", "named", "path", "sources", "lake", "models", "targets", "syncs", "alerts", "verify", "extra"}
COLD = {"cold_after": "30d", "cold_storage_class": "GLACIER_IR"}


def document(**changes: Any) -> dict[str, Any]:
    """A small valid document; `changes` are laid over it, dotted by double underscores."""
    base: dict[str, Any] = {
        "alerts": {},
        "verify": {},
        "state_dir": "/var/lib/cdc",
        "source": {"shop": {"dsn": "postgresql://cdc@db/shop"}},
        "lake": {"url": "file:///srv/lake"},
        "model": {"value": {"sql": "select 1 as id", "key": ["id"]}},
        "target": {"crm": {"type": "postgres", "dsn": "host=crm"}},
        "sync": {"value": {"model": "value", "target": "crm", "table": "public.value", "key": ["id"]}},
    }
    for path, value in changes.items():
        *folders, key = path.split("__")
        table = base
        for folder in folders:
            table = table.setdefault(folder, {})
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value
    return base


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(document(**changes))
    return str(caught.value)


def test_a_small_document_gives_every_default_and_those_that_depend_on_names() -> None:
    config = parse(document())
    shop = config.sources["shop"]
    assert (shop.slot, shop.publication, shop.tables) == ("cdc_shop", ("cdc_shop",), ())
    assert config.targets["crm"].origin == "cdc_crm"
    assert config.log_bytes_max == 10 << 30
    assert config.lake.url == "file:///srv/lake"
    assert config.state_path == Path("/var/lib/cdc/state.db")


def test_the_example_file_is_valid() -> None:
    config = load(EXAMPLE)
    assert list(config.sources) == ["shop"]
    assert config.syncs["customer_value"].model == "customer_value"


def test_the_example_file_names_every_key_and_no_other() -> None:
    named: dict[str, set[str]] = {section: set() for section in SECTIONS}
    section = ""
    for line in EXAMPLE.read_text().splitlines():
        if re.match(r'(?:# )?\[source\.\w+\.table\."', line):
            section = "table"
        elif inner := re.match(r"(?:# )?\[sync\.\w+\.(?:delete_)?(\w+)\]", line):
            section = inner[1]
            named["sync"].add(line.rstrip("]").rpartition(".")[2])
        elif header := re.match(r"(?:# )?\[(\w+)(?:\.(\w+))?\]", line):
            if header[1] == "lake" and header[2]:
                named["lake"] |= {header[2]} - {"eu"}
                inside = f"lake.{header[2]}"
                section = inside if inside in SECTIONS else header[2] if header[2] in SECTIONS else "lake"
            else:
                section = header[1]
        elif key := re.match(r"(?:# )?([a-z_]+)(?:\.\w+)? = ", line):
            named[section].add(key[1])
    for section, cls in SECTIONS.items():
        keys = {f.name for f in fields(cls)} - (NO_KEYS - {"lake"} if section == "table" else NO_KEYS)
        keys |= {"path"} if section == "request" else set()
        keys -= {"table"} if section == "source" else set()  # a section of its own
        assert named[section] == keys, f"section [{section}]"


def test_the_example_file_shows_the_defaults() -> None:
    config = load(EXAMPLE)
    shown: dict[str, Any] = {
        "": config,
        "source": config.sources["shop"],
        "alerts": config.alerts,
        "verify": config.verify,
        "lake": config.lake,
        "changelog": config.lake.changelog,
        "files": config.lake.files,
        "iceberg": config.lake.iceberg,
        "lake.current": config.lake.current,
        "target": config.targets["crm"],
        "sync": config.syncs["customer_value"],
        "guard": config.syncs["customer_value"].guard,
        "request": config.syncs["notify"].request,
    }
    compared = 0
    for section, value in shown.items():
        for f in fields(SECTIONS[section]):
            if f.name in NO_KEYS or f.default in (MISSING, None, "", ()):
                continue
            assert getattr(value, f.name) == f.default, f"[{section}] {f.name}"
            compared += 1
    assert compared > 25


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("128MB", 128 << 20),
        ("10GB", 10 << 30),
        ("64kB", 64 << 10),
        ("1 TiB", 1 << 40),
        ("1.5MB", 3 << 19),
        ("7B", 7),
        (9, 9),
    ],
)
def test_sizes_are_powers_of_1024_as_in_postgresql_conf(text: str | int, expected: int) -> None:
    assert size_bytes(text) == expected


@pytest.mark.parametrize("text", ["128", "MB", "-1MB", "128 megs", "1e3MB", "", "128MB "[::-1]])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        size_bytes(text)


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("15m", 900), ("1.5h", 5400), (" 1 d ", 86400)])
def test_durations(text: str, expected: float) -> None:
    assert duration_s(text) == expected


@pytest.mark.parametrize("text", ["", "15", "m", "0s", "-1h", "15 minutes", "1w"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        duration_s(text)


def test_a_periodic_source_has_a_schedule_and_no_slot() -> None:
    shop = parse(document(source__shop__mode="snapshot", source__shop__every="15m")).sources["shop"]
    assert (shop.is_periodic, shop.strategy, shop.full_every) == (True, "diff", "1d")
    assert not parse(document()).sources["shop"].is_periodic
    two = {"dsn": "postgresql://cdc@db/shop", "mode": "snapshot", "cron": "0 3 * * *"}
    assert set(parse(document(source__other=two, source__third=two)).sources) == {"shop", "other", "third"}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({}, 'source.shop: set exactly one of every ("15m") and cron'),
        ({"every": "15m", "cron": "0 * * * *"}, "set exactly one of every"),
        ({"every": "15 minutes"}, 'source.shop.every: "15 minutes" is no duration'),
        ({"cron": "61 * * * *"}, 'source.shop.cron: "61 * * * *" is no cron expression'),
        ({"cron": "0 0 30 2 *"}, "is no cron expression"),
        ({"every": "1h", "full_every": "often"}, 'source.shop.full_every: "often" is no duration'),
        ({"every": "1h", "strategy": "cursor"}, "source.shop.cursor: names the column"),
        ({"every": "1h", "cursor": "updated_at"}, "source.shop.cursor: names the column"),
        ({"every": "1h", "strategy": "diffs"}, "did you mean diff?"),
        ({"every": "1h", "slot": "mine"}, 'source.shop.slot: goes with mode = "stream" only'),
        ({"every": "1h", "cursor_lag_s": -1}, "source.shop.cursor_lag_s: must be at least 0"),
    ],
)
def test_what_does_not_go_with_periodic_runs_is_refused(changes: dict[str, Any], part: str) -> None:
    given = {f"source__shop__{key}": value for key, value in changes.items()}
    assert part in refusal(source__shop__mode="snapshot", **given)


@pytest.mark.parametrize("key", ["every", "cron", "strategy", "cursor", "full_every"])
def test_what_goes_with_periodic_runs_only_is_refused_for_a_stream(key: str) -> None:
    value = {"strategy": "diff"}.get(key, "1h")
    assert f'source.shop.{key}: goes with mode = "snapshot" only' in refusal(**{f"source__shop__{key}": value})


def test_an_unknown_key_names_its_path_and_the_nearest_known_one() -> None:
    assert "source.shop.slto: unknown key; did you mean slot?" in refusal(source__shop__slto="x")
    assert "lake.land_every: unknown key; did you mean land_every_s?" in refusal(lake__land_every=3)
    assert "sourcee: unknown key; did you mean source?" in refusal(sourcee={})
    assert "source.shop.name: unknown key" in refusal(source__shop__name="x")


def test_all_problems_are_told_at_once() -> None:
    message = refusal(source__shop__slto="x", lake__url=None, sync__value__target="cmr", state_dir=None)
    for part in ("source.shop.slto", "lake.url: is required", "state_dir: is required", "did you mean crm?"):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"source__shop__table": {"public.users": {"columns": {"ssn": "drop"}}}},
            'source.shop.table."public.users".columns: "ssn": hiding columns is not supported yet',
        ),
        (
            {"source__shop__table": {"public.users": {"columns": {"email": {"hash": "sha256"}}}}},
            '"email": hiding columns is not supported yet',
        ),
        ({"source__shop__type": "kafka"}, 'source.shop.type: "kafka" is not supported yet'),
        ({"target__crm__type": "kafka"}, 'target.crm.type: "kafka" is not supported yet'),
    ],
)
def test_what_comes_later_is_refused_and_not_ignored(changes: dict[str, Any], part: str) -> None:
    assert part in refusal(**changes)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"sync__value__model": "valu"}, "sync.value.model: there is no [model.valu]; did you mean value?"),
        ({"sync__value__sql": "select 1"}, "set exactly one of model and sql"),
        ({"sync__value__model": None}, "set exactly one of model and sql"),
        ({"sync__value__key": []}, "sync.value.key: name at least one column"),
        ({"model__value__key": ["id", "id"]}, "model.value.key: a column stands there twice"),
        ({"source__shop__dsn": None}, "source.shop.dsn: is required"),
        ({"source__shop__on_schema_change": "frieze"}, "did you mean freeze?"),
        ({"source__shop__table": {"users": {}}}, 'write "public.users"'),
        ({"source__shop__table": {"public.users": "freeze"}}, "a key where a section is expected"),
        (
            {"source__shop__table": {"public.users": {"on_schema_change": "thaw"}}},
            'source.shop.table."public.users".on_schema_change: "thaw" is none of',
        ),
        (
            {"source__shop__table": {"public.users": {"partition_by": "created_at:week"}}},
            'source.shop.table."public.users".partition_by: write "COLUMN:UNIT", where the unit is hour, day, month',
        ),
        ({"source__shop__table": {"public.users": {"partition_by": ":day"}}}, 'write "COLUMN:UNIT"'),
        ({"source__shop__table": {"public.users": {"partition_by": 1}}}, "a text is expected"),
        ({"alerts__webhook": "hooks.internal"}, "alerts.webhook: write a URL"),
        ({"verify__every": 5}, "verify.every: unknown key; did you mean every_s?"),
        ({"verify__sample_percent": 101}, "verify.sample_percent: is a percentage"),
        ({"verify__time_share": 1.5}, "is a share, at most 1"),
        ({"source__shop__tables": ["orders"]}, 'write "public.orders"'),
        ({"source__shop__tables": "public.*"}, "source.shop.tables: a list of texts is expected"),
        ({"source__shop__slot": "Shop-1"}, "source.shop.slot: only a-z"),
        ({"source__shop__confirm_after": "land"}, "did you mean landed?"),
        ({"source__shop__chunk_rows": 0}, "source.shop.chunk_rows: must be at least 1"),
        ({"source__shop__chunk_rows": True}, "a whole number is expected, not a boolean"),
        ({"source__shop__connect_timeout_s": "10s"}, "seconds as a number expected, not a text"),
        ({"source__shop__connect_timeout_s": float("inf")}, "seconds as a number"),
        ({"lake__land_every_s": 0}, "lake.land_every_s: must be greater than 0"),
        ({"lake__vacuum_after_s": 8 * 86400}, "a week at most"),
        ({"lake__merge_share": 1.5}, "is a share, at most 1"),
        ({"lake__changelog": {"retain": "12h"}}, "lake.changelog.retain: must be at least a day"),
        ({"lake__changelog": {"retain": "90"}}, "is no duration"),
        ({"lake__changelog": "90d"}, "write a [lake.changelog] section"),
        ({"lake__changelog": {"keep": "90d"}}, "lake.changelog.keep: unknown key"),
        ({"lake__changelog": COLD}, "lake.changelog.cold_after: [lake] is a local directory, without storage classes"),
        ({"lake__url": "s3://b/p", "lake__changelog": {"cold_after": "30d"}}, "set both cold_after and"),
        ({"lake__url": "s3://b/p", "lake__changelog": {**COLD, "cold_after": "forever"}}, "leave it out for never"),
        ({"lake__url": "s3://b/p", "lake__changelog": {**COLD, "retain": "30d"}}, "nothing would ever be put away"),
        (
            {"lake__url": "s3://b/p", "lake__changelog": {**COLD, "cold_storage_class": "DEEP_ARCHIVE"}},
            "cannot be read at once",
        ),
        ({"source__shop__table": {"public.t": {"retain": "1h"}}}, "retain: must be at least a day"),
        ({"lake__current": 3}, "write a [lake.current] section"),
        ({"lake__current__max_staleness": 3}, "did you mean max_staleness_s?"),
        ({"lake__current__max_staleness_s": -1}, "lake.current.max_staleness_s: must be at least 0"),
        ({"lake__current__max_staleness_s": 1801}, "at most half of vacuum_after_s"),
        ({"lake__url": "file://lake"}, "absolute path"),
        ({"lake__options": {"a": "b"}}, "a local directory has no region"),
        ({"lake__url": "s3://"}, "names no place"),
        ({"lake__files": {"tables": ["public.*"]}}, 'lake.files.tables: write "source.schema.table", not "public.*"'),
        ({"lake__files": {"tables": ["shop.public.*"], "format": "json"}}, "did you mean jsonl?"),
        ({"lake__files": {"format": "jsonl"}}, "lake.files.tables: is required"),
        ({"lake__files": "jsonl"}, "lake.files: write a [lake.files] section"),
        ({"lake__iceberg": {"tables": ["shop.public.*"]}}, "lake.iceberg.catalog: is required"),
        ({"lake__iceberg": {"tables": ["a.b.c"], "catalog": {"token": "x"}}}, "lake.iceberg.catalog.token: a secret"),
        ({"lake__iceberg": {"tables": ["a.b.c"], "catalog": {"uri": "sql://a:x@b"}}}, "catalog.uri: a secret stands"),
        ({"metrics_listen": "9187"}, 'metrics_listen: write "host:port"'),
        ({"metrics_listen": "127.0.0.1:99999"}, "metrics_listen"),
        ({"log_bytes_max": "100MB"}, "at least two segments"),
        ({"log_level": "warn"}, "did you mean warning?"),
        ({"state_dir": ""}, "a path is expected"),
        ({"source__shop": {}}, "source.shop.dsn: is required"),
        ({"source": None}, "write a [source.NAME] section"),
        ({"source__1shop": {"dsn": "x"}}, "source.1shop: a name is a letter"),
        ({"source__shop__password_env": "A", "source__shop__password_file": "b"}, "one of them is enough"),
        (
            {"source__shop__password_env": "A", "source__shop__dsn": "postgresql://cdc:x@db/shop"},
            "the dsn holds a password too",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_its_path(changes: dict[str, Any], part: str) -> None:
    assert part in refusal(**changes)


def test_two_sources_on_one_slot_are_refused() -> None:
    twin = {"dsn": "postgresql://cdc@db/shop", "slot": "cdc_shop"}
    assert "a slot has one reader" in refusal(source__twin=twin)


def test_secrets_stand_neither_in_errors_nor_in_repr() -> None:
    secret = "hunter2"
    config = parse(document(source__shop__dsn=f"postgresql://cdc:{secret}@db/shop"))
    assert secret not in repr(config)
    assert secret not in refusal(source__shop__dsn=f"postgresql://cdc:{secret}@db/shop", source__shop__slto="x")
    assert secret not in refusal(source__shop__chunk_rows=secret)


def test_a_password_comes_from_its_file_or_variable_at_the_time_of_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pg"
    file.write_text("it's\\ a/secret&\n")
    by_url = parse(document(source__shop__password_file=str(file))).sources["shop"]
    assert password_of(by_url) == "it's\\ a/secret&"
    file.write_text("rotated")
    assert password_of(by_url) == "rotated"

    monkeypatch.setenv("CRM_PASSWORD", "it's\\")
    by_keys = parse(document(target__crm__password_env="CRM_PASSWORD")).targets["crm"]
    assert password_of(by_keys) == "it's\\"


def test_a_secret_that_is_missing_is_named_and_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH", raising=False)
    source = parse(document(source__shop__password_env="NO_SUCH")).sources["shop"]
    with pytest.raises(ConfigError, match="NO_SUCH is not set"):
        password_of(source)
    source = parse(document(source__shop__password_file=str(tmp_path / "none"))).sources["shop"]
    with pytest.raises(ConfigError, match="none: No such file"):
        password_of(source)


@pytest.mark.parametrize(
    ("dsn", "expected"),
    [
        ("postgresql://u:p@h/d", True),
        ("postgres://u@h:5432/d", False),
        ("postgresql:///d?host=/tmp&password=x", True),
        ("postgresql:///d?passfile=/x", False),
        ("host=h password = x", True),
        ("host=h user=u", False),
    ],
)
def test_a_password_inside_a_connection_string_is_noticed(dsn: str, expected: bool) -> None:
    assert has_inline_password(dsn) is expected


def test_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    file = tmp_path / "cdc.toml"
    file.write_text('state_dir = "state"\n[source.a]\ndsn = "host=x"\npassword_file = "pw"\n[lake]\nurl = "my lake"\n')
    config = load(file)
    assert config.state_dir == tmp_path / "state"
    assert config.sources["a"].password_file == tmp_path / "pw"
    assert config.lake.url == f"file://{tmp_path}/my%20lake"


def test_the_file_is_found_by_argument_then_variable_then_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CDC_CONFIG", raising=False)
    with pytest.raises(ConfigError, match="no configuration file"):
        load()
    text = '[source.a]\ndsn = "host=x"\n[lake]\nurl = "/lake"\n'
    for name in ("cdc.toml", "variable.toml", "argument.toml"):
        (tmp_path / name).write_text(f'state_dir = "{name}.d"\n{text}')
    assert load().state_dir.name == "cdc.toml.d"
    monkeypatch.setenv("CDC_CONFIG", "variable.toml")
    assert load().state_dir.name == "variable.toml.d"
    assert load("argument.toml").state_dir.name == "argument.toml.d"
    with pytest.raises(ConfigError, match="does not exist"):
        load("none.toml")


def test_broken_toml_names_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "cdc.toml"
    file.write_text("state_dir = \n")
    with pytest.raises(ConfigError, match=r"cdc\.toml: .*line 1"):
        load(file)


def test_a_table_meets_its_own_contract_or_the_one_of_its_source() -> None:
    own = {"public.users": {"on_schema_change": "stop"}, "public.plain": {}}
    shop = parse(document(source__shop__table=own, source__shop__on_schema_change="freeze")).sources["shop"]
    assert [shop.contract(t) for t in ("public.users", "public.plain", "public.other")] == ["stop", "freeze", "freeze"]
    assert parse(document()).sources["shop"].contract("public.users") == "evolve"


@pytest.mark.parametrize(("text", "means"), [("50%", (0.5, 0)), ("0.5 %", (0.005, 0)), ("10GB", (0.0, 10 << 30))])
def test_a_threshold_is_a_share_or_a_size(text: str, means: tuple[float, int]) -> None:
    assert wal_threshold(text) == means


@pytest.mark.parametrize("text", ["0%", "101%", "half", "-1%", ""])
def test_what_is_no_threshold_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no (share|size)"):
        wal_threshold(text)


def test_ages_are_durations_and_a_table_may_have_its_own() -> None:
    config = parse(
        document(
            lake__url="s3://bucket/prefix",
            lake__changelog={"retain": "90d", **COLD},
            source__shop__table={"public.t": {"retain": "forever"}, "public.u": {"retain": "2d"}, "public.v": {}},
        )
    )
    limits = Limits.of(config.lake, config.sources["shop"])
    kept = {name: limits.retain_of(TableId("public", name)) / 86400 for name in ("t", "u", "v", "w")}
    assert kept == {"t": math.inf, "u": 2, "v": 90, "w": 90}
    assert (limits.cold_after_s, limits.cold_class) == (30 * 86400, "GLACIER_IR")


def test_a_store_without_classes_of_storage_is_not_asked_for_one(tmp_path: Path) -> None:
    """Also one that another package brings, of which the configuration knows nothing."""
    lake = LakeConfig(url=tmp_path.as_uri(), changelog=ChangelogConfig(**COLD))
    with pytest.raises(ConfigError, match="has no classes of storage"):
        open_lake(Config(path=None, state_dir=tmp_path, sources={}, lake=lake))


def test_columns_are_declared_with_a_type_that_can_be_held() -> None:
    def declared(columns: Any) -> dict[str, Any]:
        return {"source__shop__table": {"public.t": {"columns": columns}}}

    shop = parse(document(**declared({"a": {"type": "decimal(38,10)"}, "b": {"type": "string"}}))).sources["shop"]
    assert [shop.declared("public.t", c) for c in "abc"] == ["decimal(38,10)", "string", ""]
    assert shop.declared("public.other", "a") == ""
    for wrong, part in (
        ({"a": {"type": "decimal(39,0)"}}, "1 <= p <= 38"),
        ({"a": {"type": "double"}}, '"string" or "decimal(p,s)"'),
        ({"a": {"type": "string", "hash": "sha256"}}, "not supported yet"),
        ({"a": "string"}, "its type is expected"),
        ({"a": {}}, "its type is expected"),
        ([], "a table of columns is expected"),
    ):
        assert part in refusal(**declared(wrong))


def test_lakes_of_other_names_stand_beside_the_sections_of_the_lake() -> None:
    config = parse(
        document(
            lake__options={"sse": "AES256"}, lake__url="s3://main/x",
            lake__eu={"url": "s3://eu/x", "region": "eu-west-1"}, lake__local={"url": "files"},
            source__shop__lakes={"hr.*": "eu"},
            source__shop__table={"public.orders": {"lake": "main"}},
        )
    )  # fmt: skip
    assert list(config.lake.named) == ["eu", "local"]
    assert (config.lake.named["eu"].region, config.lake.options) == ("eu-west-1", {"sse": "AES256"})
    assert config.lake.named["local"].url == (Path.cwd() / "files").as_uri()
    assert config.sources["shop"].lake_of("hr.person") == "eu"
    assert config.sources["shop"].lake_of("public.orders") == ""


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"lake__current": {"url": "file:///eu"}},
            "lake.current: means something else, and cannot be the name of a lake",
        ),
        ({"lake__main": {"url": "file:///eu"}}, "lake.main: means something else"),
        ({"lake__options": {"url": "file:///eu"}}, "lake.options: means something else"),
        ({"lake__optoins": {"sse": "AES256"}}, "did you mean options?"),
        ({"lake__eu": {"url": "file:///eu", "land_every_s": 5}}, "lake.eu.land_every_s: unknown key"),
        ({"lake__eu": {"url": "file:///eu", "region": "eu-west-1"}}, "lake.eu: a local directory has no region"),
        ({"lake__eu": {"url": "s3://"}}, "lake.eu.url: names no place"),
        ({"lake__9": {"url": "file:///eu"}}, "lake.9: a name is a letter"),
        ({"source__shop__lakes": {"hr": "main"}}, 'write "hr.*"'),
        (
            {"lake__eu": {"url": "file:///eu"}, "source__shop__lakes": {"hr.*": "ue"}},
            'source.shop.lakes."hr.*": there is no [lake.ue]; did you mean eu?',
        ),
        (
            {"source__shop__table": {"hr.person": {"lake": "eu"}}},
            'source.shop.table."hr.person".lake: there is no [lake.eu]; known: main',
        ),
    ],
)
def test_a_lake_that_cannot_be_meant_is_refused_with_what_can(changes: dict[str, Any], told: str) -> None:
    assert told in refusal(**changes)
