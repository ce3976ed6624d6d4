"""What the result of a measurement says of its layers."""

from __future__ import annotations

import math

import pytest
import torch

from torchdrop.diagnostics.shift import LayerShift, VarianceShift


def layer(name: str, ratio: float, kind: str = "batch_norm") -> LayerShift:
    return LayerShift(
        name=name,
        kind=kind,
        ratio=ratio,
        var_train=ratio,
        var_eval=1.0,
        total_ratio=ratio,
        total_train=ratio,
        total_eval=1.0,
        running_ratio=None,
        running_var=None,
        channel_ratios=torch.tensor([ratio]),
    )


@pytest.mark.parametrize(("ratio", "shift"), [(2.0, 2.0), (0.25, 4.0), (1.0, 1.0), (0.0, math.inf)])
def test_a_shift_is_the_distance_from_one_either_way(ratio: float, shift: float) -> None:
    assert layer("bn", ratio).shift == shift


def test_the_largest_may_be_a_variance_that_shrinks_in_training() -> None:
    found = VarianceShift("Net", [layer("a", 2.0), layer("b", 0.25), layer("c", math.nan)], {}, "")
    assert found.largest.name == "b"
    with pytest.raises(ValueError, match="both in training and in evaluation"):
        _ = VarianceShift("Net", [layer("c", math.nan)], {}, "").largest


def test_growth_is_over_the_layer_of_the_same_kind_before() -> None:
    layers = [layer("a", 2.0), layer("s", 1.5, "residual_sum"), layer("b", 3.0)]
    assert VarianceShift("Net", layers, {}, "").growth == [2.0, 1.5, 1.5]
