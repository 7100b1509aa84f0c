"""When two keys are one, and which row of the target a key means: operators, rounding, collations, inheritance."""

from __future__ import annotations

import datetime
import decimal

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from cdc.sink import DELETE, Assignment, PushResult
from connectors.postgres.target import PostgresTarget
from tests.support.targets import assigned, batch_of, key_text, no_ledgers, target_config

pytestmark = pytest.mark.matrix
MIRROR = assigned(("id", "v"), mode="mirror")


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
        "CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext;"
        f"CREATE TABLE public.scores (id {kind} PRIMARY KEY, v int)"  # type: ignore[arg-type]
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


@pytest.mark.parametrize("how", ["policy", "rule", "trigger"])
def test_a_row_that_is_there_after_its_delete_is_a_reject(database: str, db: psycopg.Connection, how: str) -> None:
    db.execute(
        "CREATE TABLE public.scores (id int PRIMARY KEY, v int); DROP ROLE IF EXISTS keeper; CREATE ROLE keeper LOGIN;"
        "GRANT SELECT, INSERT, UPDATE, DELETE ON public.scores TO keeper; CREATE SCHEMA cdc AUTHORIZATION keeper"
    )
    kept = {
        "policy": "ALTER TABLE public.scores ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY a ON public.scores FOR SELECT USING (true);"
        "CREATE POLICY b ON public.scores FOR INSERT WITH CHECK (true);"
        "CREATE POLICY c ON public.scores FOR UPDATE USING (true)",
        "rule": "CREATE RULE kept AS ON DELETE TO public.scores DO INSTEAD NOTHING",
        "trigger": "CREATE FUNCTION public.kept() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;"
        "CREATE TRIGGER kept BEFORE DELETE ON public.scores FOR EACH ROW EXECUTE FUNCTION public.kept()",
    }
    target = PostgresTarget(target_config(make_conninfo(database, user="keeper")), no_ledgers)
    try:
        write(target, [1, 2])
        db.execute(kept[how])  # type: ignore[arg-type]
        assert ("row security" in {f.name for f in target.check(MIRROR)}) == (how == "policy")
        result = delete(target, [1, 3])
        assert [r.key for r in result.rejected] == [key_text(1)]
        assert result.rejected[0].reason.startswith("still there")
        assert ids(db) == [1, 2]
        assert acknowledged(target) == {key_text(1), key_text(2)}
    finally:
        target.close()
        db.execute("DROP OWNED BY keeper; DROP ROLE keeper")


TWINS = {
    "public.citext": ("Ann@x", "ann@x"),
    "int": ("01", "1"),
    "uuid": ("A0000000-0000-0000-0000-000000000001", "a0000000-0000-0000-0000-000000000001"),
    "char(4)": ("ab", "ab "),
    "numeric(8,2)": ("1.001", "1.002"),
}
CI = "CREATE EXTENSION citext"


@pytest.mark.parametrize("kind", TWINS)
def test_two_keys_that_are_one_row_are_both_refused(db: psycopg.Connection, target: PostgresTarget, kind: str) -> None:
    """Whichever came last would win, otherwise, and a mirror would delete it with the other."""
    db.execute(CI)
    db.execute(f"CREATE TABLE public.scores (id {kind} PRIMARY KEY, v int CHECK (v < 2), u int UNIQUE)")  # type: ignore[arg-type]
    one, other = TWINS[kind]
    given = {"id": [one, "2000", "3000", other], "v": [1, 1, 2, 1]}
    if kind == "uuid":
        given["id"][1:3] = [f"b0000000-0000-0000-0000-00000000000{i}" for i in (2, 3)]
    (result,) = target.push([batch_of(MIRROR, given)])
    reason = "another row of the result has this key in the target"
    assert [r.reason == reason for r in result.rejected] == [True, False, True]
    assert [str(i) for i in ids(db)] == [given["id"][1] + (".00" if "numeric" in kind else "")]


@pytest.mark.parametrize("kind", TWINS)
def test_a_key_that_leaves_while_another_names_the_same_row_is_only_forgotten(
    db: psycopg.Connection, target: PostgresTarget, kind: str
) -> None:
    db.execute(CI)
    db.execute(f"CREATE TABLE public.scores (id {kind} PRIMARY KEY, v int)")  # type: ignore[arg-type]
    one, other = TWINS[kind]
    write(target, [one])
    write(target, [other])
    assert delete(target, [one]).rejected == []
    assert (len(ids(db)), acknowledged(target)) == (1, {key_text(other)})
    assert delete(target, [other]).rejected == []
    assert (ids(db), acknowledged(target)) == ([], set())
    write(target, [one])
    write(target, [other])
    assert delete(target, [one, other]).rejected == []
    assert (ids(db), acknowledged(target)) == ([], set())
