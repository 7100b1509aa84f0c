"""Rows that are refused for what other rows hold: swaps, cycles and chains under unique indexes, foreign keys."""

from __future__ import annotations

import threading
import time

import psycopg
import pytest

from cdc.errors import TargetUnavailable
from cdc.sink import DELETE, Assignment, PushResult
from connectors.postgres import target as target_module
from connectors.postgres.target import PostgresTarget
from tests.support.targets import assigned, batch_of, key_text, no_ledgers, target_config
from tests.support.waiting import wait_until

pytestmark = pytest.mark.matrix
RANKED = assigned(("id", "u", "note"))


def push(target: PostgresTarget, rows: dict[int, object], *, assignment: Assignment = RANKED) -> PushResult:
    given = {
        "id": list(rows),
        "u": [str(u) if u is not None else None for u in rows.values()],
        "note": ["n"] * len(rows),
    }
    (result,) = target.push([batch_of(assignment, given)])
    return result


def held(db: psycopg.Connection) -> dict[int, str]:
    return dict(db.execute("SELECT id, u::text FROM public.scores ORDER BY id").fetchall())


def acknowledged(target: PostgresTarget, assignment: Assignment = RANKED) -> set[str]:
    return set(target.acknowledged(assignment).rows.column("key").to_pylist())


UUIDS = [f"00000000-0000-0000-0000-00000000000{i}" for i in range(5)]


@pytest.mark.parametrize("mode", ["upsert", "update"])
@pytest.mark.parametrize(
    ("column", "more", "values"),
    [
        ("int UNIQUE", "", [1, 2, 3, 4, 5]),
        ("int NOT NULL UNIQUE", "", [1, 2, 3, 4, 5]),
        ("int NOT NULL UNIQUE CHECK (u > 0)", "", None),
        ("bigint NOT NULL UNIQUE DEFERRABLE", "", [1, 2, 3, 4, 5]),
        ("date NOT NULL UNIQUE DEFERRABLE INITIALLY DEFERRED", "", [f"2024-01-0{i}" for i in range(1, 6)]),
        ("text NOT NULL UNIQUE", "", ["a", "b", "c", "d", "e"]),
        ("varchar(20) NOT NULL", "CREATE UNIQUE INDEX one ON public.scores (lower(u))", ["a", "b", "c", "d", "e"]),
        ("text", "CREATE UNIQUE INDEX one ON public.scores (u) WHERE note <> 'x'", ["a", "b", "c", "d", "e"]),
        ("uuid NOT NULL UNIQUE", "", UUIDS),
        ("date NOT NULL UNIQUE", "", None),
        ("varchar(2) NOT NULL UNIQUE", "", None),
        ("int", "ALTER TABLE public.scores ADD EXCLUDE USING btree (u WITH =)", [1, 2, 3, 4, 5]),
    ],
)
def test_swaps_and_cycles_go_through_and_who_is_in_the_way_of_none_is_not_refused(
    db: psycopg.Connection, target: PostgresTarget, column: str, more: str, values: list[object] | None, mode: str
) -> None:
    """With values None the column can take no intermediate one: then the rows of the swap are refused."""
    db.execute(f"CREATE TABLE public.scores (id int PRIMARY KEY, u {column}, note text, own text DEFAULT 'own')")  # type: ignore[arg-type]
    db.execute(more)  # type: ignore[arg-type]
    v = values or (
        ["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04", "2024-01-05"] if "date" in column else [1, 2, 3, 4, 5]
    )
    assert push(target, dict(zip(range(1, 6), v, strict=True))).rejected == []
    turned = {1: v[1], 2: v[0], 3: v[3], 4: v[4], 5: v[2]}
    result = push(target, turned, assignment=assigned(("id", "u", "note"), mode=mode))
    if values is None:
        assert {r.key for r in result.rejected} == {key_text(i) for i in turned}
        assert all("scores_u_key" in r.reason and r.conflicts for r in result.rejected)
        assert held(db) == {i + 1: str(x) for i, x in enumerate(v)}
    else:
        assert result.rejected == []
        assert held(db) == {i: str(x) for i, x in turned.items()}
    assert db.execute("SELECT count(*) FROM public.scores WHERE own = 'own' AND note = 'n'").fetchone() == (5,)


