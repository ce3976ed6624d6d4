"""The share of each branch in the FLOPs of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import net
from torchdrop.cost import flops

models = pytest.importorskip("torchvision.models")


def _training_step(model: nn.Module, x: torch.Tensor) -> Any:
    def step() -> None:
        model.zero_grad()
        model(x).sum().backward()

    return step


def _resnet() -> nn.Module:
    model: nn.Module = models.ResNet(models.resnet.Bottleneck, [2, 2, 2, 1], num_classes=10)
    return model


def _vision_transformer() -> nn.Module:
    model: nn.Module = models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=6, num_heads=4, hidden_dim=96, mlp_dim=384
    )
    return model


@pytest.mark.parametrize("make", [_resnet, _vision_transformer])
def test_flops_of_training_follow_the_decisions(make: Callable[[], nn.Module]) -> None:
    """Mean of 20 training steps over dense, against the value from ``plan.observed()``."""
    model = make().train()
    step = _training_step(model, torch.randn(6, 3, 32, 32))
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
