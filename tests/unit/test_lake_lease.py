"""The lease: one daemon writes, a successor takes over as soon as it safely can, and a former holder notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cdc.errors import FormatTooNew, LeaseExpired, LeaseLost, Standby, StoreUnavailable, Verdict
from cdc.lake import lease as lease_module
from cdc.lake.layout import lease_key
from cdc.lake.lease import Lease
from connectors.local.store import LocalStore
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
KEY = lease_key("shop")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def taken(store: LocalStore, owner: str, ttl_s: float = 30.0) -> Lease:
    lease = Lease(store, "shop", owner, ttl_s=ttl_s)
    lease.acquire()
    return lease


def document(store: LocalStore) -> dict[str, object]:
    found = store.get(KEY)
    assert found is not None
    return dict(json.loads(found[0]))


def test_a_second_daemon_is_told_who_holds_it(store: LocalStore) -> None:
    first = taken(store, "daemon on db1")
    with pytest.raises(Standby, match="daemon on db1"):
        taken(store, "other")
    first.check()
    first.renew()
    first.check()
    assert Lease(store, "another_source", "x").acquire() is None  # leases of sources are apart


def test_a_lease_given_back_is_free_at_once_and_the_fence_grows(store: LocalStore) -> None:
    first = taken(store, "a")
    assert first.fence == 1
    first.release()
    first.release()
    with pytest.raises(LeaseLost):
        first.check()
    with pytest.raises(LeaseLost):
        first.renew()
    assert taken(store, "b").fence == 2


def test_where_there_is_no_lease_the_fence_goes_on_behind_what_tables_were_committed_with(
    store: LocalStore,
) -> None:
    lease = Lease(store, "shop", "a", floor=lambda: 7)
    lease.acquire()
    assert (lease.fence, document(store)["fence"]) == (8, 8)
    lease.release()

    def never() -> int:
        raise AssertionError("the lease tells")

    successor = Lease(store, "shop", "b", floor=never)
    successor.acquire()
    assert successor.fence == 9


def test_a_store_that_does_not_answer_holds_up_no_shutdown(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = taken(store, "a")
    mute, told = threading.Event(), threading.Event()

    def put(*_: object, **__: object) -> str:
        told.set()
        mute.wait()
        return ""

    monkeypatch.setattr(store, "put", put)
    try:
        lease.release(within_s=0.05)
        assert told.wait(10), "it was asked"
    finally:
        mute.set()


def test_taking_a_lease_that_one_holds_keeps_the_term_number(store: LocalStore) -> None:
    first = taken(store, "a")
    first.acquire()
    first.check()
    assert first.fence == 1


def test_check_fails_when_the_lease_was_not_renewed_in_time(store: LocalStore) -> None:
    first = taken(store, "a", ttl_s=3.0)
    assert first.held()
    wait_until(lambda: not first.held())
    with pytest.raises(LeaseExpired) as caught:
        first.check()
    assert caught.value.verdict is Verdict.RETRY
    first.renew()  # nobody else came
    first.check()


def test_a_kept_lease_is_renewed_when_it_is_time_and_not_before_it_is_taken(store: LocalStore) -> None:
    lease = Lease(store, "shop", "a", ttl_s=1.5)
    lease.keep()
    assert store.get(KEY) is None
    lease.acquire()
    first = document(store)
    lease.keep()
    assert document(store) == first
    wait_until(lambda: not lease.keep() and document(store) != first)
    assert lease.held()
    lease.release()
    released = document(store)
    lease.keep()
    assert document(store) == released


_HOLD = """
import sys
from pathlib import Path
from cdc.lake.lease import Lease
from connectors.local.store import LocalStore
Lease(LocalStore(Path(sys.argv[1])), "shop", "child", ttl_s=3600).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_killed_holder_on_this_machine_is_succeeded_at_once(store: LocalStore, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"held\n"
            with pytest.raises(Standby, match="child"):
                taken(store, "successor")
        finally:
            child.kill()
    assert taken(store, "successor").fence == 2


def test_a_process_id_used_again_is_not_the_holder(store: LocalStore) -> None:
    taken(store, "a")
    held = document(store)
    held |= {"id": "someone else", "pid": os.getpid(), "started": "1"}
    store.put(KEY, json.dumps(held).encode())
    assert taken(store, "b").fence == 2


def test_a_holder_elsewhere_is_succeeded_when_its_time_is_over(store: LocalStore) -> None:
    taken(store, "a")
    held = document(store) | {"place": "another machine", "expires_at": time.time() - 3600, "ttl_s": 1.0}
    store.put(KEY, json.dumps(held).encode())
    second = Lease(store, "shop", "b")
    second.acquire(wait_s=20)
    assert second.fence == 2


def test_a_clock_that_is_ahead_takes_the_lease_from_nobody_who_renews_it(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = taken(store, "a", ttl_s=1.5)
    held = document(store) | {"place": "another machine"}
    store.put(KEY, json.dumps(held).encode())
    first.acquire()
    monkeypatch.setattr(lease_module, "_place", lambda: "here")
    now = time.time
    monkeypatch.setattr(lease_module.time, "time", lambda: now() + 3600)
    second = Lease(store, "shop", "b")
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        first.keep()
        with pytest.raises(Standby):
            second.acquire()
    first.check()


def test_a_process_that_proc_does_not_show_may_live(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hidepid, as systemd's ProtectProc makes it, a daemon does not see its neighbour."""
    taken(store, "a")
    monkeypatch.setattr(lease_module, "_started", lambda pid: None)
    with pytest.raises(Standby):
        taken(store, "b")


def test_a_holder_whose_clock_is_wrong_is_succeeded_after_a_term_without_renewal(store: LocalStore) -> None:
    taken(store, "a")
    held = document(store) | {"place": "another machine", "expires_at": time.time() + 1e6, "ttl_s": 1.0}
    store.put(KEY, json.dumps(held).encode())
    second = Lease(store, "shop", "b")
    with pytest.raises(Standby):
        second.acquire()
    began = time.monotonic()
    second.acquire(wait_s=20)
    assert 0.5 < time.monotonic() - began < 10
    assert second.fence == 2


def test_a_holder_that_renews_is_not_succeeded_however_long_one_watches(store: LocalStore) -> None:
    first = taken(store, "a", ttl_s=0.5)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(0.1):
            first.renew()

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(Standby):
            Lease(store, "shop", "b").acquire(wait_s=1.5)
        first.check()
    finally:
        stop.set()
        thread.join()


def test_a_renewal_without_an_answer_is_renewed_and_what_others_see_holds_as_long_as_ours(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, put = taken(store, "a"), LocalStore.put

    def mute(store: LocalStore, key: str, data: Any, **condition: Any) -> str:
        put(store, key, data, **condition)
        raise StoreUnavailable("no answer")

    with monkeypatch.context() as unheard:
        unheard.setattr(LocalStore, "put", mute)
        with pytest.raises(StoreUnavailable):
            first.renew()
    unanswered = document(store)
    first.renew()
    assert float(str(document(store)["expires_at"])) > float(str(unanswered["expires_at"]))
    first.check()


def test_a_former_holder_notices_when_it_renews(store: LocalStore) -> None:
    first = taken(store, "a")
    held = document(store) | {"place": "", "expires_at": 0.0, "ttl_s": 0.2}
    store.put(KEY, json.dumps(held).encode())
    second = Lease(store, "shop", "b")
    second.acquire(wait_s=20)
    with pytest.raises(LeaseLost):
        first.renew()
    assert not first.held()
    first.release()  # must not take away the successor's
    second.renew()
    assert document(store)["owner"] == "b"


def test_of_many_that_want_it_at_once_one_gets_it(store: LocalStore) -> None:
    got: list[Lease] = []
    gate = threading.Barrier(6)

    def work() -> None:
        lease = Lease(store, "shop", "x")
        gate.wait()
        try:
            lease.acquire()
            got.append(lease)
        except Standby:
            pass

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert len(got) == 1
    got[0].renew()


def test_a_lease_of_a_newer_release_is_refused(store: LocalStore) -> None:
    store.put(KEY, b'{"format": 2}')
    with pytest.raises(FormatTooNew):
        taken(store, "a")
