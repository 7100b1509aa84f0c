"""The oracle of delivery: what changed, told by Postgres' own `test_decoding` on a second slot, against what landed.

`Witness` counts changes per table, operation and transaction, so a change that is lost in one transaction cannot be
made up for by one that is doubled in another. The changelog is read with deltalake and pyarrow alone.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

SYSTEM = ("_op", "_epoch", "_lsn", "_seq", "_xid", "_run", "_origin")
Changes = Counter[tuple[str, str, int]]
"""How many per (table, op, xid)."""

_OPS = {"INSERT": "c", "UPDATE": "u", "DELETE": "d", "TRUNCATE": "t"}
_DECODED = """
select substring(data from '^table (.*?): (?:INSERT|UPDATE|DELETE|TRUNCATE):'),
       substring(data from '^table .*?: (INSERT|UPDATE|DELETE|TRUNCATE):'), xid::text::int8, count(*)
from pg_logical_slot_get_changes(%s, null, null)
where data like 'table %%' group by 1, 2, 3
"""


class Witness:
    """A slot of its own, from now on. Make it before the first change that is to be counted."""

    def __init__(self, dsn: str, slot: str) -> None:
        self._dsn = dsn
        self._slot = slot
        self._seen: Changes = Counter()
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("select pg_create_logical_replication_slot(%s, 'test_decoding')", [slot])

    def changes(self) -> Changes:
        """All changes since the slot was made."""
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            for tables, op, xid, count in connection.execute(_DECODED, [self._slot]).fetchall():
                # One TRUNCATE names several tables; each of them gets a row of its own in its changelog.
                for table in tables.split(", "):
                    self._seen[table, _OPS[op], xid] += count
        return self._seen


def changelog(lake: Path, table: str, *, source: str = "shop", columns: tuple[str, ...] | None = None) -> pa.Table:
    """Rows of a changelog in the order of the table; `columns` None: all. Columns that a file lacks are null."""
    path = lake / source / table / "changelog"
    parts = []
    for uri in DeltaTable(str(path)).file_uris():
        file = pq.ParquetFile(uri)
        present = [c for c in columns if c in file.schema_arrow.names] if columns is not None else None
        parts.append(file.read(columns=present))
    rows = pa.concat_tables(parts, promote_options="permissive")
    return rows.sort_by([("_epoch", "ascending"), ("_lsn", "ascending"), ("_seq", "ascending")])


def landed(lake: Path, table: str, *, source: str = "shop") -> Changes:
    """What a changelog holds of the stream: not the rows of snapshots, nor what filtered runs found absent. Asserts
    that no position stands there twice."""
    rows = changelog(lake, table, source=source, columns=SYSTEM)
    positions = Counter(zip(*(rows.column(c).to_pylist() for c in ("_epoch", "_lsn", "_seq")), strict=True))
    assert max(positions.values()) == 1, f"{table}: positions twice: {[p for p, n in positions.items() if n > 1][:5]}"
    columns = (rows.column(c).to_pylist() for c in ("_op", "_xid", "_run"))
    return Counter((table, op, xid) for op, xid, run in zip(*columns, strict=True) if op in "cudt" and run is None)


def assert_exactly_once(witness: Witness, lake: Path, tables: list[str], *, source: str = "shop") -> int:
    """Assert that the changelogs hold every change once and nothing else; the number of changes."""
    told = witness.changes()
    wanted = Counter({change: n for change, n in told.items() if change[0] in tables})
    found: Changes = sum((landed(lake, table, source=source) for table in tables), Counter())
    lost, doubled = wanted - found, found - wanted
    assert (dict(lost), dict(doubled)) == ({}, {}), f"lost {_sums(lost)}, too many {_sums(doubled)}"
    return wanted.total()


def _sums(changes: Changes) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for (table, op, _), n in changes.items():
        sums[f"{table} {op}"] += n
    return dict(sums)
