"""A changelog registered as an Iceberg table: the same Parquet objects, named once more in an Iceberg catalog.

Guarantees:
- Each snapshot has exactly the objects of one version of the changelog, and says which one (`cdc.version` in its
  summary, with epoch and position). That is the checkpoint: whatever dies, the next process finds it in the catalog,
  and takes what has come since. Rows and position are one commit of the catalog's; one that lost a race is made anew.
- What a snapshot should have is compared with what it has, so a repetition changes nothing, and what another program
  has rewritten there becomes ours again.
- Columns are known by name (a name mapping), as our objects have no field ids; they are added and widened as in the
  changelog, never removed.
- Expired snapshots go after as long as replaced objects stay (`keep_s`), and with them their manifests.

It writes no data file and deletes none: the changelog's vacuum does, and waits for this follower (cdc.follow). The
table is not partitioned: our objects do not hold `_date`, and readers prune by bounds of `_committed_at` and `_lsn`.

The only module that knows pyiceberg, which is optional: importing it without raises ImportError. One thread.
"""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import CommitFailedException, NoSuchTableError, NotInstalledError, ValidationError
from pyiceberg.io.pyarrow import parquet_file_to_data_file, schema_to_pyarrow
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table, TableProperties

from cdc.errors import CdcError, SchemaConflict, StoreConflict, StoreRefused, StoreUnavailable
from cdc.failpoints import failpoint
from cdc.lake.changelog import ChangelogTokens
from cdc.lake.layout import DATE, system_name
from cdc.lake.spans import Followed, Span, Spans
from cdc.ports import ObjectStore
from cdc.table import TableId

log = logging.getLogger(__name__)
# It warns of each column without statistics, which are most of ours, for each object.
logging.getLogger("pyiceberg.io.pyarrow").setLevel(logging.ERROR)

NAME: Final = "cdc"
"""Of the catalog, where its properties do not have another `name`: under it pyiceberg looks for further ones in the
environment (`PYICEBERG_CATALOG__CDC__…`)."""
EXPIRE_EVERY_S: Final = 600.0
_OWNER: Final = "cdc.table"
_ID, _VERSION = "cdc.changelog", "cdc.version"
_PROPERTIES: Final = {
    # The objects are the lake's: no other program's clean-up of this table may delete them.
    "gc.enabled": "false",
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "20",
}


class IcebergCatalog:
    """The catalog of the configuration; opened when it is first needed."""

    def __init__(self, properties: Mapping[str, str], namespace: str) -> None:
        self._properties = dict(properties)
        self._name = self._properties.pop("name", NAME)
        self._namespace = namespace
        self._catalog: Catalog | None = None

    def table(self, source: str, table: TableId, schema: Callable[[], pa.Schema]) -> Table:
        """The Iceberg table of a changelog, made with `schema` if there is none. SchemaConflict if another table has
        its name."""
        name = (self._namespace or source, f"{table.schema}_{table.name}")
        owner = f"{source}.{table}"
        if self._catalog is None:
            try:
                self._catalog = load_catalog(self._name, **self._properties)
            except (ValueError, TypeError, NotInstalledError) as e:
                # What it says quotes the properties, those of the environment too.
                raise StoreRefused(
                    f"the Iceberg catalog cannot be opened: {type(e).__name__}",
                    hint="lake.iceberg.catalog: pyiceberg's manual has the properties",
                ) from e
        try:
            found = self._catalog.load_table(name)
        except NoSuchTableError:
            self._catalog.create_namespace_if_not_exists(name[0])
            found = self._catalog.create_table(name, schema=schema(), properties={**_PROPERTIES, _OWNER: owner})
        if found.properties.get(_OWNER) != owner:
            raise SchemaConflict(
                f"the Iceberg table {'.'.join(name)} is another one's than {owner}",
                hint="drop it, or name another lake.iceberg.namespace",
            )
        # A commit that lost a race would be put upon the winner's snapshot as it is, and its objects be there twice.
        once = {**found.metadata.properties, TableProperties.COMMIT_NUM_RETRIES: "0"}
        found.metadata = found.metadata.model_copy(update={"properties": once})
        return found


