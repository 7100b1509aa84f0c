"""`current`: the newest row of every key of a table, kept equal to its changelog.

Guarantees:
- A merge is one Delta commit that carries the changelog's version (`changelog` token), so a change is merged once and a
  merge that is repeated after a crash changes nothing.
- Readers never see a half table: nothing is shown before the end of the first run, and rows that a whole run did not
  meet (orphans) go with the commit that merges its end.
- An unchanged TOAST value never becomes NULL: it comes from the row before, or its key is reported and nothing is
  committed.
- Replaying is by order, not by arrival; a change never undoes a newer row.
- Where the commits that it would go on from have been cleaned away, or there is no `current` at all, it is built of all
  objects that the changelog has. If retention has taken some of what that needs, it is not built (HistoryGone): a new
  run has to bring the rows.

It does not read the source or the event log, and leaves the changelog as it is. One CurrentTable belongs to one thread,
one table has one writer.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from cdc.batch import SNAPSHOT_SEQ
from cdc.errors import InvariantBroken, KeyChanged, StoreUnavailable
from cdc.failpoints import failpoint
from cdc.lake.bucket import Fetcher, current_schema, layout_fingerprint, parse_name
from cdc.lake.commits import TRIMMED, HistoryGone
from cdc.lake.delta import DeltaLog, LiveFile
from cdc.lake.events import FileShape, Layout, Patterns
from cdc.lake.keyed import BUCKET_ROWS, KeyedMerge, Rewritten
from cdc.lake.keyless import KeylessMerge, Swap, swap_of
from cdc.lake.layout import changelog_path, current_path
from cdc.lake.reduce import Barrier, Order, final_threshold
from cdc.lake.rekey import Key, Object, key_of_schema, refuse_other_keys, schema_in_force
from cdc.lake.scan import Control, Scan, Scanner, barriers_of
from cdc.ports import ObjectStore
from cdc.table import TableId, TableSchema

if TYPE_CHECKING:
    from cdc.lake.changelog import ChangelogTable

log = logging.getLogger(__name__)

MERGED = "changelog"
"""Token: version of the changelog that `current` holds."""
KEY = "key/"
"""Tokens: attnums of a key, and the version of the changelog at which `current` was last laid out by it."""
SHOWN = "cdc.oid"
"""Key of the configuration: OID of the table whose rows are shown."""
SWAP = "cdc.swap"
"""Key of the configuration, in a table without a key: the run whose rows it shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """What a merge did. `version` is the Delta version of `current` now (None: nothing is shown yet).

    `waiting`: the table's first run has not ended. `unresolved`: keys (texts of the key columns) whose rows lack values
    that nobody knows; nothing was committed, and the rows must be read again. `foreign_change`: some change was not
    made under one of our own origins. `key`: the columns of `unresolved`. `last_lsn`: commit LSN that the changelog had
    landed at the merged version.
    """

    version: int | None = None
    rows_upserted: int = 0
    rows_deleted: int = 0
    unresolved: list[tuple[str, ...]] = field(default_factory=list)
    key: tuple[str, ...] = ()
    foreign_change: bool = False
    last_lsn: int = -1
    waiting: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a merge would begin with: what `current` holds at `version` (None: it holds nothing yet, and `merged` is -1)
    and the objects of the changelog behind it, up to version `through`, with all in them that concerns the whole table.

    `shown`: the columns of `current`; `live`, `tail`: paths of objects of `current` and of the changelog. `newest`: the
    highest order that a row of `current` can have, None if that is not known; `landed`: the highest that the stream had
    landed, None if nothing is merged. `settled`: of a table without a key,
    whether what is new is only added to what its last run (`swap`) has read.
    """

    layout: Layout
    version: int | None
    merged: int
    through: int
    shown: pa.Schema | None
    live: list[str]
    tail: list[str]
    scan: Scan
    barriers: list[Barrier]
    newest: Order | None
    landed: Order | None
    swap: Swap | None = None
    settled: bool = False

    @property
    def threshold(self) -> Order | None:
        """Rows older than this do not survive the merge."""
        return final_threshold(self.barriers)


class CurrentTable:
    """`current` of one table. `temp_dir` is for scratch files, which may be lost. Not thread-safe."""

    def __init__(
        self, store: ObjectStore, source: str, table: TableId, *, temp_dir: Path, bucket_rows: int = BUCKET_ROWS
    ) -> None:
        self._store = store
        self._prefix = current_path(source, table)
        self._log = DeltaLog(store, self._prefix)
        self._changes_prefix = changelog_path(source, table)
        self._changes = DeltaLog(store, self._changes_prefix)
        self._table = table
        self._temp_dir = temp_dir
        self._bucket_rows = bucket_rows
        self._known_fresh: set[str] = set()
        self._known_layout = ""

    def version(self) -> int | None:
        """Newest Delta version, None while nothing is to be shown."""
        return self._log.version() if self.merged() >= 0 else None

    def rows(self) -> int:
        """How many rows the newest version shows; 0 if there is none."""
        return sum(f.rows for f in self._log.files()) if self._log.exists() else 0

    def merged(self) -> int:
        """Version of the changelog that `current` holds; -1 if none."""
        if not self._log.exists():
            return -1
        self._log.refresh()
        found = self._log.token(MERGED)
        return -1 if found is None else found

    def position(self, through: int | None = None) -> tuple[int, int]:
        """Epoch and commit LSN up to which version `through` of the changelog (None: the one that `current` holds) has
        the stream; (0, -1) if that is not known."""
        through = self.merged() if through is None else through
        if through < 0 or not self._changes.exists():
            return 0, -1
        if through > self._changes.version():
            self._changes.refresh()
        return self._position(through)

    def landed_until(self, position: tuple[int, int], *, least: int | None = None) -> int:
        """The newest version of the changelog that has landed nothing of the stream behind a position, at least `least`
        (None: the one that is merged); -1 if there is none."""
        least = self.merged() if least is None else least
        version = self._changes.refresh() if self._changes.exists() else -1
        while version > least and self._position(version) > position:
            version -= 1
        return version

    def merge(
        self,
        changelog: ChangelogTable,
        schema: TableSchema,
        *,
        through: int | None = None,
        own_origins: Collection[str] = (),
    ) -> MergeResult:
        """Bring `current` to version `through` of the changelog (default: its newest). `schema` is the newest version.

        Blocking; durable on return. Memory is bounded by the changes of one bucket. Raises StoreConflict if another
        writer committed meanwhile, IdentityMissing and SchemaConflict if the changes cannot be applied, HistoryGone if
        what the changelog still has does not tell the rows.
        """
        if not self._changes.exists():
            return MergeResult(version=self.version(), waiting=True)
        newest = self._changes.refresh()
        # What only rearranges rows goes along: readers of the changelog look at the version that is merged.
        through = newest if through is None else self._changes.rests_until(through)
        merged = self.merged()
        if through <= merged:
            return MergeResult(version=self.version(), last_lsn=self._position(through)[1])
        if merged < 0 and not self._complete(schema.oid):
            return MergeResult(waiting=True)
        self._temp_dir.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="merge-", dir=self._temp_dir))
        try:
            if merged >= 0:
                try:
                    return _Attempt(self, schema, scratch, merged, through, own_origins).run()
                except HistoryGone as e:
                    log.warning("merging of all objects of the changelog", extra={"why": e.args[0]})
            anew = scratch / "anew"
            anew.mkdir()
            return _Attempt(self, schema, anew, merged, through, own_origins, anew=True).run()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def outlook(
        self,
        schema: TableSchema,
        *,
        through: int | None = None,
        open_changelog: Callable[[str], pq.ParquetFile] | None = None,
    ) -> Outlook | None:
        """What `merge` with the same arguments would begin with; None if it would change nothing that is shown: there
        is nothing new, or it waits for the end of a run.

        Reads only, `open_changelog` opens the objects to look at. Blocking. Raises what `merge` raises of keys,
        HistoryGone or StoreUnavailable if what it reads goes meanwhile.
        """
        merged = self.merged()
        version = self._log.version() if merged >= 0 else None
        if not self._changes.exists():
            return None
        newest = self._changes.refresh()
        through = newest if through is None else self._changes.rests_until(through)
        if through <= merged or (merged < 0 and not self._complete(schema.oid)):
            return None
        self._temp_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="outlook-", dir=self._temp_dir) as scratch:
            attempt = _Attempt(
                self, schema, Path(scratch), merged, through, (), anew=merged < 0, open_changelog=open_changelog
            )
            found = attempt.outlook(version)
        if version is not None and self._log.version() != version:
            raise StoreUnavailable(f"{self._prefix} was merged while it was looked at", hint="look again")
        return found

    def vacuum(self, retention_s: float) -> int:
        """Delete objects that no version of the last `retention_s` needs, also those of merges that never committed;
        returns how many. And entries of the log that are old enough."""
        if self.merged() < 0:
            return 0
        gone = self._log.vacuum(retention_s)
        self._log.tidy_log()
        known = {f.path for f in self._log.files()} | self._log.removed_paths()
        before = (time.time() - max(retention_s, 3600)) * 1e6
        dead = [
            found.key
            for found in self._store.list(f"{self._prefix}/")
            if _is_data(found.key.removeprefix(f"{self._prefix}/"))
            and found.key.removeprefix(f"{self._prefix}/") not in known
            and found.modified_at_us < before
        ]
        if dead:
            self._store.delete(dead)
        return gone + len(dead)

    def _complete(self, oid: int) -> bool:
        """Whether a whole run of the table has ended, in any epoch."""
        return any(t.startswith("complete/") and t.endswith(f"/{oid}") for t in self._changes.tokens())

    def _shows(self, oid: int) -> bool:
        """Whether what is shown are rows of the table with that OID. Another table that took the name is not shown
        before it has been read to its end, so nobody sees the rows of both."""
        if self.merged() < 0:
            return False
        return self._log.configuration().get(SHOWN, str(oid)) == str(oid)

    def _position(self, version: int) -> tuple[int, int]:
        """Epoch and commit LSN that the changelog had landed at a version; (0, -1) if it has no token."""
        epochs = sorted(int(t.split("/")[1]) for t in self._changes.tokens() if t.startswith("stream/"))
        for epoch in reversed(epochs):
            lsn = self._changes.token(f"stream/{epoch}", version)
            if lsn is not None:
                return epoch, lsn
        return 0, -1

    def _fresh_files(self, layout: Layout) -> set[str]:
        """Files known not to be stale under the layout."""
        if self._known_layout != layout_fingerprint(layout):
            self._known_layout = layout_fingerprint(layout)
            self._known_fresh.clear()
        return self._known_fresh


class _Attempt:
    """One merge, from the changelog's files to the commit."""

    def __init__(
        self,
        table: CurrentTable,
        schema: TableSchema,
        scratch: Path,
        merged: int,
        through: int,
        own: Collection[str],
        *,
        anew: bool = False,
        open_changelog: Callable[[str], pq.ParquetFile] | None = None,
    ) -> None:
        """`anew`: of all objects of the changelog, not of those behind `merged`: what is in `current` already is taken
        once more, which changes nothing."""
        self._table = table
        self._anew = anew
        self._scratch = scratch
        self._merged = merged
        self._through = through
        self._own = own
        self._current = Fetcher(table._store, table._prefix, scratch)
        self._open_changelog = open_changelog or Fetcher(table._store, table._changes_prefix, scratch).open
        self._uploaded: list[str] = []
        self._attempted = False
        # What is built anew is built of what is there: objects that were joined hold the rows of those that are gone.
        self._added = table._changes.files_of(through) if anew else table._changes.files_added(merged, through)
        self._layout = Layout(schema_in_force(schema, self._objects(self._added), self._held_key()))
        self._patterns = Patterns(len(self._layout.names))
        self._tokens: dict[str, int] = {MERGED: through}
        self._configuration = {SHOWN: str(self._layout.schema.oid)}

    def run(self) -> MergeResult:
        added = self._added
        scan = self._scan(added)
        if self._anew and self._table._complete(self._layout.schema.oid):
            self._require_whole(scan)
        if self._waits(scan):
            return MergeResult(waiting=True)
        try:
            done = self._keyed(scan, added) if self._layout.key_index else self._keyless(scan, added)
            if done.unresolved:
                log.info("merge waits for rows to be read again", extra={"rows": len(done.unresolved)})
                return MergeResult(
                    version=self._table.version(), unresolved=done.unresolved, key=self._layout.schema.key
                )
            version, lsn = self._commit(scan, done)
        finally:
            # A commit that raised may have happened all the same: its objects may be the table.
            if self._uploaded and not self._attempted:
                self._discard()
        return MergeResult(
            version=version,
            rows_upserted=done.upserted,
            rows_deleted=done.deleted,
            foreign_change=scan.foreign,
            last_lsn=lsn,
        )

    def _require_whole(self, scan: Scan) -> None:
        """HistoryGone if what is left of the changelog does not tell the rows: some of it has gone, and no whole run of
        the table began behind that. Without a key the rows are those of a run in any case."""
        trimmed = self._table._changes.tokens().get(TRIMMED)
        if trimmed is None and self._layout.key_index:
            return
        oid = str(self._layout.schema.oid)
        newest = max((c for c in scan.ends() if c.facts.get("oid") == oid), key=lambda c: c.order, default=None)
        begins = {c.run: c.version for c in scan.begins()}
        if newest is not None and newest.run in begins and (trimmed is None or begins[newest.run] > trimmed):
            return
        raise HistoryGone(
            f"table {self._layout.schema.table}: the changelog no longer holds all that its rows are made of",
            hint=f"cdc resync {self._layout.schema.table}",
        )

    def outlook(self, version: int | None) -> Outlook | None:
        """What the merge would begin with, `current` being at a version; None if it would wait."""
        scan = self._scan(self._added)
        if self._anew:
            self._require_whole(scan)
        if self._waits(scan):
            return None
        if self._held_key() not in (None, key_of_schema(self._layout.schema)):
            raise KeyChanged(f"the key or replica identity of table {self._layout.schema.table} has changed")
        barriers = self._barriers(scan, self._added)
        noted = self._table._log.configuration().get(SWAP) if version is not None else None
        swap = None if noted is None else Swap.from_text(noted)
        only_added = not (scan.ends() or scan.truncates or scan.rows["u"] or scan.rows["d"])
        return Outlook(
            layout=self._layout,
            version=version,
            merged=self._merged,
            through=self._through,
            shown=None if version is None else self._table._log.schema(version),
            live=[] if version is None else [f.path for f in self._table._log.files(version)],
            tail=[path for _, path in self._added],
            scan=scan,
            barriers=barriers,
            newest=self._newest(),
            landed=None if version is None else Order(*self._table._position(self._merged), SNAPSHOT_SEQ - 1),
            swap=swap,
            settled=only_added and swap is not None and self._token("swap/settled") == swap.at.seq,
        )

    def _waits(self, scan: Scan) -> bool:
        """Whether the table that has the name now is not to be shown yet."""
        oid = self._layout.schema.oid
        return not self._table._shows(oid) and not any(end.facts.get("oid") == str(oid) for end in scan.ends())

    def _scan(self, added: list[tuple[int, str]]) -> Scan:
        scanner = Scanner(self._own)
        for version, path in added:
            file = self._open_changelog(path)
            scanner.add(file, FileShape(file.schema_arrow, self._layout), self._patterns, version)
        return scanner.finish()

    def _keyed(self, scan: Scan, added: list[tuple[int, str]]) -> Rewritten:
        barriers = self._barriers(scan, added)
        merge = KeyedMerge(
            self._layout,
            self._patterns,
            scan,
            barriers,
            scratch=self._scratch,
            live=self._live(),
            open_current=self._current.open,
            open_changelog=self._open_changelog,
            store_file=self._store_file,
            known_fresh=self._table._fresh_files(self._layout),
            newest=self._newest(),
            bucket_rows=self._table._bucket_rows,
        )
        return merge.run(path for _, path in added)

    def _barriers(self, scan: Scan, added: list[tuple[int, str]]) -> list[Barrier]:
        """Where rows go without a change of theirs; KeyChanged or IdentityMissing if changes that count are known by
        another key."""
        begins = {}
        for end in scan.ends():
            order = self._begin_of(end.run)
            if order is not None:
                begins[end.run] = order
        barriers = barriers_of(scan, begins)
        refuse_other_keys(self._layout, self._objects(added), final_threshold(barriers))
        return barriers

    def _newest(self) -> Order | None:
        """The highest order that a row of `current` can have; None if that is not known."""
        if self._merged < 0 or self._anew:
            return None
        epoch, lsn = self._table._position(self._merged)
        counter = self._table._changes.token("snapshot_seq", self._merged)
        return None if lsn < 0 or counter is None else Order(epoch, lsn, SNAPSHOT_SEQ + counter)

    def _keyless(self, scan: Scan, added: list[tuple[int, str]]) -> Rewritten:
        ends = sorted(scan.ends(), key=lambda c: c.order)
        fresh = bool(ends)
        swap: Swap | None = None
        if fresh:
            begin = self._begin_row(scan, ends[-1].run)
            if "xmin" not in begin.facts:
                # It read the table chunk by chunk, under a key that is none any more.
                table = self._layout.schema.table
                raise KeyChanged(f"table {table} has lost its key", hint=f"cdc resync {table}")
            swap = swap_of(begin)
            if swap.version <= self._merged and not self._anew:
                added = self._table._changes.files_added(swap.version - 1, self._through)
        elif self._merged >= 0 and (text := self._table._log.configuration().get(SWAP)) is not None:
            swap = Swap.from_text(text)
        elif self._token("swap/version") is not None:
            # Laid out before the configuration kept it.
            table = self._layout.schema.table
            raise KeyChanged(f"what table {table} shows is not known any more", hint=f"cdc resync {table}")
        void = [*scan.truncates, *([swap.at] if fresh and swap is not None else [])]
        refuse_other_keys(self._layout, self._objects(added), max(void, default=None))
        settled = not fresh and swap is not None and self._token("swap/settled") == swap.at.seq
        merge = KeylessMerge(
            self._layout,
            swap,
            fresh=fresh,
            settled=settled,
            scratch=self._scratch,
            live=self._live(),
            open_current=self._current.open,
            open_changelog=self._open_changelog,
            store_file=self._store_file,
            known_fresh=self._table._fresh_files(self._layout),
        )
        done = merge.run(path for _, path in added)
        if swap is not None:
            self._configuration[SWAP] = swap.to_text()
            if merge.settles:
                self._tokens["swap/settled"] = swap.at.seq
        return done

    def _begin_row(self, scan: Scan, run: str) -> Control:
        """The begin row of a run that ends in this merge."""
        for begin in scan.begins():
            if begin.run == run:
                return begin
        version = self._token(f"begin/{run}/version")
        for found in self._controls(version):
            if found.run == run and found.event == "begin":
                return found
        raise InvariantBroken(f"table {self._layout.schema.table}: run {run} ended without a begin row")

    def _controls(self, version: int | None) -> list[Control]:
        """Control rows that came with one version of the changelog."""
        if version is None:
            return []
        scan = self._scan(self._table._changes.files_added(version - 1, version))
        return sorted(scan.begins() + scan.ends(), key=lambda c: c.order)

    def _objects(self, added: list[tuple[int, str]]) -> list[Object]:
        return [Object.at(path, self._open_changelog) for _, path in added]

    def _held_key(self) -> Key | None:
        """The key that `current` is laid out by: of the keys that it ever had the one that a merge noted last. None if
        there is no `current` yet."""
        if self._merged < 0:
            return None
        noted = {name: at for name, at in self._table._log.tokens().items() if name.startswith(KEY)}
        if not noted:
            return None
        return tuple(int(n) for n in max(noted, key=lambda name: noted[name]).removeprefix(KEY).split(",") if n)

    def _token(self, name: str) -> int | None:
        return self._table._log.token(name) if self._merged >= 0 else None

    def _begin_of(self, run: str) -> Order | None:
        """Order of the begin row of a run, as an earlier merge noted it."""
        parts = [self._token(f"begin/{run}/{part}") for part in Order._fields]
        return None if None in parts else Order(*(p for p in parts if p is not None))

    def _live(self) -> list[LiveFile]:
        return self._table._log.files() if self._table._log.exists() else []

    def _store_file(self, local: Path, path: str) -> None:
        self._uploaded.append(path)
        with pa.memory_map(str(local)) as mapped:
            self._table._store.put(f"{self._table._prefix}/{path}", memoryview(mapped.read_buffer()))

    def _discard(self) -> None:
        """Remove what was written for a commit that was never tried; what stays is found by `vacuum`."""
        try:
            self._table._store.delete([f"{self._table._prefix}/{path}" for path in self._uploaded])
        except Exception as e:  # noqa: BLE001 - the error that led here matters more
            log.warning("objects of a given-up merge stay", extra={"error": type(e).__name__})

    def _commit(self, scan: Scan, done: Rewritten) -> tuple[int, int]:
        table = self._table
        for begin in scan.begins():
            brought = f"begin/{begin.run}/version"
            # What is merged anew may not tell any more which version brought it.
            self._tokens[brought] = max(begin.version, self._token(brought) or 0)
            for part, value in begin.order._asdict().items():
                self._tokens[f"begin/{begin.run}/{part}"] = value
        self._tokens[KEY + ",".join(map(str, key_of_schema(self._layout.schema)))] = self._through
        epoch, lsn = table._position(self._through)
        if lsn >= 0:
            self._tokens[f"position/{epoch}"] = lsn
        schema = current_schema(self._layout)
        if not table._log.exists():
            table._log.open_or_create(schema, configuration=self._configuration)
        known = table._log.configuration()
        failpoint("merge.before_commit")
        self._attempted = True
        version = table._log.commit(
            adds=done.adds,
            removes=done.removes,
            tokens=self._tokens,
            expect={MERGED: None if self._merged < 0 else self._merged},
            # Files that the newest layout makes stale go in this very commit, so no reader meets both.
            schema=schema,
            configuration={k: v for k, v in self._configuration.items() if known.get(k) != v},
        )
        failpoint("merge.after_commit")
        return version, lsn


def _is_data(path: str) -> bool:
    return parse_name(path) is not None or (path.startswith("rows-") and path.endswith(".parquet"))


def open_current(store: ObjectStore, source: str, table: TableId, version: int | None = None) -> ds.Dataset | None:
    """`current` of a table, at a Delta version (default: the newest), for reading with Arrow; None if nothing is shown.

    For stores in a local directory; the files of others have no path that Arrow opens without their credentials.
    """
    found = DeltaLog(store, current_path(source, table))
    if not found.exists() or found.token(MERGED) is None:
        return None
    schema = found.schema(version)
    root, _ = store.location(current_path(source, table))
    paths = [f"{root}/{file.path}" for file in found.files(version)]
    if not paths:
        return ds.dataset(pa.table({f.name: pa.array([], f.type) for f in schema}))
    return ds.dataset(paths, schema=schema, format="parquet")


__all__ = ["CurrentTable", "MergeResult", "open_current"]
