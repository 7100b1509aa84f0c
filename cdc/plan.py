"""What a sync would change: a frozen result compared with what its target has acknowledged. Pure but for its files.

Every row has a key (JSON array of the key's texts) and a digest (over target table, column names and values). A row is
an insert if its key was never acknowledged, an update if it was with another digest, else unchanged. Rows with a NULL
in their key or a key that others share are held: none of them is sent, the rest of the plan is. Keys that were
acknowledged and are gone from the result are counted; an upsert leaves them alone.

The plan is a Parquet file of the rows to send, in the order of their keys, and its id is a hash of its content: equal
plans have equal ids. All comparison is done by DuckDB over columns, within the memory limit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdc.errors import ModelFailed
from cdc.models import frozen
from cdc.relations import MEMORY_LIMIT, THREADS, failure
from cdc.sqltext import literal, quoted

if TYPE_CHECKING:
    import duckdb

INSERT, UPDATE = "insert", "update"
ACTION, KEY, DIGEST = "cdc:action", "cdc:key", "cdc:digest"
"""Columns of the plan's file before those of the result."""
SAMPLES = 20
_ROWS_PER_GROUP = 32 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Rows of a plan. `held` are in no other count; `gone` are keys, not rows."""

    inserts: int = 0
    updates: int = 0
    unchanged: int = 0
    held: int = 0
    gone: int = 0

    @property
    def writes(self) -> int:
        return self.inserts + self.updates

    def to_json(self) -> dict[str, int]:
        return {
            "inserts": self.inserts,
            "updates": self.updates,
            "unchanged": self.unchanged,
            "held": self.held,
            "gone": self.gone,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an apply would write. `held` names some of the held rows: (key, reason)."""

    id: str
    path: Path
    counts: Counts
    held: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]

    def samples(self, action: str, limit: int = SAMPLES) -> list[str]:
        """Keys of the first rows with this action."""
        found: list[str] = []
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(columns=[ACTION, KEY]):
                keys = batch.column(KEY).filter(pc.equal(batch.column(ACTION), action))
                found += keys.slice(0, limit - len(found)).to_pylist()
                if len(found) >= limit:
                    break
        return found

    def batches(self, rows: int) -> Iterator[tuple[pa.Table, pa.Table]]:
        """The rows to write and their acknowledgements (`key`, `digest`), at most `rows` at a time."""
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(batch_size=rows):
                acks = pa.table({"key": batch.column(KEY), "digest": batch.column(DIGEST)})
                yield pa.Table.from_batches([batch]).select(list(self.columns)), acks

    def to_json(self) -> dict[str, Any]:
        """For operators: counts and keys, never values."""
        return {
            "plan": self.id,
            **self.counts.to_json(),
            "samples": {action: self.samples(action) for action in (INSERT, UPDATE)},
            "held_samples": [{"key": key, "reason": reason} for key, reason in self.held],
        }

    def remove(self) -> None:
        """Delete its file."""
        self.path.unlink(missing_ok=True)


def make_plan(
    result: Path,
    acknowledged: pa.Table,
    key: Sequence[str],
    path: Path,
    *,
    table: str,
    memory_limit: str = MEMORY_LIMIT,
    threads: int = THREADS,
    temp_dir: Path | None = None,
) -> Plan:
    """Compare the frozen `result` with `acknowledged` (Sink.acknowledged) and write the plan to `path`.

    Blocks; touches nothing but `path` and `temp_dir`. ModelFailed if the result lacks a key column or does not fit
    into the memory limit.
    """
    import duckdb

    columns = _columns(result, key)
    partial = path.with_name(path.name + ".partial")
    try:
        with frozen(result, memory_limit=memory_limit, threads=threads, temp_dir=temp_dir or path.parent) as (
            connection,
            relation,
        ):
            connection.register("acknowledged", acknowledged)
            _compare(connection, relation, columns, key, table)
            counts = _counts(connection)
            held = _held(connection)
            plan_id = _write(connection, relation, columns, partial, (table, *key))
        partial.replace(path)
    except duckdb.Error as error:
        raise failure(error) from error
    finally:
        partial.unlink(missing_ok=True)
    return Plan(id=plan_id, path=path, counts=counts, held=held, columns=tuple(columns))


def _columns(result: Path, key: Sequence[str]) -> list[str]:
    columns = list(pq.read_schema(result).names)
    missing = [column for column in key if column not in columns]
    if missing:
        raise ModelFailed(
            f"the result has no column {', '.join(missing)}, which the key names",
            hint=f"its columns: {', '.join(columns)}",
        )
    reserved = [column for column in columns if column.startswith("cdc:") or column == "file_row_number"]
    if reserved:
        raise ModelFailed(f"the result has a column {reserved[0]}, a name that plans use", hint="give it another name")
    return columns


