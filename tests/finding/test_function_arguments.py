"""A module that adds the output of a function which it gets as an argument."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchdrop
from written_blocks import against_mask

W = 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(W, 3 * W), nn.Linear(W, W)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.q(x).chunk(3, -1)
        scores = (q @ k.transpose(1, 2)).masked_fill(mask == 0, -1e4)
        out: Tensor = self.o(torch.softmax(scores, -1) @ v)
        return out


class Connection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(W), nn.Dropout(0.0)

    def forward(self, x: Tensor, sublayer: Any, act: Any = None) -> Tensor:
        out: Tensor = self.dropout(sublayer(self.norm(x)))
        return x + (out if act is None else act(out))


class Layer(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.attn = form, Attention()
        self.ff = nn.Sequential(nn.Linear(W, 2 * W), nn.ReLU(), nn.Linear(2 * W, W))
        self.sub = nn.ModuleList(Connection() for _ in range(2))

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.attn(x, mask)
        return out

    def feed(self, x: Tensor) -> Tensor:
        out: Tensor = self.ff(x)
        return out

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        first, second = self.sub
        if self.form == "lambda and module":
            x = first(x, lambda y: self.attn(y, mask))
            return second(x, self.ff)
        if self.form == "closure and method":

            def attend(y: Tensor) -> Tensor:
                return self.attend(y, mask)

            return second(first(x, attend), self.feed)
        if self.form == "partial and keyword":
            x = first(x, partial(self.attn, mask=mask))
            return second(x, sublayer=self.ff)
        x = first(x, lambda y: self.attn(y, mask), functional.gelu)
        return second(x, self.ff, act=torch.tanh)


class Encoder(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(form) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


def encoder(form: str) -> Encoder:
    torch.manual_seed(0)
    return Encoder(form).double()


FORMS = ["lambda and module", "closure and method", "partial and keyword", "functions of torch"]


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_each_layer_has_two_branches(form: str, example: bool, mode: str) -> None:
    inputs = torch.randn(8, 5, W).double(), torch.ones(8, 1, 5)
    inputs[1][:3, :, 3:] = 0
    model, dense = encoder(form), encoder(form)
    given: dict[str, Any] = {"mode": mode, "example_inputs": inputs if example else None}
    plan = torchdrop.add_stochastic_depth(model, 0.5, **given)
    assert [r.name for r in plan.blocks] == ["layers.0", "layers.1", "layers.2"]
    actions = [[b.action for b in r.branches] for r in plan.blocks]
    # without an example it is not known that the mask carries the batch
    assert actions == [["skip" if example else "mask", "skip"]] * 3
    torch.testing.assert_close(model.eval()(*inputs), dense.eval()(*inputs), rtol=0, atol=0)
    if mode == "row":
        against_mask(model.train(), inputs, plan)
    else:
        plan.set_p([1.0] * 3)
        torch.testing.assert_close(model.train()(*inputs), inputs[0], rtol=0, atol=0)


def test_hooks_of_the_module_run_and_get_no_function() -> None:
    model = encoder(FORMS[0])
    torchdrop.add_stochastic_depth(model, 0.5)
    seen: list[Any] = []
    layer: Any = model.layers[2]
    layer.sub[1].register_forward_hook(lambda module, args, out: seen.append((args, out)))
    out = model(torch.randn(8, 5, W).double(), torch.ones(8, 1, 5))
    ((x, function), total) = seen.pop()
    assert function is None
    assert x.shape == total.shape
    torch.testing.assert_close(total, out)


class Given(nn.Module):
    """A block that gets a function of torch, or a module of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(W), nn.LayerNorm(W)
        self.f, self.g = (nn.Sequential(nn.Linear(W, W), nn.Tanh(), nn.Linear(W, W)) for _ in "fg")

    def forward(self, x: Tensor, act: Any) -> Tensor:
        x = x + self.f(act(self.n1(x)))
        return x + self.g(self.n2(x))


class Giving(nn.Module):
    def __init__(self, head: bool) -> None:
        super().__init__()
        self.b1, self.b2, self.b3 = Given(), Given(), Given()
        self.head = nn.Linear(W, W) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.b1, self.b2, self.b3):
            x = block(x, functional.relu)
        return self.head(x)


@pytest.mark.parametrize("head", [True, False])
def test_a_block_that_gets_a_function_of_torch_stays_a_block(head: bool) -> None:
    model, x = Giving(head).double(), torch.randn(8, 5, W).double()
    for block in (model.b1, model.b2, model.b3):  # such as those of fully_shard
        block.register_forward_pre_hook(lambda module, args: args)
    plan = torchdrop.add_stochastic_depth(model, 0.3, example_inputs=x)
    assert [(r.name, len(r.branches)) for r in plan.blocks] == [("b1", 2), ("b2", 2), ("b3", 2)]
    assert [r.p for r in plan.blocks] == pytest.approx([0.1, 0.2, 0.3])
    against_mask(model, (x,), plan)


class Routed(nn.Module):
    """Branches on the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: Tensor, act: Any) -> Tensor:
        return act(self.a(x)) if bool(x.mean() > 1e9) else act(self.b(x))


class WithRouted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = Routed()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(x, lambda y: self.moe.a(y).tanh())


def test_a_child_that_branches_on_data_may_get_a_function() -> None:
    model, x = nn.Sequential(WithRouted(), WithRouted()), torch.randn(6, W)
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x)
    assert [r.action for r in plan.blocks] == ["layer", "layer"]


class Out(NamedTuple):
    h: Tensor
    x: Tensor


class Names(nn.Module):
    def forward(self, x: Tensor, f: Any) -> Out:
        return Out(x + f(x), x)


class WithNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.add = nn.Sequential(nn.Linear(W, W), nn.Tanh(), nn.Linear(W, W)), Names()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.f).h


@pytest.mark.parametrize("example", [True, False])
def test_a_child_that_gets_a_function_may_return_a_named_tuple(example: bool) -> None:
    model, x = nn.Sequential(WithNames(), WithNames()).double(), torch.randn(6, W).double()
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x if example else None)
    assert [r.action for r in plan.blocks] == ["skip", "skip"]
