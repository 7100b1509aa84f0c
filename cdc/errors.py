"""Errors of the product: what went wrong, in which object, and what mends it.

Every class has a verdict that its supervisor obeys: RETRY (back off and repeat), OPERATOR (stop this
source, table, sink or sync and show the hint; the rest goes on), FATAL (an invariant is broken or the
process cannot work: stop). Messages never hold row values or secrets. Client libraries' exceptions are
translated at the connector's edge, with `from`; anything unknown is treated as OPERATOR, never retried blindly.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar


class Verdict(Enum):
    RETRY = "retry"
    OPERATOR = "operator"
    FATAL = "fatal"


class CdcError(Exception):
    """Base of all errors; `hint` is the statement or command that mends it."""

    verdict: ClassVar[Verdict] = Verdict.OPERATOR

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message} (hint: {self.hint})" if self.hint else message


class ConfigError(CdcError):
    """The configuration is wrong or incomplete."""

    verdict = Verdict.FATAL


class SourceUnavailable(CdcError):
    """The source cannot be reached, or cut the connection."""

    verdict = Verdict.RETRY


class GaveWay(SourceUnavailable):
    """A long snapshot was left because somebody waits for a lock on its table."""


class Standby(SourceUnavailable):
    """Another daemon has the source and does its work: ours waits for its turn. Not a fault."""


class SourceRefused(CdcError):
    """The source answers, but does not let us do what we need (privilege, setting, missing object)."""


class NotPublished(SourceRefused):
    """The table that is to be read is not in the publication any more, or is gone: the next look at the catalog tells
    what has become of it."""


class FilterRefused(CdcError):
    """The source does not run the filter of a resync. It is the filter's fault, so its table goes on."""


class SlotLost(CdcError):
    """The slot is gone, invalidated, or not where the lake says that it must be."""


class Undecodable(SlotLost):
    """The server cannot decode what lies ahead of the slot: the publication did not exist when it was written."""


class ProtocolError(CdcError):
    """A message that we do not understand; the stream stops there rather than skip it."""


class IdentityMissing(CdcError):
    """A change cannot be applied because its table has no usable key."""


class Diverged(CdcError):
    """A change cannot be applied because the lake does not hold the row that it changes."""


class SchemaConflict(CdcError):
    """A table's new shape cannot be held by its lake table."""


class KeyChanged(SchemaConflict):
    """A table's rows are known by another key than changes that have not been merged: it must be read anew."""


class StoreUnavailable(CdcError):
    """The object store cannot be reached or failed in a way that a repetition may mend."""

    verdict = Verdict.RETRY


class StoreRefused(CdcError):
    """The object store answers, but does not keep what it must promise for a lake."""


class StoreConflict(CdcError):
    """A conditional write lost against another writer."""

    verdict = Verdict.RETRY


class LedgerConflict(CdcError):
    """Two processes keep account of what one sync's target has acknowledged."""


class TargetUnavailable(CdcError):
    """A reverse-ETL target cannot be reached."""

    verdict = Verdict.RETRY


class TargetRejected(CdcError):
    """A reverse-ETL target refused what we sent."""


class ModelFailed(CdcError):
    """The SQL of a model does not run, or its result breaks the model's key."""


class StreamRestarted(CdcError):
    """The source's stream began anew inside a transaction; what was read of it is void. Not a fault."""

    verdict = Verdict.RETRY


class LogFull(CdcError):
    """The event log reached its size limit; capture waits until landing frees space."""

    verdict = Verdict.RETRY


class SpoolFailed(CdcError):
    """The local disk does not hold the transactions that the server streams before they commit."""

    verdict = Verdict.RETRY


class DiskFailed(CdcError):
    """The local disk does not take the files of a sync's run."""

    verdict = Verdict.RETRY


class LogCorrupt(CdcError):
    """A record of the event log does not have the bytes that its index promises."""

    verdict = Verdict.FATAL


class LeaseExpired(CdcError):
    """The lease was not renewed in time: nothing may be written until it is, if nobody else has taken it by then."""

    verdict = Verdict.RETRY


class LeaseLost(CdcError):
    """Another daemon writes to this lake."""

    verdict = Verdict.FATAL


class FormatTooNew(CdcError):
    """State or lake was written by a newer version."""

    verdict = Verdict.FATAL


class InvariantBroken(CdcError):
    """Something that must never happen did; going on could falsify data."""

    verdict = Verdict.FATAL


class TimedOut(CdcError):
    """A bounded wait ended without its condition."""
