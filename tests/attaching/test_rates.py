"""The rates of branches from the forms of ``p``, for blocks of two branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import net
from zoo import assert_same, fingerprint, instance_names

torchvision = pytest.importorskip("torchvision")


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.mlp = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


def rates(plan: torchdrop.Plan) -> list[list[float]]:
    return [[branch.p for branch in block.branches] for block in plan.blocks]


def model() -> nn.Module:
    return nn.Sequential(TwoBranches(), TwoBranches())


def test_a_rule_counts_blocks_not_branches() -> None:
    assert rates(torchdrop.add_stochastic_depth(model(), 0.4)) == [[0.2, 0.2], [0.4, 0.4]]
    plan = torchdrop.add_stochastic_depth(model(), 0.4, schedule="linear_from_zero")
    assert rates(plan) == [[0.0, 0.0], [0.4, 0.4]]


def test_a_sequence_has_a_rate_for_each_block() -> None:
    assert rates(torchdrop.add_stochastic_depth(model(), [0.1, 0.3])) == [[0.1, 0.1], [0.3, 0.3]]
    with pytest.raises(ValueError, match="expected 2, but got 4"):
        torchdrop.add_stochastic_depth(model(), [0.1, 0.1, 0.3, 0.3])


def test_the_rate_of_a_branch_goes_before_that_of_its_block() -> None:
    plan = torchdrop.add_stochastic_depth(model(), {"1": 0.2, "1:mlp": 0.5})
    assert rates(plan) == [[0.0, 0.0], [0.2, 0.5]]
    plan.set_p({"0:attn": 0.3})
    assert rates(plan) == [[0.3, 0.0], [0.2, 0.5]]


models = torchvision.models


def test_rates_are_inherited_and_the_layers_own_masks_rest() -> None:
    model = models.convnext_tiny(stochastic_depth_prob=0.4)
    inherited = [m.p for m in model.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    plan = torchdrop.add_stochastic_depth(model, p=None)
    assert [r.p for r in plan.blocks] == inherited
    # Were both at work, a kept row of the deepest block would still be zeroed at times.
    block, x = plan.blocks[-1].module, torch.randn(32, 768, 4, 4)
    nn.init.ones_(block.layer_scale)
    with torch.no_grad():
        for _ in range(5):
            changed = (block(x) != x).flatten(1).any(1).nonzero().flatten()
            assert torch.equal(changed, plan.last_kept()[plan.blocks[-1].name])


def test_a_given_rate_overrides_and_zero_means_zero() -> None:
    model = models.convnext_tiny(stochastic_depth_prob=0.9)
    plan = torchdrop.add_stochastic_depth(model, p=0.5, schedule="uniform")
    assert {r.p for r in plan.blocks} == {0.5}
    plan.set_p(0.0)
    x = torch.randn(4, 3, 32, 32)
    assert_same(model.train()(x), model.eval()(x))
    plan.set_p(None)
    assert plan.blocks[-1].p == 0.9
    torchdrop.remove_stochastic_depth(model)
    assert not torch.equal(model.train()(x), model.eval()(x))


def test_nothing_to_inherit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"p=None uses the rates of.*has none.*give p"):
        torchdrop.add_stochastic_depth(models.resnet18(), p=None)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.1, 0.2, 0.3]),
        ("linear_from_zero", [0.0, 0.15, 0.3]),
        ("uniform", [0.3, 0.3, 0.3]),
    ],
)
def test_depth_rules(schedule: str, expected: list[float]) -> None:
    plan = torchdrop.add_stochastic_depth(net(), 0.3, schedule=schedule)
    assert [r.p for r in plan.blocks] == pytest.approx(expected, abs=1e-15)


def test_a_sequence_and_a_mapping() -> None:
    model = net()
    plan = torchdrop.add_stochastic_depth(model, [0.1, 0, 1])
    assert [r.p for r in plan.blocks] == [0.1, 0.0, 1.0]
    plan.set_p({"1": 0.5})
    assert [r.p for r in plan.blocks] == [0.1, 0.5, 1.0]
    torchdrop.remove_stochastic_depth(model)
    plan = torchdrop.add_stochastic_depth(model, {"2": 0.5})
    assert [r.p for r in plan.blocks] == [0.0, 0.0, 0.5]


def test_branches_of_a_block_share_its_rate_or_are_named() -> None:
    plan = torchdrop.add_stochastic_depth(models.vit_b_32(image_size=32), 0.24)
    assert [r.p for r in plan.blocks] == pytest.approx([0.02 * i for i in range(1, 13)])
    assert all(b.p == r.p for r in plan.blocks for b in r.branches)
    first = plan.blocks[0]
    assert [b.name for b in first.branches] == [
        f"{first.name}:self_attention",
        f"{first.name}:mlp",
    ]
    plan.set_p({first.branches[1].name: 0.75})
    assert [b.p for b in plan.blocks[0].branches] == pytest.approx([0.02, 0.75])


BAD_RATES: list[tuple[Any, type[Exception], str]] = [
    (float("nan"), ValueError, "between 0 and 1"),
    (1.5, ValueError, "between 0 and 1, but got 1.5"),
    (-0.1, ValueError, "between 0 and 1"),
    (float("inf"), ValueError, "between 0 and 1"),
    (True, TypeError, "real number between 0 and 1"),
    ("0.2", TypeError, "real number between 0 and 1"),
    (0.2 + 0j, TypeError, "real number"),
    (torch.tensor(0.2), TypeError, r"tensor; use \.item"),
    ([0.1, 0.2], ValueError, "expected 3, but got 2"),
    ([0.1, 0.2, 3.0], ValueError, r"p\[2\]"),
    ([0.1, None, 0.3], TypeError, r"p\[1\]"),
    ({}, ValueError, "names no block, so that nothing would be dropped; .*'2': 0.2.*p=0.0"),
    ({"layer9": 0.1}, ValueError, "'layer9'.*not a block.*its blocks are '0', '1'"),
    ({"1x": 0.1}, ValueError, "did you mean '1'"),
    ({"1": float("nan")}, ValueError, r"p\['1'\]"),
]


@pytest.mark.parametrize(("p", "error", "message"), BAD_RATES)
def test_bad_rates_change_nothing(p: Any, error: type[Exception], message: str) -> None:
    model = net()
    before, names = fingerprint(model), instance_names(model)
    with pytest.raises(error, match=message):
        torchdrop.add_stochastic_depth(model, p)
    assert fingerprint(model) == before
    assert instance_names(model) == names
    plan = torchdrop.add_stochastic_depth(model, [0.1, 0.2, 0.3])
    with pytest.raises(error, match=message):
        plan.set_p(p)
    assert [r.p for r in plan.blocks] == [0.1, 0.2, 0.3]
