"""What each figure is to reach, and what the best known hardware reached.

A figure that is not listed here is only reported. Anchors: ConnectX-6 Dx as measured in "Autonomous NIC Offloads"
(Pismenny et al., ASPLOS 2021): share of TLS records decrypted wholly by the NIC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Goal:
    """`target` and `anchor` are in the figure's unit; None: nothing promised, nothing known."""

    target: float | None = None
    anchor: float | None = None
    anchor_is: str = ""
    less_is_better: bool = False

    def met(self, value: float) -> bool | None:
        """Whether a value reaches the target; None without one."""
        if self.target is None:
            return None
        return value <= self.target if self.less_is_better else value >= self.target


CX6: Final = "ConnectX-6 Dx"
RX_PERSONALITIES: Final = ("ideal", "driver-req", "driver-req-async", "core-next-hint")
TX_PERSONALITIES: Final = ("rebuild", "next-record")
CIPHERS: Final = ("aes-128-gcm", "aes-256-gcm")
# rate in the name of a figure: target of rx `ideal` with TLS 1.2 AES-GCM, anchor; per cent of records
SHARES: Final = {"loss1": (97, 73), "loss5": (90, 43), "reorder2": (95, 24), "reorder5": (90, 2)}


def flat(*parts: str) -> str:
    """A figure's name: the parts that are not empty, in one word."""
    return "_".join(part.replace("-", "_").lower() for part in parts if part)


def _goals() -> dict[str, Goal]:
    goals: dict[str, Goal] = {}
    for rate, (target, anchor) in SHARES.items():
        for prefix in ("rx", "sim_rx"):
            goals[flat(prefix, rate, "records_offloaded")] = Goal(target, anchor, CX6)
        for other in RX_PERSONALITIES[1:]:
            goals[flat("rx", rate, "records_offloaded", other)] = Goal(None, anchor, CX6)
        goals[flat("sim_rx", rate, "records_offloaded", CIPHERS[1])] = Goal(target, anchor, CX6)
    for cipher in CIPHERS:
        for personality in RX_PERSONALITIES:
            goals[flat("rx_recovery_records", personality, cipher)] = Goal(256, less_is_better=True)
        for personality in TX_PERSONALITIES:
            goals[flat("tx_recovery_records", personality, cipher)] = Goal(256, less_is_better=True)
    for where in ("loss5", "netem_loss5"):
        goals[flat("tx", where, "plaintext_frames")] = Goal(0, less_is_better=True)
        goals[flat("tx", where, "bytes_lost")] = Goal(0, less_is_better=True)
        goals[flat("tx", where, "retransmissions_in_device")] = Goal(100)
    return goals


GOALS: Final = _goals()
