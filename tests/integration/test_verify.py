"""`verify` tested by damage: every kind of injury is found and named, nothing else is, and equal tables are equal.

One daemon serves the module. The lake is injured in its files (tests/support/injuries.py), so that only a comparison
with the source can know.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pytest

from cdc.config import SourceConfig
from cdc.errors import GaveWay
from cdc.rowhash import RowHash, Sums, hash_lines, lines
from connectors.postgres.checksums import PostgresChecksumReader
from connectors.postgres.embedded import EmbeddedPostgres
from tests.integration.test_type_matrix import connect, create
from tests.support.daemon import Daemon, execute
from tests.support.injuries import Row, injured, random_injuries
from tests.support.postgres import create_database, drop_database
from tests.support.waiting import wait_until
from tests.support.workload import SCHEMA, Workload
from tests.unit.test_alerts import Hook

CHAR = 18
"""The oid of `"char"`."""

TYPES = {
    "n": "int", "price": "numeric(10,2)", "score": "float8", "word": "text", "at": "timestamptz", "due": "date",
    "ok": "boolean", "data": "bytea", "tags": "text[]", "numbers": "int[]", "doc": "jsonb", "odd": "numeric",
    "span": "interval", "code": "char(4)", "id2": "uuid", "addr": "inet", "moment": "time", "short": "smallint",
}  # fmt: skip
"""Columns of the injured table, by name."""
SETUP = f"""
create table typed (id int primary key, {", ".join(f"{name} {kind}" for name, kind in TYPES.items())});
insert into typed select g, g * 7, case when g = 5 then numeric 'NaN' else g / 4.0 end, g / 7.0, 'word ' || g,
 case when g = 6 then timestamptz 'infinity' else timestamptz '2026-01-01' + g * interval '1 hour' end,
 date '2026-01-01' + g,
 g % 2 = 0, decode(md5(g::text), 'hex'), array['a' || g, null, 'x,"y'], array[g, g + 1], jsonb_build_object('k', g),
 g / 3.0, g * interval '1 minute', 'c' || g, md5(g::text)::uuid, ('10.0.0.' || g)::inet,
 time '00:00' + g * interval '1 m', g from generate_series(1, 60) g;
insert into typed (id) values (61);
create table pairs (a text, b timestamp, n int, primary key (a, b));
insert into pairs select 'a' || g % 3, case when g = 7 then timestamp 'infinity'
 else timestamp '2026-01-01' + g * interval '1 s' end, g from generate_series(1, 30) g;
create table heap (n int, word text, odd numeric(10,2));
alter table heap replica identity full;
insert into heap select g % 5, 'same', case when g % 5 = 0 then numeric 'NaN' else 1 end
 from generate_series(1, 50) g;
