"""The plan: rates, what was delivered, and what that saves."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import net
from torchdrop.cost import flops
from zoo import assert_same

models = pytest.importorskip("torchvision.models")


def test_observed_counts_since_the_last_call() -> None:
    model = net(2)
    plan = torchdrop.add_stochastic_depth(model, [0.0, 0.5])
    observed = plan.observed()
    assert observed["0"] == 0.0
    assert math.isnan(observed["1"])
    model(torch.randn(6, 6))
    assert plan.observed() == {"0": 0.0, "1": 0.5}
    assert math.isnan(plan.observed()["1"])
    model.eval()(torch.randn(6, 6))
    assert math.isnan(plan.observed()["1"])


def test_last_kept_is_a_copy() -> None:
    model = net(2)
    plan = torchdrop.add_stochastic_depth(model, [0.5, 1.0])
    assert plan.last_kept() == {}
    model(torch.randn(6, 6))
    plan.last_kept()["0"].zero_()
    assert len(set(plan.last_kept()["0"].tolist())) == 3
    assert len(plan.last_kept()["1"]) == 0


def test_state_dict_goes_round_and_refuses_strangers() -> None:
    plan = torchdrop.add_stochastic_depth(net(3), [0.1, 0.2, 0.3])
    state = plan.state_dict()
    plan.set_p(0.0)
    plan.load_state_dict(state)
    assert [r.p for r in plan.blocks] == [0.1, 0.2, 0.3]
    other = torchdrop.add_stochastic_depth(net(2), 0.5)
    with pytest.raises(ValueError, match="another model: 2 is not in both"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"Plan\.state_dict\(\) returned, of version 1"):
        other.load_state_dict({**state, "version": 2})
    with pytest.raises(ValueError, match="between 0 and 1"):
        plan.load_state_dict({"version": 1, "p": {"0": 0.5, "1": 0.5, "2": 2.0}})
    assert [r.p for r in plan.blocks] == [0.1, 0.2, 0.3]


def test_a_plan_of_what_was_removed_does_not_pretend() -> None:
    model = net(3)
    old = torchdrop.add_stochastic_depth(model, 0.5)
    state = old.state_dict()
    torchdrop.remove_stochastic_depth(model[1])
    for call in (lambda: old.set_p(0.1), lambda: old.load_state_dict(state)):
        with pytest.raises(
            ValueError, match="was removed from the model, from all blocks or from some"
        ):
            call()
    torchdrop.get_plan(model).set_p([0.1, 0.2])
    torchdrop.remove_stochastic_depth(model)
    new = torchdrop.add_stochastic_depth(model, 0.5)
    with pytest.raises(
        ValueError, match=r"torchdrop.get_plan\(model\) returns the plan of what is"
    ):
        old.set_p(0.1)
    new.set_p(0.1)
    assert new.blocks[-1].p == 0.1
    with pytest.raises(ValueError, match="was removed from the model"):
        old.observed()
    model(torch.randn(6, 6))
    torchdrop.remove_stochastic_depth(model)
    assert 0.0 <= new.observed()["2"] <= 1.0  # what was delivered before is still told, once
    with pytest.raises(ValueError, match="was removed from the model"):
        new.observed()


def test_the_table_shows_blocks_branches_rates_and_shares() -> None:
    model = models.vit_b_32(image_size=64)
    plan = torchdrop.add_stochastic_depth(model, 0.2)
    text = repr(plan)
    assert "12 blocks, 24 branches; row mode, exact sampling" in text
    assert "give example_inputs" in text
    torchdrop.remove_stochastic_depth(model)
    x = torch.randn(2, 3, 64, 64)
    plan = torchdrop.add_stochastic_depth(model, 0.2, example_inputs=x)
    text = repr(plan)
    assert "self_attention" in text
    assert "expected FLOPs of a forward pass in training:" in text
    shares = [b.share for r in plan.blocks for b in r.branches]
    assert 0.9 < sum(s for s in shares if s is not None) < 1.0


class Counting(nn.Module):
    """Sets an attribute in its forward, so that it can only be dropped as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x + self.f(x)


@pytest.mark.parametrize(("compute", "expected"), [("skip", "50.0%"), ("mask", "100.0%")])
def test_what_is_masked_saves_no_operations(compute: str, expected: str) -> None:
    model = nn.Sequential(Counting(), Counting())
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", compute=compute, example_inputs=torch.randn(4, 6)
    )
    assert [(b.share, b.action) for r in plan.blocks for b in r.branches] == [
        (0.5, "layer" if compute == "skip" else "mask")
    ] * 2
    assert f"expected FLOPs of a forward pass in training: {expected} of dense" in repr(plan)


