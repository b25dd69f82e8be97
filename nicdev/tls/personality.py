"""The rx personalities: what kind of context each is."""

from __future__ import annotations

from nicdev.abi import RxPersonality
from nicdev.tls.context import ContextParams
from nicdev.tls.ideal import IdealContext
from nicdev.tls.resync import strategy_for
from nicdev.tls.rx import RxContext
from nicdev.tls.store import Pool


def rx_context(
    personality: RxPersonality, params: ContextParams, scratch: memoryview | None = None, pool: Pool | None = None
) -> RxContext:
    """A new rx context; `scratch` and `pool` as their users say."""
    if personality is RxPersonality.IDEAL:
        return IdealContext(params, scratch, pool)
    return RxContext(params, scratch, strategy_for(personality))
