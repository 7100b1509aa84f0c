"""How a table is best read: by ranges of blocks, or by ranges of its key.

Blocks are read in the order of the disk, whatever order the keys have there, but a row that an update moves from an
unread block into a read one is met by no chunk. The stream brings it; only a value that is stored out of line and was
left alone would be missing in it. So blocks are read where there are no such values, or where old rows carry them
(decision 31). Keys are cut by a sample of the table, in Postgres' own order. Reads only.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import psycopg
from psycopg import sql

from cdc.ports import Plan
from connectors.postgres.catalog import Described

RANGE_BLOCKS = 1024
"""A range is no smaller: 8 MB at the usual block size."""
SAMPLE_BLOCKS = 400
FACTS = """
select pg_relation_size(c.oid) / current_setting('block_size')::int8,
       coalesce(pg_relation_size(nullif(c.reltoastrelid, 0)), 0),
       (select sum(pg_relation_size(t.relid)) / current_setting('block_size')::int8
        from pg_partition_tree(c.oid) t where t.isleaf)::int8
from pg_class c where c.oid = %s
"""


def plan(connection: psycopg.Connection[Any], table: Described, parts_max: int) -> Plan:
    """Under the table's lock, after its run's begin row was appended: what was stored out of line before is seen."""
    row = connection.execute(FACTS, [table.schema.oid]).fetchone()
    blocks, aside, below = row if row is not None else (0, 0, None)
    if table.kind == "p":
        blocks = below or 0
    parts = int(max(1, min(parts_max, blocks // RANGE_BLOCKS)))
    if blocks < RANGE_BLOCKS:
        return Plan(strategy="keys", why="it is small", ranges=[(None, None)])
    if table.kind == "p":
        return Plan(strategy="keys", why="it is partitioned", ranges=_by_key(connection, table, parts, blocks))
    if aside and table.schema.identity != "f":
        why = "it has values that are stored out of line"
        return Plan(strategy="keys", why=why, ranges=_by_key(connection, table, parts, blocks))
    cuts = [(str(blocks * i // parts),) for i in range(parts + 1)]
    why = "old rows carry all values" if aside else "it has no values that are stored out of line"
    return Plan(strategy="blocks", why=why, ranges=list(pairwise(cuts)))


def _by_key(
    connection: psycopg.Connection[Any], table: Described, parts: int, blocks: int
) -> list[tuple[tuple[str, ...] | None, tuple[str, ...] | None]]:
    """Ranges of the key that hold about the same number of rows."""
    if parts < 2:
        return [(None, None)]
    # Named with the table: a bare name in ORDER BY would be the column of the result, which is text.
    key = [sql.Identifier("read", name) for name in table.schema.key]
    share = min(100.0, 100.0 * SAMPLE_BLOCKS / blocks)
    query = sql.SQL("select {} from {} as read tablesample system ({}) order by {}").format(
        sql.SQL(", ").join(sql.SQL("{}::text").format(k) for k in key),
        sql.SQL("{}" if table.kind == "p" else "only {}").format(sql.Identifier(*table.schema.table)),
        sql.Literal(share),
        sql.SQL(", ").join(key),
    )
    sample = connection.execute(query).fetchall()
    if len(sample) < 10 * parts:
        return [(None, None)]
    cuts = [tuple(sample[len(sample) * i // parts]) for i in range(1, parts)]
    return list(zip([None, *cuts], [*cuts, None], strict=True))
