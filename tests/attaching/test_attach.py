"""The surgery: what is accepted, what is refused, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import Block, net
from torchdrop.attaching import attach
from zoo import BARELY, assert_same, fingerprint, instance_names, same_randomness

torchvision = pytest.importorskip("torchvision")
models = torchvision.models


def test_an_optimizer_made_before_still_works() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    torchdrop.add_stochastic_depth(model, 0.5)
    model(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_find_residuals_changes_nothing_not_even_random_numbers() -> None:
    model, x = models.resnet18(), torch.randn(2, 3, 64, 64)
    before, names, state = fingerprint(model), instance_names(model), torch.get_rng_state()
    values = copy.deepcopy(model.state_dict())
    torchdrop.find_residuals(model, x)
    assert fingerprint(model) == before
    assert instance_names(model) == names
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_has_stochastic_depth_and_a_plan_of_its_own(copier: str) -> None:
    model = models.resnet18(num_classes=3)
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    if copier == "deepcopy":
        twin = copy.deepcopy(model)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = torch.randn(4, 3, 64, 64)
    with same_randomness():
        expected = model(x)
    with same_randomness():
        assert_same(twin(x), expected)
    plan.set_p(1.0)
    other = torchdrop.get_plan(twin)
    assert other.blocks[-1].p == 0.5
    assert all(r.module is twin.get_submodule(r.name) for r in other.blocks)
    assert max(other.observed().values()) > 0
    torchdrop.remove_stochastic_depth(twin)
    assert torchdrop.has_stochastic_depth(model)
    assert not torchdrop.has_stochastic_depth(twin)


def test_a_copy_of_a_part_does_not_drag_the_model_along() -> None:
    model = models.resnet18()
    torchdrop.add_stochastic_depth(model, 0.5)
    whole, part = len(pickle.dumps(model)), len(pickle.dumps(model.layer1))
    own = sum(p.numel() * 4 for p in model.layer1.parameters())
    assert own < part < 1.3 * own < whole
    assert len(torchdrop.get_plan(copy.deepcopy(model.layer1)).blocks) == 2


def test_a_state_dict_holds_nothing_of_ours_and_loads_with_weights_only() -> None:
    model = models.resnet18()
    keys = list(model.state_dict())
    torchdrop.add_stochastic_depth(model, 0.5)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert list(torch.load(file, weights_only=True)) == keys


def test_masks_of_blocks_not_selected_are_left_alone() -> None:
    model = models.convnext_tiny(stochastic_depth_prob=1.0)
    plan = torchdrop.add_stochastic_depth(
        model, p=0.0, select=lambda r: r.name.startswith("features.1.")
    )
    assert len(plan.blocks) == 3
    kept, dropped = model.features[1][2], model.features[7][2]
    nn.init.ones_(kept.layer_scale), nn.init.ones_(dropped.layer_scale)
    assert not torch.equal(kept(x := torch.randn(2, 96, 8, 8)), x)
    assert_same(dropped(y := torch.randn(2, 768, 2, 2)), y)


def test_example_inputs_that_fail_leave_the_model_as_it_was() -> None:
    model = models.resnet18()
    before, names = fingerprint(model), instance_names(model)
    for given, message in (
        (torch.randn(2, 5, 32, 32), r"a tensor of shape \(2, 5, 32, 32\): RuntimeError"),
        (
            torch.randn(3, 32, 32),
            r"a tensor of shape \(3, 32, 32\): .*the batch dimension included",
        ),
        ({"image": torch.randn(2, 3, 32, 32)}, r"image=a tensor of shape .*: TypeError"),
        (
            (torch.randn(2, 3, 32, 32), 1),
            r"\(a tensor of shape \(2, 3, 32, 32\), a int\): TypeError",
        ),
        ("cat.png", r"a str: .*example_inputs is what the model is called with"),
    ):
        for call in (torchdrop.add_stochastic_depth, torchdrop.find_residuals):
            with pytest.raises(ValueError, match=rf"(?s)called with example_inputs, {message}"):
                call(model, example_inputs=given)
    assert fingerprint(model) == before
    assert instance_names(model) == names


@pytest.mark.parametrize("moment", ["attaching", "a mask", "the example", "reading", "measuring"])
def test_an_interrupt_leaves_the_model_as_it_was(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C: KeyboardInterrupt, which is no Exception."""

    class Masked(Block):
        interrupts = False

        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.drop_path = torchdrop.DropPath(0.3)

        def forward(self, x: Tensor) -> Tensor:
            if self.interrupts and isinstance(x, torch.fx.Proxy) == (moment == "reading"):
                raise KeyboardInterrupt
            return x + self.drop_path(self.b(self.act(self.a(x))))

    model = net(3, block=Masked)
    calls = {"attaching": 2, "a mask": 5}.get(moment, 0)
    real = attach.put_in_slot

    def put_in_slot(*args: Any) -> None:
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise KeyboardInterrupt
        real(*args)

    def measure(*args: Any) -> None:
        assert torchdrop.has_stochastic_depth(model)
        raise KeyboardInterrupt

    if moment in ("attaching", "a mask"):
        monkeypatch.setattr(attach, "put_in_slot", put_in_slot)
    elif moment == "measuring":
        monkeypatch.setattr(attach, "measure_shares", measure)
    else:
        Masked.interrupts = True
    before, names = fingerprint(model), instance_names(model)
    with pytest.raises(KeyboardInterrupt):
        torchdrop.add_stochastic_depth(model, 0.5, example_inputs=torch.randn(2, 6))
    assert fingerprint(model) == before
    assert instance_names(model) == names
    assert torch.is_grad_enabled()
    monkeypatch.undo()
    Masked.interrupts = False
    assert len(torchdrop.add_stochastic_depth(model, 0.5).blocks) == 3


def test_what_is_half_attached_is_taken_off() -> None:
    """An interrupt may come between any two lines."""
    model = net(2)
    names = instance_names(model)
    torchdrop.add_stochastic_depth(model, 0.5)
    del model[0].__dict__["_replicate_for_data_parallel"]
    torchdrop.remove_stochastic_depth(model)
    assert instance_names(model) == names


def test_a_model_on_the_meta_device_and_an_untouched_rng() -> None:
    with torch.device("meta"):
        model = models.resnet18()
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    assert model(torch.empty(4, 3, 64, 64, device="meta")).shape == (4, 1000)
    assert max(plan.observed().values()) > 0


def test_remove_in_the_middle_of_training() -> None:
    model, x = net(), torch.randn(4, 6)
    expected = model(x)
    torchdrop.add_stochastic_depth(model, 0.9)
    model(x).sum().backward()
    assert torchdrop.remove_stochastic_depth(model) is model
    assert_same(model(x), expected)


def test_barely_dropping_runs_the_generated_forward() -> None:
    """The twin of the bit identities: they do compare the generated forward, not the original."""
    model, x = net(2), torch.randn(4, 6)
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY], verify=False)
    site = model[0].__dict__["forward"]
    site.train[0].forward.function = lambda self, site, x: x
    assert_same(model[0](x), x)
