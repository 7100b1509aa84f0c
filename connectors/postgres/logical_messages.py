"""Logical messages that an application writes into the stream, as rows of a table of cdc's own.

`pg_logical_emit_message` with a prefix that the configuration names makes one row of `cdc._messages`: prefix, content,
and whether it was written inside of its transaction. A transactional message counts as a change of its transaction: it
has the transaction's position, id, origin and time, and an ordinal among the changes. Another one stands for itself: it
is sent when it is written, whatever becomes of the transaction around it, and its own position identifies it, so that
one that is sent again after a restart is known. The table is only added to, and has no `current`.

Messages of cdc itself (heartbeats, barriers, the mark of our own writes) never land. Rare by nature: read one by one,
beside the decoder's way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import pyarrow as pa

from cdc.batch import Batch, batch_schema
from cdc.table import OWN_SCHEMA, Column, TableId, TableSchema
from connectors.postgres.buffer import Bools
from connectors.postgres.frames import Frames
from connectors.postgres.image import System
from connectors.postgres.messages import INSERT, MESSAGE, ORIGIN_PREFIX, LogicalMessage, read_message

OWN_PREFIXES = ("cdc", ORIGIN_PREFIX)
MESSAGES = TableId(OWN_SCHEMA, "_messages")
_TEXT, _BYTEA, _BOOL = 25, 17, 16

Kept = Mapping[int, LogicalMessage]
"""Messages of one part that are wanted, by their place among its frames."""


def messages_schema() -> TableSchema:
    """The table's only schema, without a number."""
    columns = (("prefix", _TEXT, "text"), ("content", _BYTEA, "bytea"), ("transactional", _BOOL, "boolean"))
    return TableSchema(
        table=MESSAGES,
        oid=0,
        columns=tuple(
            Column(name=name, attnum=i, type_oid=oid, type_name=kind, not_null=True)
            for i, (name, oid, kind) in enumerate(columns, 1)
        ),
        identity="n",
    )


@dataclass(frozen=True, slots=True)
class MessageRow:
    """A message and where it stands in the stream's order; `committed` in µs, or UNKNOWN_TIME."""

    message: LogicalMessage
    lsn: int
    seq: int
    xid: int
    committed: int
    origin: str | None


class MessageTable:
    """Which messages are wanted (globs of prefixes), and the batches that they make."""

    def __init__(self, schema: TableSchema, prefixes: Sequence[str]) -> None:
        self._schema = schema
        self._prefixes = tuple(prefixes)

    def kept(self, frames: Frames) -> Kept:
        """The wanted messages among the frames. ProtocolError for one that is malformed."""
        found: dict[int, LogicalMessage] = {}
        for i in np.flatnonzero(frames.kind == MESSAGE).tolist():
            try:
                message = read_message(frames.data(i))
            except ValueError as error:
                raise frames.malformed(i, str(error)) from error
            if self._wants(message.prefix):
                found[i] = message
        return found

    def _wants(self, prefix: str) -> bool:
        return prefix not in OWN_PREFIXES and any(fnmatchcase(prefix, pattern) for pattern in self._prefixes)

    def batch(self, epoch: int, rows: Sequence[MessageRow]) -> Batch:
        """At least one row, in order."""
        origins = [row.origin for row in rows]
        system = System(
            epoch=epoch,
            kind=np.full(len(rows), INSERT, np.uint8),
            lsn=np.array([row.lsn for row in rows], np.int64),
            seq=np.array([row.seq for row in rows], np.int64),
            xid=np.array([row.xid for row in rows], np.int64),
            committed=np.array([row.committed for row in rows], np.int64),
            origin=pa.array(origins, pa.string()) if any(o is not None for o in origins) else None,
        )
        optional = system.optional(0, len(rows))
        columns = [
            pa.array([row.message.prefix for row in rows], pa.string()),
            pa.array([row.message.content for row in rows], pa.binary()),
            pa.array([row.message.transactional for row in rows], pa.bool_()),
        ]
        return Batch(
            self._schema,
            pa.RecordBatch.from_arrays(
                [*system.required(0, len(rows)), *optional.values(), *columns],
                schema=batch_schema(self._schema, tuple(optional)),
            ),
        )


def with_messages(changes: Bools, kept: Kept) -> Bools:
    """The mask of a part's changes with its transactional messages, which have ordinals as changes do."""
    for i, message in kept.items():
        changes[i] = message.transactional
    return changes
