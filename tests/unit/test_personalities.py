"""The pictures of docs/personalities.md, played: what they say of every packet is what the engine does with it.

A picture has a row "arrives" and below it a row per personality, one sign per arrival. The stream: records of 100
bytes, of which one has passed; segments of 40, so that a record starts in number 1, 3, 6, 8, 11.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nicdev.tls.personality import RX_PERSONALITIES
from tests.support.tls_link import BASE, SIZE, Link, link
from tests.support.tls_oracle import GCM_1_2, stream

DOCUMENT = Path(__file__).parents[2] / "docs" / "personalities.md"
SEGMENT = 40
LONG = 16240  # "~": so many bytes in segments, a little less than a longest record


class Player:
    """One personality meets one picture."""

    def __init__(self, personality: str) -> None:
        self.wire: Link = link(RX_PERSONALITIES[personality], stream(GCM_1_2, [71] * 800))
        self.wire.marks((0, SIZE))
        self.top = SIZE  # behind everything that passed
        self.asked: list[int] = []
        self.hints = personality == "core-next-hint"

    def sign(self, arrival: str) -> str:
        """What becomes of one arrival."""
        if arrival == "x":
            self.wire.rx.lose_sync()
            return "."
        if arrival == "A":
            self.answer()
            return "."
        if arrival == "~":
            signs = {self.packet(self.top) for _ in range(LONG // SEGMENT)}
            return signs.pop() if len(signs) == 1 else "".join(sorted(signs))
        return self.packet(self.top if arrival == "+" else SIZE + SEGMENT * (int(arrival) - 1))

    def packet(self, at: int) -> str:
        """One segment."""
        self.top = max(self.top, at + SEGMENT)
        result = self.wire.packet(at, at + SEGMENT)
        if result.ask is not None or result.guess is not None:
            self.asked.append(((result.guess if result.ask is None else result.ask) or 0) - BASE & 0xFFFFFFFF)
        told = (result.opened, result.guess, result.ask, result.cancelled or None)
        signs = "".join(sign for sign, what in zip("SE?C", told, strict=True) if what is not None)
        return signs or ("D" if result.decrypted else "L" if result.lost_sync else "-")

    def answer(self) -> None:
        """The kernel's: to the last question, or where the next record starts behind all that passed."""
        index = -(-self.top // SIZE) if self.hints else self.asked[-1] // SIZE
        assert self.wire.resync(index)


def pictures() -> Iterator[tuple[str, list[str], str, str]]:
    """Heading, arrivals, personality and its signs."""
    heading = ""
    arrivals: list[str] = []
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("#"):
            heading, arrivals = line.strip("# "), []
        row = re.fullmatch(r"    (\S+)((?: +(?:\d+|[~+A-Zx?.L-]))+) *(?:  .*)?", line)
        if row is None:
            continue
        if row[1] == "arrives":
            arrivals = row[2].split()
        elif row[1] in RX_PERSONALITIES:
            yield heading, arrivals, row[1], row[2]


PICTURES = list(pictures())


@pytest.mark.conformance(56)
@pytest.mark.conformance(57)
@pytest.mark.conformance(58)
@pytest.mark.conformance(59)
@pytest.mark.conformance(61)
@pytest.mark.parametrize(("heading", "arrivals", "personality", "signs"), PICTURES)
def test_picture(heading: str, arrivals: list[str], personality: str, signs: str) -> None:
    player = Player(personality)
    assert [player.sign(arrival) for arrival in arrivals] == signs.split()


def test_every_rx_personality_is_drawn_in_both_figures_and_lost() -> None:
    figures = [heading for heading, _, _, _ in PICTURES]
    assert len(set(figures)) == 2 + len(RX_PERSONALITIES)
    for heading in set(figures):
        drawn = {personality for each, _, personality, _ in PICTURES if each == heading}
        assert drawn == set(RX_PERSONALITIES) or [f"rx {personality}" for personality in drawn] == [heading]
