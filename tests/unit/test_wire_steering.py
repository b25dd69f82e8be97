"""A flow is received where it last transmitted, whatever came between."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, IPOption_NOP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet

from nicdev.wire.frame import parse
from nicdev.wire.steering import MAX_FLOWS, Steering
from tests.support.ether import ETH

PORTS = ((1000, 443), (1001, 443), (1000, 444), (443, 1000))
LAYERS: tuple[tuple[Packet, Packet], ...] = (  # as transmitted, as received
    (IP(src="198.51.100.2", dst="198.51.100.1"), IP(src="198.51.100.1", dst="198.51.100.2")),
    (IP(src="198.51.100.2", dst="198.51.100.3"), IP(src="198.51.100.3", dst="198.51.100.2")),
    (IP(src="198.51.100.2", dst="198.51.100.4", options=[IPOption_NOP()]), IP(src="198.51.100.4", dst="198.51.100.2")),
    (IPv6(src="2001:db8::2", dst="2001:db8::1"), IPv6(src="2001:db8::1", dst="2001:db8::2")),
)
FLOWS = [
    (bytes(ETH / out / TCP(sport=a, dport=b)), parse(bytearray(bytes(ETH / back / TCP(sport=b, dport=a)))))
    for out, back in LAYERS
    for a, b in PORTS
]


@given(st.lists(st.tuples(st.integers(0, len(FLOWS) - 1), st.integers(0, 3)), max_size=30))
def test_the_last_queue_counts(sent: list[tuple[int, int]]) -> None:
    steering, model = Steering(), dict.fromkeys(range(len(FLOWS)), 0)
    for flow, queue in sent:
        steering.transmitted(queue, memoryview(FLOWS[flow][0]))
        model[flow] = queue
    found = {}
    for flow, (_, received) in enumerate(FLOWS):
        assert received is not None
        found[flow] = steering.queue(received)
    assert found == model


@given(st.binary(max_size=80), st.integers(14, 60))
def test_any_bytes_may_be_sent(noise: bytes, size: int) -> None:
    """And what looks like the last flow but is none changes nothing."""
    steering = Steering()
    frame, received = FLOWS[0]
    assert received is not None
    steering.transmitted(2, memoryview(frame))
    steering.transmitted(1, memoryview(frame[:size] if size < len(frame) else frame[:14] + noise))
    assert steering.queue(received) in (1, 2)
    steering.transmitted(3, memoryview(frame))
    assert steering.queue(received) == 3


def test_it_forgets_on_request_and_when_there_are_too_many() -> None:
    steering = Steering()
    frame, received = FLOWS[0]
    assert received is not None
    steering.transmitted(1, memoryview(frame))
    steering.clear()
    assert steering.queue(received) == 0
    steering.transmitted(1, memoryview(frame))
    assert steering.queue(received) == 1
    other = bytearray(frame)
    for number in range(MAX_FLOWS):
        other[26:30] = number.to_bytes(4, "big")  # its source address
        steering.transmitted(1, memoryview(other))
    assert steering.queue(received) == 0
