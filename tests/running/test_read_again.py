"""Blocks that are called in several ways: one generated forward for each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.running.forward_slot import occupant_of
from written_blocks import Base, Stack, flat
from zoo import BARELY, assert_same


def test_the_site_knows_the_program_of_each_branch() -> None:
    class Held(Base):
        def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
            x = x + self.f(x) * gain
            return x + self.g(x) * gain

    model, x = Stack(Held(), Held()), flat()
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    block = model.blocks[0]
    for gain in (1.0, 2.0, 3.0, 1.0):
        assert_same(block(x, gain), Held.forward(block, x, gain))
    site = occupant_of(block)
    assert [sorted(p.branches) for p in site.train] == [[0, 1], [2, 3], [4, 5]]  # type: ignore[union-attr]
    assert_same(copy.deepcopy(block)(x, 3.0), Held.forward(block, x, 3.0))


class Switched(Base):
    off = False
    first = True

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return x
        if self.first:
            x = x + self.f(x)
        return x + self.g(x)


def test_a_block_that_is_switched_off_runs_its_own_forward_and_the_plan_says_so() -> None:
    model, x = Stack(Switched(), Switched()).double(), flat().double()
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    model.blocks[1].off = True
    model(x)
    assert torch.equal(model.blocks[1](x), x)
    assert "in calls with self.off = True: not computed" in plan.blocks[1].reason
    model.blocks[1].off = False
    assert not torch.equal(model.blocks[1](x), x)


def test_a_branch_is_known_by_its_modules_where_another_is_left_out() -> None:
    model, x = Stack(Switched(), Switched()).double(), flat().double()
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    block = model.blocks[0]
    block.first = False
    out = block(x)
    weight = torch.zeros(len(x), 1, dtype=x.dtype)
    kept = plan.last_kept()
    assert list(kept) == ["blocks.0:g"], (kept, plan)
    weight[kept["blocks.0:g"]] = 2.0
    torch.testing.assert_close(out, x + weight * block.g(x), rtol=1e-12, atol=1e-12)


def test_a_branch_that_is_used_otherwise_is_refused() -> None:
    class Otherwise(Base):
        alone = False

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x) if self.alone else x + self.f(x)

    model, x = Stack(Otherwise(), Otherwise()), flat()
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    model.blocks[0].alone = True
    with pytest.raises(RuntimeError, match=r"does not add the same branches.*select="):
        model(x)


def test_masks_that_were_asked_for_stay_masks_in_every_kind_of_call() -> None:
    model, x = Stack(Switched(), Switched()), flat()
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", compute="mask")
    rows: list[int] = []
    for block in model.blocks:
        block.first = False
        block.g.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    model(x)
    assert set(rows) == {len(x)}


@pytest.mark.parametrize("scaled", [True, False])
def test_a_drop_path_that_does_not_scale_keeps_its_rule(scaled: bool) -> None:
    class DropPath(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop_prob, self.scale_by_keep = 0.5, scaled

        def forward(self, x: Tensor) -> Tensor:
            return x

    class Dropping(Base):
        def __init__(self) -> None:
            super().__init__()
            self.drop = DropPath()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(self.f(x))

    model, x = Stack(Dropping(), Dropping()).double(), flat().double()
    plan: Any = torchdrop.add_stochastic_depth(model, None)
    block = model.blocks[0]
    out, rows = block(x), plan.last_kept()["blocks.0"]
    gain = 2.0 if scaled else 1.0
    torch.testing.assert_close(out[rows], (x + gain * block.f(x))[rows], rtol=1e-12, atol=1e-12)
    assert ("not divided by 1-p" in plan.blocks[0].reason) == (not scaled)
