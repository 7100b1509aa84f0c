"""One small object that its writer replaces as a whole, and that nobody else replaces unseen.

Written by compare-and-swap on the etag that was last read or written here. A write may fail without anybody knowing
whether it happened, or happen later: what a failed write wanted is remembered, so that finding it there is not taken
for another writer's work. Says nothing about what is in the object, nor who may write it (cdc.lake.lease). Not
thread-safe.
"""

from __future__ import annotations

import hashlib

from cdc.errors import StoreConflict, StoreUnavailable
from cdc.ports import ObjectStore


class Document:
    """The object under `key`."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store = store
        self._key = key
        self._etag: str | None = None
        self._unanswered: set[bytes] = set()
        """Digests of what was written with an unknown end since a write was last answered: that one refuses them."""

    def read(self) -> bytes | None:
        """What is there, None if nothing is; the next write replaces just that."""
        found = self._store.get(self._key)
        self._etag = None if found is None else found[1]
        return None if found is None else found[0]

    def write(self, data: bytes) -> None:
        """Replace what was last read or written here; durable on return. StoreConflict if somebody else wrote since,
        StoreUnavailable if it may or may not have happened: another `write` is right then."""
        try:
            self._etag = self._put(data)
        except StoreUnavailable:
            self._unanswered.add(_digest(data))
            raise
        self._unanswered.clear()

    def _put(self, data: bytes) -> str:
        try:
            return self._store.put(self._key, data, if_absent=self._etag is None, if_match=self._etag)
        except StoreConflict:
            found = self._store.get(self._key)
            if found is None:
                raise
            if found[0] == data:
                return found[1]
            if _digest(found[0]) not in self._unanswered:
                raise
            # Ours, of whose end we never heard.
            self._etag = found[1]
            return self._store.put(self._key, data, if_match=found[1])


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