def test_triggers_see_the_intermediate_step_only_where_the_constraint_cannot_be_deferred(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(
        "CREATE TABLE public.scores (id int PRIMARY KEY, u int UNIQUE DEFERRABLE, note text);"
        "CREATE TABLE public.seen (id int, u int);"
        "CREATE FUNCTION public.see() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN INSERT INTO public.seen VALUES (new.id, new.u); RETURN NULL; END $$;"
        "CREATE TRIGGER see AFTER UPDATE ON public.scores FOR EACH ROW EXECUTE FUNCTION public.see()"
    )
    seen = "DELETE FROM public.seen RETURNING id, u"
    push(target, {1: 1, 2: 2, 3: 3})
    push(target, {1: 2, 2: 1, 3: 3})
    assert sorted(db.execute(seen).fetchall()) == [(1, 2), (2, 1)]
    db.execute("ALTER TABLE public.scores DROP CONSTRAINT scores_u_key, ADD UNIQUE (u)")
    push(target, {1: 1, 2: 2, 3: 3})
    assert db.execute(seen).fetchall() == [(1, None), (2, None), (1, 1), (2, 2)]


def test_a_chain_that_is_blocked_at_its_end_is_refused_and_a_cycle_beside_it_is_not(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute("CREATE TABLE public.scores (id int PRIMARY KEY, u int NOT NULL UNIQUE, note text)")
    push(target, {i: i for i in range(1, 9)})
    # 1 wants 2, 2 wants 3, 3 wants 8, which nobody gives up; 4, 5, 6 turn; 7 goes where nobody is, 9 where 7 was.
    result = push(target, {1: 2, 2: 3, 3: 8, 4: 5, 5: 6, 6: 4, 7: 70, 9: 7})
    assert {r.key for r in result.rejected} == {key_text(1), key_text(2), key_text(3)}
    assert all("scores_u_key" in r.reason and r.conflicts for r in result.rejected)
    assert held(db) == {1: "1", 2: "2", 3: "3", 4: "5", 5: "6", 6: "4", 7: "70", 8: "8", 9: "7"}
    assert acknowledged(target) == {key_text(i) for i in range(1, 10)}
    digests = target.acknowledged(RANKED).rows
    assert digests.num_rows == 9


def test_bad_rows_among_a_cycle_do_not_hold_it_up(db: psycopg.Connection, target: PostgresTarget) -> None:
    db.execute("CREATE TABLE public.scores (id int PRIMARY KEY, u int NOT NULL UNIQUE CHECK (u < 100), note text)")
    n = 60
    push(target, {i: i for i in range(n + 2)})
    wanted = {i: (i + 1) % n if i not in (7, 30) else 100 + i for i in range(n)}
    result = push(target, {**wanted, n: n + 1, n + 1: n})
    # 7 and 30 are refused and stay, so whoever waits for their values cannot move, and so on down the chain.
    assert {key_text(7), key_text(30)} <= {r.key for r in result.rejected}
    assert {r.key for r in result.rejected if not r.conflicts} == {key_text(7), key_text(30)}
    stay = {i: str(i) for i in range(n)}
    assert held(db) == {**stay, n: str(n + 1), n + 1: str(n)}, "two chains, each blocked at its end, and a swap"


def test_everybody_moving_up_by_one_takes_two_statements_not_thousands(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute("CREATE TABLE public.scores (id int PRIMARY KEY, u int NOT NULL UNIQUE, note text)")
    n = 5_000
    push(target, {i: i for i in range(n)})
    started = time.monotonic()
    assert push(target, {i: i + 1 for i in range(n)}).rejected == []
    assert time.monotonic() - started < 10
    assert held(db) == {i: str(i + 1) for i in range(n)}


def test_rows_of_several_batches_of_one_call_swap_too(db: psycopg.Connection, target: PostgresTarget) -> None:
    db.execute("CREATE TABLE public.scores (id int PRIMARY KEY, u text NOT NULL UNIQUE, note text)")
    push(target, {1: "a", 2: "b", 3: "c"})
    mirror = assigned(("id", "u", "note"), mode="mirror")
    batches = [
        batch_of(mirror, {"id": [1, 4], "u": ["b", "c"], "note": ["n", "n"]}),
        batch_of(mirror, {"id": [2], "u": ["a"], "note": ["n"]}),
        batch_of(mirror, {"id": ["3"]}, action=DELETE, digest=""),
    ]
    assert [r.rejected for r in target.push(batches)] == [[], [], []]
    assert held(db) == {1: "b", 2: "a", 4: "c"}
    assert acknowledged(target) == {key_text(i) for i in (1, 2, 4)}


def test_what_keep_and_fill_protect_is_not_lost_on_the_way(db: psycopg.Connection, target: PostgresTarget) -> None:
    db.execute("CREATE TABLE public.scores (id int PRIMARY KEY, u text UNIQUE, note text UNIQUE)")
    push_all = assigned(("id", "u", "note"))
    target.push([batch_of(push_all, {"id": [1, 2, 3], "u": ["a", "b", "c"], "note": ["x", "y", None]})])
    careful = assigned(("id", "u", "note"), keep=frozenset({"u"}), fill=frozenset({"note"}))
    rows = {"id": [1, 2, 3], "u": ["b", "a", None], "note": ["y", "x", "z"]}
    (result,) = target.push([batch_of(careful, rows)])
    assert result.rejected == []
    found = db.execute("SELECT id, u, note FROM public.scores ORDER BY id").fetchall()
    assert found == [(1, "b", "x"), (2, "a", "y"), (3, "c", "z")]


# ---------------------------------------------------------------------- foreign keys


def test_children_before_their_parents_and_parents_deleted_before_their_children_go_through_in_one_call(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(
        "CREATE TABLE public.parents (id int PRIMARY KEY);"
        "CREATE TABLE public.children (id int PRIMARY KEY, "
        "parent int NOT NULL REFERENCES public.parents ON DELETE RESTRICT)"
    )
    parents = assigned(("id",), table="public.parents", sync="parents", mode="mirror")
    children = assigned(("id", "parent"), table="public.children", sync="children", mode="mirror")
    written = target.push(
        [batch_of(children, {"id": [1, 2, 3], "parent": [1, 2, 9]}), batch_of(parents, {"id": [1, 2]})]
    )
    assert [[(r.key, r.conflicts) for r in result.rejected] for result in written] == [[(key_text(3), True)], []]
    assert acknowledged(target, children) == {key_text(1), key_text(2)}
    deleted = target.push(
        [
            batch_of(parents, {"id": ["1", "2"]}, action=DELETE, digest=""),
            batch_of(children, {"id": ["1"]}, action=DELETE, digest=""),
        ]
    )
    assert [[r.key for r in result.rejected] for result in deleted] == [[key_text(2)], []]
    assert db.execute("SELECT id, parent FROM public.children").fetchall() == [(2, 2)]
    assert acknowledged(target, parents) == {key_text(2)}


def test_a_circle_of_foreign_keys_goes_through_where_it_can_be_deferred(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(
        "CREATE TABLE public.a (id int PRIMARY KEY, b int NOT NULL);"
        "CREATE TABLE public.b (id int PRIMARY KEY, a int NOT NULL REFERENCES public.a DEFERRABLE);"
        "ALTER TABLE public.a ADD FOREIGN KEY (b) REFERENCES public.b DEFERRABLE"
    )
    a = assigned(("id", "b"), table="public.a", sync="a")
    b = assigned(("id", "a"), table="public.b", sync="b")
    ids = list(range(2_000))
    results = target.push([batch_of(a, {"id": ids, "b": ids}), batch_of(b, {"id": ids, "a": ids})])
    assert [r.rejected for r in results] == [[], []]
    assert db.execute("SELECT count(*) FROM public.a JOIN public.b ON a.b = b.id").fetchone() == (2_000,)


# ---------------------------------------------------------------------- other writers


def test_a_deadlock_with_another_writer_is_tried_again_and_has_one_effect(
    db: psycopg.Connection, target: PostgresTarget, database: str
) -> None:
    """The other one holds row 2 and asks for row 1 while we hold 1 and ask for 2; the server ends us."""
    db.execute(
        "CREATE TABLE public.scores (id int PRIMARY KEY, u int, note text); CREATE TABLE public.seen (id int, u int);"
        "CREATE FUNCTION public.see() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN INSERT INTO public.seen VALUES (new.id, new.u); RETURN NULL; END $$"
    )
    push(target, {1: 0, 2: 0})
    db.execute("CREATE TRIGGER see AFTER UPDATE ON public.scores FOR EACH ROW EXECUTE FUNCTION public.see()")
    # A deadlock is looked for by who waits for this long: the other one never does within this test.
    with psycopg.connect(database, options="-c deadlock_timeout=1h") as other:
        other.execute("UPDATE public.scores SET note = 'other' WHERE id = 2")
        results: list[PushResult] = []
        thread = threading.Thread(target=lambda: results.append(push(target, {1: 1, 2: 1})))
        thread.start()
        waits = "SELECT pid FROM pg_stat_activity WHERE application_name = 'cdc crm' AND wait_event_type = 'Lock'"
        wait_until(lambda: db.execute(waits).fetchone())
        other.execute("UPDATE public.scores SET note = 'other' WHERE id = 1")  # returns once we have been ended
        other.commit()
        thread.join(60)
    assert [(r.written, r.rejected) for r in results] == [(2, [])]
    ours = db.execute("SELECT id, u FROM public.seen WHERE u = 1 ORDER BY id").fetchall()
    assert ours == [(1, 1), (2, 1)]
    assert db.execute("SELECT id, u, note FROM public.scores ORDER BY id").fetchall() == [(1, 1, "n"), (2, 1, "n")]


def test_a_lock_that_is_never_released_ends_in_unavailable_after_a_few_tries(
    db: psycopg.Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.execute("CREATE TABLE public.scores (id int PRIMARY KEY, u int, note text)")
    monkeypatch.setattr(target_module, "TRIES", 2)
    target = PostgresTarget(target_config(database, statement_timeout_s=0.4), no_ledgers)
    try:
        push(target, {1: 0})
        with psycopg.connect(database) as blocker:
            blocker.execute("SELECT FROM public.scores WHERE id = 1 FOR UPDATE")
            with pytest.raises(TargetUnavailable, match="LockNotAvailable"):
                push(target, {1: 1, 2: 1})
        assert held(db) == {1: "0"}
        assert acknowledged(target) == {key_text(1)}
        assert push(target, {1: 1, 2: 1}).written == 2
    finally:
        target.close()


def test_room_is_made_in_no_row_whose_key_hits_several(db: psycopg.Connection, target: PostgresTarget) -> None:
    db.execute(
        "CREATE TABLE public.scores (pk int PRIMARY KEY, id int, u text UNIQUE, note text);"
        "INSERT INTO public.scores VALUES (1, 1, 'a'), (2, 2, 'b'), (3, 3, 'kept'), (4, 3, 'kept too')"
    )
    result = push(target, {1: "b", 2: "a", 3: "z"}, assignment=assigned(("id", "u", "note"), mode="update"))
    assert [(r.key, r.reason) for r in result.rejected] == [(key_text(3), "the key hits several rows")]
    found = db.execute("SELECT pk, u FROM public.scores ORDER BY pk").fetchall()
    assert found == [(1, "b"), (2, "a"), (3, "kept"), (4, "kept too")]


def test_a_value_that_does_not_change_is_left_alone_while_room_is_made(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    """Children refer to it, and would have followed."""
    db.execute(
        "CREATE TABLE public.scores (id int PRIMARY KEY, own text UNIQUE, note text, u text UNIQUE);"
        "ALTER TABLE public.scores ADD UNIQUE (own, note);"
        "CREATE TABLE public.kid (own text REFERENCES public.scores (own) ON UPDATE SET NULL);"
        "INSERT INTO public.scores VALUES (1, 'x', 'p', '1'), (2, 'y', 'q', '2');"
        "INSERT INTO public.kid VALUES ('x'), ('y')"
    )
    given = {"id": [1, 2], "own": ["x", "y"], "note": ["pp", "qq"], "u": ["2", "1"]}
    (result,) = target.push([batch_of(assigned(list(given)), given)])
    assert result.rejected == []
    assert held(db) == {1: "2", 2: "1"}
    assert db.execute("SELECT own FROM public.kid ORDER BY 1").fetchall() == [("x",), ("y",)]


def test_a_constraint_trigger_may_ask_for_rows_of_a_batch_behind(
    db: psycopg.Connection, target: PostgresTarget
) -> None:
    db.execute(
        "CREATE TABLE public.scores (id int PRIMARY KEY, v int CHECK (v > 0));"
        "CREATE TABLE public.lines (id int PRIMARY KEY, v int REFERENCES public.scores);"
        "CREATE FUNCTION public.g() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF NOT EXISTS (SELECT FROM public.lines WHERE v = new.id) THEN RAISE EXCEPTION 'no lines'; END IF; "
        "RETURN NULL; END $$; CREATE CONSTRAINT TRIGGER g AFTER INSERT ON public.scores DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION public.g()"
    )
    orders = assigned(("id", "v"), sync="orders")
    lines = assigned(("id", "v"), sync="lines", table="public.lines")
    results = target.push([batch_of(orders, {"id": [1, 2], "v": [1, 1]}), batch_of(lines, {"id": [1, 2], "v": [1, 2]})])
    assert [r.rejected for r in results] == [[], []]
    (alone,) = target.push([batch_of(orders, {"id": [3], "v": [1]})])
    assert [r.key for r in alone.rejected] == [key_text(3)]
    found = db.execute("SELECT o.id, l.id FROM public.scores o FULL JOIN public.lines l ON l.v = o.id ORDER BY 1")
    assert found.fetchall() == [(1, 1), (2, 2)]
