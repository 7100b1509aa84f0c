"""What the rows of a merge are known by, when a table's key or replica identity changes between its changes.

The key in force is that of the newest change, or of a whole run that ended behind it, as the objects of the changelog
say; a merge that brings neither keeps the key that `current` has. Rows may be laid out anew by another key at any time,
for each of them is whole. Updates and deletes may not: `update t set b = …` under the key `a` says nothing of which row
had the old `b`. Where a merge meets changes of another key that a snapshot or truncate has not made void, the table has
to be read anew.

Reads metadata, and positions only of objects whose key is not the one in force.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from cdc.errors import IdentityMissing, KeyChanged
from cdc.lake.bucket import orders_of
from cdc.lake.events import FileShape, Layout, ops_of
from cdc.lake.layout import IDENTITY_METADATA, KEY_METADATA
from cdc.lake.reduce import Order
from cdc.lake.scan import FULL_RUNS
from cdc.table import TableId, TableSchema

Key = tuple[int, ...]
"""Attnums of the key's columns; empty: none."""


class Known(NamedTuple):
    """What the rows of one object are known by. None: it does not say (a column whose number nobody knew)."""

    key: Key | None
    identity: str


@dataclass(frozen=True, slots=True)
class Object:
    """One object of the changelog."""

    path: str
    known: Known
    open: Callable[[str], pq.ParquetFile]

    @staticmethod
    def at(path: str, opener: Callable[[str], pq.ParquetFile]) -> Object:
        """The object behind a path; reads its metadata."""
        metadata = opener(path).schema_arrow.metadata or {}
        key, identity = metadata.get(KEY_METADATA.encode()), metadata.get(IDENTITY_METADATA.encode(), b"f")
        numbers = None if key is None else tuple(int(part) for part in key.decode().split(",") if part)
        return Object(path, Known(None if numbers and 0 in numbers else numbers, identity.decode()), opener)

    def newest(self, layout: Layout, operations: bytes) -> Order | None:
        """Order of the newest of these operations (`s`: ends of runs that read the whole table), None if it has none of
        them."""
        found: Order | None = None
        file = self.open(self.path)
        shape = FileShape(file.schema_arrow, layout)
        names = [shape.system[name] for name in ("_op", "_epoch", "_lsn", "_seq", "_raw")]
        for data in file.iter_batches(1 << 16, columns=names):
            wanted = np.isin(ops_of(data, shape), np.frombuffer(operations, np.uint8))
            for i in np.flatnonzero(wanted & (ops_of(data, shape) == ord("s"))).tolist():
                facts = dict(data.column(shape.system["_raw"])[i].as_py() or ())
                wanted[i] = facts.get("event") == "end" and facts.get("kind") in FULL_RUNS
            rows = np.flatnonzero(wanted)
            if len(rows):
                orders = orders_of(data, shape).take(rows)
                last = int(np.lexsort((orders.seq, orders.lsn, orders.epoch))[-1])
                order = Order(int(orders.epoch[last]), int(orders.lsn[last]), int(orders.seq[last]))
                found = order if found is None else max(found, order)
        return found


def schema_in_force(schema: TableSchema, objects: Sequence[Object], held: Key | None) -> TableSchema:
    """The schema under the key of the newest change, or end of a whole run, among `objects`; without these under the
    one that `current` has (None: it has none yet). A key with columns that are gone is left alone: the newest schema's
    is taken."""
    own = key_of_schema(schema)
    if {o.known.key for o in objects} <= {own, None} and held in (own, None):
        return schema
    key, newest = held, None
    layout = Layout(schema)
    for item in objects:
        order = item.newest(layout, b"cudts")
        if order is not None and (newest is None or order > newest):
            key, newest = own if item.known.key is None else item.known.key, order
    names = {c.attnum: c.name for c in schema.columns}
    if key is None or not set(key) <= set(names):
        return schema
    return replace(schema, key=tuple(names[n] for n in key))


def refuse_other_keys(layout: Layout, objects: Sequence[Object], void_before: Order | None) -> None:
    """KeyChanged if an update or delete that counts (it stands behind `void_before`) is known by another key;
    IdentityMissing if it is known by none and does not bring the whole old row."""
    table, key = layout.schema.table, key_of_schema(layout.schema)
    for item in objects:
        known = item.known
        same = known.key is None or set(known.key) == set(key)
        if same and (key or known.identity == "f"):
            continue
        newest = item.newest(layout, b"ud")
        if newest is None or (void_before is not None and newest <= void_before):
            continue
        if not same:
            raise KeyChanged(f"the key or replica identity of table {table} has changed", hint=f"cdc resync {table}")
        raise without_identity(table)


def without_identity(table: TableId) -> IdentityMissing:
    """For changes in a table without a key that do not say which row they mean."""
    return IdentityMissing(
        f"table {table} has no key, and changes of it came without the whole old row",
        hint=f"alter table {table} replica identity full (each of its partitions too), or add a primary key;"
        f" then cdc resync {table}",
    )


def key_of_schema(schema: TableSchema) -> Key:
    return tuple(schema.column(name).attnum for name in schema.key)