class RegisteredTable:
    """The downstream of a follower (cdc.stage.Downstream): one changelog in the catalog."""

    def __init__(
        self, store: ObjectStore, source: str, table: TableId, spans: Spans, catalog: IcebergCatalog, *, keep_s: float,
        go_on: Callable[[], None] = lambda: None, wrote: Callable[[int], None] = lambda rows: None,
    ) -> None:  # fmt: skip
        """`spans` are whole ones (`Spans.states`). `keep_s`: age at which snapshots expire. `go_on` raises if nothing
        may be written any more; `wrote` hears of the rows that came."""
        self._store = store
        self._source = source
        self._table = table
        self._spans = spans
        self._catalog = catalog
        self._keep_s = keep_s
        self._go_on = go_on
        self._wrote = wrote
        self._expire_at = 0.0
        self._shown = -1

    def resume(self) -> Followed:
        """The version that the newest snapshot of ours has; from the beginning if it is of another changelog."""
        with _translated(f"{self._source}.{self._table}"):
            self._spans.changelog.refresh()
            position = _position(self._load())
        mine = position.get(_ID) == self._spans.changelog.delta.id()
        self._shown = int(position[_VERSION]) if mine else -1
        return Followed(self._shown)

    def write(self, span: Span) -> Followed:
        """Have the table show the objects of the span's last version; durable on return."""
        with _translated(f"{self._source}.{self._table}"):
            self._follow(self._load(), span)
        return Followed(span.last, span.through)

    def tick(self) -> Followed | None:
        """Let old snapshots go, now and then. Nothing is held back. StoreConflict if the table is not the one that was
        left: `resume`, and it is filled again."""
        if time.monotonic() >= self._expire_at:
            with _translated(f"{self._source}.{self._table}"):
                table = self._load()
                if self._shown >= 0 and _position(table).get(_VERSION) != str(self._shown):
                    raise StoreConflict(f"Iceberg table of {self._source}.{self._table}: it was dropped or set back")
                self._expire(table)
            self._expire_at = time.monotonic() + EXPIRE_EVERY_S
        return None

    # ---- inside ----

    def _load(self) -> Table:
        return self._catalog.table(self._source, self._table, self._schema)

    def _schema(self) -> pa.Schema:
        """The changelog's columns that stand in its objects."""
        date = system_name(DATE, self._spans.changelog.stored_prefix())
        return pa.schema([f for f in self._spans.changelog.delta.schema() if f.name != date])

    def _follow(self, table: Table, span: Span) -> None:
        delta = self._spans.changelog.delta
        live = {self._url(f.path): f.rows for f in delta.files(span.last)}
        has: dict[str, DataFile] = {}
        if table.current_snapshot() is not None:
            has = {task.file.file_path: task.file for task in table.scan().plan_files()}
        adds, removes = sorted(live.keys() - has.keys()), sorted(has.keys() - live.keys())
        if not adds and not removes:
            return
        tokens = ChangelogTokens(span.through)
        position = {
            _ID: delta.id(),
            _VERSION: str(span.last),
            "cdc.epoch": str(tokens.epoch),
            "cdc.lsn": str(tokens.stream(tokens.epoch)),
        }
        schema = self._schema()
        self._check_scales(schema_to_pyarrow(table.schema()), schema)
        with table.transaction() as transaction:
            with transaction.update_schema() as update:
                update.union_by_name(schema)
            metadata = transaction.table_metadata
            if metadata.name_mapping() is None:
                mapping = metadata.schema().name_mapping.model_dump_json()
                transaction.set_properties({TableProperties.DEFAULT_NAME_MAPPING: mapping})
                metadata = transaction.table_metadata
            files = []
            for url in adds:
                self._go_on()
                if _scales(schema):
                    with table.io.new_input(url).open() as stream:
                        self._check_scales(pq.read_schema(stream), schema)
                files.append(parquet_file_to_data_file(table.io, metadata, url))
            snapshot = transaction.update_snapshot(snapshot_properties=position)
            with snapshot.overwrite() if removes else snapshot.merge_append() as change:
                for url in removes:
                    change.delete_data_file(has[url])
                for file in files:
                    change.append_data_file(file)
            self._go_on()
            failpoint("iceberg.before_commit")
        failpoint("iceberg.after_commit")
        self._shown = span.last
        self._wrote(max(0, sum(live[url] for url in adds) - sum(has[url].record_count for url in removes)))

    def _check_scales(self, old: pa.Schema, new: pa.Schema) -> None:
        """pyiceberg lets a decimal's scale change, which Iceberg does not: other readers would take the digits as they
        are."""
        was, now = _scales(old), _scales(new)
        for path, scale in now.items():
            if was.get(path, scale) != scale:
                raise SchemaConflict(
                    f"Iceberg table of {self._source}.{self._table}: the scale of decimal {path} is"
                    f" {was[path]} in some objects and {scale} now, which Iceberg cannot hold",
                    hint="leave the table out of lake.iceberg.tables, or see docs/operations.md",
                )

    def _expire(self, table: Table) -> None:
        """Let old snapshots go, then what they alone have named. A death between the two leaves small objects that
        nobody names."""
        bound = (dt.datetime.now(dt.UTC).timestamp() - self._keep_s) * 1000
        # What a branch or a tag names stays: somebody has put it there.
        named = {ref.snapshot_id for ref in table.metadata.refs.values()} | {table.metadata.current_snapshot_id}
        old = [s for s in table.snapshots() if s.timestamp_ms < bound and s.snapshot_id not in named]
        if not old:
            return
        manifests = {m.manifest_path for s in old for m in s.manifests(table.io)}
        table.maintenance.expire_snapshots().by_ids([s.snapshot_id for s in old]).commit()
        kept = {m.manifest_path for s in self._load().snapshots() for m in s.manifests(table.io)}
        for path in sorted((manifests | {s.manifest_list for s in old}) - kept):
            table.io.delete(path)

    def _url(self, path: str) -> str:
        location, _ = self._store.location(f"{self._spans.changelog.path}/{path}")
        return f"file://{location}" if location.startswith("/") else location


