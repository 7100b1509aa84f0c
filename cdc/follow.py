"""Followers: the changelogs of a source once more in another form, for those who read that rather than Delta.

A follower is one stage (cdc.stage): spans of a changelog's versions → the other form, which keeps its own checkpoint.
So landing, `current`, verify and models never wait for one, and none of them knows of it; the disk of the daemon holds
nothing of it. A follower that fails stops alone, for its table, and says what mends it.

What a follower has not read yet must not be removed. A vacuum waits for it (`may_vacuum`), but not for ever: one that
gets no further for HOLD_S is not waited for any more, is told loudly, and reads the whole changelog for what it lacks
when it comes back (cdc.lake.spans).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cdc import metrics
from cdc.config import IcebergConfig, LakeConfig
from cdc.errors import CdcError, ConfigError, LeaseExpired, LeaseLost, Verdict
from cdc.lake.files import PlainFiles
from cdc.lake.layout import changelog_path
from cdc.lake.lease import Lease
from cdc.lake.routing import RoutingStore
from cdc.lake.spans import Followed, Span, Spans
from cdc.ports import ObjectStore
from cdc.stage import Downstream, Stage
from cdc.state import State
from cdc.table import TableId

if TYPE_CHECKING:
    from cdc.lake.iceberg import RegisteredTable

log = logging.getLogger(__name__)

HOLD_S: Final = 6 * 3600.0
"""How long a vacuum waits for a follower that gets no further."""
RETRY_S: Final = 10.0
LOOK_S: Final = 2.0
"""How often it is looked for tables to follow, and told how far the followers are."""


def followers_fact(source: str) -> str:
    """Key of the fact that tells how far a source's followers are: a list of {table, form, version, clear_at: Unix s
    when nothing was left to read (0: not since the start), error, hint}."""
    return f"followers:{source}"


@dataclass(slots=True)
class Follower:
    """One form of one table's changelog."""

    table: TableId
    form: str
    every_s: float
    spans: Spans
    stage: Stage[Span, Followed]
    due_at: float = 0.0
    progress_at: float = field(default_factory=time.monotonic)
    version: int = -1
    error: CdcError | None = None
    let_go: bool = False

    def facts(self) -> dict[str, Any]:
        """What `status` shows."""
        return {
            "table": str(self.table),
            "form": self.form,
            "version": self.version,
            "clear_at": self.spans.clear_at,
            "error": str(self.error.args[0]) if self.error else "",
            "hint": self.error.hint if self.error else "",
        }


@dataclass(slots=True)
class _Turn:
    """How far the thread of one form is: when it looks for tables, and with what was asked."""

    look_at: float = 0.0
    rounds: int = 0
    round: int | None = None


