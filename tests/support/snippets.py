"""The snippets of docs/reading.md, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_PAGE = Path(__file__).parents[2] / "docs" / "reading.md"
SNIPPETS: list[str] = re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL)


def run_snippet(snippet: str, **given: Any) -> dict[str, Any]:
    """Run one with these names given; all names at its end."""
    names = dict(given)
    exec(compile(snippet, str(_PAGE), "exec"), names)
    return names
