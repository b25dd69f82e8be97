"""What each figure is to reach, and what the best known hardware reached.

A figure that is not listed here is only reported. Anchors: ConnectX-6 Dx as measured in "Autonomous NIC Offloads"
(Pismenny et al., ASPLOS 2021): share of TLS records decrypted wholly by the NIC, and throughput or processor time with
offload over that without TLS, or with software TLS.
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


# of throughput, in ratios: target, anchor
SPEED: Final = {
    "tx_offload_over_plain": (0.95, 0.92),
    "rx_offload_over_plain": (0.85, 0.66),
    "sendfile_offload_over_plain": (0.90, 0.72),
    "tx_offload_over_software": (3.0, 3.3),
    "rx_offload_over_software": (1.8, 2.2),
    "tx_offload_over_software_qemu_7_2": (5.0, 3.3),  # it emulates AES more slowly
    "rx_offload_over_software_qemu_7_2": (3.2, 2.2),
    "plain_tx_over_qemu": (1.0, None),
    "plain_rx_over_qemu": (1.0, None),
    "tx_loss1_offload_over_plain": (0.97, 0.89),
    "tx_loss5_offload_over_plain": (0.97, 0.91),
    "rx_loss1_offload_over_plain": (0.80, 0.65),
    "rx_loss5_offload_over_plain": (0.80, 0.49),
    "tx_loss1_offload_over_software": (3.0, 1.76),
    "tx_loss5_offload_over_software": (3.0, 1.33),
    "rx_loss1_offload_over_software": (3.0, 1.42),
    "rx_loss5_offload_over_software": (3.0, 1.11),
    "flows_2048_over_1": (0.95, 0.90),
    "plain_tx_over_passt": (1.5, None),
    "plain_rx_over_passt": (1.5, None),
    "udp_pps_over_qemu": (1.0, None),
    "small_transfer_over_software": (1.0, 0.027),
}


# the NIC alone, at the hands of a synthetic driver
DEVICE: Final = {
    "device_crypto_over_evp": Goal(0.5),
    "device_crypto_gbit": Goal(40),
    "device_crypto_gbit_two": Goal(100),
    "descriptors_mpps": Goal(1.0, 0.16, "ixy.py"),
    "tap_kpps": Goal(300, 160, "ixy.py"),
    "installs_per_s": Goal(150_000, 101_000, "mlx5"),
    "bytes_per_context": Goal(3072, 208, CX6, less_is_better=True),
    "cost_100k_flows_over_1": Goal(1.5, less_is_better=True),
    "cost_100k_flows_burst8_over_1": Goal(1.15, 1.1, CX6, less_is_better=True),
}


def flat(*parts: str) -> str:
    """A figure's name: the parts that are not empty, in one word."""
    return "_".join(part.replace("-", "_").lower() for part in parts if part)


def _goals() -> dict[str, Goal]:
    goals = dict(DEVICE)
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
    for name, (ratio, best) in SPEED.items():
        goals[name] = Goal(ratio, best, CX6 if best else "")
    goals["rr_latency_over_qemu"] = Goal(1.2, less_is_better=True)
    goals["install_time_offload_over_software"] = Goal(1.5, less_is_better=True)
    goals["cpu_per_gb_offload_over_plain"] = Goal(1.10, 1.25, CX6, less_is_better=True)
    goals["cpu_per_gb_offload_over_software"] = Goal(0.25, 0.4, CX6, less_is_better=True)
    return goals


GOALS: Final = _goals()
