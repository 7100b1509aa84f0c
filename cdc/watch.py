"""What a change of the catalog between two looks means for the rows of a table: pure.

Some things change rows and publish nothing. Each is one of these findings, with its answer: the table is read again,
or (`computed`) the catalog says what its old rows show now. The rule is that doubt reads again; only a change that
provably leaves every row as the stream has shown it is passed over (docs/decisions/0024). It reads nothing and
orders nothing; cdc.discovery does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cdc.fingerprint import Fingerprint
from cdc.table import Column, TableSchema

TEXT_TYPES = frozenset((25, 1043))
"""`text` and `varchar`: one becomes the other without a change of any value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogFinding:
    """What was found, and the answer: `resync`, or `computed` from the catalog."""

    kind: str
    message: str
    answer: str = "resync"


def compare(before: Fingerprint, now: Fingerprint) -> list[CatalogFinding]:
    """What happened to one table (same OID) between two looks; the most telling first, empty: nothing that matters."""
    found = [
        *_membership(before, now),
        *_parts(before, now),
        *_columns(before, now),
        *_storage(before, now),
        *_types(before.types, now.types),
    ]
    if not found and _shape(before.schema) != _shape(now.schema):
        found.append(CatalogFinding(kind="columns", message="its columns or its key changed", answer="computed"))
    return found


def after_upgrade(before: Fingerprint, now: Fingerprint) -> Fingerprint:
    """The facts of before as a server would show them that was upgraded: it keeps OIDs of tables and types, and neither
    publications' nor files' nor any marks."""
    return replace(
        before,
        membership=now.membership,
        storage=now.storage,
        toast=now.toast,
        marks=now.marks,
        parts=now.parts if {p.oid for p in before.parts} == {p.oid for p in now.parts} else before.parts,
    )


def _shape(schema: TableSchema) -> TableSchema:
    """The schema without what a rewrite forgets, and without its number."""
    return replace(schema, version=0, columns=tuple(replace(c, missing=None) for c in schema.columns))


def _membership(before: Fingerprint, now: Fingerprint) -> list[CatalogFinding]:
    if before.membership == now.membership:
        return []
    message = "what publishes it changed; changes in between may not have been published"
    if not before.membership:
        message = "it came back into the publication; changes in between were not published"
    return [CatalogFinding(kind="publication", message=message)]


def _parts(before: Fingerprint, now: Fingerprint) -> list[CatalogFinding]:
    old, new = {p.oid: p for p in before.parts}, {p.oid: p for p in now.parts}
    gone = [oid for oid in old if oid not in new or new[oid].mark != old[oid].mark]
    came = [oid for oid, part in new.items() if oid not in old and not part.clean]
    rewritten = [oid for oid in old if oid in new and new[oid].storage != old[oid].storage and oid not in gone]
    found = []
    if gone or came:
        message = f"partitions were attached or detached ({len(came)} new, {len(gone)} gone or placed anew)"
        found.append(CatalogFinding(kind="partitions", message=message))
    if rewritten:
        message = f"{len(rewritten)} partitions were truncated or rewritten"
        found.append(CatalogFinding(kind="rewrite", message=message))
    return found


def _columns(before: Fingerprint, now: Fingerprint) -> list[CatalogFinding]:
    """Columns that show other values under their number than before."""
    old = {c.attnum: c for c in before.schema.columns}
    changed = [c.name for c in now.schema.columns if c.attnum in old and not _same_values(old[c.attnum], c)]
    if not changed:
        return []
    return [CatalogFinding(kind="type", message=f"the type of {', '.join(changed)} changed")]


def _same_values(old: Column, new: Column) -> bool:
    """Whether values keep their text, given that the table was not rewritten."""
    if old.type_oid == new.type_oid:
        return old.element_oid == new.element_oid
    return {old.type_oid, new.type_oid} <= TEXT_TYPES


def _storage(before: Fingerprint, now: Fingerprint) -> list[CatalogFinding]:
    if before.storage == now.storage or _only_moved(before, now):
        return []
    return [CatalogFinding(kind="rewrite", message="it was truncated or rewritten")]


def _only_moved(before: Fingerprint, now: Fingerprint) -> bool:
    """Whether a new file provably holds what the stream has shown: it came from VACUUM FULL, CLUSTER, a move to another
    tablespace, or a TRUNCATE, which is in the stream.

    An ALTER TABLE that rewrites gives the table a new toast table, if it has one. Else the columns' catalog entries
    tell an ALTER of a column, and becoming unlogged is refused while the table itself is named in a publication.
    """
    if not (before.truncates and now.truncates):
        return False
    # A column's missing value would be forgotten by now.
    known = {c.attnum for c in before.schema.columns}
    if any(c.attnum not in known for c in now.schema.columns):
        return False
    if before.toast and before.toast == now.toast:
        return True
    untouched = all(before.marks.get(attnum) == mark for attnum, mark in now.marks.items())
    return before.direct and now.direct and untouched


def _types(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[CatalogFinding]:
    """Types whose values print otherwise: a renamed label, another list of attributes. A new label is none."""
    changed = []
    for oid in sorted(before.keys() & now.keys()):
        old, new = before[oid], now[oid]
        replaced = any(new.get(part) != text for part, text in old.items() if part != "name")
        if replaced or any(part.startswith("attribute/") for part in new.keys() - old.keys()):
            changed.append(new.get("name", oid))
    if not changed:
        return []
    return [CatalogFinding(kind="values", message=f"labels or attributes of type {', '.join(changed)} changed")]
