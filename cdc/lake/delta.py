"""One Delta table: its versions, files, schema and tokens, and the one way to change it.

Guarantees:
- A commit is all or nothing, and carries its tokens (Delta `txn` actions) in the same atomic step as its files.
- What a commit rests on is checked *in the version that it is committed upon*: a commit that loses a race is checked
  again against the newer version before it is tried again. deltalake alone would accept a lower token without a word,
  remove a file that is not there, and rebase a commit past tokens that were never looked at.
- A commit whose answer was lost is recognised by the id that it carries, never repeated.
- Waits for nothing but the store; tries a bounded number of times.

It does not write or delete data files (but for `vacuum`), does not know what the tokens mean, and is not thread-safe:
one DeltaLog belongs to one thread. It never goes through deltalake's own readers, which cost a query engine.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, PostCommitHookProperties
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction

from cdc.errors import (
    CdcError,
    FormatTooNew,
    InvariantBroken,
    LeaseLost,
    SchemaConflict,
    StoreConflict,
    StoreUnavailable,
)  # fmt: skip
from cdc.lake.actions import commit_text, file_actions, metadata_actions, same_schema
from cdc.lake.commits import COMMIT_KEY, LEASE, Commit, Commits, HistoryGone
from cdc.lake.widening import merged
from cdc.ports import ObjectStore

log = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT: Final = 1
"""Version of the layout of our tables; kept in the table's configuration."""

_FORMAT_KEY = "cdc.format"
_ATTEMPTS = 8
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_=./-]+")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
CHECKPOINT_EVERY: Final = 50
"""Versions."""
_DEFAULTS = {"delta.checkpointInterval": str(CHECKPOINT_EVERY), _FORMAT_KEY: str(FORMAT)}


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedFile:
    """A data file to make visible. `path` is relative to the table; letters, digits and `_=./-` only.

    `partition` has a value for every partition column. Statistics of columns stand in the file's own footer only: where
    Delta's log has those of some columns, deltalake's `to_pyarrow_dataset` takes any filter on another one for false.
    """

    path: str
    size: int
    rows: int
    partition: Mapping[str, str | None] = field(default_factory=dict)
    added_ms: int | None = None
    """When its rows came into the table, as Unix time; None: now."""


class LiveFile(NamedTuple):
    """A data file of one version of the table."""

    path: str
    size: int
    rows: int
    partition: dict[str, str | None]
    added_ms: int = 0
    """When it was added, in milliseconds since 1970 by its writer's clock."""


