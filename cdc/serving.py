"""placeholder until sync is there"""
from __future__ import annotations
from typing import Any
class Serving:
    def __init__(self, config: Any, state: Any, store: Any, pipelines: Any) -> None:
        self.origins: tuple[str, ...] = ()
    def step(self) -> bool:
        return False
    def settled(self) -> bool:
        return True
    def close(self) -> None: ...
    def model_run(self, args: dict[str, Any]) -> dict[str, Any]:
        return {}
    def sync_apply(self, args: dict[str, Any]) -> dict[str, Any]:
        return {}
