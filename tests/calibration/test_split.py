"""Which images are put aside, and which are left to rank by."""

from __future__ import annotations

import pytest
import torch
from tiny import fresh

from testreg.calibration.budget import Budget
from testreg.calibration.options import Options
from testreg.calibration.split import Split, UnreadImages, split
from testreg.calibration.view import views_of

IMAGES = torch.arange(20.0).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)  # each holds its number


def numbers(images: UnreadImages, end: float = float("inf")) -> list[int]:
    return [number for number, _ in images.take(end)]


def split_of(**options: object) -> Split:
    (view,) = views_of(fresh("timm_vit"), list(IMAGES), Options(transform=lambda image: image, **options))
    (parts,) = split([view], Budget(None))
    return parts


def test_images_are_taken_once_and_in_order() -> None:
    images = UnreadImages((number, torch.zeros(1)) for number in (1, 3, 5, 8))
    assert numbers(images, 4) == [1, 3]
    assert numbers(images, 4) == []
    assert not images.is_empty
    assert numbers(images) == [5, 8]
    assert images.is_empty


@pytest.mark.parametrize("held_out", [0, 3, 48])
def test_every_other_one_of_the_first_is_held_out(held_out: int) -> None:
    parts = split_of(held_out=held_out, top_k=3)
    expected = [number for number in range(20) if number % 2 and number < 2 * held_out]
    assert [number for number, _ in parts.held_out] == expected
    assert [number for number, _ in parts.diagnosed] == [number for number in range(20) if number not in expected]
    assert parts.num_kept == 20
    assert not parts.can_verify
    for number, packed in (*parts.diagnosed, *parts.held_out):
        assert packed.image.unique() == number


def test_what_is_ranked_begins_where_an_interrupted_run_ended() -> None:
    parts = split_of(held_out=3)
    assert numbers(parts.to_rank(4)) == [number for number in range(4, 20) if number != 5]


def test_few_images_are_all_that_a_small_budget_uses() -> None:
    parts = split_of(held_out=3).shortened(6)
    assert [number for number, _ in parts.diagnosed] == [0, 2, 4]
    assert [number for number, _ in parts.held_out] == [1, 3, 5]
    assert numbers(parts.to_rank(0)) == [0, 2, 4]
