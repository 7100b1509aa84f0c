"""What an operator can get wrong about a source: each mistake ends in a message that names it and what mends it.

One table: what is wrong, how a start says so, and what `check` finds. Nothing of it is retried blindly where only a
person can change it.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from cdc.config import SourceConfig
from cdc.errors import CdcError, Verdict
from cdc.ports import Finding
from connectors.postgres.check import ADVISORIES, advisories
from connectors.postgres.embedded import THROWAWAY, EmbeddedPostgres
from connectors.postgres.source import PostgresKind
from tests.support.daemon import execute
from tests.support.postgres import private_server

DEBIAN = Path("/usr/lib/postgresql/15/bin")
"""A build with TLS, if this machine has one: the embedded binaries have none."""

_numbers = itertools.count(1)


def configured(dsn: str) -> SourceConfig:
    return SourceConfig(name="shop", dsn=dsn, slot="bad_input", publication=("bad_input",), connect_timeout_s=3)


def start(config: SourceConfig) -> CdcError:
    """What the first steps of a start end with: identity, set-up, stream."""
    source, admin = PostgresKind.source(config), PostgresKind.admin(config)
    try:
        source.identity()
        admin.setup(dry_run=False)
        source.open(None, Nothing(), 1)
    except CdcError as told:
        return told
    finally:
        source.close()
    raise AssertionError("it started")


class Nothing:
    """No schema is known yet."""

    def register(self, schema: object) -> object:
        return schema

    def versions(self, table: object) -> list[object]:
        return []


@dataclass(frozen=True, slots=True)
class Mistake:
    """`says` and `hint` are of the start's error, `finding` is the name of the error that `check` finds."""

    name: str
    spoil: Callable[[str], str]
    says: str
    hint: str
    finding: str = "connection"
    verdict: Verdict = Verdict.OPERATOR


def with_words(**words: str) -> Callable[[str], str]:
    return lambda dsn: make_conninfo(dsn, **words)


def as_role(attributes: str, *grants: str) -> Callable[[str], str]:
    """The DSN of a role made for the case: {name} and {database} stand in the grants."""

    def spoil(dsn: str) -> str:
        with psycopg.connect(dsn, autocommit=True) as connection:
            name = f"role_{connection.info.dbname}_{next(_numbers)}"
            execute(dsn, f"create role {name} {attributes}")
            execute(dsn, *(g.format(name=name, database=connection.info.dbname) for g in grants))
        return make_conninfo(dsn, user=name)

    return spoil


READS = ("grant usage on schema public to {name}", "grant select on all tables in schema public to {name}")

MISTAKES = [
    Mistake("the database does not exist", with_words(dbname="nowhere"), "does not exist", "user and database"),
    Mistake("the role does not exist", with_words(user="nobody_here"), "does not exist", "user and database"),
    Mistake("the server has no TLS", with_words(sslmode="require"), "does not support SSL", "ssl = on"),
    Mistake(
        "several hosts, and any will do",
        with_words(host="127.0.0.1,localhost", port=""),
        "several hosts",
        "target_session_attrs=primary",
    ),
    Mistake(
        "the port is closed", with_words(port="1"), "Connection refused", "", "connection", verdict=Verdict.RETRY
    ),
    Mistake("the role may not replicate", as_role("login noreplication", *READS), "", "cdc check",
            "replication privilege"),
    Mistake("the role may not create the publication", as_role("login replication", *READS), "", "cdc check",
            "publication privilege"),
    Mistake(
        "the tables belong to others",
        as_role("login replication", *READS, "grant create on database {database} to {name}"),
        "must be owner of table",
        "cdc check",
        "table owner",
    ),
    Mistake("the role may not log in", as_role("nologin"), "not permitted to log in", "login"),
]  # fmt: skip


