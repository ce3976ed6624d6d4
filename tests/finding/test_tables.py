"""Values that are cut to the size of the input, but are not computed from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from written_blocks import against_mask

W = 4


class Tower(nn.Module):
    """Adds a positional table to what it computes: no shortcut."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(W, W), nn.Linear(W, W)
        self.pos, self.cut = nn.Parameter(torch.randn(1, 16, W)), cut

    def table(self, x: Tensor) -> Tensor:
        if self.cut == "slice":
            return self.pos[:, : x.shape[1]]
        if self.cut == "size":
            return self.pos.narrow(1, 0, x.size(1))
        if self.cut == "index":
            return self.pos[:, torch.arange(x.shape[1])]
        if self.cut == "expanded":
            return self.pos[:, : x.shape[1]].expand(x.shape[0], -1, -1)
        return self.pos[:, 16 - x.shape[1] :].to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x))) + self.table(x)


class Dual(nn.Module):
    def __init__(self, cut: str) -> None:
        super().__init__()
        self.left, self.right = Tower(cut), Tower(cut)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * self.right(x)


class Layer(Tower):
    """A residual block whose branch gets the table, too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(x + self.table(x))))


CUTS = ["slice", "size", "index", "expanded", "another dtype"]


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("cut", CUTS)
def test_a_table_that_is_cut_to_the_input_is_no_shortcut(cut: str, example: bool) -> None:
    model, x = Dual(cut), torch.randn(8, 3, W)
    given: Any = x if example else None
    assert torchdrop.find_residuals(model, example_inputs=given) == []
    with pytest.raises(ValueError, match="no residual branches found"):
        torchdrop.add_stochastic_depth(model, 0.5, example_inputs=given)


@pytest.mark.parametrize("cut", CUTS)
def test_a_residual_that_adds_a_table_in_its_branch_is_found(cut: str) -> None:
    model, x = nn.Sequential(Layer(cut), Layer(cut)).double(), torch.randn(8, 3, W).double()
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x)
    assert [len(r.branches) for r in plan.blocks] == [1, 1]
    against_mask(model, (x,), plan)
