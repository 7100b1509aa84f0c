"""Acknowledgements as plain values: what a test writes into a ledger, and what it finds there."""

from __future__ import annotations

import pyarrow as pa

from cdc.sink import ACKS, Ledger

Entry = tuple[str, str, int]
"""Key, digest and version."""


def acks(*rows: Entry) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(ACKS.names, row, strict=True)) for row in rows], ACKS)


def content(ledger: Ledger) -> dict[str, tuple[str, int]]:
    rows = ledger.read().to_pylist()
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: (row["digest"], row["version"]) for row in rows}
