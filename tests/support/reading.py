"""A source read in the test's own process: settle, stream into the log, confirm. No lake but the anchor's folder.

What a daemon does with a source, step by step and without its threads, so that a test can stop between any two steps,
change the server underneath, or lose the disk.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from cdc.batch import Boundary
from cdc.config import SourceConfig
from cdc.lake.anchor import Anchor, AnchorState
from cdc.log import EventLog
from cdc.origin import settle
from cdc.ports import Source, SourceAdmin, SourceStatus
from cdc.schema import SchemaBook
from cdc.state import State
from connectors.local.store import LocalStore
from connectors.postgres.source import PostgresKind
from tests.support.waiting import wait_until

SLOT = "cdc_shop"


class Reader:
    """The source's side of a daemon; log and anchor stay when the server goes, and the other way round."""

    def __init__(self, dsn: str, root: Path, *, slot: str = SLOT, **options: Any) -> None:
        self.config = SourceConfig(
            name="shop", dsn=dsn, slot=slot, publication=(slot,), tables=("public.*",), **options
        )
        self.root = root
        self.store = LocalStore(root / "lake")
        self.anchor = Anchor(self.store, "shop")
        self._disks = 0
        self.open_disk()

    @property
    def admin(self) -> SourceAdmin:
        return PostgresKind.admin(self.config)

    @property
    def status(self) -> SourceStatus:
        return self.admin.status()

    @property
    def position(self) -> Boundary:
        found = self.log.position("shop")
        assert found is not None
        return found

    def open_disk(self, folder: Path | None = None) -> None:
        """State and log in another folder; a new one is an empty disk."""
        self._disks += 1
        self.disk = folder or self.root / f"state-{self._disks}"
        self.state = State(self.disk / "state.db")
        self.log = EventLog(self.disk / "log", self.state, bytes_max=1 << 30)

    def copy_disk(self) -> Path:
        """A copy of state and log as they are now."""
        copy = self.root / f"copy-{self._disks}"
        self.log.close()
        self.state.close()
        shutil.copytree(self.disk, copy)
        self.open_disk(self.disk)
        return copy

    def settle(self, dsn: str = "", **options: Any) -> AnchorState:
        """Decide where the history stands, with other options or at another server from now on."""
        self.config = replace(self.config, dsn=dsn or self.config.dsn, **options)
        identity = PostgresKind.source(self.config, application_name="test").identity()
        return settle(self.config, identity, self.admin, self.anchor, self.log)

    def open(self, after: Boundary | None = None) -> Source:
        """The stream, from the log's position (or `after`) on."""
        source = PostgresKind.source(self.config, application_name="test")
        source.open(after or self.position, SchemaBook(self.state, "shop"), self.position.epoch)
        return source

    def read_to_now(self, *, confirm: bool = True) -> int:
        """Log, and confirm as landed, everything that is committed by now; the log's end."""
        self.settle()
        target = self.admin.barrier()
        source = self.open()
        try:
            wait_until(lambda: self._take(source, target), message="the stream to reach now")
            end = self.position.end_lsn
            if confirm:
                if self.config.confirm_after == "landed":
                    self.anchor.change(lambda s: replace(s, may_confirm_lsn=end))
                source.confirm(end)
                wait_until(lambda: self.status.confirmed_lsn >= end, message="the confirmation")
        finally:
            source.close()
        wait_until(lambda: not self.status.slot_active, message="the slot to be free")
        return end

    def rows_since(self, offset: int) -> int:
        """Rows of changes behind an offset of the log."""
        return sum(r.rows for r in self.log.records("shop", offset) if r.kind == "change")

    def _take(self, source: Source, target: int) -> bool:
        portion = source.read(0.2)
        if portion is not None:
            self.log.append("shop", portion)
        return self.position.end_lsn > target
