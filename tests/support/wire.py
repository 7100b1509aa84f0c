"""Bytes of a pgoutput stream, made without a server: an encoder of every message, and random streams of them.

`Wire` writes one stream: call its methods in order and take `frames`. It is the second, independent statement of the
protocol (PostgreSQL manual, "Logical Replication Message Formats"), and remembers in `changes` what it said, so that a
test can compare what comes out of a decoder with it row by row.
"""

from __future__ import annotations

import contextlib
import random
import struct
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

POSTGRES_EPOCH_US = 946_684_800_000_000


BOOL, BYTEA, INT8, INT2, INT4, TEXT, FLOAT8, DATE = 16, 17, 20, 21, 23, 25, 701, 1082
TIMESTAMP, TIMESTAMPTZ, NUMERIC, UUID, UNHEARD_OF = 1114, 1184, 1700, 2950, 98765
NUMERIC_10_2 = ((10 << 16) | 2) + 4


class Cell(Enum):
    """What a tuple may say of a column instead of a text."""

    NULL = b"n"
    UNCHANGED = b"u"


Value = bytes | Cell


@dataclass(frozen=True)
class WireColumn:
    name: str
    type_oid: int = 25
    typmod: int = -1
    key: bool = False


@dataclass(frozen=True)
class WireTable:
    oid: int
    schema: str
    name: str
    columns: tuple[WireColumn, ...]
    identity: str = "d"


@dataclass
class Change:
    """A row change (or the truncate of one table) as the stream says it; `old` is the tuple sent with it, if any."""

    op: str
    table: WireTable
    lsn: int
    seq: int
    xid: int
    committed_us: int | None
    origin: str | None
    new: tuple[Value, ...] | None = None
    old: tuple[Value, ...] | None = None
    old_kind: str = ""


@dataclass
class Wire:
    """One stream. `lsn` moves with every frame; `changes` lists what was said, `commits` (xid, lsn, end_lsn)."""

    lsn: int = 0x1000000
    frames: list[bytes] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    commits: list[tuple[int, int, int]] = field(default_factory=list)
    in_transaction: bool = False
    _commit_lsn: int = 0
    _xid: int = 0
    _time: int = 0
    _origin: str | None = None
    _mark: str | None = None
    _seq: int = 0

    def _data(self, payload: bytes) -> None:
        self.lsn += len(payload)
        self.frames.append(b"w" + struct.pack(">QQq", self.lsn, self.lsn, 0) + payload)

    def keepalive(self, *, wal_end: int | None = None, reply: bool = False) -> None:
        wal_end = self.lsn if wal_end is None else wal_end
        self.frames.append(b"k" + struct.pack(">QqB", wal_end, 0, reply))

    def begin(self, *, xid: int, commit_lsn: int, time_us: int = POSTGRES_EPOCH_US + 1) -> None:
        """`time_us` in Unix microseconds; POSTGRES_EPOCH_US is what an unknown time looks like."""
        self._commit_lsn, self._xid, self._time = commit_lsn, xid, time_us - POSTGRES_EPOCH_US
        self._origin, self._mark, self._seq, self.in_transaction = None, None, 0, True
        self._data(b"B" + struct.pack(">QqI", commit_lsn, self._time, xid))

    def commit(self, *, end_lsn: int | None = None) -> None:
        end = self._commit_lsn + 48 if end_lsn is None else end_lsn
        self.lsn = max(self.lsn, end)
        self._data(b"C\0" + struct.pack(">QQq", self._commit_lsn, end, self._time))
        self.commits.append((self._xid, self._commit_lsn, end))
        self.in_transaction = False

    def origin(self, name: str) -> None:
        self._origin = name
        self._data(b"O" + struct.pack(">Q", 77) + name.encode() + b"\0")

    def relation(self, table: WireTable) -> None:
        head = struct.pack(">I", table.oid) + _name(table.schema) + _name(table.name)
        head += table.identity.encode() + struct.pack(">H", len(table.columns))
        columns = b"".join(
            struct.pack(">B", c.key) + _name(c.name) + struct.pack(">Ii", c.type_oid, c.typmod) for c in table.columns
        )
        self._data(b"R" + head + columns)

    def type(self, oid: int, schema: str, name: str) -> None:
        self._data(b"Y" + struct.pack(">I", oid) + _name(schema) + _name(name))

    def insert(self, table: WireTable, new: tuple[Value, ...]) -> None:
        self._data(b"I" + struct.pack(">I", table.oid) + b"N" + _tuple(new))
        self._changed("c", table, new=new)

    def update(
        self,
        table: WireTable,
        new: tuple[Value, ...],
        *,
        key: tuple[Value, ...] | None = None,
        old: tuple[Value, ...] | None = None,
    ) -> None:
        """`key`: a 'K' tuple ('n' off the key), `old`: an 'O' tuple; neither: only the new tuple is sent."""
        before, kind = (key, "K") if key is not None else (old, "O" if old is not None else "")
        payload = b"U" + struct.pack(">I", table.oid)
        if before is not None:
            payload += kind.encode() + _tuple(before)
        self._data(payload + b"N" + _tuple(new))
        self._changed("u", table, new=new, old=before, old_kind=kind)

    def delete(
        self, table: WireTable, *, key: tuple[Value, ...] | None = None, old: tuple[Value, ...] | None = None
    ) -> None:
        before, kind = (key, "K") if key is not None else (old, "O")
        assert before is not None
        self._data(b"D" + struct.pack(">I", table.oid) + kind.encode() + _tuple(before))
        self._changed("d", table, old=before, old_kind=kind)

    def truncate(self, tables: list[WireTable], *, options: int = 0) -> None:
        self._data(b"T" + struct.pack(">IB", len(tables), options) + b"".join(struct.pack(">I", t.oid) for t in tables))
        for table in tables:
            self._changed("t", table, counts=False)
        self._seq += 1

    def message(self, prefix: str, content: bytes, *, transactional: bool = True) -> None:
        head = struct.pack(">BQ", transactional, self.lsn) + _name(prefix)
        self._data(b"M" + head + struct.pack(">I", len(content)) + content)
        if prefix == "cdc.origin" and transactional and self._mark is None and 0 < len(content) <= 512:
            with contextlib.suppress(UnicodeDecodeError):
                self._mark = str(content, "utf-8")

    def _changed(self, op: str, table: WireTable, *, counts: bool = True, **tuples: Any) -> None:
        time = None if self._time == 0 else self._time + POSTGRES_EPOCH_US
        origin = self._origin if self._mark is None else self._mark
        self.changes.append(Change(op, table, self._commit_lsn, self._seq, self._xid, time, origin, **tuples))
        self._seq += counts


