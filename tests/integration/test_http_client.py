"""The client of HTTP targets on a real wire: time, size, TLS, redirects, addresses, secrets; and what `check` says."""

from __future__ import annotations

import datetime as dt
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cdc import registry
from cdc.config_serving import RequestConfig, TargetConfig
from cdc.errors import TargetRejected, TargetUnavailable
from cdc.lake.ledger import LakeLedger
from cdc.sink import INSERT, Assignment
from connectors.http import addresses, client, delivery
from connectors.http.client import Client, Unanswered
from connectors.http.target import HttpTarget
from connectors.local.store import LocalStore
from tests.support.http_push import batches
from tests.support.http_target import HttpTargetServer, Reply, Request


def config(url: str, **settings: Any) -> TargetConfig:
    given = {"request_timeout_s": 0.5, "connect_timeout_s": 2.0, "allow_private": True, "retry_for_s": 0.2, **settings}
    return TargetConfig(name="crm", type="http", url=url, **given)


def echo(request: Request) -> Reply:
    return Reply(200, {"path": request.path, "method": request.method, "body": request.body.decode()})


def test_what_is_sent_arrives_and_connections_are_kept() -> None:
    with HttpTargetServer(answers=echo) as server:
        sender = Client(config(f"{server.url}/api/v1/"))
        for path, expected in (("/x?a=1", "/api/v1/x?a=1"), ("", "/api/v1"), ("?q", "/api/v1?q")):
            assert expected.encode() in sender.send("PUT", path, {"X-A": "b"}, b"{}").body
        assert [r.headers["x-a"] for r in server.requests] == ["b"] * 3
        assert "accept-encoding" in server.requests[0].headers
        sender.close()


@pytest.mark.parametrize("fault", ["drip", "mute"])
def test_a_request_ends_in_time_however_slowly_its_answer_comes(fault: str) -> None:
    with HttpTargetServer(answers=echo, drip_s=20) as server:
        server.next_faults = [fault]
        sender = Client(config(server.url))
        begin = time.monotonic()
        with pytest.raises(Unanswered, match="no whole answer in time") as told:
            sender.send("POST", "/x", {}, b"")
        assert time.monotonic() - begin < 5
        assert told.value.sent
        sender.close()


