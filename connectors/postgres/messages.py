"""The pgoutput messages that come rarely (Relation, Type, Truncate, Origin, Message), one at a time.

Row messages, Begin and Commit are read by the thousand, elsewhere. Every reader here checks that the message ends
exactly where its frame does; it raises ValueError saying what is wrong, which the decoder turns into a ProtocolError
that names LSN and kind.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

INSERT, UPDATE, DELETE, TRUNCATE = b"IUDT"
BEGIN, COMMIT, RELATION, TYPE, ORIGIN, MESSAGE = b"BCRYOM"
STREAM_START, STREAM_STOP, STREAM_COMMIT, STREAM_ABORT = b"SEcA"
NEW, KEY, OLD = b"NKO"
TEXT, NULL, UNCHANGED = b"tnu"
DDL_MARK = b'{"ddl": '
"""How the content of a message of our event triggers begins."""
ORIGIN_PREFIX = "cdc.origin"
"""A transactional message of this prefix marks its transaction as one of the origin that its content names (UTF-8): so
do writers of ours that may not set replication origins. Sent before anything else in the transaction."""
ORIGIN_BYTES_MAX = 512
"""As long as Postgres 18 lets the name of an origin be."""

_UINT16 = struct.Struct(">H")
_UINT32 = struct.Struct(">I")
_TYPE_TYPMOD = struct.Struct(">Ii")
_STREAM_START = struct.Struct(">xIB")
_STREAM_COMMIT = struct.Struct(">xIBQQq")
_STREAM_ABORT = struct.Struct(">xII")


@dataclass(frozen=True, slots=True)
class RelationColumn:
    """A column as a Relation message names it; `is_key`: part of the replica identity."""

    name: str
    type_oid: int
    typmod: int
    is_key: bool


@dataclass(frozen=True, slots=True)
class Relation:
    """A table as a Relation message describes it; `identity` is `pg_class.relreplident`."""

    oid: int
    schema: str
    name: str
    identity: str
    columns: tuple[RelationColumn, ...]


class _Reader:
    """Walks one message's bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 1  # behind the kind byte

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise ValueError("it is cut short")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int(_UINT16.unpack(self.take(2))[0])

    def u32(self) -> int:
        return int(_UINT32.unpack(self.take(4))[0])

    def text(self) -> str:
        end = self._data.find(0, self._at)
        if end < 0:
            raise ValueError("a name in it does not end")
        name = self._data[self._at : end]
        self._at = end + 1
        return name.decode()  # UnicodeDecodeError is a ValueError

    def rest(self) -> int:
        return len(self._data) - self._at

    def end(self) -> None:
        if self.rest():
            raise ValueError("it is longer than its fields")


def read_relation(data: bytes) -> Relation:
    """A Relation message, kind byte included."""
    reader = _Reader(data)
    oid, schema, name = reader.u32(), reader.text() or "pg_catalog", reader.text()
    identity, count = reader.u8(), reader.u16()
    if identity not in b"dnfi":
        raise ValueError("unknown replica identity")
    columns = []
    for _ in range(count):
        flags, column = reader.u8(), reader.text()
        type_oid, typmod = _TYPE_TYPMOD.unpack(reader.take(8))
        columns.append(RelationColumn(name=column, type_oid=type_oid, typmod=typmod, is_key=bool(flags & 1)))
    reader.end()
    if len({c.name for c in columns}) != count:
        raise ValueError("two columns have one name")
    return Relation(oid=oid, schema=schema, name=name, identity=chr(identity), columns=tuple(columns))


def read_type(data: bytes) -> tuple[int, str, str]:
    """OID, schema and name of a Type message."""
    reader = _Reader(data)
    oid, schema, name = reader.u32(), reader.text() or "pg_catalog", reader.text()
    reader.end()
    return oid, schema, name


def read_truncate(data: bytes) -> list[int]:
    """The OIDs of the relations that a Truncate message names."""
    reader = _Reader(data)
    count = reader.u32()
    reader.u8()  # options: cascade, restart identity; the relations are all named
    if reader.rest() != 4 * count:
        raise ValueError("its length does not fit its number of relations")
    return [reader.u32() for _ in range(count)]


def read_origin(data: bytes) -> str:
    """The name in an Origin message."""
    reader = _Reader(data)
    reader.take(8)  # the LSN at the origin
    name = reader.text()
    reader.end()
    return name


@dataclass(frozen=True, slots=True)
class LogicalMessage:
    """What `pg_logical_emit_message` wrote; `lsn` is its own position."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes

    @property
    def is_ddl(self) -> bool:
        """Whether it is the word of our event triggers."""
        return self.prefix == "cdc" and self.content.startswith(DDL_MARK)

    @property
    def origin(self) -> str | None:
        """The origin that it marks its transaction with; None for any other message, and for one whose content cannot
        be a name: anybody may write messages, so that is no error."""
        if self.prefix != ORIGIN_PREFIX or not self.transactional or len(self.content) > ORIGIN_BYTES_MAX:
            return None
        try:
            return self.content.decode() or None
        except UnicodeDecodeError:
            return None


def read_message(data: bytes) -> LogicalMessage:
    """A Message message; its content is anything."""
    reader = _Reader(data)
    flags, lsn = reader.u8(), int.from_bytes(reader.take(8))
    prefix = reader.text()
    content = reader.take(reader.u32())
    reader.end()
    return LogicalMessage(bool(flags & 1), lsn, prefix, content)


@dataclass(frozen=True, slots=True)
class StreamCommit:
    """A streamed transaction has committed: there, until there, then (microseconds since 2000)."""

    xid: int
    commit_lsn: int
    end_lsn: int
    time: int


def read_stream_start(data: bytes) -> tuple[int, bool]:
    """Id of the transaction of which a part follows, and whether it is the first part."""
    xid, first = _fields(_STREAM_START, data)
    return xid, bool(first)


def read_stream_commit(data: bytes) -> StreamCommit:
    """The end of a streamed transaction."""
    xid, _, commit_lsn, end_lsn, time = _fields(_STREAM_COMMIT, data)
    return StreamCommit(xid, commit_lsn, end_lsn, time)


def read_stream_abort(data: bytes) -> tuple[int, int]:
    """Ids of the top-level transaction and of the subtransaction that is rolled back (equal: all of it)."""
    xid, subxid = _fields(_STREAM_ABORT, data)
    return xid, subxid


def _fields(fields: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) != fields.size:
        raise ValueError("wrong length")
    return fields.unpack(data)
