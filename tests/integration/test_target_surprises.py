"""What a target's own triggers, sequences and slowness do to a push, and how special values arrive."""

from __future__ import annotations

import duckdb
import psycopg
import pyarrow as pa
import pytest
from psycopg.conninfo import make_conninfo

from cdc.errors import TargetRejected, TargetUnavailable
from cdc.sink import PushResult
from connectors.postgres.target import PostgresTarget
from tests.support.targets import MemoryLedger, assigned, batch_of, key_text, no_ledgers, target_config

pytestmark = pytest.mark.matrix
RAISES = {
    "no_data_found": "RAISE EXCEPTION 'x' USING ERRCODE = 'no_data_found'",
    "assert": "ASSERT new.id <> 2",
    "own class": "RAISE EXCEPTION 'x' USING ERRCODE = 'PT400'",
    "case": "CASE new.id WHEN 1 THEN NULL; END CASE",
    "too many rows": "RAISE EXCEPTION 'x' USING ERRCODE = '21000'",
    "state": "RAISE EXCEPTION 'x' USING ERRCODE = 'object_not_in_prerequisite_state'",
    "feature": "RAISE EXCEPTION 'x' USING ERRCODE = 'feature_not_supported'",
    "privilege": "RAISE EXCEPTION 'x' USING ERRCODE = 'insufficient_privilege'",
}


def write(target: PostgresTarget, ids: list[int]) -> PushResult:
    (result,) = target.push([batch_of(assigned(("id", "v")), {"id": ids, "v": [1] * len(ids)})])
    return result


def ids(db: psycopg.Connection) -> list[object]:
    return [row[0] for row in db.execute("SELECT id FROM public.scores ORDER BY 1").fetchall()]


