"""Two streams that share an attention, which returns what is added to each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from written_blocks import against_mask

W = 4


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(W, 2 * W), nn.GELU(), nn.Linear(2 * W, W))


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qx, self.qc = nn.Linear(W, 3 * W), nn.Linear(W, 3 * W)
        self.ox, self.oc = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = torch.cat([self.qc(c), self.qx(x)], 1).chunk(3, -1)
        y = torch.softmax(q @ k.transpose(1, 2), -1) @ v
        n = c.shape[1]
        return self.ox(y[:, n:]), self.oc(y[:, :n])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nx, self.nc = nn.LayerNorm(W), nn.LayerNorm(W)
        self.attn, self.fx, self.fc = Joint(), mlp(), mlp()

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        ax, ac = self.attn(self.nx(x), self.nc(c))
        x, c = x + ax, c + ac
        return c + self.fc(self.nc(c)), x + self.fx(self.nx(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            c, x = block(x, c)
        return torch.cat([x, c], 1)


@pytest.mark.parametrize("example", [True, False])
def test_the_branches_of_both_streams_are_dropped(example: bool) -> None:
    torch.manual_seed(0)
    model = Net().double()
    inputs = torch.randn(8, 5, W).double(), torch.randn(8, 3, W).double()
    given: Any = inputs if example else None
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=given)
    assert [len(r.branches) for r in plan.blocks] == [4, 4]
    if example:  # without one, branches have other names than with one
        against_mask(model, inputs, plan)
    model(*inputs).sum().backward()
    plan.set_p([1.0, 1.0])
    torch.testing.assert_close(model(*inputs), torch.cat(inputs, 1), rtol=0, atol=0)


def test_hooks_of_the_attention_get_none_for_what_is_computed_later() -> None:
    model = Net().double()
    inputs = torch.randn(8, 5, W).double(), torch.randn(8, 3, W).double()
    torchdrop.add_stochastic_depth(model, 0.5, example_inputs=inputs)
    seen: list[Any] = []
    model.get_submodule("blocks.1.attn").register_forward_hook(
        lambda module, args, out: seen.append(out)
    )
    model(*inputs)
    ((first, second),) = seen
    assert first.shape[1:] == (5, W)
    assert second is None
