"""The last step before an embedded server's `exec`: give up root, tie its life to the parent's, become it.

Run as a script (`python -I -S embedded_exec.py IDENTITY PARENT_PID SIGNAL [COMMAND ...]`), because the same in a
`preexec_fn` would run Python between fork and exec of a process with threads, which may deadlock. Every step happens
in this one process and `exec` keeps its id, so the id that the launcher sees is the server's. IDENTITY is `self`,
`namespace` (root appears as user 1000 in a user namespace of its own: files stay root's), or `UID:GID`. Without
COMMAND it only tries the identity. Linux only in what it adds; elsewhere it just runs the command.

It imports nothing of the project: an identity other than root may not be able to read it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1
_NAMESPACE_USER = 1000


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


def enter_namespace() -> None:
    """Become user 1000 of a new user namespace, mapped to the present user. Raises OSError where that is refused."""
    user, group = os.geteuid(), os.getegid()
    _checked(_libc().unshare(_CLONE_NEWUSER), "unshare(CLONE_NEWUSER)")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{_NAMESPACE_USER} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{_NAMESPACE_USER} {group} 1")


def switch_user(identity: str) -> None:
    """Become another user for good, without supplementary groups."""
    user, _, group = identity.partition(":")
    os.setgroups([])
    os.setgid(int(group))
    os.setuid(int(user))


def die_with_parent(parent: int, death_signal: int) -> None:
    """Ask the kernel to send us `death_signal` when the parent's thread that started us ends; survives exec.

    Must come after every change of identity, which clears it. A parent that died before the request is seen by the
    changed parent id.
    """
    if sys.platform != "linux":
        return
    _checked(_libc().prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise SystemExit("the process that started this server is gone")


def main(arguments: list[str]) -> None:
    identity, parent, death_signal, *command = arguments
    if identity == "namespace":
        enter_namespace()
    elif identity != "self":
        switch_user(identity)
    die_with_parent(int(parent), int(death_signal))
    if command:
        os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
