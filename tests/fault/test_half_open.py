"""A daemon dies and the server does not hear of it: its sessions are waited for, never ended by force."""

from __future__ import annotations

from pathlib import Path

import psycopg

from tests.support.daemon import Daemon, execute
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until

SESSIONS = """
select a.pid, a.backend_type = 'walsender' from pg_stat_activity a
where a.application_name = 'cdc' and a.datname = current_database() order by 1
"""


def test_a_slot_still_held_by_a_connection_of_the_dead_is_waited_for_and_not_terminated(
    tmp_path: Path, database: str
) -> None:
    execute(database, "create table orders (id int primary key)", "insert into orders values (1)")
    with Proxy(database) as proxy, Daemon(tmp_path / "first", proxy.dsn) as first:
        first.start().settled()
        proxy.freeze()
        first.kill()
        execute(database, "insert into orders values (2)")
        with (
            psycopg.connect(database, autocommit=True) as server,
            Daemon(tmp_path / "second", database, source={"slot": first.slot, "publication": first.slot},
                   lake={"url": str(first.lake)}) as second,
        ):  # fmt: skip
            held = server.execute(SESSIONS).fetchall()
            assert sorted(is_sender for _, is_sender in held) == [False, True], "as far as the server knows, it lives"
            second.start().in_phase("standby")
            assert "another daemon reads slot" in second.source()["error"]
            assert set(held) <= set(server.execute(SESSIONS).fetchall()), "nobody was terminated"

            # The lock's session goes first: then the slot itself is still taken.
            lock = next(pid for pid, is_sender in held if not is_sender)
            sender = next(pid for pid, is_sender in held if is_sender)
            server.execute("select pg_terminate_backend(%s)", [lock])
            wait_until(lambda: f"active for PID {sender}" in second.source()["error"], message=second.log_tail)
            assert (sender, True) in server.execute(SESSIONS).fetchall(), "nobody was terminated"

            proxy.cut()
            second.settled().verified()
            assert second.ask("query", "select count(*) from shop.orders").document["rows"] == [[2]]
