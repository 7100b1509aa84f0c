"""What each mode and action writes into a real table, what is acknowledged, and how a target is compared."""

from __future__ import annotations

import datetime
import decimal
import re
from collections.abc import Iterator

import psycopg
import pyarrow as pa
import pytest
from psycopg.conninfo import make_conninfo

from cdc.errors import StoreUnavailable, TargetRejected
from cdc.sink import ADOPT, DELETE, INSERT, MISSING, UPDATE, Assignment, Comparing, Drift, Ordering
from connectors.postgres.target import PostgresTarget
from connectors.postgres.target_origin import MESSAGE_PREFIX
from tests.support.targets import MemoryLedgers, acks_for, assigned, batch_of, key_text, no_ledgers, target_config
from tests.support.waiting import wait_until

pytestmark = pytest.mark.matrix
SCORES = "CREATE TABLE public.scores (id int PRIMARY KEY, score numeric(8,2), note varchar(5), own text DEFAULT 'own')"
COLUMNS = ("id", "score", "note")


def table(db: psycopg.Connection, columns: str = "id, score, note, own") -> list[tuple[object, ...]]:
    return db.execute(f"SELECT {columns} FROM public.scores ORDER BY 1, 2, 3").fetchall()  # type: ignore[arg-type]


def acknowledged(target: PostgresTarget, assignment: Assignment) -> dict[str, str]:
    found = target.acknowledged(assignment).rows.to_pydict()
    return dict(zip(found["key"], found["digest"], strict=True))


d = decimal.Decimal


def test_the_target_has_all_protocols(target: PostgresTarget) -> None:
    assert isinstance(target, Comparing)
    assert isinstance(target, Ordering)


