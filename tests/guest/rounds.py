"""Connections that echo in rounds and hold still between them, so that something can happen in the middle of one."""

from __future__ import annotations

from tests.guest.conftest import wait_until
from tests.guest.exchange import CIPHERS, EOF, SHUTDOWN, WAIT, Case, Running, recv, send

CHUNK = 128 << 10
ROUND = 16 * CHUNK
RECORDS_PER_ROUND = ROUND >> 14


def echo_cases(name: str, rounds: int) -> list[Case]:
    """A connection of each family and cipher, both directions offloaded, with a pause between rounds."""
    one = [send(CHUNK), recv(CHUNK)] * (ROUND // CHUNK)
    guest = one + [step for _ in range(rounds - 1) for step in (WAIT, *one)] + [SHUTDOWN, EOF]
    peer = [{"do": "echo", "size": rounds * ROUND}, EOF, SHUTDOWN]
    both = list(zip("46", CIPHERS, strict=True))
    return [Case(f"{name} {family}", guest, peer, family=family, cipher=cipher) for family, cipher in both]


class Rounds:
    """Leads a running exchange of echo_cases from round to round."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.done = 0
        self.end()

    def end(self) -> None:
        """Until all connections stand between this round and the next."""
        self.done += 1
        tool = self.running.tool

        def waiting() -> bool:
            assert tool.running, self.account()
            return tool.stdout.count(b'"waiting"') >= self.done

        wait_until(waiting, f"end of round {self.done}", 60)

    def account(self) -> str:
        """What the tool said, and what kernel, driver and NIC have counted since they were started."""
        bed = self.running.bed
        counts = {"tls_stat": bed.tls_stat(), "driver": bed.ethtool(), "nic": bed.nic.stats()}
        lines = [f"{name}: { {key: count for key, count in found.items() if count} }" for name, found in counts.items()]
        return "\n".join([bytes(self.running.tool.stdout + self.running.tool.stderr)[-2000:].decode(), *lines])

    def begin(self) -> None:
        """Let the next round begin; returns when it has."""
        before = self.running.bed.nic.stats()
        self.running.go_on()
        wait_until(lambda: self.running.bed.nic.stats()["rx_bytes"] > before["rx_bytes"] + CHUNK, "traffic")

    def whole(self) -> dict[str, int]:
        """A round without events, what the device counted in it."""
        before = self.running.bed.nic.stats()
        self.begin()
        self.end()
        after = self.running.bed.nic.stats()
        return {name: after[name] - before[name] for name in after}


def offloaded_again(rounds: Rounds) -> bool:
    """Whether, after what happened, a round goes through the device in both directions."""
    count = rounds.whole()
    return count["tx_tls_records"] >= 2 * RECORDS_PER_ROUND and count["rx_tls_records"] >= RECORDS_PER_ROUND
