"""The back-end side of one vhost-user connection: messages in; replies and calls to host and device out.

Theory of operation. A `VhostUserBackend` lives as long as one connection. `handle` takes one message with its fds,
which become ours: a handler takes out of the list what it keeps, everything left is closed, so every fd is closed
exactly once whatever happens. `_RULES` says per request how many fds it may bring and what must have been
negotiated; the handlers hold the meaning.

Answers. With REPLY_ACK negotiated and asked for, every message is answered, 0 for done, 1 for refused. Without it a
bad message raises ProtocolError and the connection must be closed: the front end could not know otherwise. Requests
this back-end does not know are refused if an answer is wanted, else counted and ignored. A refused message has no
effect, except that ring addresses which turn out to be impossible are forgotten.

New drivers. Contexts and keys belong to a driver instance. It is over with status 0, RESET_DEVICE and the end of
the connection, and also when SET_VRING_BASE names another place than the one where the ring stopped, which is all
that a front end without STATUS tells.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from nicdev.errors import ProtocolError
from nicdev.stats import Counter, Stats
from nicdev.vhost import message as msg
from nicdev.vhost.host import NO_FD, Device, Host
from nicdev.vhost.memtable import MAX_SLOTS, MemoryTable
from nicdev.vhost.message import Header, ProtocolFeature, Request
from nicdev.vhost.vring import Vring, Vrings
from nicdev.virtio import features as virtio
from nicdev.virtio.ring import MAX_QUEUE_SIZE

log = logging.getLogger(__name__)

VHOST_USER_F_PROTOCOL_FEATURES: Final = 1 << 30  # between the peers only; no driver ever sees it
PROTOCOL_FEATURES: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.NET_MTU
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
DEVICE_NEEDS_RESET: Final = 0x40  # device status bit (virtio 1.2, section 2.1)
MIN_MTU: Final = 68
MAX_MTU: Final = 65535
_MAX_QUEUE_PAIRS: Final = 128  # vring indexes have 8 bits


class VhostUserBackend:
    """One connection's state.

    `features` are the virtio feature bits offered; Stats counts refused and unknown messages.
    """

    def __init__(
        self, host: Host, device: Device, stats: Stats, *, queue_pairs: int, features: int = virtio.OFFERED
    ) -> None:
        if not 0 < queue_pairs <= _MAX_QUEUE_PAIRS:
            raise ValueError(f"{queue_pairs} queue pairs")
        self._host = host
        self._device = device
        self._stats = stats
        self._offered = features | VHOST_USER_F_PROTOCOL_FEATURES
        self._features = 0
        self._protocol_features = 0
        self._status = 0
        self._table = MemoryTable(host)
        self._vrings = Vrings(host, device, stats, 2 * queue_pairs)

    # -- messages in -----------------------------------------------------------------------------------------------

    def handle(self, header: Header, payload: bytes, fds: Sequence[int]) -> bytes:
        """Act on one message; returns the reply to send, maybe empty. All `fds` become ours.

        Raises ProtocolError when the connection must be closed; the caller then calls `close`.
        """
        mine = list(fds)
        try:
            reply = self._dispatch(header, payload, mine)
        except ProtocolError as error:
            return self.refuse(header, error)
        finally:
            for fd in mine:
                self._host.close(fd)
        if reply is not None:
            return msg.encode_reply(header.request, reply)
        return self._ack(header, 0)

    def refuse(self, header: Header, error: ProtocolError) -> bytes:
        """Count a bad message; returns the answer if the front end wants one, else raises `error`."""
        self._stats.add(Counter.VHOST_BAD_MESSAGES)
        log.warning("vhost-user: request %d refused: %s", header.request, error)
        rule = _RULES.get(header.request)
        answer = b"" if rule is not None and rule.replies else self._ack(header, 1)
        if not answer:
            raise error
        return answer

    def _ack(self, header: Header, result: int) -> bytes:
        if header.flags & msg.NEED_REPLY_FLAG and self._protocol_features & ProtocolFeature.REPLY_ACK:
            return msg.encode_reply(header.request, msg.encode_u64(result))
        return b""

    def _dispatch(self, header: Header, payload: bytes, fds: list[int]) -> bytes | None:
        """Apply the rules, then the handler.

        Raises ProtocolError; the reply's payload is None where there is no special one.
        """
        if header.flags & msg.VERSION_MASK != msg.VERSION or header.flags & msg.REPLY_FLAG:
            raise ProtocolError(f"flags {header.flags:#x} in request {header.request}")
        rule = _RULES.get(header.request)
        if rule is None:
            self._stats.add(Counter.VHOST_UNKNOWN_MESSAGES)
            if self._ack(header, 1):
                raise ProtocolError(f"unknown request {header.request}")
            return None
        name = Request(header.request).name
        if rule.needs & ~self._protocol_features:
            raise ProtocolError(f"{name} without {rule.needs!r}")
        if not rule.min_fds <= len(fds) <= rule.max_fds:
            raise ProtocolError(f"{name} with {len(fds)} fds")
        return rule.handler(self, payload, fds)

    def close(self) -> None:
        """The connection is over: stop everything, close every fd, unmap the guest's memory. May be called twice."""
        self._vrings.stop_all()
        self._device.reset("front end disconnected")
        self._vrings.close()
        self._table.release(self._table.clear())

    # -- features and status ---------------------------------------------------------------------------------------

    def _get_features(self, payload: bytes, _fds: list[int]) -> bytes:
        msg.decode_empty(payload)
        return msg.encode_u64(self._offered)

    def _set_features(self, payload: bytes, _fds: list[int]) -> None:
        features = msg.decode_u64(payload)
        if features & ~self._offered:
            raise ProtocolError(f"features {features & ~self._offered:#x} were not offered")
        # QEMU sends this once per queue pair, the later ones while the first pairs run already.
        if features == self._features:
            return
        if any(vring.ring for vring in self._vrings):
            raise ProtocolError("features changed while a ring runs")
        self._accept(features)

    def _accept(self, features: int) -> None:
        """Without protocol features there is no message to enable a ring, so every ring is."""
        self._features = features
        self._device.features_set(features & ~VHOST_USER_F_PROTOCOL_FEATURES)
        self._vrings.negotiated(
            event_idx=bool(features & virtio.VIRTIO_F_EVENT_IDX),
            indirect=bool(features & virtio.VIRTIO_F_INDIRECT_DESC),
            by_message=bool(features & VHOST_USER_F_PROTOCOL_FEATURES),
        )

    def _get_protocol_features(self, payload: bytes, _fds: list[int]) -> bytes:
        msg.decode_empty(payload)
        return msg.encode_u64(PROTOCOL_FEATURES)

    def _set_protocol_features(self, payload: bytes, _fds: list[int]) -> None:
        features = msg.decode_u64(payload)
        unknown = features & ~int(PROTOCOL_FEATURES)  # ~ of an IntFlag keeps to its known bits
        if unknown:
            raise ProtocolError(f"protocol features {unknown:#x} were not offered")
        self._protocol_features = features

    def _ignore(self, payload: bytes, _fds: list[int]) -> None:
        """SET_OWNER: there is only one. RESET_OWNER: deprecated, and safest ignored says its specification."""
        msg.decode_empty(payload)

    def _get_queue_num(self, payload: bytes, _fds: list[int]) -> bytes:
        """For vhost-user-net the unit is queue pairs: QEMU compares it with `queues=`."""
        msg.decode_empty(payload)
        return msg.encode_u64(len(self._vrings) // 2)

    def _net_set_mtu(self, payload: bytes, _fds: list[int]) -> None:
        mtu = msg.decode_u64(payload)
        if not MIN_MTU <= mtu <= MAX_MTU:
            raise ProtocolError(f"mtu {mtu}")
        self._device.set_mtu(mtu)

    def _reset_device(self, payload: bytes, _fds: list[int]) -> None:
        msg.decode_empty(payload)
        self._reset("device reset")
        for vring in self._vrings:
            vring.enabled = False

    def _set_status(self, payload: bytes, _fds: list[int]) -> None:
        status = msg.decode_u64(payload)
        if status > 0xFF:
            raise ProtocolError(f"status {status:#x}")
        if status == 0:
            self._reset("driver reset")
        self._status = status

    def _get_status(self, payload: bytes, _fds: list[int]) -> bytes:
        msg.decode_empty(payload)
        broken = any(vring.ring and vring.ring.broken for vring in self._vrings)
        return msg.encode_u64(self._status | (DEVICE_NEEDS_RESET if broken else 0))

    def _reset(self, reason: str) -> None:
        """Back to before the driver: no ring runs, nothing is negotiated with it.

        Memory, fds and the peers' own features stay.
        """
        self._vrings.stop_all()
        self._vrings.forget_driver()
        self._status = 0
        self._device.reset(reason)
        self._accept(0)

    # -- memory ----------------------------------------------------------------------------------------------------

    def _set_mem_table(self, payload: bytes, fds: list[int]) -> None:
        old = self._table.replace(msg.decode_mem_table(payload), fds)
        self._memory_changed(old)

    def _get_max_mem_slots(self, payload: bytes, _fds: list[int]) -> bytes:
        msg.decode_empty(payload)
        return msg.encode_u64(MAX_SLOTS)

    def _add_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        self._table.add(msg.decode_single_region(payload), fds[0])
        self._memory_changed([])

    def _rem_mem_reg(self, payload: bytes, _fds: list[int]) -> None:
        """Some front ends send an fd with this; it is closed unused like any other that nobody takes."""
        old = self._table.remove(msg.decode_single_region(payload))
        self._memory_changed(old)

    def _memory_changed(self, old: list[memoryview]) -> None:
        """The rings move to the new table; then `old` may go."""
        self._vrings.follow(self._table.memory)
        self._table.release(old)

    # -- vrings ----------------------------------------------------------------------------------------------------

    def _set_vring_num(self, payload: bytes, _fds: list[int]) -> None:
        index, num = msg.decode_vring_state(payload)
        if not 0 < num <= MAX_QUEUE_SIZE or num & (num - 1):
            raise ProtocolError(f"vring {index} of {num} descriptors")
        vring = self._vrings.stopped(index)
        vring.num = num
        self._vrings.update(vring)

    def _set_vring_addr(self, payload: bytes, _fds: list[int]) -> None:
        """`flags` and `log` are about dirty logging, which is not offered."""
        addr = msg.decode_vring_addr(payload)
        vring = self._vrings[addr.vring]
        if addr.descriptor % 16 or addr.available % 2 or addr.used % 4:
            raise ProtocolError(f"misaligned vring: {addr}")
        self._vrings.drop_ring(vring)
        vring.addresses = addr.descriptor, addr.available, addr.used
        self._vrings.update(vring)

    def _set_vring_base(self, payload: bytes, _fds: list[int]) -> None:
        index, base = msg.decode_vring_state(payload)
        if base > 0xFFFF:
            raise ProtocolError(f"base {base} for vring {index}")
        vring = self._vrings.stopped(index)
        if vring.stopped_at is not None and vring.stopped_at != base:
            self._vrings.forget_driver()  # one reset is enough for all of them
            self._device.reset("new driver")
        vring.base = base

    def _get_vring_base(self, payload: bytes, _fds: list[int]) -> bytes:
        """Stops the ring; `num` of the request means nothing."""
        index, _num = msg.decode_vring_state(payload)
        vring = self._vrings[index]
        self._vrings.stop(vring)
        return msg.encode_vring_state(index, vring.base)

    def _set_vring_kick(self, payload: bytes, fds: list[int]) -> None:
        """Starts the ring.

        Without an fd it would have to be polled, which starves a guest on the same cores: refused.
        """
        vring, fd = self._take_event(payload, fds)
        if fd == NO_FD:
            raise ProtocolError(f"vring {vring.index} without a kick fd")
        self._vrings.pause(vring)
        vring.kick_fd, old = fd, vring.kick_fd
        self._vrings.close_fd(old)
        self._vrings.update(vring)

    def _set_vring_call(self, payload: bytes, fds: list[int]) -> None:
        vring, fd = self._take_event(payload, fds)
        self._vrings.pause(vring)
        vring.call_fd, old = fd, vring.call_fd
        self._vrings.close_fd(old)
        self._vrings.update(vring)

    def _set_vring_err(self, payload: bytes, fds: list[int]) -> None:
        vring, fd = self._take_event(payload, fds)
        self._vrings.pause(vring)
        vring.err_fd, old = fd, vring.err_fd
        self._vrings.close_fd(old)
        self._vrings.update(vring)

    def _set_vring_enable(self, payload: bytes, _fds: list[int]) -> None:
        """May come before anything else about the vring: QEMU sends it as soon as the driver negotiated MQ."""
        index, enable = msg.decode_vring_state(payload)
        if enable > 1:
            raise ProtocolError(f"vring {index} enabled with {enable}")
        self._vrings.enable(self._vrings[index], bool(enable))

    def _take_event(self, payload: bytes, fds: list[int]) -> tuple[Vring, int]:
        """Vring and fd (out of `fds`, checked) of SET_VRING_KICK, CALL and ERR; NO_FD where the message says so."""
        index, has_fd = msg.decode_vring_file(payload)
        if has_fd != bool(fds):
            raise ProtocolError(f"vring {index} with {len(fds)} event fds")
        vring = self._vrings[index]
        if not has_fd:
            return vring, NO_FD
        self._host.check_event(fds[0])
        return vring, fds.pop()


class _Rule(NamedTuple):
    """What may come with a request, and who handles it."""

    handler: Callable[[VhostUserBackend, bytes, list[int]], bytes | None]
    min_fds: int = 0
    max_fds: int = 0
    needs: ProtocolFeature = ProtocolFeature(0)
    replies: bool = False  # has a reply of its own; need_reply then changes nothing


_B = VhostUserBackend
_SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS
_RULES: Final[dict[int, _Rule]] = {
    Request.GET_FEATURES: _Rule(_B._get_features, replies=True),
    Request.SET_FEATURES: _Rule(_B._set_features),
    Request.SET_OWNER: _Rule(_B._ignore),
    Request.RESET_OWNER: _Rule(_B._ignore),
    Request.SET_MEM_TABLE: _Rule(_B._set_mem_table, max_fds=msg.MAX_FDS),
    Request.SET_VRING_NUM: _Rule(_B._set_vring_num),
    Request.SET_VRING_ADDR: _Rule(_B._set_vring_addr),
    Request.SET_VRING_BASE: _Rule(_B._set_vring_base),
    Request.GET_VRING_BASE: _Rule(_B._get_vring_base, replies=True),
    Request.SET_VRING_KICK: _Rule(_B._set_vring_kick, max_fds=1),
    Request.SET_VRING_CALL: _Rule(_B._set_vring_call, max_fds=1),
    Request.SET_VRING_ERR: _Rule(_B._set_vring_err, max_fds=1),
    Request.GET_PROTOCOL_FEATURES: _Rule(_B._get_protocol_features, replies=True),
    Request.SET_PROTOCOL_FEATURES: _Rule(_B._set_protocol_features),
    Request.GET_QUEUE_NUM: _Rule(_B._get_queue_num, replies=True),
    Request.SET_VRING_ENABLE: _Rule(_B._set_vring_enable),
    Request.NET_SET_MTU: _Rule(_B._net_set_mtu),
    Request.RESET_DEVICE: _Rule(_B._reset_device),
    Request.GET_MAX_MEM_SLOTS: _Rule(_B._get_max_mem_slots, needs=_SLOTS, replies=True),
    Request.ADD_MEM_REG: _Rule(_B._add_mem_reg, min_fds=1, max_fds=1, needs=_SLOTS),
    Request.REM_MEM_REG: _Rule(_B._rem_mem_reg, max_fds=1, needs=_SLOTS),
    Request.SET_STATUS: _Rule(_B._set_status, needs=ProtocolFeature.STATUS),
    Request.GET_STATUS: _Rule(_B._get_status, needs=ProtocolFeature.STATUS, replies=True),
}
