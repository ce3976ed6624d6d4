"""Which residuals of a model are taken by default, and the rates of the masks that they have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import Block


class Outer(nn.Module):
    """A residual around residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.stack(x)


def test_of_nested_residuals_the_outermost_are_taken_and_the_others_listed() -> None:
    model = nn.Sequential(Outer(), Outer())
    assert [r.name for r in torchdrop.find_residuals(model)] == ["0", "1"]
    every = torchdrop.find_residuals(model, select=lambda residual: True)
    inner = [r for r in every if not r.default]
    assert [r.name for r in inner] == ["0.stack.0", "0.stack.1", "1.stack.0", "1.stack.1"]
    assert {r.why_not for r in inner} == {"inside the branch of another residual"}


class DropPath(nn.Module):
    """A copy of the layer as packages of models have it, known by its name."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop_prob = p

    def forward(self, x: Tensor) -> Tensor:
        return x


class TwoMasks(nn.Module):
    def __init__(self, inner: float, outer: float) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), DropPath(inner))
        self.drop = DropPath(outer)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.f(x))


def test_a_branch_with_two_masks_survives_where_both_let_it() -> None:
    model = nn.Sequential(TwoMasks(0.2, 0.5), TwoMasks(0.0, 0.3))
    wanted = pytest.approx([1 - (1 - 0.2) * (1 - 0.5), 0.3])
    assert [r.p for r in torchdrop.find_residuals(model)] == wanted
    plan = torchdrop.add_stochastic_depth(model, None)
    assert [r.p for r in plan.blocks] == wanted


class Inner(nn.Module):
    """On the path of the shortcut of its block; the sum of the block calls no child."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.f(x))
        return x * 2.0


class AroundFunctions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x + torch.tanh(x @ self.weight)


@pytest.mark.parametrize("example", [None, torch.randn(3, 6)])
def test_a_branch_that_calls_no_child_has_a_name(example: Tensor | None) -> None:
    found = torchdrop.find_residuals(nn.Sequential(AroundFunctions(), AroundFunctions()), example)
    names = [branch.name for block in found for branch in block.branches]
    assert names == ["0:inner", "0:sum", "1:inner", "1:sum"]
