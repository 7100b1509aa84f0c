"""The command line: arguments of every verb, and how errors become exit codes. The work is in cdc.verbs.

Exit codes: 0 fine, 1 failed, 2 wrong usage or configuration, 3 ran and found something, 4 timed out. With `--json`
standard output holds one JSON document, of an error too. Verbs are imported when they run, so `--help` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from cdc.console import Console, parse_lsn
from cdc.errors import CdcError, ConfigError, TimedOut
from cdc.verbs.call import FAILED, OK, TIMED_OUT, USAGE, Call, UsageError, Verb

INTERRUPTED = 130
MAIN_HELP = """\
Keeps tables in a lake equal to tables in Postgres, and pushes results back into production systems.

The configuration is read from --config, else $CDC_CONFIG, else ./cdc.toml, else /etc/cdc/cdc.toml.
Exit codes: 0 fine, 1 failed, 2 wrong usage or configuration, 3 ran and found something, 4 timed out.
"""

Declare = Callable[[argparse.ArgumentParser], None]


class _Parser(argparse.ArgumentParser):
    """Usage errors show the verb's example."""

    def error(self, message: str) -> NoReturn:
        example = f"\n{self.epilog}" if self.epilog else ""
        self.exit(USAGE, f"{self.format_usage()}{self.prog}: {message}{example}\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line; what every verb's `--help` and the documentation's test read."""
    # Options that stand before or after the verb; SUPPRESS keeps the second parse from undoing the first.
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--config", metavar="PATH", help="configuration file")
    common.add_argument("--json", action="store_true", help="one JSON document on standard output")
    top = _Parser(
        prog="cdc",
        description=MAIN_HELP,
        epilog="example: cdc --config /etc/cdc/cdc.toml status",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[common],
    )
    verbs = top.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True, parser_class=_Parser)
    for name, (text, example, declare, target) in VERBS.items():
        _add(verbs, common, name, text, example, declare, target)
    for group, (text, members) in GROUPS.items():
        sub = verbs.add_parser(group, help=text, description=text, epilog=f"example: {next(iter(members.values()))[1]}")
        inner = sub.add_subparsers(metavar="VERB", dest="subverb", required=True, parser_class=_Parser)
        for name, (member_text, example, declare, target) in members.items():
            _add(inner, common, name, member_text, example, declare, target)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors are written to standard error, and as JSON with --json."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else USAGE
    args.config = getattr(args, "config", None)
    console = Console(as_json=getattr(args, "json", False))
    try:
        with _cleaned_up(args.verb):
            code = _verb(args.target)(Call(args, console))
            sys.stdout.flush()
        return code
    except (ConfigError, UsageError) as error:
        return _fail(console, error, USAGE)
    except TimedOut as error:
        return _fail(console, error, TIMED_OUT)
    except CdcError as error:
        return _fail(console, error, FAILED)
    except KeyboardInterrupt:
        console.note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone. Python flushes standard output once more at exit: give it a place.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


@contextmanager
def _cleaned_up(verb: str) -> Iterator[None]:
    """SIGTERM and SIGHUP end the verb by SystemExit, so that temporary files go with it: copies of rows, perhaps. The
    daemon and the demo have handlers of their own."""
    before: dict[signal.Signals, Any] = {}
    if verb not in ("run", "demo") and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            # One that is ignored (nohup), or that our caller handles, stays as it is.
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _exit)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def _fail(console: Console, error: CdcError, code: int) -> int:
    kind, message = type(error).__name__, str(error.args[0])
    console.document({"error": {"kind": kind, "message": message, "hint": error.hint}, "exit_code": code})
    console.note(f"cdc: {message}" + (f"\n     {error.hint}" if error.hint else ""))
    return code


def _verb(target: str) -> Verb:
    module, _, function = target.partition(":")
    verb: Verb = getattr(importlib.import_module(f"cdc.verbs.{module}"), function)
    return verb


def _add(
    verbs: argparse._SubParsersAction[_Parser],
    common: _Parser,
    name: str,
    text: str,
    example: str,
    declare: Declare,
    target: str,
) -> None:
    sub = verbs.add_parser(
        name, help=text, description=text, epilog=f"example: {example}", parents=[common], allow_abbrev=False
    )
    declare(sub)
    sub.set_defaults(target=target)


