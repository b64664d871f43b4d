"""What a budget pays for, by a clock that is turned by hand."""

import pytest

from testreg.calibration import budget
from testreg.calibration.budget import Budget


class Clock:
    """In the place of `time`: forwards turn it on."""

    now = 0.0

    def monotonic(self):
        return self.now

    perf_counter = monotonic

    def forward(self):
        self.now += 0.5


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("seconds", "images"),
    [(None, None), (288.0, None), (287.0, 142), (80.0, 40), (79.0, 38), (16.0, 8), (10.0, 8), (1e-9, 8)],
)
@pytest.mark.filterwarnings("ignore:a budget of")
def test_an_image_costs_four_forwards(seconds, images, clock):
    spent = Budget(seconds)
    assert spent.affordable_images(144, clock.forward) == images
    assert spent.cut_steps == ([] if images is None else ["images"])


def test_a_budget_that_is_too_small_says_so(clock):
    with pytest.warns(UserWarning, match="of 10 seconds does not pay for 8 images, .* these take 16 or so"):
        Budget(10.0).affordable_images(144, clock.forward)


def test_there_are_no_more_than_there_were(clock):
    spent = Budget(1e-9)
    assert spent.affordable_images(6, clock.forward) is None
    assert not spent.cut_steps


def test_what_is_cut_short_is_remembered_once(clock):
    spent = Budget(2.0)
    assert not spent.is_spent("ranking")
    clock.now = 2.5
    assert spent.is_spent("ranking")
    assert spent.is_spent("choosing")
    assert spent.is_spent("choosing")
    assert spent.cut_steps == ["ranking", "choosing"]
    clock.now = 1e9
    assert not Budget(None).is_spent("ranking")


def test_time_is_kept_for_what_has_to_come(clock):
    spent = Budget(100.0)
    spent.affordable_images(144, clock.forward)  # of half a second each
    clock.now = 60.0
    assert not spent.is_spent("choosing", forwards_to_come=79)
    assert spent.is_spent("choosing", forwards_to_come=81)
    assert not Budget(None).is_spent("choosing", forwards_to_come=81)
