"""Plain TCP through our NIC over the same through passt, another vhost-user back end, of one guest."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

from bench.passt import MTU
from bench.registry import Group, Measured, Session, interleaved, ratios
from bench.speed_bed import PASST, passt_bed
from bench.speed_bulk import absolute, arm, warm_up
from bench.speed_run import Arm
from tests.guest.exchange import BOTH


def measure(session: Session) -> Iterator[Measured]:
    """The group."""
    bed = session.guest(passt_bed)
    arms = {f"plain_{direction}": Arm(direction) for direction in BOTH}
    arms |= {f"passt_{direction}": Arm(direction, link=PASST) for direction in BOTH}
    warm_up(session, bed, arms)
    results = interleaved(
        {name: partial(arm, session, bed, name, what) for name, what in arms.items()}, session.rounds()
    )
    for direction in BOTH:
        over, under = ([outcome.gbit for outcome in results[f"{name}_{direction}"]] for name in ("plain", "passt"))
        details = {"plain_gbit": over, "passt_gbit": under, "passt_mtu": MTU}
        yield Measured(f"plain_{direction}_over_passt", "x", ratios(over, under), over, details)
        yield absolute(f"passt_{direction}", results[f"passt_{direction}"], {"mtu": MTU})


GROUP: Final = Group("speed-passt", "guest", "plain TCP: our NIC, and passt instead of it", measure)
