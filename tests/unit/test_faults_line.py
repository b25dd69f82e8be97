"""Frames in, frames out: each fault, each address, the same twice. The frames are scapy's, records are made by hand."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from nicdev.abi import Cipher, Direction, TlsVersion
from nicdev.faults import line
from nicdev.faults.director import Director
from nicdev.faults.parse import parse
from nicdev.faults.scenario import Scenario
from nicdev.stats import Counter, Stats
from nicdev.tls.context import ContextParams
from nicdev.tls.table import ContextTable

GUEST, PEER = bytes([198, 51, 100, 2]), bytes([198, 51, 100, 1])
START = 0xFFFF_F000  # wraps after 4 KiB
PLAIN = bytes(12)
GSO = struct.pack("<BBHHHHH", 1, 1, 54, 1000, 34, 16, 0)  # NEEDS_CSUM, TCPV4, gso_size 1000
PARTIAL = struct.pack("<BBHHHHH", 1, 0, 54, 0, 34, 16, 0)
RECORD = 529  # bytes in all: 500 of text
TX, RX = Direction.TX, Direction.RX


class World:
    """A director for a table without contexts, and what its counters say."""

    def __init__(self, scenario: Scenario | str) -> None:
        self.stats = Stats()
        self.table = ContextTable(16)
        wanted = parse(scenario, "test") if isinstance(scenario, str) else scenario
        self.director = Director(wanted, self.table, self.stats, lambda: 0.0)
        self.table.observer = self.director.flows
        self.contexts = 0

    def context(self, direction: Direction = TX, port: int = 4000, rec_seq: int = 0, start: int = START) -> None:
        """The next context: a guest's port to the peer's 443."""
        self.table.add(self.contexts, 1, params(direction, port, rec_seq, start))
        self.contexts += 1

    def pass_(self, frame: bytes, header: bytes = PLAIN, now: float = 0, direction: Direction = TX) -> list[bytes]:
        """The frames that leave when this one comes."""
        out = self.director.feed(direction, header, memoryview(bytearray(frame)), now)
        return [bytes(parcel.frame) for parcel in out]

    def struck(self) -> list[int]:
        return [int(str(rule["struck"])) for rule in self.director.describe()["rules"]]  # type: ignore[attr-defined]

    def later(self, now: float) -> list[bytes]:
        return [bytes(parcel.frame) for _, parcel in self.director.poll(now)]


def params(direction: Direction, port: int = 4000, rec_seq: int = 0, start: int = START) -> ContextParams:
    return ContextParams(
        direction, 4, TlsVersion.TLS_1_2, Cipher.AES_GCM_128, start, rec_seq,
        bytearray(4), bytearray(8), bytearray(16), (GUEST, port), (PEER, 443),
    )  # fmt: skip


def segment(at: int = 0, payload: bytes = b"x", port: int = 4000, outgoing: bool = True, flags: str = "PA") -> bytes:
    """A segment of a guest's connection that starts at byte `at` of the flow."""
    guest, peer = (".".join(map(str, end)) for end in (GUEST, PEER))
    ip = IP(src=guest, dst=peer) if outgoing else IP(src=peer, dst=guest)
    ports = (port, 443) if outgoing else (443, port)
    tcp = TCP(sport=ports[0], dport=ports[1], seq=(START + at) & 0xFFFFFFFF, flags=flags)
    return bytes(Ether() / ip / tcp / payload)


def valid(frame: bytes) -> bool:
    """Whether scapy finds the TCP checksum right."""
    packet = Ether(frame)
    written = packet[TCP].chksum
    del packet[TCP].chksum
    return bool(Ether(bytes(packet))[TCP].chksum == written)


STREAM = b"".join(b"\x17\x03\x03" + (RECORD - 5).to_bytes(2, "big") + bytes([n]) * (RECORD - 5) for n in range(20))
CUT = 200
PIECES = [(at, segment(at, STREAM[at : at + CUT])) for at in range(0, len(STREAM), CUT)]


