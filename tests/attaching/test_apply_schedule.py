"""Rates over training time, on plans and on the layers of the family."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import net
from torchdrop.schedules import over_time

RULE = over_time.ramp(0.0, 0.4)


def rates(plan: torchdrop.Plan) -> list[float]:
    return [block.p for block in plan.blocks]


def test_a_plan_spreads_the_rate_by_its_own_depth_rule() -> None:
    model = net(4)
    plan = torchdrop.add_stochastic_depth(model, 0.0)
    assert torchdrop.apply_schedule(model, RULE, 0.5) == 0.2
    assert rates(plan) == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert torchdrop.apply_schedule(plan, RULE, 1) == 0.4
    assert rates(plan) == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("exponential", [0.0, 0.4 * (2**0.5 - 1), 0.4]),
        (torchdrop.schedules.per_stage([2, 1]), [0.2, 0.2, 0.4]),
        (lambda p, depth: [p, 0.0, p / 2], [0.4, 0.0, 0.2]),
    ],
)
def test_every_rule_over_depth_composes_with_one_over_time(
    schedule: Any, expected: list[float]
) -> None:
    model = net(3)
    plan = torchdrop.add_stochastic_depth(model, 0.1, schedule=schedule)
    torchdrop.apply_schedule(model, RULE, 1.0)
    assert rates(plan) == pytest.approx(expected)
    again = torchdrop.get_plan(copy.deepcopy(model))
    again.set_p(0.4)
    assert rates(again) == pytest.approx(expected)


def test_a_function_for_depth_that_does_not_fit_changes_nothing() -> None:
    model = net(3)
    with pytest.raises(ValueError, match="each of the 3 blocks, but returned 1"):
        torchdrop.add_stochastic_depth(model, 0.1, schedule=lambda p, depth: [p])
    assert not torchdrop.has_stochastic_depth(model)
    with pytest.raises(ValueError, match=r"have 2 blocks, but the model has 3"):
        torchdrop.add_stochastic_depth(model, 0.1, schedule=torchdrop.schedules.per_stage([2]))
    assert not torchdrop.has_stochastic_depth(model)


def test_a_model_with_a_rule_for_stages_pickles() -> None:
    model = net(3)
    torchdrop.add_stochastic_depth(model, 0.1, schedule=torchdrop.schedules.per_stage([2, 1]))
    torchdrop.apply_schedule(model, RULE, 1.0)
    twin = pickle.loads(pickle.dumps(model))
    assert rates(torchdrop.get_plan(twin)) == pytest.approx([0.2, 0.2, 0.4])


LAYERS = [
    torchdrop.DropPath(0.1),
    torchdrop.DropBlock2d(0.1),
    torchdrop.SpatialDropout(0.1),
    torchdrop.GaussianDropout(0.1),
    torchdrop.ShakeDrop(0.1),
    torchdrop.Cutout(4, p=0.1),
    torchdrop.PathDrop(0.1),
    torchdrop.StochasticDepth(nn.Linear(4, 4), 0.1),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_every_layer_of_the_family_gets_the_rate(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), copy.deepcopy(layer))
    torchdrop.apply_schedule(model, RULE, 0.5)
    assert model[1].p == 0.2


def test_all_layers_are_tested() -> None:
    tested = {type(layer).__name__ for layer in LAYERS} | {"UniformDropout"}
    others = {"DropBlock1d", "DropBlock3d"}  # of one class with DropBlock2d
    layers = {n for n in torchdrop.layers.__all__ if isinstance(getattr(torchdrop, n), type)}
    assert {n for n in layers if issubclass(getattr(torchdrop, n), nn.Module)} == tested | others


def test_uniform_dropout_gets_it_as_its_beta() -> None:
    model = nn.Sequential(torchdrop.UniformDropout(0.1))
    torchdrop.apply_schedule(model, RULE, 0.5)
    assert model[0].beta == 0.2


class Masked(nn.Module):
    """A block with a mask of its own, and DropBlock behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.drop_path = torchdrop.DropPath(0.3)
        self.noise = torchdrop.GaussianDropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.noise(x + self.drop_path(self.b(self.a(x).tanh())))
        return out


