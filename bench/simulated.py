"""What rx `ideal` and `driver-req` promise under disorder, without guest: the engine between a modelled path and a
modelled kernel (tests/support/tls_figures.py). Records of 16 KiB, segments of 1448 bytes; a lost one is sent again 64
or 256 segments later, one out of order comes 2 to 7 segments late. The same bytes in every run.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.goals import CIPHERS, flat
from bench.registry import Group, Measured, Session
from nicdev.abi import Cipher, RxPersonality, TlsVersion
from tests.support.tls_figures import bulk, run
from tests.support.tls_oracle import SUITES, Suite
from tests.support.tls_path import Path

PATHS = {
    "loss1": (Path(64, loss=0.01), Path(256, loss=0.01)),
    "loss5": (Path(64, loss=0.05), Path(256, loss=0.05)),
    "reorder2": (Path(reorder=0.02),),
    "reorder5": (Path(reorder=0.05),),
}
NAMES = {
    (TlsVersion.TLS_1_2, Cipher.AES_GCM_128): "",
    (TlsVersion.TLS_1_2, Cipher.AES_GCM_256): CIPHERS[1],
    (TlsVersion.TLS_1_2, Cipher.CHACHA20_POLY1305): "chacha20_poly1305",
    (TlsVersion.TLS_1_3, Cipher.AES_GCM_128): "tls13_aes_128_gcm",
    (TlsVersion.TLS_1_3, Cipher.AES_GCM_256): "tls13_aes_256_gcm",
    (TlsVersion.TLS_1_3, Cipher.CHACHA20_POLY1305): "tls13_chacha20_poly1305",
}


def _arms() -> Iterator[tuple[Suite, RxPersonality, str]]:
    for suite in SUITES:
        yield suite, RxPersonality.IDEAL, NAMES[suite.version, suite.cipher]
    yield SUITES[0], RxPersonality.DRIVER_REQ, "driver-req"


def measure(session: Session) -> Iterator[Measured]:
    """One figure per suite and rate; a sample per seed, over all paths of the rate."""
    count = session.scaled(600, 40)
    for suite, personality, name in _arms():
        records = bulk(suite, count)
        for rate, paths in PATHS.items():
            samples = []
            for seed in range(1, session.rounds() + 1):
                results = [run(records, path, seed, personality) for path in paths]
                samples.append(100 * sum(result.offloaded for result in results) / len(results))
            details = {"suite": str(suite), "personality": personality.name, "records": count * len(paths)}
            yield Measured(flat("sim_rx", rate, "records_offloaded", name), "%", samples, details=details)


GROUP = Group("simulation", "simulation", "records offloaded under disorder, engine alone", measure)
