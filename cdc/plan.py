"""What a sync would change: a frozen result compared with what its target has acknowledged. Pure but for its files.

Every row has a key (JSON array of the key's texts) and a digest. A row is new if its key is not acknowledged, changed
if it is with other content, due again if it was acknowledged before the last `resync` was ordered, else unchanged.
What becomes of each is the mode's: an upsert leaves keys alone that are gone from the result, a mirror deletes those
that the target has acknowledged, an insert sends new keys only, an update never inserts, an append sends new content.
Rows with a NULL in their key or a key that others share are held: none of them is sent, the rest of the plan is.

A plan is a folder: the rows to write and the keys to delete, each in order of their keys, and what was counted. It does
not change once it is made, so it can be kept until somebody approves it. Its id is a hash of its content: equal plans
have equal ids. All comparison is done by DuckDB over columns, within the memory limit. Whether a plan may be carried
out is not asked here (cdc.guarding).

A digest is `<content>:<columns>:<generation>:<place>`: 32 hex digits over target table, column names and values, by
which rows are compared; 4 for each column beside the key, in order of their names, which only say *where* a row differs
(one change in 65,536 is not shown by them); how many resyncs had been ordered; and 8 for target and key. What was
acknowledged by another target or another key is no word about this one: it counts as never acknowledged, and is not
deleted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdc.errors import ModelFailed
from cdc.models import frozen
from cdc.relations import MEMORY_LIMIT, THREADS, failure, open_files
from cdc.sink import ACKS, ADOPT, DELETE, IN_DOUBT, INSERT, UPDATE, Assignment, Batch
from cdc.sqltext import literal, quoted

if TYPE_CHECKING:
    import duckdb

RESEND = "resend"
"""Sent though nothing has changed that anybody knows of: by a resync, or because an answer was lost."""
UNCHANGED, IGNORED = "unchanged", "ignored"
ACTION, KEY, DIGEST, VERSION, DIFFERS = "cdc:action", "cdc:key", "cdc:digest", "cdc:version", "cdc:differs"
"""Columns of the plan's files before those of the result."""
SAMPLES = 20
_ROWS_PER_GROUP = 32 * 1024
_ROWS_PER_PART = 250_000
_WRITES, _DELETES, _ABOUT = "writes.parquet", "deletes.parquet", "plan.json"
_SENT = {RESEND: UPDATE}
"""Actions of the plan that a sink knows under another name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Rows of a plan. `acknowledged`: keys that the target had; `gone` of them are not in the result (and in `deletes`
    too if the mode deletes). `ignored` have changed, but the mode does not send changes."""

    rows: int = 0
    acknowledged: int = 0
    inserts: int = 0
    updates: int = 0
    resends: int = 0
    adopts: int = 0
    deletes: int = 0
    unchanged: int = 0
    ignored: int = 0
    held: int = 0
    gone: int = 0

    @property
    def writes(self) -> int:
        """Rows that would be sent or deleted."""
        return self.inserts + self.updates + self.resends + self.deletes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an apply would write. `held` names some of the held rows: (key, reason); `differs` says in how many updates
    each column differs; `about` is the caller's (whence the rows come)."""

    id: str
    folder: Path
    assignment: Assignment
    counts: Counts
    held: tuple[tuple[str, str], ...] = ()
    differs: dict[str, int] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def samples(self, action: str, limit: int = SAMPLES, *, values: bool = False) -> list[dict[str, Any]]:
        """The first rows with this action: key, for updates the columns that differ, and the new `values` on demand."""
        found: list[dict[str, Any]] = []
        with pq.ParquetFile(self.folder / (_DELETES if action == DELETE else _WRITES)) as file:
            for batch in file.iter_batches():
                rows = batch.filter(pc.equal(batch.column(ACTION), action)).slice(0, limit - len(found))
                for row in rows.to_pylist():
                    sample: dict[str, Any] = {"key": row[KEY]}
                    if action == UPDATE:
                        sample["columns"] = row[DIFFERS]
                    if values and action != DELETE:
                        sample["values"] = {c: row[c] for c in self.assignment.columns}
                    found.append(sample)
                if len(found) >= limit:
                    break
        return found

    def batches(self, rows: int, run: str = "") -> Iterator[Batch]:
        """What is to be done, at most `rows` at a time, each batch of one action: deletes, then updates, then inserts,
        so that a unique value is free before another row takes it."""
        yield from self.deletes(rows, run)
        yield from self.writes(rows, run)

    def deletes(self, rows: int, run: str = "") -> Iterator[Batch]:
        """The deletes among `batches`."""
        return self._batches(_DELETES, self.assignment.key, rows, run)

    def writes(self, rows: int, run: str = "") -> Iterator[Batch]:
        """The others among `batches`."""
        return self._batches(_WRITES, self.assignment.columns, rows, run)

    def _batches(self, name: str, columns: Sequence[str], rows: int, run: str) -> Iterator[Batch]:
        with pq.ParquetFile(self.folder / name) as file:
            for read in file.iter_batches(batch_size=rows):
                for action, start, stop in _runs_of(read.column(ACTION)):
                    part = read.slice(start, stop - start)
                    acks = pa.table([part.column(KEY), part.column(DIGEST), part.column(VERSION)], schema=ACKS)
                    yield Batch(
                        assignment=self.assignment,
                        action=_SENT.get(action, action),
                        rows=pa.Table.from_batches([part]).select(list(columns)),
                        acks=acks,
                        run=run,
                        label=action,
                        differs=part.column(DIFFERS),
                        untried=not self.counts.acknowledged,
                    )

    def to_json(self, *, values: bool = False) -> dict[str, Any]:
        """For operators: counts, keys and columns; values only on demand."""
        return {
            "plan": self.id,
            **asdict(self.counts),
            "differs": self.differs,
            "samples": {a: self.samples(a, values=values) for a in (INSERT, UPDATE, RESEND, DELETE)},
            "held_samples": [{"key": key, "reason": reason} for key, reason in self.held],
        }

    def moved(self, folder: Path) -> Plan:
        """Move it to `folder`, replacing what is there, with what is not in its files of rows; durable on return."""
        about = {
            "id": self.id, "columns": self.assignment.columns, "counts": asdict(self.counts), "held": self.held,
            "differs": self.differs, "about": self.about,
        }  # fmt: skip
        (self.folder / _ABOUT).write_text(json.dumps(about))
        for file in self.folder.iterdir():
            # Somebody may approve it tomorrow, behind a power cut.
            with file.open("rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.rename(folder)
        return replace(self, folder=folder)


def load(folder: Path, assignment: Assignment) -> Plan:
    """The plan in `folder`, made for `assignment`, whose columns it knows itself. ModelFailed if it is not whole."""
    try:
        read: dict[str, Any] = json.loads((folder / _ABOUT).read_text())
        for name in (_WRITES, _DELETES):
            pq.read_metadata(folder / name)
        return Plan(
            id=read["id"],
            folder=folder,
            assignment=replace(assignment, columns=tuple(read["columns"])),
            counts=Counts(**read["counts"]),
            held=tuple((key, reason) for key, reason in read["held"]),
            differs=read["differs"],
            about=read["about"],
        )
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ModelFailed("the plan is not there any more", hint="have a new one made: `cdc sync apply`") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the plan is made for, beside the difference. `only`: keys (one string column) that it is limited to.
    `again`: unchanged rows among them are sent too. `adopt`: nothing is sent, what differs counts as acknowledged.
    `generation`: resyncs that were ordered; rows acknowledged before the last one are sent again. `resync`: one more is
    ordered now."""

    generation: int = 0
    resync: bool = False
    only: pa.ChunkedArray | None = None
    again: bool = False
    adopt: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)


def make_plan(
    result: Path,
    acknowledged: pa.Table,
    assignment: Assignment,
    folder: Path,
    *,
    mapping: Mapping[str, str] | None = None,
    asked: Asked | None = None,
    memory_limit: str = MEMORY_LIMIT,
    threads: int = THREADS,
    temp_dir: Path | None = None,
) -> Plan:
    """Compare the frozen `result` with `acknowledged` (cdc.sink.ACKS) and write the plan into `folder`.

    `mapping`: column of the target -> column of the result; left out, columns keep their names. Blocks; touches nothing
    but `folder` (replaced; what is there after an error is no plan) and `temp_dir`. ModelFailed if a column is missing
    or memory does not suffice.
    """
    import duckdb

    asked = asked or Asked()
    columns = dict(mapping) if mapping else {c: c for c in assignment.columns}
    _check(result, assignment, columns)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options: dict[str, Any] = {"memory_limit": memory_limit, "threads": threads, "temp_dir": temp_dir or folder.parent}
    try:
        with frozen(result, **options) as (connection, relation):
            comparison = _Comparison(connection, relation, assignment, columns, asked)
            comparison.compare(acknowledged)
            counts, held = comparison.counts(), comparison.held()
            content = hashlib.sha256(comparison.head.encode())
            comparison.write(folder / _DELETES, comparison.deletes(), content)
            comparison.write(folder / _WRITES, comparison.writes(), content)
            differs = comparison.differs(folder / _WRITES)
    except duckdb.Error as error:
        raise failure(error) from error
    return Plan(
        id=content.hexdigest()[:16], folder=folder, assignment=assignment, counts=counts, held=tuple(held),
        differs=differs, about={**asked.about, "generation": comparison.generation},
    )  # fmt: skip


def key_json(key: Sequence[str]) -> str:
    """SQL: the JSON array of the key's texts."""
    return f"to_json([{', '.join(f'{quoted(c)}::VARCHAR' for c in key)}])::VARCHAR"


def key_of(rows: pa.Table, key: Sequence[str]) -> pa.ChunkedArray:
    """The keys of these rows, as they stand in a plan; null where one of the key's columns is. Blocks briefly."""
    complete = " AND ".join(f"{quoted(c)} IS NOT NULL" for c in key)
    with open_files() as connection:
        connection.register("given", rows.select(list(key)))
        query = f"SELECT CASE WHEN {complete} THEN {key_json(key)} END AS key FROM given"
        return connection.sql(query).to_arrow_table().column("key").cast(pa.string())


def content_sql(columns: Mapping[str, str], assignment: Assignment) -> str:
    """SQL: what a row holds, as 32 hex digits. Columns stand in order of their names, so reordering a SELECT changes
    nothing; the target table and the key are in it, so pointing a sync elsewhere sends everything."""
    pairs = ", ".join(f"{literal(c)}, {quoted(columns[c])}" for c in sorted(columns))
    return f"md5({literal(json.dumps([assignment.table, list(assignment.key)]))} || json_object({pairs})::VARCHAR)"


class _Comparison:
    """The queries of one plan, over one connection."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        relation: str,
        assignment: Assignment,
        columns: Mapping[str, str],
        asked: Asked,
    ) -> None:
        self._connection = connection
        self._relation = relation
        self._assignment = assignment
        self._columns = columns
        self._asked = asked
        self._rows = 0
        self.generation = asked.generation
        self._place = hashlib.md5(json.dumps([assignment.place, assignment.key]).encode()).hexdigest()[:8]
        self._ours = f"split_part(digest, ':', 4) IN ('', '{self._place}')"
        self._others = sorted(c for c in columns if c not in assignment.key)
        self.head = json.dumps([assignment.table, assignment.key, assignment.mode, sorted(columns.items())])

    def compare(self, acknowledged: pa.Table) -> None:
        """Temporary tables: `planned`, the rows of the result that are not simply unchanged, with what becomes of
        them; `gone`, the acknowledged keys that the result lacks. Done by parts of the keys, so that what is held in
        memory does not grow with the result."""
        connection, key = self._connection, [self._columns[c] for c in self._assignment.key]
        connection.register("acknowledged", acknowledged)
        if self._asked.only is not None:
            connection.register("only_keys", pa.table({"key": self._asked.only}))
        connection.execute(
            "CREATE TEMP TABLE planned (n BIGINT, key VARCHAR, digest VARCHAR, version BIGINT, acked VARCHAR, "
            "action VARCHAR)"
        )
        connection.execute("CREATE TEMP TABLE gone (key VARCHAR, version BIGINT)")
        self._rows = self._number(f"SELECT count(*) FROM {self._relation}")
        if self._asked.resync:
            # By what the target has seen, for the count of our own may be lost.
            newest = "coalesce(max(try_cast(split_part(digest, ':', 3) AS INT)), 0)"
            known = self._number(f"SELECT {newest} FROM acknowledged")
            self.generation = max(self.generation, known) + 1
        parts = max(1, math.ceil(max(self._rows, acknowledged.num_rows) / _ROWS_PER_PART))
        complete = " AND ".join(f"{quoted(c)} IS NOT NULL" for c in key)
        only = "" if self._asked.only is None else " AND a.key IN (FROM only_keys)"
        for part in range(parts):
            mine = f"% {parts} = {part}"
            for statement in (
                f"CREATE TEMP TABLE digested AS SELECT file_row_number AS n, {key_json(key)} AS key, "
                f"{content_sql(self._columns, self._assignment)} AS digest, {complete} AS whole "
                f"FROM {self._relation} WHERE hash({key_json(key)}) {mine}",
                f"CREATE TEMP TABLE known AS SELECT key, CASE WHEN {self._ours} THEN digest ELSE '' END AS digest, "
                f"version FROM acknowledged WHERE hash(key) {mine}",
                # By hash first: hardly any result has a key twice, and numbers take a third of the room of keys.
                "CREATE TEMP TABLE suspects AS "
                "SELECT hash(key) AS h FROM digested WHERE whole GROUP BY h HAVING count(*) > 1",
                "CREATE TEMP TABLE shared AS SELECT key FROM digested WHERE whole AND hash(key) IN (FROM suspects) "
                "GROUP BY key HAVING count(*) > 1",
                f"""
                INSERT INTO planned
                SELECT d.n, d.key, d.digest, coalesce(a.version, 0) AS version, a.digest AS acked,
                       CASE WHEN NOT d.whole THEN 'null key' WHEN d.key IN (FROM shared) THEN 'duplicate key'
                            ELSE {self._action_sql()} END AS action
                FROM digested d LEFT JOIN known a ON d.key = a.key WHERE action <> '{UNCHANGED}'""",
                "INSERT INTO gone SELECT a.key, a.version FROM known a "
                f"ANTI JOIN digested d ON d.key = a.key WHERE a.digest <> ''{only}",
                *(f"DROP TABLE {name}" for name in ("digested", "known", "suspects", "shared")),
            ):
                connection.execute(statement)

    def _action_sql(self) -> str:
        """What becomes of a row with a key of its own."""
        mode, asked = self._assignment.mode, self._asked
        new = {"update": UPDATE}.get(mode, INSERT)
        changed = {"insert": IGNORED, "append": INSERT}.get(mode, UPDATE)
        again = {"insert": UNCHANGED, "append": INSERT}.get(mode, RESEND)
        doubted = {"insert": INSERT, "append": INSERT}.get(mode, RESEND)
        if asked.adopt:
            new = changed = again = doubted = ADOPT
        old = f"coalesce(try_cast(split_part(a.digest, ':', 3) AS INT), 0) < {self.generation}"
        due = "true" if asked.again else old
        cases = (
            ("coalesce(a.digest, '') = ''", new),
            (f"a.digest = '{IN_DOUBT}'", doubted),
            ("substr(a.digest, 1, 32) <> d.digest", changed),
            (due, again),
        )
        whens = " ".join(f"WHEN {condition} THEN '{action}'" for condition, action in cases)
        action = f"CASE {whens} ELSE '{UNCHANGED}' END"
        if asked.only is None:
            return action
        return f"CASE WHEN d.key NOT IN (FROM only_keys) THEN '{UNCHANGED}' ELSE {action} END"

    def counts(self) -> Counts:
        """How many rows of each kind."""
        found: dict[str, int] = dict(
            self._connection.execute("SELECT action, count(*) FROM planned GROUP BY action").fetchall()
        )
        gone = self._number("SELECT count(*) FROM gone")
        return Counts(
            rows=self._rows,
            acknowledged=self._number(f"SELECT count(*) FROM acknowledged WHERE digest <> '' AND {self._ours}"),
            inserts=found.get(INSERT, 0),
            updates=found.get(UPDATE, 0),
            resends=found.get(RESEND, 0),
            adopts=found.get(ADOPT, 0),
            deletes=gone if self._deletes else 0,
            unchanged=self._rows - sum(found.values()),
            ignored=found.get(IGNORED, 0),
            held=found.get("null key", 0) + found.get("duplicate key", 0),
            gone=gone,
        )

    def _number(self, query: str) -> int:
        # All of it: a result that is not read to its end is in the way of the next statement.
        return int(self._connection.execute(query).fetchall()[0][0])

    @property
    def _deletes(self) -> bool:
        return self._assignment.mode == "mirror" and not self._asked.adopt

    def held(self) -> list[tuple[str, str]]:
        """Some of the held keys, and why."""
        rows = self._connection.execute(
            "SELECT DISTINCT key, action FROM planned WHERE action LIKE '% key' ORDER BY key LIMIT ?", [SAMPLES]
        ).fetchall()
        return [(key, reason) for key, reason in rows]

    def deletes(self) -> str:
        """SQL: the keys to delete, in order, with the key's columns as the result has them.

        ModelFailed if keys that were acknowledged are written in another way than the result's: `2.0` and `2` are two
        keys here and one row at the target, and to delete one would take the other.
        """
        types = self._key_types()
        parts = [f"TRY_CAST(key::JSON->>{i} AS {kind})" for i, kind in enumerate(types)]
        if self._deletes:
            again = f"to_json([{', '.join(f'{part}::VARCHAR' for part in parts)}])::VARCHAR"
            strange = self._number(f"SELECT count(*) FROM gone WHERE {again} IS DISTINCT FROM key")
            if strange:
                raise ModelFailed(
                    f"{strange} keys that would be deleted are no {', '.join(types)} as the result writes them: the "
                    "type of the key has changed",
                    hint="give the key its former type in the query; or forget what was sent, and nothing is "
                    f"deleted: `cdc sync reset-state {self._assignment.sync}`",
                )
        columns = ", ".join(f"{part} AS {quoted(c)}" for part, c in zip(parts, self._assignment.key, strict=True))
        return (
            f"SELECT '{DELETE}' AS {quoted(ACTION)}, key AS {quoted(KEY)}, '' AS {quoted(DIGEST)}, "
            f"version AS {quoted(VERSION)}, []::VARCHAR[] AS {quoted(DIFFERS)}, {columns} FROM gone "
            f"WHERE {'true' if self._deletes else 'false'} ORDER BY key"
        )

    def _key_types(self) -> list[str]:
        names = ", ".join(quoted(self._columns[c]) for c in self._assignment.key)
        found = self._connection.execute(f"DESCRIBE SELECT {names} FROM {self._relation}").fetchall()
        return [str(row[1]) for row in found]

    def writes(self) -> str:
        """SQL: the rows to send; what exists before what is new, then in the order of their keys."""
        hashes = [f"coalesce(substr(md5(r.{quoted(self._columns[c])}::VARCHAR), 1, 4), '----')" for c in self._others]
        hashed = " || ".join(hashes) if hashes else "''"
        parts = ", ".join(
            f"CASE WHEN substr(p.known, {1 + 4 * i}, 4) IS DISTINCT FROM substr(p.hashed, {1 + 4 * i}, 4) "
            f"THEN {literal(c)} END"
            for i, c in enumerate(self._others)
        )
        # With other columns than before nothing is known of single ones: all of them count.
        every = f"[{', '.join(map(literal, self._others))}]::VARCHAR[]"
        one_by_one = "[]::VARCHAR[]" if not self._others else f"list_filter([{parts}], lambda x: x IS NOT NULL)"
        differs = f"CASE WHEN length(p.known) <> {4 * len(self._others)} THEN {every} ELSE {one_by_one} END"
        # By number within: a column may be called as one of ours is.
        names = ", ".join(f'p."cdc:v{i}" AS {quoted(c)}' for i, c in enumerate(self._assignment.columns))
        values = ", ".join(
            f'r.{quoted(self._columns[c])} AS "cdc:v{i}"' for i, c in enumerate(self._assignment.columns)
        )
        return (
            f"SELECT p.action AS {quoted(ACTION)}, p.key AS {quoted(KEY)}, "
            f"p.digest || ':' || p.hashed || ':' || '{self.generation}:{self._place}' AS {quoted(DIGEST)}, "
            f"p.version AS {quoted(VERSION)}, "
            f"CASE WHEN p.action = '{UPDATE}' AND p.acked <> '' THEN {differs} ELSE []::VARCHAR[] END "
            f"AS {quoted(DIFFERS)}, {names} FROM (SELECT p.action, p.key, p.digest, p.version, p.acked, "
            f"split_part(p.acked, ':', 2) AS known, {hashed} AS hashed, {values} FROM {self._relation} r "
            f"JOIN planned p ON p.n = r.file_row_number WHERE p.action IN ('{INSERT}', '{UPDATE}', '{RESEND}', "
            f"'{ADOPT}')) p ORDER BY p.action = '{INSERT}', p.action, p.key"
        )

    def write(self, path: Path, query: str, content: Any) -> None:
        """Write what the query gives, and feed action, content and key of each row into the plan's hash."""
        reader = self._connection.sql(query).to_arrow_reader(_ROWS_PER_GROUP)
        with pq.ParquetWriter(path, reader.schema, compression="zstd", compression_level=1) as writer:
            for batch in reader:
                digest = pc.utf8_slice_codeunits(batch.column(2), 0, 32)
                content.update(_joined(pc.binary_join_element_wise(batch.column(0), digest, batch.column(1), " ")))
                writer.write_batch(batch)

    def differs(self, path: Path) -> dict[str, int]:
        """In how many of the updates each column differs."""
        found: dict[str, int] = {}
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=[DIFFERS]):
                for entry in pc.value_counts(pc.list_flatten(batch.column(0))).to_pylist():
                    found[entry["values"]] = found.get(entry["values"], 0) + entry["counts"]
        return dict(sorted(found.items()))


