"""A branch is dropped if it is not linear: parts of it that look linear and are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchdrop
from written_blocks import Base, Stack, W, flat, mlp
from zoo import BARELY, assert_same

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
        lambda a, b: torch.mul(a, other=b),
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


class Starting(nn.Module):
    """A composite child that begins by writing into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = x.view(x.shape)
        y.relu_()
        return self.inner(y)


class LeafStarting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(W, W))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=True) @ self.weight


class Writes(Base):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return x + self.child(x)


@pytest.mark.parametrize(
    "child",
    [
        lambda: nn.Sequential(nn.ReLU(inplace=True), mlp()),
        lambda: nn.Sequential(nn.Sequential(nn.Identity(), nn.ReLU6(inplace=True)), mlp()),
        Starting,
        LeafStarting,
        lambda: nn.Sequential(nn.Identity(), Starting()),
    ],
)
def test_a_branch_that_writes_into_its_input_is_masked(child: Any) -> None:
    model, x = Stack(Writes(child()), Writes(child())), flat()
    dense = copy.deepcopy(model)
    plan = torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    assert all(r.action == "mask" and "writes into its input" in r.reason for r in plan.blocks)
    with torch.no_grad():
        assert_same(model(x.clone()), dense(x.clone()))
        plan.set_p([1.0, 1.0])
        assert_same(model(x.clone()), x.relu())


class Pooled(nn.Module):
    """Its skip is pooled by a maximum over a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.f = nn.LayerNorm(W), nn.Linear(W, W), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        pooled = self.up(x).unflatten(1, (2, -1)).max(dim=1).values
        return pooled + self.f(x).unflatten(1, (2, -1)).amax(1)


def test_a_maximum_over_a_dimension_pools_the_skip() -> None:
    (first, _) = torchdrop.find_residuals(Stack(Pooled(), Pooled()))
    assert (first.shortcut, first.action) == ("projection", "skip")