def rule(action: str, *lines: str, direction: str = "tx") -> str:
    return "\n".join(("[[rule]]", f'action = "{action}"', f'direction = "{direction}"', *lines, ""))


def run(world: World, pieces: list[tuple[int, bytes]] = PIECES) -> list[int]:
    """Where the segments that were dropped started."""
    return [at for at, frame in pieces if not world.pass_(frame)]


def holding(low: int, high: int) -> list[int]:
    """Where the segments that hold some of these bytes start."""
    return [at for at, _ in PIECES if at < high and at + CUT > low]


# -- addresses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "dropped"),
    [
        (["nth = 3"], [2 * CUT]),
        (["nth = 3", "count = 2"], [2 * CUT, 3 * CUT]),
        (["flow = 1", "record = 7", 'part = "header"'], holding(7 * RECORD, 7 * RECORD + 5)),
        (["record = 7", 'part = "nonce"'], holding(7 * RECORD + 5, 7 * RECORD + 13)),
        (["record = 3", 'part = "payload"', 'count = "all"'], holding(3 * RECORD + 13, 4 * RECORD - 16)),
        (["record = 3", 'part = "tag"', 'count = "all"'], holding(4 * RECORD - 16, 4 * RECORD)),
        (["record = 3", 'count = "all"'], holding(3 * RECORD, 4 * RECORD)),
        (["record = 3", "nth = 2"], holding(3 * RECORD, 4 * RECORD)[1:2]),
        (["record = 3", "byte = 300"], holding(3 * RECORD + 300, 3 * RECORD + 301)),
        (["record = 3", 'part = "tag"', "byte = 15"], holding(4 * RECORD - 1, 4 * RECORD)),
        (["seq = [1000, 1300]", 'count = "all"'], holding(1000, 1300)),
        (["seq = [4000, 4200]"], holding(4000, 4200)[:1]),
        (["record = 99"], []),
        (["flow = 2"], []),
        (["flow = 2", "record = 1"], []),
        (['local = "198.51.100.2:4000"', 'remote = "*:443"'], [0]),
        (['local = "198.51.100.3:*"'], []),
        (['remote = "[2001:db8::1]:443"'], []),
    ],
)
def test_address(lines: list[str], dropped: list[int]) -> None:
    world = World(rule("drop", *lines))
    world.context()
    assert run(world) == dropped
    assert world.stats[Counter.FAULT_DROPPED] == len(dropped) == world.struck()[0]


def test_record_numbers_count_from_the_first_of_the_context() -> None:
    world = World(rule("drop", "record = 2", 'part = "header"'))
    world.context(rec_seq=5000)
    assert run(world) == holding(2 * RECORD, 2 * RECORD + 5)[:1]


def test_flows_count_per_direction_in_order_of_creation() -> None:
    world = World(rule("drop", "flow = 2", 'count = "all"'))
    for direction, port in ((TX, 4000), (RX, 4000), (RX, 4001), (TX, 4001), (TX, 4002)):
        world.context(direction, port)
    assert [port for port in (4000, 4001, 4002) if not world.pass_(segment(port=port))] == [4001]
    world.table.delete(3, 1)
    assert world.pass_(segment(at=1, port=4001))
    world.context(TX, 4001)  # the same ends, another flow
    assert world.pass_(segment(at=2, port=4001))


def test_a_scenario_that_comes_later_finds_flows_where_they_are() -> None:
    world = World("")
    world.context()
    world.context(port=4001)
    late = Director(parse(rule("drop", "flow = 2", "record = 1"), "t"), world.table, world.stats, lambda: 0.0)
    frame = segment(RECORD, STREAM[RECORD : RECORD + CUT], port=4001)
    first = segment(0, STREAM[:CUT], port=4001)
    fed = [late.feed(TX, PLAIN, memoryview(bytearray(f)), 0) for f in (first, frame)]
    assert [len(out) for out in fed] == [1, 0]


def test_rx_flows_are_found_from_the_other_end() -> None:
    world = World(rule("drop", "flow = 1", "record = 1", direction="rx"))
    world.context(RX)
    assert world.pass_(segment(0, STREAM[:600]), direction=RX)  # the guest's own
    assert world.pass_(segment(0, STREAM[:RECORD], outgoing=False), direction=RX)
    assert not world.pass_(segment(RECORD, STREAM[RECORD:600], outgoing=False), direction=RX)


