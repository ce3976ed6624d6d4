"""The rates of branches from the forms of ``p``, for blocks of two branches."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import torchdrop


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.mlp = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


def rates(plan: torchdrop.Plan) -> list[list[float]]:
    return [[branch.p for branch in block.branches] for block in plan.blocks]


def model() -> nn.Module:
    return nn.Sequential(TwoBranches(), TwoBranches())


def test_a_rule_counts_blocks_not_branches() -> None:
    assert rates(torchdrop.add_stochastic_depth(model(), 0.4)) == [[0.2, 0.2], [0.4, 0.4]]
    plan = torchdrop.add_stochastic_depth(model(), 0.4, schedule="linear_from_zero")
    assert rates(plan) == [[0.0, 0.0], [0.4, 0.4]]


def test_a_sequence_has_a_rate_for_each_block() -> None:
    assert rates(torchdrop.add_stochastic_depth(model(), [0.1, 0.3])) == [[0.1, 0.1], [0.3, 0.3]]
    with pytest.raises(ValueError, match="expected 2, but got 4"):
        torchdrop.add_stochastic_depth(model(), [0.1, 0.1, 0.3, 0.3])


def test_the_rate_of_a_branch_goes_before_that_of_its_block() -> None:
    plan = torchdrop.add_stochastic_depth(model(), {"1": 0.2, "1:mlp": 0.5})
    assert rates(plan) == [[0.0, 0.0], [0.2, 0.5]]
    plan.set_p({"0:attn": 0.3})
    assert rates(plan) == [[0.3, 0.0], [0.2, 0.5]]
