"""What tests push into a target: assignments and batches from plain values, and ledgers in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from cdc.config_serving import TargetConfig
from cdc.errors import CdcError
from cdc.sink import ACKS, IN_DOUBT, INSERT, Assignment, Batch, Ledger

NONE = ACKS.empty_table()


def target_config(dsn: str, **changes: object) -> TargetConfig:
    values: dict[str, object] = {"name": "crm", "type": "postgres", "dsn": dsn, "origin": "cdc_crm", **changes}
    return TargetConfig(**values)  # type: ignore[arg-type]


class MemoryLedger:
    """Acknowledgements of one sync in memory; `failing` is raised in place of taking any."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[str, int]] = {}
        self.tried: dict[str, tuple[str, int]] = {}
        self.failing: CdcError | None = None

    def read(self) -> pa.Table:
        known = {**self.known, **{key: (IN_DOUBT, version) for key, (_, version) in self.tried.items()}}
        rows = [(key, digest, version) for key, (digest, version) in known.items()]
        return pa.table([list(c) for c in zip(*rows, strict=True)] or [[], [], []], schema=ACKS)

    def attempts(self) -> Mapping[str, tuple[str, int]]:
        return self.tried

    def record(self, *, acks: pa.Table = NONE, settled: pa.Table = NONE, attempts: pa.Table = NONE) -> None:
        if self.failing is not None and acks.num_rows:
            raise self.failing
        for table in (acks, settled, attempts):
            assert table.schema == ACKS
        for row in acks.to_pylist():
            self.known[row["key"]] = (row["digest"], row["version"])
            self.tried.pop(row["key"], None)
        for row in settled.to_pylist():
            self.tried.pop(row["key"], None)
        self.tried |= {row["key"]: (row["digest"], row["version"]) for row in attempts.to_pylist()}

    def forget(self) -> None:
        self.known = {key: ("", version) for key, (_, version) in {**self.known, **self.tried}.items()}
        self.tried = {}


class MemoryLedgers:
    """A ledger per sync."""

    def __init__(self) -> None:
        self.by_sync: dict[str, MemoryLedger] = {}

    def __call__(self, sync: str) -> Ledger:
        return self.of(sync)

    def of(self, sync: str) -> MemoryLedger:
        return self.by_sync.setdefault(sync, MemoryLedger())


def no_ledgers(sync: str) -> Ledger:
    """For targets that keep acknowledgements themselves: to ask for a ledger is a failure."""
    raise AssertionError(f"a ledger of {sync} was asked for")


def key_text(*values: object) -> str:
    """The key as acknowledgements have it."""
    return json.dumps([str(v) for v in values])


def acks_for(keys: Sequence[str], digests: str | Sequence[str] = "d1") -> pa.Table:
    digest = [digests] * len(keys) if isinstance(digests, str) else list(digests)
    return pa.table([pa.array(keys, pa.string()), pa.array(digest, pa.string()), [0] * len(keys)], schema=ACKS)


def assigned(
    columns: Sequence[str], *, table: str = "public.scores", key: Sequence[str] = ("id",), **changes: Any
) -> Assignment:
    values: dict[str, Any] = {"sync": "s", "mode": "upsert", **changes}
    return Assignment(table=table, key=tuple(key), columns=tuple(columns), **values)


def batch_of(
    assignment: Assignment,
    rows: Mapping[str, Any] | pa.Table,
    *,
    action: str = INSERT,
    digest: str | Sequence[str] = "d1",
    run: str = "run-1",
) -> Batch:
    """A batch of these columns (of the key's texts with DELETE); the digest is one for all rows, or one for each."""
    table = rows if isinstance(rows, pa.Table) else pa.table(dict(rows))
    keys = [key_text(*values) for values in zip(*(table.column(k).to_pylist() for k in assignment.key), strict=True)]
    return Batch(assignment=assignment, action=action, rows=table, acks=acks_for(keys, digest), run=run)
