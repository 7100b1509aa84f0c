"""Postgres as a target, on a real server: rows and acknowledgements together, whatever happens in between."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import subprocess
import sys
import threading
import uuid
from dataclasses import replace
from pathlib import Path

import psycopg
import pyarrow as pa
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.errors import FormatTooNew, TargetRejected, TargetUnavailable
from connectors.postgres.embedded import EmbeddedPostgres
from connectors.postgres.target import ALL_REFUSED_ROWS, PostgresTarget
from tests.support.targets import assigned, batch_of, no_ledgers
from tests.support.targets import target_config as config
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
SCORES = "CREATE TABLE public.scores (id int PRIMARY KEY, score numeric(8,2), note text)"


def push(target: PostgresTarget, rows: dict[str, list[object]], *, digest: str = "d1", table: str = "public.scores"):
    (result,) = target.push([batch_of(assigned(list(rows), table=table), rows, digest=digest)])
    assert result.unsent == []
    return result


def acknowledged(target: PostgresTarget) -> dict[str, str]:
    found = target.acknowledged(assigned(["id"])).rows.to_pydict()
    return dict(zip(found["key"], found["digest"], strict=True))


def sessions(db: psycopg.Connection, which: str) -> int:
    (count,) = db.execute(f"SELECT count(*) FROM pg_stat_activity WHERE {which}").fetchone()  # type: ignore[misc]
    return count


def scores(db: psycopg.Connection) -> list[tuple[object, ...]]:
    return db.execute("SELECT id, score, note FROM public.scores ORDER BY id").fetchall()


def test_rows_arrive_with_their_acknowledgements_and_a_later_digest_replaces_them(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(SCORES)
    assert acknowledged(target) == {}
    result = push(target, {"id": [1, 2], "score": [1.5, 2.5], "note": ['a,"b"\n\\N', ""]})
    assert (result.written, result.rejected) == (2, [])
    assert push(target, {"id": [2, 3], "score": [7.0, None], "note": [None, "c"]}, digest="d2").written == 2
    d = decimal.Decimal
    assert scores(db) == [(1, d("1.50"), 'a,"b"\n\\N'), (2, d("7.00"), None), (3, None, "c")]
    assert acknowledged(target) == {'["1"]': "d1", '["2"]': "d2", '["3"]': "d2"}
    assert target.acknowledged(assigned(["id"], sync="another")).rows.num_rows == 0


def test_only_mapped_columns_are_touched_and_equal_rows_are_not_written_again(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute("CREATE TABLE public.scores (id int PRIMARY KEY, score float8, note json, own text DEFAULT 'kept')")
    push(target, {"id": [1, 2], "score": [1.0, float("nan")], "note": ['{"a": 1}', None]})
    db.execute("UPDATE public.scores SET own = 'human' WHERE id = 1")
    before = db.execute("SELECT id, xmin::text, own FROM public.scores ORDER BY id").fetchall()
    push(target, {"id": [1, 2], "score": [1.0, float("nan")], "note": ['{"a": 1}', None]}, digest="d2")
    assert db.execute("SELECT id, xmin::text, own FROM public.scores ORDER BY id").fetchall() == before
    push(target, {"id": [1], "score": [1.0], "note": ['{"a":1}']}, digest="d3")
    assert db.execute("SELECT note::text, own FROM public.scores WHERE id = 1").fetchone() == ('{"a":1}', "human")


def test_every_type_of_a_result_reads_back_as_it_was(db: psycopg.Connection, target: PostgresTarget) -> None:
    db.execute(
        "CREATE DOMAIN public.short AS varchar(5); CREATE TYPE public.mood AS ENUM ('ok', 'bad');"
        "CREATE TABLE public.all_types (id bigint PRIMARY KEY, b bool, d date, ts timestamp, tz timestamptz, "
        "n numeric, f float8, bin bytea, ints int[], texts text[], nested int[], u uuid, j jsonb, dom public.short, "
        "m public.mood, c char(4), bits bit(3), t time)"
    )
    utc = datetime.UTC
    naive = datetime.datetime(2024, 2, 29, 1, 2, 3, 456, tzinfo=utc).replace(tzinfo=None)
    tokyo = pa.timestamp("us", "Asia/Tokyo")
    rows = pa.table(
        {
            "id": pa.array([1, 2], pa.int64()),
            "b": [True, None],
            "d": [datetime.date(2024, 2, 29), None],
            "ts": pa.array([naive, None], pa.timestamp("us")),
            "tz": pa.array([datetime.datetime(2024, 2, 29, 23, 2, 3, tzinfo=utc), None], tokyo),
            "n": pa.array([decimal.Decimal("0.00000001"), None], pa.decimal128(38, 8)),
            "f": [float("inf"), 0.1],
            "bin": pa.array([b"\x00\xff\\", b""], pa.binary()),
            "ints": pa.array([[1, None], None], pa.list_(pa.int32())),
            "texts": pa.array([['a"b\\', None, "", "NULL", "{,}"], []], pa.list_(pa.string())),
            "nested": pa.array([[[1, 2], [3, 4]], None], pa.list_(pa.list_(pa.int64()))),
            "u": ["00000000-0000-0000-0000-000000000001", None],
            "j": ['{"a": [1, null]}', "null"],
            "dom": ["short", None],
            "m": pa.array(["ok", "bad"]).dictionary_encode(),
            "c": ["ab", None],
            "bits": ["101", None],
            "t": pa.array([datetime.time(1, 2, 3), None], pa.time64("us")),
        }
    )
    (result,) = target.push([batch_of(assigned(rows.column_names, table="all_types"), rows)])
    assert result.rejected == []
    one, two = db.execute("SELECT * FROM public.all_types ORDER BY id").fetchall()
    assert one == (
        1, True, datetime.date(2024, 2, 29), naive,
        datetime.datetime(2024, 2, 29, 23, 2, 3, tzinfo=utc), decimal.Decimal("0.00000001"), float("inf"),
        b"\x00\xff\\", [1, None], ['a"b\\', None, "", "NULL", "{,}"], [[1, 2], [3, 4]],
        uuid.UUID(int=1), {"a": [1, None]}, "short", "ok", "ab  ", "101", datetime.time(1, 2, 3),
    )  # fmt: skip
    assert two[0] == 2
    assert two[6:8] == (0.1, b"")
    assert two[9] == []
    assert all(v is None for i, v in enumerate(two) if i not in (0, 6, 7, 9, 12, 14))


def test_rejects_are_exactly_the_rows_that_the_target_refuses(db: psycopg.Connection, target: PostgresTarget) -> None:
    db.execute(
        "CREATE TABLE public.other (id int PRIMARY KEY); INSERT INTO public.other SELECT generate_series(0, 199);"
        "CREATE TABLE public.scores (id int PRIMARY KEY REFERENCES public.other DEFERRABLE INITIALLY DEFERRED, "
        "score numeric(8,2) CHECK (score < 1000), note varchar(5) NOT NULL, small smallint);"
        "CREATE UNIQUE INDEX one_note ON public.scores (note);"
        "CREATE FUNCTION public.grumble() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF new.id = 60 THEN RAISE EXCEPTION 'secret %', new.note; END IF; RETURN new; END $$;"
        "CREATE TRIGGER grumble BEFORE INSERT ON public.scores FOR EACH ROW EXECUTE FUNCTION public.grumble()"
    )
    ids = list(range(100))
    note: list[str | None] = [f"n{i}" for i in ids]
    score, small = [float(i) for i in ids], [1] * 100
    ids[10], score[20], note[30], note[40], note[50] = 500, 1000.0, None, "too long", "n1"
    small[70], note[80] = 70000, "a\0b"
    result = push(target, {"id": ids, "score": score, "note": note, "small": small})
    reasons = {json.loads(r.key)[0]: r.reason for r in result.rejected}
    twin = ({"1", "50"} & set(reasons)).pop()  # one of the two that want the same note
    assert sorted(reasons) == sorted(["500", "20", "30", "40", twin, "60", "70", "80"])
    assert {json.loads(r.key)[0] for r in result.rejected if r.conflicts} == {"500", twin}
    assert result.written == 92
    assert "scores_id_fkey" in reasons["500"]
    assert "scores_score_check" in reasons["20"]
    assert "column note" in reasons["30"]
    assert "one_note" in reasons[twin]
    assert "NumericValueOutOfRange" in reasons["70"]
    assert not any(word in reason for reason in reasons.values() for word in ("secret", "too long", "n1", "70000"))
    present = {row[0] for row in db.execute("SELECT id FROM public.scores").fetchall()}
    assert present == set(range(100)) - {10, 20, 30, 40, int(twin), 60, 70, 80}
    assert set(acknowledged(target)) == {json.dumps([str(i)]) for i in present}


def test_a_batch_that_is_refused_row_after_row_is_given_up_as_a_whole(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(SCORES)
    n = ALL_REFUSED_ROWS + 100
    few = {"id": list(range(n)), "score": ["x"] * (ALL_REFUSED_ROWS - 1) + ["1"] * 101, "note": [""] * n}
    assert len(push(target, few).rejected) == ALL_REFUSED_ROWS - 1
    bad = {**few, "score": ["x"] * n}
    first = batch_of(assigned(list(bad)), bad, digest="d2")
    with pytest.raises(TargetRejected, match="each of the first 500 rows"):
        target.push([replace(first, untried=True)])
    assert len(push(target, bad, digest="d2").rejected) == n, "of a sync that has worked, rows are told apart"
    assert set(acknowledged(target).values()) == {"d1"}


def test_row_security_refuses_rows_not_the_batch(db: psycopg.Connection, database: str) -> None:
    db.execute(SCORES)
    db.execute(
        "DROP ROLE IF EXISTS pusher; CREATE ROLE pusher LOGIN; CREATE SCHEMA cdc AUTHORIZATION pusher;"
        "GRANT SELECT, INSERT, UPDATE ON public.scores TO pusher; ALTER TABLE public.scores ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY small ON public.scores USING (true) WITH CHECK (id < 5)"
    )
    target = PostgresTarget(config(make_conninfo(database, user="pusher")), no_ledgers)
    try:
        result = push(target, {"id": [1, 5, 2], "score": [1.0, 1.0, 1.0], "note": ["", "", ""]})
        assert [r.key for r in result.rejected] == ['["5"]']
        assert [row[0] for row in scores(db)] == [1, 2]
        assert target._session.marks is not None
        assert (target._session.marks.by_origin, target._session.marks.by_message) == (False, True)
        findings = {f.name: f for f in target.check(assigned(["id", "score"]))}
        assert list(findings) == ["replication origin"]
        db.execute(findings["replication origin"].fix)
        target.close()
        (room,) = target.check(assigned(["id", "score"]))
        assert (room.name, room.severity) == ("replication origins", "info")
        push(target, {"id": [3], "score": [1.0], "note": [""]})
        assert target._session.marks.by_origin
        assert target.check(assigned(["id", "score"])) == []
    finally:
        target.close()
        db.execute("DROP OWNED BY pusher CASCADE")
        wait_until(lambda: sessions(db, "usename = 'pusher'") == 0)
        db.execute("DROP ROLE pusher")


@pytest.mark.parametrize(
    ("ddl", "table", "says", "mends"),
    [
        ("SELECT 1", "public.scores", "no table public.scores", "create it"),
        ("CREATE TABLE public.scores (id int, score float8)", "public.scores", "no unique index", "CREATE UNIQUE"),
        ("CREATE TABLE public.scores (id int PRIMARY KEY)", "scores", "no column score", "leave it out"),
        (
            "CREATE TABLE public.scores (id int PRIMARY KEY DEFERRABLE, score float8)",
            "public.scores", "no unique index", "CREATE UNIQUE",
        ),
        (
            "CREATE TABLE public.scores (id int PRIMARY KEY, score float8 GENERATED ALWAYS AS (1) STORED)",
            "public.scores", "generated always", "leave it out",
        ),
        ("CREATE VIEW public.scores AS SELECT 1 AS id, 2 AS score", "public.scores", "is no table", "into a table"),
        ("SELECT 1", "a.b.c", "no name of a table", 'write "schema.table"'),
    ],
)  # fmt: skip
def test_a_target_that_cannot_take_the_sync_is_refused_before_the_first_row(
    db: psycopg.Connection, target: PostgresTarget, ddl: str, table: str, says: str, mends: str
) -> None:
    db.execute(ddl)
    with pytest.raises(TargetRejected) as raised:
        push(target, {"id": [1], "score": [1.0]}, table=table)
    assert says in str(raised.value.args[0])
    assert mends in raised.value.hint
    (finding,) = (f for f in target.check(assigned(["id", "score"], table=table)) if f.severity != "info")
    assert (finding.severity, finding.fix) == ("error", raised.value.hint)
    assert db.execute("SELECT to_regnamespace('cdc')").fetchone() == (None,), "nothing was left behind"


def test_names_with_quotes_dots_and_percent_signs_work(db: psycopg.Connection, target: PostgresTarget) -> None:
    db.execute(
        'CREATE SCHEMA "a.b"; CREATE TYPE "a.b"."t%{x" AS ENUM (\'v\');'
        'CREATE TABLE "a.b"."c""d" (id int PRIMARY KEY, "x %s{}" "a.b"."t%{x")'
    )
    push(target, {"id": [1], "x %s{}": ["v"]}, table='"a.b"."c""d"')
    assert db.execute('SELECT * FROM "a.b"."c""d"').fetchall() == [(1, "v")]


def test_a_table_that_was_dropped_and_made_anew_has_acknowledged_nothing(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(SCORES)
    push(target, {"id": [1], "score": [1.0], "note": ["a"]})
    db.execute("DROP TABLE public.scores")
    db.execute(SCORES)
    assert acknowledged(target) == {}
    push(target, {"id": [1], "score": [1.0], "note": ["a"]})
    assert acknowledged(target) == {'["1"]': "d1"}


def test_a_state_table_of_a_newer_version_is_refused(db: psycopg.Connection, target: PostgresTarget) -> None:
    db.execute(SCORES)
    push(target, {"id": [1], "score": [1.0], "note": ["a"]})
    db.execute("COMMENT ON TABLE cdc.cdc_sync_state IS 'Format 3.'")
    with pytest.raises(FormatTooNew):
        target.acknowledged(assigned(["id"]))


# ---------------------------------------------------------------------- origin


def test_writes_carry_our_origin_and_their_commit_time_transaction_by_transaction(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(SCORES)
    db.execute("CREATE PUBLICATION p FOR TABLE public.scores")
    slot = f"target_{os.getpid()}"
    db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (slot,))
    try:
        started = db.execute("SELECT clock_timestamp()").fetchone()[0]  # type: ignore[index]
        push(target, {"id": [1], "score": [1.0], "note": ["a"]})
        db.execute("INSERT INTO public.scores VALUES (2)")
        push(target, {"id": [3], "score": [1.0], "note": ["a"]})
        ended = db.execute("SELECT clock_timestamp()").fetchone()[0]  # type: ignore[index]
        messages = [
            bytes(row[0])
            for row in db.execute(
                "SELECT data FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, 'proto_version', '1', "
                "'publication_names', 'p')",
                (slot,),
            ).fetchall()
        ]
    finally:
        db.execute("SELECT pg_drop_replication_slot(%s)", (slot,))
    origins, times = [], []
    for message in messages:
        if message[:1] == b"B":
            origins.append("")
            micros = int.from_bytes(message[9:17], "big")
            times.append(datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(microseconds=micros))
        elif message[:1] == b"O":
            origins[-1] = message[9:].rstrip(b"\0").decode()
    assert origins == ["cdc_crm", "", "cdc_crm"]
    assert all(started <= at <= ended for at in times), "never the year 2000 of an origin without a time"
    assert times == sorted(times)


def test_a_second_session_under_the_same_origin_is_told_what_to_do_and_gets_its_turn(
    db: psycopg.Connection, target: PostgresTarget, database: str
) -> None:
    db.execute(SCORES)
    push(target, {"id": [1], "score": [1.0], "note": ["a"]})
    second = PostgresTarget(config(database), no_ledgers)
    try:
        with pytest.raises(TargetUnavailable) as raised:
            push(second, {"id": [2], "score": [1.0], "note": ["b"]})
        assert "cdc_crm" in str(raised.value)
        assert "`origin`" in raised.value.hint
        other = PostgresTarget(config(database, origin="cdc_crm_2"), no_ledgers)
        push(other, {"id": [3], "score": [1.0], "note": ["c"]})
        other.close()
        target.close()

        def writes() -> bool:
            try:
                return push(second, {"id": [2], "score": [1.0], "note": ["b"]}).written == 1
            except TargetUnavailable:
                return False

        wait_until(writes, 60, "the origin to become free")
    finally:
        second.close()
    assert [row[0] for row in scores(db)] == [1, 2, 3]


def test_where_there_is_no_room_for_another_origin_messages_mark(tmp_path: Path) -> None:
    from tests.support.postgres import private_server

    with (
        private_server(tmp_path / "pg", wal_level="logical", max_active_replication_origins=1) as server,
        psycopg.connect(server.dsn(), autocommit=True) as holder,
    ):
        holder.execute(SCORES)
        holder.execute("SELECT pg_replication_origin_create('theirs'), pg_replication_origin_session_setup('theirs')")
        target = PostgresTarget(config(server.dsn()), no_ledgers)
        (room,) = target.check(assigned(["id", "score"]))
        assert (room.severity, "1 are taken, 0 free" in room.message) == ("warning", True)
        assert "max_active_replication_origins" in room.fix
        assert push(target, {"id": [1], "score": [1.0], "note": ["a"]}).written == 1
        assert target._session.marks is not None
        assert target._session.marks.by_message
        target.close()


def test_a_role_without_rights_is_told_the_grants(db: psycopg.Connection, database: str) -> None:
    db.execute(SCORES)
    db.execute("DROP ROLE IF EXISTS guest; CREATE ROLE guest LOGIN")
    guest = PostgresTarget(config(make_conninfo(database, user="guest")), no_ledgers)
    try:
        for _ in range(10):
            findings = [f for f in guest.check(assigned(["id", "score", "note"])) if f.severity != "info"]
            if not findings:
                break
            for finding in findings:
                db.execute(finding.fix)
        assert findings == []
        assert push(guest, {"id": [1], "score": [1.0], "note": ["a"]}).written == 1
    finally:
        guest.close()
        db.execute("DROP OWNED BY guest CASCADE")
        wait_until(lambda: sessions(db, "usename = 'guest'") == 0)
        db.execute("DROP ROLE guest")


# ---------------------------------------------------------------------- cut and killed


def test_a_connection_cut_in_the_middle_of_a_batch_leaves_nothing_and_the_next_try_does_it_all(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(SCORES)
    push(target, {"id": [1], "score": [1.0], "note": ["a"]})
    rows = {"id": [1, 2], "score": [5.0, 6.0], "note": ["x", "y"]}
    with psycopg.connect(db.info.dsn) as blocker:
        blocker.execute("SELECT FROM public.scores WHERE id = 1 FOR UPDATE")
        caught: list[BaseException] = []

        def attempt() -> None:
            try:
                push(target, rows, digest="d2")
            except TargetUnavailable as error:
                caught.append(error)

        thread = threading.Thread(target=attempt)
        thread.start()
        (pid,) = wait_until(
            lambda: db.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'cdc crm' AND wait_event_type = 'Lock' "
                "AND datname = current_database()"
            ).fetchone()
        )
        db.execute("SELECT pg_terminate_backend(%s)", (pid,))
        thread.join(60)
    assert len(caught) == 1
    assert scores(db) == [(1, decimal.Decimal("1.00"), "a")]
    assert acknowledged(target) == {'["1"]': "d1"}
    wait_until(lambda: try_push(target, rows), 60, "the cut session's origin to become free")
    assert [(row[0], row[2]) for row in scores(db)] == [(1, "x"), (2, "y")]
    assert acknowledged(target) == {'["1"]': "d2", '["2"]': "d2"}


def try_push(target: PostgresTarget, rows: dict[str, list[object]]) -> bool:
    try:
        return push(target, rows, digest="d2").written == len(rows["id"])
    except TargetUnavailable:
        return False


def test_a_server_that_restarts_between_two_batches_is_reached_again(tmp_path: Path) -> None:
    from tests.support.postgres import private_server

    with private_server(tmp_path / "pg") as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(SCORES)
        target = PostgresTarget(config(server.dsn()), no_ledgers)
        push(target, {"id": [1], "score": [1.0], "note": ["a"]})
        server.kill()
        with pytest.raises(TargetUnavailable):
            push(target, {"id": [2], "score": [1.0], "note": ["b"]})
        server.start()
        push(target, {"id": [2], "score": [1.0], "note": ["b"]})
        assert acknowledged(target) == {'["1"]': "d1", '["2"]': "d1"}
        target.close()


CHILD = """
import json, sys
from tests.integration.test_target import config, push
from connectors.postgres.target import PostgresTarget
from tests.support.targets import no_ledgers
target = PostgresTarget(config(sys.argv[1]), no_ledgers)
for batch in range(3):
    ids = list(range(batch * 10, batch * 10 + 10))
    push(target, {"id": ids, "score": [float(batch)] * 10, "note": ["x"] * 10})
