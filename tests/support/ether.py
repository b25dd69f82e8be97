"""An Ethernet header with both addresses: one that is missing, scapy asks the network of this machine for."""

from __future__ import annotations

from scapy.layers.l2 import Ether

ETH = Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01")
