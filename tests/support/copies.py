"""Copies of a running server, by the low-level backup interface: standbys that follow it, and restores to a point.

A copy is a server of its own (connectors.postgres.embedded) on a copy of the data directory. Its WAL comes from the
server that it was copied from: by streaming, or out of that one's pg_wal while it is still there.
"""

from __future__ import annotations

import atexit
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import psycopg
from psycopg import sql

from connectors.postgres.embedded import EmbeddedPostgres
from tests.support.waiting import wait_until

_LEFT_OUT = ("postmaster.pid", "postmaster.opts")


def standby_of(
    primary: EmbeddedPostgres, directory: Path, *, name: str, dbname: str = "postgres", **settings: str | int
) -> EmbeddedPostgres:
    """A streaming standby, started and caught up; it uses a physical slot `name` on the primary. `dbname` is where
    a synchronizing standby (sync_replication_slots) looks for slots."""
    with psycopg.connect(primary.dsn(), autocommit=True) as connection:
        connection.execute("select pg_create_physical_replication_slot(%s, true)", [name])
    conninfo = f"host=127.0.0.1 port={primary.port} user=postgres dbname={dbname} application_name={name}"
    standby = _copy(
        primary, directory,
        {**settings, "primary_conninfo": conninfo, "primary_slot_name": name, "hot_standby_feedback": "on"},
        signal_file="standby.signal",
    )  # fmt: skip
    standby.start()
    caught_up(primary, standby)
    return standby


def caught_up(primary: EmbeddedPostgres, standby: EmbeddedPostgres) -> None:
    """Wait until the standby has replayed everything that the primary has written by now."""
    head = scalar(primary.dsn(), "select pg_current_wal_flush_lsn()::text")
    wait_until(
        lambda: scalar(standby.dsn(), f"select pg_last_wal_replay_lsn() >= '{head}'"), message="the standby to catch up"
    )


def promote(standby: EmbeddedPostgres) -> None:
    """Return when it is a primary, on a timeline of its own."""
    scalar(standby.dsn(), "select pg_promote(true, 60)")
    wait_until(lambda: scalar(standby.dsn(), "select not pg_is_in_recovery()"), message="the promotion")


def restore_of(
    primary: EmbeddedPostgres, directory: Path, *, between: Callable[[], str], **settings: str | int
) -> EmbeddedPostgres:
    """Back the server up, do what `between` does, and restore it to the LSN that this returns: a server on the next
    timeline that never saw what came behind. The first server is stopped; the restored one takes its port."""
    restored = _copy(primary, directory, {}, signal_file="recovery.signal")
    target = between()
    wal = primary.data.resolve() / "pg_wal"
    scalar(primary.dsn(), "select pg_switch_wal()::text")
    primary.stop()
    restored.port = primary.port
    restored.settings.update(settings)
    # Slots are no part of a backup; a restore of the whole machine's disk has them.
    shutil.rmtree(restored.data.resolve() / "pg_replslot")
    _cp(primary.data.resolve() / "pg_replslot", restored.data.resolve() / "pg_replslot")
    restored.settings.update(
        restore_command=f'cp "{wal}/%f" "%p"', recovery_target_lsn=target, recovery_target_action="promote"
    )
    restored.start()
    wait_until(lambda: scalar(restored.dsn(), "select not pg_is_in_recovery()"), message="the end of the recovery")
    return restored


def upgraded(old: EmbeddedPostgres, new: EmbeddedPostgres) -> None:
    """pg_upgrade: what `old` (stopped) holds, slots too, goes into the new cluster of `new`, which is not started."""
    new.start()
    new.stop()
    place = Path(tempfile.mkdtemp(prefix="cdc-up-"))
    place.chmod(0o777)
    try:
        binaries = str(old.binary("postgres").parent)
        old.run(
            "pg_upgrade", "--old-bindir", binaries, "--new-bindir", binaries, "--old-datadir", str(old.data.resolve()),
            "--new-datadir", str(new.data.resolve()), "--username", "postgres", "--socketdir", str(place), "--copy",
            "--old-port", str(old.port), "--new-port", str(new.port),
        )  # fmt: skip
    finally:
        shutil.rmtree(place, ignore_errors=True)


def scalar(dsn: str, query: str) -> object:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(query.encode()).fetchone()
        assert row is not None
        return row[0]


def _copy(
    server: EmbeddedPostgres, directory: Path, settings: dict[str, str | int], *, signal_file: str
) -> EmbeddedPostgres:
    """Copy the data of a running server into a server of its own, which is not started."""
    copy = EmbeddedPostgres(directory, settings={**server.settings, **settings})
    directory.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="cdc-postgres-data-")) / "data"
    place.parent.chmod(0o755)
    copy.data.symlink_to(place)
    atexit.register(copy.remove)
    start, stop = (
        ("pg_backup_start", "pg_backup_stop") if server.version >= 15 else ("pg_start_backup", "pg_stop_backup")
    )
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        if server.version >= 15:
            connection.execute(sql.SQL("select {}('copy', true)").format(sql.Identifier(start)))
        else:
            connection.execute(sql.SQL("select {}('copy', true, false)").format(sql.Identifier(start)))
        _cp(server.data.resolve(), place)
        arguments = sql.SQL("false") if server.version >= 15 else sql.SQL("false, false")
        row = connection.execute(
            sql.SQL("select labelfile from {}({})").format(sql.Identifier(stop), arguments)
        ).fetchone()
    assert row is not None
    for name in _LEFT_OUT:
        (place / name).unlink(missing_ok=True)
    for slot in (place / "pg_replslot").iterdir():
        shutil.rmtree(slot)
    owner = place.stat()
    for name, text in (("backup_label", str(row[0])), (signal_file, "")):
        (place / name).write_text(text)
        shutil.chown(place / name, owner.st_uid, owner.st_gid)
    return copy


def _cp(source: Path, target: Path) -> None:
    # Files of a running server may go while they are copied; WAL replay makes the copy whole.
    subprocess.run(["cp", "-a", str(source), str(target)], check=False, stderr=subprocess.DEVNULL)
