"""What of a chunk may be appended: one story per rule, rows given as dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cdc.batch import SNAPSHOT_SEQ, Batch
from cdc.ports import RowsRead, Visibility
from cdc.table import Column, TableId, TableSchema
from cdc.window import Stamp, control_batch, fill_batch, must_read_again, read_batch, reconcile, unseen
from tests.support.changelogs import batch_of

ID = Column(name="id", attnum=1, type_oid=20, type_name="bigint", not_null=True)
NOTE = Column(name="note", attnum=2, type_oid=25, type_name="text")
BIG = Column(name="big", attnum=3, type_oid=25, type_name="text")
SCHEMA = TableSchema(table=TableId("public", "t"), oid=7, columns=(ID, NOTE, BIG), key=("id",), version=1)
STAMP = Stamp(epoch=1, lsn=900, seq=SNAPSHOT_SEQ + 5, run="run1", at_us=1_000_000)


def chunk(*rows: tuple[int, str, str]) -> RowsRead:
    ids, notes, bigs = zip(*rows, strict=True)
    columns = [pa.array(ids, pa.int64()), pa.array(notes, pa.string()), pa.array(bigs, pa.string())]
    return RowsRead(columns=columns, raw=None, rows=len(rows), last_key=(str(ids[-1]),), done=True)


def window(*changes: dict[str, Any]) -> list[Batch]:
    rows = [{"_lsn": 1000 + i, "_seq": i, "_xid": 50, **change} for i, change in enumerate(changes)]
    return [batch_of(SCHEMA, [row]) for row in rows]


def outcome(rows: RowsRead, changes: Sequence[Batch]) -> tuple[list[int], list[dict[str, Any]]]:
    """Ids that stay, and what the fill rows carry."""
    done = reconcile(SCHEMA, rows, changes)
    kept = rows.columns[0].take(pa.array(done.keep)).to_pylist()
    if done.fills is None:
        return kept, []
    batch = fill_batch(SCHEMA, done.fills, STAMP)
    names = ("id", "note", "big")
    cells = [batch.column(n).to_pylist() for n in names]
    unchanged = batch.system("_unchanged").to_pylist()
    return kept, [
        {**dict(zip(names, row, strict=True)), "unchanged": u} for *row, u in zip(*cells, unchanged, strict=True)
    ]


def test_rows_that_the_window_changed_are_left_out_and_the_others_stay() -> None:
    changes = window({"_op": "u", "id": "2", "note": "new", "big": "B"}, {"_op": "d", "id": "3"})
    assert outcome(chunk((1, "a", "A"), (2, "b", "B"), (3, "c", "C")), changes) == ([1], [])


def test_both_keys_of_a_key_change_are_left_out() -> None:
    changes = window({"_op": "u", "id": "9", "note": "n", "big": "X", "_before": {"id": "1"}})
    assert outcome(chunk((1, "a", "A"), (2, "b", "B"), (9, "z", "Z")), changes) == ([2], [])


def test_a_toast_value_that_no_message_carried_comes_from_the_chunk_alone() -> None:
    changes = window({"_op": "u", "id": "1", "note": "new", "_unchanged": ["big"]})
    fill = {"id": 1, "note": None, "big": "A", "unchanged": ["note"]}
    assert outcome(chunk((1, "old", "A")), changes) == ([], [fill])


def test_a_row_that_moves_takes_its_toast_value_along_under_its_last_key() -> None:
    changes = window(
        {"_op": "u", "id": "5", "note": "x", "_unchanged": ["big"], "_before": {"id": "1"}},
        {"_op": "u", "id": "6", "note": "y", "_unchanged": ["big"], "_before": {"id": "5"}},
    )
    fill = {"id": 6, "note": None, "big": "A", "unchanged": ["note"]}
    assert outcome(chunk((1, "old", "A")), changes) == ([], [fill])


def test_two_rows_that_swap_their_keys_swap_their_toast_values() -> None:
    changes = window(
        {"_op": "u", "id": "3", "note": "a", "_unchanged": ["big"], "_before": {"id": "1"}},
        {"_op": "u", "id": "1", "note": "b", "_unchanged": ["big"], "_before": {"id": "2"}},
        {"_op": "u", "id": "2", "note": "a", "_unchanged": ["big"], "_before": {"id": "3"}},
    )
    _, fills = outcome(chunk((1, "a", "A"), (2, "b", "B")), changes)
    assert {(f["id"], f["big"]) for f in fills} == {(1, "B"), (2, "A")}


def test_a_key_that_the_window_deletes_needs_no_value() -> None:
    changes = window({"_op": "u", "id": "1", "note": "n", "_unchanged": ["big"]}, {"_op": "d", "id": "1"})
    assert outcome(chunk((1, "old", "A")), changes) == ([], [])


def test_a_later_change_that_carries_the_value_makes_the_fill_unnecessary() -> None:
    changes = window(
        {"_op": "u", "id": "1", "note": "n", "_unchanged": ["big"]}, {"_op": "u", "id": "1", "note": "n", "big": "B"}
    )
    assert outcome(chunk((1, "old", "A")), changes) == ([], [])


def test_changes_that_the_snapshot_saw_do_not_count() -> None:
    sees_below_50 = Visibility(xmin=50, xmax=50, in_progress=frozenset())
    seen = batch_of(SCHEMA, [{"_op": "u", "_lsn": 1, "_xid": 49, "id": "1", "note": "n", "big": "B"}])
    mixed = batch_of(
        SCHEMA,
        [
            {"_op": "u", "_lsn": 1, "_xid": 49, "id": "1", "note": "n", "big": "B"},
            {"_op": "u", "_lsn": 2, "_xid": 51, "id": "2", "note": "n", "big": "B"},
        ],
    )
    assert unseen(seen, sees_below_50).data.num_rows == 0
    assert unseen(mixed, sees_below_50).column("id").to_pylist() == [2]


def test_a_truncate_or_another_schema_version_makes_the_chunk_void() -> None:
    assert not must_read_again(SCHEMA, [(1, False), (1, False)])
    assert must_read_again(SCHEMA, [(1, False), (1, True)])
    assert must_read_again(SCHEMA, [(2, False)])


def test_rows_of_a_snapshot_stand_right_after_the_position_and_count_on() -> None:
    rows = chunk((1, "a", "A"), (2, "b", "B"))
    batch = read_batch(SCHEMA, rows.columns, None, STAMP, 2)
    assert batch.system("_lsn").to_pylist() == [900, 900]
    assert batch.system("_seq").to_pylist() == [SNAPSHOT_SEQ + 5, SNAPSHOT_SEQ + 6]
    assert batch.system("_op").to_pylist() == ["r", "r"]
    control = control_batch(SCHEMA, {"event": "begin", "kind": "first"}, STAMP)
    assert dict(control.system("_raw")[0].as_py()) == {"event": "begin", "kind": "first"}
    assert control.column("id").null_count == 1


def test_ids_of_transactions_are_widened_to_the_nearest_around_the_wrap() -> None:
    epoch = 3 << 32
    visibility = Visibility(xmin=epoch + 5, xmax=epoch + 10, in_progress=frozenset({epoch + 7}))
    ids = np.array([0xFFFFFFF0, 4, 7, 9, 10, 11], np.uint32)
    assert visibility.sees(ids).tolist() == [True, True, False, True, False, False]
