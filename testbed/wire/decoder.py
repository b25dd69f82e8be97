"""What was really on the wire, read independently: python -m testbed.wire.decoder FILE --keys keys.json

Reassembles TCP, decrypts every TLS 1.2 record with keys that are known from elsewhere, and looks for plaintext in
every frame. Shares no code with the NIC. keys.json, all parts optional:

    {"keylog": "file in NSS format",
     "fixed": [{"src": [address, port], "dst": [address, port], "cipher": "aes-128-gcm", "key": hex, "salt": hex,
                "rec_seq": number of the first record, "start": byte of the stream at which it begins}],
     "seeds": [seeds of testbed.peers.stream whose data must not be seen], "samples": [hex]}

A null address or port in "fixed" matches any; the first entry that matches a stream counts.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from testbed.peers import stream
from testbed.peers.flowkeys import FlowKeys
from testbed.wire import pcapfile, tls12
from testbed.wire.pcapfile import CaptureError
from testbed.wire.plaintext import Canary
from testbed.wire.reassembly import Connection, Endpoint, Stream, reassemble
from testbed.wire.tls12 import APPLICATION_DATA, NONCE, OVERHEAD, NotTls, Secret

SHOWN: Final = 16  # failures told in detail per stream
Match = tuple[str | None, int | None]


def matches(want: Match, have: Endpoint) -> bool:
    """Whether an endpoint is the wanted one; None matches any address or port."""
    return all(part is None or part == found for part, found in zip(want, have, strict=True))


@dataclass(frozen=True)
class Fixed:
    """Keys of the streams from `source` to `destination`; None matches any address or port."""

    source: Match
    destination: Match
    secret: Secret

    def fits(self, found: Stream) -> bool:
        """Whether these are the keys of a stream."""
        return matches(self.source, found.source) and matches(self.destination, found.destination)


def fixed_keys(
    flow: FlowKeys, peer: Match = (None, None), guest: Match = (None, None), tx_start: int = 0, rx_start: int = 0
) -> list[Fixed]:
    """Both directions of a flow between `guest` and `peer`; TLS begins behind the given numbers of clear bytes."""
    tx = Secret(flow.cipher, flow.tx.key, flow.tx.salt, flow.tx.rec_seq, tx_start)
    rx = Secret(flow.cipher, flow.rx.key, flow.rx.salt, flow.rx.rec_seq, rx_start)
    return [Fixed(guest, peer, tx), Fixed(peer, guest, rx)]


@dataclass
class Keys:
    """Everything known beforehand."""

    fixed: list[Fixed] = field(default_factory=list)
    keylog: dict[bytes, bytes] = field(default_factory=dict)
    samples: list[bytes] = field(default_factory=list)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Keys:
        """The form described above. Raises KeyError, ValueError, OSError."""
        fixed = []
        for entry in value.get("fixed", []):
            key, salt = bytes.fromhex(entry["key"]), bytes.fromhex(entry["salt"])
            secret = Secret(entry["cipher"], key, salt, entry.get("rec_seq", 0), entry.get("start", 0))
            source, destination = (tuple(entry.get(end, (None, None))) for end in ("src", "dst"))
            fixed.append(Fixed(source, destination, secret))
        keylog = tls12.read_keylog(Path(value["keylog"]).read_text()) if "keylog" in value else {}
        samples = [bytes.fromhex(text) for text in value.get("samples", [])]
        return cls(fixed, keylog, samples + [stream.sample(seed) for seed in value.get("seeds", [])])


@dataclass
class StreamReport:
    """One direction of one connection. `sha256` is of the application data; `errors` are not about one record."""

    connection: int
    source: Endpoint
    destination: Endpoint
    keys: str = "none"  # fixed, keylog or none
    cipher: str | None = None
    bytes: int = 0
    segments: int = 0
    retransmitted_bytes: int = 0
    damaged: int = 0  # segments that TCP discards for their checksum; they count nowhere else
    clear_bytes: int = 0
    records: int = 0
    records_decrypted_ok: int = 0
    types: dict[int, int] = field(default_factory=dict)
    plaintext_bytes: int = 0
    sha256: str = ""
    failures: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything here was as it must be; also true of a stream that is not TLS."""
        return self.records == self.records_decrypted_ok and not self.errors


