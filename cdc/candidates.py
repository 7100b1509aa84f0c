"""Rows of the lake that a filtered resync has not met although they may belong to its filter (rule 14).

The filter is Postgres' SQL, and what is in the lake may be the wrong one: so nothing is decided here. DuckDB evaluates
the same text over `current` as well as it can; whatever it finds true, and the run has not written, is a key for
Postgres to be asked for. One key too many does no harm, and where DuckDB cannot evaluate the filter, that is said.
Nothing is written, and no value but keys leaves the lake.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from cdc.errors import ModelFailed
from cdc.lake.current import MERGED
from cdc.lake.delta import DeltaLog
from cdc.lake.layout import changelog_path, current_path, system_name, system_prefix
from cdc.lake.reduce import Order
from cdc.ports import ObjectStore
from cdc.relations import Relation, open_views
from cdc.runs import Run
from cdc.sqltext import quoted
from cdc.table import TableSchema
from cdc.types import arrow_fields, pg_text

CANDIDATES_MAX = 10_000
"""Keys of one look; the others are found when these have been written."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Texts of keys to ask Postgres for. `note`: why there may be more that nobody finds; empty if there are not."""

    keys: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""


def candidates(store: ObjectStore, source: str, schema: TableSchema, run: Run, *, temp_dir: Path) -> Candidates | None:
    """Keys of `current` that meet the run's filter and were written before its begin row, or by nobody whom the lake
    knows. None until `current` holds the run's chunks. Blocking; StoreUnavailable may be tried again.
    """
    begin = Order(run.details["epoch"], run.first_lsn, run.details["begin_seq"])
    import duckdb

    table = schema.table
    delta = DeltaLog(store, current_path(source, table))
    if not delta.exists():
        return None
    delta.refresh()
    version, merged = delta.version(), delta.token(MERGED)
    if merged is None:
        return None
    changelog = DeltaLog(store, changelog_path(source, table))
    landed = changelog.token(f"run/{run.id}", merged)
    if landed is None or landed < run.chunk_no:
        return None
    lsn = changelog.token(f"stream/{begin.epoch}", merged)
    prefix = system_prefix(c.name for c in schema.columns)
    at = ", ".join(quoted(system_name(name, prefix)) for name in ("_epoch", "_lsn", "_seq"))
    older = f"row({at}) < row({begin.epoch}, {begin.lsn}, {begin.seq})"
    # Nobody but us writes there rightly, and we write no position that has not landed.
    newer = f"({quoted(system_name('_epoch', prefix))}, {quoted(system_name('_lsn', prefix))}) > ({begin.epoch}, {lsn})"
    names = [*schema.key, system_name("_raw", prefix)]
    view = f"{quoted(source)}.{quoted(Relation(source, table).name)}"
    query = (
        f"select {', '.join(map(quoted, names))} from (select * from {view} where {older} or {newer})"
        f" where ({run.where_sql}\n) limit {CANDIDATES_MAX}"
    )
    try:
        with open_views(store, [Relation(source, table)], {source: {table: version}}, temp_dir=temp_dir) as connection:
            found: pa.Table = connection.sql(query).to_arrow_table()
    except (duckdb.Error, ModelFailed) as e:
        return Candidates(note=f"rows of the lake were not looked through: DuckDB does not run it ({type(e).__name__})")
    fields = {f.name: f.type for f in arrow_fields(schema)}
    raw = found.column(len(schema.key)).combine_chunks()
    texts = []
    for i, name in enumerate(schema.key):
        text = pg_text(found.column(i).cast(fields[name]).combine_chunks(), schema.column(name))
        texts.append(pc.coalesce(text, pc.map_lookup(raw, name, "first")).to_pylist())
    return Candidates([key for key in zip(*texts, strict=True) if None not in key])
