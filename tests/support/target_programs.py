"""Random programs of a hostile target: two tables under a mirror each, one under append, and what becomes of them.

A program is a list of wanted results, generated from a seed. `planned` compares with what the target has acknowledged;
digests are the rows themselves, so an acknowledgement says what the target has to hold. `expected_rejects` is an oracle
of its own: from the target's rows before a push it derives which changes the target must refuse, by the rules of its
constraints and not by trying. Run as a module it is the child that gets killed.

Values of a unique column are wanted by one row each, and no child is wanted whose parent is to go, so who is refused
does not depend on an order. No content comes twice in a row, so each effect that a trigger logs is a new one.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import psycopg

from cdc.sink import DELETE, UPDATE, Assignment, Batch, PushResult
from connectors.postgres.target import PostgresTarget
from tests.support.targets import assigned, batch_of, key_text, no_ledgers, target_config

DDL = """
CREATE TABLE public.parents (
    id int PRIMARY KEY, u text UNIQUE, n int NOT NULL UNIQUE, d date UNIQUE DEFERRABLE, note varchar(8) NOT NULL,
    own text NOT NULL DEFAULT 'own', twice int GENERATED ALWAYS AS (n * 2) STORED, CHECK (note <> 'bad'));
CREATE TABLE public.children (
    id int PRIMARY KEY, parent int REFERENCES public.parents, tag text NOT NULL, own text NOT NULL DEFAULT 'own');
CREATE TABLE public.events (id int, note text);
CREATE TABLE public.seen (n bigserial, relation text, op text, id int, content text);
CREATE FUNCTION public.see() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
    IF tg_op = 'DELETE' THEN
        INSERT INTO public.seen (relation, op, id) VALUES (tg_relname, tg_op, old.id);
    ELSE
        INSERT INTO public.seen (relation, op, id, content) VALUES (tg_relname, tg_op, new.id, new::text);
    END IF;
    RETURN NULL;
END $$;
CREATE FUNCTION public.grumble() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF new.tag = 'boom' THEN RAISE EXCEPTION 'no %', new.tag; END IF;
    RETURN new;
