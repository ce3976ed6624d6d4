"""The boxes of Cutout: sizes, centres, and the twins that show that the tests can fail."""

import pytest
import torch
from scipy import stats

from torchdrop.functional import cutout_boxes

ALPHA = 1e-6


def sizes(boxes):
    left, top, right, bottom = boxes.unbind(-1)
    return bottom - top, right - left


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9])
def test_odd_and_even_sizes_are_exact(size):
    """Snippets cut size // 2 on both sides of the centre: 7 becomes 6."""
    tall, wide = sizes(cutout_boxes(500, 9, 20, size, place="inside"))
    assert (tall == size).all()
    assert (wide == size).all()
    tall, wide = sizes(cutout_boxes(500, 40, 40, size))
    assert tall.max() == wide.max() == size


def test_fractions_are_rounded_to_the_nearest_pixel_and_never_to_none():
    for fraction, expected in ((0.5, (5, 7)), (0.24, (2, 3)), (0.001, (1, 1)), (1.0, (9, 14))):
        tall, wide = sizes(cutout_boxes(20, 9, 14, fraction, place="inside"))
        assert {(int(t), int(w)) for t, w in zip(tall, wide, strict=True)} == {expected}


def centres_are_uniform(boxes_of, side, size):
    """Counts of the first row of holes, against the centre being uniform over the image."""
    torch.manual_seed(0)
    top = boxes_of(40_000)[:, 0, 1]
    starts = torch.arange(side) - size // 2
    expected = torch.bincount(starts.clamp(min=0), minlength=side).double() / side * 40_000
    seen = torch.bincount(top, minlength=side).double()
    some = expected > 0
    if bool(seen[~some].any()):
        return False
    return stats.chisquare(seen[some].numpy(), expected[some].numpy()).pvalue > ALPHA


def test_centres_are_uniform_over_the_image():
    assert centres_are_uniform(lambda n: cutout_boxes(n, 12, 9, 5), 12, 5)
    assert centres_are_uniform(lambda n: cutout_boxes(n, 12, 9, 4), 12, 4)


def test_centres_can_fail():
    assert not centres_are_uniform(lambda n: cutout_boxes(n, 12, 9, 5, place="inside"), 12, 5)
    assert not centres_are_uniform(lambda n: cutout_boxes(n, 11, 9, 5), 12, 5)


def test_inside_is_uniform():
    torch.manual_seed(0)
    left = cutout_boxes(40_000, 12, 9, 5, place="inside")[:, 0, 0]
    assert stats.chisquare(torch.bincount(left, minlength=5).numpy()).pvalue > ALPHA
