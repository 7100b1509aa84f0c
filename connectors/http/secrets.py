"""Secrets by reference: `env:NAME` and `file:/path`, read when they are needed and kept by nobody.

No message holds a secret, only the reference.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cdc.errors import TargetRejected

_CONTROL = re.compile(r"[^\x20-\x7e]")
BYTES_MAX = 64 << 10


def read_secret(target: str, reference: str) -> str:
    """What a reference stands for, without the line's end of a file. TargetRejected if it cannot be read, is empty, or
    holds what no header and no path may hold."""
    kind, _, name = reference.partition(":")
    where = f"target {target}: {reference}"
    if kind == "env":
        value = os.environ.get(name)
        if value is None:
            raise TargetRejected(f"{where}: the environment variable is not set", hint="it holds a secret of [target]")
    else:
        try:
            with Path(name).expanduser().open("rb") as file:
                value = file.read(BYTES_MAX).decode().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "not UTF-8"
            raise TargetRejected(f"{where}: cannot be read: {reason}", hint="it holds a secret of [target]") from None
    if not value or _CONTROL.search(value):
        raise TargetRejected(
            f"{where}: is empty, or holds control characters or characters beyond ASCII", hint="write the secret alone"
        )
    return value


__all__ = ["read_secret"]
