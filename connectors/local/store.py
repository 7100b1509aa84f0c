"""An object store in a local directory: the default lake, and what the others are measured against.

Guarantees: an object appears whole or not at all, also when the disk is full or the power goes; it is on the disk when
`put` returns (file and directory are synced). Conditional writes hold between threads and processes of one machine.

How: bytes go to a hidden temporary file in the object's own directory, are synced, and take the object's name by
rename (or by link, which fails if the name is taken). Replacing and deleting happen under a lock on one file in the
root. The etag is the file's inode, modification time and size, with the time pushed forward so that it grows with
every replacement: as good as a hash of the content for telling versions apart, without reading a byte.

It is not for network file systems without working `flock`, and does not stop other programs from changing files.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from cdc.errors import ConfigError, InvariantBroken, StoreConflict, StoreUnavailable
from cdc.ports import StoredObject

_LOCK: Final = ".cdc-store.lock"
_TEMP: Final = ".cdc-put-"
_STALE_S: Final = 24 * 3600
_CHUNK: Final = 4 << 20


class LocalStore:
    """Objects as files below `root`, which is created if it is missing. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.abspath(root))  # noqa: PTH100  (resolve() would follow an operator's symlinks)
        if "%" in str(self._root):
            # The Delta kernel decodes such a path once too often, and looks for another directory.
            raise ConfigError("lake.url: a local directory with a percent sign in its path cannot hold Delta tables")
        with _translated("the root"):
            _make_directory(self._root)

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, str] | None = None) -> LocalStore:
        """The store at `file:///path` or at a plain path; ConfigError if it names another host or is relative."""
        if options:
            raise ConfigError(f"lake: a local directory has no options, got {', '.join(sorted(options))}")
        parts = urlsplit(url)
        path = unquote(parts.path) if parts.scheme == "file" else url
        if (parts.scheme == "file" and parts.netloc not in ("", "localhost")) or not path.startswith("/"):
            raise ConfigError(f'lake.url = "{url}" is no absolute path', hint="write file:///srv/lake")
        return cls(Path(path))

    def put(self, key: str, data: Any, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write bytes (anything with the buffer protocol), return the etag; see ports.ObjectStore."""
        path = self._path(key)
        temp = path.parent / f"{_TEMP}{uuid.uuid4().hex}"
        with _translated(key):
            _make_directory(path.parent)
            try:
                try:
                    _write_synced(temp, data)
                except FileNotFoundError:
                    # Another thread has removed the last object there, and the directory with it.
                    _make_directory(path.parent)
                    _write_synced(temp, data)
                etag = self._place(key, temp, path, if_absent=if_absent, if_match=if_match)
            finally:
                with suppress(FileNotFoundError):
                    temp.unlink()
            _sync_directory(path.parent)
        return etag

    def get(self, key: str, *, into: Path | None = None) -> tuple[bytes, str] | None:
        """The object's bytes (or b"", if they went `into` a file) and etag, None if there is none."""
        with _translated(key):
            try:
                with self._path(key).open("rb") as f:
                    etag = _etag(os.fstat(f.fileno()))
                    if into is None:
                        return f.read(), etag
                    with into.open("wb") as copy:
                        shutil.copyfileobj(f, copy)
                    return b"", etag
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Objects whose key starts with `prefix`, in key order. Temporary files that a crash left are removed."""
        directory = prefix.rpartition("/")[0]
        base = self._path(directory) if directory else self._root
        yield from self._walk(base, f"{directory}/" if directory else "", prefix)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; those that do not exist are no error."""
        directories = set()
        for key in keys:
            path = self._path(key)
            with _translated(key), self._lock(), suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
                directories.add(path.parent)
        for directory in directories:
            with _translated("a directory"), suppress(FileNotFoundError):
                _sync_directory(directory)
            self._remove_empty(directory)

    def _remove_empty(self, directory: Path) -> None:
        """Directories are nothing of their own in a store: what has no object any more goes, up to the root."""
        while directory != self._root:
            try:
                directory.rmdir()
            except OSError:
                return
            directory = directory.parent

    def location(self, key: str) -> tuple[str, dict[str, str]]:
        """The absolute path of a key; a local directory needs no options."""
        return str(self._path(key) if key else self._root), {}

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        # A hidden first letter is ours: the lock, and objects that are not whole yet.
        if any(p in ("", ".", "..") or "\0" in p for p in parts) or parts[-1].startswith((_TEMP, _LOCK)):
            raise InvariantBroken(f"not an object's key: {key!r}")
        return self._root.joinpath(*parts)

    def _place(self, key: str, temp: Path, path: Path, *, if_absent: bool, if_match: str | None) -> str:
        """Give a finished temporary file the object's name, under the condition."""
        with self._lock():
            old = _stat(path)
            if if_absent and old is not None:
                raise StoreConflict(f"{key} exists already")
            if if_match is not None and (old is None or _etag(old) != if_match):
                raise StoreConflict(f"{key} was changed or removed by another writer")
            if old is not None:
                # An inode may be used again at once and clocks are coarse: growing times keep etags unique.
                grown = max(time.time_ns(), old.st_mtime_ns + 1)
                os.utime(temp, ns=(grown, grown))
            found = _etag(temp.stat())
            if if_absent:
                _link(key, temp, path)
            else:
                temp.replace(path)
            return found

    def _walk(self, directory: Path, stem: str, prefix: str) -> Iterator[StoredObject]:
        with _translated(stem):
            try:
                entries = list(os.scandir(directory))
            except (FileNotFoundError, NotADirectoryError):
                return
        named = sorted((f"{stem}{e.name}/" if e.is_dir() else f"{stem}{e.name}", e) for e in entries)
        for key, entry in named:
            if key.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(Path(entry.path), key, prefix)
            elif entry.name.startswith(_TEMP):
                _drop_stale(entry)
            elif key.startswith(prefix) and entry.name != _LOCK:
                try:
                    found = entry.stat()
                except FileNotFoundError:
                    continue
                yield StoredObject(
                    key=key, size=found.st_size, modified_at_us=found.st_mtime_ns // 1000, etag=_etag(found)
                )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Exclusion of threads (each opens the file anew) and processes. Held for a rename, never for a write."""
        fd = os.open(self._root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """The system's errors as StoreUnavailable; a repetition may mend them once the operator has made room."""
    try:
        yield
    except OSError as e:
        hint = {
            errno.ENOSPC: "make room on the lake's disk",
            errno.EDQUOT: "raise the quota of the lake's disk",
            errno.EACCES: "let the daemon's user write to the lake's directory",
            errno.EROFS: "the lake's file system is mounted read-only",
        }.get(e.errno or 0, "")
        raise StoreUnavailable(f"{what} in the local store: {os.strerror(e.errno or 0)}", hint=hint) from e


def _write_synced(path: Path, data: Any) -> None:
    view = memoryview(data).cast("B")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        done = 0
        while done < len(view):
            done += os.write(fd, view[done : done + _CHUNK])
            if isinstance(data, mmap.mmap) and done % mmap.PAGESIZE == 0:
                # Pages that have been written out need not count as ours.
                data.madvise(mmap.MADV_DONTNEED, 0, done)
        os.fsync(fd)
    finally:
        os.close(fd)
        view.release()


def _link(key: str, temp: Path, path: Path) -> None:
    """Take a name that must be free, also of programs that do not know our lock."""
    try:
        path.hardlink_to(temp)
    except FileExistsError:
        raise StoreConflict(f"{key} exists already") from None
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        temp.replace(path)  # no hard links here: the lock alone has to do


def _etag(found: os.stat_result) -> str:
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _drop_stale(entry: os.DirEntry[str]) -> None:
    with suppress(OSError):
        if time.time() - entry.stat().st_mtime > _STALE_S:
            Path(entry.path).unlink()


def _make_directory(path: Path) -> None:
    """Create a directory with its parents; each new name is durable."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    with suppress(FileExistsError):
        path.mkdir()
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
