"""Watching packets go through the NIC: what an observer is told."""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

from nicdev import abi


class View(IntEnum):
    """The two places where a packet can be looked at."""

    HOST = 0  # what the guest gave or got
    WIRE = 1


class Observer(Protocol):
    """Somebody who watches packets, such as a capture. The two views of a packet share `packet_id`."""

    def packet(self, packet_id: int, view: View, direction: str, frame: bytes, comment: str) -> None:
        """See one view of one packet; direction is "tx" or "rx", comment may be empty."""


def remark(header: bytes | memoryview) -> str:
    """For observers: what the extension of a received packet says."""
    if not header[0] & abi.HDR_F_EXT:
        return ""
    verdict = abi.RxTls._make(abi.RX_TLS.unpack_from(header, abi.VNET_HDR_LEN))
    how = "decrypted" if verdict.flags & abi.RxTlsFlag.DECRYPTED else "untouched"
    return f"slot={verdict.slot} gen={verdict.generation} rx {how} records={verdict.records}"
