"""Small readings of values in the configuration file, and the words for what is wrong with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from cdc.config import FOREVER, age_s

_AGE_LEAST_S = 86_400.0
"""Of what is kept: longer than any comparison of `verify` takes, which reads what has changed meanwhile."""


def check_age(text: str, *, forever: bool) -> None:
    """ValueError if a text is no age that objects are kept to."""
    if text == FOREVER and not forever:
        raise ValueError("leave it out for never")
    if age_s(text) < _AGE_LEAST_S:
        raise ValueError('must be at least a day, "1d"')


def strings(value: Any, *, single: bool) -> tuple[str, ...]:
    if single and isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"a list of texts is expected, not {kind_of(value)}")
    return tuple(value)


def nearest(word: str, known: Iterable[str]) -> str:
    names = list(known)
    match = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if match:
        return f"; did you mean {match[0]}?"
    return f"; known: {', '.join(sorted(names))}" if names else ""


def kind_of(value: Any) -> str:
    """The TOML word for a value's type; values themselves may be secrets and are not quoted."""
    names: list[tuple[type, str]] = [
        (bool, "a boolean"),
        (int, "a whole number"),
        (float, "a number"),
        (str, "a text"),
        (list, "a list"),
        (dict, "a table"),
    ]
    return next((name for kind, name in names if isinstance(value, kind)), "a date or time")
