"""Where the history of a periodically compared source begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdc.config import SourceConfig
from cdc.lake.anchor import Anchor
from cdc.periodic_origin import settle_periodic
from cdc.ports import SourceIdentity
from connectors.local.store import LocalStore
from tests.support.logs import SOURCE, open_log


@pytest.mark.parametrize(("landed", "epoch"), [(-1, 1), (3, 4)])
def test_without_an_anchor_it_begins_in_an_epoch_that_the_lake_has_nothing_of(
    tmp_path: Path, landed: int, epoch: int
) -> None:
    state, log = open_log(tmp_path)
    identity = SourceIdentity(system_id="1", timeline=1, database="d", server_version=170000, head_lsn=500)
    anchor = Anchor(LocalStore(tmp_path / "lake"), SOURCE)
    for _ in range(2):
        settled = settle_periodic(
            SourceConfig(name=SOURCE), identity, anchor, log,
            landed_lsn=lambda epoch: -1, landed_epoch=lambda: landed,
        )  # fmt: skip
        assert settled.anchor.epoch == epoch
    position = log.position(SOURCE)
    assert position is not None
    assert (position.epoch, position.lsn) == (epoch, 500)
    log.close()
    state.close()
