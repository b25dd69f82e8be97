"""A device that lies, on purpose and at random: the guest lives, notices, and hands out no wrong byte.

The NIC's program is the real one with a liar between device and driver (tests/support/lying_nic.py). What it lies about
is told to it at run time, so one guest serves all tests. After each, the device is honest again: no context may be left
anywhere, the kernel may have nothing to complain about, and new connections must be offloaded as ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from testbed.bed import MACS, Bed, configure_guest, running
from testbed.setup import Assets
from tests.guest.cases import AWAITED, both_ways
from tests.guest.conftest import assert_settled, wait_until
from tests.guest.exchange import (
    CIPHERS,
    WAIT,
    Case,
    Running,
    exchange,
    exchanging,
    recv,
    rx_case,
    rx_personality,
    send,
    tx_case,
)
from tests.guest.lying import BIND, STUCK, bind, grows, lying, rebind, unbind
from tests.guest.resync_rx import desync, rule
from tests.support.packet_link import PacketLink

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZE = 200_000
# What a device that was told nonsense, or taken at its word, drops rather than send
DROPS = ("tx_drop_unknown_context", "tx_drop_stale_context", "tx_drop_wrong_seq", "rx_drop_inconsistent")
BROKEN = ("rx_ring_errors", "tx_ring_errors")
FRAME = bytes.fromhex(MACS[0].replace(":", "")) + bytes.fromhex("02000000000188b5") + bytes(200)
RX_PERSONALITIES = ("driver-req", "driver-req-async", "core-next-hint", "ideal")
DRIVER = "/opt/tlsnic/tlsnic.ko"


@pytest.fixture(scope="module")
def liar(assets: Assets) -> Iterator[Bed]:
    with running(assets, name="test-liar", nic_module="tests.support.lying_nic") as bed:
        yield bed


@pytest.fixture
def bed(liar: Bed, tmp_path: Path) -> Iterator[Bed]:
    yield liar
    fresh = both_ways("honest again", SIZE)
    exchange(liar, [fresh], tmp_path / "fresh.pcap").offloaded()
    assert_settled(liar, drops=DROPS + BROKEN)


NOTICED = {
    "length zero": "rx_drop_length",
    "length less than a header": "rx_drop_length",
    "length without a frame": "rx_drop_length",
    "length more than the buffer": "rx_drop_length",
    "no buffers": "rx_drop_buffers",
    "too many buffers": "rx_drop_buffers",
    "more buffers than there are": "rx_drop_buffers",
    "gso type": "rx_drop_header",
    "gso size": "rx_drop_header",
    "checksum outside": "rx_drop_header",
    "extension type": "rx_drop_ext",
    "extension cut": "rx_drop_ext",
    "extension too small": "rx_drop_ext",
    "extension beyond the buffer": "rx_drop_ext",
    "verdict of an unknown context": "rx_drop_verdict",
    "event about nobody": "events_stale",
}


@pytest.mark.parametrize("lie", NOTICED)
def test_a_lie_is_noticed(liar: Bed, lie: str) -> None:
    """Each lie about a frame is counted under its name. One by one, since the driver may take the next frame for a part
    of the one before."""
    with PacketLink(liar.wire) as link, lying(liar, lie) as told:
        for _ in range(5):
            before = liar.ethtool()[NOTICED[lie]]
            link.send(FRAME)
            grows(liar, NOTICED[lie], before)
    assert told[lie] >= 5
    assert liar.guest.kernel_complaints() == []


UNANSWERED = (
    "nothing written",
    "less than a reply written",
    "more than a reply written",
    "status",
    "status of another",
    "reply shorter than a reply",
)


@pytest.mark.parametrize("lie", UNANSWERED)
def test_a_reply_is_not_believed(liar: Bed, lie: str) -> None:
    """`ethtool -S` asks the device for its counters: without an answer they stay what they were."""
    honest = Counter(liar.ethtool())
    with lying(liar, lie) as told:
        for _ in range(5):
            assert liar.ethtool()["dev_cmd_ok"] == honest["dev_cmd_ok"]
    assert told[lie] == 5
    assert liar.ethtool()["cmd_failed"] == honest["cmd_failed"] + 5


def test_a_reply_of_another_length(liar: Bed) -> None:
    """The driver reads no more than the ring says was written, and of numbers whole ones."""
    honest = Counter(liar.ethtool())
    with lying(liar, "reply longer than written", "reply cut short") as told:
        for _ in range(5):
            assert len(liar.ethtool()) == len(honest)
    assert told.total() == 5
    assert liar.ethtool()["cmd_failed"] == honest["cmd_failed"]


class Family(NamedTuple):
    """Lies told at random, all at the same time, to connections that are made and used meanwhile."""

    lies: Sequence[str]
    share: float
    counted: Sequence[str]  # by the driver, each at least once
    large: bool = False  # frames, of many buffers, rather than of wire size
    personality: str = "ideal"
    scenario: str = ""


QUESTIONS = ("question", "question elsewhere")
FAMILIES = {
    "length": Family([*(lie for lie in NOTICED if lie.startswith("length")), "length beyond the frame",
                      "length within the frame"], 0.03, ["rx_drop_length"]),
    "length of a later buffer": Family(["length of a later buffer"], 0.2, ["rx_drop_length"], large=True),
    "buffers": Family([lie for lie in NOTICED if "buffers" in lie], 0.1, ["rx_drop_buffers"], large=True),
    "header": Family(["gso type", "gso size", "checksum outside", "segments of any size", "header of noise"], 0.04,
                     ["rx_drop_header"]),
    "extension": Family([*(lie for lie in NOTICED if lie.startswith("extension")), "extension into the frame"], 0.03,
                        ["rx_drop_ext"]),
    "verdict": Family(["verdict of an unknown context", "verdict of another generation", "verdict of a tx context",
                       "verdict of a closed context"], 0.04, ["rx_drop_verdict"]),
    "event": Family(["event about nobody", "event of a drop", "event of no context", "event of a change"], 0.1,
                    ["events", "events_stale", "tx_tls_device_drop", "hello", "tls_recreated"]),
    "hello unasked": Family(["hello unasked"], 0.5, []),
    "answer": Family([*UNANSWERED, "reply longer than written"], 1, ["cmd_failed"], scenario=AWAITED),
    "posted add": Family(["posted add forgotten", "posted add spoiled"], 0.5,
                         ["tls_add_posted", "tls_add_refused", "tls_recreated"]),
    **{f"question of {name}": Family(QUESTIONS, 0.3, ["rx_tls_resync_req_pkt"], personality=name)
       for name in RX_PERSONALITIES},
}  # fmt: skip
REFUSE = "".join(rule("refuse-add", direction=direction, count="all") for direction in ("tx", "rx"))
WIRE_SIZE = """
seed = 1
[rx]
segments = "wire"
"""


def connections(name: str) -> list[Case]:
    """Several at once, with keys for both directions and for one."""
    size = 4 * SIZE
    return [
        *(both_ways(f"{name} {number}", SIZE, cipher=cipher) for number, cipher in enumerate(CIPHERS * 2)),
        tx_case(f"{name} tx", send(size), size=size),
        rx_case(f"{name} rx", send(size), size=size),
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_streams_arrive_whatever_the_device_says(bed: Bed, tmp_path: Path, name: str) -> None:
    """Slower, perhaps by software, and not one byte wrong or in clear."""
    lies, share, counted, large, personality, scenario = FAMILIES[name]
    with ExitStack() as stack:
        stack.enter_context(rx_personality(bed, personality))
        if scenario or not large:
            stack.enter_context(bed.nic.faults(("" if large else WIRE_SIZE) + scenario))
        told = stack.enter_context(lying(bed, *lies, share=share))
        seen = exchange(bed, connections(name), tmp_path / "wire.pcap")
    seen.arrived()
    seen.wire_is_encrypted()
    assert told.total() >= 5, told
    assert {lie for lie in lies if lie not in NOTICED and lie not in UNANSWERED and not told[lie]} == set(), told
    assert {counter for counter in counted if not seen.driver[counter]} == set(), seen.account(name)
    starts, ends, skips = (seen.driver[f"rx_tls_resync_req_{what}"] for what in ("start", "end", "skip"))
    assert starts == ends + skips


@pytest.mark.conformance(8)
def test_contexts_that_are_made_and_denied(bed: Bed, tmp_path: Path) -> None:
    """Every context is made and said to be refused: software does it all, and nothing stays in the device."""
    with bed.nic.faults(AWAITED), lying(bed, "status of another") as told:
        seen = exchange(bed, connections("denied"), tmp_path / "wire.pcap")
    made = seen.nic["ctx_tx_added"] + seen.nic["ctx_rx_added"]
    assert told["status of another"] >= made == sum(len(case.dirs) for case in seen.cases)
    assert seen.driver["tls_add_failed"] == seen.tls_stat["TlsTxSw"] + seen.tls_stat["TlsRxSw"] == made
    seen.arrived()
    seen.wire_is_encrypted()


def test_contexts_that_are_promised_and_not_made(bed: Bed, tmp_path: Path) -> None:
    """The device drops what it was to encrypt, and says so; the driver adds the context again, once, in vain."""
    with bed.nic.faults(REFUSE), lying(bed, "success") as told:
        seen = exchange(bed, connections("promised"), tmp_path / "wire.pcap")
    contexts = seen.streams("tx")
    assert told["success"] > 0
    assert seen.nic["ctx_tx_added"] == seen.nic["ctx_rx_added"] == 0
    assert seen.driver["tls_recreated"] == len(contexts)
    assert seen.nic["tx_drop_unknown_context"] >= 2 * len(contexts)
    assert seen.driver["tx_tls_fallback"] > 0
    seen.arrived()
    seen.wire_is_encrypted()


@pytest.mark.conformance(8)
def test_posted_contexts_that_are_refused(bed: Bed, tmp_path: Path) -> None:
    """The kernel knows of no refusal, the driver does: it leaves these flows to software, and asks no more."""
    cases = connections("spoiled")
    contexts = sum(len(case.dirs) for case in cases)
    refused = bed.nic.stats()["ctx_refused"] + contexts
    driver = bed.ethtool()
    with lying(bed, "posted add spoiled") as told:
        seen = exchange(bed, cases, tmp_path / "wire.pcap")
        # nobody kicks for an rx context: its connection may have ended before the device hears of it
        wait_until(lambda: bed.nic.stats()["ctx_refused"] == refused, "the device has heard of every context")
    assert told["posted add spoiled"] == seen.driver["tls_add_posted"] == contexts
    told_late = bed.ethtool()["events_stale"] - driver["events_stale"]
    assert contexts - told_late <= bed.ethtool()["tls_add_refused"] - driver["tls_add_refused"] <= contexts
    assert seen.tls_stat["TlsTxDevice"] + seen.tls_stat["TlsRxDevice"] == contexts
    assert seen.nic["ctx_tx_added"] == seen.nic["ctx_rx_added"] == seen.driver["tls_recreated"] == 0
    assert seen.nic["tx_tls_packets"] == seen.nic["rx_tls_packets"] == 0
    assert seen.driver["tx_tls_fallback"] > 0
    seen.arrived()
    seen.wire_is_encrypted()


@pytest.mark.parametrize("again", ["added", "denied"])
def test_posted_contexts_that_are_forgotten(bed: Bed, tmp_path: Path, again: str) -> None:
    """The device drops what it was to encrypt; the driver adds the context again, and waits: to be told yes, or no."""
    lies = ("posted add forgotten", *(["status of another"] if again == "denied" else []))
    with lying(bed, *lies) as told:
        seen = exchange(bed, connections(f"forgotten {again}"), tmp_path / "wire.pcap")
    sending = len(seen.streams("tx"))
    assert told["posted add forgotten"] == seen.driver["tls_add_posted"] == sum(len(case.dirs) for case in seen.cases)
    assert seen.nic["tx_drop_unknown_context"] >= sending
    if again == "added":
        assert seen.driver["tls_recreated"] == sending
    else:  # tried again with every HELLO
        assert seen.driver["tls_recreate_failed"] >= sending
        assert seen.driver["tx_tls_fallback"] > 0  # which those that are added at once may do without
    assert seen.nic["ctx_rx_added"] == seen.nic["rx_tls_packets"] == 0
    assert (seen.nic["tx_tls_packets"] > 0) == (again == "added")
    seen.arrived()
    seen.wire_is_encrypted()


def slots_while_open(bed: Bed, tmp_path: Path, name: str) -> tuple[set[int], Counter[str]]:
    """One connection that sends: the slots that the device has in use meanwhile, and what the driver counted."""
    slots: set[int] = set()

    def meanwhile(run: Running) -> None:
        run.guest_waits()
        slots.update(context["slot"] for context in bed.nic.contexts())
        run.go_on()

    size = 20_000
    seen = exchange(bed, [tx_case(name, send(size), WAIT, size=size)], tmp_path / "wire.pcap", meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    return slots, seen.driver


@pytest.mark.conformance(13)
@pytest.mark.parametrize("told_by", ["reply", "event"])
def test_a_slot_that_the_device_does_not_let_go(bed: Bed, tmp_path: Path, told_by: str) -> None:
    """It holds something there that nobody gave it. One context at most is refused for that: others go elsewhere, until
    the device has lost it."""
    with lying(bed, "posted add of another generation", *(["nothing written"] if told_by == "event" else [])) as told:
        held, driver = slots_while_open(bed, tmp_path, f"unwanted {told_by}")
    assert told["posted add of another generation"] == len(held) == 1
    assert driver["tls_recreate_failed"] > 0
    for number in range(3):
        slots, driver = slots_while_open(bed, tmp_path, f"later {told_by} {number}")
        refused = told_by == "event" and number == 0
        assert (len(slots), driver["tls_add_refused"]) == ((1, 1) if refused else (2, 0))
        assert held < slots or refused

    bed.guest.qmp("stop")  # QEMU resets the device meanwhile
    bed.guest.qmp("cont")

    def used_again() -> bool:
        slots, _ = slots_while_open(bed, tmp_path, f"anew {told_by}")
        return min(slots) <= min(held)

    wait_until(used_again, "the device has lost it, and the driver knows")


def test_a_device_that_is_another_every_time(bed: Bed, tmp_path: Path) -> None:
    """It says that it has lost its contexts, and holds them; the driver makes them anew, and none is left over."""
    times = 5

    def meanwhile(run: Running) -> None:
        for _ in range(times):
            run.guest_waits()
            hellos, made = (bed.ethtool()[name] for name in ("hello", "tls_recreated"))
            bed.nic.ask("personality", rx="ideal")  # the driver says HELLO when it hears of it
            grows(bed, "hello", hellos)
            grows(bed, "tls_recreated", made, by=4)
            run.go_on()

    guest = [step for _ in range(times) for step in (send(SIZE), recv(SIZE), WAIT)]
    peer = [step for _ in range(times) for step in (recv(SIZE), send(SIZE))]
    cases = [Case(f"reborn {n}", [*guest, send(1)], [*peer, recv(1)]) for n in range(2)]
    with lying(bed, "hello reborn") as told:
        seen = exchange(bed, cases, tmp_path / "wire.pcap", meanwhile)
    assert told["hello reborn"] == times
    seen.arrived()
    seen.wire_is_encrypted()


@pytest.mark.conformance(70)
@pytest.mark.conformance(105)
def test_an_attempt_that_is_never_heard_of_again(bed: Bed, tmp_path: Path) -> None:
    """The device opens one, and says of no later frame whose it is: the kernel would complain about 65535 records."""
    records = 75_000
    case = rx_case("forgotten", send(records, records=[1], writes=[30_000]), size=records)
    faults = bed.nic.faults(desync(1000))
    with rx_personality(bed, "driver-req-async"), faults, lying(bed, "question forgotten") as told:
        seen = exchange(bed, [case], tmp_path / "wire.pcap")
    seen.arrived()
    assert told["question forgotten"] > 20
    assert seen.nic["rx_tls_records"] < records / 10
    counts = [seen.driver[f"rx_tls_resync_req_{what}"] for what in ("start", "end", "skip")]
    assert counts == [1, 0, 1], seen.account("attempts")
    assert bed.guest.kernel_complaints() == []


def test_a_hello_out_of_all_proportion(bed: Bed, tmp_path: Path) -> None:
    """What the driver allocates by the device's word is bounded; names without an end get one."""
    with lying(bed, "hello absurd", "stat names without end", "stats of ones") as told:
        rebind(bed)
        listed = bed.agent.run(["ethtool", "-S", "eth0"]).text.splitlines()
        seen = exchange(bed, connections("absurd"), tmp_path / "wire.pcap")
    rebind(bed)
    assert min(told.values()) > 0, told
    assert sum("dev_%%%" in line for line in listed) == 1024
    assert sum(str((1 << 64) - 1) in line for line in listed) == 1024
    seen.arrived()
    seen.wire_is_encrypted()