@pytest.mark.parametrize(("too", "dropped"), [("false", [True, False, False]), ("true", [True, True, False])])
def test_first_transmissions_or_repetitions_as_well(too: str, dropped: list[bool]) -> None:
    world = World(rule("drop", "record = 1", 'part = "header"', "count = 2", f"retransmissions = {too}"))
    world.context()
    first, second = segment(0, STREAM[:RECORD]), segment(RECORD, STREAM[RECORD:700])
    assert world.pass_(first)
    assert [not world.pass_(second) for _ in range(3)] == dropped


@pytest.mark.parametrize(
    ("only", "dropped"),
    [("data", [False, False, True, False]), ("tcp", [False, True, True, True]), ("any", [True] * 4)],
)
def test_kinds_of_packets(only: str, dropped: list[bool]) -> None:
    world = World(rule("drop", f'only = "{only}"', 'count = "all"'))
    udp = bytes(Ether() / IP() / UDP() / b"x")
    fin = segment(1, b"", flags="FA")
    six = bytes(Ether() / IPv6() / TCP(flags="A"))
    assert [not world.pass_(frame) for frame in (udp, fin, segment(), six)] == dropped


# -- actions -------------------------------------------------------------------------------------------------------


def test_duplicate_is_a_copy_of_its_own() -> None:
    world = World(rule("duplicate"))
    frame = segment()
    one, two = world.director.feed(TX, PLAIN, memoryview(bytearray(frame)), 0)
    assert bytes(one.frame) == bytes(two.frame) == frame
    one.frame[-1] ^= 0xFF  # as a device does that decrypts in place
    assert bytes(two.frame) == frame
    assert world.pass_(frame) == [frame]
    assert world.stats[Counter.FAULT_DUPLICATED] == 1


def flipped(before: bytes, after: bytes) -> list[int]:
    """Bits that differ, checksums of TCP (bytes 50, 51) aside."""
    one, two = (f[:50] + b"\0\0" + f[52:] for f in (before, after))
    difference = int.from_bytes(one, "big") ^ int.from_bytes(two, "big")
    return [len(one) * 8 - 1 - n for n in range(len(one) * 8) if difference >> n & 1]


@pytest.mark.parametrize("header", [PLAIN, PARTIAL])
@pytest.mark.parametrize(
    ("part", "low", "high"),
    [("header", 0, 5), ("nonce", 5, 13), ("payload", 13, RECORD - 16), ("tag", RECORD - 16, RECORD)],
)
def test_corrupt_flips_one_bit_of_the_part_and_repairs_the_checksum(
    header: bytes, part: str, low: int, high: int
) -> None:
    world = World(rule("corrupt", "record = 1", f'part = "{part}"'))
    world.context()
    frame = segment(0, STREAM[:1200])
    (out,) = world.pass_(frame, header)
    (bit,) = flipped(frame, out)
    assert RECORD + low <= bit // 8 - 54 < RECORD + high
    assert valid(out) or header == PARTIAL  # a checksum that is left to others is theirs
    assert (out[50:52] == frame[50:52]) == (header == PARTIAL)
    assert world.stats[Counter.FAULT_CORRUPTED] == 1


def test_corrupt_one_bit_that_is_named() -> None:
    world = World(rule("corrupt", "record = 0", 'part = "tag"', "byte = 15", "bit = 7"))
    world.context()
    frame = segment(0, STREAM[:600])
    (out,) = world.pass_(frame)
    assert flipped(frame, out) == [8 * (54 + RECORD - 1)]


@pytest.mark.parametrize("header", [PLAIN, PARTIAL])
def test_corrupt_with_a_checksum_that_tells(header: bytes) -> None:
    world = World('[tx]\nsegments = "wire"\n' + rule("corrupt", 'checksum = "wrong"'))
    frame = segment(payload=b"data" * 9)
    (out,) = world.director.feed(TX, header, memoryview(bytearray(frame)), 0)
    assert bytes(out.header) == PLAIN
    assert len(flipped(frame, bytes(out.frame))) == 1
    assert not valid(bytes(out.frame))