def key_json(key: Sequence[str]) -> str:
    """SQL: the JSON array of the key's texts."""
    return f"to_json([{', '.join(f'{quoted(c)}::VARCHAR' for c in key)}])::VARCHAR"


def digest_sql(columns: Sequence[str], table: str, key: Sequence[str]) -> str:
    """SQL: the digest of a row. Columns stand in order of their names, so reordering a SELECT changes nothing; the
    target table and the key are in it, so pointing a sync elsewhere sends everything."""
    pairs = ", ".join(f"{literal(c)}, {quoted(c)}" for c in sorted(columns))
    head = literal(json.dumps([table, list(key)]))
    return f"md5({head} || json_object({pairs})::VARCHAR)"


def _compare(
    connection: duckdb.DuckDBPyConnection, relation: str, columns: Sequence[str], key: Sequence[str], table: str
) -> None:
    """The temporary table `planned`: one narrow row per row of the result, with what is to be done about it."""
    complete = " AND ".join(f"{quoted(c)} IS NOT NULL" for c in key)
    connection.execute(
        f"""
        CREATE TEMP TABLE digested AS
        SELECT file_row_number AS n, {key_json(key)} AS key, {digest_sql(columns, table, key)} AS digest,
               {complete} AS whole
        FROM {relation}"""
    )
    connection.execute(
        """
        CREATE TEMP TABLE planned AS
        WITH shared AS (SELECT key FROM digested WHERE whole GROUP BY key HAVING count(*) > 1)
        SELECT d.n, d.key, d.digest,
               CASE WHEN NOT d.whole THEN 'null key' WHEN s.key IS NOT NULL THEN 'duplicate key'
                    WHEN a.key IS NULL THEN 'insert' WHEN a.digest IS DISTINCT FROM d.digest THEN 'update' END AS action
        FROM digested d LEFT JOIN shared s ON d.key = s.key LEFT JOIN acknowledged a ON d.key = a.key"""
    )


def _counts(connection: duckdb.DuckDBPyConnection) -> Counts:
    found: dict[str | None, int] = dict(
        connection.execute("SELECT action, count(*) FROM planned GROUP BY action").fetchall()
    )
    gone = connection.execute("SELECT count(*) FROM acknowledged a ANTI JOIN digested d ON d.key = a.key").fetchone()
    return Counts(
        inserts=found.get(INSERT, 0),
        updates=found.get(UPDATE, 0),
        unchanged=found.get(None, 0),
        held=found.get("null key", 0) + found.get("duplicate key", 0),
        gone=gone[0] if gone else 0,
    )


def _held(connection: duckdb.DuckDBPyConnection) -> tuple[tuple[str, str], ...]:
    rows = connection.execute(
        "SELECT DISTINCT key, action FROM planned WHERE action LIKE '% key' ORDER BY key LIMIT ?", [SAMPLES]
    ).fetchall()
    return tuple((key, reason) for key, reason in rows)


def _write(
    connection: duckdb.DuckDBPyConnection, relation: str, columns: Sequence[str], path: Path, about: Sequence[str]
) -> str:
    """Write the rows to send, ordered by key, and return the plan's id."""
    content = hashlib.sha256(json.dumps(list(about)).encode())
    names = ", ".join(f"r.{quoted(c)}" for c in columns)
    reader = connection.sql(
        f"SELECT p.action AS {quoted(ACTION)}, p.key AS {quoted(KEY)}, p.digest AS {quoted(DIGEST)}, {names} "
        f"FROM {relation} r JOIN planned p ON p.n = r.file_row_number "
        f"WHERE p.action IN ('{INSERT}', '{UPDATE}') ORDER BY p.key"
    ).to_arrow_reader(_ROWS_PER_GROUP)
    with pq.ParquetWriter(path, reader.schema, compression="zstd", compression_level=1) as writer:
        for batch in reader:
            lines = pc.binary_join_element_wise(batch.column(0), batch.column(2), batch.column(1), " ")
            content.update(_joined(lines))
            writer.write_batch(batch)
    return content.hexdigest()[:16]


def _joined(lines: pa.Array) -> bytes:
    """The lines, each ended, as one run of bytes, however they are chunked."""
    ended = pc.binary_join_element_wise(lines, "\n", "").cast(pa.large_string())
    data = ended.buffers()[2]
    return b"" if data is None else data.to_pybytes()[: pc.sum(pc.binary_length(ended)).as_py() or 0]
