"""The rx personalities: what kind of context each is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from nicdev.abi import RxPersonality
from nicdev.tls.context import ContextParams
from nicdev.tls.history import History
from nicdev.tls.ideal import IdealContext
from nicdev.tls.resync import CoreNextHint, ResyncStrategy
from nicdev.tls.rx import RxContext
from nicdev.tls.scan import DriverReq, DriverReqAsync
from nicdev.tls.store import Pool

# As users write them.
RX_PERSONALITIES: Final = {personality.name.lower().replace("_", "-"): personality for personality in RxPersonality}

_STRATEGIES: Final[dict[RxPersonality, Callable[[History | None], ResyncStrategy]]] = {
    RxPersonality.DRIVER_REQ: DriverReq,
    RxPersonality.DRIVER_REQ_ASYNC: DriverReqAsync,
    RxPersonality.CORE_NEXT_HINT: CoreNextHint,
}


def rx_context(
    params: ContextParams,
    scratch: memoryview | None = None,
    pool: Pool | None = None,
    history: History | None = None,
) -> RxContext:
    """A new rx context; `scratch` and `pool` as their users say."""
    if params.rx_personality is RxPersonality.IDEAL:
        return IdealContext(params, scratch, pool, history)
    return RxContext(params, scratch, _STRATEGIES[params.rx_personality](history))
