"""The lease: which daemon may land a source's changes in this lake.

What it fences: landing, merging and confirming. Two daemons with the same configuration do not both write; the second
one is told who holds the lease. The holder asks `check` (no I/O) before each commit. Whoever keeps it has a thread for
that alone, so that no landing is too long for it. A lease that ran out, because the store was out of reach or the
process was stopped, comes back with the next renewal unless somebody else has taken it meanwhile.

What it does not fence, and what does instead:
- A holder that sleeps longer than the lease between `check` and its commit. The commit's own tokens are compared in the
  version committed upon, and the fence number, which grows with every change of hands and travels as a token
  of its own, makes a commit of a former holder fail. Nothing is lost or doubled even if the lease is wrong.
- Who reads the source: an advisory lock there orders that.
- Other programs that write to the lake's tables.

Time: the holder trusts only its monotonic clock, counted from *before* the write that renewed the lease. Others watch
the object stay unchanged for a whole term, or for half of one if its end, as wall-clock time in the object, has passed;
a wrong clock alone takes it from nobody. A holder on the same machine whose process is gone is succeeded at once.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from cdc.errors import FormatTooNew, LeaseExpired, LeaseLost, Standby, StoreConflict, StoreUnavailable
from cdc.failpoints import failpoint
from cdc.lake.layout import lease_key
from cdc.ports import ObjectStore

FORMAT: Final = 1
TTL_S: Final = 30.0
SKEW_S: Final = 5.0
"""How far clocks of two machines may differ for an end to count as passed."""
_POLL_S: Final = 0.5
RELEASE_S: Final = 10.0


class Lease:
    """The right of one process to write one source's part of the lake. Thread-safe."""

    def __init__(
        self,
        store: ObjectStore,
        source: str,
        owner: str,
        *,
        ttl_s: float = TTL_S,
        floor: Callable[[], int] = lambda: 0,
    ) -> None:
        """`owner` is what others are shown (host, process); identity is a random id of this object. `floor` gives the
        highest fence that the source's tables were committed to with; it is asked where there is no lease."""
        self._store = store
        self._source = source
        self._key = lease_key(source)
        self._owner = owner
        self._floor = floor
        self._ttl_s = ttl_s
        self._id = uuid.uuid4().hex
        self._mutex = threading.Lock()
        self._etag: str | None = None
        self._fence = 0
        self._deadline = 0.0
        self._renew_at = math.inf
        self._watched: tuple[str, float] = ("", 0.0)

    @property
    def fence(self) -> int:
        """Number of this term, higher than that of every holder before; 0 before `acquire`."""
        return self._fence

    def acquire(self, *, wait_s: float = 0.0) -> None:
        """Take the lease, waiting up to `wait_s` for its holder to end; Standby naming the holder if that fails."""
        deadline = time.monotonic() + wait_s
        while True:
            with self._mutex:
                holder = self._try()
            if holder is None:
                return
            if time.monotonic() >= deadline:
                raise Standby(
                    f"source {self._source}: another daemon writes to this lake: {holder}",
                    hint="this one takes over when that one ends; if it is gone for good, its lease ends by itself",
                )
            threading.Event().wait(min(_POLL_S, max(0.0, deadline - time.monotonic())))

    def keep(self) -> bool:
        """Renew the lease if it is time to, as `renew` does; nothing before it is taken. False: nothing more to do
        now. For the thread that keeps the lease; may block as long as the store does."""
        if time.monotonic() >= self._renew_at:
            self.renew()
        return False

    def renew(self) -> None:
        """Extend the lease by a term from now. LeaseLost if another holder has it; StoreUnavailable leaves it."""
        with self._mutex:
            if self._etag is None:
                raise LeaseLost(f"source {self._source}: the lease is not held")
            failpoint("lease.before_renewal")
            self._write(self._etag)
            failpoint("lease.after_renewal")

    def check(self) -> None:
        """LeaseExpired if the lease may have ended, LeaseLost if it is not ours. No I/O; call it before whatever the
        lease protects."""
        if self._etag is None:
            raise LeaseLost(f"source {self._source}: the lease is not held", hint="run only one daemon")
        if time.monotonic() >= self._deadline:
            raise LeaseExpired(
                f"source {self._source}: the lease was not renewed in time, another daemon may write to this lake",
                hint="it goes on when the store can be reached, unless another daemon has taken over",
            )

    def is_long_over(self) -> bool:
        """Whether it ran out a whole term ago and did not come back: another daemon may have it by now."""
        return self._etag is not None and time.monotonic() >= self._deadline + self._ttl_s

    def held(self) -> bool:
        """Whether `check` would pass."""
        return self._etag is not None and time.monotonic() < self._deadline

    def release(self, within_s: float = RELEASE_S) -> None:
        """Give the lease back, so that a successor need not wait; best effort, idempotent. Returns when that is done,
        or after `within_s`: a store that does not answer holds up no shutdown."""
        thread = threading.Thread(target=self._release, name=f"release:{self._source}", daemon=True)
        thread.start()
        thread.join(within_s)

    def _release(self) -> None:
        with self._mutex:
            if self._etag is None:
                return
            etag, self._etag, self._deadline, self._renew_at = self._etag, None, 0.0, math.inf
            with suppress(StoreConflict, StoreUnavailable):
                self._store.put(self._key, self._document(released=True), if_match=etag)

    def _try(self) -> str | None:
        """Take the lease if it is free: None, else who holds it."""
        found = self._store.get(self._key)
        if found is None:
            # Tables may be older than the lease: kept ones below a new main lake, or it was removed.
            self._fence = 1 + self._floor()
            return self._take(None)
        data, etag = found
        document: dict[str, Any] = json.loads(data)
        if int(document.get("format", 0)) > FORMAT:
            raise FormatTooNew(f"{self._key} has format {document['format']}", hint="upgrade cdc")
        if document["id"] != self._id and not self._is_over(document, etag):
            return f"{document['owner']}, until {_clock(document['expires_at'])}"
        self._fence = int(document["fence"]) + (0 if document["id"] == self._id else 1)
        return self._take(etag)

    def _take(self, etag: str | None) -> str | None:
        try:
            self._write(etag)
        except (StoreConflict, LeaseLost):
            return "one that was faster"
        return None

    def _write(self, etag: str | None) -> None:
        began = time.monotonic()
        document = self._document(released=False)
        try:
            new = self._store.put(self._key, document, if_absent=etag is None, if_match=etag)
        except StoreConflict:
            # It may be ours, of whose answer we never heard.
            found = self._store.get(self._key)
            if found is None or json.loads(found[0])["id"] != self._id:
                self._etag, self._deadline, self._renew_at = None, 0.0, math.inf
                raise LeaseLost(
                    f"source {self._source}: another daemon has taken over this lake", hint="run only one"
                ) from None
            new = found[1]
            if found[0] != document:
                # The renewal before this one: what others see of it ends sooner than what we would count on.
                new = self._store.put(self._key, document, if_match=new)
        self._etag, self._deadline, self._renew_at = new, began + self._ttl_s, began + self._ttl_s / 3

    def _is_over(self, document: dict[str, Any], etag: str) -> bool:
        if document["released"]:
            return True
        if document["place"] and document["place"] == _place() and _is_gone(document["pid"], document["started"]):
            return True
        now = time.monotonic()
        if self._watched[0] != etag:
            self._watched = (etag, now)
        unchanged_s, ttl_s = now - self._watched[1], float(document["ttl_s"])
        # One that lives renews it in a third of its term, whatever our clock says of its end.
        is_late = time.time() > document["expires_at"] + SKEW_S
        return unchanged_s > (ttl_s / 2 if is_late else ttl_s)

    def _document(self, *, released: bool) -> bytes:
        now = time.time()
        values = {
            "format": FORMAT,
            "id": self._id,
            "owner": self._owner,
            "fence": self._fence,
            "place": _place(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "ttl_s": self._ttl_s,
            "renewed_at": now,
            "expires_at": now + self._ttl_s,
            "released": released,
        }
        return json.dumps(values, indent=1).encode()


def _place() -> str:
    """What makes process ids comparable: this boot of this kernel, and the name space of ids. Empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115  (no path: a name like pid:[402653])
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Start time of a process in the kernel's ticks, so that a reused id is another process; empty if it is a zombie,
    None if nothing is to be seen of it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]


def _is_gone(pid: int, started: str | None) -> bool:
    """Whether a process is known to be gone. What /proc does not show may live (hidepid, as systemd's ProtectProc)."""
    now = _started(pid)
    if now is not None:
        return started is not None and now != started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
