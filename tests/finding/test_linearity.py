"""A branch is dropped if it is not linear: parts of it that look linear and are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchdrop

Combine = Callable[[Tensor, Tensor], Tensor]


class Combined(nn.Module):
    """A branch of two linear maps; whether it is linear depends on how they are combined."""

    def __init__(self, combine: Combine) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return x + self.combine(self.a(x), self.b(x))


@pytest.mark.parametrize(
    "combine",
    [
        torch.max,  # maxout
        lambda a, b: a.max(b),
        lambda a, b: a * b,
        lambda a, b: a.mul(b),
        lambda a, b: a * a + b,
    ],
)
def test_two_linear_maps_combined_to_one_that_is_not_linear(combine: Combine) -> None:
    model = nn.Sequential(Combined(combine), Combined(combine))
    assert [r.name for r in torchdrop.find_residuals(model)] == ["0", "1"]


@pytest.mark.parametrize(
    "combine",
    [
        lambda a, b: a - 2 * b,
        lambda a, b: a / 3 + b,
        lambda a, b: torch.stack([a, b]).max(0).values,  # over a dimension it counts as pooling
        lambda a, b: torch.cat([a, b], 1).chunk(2, 1)[0],
    ],
)
def test_two_linear_maps_combined_to_a_linear_one(combine: Combine) -> None:
    model = nn.Sequential(Combined(combine), Combined(combine))
    assert torchdrop.find_residuals(model) == []
    every = torchdrop.find_residuals(model, select=lambda residual: True)
    assert [r.why_not for r in every] == ["its branch is linear"] * 2
