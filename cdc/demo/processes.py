"""The demo's children: the daemon and one command at a time, each in a process group of its own and ended by its id.

Guarantees: `close` returns when none is left; on Linux a child also ends when the demo itself is killed (the kernel
sends it SIGKILL; that is safe for the daemon at any moment). Signals to the demo only raise a flag, which every wait
here looks at, so no child is lost between its birth and our knowing of it. To be used by the main thread.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from cdc.errors import CdcError

POLL_S = 0.03
DAEMON_STOP_S = 15.0
LOG_LINES_SHOWN = 15

# Run before the child becomes what it is to be: ask the kernel for SIGKILL when the demo ends. (In a `preexec_fn` it
# would be Python between fork and exec of a process with threads.)
_TIE = """
import ctypes, os, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != int(parent):
        sys.exit("the demo is gone")
os.execv(command[0], command)
"""


class DemoFailed(CdcError):
    """A step of the demo did not work."""


class Interrupted(CdcError):
    """Somebody wants the demo to end."""


class Interrupts:
    """Turns SIGINT, SIGTERM and SIGHUP into a flag while it is entered."""

    def __init__(self) -> None:
        self.count = 0
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Interrupted if a signal has come."""
        if self.count:
            raise Interrupted("interrupted")

    def sleep(self, seconds: float) -> None:
        """Interrupted if a signal comes meanwhile."""
        deadline = time.monotonic() + seconds
        self.check()
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left))
            self.check()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        # Nothing that takes a lock: the main thread may hold it.
        self.count += 1
        self.number = number


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code, its JSON document, and how long it took."""

    code: int
    document: dict[str, Any]
    seconds: float


class Processes:
    """The daemon and the commands of one configuration."""

    def __init__(self, config: Path, log: Path, interrupts: Interrupts) -> None:
        self._config = config
        self._log = log
        self._interrupts = interrupts
        self._daemon: subprocess.Popen[bytes] | None = None
        self.daemon_pid = 0
        """Of the daemon that runs; 0 if none should."""

    def start_daemon(self) -> None:
        """Start `cdc run`; returns at once. Its log is appended to the file."""
        with self._log.open("ab") as log:
            self._daemon = self._spawn(["run"], stdout=log, stderr=log)
        self.daemon_pid = self._daemon.pid

    def kill_daemon(self) -> int:
        """SIGKILL, as a crash would; the id of the process that is gone."""
        assert self._daemon is not None
        pid, self.daemon_pid = self._daemon.pid, 0
        self._daemon.kill()
        self._daemon.wait()
        return pid

    def stop_daemon(self) -> int:
        """SIGTERM, and SIGKILL if it has not ended in time or a second interrupt comes; its exit code."""
        daemon = self._daemon
        if daemon is None or daemon.poll() is not None:
            self.daemon_pid = 0
            return daemon.returncode if daemon is not None else 0
        self.daemon_pid = 0
        daemon.terminate()
        deadline = time.monotonic() + DAEMON_STOP_S
        while daemon.poll() is None:
            if time.monotonic() > deadline or self._interrupts.count > 1:
                daemon.kill()
                return daemon.wait()
            time.sleep(POLL_S)
        return daemon.returncode

    def check_daemon(self) -> None:
        """DemoFailed if the daemon should run and does not."""
        if self.daemon_pid and self._daemon is not None and self._daemon.poll() is not None:
            code, self.daemon_pid = self._daemon.returncode, 0
            raise DemoFailed(f"the daemon ended by itself with code {code}")

    def command(self, words: Sequence[str], *, timeout_s: float = 60.0, allowed: Sequence[int] = (0,)) -> Outcome:
        """Run a verb to its end. DemoFailed if it exits with another code than those allowed, or not in time."""
        began = time.monotonic()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = self._spawn(["--json", *words], stdout=out, stderr=err)
            try:
                while process.poll() is None:
                    self._interrupts.sleep(POLL_S)
                    if time.monotonic() - began > timeout_s:
                        raise DemoFailed(f"cdc {words[0]} did not end within {timeout_s:g} s")
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            out.seek(0)
            err.seek(0)
            written, notes = out.read(), err.read().decode(errors="replace").strip()
        if process.returncode not in allowed:
            raise DemoFailed(f"cdc {' '.join(words)} ended with code {process.returncode}", hint=notes[-2000:])
        return Outcome(process.returncode, json.loads(written), time.monotonic() - began)

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Block until the condition holds while the daemon is alive; DemoFailed if it does not in time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.check_daemon()
            if time.monotonic() > deadline:
                raise DemoFailed(f"not within {timeout_s:g} s: {what}")
            self._interrupts.sleep(POLL_S)

    def log_tail(self) -> list[str]:
        """The last lines that the daemon has logged."""
        if not self._log.exists():
            return []
        return self._log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]

    def close(self) -> None:
        """End what is left; bounded, idempotent."""
        self.stop_daemon()

    def _spawn(self, words: Sequence[str], *, stdout: Any, stderr: Any) -> subprocess.Popen[bytes]:
        # -P: a folder named cdc where the demo is started from is not ours.
        command = [sys.executable, "-P", "-m", "cdc", "--config", str(self._config), *words]
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=_environment(),
            start_new_session=True,  # Ctrl-C on the terminal is the demo's to handle
        )


def _environment() -> dict[str, str]:
    """Ours without what would lead a child elsewhere: another configuration, our service manager."""
    ours = ("CDC_CONFIG", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
    return {name: value for name, value in os.environ.items() if name not in ours}
