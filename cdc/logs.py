"""Sets up logging once per process: text on a terminal, one JSON object per line otherwise, on standard error.

Keys given with `extra=` are rendered in both forms. Row values and secrets never reach a log call (house rule); as a
second fence, connection strings inside messages lose their passwords here.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any, TextIO

from cdc.errors import CdcError

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_SECRET = re.compile(r"(?i)(password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&]+)|(://[^:/@\s]+:)[^@\s]+(@)")
_COLOURS = {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[31;1m", "DEBUG": "\x1b[2m"}


def configure(level: str = "info", form: str = "auto", stream: TextIO | None = None) -> None:
    """Send the root logger to `stream` (standard error). `form`: auto | text | json. May be called again."""
    out = stream or sys.stderr
    terminal = out.isatty()
    handler = logging.StreamHandler(out)
    text = form == "text" or (form == "auto" and terminal)
    handler.setFormatter(TextFormatter(colour=terminal) if text else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for noisy in ("botocore", "boto3", "urllib3", "s3transfer"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


def redact(text: str) -> str:
    """`text` with the passwords of connection strings taken out."""
    return _SECRET.sub(lambda m: f"{m[1]}***" if m[1] else f"{m[3]}***{m[4]}", text)


def extra_of(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed with `extra=`."""
    return {k: v for k, v in vars(record).items() if k not in _STANDARD and not k.startswith("_")}


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ts (RFC 3339, UTC, ms), level, logger, message, thread, the extra keys, error."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
            "thread": record.threadName,
        }
        for key, value in extra_of(record).items():
            line.setdefault(key, redact(value) if isinstance(value, str) else value)
        if record.exc_info:
            line["error"] = redact(self.formatException(record.exc_info))
        return json.dumps(line, default=_plain, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """`12:00:01.123 INFO    cdc.land  message key=value …`, local time, colours on a terminal."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created)) + f".{int(record.msecs):03d}"
        extra = "".join(f" {key}={_word(value)}" for key, value in extra_of(record).items())
        line = redact(f"{clock} {record.levelname:<7} {record.name:<14} {record.getMessage()}{extra}")
        if record.exc_info:
            line += "\n" + redact(self.formatException(record.exc_info))
        colour = _COLOURS.get(record.levelname, "") if self._colour else ""
        return f"{colour}{line}\x1b[0m" if colour else line


def _timestamp(seconds: float) -> str:
    whole = int(seconds)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{int((seconds - whole) * 1000):03d}Z"


def _word(value: Any) -> str:
    text = str(value) if not isinstance(value, float) else f"{value:.6g}"
    return json.dumps(text, ensure_ascii=False) if re.search(r'[\s"=]', text) or not text else text


def _plain(value: Any) -> Any:
    if isinstance(value, CdcError):
        return str(value)
    if isinstance(value, set | frozenset | tuple):
        return list(value)
    return str(value)
