from __future__ import annotations

from statistics import fmean

import pytest
import torch
from method_nets import applied_to

from torchdrop.app.errors import UserError
from torchdrop.app.methods import METHODS
from torchdrop.app.models import CifarResNet


def test_path_drop_needs_a_fractal_net():
    with pytest.raises(UserError, match="joins of a FractalNet; give --model fractalnet, or leave"):
        METHODS["path_drop"].build(CifarResNet(8), 0.15)


@pytest.mark.parametrize("p", [0.15, 0.9])
def test_path_drop_delivers_the_rate_of_half_local_half_global(p):
    torch.manual_seed(0)
    model, applied = applied_to("path_drop", p)
    # Joins of 2 and of 3 columns, as many of each.
    local = [p - p**n / n for n in (2, 3)]
    assert applied.asked == pytest.approx(fmean(local) / 2 + fmean([1 / 3, 2 / 3]) / 2)
    with torch.no_grad():
        for _ in range(10):
            model.train()(torch.randn(200, 1, 4, 4))
    assert applied.observed() == pytest.approx(applied.asked, abs=0.02)
    assert applied.observed() is None
