"""What a model drops by itself: layers left out of a loop, rows multiplied by random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import Block
from torchdrop.finding.existing_drops import drops_layers


class LayerDrop(nn.Module):
    """A loop that leaves out whole layers, as encoders for speech do."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.layerdrop = rate

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and torch.rand(()) < self.layerdrop:
                continue
            x = layer(x)
        return x


def test_a_model_that_leaves_out_all_of_its_layers() -> None:
    model, x = LayerDrop(1.0), torch.randn(2, 6)
    assert drops_layers(model) == (model, 1.0)
    assert torch.equal(model(x), x)
    dense = copy.deepcopy(model)
    dense.layerdrop = 0.0
    plan = torchdrop.add_stochastic_depth(model, 0.0)
    assert torch.equal(model(x), dense(x))
    plan.set_p(None)
    assert [r.p for r in plan.blocks] == [1.0] * 3


def test_a_rate_of_zero_leaves_out_nothing() -> None:
    assert drops_layers(LayerDrop(0.0)) is None


class Noisy(nn.Module):
    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * self.noise(x)


def test_one_random_number_for_each_row_is_a_drop_of_rows() -> None:
    model = nn.Sequential(*(Noisy(lambda x: torch.rand(x.shape[0], 1).floor()) for _ in range(2)))
    with pytest.raises(ValueError, match="rate would add to p"):
        torchdrop.add_stochastic_depth(model, 0.5)


def test_a_random_number_for_each_element_is_noise() -> None:
    model = nn.Sequential(*(Noisy(lambda x: torch.rand(x.shape[0], 6)) for _ in range(2)))
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    assert [r.action for r in plan.blocks] == ["skip", "skip"]
