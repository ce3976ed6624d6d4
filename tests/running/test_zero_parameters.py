"""A branch that starts at zero is tested as if it did not."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.running import proof
from torchdrop.running.zero_parameters import zero_parameters_replaced

W, B = 4, 6


class Block(nn.Module):
    """A branch that mixes rows if ``mixes``, and ends with something that is zero at first."""

    def __init__(self, last: str, mixes: bool) -> None:
        super().__init__()
        self.fc, self.mixes, self.last = nn.Linear(W, W), mixes, last
        if last == "layer scale":
            self.gamma = nn.Parameter(torch.zeros(W))
        elif last == "gate":
            self.gamma = nn.Parameter(torch.tensor(0.0))
        elif last == "norm":
            self.norm = nn.LayerNorm(W)
            nn.init.zeros_(self.norm.weight)
        elif last == "weight":
            self.out = nn.Linear(W, W)
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)
        elif last == "tied":
            self.out = nn.Linear(W, W, bias=False)
            self.tied = nn.Linear(W, W, bias=False)
            nn.init.zeros_(self.out.weight)
            self.tied.weight = self.out.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc(x))
        if self.mixes:
            h = h - h.mean(0)
        if self.last == "layer scale":
            h = h * self.gamma
        elif self.last == "gate":
            h = torch.tanh(self.gamma) * h
        elif self.last == "norm":
            h = self.norm(h)
        elif self.last == "weight":
            h = self.out(h)
        else:
            h = self.tied(torch.tanh(self.out(h)))
        return x + h


LASTS = ["layer scale", "gate", "norm", "weight", "tied"]


def _stack(last: str, mixes: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(last, mixes), Block(last, mixes)).double()


def _actions(last: str, mixes: bool, example: bool) -> list[str]:
    model = _stack(last, mixes)
    x = torch.randn(B, W, dtype=torch.double)
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x if example else None)
    model(x)
    return [block.action for block in plan.blocks]


@pytest.mark.filterwarnings("ignore:.*computed for all rows and masked")
@pytest.mark.parametrize("example", [True, False], ids=["example", "first call"])
@pytest.mark.parametrize("last", LASTS)
def test_rows_that_will_depend_on_each_other_are_masked(last: str, example: bool) -> None:
    assert _actions(last, True, example) == ["mask", "mask"]
    assert _actions(last, False, example) == ["skip", "skip"]


@pytest.mark.parametrize("last", LASTS)
def test_the_proof_would_see_nothing_of_it(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: with the zeros in place the rows do not depend on each other."""
    monkeypatch.setattr(proof, "zero_parameters_replaced", lambda module: nullcontext())
    assert _actions(last, True, True) == ["skip", "skip"]


@pytest.mark.parametrize("last", LASTS)
def test_parameters_are_put_back_and_never_written_into(last: str) -> None:
    model, x = _stack(last, False), torch.randn(B, W, dtype=torch.double)
    before: dict[str, Any] = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    versions = {name: p._version for name, p in before.items()}
    torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x)
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, values[name])
        assert parameter._version == versions[name]


def test_a_tied_parameter_stays_tied_and_others_stay() -> None:
    block = Block("tied", False)
    kept, zero = block.fc.weight, block.out.weight
    state = torch.get_rng_state()
    with zero_parameters_replaced(block):
        assert block.out.weight is block.tied.weight
        assert block.out.weight is not zero
        assert block.out.weight.requires_grad
        assert block.out.weight.any()
        assert block.fc.weight is kept
    assert block.out.weight is block.tied.weight is zero
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_puts_them_back_too() -> None:
    block = Block("weight", False)
    zero = block.out.weight

    def fail() -> None:
        with zero_parameters_replaced(block):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert block.out.weight is zero


def test_the_values_are_the_same_in_each_test() -> None:
    found = []
    for _ in range(2):
        block = Block("weight", False)
        with zero_parameters_replaced(block):
            found.append(block.out.weight.detach())
    assert torch.equal(*found)
