"""Tells systemd how we are (sd_notify): ready, stopping, status, watchdog. One datagram socket, no library.

Without $NOTIFY_SOCKET every call is a no-op. A send never blocks and never raises: the service manager's health is
not ours.
"""

from __future__ import annotations

import logging
import os
import socket
import time

_log = logging.getLogger(__name__)


class Notifier:
    """Messages to the service manager that started us. Thread-safe: each message is one datagram."""

    def __init__(self, address: str | None = None) -> None:
        """`address`: path of the socket, `@name` for an abstract one; None: $NOTIFY_SOCKET."""
        self._address = address if address is not None else os.environ.get("NOTIFY_SOCKET", "")
        self._socket: socket.socket | None = None
        self._next_watchdog = 0.0
        self.watchdog_s = _watchdog_s()
        """How often the watchdog expects us; 0 if it does not."""
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    def ready(self, status: str = "") -> None:
        """Start-up is done."""
        self._send("READY=1", status)

    def stopping(self, status: str = "") -> None:
        """Shutdown has begun."""
        self._send("STOPPING=1", status)

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send("", text)

    def extend_timeout(self, seconds: float) -> None:
        """Ask for more time for what goes on now (start or stop)."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def watchdog(self) -> None:
        """We are alive. Call it as often as you like: sent at a third of the watchdog's interval."""
        now = time.monotonic()
        if self.watchdog_s and now >= self._next_watchdog:
            self._next_watchdog = now + self.watchdog_s / 3
            self._send("WATCHDOG=1")

    def close(self) -> None:
        """Close the socket; later calls do nothing."""
        if self._socket:
            self._socket.close()
            self._socket = None

    def _send(self, state: str, status: str = "") -> None:
        if not self._socket:
            return
        lines = [state] if state else []
        if status:
            lines.append("STATUS=" + status.replace("\n", " ")[:500])
        path = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            self._socket.sendto("\n".join(lines).encode(), path)
        except OSError as error:
            _log.debug("service manager not told", extra={"reason": error.strerror})


def _watchdog_s() -> float:
    """Interval of the watchdog, if it is meant for this process (sd_watchdog_enabled)."""
    pid = os.environ.get("WATCHDOG_PID")
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / 1e6 if usec.isdecimal() and (not pid or pid == str(os.getpid())) else 0.0
