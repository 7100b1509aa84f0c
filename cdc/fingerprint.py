"""What a look at the source's catalog finds of its tables: the facts that decide which rows a table shows.

Pure values with JSON in and out. A fact that changes between two looks may have changed rows without an event in the
stream; what follows from which change is decided in cdc.watch. Marks are opaque texts that a source changes whenever
the thing behind them may have changed, also when it was changed back meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cdc.table import TableId, TableSchema


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A partition below a published root. `storage` identifies its file, `mark` its place in the tree.

    `clean`: it has been part of the root since it was made, or has no rows. It is a fact of the moment, and not kept.
    """

    oid: int
    storage: int
    mark: str
    clean: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """One table's facts.

    `membership`: by which entries of which publications it is published, each with a mark; empty: it is not.
    `truncates`: TRUNCATE is published. `direct`: it is named in a publication itself, so the source refuses to make it
    unlogged. `storage` and `toast` identify its files (0: it has none). `marks`: per attnum, of the column's catalog
    entry. `types`: per user-defined type behind its columns its `name` and its parts (`label/…`, `attribute/…`).
    """

    schema: TableSchema
    membership: tuple[str, ...] = ()
    truncates: bool = True
    direct: bool = False
    storage: int = 0
    toast: int = 0
    marks: Mapping[int, str] = field(default_factory=dict)
    types: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": self.schema.to_json(),
            "membership": list(self.membership),
            "truncates": self.truncates,
            "direct": self.direct,
            "storage": self.storage,
            "toast": self.toast,
            "marks": {str(k): v for k, v in self.marks.items()},
            "types": {k: dict(v) for k, v in self.types.items()},
            "parts": [[p.oid, p.storage, p.mark] for p in self.parts],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Fingerprint:
        return cls(
            schema=TableSchema.from_json(data["schema"]),
            membership=tuple(data["membership"]),
            truncates=data["truncates"],
            direct=data["direct"],
            storage=data["storage"],
            toast=data["toast"],
            marks={int(k): v for k, v in data["marks"].items()},
            types=data["types"],
            parts=tuple(Part(oid=oid, storage=storage, mark=mark) for oid, storage, mark in data["parts"]),
        )

    def kept(self) -> Fingerprint:
        """What of it is kept: equal facts of two looks are equal in this form."""
        if not self.schema.version and not any(p.clean for p in self.parts):
            return self
        parts = tuple(replace(p, clean=False) for p in self.parts)
        return replace(self, schema=replace(self.schema, version=0), parts=parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpublished:
    """A table that the configuration wants and no publication has. `fix`: the statement that adds it."""

    table: TableId
    oid: int
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """One look, consistent in itself. `lsn`: everything that it sees was committed before this position.

    `tables`: the selected, published tables. `own`: the publication was made by us, so it is ours to extend.
    `partitions_stick`: an open stream goes on with what it knew of a partition before it was attached or detached, so
    such a finding is answered with a stream that is opened anew.
    """

    lsn: int
    tables: list[Fingerprint]
    unpublished: list[Unpublished] = field(default_factory=list)
    own: bool = False
    partitions_stick: bool = False
