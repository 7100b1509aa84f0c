"""Several object stores as one: each table's objects stand in the store of its lake, everything else in the main one.

All keys of a table begin with its path (cdc.lake.layout), so a key alone says where it belongs, and who reads or writes
through here cannot reach another place. A store shows what belongs to it: objects of a table that stood elsewhere
before are neither read, listed nor deleted where they were left. What belongs where is said by the configuration, once
for the life of a process; that a table has moved is for cdc.places to notice.

A failure of one store is told as it is; nothing is written elsewhere instead.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from cdc import registry
from cdc.config import Config, LakeConfig
from cdc.errors import ConfigError
from cdc.lake.layout import decode_name, table_of_path
from cdc.ports import ObjectStore, StoredObject, TieredStore
from cdc.table import TableId


class RoutingStore:
    """The protocol of cdc.ports.TieredStore over `main` and stores by name. `lake_of` says the name of the lake of a
    source's table, empty for `main`. Thread-safe as far as the stores are."""

    def __init__(
        self, main: ObjectStore, named: Mapping[str, ObjectStore], lake_of: Callable[[str, TableId], str]
    ) -> None:
        self.stores: dict[str, ObjectStore] = {"": main, **named}
        """By the lake's name; the main one, whose name is empty, first."""
        self._lake_of = lake_of
        self._known: dict[str, str] = {}

    def put(self, key: str, data: Any, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """As ports.ObjectStore, in the store of the key's table."""
        return self._store(key).put(key, data, if_absent=if_absent, if_match=if_match)

    def get(self, key: str, *, into: Path | None = None) -> tuple[bytes, str] | None:
        """As ports.ObjectStore, from the store of the key's table."""
        return self._store(key).get(key, into=into)

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """As ports.ObjectStore. A prefix that ends above or within tables' names lists all stores."""
        if prefix.count("/") >= 2:
            # Source and table are whole.
            return self._store(prefix).list(prefix)
        listings = [self._own(name, store, prefix) for name, store in self.stores.items()]
        return heapq.merge(*listings, key=lambda stored: stored.key)

    def delete(self, keys: Sequence[str]) -> None:
        """As ports.ObjectStore, store by store. An error leaves those of the stores behind it."""
        by_lake: dict[str, list[str]] = {}
        for key in keys:
            by_lake.setdefault(self.lake(key), []).append(key)
        for name, own in by_lake.items():
            self.stores[name].delete(own)

    def move(self, key: str, storage_class: str) -> bool:
        """As ports.TieredStore, in the store of the key's table, which must be one."""
        return cast(TieredStore, self._store(key)).move(key, storage_class)

    def location(self, key: str) -> tuple[str, dict[str, str]]:
        """As ports.ObjectStore, in the store of the key's table."""
        return self._store(key).location(key)

    def lake(self, key: str) -> str:
        """Name of the lake that a key belongs to; empty: the main one."""
        folder = "/".join(key.split("/", 2)[:2])
        if folder not in self._known:
            self._known[folder] = self._look_up(folder)
        return self._known[folder]

    def _look_up(self, folder: str) -> str:
        table = table_of_path(folder)
        if table is None:
            return ""
        try:
            source = decode_name(folder.partition("/")[0])
        except ValueError:
            return ""
        return self._lake_of(source, table)

    def _store(self, key: str) -> ObjectStore:
        return self.stores[self.lake(key)]

    def _own(self, name: str, store: ObjectStore, prefix: str) -> Iterator[StoredObject]:
        return (stored for stored in store.list(prefix) if self.lake(stored.key) == name)


def open_lake(config: Config) -> ObjectStore:
    """The object store of the whole lake: that of `[lake]`, or, with lakes of other names, one that knows them all.
    ConfigError for a kind of store that is not installed, or cannot do what is asked of it. May touch the stores."""
    stores = {at: registry.lake_store(lake) for at, lake in config.lake.all.items()}
    for at, store in stores.items():
        if config.lake.changelog.cold_after and not isinstance(store, TieredStore):
            raise ConfigError(
                f"lake.changelog.cold_after: the store of [{at}] has no classes of storage",
                hint="leave out cold_after and cold_storage_class",
            )
    main = stores.pop("lake")
    if not stores:
        return main
    named = {at.removeprefix("lake."): store for at, store in stores.items()}

    def lake_of(source: str, table: TableId) -> str:
        known = config.sources.get(source)
        return known.lake_of(str(table)) if known is not None else ""

    return RoutingStore(main, named, lake_of)


def stores_of(store: ObjectStore, lake: LakeConfig) -> dict[str, tuple[str, ObjectStore]]:
    """URL and store of each lake, by name; the main one, whose name is empty, first."""
    stores = store.stores if isinstance(store, RoutingStore) else {"": store}
    return {name: (lake.named[name].url if name else lake.url, each) for name, each in stores.items()}


__all__ = ["RoutingStore", "open_lake", "stores_of"]
