"""What all tests share: nobody outside hears of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def no_questions_to_the_network() -> Iterator[None]:
    """Frames name their addresses; scapy would send ARP on this machine's interfaces, and wait, for one left out."""

    def refuse(*layers: object) -> None:
        raise AssertionError(f"no destination address in {layers[0]!r}")

    with pytest.MonkeyPatch.context() as patch:
        if scapy := sys.modules.get("scapy.config"):
            patch.setattr(scapy.conf.neighbor, "resolve", refuse)
        yield
