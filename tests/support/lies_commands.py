"""What a device can lie about when the driver gives it a command: in its reply, or by what it does of one without.

One function per lie, named as tests name it; see lies.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Final

from nicdev import abi
from tests.support.deliveries import EXT, Answer
from tests.support.lies import MORE_THAN_ANY_BUFFER

GENERATION_AT: Final = 8  # in a COMMAND
KEY_LEN_AT: Final = 12  # in the body of CTX_ADD
AnswerLie = Callable[[Answer, Random], bool]
PostedLie = Callable[[bytearray, Random], bool]  # the chain that the device will read


# -- replies to commands -----------------------------------------------------------------------------------------------


def _answer_used(*lengths: int) -> AnswerLie:
    def lie(it: Answer, rng: Random) -> bool:
        it.written = rng.choice(lengths)
        return True

    return lie


def _answer_status(*statuses: int) -> AnswerLie:
    def lie(it: Answer, rng: Random) -> bool:
        it.view[:4] = rng.choice(statuses).to_bytes(4, "little")
        return True

    return lie


def _answer_len(*lengths: int) -> AnswerLie:
    def lie(it: Answer, rng: Random) -> bool:
        it.view[4:8] = rng.choice(lengths).to_bytes(4, "little")
        return True

    return lie


def _answer_cut(it: Answer, rng: Random) -> bool:
    """In the midst of the data."""
    if it.written < 24:
        return False
    it.written = rng.randrange(9, it.written)
    return True


def _answer_data(opcode: abi.Opcode, byte: int) -> AnswerLie:
    """A reply full of the same."""

    def lie(it: Answer, rng: Random) -> bool:
        if it.opcode != opcode:
            return False
        it.view[8:] = bytes([byte]) * (len(it.view) - 8)
        it.written = len(it.view)
        it.view[4:8] = it.written.to_bytes(4, "little")
        return True

    return lie


# -- contexts that nobody waits for ------------------------------------------------------------------------------------


def _posted_forgotten(chain: bytearray, rng: Random) -> bool:
    """It becomes a command that changes nothing."""
    chain[EXT:] = abi.COMMAND.pack(abi.ExtType.COMMAND, abi.Opcode.GET_STATS, abi.COMMAND.size, 0, 0)
    return True


def _posted_other(chain: bytearray, rng: Random) -> bool:
    """It becomes a context with a generation that the driver will not use; nothing ends it but a reset."""
    at = EXT + GENERATION_AT
    chain[at : at + 4] = (0xFFFF_FFFF).to_bytes(4, "little")
    return True


def _posted_spoiled(chain: bytearray, rng: Random) -> bool:
    """The device finds it malformed, and says so."""
    chain[EXT + abi.COMMAND.size + KEY_LEN_AT] += rng.choice((1, 2, 7))
    return True


ANSWER_LIES: Final[dict[str, AnswerLie]] = {
    "nothing written": _answer_used(0),
    "less than a reply written": _answer_used(*range(1, 8)),
    "more than a reply written": _answer_used(*MORE_THAN_ANY_BUFFER),
    "status": _answer_status(7, 255, 1 << 31, (1 << 32) - 1),
    "status of another": _answer_status(*range(1, 7)),
    "success": _answer_status(0),
    "reply shorter than a reply": _answer_len(*range(8)),
    "reply longer than written": _answer_len(0xFFFF, (1 << 32) - 1),
    "reply cut short": _answer_cut,
    "stat names without end": _answer_data(abi.Opcode.GET_STAT_NAMES, 0x25),
    "stats of ones": _answer_data(abi.Opcode.GET_STATS, 0xFF),
}
POSTED_LIES: Final[dict[str, PostedLie]] = {
    "posted add forgotten": _posted_forgotten,
    "posted add spoiled": _posted_spoiled,
    "posted add of another generation": _posted_other,
}