"""


@pytest.mark.parametrize(("point", "batches"), [("sync.before_commit", 1), ("sync.after_commit", 2)])
def test_killed_beside_the_commit_rows_and_acknowledgements_agree(
    db: psycopg.Connection, database: str, target: PostgresTarget, point: str, batches: int
) -> None:
    db.execute(SCORES)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, database],
        env={**os.environ, "CDC_FAILPOINTS": f"{point}=kill:2", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert child.returncode == -9
    expected = list(range(10 * batches))
    wait_until(lambda: sessions(db, "application_name = 'cdc crm'") == 0)
    assert [row[0] for row in scores(db)] == expected
    assert set(acknowledged(target)) == {json.dumps([str(i)]) for i in expected}
    again = {"id": list(range(30)), "score": [9.0] * 30, "note": ["y"] * 30}
    wait_until(lambda: try_push(target, again), 60, "the dead session's origin to become free")
    assert [row[0] for row in scores(db)] == list(range(30))


def test_a_wrong_password_is_the_operators_and_never_shown(
    server: EmbeddedPostgres, tmp_path: Path, database: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    target = PostgresTarget(config(make_conninfo(database, user="nobody_here"), password_file=secret), no_ledgers)
    with pytest.raises((TargetRejected, TargetUnavailable)) as raised:
        target.acknowledged(assigned(["id"]))
    assert "hunter2" not in str(raised.value)
    assert "hunter2" not in repr(target._config)
    gone = PostgresTarget(config("postgresql://127.0.0.1:1/nowhere"), no_ledgers)
    with pytest.raises(TargetUnavailable):
        gone.acknowledged(assigned(["id"]))


def test_one_batch_of_many_rows_is_fast_and_orderly(db: psycopg.Connection, target: PostgresTarget) -> None:
    db.execute(SCORES)
    n = 10_000
    rows = {"id": list(range(n)), "score": [1.0] * n, "note": ["x" * 20] * n}
    assert push(target, rows).written == n
    rows["score"] = [2.0] * n
    assert push(target, rows, digest="d2").written == n
    found = db.execute("SELECT count(*), sum(score) FROM public.scores").fetchone()
    assert found == (n, decimal.Decimal("20000.00"))
    assert db.execute(
        sql.SQL("SELECT count(*) FROM {} WHERE digest = 'd2'").format(sql.Identifier("cdc", "cdc_sync_state"))
    ).fetchone() == (n,)
