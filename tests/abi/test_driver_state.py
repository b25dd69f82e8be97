"""The compiler's word that the driver's state fits what the kernel sets aside for it.

`struct tls_offload_context_tx` and `_rx` hold 16 and 8 bytes for a driver. Nothing at run time shows a byte too many
(it overwrites what happens to follow), so the promise is a BUILD_BUG_ON, and this test that it is there: at the one
place where the driver gets at these bytes.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DRIVER = Path(__file__).parents[2] / "driver"
ACCESS = re.compile(r"\b_*tls_driver_ctx\(")


def code(path: Path) -> str:
    """A C file without its comments."""
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.DOTALL)


@pytest.mark.conformance(12)
def test_what_is_kept_in_the_kernels_bytes_is_measured_where_it_is_reached() -> None:
    reached = [path.name for path in sorted(DRIVER.glob("*.[ch]")) for _ in ACCESS.findall(code(path))]
    assert reached == ["tlsnic_ktls.c"], "one place alone"
    (function,) = re.findall(
        r"^static (struct tlsnic_ctx \*\*)tlsnic_state\(.*?\n\{\n(.*?)\n\}", code(DRIVER / reached[0]), re.M | re.DOTALL
    )
    kept, body = function
    assert ACCESS.search(body)
    for size in ("TLS_DRIVER_STATE_SIZE_TX", "TLS_DRIVER_STATE_SIZE_RX"):
        assert f"BUILD_BUG_ON(sizeof({kept.removesuffix('*')}) > {size});" in body