def _check(result: Path, assignment: Assignment, columns: Mapping[str, str]) -> None:
    have = list(pq.read_schema(result).names)
    missing = [c for c in dict.fromkeys([*assignment.key, *assignment.columns]) if columns.get(c, c) not in have]
    if missing:
        named = "which the key names" if missing[0] in assignment.key else "which `columns` names"
        raise ModelFailed(
            f"the result has no column {', '.join(columns.get(c, c) for c in missing)}, {named}",
            hint=f"its columns: {', '.join(have)}",
        )
    folded = [c.lower() for c in columns]
    alike = sorted(c for c in columns if folded.count(c.lower()) > 1)
    if alike:
        raise ModelFailed(
            f"the columns {', '.join(alike)} differ in upper and lower case only",
            hint="SQL of the lake cannot tell them apart; push one of them",
        )
    reserved = [c for c in [*columns, *columns.values()] if c.startswith("cdc:") or c == "file_row_number"]
    if reserved:
        raise ModelFailed(f"there is a column {reserved[0]}, a name that plans use", hint="give it another name")


def _runs_of(actions: pa.Array) -> Iterator[tuple[str, int, int]]:
    """Stretches of one action: (action, start, stop)."""
    encoded = pc.run_end_encode(actions)
    start = 0
    for action, stop in zip(encoded.values.to_pylist(), encoded.run_ends.to_pylist(), strict=True):
        yield action, start, stop
        start = stop


def _joined(lines: pa.Array) -> bytes:
    """The lines, each ended, as one run of bytes, however they are chunked."""
    ended = pc.binary_join_element_wise(lines, "\n", "").cast(pa.large_string())
    data = ended.buffers()[2]
    return b"" if data is None else data.to_pybytes()[: pc.sum(pc.binary_length(ended)).as_py() or 0]
