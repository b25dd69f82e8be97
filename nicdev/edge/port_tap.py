"""The `tap` port: a tap interface with virtio_net_hdr and segmentation offloads, in a network namespace of its own.

With IFF_VNET_HDR and TUNSETOFFLOAD the kernel takes and gives TCP frames of up to 64 KiB with partial checksums, so
packets stay whole between the guest and a peer on this host. Constants: linux/if_tun.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from io import FileIO
from typing import Final

from nicdev.edge.loop import Loop
from nicdev.edge.port import Port
from nicdev.errors import ConfigError
from nicdev.nic import Packet
from nicdev.virtio import features
from nicdev.wire import vnet
from nicdev.wire.frame import MAX_FRAME

TUN_PATH: Final = "/dev/net/tun"
TUNSETIFF: Final = 0x400454CA
TUNSETOFFLOAD: Final = 0x400454D0
TUNSETVNETHDRSZ: Final = 0x400454D8
IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
TUN_F_CSUM: Final = 0x01
TUN_F_TSO4: Final = 0x02
TUN_F_TSO6: Final = 0x04
TUN_F_TSO_ECN: Final = 0x08
BURST: Final = 64


def open_tun() -> int:
    """The tun driver's control device, without an interface yet; nonblocking. Raises ConfigError."""
    try:
        return os.open(TUN_PATH, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ConfigError(f"{TUN_PATH} is missing: load the tun module (modprobe tun)") from None
    except PermissionError:
        raise ConfigError(f"{TUN_PATH} is not accessible: run as root, or once: sudo chmod 0666 {TUN_PATH}") from None
    except OSError as error:
        raise ConfigError(f"{TUN_PATH} does not open: {error.strerror}; load the tun module (modprobe tun)") from None


def open_tap(name: str) -> int:
    """Create the tap interface `name` in the current namespace; returns its nonblocking fd. Raises ConfigError."""
    fd = open_tun()
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", vnet.VNET_HDR.size))
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"cannot create tap interface {name}: {error.strerror}") from None
    return fd


class TapPort(Port):
    """A tap interface; `fd` as `open_tap` gives it, owned by the port."""

    def __init__(self, loop: Loop, fd: int) -> None:
        super().__init__()
        self._loop = loop
        self._fd = fd
        self._read = FileIO(fd, "rb", closefd=False).readinto  # None where there is nothing; an exception costs more
        self._buffer = memoryview(bytearray(vnet.VNET_HDR.size + MAX_FRAME))
        self._reading = False
        self.resume()

    def send(self, packet: Packet) -> bool:
        """Write one frame; False when the interface is down or refuses it."""
        try:
            os.writev(self._fd, (packet.header, packet.frame))
        except OSError as error:
            if error.errno in (errno.EIO, errno.EINVAL, errno.EAGAIN, errno.ENOBUFS, errno.EFAULT, errno.ENOMEM):
                return False
            raise
        return True

    def resume(self) -> None:
        """Read from the interface again."""
        if not self._reading:
            self._reading = True
            self._loop.watch(self._fd, self._on_readable)

    def _on_readable(self) -> None:
        read, buffer, size = self._read, self._buffer, vnet.VNET_HDR.size
        header = buffer[:size]
        self.before_frames()
        for _ in range(BURST):
            n = read(buffer)
            if n is None:
                return
            if n > size and not self.receiver(header, buffer[size:n]):
                self._reading = False
                self._loop.unwatch(self._fd)
                return

    def features_changed(self, accepted: int) -> None:
        """Ask the kernel for no more than the guest takes."""
        offload = 0
        if accepted & features.VIRTIO_NET_F_GUEST_CSUM:
            offload |= TUN_F_CSUM
            offload |= TUN_F_TSO4 if accepted & features.VIRTIO_NET_F_GUEST_TSO4 else 0
            offload |= TUN_F_TSO6 if accepted & features.VIRTIO_NET_F_GUEST_TSO6 else 0
            offload |= TUN_F_TSO_ECN if accepted & features.VIRTIO_NET_F_GUEST_ECN else 0
        fcntl.ioctl(self._fd, TUNSETOFFLOAD, offload)

    def close(self) -> None:
        """Close the fd; the interface goes with it."""
        self._loop.unwatch(self._fd)
        os.close(self._fd)
