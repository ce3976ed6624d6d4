"""Pauses: nothing is dropped, they nest, and they end."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import torchdrop
from small_nets import net
from zoo import assert_same

models = pytest.importorskip("torchvision.models")


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", ["train", "eval"])
def test_nothing_acts_in_a_pause(mode: str, training: bool, scale: str) -> None:
    model, x = net(3), torch.randn(6, 6)
    dense = copy.deepcopy(model).train(training)
    plan = torchdrop.add_stochastic_depth(model.train(training), [0.5] * 3, mode=mode, scale=scale)
    state = torch.get_rng_state()
    with torchdrop.paused(model):
        assert_same(model(x), dense(x))
        assert plan.observed() == {}
        assert plan.last_kept() == {}
    assert torch.equal(torch.get_rng_state(), state)
    # the twin: outside of it something does act
    assert torch.equal(model(x), dense(x)) == (not training and scale == "train")
    assert [r.p for r in plan.blocks] == [0.5] * 3


def test_pauses_nest_and_end_whatever_happens() -> None:
    model, x = net(2), torch.randn(6, 6)
    plan = torchdrop.add_stochastic_depth(model, [1.0, 1.0])
    expected = model(x)
    with torchdrop.paused(model):
        with pytest.raises(ZeroDivisionError), torchdrop.paused(model[0]):
            raise ZeroDivisionError
        plan.set_p([0.5, 1.0])  # wakes nothing before the end
        assert not torch.equal(model(x), expected)
        assert plan.last_kept()["0"].numel() == 0
    model(x)
    assert plan.last_kept()["0"].numel() == 3
    with torchdrop.paused(model):
        plan.set_p(0.0)
    model(x)
    assert plan.last_kept()["0"].numel() == 3


def test_a_part_can_be_paused_alone() -> None:
    model, x = net(2), torch.randn(6, 6)
    plan = torchdrop.add_stochastic_depth(model, [1.0, 1.0])
    with torchdrop.paused(model[1]):
        model(x)
    assert list(plan.last_kept()) == ["0"]
    with (
        pytest.raises(ValueError, match=r"this Linear has no stochastic depth.*add_stochastic"),
        torchdrop.paused(model[0].a),
    ):
        pass


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_in_a_pause_is_not_paused(copier: Any) -> None:
    model, x = net(2), torch.randn(6, 6)
    torchdrop.add_stochastic_depth(model, [1.0, 1.0])
    expected = model(x)
    with torchdrop.paused(model):
        assert not torch.equal(model(x), expected)
        twin = copier(model)
        assert_same(twin(x), expected)
    assert_same(model(x), expected)
    # nor does it count the pause: a rate that is set acts
    plan = torchdrop.get_plan(twin)
    assert "paused" not in repr(plan)
    plan.set_p([0.0, 1.0])
    assert_same(twin(x), type(model[0]).forward(model[0], x))


def test_removing_in_a_pause() -> None:
    model, x = net(2), torch.randn(6, 6)
    dense = model(x)
    torchdrop.add_stochastic_depth(model, [1.0, 1.0])
    with torchdrop.paused(model):
        torchdrop.remove_stochastic_depth(model)
    assert_same(model(x), dense)
    torchdrop.add_stochastic_depth(model, [1.0, 1.0])
    assert not torch.equal(model(x), dense)
