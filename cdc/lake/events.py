"""Changelog rows as events of the reduction, in the layout of the table's newest schema version.

Columns are matched by attnum, so a renamed column is the same column and a re-created one is not. A file that lacks a
column, or holds it in a type that does not convert, does not *know* it: its cells are filled in by the reduction or
reported, never set to NULL. A change of key becomes two events, the end of the old key and the new key's row, unless
the new row lacks values that only the old key's row knows (`moved_from`).

Does not decide what survives (cdc.lake.reduce) and keeps nothing between files but the patterns of known columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdc.batch import RAW_TYPE, SYSTEM, TIMESTAMP_TYPE
from cdc.keys import BEFORE, hash_of, key_of
from cdc.lake.reduce import ABSENT, CLEAR, KNOWN, SET, UNCHANGED
from cdc.lake.widening import SOURCE_NAME
from cdc.table import TableSchema
from cdc.types import arrow_fields

ATTNUM = b"pg.attnum"

EVENT_FIELDS = (
    pa.field("key", pa.string()),
    pa.field("kind", pa.uint8()),
    pa.field("epoch", pa.int64()),
    pa.field("lsn", pa.int64()),
    pa.field("seq", pa.int64()),
    pa.field("pattern", pa.int32()),
    pa.field("moved_from", pa.string()),
    pa.field("committed_at", TIMESTAMP_TYPE),
    pa.field("origin", pa.string()),
    pa.field("raw", RAW_TYPE),
)
FIRST_COLUMN = len(EVENT_FIELDS)


class Layout:
    """The newest schema version, as the merge needs it."""

    def __init__(self, schema: TableSchema) -> None:
        self.schema = schema
        self.fields = arrow_fields(schema)
        self.names = [c.name for c in schema.columns]
        self.attnums = [c.attnum for c in schema.columns]
        self.key_index = [self.names.index(name) for name in schema.key]
        numbered = [pa.field(str(i), f.type) for i, f in enumerate(self.fields)]
        self.event_schema = pa.schema([*EVENT_FIELDS, *numbered])


class Patterns:
    """Which columns a row knows, numbered; number 0 is "all"."""

    def __init__(self, columns_n: int) -> None:
        self._numbers: dict[bytes, int] = {}
        self._rows: list[np.ndarray] = []
        self.number(np.zeros(columns_n, np.uint8))

    def number(self, states: np.ndarray) -> int:
        """The number of a vector of KNOWN, UNCHANGED, ABSENT, one per column of the layout."""
        name = states.tobytes()
        if name not in self._numbers:
            self._numbers[name] = len(self._rows)
            self._rows.append(states.copy())
        return self._numbers[name]

    @property
    def matrix(self) -> np.ndarray:
        return np.stack(self._rows)


@dataclass(frozen=True)
class FileShape:
    """Where a Parquet file of the table keeps what: the changelog's or `current`'s, of any schema version."""

    schema: pa.Schema
    layout: Layout

    @cached_property
    def system(self) -> dict[str, str]:
        """System column → its name in the file (a second underscore where a source column collides)."""
        found = {}
        for field in self.schema:
            if attnum_of(field) is None:
                name = "_" + field.name.lstrip("_")
                if name in SYSTEM:
                    found[name] = field.name
        return found

    @cached_property
    def source(self) -> list[str | None]:
        """File column of each column of the layout, None where the file has none."""
        by_attnum = {attnum_of(field): field.name for field in self.schema}
        # Another writer may have lost a field's metadata: then the name must do.
        bare = {f.name for f in self.schema if attnum_of(f) is None} - set(self.system.values())
        columns = zip(self.layout.attnums, self.layout.names, strict=True)
        return [by_attnum.get(attnum, name if name in bare else None) for attnum, name in columns]

    @cached_property
    def known_as(self) -> dict[str, str]:
        """File column → the source column's name when the file was written: `_unchanged` and `_raw` have these."""
        return {f.name: (f.metadata or {}).get(SOURCE_NAME, f.name.encode()).decode() for f in self.schema}

    @cached_property
    def by_name(self) -> dict[str, int]:
        """Column of the layout by the source's name in the file."""
        return {self.known_as[name]: i for i, name in enumerate(self.source) if name is not None}

    @cached_property
    def key_names(self) -> list[str] | None:
        """File columns of the key; None if the file lacks one of them."""
        names = [self.source[i] for i in self.layout.key_index]
        return None if None in names else [name for name in names if name is not None]

    @cached_property
    def renames(self) -> dict[str, str]:
        """The source's name in the file → name in the layout."""
        return {name: self.layout.names[i] for name, i in self.by_name.items()}