class DeltaLog:
    """The Delta table under `prefix` of a store. Nothing is read before the first call that needs it."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store = store
        self.prefix = prefix
        self._location, self._options = store.location(prefix)
        self._table: DeltaTable | None = None
        self._commits = Commits(store, prefix)
        self._vacuumed: set[str] = set()

    # ---- opening ----

    def exists(self) -> bool:
        """Whether the table exists (reads it if it does)."""
        return self._load() is not None

    def open_or_create(
        self,
        schema: pa.Schema,
        *,
        partition_by: Sequence[str] = (),
        configuration: Mapping[str, str] | None = None,
        tokens: Mapping[str, int] | None = None,
    ) -> bool:
        """Make sure that the table exists and has at least these columns; True if this call created it.

        `configuration` and `tokens` apply to a table that is created. Fields keep their metadata. SchemaConflict if the
        table cannot hold the schema, FormatTooNew if a newer release made it.
        """
        _check_names(schema.names)
        created = False
        if self._load() is None:
            created = self._create(schema, partition_by, configuration or {}, tokens or {})
        if not created:
            self.evolve(schema)
        return created

    def refresh(self) -> int:
        """Read what has been committed since, and return the newest version; StoreUnavailable if there is no table."""
        if self._table is None:
            return self._require().version()
        try:
            self._table.update_incremental()
        except (DeltaError, OSError):
            # Also if the part of the log that it stands on has been cleaned away meanwhile.
            self._table = None
        return self._require().version()

    def version(self) -> int:
        """The newest version that has been read (`refresh` reads on); -1 if there is no table."""
        table = self._load()
        return -1 if table is None else table.version()

    def id(self) -> str:
        """The table's own id: another one made anew at the same place has another."""
        return str(self._require().metadata().id)

    def configuration(self) -> dict[str, str]:
        return dict(self._require().metadata().configuration)

    def partition_columns(self) -> list[str]:
        return list(self._require().metadata().partition_columns)

    # ---- reading ----

    def schema(self, version: int | None = None) -> pa.Schema:
        """The table's schema with field metadata, partition columns included."""
        return pa.schema(self._at(version).schema().to_arrow())

    def token(self, app_id: str, version: int | None = None) -> int | None:
        """The token of one application in a version (default: the one that has been read), None if it never had one."""
        if version is not None and version != self._require().version():
            try:
                return self._commits.token(app_id, version)
            except LookupError:
                with _translated(self.prefix):
                    value = self._at(version).transaction_version(app_id)
                return None if value is None else int(value)
        value = self._read(lambda table: table.transaction_version(app_id))
        return None if value is None else int(value)

    def tokens(self) -> dict[str, int]:
        """All tokens of the version that has been read; where another thread's checkpoint is newer, of that one, which
        is read then."""
        try:
            return self._commits.tokens(self._require().version())
        except LookupError:
            return self._commits.tokens(self.refresh())

    def files(self, version: int | None = None) -> list[LiveFile]:
        """The data files of a version (default: the one that has been read)."""
        if version is None or version == self._require().version():
            actions = self._read(lambda table: pa.table(table.get_add_actions(flatten=False)))
        else:
            with _translated(self.prefix):
                actions = pa.table(self._at(version).get_add_actions(flatten=False))
        names = set(actions.schema.names)
        paths = actions.column("path").to_pylist()
        sizes = actions.column("size_bytes").to_pylist()
        rows = actions.column("num_records").to_pylist() if "num_records" in names else [None] * len(paths)
        partitions = actions.column("partition").to_pylist() if "partition" in names else [{}] * len(paths)
        times = actions.column("modification_time").cast(pa.int64()).to_pylist()
        return [
            LiveFile(p, int(s), int(r or 0), dict(part or {}), int(ms))
            for p, s, r, part, ms in zip(paths, sizes, rows, partitions, times, strict=True)
        ]

    def files_added(self, after_version: int, through_version: int) -> list[tuple[int, str]]:
        """(version, path) of the files that commits after `after_version`, up to `through_version`, added, in order.

        Files that only rearrange rows (compaction: `dataChange` false) are left out. Reads the commits themselves,
        which stay readable behind checkpoints for Delta's log retention; HistoryGone if they have been cleaned away.
        """
        versions = range(after_version + 1, through_version + 1)
        return [(version, path) for version in versions for path in self._commits.at(version).added]

    def commit_at(self, version: int) -> Commit:
        """What one commit brought and took; HistoryGone if it has been cleaned away."""
        return self._commits.at(version)

    def files_of(self, version: int) -> list[tuple[int, str]]:
        """(version, path) of all files of a version, by the version that added each; 0 for one that only rearranged
        rows of others, or whose commit has been cleaned away."""
        added: dict[str, int] = {}
        for number in range(version, -1, -1):
            try:
                added |= dict.fromkeys(self._commits.at(number).added, number)
            except HistoryGone:
                break
        return sorted((added.get(file.path, 0), file.path) for file in self.files(version))

    def rests_until(self, version: int) -> int:
        """The last version behind `version` up to which no row and no token came: the rows are the same in all."""
        newest = self._require().version()
        try:
            while version < newest and self._commits.at(version + 1).is_rest:
                version += 1
        except HistoryGone:
            log.info("a commit is gone: nobody knows what it brought", extra={"delta_table": self.prefix})
        return version

    def open_file(self, path: str) -> pq.ParquetFile:
        """Open a data file for reading, with the store's own means; StoreUnavailable if it cannot be read."""
        location, options = self._store.location(f"{self.prefix}/{path}")
        try:
            if not options and location.startswith("/"):
                return pq.ParquetFile(location)
            # The name goes at once; the bytes stay for as long as the file is open.
            with tempfile.NamedTemporaryFile(prefix="cdc-object-") as copy:
                if self._store.get(f"{self.prefix}/{path}", into=Path(copy.name)) is None:
                    raise FileNotFoundError(path)
                return pq.ParquetFile(copy.name)
        except (OSError, pa.ArrowException) as e:
            raise StoreUnavailable(f"{self.prefix}/{path} cannot be read: {type(e).__name__}") from e

    def removed_paths(self) -> set[str]:
        """Paths of files that were removed and that no vacuum has forgotten yet: readers of older versions use them."""
        return self._commits.removed(self._require().version())

    # ---- changing ----

    def evolve(self, fields: Iterable[pa.Field]) -> int:
        """Add the columns, and the fields of structs, that the table does not have, and widen types; nothing else ever
        changes.

        A column whose metadata differ (it was dropped and made anew: another attnum) takes the new ones. SchemaConflict
        if a column exists with a type that cannot be widened. Returns the version from which on the table has them.
        """
        wanted = list(fields)
        for _ in range(_ATTEMPTS):
            present = list(self.schema())
            names = {f.name for f in present}
            _check_names([*names, *(f.name for f in wanted if f.name not in names)])
            schema = pa.schema(merged(present, wanted, self.prefix))
            table = self._require()
            if same_schema(table, schema):
                return table.version()
            try:
                return self.commit(schema=schema)
            except StoreConflict:
                self.refresh()
        raise StoreConflict(f"{self.prefix}: lost {_ATTEMPTS} races for a change of schema")

    def commit(
        self,
        *,
        adds: Sequence[AddedFile] = (),
        removes: Sequence[str] = (),
        tokens: Mapping[str, int] | None = None,
        expect: Mapping[str, int | None] | None = None,
        metadata: Mapping[str, Any] | None = None,
        data_change: bool = True,
        schema: pa.Schema | None = None,
        configuration: Mapping[str, str] | None = None,
    ) -> int:
        """Make `adds` visible, take `removes` away and set `tokens`, in one commit; returns its version. Durable.

        `schema` replaces the table's from this version on, whatever it was, and `configuration` is added to the
        table's: the caller vouches that every live file can be read with it.

        In the version committed upon, every token of `expect` must have exactly that value (None: not set) and every
        path of `removes` must be live, else StoreConflict: read again and build the change anew. A token that would
        decrease is InvariantBroken. The files of `adds` must be durable in the store. `metadata` (JSON values) stands
        in the commit's commitInfo. StoreUnavailable if it is not known whether the commit happened: what the tokens say
        after a `refresh` is the truth then.
        """
        tokens, expect, commit_id = tokens or {}, expect or {}, uuid.uuid4().hex
        failed: Exception | None = None
        for _ in range(_ATTEMPTS):
            table = self._require()
            base = table.version()
            try:
                self._check(table, tokens, expect, removes)
            except (DeltaError, OSError) as e:
                # The log that it stands on may have been cleaned meanwhile; what is read anew stands on a checkpoint.
                self._table, failed = None, e
                continue
            added, removed = _add_actions(adds, data_change), self._remove_actions(removes, data_change)
            if schema is not None:
                _check_names(schema.names)
            try:
                if configuration or (schema is not None and not same_schema(table, schema)):
                    self._put_commit(
                        base + 1,
                        [*metadata_actions(table, schema, configuration or {}), *file_actions(added, removed)],
                        tokens,
                        {**(metadata or {}), COMMIT_KEY: commit_id},
                    )
                else:
                    table.create_write_transaction(
                        [*added, *removed],
                        "append",
                        table.schema(),
                        partition_by=self.partition_columns(),
                        commit_properties=_properties(tokens, metadata or {}, commit_id),
                        post_commithook_properties=_hooks(),
                    )
            except (CommitFailedError, DeltaError, OSError, StoreConflict, StoreUnavailable) as e:
                done = self._after_failure(e, base, commit_id)
                if done is not None:
                    return done
                if schema is not None:
                    # Made for the version that it saw: another writer may have changed the schema as well.
                    raise StoreConflict(f"{self.prefix}: another writer committed meanwhile") from e
                continue
            try:
                self.refresh()
            except StoreUnavailable:
                self._table = None  # the commit is done; whoever needs the table next reads it anew
            return base + 1
        if failed is not None:
            raise StoreUnavailable(f"{self.prefix} cannot be read: {_brief(failed)}") from failed
        raise StoreConflict(f"{self.prefix}: lost {_ATTEMPTS} races for a commit")

    def vacuum(self, retention_s: float, *, untracked: bool = False) -> int:
        """Delete the objects of files that were removed more than `retention_s` ago (in whole hours, rounded up);
        returns how many. Versions older than that can no longer be read. `untracked`: also objects of that age that no
        version has ever shown.

        deltalake says which; it names them again for a week, so those that this object has deleted are passed over.
        """
        self.refresh()
        with _translated(self.prefix):
            hours = math.ceil(retention_s / 3600)
            found = self._require().vacuum(
                retention_hours=hours, dry_run=True, enforce_retention_duration=False, full=untracked
            )
        gone = [path for path in found if path not in self._vacuumed]
        self._store.delete([f"{self.prefix}/{path}" for path in gone])
        self._vacuumed = set(found)
        return len(gone)

    def tidy_log(self) -> None:
        """Delete the log's entries that are older than the table's `delta.logRetentionDuration` (Delta's default: 30
        days) and that a checkpoint stands for; make one first where commits have gone without. Only when nobody goes on
        from a version before the newest. Versions before can no longer be read."""
        with _translated(self.prefix):
            table = self._require()
            if table.version() - self.checkpointed() >= CHECKPOINT_EVERY:
                table.create_checkpoint()
            table.cleanup_metadata()

    def checkpointed(self) -> int:
        """Version of the newest checkpoint; -1 if there is none."""
        return self._commits.checkpointed()

    # ---- inside ----

    def _load(self) -> DeltaTable | None:
        # Credentials that are lent for an hour are others by now; an open table goes on with those that it was given.
        where = self._store.location(self.prefix)
        if where != (self._location, self._options):
            (self._location, self._options), self._table = where, None
        if self._table is None:
            try:
                with _translated(self.prefix):
                    self._table = DeltaTable(self._location, storage_options=self._options or None)
            except TableNotFoundError:
                return None
            self._check_format(self._table)
        return self._table

    def _read(self, ask: Callable[[DeltaTable], T]) -> T:
        """What the table says; opened anew if the part of its log that it stands on has been cleaned away meanwhile."""
        try:
            return ask(self._require())
        except (DeltaError, OSError):
            self._table = None
        with _translated(self.prefix):
            return ask(self._require())

    def _require(self) -> DeltaTable:
        table = self._load()
        if table is None:
            raise StoreUnavailable(f"{self.prefix}: there is no table", hint="it is created by the first landing")
        return table

    def _at(self, version: int | None) -> DeltaTable:
        table = self._require()
        if version is None or version == table.version():
            return table
        try:
            return DeltaTable(self._location, version=version, storage_options=self._options or None)
        except (DeltaError, FileNotFoundError) as e:
            raise HistoryGone(f"{self.prefix}: version {version} cannot be read: {type(e).__name__}") from e
        except OSError as e:
            raise StoreUnavailable(f"{self.prefix}: version {version} cannot be read: {type(e).__name__}") from e

    def _check_format(self, table: DeltaTable) -> None:
        text = table.metadata().configuration.get(_FORMAT_KEY)
        if text is None:
            raise SchemaConflict(
                f"{self.prefix} is a Delta table that something else made", hint="move it away, or use another lake.url"
            )
        if int(text) > FORMAT:
            raise FormatTooNew(f"{self.prefix} has format {text}, this release knows {FORMAT}", hint="upgrade cdc")

    def _create(
        self,
        schema: pa.Schema,
        partition_by: Sequence[str],
        configuration: Mapping[str, str],
        tokens: Mapping[str, int],
    ) -> bool:
        """Create the table; False if another one came first."""
        self._commits = Commits(self._store, self.prefix)
        try:
            DeltaTable.create(
                self._location,
                schema=schema,
                mode="error",
                partition_by=list(partition_by),
                configuration={**_DEFAULTS, **configuration},
                storage_options=self._options or None,
                commit_properties=_properties(tokens, {}, uuid.uuid4().hex),
                raise_if_key_not_exists=False,
            )
        except (DeltaError, OSError) as e:
            if self._load() is not None:
                return False
            raise StoreUnavailable(f"{self.prefix} cannot be created: {_brief(e)}") from e
        self._require()
        return True

    def _check(
        self, table: DeltaTable, tokens: Mapping[str, int], expect: Mapping[str, int | None], removes: Sequence[str]
    ) -> None:
        """Whether a commit may stand upon the version of `table`; its errors as they are."""
        for app_id, value in expect.items():
            found = table.transaction_version(app_id)
            if found != value:
                raise StoreConflict(f"{self.prefix}: token {app_id} is {found}, the commit was built upon {value}")
        for app_id, value in tokens.items():
            found = table.transaction_version(app_id)
            if found is not None and found > value and app_id == LEASE:
                raise LeaseLost(f"{self.prefix}: a later holder of the lease has written here", hint="run only one")
            if found is not None and found > value:
                raise InvariantBroken(f"{self.prefix}: token {app_id} would go back from {found} to {value}")
        if removes and not set(removes) <= {f.path for f in self.files()}:
            raise StoreConflict(f"{self.prefix}: a file to be removed is not live any more")

    def _remove_actions(self, removes: Sequence[str], data_change: bool) -> list[RemoveAction]:
        if not removes:
            return []
        live = {f.path: f for f in self.files()}
        now = int(time.time() * 1000)
        return [RemoveAction(p, data_change, now, live[p].size, live[p].partition) for p in removes]

    def _put_commit(
        self, version: int, actions: Sequence[Mapping[str, Any]], tokens: Mapping[str, int], info: Mapping[str, Any]
    ) -> None:
        """The commit of that version, unless somebody else has made one."""
        key = f"{self.prefix}/_delta_log/{version:020d}.json"
        self._store.put(key, commit_text(actions, tokens, info), if_absent=True)

    def _after_failure(self, error: Exception, base: int, commit_id: str) -> int | None:
        """What became of a commit that raised: its version if it happened after all, None if it lost a race."""
        try:
            self._table = None
            newest = self._require().version()
            for version in range(base + 1, newest + 1):
                if self._commits.at(version).id == commit_id:
                    log.info("commit happened although it reported a failure", extra={"delta_table": self.prefix})
                    return version
        except CdcError as e:
            raise StoreUnavailable(f"{self.prefix}: a commit failed, and what became of it cannot be read") from e
        if newest > base:
            return None
        raise StoreUnavailable(f"{self.prefix}: commit failed: {_brief(error)}") from error