def _scales(fields: Iterable[pa.Field], at: str = "") -> dict[str, int]:
    """The scale of each decimal, by its path."""
    found: dict[str, int] = {}
    for field in fields:
        path, kind = f"{at}{field.name}", field.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind = kind.value_type
        if pa.types.is_decimal(kind):
            found[path] = kind.scale
        elif pa.types.is_struct(kind):
            found |= _scales(kind, f"{path}.")
    return found


def _position(table: Table) -> dict[str, str]:
    """What the newest snapshot of ours says of itself; others may have made newer ones."""
    snapshot = table.current_snapshot()
    while snapshot is not None:
        summary = snapshot.summary.additional_properties if snapshot.summary is not None else {}
        if _VERSION in summary:
            return dict(summary)
        parent = snapshot.parent_snapshot_id
        snapshot = table.snapshot_by_id(parent) if parent is not None else None
    return {}


@contextmanager
def _translated(table: str) -> Iterator[None]:
    """Errors of pyiceberg and of what it is built upon, as errors of the product."""
    try:
        yield
    except CdcError:
        raise
    except CommitFailedException as e:
        raise StoreConflict(f"Iceberg table of {table}: another writer committed meanwhile") from e
    except (ValidationError, ValueError, TypeError) as e:
        raise SchemaConflict(
            f"Iceberg table of {table} cannot hold the changelog: {_brief(e)}",
            hint="Iceberg has no type for that: leave the table out of lake.iceberg.tables, or see docs/operations.md",
        ) from e
    except Exception as e:
        # A catalog's client raises what its libraries raise (HTTP, SQL, cloud); of those the type must do.
        raise StoreUnavailable(
            f"Iceberg table of {table}: {type(e).__name__}", hint="can the catalog be reached? see lake.iceberg.catalog"
        ) from e


def _brief(error: Exception) -> str:
    """What pyiceberg says of schemas and files: names and types, never rows."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


__all__ = ["IcebergCatalog", "RegisteredTable"]