def test_corrupt_what_is_no_tcp() -> None:
    world = World(rule("corrupt", 'only = "any"', "count = 2"))
    for frame in (bytes(Ether() / IP() / UDP() / b"x"), segment(payload=b"")):
        (out,) = world.pass_(frame)
        assert out[:14] == frame[:14]
        assert out != frame


def names(frames: list[bytes]) -> str:
    return "".join(chr(frame[-1]) for frame in frames)


def letters(world: World, text: str, now: float = 0, port: int = 4000) -> str:
    """Feed one segment per letter; what came out."""
    return "".join(names(world.pass_(segment(ord(c), c.encode(), port=port), now=now)) for c in text)


@pytest.mark.parametrize(("distance", "out"), [(1, "abdcef"), (2, "abdecf"), (3, "abdefc"), (9, "abdef")])
def test_reorder_lets_others_overtake(distance: int, out: str) -> None:
    world = World(rule("reorder", "nth = 3", f"distance = {distance}"))
    assert letters(world, "abcdef") == out
    assert world.stats[Counter.FAULT_REORDERED] == 1
    assert names([bytes(parcel.frame) for _, parcel in world.director.flush()]) == ("c" if distance == 9 else "")


def test_swap_the_next_two_segments() -> None:
    assert letters(World(rule("swap")), "abcd") == "bacd"


def test_reorder_counts_packets_of_the_same_stream_and_kind() -> None:
    world = World(rule("swap", 'local = "*:4000"'))
    assert letters(world, "a") == ""
    assert letters(world, "b", port=4001) == "b"
    assert world.pass_(segment(5, b"", flags="A")) != []
    assert letters(world, "c") == "ca"


def test_reorder_ends_in_time_without_a_partner() -> None:
    world = World(rule("swap", "timeout_ms = 20"))
    assert letters(world, "a", now=1) == ""
    assert world.director.deadline() == pytest.approx(1.02)
    assert world.later(1.019) == []
    assert names(world.later(1.02)) == "a"
    assert world.director.deadline() is None
    assert world.stats[Counter.FAULT_TIMED_OUT] == 1
    assert letters(world, "b", now=2) == "b"


def test_delay_by_time_and_before_what_comes_later() -> None:
    world = World(rule("delay", "ms = 10", "count = 2"))
    assert letters(world, "abc", now=1) == "c"
    assert letters(world, "d", now=1.005) == "d"
    assert world.later(1.009) == []
    assert letters(world, "e", now=1.010) == "abe"
    assert world.stats[Counter.FAULT_DELAYED] == 2
    assert world.stats[Counter.FAULT_TIMED_OUT] == 0


def test_a_held_packet_is_a_copy_with_its_header() -> None:
    world = World(rule("delay", "ms = 1") + rule("duplicate"))
    frame = bytearray(segment())
    assert not world.director.feed(TX, memoryview(bytearray(PARTIAL)), memoryview(frame), 0)
    frame[:] = bytes(len(frame))
    (_, one), (_, two) = world.director.poll(1)
    assert bytes(one.frame) == bytes(two.frame) == segment()
    assert bytes(one.header) == PARTIAL


def test_a_full_store_lets_packets_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "MAX_HELD", 2)
    world = World(rule("delay", "ms = 1000", 'count = "all"'))
    assert letters(world, "abcd") == "cd"
    assert world.stats[Counter.FAULT_HOLD_FULL] == 2
    assert names([bytes(parcel.frame) for _, parcel in world.director.flush()]) == "ab"
    assert world.director.deadline() is None


def test_flush_lets_everything_go_in_order() -> None:
    world = World(rule("delay", "ms = 30") + rule("reorder", "nth = 2", "distance = 5", "timeout_ms = 10"))
    assert letters(world, "abc") == "c"
    assert names([bytes(parcel.frame) for _, parcel in world.director.flush()]) == "ba"
    assert letters(world, "defghijkl", now=9) == "defghijkl"


