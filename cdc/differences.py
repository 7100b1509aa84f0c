"""What changed between two schema versions of a table, and what that means for rows that are in the lake already: pure.

Columns are compared by attnum, so a renamed column is the same column and one that was dropped and made anew is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cdc.batch import SYSTEM, Batch, batch_schema, system_type
from cdc.errors import SchemaConflict
from cdc.lake.widening import same, widens
from cdc.table import Column, TableSchema
from cdc.types import arrow_type


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One change. `before` and `after` are JSON values: descriptions of a column, or names."""

    kind: str
    before: Any
    after: Any


def differences(before: TableSchema, after: TableSchema) -> list[Difference]:
    """Every difference that a reader of the lake could notice, in the order of the columns; then key and identity."""
    found: list[Difference] = []
    if before.oid != after.oid:
        found.append(Difference(kind="replace_table", before=_shape(before), after=_shape(after)))
        return found
    old = {c.attnum: c for c in before.columns}
    new = {c.attnum: c for c in after.columns}
    for attnum, column in old.items():
        if attnum not in new:
            found.append(Difference(kind="drop_column", before=asdict(column), after=None))
    for attnum, column in new.items():
        was = old.get(attnum)
        if was is None:
            found.append(Difference(kind="add_column", before=None, after=asdict(column)))
            continue
        found += _of_column(was, column)
    if _key_numbers(before) != _key_numbers(after):
        found.append(Difference(kind="change_key", before=list(before.key), after=list(after.key)))
    if before.identity != after.identity:
        found.append(Difference(kind="change_identity", before=before.identity, after=after.identity))
    return found


def _of_column(was: Column, now: Column) -> list[Difference]:
    kinds = []
    if was.name != now.name:
        kinds.append("rename_column")
    if (was.type_oid, was.typmod, was.element_oid) != (now.type_oid, now.typmod, now.element_oid):
        kinds.append("change_type")
    if was.not_null != now.not_null:
        kinds.append("change_not_null")
    return [Difference(kind=kind, before=asdict(was), after=asdict(now)) for kind in kinds]


def _shape(schema: TableSchema) -> dict[str, Any]:
    return {"oid": schema.oid, "columns": [asdict(c) for c in schema.columns], "key": list(schema.key)}


def _key_numbers(schema: TableSchema) -> list[int]:
    return sorted(schema.column(k).attnum for k in schema.key)


def reading_reason(before: TableSchema, after: TableSchema, *, doubtful: bool = False) -> str:
    """Why the table's rows must be read again, because nothing tells what they show now; empty if they need not.
    `doubtful`: some columns of `after` may be others of the same name."""
    if before.oid != after.oid:
        return "another table has its name now"
    if _key_numbers(before) != _key_numbers(after):
        return "its key changed"
    old = {c.attnum: c for c in before.columns}
    names = {c.name for c in after.columns if c.attnum not in old}
    again = [c.name for c in before.columns if c.name in names]
    if again:
        # Messages of both columns look the same, so rows of the one may have been taken for rows of the other.
        return f"column {again[0]} was dropped and made anew"
    if doubtful and set(old) != {c.attnum for c in after.columns}:
        return "which of its columns some changes mean is not certain"
    for column in after.columns:
        was = old.get(column.attnum)
        if was is not None and not widens(arrow_type(was), arrow_type(column)):
            return f"column {column.name} changed its type"
    return ""


def frozen(kept: TableSchema, now: TableSchema) -> TableSchema:
    """The shape that a frozen table keeps while its source has the shape `now`: the columns of `kept`, whatever they
    are called there by now. SchemaConflict if it cannot hold what comes."""
    where = f"table {now.table} is frozen (on_schema_change), and"
    hint = f"`cdc resync {now.table}` accepts the new shape"
    if kept.oid != now.oid:
        raise SchemaConflict(f"{where} another table has its name now", hint=hint)
    new = {c.attnum: c for c in now.columns}
    columns: list[Column] = []
    for column in kept.columns:
        came = new.get(column.attnum)
        if came is not None and not widens(arrow_type(came), arrow_type(column)):
            raise SchemaConflict(f"{where} column {column.name} changed its type", hint=hint)
        columns.append(column if came is not None else _without_missing(column))
    numbers = {c.attnum: c.name for c in columns}
    lost = [k for k in now.key if now.column(k).attnum not in numbers]
    if lost:
        raise SchemaConflict(f"{where} its key has column {lost[0]} now, which the lake lacks", hint=hint)
    key = tuple(numbers[now.column(k).attnum] for k in now.key)
    return TableSchema(table=now.table, oid=now.oid, columns=tuple(columns), key=key, identity=now.identity)


def _without_missing(column: Column) -> Column:
    """A column that the source has dropped: rows that lack it show NULL, not what was once added with it."""
    return Column(**{**asdict(column), "missing": None})


def projected(batch: Batch, kept: TableSchema) -> Batch:
    """The batch's rows in the shape `kept`, made by `frozen` for the batch's schema."""
    names = {c.name: k.name for c in batch.schema.columns for k in kept.columns if c.attnum == k.attnum}
    source = {k: c for c, k in names.items()}
    arrays: list[pa.Array] = []
    optional = batch.optional
    system = [n for n in SYSTEM if batch.has(n)]
    for name in system:
        array = batch.system(name)
        if name == "_before":
            array = _before(array, kept, source)
        elif name == "_unchanged" and array.null_count < len(array):
            array = pa.array([_listed(row, names) for row in array.to_pylist()], system_type(name, kept))
        elif name == "_raw" and array.null_count < len(array):
            array = _raw(array, batch, names)
        arrays.append(array)
    for column in kept.columns:
        kind = arrow_type(column)
        if column.name in source:
            arrays.append(_typed(batch.column(source[column.name]), kind))
        else:
            arrays.append(pa.nulls(batch.data.num_rows, kind))
    return Batch(kept, pa.RecordBatch.from_arrays(arrays, schema=batch_schema(kept, optional)))


def _typed(array: pa.Array, kind: pa.DataType) -> pa.Array:
    return array if same(array.type, kind) else pc.cast(array, kind)


def _before(array: pa.Array, kept: TableSchema, source: dict[str, str]) -> pa.Array:
    kind = system_type("_before", kept)
    fields = {array.type.field(i).name: i for i in range(array.type.num_fields)}
    children = [
        _typed(pc.struct_field(array, fields[source[f.name]]), f.type)
        if source.get(f.name) in fields
        else pa.nulls(len(array), f.type)
        for f in kind
    ]
    return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())


def _listed(row: Sequence[str] | None, names: dict[str, str]) -> list[str] | None:
    return None if row is None else [names[n] for n in row if n in names] or None


def _raw(array: pa.Array, batch: Batch, names: dict[str, str]) -> pa.Array:
    """Texts under the names of the lake; those of control rows are no columns' and stay as they are."""
    ops = batch.system("_op").to_pylist()
    known = {**names, **{f"before.{c}": f"before.{k}" for c, k in names.items()}}
    rows = [
        row if row is None or op == "s" else [(known[k], v) for k, v in row if k in known] or None
        for op, row in zip(ops, array.to_pylist(), strict=True)
    ]
    return pa.array(rows, array.type)


__all__ = ["Difference", "differences", "frozen", "projected", "reading_reason"]
