"""Nouns of a table: its identity, its columns, one version of its schema.

Pure values, hashable and comparable; JSON in and out for state and lake. Identity of a table is its OID, of
a column its attnum; names are how people and wire messages call them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

OWN_SCHEMA = "cdc"
"""What cdc keeps itself: in a database the acknowledgements of reverse ETL, in the lake tables that no source has.
Tables of this schema are never captured, so these names are free."""

PARTITION_UNITS = ("hour", "day", "month")


class TableId(NamedTuple):
    """Schema and name, unquoted, as the catalog stores them."""

    schema: str
    name: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def is_own(self) -> bool:
        """Whether cdc itself writes it: it has a changelog, but no rows at the source, no snapshot and no `current`."""
        return self.schema == OWN_SCHEMA


class PartitionBy(NamedTuple):
    """Which of a table's times decides where its rows land, and how coarsely: the unit is hour, day or month."""

    column: str
    unit: str

    @classmethod
    def of(cls, text: str) -> PartitionBy:
        """From `COLUMN:UNIT`, as the configuration has it; ValueError if it is not that."""
        column, _, unit = text.rpartition(":")
        if not column or unit not in PARTITION_UNITS:
            raise ValueError(f'write "COLUMN:UNIT", where the unit is {", ".join(PARTITION_UNITS)}')
        return cls(column, unit)

    def __str__(self) -> str:
        return f"{self.column}:{self.unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column in one schema version.

    `type_oid` and `typmod` are those of the *base* type (domains resolved); `element_oid` is set for arrays
    (base type of the elements); `type_name` is what `format_type` prints. `missing` is the text of the value that
    rows older than the column show (`pg_attribute.attmissingval`), None if there is none. `declared` is the type
    that the configuration wants instead of the contract's (cdc.types.overridden), empty if none.
    """

    name: str
    attnum: int
    type_oid: int
    typmod: int = -1
    type_name: str = ""
    element_oid: int = 0
    not_null: bool = False
    missing: str | None = None
    declared: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSchema:
    """One version of a table's schema, columns in attnum order of the source.

    `key` names the columns that an old tuple carries: the replica identity's, under FULL and NOTHING the primary key's;
    empty if there is none. `identity` is `pg_class.relreplident` (d, n, f, i). `version` is 0 until the schema book
    (cdc.schema) has given it a number. `absent` names generated columns that the table has and the stream does not.
    `doubtful`: some columns may be others of the same name (a message has no attnums); no part of what it is.
    """

    table: TableId
    oid: int
    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()
    identity: str = "d"
    version: int = 0
    absent: tuple[str, ...] = ()
    doubtful: bool = field(default=False, compare=False)

    def column(self, name: str) -> Column:
        """The column of that name; KeyError if there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        return {
            "table": list(self.table),
            "oid": self.oid,
            "columns": [asdict(c) for c in self.columns],
            "key": list(self.key),
            "identity": self.identity,
            "version": self.version,
            **({"absent": list(self.absent)} if self.absent else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TableSchema:
        return cls(
            table=TableId(*data["table"]),
            oid=data["oid"],
            columns=tuple(Column(**c) for c in data["columns"]),
            key=tuple(data["key"]),
            identity=data["identity"],
            version=data["version"],
            absent=tuple(data.get("absent", ())),
        )
