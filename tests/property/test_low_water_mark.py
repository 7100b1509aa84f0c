"""What may be confirmed is what every table holds: tables land in any order, some fail, and none is passed over."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import numpy as np
import pytest

from cdc.batch import Boundary, Portion
from cdc.capture import ConfirmGate
from cdc.errors import StoreUnavailable
from cdc.evolution import Evolution
from cdc.lake.changelog import ChangelogTable, ChangelogWriter
from cdc.land import Lander, LogReader
from cdc.schema import SchemaBook
from cdc.stage import Stage
from connectors.local.store import LocalStore
from tests.support.logs import SOURCE, Row, batch, open_log, schema_of

TABLES = [schema_of(f"t{n}") for n in range(4)]


class Held:
    """A lease that nobody wants."""

    fence = 1

    def check(self) -> None: ...


@pytest.mark.parametrize("round_", range(3))
def test_the_low_water_mark_never_passes_a_table_that_has_not_landed(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch, round_: int
) -> None:
    rng.seed(rng.random() + round_)
    state, log = open_log(tmp_path)
    store = LocalStore(tmp_path / "lake")
    book = SchemaBook(state, SOURCE)
    schemas = [book.register(schema) for schema in TABLES]
    said: list[int] = []
    gate = ConfirmGate(
        epoch=1, confirm_after="landed", save_anchor=lambda lsn, mode: said.append(lsn), anchored_lsn=0, every_s=0
    )
    commit = ChangelogWriter.commit
    failing = True

    def sometimes(self: ChangelogWriter, *args: object, **options: object) -> object:
        if failing and rng.random() < 0.25:
            raise StoreUnavailable("before")
        landed = commit(self, *args, **options)  # type: ignore[arg-type]
        if failing and rng.random() < 0.25:
            raise StoreUnavailable("behind")
        return landed

    monkeypatch.setattr(ChangelogWriter, "commit", sometimes)
    shapes = Evolution(
        SOURCE, state, book, store, contract=lambda table: "evolve", read_anew=never, alert=lambda *told: None
    )
    lander = Lander(
        SOURCE, log, state, book, store, epoch=1, temp_dir=tmp_path, land_every_s=1e-9, land_bytes=1 << 20,
        lease=Held(), stop_table=never, is_stopped=lambda table: False, evolution=shapes,
    )  # type: ignore[arg-type]  # fmt: skip
    land: Stage = Stage("land", LogReader(SOURCE, log, state, gate, lander.due_in_s), lander)
    touched: dict[int, list[int]] = {}
    log.set_position(SOURCE, Boundary(1, 0, 0))

    def append(number: int) -> None:
        """A transaction that touches some tables, in some order."""
        lsn = 1_000 * number
        some = rng.sample(range(len(schemas)), rng.randrange(1, len(schemas) + 1))
        touched[lsn] = some
        batches = [batch(schemas[n], [Row(lsn, seq, lsn + seq, "x")]) for seq, n in enumerate(some)]
        log.append(SOURCE, Portion(
            batches=batches, boundary=Boundary(1, lsn, lsn + 48), head_lsn=lsn + 48,
            xids=np.array([number], np.uint32), xid_lsns=np.array([lsn], np.int64),
        ))  # fmt: skip

    def holds() -> list[int]:
        return [ChangelogTable(store, SOURCE, schema.table).tokens().stream(1) for schema in schemas]

    def step() -> None:
        with contextlib.suppress(StoreUnavailable):
            land.step(0)
        tokens = holds()
        for lsn, tables in touched.items():
            if lsn + 48 <= gate.allowed:
                assert all(tokens[n] >= lsn for n in tables), f"{lsn} was let go, the tables hold {tokens}"

    for number in range(1, 13):
        append(number)
        step()
    failing = False
    for _ in range(20):
        step()
    assert gate.allowed == 12_048
    assert gate.allowed in said, "the anchor heard of it before"
    log.close()
    state.close()


def never(table: object, *why: object) -> None:
    raise AssertionError(f"{table}: {why}")
