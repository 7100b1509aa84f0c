"""How a target's rows differ from a result: staged like a batch, compared in the server, nothing kept.

A row is compared as it would be written: with the columns' own types and modifiers, and with `keep` and `fill`. What
does not even fit into its column differs.
"""

from __future__ import annotations

from typing import Any

import psycopg

from cdc.sink import DIFFERENT, INSERT, MISSING, Assignment, Batch, Drift
from connectors.postgres.target_errors import is_about_rows
from connectors.postgres.target_rows import stage_csv
from connectors.postgres.target_statements import Statements
from connectors.postgres.target_table import TargetTable


def differences(
    connection: psycopg.Connection[Any], table: TargetTable, assignment: Assignment, batch: Batch
) -> list[Drift]:
    """The rows of the batch that the table lacks or holds otherwise; leaves temporary tables behind."""
    statements = Statements(
        table=table, assignment=assignment, action=INSERT, columns=assignment.columns, number=0, run=""
    )
    connection.execute(statements.create_stage())
    connection.execute(statements.create_typed())
    unheld: list[int] = []
    _stage(connection, statements, batch, range(batch.rows.num_rows), unheld)
    names = statements.compared()
    keys = batch.acks.column("key")
    found = [Drift(str(keys[n].as_py()), DIFFERENT) for n in unheld]
    for key, lacks, differs in connection.execute(statements.drift()).fetchall():
        if lacks:
            found.append(Drift(key, MISSING))
        else:
            found.append(Drift(key, DIFFERENT, tuple(n for n, other in zip(names, differs, strict=False) if other)))
    return found


def _stage(
    connection: psycopg.Connection[Any], statements: Statements, batch: Batch, rows: range, unheld: list[int]
) -> None:
    """Into both stages; rows with values that no column of that type holds are found by halving."""
    if not rows:
        return
    try:
        with connection.transaction():
            with connection.cursor().copy(statements.copy()) as copy:
                copy.write(memoryview(stage_csv(batch, statements.columns, rows)))
            connection.execute(statements.type_rows(rows))
        return
    except psycopg.Error as error:
        if not is_about_rows(error, connection):
            raise
        if len(rows) == 1:
            unheld.append(rows.start)
            return
    middle = (rows.start + rows.stop) // 2
    _stage(connection, statements, batch, range(rows.start, middle), unheld)
    _stage(connection, statements, batch, range(middle, rows.stop), unheld)