END $$;
CREATE TRIGGER see AFTER INSERT OR UPDATE OR DELETE ON public.parents FOR EACH ROW EXECUTE FUNCTION public.see();
CREATE TRIGGER see AFTER INSERT OR UPDATE OR DELETE ON public.children FOR EACH ROW EXECUTE FUNCTION public.see();
CREATE TRIGGER grumble BEFORE INSERT OR UPDATE ON public.children FOR EACH ROW EXECUTE FUNCTION public.grumble();
ALTER TABLE public.children ENABLE ROW LEVEL SECURITY;
CREATE POLICY most ON public.children USING (true) WITH CHECK (id <> 5);
"""

PARENTS = assigned(("id", "u", "n", "d", "note"), table="public.parents", sync="parents", mode="mirror")
CHILDREN = assigned(("id", "parent", "tag"), table="public.children", sync="children", mode="mirror")
EVENTS = assigned(("id", "note"), table="public.events", sync="events", mode="append")
SYNCS = (PARENTS, CHILDREN, EVENTS)
UNIQUE = ("u", "n", "d")

Row = dict[str, Any]
Wanted = dict[str, dict[str, Row]]
"""Sync → id as text → row."""


@dataclass
class Program:
    """What is wanted, step by step, and how each step is pushed."""

    seed: int
    with_row_security: bool
    steps: list[Wanted] = field(default_factory=list)
    batch_rows: list[int] = field(default_factory=list)


def make_program(seed: int, steps: int = 6) -> Program:
    rng = random.Random(seed)
    program = Program(seed, with_row_security=rng.random() < 0.5)
    wanted: Wanted = {a.sync: {} for a in SYNCS}
    counter = 0
    for _ in range(steps):
        wanted = {sync: {i: dict(row) for i, row in rows.items()} for sync, rows in wanted.items()}
        for _ in range(rng.randint(2, 14)):
            counter += 1
            _mutate(rng, wanted, counter)
        program.steps.append(wanted)
        program.batch_rows.append(rng.choice((1, 3, 50)))
    return program


def _mutate(rng: random.Random, wanted: Wanted, counter: int) -> None:
    parents, children, events = wanted["parents"], wanted["children"], wanted["events"]
    kind = rng.choice(
        ("parent", "parent", "turn", "turn", "turn", "bad", "drop", "child", "child", "orphan", "boom", "event")
    )
    one = str(rng.randint(1, 12))
    if kind == "parent":
        parents[one] = {
            "id": int(one), "u": rng.choice((f"u{counter}", None)), "n": counter,
            "d": f"2{counter // 300:03}-{counter // 25 % 12 + 1:02}-{counter % 25 + 1:02}", "note": f"n{counter}",
        }  # fmt: skip
    elif kind == "turn" and len(parents) > 1:
        # Two or more rows hand a unique value on in a circle.
        chosen = rng.sample(sorted(parents), rng.randint(2, min(4, len(parents))))
        column = rng.choice(UNIQUE)
        values = [parents[i][column] for i in chosen]
        for i, value in zip(chosen, values[1:] + values[:1], strict=True):
            parents[i][column] = value
    elif kind == "bad" and one in parents:
        parents[one]["note"] = rng.choice(("bad", "far too long", None))
    elif kind == "drop":
        rows = rng.choice((parents, children))
        rows.pop(one, None)
        if rows is parents:
            for i in [i for i, child in children.items() if child["parent"] == int(one)]:
                del children[i]
    elif kind in ("child", "orphan", "boom"):
        parent = 999 if kind == "orphan" else int(rng.choice(sorted(parents) or ["998"]))
        tag = "boom" if kind == "boom" else f"t{counter}"
        children[one] = {"id": int(one), "parent": parent, "tag": tag}
    elif kind == "event":
        events[one] = {"id": int(one), "note": f"e{counter}"}


def digest_of(row: Row) -> str:
    return json.dumps(row, sort_keys=True)


def acknowledged(target: PostgresTarget, assignment: Assignment) -> dict[str, str]:
    found = target.acknowledged(assignment).rows.to_pydict()
    return dict(zip(found["key"], found["digest"], strict=True))


def planned(target: PostgresTarget, wanted: Wanted, batch_rows: int, run: str) -> list[Batch]:
    """What is not acknowledged as wanted, in batches: upserts with parents first, then deletes with children first."""
    writes, deletes = [], []
    for assignment in SYNCS:
        acked = acknowledged(target, assignment)
        rows = [r for r in wanted[assignment.sync].values() if acked.get(key_text(r["id"])) != digest_of(r)]
        for piece in _pieces(sorted(rows, key=lambda r: r["id"]), batch_rows):
            columns = {c: [None if r[c] is None else str(r[c]) for r in piece] for c in assignment.columns}
            writes.append(batch_of(assignment, columns, action=UPDATE, digest=[digest_of(r) for r in piece], run=run))
        gone = sorted({json.loads(k)[0] for k in acked} - set(wanted[assignment.sync]))
        if assignment.mode == "mirror":
            for piece in _pieces(gone, batch_rows):
                deletes.insert(0, batch_of(assignment, {"id": piece}, action=DELETE, digest="", run=run))
    return writes + deletes


def _pieces(rows: list[Any], size: int) -> Iterable[list[Any]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def rejected_of(batches: list[Batch], results: list[PushResult]) -> set[tuple[str, str]]:
    """(sync, key) of every row that was refused."""
    return {(b.assignment.sync, r.key) for b, result in zip(batches, results, strict=True) for r in result.rejected}


# ---------------------------------------------------------------------- the oracle


def contents(db: psycopg.Connection) -> Wanted:
    """What the target holds of the mirrored columns, by id."""
    found: Wanted = {}
    for assignment in (PARENTS, CHILDREN):
        columns = ", ".join(f"{c}::text" if c == "d" else c for c in assignment.columns)
        rows = db.execute(f"SELECT {columns} FROM {assignment.table}").fetchall()  # type: ignore[arg-type]
        found[assignment.sync] = {str(r[0]): dict(zip(assignment.columns, r, strict=True)) for r in rows}
    return found


def expected_rejects(before: Wanted, batches: list[Batch], *, with_row_security: bool) -> set[tuple[str, str]]:
    """The changes that the target has to refuse, whatever the order: those that break a rule although every other
    change that may go through does."""
    changes: dict[tuple[str, str], Row | None] = {}
    for batch in batches:
        if batch.assignment.mode == "append":
            continue
        for row, digest in zip(batch.rows.to_pylist(), batch.acks.column("digest").to_pylist(), strict=True):
            changes[batch.assignment.sync, str(row["id"])] = None if batch.action == DELETE else json.loads(digest)
    refused: set[tuple[str, str]] = set()
    while True:
        after = {sync: dict(rows) for sync, rows in before.items()}
        for (sync, i), row in changes.items():
            if (sync, i) not in refused:
                after[sync].pop(i, None)
                if row is not None:
                    after[sync][i] = row
        more = {
            (sync, i)
            for (sync, i), row in changes.items()
            if (sync, i) not in refused and _breaks(sync, i, row, before, after, with_row_security)
        }
        if not more:
            return {(sync, key_text(i)) for sync, i in refused}
        refused |= more


def _breaks(sync: str, i: str, row: Row | None, before: Wanted, after: Wanted, with_row_security: bool) -> bool:
    if row is None:
        return (
            sync == "parents" and i in before[sync] and any(c["parent"] == int(i) for c in after["children"].values())
        )
    if sync == "children":
        if row["tag"] == "boom" or (with_row_security and i == "5"):
            return True
        return str(row["parent"]) not in after["parents"]
    if row["note"] in (None, "bad") or len(row["note"]) > 8:
        return True
    others = [r for j, r in after["parents"].items() if j != i]
    return any(row[c] is not None and any(r[c] == row[c] for r in others) for c in UNIQUE)


# ---------------------------------------------------------------------- the child


def main() -> None:
    """Push the steps of a program from one on, each in a call of its own or batch by batch; says what it has begun."""
    dsn, seed, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    program = make_program(seed)
    target = PostgresTarget(target_config(dsn), no_ledgers)
    for step in range(first, len(program.steps)):
        sys.stdout.write(f"{step}\n")
        sys.stdout.flush()
        batches = planned(target, program.steps[step], program.batch_rows[step], f"run-{step}")
        if random.Random(seed + step).random() < 0.5:
            target.push(batches)
        else:
            for batch in batches:
                target.push([batch])


if __name__ == "__main__":
    main()