class Followers:
    """All followers of one source. `step` belongs to one thread for each form; the rest may be called from any."""

    def __init__(
        self, source: str, config: LakeConfig, state: State, store: ObjectStore, temp_dir: Path, lease: Lease
    ) -> None:
        self._source = source
        self._config = config
        self._state = state
        self._store = store
        self._temp_dir = temp_dir
        self._lease = lease
        self.forms = tuple(form for form in ("files", "iceberg") if getattr(config, form) is not None)
        """Each wants a thread of its own: a catalog that does not answer is none of the files' business."""
        self._turns = {form: _Turn() for form in self.forms}
        self._followers: dict[tuple[TableId, str], Follower] = {}
        self._elsewhere: set[TableId] = set()
        self._lock = threading.Lock()
        self._began_at, self._began_unix = time.monotonic(), time.time()
        self._asked = 0
        self._told: list[dict[str, Any]] | None = None
        if config.iceberg is not None:
            self._register = self._opened(config.iceberg)

    def step(self, form: str) -> bool:
        """One bounded piece of work of each follower of a form that is due; whether there may be more. Nothing while
        the lease is not held. Blocks for the store. Errors are those of the lease; those of one follower are kept, and
        told."""
        if not self._lease.held():
            return False
        now, turn = time.monotonic(), self._turns[form]
        if now >= turn.look_at:
            turn.look_at = now + LOOK_S
            self._look(form)
            self._tell()
        if turn.round is None and self._asked > turn.rounds:
            turn.round = self._asked
            self._look(form)
            for follower in self._of(form):
                if follower.error is None:
                    follower.due_at = 0.0
        more = False
        for follower in self._of(form):
            if now >= follower.due_at:
                more |= self._advance(follower)
        if turn.round is not None and not more:
            turn.rounds, turn.round = turn.round, None
            self._tell()
        return more

    def finishing(self) -> Callable[[], bool]:
        """Whether every follower holds what stands in the changelogs now; raises the error of one that needs an
        operator."""
        asked = self._ask()

        def finished() -> bool:
            nonlocal asked
            if any(turn.rounds < asked for turn in self._turns.values()):
                return False
            errors = [f.error for f in list(self._followers.values()) if f.error is not None]
            for error in errors:
                if error.verdict is not Verdict.RETRY:
                    raise error
            if errors:
                asked = self._ask()
            return not errors

        return finished

    def may_vacuum(self, table: TableId, version: int, since: float) -> bool:
        """Whether no follower has still to read what was removed from a table's changelog before `since` (Unix time),
        up to its version `version`; True for one that is not waited for any more."""
        return not any(
            self._is_waited_for(table, form) and not self._is_clear(table, form, version, since)
            for form in self._forms(table)
        )

    # ---- inside ----

    def _ask(self) -> int:
        """Have every follower look at once, but for one that waits to try again; the number of the round to come."""
        with self._lock:
            self._asked += 1
            return self._asked

    def _forms(self, table: TableId) -> list[str]:
        name = f"{self._source}.{table}"
        forms = {"files": self._config.files, "iceberg": self._config.iceberg}
        wanted = [f for f, of in forms.items() if of is not None and any(fnmatchcase(name, g) for g in of.tables)]
        if "iceberg" in wanted and self._stands_elsewhere(table):
            wanted.remove("iceberg")
        return wanted

    def _stands_elsewhere(self, table: TableId) -> bool:
        """Whether a table stands in a lake with a name, which manifests, that hold bounds of its keys, would leave."""
        if not isinstance(self._store, RoutingStore):
            return False
        lake = self._store.lake(f"{changelog_path(self._source, table)}/")
        if lake and table not in self._elsewhere:
            self._elsewhere.add(table)
            log.warning(
                "lake.iceberg names a table of another lake: it is left out, for the catalog's warehouse is not there",
                extra={"source": self._source, "table": str(table), "lake": lake},
            )
        return bool(lake)

    def _is_clear(self, table: TableId, form: str, version: int, since: float) -> bool:
        follower = self._followers.get((table, form))
        return follower is not None and follower.spans.is_clear(version, since)

    def _is_waited_for(self, table: TableId, form: str) -> bool:
        follower = self._followers.get((table, form))
        since = self._began_at if follower is None else max(follower.progress_at, follower.due_at)
        if time.monotonic() - since < HOLD_S:
            return True
        if follower is not None and not follower.let_go:
            follower.let_go = True
            log.error(
                "a follower gets no further: objects that it has not read may be removed now",
                extra={"source": self._source, "table": str(table), "form": form, "hint": "see `cdc status`"},
            )
        return False

    def _of(self, form: str) -> list[Follower]:
        return [f for f in list(self._followers.values()) if f.form == form]

    def _look(self, form: str) -> None:
        for known in self._state.tables(self._source):
            if (known.table, form) not in self._followers and form in self._forms(known.table):
                self._followers[known.table, form] = self._made(known.table, form)

    def _made(self, table: TableId, form: str) -> Follower:
        def wrote(rows: int) -> None:
            self._wrote(table, form, rows)

        files, iceberg = self._config.files, self._config.iceberg
        spans = Spans(self._store, self._source, table, states=form == "iceberg")
        target: Downstream[Span, Followed]
        if form == "iceberg":
            assert iceberg is not None
            every_s, target = iceberg.every_s, self._register(table, spans, wrote)
        else:
            assert files is not None
            every_s = files.every_s
            target = PlainFiles(
                self._store, self._source, table, spans, temp_dir=self._temp_dir, form=files.format,
                object_bytes=files.object_bytes_target, go_on=self._lease.check, wrote=wrote,
            )  # fmt: skip
        # Reckoned when it is asked for: also while another follower is long at work.
        lag = metrics.FOLLOWER_LAG_SECONDS.labels(self._source, form, metrics.table_label(self._source, table))
        lag.set_function(lambda: time.time() - (spans.clear_at or self._began_unix))
        return Follower(table, form, every_s, spans, Stage(f"{form}:{table}", spans, target))

    def _opened(self, iceberg: IcebergConfig) -> Callable[[TableId, Spans, Callable[[int], None]], RegisteredTable]:
        """What makes the downstream of a table in the catalog. ConfigError if pyiceberg is not installed."""
        try:
            from cdc.lake.iceberg import IcebergCatalog, RegisteredTable
        except ImportError as e:
            raise ConfigError("lake.iceberg needs pyiceberg", hint='pip install "cdc[iceberg]"') from e
        catalog = IcebergCatalog(iceberg.catalog, iceberg.namespace)

        def register(table: TableId, spans: Spans, wrote: Callable[[int], None]) -> RegisteredTable:
            return RegisteredTable(
                self._store, self._source, table, spans, catalog, keep_s=self._config.vacuum_after_s,
                go_on=self._lease.check, wrote=wrote,
            )  # fmt: skip

        return register

    def _wrote(self, table: TableId, form: str, rows: int) -> None:
        """A long span gets further object by object."""
        follower = self._followers[table, form]
        follower.progress_at, follower.let_go = time.monotonic(), False
        metrics.FOLLOWED_ROWS.labels(self._source, form, metrics.table_label(self._source, table)).inc(rows)

    def _advance(self, follower: Follower) -> bool:
        """One step of one follower; whether there may be more at once."""
        try:
            self._lease.check()
            if not follower.spans.changelog.exists():
                follower.due_at = time.monotonic() + follower.every_s
                return False
            read = follower.stage.step(0.0).read
        except (LeaseLost, LeaseExpired):
            raise
        except CdcError as e:
            self._note(follower, e)
            follower.due_at = time.monotonic() + RETRY_S
            return False
        self._note(follower, None)
        follower.progress_at, follower.let_go = time.monotonic(), False
        follower.version = follower.spans.version
        follower.due_at = 0.0 if read else time.monotonic() + follower.every_s
        return read

    def _note(self, follower: Follower, error: CdcError | None) -> None:
        was, follower.error = follower.error, error
        where = {"source": self._source, "table": str(follower.table), "form": follower.form}
        if error is None:
            if was is not None:
                log.info("a follower has recovered", extra=where)
        else:
            metrics.ERRORS.labels(f"follow:{self._source}", type(error).__name__).inc()
            if str(was) != str(error):
                log.error(error.args[0], extra={**where, "error": type(error).__name__, "hint": error.hint})

    def _tell(self) -> None:
        with self._lock:
            told = [f.facts() for f in list(self._followers.values())]
            if told != self._told:
                self._state.set(followers_fact(self._source), told)
                self._told = told


__all__ = ["Followers", "followers_fact"]