@dataclass
class Report:
    """The whole capture."""

    frames: int
    streams: list[StreamReport]
    plaintext_hits: int
    plaintext_places: list[str]

    @property
    def records(self) -> int:
        """Encrypted records of all streams."""
        return sum(item.records for item in self.streams)

    @property
    def records_decrypted_ok(self) -> int:
        """Those whose tag verified under the expected record number."""
        return sum(item.records_decrypted_ok for item in self.streams)

    @property
    def ok(self) -> bool:
        """Every record decrypted, nothing contradictory, no plaintext."""
        return not self.plaintext_hits and all(item.ok for item in self.streams)

    def find(self, source: Match = (None, None), destination: Match = (None, None)) -> list[StreamReport]:
        """The streams with these ends; None matches anything."""
        return [s for s in self.streams if matches(source, s.source) and matches(destination, s.destination)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        totals = {"records": self.records, "records_decrypted_ok": self.records_decrypted_ok}
        streams = [{"ok": item.ok, **asdict(item)} for item in self.streams]
        return {"ok": self.ok, **totals, **asdict(self), "streams": streams}


class Decoder:
    """Decrypts streams; remembers nonces, since one must never be used twice with a key, in whatever stream."""

    def __init__(self, keys: Keys, canary: Canary) -> None:
        self._keys = keys
        self._fixed: dict[tuple[int | None, int | None], list[tuple[int, Fixed]]] = {}  # by ports, with their place
        for place, entry in enumerate(keys.fixed):
            self._fixed.setdefault((entry.source[1], entry.destination[1]), []).append((place, entry))
        self._canary = canary
        self._nonces: dict[tuple[bytes, bytes], set[bytes]] = {}

    def connection(self, number: int, connection: Connection) -> list[StreamReport]:
        """Both directions of one connection."""
        hellos = [tls12.read_hello(item.data) for item in connection.streams]
        agreed: dict[int, Secret] = {}
        reason = ""
        if any(hellos):
            try:
                agreed = tls12.derive(filter(None, hellos), self._keys.keylog)
            except ValueError as error:
                reason = str(error)
        reports = []
        for item, hello in zip(connection.streams, hellos, strict=True):
            report = StreamReport(number, item.source, item.destination)
            reports.append(report)
            fixed = self._find(item)
            secret = fixed or (agreed.get(hello.kind) if hello else None)
            self._transport(item, report)
            if secret is not None:
                report.keys, report.cipher = "fixed" if fixed else "keylog", secret.cipher
                self._decrypt(item, secret, report)
            elif reason and hello:
                self._give_up(item, hello.encrypted_from, reason, report)
            elif not hello:
                report.clear_bytes = report.bytes
        return reports

    def _find(self, item: Stream) -> Secret | None:
        """The fixed keys of a stream: the first that fit."""
        ports = product((None, item.source.port), (None, item.destination.port))
        entries = [pair for key in ports for pair in self._fixed.get(key, ()) if pair[1].fits(item)]
        return min(entries, key=itemgetter(0))[1].secret if entries else None

    @staticmethod
    def _transport(item: Stream, report: StreamReport) -> None:
        report.bytes = len(item.data)
        report.segments = item.segments
        report.retransmitted_bytes = item.retransmitted_bytes
        report.damaged = item.damaged
        report.errors += item.conflicts[:SHOWN]
        if item.gap is not None:
            report.errors.append(f"byte {item.gap} and some behind it were never seen")

    @staticmethod
    def _give_up(item: Stream, start: int | None, reason: str, report: StreamReport) -> None:
        """A TLS session without keys: its records count, and not one of them is proven."""
        report.errors.append(reason)
        if start is not None:
            with contextlib.suppress(NotTls):
                report.records = sum(1 for _ in tls12.records(item.data, start))

    def _decrypt(self, item: Stream, secret: Secret, report: StreamReport) -> None:
        """Every record from `secret.start` on; records before it are clear (the handshake)."""
        aead, data = AESGCM(secret.key), memoryview(item.data)
        nonces = self._nonces.setdefault((secret.key, secret.salt), set())
        digest, types = hashlib.sha256(), Counter[int]()
        report.clear_bytes = position = min(secret.start, len(data))
        try:
            for record in tls12.records(item.data, secret.start):
                number = secret.rec_seq + report.records
                report.records += 1
                position = record.end
                explicit = bytes(data[record.body : record.body + NONCE])
                if explicit in nonces:
                    report.errors.append(f"record {number} uses nonce {explicit.hex()} again")
                nonces.add(explicit)
                try:
                    plaintext = aead.decrypt(
                        secret.salt + explicit,
                        data[record.body + NONCE : record.end],
                        tls12.additional_data(number, item.data, record),
                    )
                except (InvalidTag, OverflowError, ValueError):
                    self._fail(report, number, record, data)
                    continue
                report.records_decrypted_ok += 1
                types[record.kind] += 1
                if record.kind == APPLICATION_DATA:
                    digest.update(plaintext)
                    report.plaintext_bytes += len(plaintext)
        except NotTls as error:
            report.errors.append(str(error))
        else:
            if item.finished and position < len(data):
                report.errors.append(f"ends {len(data) - position} bytes into a record")
        report.types, report.sha256 = dict(types), digest.hexdigest()

    def _fail(self, report: StreamReport, number: int, record: tls12.Record, data: memoryview) -> None:
        if len(report.failures) >= SHOWN:
            return
        if record.end - record.body < OVERHEAD:
            reason = "too short for nonce and tag"
        elif self._canary.find(data[record.body : record.end]) is not None:
            reason = "it is in plaintext"
        else:
            reason = "the tag does not verify"
        report.failures.append({"record": number, "offset": record.start, "reason": reason})


def decode(path: Path, keys: Keys, interface: str | None = None) -> Report:
    """Read a whole capture; `interface` chooses one of a pcapng file. Raises CaptureError when the file is not fit."""
    canary = Canary(keys.samples)
    connections = reassemble(canary.watch(pcapfile.frames(path, interface)))
    decoder = Decoder(keys, canary)
    streams = [report for number, each in enumerate(connections) for report in decoder.connection(number, each)]
    return Report(canary.frames, streams, canary.hits, canary.places)


def main(argv: Sequence[str]) -> int:
    """Entry point; 0 when all is well, 1 when the wire is not as it must be, 2 when it cannot be told."""
    parser = argparse.ArgumentParser(prog="python -m testbed.wire.decoder", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="pcap or pcapng")
    parser.add_argument("--keys", type=Path, help="keys.json (see the module's text)")
    parser.add_argument("--interface", help="of a pcapng file, only the interface of this name")
    args = parser.parse_args(argv)
    try:
        keys = Keys.from_json(json.loads(args.keys.read_text())) if args.keys else Keys()
        report = decode(args.file, keys, args.interface)
    except (OSError, KeyError, ValueError, CaptureError) as error:
        print(f"decoder: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.as_dict(), indent=1))
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
