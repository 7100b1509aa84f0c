"""Planning: a frozen result against what was acknowledged, compared with a plain Python oracle."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdc.config_serving import ModelConfig, SyncConfig
from cdc.errors import ConfigError, ModelFailed
from cdc.plan import Asked, Plan, load, make_plan
from cdc.planning import definition
from cdc.sink import ACKS, IN_DOUBT, Assignment, Batch

NOTHING = ACKS.empty_table()


def plan_of(
    tmp_path: Path,
    rows: pa.Table,
    acknowledged: pa.Table = NOTHING,
    *,
    key: tuple[str, ...] = ("id",),
    table: str = "public.t",
    mode: str = "upsert",
    mapping: dict[str, str] | None = None,
    asked: Asked | None = None,
) -> Plan:
    result = tmp_path / "result.parquet"
    pq.write_table(rows, result, row_group_size=7)
    columns = tuple(mapping or rows.column_names)
    assignment = Assignment(sync="s", table=table, key=key, mode=mode, columns=columns)
    return make_plan(result, acknowledged, assignment, tmp_path / "plan", mapping=mapping, asked=asked)


def acks_of(plan: Plan) -> pa.Table:
    """What a target that took the whole plan has acknowledged."""
    return pa.concat_tables([NOTHING, *(b.acks for b in plan.batches(10) if b.action != "delete")])


def after(acknowledged: pa.Table, plan: Plan) -> pa.Table:
    """What is acknowledged once a target that had acknowledged this has taken the plan."""
    known = {r["key"]: r for r in acknowledged.to_pylist()}
    for batch in plan.batches(3):
        for row in batch.acks.to_pylist():
            if batch.action == "delete":
                del known[row["key"]]
            else:
                known[row["key"]] = {**row, "version": row["version"] + 1}
    return pa.Table.from_pylist(list(known.values()), schema=ACKS)


def counted(plan: Plan) -> dict[str, int]:
    """The counts that are not zero, but for what the result and the target have."""
    return {k: v for k, v in asdict(plan.counts).items() if v and k not in ("rows", "acknowledged")}


def sent(plan: Plan, rows: int = 100) -> list[tuple[str, list[dict[str, object]]]]:
    return [(b.action, b.rows.to_pylist()) for b in plan.batches(rows)]


def test_a_first_plan_inserts_everything_in_the_order_of_the_keys(tmp_path: Path) -> None:
    rows = pa.table({"id": [3, 1, 2], "v": ["c", "a", None]})
    plan = plan_of(tmp_path, rows)
    assert counted(plan) == {"inserts": 3}
    batches: list[Batch] = list(plan.batches(2))
    assert [b.rows.to_pylist() for b in batches] == [
        [{"id": 1, "v": "a"}, {"id": 2, "v": None}], [{"id": 3, "v": "c"}]
    ]  # fmt: skip
    assert [b.acks.column("key").to_pylist() for b in batches] == [['["1"]', '["2"]'], ['["3"]']]
    assert plan.samples("insert", 2) == [{"key": '["1"]'}, {"key": '["2"]'}]
    assert plan.samples("insert", 1, values=True) == [{"key": '["1"]', "values": {"id": 1, "v": "a"}}]


def test_what_was_acknowledged_is_unchanged_until_a_value_differs(tmp_path: Path) -> None:
    rows = pa.table({"id": [1, 2, 3], "v": ["a", "b", None]})
    acknowledged = acks_of(plan_of(tmp_path, rows))
    again = plan_of(tmp_path, rows, acknowledged)
    assert (again.counts.unchanged, again.counts.writes) == (3, 0)
    assert list(again.batches(10)) == []
    changed = plan_of(tmp_path, pa.table({"id": [1, 3, 4], "v": ["a", "", None]}), acknowledged)
    assert counted(changed) == {"inserts": 1, "updates": 1, "unchanged": 1, "gone": 1}
    assert changed.samples("update") == [{"key": '["3"]', "columns": ["v"]}], "an empty text is not NULL"
    assert changed.differs == {"v": 1}


def test_the_order_of_rows_and_columns_changes_nothing_but_another_target_or_name_sends_everything(
    tmp_path: Path,
) -> None:
    rows = pa.table({"id": [1, 2, 3, 4], "v": ["a", "b", "c", "d"], "w": [1, 2, 3, 4]})
    first = plan_of(tmp_path, rows)
    acknowledged = acks_of(first)
    moved = rows.select(["w", "id", "v"]).take([3, 1, 0, 2])
    assert plan_of(tmp_path, moved, acknowledged).counts.unchanged == 4
    assert plan_of(tmp_path, moved).id == first.id
    assert plan_of(tmp_path, rows, acknowledged, table="public.other").counts.updates == 4
    assert plan_of(tmp_path, rows.rename_columns(["id", "v", "x"]), acknowledged).counts.updates == 4


def test_equal_plans_have_equal_ids_and_different_ones_do_not(tmp_path: Path) -> None:
    rows = pa.table({"id": [1, 2], "v": ["a", "b"]})
    acknowledged = acks_of(plan_of(tmp_path, rows.slice(0, 1)))
    ids = [
        plan_of(tmp_path, rows).id,
        plan_of(tmp_path, rows, acknowledged).id,
        plan_of(tmp_path, pa.table({"id": [1, 2], "v": ["a", "c"]})).id,
        plan_of(tmp_path, rows, table="public.other").id,
        plan_of(tmp_path, rows.slice(0, 0)).id,
    ]
    assert len(set(ids)) == len(ids)
    assert plan_of(tmp_path, rows).id == ids[0]


def test_null_and_duplicate_keys_are_held_and_the_rest_goes(tmp_path: Path) -> None:
    rows = pa.table({"a": [1, 1, None, 2, 2, None, 3], "b": ["x", "x", "x", "y", "z", None, None], "v": range(7)})
    plan = plan_of(tmp_path, rows, key=("a", "b"))
    assert counted(plan) == {"inserts": 2, "held": 5}
    assert dict(plan.held) == {
        '["1","x"]': "duplicate key", '[null,"x"]': "null key", "[null,null]": "null key", '["3",null]': "null key"
    }  # fmt: skip
    assert [s["key"] for s in plan.samples("insert")] == ['["2","y"]', '["2","z"]']
    document = plan.to_json()
    assert (document["held"], len(document["held_samples"])) == (5, 4)


def test_keys_that_look_alike_when_joined_are_different(tmp_path: Path) -> None:
    rows = pa.table({"a": ["x", "x,", 'x","y', ""], "b": ["y", "y", "", 'x","y'], "v": [1, 2, 3, 4]})
    plan = plan_of(tmp_path, rows, key=("a", "b"))
    assert (plan.counts.inserts, plan.counts.held) == (4, 0)
    assert [json.loads(s["key"]) for s in plan.samples("insert")] == sorted(
        [["x", "y"], ["x,", "y"], ['x","y', ""], ["", 'x","y']], key=lambda k: json.dumps(k, separators=(",", ":"))
    )


@pytest.mark.parametrize(
    "column",
    [
        pa.array([float("nan"), float("inf"), -0.0, 0.1], pa.float64()),
        pa.array([b"\x00\xff", b"", None, b"'"], pa.binary()),
        pa.array([[1, None], [], None, [2]], pa.list_(pa.int64())),
        pa.array([{"x": 1}, {"x": None}, None, {"x": 2}], pa.struct([("x", pa.int64())])),
        pa.array([[("k", 1)], [], None, [("k", None)]], pa.map_(pa.string(), pa.int64())),
        pa.array([1, 2, None, 3], pa.timestamp("us", "UTC")),
        pa.array(["\x01\u2028é💥", "\\", '"', "a\nb"], pa.string()),
        pa.nulls(4),
    ],
    ids=lambda c: str(c.type),
)
def test_every_type_has_a_digest_that_tells_its_values_apart(tmp_path: Path, column: pa.Array) -> None:
    plan = plan_of(tmp_path, pa.table({"id": [1, 2, 3, 4], "v": column}))
    acknowledged = acks_of(plan)
    assert acknowledged.column("digest").null_count == 0
    assert plan_of(tmp_path, pa.table({"id": [1, 2, 3, 4], "v": column}), acknowledged).counts.unchanged == 4
    rotated = pa.table({"id": [1, 2, 3, 4], "v": column.take(pa.array([1, 2, 3, 0]))})
    expected = 0 if column.null_count == 4 else 4
    assert plan_of(tmp_path, rotated, acknowledged).counts.updates == expected


def test_what_becomes_of_a_row_is_the_modes(tmp_path: Path) -> None:
    before, now = pa.table({"id": [1, 2, 3], "v": ["a", "b", "c"]}), pa.table({"id": [2, 3, 4], "v": ["b", "x", "d"]})
    three, four = {"id": 3, "v": "x"}, {"id": 4, "v": "d"}
    expected: dict[str, tuple[dict[str, int], list[tuple[str, list[dict[str, object]]]]]] = {
        "upsert": (
            {"inserts": 1, "updates": 1, "unchanged": 1, "gone": 1}, [("update", [three]), ("insert", [four])]
        ),
        "mirror": (
            {"inserts": 1, "updates": 1, "unchanged": 1, "gone": 1, "deletes": 1},
            [("delete", [{"id": 1}]), ("update", [three]), ("insert", [four])],
        ),
        "insert": ({"inserts": 1, "ignored": 1, "unchanged": 1, "gone": 1}, [("insert", [four])]),
        "update": ({"updates": 2, "unchanged": 1, "gone": 1}, [("update", [three, four])]),
        "append": ({"inserts": 2, "unchanged": 1, "gone": 1}, [("insert", [three, four])]),
    }  # fmt: skip
    for mode, (counts, batches) in expected.items():
        acknowledged = acks_of(plan_of(tmp_path, before, mode=mode))
        plan = plan_of(tmp_path, now, acknowledged, mode=mode)
        assert (mode, counted(plan), sent(plan)) == (mode, counts, batches)


def test_a_resync_sends_what_is_unchanged_and_goes_on_where_it_was_cut_short(tmp_path: Path) -> None:
    rows = pa.table({"id": [1, 2, 3], "v": ["a", "b", "c"]})
    known = after(NOTHING, plan_of(tmp_path, rows, mode="mirror"))
    again = Asked(generation=1)
    plan = plan_of(tmp_path, rows.slice(1), known, mode="mirror", asked=again)
    assert counted(plan) == {"resends": 2, "gone": 1, "deletes": 1}
    assert [a for a, _ in sent(plan)] == ["delete", "update"]
    first = next(b for b in plan.batches(1) if b.action == "update")
    half = {r["key"]: r for r in known.to_pylist()} | {r["key"]: r for r in first.acks.to_pylist()}
    known = pa.Table.from_pylist(list(half.values()), schema=ACKS)
    assert counted(plan_of(tmp_path, rows, known, asked=again)) == {"resends": 2, "unchanged": 1}
    assert counted(plan_of(tmp_path, rows, known)) == {"unchanged": 3}, "only a resync asks for it"


@pytest.mark.parametrize(
    "key",
    [
        pa.array([b"\xaaAB", b"\xaa\xab"], pa.binary()),
        pa.array([2.0, 0.1], pa.float64()),
        pa.array([10**15, 20], pa.timestamp("us", "UTC")),
        pa.array([[3], [4, None]], pa.list_(pa.int64())),
        pa.array(["01", "1"], pa.string()),
    ],
    ids=lambda k: str(k.type),
)
def test_deletes_carry_the_keys_values_as_writes_do(tmp_path: Path, key: pa.Array) -> None:
    rows = pa.table({"id": key, "v": [1, 2]})
    known = acks_of(plan_of(tmp_path, rows, mode="mirror"))
    plan = plan_of(tmp_path, rows.slice(1), known, mode="mirror")
    (batch,) = plan.batches(9)
    assert (batch.action, batch.rows.column("id").to_pylist()) == ("delete", [key[0].as_py()])
    assert batch.rows.column("id").type == next(plan_of(tmp_path, rows).batches(9)).rows.column("id").type


def test_keys_of_another_form_than_before_are_not_deleted(tmp_path: Path) -> None:
    """`2.0` and `2` are two keys and one row at the target."""
    known = acks_of(plan_of(tmp_path, pa.table({"id": [1.0, 2.0]})))
    now = pa.table({"id": [1, 2]})
    with pytest.raises(ModelFailed, match="the type of the key has changed"):
        plan_of(tmp_path, now, known, mode="mirror")
    assert counted(plan_of(tmp_path, now, known)) == {"inserts": 2, "gone": 2}, "an upsert deletes nothing"


def test_a_resync_counts_on_from_what_the_target_has_seen(tmp_path: Path) -> None:
    rows = pa.table({"id": [1, 2]})
    first = plan_of(tmp_path, rows, acks_of(plan_of(tmp_path, rows)), asked=Asked(generation=6, resync=True))
    assert (counted(first), first.about["generation"]) == ({"resends": 2}, 7)
    known = acks_of(first)
    again = plan_of(tmp_path, rows, known, asked=Asked(resync=True))
    assert (counted(again), again.about["generation"]) == ({"resends": 2}, 8), "our own count was lost"


def test_rows_whose_answer_was_lost_are_sent_again_and_are_no_changes(tmp_path: Path) -> None:
    rows = pa.table({"id": [1, 2, 3], "v": ["a", "b", "c"]})
    keys = ['["1"]', '["2"]', '["9"]']
    known = pa.table({"key": keys, "digest": [IN_DOUBT] * 3, "version": [4, 0, 0]}, schema=ACKS)
    plan = plan_of(tmp_path, rows, known, mode="mirror")
    assert counted(plan) == {"resends": 2, "inserts": 1, "gone": 1, "deletes": 1}
    assert [b.acks.column("version").to_pylist() for b in plan.batches(9)] == [[0], [4, 0], [0]]
    assert counted(plan_of(tmp_path, rows, known, mode="insert")) == {"inserts": 3, "gone": 1}


def test_a_plan_may_be_limited_to_keys_and_may_only_take_note(tmp_path: Path) -> None:
    rows = pa.table({"id": [1, 2, 3, 4], "v": ["a", "b", "c", "d"]})
    known = acks_of(plan_of(tmp_path, rows.slice(0, 3)))
    only = pa.chunked_array([['["1"]', '["4"]', '["9"]']])
    assert counted(plan_of(tmp_path, rows, known, asked=Asked(only=only))) == {"inserts": 1, "unchanged": 3}
    plan = plan_of(tmp_path, rows, known, mode="mirror", asked=Asked(only=only, again=True))
    assert counted(plan) == {"inserts": 1, "resends": 1, "unchanged": 2}
    plan = plan_of(tmp_path, rows, known, asked=Asked(only=only, adopt=True))
    assert (counted(plan)["adopts"], {b.action for b in plan.batches(9)}) == (1, {"adopt"})


def test_only_mapped_columns_count_under_the_names_of_the_target(tmp_path: Path) -> None:
    rows = pa.table({"k": [1, 2], "a": ["x", "y"], "noise": [1, 2]})
    mapping = {"id": "k", "name": "a"}
    first = plan_of(tmp_path, rows, mapping=mapping)
    assert sent(first) == [("insert", [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}])]
    known = acks_of(first)
    noisy = rows.set_column(2, "noise", pa.array([7, 8]))
    assert counted(plan_of(tmp_path, noisy, known, mapping=mapping)) == {"unchanged": 2}
    with pytest.raises(ModelFailed, match="no column b, which `columns` names"):
        plan_of(tmp_path, rows, mapping={"id": "k", "name": "b"})


def test_an_update_names_the_columns_that_differ(tmp_path: Path) -> None:
    rows = pa.table({"id": [1, 2, 3], "a": ["x", "y", None], "b": [1.5, 2.5, 3.5]})
    known = acks_of(plan_of(tmp_path, rows))
    now = pa.table({"id": [1, 2, 3], "a": ["x", "z", "w"], "b": [1.5, 9.5, 3.5]})
    plan = plan_of(tmp_path, now, known)
    assert plan.samples("update") == [{"key": '["2"]', "columns": ["a", "b"]}, {"key": '["3"]', "columns": ["a"]}]
    assert plan.differs == {"a": 2, "b": 1}
    wider = plan_of(tmp_path, now.append_column("c", pa.array([1, 1, 1])), known)
    assert wider.differs == {"a": 3, "b": 3, "c": 3}, "with another set of columns nothing is known of single ones"


def test_a_plan_is_kept_whole_and_read_back(tmp_path: Path) -> None:
    rows = pa.table({"id": [1, 2, 3], "v": ["a", "b", "c"]})
    known = acks_of(plan_of(tmp_path, rows))
    plan = plan_of(tmp_path, rows.slice(1), known, mode="mirror", asked=Asked(generation=1, about={"cause": "test"}))
    expected = sent(plan)
    moved = plan.moved(tmp_path / "held" / "here")
    found = load(
        tmp_path / "held" / "here", Assignment(sync="s", table="public.t", key=("id",), mode="mirror", columns=())
    )
    assert (found.id, found.counts, found.about, sent(found)) == (plan.id, plan.counts, plan.about, expected)
    shutil.rmtree(moved.folder)
    with pytest.raises(ModelFailed, match="not there any more"):
        load(tmp_path / "held" / "here", plan.assignment)


@pytest.mark.parametrize("mode", ["insert", "update", "upsert", "mirror", "append"])
def test_random_results_are_planned_as_a_plain_loop_would(tmp_path: Path, rng: random.Random, mode: str) -> None:
    known = NOTHING
    for _ in range(5):
        n = rng.choice([0, 1, 40, 400])
        ids = [rng.choice([None, *range(300)]) if rng.random() < 0.5 else i + 1000 for i in range(n)]
        rows = pa.table({"id": pa.array(ids, pa.int64()), "v": [rng.choice(["a", "b", None]) for _ in range(n)]})
        digests = acks_of(plan_of(tmp_path, rows))
        now = dict(zip(digests.column("key").to_pylist(), digests.column("digest").to_pylist(), strict=True))
        keys = Counter(ids)
        assert set(now) == {json.dumps([str(i)]) for i, times in keys.items() if i is not None and times == 1}
        acked = {r["key"]: r["digest"] for r in known.to_pylist()}
        new = {k for k in now if k not in acked}
        changed = {k for k, d in now.items() if k in acked and acked[k] != d}
        gone = {k for k in acked if k not in {json.dumps([None if i is None else str(i)]) for i in ids}}
        sends = {
            "insert": {"insert": new}, "update": {"update": new | changed}, "append": {"insert": new | changed},
            "upsert": {"insert": new, "update": changed},
            "mirror": {"insert": new, "update": changed, "delete": gone},
        }[mode]  # fmt: skip
        plan = plan_of(tmp_path, rows, known, mode=mode)
        found: dict[str, list[str]] = {}
        for batch in plan.batches(7):
            found.setdefault(batch.action, []).extend(batch.acks.column("key").to_pylist())
        assert found == {a: sorted(k) for a, k in sends.items() if k}
        assert counted(plan).get("held", 0) == n - len(now)
        known = after(known, plan)


def test_a_result_without_the_key_or_with_a_reserved_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFailed, match="no column id"):
        plan_of(tmp_path, pa.table({"v": [1]}))
    for name in ("cdc:key", "file_row_number"):
        with pytest.raises(ModelFailed, match="a name that plans use"):
            plan_of(tmp_path, pa.table({"id": [1], name: [2]}))


def test_digests_are_the_same_in_another_process(tmp_path: Path) -> None:
    """State outlives the process: were a digest salted, every restart would send everything."""
    rows = pa.table({"id": [1, 2], "v": [0.1, None]})
    here = acks_of(plan_of(tmp_path, rows)).to_pydict()
    code = (
        "import sys, json, pathlib; from tests.unit.test_plan import *\n"
        "rows = pa.table({'id': [1, 2], 'v': [0.1, None]})\n"
        "print(json.dumps(acks_of(plan_of(pathlib.Path(sys.argv[1]), rows)).to_pydict()))"
    )
    root = Path(__file__).parents[2]
    there = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, check=True)
    assert json.loads(there.stdout) == here


def test_a_sync_takes_its_sql_from_its_model_or_itself() -> None:
    fields = {"name": "s", "target": "t", "table": "public.x", "key": ("id",)}
    model = ModelConfig(name="m", sql="select 1 as id", key=("id",))
    assert definition(SyncConfig(**fields, model="m"), model) == "select 1 as id"
    assert definition(SyncConfig(**fields, sql="select 2 as id"), None) == "select 2 as id"
    with pytest.raises(ConfigError, match="no model m"):
        definition(SyncConfig(**fields, model="m"), None)
