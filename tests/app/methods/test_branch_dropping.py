from __future__ import annotations

from statistics import fmean

import pytest
import torch
from method_nets import applied_to
from torch import nn

import torchdrop
from torchdrop.app.errors import UserError
from torchdrop.app.methods import METHODS


def test_asked_is_the_mean_over_the_linear_decay():
    _, applied = applied_to("stochastic_depth_row", 0.6)
    assert applied.asked == pytest.approx(fmean([0.2, 0.4, 0.6]))


def test_a_network_without_residuals_is_refused_in_one_line():
    with pytest.raises(UserError) as error:
        METHODS["stochastic_depth_row"].build(nn.Sequential(nn.Conv2d(1, 1, 1)), 0.5)
    assert "\n" not in str(error.value)


def test_drop_path_computes_every_branch_and_rows_do_not():
    from torchdrop import cost

    x = torch.randn(20, 1, 8, 8)
    counts = {}
    for name in ("none", "drop_path", "stochastic_depth_row", "stochastic_depth_batch"):
        torch.manual_seed(0)
        model, _ = applied_to(name, 0.9)
        counts[name] = cost.flops(model.train(), x)
    assert counts["drop_path"] == counts["none"]
    assert counts["stochastic_depth_row"] < 0.7 * counts["none"]
    assert counts["stochastic_depth_batch"] < counts["none"]


def test_methods_are_the_ones_of_torchdrop():
    for name in ("drop_path", "stochastic_depth_row", "stochastic_depth_batch"):
        model, applied = applied_to(name, 0.5)
        assert torchdrop.has_stochastic_depth(model)
        assert len(applied.plan.blocks) == 3
