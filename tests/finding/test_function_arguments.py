"""A module that adds the output of a function which it gets as an argument."""

from __future__ import annotations

from functools import partial
from typing import Any

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
