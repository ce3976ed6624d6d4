"""The sums of a block, reported whether or not anything is dropped in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import Block, net
from torchdrop.running.forward_slot import occupant_of
from torchdrop.running.observed_sums import ObservedSums
from torchdrop.tracing.untraceable import UntraceableError
from zoo import assert_same


def watch(module: nn.Module, sums: list[Tensor], errors: list[UntraceableError]) -> ObservedSums:
    return ObservedSums(module, [0], lambda event: sums.append(event.total), errors.append)


@pytest.mark.parametrize("p", [None, 0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_sums_are_reported_and_the_output_stays(p: float | None, training: bool) -> None:
    model, x = net(2), torch.randn(6, 6)
    expected = model[0](x)
    if p is not None:
        torchdrop.add_stochastic_depth(model, [p, p])
    model.train(training)
    sums: list[Tensor] = []
    with watch(model[0], sums, []):
        out = model[0](x)
    assert len(sums) == 1
    assert_same(sums[0], out)
    if not (p and training):
        assert_same(out, expected)
    else:
        assert not torch.equal(out, expected)


@pytest.mark.parametrize("attached", [True, False])
def test_the_slot_is_as_before(attached: bool) -> None:
    model = net(2)
    if attached:
        torchdrop.add_stochastic_depth(model, 0.5)
    before, sums = occupant_of(model[0]), []
    names = set(model[0].__dict__)
    try:
        with watch(model[0], sums, []):
            assert isinstance(occupant_of(model[0]), ObservedSums)
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert occupant_of(model[0]) is before
    assert set(model[0].__dict__) == names
    model(torch.randn(6, 6))
    assert sums == []


class OnData(Block):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + self.b(self.act(self.a(x)))
        return x


def test_a_forward_that_cannot_be_read_runs_and_is_reported() -> None:
    block, x = net(1, block=OnData)[0], torch.ones(2, 6)
    sums: list[Any] = []
    errors: list[UntraceableError] = []
    with watch(block, sums, errors):
        assert_same(block(x), OnData.forward(block, x))
    assert sums == []
    assert len(errors) == 1
