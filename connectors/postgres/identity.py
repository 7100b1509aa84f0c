"""What a table's replica identity means for its updates and deletes, as findings of `check`.

Postgres refuses an UPDATE or DELETE of a published table that has no identity, at the statement itself: whoever hears
of it from the application hears of it too late. Reads nothing; which identities there are is read in catalog.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from cdc.ports import Finding
from cdc.table import TableId
from connectors.postgres.catalog import Described, Leaf, Published


def identity_findings(published: Published | None, described: Described) -> list[Finding]:
    """What becomes of updates and deletes of one table; nothing if every row can be told by a key. `published` None: it
    is to be published, with all operations."""
    if published is not None and described.is_torn({c.name for c in described.sent(published.columns).columns}):
        return []  # That is an error of its own.
    sent = {"update", "delete"} if published is None else set().union(*(p.operations for p in published.parts))
    sent &= {"update", "delete"}
    if not sent:
        return []
    table, schema = described.schema.table, described.schema
    if described.kind == "p":
        return _of_partitions(table, described)
    if not _has_identity(schema.identity, schema.key):
        return [_refused(table, sent, schema.identity, bool(described.primary))]
    return [] if schema.key else [_multiset(table)]


def _of_partitions(root: TableId, described: Described) -> list[Finding]:
    """Each partition is judged by its own identity, whatever the root's is."""
    leaves = [leaf for leaf in described.leaves if leaf.kind == "r"]
    findings = [
        _refused(leaf.table, {"update", "delete"}, leaf.identity, bool(leaf.key))
        for leaf in leaves
        if not _has_identity(leaf.identity, leaf.key)
    ]
    if described.schema.key:
        return findings
    if described.schema.identity == "f":
        return [*findings, _multiset(root)]
    return findings + _not_whole(root, leaves)


def _not_whole(root: TableId, leaves: Iterable[Leaf]) -> list[Finding]:
    """Under a root without a key old rows have to be whole, by word of the root and of the partition."""
    odd = [leaf.table for leaf in leaves if _has_identity(leaf.identity, leaf.key)]
    statements = [f"alter table {quoted(table)} replica identity full;" for table in (root, *odd)]
    return (
        [
            Finding(
                name="replica identity",
                severity="warning",
                message=f"table {root} has no key, and partition {odd[0]} sends no whole old rows under it:"
                " an update or delete stops the table",
                fix=" ".join(statements),
                object=str(root),
            )
        ]
        if odd
        else []
    )


def _has_identity(identity: str, key: tuple[str, ...]) -> bool:
    return identity == "f" or (identity != "n" and bool(key))


def _refused(table: TableId, sent: Iterable[str], identity: str, has_primary: bool) -> Finding:
    statements = " and ".join(sorted(operation.upper() for operation in sent))
    fix = f"alter table {quoted(table)} add primary key (…); -- or: replica identity full"
    if has_primary:
        fix = f"alter table {quoted(table)} replica identity default;"
    if identity == "i":
        fix += " -- the index that it names is gone"
    return Finding(
        name="replica identity",
        severity="warning",
        message=f"table {table} has no replica identity: inserts are captured, and Postgres itself refuses {statements}"
        f" ('cannot update table \"{table.name}\" because it does not have a replica identity and publishes updates')",
        fix=fix,
        object=str(table),
    )


def _multiset(table: TableId) -> Finding:
    return Finding(
        name="replica identity",
        severity="info",
        message=f"table {table} has no key: it is kept as a multiset of rows, and each merge of updates or deletes"
        " reads all of its current table",
        fix=f"alter table {quoted(table)} add primary key (…); -- if it is big",
        object=str(table),
    )


def quoted(table: TableId) -> str:
    """A table's name as it stands in a statement."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in table)
