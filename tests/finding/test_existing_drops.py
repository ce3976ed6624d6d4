"""What a model drops by itself: layers left out of a loop, rows multiplied by random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import torchdrop
from small_nets import Block
from torchdrop.finding.existing_drops import layerdrop_of
from written_blocks import Base, two
from zoo import instance_names


class LayerDrop(nn.Module):
    """A loop that leaves out whole layers, as encoders for speech do."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.layerdrop = rate

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and torch.rand(()) < self.layerdrop:
                continue
            x = layer(x)
        return x


def test_a_model_that_leaves_out_all_of_its_layers() -> None:
    model, x = LayerDrop(1.0), torch.randn(2, 6)
    assert layerdrop_of(model) == (model, 1.0)
    assert torch.equal(model(x), x)
    dense = copy.deepcopy(model)
    dense.layerdrop = 0.0
    plan = torchdrop.add_stochastic_depth(model, 0.0)
    assert torch.equal(model(x), dense(x))
    plan.set_p(None)
    assert [r.p for r in plan.blocks] == [1.0] * 3


def test_a_rate_of_zero_leaves_out_nothing() -> None:
    assert layerdrop_of(LayerDrop(0.0)) is None


class Noisy(nn.Module):
    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * self.noise(x)


def test_one_random_number_for_each_row_is_a_drop_of_rows() -> None:
    model = nn.Sequential(*(Noisy(lambda x: torch.rand(x.shape[0], 1).floor()) for _ in range(2)))
    with pytest.raises(ValueError, match="rate would add to p"):
        torchdrop.add_stochastic_depth(model, 0.5)


def test_a_random_number_for_each_element_is_noise() -> None:
    model = nn.Sequential(*(Noisy(lambda x: torch.rand(x.shape[0], 6)) for _ in range(2)))
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    assert [r.action for r in plan.blocks] == ["skip", "skip"]


class InlinedDropPath(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.training:
            y = y * (torch.rand(x.shape[0], 1) < 0.5)
        return x + y


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    """As timm has it."""
    if p == 0.0 or not training:
        return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = x.new_empty(shape).bernoulli_(1 - p)
    random_tensor.div_(1 - p)
    return x * random_tensor


class CallingDropPath(Base):
    p = 0.3

    def forward(self, x: Tensor) -> Tensor:
        return x + drop_path(self.f(x), self.p, self.training)


class CallingStochasticDepth(CallingDropPath):
    def forward(self, x: Tensor) -> Tensor:
        return x + torchvision.ops.stochastic_depth(self.f(x), self.p, "batch", self.training)


@pytest.mark.parametrize("kind", [InlinedDropPath, CallingDropPath, CallingStochasticDepth])
@pytest.mark.parametrize("p", [0.2, None])
def test_a_drop_path_in_the_forward_itself_is_refused(kind: type[Base], p: float | None) -> None:
    model = two(kind)()
    names = instance_names(model)
    with pytest.raises(
        ValueError,
        match=r"'blocks\.0' \(.*drops the branch blocks\.0 itself.*"
        r"add to p; set it to 0, use a layer like torchdrop\.DropPath",
    ):
        torchdrop.add_stochastic_depth(model, p)
    assert instance_names(model) == names
    if isinstance(model.blocks[0], CallingDropPath):
        for block in model.blocks:
            block.p = 0.0
        plan = torchdrop.add_stochastic_depth(model, 0.2)
        assert [r.action for r in plan.blocks] == ["skip", "skip"]


def calls(model, x, times=200):
    count = []
    handle = model.layers[1].register_forward_hook(lambda *_: count.append(1))
    torch.manual_seed(0)
    for _ in range(times):
        model(x)
    handle.remove()
    return len(count)


def test_layer_drop_in_a_loop_is_taken_over():
    model, x = LayerDrop(0.25), torch.randn(2, 6)
    assert layerdrop_of(model) == (model, 0.25)
    before = calls(model, x)
    assert before < 200  # the twin: it does drop
    plan = torchdrop.add_stochastic_depth(model, None)
    assert [block.p for block in plan.blocks] == [0.25] * 3
    assert calls(model, x) == 200
    plan.set_p(0.0)
    assert calls(model, x) == 200
    assert model.layerdrop == 0.25
    torchdrop.remove_stochastic_depth(model)
    assert calls(model, x) == before
    assert "forward" not in model.__dict__


def test_a_rate_that_nothing_reads_is_no_layer_drop():
    model = nn.Sequential(Block())
    model.layerdrop = 0.5
    assert layerdrop_of(model) is None
