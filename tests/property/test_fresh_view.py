"""The fresh view against merges: after every commit of a random history, with whatever lag the history has, it shows
what a merge of the same changes comes to, cell by cell."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from cdc.errors import ModelFailed
from cdc.fresh import UNKNOWN
from cdc.lake.current import open_current
from tests.property.test_current_model import TABLE, Machine, _schema, programs
from tests.support.views import Told, cells, merged, shown

FOUND: Counter[str] = Counter()


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
        schema = _schema(self.version, self.missing)
        wanted, result = merged(self.root / "lake", self.changelog.source, schema, self.through, self.root / "scratch")
        try:
            found, note = shown(self.changelog.store, self.changelog.source, Told(schema), self.root / "scratch")
        except ModelFailed:
            # Nothing is merged yet, to be shown in place of what cannot be.
            assert open_current(self.changelog.store, self.changelog.source, TABLE) is None
            FOUND["nothing" if wanted is None else "nothing merged"] += 1
            return
        except duckdb.Error as error:
            assert UNKNOWN in str(error), error
            assert result.unresolved
            FOUND["unresolved"] += 1
            return
        FOUND[note.partition(": ")[2] or "exact"] += 1
        event(note.partition(": ")[2] or "exact")
        if not note:
            assert not result.unresolved
            assert wanted is not None
            assert found.schema == wanted.schema
            assert cells(found) == cells(wanted)


@settings(
    max_examples=int(os.environ.get("NN", "8")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(program=programs(), missing=st.sampled_from([None, "7"]))
def test_the_fresh_view_shows_what_a_merge_would(program: list[dict[str, Any]], missing: str | None) -> None:
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "scratch").mkdir()
        Watched(Path(root), missing).run(program)
