"""What a forward pass may change is restored: buffers, training flags, random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchdrop.tracing.unchanged import (
    BufferCopies,
    attention_fast_path_off,
    devices_of,
    unchanged,
)


class Counts(nn.Module):
    """Changes its buffers in place, assigns one anew, and draws from all generators."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("last", torch.zeros(2))
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.last = x[0].detach()
        return self.norm(x + torch.rand(()) + random.random() + np.random.rand())


def state_of(module: nn.Module) -> list[Any]:
    found = [(id(b), b._version, b.tolist()) for b in module.buffers()]
    numbers = [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]
    return [*found, *numbers, [m.training for m in module.modules()]]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left(fails: bool) -> None:
    module = Counts()
    module.norm.eval()
    before = state_of(module)
    try:
        with unchanged(module):
            module.train()
            module(torch.randn(4, 2))
            module.eval()
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert state_of(module) == before


def test_without_it_all_of_this_changes() -> None:
    module = Counts()
    before = state_of(module)
    module(torch.randn(4, 2))
    module.eval()
    changed = [a != b for a, b in zip(before, state_of(module), strict=True)]
    assert all(changed)


def test_a_backward_pass_to_come_finds_what_it_saved() -> None:
    module = Counts().eval()
    loss = module(torch.randn(4, 2, requires_grad=True)).sum()  # saves the running statistics
    with unchanged(module):
        module.train()(torch.randn(4, 2))
    loss.backward()


def test_copies_begin_anew_and_are_kept_where_wanted() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    x = torch.randn(4, 2) + 1
    with BufferCopies(module) as buffers:
        module(x)
        buffers.reset()
        assert int(module[0].num_batches_tracked) == 0
        module(x)
        buffers.keep(lambda m: m is module[1])
    assert [int(m.num_batches_tracked) for m in module] == [0, 1]


def test_a_shared_buffer_stays_shared() -> None:
    one, two = Counts(), Counts()
    two.seen = one.seen
    with BufferCopies(one, two):
        one.seen += 1
        assert two.seen[0] == 1.0
    assert two.seen[0] == 0.0


def test_a_lazy_buffer_is_left_alone() -> None:
    module = nn.LazyBatchNorm1d()
    with BufferCopies(module):
        pass
    assert torch.nn.parameter.is_lazy(module.running_mean)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_fast_path_of_attention_is_switched_back(enabled: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with attention_fast_path_off():
            assert not torch.backends.mha.get_fastpath_enabled()
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_devices_are_those_of_parameters_and_buffers() -> None:
    module = nn.BatchNorm1d(2)
    module.running_mean = torch.zeros(2, device="meta")
    assert devices_of(module) == {torch.device("cpu"), torch.device("meta")}
    with unchanged(module):  # the meta device has no generator
        pass
