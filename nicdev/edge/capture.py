"""pcapng capture of both sides of the NIC: `host0` is what the guest gave or got, `wire0` what was on the wire.

The two views of one packet share epb_packetid and a comment that names context, record count and verdict.
python-pcapng writes the blocks.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Final

from pcapng import FileWriter, blocks

from nicdev import __version__
from nicdev.errors import ConfigError
from nicdev.nic import View

LINKTYPE_ETHERNET: Final = 1
SNAPLEN: Final = 0x40000
_DIRECTION: Final = {"rx": 1, "tx": 2}  # epb_flags, bits 0-1


class Capture:
    """Writes `path`, readable by its owner only: host0 holds plaintext."""

    def __init__(self, path: Path) -> None:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot write capture file {path}: {error.strerror}") from None
        self._file = os.fdopen(fd, "wb")
        self._section = blocks.SectionHeader(options={"shb_userappl": f"tlsnic {__version__}"})
        for name in ("host0", "wire0"):
            self._section.new_member(
                blocks.InterfaceDescription,
                link_type=LINKTYPE_ETHERNET,
                snaplen=SNAPLEN,
                options={"if_name": name, "if_tsresol": b"\x09"},
            )
        self._writer = FileWriter(self._file, self._section)

    def packet(self, packet_id: int, view: View, direction: str, frame: bytes, comment: str) -> None:
        """Record one view of one packet; implements nic.Observer."""
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
        self._writer.write_block(block)
        self._file.flush()  # whoever reads along, through a FIFO perhaps, sees it now

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()
