"""What a branch takes from outside, and which modules it calls."""

from __future__ import annotations

import torch
from torch import Tensor

from torchdrop.finding.residual_sums import read_residual_sums
from torchdrop.finding.split import called_modules, outside_inputs
from torchdrop.tracing.block_graph import trace_block
from written_blocks import Base


class Masked(Base):
    """A branch that takes the shape of the shortcut, a mask and a parameter besides."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.g(self.f(x).relu()).reshape(x.shape)
        return torch.add(x, y * mask * self.gamma, alpha=-0.5)


def test_inputs_are_the_tensors_from_outside_in_order() -> None:
    block = trace_block(Masked())
    (entry,) = read_residual_sums(block)
    split = entry.split
    assert [node.name for node in outside_inputs(split, block.graph.nodes)] == ["x", "mask"]
    assert called_modules(split) == ["f", "g"]
    assert (split.skip.name, split.skip_gain, split.branch_gain) == ("x", 1.0, -0.5)
    assert not split.branch_first


class BranchFirst(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sub(self.f(x), x, alpha=2.0)


def test_the_shortcut_may_be_the_second_operand() -> None:
    (entry,) = read_residual_sums(trace_block(BranchFirst()))
    split = entry.split
    assert split.branch_first
    assert (split.skip_gain, split.branch_gain, split.writes_skip) == (-2.0, 1.0, False)
    assert entry.why_not == "its shortcut is subtracted"
