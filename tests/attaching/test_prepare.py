"""What is known of a branch before it is attached."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.running.block_site import sites_of


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).relu()


@pytest.mark.parametrize(
    ("layer", "x", "convolves"),
    [
        (lambda: nn.Conv1d(2, 2, 3, padding=1), (4, 2, 5), True),
        (lambda: nn.Conv2d(2, 2, 1), (4, 2, 5, 5), True),
        (lambda: nn.ConvTranspose2d(2, 2, 1), (4, 2, 5, 5), True),
        (lambda: nn.Linear(5, 5), (4, 2, 5), False),
        (lambda: nn.LayerNorm((2, 5)), (4, 2, 5), False),
        (lambda: nn.GroupNorm(1, 2), (4, 2, 5), False),
    ],
)
def test_whether_a_branch_convolves(
    layer: type[nn.Module], x: tuple[int, ...], convolves: bool
) -> None:
    # inductor must know the number of rows of a convolution, and of nothing else
    model = nn.Sequential(Around(layer()), Around(layer()))
    torchdrop.add_stochastic_depth(model, 0.5, example_inputs=torch.randn(x))
    assert [branch.facts.convolves for site in sites_of(model) for branch in site.branches] == [
        convolves
    ] * 2