def _training_step(model: nn.Module, x: torch.Tensor) -> Any:
    def step() -> None:
        model.zero_grad()
        model(x).sum().backward()

    return step


@pytest.mark.parametrize(
    ("architecture", "options", "size"),
    [("resnet50", {}, 64), ("vit_b_16", {"image_size": 32}, 32)],
)
def test_flops_of_training_follow_the_decisions(
    architecture: str, options: dict[str, Any], size: int
) -> None:
    """Mean of 20 training steps over dense, against the value from ``plan.observed()``."""
    model = getattr(models, architecture)(num_classes=10, **options).train()
    step = _training_step(model, torch.randn(6, 3, size, size))
    dense = flops(step)
    plan = torchdrop.add_stochastic_depth(model, 0.0)
    assert flops(step) == dense
    names = [branch.name for residual in plan.blocks for branch in residual.branches]
    share = {}
    for name in names:  # what each branch alone costs, forward and backward
        plan.set_p({other: float(other == name) for other in names})
        share[name] = 1 - flops(step) / dense
    for mode in ("row", "batch"):
        torchdrop.remove_stochastic_depth(model)
        plan = torchdrop.add_stochastic_depth(model, 0.5, mode=mode)
        measured = sum(flops(step) for _ in range(20)) / 20 / dense
        observed = plan.observed()
        assert measured == pytest.approx(1 - sum(share[n] * observed[n] for n in names), rel=0.01)
        assert measured < 0.9
        # the twin: the value depends on the decisions; with those of dense steps it is 1
        assert measured != pytest.approx(1.0, rel=0.01)


def test_shares_count_attention_that_evaluation_would_fuse() -> None:
    """One rate for attention alone: the estimate has to follow, not only in the sum."""
    model = models.vit_b_32(image_size=64, num_classes=10).train()
    x = torch.randn(2, 3, 64, 64)
    plan = torchdrop.add_stochastic_depth(model, 0.0, example_inputs=x)
    attention = [b for r in plan.blocks for b in r.branches if "attention" in b.name]
    dense = flops(lambda: model(x))
    plan.set_p({b.name: 1.0 for b in attention})
    saved = sum(b.share for b in attention if b.share is not None)
    assert saved > 0.2
    assert flops(lambda: model(x)) / dense == pytest.approx(1 - saved, rel=0.01)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_block_prints_in_one_line() -> None:
    found = torchdrop.find_residuals(models.resnet18())
    assert repr(found[2]) == "<layer2.0 (BasicBlock): 1 branch, projection shortcut, skip, p=0>"


# --- paused ----------------------------------------------------------------------------------


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
        assert all(math.isnan(rate) for rate in plan.observed().values())
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


class Idle(nn.Module):
    """Of two stacks it calls one."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = net(2), net(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x)
        return out


def test_the_plan_says_what_the_example_did_not_reach() -> None:
    shown = str(torchdrop.add_stochastic_depth(Idle(), 0.5, example_inputs=torch.randn(4, 6)))
    (note,) = [line for line in shown.splitlines() if "did not call this branch" in line]
    number = note.partition(" ")[0]
    assert [number in line for line in shown.splitlines()[2:6]] == [False, False, True, True]
    assert "expected FLOPs" in shown
    assert "did not call" not in str(torchdrop.add_stochastic_depth(Idle(), 0.5))


class Around(nn.Module):
    """Calls parts of its blocks, and never their forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = net(2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block.b(block.a(x))
        return x


def test_the_plan_of_blocks_whose_forward_is_never_called_says_so() -> None:
    plan = torchdrop.add_stochastic_depth(Around(), 0.5, example_inputs=torch.randn(4, 6))
    assert "did not call this branch" in str(plan)
    assert "give example_inputs" not in str(plan)


class Masked(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.f, self.drop_path = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), torchdrop.DropPath(p)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop_path(self.f(x))
        return out


def test_the_plan_says_that_other_rates_rest() -> None:
    model = nn.Sequential(Masked(0.05), Masked(0.1))
    plan = torchdrop.add_stochastic_depth(model, 0.2)
    assert "own drop path layers (rates up to 0.1) are inactive, p replaces their rates" in str(
        plan
    )
    plan.set_p(None)
    assert "rests" not in str(plan)
    assert "rests" not in str(torchdrop.add_stochastic_depth(net(2), 0.2))


def test_the_plan_says_that_it_rests_or_is_gone() -> None:
    model = net(2)
    plan = torchdrop.add_stochastic_depth(model, 0.2)
    with torchdrop.paused(model):
        assert str(plan).endswith("paused: nothing is dropped now")
    assert "paused" not in str(plan)
    assert "removed" not in str(plan)
    torchdrop.remove_stochastic_depth(model)
    assert "removed from the model" in str(plan)