def _nothing(p: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def _run(p: argparse.ArgumentParser) -> None:
    p.add_argument("--once", action="store_true", help="land everything committed before now, run due syncs, and exit")


def _check(p: argparse.ArgumentParser) -> None:
    p.add_argument("--strict", action="store_true", help="exit 3 for warnings too")


def _change_source(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", nargs="*", metavar="SOURCE", help="sources by name; none: all")
    p.add_argument("--dry-run", action="store_true", help="print the SQL, change nothing")


def _setup(p: argparse.ArgumentParser) -> None:
    _change_source(p)
    p.add_argument(
        "--ddl-events", action="store_true", help="event triggers that write DDL into the stream (superuser)"
    )


def _teardown(p: argparse.ArgumentParser) -> None:
    _change_source(p)
    p.add_argument("--yes", action="store_true", help="don't ask at a terminal")


def _adopt(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="SOURCE", help="the source, by name; its dsn leads to the new server")
    p.add_argument("--dry-run", action="store_true", help="only look, change nothing")


def _resync(p: argparse.ArgumentParser) -> None:
    p.add_argument("table", nargs="*", metavar="TABLE", help="tables; `cancel TABLE…` takes the order back")
    p.add_argument("--all", action="store_true", help="all tables of all sources")
    p.add_argument("--where", metavar="SQL", help="only the rows that this condition (the source's SQL) names")
    p.add_argument("--wait", action="store_true", help="follow it, and return when `current` holds the result")
    p.add_argument("--timeout", type=_seconds, default=86400.0, metavar="S", help="bound of --wait (default: a day)")


def _held(p: argparse.ArgumentParser) -> None:
    p.add_argument("table", nargs="*", metavar="TABLE", help="tables; none: all")


def _upkeep(p: argparse.ArgumentParser) -> None:
    _held(p)
    p.add_argument("--timeout", type=_seconds, default=3600.0, metavar="S", help="how long to wait (default: an hour)")


def _land(p: argparse.ArgumentParser) -> None:
    p.add_argument("now", choices=("now",), help="what is logged when the daemon takes the order")
    p.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help="exit 4 after this long (default 60)")


def _pause(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "name",
        nargs="*",
        metavar="NAME",
        help="source, table, target or sync, or source:NAME, table:NAME, sink:NAME, sync:NAME; none: every source",
    )


def _wait(p: argparse.ArgumentParser) -> None:
    p.add_argument("--table", nargs="+", action="extend", default=[], metavar="T", help="tables; none: all")
    p.add_argument("--lsn", type=_lsn, metavar="LSN", help="up to this position, in place of now")
    p.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help="exit 4 after this long (default 60)")


def _verify(p: argparse.ArgumentParser) -> None:
    p.add_argument("table", nargs="*", metavar="TABLE", help="tables; none: all")
    p.add_argument("--repair", action="store_true", help="have what differs read anew, row by row, and verify again")
    p.add_argument("--show-values", action="store_true", help="show differing values too (they may be personal data)")
    p.add_argument("--cells", action="store_true", help="compare the cells of all rows, not checksums first")
    p.add_argument("--sample", type=_percent, metavar="N", help="compare only N percent of the keys, others each time")
    p.add_argument("--timeout", type=_seconds, default=3600.0, metavar="S", help="exit 4 after this (default 3600)")


def _query(p: argparse.ArgumentParser) -> None:
    p.add_argument("sql", metavar="SQL", help="DuckDB SQL over <source>.<table> and <source>.<table>_changelog")
    p.add_argument("--format", choices=("table", "json", "csv"), default="table", help="of the result")
    p.add_argument("--limit", type=_count, metavar="N", help="rows at most (default: 1000 as a table, else 1000000)")
    p.add_argument("--timeout", type=_seconds, default=600.0, metavar="S", help="exit 1 after this long (default 600)")
    p.add_argument("--merged", action="store_true", help="tables at the last cut at which all were merged")


def _lake_sql(p: argparse.ArgumentParser) -> None:
    p.add_argument("table", metavar="TABLE", help="the table")
    p.add_argument("--merged", action="store_true", help="as it is merged, without what has landed since")


