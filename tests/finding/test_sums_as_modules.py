"""Additions that are modules of their own, as in networks that were converted from ONNX."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from written_blocks import against_mask

W = 4


class AddList(nn.Module):
    def forward(self, inputs: Any) -> Tensor:
        return torch.add(*inputs)


class AddTwo(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class AddAny(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.stack(inputs).sum(0)


class AddAndActivate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.act(a + b)


class Clone(nn.Module):
    def forward(self, x: Tensor, n: int) -> list[Tensor]:
        return [x.clone() for _ in range(n)]


class Multiply(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


class Unreadable(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b if float(a.sum()) > 0 else b


def mlp() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(W), nn.Linear(W, W), nn.Tanh(), nn.Linear(W, W))


class Block(nn.Module):
    def __init__(self, add: nn.Module) -> None:
        super().__init__()
        self.f, self.add = mlp(), add

    def forward(self, x: Tensor) -> Tensor:
        f = self.f(x)
        return self.add([x, f]) if isinstance(self.add, AddList) else self.add(x, f)


class Cloning(Block):
    """The shortcut and the input of the branch are copies."""

    def __init__(self, add: nn.Module) -> None:
        super().__init__(add)
        self.clone = Clone()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.clone(x, 2)
        f = self.f(b)
        return self.add([a, f]) if isinstance(self.add, AddList) else self.add(a, f)


class Twice(Block):
    """One sum by the module, used twice, and one by the block itself."""

    def __init__(self, add: nn.Module) -> None:
        super().__init__(add)
        self.g, self.h = mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(x, self.f(x))
        x = self.add(self.g(x), x)
        return x + self.h(x)


def stack(kind: type[Block], add: type[nn.Module], shared: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    one = add()
    return nn.Sequential(*(kind(one if shared else add()) for _ in range(2))).double()


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize(
    ("kind", "add", "branches"),
    [
        *((Block, add, 1) for add in (AddList, AddTwo, AddAny, AddAndActivate)),
        (Cloning, AddList, 1),
        (Cloning, AddTwo, 1),
        (Twice, AddTwo, 3),
        (Twice, AddAny, 3),
    ],
)
def test_every_sum_is_found(
    kind: type[Block], add: type[nn.Module], branches: int, example: bool
) -> None:
    model, x = stack(kind, add), torch.randn(6, W).double()
    dense = stack(kind, add)
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x if example else None)
    assert [[b.action for b in r.branches] for r in plan.blocks] == [["skip"] * branches] * 2
    torch.testing.assert_close(model.eval()(x), dense.eval()(x), rtol=0, atol=0)
    against_mask(model.train(), (x,), plan)


def test_one_module_may_add_for_all_blocks() -> None:
    model, x = stack(Twice, AddTwo, shared=True), torch.randn(6, W).double()
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    assert len(plan.blocks) == 2
    against_mask(model, (x,), plan)


def test_hooks_of_the_sum_see_its_output() -> None:
    model, x = stack(Block, AddTwo), torch.randn(6, W).double()
    torchdrop.add_stochastic_depth(model, 0.5)
    seen: list[Tensor] = []
    add: Any = model[1]
    add.add.register_forward_hook(lambda module, args, out: seen.append(out))
    out = model(x)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], out)


@pytest.mark.parametrize("add", [Multiply, Unreadable])
def test_another_operation_is_no_sum(add: type[nn.Module]) -> None:
    assert torchdrop.find_residuals(stack(Block, add)) == []


class BesideUnreadable(Block):
    def __init__(self, add: nn.Module) -> None:
        super().__init__(add)
        self.other = Unreadable()

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(x, x.tanh())
        return self.add(x, self.f(x))


def test_an_operation_that_cannot_be_read_hides_no_sum_beside_it() -> None:
    model, x = stack(BesideUnreadable, AddTwo), torch.randn(6, W).double()
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    against_mask(model, (x,), plan)
