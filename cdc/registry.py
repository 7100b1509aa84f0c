"""Finds kinds of sources, sinks and stores through entry points, so that a third party can add one.

Groups: `cdc.sources`, `cdc.sinks` (by the `type` of a section), `cdc.stores` (by the scheme of the lake's URL) and
`cdc.demos` (what `cdc demo` runs on).
Nothing is imported before it is asked for. A kind that is missing or does not import is a ConfigError that lists
those that are known; this module never falls back to another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, cast

from cdc.config import LakeConfig, NamedLakeConfig, SourceConfig
from cdc.config_serving import TargetConfig
from cdc.errors import ConfigError
from cdc.inspection import SourceInspector
from cdc.ports import ChecksumReader, ObjectStore, RunReader, SnapshotReader, Source, SourceAdmin
from cdc.sink import Ledgers, Sink

SOURCES, SINKS, STORES, DEMOS = "cdc.sources", "cdc.sinks", "cdc.stores", "cdc.demos"

StoreFactory = Callable[[str, Mapping[str, str]], ObjectStore]


class SourceKind(Protocol):
    """What an entry point of `cdc.sources` names. None of its methods connects."""

    def source(self, config: SourceConfig, *, application_name: str, temp_dir: Path | None = None) -> Source:
        """The stream of this source. `temp_dir` (None: there is none) is its own, for what need not survive."""

    def reader(self, config: SourceConfig) -> SnapshotReader:
        """A reader of existing rows, with a connection of its own."""

    def comparer(self, config: SourceConfig) -> ChecksumReader:
        """A reader for `verify`, with a connection of its own."""

    def runs(self, config: SourceConfig) -> RunReader:
        """A reader of all tables at once, for periodic runs, with a connection of its own."""

    def admin(self, config: SourceConfig) -> SourceAdmin:
        """What operator's commands do at this source."""

    def inspector(self, config: SourceConfig) -> SourceInspector:
        """What measures this source before anybody relies on it."""


class SinkKind(Protocol):
    """What an entry point of `cdc.sinks` names."""

    def __call__(self, config: TargetConfig, ledgers: Ledgers) -> Sink:
        """The target; connects at first use. `ledgers`: where acknowledgements go that it cannot keep itself."""


def source_kind(name: str) -> SourceKind:
    """The kind of source of that name (`type` in [source.X]); ConfigError lists the known ones."""
    found = _load(SOURCES, name)
    return cast(SourceKind, found() if isinstance(found, type) else found)


def sink_kind(name: str) -> SinkKind:
    """The kind of target of that name (`type` in [target.X]); ConfigError lists the known ones."""
    return cast(SinkKind, _load(SINKS, name))


def store(url: str, options: Mapping[str, str] | None = None) -> ObjectStore:
    """The object store at `url` (`scheme://…`); ConfigError lists the known schemes. May touch the store."""
    scheme, separator, _ = url.partition("://")
    factory = cast(StoreFactory, _load(STORES, scheme if separator else "file"))
    return factory(url, options or {})


def lake_store(lake: LakeConfig | NamedLakeConfig) -> ObjectStore:
    """The one object store that `[lake]`, or `[lake.NAME]`, names; cdc.lake.routing makes one of all."""
    named = {"region": lake.region, "endpoint_url": lake.endpoint_url}
    return store(lake.url, {**{k: v for k, v in named.items() if v}, **lake.options})


def demo_shop(name: str) -> Any:
    """The factory of that demo's shop (`cdc.demo.shop.ShopFactory`); ConfigError lists the known ones."""
    return _load(DEMOS, name)


def known(group: str) -> list[str]:
    """Names that are installed in a group, sorted."""
    return sorted(_entry_points(group))


@cache
def _entry_points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


@cache
def _load(group: str, name: str) -> Any:
    point = _entry_points(group).get(name)
    if point is None:
        kinds = ", ".join(known(group)) or "none; is the package installed?"
        word = {SOURCES: "source", SINKS: "target", STORES: "store", DEMOS: "demo"}[group]
        raise ConfigError(f'there is no {word} of kind "{name}"', hint=f"known kinds: {kinds}")
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f'kind "{name}" ({point.value}) does not import: {error}', hint="install the extra that it needs"
        ) from error
