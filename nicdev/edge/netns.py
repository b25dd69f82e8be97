"""Network namespaces: where the tap lives, so that the host's own interfaces, routes and DNS are never touched.

`own` is an anonymous namespace that dies with the last process in it; nothing is left behind even by SIGKILL.
Without root it comes with a user namespace in which we are root. Other programs join through /proc/PID/ns (nsenter).
A named one, made and removed through pyroute2, is for people who prefer `ip netns exec`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ipaddress import ip_interface
from pathlib import Path
from typing import Final

from nicdev.errors import ConfigError

CLONE_NEWNET: Final = 0x40000000
CLONE_NEWUSER: Final = 0x10000000


def enter_own() -> None:
    """Move this process, still single-threaded, into a fresh network namespace. Raises ConfigError."""
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNET if uid == 0 else CLONE_NEWNET | CLONE_NEWUSER
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        reason = os.strerror(ctypes.get_errno())
        hint = (
            "run as root"
            if uid == 0
            else "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1) or run as root"
        )
        raise ConfigError(f"cannot make a network namespace: {reason}; {hint}")
    if flags & CLONE_NEWUSER:
        try:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        except OSError as error:  # a security module lets the namespace be made, and nothing be done in it
            raise ConfigError(
                f"user namespaces are restricted here: {error.strerror}; allow them or run as root"
            ) from None


class NamedNamespace:
    """A namespace under /run/netns, made if it does not exist, removed by `close` if we made it."""

    def __init__(self, name: str) -> None:
        from pyroute2 import netns  # the tap port's own dependency: the core runs without it

        self._netns = netns
        self._name = name
        try:
            self._made = name not in netns.listnetns()
            if self._made:
                netns.create(name)
            netns.setns(name)
        except OSError as error:
            raise ConfigError(f"cannot use network namespace {name}: {error.strerror}") from None

    def close(self) -> None:
        """Remove the namespace's name; it ends with its last process."""
        if self._made:
            self._netns.remove(self._name)


def configure(interface: str, addresses: Sequence[str], mtu: int) -> None:
    """Bring `interface` (and lo) up with `addresses` ("198.51.100.1/24") and `mtu` (bytes) in the current namespace.

    An interface that was there before may have the addresses already. Raises ConfigError.
    """
    from pyroute2 import NetlinkError

    try:
        _configure(interface, addresses, mtu)
    except NetlinkError as error:
        what = f"mtu {mtu} and addresses {', '.join(addresses) or 'none'}"
        raise ConfigError(f"cannot set up {interface} with {what}: {os.strerror(error.code)}") from None


def _configure(interface: str, addresses: Sequence[str], mtu: int) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        ip.link("set", index=ip.link_lookup(ifname="lo")[0], state="up")
        index = ip.link_lookup(ifname=interface)[0]
        ip.link("set", index=index, mtu=mtu, state="up")
        for text in addresses:
            address = ip_interface(text)
            # nodad: an address in a namespace of its own has nobody to collide with, and must work at once
            flags = {"flags": 0x02} if address.version == 6 else {}
            ip.addr("replace", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, **flags)
