"""What every verb works with: its arguments, its console, and configuration, state and lake when it asks for them.

Nothing is opened before it is asked for, so that `cdc version` needs no configuration and a reader of state no lake.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from cdc import config_file
from cdc.config import Config
from cdc.console import Console
from cdc.errors import CdcError
from cdc.table import TableId

if TYPE_CHECKING:
    from cdc.ports import ObjectStore, SourceAdmin
    from cdc.state import State

OK, FAILED, USAGE, FOUND, TIMED_OUT = 0, 1, 2, 3, 4
"""Exit codes; a contract with operators' scripts."""


class UsageError(CdcError):
    """The command line names something that does not exist or does not fit."""


@dataclass
class Call:
    """One command line."""

    args: argparse.Namespace
    console: Console

    @cached_property
    def config(self) -> Config:
        """The configuration; ConfigError if it is missing or wrong."""
        return config_file.load(self.args.config)

    @cached_property
    def store(self) -> ObjectStore:
        """The object store of the lake."""
        from cdc.lake.routing import open_lake

        return open_lake(self.config)

    def admin(self, source: str) -> SourceAdmin:
        """The operator's side of a source."""
        from cdc import registry

        section = self.config.sources[source]
        return registry.source_kind(section.type).admin(section)

    @property
    def has_state(self) -> bool:
        """Whether a daemon has ever worked on this state directory; CdcError if we may not look."""
        path = self.config.state_path
        try:
            # A daemon that is just starting for the first time has made the file and not yet its tables.
            return path.stat().st_size > 0 and path.is_file()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as e:
            raise CdcError(f"{path} cannot be looked at: {e.strerror}", hint="run as the daemon's user") from e

    @contextmanager
    def state(self, *, readonly: bool = False) -> Iterator[State]:
        """The state database, closed afterwards. CdcError if no daemon has ever written one."""
        from cdc.state import State

        if not self.has_state:
            raise CdcError(
                f"{self.config.state_dir} holds no state: the daemon has never run here", hint="start it: cdc run"
            )
        state = State(self.config.state_path, create=False, readonly=readonly)
        try:
            yield state
        finally:
            state.close()

    def sources(self, names: Sequence[str] = ()) -> list[str]:
        """The named sources, or all; UsageError for one that is not configured."""
        for name in names:
            if name not in self.config.sources:
                raise unknown("source", name, list(self.config.sources))
        return list(names) or list(self.config.sources)


def unknown(kind: str, name: str, known: Sequence[str]) -> UsageError:
    """The error for a name that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(name, known, n=1)
    some = ", ".join(sorted(known)[:10]) + (", …" if len(known) > 10 else "")
    hint = f"did you mean {near[0]}?" if near else (f"known: {some}" if known else f"there is no {kind} yet")
    return UsageError(f"there is no {kind} {name}", hint=hint)


def tables_of(state: State, sources: Sequence[str], *, with_own: bool = False) -> list[tuple[str, TableId]]:
    """The tables that the daemon knows, removed ones left out; `with_own`: also those that only cdc has."""
    found = [(s, t) for s in sources for t in state.tables(s)]
    return [(s, t.table) for s, t in found if t.state != "removed" and (with_own or not t.table.is_own)]


def resolve_tables(known: Sequence[tuple[str, TableId]], names: Sequence[str]) -> list[tuple[str, TableId]]:
    """Tables named as `table` (schema public), `schema.table` or `source.schema.table`; each once, in order.

    UsageError for a name that no table has, or that tables of several sources have.
    """
    spelled: dict[str, list[tuple[str, TableId]]] = {}
    for source, table in known:
        for spelling in spellings(source, table):
            spelled.setdefault(spelling, []).append((source, table))
    found: dict[tuple[str, TableId], None] = {}
    for name in names:
        matches = spelled.get(name, [])
        if not matches:
            raise unknown("table", name, list(spelled))
        if len(matches) > 1:
            full = " or ".join(f"{source}.{table}" for source, table in matches)
            raise UsageError(f"{name} names several tables", hint=f"write {full}")
        found[matches[0]] = None
    return list(found)


def spellings(source: str, table: TableId) -> list[str]:
    """The ways in which a table may be named on the command line."""
    names = [f"{source}.{table}", str(table)]
    return [*names, table.name] if table.schema == "public" else names


def pick(names: Sequence[str], known: Sequence[str], kind: str) -> list[str]:
    """The names if all are known, else UsageError."""
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)
    return list(names)


Verb = Callable[[Call], int]
