"""Connections that reach public addresses only, unless the operator allows others.

The name is resolved here, each address is judged, and exactly those are connected to: what a name says the next time
it is asked does not matter. Addresses that carry an IPv4 address (mapped, 6to4, Teredo, NAT64) are judged by that one
too. Proxies of the environment are not used.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Iterator
from typing import Final

from cdc.errors import TargetRejected, TargetUnavailable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64: Final = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))
_NEITHER: Final = tuple(
    ipaddress.ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "5f00::/16", "fec0::/10")
)
"""Not public by IANA's registries of special-purpose addresses, or meant for one site (RFC 3879), which Python 3.11
does not say of them, or not of all."""


def is_allowed(text: str, *, allow_private: bool) -> bool:
    """Whether an address may be connected to. Nobody may reach a multicast address, or the unspecified one."""
    for address in _meanings(ipaddress.ip_address(text)):
        if address.is_multicast or address.is_unspecified:
            return False
        if not allow_private and not _is_public(address):
            return False
    return True


def _is_public(address: Address) -> bool:
    return address.is_global and not address.is_reserved and not any(address in network for network in _NEITHER)


def _meanings(address: Address) -> Iterator[Address]:
    """The address, and those of IPv4 that it leads to. One that is mapped is nothing of its own."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            yield address.ipv4_mapped
            return
        if address.sixtofour is not None:
            yield address.sixtofour
        if address.teredo is not None:
            yield from address.teredo
        if any(address in network for network in _NAT64):
            yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    yield address


def resolve(target: str, host: str, port: int, *, allow_private: bool) -> list[tuple[socket.AddressFamily, str, int]]:
    """The addresses of `host` that may be connected to. TargetUnavailable if it has none now, TargetRejected if it has
    none that may."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        raise TargetUnavailable(
            f"target {target}: the name {host} does not resolve",
            hint="check the url, and this machine's DNS",
        ) from e
    every: list[tuple[socket.AddressFamily, str, int]] = [
        (family, str(where[0]), int(where[1])) for family, _, _, _, where in found
    ]
    allowed = [each for each in every if is_allowed(each[1], allow_private=allow_private)]
    if not allowed:
        raise TargetRejected(
            f"target {target}: {host} is at {every[0][1]}, which is no public address",
            hint=f"if that is meant, set allow_private = true in [target.{target}]",
        )
    return allowed


def connect(target: str, host: str, port: int, *, allow_private: bool, timeout_s: float) -> socket.socket:
    """A connection to the first of the allowed addresses that answers within `timeout_s` in all. Errors of `resolve`,
    and OSError if none answers."""
    deadline = time.monotonic() + timeout_s
    last: OSError = TimeoutError("timed out")
    for family, address, at in resolve(target, host, port, allow_private=allow_private):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            break
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(left_s)
            sock.connect((address, at))
        except OSError as e:
            sock.close()
            last = e
            continue
        sock.settimeout(timeout_s)
        return sock
    raise last


__all__ = ["connect", "is_allowed", "resolve"]