def test_a_body_that_drips_ends_in_time_too() -> None:
    end = threading.Event()

    def drip(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(65536)
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not end.wait(0.1):
                try:
                    peer.sendall(b"x")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        begin = time.monotonic()
        with pytest.raises(Unanswered, match="in time"):
            Client(config(f"http://127.0.0.1:{listener.getsockname()[1]}")).send("GET", "/", {}, None)
        assert time.monotonic() - begin < 5
        end.set()


def test_an_answer_is_read_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_BYTES_MAX", 1 << 20)
    with HttpTargetServer(answers=lambda request: Reply(200, b"x" * int(request.body))) as server:
        sender = Client(config(server.url, request_timeout_s=20.0))
        assert len(sender.send("POST", "/x", {}, b"1048576").body) == 1 << 20
        with pytest.raises(Unanswered, match="more than 1 MB"):
            sender.send("POST", "/x", {}, b"1048577")
        sender.close()


@pytest.mark.parametrize("fault", ["cut", "half", "early"])
def test_an_answer_that_is_not_whole_is_none(fault: str) -> None:
    with HttpTargetServer(answers=echo) as server:
        server.next_faults = [fault]
        sender = Client(config(server.url))
        with pytest.raises(Unanswered) as told:
            sender.send("POST", "/secret-path", {}, b"secret-body")
        assert told.value.sent
        assert "secret" not in str(told.value)
        assert sender.send("POST", "/x", {}, b"").status == 200
        sender.close()


def test_nobody_there_is_no_effect() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(Unanswered, match="refused") as told:
        Client(config(f"http://127.0.0.1:{port}")).send("POST", "/x", {}, b"")
    assert not told.value.sent
    with pytest.raises(TargetUnavailable):
        Client(config(f"http://127.0.0.1:{port}")).reach()
    with pytest.raises(Unanswered, match="does not resolve") as told:
        Client(config("http://nowhere.invalid")).send("POST", "/x", {}, b"")
    assert not told.value.sent


# ---- addresses ----


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"])
def test_private_addresses_are_refused_before_a_byte_is_sent(host: str) -> None:
    with HttpTargetServer(answers=echo) as server:
        for test in (Client.reach, lambda c: c.send("POST", "/x", {}, b"")):
            with pytest.raises(TargetRejected, match="no public address") as told:
                test(Client(config(f"http://{host}:{server.port}", allow_private=False)))
            assert "allow_private = true in [target.crm]" in told.value.hint
        assert server.count == 0


def test_what_a_name_says_the_second_time_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver's answer is judged and connected to; a name that changes its mind leads nowhere else."""
    asked: list[str] = []
    with HttpTargetServer(answers=echo) as server:

        def rebinding(host: str, port: int, **kwargs: Any) -> list[Any]:
            asked.append(host)
            address = "203.0.113.1" if len(asked) == 1 else "127.0.0.1"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

        monkeypatch.setattr(addresses.socket, "getaddrinfo", rebinding)
        allowed = addresses.is_allowed
        monkeypatch.setattr(addresses, "is_allowed", lambda text, **kw: text == "203.0.113.1" or allowed(text, **kw))
        sender = Client(config(f"http://rebinds.test:{server.port}", allow_private=False, connect_timeout_s=0.2))
        with pytest.raises(Unanswered):
            sender.send("POST", "/x", {}, b"")
        assert asked == ["rebinds.test"]
        with pytest.raises(TargetRejected, match="no public address"):
            sender.send("POST", "/x", {}, b"")
        assert server.count == 0


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with HttpTargetServer(answers=echo) as server, HttpTargetServer(answers=echo) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert Client(config(server.url)).send("GET", "/x", {}, None).status == 200
        assert (server.count, proxy.count) == (1, 0)


# ---- redirects ----


def test_a_redirect_is_the_operators_business_unless_it_is_followed() -> None:
    with HttpTargetServer(answers=echo) as server, HttpTargetServer(answers=echo) as other:
        for status in (301, 302, 303, 307, 308):
            server.next_faults = [f"redirect:{status}:/there"]
            with pytest.raises(TargetRejected, match=str(status)) as told:
                Client(config(server.url)).send("POST", "/x", {}, b"body")
            assert "follow_redirects" in told.value.hint
        following = Client(config(server.url, follow_redirects=True))
        for status in (307, 308):
            server.next_faults = [f"redirect:{status}:/there?a=1"]
            answer = following.send("POST", "/x", {}, b"body")
            assert answer.body == b'{"path": "/there?a=1", "method": "POST", "body": "body"}'
        server.next_faults = ["redirect:302:/there"]
        with pytest.raises(TargetRejected, match="does not keep the method"):
            following.send("POST", "/x", {}, b"body")
        for where in (f"{other.url}/x", "//evil.test/x", f"https://127.0.0.1:{server.port}/x", "http://[bad"):
            server.next_faults = [f"redirect:307:{where}"]
            with pytest.raises(TargetRejected, match="another host"):
                following.send("POST", "/x", {"Authorization": "secret"}, b"body")
        server.next_faults = ["redirect:307:/x"] * 20
        with pytest.raises(TargetRejected, match="more than 5 redirects"):
            following.send("POST", "/x", {}, b"body")
        assert other.count == 0
        following.close()


# ---- TLS ----


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of its own authority for `localhost`, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(made.public_bytes(pem) + private)
    return path


def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_tls_is_verified(certificate: Path) -> None:
    with HttpTargetServer(answers=echo, tls=tls(certificate)) as server:
        trusting = config(server.url, ca_file=certificate)
        Client(trusting).reach()
        assert Client(trusting).send("POST", "/x", {}, b"").status == 200
        for wrong in (config(server.url), config(server.url.replace("localhost", "127.0.0.1"), ca_file=certificate)):
            with pytest.raises(TargetRejected, match="certificate") as told:
                Client(wrong).send("POST", "/x", {}, b"")
            assert "ca_file" in told.value.hint
            with pytest.raises(TargetRejected, match="certificate"):
                Client(wrong).reach()
        assert server.count == 1
        with pytest.raises(TargetRejected, match="ca_file"):
            Client(config(server.url, ca_file=certificate.with_name("missing.pem")))


def test_a_slow_answer_over_tls_ends_in_time(certificate: Path) -> None:
    with HttpTargetServer(answers=echo, tls=tls(certificate), drip_s=20) as server:
        sender = Client(config(server.url, ca_file=certificate))
        for fault in ("drip", "mute"):
            server.next_faults = [fault]
            begin = time.monotonic()
            with pytest.raises(Unanswered, match="in time"):
                sender.send("POST", "/x", {}, b"")
            assert time.monotonic() - begin < 5
        assert sender.send("POST", "/x", {}, b"").status == 200
        sender.close()


def test_plain_http_where_tls_is_expected_may_pass(certificate: Path) -> None:
    with HttpTargetServer(answers=echo) as server:
        with pytest.raises(Unanswered, match=r"TLS failed|connection failed"):
            Client(config(server.url.replace("http:", "https:"), ca_file=certificate)).send("POST", "/x", {}, b"")


# ---- secrets, and what check says ----


def assignment(**request: Any) -> Assignment:
    given = {"path": "/x", "body": {"v": "{v}"}, **request}
    return Assignment(sync="crm", table="", key=("k",), mode="upsert", columns=("k", "v"),
                      request=RequestConfig(**given))  # fmt: skip


@pytest.fixture
def sink_of(tmp_path: Path) -> Callable[..., HttpTarget]:
    return lambda *args, **kw: HttpTarget(config(*args, **kw), partial(LakeLedger, LocalStore(tmp_path / "lake")))


def test_secrets_are_read_for_each_push_and_are_in_no_message(
    sink_of: Callable[..., HttpTarget],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(delivery, "WAIT_S", 0.01)
    caplog.set_level(logging.WARNING)
    file = tmp_path / "token"
    file.write_text("Bearer hush-1\n")
    monkeypatch.setenv("HOOK", "T0/hush-2")
    status = [200]
    with HttpTargetServer(answers=lambda request: Reply(status[0], {"you sent": request.headers})) as server:
        sink = sink_of(server.url, secret_headers={"Authorization": f"file:{file}"})
        to = assignment(path="/{env:HOOK}", reason="x")

        def push(key: str) -> Any:
            return sink.push(batches(to, [(key, INSERT, "hush-3", 0)]))[0]

        assert push("a").written == 1
        assert (server.requests[-1].headers["authorization"], server.requests[-1].path) == (
            "Bearer hush-1",
            "/T0/hush-2",
        )
        file.write_text("Bearer hush-4")
        assert push("b").written == 1
        assert server.requests[-1].headers["authorization"] == "Bearer hush-4"
        said = [repr(sink._config), repr(sink)]
        for code in (401, 422, 500, 302):
            status[0] = code
            result = push("c")
            said += [str(result.error), repr(result.error), repr(result.rejected)]
        for broken in ("", "a\nb", "hush\x00"):
            file.write_text(broken)
            with pytest.raises(TargetRejected) as told:
                push("d")
            said.append(str(told.value))
        file.unlink()
        with pytest.raises(TargetRejected, match="cannot be read"):
            push("d")
        monkeypatch.delenv("HOOK")
        said += [f.message + f.fix for f in sink.check(to)]
        sink.close()
    assert [text for text in [*said, caplog.text] if "hush" in text] == []


def test_check_sends_nothing_and_says_what_is_wrong(
    sink_of: Callable[..., HttpTarget], tmp_path: Path, certificate: Path
) -> None:
    with HttpTargetServer(answers=echo, tls=tls(certificate)) as server:
        good = sink_of(server.url, ca_file=certificate)
        assert good.check(assignment()) == []
        bad = sink_of(server.url, ca_file=certificate, secret_headers={"X-Token": "env:NOT_SET"}, headers={"Host": "x"})
        to = Assignment(
            sync="crm", table="", key=("k",), mode="append", columns=("k", "v"),
            request=RequestConfig(path="/{q}", body="{v}", ok="a ==", headers={"x-token": "y"}, idempotency_header=""),
            delete_request=RequestConfig(path="/{v}"),
        )  # fmt: skip
        found = bad.check(to)
        messages = "\n".join(f.message for f in found)
        for expected in (
            "request.path: there is no {q}",
            "request.ok: is no JMESPath",
            "delete_request.path: there is no",
            "X-Token: stands in secret_headers",
            "Host: is no header",
            "NOT_SET: the environment variable",
            "carry no idempotency key",
        ):
            assert expected in messages
        assert {f.severity for f in found} == {"error", "warning"}
        assert {f.object for f in found} == {"target.crm: sync.crm"}
        (private,) = sink_of(server.url, ca_file=certificate, allow_private=False).check(assignment())
        assert (private.name, private.severity) == ("http address", "error")
        plain = sink_of(
            f"http://127.0.0.1:{server.port}", headers={}, secret_headers={"X-Token": f"file:{certificate}"}
        )
        assert any("plain text" in f.message for f in plain.check(assignment()))
        with pytest.raises(TargetRejected, match="there is no"):
            good.push(batches(assignment(path="/{q}"), [("a", INSERT, "v", 0)]))
        assert server.count == 0


def test_it_is_found_as_a_kind(tmp_path: Path) -> None:
    assert registry.sink_kind("http") is HttpTarget  # type: ignore[comparison-overlap]
