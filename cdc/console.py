"""What a command writes for its user: one JSON document, or text, on standard output; the rest on standard error.

The only place of `cdc` that writes to standard output. Units and positions are written here, so that every command
writes them alike. No colours; no width is assumed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, TextIO


class Console:
    """Output of one command. With `as_json`, text is left out and `document` is the one thing on standard output."""

    def __init__(self, *, as_json: bool = False, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.as_json = as_json
        self._out = out or sys.stdout
        self._err = err or sys.stderr

    def document(self, value: Any, *, always: bool = False) -> None:
        """The command's result as JSON; nothing in text mode, unless `always`."""
        if self.as_json or always:
            json.dump(value, self._out, indent=2, default=plain, ensure_ascii=False)
            self._out.write("\n")
            self._out.flush()

    def line(self, text: str = "") -> None:
        """A line of the result as text; nothing in JSON mode."""
        if not self.as_json:
            self._out.write(text + "\n")

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[Any]], *, indent: str = "") -> None:
        """Aligned columns as text; nothing in JSON mode. Numbers are set to the right."""
        if self.as_json:
            return
        body = [["" if cell is None else str(cell) for cell in row] for row in rows]
        widths = [max([len(h), *(len(row[i]) for row in body)]) for i, h in enumerate(headers)]
        right = [bool(body) and all(_NUMBER.fullmatch(row[i]) for row in body if row[i]) for i in range(len(headers))]
        for row in [list(headers), *body]:
            cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
            self._out.write(indent + "  ".join(cells).rstrip() + "\n")

    def raw(self, text: str) -> None:
        """Text for standard output in either mode: a command's own format (csv, JSON lines)."""
        self._out.write(text)

    def note(self, text: str) -> None:
        """Progress, advice or an error, on standard error."""
        self._err.write(text + "\n")
        self._err.flush()


_NUMBER = re.compile(r"[-\d.,]+( ?(B|kB|MB|GB|TB|s|%))?|-")


def plain(value: Any) -> Any:
    """A value that JSON does not know, as text; paths, positions and decimals keep every digit."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return "\\x" + value.hex()
    if isinstance(value, tuple | set | frozenset):
        return list(value)
    return str(value)


def lsn_text(lsn: int | None) -> str:
    """A position as Postgres prints it; empty if it is not known."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}" if lsn else ""


def parse_lsn(text: str) -> int:
    """The position that `16/B374D848` names. ValueError if it is none."""
    match = re.fullmatch(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})", text)
    if not match:
        raise ValueError(f'"{text}" is no position; Postgres prints them as 16/B374D848')
    return (int(match[1], 16) << 32) | int(match[2], 16)


def bytes_text(count: float | None) -> str:
    """A number of bytes for people, in powers of 1024."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"


def seconds_text(seconds: float | None) -> str:
    """A duration for people; `-` if it is not known."""
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, _ = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def time_text(unix_s: float | None) -> str | None:
    """RFC 3339 in UTC; None if it is not known."""
    if not unix_s:
        return None
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