def attnum_of(field: pa.Field) -> int | None:
    """The source column's number, None for a system column."""
    metadata = field.metadata
    return int(metadata[ATTNUM]) if metadata and ATTNUM in metadata else None


def columns_of(data: pa.RecordBatch, shape: FileShape, *, old: bool = False) -> tuple[list[pa.Array], np.ndarray]:
    """The layout's columns from rows of a file (`old`: from their old tuples), and what is known of them (one vector
    for all rows)."""
    before = _system(data, shape, "_before") if old else None
    states = np.full(len(shape.source), KNOWN, np.uint8)
    columns: list[pa.Array] = []
    for i, (name, field) in enumerate(zip(shape.source, shape.layout.fields, strict=True)):
        if name is None:
            states[i] = ABSENT
            columns.append(pa.nulls(data.num_rows, field.type))
            continue
        if before is not None:
            array = pc.struct_field(before, before.type.get_field_index(name))
        else:
            array = data.column(data.schema.get_field_index(name))
        converted = convert(array, field.type)
        if converted is None:
            states[i] = UNCHANGED
            converted = pa.nulls(data.num_rows, field.type)
        columns.append(converted)
    return columns, states


def convert(array: pa.Array, kind: pa.DataType) -> pa.Array | None:
    """The same values in another type, as `ALTER TABLE … TYPE` would keep them; None if that is not certain."""
    if array.type == kind:
        return array
    if not _converts(array.type, kind):
        return None
    try:
        return pc.cast(array, kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _converts(old: pa.DataType, new: pa.DataType) -> bool:
    is_type = pa.types
    # Another writer of the table may have stored the same values in a sibling of our type.
    if is_type.is_large_string(old) or is_type.is_string_view(old):
        return bool(is_type.is_string(new))
    if is_type.is_large_binary(old) or is_type.is_binary_view(old):
        return bool(is_type.is_binary(new))
    if is_type.is_timestamp(old):
        return bool(is_type.is_timestamp(new)) and (old.tz is None) == (new.tz is None)
    if is_type.is_integer(old):
        return bool(is_type.is_integer(new) or is_type.is_decimal(new) or is_type.is_string(new))
    if is_type.is_decimal(old):
        return bool(is_type.is_decimal(new))
    if is_type.is_floating(old):
        return bool(is_type.is_floating(new)) and new.bit_width >= old.bit_width
    if is_type.is_list(new) and (is_type.is_list(old) or is_type.is_large_list(old)):
        return old.value_type == new.value_type or _converts(old.value_type, new.value_type)
    return False


def raw_in_layout(raw: pa.Array, renames: dict[str, str], *, prefix: str = "") -> pa.Array:
    """`_raw` with the layout's names, without old values (with `prefix` BEFORE: only these) and without columns that
    are gone."""
    if raw.null_count == len(raw):
        return raw
    if prefix:
        renames = {prefix + name: to for name, to in renames.items()}
    names = pc.unique(raw.keys).to_pylist()
    if all(renames.get(name) == name for name in names):
        return raw
    # Rare: old values that no type holds, or texts of a renamed column; only rows that have a text cost anything.
    rows = raw.to_pylist()
    renamed = [None if row is None else [(renames[k], v) for k, v in row if k in renames] for row in rows]
    return pa.array([row or None for row in renamed], RAW_TYPE)


def file_keys(data: pa.RecordBatch, shape: FileShape, *, prefix: str = "") -> pa.Array:
    """Canonical keys of rows of a file that has all key columns; with `prefix` BEFORE those of the old tuples."""
    assert shape.key_names is not None
    layout = shape.layout
    arrays: list[pa.Array] = []
    old = _system(data, shape, "_before") if prefix else None
    for index, name in zip(layout.key_index, shape.key_names, strict=True):
        if old is not None:
            array = pc.struct_field(old, old.type.get_field_index(name))
        else:
            array = data.column(data.schema.get_field_index(name))
        converted = convert(array, layout.fields[index].type)
        if converted is None:
            # Keys of another type: null, so that whoever needs one of them says so.
            return pa.nulls(data.num_rows, pa.string())
        arrays.append(converted)
    raw = data.column(data.schema.get_field_index(shape.system["_raw"])) if "_raw" in shape.system else None
    return key_of(arrays, raw, [shape.known_as[name] for name in shape.key_names], prefix=prefix)


def _system(data: pa.RecordBatch, shape: FileShape, name: str) -> pa.Array:
    return data.column(data.schema.get_field_index(shape.system[name]))


def ops_of(data: pa.RecordBatch, shape: FileShape) -> np.ndarray:
    """`_op` of each row as the byte value of its letter."""
    column = _system(data, shape, "_op")
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    start = column.offset
    offsets = np.frombuffer(column.buffers()[1], np.int32)[start : start + len(column) + 1]
    letters = np.frombuffer(column.buffers()[2], np.uint8) if len(column) else np.empty(0, np.uint8)
    return letters[offsets[:-1]]


def old_keys(data: pa.RecordBatch, shape: FileShape) -> pa.Array | None:
    """Keys of the old tuples, null where a row has none; None if no row has one."""
    if "_before" not in shape.system or shape.key_names is None:
        return None
    old = _system(data, shape, "_before")
    return None if old.null_count == len(old) else file_keys(data, shape, prefix=BEFORE)


def new_keys(data: pa.RecordBatch, shape: FileShape) -> pa.Array:
    """Keys of the rows. A key that is stored out of line and did not change stands in the old tuple only."""
    keys = file_keys(data, shape)
    if keys.null_count:
        olds = old_keys(data, shape)
        if olds is not None:
            keys = pc.coalesce(keys, olds)
    return keys


def moved(data: pa.RecordBatch, shape: FileShape, ops: np.ndarray, keys: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Mask of the updates that changed their key, and the old keys (valid where the mask is set)."""
    olds = old_keys(data, shape)
    if olds is None:
        return np.zeros(data.num_rows, np.bool_), pa.nulls(data.num_rows, pa.string())
    differs = pc.fill_null(pc.not_equal(olds, keys), False).to_numpy(zero_copy_only=False)
    mask = differs & (ops == ord("u"))
    return mask, olds


def pattern_numbers(data: pa.RecordBatch, shape: FileShape, patterns: Patterns, states: np.ndarray) -> np.ndarray:
    """Pattern of each row: what its file knows, less the columns listed in `_unchanged`."""
    n = data.num_rows
    numbers = np.full(n, patterns.number(states), np.int32)
    if "_unchanged" not in shape.system:
        return numbers
    unchanged = _system(data, shape, "_unchanged")
    if unchanged.null_count == n:
        return numbers
    parents = pc.list_parent_indices(unchanged).to_numpy(zero_copy_only=False)
    encoded = pc.list_flatten(unchanged).dictionary_encode()
    names = encoded.dictionary.to_pylist()
    matrix = np.zeros((n, len(names)), np.bool_)
    matrix[parents, encoded.indices.to_numpy(zero_copy_only=False)] = True
    rows = np.flatnonzero(matrix.any(axis=1))
    combinations, which = np.unique(matrix[rows], axis=0, return_inverse=True)
    found = np.empty(len(combinations), np.int32)
    for i, combination in enumerate(combinations):
        vector = states.copy()
        for j in np.flatnonzero(combination):
            index = shape.by_name.get(names[j])
            if index is not None:
                vector[index] = UNCHANGED
        found[i] = patterns.number(vector)
    numbers[rows] = found[which.reshape(-1)]
    return numbers


def events_of(data: pa.RecordBatch, shape: FileShape, patterns: Patterns) -> list[pa.RecordBatch]:
    """Rows `c r u d` of a changelog file as event batches (`Layout.event_schema`); others are left out. Keys are null
    where the file lacks a key column."""
    ops = ops_of(data, shape)
    rows = np.isin(ops, np.frombuffer(b"crud", np.uint8))
    if not rows.all():
        data = data.filter(pa.array(rows))
        ops = ops[rows]
    if not data.num_rows:
        return []
    layout = shape.layout
    columns, states = columns_of(data, shape)
    has_keys = shape.key_names is not None
    keys = new_keys(data, shape) if has_keys else pa.nulls(data.num_rows, pa.string())
    is_moved, olds = moved(data, shape, ops, keys)
    numbers = pattern_numbers(data, shape, patterns, states)
    linked = is_moved & (numbers != 0)
    orders = [_system(data, shape, name) for name in ("_epoch", "_lsn", "_seq")]
    kind = np.where(ops == ord("d"), CLEAR, SET).astype(np.uint8)
    no_text = pa.nulls(data.num_rows, pa.string())
    main: list[pa.Array] = [
        keys,
        pa.array(kind),
        *orders,
        pa.array(numbers),
        pc.if_else(pa.array(linked), olds, pa.scalar(None, pa.string())) if linked.any() else no_text,
        _optional(data, shape, "_committed_at", TIMESTAMP_TYPE),
        _optional(data, shape, "_origin", pa.string()),
        raw_in_layout(_optional(data, shape, "_raw", RAW_TYPE), shape.renames),
        *columns,
    ]
    out = [pa.RecordBatch.from_arrays(main, schema=layout.event_schema)]
    cut = np.flatnonzero(is_moved & ~linked)
    if len(cut):
        index = pa.array(cut)
        out.append(clear_events(layout, olds.take(index), [o.take(index) for o in orders]))
    return out


def clear_events(layout: Layout, keys: pa.Array, orders: list[pa.Array]) -> pa.RecordBatch:
    """Events that end keys, without any values."""
    n = len(keys)
    arrays: list[Any] = [keys, pa.array(np.full(n, CLEAR, np.uint8)), *orders, pa.array(np.zeros(n, np.int32))]
    arrays += [pa.nulls(n, field.type) for field in list(layout.event_schema)[len(arrays) :]]
    return pa.RecordBatch.from_arrays(arrays, schema=layout.event_schema)


def linked_hashes(data: pa.RecordBatch, shape: FileShape, patterns: Patterns) -> np.ndarray:
    """Hashes of all keys, old and new, of updates that changed their key and lack values; `data` needs the system
    columns and the key's only."""
    if shape.key_names is None:
        return np.empty(0, np.uint64)
    ops = ops_of(data, shape)
    keys = new_keys(data, shape)
    is_moved, olds = moved(data, shape, ops, keys)
    if not is_moved.any():
        return np.empty(0, np.uint64)
    states = np.array([KNOWN if name is not None else ABSENT for name in shape.source], np.uint8)
    for i, (name, field) in enumerate(zip(shape.source, shape.layout.fields, strict=True)):
        if name is not None and shape.schema.field(name).type != field.type:
            states[i] = UNCHANGED  # It may not convert; one key too many among the linked ones does no harm.
    linked = is_moved & (pattern_numbers(data, shape, patterns, states) != 0)
    if not linked.any():
        return np.empty(0, np.uint64)
    index = pa.array(np.flatnonzero(linked))
    return np.concatenate([hash_of(keys.take(index)), hash_of(olds.take(index))])


def _optional(data: pa.RecordBatch, shape: FileShape, name: str, kind: pa.DataType) -> pa.Array:
    if name not in shape.system:
        return pa.nulls(data.num_rows, kind)
    column = _system(data, shape, name)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column if column.type == kind else pc.cast(column, kind)
