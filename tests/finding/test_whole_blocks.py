"""Which blocks that cannot be read are dropped as a whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchdrop


class Counting(nn.Module):
    """Sets an attribute in its forward, so that it cannot be read."""

    def __init__(self, width: int, result: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.f = nn.Linear(width, width)
        self.result = result
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.result(x, x + self.f(x).relu())


def widths(result: Callable[[Tensor, Tensor], Tensor]) -> list[int]:
    """The widths of three blocks in a row."""
    found = [6]
    for _ in range(2):
        found.append(result(torch.ones(2, found[-1]), torch.ones(2, found[-1])).shape[-1])
    return found


@pytest.mark.parametrize(
    ("result", "taken"),
    [
        (lambda x, y: y, True),
        (lambda x, y: torch.cat([x, y], 1), False),  # as a DenseNet does
        (lambda x, y: y[:, ::2], False),
        (lambda x, y: y.unsqueeze(0), False),
        (lambda x, y: y.sum(0, keepdim=True), False),
    ],
)
def test_only_what_returns_the_shape_that_it_takes(
    result: Callable[[Tensor, Tensor], Tensor], taken: bool
) -> None:
    model = nn.Sequential(*(Counting(width, result) for width in widths(result)))
    found = torchdrop.find_residuals(model, torch.randn(2, 6))
    assert [(r.name, r.action) for r in found] == [(str(i), "layer") for i in range(3 * taken)]