def test_a_model_with_a_plan_and_layers_gets_both() -> None:
    model = net(2, block=lambda width: Masked())  # type: ignore[arg-type]
    plan = torchdrop.add_stochastic_depth(model, 0.1, schedule="uniform")
    torchdrop.apply_schedule(model, RULE, 0.5)
    assert rates(plan) == [0.2, 0.2]
    assert [block.noise.p for block in model] == [0.2, 0.2]
    assert [block.drop_path.p for block in model] == [0.3, 0.3]  # it rests, the plan drops
    torchdrop.apply_schedule(plan, RULE, 1.0)
    assert [block.noise.p for block in model] == [0.2, 0.2]  # a plan is its blocks alone
    torchdrop.remove_stochastic_depth(model)
    torchdrop.apply_schedule(model, RULE, 0.25)
    assert [block.drop_path.p for block in model] == [0.1, 0.1]


def test_nothing_changes_if_a_layer_refuses_the_rate() -> None:
    model = nn.Sequential(*net(2), torchdrop.DropPath(0.3), torchdrop.GaussianDropout(0.3))
    plan = torchdrop.add_stochastic_depth(model, 0.1, schedule="uniform")
    with pytest.raises(ValueError, match=r"p has to be below 1"):
        torchdrop.apply_schedule(model, over_time.constant(1.0), 0.5)
    assert rates(plan) == [0.1, 0.1]
    assert (model[2].p, model[3].p) == (0.3, 0.3)
    assert "rate over time" not in repr(plan)


def test_nothing_changes_if_the_plan_refuses_the_rate() -> None:
    model = nn.Sequential(*net(2), torchdrop.DropPath(0.3))

    def only_small(p: float, depth: int) -> list[float]:
        return [p] * depth if p < 0.2 else []

    plan = torchdrop.add_stochastic_depth(model, 0.1, schedule=only_small)
    with pytest.raises(ValueError, match="each of the 2 blocks, but returned 0"):
        torchdrop.apply_schedule(model, RULE, 1.0)
    assert rates(plan) == [0.1, 0.1]
    assert model[2].p == 0.3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear(2, 2), RULE, 0.5), ValueError, "no stochastic depth and no layers of"),
        (("model", RULE, 0.5), TypeError, "model"),
        ((net(2), 0.5, 0.5), TypeError, "rule has to be a function of progress, but got 0.5"),
        ((net(2), RULE, 1.5), ValueError, "progress has to be between 0 and 1, such as step"),
        ((net(2), RULE, "0.5"), TypeError, "progress has to be a real number"),
        ((net(2), lambda t: 2.0, 0.5), ValueError, r"rule\(progress\) has to be between 0 and 1"),
        ((net(2), lambda t: None, 0.5), TypeError, r"rule\(progress\) has to be a real number"),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        torchdrop.apply_schedule(*arguments)


def test_the_plan_says_which_rule_sets_the_rates_and_where_it_is() -> None:
    model = net(2)
    plan = torchdrop.add_stochastic_depth(model, 0.1)
    torchdrop.apply_schedule(model, RULE, 1 / 3)
    line = "rate over time: ramp(start=0.0, end=0.4), now at progress 0.3333"
    assert line in repr(plan)
    assert line in repr(torchdrop.get_plan(pickle.loads(pickle.dumps(model))))
    torchdrop.apply_schedule(model, rising, 0.5)
    assert "rate over time: rising, now at progress 0.5" in repr(plan)
    plan.set_p(0.1)
    assert "rate over time" not in repr(plan)


def rising(progress: float) -> float:
    return progress / 2


def test_a_thousand_rates_need_no_more_graphs() -> None:
    model = net(2)
    torchdrop.add_stochastic_depth(model, 0.1)
    seen = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal seen
        seen += 1
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    x, after_a_few = torch.randn(8, 6), 0
    for step in range(1000):
        torchdrop.apply_schedule(model, over_time.ramp(0.05, 0.9), step / 1000)
        compiled(x)
        after_a_few = seen if step == 20 else after_a_few
    assert seen == after_a_few > 0