@pytest.mark.matrix
def test_each_mistake_at_a_source_is_named_with_what_mends_it(database: str) -> None:
    execute(database, "create table orders (id int primary key)", "create table notes (id int primary key)")
    try:
        for mistake in MISTAKES:
            config = configured(mistake.spoil(database))
            told = start(config)
            where = f"{mistake.name}: {told!r}"
            assert mistake.says in str(told.args[0]), where
            assert mistake.hint in told.hint, where
            assert told.verdict is mistake.verdict, where
            found = {f.name: f for f in PostgresKind.admin(config).check() if f.severity == "error"}
            assert mistake.finding in found, f"{mistake.name}: {found}"
            assert found[mistake.finding].fix or mistake.verdict is Verdict.RETRY, mistake.name
    finally:
        drop_roles(database)


def drop_roles(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        names = connection.execute(
            "select rolname from pg_roles where rolname like %s", [f"role\\_{connection.info.dbname}\\_%"]
        ).fetchall()
        for (name,) in names:
            connection.execute(f"drop owned by {name}; drop role {name}".encode())


def test_a_role_is_told_each_right_that_it_lacks(database: str) -> None:
    execute(
        database,
        "create table orders (id int primary key)",
        "create table hidden (id int primary key)",
        "alter table hidden enable row level security",
        "create publication bad_input for all tables",
        "revoke execute on function pg_logical_emit_message(boolean, text, text"
        + (", boolean" if version(database) >= 170000 else "")
        + ") from public",
    )
    try:
        dsn = as_role("login replication connection limit 3", "grant select on hidden to {name}")(database)
        user = psycopg.conninfo.conninfo_to_dict(dsn)["user"]
        found = errors(dsn)
        fixes = {name: f.fix for name, f in found.items()}
        assert set(found) == {"select privilege", "message privilege", "connection limit", "row security"}, found
        assert f'grant select on public.orders to "{user}"' in fixes["select privilege"]
        assert fixes["message privilege"].startswith("grant execute on function pg_catalog.pg_logical_emit_message(")
        assert "bypassrls" in fixes["row security"]
        assert found["row security"].object == "public.hidden"

        # What is named is what mends it.
        execute(
            database,
            fixes["select privilege"],
            fixes["message privilege"],
            fixes["connection limit"],
            fixes["row security"].partition(" --")[0],
        )
        assert errors(dsn) == {}
    finally:
        execute(database, "drop publication bad_input")
        drop_roles(database)


def version(dsn: str) -> int:
    with psycopg.connect(dsn) as connection:
        return connection.info.server_version


def errors(dsn: str, *, severity: str = "error") -> dict[str, Finding]:
    return {f.name: f for f in PostgresKind.admin(configured(dsn)).check() if f.severity == severity}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A server with one slot, one sender and passwords for one role; tests below change it in turn."""
    with private_server(
        tmp_path_factory.mktemp("small"),
        max_replication_slots=1,
        max_wal_senders=1,
        max_slot_wal_keep_size="64MB",
        wal_sender_timeout=0,
    ) as server:
        execute(server.dsn(), "create role asked login password 'right'", "create role stranger login",
                "create table orders (id int primary key)")  # fmt: skip
        rules = server.data / "pg_hba.conf"
        rules.write_text("host all asked all scram-sha-256\nhost all stranger all reject\n" + rules.read_text())
        execute(server.dsn(), "select pg_reload_conf()")
        yield server


def test_a_wrong_or_missing_password_is_the_operators_and_never_shown(small: EmbeddedPostgres) -> None:
    for words, says, hint in (
        ({"user": "asked", "password": "wr0ng"}, "password authentication failed", "password"),
        ({"user": "asked"}, "no password supplied", "password_file"),
        ({"user": "stranger"}, "pg_hba.conf", "pg_hba.conf"),
    ):
        told = start(configured(make_conninfo(small.dsn(), **words)))
        assert told.verdict is Verdict.OPERATOR
        assert says in str(told.args[0])
        assert hint in told.hint
        assert "wr0ng" not in str(told)


def test_too_few_slots_and_senders_are_told_before_they_are_missed(small: EmbeddedPostgres) -> None:
    dsn = small.dsn()
    execute(dsn, "select pg_create_physical_replication_slot('of_somebody')")
    try:
        found = errors(dsn)
        assert "max_replication_slots = 3" in found["max_replication_slots"].fix
        told = start(configured(dsn))
        assert "slots are in use" in str(told.args[0])
        assert (told.verdict, "max_replication_slots" in told.hint) == (Verdict.RETRY, True)
        warned = errors(dsn, severity="warning")
        assert {"max_slot_wal_keep_size", "wal_sender_timeout"} <= set(warned)
    finally:
        execute(dsn, "select pg_drop_replication_slot('of_somebody')", "drop publication if exists bad_input")


def test_too_few_senders_are_told(small: EmbeddedPostgres, tmp_path: Path) -> None:
    config = configured(small.dsn())
    taken = PostgresKind.source(replace(config, slot="other"))
    PostgresKind.admin(replace(config, slot="other")).setup(dry_run=False)
    try:
        taken.open(None, Nothing(), 1)
        assert "max_wal_senders = 3" in errors(config.dsn)["max_wal_senders"].fix
        told = start(config)
        assert "max_wal_senders" in str(told.args[0]) + told.hint
        assert told.verdict is Verdict.RETRY, "one may become free"
    finally:
        taken.close()
        PostgresKind.admin(replace(config, slot="other")).teardown(dry_run=False)


def test_a_server_that_is_not_logical_and_a_standby_are_refused(small: EmbeddedPostgres) -> None:
    """Last in the file: it leaves the server as a standby."""
    small.stop()
    small.settings["wal_level"] = "replica"
    small.start()
    told = start(configured(small.dsn()))
    assert (told.verdict, "wal_level" in str(told.args[0])) == (Verdict.OPERATOR, True)
    assert "wal_level = 'logical'" in told.hint
    assert "wal_level = 'logical'" in errors(small.dsn())["wal_level"].fix

    small.stop()
    small.settings["wal_level"] = "logical"
    (small.data / "standby.signal").touch()
    small.start()
    told = start(configured(small.dsn()))
    assert (told.verdict, "standby" in str(told.args[0])) == (Verdict.OPERATOR, True)
    assert "primary" in told.hint
    assert "standby" in errors(small.dsn())


@pytest.mark.skipif(not (DEBIAN / "postgres").exists() or not shutil.which("openssl"), reason="no server with TLS here")
def test_a_certificate_that_is_not_trusted_or_of_another_name_is_refused(tmp_path: Path) -> None:
    certificate, key = tmp_path / "server.crt", tmp_path / "server.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    with EmbeddedPostgres(tmp_path / "postgres", settings=THROWAWAY, bin_dir=DEBIAN) as server:
        for file in (certificate, key):
            shutil.copy(file, server.data / file.name)
            shutil.chown(server.data / file.name, *_owner_of(server.data))
            (server.data / file.name).chmod(0o600)
        rules = server.data / "pg_hba.conf"
        rules.write_text("hostnossl all all all reject\n" + rules.read_text())
        server.stop()
        server.settings["ssl"] = "on"
        server.start()
        for words, says, hint in (
            ({"sslmode": "disable"}, "pg_hba.conf", "pg_hba.conf"),
            ({"sslmode": "verify-full", "sslrootcert": str(tmp_path / "none.crt")}, "root certificate", "sslrootcert"),
            ({"sslmode": "verify-full", "sslrootcert": str(certificate)}, "does not match host name", "another name"),
        ):
            told = start(configured(make_conninfo(server.dsn(), **words)))
            assert told.verdict is Verdict.OPERATOR, told
            assert says in str(told.args[0])
            assert hint in told.hint
        trusted = make_conninfo(
            server.dsn(), host="localhost", hostaddr="127.0.0.1", sslmode="verify-full", sslrootcert=str(certificate)
        )
        assert PostgresKind.source(configured(trusted)).identity().database == "postgres"


def _owner_of(place: Path) -> tuple[int, int]:
    return place.stat().st_uid, place.stat().st_gid


def test_releases_with_a_known_fault_are_told_and_others_are_not() -> None:
    assert [f.fix for f in advisories(170005, "here")] == ["upgrade to 17.6 or later"]
    assert [f.severity for f in advisories(150013, "here")] == ["warning"]
    assert advisories(170006, "here") == advisories(180000, "here") == []
    assert all(fixed == release + 1 for release, fixed, _ in ADVISORIES)
