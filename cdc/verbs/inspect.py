"""`cdc inspect`: measures a source, and shows what was found as text, as JSON, and as a page with plots.

Exit 3 if a finding endangers capture (severity warning or error), whatever else was found. It only reads the source,
and shows names, counts, sizes and ages, never a value of a row.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdc.errors import CdcError
from cdc.inspection import AGE_LABELS, Request
from cdc.verbs.call import FOUND, OK, Call
from cdc.verbs.inspect_text import IDENTITY, show

if TYPE_CHECKING:
    from cdc.inspection import Inspection


def inspect(call: Call) -> int:
    """Measure one source; 3 if something endangers capture."""
    from cdc import registry

    args = call.args
    name = call.sources([args.source])[0]
    section = call.config.sources[name]
    request = Request(
        interval_s=args.interval, age_column=args.age_column, late_after_s=args.late_after, budget_s=args.budget
    )
    found = registry.source_kind(section.type).inspector(section).inspect(request, call.console.note)
    call.console.document(document(found))
    if not call.console.as_json:
        show(call, found)
    if args.html:
        _write_page(Path(args.html), found)
        call.console.note(f"page with plots: {args.html}")
    return FOUND if found.is_endangered else OK


def _write_page(path: Path, found: Inspection) -> None:
    from cdc.verbs.inspect_page import page

    try:
        path.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise CdcError(f"cannot write {path}: {error.strerror}", hint="name another file: --html FILE") from error


def document(found: Inspection) -> dict[str, Any]:
    """The findings as JSON: every number of `cdc.inspection.Inspection`, and those that follow from them."""
    value = _plain(asdict(found))
    assert isinstance(value, dict)
    value["endangered"] = found.is_endangered
    value["outage_seconds"] = found.outage_s
    if found.wal is not None:
        value["wal"]["bytes_per_hour"] = found.wal.bytes_per_hour
        value["wal"]["bytes_per_hour_before"] = found.wal.bytes_per_hour_before
    for facts, table in zip(found.tables, value["tables"], strict=True):
        table["table"] = str(facts.table)
        table["identity"] = IDENTITY.get(facts.identity, facts.identity)
        for changes, key in ((facts.changes, "changes"), (facts.changes_before, "changes_before")):
            if changes is not None:
                table[key]["per_second"] = changes.per_second
        if facts.space is not None:
            table["space"]["unused_share"] = facts.space.unused_share
        if facts.ages is not None:
            table["ages"]["late_share"] = facts.ages.late_share
            table["ages"]["counts"] = dict(zip(AGE_LABELS, facts.ages.counts, strict=True))
        for candidate, shown in zip(facts.candidates, table["candidates"], strict=True):
            shown["unique"] = candidate.is_unique
    if found.plan is not None:
        value["plan"]["bytes"] = found.plan.bytes
        value["plan"]["unplanned"] = [str(t) for t in found.plan.unplanned]
        for planned, shown in zip(found.plan.tables, value["plan"]["tables"], strict=True):
            shown["table"] = str(planned.table)
    return value


def _plain(value: Any) -> Any:
    """Keys with the unit written out, as in the other documents."""
    if isinstance(value, dict):
        return {(k[:-2] + "_seconds" if k.endswith("_s") else k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
