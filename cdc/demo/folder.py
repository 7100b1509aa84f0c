"""The folder of a demo: made, replaced only if a demo made it, held by one demo at a time; and the configuration in it.

The configuration is written for people to read and to use after the demo: it is an ordinary one, with comments, and
the passwords are in files beside it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cdc.errors import ConfigError

MARK = ".cdc-demo"
"""A file that says that a demo made the folder; locked while one runs in it."""
DEFAULT = Path("cdc-demo")
_ELSEWHERE = "name another place: cdc demo --directory DIR"

MODEL_SQL = """\
select c.customer_id,
       count(distinct o.order_id) as orders,
       coalesce(sum(i.quantity * i.unit_price), 0)::decimal(14,2) as value
from shop.customers c
left join shop.orders o using (customer_id)
left join shop.order_items i using (order_id)
group by 1"""
SYNC = "customer_value"

_CONFIG = """\
# Written by `cdc demo`: a whole configuration. Every key that there is: config.example.toml.
state_dir = "state"                   # event log and state database: a cache
metrics_listen = "127.0.0.1:0"        # any free port, so that it cannot collide with yours
log_format = "text"

# Where changes come from: the shop's database.
[source.shop]
{source}
confirm_after = "landed"              # the database may forget a change once the lake holds it
confirm_every_s = 2
chunk_rows = 20000                    # small, so that snapshots take several chunks here

# Where they go: Delta tables, <source>/<schema>.<table>/current and …/changelog.
[lake]
{lake}
land_every_s = 2                      # a demo is impatient; the default is 10
merge_every_s = 2
merge_share = 0.3

# SQL over current tables, all read at one position.
[model.customer_value]
sql = \"\"\"
{sql}
\"\"\"
key = ["customer_id"]

# Results go back into the shop's own database, as another role; our own writes start no new run.
[target.shop]
{target}

[sync.customer_value]
model = "customer_value"
target = "shop"
table = {scores}
key = ["customer_id"]

# On a slow machine most customers may have ordered something between two runs.
[sync.customer_value.guard]
max_change_share = 1.0
"""


@contextmanager
def held(directory: Path) -> Iterator[bool]:
    """Make the folder, or take over what a demo left there, and hold it; yields whether it was there before.

    Nothing in it is deleted yet: see `clear`. ConfigError if the folder is not a demo's, another demo is running in
    it, or it cannot be written.
    """
    mark = directory / MARK
    try:
        replaced = mark.exists()
        if not replaced and directory.exists() and any(directory.iterdir()):
            raise ConfigError(f"{directory} exists, and no demo made it", hint=_ELSEWHERE)
        directory.mkdir(parents=True, exist_ok=True)
        lock = mark.open("a")
    except OSError as error:
        raise ConfigError(f"{directory} cannot be used: {error.strerror}", hint=_ELSEWHERE) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another demo is running in {directory}", hint=_ELSEWHERE) from error
        yield replaced


def clear(directory: Path) -> None:
    """Delete everything in the folder but its mark."""
    for entry in directory.iterdir():
        if entry.name == MARK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_config(
    directory: Path, source: Mapping[str, str], target: Mapping[str, str], scores: str, lake: Mapping[str, str]
) -> Path:
    """Write the configuration; its path. `lake`: keys of its section, without a URL if it is to stand in the folder."""
    path = directory / "cdc.toml"
    path.write_text(
        _CONFIG.format(
            source=_keys(source),
            target=_keys(target),
            lake=_keys({"url": (directory / "lake").as_uri(), **lake}),
            sql=MODEL_SQL,
            scores=json.dumps(scores),
        )
    )
    return path


def shown(path: Path) -> str:
    """The path as people would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _keys(keys: Mapping[str, str]) -> str:
    # A JSON string is a TOML string.
    return "\n".join(f"{name} = {json.dumps(value)}" for name, value in keys.items())