def test_update_writes_rows_that_exist_and_names_those_that_do_not(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    """Without a unique index, generated key and all; a key that hits several rows changes none of them."""
    db.execute(
        "CREATE TABLE public.scores (id int GENERATED ALWAYS AS IDENTITY, score numeric(8,2), note varchar(5), "
        "own text NOT NULL); INSERT INTO public.scores (score, note, own) VALUES (1, 'a', 'x'), (2, 'b', 'y'), "
        "(3, 'c', 'z'); INSERT INTO public.scores OVERRIDING SYSTEM VALUE VALUES (3, 3, 'c', 'z')"
    )
    untouched = db.execute("SELECT xmin::text FROM public.scores WHERE id = 2").fetchone()
    assignment = assigned(COLUMNS, mode="update")
    assert [f for f in target.check(assignment) if f.severity != "info"] == []
    rows = {"id": [1, 2, 3, 4, 5], "score": [7, 2, 7, 7, 7], "note": ["n", "b", "n", "n", "too long"]}
    (result,) = target.push([batch_of(assignment, rows, action=UPDATE)])
    assert result.absent == [key_text(4)]
    refused = {r.key: (r.reason, r.conflicts) for r in result.rejected}
    assert set(refused) == {key_text(3), key_text(5)}
    assert refused[key_text(3)] == ("the key hits several rows", False)
    assert set(acknowledged(target, assignment)) == {key_text(1), key_text(2)}
    assert result.written == 2
    assert table(db) == [(1, d(7), "n", "x"), (2, d(2), "b", "y"), (3, d(3), "c", "z"), (3, d(3), "c", "z")]
    assert db.execute("SELECT xmin::text FROM public.scores WHERE id = 2").fetchone() == untouched, "was equal"


def test_insert_refuses_rows_that_exist_and_append_asks_for_no_key(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(SCORES)
    db.execute("INSERT INTO public.scores VALUES (2, 2, 'b')")
    inserting = assigned(COLUMNS, mode="insert")
    rows = {"id": [1, 2, 3], "score": [1, 9, 3], "note": ["a", "x", "c"]}
    (result,) = target.push([batch_of(inserting, rows)])
    assert [(r.key, r.conflicts, "scores_pkey" in r.reason) for r in result.rejected] == [(key_text(2), False, True)]
    assert [row[:3] for row in table(db)] == [(1, d(1), "a"), (2, d(2), "b"), (3, d(3), "c")]
    db.execute("CREATE TABLE public.events (id int, note text)")
    appending = assigned(("id", "note"), table="public.events", mode="append", sync="log")
    rows = {"id": [1, 1], "note": ["a", "b"]}
    batch = batch_of(assigned(("id", "note"), key=("id", "note")), rows)  # acknowledged by id and note
    appended = batch_of(appending, rows)
    appended = type(batch)(assignment=appending, action=INSERT, rows=appended.rows, acks=batch.acks, run="r")
    assert target.push([appended])[0].written == 2
    assert target.push([appended])[0].written == 2, "sent twice, and taken once"
    assert db.execute("SELECT id, note FROM public.events ORDER BY note").fetchall() == [(1, "a"), (1, "b")]
    again = type(batch)(
        assignment=appending, action=UPDATE, rows=appended.rows,
        acks=batch.acks.set_column(1, "digest", pa.array(["d2", "d1"])), run="r",
    )  # fmt: skip
    target.push([again])
    assert db.execute("SELECT id, note FROM public.events ORDER BY note").fetchall() == [(1, "a"), (1, "a"), (1, "b")]
    assert target.forget(appending) == 2
    target.push([again])
    assert db.execute("SELECT count(*) FROM public.events").fetchone() == (5,), "forgotten, so sent again"


def test_deletes_go_by_the_key_and_take_the_acknowledgement_along(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute("CREATE TABLE public.scores (a date, b numeric(8,2), note text, own text, PRIMARY KEY (a, b))")
    mirror = assigned(("a", "b", "note"), key=("a", "b"), mode="mirror")
    days = [datetime.date(2024, 1, 1), datetime.date(2024, 1, 2), datetime.date(2024, 1, 3)]
    rows = pa.table({"a": days, "b": [d("1.50"), d("2.50"), d("3.50")], "note": ["x", "y", "z"]})
    target.push([batch_of(mirror, rows)])
    db.execute("DELETE FROM public.scores WHERE note = 'y'")
    gone = {"a": ["2024-01-01", "2024-01-02"], "b": ["1.5", "2.50"]}
    deletes = batch_of(mirror, gone, action=DELETE, digest="")
    deletes = type(deletes)(
        assignment=mirror, action=DELETE, rows=deletes.rows,
        acks=acks_for([key_text("2024-01-01", "1.50"), key_text("2024-01-02", "2.50")], ""),
    )  # fmt: skip
    assert target.push([deletes])[0].written == 2, "what is gone already is done"
    assert table(db, "a, b, note") == [(days[2], d("3.50"), "z")]
    assert list(acknowledged(target, mirror)) == [key_text("2024-01-03", "3.50")]
    assert target.push([deletes])[0].written == 2


def test_adopting_writes_acknowledgements_only(db: psycopg.Connection, target: PostgresTarget) -> None:
    db.execute(SCORES)
    assignment = assigned(COLUMNS)
    rows = {"id": [1], "score": [1], "note": ["a"]}
    assert target.push([batch_of(assignment, rows, action=ADOPT)])[0].written == 1
    assert table(db) == []
    assert acknowledged(target, assignment) == {key_text(1): "d1"}


@pytest.mark.parametrize("mode", ["upsert", "update"])
def test_keep_and_fill_look_at_what_is_there(db: psycopg.Connection, target: PostgresTarget, mode: str) -> None:
    db.execute(
        "CREATE DOMAIN public.word AS text CHECK (value <> '');"
        "CREATE TABLE public.scores (id int PRIMARY KEY, kept public.word NOT NULL, filled numeric(8,2), plain text);"
        "INSERT INTO public.scores VALUES (1, 'a', NULL, 'p'), (2, 'b', 2, 'p'), (3, 'c', 3, NULL)"
    )
    assignment = assigned(
        ("id", "kept", "filled", "plain"), mode=mode, keep=frozenset({"kept"}), fill=frozenset({"filled"})
    )
    rows = {"id": [1, 2, 3], "kept": [None, "B", None], "filled": [1.5, 9, None], "plain": ["q", None, None]}
    (result,) = target.push([batch_of(assignment, rows)])
    assert result.rejected == []
    expected = [(1, "a", d("1.50"), "q"), (2, "B", d(2), None), (3, "c", d(3), None)]
    assert table(db, "id, kept, filled, plain") == expected
    before = db.execute("SELECT xmin::text FROM public.scores ORDER BY id").fetchall()
    target.push([batch_of(assignment, rows, digest="d2")])
    assert db.execute("SELECT xmin::text FROM public.scores ORDER BY id").fetchall() == before, "nothing is left to do"
    (found,) = target.drift(assignment, [batch_of(assignment, rows)])
    assert found == []


@pytest.mark.parametrize(
    ("values", "column", "instead"),
    [
        (pa.array([True]), "timestamp", "cast"),
        (pa.array([1]), "timestamptz", "cast"),
        (pa.array([1]), "uuid", "cast"),
        (pa.array([1]), "bytea", "cast"),
        (pa.array([True]), "int", "cast"),
        (pa.array([datetime.date(2024, 1, 1)]), "bigint", "cast"),
        (pa.array([datetime.datetime(2024, 1, 1, 5)]), "date", "x::date"),  # noqa: DTZ001
        (pa.array([datetime.time(1)]), "timestamp", "cast"),
        (pa.array([b"x"]), "text", "hex(x)"),
        (pa.array([[1]]), "jsonb", "to_json(x)"),
        (pa.array([{"a": 1}]), "jsonb", "to_json(x)"),
        (pa.array([[{"a": 1}]]), "text[]", "to_json(x)"),
    ],
)
def test_types_that_can_never_fit_are_refused_before_the_first_row(
    db: psycopg.Connection, target: PostgresTarget, values: pa.Array, column: str, instead: str
) -> None:
    db.execute(f"CREATE TABLE public.scores (id int PRIMARY KEY, x {column})")  # type: ignore[arg-type]
    with pytest.raises(TargetRejected) as raised:
        target.push([batch_of(assigned(("id", "x")), pa.table({"id": [1], "x": values}))])
    assert "column x of the result" in str(raised.value)
    assert instead in raised.value.hint
    assert db.execute("SELECT to_regnamespace('cdc')").fetchone() == (None,), "nothing was left behind"


@pytest.mark.parametrize(
    ("value", "column"),
    [
        ("2024-01-01", "date"), ("12", "bigint"), ("t", "bool"), (1, "bool"), (1, "numeric"), (1.5, "text"),
        (True, "json"), (1, "public.mood"), (datetime.date(2024, 1, 1), "timestamptz"), (None, "uuid"),
        (datetime.time(1), "interval"), ([1], "text[]"), ("x", "public.dom"),
    ],
)  # fmt: skip
def test_types_that_may_fit_are_left_to_the_server(
    db: psycopg.Connection, target: PostgresTarget, value: object, column: str
) -> None:
    db.execute("CREATE TYPE public.mood AS ENUM ('1'); CREATE DOMAIN public.dom AS varchar(3)")
    db.execute(f"CREATE TABLE public.scores (id int PRIMARY KEY, x {column})")  # type: ignore[arg-type]
    (result,) = target.push([batch_of(assigned(("id", "x")), {"id": [1], "x": [value]})])
    assert result.rejected == []


def test_a_column_that_was_dropped_since_the_plan_stops_the_sync_before_anything_is_written(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(SCORES)
    rows = {"id": [1], "score": [1], "note": ["a"]}
    assignment = assigned(COLUMNS)
    before = target.acknowledged(assignment)
    db.execute("ALTER TABLE public.scores DROP COLUMN note")
    with pytest.raises(TargetRejected) as raised:
        target.push([batch_of(assignment, rows)])
    assert "no column note" in str(raised.value)
    assert "leave it out of the sync" in raised.value.hint
    assert table(db, "id, score, own") == []
    assert target.acknowledged(assignment).shape != before.shape


@pytest.mark.parametrize(
    ("ddl", "differs"),
    [
        ("ALTER TABLE public.scores ALTER note TYPE varchar(6)", True),
        ("ALTER TABLE public.scores ALTER note SET NOT NULL", True),
        ("ALTER TABLE public.scores ADD needed int NOT NULL", True),
        ("ALTER TABLE public.scores RENAME note TO notes", True),
        ("ALTER TABLE public.scores ADD more int NOT NULL DEFAULT 1", False),
        ("ALTER TABLE public.scores DROP own", False),
        ("ALTER TABLE public.scores ALTER own TYPE varchar(3)", False),
    ],
)
def test_the_shape_is_of_what_a_push_would_meet(
    db: psycopg.Connection, target: PostgresTarget, ddl: str, differs: bool
) -> None:
    db.execute(SCORES)
    before = target.acknowledged(assigned(COLUMNS)).shape
    assert before
    db.execute(ddl)  # type: ignore[arg-type]
    assert (target.acknowledged(assigned(COLUMNS)).shape != before) == differs


def test_the_last_run_is_known_also_when_it_only_deleted_and_forgetting_sends_nothing(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(SCORES)
    mirror = assigned(COLUMNS, mode="mirror")
    rows = {"id": [1, 2], "score": [1, 2], "note": ["a", "b"]}
    assert target.acknowledged(mirror).last_run == ""
    target.push([batch_of(mirror, rows, run="run-1")])
    assert target.acknowledged(mirror).last_run == "run-1"
    assert db.execute("SELECT run FROM cdc.cdc_sync_state WHERE key = %s", (key_text(1),)).fetchone() == ("run-1",)
    target.push([batch_of(mirror, {"id": ["2"]}, action=DELETE, digest="", run="run-2")])
    assert target.acknowledged(mirror).last_run == "run-2"
    assert target.forget(mirror) == 1
    assert target.forget(mirror) == 0
    assert (target.acknowledged(mirror).rows.num_rows, target.acknowledged(mirror).last_run) == (0, "")
    assert len(table(db)) == 1


def test_a_state_table_of_format_1_is_read_and_then_brought_to_format_2(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(SCORES)
    db.execute(
        "CREATE SCHEMA cdc; CREATE TABLE cdc.cdc_sync_state (sync text NOT NULL, key text NOT NULL, digest text "
        "NOT NULL, relation oid NOT NULL, acked_at timestamptz NOT NULL, PRIMARY KEY (sync, key));"
        "COMMENT ON TABLE cdc.cdc_sync_state IS 'What cdc has pushed into this database. Format 1.';"
        "INSERT INTO cdc.cdc_sync_state SELECT 's', '[\"1\"]', 'old', 'public.scores'::regclass, now()"
    )
    assignment = assigned(COLUMNS)
    assert acknowledged(target, assignment) == {key_text(1): "old"}
    assert target.acknowledged(assignment).last_run == ""
    target.push([batch_of(assignment, {"id": [2], "score": [2], "note": ["b"]})])
    assert acknowledged(target, assignment) == {key_text(1): "old", key_text(2): "d1"}
    comment = db.execute("SELECT obj_description('cdc.cdc_sync_state'::regclass)").fetchone()
    assert comment is not None
    assert re.search("Format 2", comment[0])
    key = db.execute("SELECT pg_get_indexdef('cdc.cdc_sync_state_pkey'::regclass)").fetchone()
    assert key is not None
    assert "(sync, relation_name, key)" in key[0]


def test_an_acknowledgement_counts_for_the_table_that_it_was_given_for(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(SCORES)
    db.execute("CREATE TABLE public.others (LIKE public.scores INCLUDING ALL)")
    target.push([batch_of(assigned(COLUMNS), {"id": [1], "score": [1], "note": ["a"]})])
    assert acknowledged(target, assigned(COLUMNS, table="public.others")) == {}
    db.execute("DROP TABLE public.scores; ALTER TABLE public.others RENAME TO scores")
    assert acknowledged(target, assigned(COLUMNS)) == {}


def test_two_daemons_whose_syncs_have_one_name_do_not_forget_for_each_other(
    db: psycopg.Connection, database: str, target: PostgresTarget
) -> None:
    db.execute('CREATE TABLE public.a (id int, v int); CREATE TABLE public."B" (id int, v int)')
    other = PostgresTarget(target_config(database, origin="cdc_other"), no_ledgers)
    mine = assigned(("id", "v"), table="public.a", mode="append")
    others = assigned(("id", "v"), table='public."B"', mode="append")
    try:
        for _ in range(2):
            for sink, assignment in ((target, mine), (other, others)):
                sink.push([batch_of(assignment, {"id": [1], "v": [1]})])
                assert acknowledged(sink, assignment) == {key_text(1): "d1"}
        assert db.execute('SELECT (SELECT count(*) FROM public.a), (SELECT count(*) FROM public."B")').fetchone() == (
            1,
            1,
        )
        assert other.forget(others) == 1
        assert acknowledged(target, mine) == {key_text(1): "d1"}
    finally:
        other.close()


def test_a_copy_of_the_database_with_other_oids_knows_what_it_was_given(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    """What restoring a dump leaves: the same names and rows, and other OIDs."""
    db.execute("CREATE TABLE public.scores (id int, v int)")
    append = assigned(("id", "v"), mode="append")
    given = batch_of(append, {"id": [1, 2], "v": [1, 1]}, run="run-1")
    target.push([given])
    db.execute(
        "CREATE TABLE public.copy AS TABLE public.scores; DROP TABLE public.scores;"
        "ALTER TABLE public.copy RENAME TO scores;"
        "CREATE TABLE cdc.copy (LIKE cdc.cdc_sync_state INCLUDING ALL);"
        "INSERT INTO cdc.copy TABLE cdc.cdc_sync_state; DROP TABLE cdc.cdc_sync_state;"
        "ALTER TABLE cdc.copy RENAME TO cdc_sync_state;"
        "COMMENT ON TABLE cdc.cdc_sync_state IS 'What cdc has pushed into this database. Format 2.'"
    )
    known = target.acknowledged(append)
    assert (known.rows.num_rows, known.last_run) == (2, "run-1")
    target.push([given])
    assert db.execute("SELECT id FROM public.scores ORDER BY id").fetchall() == [(1,), (2,)]
    assert acknowledged(target, append) == {key_text(1): "d1", key_text(2): "d1"}
    # From here on an OID counts again.
    db.execute("DROP TABLE public.scores; CREATE TABLE public.scores (id int, v int)")
    assert target.acknowledged(append).last_run == ""
    assert acknowledged(target, append) == {}
    target.push([given])
    assert db.execute("SELECT id FROM public.scores ORDER BY id").fetchall() == [(1,), (2,)]


# ---------------------------------------------------------------------- without rights


@pytest.fixture
def guest(db: psycopg.Connection, database: str) -> Iterator[tuple[PostgresTarget, MemoryLedgers]]:
    """A role that may write the table, and keep nothing in the database."""
    db.execute(SCORES)
    db.execute("DROP ROLE IF EXISTS visitor; CREATE ROLE visitor LOGIN")
    db.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON public.scores TO visitor")
    ledgers = MemoryLedgers()
    sink = PostgresTarget(target_config(make_conninfo(database, user="visitor")), ledgers)
    yield sink, ledgers
    sink.close()
    db.execute("DROP OWNED BY visitor CASCADE")
    query = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'visitor'"
    wait_until(lambda: db.execute(query).fetchone() == (0,))
    db.execute("DROP ROLE visitor")


def test_without_a_place_in_the_target_a_ledger_is_told_after_the_commit(
    db: psycopg.Connection, guest: tuple[PostgresTarget, MemoryLedgers]
) -> None:
    target, ledgers = guest
    mirror = assigned(COLUMNS, mode="mirror")
    state = {f.name: f for f in target.check(mirror)}["sync state"]
    assert (state.severity, state.fix) == ("warning", 'CREATE SCHEMA cdc AUTHORIZATION "visitor"')
    rows = {"id": [1, 2, 3], "score": [1, 2, 3], "note": ["a", "b", "too long"]}
    (result,) = target.push([batch_of(mirror, rows)])
    assert (result.written, [r.key for r in result.rejected]) == (2, [key_text(3)])
    assert ledgers.of("s").known == {key_text(1): ("d1", 1), key_text(2): ("d1", 1)}
    assert acknowledged(target, mirror) == {key_text(1): "d1", key_text(2): "d1"}
    target.push([batch_of(mirror, {"id": ["2"]}, action=DELETE, digest="")])
    assert ledgers.of("s").known[key_text(2)] == ("", 1)
    ledgers.of("s").failing = StoreUnavailable("the disk is full")
    (result,) = target.push([batch_of(mirror, {"id": [4], "score": [4], "note": ["d"]})])
    assert (result.unsent, result.error, result.written) == ([key_text(4)], ledgers.of("s").failing, 0)
    ledgers.of("s").failing = None
    (result,) = target.push([batch_of(mirror, {"id": [4], "score": [4], "note": ["d"]})])
    assert result.written == 1
    assert [row[0] for row in table(db)] == [1, 4]
    assert target.forget(mirror) == 2
    assert set(acknowledged(target, mirror).values()) == {""}
    shape = target.acknowledged(mirror).shape
    db.execute("DROP TABLE public.scores")
    db.execute(SCORES)
    db.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON public.scores TO visitor")
    assert target.acknowledged(mirror).shape != shape, "a ledger cannot tell the new table from the old one"


@pytest.mark.parametrize("mode", ["insert", "append"])
def test_what_could_double_or_reject_after_a_lost_answer_is_refused_there(
    guest: tuple[PostgresTarget, MemoryLedgers], mode: str
) -> None:
    target, _ = guest
    state = {f.name: f for f in target.check(assigned(COLUMNS, mode=mode))}["sync state"]
    assert state.severity == "error"
    with pytest.raises(TargetRejected, match="answer was lost"):
        target.push([batch_of(assigned(COLUMNS, mode=mode), {"id": [1], "score": [1], "note": ["a"]})])


def test_half_the_rights_on_the_state_table_are_an_error_not_a_reason_to_forget(
    db: psycopg.Connection, guest: tuple[PostgresTarget, MemoryLedgers], target: PostgresTarget
) -> None:
    visitor, _ = guest
    target.push([batch_of(assigned(COLUMNS), {"id": [1], "score": [1], "note": ["a"]})])
    db.execute("GRANT USAGE ON SCHEMA cdc TO visitor; GRANT SELECT, INSERT, UPDATE ON cdc.cdc_sync_state TO visitor")
    with pytest.raises(TargetRejected, match="may not DELETE") as raised:
        visitor.acknowledged(assigned(COLUMNS))
    db.execute(raised.value.hint)  # type: ignore[arg-type]
    assert acknowledged(visitor, assigned(COLUMNS)) == {key_text(1): "d1"}


# ---------------------------------------------------------------------- order, drift, marks


def test_tables_that_are_referred_to_come_first_and_circles_keep_their_order(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY, a int REFERENCES a);"
        "CREATE TABLE c (id int PRIMARY KEY, b int REFERENCES b, c int REFERENCES c);"
        "CREATE TABLE x (id int PRIMARY KEY, y int); CREATE TABLE y (id int PRIMARY KEY, x int REFERENCES x);"
        "ALTER TABLE x ADD FOREIGN KEY (y) REFERENCES y; CREATE TABLE z (id int PRIMARY KEY, x int REFERENCES x)"
    )

    def order(names: str) -> str:
        given = [assigned(("id",), table=f"public.{n}", sync=n) for n in names]
        return "".join(a.sync for a in target.order(given))

    assert order("cba") == "abc"
    assert order("bca") == "abc"
    assert order("ca") == "ca"
    assert order("zyx") == "yxz"
    assert order("xy") == "xy"
    assert order("yx") == "yx"


def test_drift_names_what_is_missing_and_what_differs_and_writes_nothing(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(SCORES)
    assignment = assigned(COLUMNS)
    rows = {"id": [1, 2, 3, 4, 5], "score": [1.5, 2, 3, 4, 5], "note": ["a", "b", "c", None, "e"]}
    target.push([batch_of(assignment, rows)])
    db.execute(
        "UPDATE public.scores SET own = 'human'; UPDATE public.scores SET note = 'x', score = 0 WHERE id = 2;"
        "UPDATE public.scores SET note = 'd' WHERE id = 4; DELETE FROM public.scores WHERE id = 3"
    )
    before = db.execute("SELECT txid_current_snapshot()::text, pg_relation_size('cdc.cdc_sync_state')").fetchone()
    whole = {"id": [*rows["id"], 6], "score": [*rows["score"], 6], "note": [*rows["note"], "too long"]}
    found = list(
        target.drift(
            assignment, [batch_of(assignment, whole), batch_of(assignment, {k: v[:1] for k, v in rows.items()})]
        )
    )
    assert [set(f) for f in found] == [
        {
            Drift(key_text(2), "different", ("score", "note")),
            Drift(key_text(3), MISSING),
            Drift(key_text(4), "different", ("note",)),
            Drift(key_text(6), "different"),
        },
        set(),
    ]
    assert before is not None
    assert db.execute("SELECT count(*) FROM public.scores").fetchone() == (4,)


def test_where_no_origin_can_be_set_a_message_is_the_first_thing_in_the_transaction(
    db: psycopg.Connection, guest: tuple[PostgresTarget, MemoryLedgers]
) -> None:
    target, _ = guest
    db.execute("SELECT pg_create_logical_replication_slot('marks', 'test_decoding')")
    try:
        target.push([batch_of(assigned(COLUMNS), {"id": [1], "score": [1], "note": ["a"]})])
        changes = [
            row[0] for row in db.execute("SELECT data FROM pg_logical_slot_get_changes('marks', NULL, NULL)").fetchall()
        ]
    finally:
        db.execute("SELECT pg_drop_replication_slot('marks')")
    assert changes[0].startswith("BEGIN")
    assert f"prefix: {MESSAGE_PREFIX}" in changes[1]
    assert changes[1].endswith("content:cdc_crm")
    assert "INSERT" in changes[2]
