"""Named points where tests let the process die or fail; no-ops unless armed.

`CDC_FAILPOINTS="land.before_commit=kill:3,capture.after_append=error"` arms points in a child process: `kill`
ends it with SIGKILL, `error` raises InvariantBroken's retryable sibling; `:N` means at the N-th pass (default 1).
Armed once at import, so an unarmed point costs one dictionary look-up. Names are constants at the place of use.
"""

from __future__ import annotations

import os
import signal

from cdc.errors import SourceUnavailable


def _parse(text: str) -> dict[str, tuple[str, int]]:
    armed: dict[str, tuple[str, int]] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, action = item.partition("=")
        verb, _, nth = action.partition(":")
        if verb not in ("kill", "error"):
            raise ValueError(f"CDC_FAILPOINTS: unknown action {verb!r} for {name!r}; use kill or error")
        armed[name] = (verb, int(nth or "1"))
    return armed


_armed = _parse(os.environ.get("CDC_FAILPOINTS", ""))
_passes: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Die or fail here if `name` is armed and this is its turn."""
    if not _armed or name not in _armed:
        return
    verb, nth = _armed[name]
    _passes[name] = _passes.get(name, 0) + 1
    if _passes[name] != nth:
        return
    if verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise SourceUnavailable(f"failpoint {name}")
