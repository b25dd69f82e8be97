"""Python's collector of reference cycles, in a process that holds a hundred thousand contexts.

Theory of operation: the collector looks at young objects often, and at all there are whenever their number has grown by
a quarter. Contexts are objects that stay, and hold no cycles: the memory that they leave is free at once without it. So
all that it brings a server with many connections is pauses, up to half a second at 100,000 contexts, and a quarter of
the time that it takes to install them. What is young is therefore collected as always, what is old only after
FULL_AFTER times that.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

FULL_AFTER: Final = 1000  # collections of what is middle-aged; some million objects more


@contextmanager
def seldom_full() -> Iterator[None]:
    """Collections of everything are rare within, and leave out what is there now."""
    usual = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(usual[0], usual[1], FULL_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()
