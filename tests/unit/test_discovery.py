"""What a look makes of a table that it sees for the first time, by what the lake says of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest

from cdc.discovery import Discovery
from cdc.fingerprint import Catalog, Fingerprint
from cdc.lake.changelog import ChangelogTable
from cdc.schema import SchemaBook
from cdc.state import open_state
from connectors.local.store import LocalStore
from tests.support.logs import PEOPLE, SOURCE


@pytest.mark.parametrize("vouched", [True, False])
def test_a_snapshot_that_the_lake_calls_complete_counts_only_if_the_table_stood_there_last(
    tmp_path: Path, vouched: bool
) -> None:
    store, state = LocalStore(tmp_path / "lake"), open_state(tmp_path)
    changelog = ChangelogTable(store, SOURCE, PEOPLE.table)
    changelog.delta.open_or_create(pa.schema([("id", pa.int64())]))
    changelog.delta.commit(tokens={f"complete/1/{PEOPLE.oid}": 1})
    ordered: list[str] = []
    marked: list[str] = []
    now = Fingerprint(schema=PEOPLE, membership=("1",), direct=True, storage=1, toast=0)
    reader = SimpleNamespace(tables=lambda: Catalog(lsn=1, tables=[now]))
    tables = SimpleNamespace(
        marks=dict, take_part=lambda *_: None, rests=lambda table: False,
        mark=lambda tables, needs: marked.extend(str(t) for t in tables),
    )  # fmt: skip
    backfill = SimpleNamespace(
        order=lambda table, kind, reason, settle: ordered.append(f"{kind} {table}"),
        is_ordered=lambda table: True, tell_shape=lambda schema: None,
    )  # fmt: skip
    discovery = Discovery(
        SOURCE, cast(Any, reader), cast(Any, None), state, SchemaBook(state, SOURCE), store, cast(Any, backfill),
        cast(Any, tables), epoch=1, server="1", vouches=lambda table: vouched,
    )  # fmt: skip
    discovery.look()
    assert state.table(SOURCE, PEOPLE.table).state == ("streaming" if vouched else "new")
    assert ordered == ([] if vouched else ["first public.people"])
    assert marked == ([] if vouched else ["public.people"]), "or who dies now takes it for complete at the next start"
    state.close()
