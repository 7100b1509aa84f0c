"""Names of a changelog's objects: the range that they cover, and which writer's attempt they are of.

`<epoch>-<first LSN>-<last LSN>-<kind><term>_<random>.parquet`, LSNs with all their digits, so that names sort by
position. `kind` is `l` for an object that landing wrote, `j` for one that joins others; `term` is the fence of the
lease under which it was written (cdc.lake.lease), 0 if there was none. Readers need none of it: a commit decides what
exists. An object that no commit shows belonged to whom its name says.

Objects of releases that did not write kind and term have the random part alone.
"""

from __future__ import annotations

import re
import secrets
from typing import Final, NamedTuple

LANDED: Final = "l"
JOINED: Final = "j"

_NAME = re.compile(r"(\d+)-([0-9a-f]{16})-([0-9a-f]{16})-(?:([lj])([0-9a-f]+)_)?[0-9a-f]+\.parquet")


class ObjectName(NamedTuple):
    """What the name of an object says. `kind` and `term`: empty and 0 if it does not say them."""

    epoch: int
    first_lsn: int
    last_lsn: int
    kind: str
    term: int

    @staticmethod
    def of(path: str) -> ObjectName | None:
        """From a path or key that ends in the name; None if it is no such name."""
        found = _NAME.fullmatch(path.rpartition("/")[2])
        if found is None:
            return None
        epoch, first, last, kind, term = found.groups()
        return ObjectName(int(epoch), int(first, 16), int(last, 16), kind or "", int(term or "0", 16))

    def fresh(self) -> str:
        """A name that no other object has."""
        unique = f"{self.kind}{self.term:x}_{secrets.token_hex(6)}"
        return f"{self.epoch}-{self.first_lsn:016x}-{self.last_lsn:016x}-{unique}.parquet"
