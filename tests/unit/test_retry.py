from random import Random

import pytest

from chalicelib import retry


class NoJitter(Random):
    def random(self):
        return 0.0


class FullJitter(Random):
    def random(self):
        return 1.0


@pytest.mark.parametrize(
    ("policy", "schedule"),
    [
        (retry.CALL, [0.2, 0.4, 0.8]),
        (retry.SUBMIT, [15, 30, 60, 120, 240, 300, 300]),
        (retry.STORE, [10, 20, 40, 80, 120, 120]),
    ],
)
def test_the_schedule_is_the_one_that_stands_beside_the_value(policy, schedule):
    waits = [retry.seconds_to_wait(policy, n, rng=NoJitter()) for n in range(1, len(schedule) + 1)]

    assert waits == pytest.approx(schedule)


def test_jitter_only_shortens_and_by_no_more_than_its_part():
    assert retry.seconds_to_wait(retry.SUBMIT, 1, rng=FullJitter()) == pytest.approx(12)


def test_retry_after_wins():
    assert retry.seconds_to_wait(retry.SUBMIT, 9, rng=NoJitter(), retry_after=7) == 7
    assert retry.seconds_to_wait(retry.SUBMIT, 1, rng=FullJitter(), retry_after=0) == 1


def test_a_million_failures_do_not_overflow():
    assert retry.seconds_to_wait(retry.STORE, 1_000_000, rng=NoJitter()) == 120
