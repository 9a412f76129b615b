"""How often RunPod is called, how much of it is in memory at once, and who waits for it."""

import threading

import pytest

from chalicelib.pace import Pace
from chalicelib.room import Place, Room

# Pace


def test_calls_within_the_limit_wait_for_nobody(clock):
    pace = Pace(clock, calls=3, seconds=10.0)

    assert [pace.take_turn(within=0.0) for _ in range(3)] == [True] * 3
    assert clock.slept == []


def test_who_would_be_over_it_waits_until_the_window_has_room(clock):
    pace = Pace(clock, calls=3, seconds=10.0)
    for _ in range(3):
        pace.take_turn(within=0.0)
        clock.advance(1.0)

    assert pace.take_turn(within=8.0)

    assert clock.slept == [7.0]


def test_who_would_wait_for_too_long_is_told_at_once_and_uses_no_turn(clock):
    pace = Pace(clock, calls=1, seconds=10.0)
    pace.take_turn(within=0.0)

    assert not pace.take_turn(within=9.0)
    assert clock.slept == []
    clock.advance(10.0)
    assert pace.take_turn(within=0.0)


@pytest.mark.parametrize("calls", [1, 7, 50])
def test_no_window_has_more_than_the_limit(clock, calls):
    pace = Pace(clock, calls=calls, seconds=10.0)
    times = []

    for _ in range(4 * calls):
        assert pace.take_turn(within=100.0)
        times.append(clock.monotonic())
        clock.advance(0.01)

    assert all(later - earlier >= 10.0 - 1e-9 for earlier, later in zip(times, times[calls:], strict=False))


def test_a_short_rest_is_one_for_everybody(clock):
    pace = Pace(clock, calls=100, seconds=10.0)
    pace.refused(None)

    assert not pace.take_turn(within=1.0)
    assert pace.take_turn(within=2.0)
    assert clock.slept == [2.0]


def test_nobody_but_the_patient_waits_through_a_long_rest(clock):
    pace = Pace(clock, calls=100, seconds=10.0)
    pace.refused(5.0)

    assert not pace.take_turn(within=50.0)
    assert clock.slept == []
    assert pace.take_turn(within=5.0, patient=True)
    assert clock.slept == [5.0]


def test_nobody_waits_through_one_rest_after_the_other(clock):
    pace = Pace(clock, calls=100, seconds=10.0)
    pace.refused(None)
    pace.refused(None)  # of a call that was under way
    assert pace.take_turn(within=9.0)
    pace.refused(None)

    assert not pace.take_turn(within=9.0)
    clock.advance(2.0)
    assert pace.take_turn(within=0.0)
    pace.taken()
    pace.refused(None)
    assert pace.take_turn(within=9.0)


def test_no_rest_is_so_long_that_a_result_would_be_forgotten(clock):
    pace = Pace(clock, calls=100, seconds=10.0)
    pace.refused(900.0)
    pace.refused(1.0)

    clock.advance(29.9)
    assert not pace.take_turn(within=0.0)
    clock.advance(0.1)
    assert pace.take_turn(within=0.0)


# Room


def test_what_fits_is_taken_at_once_and_given_back_at_the_end():
    room = Room(10)

    with Place(room) as one, Place(room) as two:
        assert one.take(6, timeout=0.0)
        assert not two.take(6, timeout=0.0)
        assert two.take(4, timeout=0.0)

    with Place(room) as place:
        assert place.take(10, timeout=0.0)


def test_what_is_larger_than_the_room_is_let_in_alone():
    room = Room(10)

    with Place(room) as one, Place(room) as two:
        assert one.take(50, timeout=0.0)
        assert not two.take(1, timeout=0.0)


def test_a_place_that_is_large_enough_is_kept():
    room = Room(10)

    with Place(room) as one, Place(room) as two:
        assert one.take(6, timeout=0.0)
        assert two.take(4, timeout=0.0)
        assert one.take(5, timeout=0.0)


def test_who_waits_goes_on_when_there_is_room():
    room = Room(10)
    first, got = Place(room), []
    first.take(8, timeout=0.0)

    waiter = threading.Thread(target=lambda: got.append(room.take(8, timeout=20.0)))
    waiter.start()
    first.leave()
    waiter.join(20)

    assert got == [True]


def test_small_ones_do_not_pass_a_large_one_that_waits():
    room = Room(10)
    first = Place(room)
    first.take(4, timeout=0.0)
    large = threading.Thread(target=lambda: room.take(10, timeout=20.0))
    large.start()
    while room.take(1, timeout=0.0):  # until the large one waits for its turn
        room.give(1)

    first.leave()
    large.join(20)

    assert not large.is_alive()
    assert not room.take(1, timeout=0.0)
