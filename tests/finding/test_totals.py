"""Sums of what successive blocks return are no residuals, and the blocks are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchdrop

W = 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(W, W)


class Plain(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


class MeanBeside(Layer):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + torch.tanh(self.fc(x))
        return x, x.mean(-1)


class LossBeside(Layer):
    """As a mixture of experts returns the loss of its router."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.fc(x))
        return x + h, self.fc(x).square().mean()


class SkipBeside(Layer):
    """As in WaveNet: what the branch computes is also summed up over the blocks."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.fc(x))
        return x + h, h


class BothIn(Layer):
    """A block that also adds its second input to its branch."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = torch.tanh(self.fc(x)) + bias
        return x + h * 0.5


class Total(nn.Module):
    def __init__(self, kind: type[nn.Module], depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, total = x * 1.0, torch.zeros(())
        for block in self.blocks:
            x, more = block(x)
            total = total + more
        return x, total


class TotalOfMeans(Total):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(())
        for block in self.blocks:
            x = block(x)
            total = total + x.mean(-1)
        return x, total


class SumOfLayers(Total):
    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for block in self.blocks:
            x = block(x)
            outs.append(x)
        return sum(outs)


class BiasAndTotal(Total):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bias, total = x.mean(-1, keepdim=True), torch.zeros(())
        for block in self.blocks:
            x = block(x, bias)
            total = total + x.mean(-1)
        return x, total


class SumOfHeads(Total):
    """As in EfficientViM: each stage has a head, which is linear, and the network adds them."""

    def __init__(self, kind: type[nn.Module], depth: int) -> None:
        super().__init__(kind, depth)
        self.stem = nn.Linear(W, W)
        self.heads = nn.ModuleList(nn.Linear(W, 3) for _ in range(depth))
        self.weights = nn.Parameter(torch.rand(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, outs = self.stem(x), []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x)
            outs.append(head(x))
        total = outs[0] * self.weights[0]
        for i in range(1, len(outs)):
            total = total + outs[i] * self.weights[i]
        return x, total


NETS = [
    (Total, MeanBeside, "skip"), (Total, LossBeside, "skip"), (Total, SkipBeside, "mask"),
    (TotalOfMeans, Plain, "skip"), (SumOfLayers, Plain, "skip"), (BiasAndTotal, BothIn, "skip"),
    (SumOfHeads, Plain, "skip"),
]  # fmt: skip


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize(("net", "kind", "action"), NETS)
def test_the_blocks_are_found_and_not_the_total(
    net: type[Total], kind: type[nn.Module], action: str, example: bool, depth: int
) -> None:
    model = net(kind, depth)
    x = torch.randn(3, W) if example else None
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x)
    assert [block.name for block in plan.blocks] == [f"blocks.{i}" for i in range(depth)]
    if kind is BothIn and not example:
        action = "mask"  # which of its inputs carry the batch is not known
    assert {block.action for block in plan.blocks} == {action}
    assert plan.blocks[-1].p == 0.5


@pytest.mark.parametrize("net", [Total, TotalOfMeans])
def test_the_total_is_listed_as_not_taken(net: type[Total]) -> None:
    model = net(MeanBeside if net is Total else Plain, 4)
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    assert "it totals the outputs of successive blocks" in repr(plan)


def test_the_total_keeps_what_every_block_returns() -> None:
    """With p=1 each block is the identity, and the total is that of the input."""
    model = Total(MeanBeside, 4).double()
    torchdrop.add_stochastic_depth(model, 1.0, schedule="uniform")
    x = torch.randn(3, W, dtype=torch.double)
    out, total = model(x)
    torch.testing.assert_close(out, x)
    torch.testing.assert_close(total, 4 * x.mean(-1))


class ParallelAfterNorm(nn.Module):
    """The twin: two branches of one norm, as in GPT-J, are no total."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(W), nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + torch.tanh(self.a(h)) + torch.relu(self.b(h))


def test_parallel_branches_are_no_total() -> None:
    model = nn.Sequential(ParallelAfterNorm(), ParallelAfterNorm())
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    assert [len(block.branches) for block in plan.blocks] == [2, 2]


class Adapter(nn.Module):
    """An adapter reads what the attention returns, and both are added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.b, self.c = nn.LayerNorm(W), nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.c(self.norm(x)))
        return x + h + torch.relu(self.b(h))


class AdapterOfModules(nn.Module):
    """The same with a module for each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(W, W), nn.Tanh())
        self.b = nn.Sequential(nn.Linear(W, W), nn.Tanh(), nn.Linear(W, W))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return x + h + self.b(h)


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("kind", [Adapter, AdapterOfModules])
def test_a_branch_that_reads_another_one_is_no_total(kind: type[nn.Module], example: bool) -> None:
    model = nn.Sequential(kind(), kind())
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, example_inputs=torch.randn(3, W) if example else None
    )
    assert [len(block.branches) for block in plan.blocks] == [2, 2]
