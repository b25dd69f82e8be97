"""pcapng capture of both sides of the NIC: `host0` is what the guest gave or got, `wire0` what was on the wire.

The two views of one packet share epb_packetid and a comment that names context, record count and verdict.
python-pcapng writes the blocks. A capture that can go no further (a full disk, a FIFO whose reader has gone) says so
once and ends; packets pass as without it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from pcapng import FileWriter, blocks

from nicdev import __version__
from nicdev.errors import ConfigError
from nicdev.observer import View

LINKTYPE_ETHERNET: Final = 1
SNAPLEN: Final = 0x40000
log = logging.getLogger(__name__)
_DIRECTION: Final = {"rx": 1, "tx": 2}  # epb_flags, bits 0-1


def _open(path: Path) -> int:
    """A descriptor of the file, empty and ours alone. Raises ConfigError."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write capture file {path}: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConfigError(f"capture file {path} is being written by another NIC: name another file") from None
    except OSError:  # a file system without locks
        pass
    if stat.S_ISREG(os.fstat(fd).st_mode):
        os.ftruncate(fd, 0)
    return fd


class Capture:
    """Writes `path`, readable by its owner only: host0 holds plaintext."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if `path` cannot be written, or another NIC writes it."""
        self._path = path
        self._file = os.fdopen(_open(path), "wb")
        self._section = blocks.SectionHeader(options={"shb_userappl": f"tlsnic {__version__}"})
        for name in ("host0", "wire0"):
            self._section.new_member(
                blocks.InterfaceDescription,
                link_type=LINKTYPE_ETHERNET,
                snaplen=SNAPLEN,
                options={"if_name": name, "if_tsresol": b"\x09"},
            )
        self._writer = FileWriter(self._file, self._section)
        try:
            self._file.flush()
        except OSError as error:
            self.close()
            raise ConfigError(f"cannot write capture file {path}: {error.strerror}") from None

    def packet(self, packet_id: int, view: View, direction: str, frame: bytes, comment: str) -> None:
        """Record one view of one packet; implements nic.Observer."""
        if self._file.closed:
            return
        now = time.time_ns()
        options: dict[str, Any] = {"epb_flags": _DIRECTION[direction], "epb_packetid": packet_id}
        if comment:
            options["opt_comment"] = comment
        block = self._section.new_member(
            blocks.EnhancedPacket,
            interface_id=int(view),
            packet_data=frame,
            timestamp_high=now >> 32,
            timestamp_low=now & 0xFFFF_FFFF,
            packet_len=len(frame),
            options=options,
        )
        try:
            self._writer.write_block(block)
            self._file.flush()  # whoever reads along, through a FIFO perhaps, sees it now
        except OSError as error:
            log.warning("the capture ends here: cannot write %s: %s", self._path, error.strerror)
            self.close()

    def close(self) -> None:
        """Flush and close the file."""
        with suppress(OSError):  # what could not be written before cannot be now
            self._file.close()