class _translated:
    """Errors of deltalake as errors of the product; a table that is not there stays TableNotFoundError."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (DeltaError, OSError)) and not isinstance(error, TableNotFoundError):
            raise StoreUnavailable(f"{self._prefix} cannot be read: {_brief(error)}") from error


def _properties(tokens: Mapping[str, int], metadata: Mapping[str, Any], commit_id: str) -> CommitProperties:
    # No retries inside deltalake: it would rebase upon versions whose tokens nobody has compared.
    return CommitProperties(
        custom_metadata={**metadata, COMMIT_KEY: commit_id},
        max_commit_retries=0,
        app_transactions=[Transaction(app_id, value) for app_id, value in tokens.items()],
    )


def _hooks() -> PostCommitHookProperties:
    # The log is cleaned where it is known what somebody goes on from, not by whoever happens to commit (`tidy_log`).
    return PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False)


def _add_actions(adds: Sequence[AddedFile], data_change: bool) -> list[AddAction]:
    now = int(time.time() * 1000)
    for added in adds:
        if _PLAIN_PATH.fullmatch(added.path) is None:
            raise InvariantBroken("a data file's path has characters that Delta would have to escape")
    return [
        AddAction(
            path=a.path,
            size=a.size,
            partition_values=dict(a.partition),
            modification_time=now if a.added_ms is None else a.added_ms,
            data_change=data_change,
            stats=json.dumps({"numRecords": a.rows}),
        )
        for a in adds
    ]


def _check_names(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise SchemaConflict(
                f'columns "{other}" and "{name}" differ in case only, which Delta tables cannot hold',
                hint="rename one of them at the source, or leave one out of the publication's column list",
            )


def _brief(error: BaseException) -> str:
    """First line of a library's error, and the store's code if it has one: they name objects and causes, never rows."""
    lines = str(error).splitlines() or [""]
    code = _CODE.search(str(error))
    return f"{type(error).__name__}: {lines[0][:200]}" + (f" ({code[1]})" if code else "")
