"""When two keys are one, and which row of the target a key means: operators, rounding, collations, inheritance."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Iterator

import psycopg
import pytest

from cdc.sink import DELETE, Assignment, PushResult
from connectors.postgres.target import PostgresTarget
from tests.support.targets import assigned, batch_of, key_text, no_ledgers, target_config

pytestmark = pytest.mark.matrix
MIRROR = assigned(("id", "v"), mode="mirror")


@pytest.fixture
def db(database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def target(database: str) -> Iterator[PostgresTarget]:
    sink = PostgresTarget(target_config(database), no_ledgers)
    yield sink
    sink.close()


def write(target: PostgresTarget, ids: list[object], *, assignment: Assignment = MIRROR) -> PushResult:
    (result,) = target.push([batch_of(assignment, {"id": ids, "v": [1] * len(ids)})])
    return result


def delete(target: PostgresTarget, ids: list[object], *, assignment: Assignment = MIRROR) -> PushResult:
    (result,) = target.push([batch_of(assignment, {"id": ids}, action=DELETE, digest="")])
    return result


def ids(db: psycopg.Connection) -> list[object]:
    return [row[0] for row in db.execute("SELECT id FROM public.scores ORDER BY 1").fetchall()]


def acknowledged(target: PostgresTarget, assignment: Assignment = MIRROR) -> set[str]:
    return set(target.acknowledged(assignment).rows.column("key").to_pylist())


def test_an_operator_that_someone_puts_into_the_search_path_is_not_asked(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(
        "CREATE TABLE public.scores (id varchar(20) PRIMARY KEY, v int);"
        "CREATE FUNCTION public.evil(varchar, varchar) RETURNS bool LANGUAGE sql AS 'SELECT true';"
        "CREATE OPERATOR public.= (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = public.evil)"
    )
    write(target, ["a", "b", "c"])
    assert delete(target, ["a"]).rejected == []
    assert ids(db) == ["b", "c"]


@pytest.mark.parametrize("kind", ["ext.citext", "public.mood", "int[]", "int4range", "public.short"])
def test_keys_are_found_whatever_schema_their_operator_is_in(
    db: psycopg.Connection, target: PostgresTarget, kind: str
) -> None:
    db.execute(
        "CREATE TYPE public.mood AS ENUM ('[1,2)', '{1}'); CREATE DOMAIN public.short AS varchar(5);"
        f"CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext; CREATE TABLE public.scores (id {kind} PRIMARY KEY, v int)"  # type: ignore[arg-type]
    )
    key = "{1}" if kind == "int[]" else "[1,2)"
    for mode in ("mirror", "update"):
        assert write(target, [key], assignment=assigned(("id", "v"), mode=mode)).written == 1
    assert delete(target, [key]).rejected == []
    assert ids(db) == []


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("numeric(8,2)", decimal.Decimal("1.001")),
        ("timestamptz(0)", datetime.datetime(2024, 1, 1, 0, 0, 0, 400_000, tzinfo=datetime.UTC)),
        ("public.rounded", decimal.Decimal("1.001")),
        ("char(4)", "ab"),
    ],
)
def test_a_key_that_its_column_rounds_is_found_again(
    db: psycopg.Connection, target: PostgresTarget, kind: str, key: object
) -> None:
    db.execute("CREATE DOMAIN public.rounded AS numeric(8,2)")
    db.execute(f"CREATE TABLE public.scores (id {kind} PRIMARY KEY, v int)")  # type: ignore[arg-type]
    write(target, [key])
    assert len(ids(db)) == 1
    assert delete(target, [key]).rejected == []
    assert ids(db) == []


def test_rows_of_a_table_that_inherits_are_not_ours(db: psycopg.Connection, target: PostgresTarget) -> None:
    db.execute(
        "CREATE TABLE public.scores (id int PRIMARY KEY, v int);"
        "CREATE TABLE public.kid () INHERITS (public.scores); INSERT INTO public.kid VALUES (1, 77)"
    )
    write(target, [0, 1])
    write(target, [1], assignment=assigned(("id", "v"), mode="update"))
    assert delete(target, [1]).rejected == []
    assert db.execute("SELECT tableoid::regclass::text, id, v FROM public.scores ORDER BY 2").fetchall() == [
        ("scores", 0, 1),
        ("kid", 1, 77),
    ]
