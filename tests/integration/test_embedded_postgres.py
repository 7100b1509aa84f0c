"""The launcher against real processes: it starts, crashes and stops what it says, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from cdc.errors import ConfigError, SourceUnavailable
from connectors.postgres import embedded
from connectors.postgres.embedded import THROWAWAY, EmbeddedPostgres
from tests.support.postgres import private_server
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    with private_server(tmp_path / "pg") as server:
        yield server


def processes_of(data: Path) -> list[int]:
    """Live processes that have their working directory in the data directory, as all of a server's have."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve() == data.resolve():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def cpu_ticks(pid: int) -> int:
    """Processor time that a process has used, in hundredths of a second."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def shared_memory_segments() -> set[str]:
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


def test_a_started_server_answers_with_the_settings_it_was_given(tmp_path: Path) -> None:
    with private_server(tmp_path, work_mem="7MB", application_name="it's") as server:
        with psycopg.connect(server.dsn()) as client:
            assert client.execute("SHOW work_mem").fetchone() == ("7MB",)
            assert client.execute("SHOW application_name").fetchone() == ("it's",)
            assert client.execute("SHOW wal_level").fetchone() == ("logical",)
            assert client.execute("SELECT pg_backend_pid()").fetchone()
            version = client.info.server_version
        assert version // 10_000 == server.version
        assert processes_of(server.data), "the test's way to see the server's processes must work"
    assert server.pid == 0
    assert processes_of(server.data) == []


def test_alter_system_wins_over_the_launchers_settings_after_a_restart(running: EmbeddedPostgres) -> None:
    with psycopg.connect(running.dsn(), autocommit=True) as client:
        client.execute("ALTER SYSTEM SET max_connections = 33")
    port = running.port
    running.stop()
    running.start()
    assert running.port == port, "clients find a restarted server where it was"
    with psycopg.connect(running.dsn()) as client:
        assert client.execute("SHOW max_connections").fetchone() == ("33",)


def test_a_crash_keeps_what_was_committed_and_nothing_else(running: EmbeddedPostgres) -> None:
    before = shared_memory_segments()
    with psycopg.connect(running.dsn()) as client, contextlib.closing(psycopg.connect(running.dsn())) as busy:
        client.execute("CREATE TABLE t (a int)")
        client.execute("INSERT INTO t VALUES (1)")
        client.commit()
        client.execute("INSERT INTO t VALUES (2)")
        # A session that computes does not look whether its server is still there: it must be killed like the rest.
        busy.pgconn.send_query(b"SELECT count(*) FROM generate_series(1, 1000000000)")
        wait_until(lambda: cpu_ticks(busy.info.backend_pid) > 5, 60, "the query to compute")
        running.kill()
        assert processes_of(running.data) == []
        with pytest.raises(psycopg.OperationalError):
            client.execute("SELECT 1")
    assert len(shared_memory_segments() & before) < len(before), "a crash leaves no segment in the kernel"
    running.start()
    with psycopg.connect(running.dsn()) as client:
        assert client.execute("SELECT a FROM t").fetchall() == [(1,)]
    assert "database system was not properly shut down" in running.log_path.read_text()


def test_many_crashes_in_a_row_always_recover(running: EmbeddedPostgres) -> None:
    with psycopg.connect(running.dsn(), autocommit=True) as client:
        client.execute("CREATE TABLE t (a int)")
    for turn in range(5):
        with psycopg.connect(running.dsn(), autocommit=True) as client:
            client.execute("INSERT INTO t VALUES (%s)", (turn,))
            running.kill()
        running.start()
    with psycopg.connect(running.dsn()) as client:
        assert client.execute("SELECT count(*) FROM t").fetchone() == (5,)


def test_a_port_that_somebody_takes_first_is_replaced(
    tmp_path: Path, running: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    offers = iter([running.port, running.port])
    free_port = embedded._free_port
    monkeypatch.setattr(embedded, "_free_port", lambda: next(offers, 0) or free_port())
    with private_server(tmp_path / "second") as second:
        assert second.port != running.port
        with psycopg.connect(second.dsn()) as client:
            assert client.execute("SHOW data_directory").fetchone() == (str(second.data),)


def test_a_server_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    server = private_server(tmp_path, shared_buffers="nonsense")
    with pytest.raises(SourceUnavailable, match="shared_buffers"):
        server.start()
    assert server.pid == 0
    assert processes_of(server.data) == []


def test_servers_of_one_template_share_their_identifier_and_fresh_ones_do_not(tmp_path: Path) -> None:
    found = []
    for name, fresh in (("a", False), ("b", False), ("c", True)):
        with private_server(tmp_path / name, fresh=fresh) as server, psycopg.connect(server.dsn()) as client:
            row = client.execute("SELECT system_identifier FROM pg_control_system()").fetchone()
            assert row is not None
            found.append(row[0])
    assert found[0] == found[1] != found[2]


def test_a_password_keeps_others_out(tmp_path: Path) -> None:
    secret = "a'b c@/:ü"
    with EmbeddedPostgres(tmp_path, settings=THROWAWAY, password=secret) as server:
        with psycopg.connect(server.dsn()) as client:
            assert client.execute("SELECT 1").fetchone() == (1,)
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(f"postgresql://postgres:wrong@127.0.0.1:{server.port}/postgres")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_root_without_user_namespaces_runs_it_as_nobody_even_in_a_closed_directory(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    server = EmbeddedPostgres(closed / "pg", settings=THROWAWAY, run_as="nobody")
    with server:
        place = server.data.resolve()
        assert Path(f"/proc/{server.pid}").stat().st_uid != 0
        with psycopg.connect(server.dsn()) as client:
            assert client.execute("SELECT 1").fetchone() == (1,)
        server.kill()
        server.start()
        with psycopg.connect(server.dsn()) as client:
            assert client.execute("SELECT 1").fetchone() == (1,)
    server.remove()
    assert not place.parent.exists(), "the place that stood in for the closed directory is gone as a whole"
    assert list((closed / "pg").iterdir()) == []


def test_a_server_started_from_a_thread_outlives_that_thread(tmp_path: Path) -> None:
    server = private_server(tmp_path)
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    try:
        # The kernel sends the parent-death signal as the thread ends, so a few conversations later it has arrived.
        for _ in range(20):
            with psycopg.connect(server.dsn()) as client:
                assert client.execute("SELECT 1").fetchone() == (1,)
    finally:
        server.stop()


PARENT = """
import sys, pathlib
from connectors.postgres.embedded import EmbeddedPostgres, THROWAWAY
with EmbeddedPostgres(pathlib.Path(sys.argv[1]), settings=THROWAWAY) as server:
    print(server.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_when_its_parent_does_however_that_happens(tmp_path: Path, end: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert pid in processes_of(tmp_path / "data")
        parent.send_signal(end)
        parent.wait(20)
        wait_until(lambda: not processes_of(tmp_path / "data"), 60, "the server's processes to end")
    finally:
        parent.kill()
        parent.communicate()


INTERRUPTED = """
import sys, pathlib, psycopg
from connectors.postgres.embedded import EmbeddedPostgres, THROWAWAY
with EmbeddedPostgres(pathlib.Path(sys.argv[1]), settings=THROWAWAY) as server:
    client = psycopg.connect(server.dsn())
    try:
        print(server.pid, flush=True)
        sys.stdin.read()
    except KeyboardInterrupt:
        for _ in range(300):
            client.execute("SELECT pg_sleep(0.001)")
        print("still served", flush=True)
"""


def test_ctrl_c_in_the_terminal_reaches_the_program_and_not_its_server(tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        start_new_session=True,
    )
    try:
        assert program.stdout is not None
        assert int(program.stdout.readline()) in processes_of(tmp_path / "data")
        os.killpg(program.pid, signal.SIGINT)  # what a terminal does: the signal goes to the whole group
        assert program.stdout.read() == "still served\n"
        assert program.wait(20) == 0
        assert processes_of(tmp_path / "data") == []
    finally:
        program.kill()
        program.communicate()


def test_a_named_directory_without_binaries_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="CDC_POSTGRES_BIN"):
        embedded.find_binaries(tmp_path)
    monkeypatch.setenv("CDC_POSTGRES_BIN", str(tmp_path))
    with pytest.raises(ConfigError, match="no Postgres binaries"):
        embedded.find_binaries()


def test_the_database_fixture_gives_an_empty_database_and_cleans_up_what_hangs_on_it(
    server: EmbeddedPostgres, database: str
) -> None:
    from tests.support.postgres import create_database, drop_database

    dsn = create_database(server, "untidy")
    with psycopg.connect(dsn, autocommit=True) as client:
        client.execute("SELECT pg_create_logical_replication_slot('untidy', 'pgoutput')")
        client.execute("SELECT pg_replication_origin_create('untidy')")
        client.execute("CREATE TABLE t (a int)")
        client.execute("BEGIN")
        client.execute("INSERT INTO t VALUES (1)")
        client.execute("PREPARE TRANSACTION 'untidy'")
        drop_database(server, "untidy")
    with psycopg.connect(database) as client:
        assert client.execute("SELECT count(*) FROM pg_replication_slots").fetchone() == (0,)
        assert client.execute("SELECT count(*) FROM pg_prepared_xacts").fetchone() == (0,)
        assert client.execute("SELECT count(*) FROM pg_replication_origin").fetchone() == (0,)
        assert client.execute(
            "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        ).fetchone() == (0,)
