"""The commits of one Delta table as they stand in its log: tokens, added and removed files, ids.

A commit never changes once it is there, so what was read is kept (the last few), and a question costs the commits
since the one before. What lies behind the newest checkpoint is read from it.

It writes nothing, and trusts the caller that a version exists. Not thread-safe.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from cdc.errors import CdcError, StoreUnavailable
from cdc.ports import ObjectStore

COMMIT_KEY: Final = "cdc.commit"
"""Of a commit's info: the id by which its writer knows it again."""
LEASE: Final = "lease"
"""Token: fence of the lease under which was committed (cdc.lake.lease)."""
TRIMMED: Final = "trimmed"
"""Token: the last version of which retention has taken away objects (cdc.lake.retention)."""
_KEPT: Final = 16
_KEPT_FILES: Final = 1000
"""A commit with more files than this is read again when it is asked for again."""
_LOOK_BACK: Final = 50


class HistoryGone(CdcError):
    """What is asked for has been cleaned away: commits of the log, or objects by retention. Only the table's present
    state is left."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One version. `added`: paths of files with rows that are new, without those that a compaction only rearranged;
    `added_bytes`: their sizes."""

    tokens: dict[str, int]
    added: list[str]
    added_bytes: list[int]
    removed: list[str]
    id: str | None
    is_rest: bool
    """Whether whoever follows the table has nothing to do for it: it brings no row, and no token but the lease's; it
    rearranges, changes what is said of the table, or takes away what retention lets go."""


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """The state of the table at one version."""

    version: int
    tokens: dict[str, int]
    removed: set[str]


class Commits:
    """The log of the table under `prefix` of a store."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._kept: OrderedDict[int, Commit] = OrderedDict()
        self._through = -1
        self._set: dict[str, tuple[int, int]] = {}
        """Tokens at the version `_through`, and the version that set each (at the latest)."""

    def at(self, version: int) -> Commit:
        """One commit; HistoryGone if it has been cleaned away."""
        kept = self._kept.get(version)
        if kept is not None:
            self._kept.move_to_end(version)
            return kept
        found = self._store.get(f"{self._prefix}/_delta_log/{version:020d}.json")
        if found is None:
            raise HistoryGone(
                f"{self._prefix}: commit {version} has been cleaned away", hint="resync the table to build it anew"
            )
        commit = _parsed([orjson.loads(line) for line in found[0].splitlines() if line.strip()])
        if len(commit.added) + len(commit.removed) <= _KEPT_FILES:
            self._kept[version] = commit
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return commit

    def tokens(self, version: int) -> dict[str, int]:
        """All tokens at a version. Costs the commits since the version that was asked for last; the first time, or
        when an older one is asked for, a checkpoint and the commits after it. LookupError if that is newer."""
        if self._through > version:
            self._forget()
        try:
            return self._tokens(version)
        except HistoryGone:
            if self._through < 0:
                raise
            # Commits since the version that was asked for last have been cleaned away: a checkpoint stands for them.
            self._forget()
            return self._tokens(version)

    def _forget(self) -> None:
        self._through, self._set = -1, {}

    def _tokens(self, version: int) -> dict[str, int]:
        if self._through < 0 and (checkpoint := self._checkpoint()) is not None:
            if checkpoint.version > version:
                raise LookupError(version)
            self._through = checkpoint.version
            self._set = {name: (value, checkpoint.version) for name, value in checkpoint.tokens.items()}
        for number in range(self._through + 1, version + 1):
            self._set |= {name: (value, number) for name, value in self.at(number).tokens.items()}
            self._through = number
        return {name: value for name, (value, _) in self._set.items()}

    def token(self, app_id: str, version: int) -> int | None:
        """One token at a version, None if it was not set. LookupError if the commits near the version do not tell."""
        if self._through < version:
            self.tokens(version)
        value, at = self._set.get(app_id, (None, 0))
        if value is None or at <= version:
            return value
        for number in range(version, max(-1, version - _LOOK_BACK), -1):
            try:
                tokens = self.at(number).tokens
            except HistoryGone:
                break
            if app_id in tokens:
                return tokens[app_id]
        else:
            if version < _LOOK_BACK:
                return None
        raise LookupError(app_id)

    def removed(self, version: int) -> set[str]:
        """Paths of files that were removed up to a version, or a little later, and that no vacuum has forgotten yet."""
        checkpoint = self._checkpoint()
        removed = set() if checkpoint is None else set(checkpoint.removed)
        for number in range(-1 if checkpoint is None else checkpoint.version, version):
            removed.update(self.at(number + 1).removed)
        return removed

    def checkpointed(self) -> int:
        """Version of the newest checkpoint; -1 if there is none."""
        hint = self._last_checkpoint()
        return -1 if hint is None else int(hint["version"])

    def _last_checkpoint(self) -> dict[str, Any] | None:
        found = self._store.get(f"{self._prefix}/_delta_log/_last_checkpoint")
        return None if found is None else dict(json.loads(found[0]))

    def _checkpoint(self) -> _Checkpoint | None:
        """The newest checkpoint; None if there is none."""
        hint = self._last_checkpoint()
        if hint is None:
            return None
        at, parts = int(hint["version"]), int(hint.get("parts") or 0)
        stem = f"{self._prefix}/_delta_log/{at:020d}.checkpoint"
        names = [f"{stem}.{i:010d}.{parts:010d}.parquet" for i in range(1, parts + 1)] or [f"{stem}.parquet"]
        tables = []
        for name in names:
            part = self._store.get(name)
            if part is None:
                raise StoreUnavailable(f"{self._prefix}: the checkpoint of version {at} is being replaced")
            tables.append(pq.read_table(pa.BufferReader(part[0]), columns=["txn", "remove"]))
        actions = pa.concat_tables(tables)
        return _Checkpoint(
            at,
            {t["appId"]: int(t["version"]) for t in actions.column("txn").drop_null().to_pylist()},
            {r["path"] for r in actions.column("remove").drop_null().to_pylist()},
        )


def _parsed(actions: list[dict[str, Any]]) -> Commit:
    tokens: dict[str, int] = {}
    added, sizes, removed = [], [], []
    commit_id: str | None = None
    changes = False
    for action in actions:
        if "txn" in action:
            tokens[action["txn"]["appId"]] = int(action["txn"]["version"])
        elif "remove" in action:
            removed.append(action["remove"]["path"])
            changes |= action["remove"].get("dataChange", True)
        elif "add" in action and action["add"].get("dataChange", True):
            added.append(action["add"]["path"])
            sizes.append(int(action["add"]["size"]))
        elif "commitInfo" in action:
            commit_id = action["commitInfo"].get(COMMIT_KEY)
    is_rest = not (tokens.keys() - {LEASE, TRIMMED} or added or (changes and TRIMMED not in tokens))
    return Commit(tokens, added, sizes, removed, commit_id, is_rest)