def _log_list(p: argparse.ArgumentParser) -> None:
    p.add_argument("--source", metavar="NAME", help="one source; none: all")
    p.add_argument("--table", metavar="T", help="one table; none: all")
    p.add_argument("--after", type=int, default=0, metavar="OFFSET", help="records after this offset")
    p.add_argument("--limit", type=_count, default=100, metavar="N", help="records at most (default 100)")


def _log_tail(p: argparse.ArgumentParser) -> None:
    p.add_argument("--source", metavar="NAME", help="one source; none: all")
    p.add_argument("--table", metavar="T", help="one table; none: all")
    p.add_argument("--limit", type=_count, default=10, metavar="N", help="records to begin with (default 10)")
    p.add_argument("--timeout", type=_seconds, metavar="S", help="stop after this long; none: until interrupted")


def _inspect(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="SOURCE", help="the source, by name")
    p.add_argument("--interval", type=_seconds, default=10.0, metavar="S", help="count changes so long (default 10)")
    p.add_argument("--age-column", default="", metavar="COLUMN", help="dates a row's event; none: found table by table")
    p.add_argument(
        "--late-after", type=_seconds, default=86400.0, metavar="S", help="age of a late change (default: a day)"
    )
    p.add_argument("--budget", type=_seconds, default=120.0, metavar="S", help="for reading rows, in all (default 120)")
    p.add_argument("--html", metavar="FILE", help="write a page with plots too")


def _named(kind: str) -> Declare:
    def declare(p: argparse.ArgumentParser) -> None:
        p.add_argument("name", metavar="NAME", help=f"the {kind}")

    return declare


def _applied(kind: str) -> Declare:
    def declare(p: argparse.ArgumentParser) -> None:
        _named(kind)(p)
        p.add_argument("--timeout", type=_seconds, default=600.0, metavar="S", help="exit 4 after this (default 600)")

    return declare


def _planned(p: argparse.ArgumentParser) -> None:
    _named("sync")(p)
    p.add_argument("--show-values", action="store_true", help="show the new values of the sample rows too")
    p.add_argument("--held", action="store_true", help="the plan that waits for approval, not one of now")


def _approved(p: argparse.ArgumentParser) -> None:
    _applied("sync")(p)
    p.add_argument("plan", metavar="PLAN_ID", help="the plan, as `sync plan`, `status` and the alert name it")


def _resent(p: argparse.ArgumentParser) -> None:
    _applied("sync")(p)
    p.add_argument("--yes", action="store_true", help="also if it deletes")


def _reconciled(p: argparse.ArgumentParser) -> None:
    _applied("sync")(p)
    p.add_argument(
        "--policy", choices=("report", "source", "target"), default="report",
        help="report: only compare (default); source: send again what differs; target: let it stand, as if sent",
    )  # fmt: skip


def _history(p: argparse.ArgumentParser) -> None:
    _named("sync")(p)
    p.add_argument("run", metavar="RUN", nargs="?", default="", help="a run, for what became of its rows")
    p.add_argument("--limit", type=_count, default=20, metavar="N", help="runs shown (default 20)")


def _demo(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--duration",
        type=_seconds,
        default=15.0,
        metavar="S",
        help="of streaming, after the first snapshots (default 15)",
    )
    p.add_argument("--keep", action="store_true", help="leave everything running to look at, until Ctrl-C")
    p.add_argument("--directory", metavar="DIR", help="where to put it; a demo's is replaced (default ./cdc-demo)")
    p.add_argument("--lake", metavar="URL", help="an empty place for its lake, as s3://BUCKET/PREFIX (default: there)")
    p.add_argument("--endpoint-url", metavar="URL", help="of the bucket, if it is not on AWS")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds greater than 0")
    return value


def _percent(text: str) -> float:
    value = float(text)
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is no percentage above 0, up to 100")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number greater than 0")
    return value