def guarded(db: psycopg.Connection, which: str, does: str) -> None:
    db.execute(
        "CREATE TABLE public.scores (id int PRIMARY KEY, v int);"
        "CREATE FUNCTION public.g() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN IF {which} THEN {does}; END IF; RETURN new; END $$;"
        "CREATE TRIGGER g BEFORE INSERT ON public.scores FOR EACH ROW EXECUTE FUNCTION public.g()"  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("how", RAISES)
def test_whatever_a_trigger_raises_is_about_the_row(db: psycopg.Connection, target: PostgresTarget, how: str) -> None:
    guarded(db, "new.id = 2", RAISES[how])
    assert [r.key for r in write(target, [0, 1, 2, 3]).rejected] == [key_text(2)]
    assert ids(db) == [0, 1, 3]


def test_a_right_that_is_lacking_behind_the_table_is_the_whole_syncs(database: str, db: psycopg.Connection) -> None:
    db.execute(
        "CREATE SEQUENCE public.q; CREATE TABLE public.scores (id int PRIMARY KEY, v int, s int DEFAULT nextval('q'));"
        "DROP ROLE IF EXISTS keeper; CREATE ROLE keeper LOGIN; CREATE SCHEMA cdc AUTHORIZATION keeper;"
        "GRANT SELECT, INSERT, UPDATE ON public.scores TO keeper"
    )
    target = PostgresTarget(target_config(make_conninfo(database, user="keeper")), no_ledgers)
    try:
        with pytest.raises(TargetRejected, match="InsufficientPrivilege"):
            write(target, [1, 2])
    finally:
        target.close()
        db.execute("DROP OWNED BY keeper; DROP ROLE keeper")


def test_a_row_that_runs_into_the_timeout_is_found_and_a_table_that_is_slow_is_told(
    database: str, db: psycopg.Connection
) -> None:
    guarded(db, "new.id = 2", "PERFORM pg_sleep(30)")
    target = PostgresTarget(target_config(database, statement_timeout_s=0.2), no_ledgers)
    try:
        assert [r.key for r in write(target, list(range(8))).rejected] == [key_text(2)]
        assert ids(db) == [0, 1, 3, 4, 5, 6, 7]
        db.execute("DROP TABLE public.scores; DROP FUNCTION public.g")
        guarded(db, "true", "PERFORM pg_sleep(30)")
        with pytest.raises(TargetUnavailable, match="QueryCanceled"):
            write(target, list(range(64)))
        assert ids(db) == []
    finally:
        target.close()


TIMES = """
SELECT * FROM (VALUES (1, 'infinity'::timestamp, '-infinity'::timestamptz, 'infinity'::date),
    (2, '-infinity', 'infinity', '-infinity'), (3, '0044-03-15 (BC) 01:02:03.5', '4713-01-01 (BC)', '0001-12-31 (BC)'),
    (4, '0001-01-01', '2024-02-29 01:02:03.000001+00', '0401-02-28'), (5, NULL, NULL, NULL)) t (id, ts, tz, day)"""


def test_infinite_times_and_years_before_christ_arrive(db: psycopg.Connection, target: PostgresTarget) -> None:
    db.execute("CREATE TABLE public.scores (id int PRIMARY KEY, ts timestamp, tz timestamptz, day date)")
    with duckdb.connect() as engine:
        engine.execute("SET TimeZone = 'UTC'")
        rows = engine.sql(TIMES).to_arrow_table()
    (result,) = target.push([batch_of(assigned(rows.column_names), rows)])
    assert result.rejected == []
    db.execute("SET TimeZone = 'UTC'")
    assert db.execute("SELECT ts::text, tz::text, day::text FROM public.scores ORDER BY id").fetchall() == [
        ("infinity", "-infinity", "infinity"),
        ("-infinity", "infinity", "-infinity"),
        ("0044-03-15 01:02:03.5 BC", "4713-01-01 00:00:00+00 BC", "0001-12-31 BC"),
        ("0001-01-01 00:00:00", "2024-02-29 01:02:03.000001+00", "0401-02-28"),
        (None, None, None),
    ]


def test_whole_floats_arrive_in_plain_digits(db: psycopg.Connection, target: PostgresTarget) -> None:
    db.execute("CREATE TABLE public.scores (id bigint PRIMARY KEY, v text, f float8)")
    values = [12345678901.0, -9e15, 0.0]
    given = {"id": values, "v": values, "f": [1e300, -0.0, float("inf")]}
    (result,) = target.push([batch_of(assigned(list(given)), given)])
    assert result.rejected == []
    assert db.execute("SELECT id, v, f::text FROM public.scores ORDER BY id").fetchall() == [
        (-9_000_000_000_000_000, "-9000000000000000", "-0"),
        (0, "0", "Infinity"),
        (12345678901, "12345678901", "1e+300"),
    ]


@pytest.mark.parametrize("kind", ["name", '"char"'])
def test_columns_that_would_cut_their_texts_are_refused(
    db: psycopg.Connection, target: PostgresTarget, kind: str
) -> None:
    db.execute(f"CREATE TABLE public.scores (id int PRIMARY KEY, v {kind})")  # type: ignore[arg-type]
    with pytest.raises(TargetRejected, match="column v"):
        target.push([batch_of(assigned(("id", "v")), {"id": [1], "v": ["ab"]})])


def test_a_ledger_is_asked_for_once(database: str, db: psycopg.Connection) -> None:
    """It remembers what it has read: another object would read all of it for each batch."""
    db.execute(
        "CREATE TABLE public.scores (id int PRIMARY KEY, v int); DROP ROLE IF EXISTS keeper; CREATE ROLE keeper LOGIN;"
        "GRANT SELECT, INSERT, UPDATE ON public.scores TO keeper"
    )
    asked: list[str] = []

    def ledgers(sync: str) -> MemoryLedger:
        asked.append(sync)
        return MemoryLedger()

    target = PostgresTarget(target_config(make_conninfo(database, user="keeper")), ledgers)
    try:
        for n in range(3):
            assert write(target, [n]).written == 1
        assert target.acknowledged(assigned(("id", "v"))).rows.num_rows == 3
        assert asked == ["s"]
    finally:
        target.close()
        db.execute("DROP OWNED BY keeper; DROP ROLE keeper")


def test_deletes_take_keys_of_the_results_own_types(db: psycopg.Connection, target: PostgresTarget) -> None:
    """As writes do: they are the same texts."""
    db.execute(
        "CREATE TABLE public.scores (a bytea, b bigint, c timestamptz, d int[], e bool, v int, "
        "PRIMARY KEY (a, b, c, d, e))"
    )
    names = ("a", "b", "c", "d", "e")
    with duckdb.connect() as engine:
        engine.execute("SET TimeZone = 'UTC'")
        keys = engine.sql(
            "SELECT unhex('AA4142') AS a, 12345678901::double AS b, 'infinity'::timestamptz AS c, [1, 2] AS d, "
            "true AS e UNION ALL SELECT unhex('AAAB'), 2, '2024-01-01 00:00:00.5+00', [3], false"
        ).to_arrow_table()
    assignment = assigned((*names, "v"), key=names, mode="mirror")
    rows = keys.append_column("v", pa.array([1, 1]))
    target.push([batch_of(assignment, rows)])
    (result,) = target.push([batch_of(assignment, keys.slice(0, 1), action="delete", digest="")])
    assert result.rejected == []
    assert db.execute("SELECT b FROM public.scores").fetchall() == [(2,)]