def _name(name: str) -> bytes:
    return name.encode() + b"\0"


def _tuple(cells: tuple[Value, ...]) -> bytes:
    parts = [struct.pack(">H", len(cells))]
    for cell in cells:
        parts.append(cell.value if isinstance(cell, Cell) else b"t" + struct.pack(">I", len(cell)) + cell)
    return b"".join(parts)


_TEXTS: dict[int, tuple[str, ...]] = {
    BOOL: ("t", "f"),
    BYTEA: ("\\x", "\\x00ff", "\\xdeadbeef"),
    INT2: ("0", "-32768", "32767"),
    INT4: ("0", "7", "-2147483648", "2147483647"),
    INT8: ("1", "-9223372036854775808", "9223372036854775807"),
    TEXT: ("", "a", "naïve — 数", 'with "quotes" and ,{} \n', "x" * 300, "t\u0001n"),
    FLOAT8: ("0", "1.5", "-1e-300", "Infinity", "-Infinity"),
    DATE: ("2024-02-29", "1970-01-01", "0001-01-01", "infinity", "0044-03-15 BC"),
    TIMESTAMP: ("2024-02-29 23:59:59.999999", "1999-12-31 00:00:00", "-infinity", "12345-01-01 00:00:00"),
    TIMESTAMPTZ: ("2024-02-29 23:59:59.5+00", "1970-01-01 00:00:00+00", "infinity"),
    NUMERIC: ("0.00", "-99999999.99", "12345678.90", "NaN"),
    UUID: ("6c9c7a0e-7d4b-4c3e-9c1a-0a0b0c0d0e0f",),
    UNHEARD_OF: ("(1,2)", "anything"),
}
_NAMES = ("id", "Name", "_op", "sel ect", "größe", "a", "b", "c", "d", "dropped")


