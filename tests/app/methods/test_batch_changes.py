from __future__ import annotations

from statistics import fmean

import pytest
import torch
from method_nets import applied_to
from torch import nn

from torchdrop.app.methods import METHODS


@pytest.mark.parametrize(("batch", "p"), [(100, 0.303), (7, 0.5), (3, 0.9), (2, 0.5), (1, 0.3)])
def test_subsample_keeps_the_mean_exactly_and_never_a_single_row(batch, p):
    torch.manual_seed(0)
    _, applied = applied_to("subsample", p)
    sizes = []
    for _ in range(4000):
        images, labels = applied.batch(torch.arange(batch), torch.arange(batch))
        assert torch.equal(images, labels)
        assert len(set(images.tolist())) == len(images)
        sizes.append(len(images))
    assert batch == 1 or 1 not in sizes
    assert max(sizes) - min(sizes) <= 2
    # A size is one of two neighbours, or 0 and 2: the standard error is below .016.
    assert fmean(sizes) == pytest.approx(batch * (1 - p), abs=0.08)
    assert applied.observed() == pytest.approx(1 - fmean(sizes) / batch)


def test_subsample_at_the_ends():
    x = torch.arange(10)
    assert len(METHODS["subsample"].build(nn.Identity(), 0.0).batch(x, x)[0]) == 10
    assert len(METHODS["subsample"].build(nn.Identity(), 1.0).batch(x, x)[0]) == 0


def test_cutout_cuts_every_sample_its_own_hole_of_half_the_side():
    torch.manual_seed(0)
    _, applied = applied_to("cutout", 1.0)
    images = torch.ones(200, 1, 8, 8)
    cut, labels = applied.batch(images, torch.arange(200))
    assert torch.equal(labels, torch.arange(200))
    assert images.all()
    holes = (cut == 0).flatten(1)
    assert int(holes.sum(1).max()) == 16  # 4x4 where it fits
    assert len({tuple(hole.tolist()) for hole in holes}) > 40
    assert applied.observed() == 1.0
    assert applied.observed() is None
