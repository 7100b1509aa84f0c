"""Sizes, shares and durations as the configuration writes them."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB)")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_UNITS = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def size_bytes(text: str | int) -> int:
    """Bytes of a size such as "128MB". Units are powers of 1024 as in postgresql.conf. ValueError if it is none."""
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f'"{text}" is no size; write bytes as a number, or "64kB", "128MB", "10GB"')
    return int(float(match[1]) * (1 << _UNITS[match[2][0].upper()]))


def duration_s(text: str) -> float:
    """Seconds of a duration such as "90s", "15m", "6h", "1d". ValueError if it is none, or is nothing."""
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not seconds:
        raise ValueError(f'"{text}" is no duration; write "90s", "15m", "6h" or "1d"')
    return seconds


def wal_threshold(text: str) -> tuple[float, int]:
    """A threshold of the WAL guard: its share of the server's limit and 0, or 0 and its bytes. ValueError if it is
    neither."""
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if share is None:
        return 0.0, size_bytes(text)
    if not 0 < float(share[1]) <= 100:
        raise ValueError(f'"{text}" is no share; write "1%" to "100%"')
    return float(share[1]) / 100, 0
