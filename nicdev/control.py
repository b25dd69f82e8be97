"""Commands of the guest's driver: a table from opcode to handler, and what HELLO is answered.

Everything a command holds is the guest's word: lengths are checked here, values where they are used, and every
refusal is a status in the reply. Numbers and layouts are in abi.py, their meaning in docs/device.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nicdev import abi
from nicdev.errors import CommandError
from nicdev.faults.device import Faults
from nicdev.stats import Counter, Stats
from nicdev.tls.context import params_from_ctx_add
from nicdev.tls.table import ContextTable, RxEntry

TX_PERSONALITIES: Final = {personality.name.lower().replace("_", "-"): personality for personality in abi.TxPersonality}
TLS_1_2_AES_GCM: Final = abi.CipherCap.TLS_1_2_AES_GCM_128 | abi.CipherCap.TLS_1_2_AES_GCM_256


@dataclass(frozen=True)
class Identity:
    """What the device tells of itself in HELLO_REPLY."""

    device_version: str
    caps: abi.Cap = abi.Cap.TX | abi.Cap.RX
    ciphers: abi.CipherCap = TLS_1_2_AES_GCM
    rx_personality: abi.RxPersonality = abi.RxPersonality.IDEAL
    tx_personality: abi.TxPersonality = abi.TxPersonality.REBUILD


class Control:
    """Executes commands on one context table."""

    def __init__(self, identity: Identity, table: ContextTable, stats: Stats) -> None:
        self._identity = identity
        self._table = table
        self._stats = stats
        # These may change. The driver learns it from its next HELLO; each rx context is what the driver asks for.
        self.rx_personality = identity.rx_personality
        self.tx_personality = identity.tx_personality
        self.faults = Faults()

    def hello_reply(self, nonce: int, boot_id: int) -> bytes:
        """The HELLO_REPLY extension."""
        me = self._identity
        return abi.HELLO_REPLY.pack(
            abi.ExtType.HELLO_REPLY,
            0,
            abi.HELLO_REPLY.size,
            abi.ABI_VERSION,
            nonce,
            boot_id,
            me.caps,
            me.ciphers,
            self._table.max_contexts,
            len(Counter),
            self.tx_personality,
            self.rx_personality,
            me.device_version.encode("ascii")[:16],
        )

    def execute(self, command: memoryview) -> bytes:
        """Carry out one COMMAND extension (header and body); return the reply. Never raises on what a guest wrote."""
        try:
            data = self._execute(command)
        except CommandError as error:
            self._stats.add(Counter.CMD_FAILED)
            return abi.REPLY.pack(error.status, abi.REPLY.size)
        self._stats.add(Counter.CMD_OK)
        return abi.REPLY.pack(abi.Status.OK, abi.REPLY.size + len(data)) + data

    def _execute(self, command: memoryview) -> bytes:
        if len(command) < abi.COMMAND.size:
            raise CommandError(abi.Status.BAD_REQUEST, "command shorter than its header")
        header = abi.CommandHeader._make(abi.COMMAND.unpack_from(command))
        handler, body_len = _COMMANDS.get(header.opcode, (None, 0))
        if handler is None:
            raise CommandError(abi.Status.UNSUPPORTED, f"opcode {header.opcode}")
        if header.len != len(command) or header.len != abi.COMMAND.size + body_len:
            raise CommandError(abi.Status.BAD_REQUEST, f"opcode {header.opcode} of {header.len} bytes")
        return handler(self, header, command[abi.COMMAND.size :])

    def _ctx_add(self, header: abi.CommandHeader, body: memoryview) -> bytes:
        try:
            params = params_from_ctx_add(abi.unpack_ctx_add(body))
            self._check_capabilities(params.direction, params.tls_version, params.cipher)
            refusal = self.faults.refusal(params)
            if refusal is not abi.Status.OK:
                params.wipe()
                raise CommandError(refusal, "as a fault")
            self._table.add(header.slot, header.generation, params)
        except CommandError:
            self._stats.add(Counter.CTX_REFUSED)
            raise
        finally:
            body[:] = bytes(len(body))  # the key stays in the context only
        tx = params.direction is abi.Direction.TX
        self._stats.add(Counter.CTX_TX_ADDED if tx else Counter.CTX_RX_ADDED)
        return b""

    def _check_capabilities(self, direction: abi.Direction, version: abi.TlsVersion, cipher: abi.Cipher) -> None:
        needed = abi.Cap.TX if direction is abi.Direction.TX else abi.Cap.RX
        name = abi.CipherCap[f"{version.name}_{cipher.name}"]
        if not self._identity.caps & needed or not self._identity.ciphers & name:
            raise CommandError(abi.Status.UNSUPPORTED, f"{direction.name} {name.name}")

    def _ctx_del(self, header: abi.CommandHeader, _body: memoryview) -> bytes:
        self._table.delete(header.slot, header.generation)
        self._stats.add(Counter.CTX_DELETED)
        return b""

    def _rx_resync(self, header: abi.CommandHeader, body: memoryview) -> bytes:
        answer = abi.RxResync._make(abi.RX_RESYNC.unpack(body))
        context = self._table.get_rx(header.slot, header.generation)
        entry = RxEntry(header.slot, header.generation, context)
        if not self.faults.answer(entry, answer.tcp_seq, answer.rcd_sn):
            raise CommandError(abi.Status.REFUSED, "the context has passed that place, or knows it already")
        return b""

    def _get_stats(self, _header: abi.CommandHeader, _body: memoryview) -> bytes:
        return b"".join((value & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(8, "little") for value in self._stats.values)

    def _get_stat_names(self, _header: abi.CommandHeader, _body: memoryview) -> bytes:
        return b"".join(c.name.lower().encode("ascii").ljust(abi.STAT_NAME_LEN, b"\0") for c in Counter)


_Handler = Callable[[Control, abi.CommandHeader, memoryview], bytes]
_COMMANDS: Final[dict[int, tuple[_Handler, int]]] = {
    abi.Opcode.CTX_ADD: (Control._ctx_add, abi.CTX_ADD.size),
    abi.Opcode.CTX_DEL: (Control._ctx_del, 0),
    abi.Opcode.RX_RESYNC: (Control._rx_resync, abi.RX_RESYNC.size),
    abi.Opcode.GET_STATS: (Control._get_stats, 0),
    abi.Opcode.GET_STAT_NAMES: (Control._get_stat_names, 0),
}
