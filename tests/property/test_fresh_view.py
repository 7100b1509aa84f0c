"""The fresh view against merges: after every commit of a random history, with whatever lag the history has, it shows
what a merge of the same changes comes to, cell by cell."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from cdc.errors import ModelFailed
from cdc.fresh import UNKNOWN
from cdc.lake.current import open_current
from tests.property.test_current_model import TABLE, Machine, _schema, programs
from tests.support.views import cells, fresh_view, merged, rows_of


class Watched(Machine):
    """A machine whose fresh view is looked at after every commit."""

    def __init__(self, root: Path, missing: str | None) -> None:
        super().__init__(root, missing)
        self.root = root

    def commit(self) -> None:
        super().commit()
        if self.through >= 0:
            self.look()

    def look(self) -> None:
        schema, store = _schema(self.version, self.missing), self.changelog.store
        wanted, result = merged(self.root / "lake", self.changelog.source, schema, self.through, self.root / "scratch")
        try:
            view = fresh_view(store, self.changelog.source, schema, self.root / "scratch")
        except ModelFailed:
            # Nothing is merged yet, to be shown in place of what cannot be.
            assert open_current(store, self.changelog.source, TABLE) is None
            event("nothing yet" if wanted is None else "nothing merged")
            return
        event(view.note or "exact")
        if result.unresolved and not view.note:
            with pytest.raises(duckdb.Error, match=UNKNOWN):
                rows_of(view)
        elif not view.note:
            assert wanted is not None
            found = rows_of(view)
            assert found.schema.names == wanted.schema.names
            assert cells(found) == cells(wanted)


ANY = {"program": programs(), "missing": st.sampled_from([None, "7"])}
UNHURRIED = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=5, deadline=None, suppress_health_check=UNHURRIED)
@given(**ANY)
def test_the_fresh_view_shows_what_a_merge_would(program: list[dict[str, Any]], missing: str | None) -> None:
    run(program, missing)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=UNHURRIED)
@given(**ANY)
def test_many_fresh_views_show_what_merges_would(program: list[dict[str, Any]], missing: str | None) -> None:
    run(program, missing)


def run(program: list[dict[str, Any]], missing: str | None) -> None:
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "scratch").mkdir()
        Watched(Path(root), missing).run(program)
