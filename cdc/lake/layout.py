"""Where things stand in the lake, and under which names.

`<source>/<schema>.<table>/changelog/` and `…/current/` are Delta tables, `…/files/` the changelog in plain files, on
request; `<source>/_cdc/` holds the small objects of the source (lease, anchor, fingerprints), and `_syncs/<sync>/acks/`
what targets have acknowledged (cdc.lake.ledger). Names are pure functions of the catalog's names: two daemons, or two
releases, always agree.

A name is written with every byte of its UTF-8 form other than letters, digits, `_` and `-` as `@XX` (upper-case hex).
The escape is not `%`: deltalake 1.6 and whatever reads through the same Delta kernel decode a percent sign in a table's
path once too often and then look for another directory, so such a table could be neither written nor opened. A name
whose escaped form is longer than ESCAPED_MAX stands as `@@` and its bytes in base 32: a directory's name, which holds
schema and table, has 255 bytes at most.
`_cdc` cannot be a table's directory, for those always contain a dot; nor can a sync's, for a sync's name has none.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from typing import Final

from cdc.batch import SYSTEM
from cdc.ports import ObjectStore
from cdc.table import TableId

ESCAPE: Final = "@"
ESCAPED_MAX: Final = 120
"""Twice this, and a dot, fits into the name of a directory; so does twice the dense form of 63 bytes."""
DATE: Final = "_date"
"""Partition column of a changelog, as text in UTC: the commit date, or a time of the row (cdc.lake.partitions)."""
PARTITION_KEY: Final = "cdc.partition_by"
"""Of a changelog's configuration: what `_date` means, and from which version on (JSON: `by`, `since`); not set: the
commit date, of every object."""

LAKE_SYSTEM: Final = (*SYSTEM, DATE)
"""Every system column that a lake table may have, by its name without a collision."""

KEY_METADATA: Final = "cdc.key"
IDENTITY_METADATA: Final = "cdc.identity"
"""Of a changelog's object: what its rows are known by."""

CURRENT_SYSTEM: Final = ("_epoch", "_lsn", "_seq", "_committed_at", "_origin", "_raw")
"""The system columns of `current`."""

_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_DENSE = ESCAPE + ESCAPE
_ESCAPED = re.compile(rb"@([0-9A-F]{2})")


def encode_name(name: str) -> str:
    """A source's, schema's or table's name as it stands in object keys; one-to-one, so different names never meet."""
    raw = name.encode()
    escaped = "".join(chr(b) if b in _PLAIN else f"{ESCAPE}{b:02X}" for b in raw)
    return escaped if len(escaped) <= ESCAPED_MAX else _DENSE + base64.b32encode(raw).decode().rstrip("=")


def decode_name(text: str) -> str:
    """The name behind `encode_name`; ValueError if `text` cannot be one."""
    if text.startswith(_DENSE):
        dense = text.removeprefix(_DENSE)
        name = base64.b32decode(dense + "=" * (-len(dense) % 8)).decode()
    else:
        name = _ESCAPED.sub(lambda m: bytes([int(m[1], 16)]), text.encode()).decode()
    if encode_name(name) != text:
        raise ValueError(f"not an encoded name: {text!r}")
    return name


def source_path(source: str) -> str:
    return encode_name(source)


def table_path(source: str, table: TableId) -> str:
    """Key prefix of a table, without a slash at its end."""
    return f"{source_path(source)}/{encode_name(table.schema)}.{encode_name(table.name)}"


def changelog_path(source: str, table: TableId) -> str:
    return f"{table_path(source, table)}/changelog"


def current_path(source: str, table: TableId) -> str:
    return f"{table_path(source, table)}/current"


def files_path(source: str, table: TableId) -> str:
    return f"{table_path(source, table)}/files"


def lease_key(source: str) -> str:
    return f"{source_path(source)}/_cdc/lease.json"


def anchor_key(source: str) -> str:
    return f"{source_path(source)}/_cdc/source.json"


def fingerprints_key(source: str) -> str:
    return f"{source_path(source)}/_cdc/fingerprints.json"


def acks_path(sync: str) -> str:
    """Key prefix of the acknowledgements of a sync, without a slash at its end."""
    return f"_syncs/{encode_name(sync)}/acks"


def runs_path(sync: str) -> str:
    """Key prefix of the row logs of a sync, without a slash at its end."""
    return f"_syncs/{encode_name(sync)}/runs"


def date_column(columns: Iterable[str]) -> str | None:
    """Which of a changelog's partition columns is its `_date`, whatever prefix its system columns have; None: none."""
    return next((c for c in columns if "_" + c.lstrip("_") == DATE), None)


def table_of_path(path: str) -> TableId | None:
    """The table whose directory `path` (`<source>/<schema>.<table>` or a key below) names; None if it names none."""
    parts = path.split("/")
    schema, dot, name = (parts[1] if len(parts) > 1 else "").partition(".")
    if not dot:
        return None
    try:
        return TableId(decode_name(schema), decode_name(name))
    except ValueError:
        return None


def tables_in(store: ObjectStore, source: str) -> list[TableId]:
    """The tables of a source that have anything in the lake, as the store lists them."""
    tables = {table_of_path(stored.key) for stored in store.list(source_path(source) + "/")}
    return sorted(table for table in tables if table is not None)


def system_prefix(columns: Iterable[str]) -> str:
    """What the system columns of a table with these source columns begin with: `_`, or more underscores on collision.

    One collision moves all of them, so that a reader needs one fact per table. Letters' case is ignored, as Delta and
    most engines do.
    """
    taken = {c.lower() for c in columns}
    prefix = "_"
    while any(prefix + name[1:] in taken for name in LAKE_SYSTEM):
        prefix += "_"
    return prefix


def system_name(name: str, prefix: str) -> str:
    """The name in the lake of the system column `name` (`_lsn`) of a table with that `prefix`."""
    return prefix + name[1:]
