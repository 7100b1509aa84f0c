"""Planning: a frozen result against what was acknowledged, compared with a plain Python oracle."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdc.config_serving import ModelConfig, SyncConfig
from cdc.errors import ConfigError, ModelFailed
from cdc.plan import DIGEST, KEY, Plan, make_plan
from cdc.sync import definition

NOTHING = pa.schema([("key", pa.string()), ("digest", pa.string())]).empty_table()


def plan_of(
    tmp_path: Path, rows: pa.Table, acknowledged: pa.Table = NOTHING, *, key: tuple[str, ...] = ("id",), **options: str
) -> Plan:
    result = tmp_path / "result.parquet"
    pq.write_table(rows, result, row_group_size=7)
    return make_plan(result, acknowledged, key, tmp_path / "plan.parquet", table=options.get("table", "public.t"))


def acks_of(plan: Plan) -> pa.Table:
    """What a target that took the whole plan has acknowledged."""
    return pa.concat_tables([NOTHING, *(acks for _, acks in plan.batches(10))])


def test_a_first_plan_inserts_everything_in_the_order_of_the_keys(tmp_path: Path) -> None:
    rows = pa.table({"id": [3, 1, 2], "v": ["c", "a", None]})
    plan = plan_of(tmp_path, rows)
    assert plan.counts.to_json() == {"inserts": 3, "updates": 0, "unchanged": 0, "held": 0, "gone": 0}
    batches = list(plan.batches(2))
    assert [b.to_pylist() for b, _ in batches] == [[{"id": 1, "v": "a"}, {"id": 2, "v": None}], [{"id": 3, "v": "c"}]]
    assert [a.column("key").to_pylist() for _, a in batches] == [['["1"]', '["2"]'], ['["3"]']]
    assert plan.samples("insert", 2) == ['["1"]', '["2"]']


def test_what_was_acknowledged_is_unchanged_until_a_value_differs(tmp_path: Path) -> None:
    rows = pa.table({"id": [1, 2, 3], "v": ["a", "b", None]})
    acknowledged = acks_of(plan_of(tmp_path, rows))
    again = plan_of(tmp_path, rows, acknowledged)
    assert (again.counts.unchanged, again.counts.writes) == (3, 0)
    assert list(again.batches(10)) == []
    changed = plan_of(tmp_path, pa.table({"id": [1, 3, 4], "v": ["a", "", None]}), acknowledged)
    assert changed.counts.to_json() == {"inserts": 1, "updates": 1, "unchanged": 1, "held": 0, "gone": 1}
    assert changed.samples("update") == ['["3"]'], "an empty text is not NULL"


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
    assert plan.counts.to_json() == {"inserts": 2, "updates": 0, "unchanged": 0, "held": 5, "gone": 0}
    assert dict(plan.held) == {
        '["1","x"]': "duplicate key", '[null,"x"]': "null key", "[null,null]": "null key", '["3",null]': "null key"
    }  # fmt: skip
    assert plan.samples("insert") == ['["2","y"]', '["2","z"]']
    document = plan.to_json()
    assert (document["held"], len(document["held_samples"])) == (5, 4)


def test_keys_that_look_alike_when_joined_are_different(tmp_path: Path) -> None:
    rows = pa.table({"a": ["x", "x,", 'x","y', ""], "b": ["y", "y", "", 'x","y'], "v": [1, 2, 3, 4]})
    plan = plan_of(tmp_path, rows, key=("a", "b"))
    assert (plan.counts.inserts, plan.counts.held) == (4, 0)
    assert [json.loads(k) for k in plan.samples("insert")] == sorted(
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


def test_random_results_are_planned_as_a_plain_loop_would(tmp_path: Path, rng: random.Random) -> None:
    acknowledged: dict[str, str] = {}
    for _ in range(6):
        n = rng.choice([0, 1, 40, 400])
        ids = [rng.choice([None, *range(300)]) if rng.random() < 0.5 else i + 1000 for i in range(n)]
        rows = pa.table({"id": pa.array(ids, pa.int64()), "v": [rng.choice(["a", "b", None]) for _ in range(n)]})
        acks = pa.table({"key": list(acknowledged), "digest": list(acknowledged.values())}, schema=NOTHING.schema)
        plan = plan_of(tmp_path, rows, acks)
        digests = acks_of(plan_of(tmp_path, rows))
        now = dict(zip(digests.column("key").to_pylist(), digests.column("digest").to_pylist(), strict=True))
        keys = Counter(ids)
        assert set(now) == {json.dumps([str(i)]) for i, times in keys.items() if i is not None and times == 1}
        plan = plan_of(tmp_path, rows, acks)
        seen = {json.dumps([None if i is None else str(i)]) for i in ids}
        assert plan.counts.to_json() == {
            "inserts": sum(k not in acknowledged for k in now),
            "updates": sum(k in acknowledged and acknowledged[k] != d for k, d in now.items()),
            "unchanged": sum(acknowledged.get(k) == d for k, d in now.items()),
            "held": n - len(now),
            "gone": sum(k not in seen for k in acknowledged),
        }
        sent = acks_of(plan)
        acknowledged |= dict(zip(sent.column("key").to_pylist(), sent.column("digest").to_pylist(), strict=True))
        file = pq.read_table(plan.path)
        assert file.column(KEY).to_pylist() == sorted(file.column(KEY).to_pylist())
        assert file.column(DIGEST).null_count == 0


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
        "import sys, json, pathlib; from tests.unit.test_sync import *\n"
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
    with pytest.raises(ConfigError, match="mirror"):
        definition(SyncConfig(**fields, sql="select 1", mode="mirror"), None)
