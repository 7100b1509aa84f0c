"""The catalog's fingerprints in the lake: what each table of a source looked like when the lake last followed it.

One small object per source, beside the anchor, so that a daemon on an empty disk notices what happened while there was
none. Written by conditional PUT; a writer that lost the lease is refused. It does not compare (cdc.watch).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from cdc.errors import FormatTooNew, LeaseLost, StoreConflict
from cdc.fingerprint import Fingerprint
from cdc.lake.document import Document
from cdc.lake.layout import fingerprints_key
from cdc.ports import ObjectStore
from cdc.table import TableId

FORMAT: Final = 1


class Fingerprints:
    """Fingerprints of one source. Not thread-safe."""

    def __init__(self, store: ObjectStore, source: str) -> None:
        self._source = source
        self._key = fingerprints_key(source)
        self._document = Document(store, self._key)
        self._known: dict[TableId, Fingerprint] = {}
        self._server = ""

    def load(self) -> tuple[str, dict[TableId, Fingerprint]]:
        """System identifier of the server that was looked at, and what was saved; ("", {}) if nothing was."""
        found = self._document.read()
        self._known, self._server = {}, ""
        if found is not None:
            data: dict[str, Any] = json.loads(found)
            if int(data.get("format", 0)) > FORMAT:
                raise FormatTooNew(f"{self._key} has format {data['format']}, this release knows {FORMAT}",
                                   hint="upgrade cdc")  # fmt: skip
            prints = [Fingerprint.from_json(t).kept() for t in data["tables"]]
            self._known = {p.schema.table: p for p in prints}
            self._server = data["server"]
        return self._server, dict(self._known)

    def save(self, server: str, prints: Mapping[TableId, Fingerprint]) -> None:
        """Replace what was loaded or saved here, if it differs; durable on return. LeaseLost if someone else wrote."""
        wanted = {table: p.kept() for table, p in prints.items()}
        if wanted == self._known and server == self._server:
            return
        tables = [wanted[table].to_json() for table in sorted(wanted)]
        data = json.dumps({"format": FORMAT, "server": server, "tables": tables}, separators=(",", ":")).encode()
        try:
            self._document.write(data)
        except StoreConflict as e:
            raise LeaseLost(f"source {self._source}: another daemon wrote {self._key}", hint="run only one") from e
        self._known, self._server = wanted, server