def _lsn(text: str) -> int:
    try:
        return parse_lsn(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


VerbRow = tuple[str, str, Declare, str]
"""What it does, an example, its arguments, and module:function in cdc.verbs."""

VERBS: dict[str, VerbRow] = {
    "run": ("the daemon in the foreground", "cdc run --once", _run, "service:run"),
    "check": ("preflight: everything that would stop or endanger it", "cdc check --json", _check, "service:check"),
    "inspect": (
        "measure a source before relying on it",
        "cdc inspect shop --interval 60 --html shop.html",
        _inspect,
        "inspect:inspect",
    ),
    "setup": ("create publication and slot", "cdc setup --dry-run", _setup, "service:setup"),
    "teardown": ("drop slot and publication", "cdc teardown shop --dry-run", _teardown, "service:teardown"),
    "adopt": (
        "go on with the server that pg_upgrade made of the old one",
        "cdc adopt shop --dry-run",
        _adopt,
        "service:adopt",
    ),
    "status": ("phases, positions, lag, tables and syncs", "cdc status --json", _nothing, "look:status"),
    "tables": ("tables with key, identity, columns and types", "cdc tables --json", _nothing, "look:tables"),
    "resync": ("order a new snapshot of tables", "cdc resync public.orders --wait", _resync, "orders:resync"),
    "pause": ("let a source, table, target or sync stand still", "cdc pause shop", _pause, "orders:pause"),
    "resume": ("let it go on", "cdc resume shop", _pause, "orders:resume"),
    "wait": (
        "return when the lake holds everything committed before now",
        "cdc wait --table orders",
        _wait,
        "orders:wait",
    ),
    "verify": ("compare source and lake, by checksums first", "cdc verify public.orders", _verify, "data:verify"),
    "query": ("DuckDB over the lake", 'cdc query "select count(*) from shop.orders"', _query, "data:query"),
    "demo": ("the whole thing on an embedded Postgres", "cdc demo --duration 30", _demo, "service:demo"),
    "version": ("versions of cdc and its libraries", "cdc version --json", _nothing, "service:show_version"),
}
GROUPS: dict[str, tuple[str, dict[str, VerbRow]]] = {
    "log": (
        "what the event log holds",
        {
            "ls": ("its records", "cdc log ls --table public.orders", _log_list, "log:list_records"),
            "cat": ("rows of its records, as JSON lines", "cdc log cat --after 100 --limit 1", _log_list, "log:cat"),
            "tail": ("records as they come", "cdc log tail --source shop", _log_tail, "log:tail"),
        },
    ),
    "sync": (
        "reverse ETL",
        {
            "plan": ("what an apply would write", "cdc sync plan customer_value", _planned, "syncs:plan"),
            "apply": ("push now", "cdc sync apply customer_value", _applied("sync"), "syncs:apply"),
            "approve": (
                "let a held plan through",
                "cdc sync approve customer_value 1f0c5d77a0b1c2d3",
                _approved,
                "syncs:approve",
            ),
            "retry": ("send rejected rows again", "cdc sync retry customer_value", _applied("sync"), "syncs:retry"),
            "resync": ("send every row again", "cdc sync resync customer_value", _resent, "syncs:resync"),
            "reset-state": (
                "forget what was sent, send nothing",
                "cdc sync reset-state customer_value",
                _applied("sync"),
                "syncs:reset_state",
            ),
            "reconcile": (
                "compare the target's rows with the result, and mend what differs",
                "cdc sync reconcile customer_value --policy source",
                _reconciled,
                "syncs:reconcile",
            ),
            "history": (
                "its runs, or the rows of one run",
                "cdc sync history customer_value",
                _history,
                "syncs:history",
            ),
        },
    ),
    "model": (
        "SQL models",
        {"run": ("run it now", "cdc model run customer_value", _applied("model"), "data:model_run")},
    ),
    "lake": (
        "the lake",
        {
            "ls": ("its tables", "cdc lake ls --json", _held, "lake:list_tables"),
            "land": ("land what is logged, and wait for it", "cdc lake land now", _land, "lake:land"),
            "sql": ("a table as it is now, as SQL for DuckDB", "cdc lake sql orders", _lake_sql, "lake:sql"),
            "compact": ("join small objects of changelogs", "cdc lake compact orders", _upkeep, "lake:compact"),
            "vacuum": ("remove what no reader needs any more", "cdc lake vacuum", _upkeep, "lake:vacuum"),
        },
    ),
}
