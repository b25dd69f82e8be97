"""The device side of a split virtqueue (virtio 1.2, section 2.7), with indirect descriptors and EVENT_IDX.

Theory of operation. The driver owns descriptor table and available ring, we own the used ring. `pop` takes the next
available chain apart into views of guest memory; `push` puts its head into the used ring, `push_used` those of many;
`publish` shows everything pushed to the driver at once and says whether it wants to be signalled. Between bursts:
`suppress_kicks`, drain, `publish`, `want_kicks`; the last says whether something came in meanwhile, and then the
caller must drain again rather than wait.

A packet may need many receive buffers: `take` pops as many chains as have room for it, or none.

A signal is an interrupt for the guest and a wake-up of QEMU, and the return of a tx chain seldom urgent. So `publish`
comes in two steps for who wants to put the signal off, `show` and, later, `publish`.

Trust. All that is read from shared memory may change while we look. A descriptor is copied once and the copy is
judged; an indirect table is copied whole; the index words are read once per batch. A chain visits at most `num`
descriptors, so every call is bounded. What breaks the rules raises RingError (GuestMemoryError for addresses),
leaves the position where it was, and marks the ring `broken`: there is no way to know what the driver meant next.

Memory ordering. All of it is here; no other module touches index words.
 - Index and flag words are accessed through `cast("H")` views, a single 16-bit load or store each.
   `struct.pack_into` may write byte by byte, so it is not used for them.
 - avail.idx is loaded before the entries it covers (acquire), used entries are stored before used.idx (release):
   free on x86-64, a barrier where the machine is `WEAKLY_ORDERED`.
 - used.idx is stored before used_event or avail.flags is loaded (`show`), and avail_event or used.flags is
   stored before avail.idx is loaded again (`want_kicks`): store before load needs a full barrier everywhere.
   Without it a kick or a signal is lost.

Speed. The cases that make up nearly all traffic, one descriptor in the region of the previous one, are handled in
`pop` and `take` themselves; views are made once and kept in slots; no object is made per descriptor but the view that
is handed out. Drivers cut consecutive receive buffers from one piece of memory, so `take` makes one view of those that
follow one another.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from nicdev.errors import RingError
from nicdev.virtio.barrier import WEAKLY_ORDERED, full_barrier
from nicdev.virtio.memory import GuestMemory

# struct virtq_desc: le64 addr, le32 len, le16 flags, le16 next (section 2.7.5)
_DESC: Final = Struct("<QIHH")
VIRTQ_DESC_F_NEXT: Final = 1
VIRTQ_DESC_F_WRITE: Final = 2
VIRTQ_DESC_F_INDIRECT: Final = 4
VIRTQ_AVAIL_F_NO_INTERRUPT: Final = 1
VIRTQ_USED_F_NO_NOTIFY: Final = 1
MAX_QUEUE_SIZE: Final = 32768
MAX_CHAIN_BYTES: Final = 1 << 32  # section 2.7.5.2

_unpack = _DESC.unpack_from
# Words of an avail or used ring seen as 16-bit units: flags, idx, entries.
_FLAGS: Final = 0
_IDX: Final = 1
_ENTRIES: Final = 2


class RingLayout(NamedTuple):
    """Size in descriptors, and the front-end user addresses of the ring's three parts."""

    num: int
    desc_addr: int
    avail_addr: int
    used_addr: int


Chain = tuple[int, list[memoryview], list[memoryview]]
Taken = tuple[list[int], list[memoryview], int]