def test_a_dropped_packet_meets_nothing_else() -> None:
    world = World(rule("duplicate") + rule("drop") + rule("corrupt") + rule("delay", "ms = 1"))
    assert letters(world, "ab") == "b"
    counted = [counter.name for counter in Counter if world.stats[counter]]
    assert counted == ["FAULT_DROPPED"]


# -- segments ------------------------------------------------------------------------------------------------------


def test_large_packets_stay_whole_or_are_cut_to_wire_size() -> None:
    frame = segment(0, STREAM[:5000])
    assert World("").pass_(frame, GSO) == [frame]
    world = World('[tx]\nsegments = "wire"')
    out = world.director.feed(TX, GSO, memoryview(bytearray(frame)), 0)
    assert [bytes(parcel.header) for parcel in out] == [PLAIN] * 5
    packets = [Ether(bytes(parcel.frame)) for parcel in out]
    assert b"".join(bytes(packet[TCP].payload) for packet in packets) == STREAM[:5000]
    assert [packet[TCP].seq for packet in packets] == [(START + 1000 * n) & 0xFFFFFFFF for n in range(5)]
    assert all(valid(bytes(packet)) for packet in packets)
    assert world.pass_(frame, GSO, direction=RX) == [frame]
    small = segment(0, b"small")
    assert world.pass_(small, PARTIAL) == [small]


def test_a_packet_of_too_many_segments_stays_whole() -> None:
    world = World('[tx]\nsegments = "wire"')
    tiny = struct.pack("<BBHHHHH", 1, 1, 54, 1, 34, 16, 0)
    frame = segment(0, STREAM[:5000])
    assert world.pass_(frame, tiny) == [frame]


def test_faults_meet_segments_not_packets() -> None:
    world = World('[tx]\nsegments = "wire"\n' + rule("drop", "record = 3", 'part = "header"'))
    world.context()
    out = world.pass_(segment(0, STREAM[:5000]), GSO)
    assert [(Ether(frame)[TCP].seq - START) % 2**32 for frame in out] == [0, 2000, 3000, 4000]


# -- the same twice ------------------------------------------------------------------------------------------------

EVERYTHING = """
[tx]
segments = "wire"
drop = 0.1
duplicate = 0.1
corrupt = 0.1
reorder = 0.1
delay = 0.1
[rx]
drop = 0.3
"""


def everything(scenario: Scenario, jitter: float = 0) -> list[bytes]:
    """What leaves of 400 packets in both directions."""
    world = World(scenario)
    world.context()
    out = []
    for n in range(200):
        at = n % 20 * 1000
        out += world.pass_(segment(at, (STREAM * 2)[at : at + 3000]), GSO, now=n / 100 + (n % 3) * jitter)
        out += world.pass_(segment(n, b"back", outgoing=False), now=n / 100, direction=RX)
    return out + [bytes(parcel.frame) for _, parcel in world.director.flush()]


def test_the_same_seed_and_packets_give_the_same_bytes() -> None:
    scenario = parse(f"seed = 1\n{EVERYTHING}", "t")
    once = everything(scenario)
    assert once == everything(scenario)
    assert once != everything(replace(scenario, seed=2))
    assert sorted(once) == sorted(everything(scenario, jitter=0.002))  # time changes the order and nothing else


def test_a_rule_does_not_change_the_decisions_of_others() -> None:
    text = "[tx]\ndrop = 0.2\n"
    alone = run(World(text))
    among = World(text + "duplicate = 0.5\n" + rule("corrupt", "rate = 0.9") + "[rx]\ndrop = 0.5\n")
    assert run(among) == alone
    assert 0 < len(alone) < len(PIECES)


def test_a_rate_is_about_kept() -> None:
    world = World("[tx]\ndrop = 0.05")
    dropped = sum(not world.pass_(segment(n, b"x")) for n in range(2000))
    assert 70 <= dropped <= 130
    assert world.stats[Counter.FAULT_DROPPED] == dropped
