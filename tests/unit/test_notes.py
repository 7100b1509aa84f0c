"""A table of notes: each row once, in few objects, whatever comes in between."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from cdc.errors import StoreUnavailable
from cdc.lake import notes
from cdc.lake.delta import DeltaLog
from cdc.lake.notes import Note, NotesTable
from connectors.local.store import LocalStore

COLUMNS = pa.schema([pa.field("text", pa.string())])


def note(number: int) -> Note:
    return Note("orders", number, {"text": str(number)})


def held(store: LocalStore) -> list[str]:
    delta = DeltaLog(store, "shop/_notes")
    rows = [row for f in delta.files() for row in delta.open_file(f.path).read().column("text").to_pylist()]
    return sorted(rows, key=int)


def test_notes_stand_once_and_their_objects_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "OBJECTS_MAX", 4)
    monkeypatch.setattr(notes, "_VACUUM_S", 0.0)
    store = LocalStore(tmp_path)
    table = NotesTable(store, "shop", "_notes", COLUMNS)
    for number in range(11):
        assert table.append([note(number)]) == [note(number)]
        assert NotesTable(store, "shop", "_notes", COLUMNS).append([note(number)]) == [], "it came again"
        assert len(table.delta.files()) <= 4
    assert held(store) == [str(n) for n in range(11)]
    assert len([o for o in store.list("shop/_notes/") if o.key.endswith(".parquet") and "_delta_log" not in o.key]) < 9


def test_a_join_that_fails_keeps_nobody_from_appending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "OBJECTS_MAX", 2)
    store = LocalStore(tmp_path)
    table = NotesTable(store, "shop", "_notes", COLUMNS)
    table.append([note(0)])
    table.append([note(1)])

    def fails(self: DeltaLog, path: str) -> None:
        raise StoreUnavailable("a blink")

    with monkeypatch.context() as blinking:
        blinking.setattr(DeltaLog, "open_file", fails)
        assert table.append([note(2)]) == [note(2)]
    assert len(table.delta.files()) == 3
    table.append([note(3)])
    assert len(table.delta.files()) == 2
    assert held(store) == ["0", "1", "2", "3"]
