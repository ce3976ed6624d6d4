"""Models and arguments that are refused, and the errors that say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import Block, net
from zoo import fingerprint, instance_names

torchvision = pytest.importorskip("torchvision")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": "cosine"}, ValueError, "schedule has to be one of 'linear'"),
        ({"mode": "sample"}, ValueError, "mode has to be one of 'row', 'batch', but got 'sample'"),
        ({"sampling": None}, ValueError, "sampling has to be one of 'exact'"),
        ({"scale": "none"}, ValueError, "scale has to be one of 'train', 'eval'"),
        ({"compute": True}, ValueError, "compute has to be one of 'auto'"),
        ({"sync_ranks": 1}, TypeError, "sync_ranks"),
        ({"zero_grad": None}, TypeError, "zero_grad"),
        ({"batch_dim": -1}, ValueError, "batch_dim has to be 0 or more"),
        ({"batch_dim": 0.0}, TypeError, "batch_dim has to be an integer"),
        ({"select": "layer1"}, TypeError, "select has to be a function"),
        ({"select": lambda r: False}, ValueError, "select took none of the 3 residuals"),
    ],
)
def test_bad_options_change_nothing(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = net()
    before, names = fingerprint(model), instance_names(model)
    with pytest.raises(error, match=message):
        torchdrop.add_stochastic_depth(model, 0.2, **options)
    assert fingerprint(model) == before
    assert instance_names(model) == names


def test_one_forward_is_counted_as_one() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).relu()  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"has read 1 forward with 0 additions\."):
        torchdrop.add_stochastic_depth(Plain(), 0.2)


def test_what_is_no_module_and_what_is_attached_already() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, but got a list"):
        torchdrop.add_stochastic_depth([net()], 0.2)  # type: ignore[arg-type]
    model = net()
    torchdrop.add_stochastic_depth(model, 0.2)
    for again in (model, nn.Sequential(model, net())):
        with pytest.raises(
            ValueError, match=r"already has stochastic depth; change its rates with.*set_p"
        ):
            torchdrop.add_stochastic_depth(again, 0.3)
    assert torchdrop.get_plan(model).blocks[-1].p == 0.2
    torchdrop.remove_stochastic_depth(model)
    with pytest.raises(ValueError, match="this Sequential has no stochastic depth"):
        torchdrop.remove_stochastic_depth(model)
    with pytest.raises(ValueError, match=r"no stochastic depth.*add_stochastic_depth\(model, p\)"):
        torchdrop.get_plan(model)


def test_wrapped_models_are_refused_with_the_order_to_use() -> None:
    with pytest.raises(ValueError, match=r"wrapped in DataParallel.*wrap it afterwards"):
        torchdrop.add_stochastic_depth(nn.DataParallel(net()), 0.2)

    class Scripted(torch.jit.ScriptModule):
        pass

    with pytest.raises(ValueError, match="already TorchScript; add stochastic depth to the"):
        torchdrop.add_stochastic_depth(Scripted(), 0.2)
    with pytest.raises(ValueError, match=r"already compiled by torch\.compile.*compile afterwards"):
        torchdrop.add_stochastic_depth(torch.compile(net()), 0.2)  # type: ignore[arg-type]


class Branching(Block):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + self.b(self.a(x).tanh())
        return x


def test_a_block_that_cannot_be_read_is_named_with_its_line() -> None:
    model = nn.Sequential(Block(6), Block(6), Branching(6), Branching(6))
    names = instance_names(model)
    with pytest.raises(ValueError, match=r"'2' \(Branching\).*cannot be read.*if x\.sum\(\) > 0"):
        torchdrop.add_stochastic_depth(model, 0.2)
    assert instance_names(model) == names
    plan = torchdrop.add_stochastic_depth(model, 0.2, select=lambda r: r.default)
    assert [r.name for r in plan.blocks] == ["0", "1"]


class Drops(nn.Module):
    """A block that calls the function by itself."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.linear, self.p = nn.Linear(6, 6), p

    def forward(self, x: Tensor) -> Tensor:
        return x + torchdrop.functional.drop_path(self.linear(x).relu(), self.p, self.training)


@pytest.mark.parametrize("around", [True, False])
def test_a_layer_around_or_inside_a_block_is_refused_as_its_rate_would_add(around: bool) -> None:
    def stage() -> nn.Module:
        return nn.Sequential(Drops(0.0), Drops(0.0))

    if around:
        model = nn.Sequential(torchdrop.StochasticDepth(stage(), 0.3), stage())
    else:
        model = nn.Sequential(*stage(), *stage())
        for block in model:
            block.linear = nn.Sequential(torchdrop.StochasticDepth(nn.Linear(6, 6), 0.3), nn.ReLU())
    with pytest.raises(ValueError, match=r"StochasticDepth with p=0\.3, which would add"):
        torchdrop.add_stochastic_depth(model, 0.5)
    assert not torchdrop.has_stochastic_depth(model)
    for layer in model.modules():
        if isinstance(layer, torchdrop.StochasticDepth):
            layer.p = 0.0
    assert len(torchdrop.add_stochastic_depth(model, 0.5).blocks) == 4
    # beside each other they have nothing to do with each other
    apart = nn.Sequential(torchdrop.StochasticDepth(nn.Linear(6, 6), 0.3), *stage())
    assert len(torchdrop.add_stochastic_depth(apart, 0.5).blocks) == 2
