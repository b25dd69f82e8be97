"""Write cpio archives in the "newc" format, the one the kernel unpacks as an initramfs.

Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Every number is eight
hexadecimal digits; names and contents are padded to four bytes; archives may simply follow one another.
No tool and no root is needed, and the same input always gives the same bytes.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

MAGIC = b"070701"
TRAILER = "TRAILER!!!"


@dataclass(frozen=True)
class Entry:
    """One member. `name` has no leading slash; `mode` holds type and permissions; `rdev` is (major, minor)."""

    name: str
    mode: int
    data: bytes = b""
    rdev: tuple[int, int] = (0, 0)


def file(name: str, data: bytes, mode: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(name, stat.S_IFREG | mode, data)


def directory(name: str, mode: int = 0o755) -> Entry:
    """A directory."""
    return Entry(name, stat.S_IFDIR | mode)


def symlink(name: str, target: str) -> Entry:
    """A symbolic link to `target`."""
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def char_device(name: str, major: int, minor: int) -> Entry:
    """A character device node, as the console needs one before devtmpfs is mounted."""
    return Entry(name, stat.S_IFCHR | 0o600, rdev=(major, minor))


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _member(entry: Entry, inode: int) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.rdev, len(name), 0)
    header = MAGIC + b"".join(b"%08X" % field for field in fields)
    return _pad(header + name) + _pad(entry.data)


def archive(entries: Iterable[Entry]) -> bytes:
    """The whole archive; directories that members lie in are added in front of them."""
    members: dict[str, Entry] = {}
    for entry in entries:
        parts = entry.name.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            parent = "/".join(parts[:depth])
            members.setdefault(parent, directory(parent))
        members[entry.name] = entry
    body = b"".join(_member(entry, inode) for inode, entry in enumerate(members.values(), start=1))
    return body + _member(Entry(TRAILER, 0), 0)
