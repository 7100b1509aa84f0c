"""`make bench-fresh`: what reading the fresh view of a table costs, beside reading it as it is merged.

A table of `--rows` rows, merged, and a tail of `--changes` unmerged changes in ten landings: inserts, updates, deletes
at random keys; of the updates a share (`--lacking`) lacks an unchanged value. Reads by DuckDB as `cdc query` does them,
in turn and several rounds: every cell of every row, one column, a count, one key; then the merge of the same tail,
which is what the view saves. CPU seconds of the process, so that a busy machine compares too; medians. Writes
build/bench-fresh.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from cdc.batch import OPTIONAL, Batch, batch_schema, system_type
from cdc.lake.current import CurrentTable
from cdc.relations import Relation, open_views
from cdc.table import Column, TableId, TableSchema
from tests.support.changelogs import Changelog, batch_of
from tests.support.daemon import ROOT
from tests.support.views import Told

TABLE = TableId("public", "bench")
SCHEMA = TableSchema(
    table=TABLE,
    oid=7,
    key=("id",),
    columns=(
        Column(name="id", attnum=1, type_oid=20, type_name="bigint"),
        Column(name="customer", attnum=2, type_oid=23, type_name="integer"),
        Column(name="amount", attnum=3, type_oid=1700, typmod=(12 << 16 | 2) + 4, type_name="numeric(12,2)"),
        Column(name="note", attnum=4, type_oid=25, type_name="text"),
        Column(name="created", attnum=5, type_oid=1184, type_name="timestamp with time zone"),
        Column(name="body", attnum=6, type_oid=25, type_name="text"),
    ),
)
COLUMNS = ", ".join(c.name for c in SCHEMA.columns)
READS = {
    "every cell": f"select sum(hash(columns(*))) from (select {COLUMNS} from shop.bench)",
    "one column": "select sum(amount) from shop.bench",
    "count": "select count(*) from shop.bench",
    "one key": "select * from shop.bench where id = 4711",
}


def changes(ids: np.ndarray, ops: np.ndarray, lsn: int, random: np.random.Generator, *, lacking: float = 0.0) -> Batch:
    """Rows of these keys; `lacking`: the share of them whose body was not sent."""
    n = len(ids)
    lacks = (random.random(n) < lacking) & (ops == "u")
    hexes = random.integers(0, 1 << 62, (n, 4)).astype(str)
    body = np.char.add(np.char.add(hexes[:, 0], hexes[:, 1]), np.char.add(hexes[:, 2], hexes[:, 3]))
    values = {
        "id": pa.array(ids, pa.int64()),
        "customer": pa.array(random.integers(0, 1000, n), pa.int32()),
        "amount": pa.array(random.integers(0, 10**6, n).astype(float)).cast(pa.decimal128(12, 2)),
        "note": pa.array(np.char.add("note ", random.integers(0, 10**9, n).astype(str))),
        "created": pa.array(random.integers(0, 10**15, n), pa.timestamp("us", tz="UTC")),
        "body": pa.array(body, mask=lacks),
    }
    system = {
        "_op": pa.array(ops.astype(str)),
        "_epoch": pa.array(np.zeros(n, np.int64)),
        "_lsn": pa.array(np.arange(lsn, lsn + n)),
        "_seq": pa.array(np.zeros(n, np.int64)),
        "_xid": pa.array(np.arange(n)),
        "_committed_at": pa.array(np.arange(lsn, lsn + n), pa.timestamp("us", tz="UTC")),
        "_unchanged": pa.array([["body"] if lack else None for lack in lacks], pa.list_(pa.string())),
    }
    arrays = [system.get(f.name, values.get(f.name)) for f in batch_schema(SCHEMA, OPTIONAL)]
    arrays = [a.combine_chunks() if isinstance(a, pa.ChunkedArray) else a for a in arrays]
    filled = [
        pa.nulls(n, system_type(f.name, SCHEMA)) if a is None else a
        for a, f in zip(arrays, batch_schema(SCHEMA, OPTIONAL), strict=True)
    ]
    return Batch(SCHEMA, pa.RecordBatch.from_arrays(filled, schema=batch_schema(SCHEMA, OPTIONAL)))


def table(root: Path, rows: int, tail: int, lacking: float) -> tuple[Changelog, CurrentTable]:
    """The table, merged, and its tail, landed."""
    random = np.random.default_rng(1)
    lake = Changelog(root / "lake", SCHEMA)
    lines = [
        {"_op": "s", "_run": "r", "_lsn": lsn, "_raw": {"event": event, "kind": "first", "oid": "7"}}
        for lsn, event in ((1, "begin"), (rows + 5, "end"))
    ]
    ids = random.permutation(rows)
    first = [batch_of(SCHEMA, lines[:1]), changes(ids, np.full(rows, "c"), 2, random), batch_of(SCHEMA, lines[1:])]
    lake.commit(first, lsn=rows + 5, complete=True)
    current = CurrentTable(lake.store, lake.source, TABLE, temp_dir=root / "scratch")
    current.merge(None, SCHEMA)  # type: ignore[arg-type]
    lsn = rows + 10
    for _ in range(10):
        n = tail // 10
        ops = random.choice(["u", "d", "c"], n, p=[0.8, 0.1, 0.1])
        # What is deleted is not changed again: that would be a change of a row without older values.
        old = random.integers(0, rows // 10, n) * 10 + np.where(ops == "d", 0, random.integers(1, 10, n))
        keys = np.where(ops == "c", rows + lsn + np.arange(n), old)
        lake.commit([changes(keys, ops, lsn, random, lacking=lacking)], lsn=lsn + n)
        lsn += n + 10
    return lake, current


def measured(act: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--changes", type=int, default=100_000)
    parser.add_argument("--lacking", type=float, default=0.0, help="share of the changes that lack an unchanged value")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="cdc-bench-") as folder:
        root = Path(folder)
        lake, current = table(root, args.rows, args.changes, args.lacking)
        relation = Relation(lake.source, TABLE)
        runs: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for _ in range(args.rounds):
            for way, told in (("merged", None), ("fresh", Told(SCHEMA))):
                for name, sql in READS.items():

                    def read(told: Told | None = told, sql: str = sql) -> None:
                        with open_views(lake.store, [relation], fresh=told, note=print, temp_dir=root) as connection:
                            connection.sql(sql).to_arrow_table()

                    runs.setdefault(name, {}).setdefault(way, []).append(measured(read))

                def opened(told: Told | None = told) -> None:
                    with open_views(lake.store, [relation], fresh=told, note=print, temp_dir=root):
                        pass

                runs.setdefault("opening alone", {}).setdefault(way, []).append(measured(opened))
        for name, ways in runs.items():
            found[name] = {way: (_median(times, 0), _median(times, 1)) for way, times in ways.items()}
            merged, fresh = found[name]["merged"][1], found[name]["fresh"][1]
            print(f"{name:14} merged {merged:6.3f} fresh {fresh:6.3f} CPU s, {fresh / merged:.2f} times")
        print("merging the tail: {:.2f} s, {:.2f} CPU s".format(*measured(lambda: current.merge(None, SCHEMA))))  # type: ignore[arg-type]
    out = ROOT / "build" / "bench-fresh.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"arguments": vars(args), "seconds_and_cpu_s": found}, indent=2) + "\n")


def _median(times: list[tuple[float, float]], which: int) -> float:
    return statistics.median(t[which] for t in times)


if __name__ == "__main__":
    main()