@pytest.mark.parametrize("lie", ["rx id", "tx id", "no buffers", "extension cut"])
def test_a_device_that_lies_when_it_is_asked_who_it_is(bed: Bed, lie: str) -> None:
    """The driver lets go of it, or can be made to, and takes it when it is honest."""
    unbind(bed)
    with lying(bed, lie) as told:
        bound = bed.agent.run(["sh", "-c", BIND], timeout=STUCK, check=False).returncode == 0
    assert told[lie] > 0
    assert bound == (lie == "tx id")  # of which it hears when it has the answer
    if bound:
        unbind(bed)
    bind(bed)


@pytest.mark.parametrize(
    ("lie", "way"), [("rx id", "reload"), ("rx id twice", "rebind"), ("tx id", "rebind"), ("tx id twice", "reload")]
)
def test_a_ring_that_is_broken(bed: Bed, lie: str, way: str) -> None:
    """No frame passes any more, and whoever asks the driver for something gets an answer; it can be unbound, and then
    everything is as before."""
    endless = [Case(f"{lie} {way} {n}", [send(SIZE * 500)], [recv(SIZE * 500)], dirs=("tx",)) for n in range(2)]
    before = broken_rings(bed)
    with exchanging(bed, endless):
        wait_until(lambda: bed.nic.stats()["tx_tls_records"] > 0, "records are sent")
        with lying(bed, lie, share=0.2):
            wait_until(lambda: broken_rings(bed) > before, "the ring is broken")
        for command in ("ethtool -S eth0", "ip link set eth0 down", "ip link set eth0 up", "ethtool -S eth0"):
            bed.agent.run(command.split(), timeout=STUCK)
        if way == "rebind":
            unbind(bed)
        else:
            bed.agent.run(["rmmod", "tlsnic"], timeout=STUCK)
        wait_until(lambda: not bed.nic.contexts(), "the contexts are gone")
        if way == "rebind":
            bind(bed)
        else:
            bed.agent.run(["insmod", DRIVER], timeout=STUCK)
            configure_guest(bed.agent)


def broken_rings(bed: Bed) -> int:
    """How often the guest's virtio core has given up on a ring."""
    log = bed.agent.kernel_log()
    return log.count("is not a head!") + log.count("out of range")
