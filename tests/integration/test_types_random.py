"""Random values, all the way: the server stores and prints them, stream and snapshot read them, the lake holds them.

Values are made in Python and sent in binary, so the only text on the way is the server's. What the lake's files hold is
compared with the Python values themselves; where Python has no such value (dates before year 1, NaN of a numeric),
a rule of its own says that it must be in `_raw`, with the text that the server prints.
"""

from __future__ import annotations

import datetime as dt
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from psycopg import sql

from cdc.batch import Batch, Boundary
from cdc.config import SourceConfig
from cdc.lake.changelog import ChangelogTable
from cdc.table import TableSchema
from connectors.local.store import LocalStore
from connectors.postgres.connection import CANONICAL
from connectors.postgres.embedded import EmbeddedPostgres
from connectors.postgres.pgoutput import Decoder
from connectors.postgres.snapshot import PostgresSnapshotReader
from tests.support.postgres import create_database, drop_database
from tests.support.typecases import same
from tests.support.witness import changelog

NAME = "types_random"
KEPT, PRINTED = object(), object()
"""Expected of a cell: that its text is in `_raw`; that it is the text which the server prints."""

EPOCH = dt.datetime(2000, 1, 1)  # noqa: DTZ001 - Postgres' own, of a timestamp without a zone
DAY = 86_400_000_000


@dataclass(frozen=True)
class Kind:
    """A type: its random values, how SQL takes one, and what the lake must hold of it."""

    declared: str
    values: st.SearchStrategy[Any]
    held: Callable[[Any], Any] = lambda value: value
    taken: str = "%b"


def _day(days: int) -> Any:
    at = dt.date(2000, 1, 1).toordinal() + days
    return dt.date.fromordinal(at) if 1 <= at <= dt.date.max.toordinal() else KEPT


def _moment(micros: int) -> Any:
    return EPOCH + dt.timedelta(microseconds=micros) if -730_119 * DAY <= micros < 2_921_940 * DAY else KEPT


def _instant(micros: int) -> Any:
    moment = _moment(micros)
    return moment if moment is KEPT else moment.replace(tzinfo=dt.UTC)


def _decimal(value: Decimal) -> Any:
    return value if value.is_finite() else KEPT


