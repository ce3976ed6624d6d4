"""Which residual additions are repeated, and so taken by default."""

from __future__ import annotations

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

import torchdrop
from written_blocks import Plain, Stack, conv, mlp


def test_a_lone_residual_is_listed_with_what_to_do() -> None:
    model = Stack(mlp(), Plain(), mlp())
    with pytest.raises(ValueError, match=r"'blocks\.1' \(no other Plain has.*select=lambda r"):
        torchdrop.add_stochastic_depth(model)
    plan = torchdrop.add_stochastic_depth(model, select=lambda r: r.name == "blocks.1")
    assert [r.name for r in plan.blocks] == ["blocks.1"]


class Strided(nn.Module):
    """Adds its input where it neither strides nor widens."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv, self.same = conv(width, out), width == out

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.conv(x)) if self.same else F.relu(self.conv(x))


def test_a_stack_may_be_of_blocks_of_several_classes() -> None:
    class Other(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.f(x) + x

    model = Stack(Plain(), Other())
    assert [r.name for r in torchdrop.find_residuals(model)] == ["blocks.0", "blocks.1"]


def test_the_one_block_that_does_not_stride_is_a_block() -> None:
    model = Stack(Strided(4, 6), Strided(6, 8), Strided(8, 8))
    assert [r.name for r in torchdrop.find_residuals(model)] == ["blocks.2"]