class SplitRing:
    """One virtqueue. `base` is the index of the next available entry to take, mod 2^16.

    Raises RingError when size or alignment are impossible, GuestMemoryError when a part is not in `memory`.
    """

    __slots__ = (
        "_avail",
        "_avail_event_at",
        "_desc",
        "_event_idx",
        "_hot_end",
        "_hot_start",
        "_hot_view",
        "_indirect",
        "_layout",
        "_mask",
        "_memory",
        "_next",
        "_num",
        "_published",
        "_seen",
        "_told",
        "_used",
        "_used_entries",
        "_used_event_at",
        "_used_next",
        "broken",
    )

    def __init__(
        self, memory: GuestMemory, layout: RingLayout, *, base: int = 0, event_idx: bool = False, indirect: bool = False
    ) -> None:
        num = layout.num
        if not 0 < num <= MAX_QUEUE_SIZE or num & (num - 1):
            raise RingError(f"queue size {num} is not a power of 2 up to {MAX_QUEUE_SIZE}")
        if layout.desc_addr % 16 or layout.avail_addr % 2 or layout.used_addr % 4:
            raise RingError(f"misaligned ring: {layout}")
        self._layout = layout
        self._num = num
        self._mask = num - 1
        self._event_idx = event_idx
        self._indirect = indirect
        self._used_event_at = _ENTRIES + num
        self._avail_event_at = _ENTRIES + 4 * num
        self.broken = False
        self.attach(memory)
        self._next = self._seen = base & 0xFFFF
        # Whoever served this ring before us left its position here; what the driver has seen is what counts.
        self._used_next = self._published = self._told = self._used[_IDX]

    def attach(self, memory: GuestMemory) -> None:
        """Go on in another memory table, at the same addresses.

        Raises GuestMemoryError and changes nothing if they are not in it.
        """
        num, desc_addr, avail_addr, used_addr = self._layout
        desc = memory.user_view(desc_addr, 16 * num)
        avail = memory.user_view(avail_addr, 2 * (_ENTRIES + num + 1))
        used = memory.user_view(used_addr, 2 * (_ENTRIES + 4 * num + 1))
        self._desc = desc
        self._avail = avail.cast("H")
        self._used = used.cast("H")
        self._used_entries = used[4 : 4 + 8 * num].cast("Q")
        self._memory = memory
        # Where the last buffer was found, the next one most likely is. Start + length > end decides, so this is an
        # empty range.
        self._hot_start, self._hot_end, self._hot_view = 1, 0, desc

    @property
    def num(self) -> int:
        """Queue size in descriptors."""
        return self._num

    @property
    def base(self) -> int:
        """Index of the next available entry to take, mod 2^16: the answer to GET_VRING_BASE once every popped chain
        was pushed."""
        return self._next

    # -- available -------------------------------------------------------------------------------------------------

    def pop(self) -> Chain | None:
        """Take the next chain: (head, device-readable views, device-writable views), or None if there is none.

        Raises RingError, after which the position is unchanged and `broken` is set.
        """
        at = self._next
        try:
            if at == self._seen and not self._look(at):
                return None
            head = self._avail[_ENTRIES + (at & self._mask)]
            if head > self._mask:
                raise RingError(f"available head {head} in a queue of {self._num}")
            addr, length, flags, following = _unpack(self._desc, head << 4)
            start = self._hot_start
            # One descriptor, neither NEXT nor INDIRECT, where the last buffer was: most traffic.
            if not flags & 5 and start <= addr and addr + length <= self._hot_end and length:
                view = self._hot_view[addr - start : addr - start + length]
                readable, writable = ([], [view]) if flags & VIRTQ_DESC_F_WRITE else ([view], [])
            else:
                readable, writable = self._walk(addr, length, flags, following)
        except RingError:
            self.broken = True
            raise
        self._next = (at + 1) & 0xFFFF
        return head, readable, writable

    def take(self, need: int, most: int) -> Taken:
        """Take chains, at most `most`, until they have room for `need` (> 0) bytes.

        Returns (used entries, device-writable views in order, room in them). The entries are for `push_used` and say
        that the first `need` bytes were written. Less room than `need` means that there are no more chains, or that
        `most` were too few; then nothing was taken. Raises RingError, after which the position is unchanged and
        `broken` is set.
        """
        used: list[int] = []
        views: list[memoryview] = []
        at, mask, avail, desc = self._next, self._mask, self._avail, self._desc
        start, stop, hot = self._hot_start, self._hot_end, self._hot_view
        room = begin = end = 0  # from `begin` to `end`: buffers that follow one another and have no view yet
        try:
            while room < need and len(used) < most:
                if at == self._seen and not self._look(at):
                    break
                head = avail[_ENTRIES + (at & mask)]
                if head > mask:
                    raise RingError(f"available head {head} in a queue of {self._num}")
                addr, length, flags, following = _unpack(desc, head << 4)
                usual = flags & 7 == VIRTQ_DESC_F_WRITE and start <= addr and addr + length <= stop and length
                if addr != end or not usual:
                    if begin != end:
                        views.append(hot[begin - start : end - start])
                    begin = end = addr
                if usual:
                    end += length
                else:
                    _, writable = self._walk(addr, length, flags, following)
                    views += writable
                    length = sum(map(len, writable))
                    start, stop, hot = self._hot_start, self._hot_end, self._hot_view
                used.append(head | length << 32)
                room += length
                at = (at + 1) & 0xFFFF
        except RingError:
            self.broken = True
            raise
        if begin != end:
            views.append(hot[begin - start : end - start])
        if room >= need:
            used[-1] -= room - need << 32
            self._next = at
        return used, views, room

    def _look(self, at: int) -> bool:
        """Read avail.idx; whether there are new entries from `at` on, which is as far as was known.

        Raises RingError if it is where no correct driver could put it.
        """
        idx = self._avail[_IDX]
        if idx == at:
            return False
        # A driver has at most `num` heads outstanding, counted from what it has seen used. This also covers going
        # backwards.
        outstanding = (idx - self._published) & 0xFFFF
        if outstanding > self._num or (idx - at) & 0xFFFF > outstanding:
            raise RingError(f"avail idx {idx} with {self._published} used, {at} taken, queue of {self._num}")
        self._seen = idx
        if WEAKLY_ORDERED:
            full_barrier()
        return True

    def _walk(self, addr: int, length: int, flags: int, following: int) -> tuple[list[memoryview], list[memoryview]]:
        """Follow a chain from its first descriptor, given by value. Raises RingError."""
        desc, limit, inside = self._desc, self._num, False
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        steps = total = 0
        while True:
            if flags & VIRTQ_DESC_F_INDIRECT:
                # WRITE is ignored here, and ordinary descriptors may have come before (section 2.7.5.3.2).
                if inside or flags & VIRTQ_DESC_F_NEXT or not self._indirect:
                    raise RingError("indirect descriptor that is nested, has NEXT, or was not negotiated")
                desc, limit, inside = self._indirect_table(addr, length), length >> 4, True
                addr, length, flags, following = _unpack(desc, 0)
                continue
            steps += 1
            if steps > self._num:
                raise RingError(f"chain of more than {self._num} descriptors")
            total += length
            views = self._views(addr, length)
            if flags & VIRTQ_DESC_F_WRITE:
                writable += views
            elif writable:
                raise RingError("device-readable descriptor after a device-writable one")
            else:
                readable += views
            if not flags & VIRTQ_DESC_F_NEXT:
                break
            if following >= limit:
                raise RingError(f"next descriptor {following} in a table of {limit}")
            addr, length, flags, following = _unpack(desc, following << 4)
        if total > MAX_CHAIN_BYTES:
            raise RingError(f"chain of {total} bytes")
        return readable, writable

    def _indirect_table(self, addr: int, length: int) -> memoryview:
        """A copy of an indirect table.

        Raises RingError unless it holds 1 to `num` whole descriptors (a chain cannot be longer).
        """
        if not length or length & 15 or length >> 4 > self._num:
            raise RingError(f"indirect table of {length} bytes in a queue of {self._num}")
        return memoryview(b"".join(self._views(addr, length)))

    def _views(self, addr: int, length: int) -> list[memoryview]:
        """Views of one buffer; remembers its region. Raises GuestMemoryError, also for an empty one."""
        if length and self._hot_start <= addr and addr + length <= self._hot_end:
            at = addr - self._hot_start
            return [self._hot_view[at : at + length]]
        views = self._memory.views(addr, length)
        region = self._memory.region_at(addr)
        self._hot_start, self._hot_end, self._hot_view = region.guest_addr, region.guest_addr + region.size, region.view
        return views

    # -- used ------------------------------------------------------------------------------------------------------

    def push(self, head: int, written: int) -> None:
        """Return a popped chain with `written` bytes in its device-writable part; the driver sees it after
        `publish`."""
        at = self._used_next
        self._used_entries[at & self._mask] = head | written << 32  # le32 id, le32 len (section 2.7.8)
        self._used_next = (at + 1) & 0xFFFF

    def push_used(self, used: list[int]) -> None:
        """Return chains as used entries (head | written << 32): a burst's, or a `take`'s. The driver sees them after
        `publish`."""
        at, mask, entries = self._used_next, self._mask, self._used_entries
        for entry in used:
            entries[at & mask] = entry
            at += 1
        self._used_next = at & 0xFFFF

    def publish(self) -> bool:
        """Show all pushed chains to the driver. Returns whether it must be signalled, now."""
        owed = self.show()
        self._told = self._published
        return owed

    def show(self) -> bool:
        """Show all pushed chains to the driver. Returns whether a signal is owed (sections 2.7.7.2 and 2.7.10), which
        may wait: until `publish` is to be called, which tells whether the driver has looked by itself meanwhile."""
        new = self._used_next
        if new != self._published:
            if WEAKLY_ORDERED:
                full_barrier()
            self._used[_IDX] = new
            self._published = new
            full_barrier()
        if new == self._told:
            return False
        if self._event_idx:
            owed = (new - self._avail[self._used_event_at] - 1) & 0xFFFF < (new - self._told) & 0xFFFF
        else:
            owed = not self._avail[_FLAGS] & VIRTQ_AVAIL_F_NO_INTERRUPT
        if not owed:
            self._told = new
        return owed

    @property
    def untold(self) -> int:
        """How many chains have been shown since the last signal."""
        return (self._published - self._told) & 0xFFFF

    @property
    def waiting(self) -> bool:
        """Whether there is a chain to take."""
        return self._avail[_IDX] != self._next

    # -- kicks -----------------------------------------------------------------------------------------------------

    def suppress_kicks(self) -> None:
        """Ask the driver not to kick while we look at the ring anyway; only a hint.

        With EVENT_IDX silence is the default.
        """
        if not self._event_idx:
            self._used[_FLAGS] = VIRTQ_USED_F_NO_NOTIFY

    def want_kicks(self) -> bool:
        """Ask for a kick when a chain becomes available that we have not come across, taken or not.

        True: one already has, no kick may come, look again.
        """
        if self._event_idx:
            self._used[self._avail_event_at] = self._seen
        else:
            self._used[_FLAGS] = 0
        full_barrier()
        return self._avail[_IDX] != self._seen
