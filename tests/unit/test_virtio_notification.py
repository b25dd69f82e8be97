"""When a driver must be signalled, and when it must kick."""

from __future__ import annotations

import pytest

from tests.support.rings import DATA, make


class TestNotification:
    """Section 2.7.7.2 and 2.7.10: flags without EVENT_IDX, one crossing with it."""

    def test_flags(self) -> None:
        queue, ring = make(4)
        for wanted in (True, False):
            queue.add([(DATA, 1)], [])
            queue.publish()
            chain = ring.pop()
            assert chain is not None
            ring.push(chain[0], 0)
            assert ring.publish() is wanted
            queue.collect()
            queue.no_signals()

    def test_kicks_by_flag(self) -> None:
        queue, ring = make(4)
        ring.suppress_kicks()
        queue.add([(DATA, 1)], [])
        assert queue.publish() is False
        assert ring.want_kicks() is True, "what came in silence must be found"
        ring.pop()
        assert ring.want_kicks() is False
        queue.add([(DATA, 1)], [])
        assert queue.publish() is True

    @pytest.mark.parametrize("start", [0, 65533, 65535])
    def test_kicks_by_event(self, start: int) -> None:
        queue, ring = make(4, event_idx=True, start=start)
        for _ in range(6):
            assert ring.want_kicks() is False
            queue.add([(DATA, 1)], [])
            assert queue.publish() is True, "the first after asking"
            queue.add([(DATA, 1)], [])
            assert queue.publish() is False, "the device knows"
            assert ring.want_kicks() is True
            for _ in range(2):
                chain = ring.pop()
                assert chain is not None
                ring.push(chain[0], 0)
            ring.publish()
            queue.collect()

    @pytest.mark.parametrize("start", [0, 65530, 65535])
    @pytest.mark.parametrize("batch", [1, 2, 3])
    def test_signal_once_per_crossing(self, start: int, batch: int) -> None:
        """The driver asks at its position; whatever batch passes that position signals, the next does not."""
        queue, ring = make(8, event_idx=True, start=start)
        for _ in range(4):
            assert queue.want_signal() is False
            for wanted in (True, False):
                for _ in range(batch):
                    queue.add([(DATA, 1)], [])
                queue.publish()
                for _ in range(batch):
                    chain = ring.pop()
                    assert chain is not None
                    ring.push(chain[0], 0)
                assert ring.publish() is wanted
            assert queue.want_signal() is True
            queue.collect()

    @pytest.mark.parametrize("start", [0, 65530, 65535])
    @pytest.mark.parametrize("event_idx", [False, True])
    def test_a_signal_waits_until_it_is_sent(self, start: int, event_idx: bool) -> None:
        """Unless the driver looks meanwhile, and asks anew or for nothing."""
        queue, ring = make(8, event_idx=event_idx, start=start)

        def use_one() -> None:
            queue.add([(DATA, 1)], [])
            queue.publish()
            chain = ring.pop()
            assert chain is not None
            ring.push(chain[0], 0)

        queue.want_signal()
        for shown in range(1, 4):
            use_one()
            assert ring.show() is True
            assert (ring.untold, len(queue.in_flight)) == (shown, shown), "seen by the driver when it looks"
        assert ring.publish() is True
        assert ring.publish() is False, "it was sent"
        assert ring.show() is False
        assert len(queue.collect()) == 3
        queue.want_signal()
        use_one()
        assert ring.show() is True
        assert len(queue.collect()) == 1
        if event_idx:
            queue.want_signal()
        else:
            queue.no_signals()
        assert ring.publish() is False
        queue.want_signal()
        use_one()
        assert ring.publish() is True
