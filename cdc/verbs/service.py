"""Verbs around the daemon's life: run, check, setup, teardown, demo, version."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import cdc
from cdc.errors import CdcError
from cdc.verbs.call import FAILED, FOUND, OK, Call, UsageError

if TYPE_CHECKING:
    from cdc.ports import Finding


def run(call: Call) -> int:
    """The daemon in the foreground."""
    # Read when Arrow is loaded, which is now: what its own allocator once had, it keeps (70 MB of a small daemon).
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    from cdc import logs
    from cdc.daemon import Daemon

    config = call.config
    logs.configure(config.log_level, config.log_format)
    code = Daemon(config).run(once=call.args.once)
    call.console.document({"outcome": "ok" if code == OK else "failed", "once": call.args.once})
    return code


def check(call: Call) -> int:
    """Preflight; 3 if something stands in the way (with --strict: warnings too)."""
    from cdc import preflight

    findings = preflight.check(call.config)
    worst = preflight.worst(findings)
    found = worst == "error" or (call.args.strict and worst == "warning")
    call.console.document({"ok": not found, "findings": [asdict(f) for f in findings]})
    for finding in findings:
        _show_finding(call, finding)
    count = {severity: sum(f.severity == severity for f in findings) for severity in preflight.SEVERITIES}
    call.console.line(f"{count['error']} errors, {count['warning']} warnings")
    return FOUND if found else OK


def setup(call: Call) -> int:
    """Create publication and slot of each source."""
    return _change_sources(call, "setup")


def teardown(call: Call) -> int:
    """Drop slot and publication of each source; a person at a terminal types the names."""
    if not call.args.dry_run:
        _refuse_while_running(call)
    if not (call.args.dry_run or call.args.yes) and sys.stdin.isatty() and not _agreed(call):
        call.console.note("nothing was dropped")
        return FAILED
    return _change_sources(call, "teardown")


def adopt(call: Call) -> int:
    """Take the server that a source's dsn leads to for the continuation of the one that the lake was filled from."""
    from cdc import adoption, registry
    from cdc.console import lsn_text
    from cdc.lake.anchor import Anchor

    name = call.sources([call.args.source])[0]
    _refuse_while_running(call)
    config = call.config.sources[name]
    if config.is_periodic:
        raise UsageError(
            f"source {name} is compared periodically: there is no slot whose history another server could go on with",
            hint=f"`cdc teardown {name}` and start again: the next run compares the new server with the lake",
        )
    kind = registry.source_kind(config.type)
    identity = kind.source(config, application_name="cdc adopt").identity()
    anchor = Anchor(call.store, name)
    oids = {t.schema.table: t.schema.oid for t in kind.reader(config).tables().tables}
    found = adoption.examine(
        config, identity, kind.admin(config).status(), oids, anchor, call.store, logged_lsn=_logged_lsn(call, name)
    )
    if not found.is_known and not call.args.dry_run:
        adoption.adopt(identity, anchor, found)
    call.console.document(
        {
            "source": name,
            "system_id": identity.system_id,
            "adopted": not found.is_known and not call.args.dry_run,
            "held_lsn": lsn_text(found.held_lsn),
            "at_lsn": lsn_text(found.at_lsn),
            "read_anew": [str(t) for t in found.read_anew],
            "missing": [str(t) for t in found.missing],
        }
    )
    if found.is_known:
        call.console.line(f"{name}: this is the server that the lake was filled from: nothing to do")
        return OK
    did = "would go on" if call.args.dry_run else "goes on at the next start"
    call.console.line(f"{name}: {did} at {lsn_text(found.at_lsn)} of server {identity.system_id}")
    call.console.line(
        f"  the old server is held up to {lsn_text(found.held_lsn)}; you vouch that it wrote nothing after"
    )
    for table in found.read_anew:
        call.console.line(f"  {table} is another table here: it is snapshotted anew")
    for table in found.missing:
        call.console.line(f"  {table} is not published here: the lake keeps it as it is")
    return OK


def _logged_lsn(call: Call, source: str) -> int | None:
    """How far the local event log reaches, None if there is none."""
    if not call.has_state:
        return None
    with call.state(readonly=True) as state:
        known = state.source(source)
        return known.end_lsn if known is not None and known.positioned else None


def _refuse_while_running(call: Call) -> None:
    """CdcError if a daemon works on this state directory."""
    from cdc import control

    if call.has_state:
        with call.state(readonly=True) as state:
            if control.is_running(state):
                raise CdcError("the daemon is running and holds the slots", hint="stop it first")


def _agreed(call: Call) -> bool:
    """Whether the person at the terminal types the name of every source that is about to lose its slot."""
    for name in call.sources(call.args.source):
        if call.config.sources[name].is_periodic:
            continue  # Nothing is lost: the next run compares with what the lake holds.
        call.console.note(
            f"What was committed at source {name} and is not captured yet is lost with its slot; the next start"
            f" snapshots every table anew. Type the source's name to go on ({name}):"
        )
        if input().strip() != name:
            return False
    return True


def demo(call: Call) -> int:
    """The whole thing on an embedded Postgres."""
    from cdc.demo import run_demo

    directory = Path(call.args.directory).absolute() if call.args.directory else None
    lake = {"url": call.args.lake, "endpoint_url": call.args.endpoint_url}
    given = {key: value for key, value in lake.items() if value}
    return run_demo(call.args.duration, call.args.keep, directory, call.console, lake=given)


def show_version(call: Call) -> int:
    """Versions of cdc and of what it stands on."""
    libraries = {name: _installed(name) for name in ("psycopg", "pyarrow", "deltalake", "duckdb")}
    facts = {"cdc": cdc.__version__, "python": platform.python_version(), **libraries}
    call.console.document(facts)
    call.console.line(f"cdc {cdc.__version__}")
    call.console.line(", ".join(f"{name} {v}" for name, v in facts.items() if name != "cdc") + f", {sys.platform}")
    return OK


def _change_sources(call: Call, what: str) -> int:
    """Run setup or teardown at the chosen sources; prints the SQL in the order in which it ran (or would run)."""
    from cdc.lake.anchor import Anchor
    from cdc.origin import give_up

    done: dict[str, list[str]] = {}
    for name in call.sources(call.args.source):
        if what == "teardown" and not call.args.dry_run:
            give_up(Anchor(call.store, name))
        options = {"ddl_events": call.args.ddl_events} if what == "setup" else {}
        statements = getattr(call.admin(name), what)(dry_run=call.args.dry_run, **options)
        done[name] = statements
        mode = "would run" if call.args.dry_run else "ran"
        call.console.line(f"-- source {name}: {mode if statements else 'nothing to do'}")
        for statement in statements:
            call.console.line(statement.rstrip(";") + ";")
    call.console.document({"dry_run": call.args.dry_run, "sources": done})
    return OK


def _show_finding(call: Call, finding: Finding) -> None:
    mark = {"ok": "ok     ", "info": "info   ", "warning": "WARNING", "error": "ERROR  "}[finding.severity]
    call.console.line(f"{mark} {finding.object}: {finding.name}: {finding.message}")
    if finding.fix and finding.severity != "ok":
        call.console.line(f"        mend it: {finding.fix}")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
