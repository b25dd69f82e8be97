"""Commands of the guest's driver: a table from opcode to handler, and what HELLO is answered.

Everything a command holds is the guest's word: lengths are checked here, values where they are used, and every
refusal is a status in the reply. Numbers and layouts are in abi.py, their meaning in docs/device.md.

A *posted* CTX_ADD has no room for a reply. It is offered while no fault rule refuses contexts, since a driver that
waits for nothing cannot be refused in time; and such a rule does not touch what is posted all the same, by a driver
that has not heard of it yet or prepared it before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final

from nicdev import abi
from nicdev.errors import CommandError
from nicdev.faults.device import Faults
from nicdev.stats import Counter, Stats
from nicdev.tls.context import params_from_ctx_add
from nicdev.tls.table import ContextTable, RxEntry

TX_PERSONALITIES: Final = {personality.name.lower().replace("_", "-"): personality for personality in abi.TxPersonality}
TLS_1_2_AES_GCM: Final = abi.CipherCap.TLS_1_2_AES_GCM_128 | abi.CipherCap.TLS_1_2_AES_GCM_256

# Looked up once: the way to a member through its enum and module is longer than what is done with it.
_OK: Final = abi.Status.OK
_TX: Final = abi.Direction.TX
_CMD_OK: Final = Counter.CMD_OK
_CMD_FAILED: Final = Counter.CMD_FAILED
_CTX_TX_ADDED: Final = Counter.CTX_TX_ADDED
_CTX_RX_ADDED: Final = Counter.CTX_RX_ADDED
_CTX_DELETED: Final = Counter.CTX_DELETED
_CTX_ADD: Final = abi.Opcode.CTX_ADD
_COMMAND_LEN: Final = abi.COMMAND.size
_DONE: Final = abi.REPLY.pack(abi.Status.OK, abi.REPLY.size)
_NO_BODY: Final = bytes(abi.CTX_ADD.size)

_Kind = tuple[abi.Direction, abi.TlsVersion, abi.Cipher]


@dataclass(frozen=True)
class Identity:
    """What the device tells of itself in HELLO_REPLY."""

    device_version: str
    caps: abi.Cap = abi.Cap.TX | abi.Cap.RX
    ciphers: abi.CipherCap = TLS_1_2_AES_GCM
    rx_personality: abi.RxPersonality = abi.RxPersonality.IDEAL
    tx_personality: abi.TxPersonality = abi.TxPersonality.REBUILD


def _offered(identity: Identity) -> Iterator[_Kind]:
    """The kinds of contexts that a device makes."""
    for direction, cap in ((abi.Direction.TX, abi.Cap.TX), (abi.Direction.RX, abi.Cap.RX)):
        for version, cipher in product(abi.TlsVersion, abi.Cipher):
            if identity.caps & cap and identity.ciphers & abi.CipherCap[f"{version.name}_{cipher.name}"]:
                yield direction, version, cipher


class Control:
    """Executes commands on one context table."""

    def __init__(self, identity: Identity, table: ContextTable, stats: Stats) -> None:
        self._identity = identity
        self._table = table
        self._stats = stats
        self._offered = frozenset(_offered(identity))  # kinds of contexts
        # These may change. The driver learns it from its next HELLO; each rx context is what the driver asks for.
        self.rx_personality = identity.rx_personality
        self.tx_personality = identity.tx_personality
        self.faults = Faults()

    @property
    def caps(self) -> abi.Cap:
        """What the device can do now."""
        fixed = self._identity.caps
        return fixed | abi.Cap.POSTED_ADD if fixed and not self.faults.refuses_adds else fixed

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
            self.caps,
            me.ciphers,
            self._table.max_contexts,
            len(Counter),
            self.tx_personality,
            self.rx_personality,
            me.device_version.encode("ascii")[:16],
        )

    def execute(self, command: memoryview, posted: bool = False) -> bytes:
        """Carry out one COMMAND extension (header and body); return the reply. Never raises on what a guest wrote.

        `posted`: there is no room for the reply.
        """
        try:
            data = self._execute(command, posted)
        except CommandError as error:
            self._stats.values[_CMD_FAILED] += 1
            command[_COMMAND_LEN:] = bytes(max(0, len(command) - _COMMAND_LEN))  # a CTX_ADD of a wrong length has a key
            return abi.REPLY.pack(error.status, abi.REPLY.size)
        self._stats.values[_CMD_OK] += 1
        return abi.REPLY.pack(_OK, abi.REPLY.size + len(data)) + data if data else _DONE

    def _execute(self, command: memoryview, posted: bool) -> bytes:
        if len(command) < _COMMAND_LEN:
            raise CommandError(abi.Status.BAD_REQUEST, "command shorter than its header")
        _, opcode, length, slot, generation = abi.COMMAND.unpack_from(command)
        handler, body_len = _COMMANDS.get(opcode, (None, 0))
        if handler is None:
            raise CommandError(abi.Status.UNSUPPORTED, f"opcode {opcode}")
        if length != len(command) or length != _COMMAND_LEN + body_len:
            raise CommandError(abi.Status.BAD_REQUEST, f"opcode {opcode} of {length} bytes")
        if posted and opcode == _CTX_ADD:
            return self._ctx_add(slot, generation, command[_COMMAND_LEN:], posted=True)
        return handler(self, slot, generation, command[_COMMAND_LEN:])

    def _ctx_add(self, slot: int, generation: int, body: memoryview, posted: bool = False) -> bytes:
        try:
            params = params_from_ctx_add(abi.unpack_ctx_add(body))
            offered = (params.direction, params.tls_version, params.cipher) in self._offered
            refusal = abi.Status.UNSUPPORTED if not offered else _OK if posted else self.faults.refusal(params)
            if refusal is not _OK:
                params.wipe()
                raise CommandError(refusal)
            self._table.add(slot, generation, params)
        except CommandError:
            self._stats.add(Counter.CTX_REFUSED)
            raise
        finally:
            body[:] = _NO_BODY  # the key stays in the context only
        self._stats.values[_CTX_TX_ADDED if params.direction is _TX else _CTX_RX_ADDED] += 1
        return b""

    def _ctx_del(self, slot: int, generation: int, _body: memoryview) -> bytes:
        self._table.delete(slot, generation)
        self._stats.values[_CTX_DELETED] += 1
        return b""

    def _rx_resync(self, slot: int, generation: int, body: memoryview) -> bytes:
        answer = abi.RxResync._make(abi.RX_RESYNC.unpack(body))
        context = self._table.get_rx(slot, generation)
        entry = RxEntry(slot, generation, context)
        if not self.faults.answer(entry, answer.tcp_seq, answer.rcd_sn):
            raise CommandError(abi.Status.REFUSED, "the context has passed that place, or knows it already")
        return b""

    def _get_stats(self, _slot: int, _generation: int, _body: memoryview) -> bytes:
        return b"".join((value & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(8, "little") for value in self._stats.values)

    def _get_stat_names(self, _slot: int, _generation: int, _body: memoryview) -> bytes:
        return b"".join(c.name.lower().encode("ascii").ljust(abi.STAT_NAME_LEN, b"\0") for c in Counter)


_Handler = Callable[[Control, int, int, memoryview], bytes]  # slot, generation, body
_COMMANDS: Final[dict[int, tuple[_Handler, int]]] = {
    abi.Opcode.CTX_ADD: (Control._ctx_add, abi.CTX_ADD.size),
    abi.Opcode.CTX_DEL: (Control._ctx_del, 0),
    abi.Opcode.RX_RESYNC: (Control._rx_resync, abi.RX_RESYNC.size),
    abi.Opcode.GET_STATS: (Control._get_stats, 0),
    abi.Opcode.GET_STAT_NAMES: (Control._get_stat_names, 0),
}