create table many (id int primary key, n int, word text);
insert into many select g, g, 'word ' || g from generate_series(1, 4000) g;
"""


@pytest.fixture(scope="module")
def daemon(server: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    dsn = create_database(server, "test_verify")
    execute(dsn, *(s for s in SETUP.split(";\n") if s.strip()))
    with Daemon(tmp_path_factory.mktemp("verify"), dsn) as made:
        yield made.start().settled()
    drop_database(server, "test_verify")


def report(daemon: Daemon, table: str, *more: str) -> dict[str, Any]:
    """What `verify` says of one table, its exit code beside it."""
    answer = daemon.ask("verify", table, "--timeout", "60", *more)
    (found,) = answer.document["tables"]
    return {**found, "code": answer.code}


def by_id(rows: list[Row]) -> dict[int, Row]:
    return {row["id"]: row for row in rows}


def test_equal_tables_send_no_row(daemon: Daemon) -> None:
    answer = daemon.ask("verify", "--timeout", "60")
    assert answer.code == 0
    told = {t["table"]: (t["rows"], t["fetched"], t["by"], t["buckets_different"]) for t in answer.document["tables"]}
    assert told == {
        f"public.{name}": (rows, 0, "checksums", 0)
        for name, rows in (("typed", 61), ("pairs", 30), ("heap", 50), ("many", 4000))
    }


def test_a_wrong_cell_of_every_type_is_found_and_named(daemon: Daemon) -> None:
    wrong: dict[str, int] = {}

    def change(rows: list[Row]) -> None:
        row = by_id(rows)
        for i, name in enumerate(TYPES, 10):
            # Another row's value, or none at all, or one where there was none.
            row[i][name] = row[i + 1][name] if name != "ok" else None
            row[i + 20][name] = None
            wrong[name] = 2
        row[61]["word"] = ""
        row[5]["_raw"] = [("price", "Infinity")]
        row[6]["_raw"] = None
        row[7]["_raw"] = [("n", "49")]
        row[8]["word"], row[9]["word"] = row[9]["word"], row[8]["word"]

    with injured(daemon.lake, "typed", change):
        found = report(daemon, "typed")
    ids = sorted({*range(10, 10 + len(TYPES)), *range(30, 30 + len(TYPES)), 5, 6, 7, 8, 9, 61})
    assert (found["code"], found["missing"], found["extra"]) == (3, [], [])
    assert sorted(map(int, found["different"])) == ids
    # What stands in `_raw` alone is no column's cell.
    assert found["columns"] == {**wrong, "word": wrong["word"] + 3}
    assert found["fetched"] < 61 + 1
    assert report(daemon, "typed")["code"] == 0


def test_missing_extra_doubled_and_moved_rows_are_told_apart(daemon: Daemon) -> None:
    def change(rows: list[Row]) -> list[Row]:
        kept = [r for r in rows if r["id"] not in (17, 3999)]
        row = by_id(kept)
        row[100]["id"] = 5000
        return [*kept, {**row[5], "id": -5}, {**row[6]}]

    with injured(daemon.lake, "many", change):
        found = report(daemon, "many")
    assert found["counts"] == {"missing": 3, "extra": 3, "different": 0}
    assert (found["missing"], found["extra"]) == (["100", "17", "3999"], ["-5", "5000", "6"])
    assert 0 < found["fetched"] < 1000, "only rows of buckets that differ"

    def change_pairs(rows: list[Row]) -> list[Row]:
        raw = next(r for r in rows if r["_raw"] is not None)
        raw["n"] = 99
        return [r for r in rows if r["n"] != 8]

    with injured(daemon.lake, "pairs", change_pairs):
        found = report(daemon, "pairs")
    assert found["counts"] == {"missing": 1, "extra": 0, "different": 1}
    assert found["different"] == ["2:a1:8:infinity"]


def test_rows_without_a_key_are_compared_as_a_multiset(daemon: Daemon) -> None:
    injuries = {
        "one of equal rows is gone": (lambda rows: rows[1:], (1, 0)),
        "a row is doubled": (lambda rows: [*rows, rows[3]], (0, 1)),
        "a cell is wrong": (lambda rows: [{**rows[0], "word": "other"}, *rows[1:]], (1, 1)),
        "NULL in place of a text": (lambda rows: [{**rows[0], "word": None}, *rows[1:]], (1, 1)),
        "what a decimal cannot hold is lost": (
            lambda rows: [{**r, "_raw": None} if r["n"] == 0 else r for r in rows], (10, 10),
        ),
    }  # fmt: skip
    for name, (change, (missing, extra)) in injuries.items():
        with injured(daemon.lake, "heap", change):
            found = report(daemon, "heap")
        assert (found["code"], found["counts"]) == (3, {"missing": missing, "extra": extra, "different": 0}), name
    assert report(daemon, "heap")["code"] == 0


def test_a_sample_looks_at_a_share_of_the_keys_on_both_sides(daemon: Daemon) -> None:
    def change(rows: list[Row]) -> list[Row]:
        return [{**r, "n": -1} for r in rows if r["id"] % 4] + [{**r, "id": -r["id"]} for r in rows[:500]]

    equal = report(daemon, "many", "--sample", "10")
    assert (equal["code"], equal["sample"]) == (0, 10)
    assert 200 < equal["rows"] < 700
    with injured(daemon.lake, "many", change):
        found = report(daemon, "many", "--sample", "10")
        assert report(daemon, "many")["counts"] == {"missing": 1000, "extra": 500, "different": 3000}
    assert 30 < found["counts"]["missing"] < 250
    assert 10 < found["counts"]["extra"] < 150
    assert 150 < found["counts"]["different"] < 500


def test_all_cells_are_compared_on_request(daemon: Daemon) -> None:
    equal = report(daemon, "typed", "--cells")
    assert (equal["code"], equal["by"], equal["why"], equal["fetched"]) == (0, "cells", "as asked", 61)

    def change(rows: list[Row]) -> None:
        by_id(rows)[3]["price"] = Decimal("0.01")

    with injured(daemon.lake, "typed", change):
        assert report(daemon, "typed", "--cells")["different"] == ["3"]


def test_random_injuries_are_mended_row_by_row(daemon: Daemon, rng: random.Random) -> None:
    done = random_injuries(daemon.lake, "many", 60, rng)
    found = report(daemon, "many")
    assert {kind: set(map(int, found[kind])) for kind in done} == done
    answer = daemon.ask("verify", "many", "--repair", "--timeout", "120")
    assert (answer.code, answer.document["repaired"]) == (0, ["shop.public.many"]), answer
    daemon.verified("many")
    runs = _runs(daemon, "many")
    assert [(r.kind, r.rows) for r in runs][1:] == [("filtered", len(done["missing"]) + len(done["different"]))]


def test_rows_without_a_key_are_mended_by_the_whole_table(daemon: Daemon) -> None:
    from tests.support.injuries import files, rewrite

    (path,) = files(daemon.lake, "heap")
    rewrite(path, lambda rows: [*rows[2:], rows[5]])
    answer = daemon.ask("verify", "heap", "--repair", "--timeout", "120")
    assert answer.code == 0, answer
    assert [r.kind for r in _runs(daemon, "heap")] == ["first", "resync"]


def test_an_order_says_what_became_of_it(daemon: Daemon) -> None:
    daemon.ask("pause", "table:typed")
    # A paused table's runs wait, so what is ordered stays as it is.
    first = daemon.ask("resync", "typed").document["resyncs"][0]
    second = daemon.ask("resync", "typed").document["resyncs"][0]
    part = daemon.ask("resync", "typed", "--where", "id < 5").document["resyncs"][0]
    assert (first["order"], first["behind"]) == ("new", None)
    assert (second["order"], second["run"]) == ("joined", first["run"])
    assert (part["order"], part["behind"], part["kind"]) == ("queued", first["run"], "filtered")
    cancelled = daemon.ask("resync", "cancel", "typed").document["cancelled"][0]
    assert cancelled["runs"] == [first["run"], part["run"]]
    daemon.ask("resume", "table:typed")
    daemon.settled()
    everything = daemon.cdc("resync", "--all", "--wait", "--timeout", "100")
    assert everything.code == 0, everything
    assert {r["table"] for r in everything.document["resyncs"]} >= {"public.typed", "public.heap", "public.many"}
    daemon.verified()


def _runs(daemon: Daemon, table: str) -> list[Any]:
    from cdc.state import open_state
    from cdc.table import TableId

    state = open_state(daemon.state_dir, create=False, readonly=True)
    try:
        return state.runs("shop", TableId("public", table))
    finally:
        state.close()


@pytest.mark.matrix
def test_every_type_is_hashed_by_the_server_as_by_us(server: EmbeddedPostgres, rng: random.Random) -> None:
    """Column by column, so that no other hides it; in UTF-8, and in an encoding whose bytes are others."""
    name = f"test_hashes_{rng.randrange(1 << 30)}"
    dsn = create_database(server, name)
    with connect(dsn) as connection:
        columns, rows = create(connection)
        connection.execute("create publication p for table public.every")
        version = connection.info.server_version
    reader = PostgresChecksumReader(SourceConfig(name="s", dsn=dsn, publication=("p",)))
    (table,) = reader.tables().tables
    schema = reader.begin(table.schema).schema
    assert reader.hashes() is False
    everything = RowHash(columns=schema.columns, key=schema.key, buckets=64)
    read = reader.rows_in(everything, None)
    assert (read.rows, read.done) == (rows, True)
    texts = [c.name for c in schema.columns]
    whole = _summed(everything, lines(schema.columns, read.columns, read.raw, texts))
    different = list(whole.differing(reader.sums(everything).sums))
    wrong = []
    for column, array in zip(schema.columns, read.columns, strict=True):
        how = RowHash(columns=(column,), key=(), buckets=64)
        ours = _summed(how, lines([column], [array], _only(read.raw, column.name), [column.name]))
        wrong += [column.name] if len(ours.differing(reader.sums(how).sums)) else []
    reader.close()
    drop_database(server, name)
    # Before Postgres 15 a "char" beyond ASCII is printed as a byte that is no text: its cells are compared.
    bytes_alone = {c.name for c in schema.columns if c.type_oid == CHAR} if version < 150_000 else set()
    assert set(wrong) <= bytes_alone
    assert bool(wrong) == bool(different) == bool(bytes_alone)
    assert len(columns) > 200


def test_a_database_in_another_encoding_is_hashed_alike(server: EmbeddedPostgres) -> None:
    for encoding in ("LATIN1", "EUC_JP"):
        name = f"test_in_{encoding.lower()}"
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute(f"create database {name} encoding '{encoding}' locale 'C' template template0".encode())
        dsn = server.dsn(name)
        with psycopg.connect(dsn, autocommit=True, client_encoding="utf8") as connection:
            connection.execute("create table t (id int primary key, word text, tags text[])")
            word = "été" if encoding == "LATIN1" else "東京"
            connection.execute("insert into t values (1, %s, %s), (2, 'plain', null)", [word, [word, None]])
            connection.execute("create publication p for table t")
        reader = PostgresChecksumReader(SourceConfig(name="s", dsn=dsn, publication=("p",)))
        (table,) = reader.tables().tables
        schema = reader.begin(table.schema).schema
        assert reader.hashes() is True
        how = RowHash(columns=schema.columns, key=schema.key, buckets=64, in_hex=True)
        read = reader.rows_in(how, None)
        ours = _summed(how, lines(schema.columns, read.columns, read.raw, ["id", "word", "tags"], in_hex=True))
        assert list(ours.differing(reader.sums(how).sums)) == []
        reader.close()
        drop_database(server, name)


def test_what_is_hashed_is_a_range_of_blocks_at_a_time(database: str) -> None:
    """Sums of pieces add up, those of keys can be taken out, and a piece is a statement of its own."""
    execute(
        database,
        "create table t (id int primary key, word text)",
        "insert into t select g, repeat('x', 500) || g from generate_series(1, 3000) g",
        "create publication p for table t where (id > 10)",
    )
    reader = PostgresChecksumReader(SourceConfig(name="s", dsn=database, publication=("p",)))
    (table,) = reader.tables().tables
    schema = reader.begin(table.schema).schema
    reader._blocks = 16
    how = RowHash(columns=schema.columns, key=schema.key, buckets=64)
    total, after, pieces, done = Sums.zero(64), (), 0, False
    while not done:
        piece = reader.sums(how, after=after)
        total.join(piece.sums)
        after, done, pieces = piece.last, piece.done, pieces + 1
    assert pieces > 2
    assert int(total.rows.sum()) == 2990, "the row filter holds"
    some = reader.sums_of(how, [("5",), ("11",), ("3000",), ("4000",)])
    assert int(some.rows.sum()) == 2
    total.join(some, -1)
    kept = reader.rows_in(how, None)
    ours = _summed(how, lines(schema.columns, kept.columns, kept.raw, ["id", "word"]))
    assert sorted(kept.columns[0].to_pylist()) == list(range(11, 3001)) or not kept.done
    if kept.done:
        ours.join(some, -1)
        assert list(ours.differing(total)) == []
    reader.close()


def test_who_waits_for_a_lock_on_the_table_gets_it(database: str) -> None:
    execute(
        database, "create table t (id int primary key)", "insert into t values (1)", "create publication p for table t"
    )
    reader = PostgresChecksumReader(SourceConfig(name="s", dsn=database, publication=("p",)))
    (table,) = reader.tables().tables
    schema = reader.begin(table.schema).schema
    how = RowHash(columns=schema.columns, key=schema.key, buckets=64)
    altering = threading.Thread(target=execute, args=(database, "alter table t add n int"))
    altering.start()
    with psycopg.connect(database, autocommit=True) as connection:
        query = "select from pg_locks where relation = 't'::regclass and not granted"
        wait_until(lambda: connection.execute(query).fetchone() is not None, 60, "the ALTER to wait")
    with pytest.raises(GaveWay):
        reader.sums(how)
    altering.join(60)
    assert not altering.is_alive()
    assert len(reader.begin(schema).schema.columns) == 2
    reader.close()


def _summed(how: RowHash, texts: pa.Array) -> Sums:
    sums = Sums.zero(how.buckets)
    sums.add(hash_lines(texts))
    return sums


def _only(raw: pa.Array | None, name: str) -> pa.Array | None:
    if raw is None:
        return None
    kept = [[(k, v) for k, v in entries or () if k == name] or None for entries in raw.to_pylist()]
    return pa.array(kept, raw.type)


# ---- with a daemon of their own ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_equal_tables_are_called_equal_under_load(tmp_path: Path, database: str, rng: random.Random) -> None:
    execute(database, SCHEMA)
    with Daemon(tmp_path, database) as daemon, Workload(database, rng.randrange(1 << 30), pause_s=0.03):
        daemon.start().settled()
        for _ in range(2):
            answer = daemon.ask("verify", "stock", "lines", "heap", "--timeout", "100")
            told = {t["table"]: t for t in answer.document["tables"]}
            # What changes all the time may not be comparable; nothing may be called different.
            assert not any(any(t["counts"].values()) for t in told.values()), told
            assert told["public.stock"]["rows"] >= 2900, told


def test_a_frozen_table_is_compared_as_it_was_frozen(tmp_path: Path, database: str) -> None:
    execute(
        database,
        "create table t (id int primary key, n int, word text)",
        "insert into t select g, g, 'w' || g from generate_series(1, 50) g",
    )
    with Daemon(tmp_path, database, source={"on_schema_change": "freeze"}) as daemon:
        daemon.start().settled()
        execute(
            database, "alter table t add later int default 5", "alter table t rename n to number",
            "insert into t (id, number) values (99, 99)", "update t set later = 6 where id < 5",
        )  # fmt: skip
        daemon.settled()
        equal = report(daemon, "t")
        assert (equal["code"], equal["left_out"], equal["fetched"]) == (0, ["later"], 0), equal

        def change(rows: list[Row]) -> None:
            by_id(rows)[99]["n"] = 98

        with injured(daemon.lake, "t", change):
            found = report(daemon, "t")
        assert (found["code"], found["different"], found["columns"]) == (3, ["99"], {"number": 1})


def test_tables_are_verified_in_the_background(tmp_path: Path, database: str) -> None:
    execute(
        database,
        "create table t (id int primary key, n int)",
        "insert into t select g, g from generate_series(1, 500) g",
        "create table u (id int primary key)",
    )
    hook = Hook()
    threading.Thread(target=hook.serve_forever, args=(0.05,), daemon=True).start()
    more = f'[verify]\nevery_s = 0.5\ntime_share = 1\n[alerts]\nwebhook = "{hook.url}"\n'
    with hook, Daemon(tmp_path, database, more=more) as daemon:
        daemon.start().settled()

        def verified(table: str, outcome: str) -> Any:
            found = daemon.tables()[f"public.{table}"]["verified"]
            return found if found and found["outcome"] == outcome else None

        for table in ("t", "u"):
            entry = wait_until(lambda table=table: verified(table, "equal"), 60, f"{table} to be verified")
            assert (entry["cause"], entry["counts"]["different"], entry["error"]) == ("schedule", 0, "")

        def change(rows: list[Row]) -> list[Row]:
            by_id(rows)[7]["n"] = 8
            return rows[:-2]

        with injured(daemon.lake, "t", change):
            entry = wait_until(lambda: verified("t", "different"), 60, "the injuries to be found")
            assert (entry["counts"]["missing"], entry["counts"]["different"]) == (2, 1)
            shown = daemon.http("/metrics")[1]
            assert 'cdc_verify_different_rows{kind="missing",source="shop",table="public.t"} 2.0' in shown
            assert 'cdc_verify_rows{source="shop",table="public.t"} 500.0' in shown
        alert = wait_until(lambda: hook.got, 60, "the alert")[0]
        told = {k: alert[k] for k in ("alert", "source", "table", "missing", "extra", "different")}
        assert told == {
            "alert": "verify", "source": "shop", "table": "public.t", "missing": 2, "extra": 0, "different": 1,
        }  # fmt: skip
        wait_until(lambda: verified("t", "equal"), 60, "the mended table to be verified")
        assert "the lake differs from the source" in daemon.log_path.read_text()
        assert daemon.stop() == 0
        hook.shutdown()


def test_the_background_job_stops_when_the_daemon_does(tmp_path: Path, database: str) -> None:
    """It rests nearly all of the time, its snapshot open, when the signal comes."""
    execute(
        database, "create table t (id int primary key)", "insert into t select generate_series(1, 100000)",
    )  # fmt: skip
    with Daemon(tmp_path, database, more="[verify]\nevery_s = 0.5\ntime_share = 0.0001\n") as daemon:
        daemon.start().settled()
        with psycopg.connect(database, autocommit=True) as connection:
            query = (
                "select from pg_stat_activity where application_name = 'cdc verify' and state = 'idle in transaction'"
            )
            wait_until(lambda: connection.execute(query).fetchone() is not None, 60, "a comparison at rest")
        assert daemon.stop(timeout_s=15) == 0
        assert "Traceback" not in daemon.log_path.read_text()


@pytest.mark.slow
def test_a_thousand_random_injuries_in_a_million_rows_are_mended(
    tmp_path: Path, database: str, rng: random.Random
) -> None:
    execute(
        database,
        "create table t (id int primary key, n int, price numeric(10,2), word text, at timestamptz)",
        "insert into t select g, g % 1000, g / 7.0, 'word ' || g, timestamptz '2026-01-01' + g * interval '1 s'"
        " from generate_series(1, 1000000) g",
    )
    with Daemon(tmp_path, database) as daemon:
        daemon.start().settled(600)
        done = random_injuries(daemon.lake, "t", 1000, rng)
        found = report(daemon, "t")
        assert {kind: set(map(int, found[kind])) for kind in done} == done
        assert found["fetched"] < 250_000
        mended = daemon.cdc("verify", "t", "--repair", "--timeout", "600", timeout_s=900)
        assert mended.code == 0, mended
        assert [r.kind for r in _runs(daemon, "t")] == ["first", "filtered"]
        daemon.verified()
