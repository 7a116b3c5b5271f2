"""Doorbells: no ring is lost, none wakes the wrong sleep."""

import threading
import time

from k2dist.engine.doorbell import Doorbell


def sleep_in_thread(
    bell: Doorbell, epoch: int, has_reason: threading.Event
) -> tuple[threading.Thread, list[bool]]:
    must_ring: list[bool] = []
    thread = threading.Thread(target=lambda: must_ring.append(bell.wait(epoch, has_reason.is_set)))
    thread.start()
    return thread, must_ring


def test_a_ring_before_the_sleep_is_not_lost() -> None:
    bell = Doorbell()
    bell.ring(3)
    assert bell.wait(3, lambda: False) is False


def test_a_ring_for_a_past_sleep_wakes_nobody() -> None:
    bell = Doorbell()
    bell.ring(2)
    thread, must_ring = sleep_in_thread(bell, 3, threading.Event())
    bell.ring(1)
    thread.join(0.05)
    assert thread.is_alive()
    bell.ring(3)
    thread.join(5)
    assert must_ring == [False]


def test_work_of_its_own_makes_it_ring_the_others() -> None:
    bell, has_work = Doorbell(), threading.Event()
    thread, must_ring = sleep_in_thread(bell, 0, has_work)
    has_work.set()
    bell.nudge()
    thread.join(5)
    assert must_ring == [True]


def test_no_nudge_is_lost_between_the_look_and_the_wait() -> None:
    for _ in range(200):
        bell, has_work = Doorbell(), threading.Event()

        def look(bell: Doorbell = bell, has_work: threading.Event = has_work) -> bool:
            was_set = has_work.is_set()
            if not was_set:  # the worst moment: just after this look said no
                has_work.set()
                bell.nudge()
            return was_set

        started_s = time.monotonic()
        assert bell.wait(0, look) is True
        assert time.monotonic() - started_s < 5
