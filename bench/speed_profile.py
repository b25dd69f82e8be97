"""Where the guest's processors are during transfers, bulk and small: the share of our driver, of the kernel's TLS, of
copies.

Figures are shares of the samples in which a processor was busy. `details` has all parts and the functions that were
seen most; of short connections also the microseconds that one spends inside of STEPS, some of which are inside others.
Nothing here has a goal: it shows where a driver could help, and where not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Final

from bench.registry import Group, Measured, Session, interleaved
from bench.speed_bed import GUEST_FOLDER, SpeedBed, speed_bed
from bench.speed_bulk import ARMS, warm_up
from bench.speed_run import Timing, transfer
from bench.speed_small import MODES, small_transfers
from testbed.errors import BedError

BULK: Final = {name: what for name, what in ARMS.items() if name.partition("_")[0] in ("plain", "offload")}
COPIES: Final = frozenset(("rep_movs_alternative", "copy_to_nontemporal", "copy_user_generic", "memcpy", "memcpy_orig"))
CLEARS: Final = frozenset(("clear_page_orig", "clear_page_rep", "clear_page_erms", "memset", "memset_orig"))
STEPS: Final = (
    "inet_stream_connect",
    "tls_setsockopt [tls]",
    "tls_sw_fallback_init [tls]",
    "tlsnic_tls_add [tlsnic]",
    "tls_sw_sendmsg [tls]",
    "tls_device_sendmsg [tls]",
    "tlsnic_start_xmit [tlsnic]",
    "tls_sw_recvmsg [tls]",
    "inet_release",
    "tlsnic_ctx_remove [tlsnic]",
    "__sk_destruct",
    "process_one_work",
    "tlsnic_rx_poll [tlsnic]",
    "tlsnic_tx_poll [tlsnic]",
    "native_queued_spin_lock_slowpath",
    "user",
)
SHOWN: Final = 25  # functions
SAMPLED: Final = Timing(1.0, 2.5)  # the sampler needs most of a second to start in the guest


def part(function: str) -> str:
    """Which part of the guest a function belongs to."""
    name, _, module = function.partition(" ")
    if name in COPIES:
        return "copies"
    if name in CLEARS:
        return "clearing of new memory"
    return {"[tlsnic]": "driver", "[tls]": "tls", "user": "programs"}.get(module or name, "rest of the kernel")


def shares(functions: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Per cent of what was busy, by part and by function. Raises BedError where nothing was."""
    busy = sum(functions.values())
    if not busy:
        raise BedError("the guest was idle all the time")
    parts: Counter[str] = Counter()
    for function, count in functions.items():
        parts[part(function)] += count
    found = {"parts": parts, "functions": functions}
    return {kind: {name: 100 * count / busy for name, count in counts.items()} for kind, counts in found.items()}


def middle(rounds: Sequence[Mapping[str, float]], most: int) -> dict[str, float]:
    """The medians of the rounds, the largest first."""
    names = {name for one in rounds for name in one}
    found = Counter({name: round(median(one.get(name, 0.0) for one in rounds), 2) for name in names})
    return dict(found.most_common(most))


def bulk(bed: SpeedBed, name: str, number: int) -> None:
    """A transfer of an arm of BULK."""
    transfer(bed, BULK[name], SAMPLED, f"{name} profiled {number}")


def small(bed: SpeedBed, mode: str, number: int) -> float:
    """Short connections that send, in a mode of MODES; microseconds of the guest's processors for one."""
    return small_transfers(bed, "tx", mode, SAMPLED.warm + SAMPLED.seconds, number).cpu["vcpus"]


def profile(
    session: Session, bed: SpeedBed, name: str, run: Callable[[int], float | None], number: int
) -> dict[str, dict[str, float]]:
    """One run of an arm and what was sampled meanwhile. What the arm costs is told by a run without the sampler."""
    cost = run(number) if name.startswith("small_") else None  # us
    command = ["python3", "-m", "testbed.peers.speed_profile", str(SAMPLED.seconds - 0.5)]
    sampler = bed.bed.agent.spawn(command, cwd=GUEST_FOLDER)
    run(number)
    said = bytearray()
    while piece := sampler.read(30):
        said += piece
    if not said:
        raise BedError(f"the sampler in the guest: {bytes(sampler.stderr).decode(errors='replace')[-500:]}")
    sampled = json.loads(said)
    found = shares(sampled["functions"])
    busy = sum(sampled["functions"].values())
    found["processors"] = {"idle": 100 * sampled["idle"] / (busy + sampled["idle"])}
    if cost is not None:
        found["us_per_connection"] = {step: cost * sampled["inside"].get(step, 0) / busy for step in STEPS}
    driver, tls = (found["parts"].get(name, 0.0) for name in ("driver", "tls"))
    session.say(f"  round {number + 1}, {name}: driver {driver:.1f} %, tls {tls:.1f} % of what is busy")
    return found


def measure(session: Session) -> Iterator[Measured]:
    """The group."""
    bed = session.guest(speed_bed)
    wanted = list(BULK)[: 2 if session.smoke else None]
    warm_up(session, bed, {name: BULK[name] for name in wanted})
    arms: dict[str, Callable[[int], float | None]] = {name: partial(bulk, bed, name) for name in wanted}
    arms |= {f"small_{mode}": partial(small, bed, mode) for mode in MODES}
    runs = {name: partial(profile, session, bed, name, run) for name, run in arms.items()}
    for name, rounds in interleaved(runs, session.rounds()).items():
        details = {kind: middle([one[kind] for one in rounds], SHOWN) for kind in rounds[0]}
        driver = [one["parts"].get("driver", 0.0) for one in rounds]
        yield Measured(f"guest_share_driver_{name}", "%", driver, details=details)


GROUP: Final = Group(
    "speed-profile", "guest", "where the guest's processors are in transfers, bulk and small", measure, only_full=True
)