def _all(held: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Of a list: one element that cannot be held takes the others with it."""

    def of(values: list[Any]) -> Any:
        cells = [None if v is None else held(v) for v in values]
        return KEPT if any(c is KEPT for c in cells) else cells

    return of


def _lists(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(st.none() | values, max_size=4)


def _printed(value: Any) -> Any:
    return PRINTED


FLOATS = st.floats() | st.builds(lambda m, k: float(m * 2**k), st.integers(-(2**53), 2**53), st.integers(0, 70))
SINGLES = st.floats(width=32).map(lambda v: float(np.float32(v)))
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
NASTY = TEXTS | st.text(st.sampled_from(list('nulNUL {}",;\\\t\r\n\v\x1c\xa0[]=:ž')), max_size=8)
PRICES = st.decimals(min_value=-(10**8) + 1, max_value=10**8 - 1, places=2) | st.just(Decimal("NaN"))
DAYS = st.integers(-2_451_545, 2_145_031_948) | st.integers(-730_130, -730_110) | st.integers(2_921_930, 2_921_950)
MICROS = (
    st.integers(-211_813_488_000_000_000, 9_223_371_331_199_999_999)
    | st.integers(-730_119 * DAY - 9, -730_119 * DAY + 9)
    | st.integers(2_921_940 * DAY - 9, 2_921_940 * DAY + 9)
    | st.integers(-(10**15), 10**15)
)
# Not as one number of microseconds: old servers take no interval that is written with more than 32 bits of them.
MOVED = (
    "(select '2000-01-01 00:00:00+00'::{} + make_interval(days => (v / 86400000000)::int,"
    " secs => (v %% 86400000000) / 1000000.0) from (select %b::int8) given(v))"
)
KINDS = (
    Kind("boolean", st.booleans()),
    Kind("smallint", st.integers(-(2**15), 2**15 - 1)),
    Kind("bigint", st.integers(-(2**63), 2**63 - 1)),
    Kind("real", SINGLES),
    Kind("double precision", FLOATS),
    Kind("numeric(10,2)", PRICES, _decimal),
    Kind("numeric(38,10)", st.decimals(-(10**27), 10**27, places=10), _decimal),
    Kind("numeric", st.decimals(allow_nan=False), _printed),
    Kind("date", DAYS, _day, "'2000-01-01'::date + %b::int"),
    Kind("timestamp", MICROS, _moment, MOVED.format("timestamp")),
    Kind("timestamptz", MICROS, _instant, MOVED.format("timestamptz")),
    Kind("interval", st.timedeltas(), _printed),
    Kind("bytea", st.binary(max_size=20)),
    Kind("text", NASTY),
    Kind("uuid", st.uuids(), str),
    Kind("bigint[]", _lists(st.integers(-(2**63), 2**63 - 1))),
    Kind("real[]", _lists(SINGLES)),
    Kind("numeric(10,2)[]", _lists(PRICES), _all(_decimal)),
    Kind("timestamptz[]", _lists(st.datetimes(timezones=st.just(dt.UTC)))),
    Kind("bytea[]", _lists(st.binary(max_size=4))),
    Kind("text[]", _lists(NASTY)),
    Kind("uuid[]", _lists(st.uuids()), _all(str)),
)
ROWS = st.lists(st.tuples(*(st.none() | kind.values for kind in KINDS)), min_size=1, max_size=12)


@dataclass
class Way:
    """A table of every kind at a server, and both ways from there."""

    connection: psycopg.Connection[Any]
    reader: PostgresSnapshotReader
    schema: TableSchema

    def store(self, rows: list[tuple[Any, ...]]) -> list[list[str | None]]:
        """Replace the rows of the table; what the server prints for them."""
        taken = sql.SQL(", ").join(sql.SQL(f"({kind.taken})::{kind.declared}") for kind in KINDS)
        values = sql.SQL(", ").join(sql.SQL("({}, {})").format(sql.Literal(i), taken) for i in range(len(rows)))
        self.connection.execute("delete from public.random")
        self.frames()
        given = [cell for row in rows for cell in row]
        self.connection.execute(sql.SQL("insert into public.random values {}").format(values), given)
        with self.connection.cursor() as cursor:
            result = cursor.execute("select * from public.random order by id").pgresult
            assert result is not None
            cells = [[result.get_value(i, k + 1) for k in range(len(KINDS))] for i in range(len(rows))]
        return [[None if cell is None else cell.decode() for cell in row] for row in cells]

    def frames(self) -> list[bytes]:
        """What the slot has, as the replication protocol would frame it."""
        found = self.connection.execute(
            "select lsn - '0/0'::pg_lsn, data from pg_logical_slot_get_binary_changes(%s, null, null,"
            " 'proto_version', '1', 'publication_names', %s)",
            [NAME, NAME],
        ).fetchall()
        return [b"w" + struct.pack(">QQq", int(lsn), int(lsn), 0) + bytes(data) for lsn, data in found]

    def streamed(self) -> list[Batch]:
        return list(Decoder(lambda relation: self.schema, epoch=1).feed(self.frames()).batches)

    def read(self) -> list[pa.Array]:
        """The columns, and last what is kept as text, as a snapshot reads them."""
        self.reader.begin(self.schema)
        rows = self.reader.read()
        self.reader.end()
        return [*rows.columns, rows.raw]


@pytest.fixture(scope="module")
def way(server: EmbeddedPostgres) -> Iterator[Way]:
    dsn = create_database(server, NAME)
    options = " ".join(f"-c {name}={value}" for name, value in CANONICAL.items())
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None, options=options) as connection:
        columns = ", ".join(f"c{i} {kind.declared}" for i, kind in enumerate(KINDS))
        connection.execute(f"create table public.random (id int primary key, {columns})".encode())
        connection.execute(sql.SQL("create publication {} for table public.random").format(sql.Identifier(NAME)))
        connection.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", [NAME])
        reader = PostgresSnapshotReader(SourceConfig(name="random", dsn=dsn, slot=NAME, publication=(NAME,)))
        schema = next(f.schema for f in reader.tables().tables)
        yield Way(connection, reader, schema)
        reader.close()
    drop_database(server, NAME)


@pytest.mark.matrix
@given(rows=ROWS)
# Every example is work for a server: one that fails is told as it is, without a search for a smaller one.
@settings(max_examples=max(2, settings().max_examples // 5), phases=[Phase.reuse, Phase.generate])
def test_the_lake_holds_the_values_that_the_server_was_given(way: Way, rows: list[tuple[Any, ...]]) -> None:
    printed = way.store(rows)
    batches = way.streamed()
    assert sum(batch.data.num_rows for batch in batches) == len(rows)
    with tempfile.TemporaryDirectory() as folder:
        table = ChangelogTable(LocalStore(Path(folder)), "shop", way.schema.table)
        writer = table.writer(Path(folder))
        lsn = 0
        for batch in batches:
            writer.add(batch)
            lsn = max(batch.system("_lsn").to_pylist())
        writer.commit(Boundary(1, lsn, lsn))
        landed = changelog(Path(folder), str(way.schema.table)).to_pylist()
    landed.sort(key=lambda row: row["id"])
    read = way.read()
    snapshot_raw = read[-1].to_pylist() if read[-1] is not None else [None] * len(rows)
    for i, row in enumerate(rows):
        raw = dict(landed[i]["_raw"] or ())
        assert raw == dict(snapshot_raw[i] or ())
        for k, (kind, value) in enumerate(zip(KINDS, row, strict=True)):
            name = f"c{k}"
            held = landed[i][name]
            assert same(read[k + 1][i].as_py(), held), kind.declared
            expected = None if value is None else kind.held(value)
            if expected is KEPT:
                assert (held, raw.pop(name)) == (None, printed[i][k]), kind.declared
            else:
                assert same(held, printed[i][k] if expected is PRINTED else expected), (kind.declared, held, expected)
        assert raw == {}