def random_stream(rng: random.Random, *, transactions: int, start: int = 0x1000000) -> Wire:
    """A valid stream with everything in it that pgoutput can say, sometimes ending inside a transaction.

    Tables whose name starts with "hidden" and columns named "dropped" are meant to be left out by the resolver.
    """
    wire = Wire(lsn=start)
    tables = [_random_table(rng, 16384 + i) for i in range(rng.randint(1, 12 if rng.random() < 0.2 else 4))]
    said: dict[int, WireTable] = {}
    xid = rng.randrange(1, 1 << 32)
    for number in range(transactions):
        _random_rest(wire, rng)
        xid = xid + 1 & 0xFFFFFFFF
        time = POSTGRES_EPOCH_US if rng.random() < 0.1 else 1_700_000_000_000_000 + rng.randrange(10**9)
        wire.begin(xid=xid, commit_lsn=wire.lsn + rng.randint(1, 5000), time_us=time)
        if rng.random() < 0.2:
            wire.origin(rng.choice(("cdc_crm", "pg_16389", "ö")))
        if rng.random() < 0.2:
            wire.message("cdc.origin", rng.choice((b"cdc_crm", b"cdc_mail", b"\xc3")))
        for _ in range(rng.choice((0, 1, 1, 3, 8))):
            _random_changes(wire, rng, tables, said)
        if number < transactions - 1 or rng.random() < 0.6:
            wire.commit()
            _random_rest(wire, rng)
    return wire


def _random_table(rng: random.Random, oid: int) -> WireTable:
    names = rng.sample(_NAMES, rng.choice((0, 1, 2, 4, 7)))
    columns = tuple(_random_column(rng, name, key=i == 0) for i, name in enumerate(names))
    name = rng.choice(("orders", "Order Items", "hidden", "naïve"))
    return WireTable(oid, rng.choice(("public", "", "Sales")), f"{name}{oid}", columns, rng.choice("dfi"))


def _random_column(rng: random.Random, name: str, *, key: bool) -> WireColumn:
    type_oid = rng.choice(list(_TEXTS))
    return WireColumn(name, type_oid, NUMERIC_10_2 if type_oid == NUMERIC else -1, key)


def _random_rest(wire: Wire, rng: random.Random) -> None:
    """What may stand anywhere: keepalives, types, messages outside of a transaction."""
    match rng.randrange(14):
        case 0:
            wire.keepalive(reply=rng.random() < 0.5)
        case 1:
            wire.type(rng.randrange(16384, 1 << 32), "public", "mood")
        case 2:
            wire.message("prefix", b"\x00\xff", transactional=wire.in_transaction)
        case 3 | 4:
            content = rng.choice((b"cdc_crm", "ö".encode(), b"\xff", b"", b"x" * 513))
            wire.message("cdc.origin", content, transactional=wire.in_transaction)


def _random_changes(wire: Wire, rng: random.Random, tables: list[WireTable], said: dict[int, WireTable]) -> None:
    """One run of changes of one table; now and then its shape changes first, or its Relation is said again."""
    place = rng.randrange(len(tables))
    if rng.random() < 0.15:
        spare = [name for name in _NAMES if name not in {c.name for c in tables[place].columns}]
        added = (_random_column(rng, rng.choice(spare), key=False),) if spare else ()
        tables[place] = replace(tables[place], columns=tables[place].columns + added)
    if rng.random() < 0.1:
        named = rng.sample(tables, rng.randint(1, len(tables)))
        _say(wire, rng, named, said)
        wire.truncate(named)
        return
    table = tables[place]
    _say(wire, rng, [table], said)
    for _ in range(rng.choice((1, 2, 5, 20)) if rng.random() < 0.9 else 150):
        if rng.random() < 0.05:
            _random_rest(wire, rng)
        _random_row(wire, rng, table)


def _say(wire: Wire, rng: random.Random, tables: list[WireTable], said: dict[int, WireTable]) -> None:
    for table in tables:
        if said.get(table.oid) != table or rng.random() < 0.1:
            wire.relation(table)
            said[table.oid] = table


def _random_row(wire: Wire, rng: random.Random, table: WireTable) -> None:
    new = _random_tuple(rng, table, unchanged=0.0)
    toasted = _random_tuple(rng, table, unchanged=0.1)
    key = tuple(cell if c.key else Cell.NULL for c, cell in zip(table.columns, new, strict=True))
    match rng.randrange(4), table.identity:
        case 0, "f":
            wire.delete(table, old=new)
        case 0, _:
            wire.delete(table, key=key)
        case 1, _:
            wire.insert(table, new)
        case 2, "f":
            wire.update(table, toasted, old=new)
        case 2, _:
            wire.update(table, toasted, key=key)
        case _:
            wire.update(table, toasted)


def _random_tuple(rng: random.Random, table: WireTable, *, unchanged: float) -> tuple[Value, ...]:
    cells: list[Value] = []
    for column in table.columns:
        dice = rng.random()
        if dice < unchanged:
            cells.append(Cell.UNCHANGED)
        elif dice > 0.85:
            cells.append(Cell.NULL)
        else:
            cells.append(rng.choice(_TEXTS[column.type_oid]).encode())
    return tuple(cells)
