"""core-next-hint: the kernel tells where the next record starts, after records that it had to decrypt itself.

Its rules (tls_device_core_ctrl_rx_resync, tls_device_rx_resync_new_rec): the first record without any mark starts a
count; when the count has passed a target, which is 2 at first and doubles up to 128, it tells: at once where nothing
waits in the socket, else when it has read what waits.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from testbed.bed import Bed
from tests.guest.exchange import exchange
from tests.guest.resync_rx import (
    behind_case,
    consistent,
    desync,
    go_on_when_passed,
    lockstep_case,
    lockstep_flows,
    resyncing,
    rule,
)

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

HINT = "core-next-hint"
LOST = 10


@pytest.mark.conformance(81)
def test_back_off_while_the_device_ignores_hints(bed: Bed, capture_path: Path) -> None:
    """It never takes up a hint: 2, 4, 8 and so on to 128 records lie between one and the next, then always 128."""
    cases = lockstep_flows("deaf", 420)
    faults = desync(LOST) + rule("lose-answer", count="all")
    with resyncing(bed, HINT, faults) as flows:
        seen = exchange(bed, cases, capture_path)
    consistent(seen, flows)
    for flow in flows.values():
        answers = flow.answers(HINT)
        assert answers[0] == LOST + 3
        assert [b - a for a, b in pairwise(answers)] == [2, 4, 8, 16, 32, 64, 128, 128]
        assert flow.by_software == list(range(LOST, 420))
    assert seen.nic["fault_answers_lost"] == 9 * len(cases)


@pytest.mark.conformance(79)
@pytest.mark.conformance(81)
def test_back_off_ends_with_a_record_of_the_device(bed: Bed, capture_path: Path) -> None:
    """Four hints are lost, the fifth arrives; when the device loses its place again, the kernel begins at 2."""
    case = lockstep_case("again", 120, 1 << 33)
    faults = desync(LOST) + desync(80).replace("[[rule]]", '[[rule]]\nname = "again"') + rule("lose-answer", count=4)
    with resyncing(bed, HINT, faults) as flows:
        seen = exchange(bed, [case], capture_path)
    consistent(seen, flows)
    (flow,) = flows.values()
    assert flow.answers(HINT) == [13, 15, 19, 27, 43, 83]
    assert flow.by_software == [*range(10, 43), 80, 81, 82]


@pytest.mark.conformance(75)
@pytest.mark.conformance(79)
@pytest.mark.conformance(80)
def test_the_kernel_waits_until_the_socket_is_drained(bed: Bed, capture_path: Path) -> None:
    """The application is behind: told of the third record, the kernel delays the hint for each that waits behind it.

    The device resumes exactly at the first record that was sent after that.
    """
    waiting = 50
    case = behind_case("behind", waiting, waiting + 20, 1 << 34)
    meanwhile = go_on_when_passed(bed, waiting - LOST)
    with resyncing(bed, HINT, desync(LOST)) as flows:
        seen = exchange(bed, [case], capture_path, meanwhile)
    consistent(seen, flows)
    (flow,) = flows.values()
    assert flow.by_software == list(range(LOST, waiting))
    assert len(flow.of("rx_resync_nh_schedule")) == 1
    # behind record 12 the kernel looks at each that comes next, but for the last
    assert len(flow.of("rx_resync_nh_delay")) == waiting - 1 - (LOST + 3)
    assert all(delay["sock_data"] > delay["rec_len"] for delay in flow.of("rx_resync_nh_delay"))
    assert flow.answers(HINT) == [waiting]


@pytest.mark.conformance(107)
def test_a_hint_of_no_use_is_refused(bed: Bed, capture_path: Path) -> None:
    """Three verdicts are withheld: the kernel believes the device lost, but it is not; the driver counts."""
    case = lockstep_case("knows", 30, 1 << 35)
    faults = "".join(rule("withhold-verdict", name=f"of {record}", record=record) for record in (10, 11, 12))
    with resyncing(bed, HINT, faults) as flows:
        seen = exchange(bed, [case], capture_path)
    consistent(seen, flows, skipped=1)
    (flow,) = flows.values()
    assert flow.by_software == [10, 11, 12]
    assert flow.answers(HINT) == [13]
    assert seen.nic["cmd_failed"] == seen.driver["rx_tls_resync_res_skip"] == 1
    assert seen.nic["rx_tls_lost_sync"] == seen.nic["rx_tls_resynced"] == 0
