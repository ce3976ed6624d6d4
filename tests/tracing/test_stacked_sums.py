"""Sums that are written with a stack, or fused with a product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.tracing.block_graph import trace_block
from written_blocks import against_mask

W = 4
Join = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """``join(x, f(x))``, where ``join`` is given."""

    def __init__(self, join: Join) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(W), nn.Linear(W, W), nn.Tanh(), nn.Linear(W, W))
        self.gate = nn.Parameter(torch.full((W,), 0.5))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x, self.f(x))


def stack(join: Join) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(join), Block(join)).double()


SUMS: dict[str, Join] = {
    "stack and method": lambda m, x, f: torch.stack([x, f]).sum(0),
    "stack and function": lambda m, x, f: torch.sum(torch.stack((x, f)), 0),
    "branch first": lambda m, x, f: torch.stack([f, x]).sum(dim=0),
    "a list of dimensions": lambda m, x, f: torch.stack([x, f], 0).sum([0]),
    "last dimension": lambda m, x, f: torch.stack([x, f], dim=-1).sum(-1),
    "second dimension": lambda m, x, f: torch.stack(tensors=[x, f], dim=1).sum(1),
    "two branches": lambda m, x, f: torch.stack([x, f, m.gate * x.tanh()]).sum(0),
    "addcmul": lambda m, x, f: torch.addcmul(x, m.gate, f),
    "method addcmul": lambda m, x, f: x.addcmul(f, m.gate, value=0.5),
    "addcmul in place": lambda m, x, f: x.clone().addcmul_(m.gate, f),
    "addcmul of a negative value": lambda m, x, f: torch.addcmul(x, f, m.gate, value=-2),
}


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_found_and_its_rows_are_skipped(name: str, example: bool) -> None:
    model, x = stack(SUMS[name]), torch.randn(6, W).double()
    dense = stack(SUMS[name])
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x if example else None)
    assert {b.action for r in plan.blocks for b in r.branches} == {"skip"}
    torch.testing.assert_close(model.eval()(x), dense.eval()(x), rtol=0, atol=0)
    against_mask(model.train(), (x,), plan)


OTHERS: dict[str, Join] = {
    "a sum over another dimension": lambda m, x, f: torch.stack([x, f], 1).sum(0),
    "a sum over all": lambda m, x, f: x * torch.stack([x, f]).sum(),
    "a dimension is kept": lambda m, x, f: torch.stack([x, f]).sum(0, keepdim=True)[0],
    "another dtype": lambda m, x, f: torch.stack([x, f]).sum(0, dtype=torch.float32),
    "one tensor": lambda m, x, f: x * torch.stack([f]).sum(0),
    "a mean": lambda m, x, f: torch.stack([x, f]).mean(0),
    "memory of its own": lambda m, x, f: torch.addcmul(x, f, m.gate, out=torch.empty_like(x)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_such_sum_is_left_as_it_is(name: str) -> None:
    graph = trace_block(stack(OTHERS[name])[0]).graph
    called = {getattr(node.target, "__name__", node.target) for node in graph.nodes}
    assert called & {"stack", "addcmul"}


def test_a_stack_that_is_used_twice_stays() -> None:
    def twice(m: nn.Module, x: Tensor, f: Tensor) -> Tensor:
        both = torch.stack([x, f])
        return both.sum(0) + both.amax(0)

    graph = trace_block(stack(twice)[0]).graph
    assert torch.stack in [node.target for node in graph.nodes]
