"""A Ceph object gateway of our own, for `make test-stores`: monitor, OSD in memory, radosgw, from Debian's packages.

`python -m tests.support.ceph --install` puts the packages there, where that is possible. The processes listen on the
loopback interface only, are those that this module starts, and are ended by their ids.
"""

from __future__ import annotations

import atexit
import functools
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.waiting import wait_until

PACKAGES = {"ceph-mon": "ceph-mon", "ceph-osd": "ceph-osd", "radosgw": "radosgw", "ceph": "ceph-common"}
"""Program → Debian's package."""
_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon},v1:127.0.0.1:{mon_v1}]
public addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon pg warn min per osd = 0
osd objectstore = memstore
memstore device bytes = 2147483648
osd memory target = 939524096
# The machine's disk holds nothing of it but logs.
mon data avail warn = 2
mon data avail crit = 1
run dir = {root}/run
admin socket = {root}/run/$name.asok
pid file = {root}/run/$name.pid
log file = {root}/$name.log
keyring = {root}/keyring
ms bind ipv6 = false
auth allow insecure global id reclaim = true
[mon.a]
mon data = {root}/mon
[osd.0]
osd data = {root}/osd
[client.rgw]
rgw data = {root}/rgw
rgw frontends = beast endpoint=127.0.0.1:{rgw}
rgw enable ops log = false
rgw thread pool size = 32
"""


def missing() -> list[str]:
    """Debian packages that are not installed here."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [package for program, package in PACKAGES.items() if shutil.which(program, path=path) is None]


@functools.cache
def ceph_endpoint(access_key: str, secret_key: str) -> str:
    """The gateway's URL; it is started at the first call and ends with this process. Skips the test if there is no
    Ceph here."""
    if missing():
        pytest.skip(f"no Ceph: apt-get install --no-install-recommends {' '.join(missing())}")
    return _Ceph(Path(tempfile.mkdtemp(prefix="cdc-ceph-"))).start(access_key, secret_key)


class _Ceph:
    """One cluster in one directory, which goes with it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._servers: list[subprocess.Popen[bytes]] = []
        self._mon, mon_v1, self._rgw = _free_ports(3)
        self._fsid = str(uuid.uuid4())
        for name in ("run", "mon", "osd", "rgw"):
            (root / name).mkdir()
        (root / "ceph.conf").write_text(
            _CONFIGURATION.format(root=root, fsid=self._fsid, mon=self._mon, mon_v1=mon_v1, rgw=self._rgw)
        )
        self._address = f"[v2:127.0.0.1:{self._mon},v1:127.0.0.1:{mon_v1}]"
        atexit.register(self.stop)

    def start(self, access_key: str, secret_key: str) -> str:
        """Start everything, with one user; the gateway's URL. Takes 15 seconds."""
        keyring, monmap = str(self._root / "keyring"), str(self._root / "monmap")
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        for name in ("client.admin", "osd.0", "client.rgw"):
            may = [word for part in ("mon", "osd", "mgr") for word in ("--cap", part, "allow *")]
            self._run("ceph-authtool", keyring, "--gen-key", "-n", name, *may)
        self._run("monmaptool", "--create", "--clobber", "--fsid", self._fsid, "--addv", "a", self._address, monmap)
        self._ceph("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._serve("ceph-mon", "-i", "a")
        wait_until(lambda: self._answers("-s"), 60, self._told)
        self._ceph("ceph", "auth", "import", "-i", keyring)
        number = str(uuid.uuid4())
        self._ceph("ceph", "osd", "new", number, "0")
        self._ceph("ceph-osd", "-i", "0", "--mkfs", "--no-mon-config", "--osd-uuid", number)
        self._serve("ceph-osd", "-i", "0")
        wait_until(lambda: "1 up" in self._answers("osd", "stat"), 60, self._told)
        self._serve("radosgw", "-n", "client.rgw")
        wait_until(lambda: _is_open(self._rgw), 120, self._told)
        self._ceph(
            "radosgw-admin", "-n", "client.rgw", "user", "create", "--uid=cdc", "--display-name=cdc",
            f"--access-key={access_key}", f"--secret-key={secret_key}",
        )  # fmt: skip
        return f"http://127.0.0.1:{self._rgw}"

    def stop(self) -> None:
        """End what was started, and remove the directory. What it holds is in memory: nothing is worth waiting for."""
        for server in reversed(self._servers):
            server.kill()
            server.wait()
        shutil.rmtree(self._root, ignore_errors=True)

    def _run(self, program: str, *words: str) -> str:
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{program}: {done.stderr[-2000:]}"
        return done.stdout

    def _ceph(self, program: str, *words: str) -> str:
        return self._run(program, "-c", str(self._root / "ceph.conf"), *words)

    def _answers(self, *words: str) -> str:
        """What the monitor says; empty if it does not answer."""
        command = ["ceph", "-c", str(self._root / "ceph.conf"), "--connect-timeout", "5", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout

    def _serve(self, program: str, *words: str) -> None:
        with (self._root / f"{program}.out").open("wb") as out:
            command = [program, "-c", str(self._root / "ceph.conf"), *words, "-f"]
            self._servers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out))

    def _told(self) -> str:
        return "\n".join(f"{p.name}: {p.read_text(errors='replace')[-1000:]}" for p in self._root.glob("*.out"))


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the system lends: a monitor must know its own beforehand."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(16_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    return list(found) if len(set(found)) == count else _free_ports(count)


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def install() -> int:
    """Install what is missing, as root and where apt works; 0 in any case: without it, its tests are skipped."""
    wanted = missing()
    if not wanted:
        return 0
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *wanted]
    if os.geteuid() == 0 and shutil.which("apt-get") is not None:
        sys.stdout.write(f"installing {' '.join(wanted)} (once; a minute or so)\n")
        sys.stdout.flush()
        for words in (["apt-get", "update"], command):
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(words, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, timeout=1200,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)  # fmt: skip
    if missing():
        sys.stderr.write(f"Ceph's tests are skipped: {' '.join(command)} (as root) installs what they need\n")
    return 0


if __name__ == "__main__":
    sys.exit(install() if sys.argv[1:] == ["--install"] else 2)
