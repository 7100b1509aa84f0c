"""Which column of a lake table holds a source column, when its type has changed: pure.

A Delta column has one type forever, but for widening: objects with the narrower type are read as the wider one by every
reader that we know. So a column keeps its name as long as one type holds the values of both (int32 and int64,
decimals, float and double, lists of these); otherwise the changes from there on stand in a column of their own, named
after the new type (`amount@string`), and the older ones stay where they are. Nothing is rewritten, no value is cast,
and a column of the lake never means two things. `current`, which is rewritten anyway, always has the source's names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pyarrow as pa

from cdc.errors import SchemaConflict
from cdc.table import TableSchema
from cdc.types import arrow_fields

SOURCE_NAME = b"pg.name"
"""Field metadata: the source column's name, where the lake's is another."""


def common(old: pa.DataType, new: pa.DataType) -> pa.DataType | None:
    """The type that holds every value of both without changing its meaning; None if there is none."""
    is_type = pa.types
    if same(old, new):
        return old
    if is_type.is_integer(old) and is_type.is_integer(new):
        return max(old, new, key=lambda t: t.bit_width)
    if is_type.is_floating(old) and is_type.is_floating(new):
        return max(old, new, key=lambda t: t.bit_width)
    if is_type.is_decimal(old) and is_type.is_decimal(new):
        scale = max(old.scale, new.scale)
        digits = max(old.precision - old.scale, new.precision - new.scale) + scale
        return pa.decimal128(digits, scale) if digits <= 38 else None
    if is_type.is_list(old) and is_type.is_list(new):
        inner = common(old.value_type, new.value_type)
        return None if inner is None else pa.list_(inner)
    return None


def widens(old: pa.DataType, new: pa.DataType) -> bool:
    """Whether every value of `old` is one of `new`, so that rows of before need not be read again."""
    wider = common(old, new)
    return wider is not None and same(wider, new)


def same(old: pa.DataType, new: pa.DataType) -> bool:
    """Equal types, whatever the inner fields of lists and maps are called."""
    if pa.types.is_list(old) and pa.types.is_list(new):
        return same(old.value_type, new.value_type)
    if pa.types.is_map(old) and pa.types.is_map(new):
        return same(old.key_type, new.key_type) and same(old.item_type, new.item_type)
    if pa.types.is_struct(old) and pa.types.is_struct(new):
        return [f.name for f in old] == [f.name for f in new] and all(
            same(a.type, b.type) for a, b in zip(old, new, strict=True)
        )
    return bool(old == new)


def in_lake(schema: TableSchema, present: Mapping[str, pa.DataType]) -> TableSchema:
    """The schema with its columns named as a changelog with the columns `present` holds them. The key keeps the names
    of the lake too."""
    taken = {c.name for c in schema.columns}
    renamed: dict[str, str] = {}
    for column, field in zip(schema.columns, arrow_fields(schema), strict=True):
        name = column.name
        while name in present and common(present[name], field.type) is None:
            name = _next_name(name, field.type)
            while name in taken:
                name += "@"
        renamed[column.name] = name
        taken.add(name)
    if all(old == new for old, new in renamed.items()):
        return schema
    columns = tuple(replace(c, name=renamed[c.name]) for c in schema.columns)
    return replace(schema, columns=columns, key=tuple(renamed[k] for k in schema.key))


def _next_name(name: str, kind: pa.DataType) -> str:
    suffix = f"@{_word(kind)}"
    return f"{name}{suffix}" if suffix not in name else f"{name}@"


def _word(kind: pa.DataType) -> str:
    """A type as part of a column's name: Delta allows no brackets, commas or spaces there."""
    is_type = pa.types
    if is_type.is_integer(kind):
        return "int"
    if is_type.is_decimal(kind):
        return "decimal"
    if is_type.is_list(kind):
        return f"{_word(kind.value_type)}_list"
    if is_type.is_timestamp(kind):
        return "timestamptz" if kind.tz else "timestamp"
    return {"double": "float", "date32[day]": "date", "map<string, string>": "map"}.get(str(kind), str(kind))


def merged(present: Sequence[pa.Field], wanted: Sequence[pa.Field], where: str) -> list[pa.Field]:
    """The fields of a table that held `present` and shall hold `wanted` too: new ones added (of structs new children),
    types widened, metadata those of `wanted`. SchemaConflict if a column exists with a type that cannot be widened."""
    found = {f.name: f for f in present}
    for f in wanted:
        old = found.get(f.name)
        if old is None:
            found[f.name] = f.with_nullable(True)
            continue
        metadata = {**(old.metadata or {}), **(f.metadata or {})} if f.metadata else old.metadata
        found[f.name] = pa.field(f.name, _grown(old.type, f.type, f.name, where), nullable=True, metadata=metadata)
    return list(found.values())


def _grown(old: pa.DataType, new: pa.DataType, name: str, where: str) -> pa.DataType:
    if pa.types.is_struct(old) and pa.types.is_struct(new):
        children = {f.name: f for f in old}
        for f in new:
            was = children.get(f.name)
            kind = f.type if was is None else _grown(was.type, f.type, f"{name}.{f.name}", where)
            children[f.name] = pa.field(f.name, kind, metadata=(f if was is None else was).metadata)
        return pa.struct(list(children.values()))
    wider = common(old, new)
    if wider is None:
        raise SchemaConflict(
            f"{where}: column {name} is {old} in the lake and {new} at the source", hint="cdc resync, for that table"
        )
    return wider
